"""What probes are given and what they give: batches of held-out text as a model saw them, and rows
for the tables.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainables import corpus
from trainables.heads import LinearHead, TokenStats, token_stats
from trainables.recorder import Recorder


class Text(NamedTuple):
    """What is known of the text that models are measured on."""

    unigram: Tensor
    """V log-probabilities, from the training text."""
    bytes_per_token: dict[str, float]
    """By split."""


def text(shards: corpus.Corpus, device: torch.device) -> Text:
    """The same of a tokenised corpus."""
    unigram = torch.from_numpy(shards.unigram()).float().to(device)
    ratio = {split: shards.bytes[split] / shards.tokens[split] for split in shards.tokens}
    held_out = ratio["held_out"]
    by_split = {"held_out": held_out, "selection": held_out, "seen": ratio["train"]}
    return Text(unigram, by_split)


@dataclass(frozen=True)
class Batch:
    """One evaluation batch as the model saw it."""

    split: str
    blocks: list[int]
    """Index of each sequence in its split."""
    hidden: Tensor
    """blocks x sequence x d, after the final norm: what the head sees."""
    labels: Tensor
    """blocks x sequence."""
    stats: TokenStats
    """Each blocks x sequence."""
    inner: dict[int, Tensor]
    """The same of layers before the last, where they were asked for: 0 is the embedding."""


def see(
    head: LinearHead,
    split: str,
    blocks: list[int],
    hidden: Tensor,
    labels: Tensor,
    inner: dict[int, Tensor] | None = None,
) -> Batch:
    """The batch of these hidden states (blocks x sequence x d) and labels under a head."""
    flat = token_stats(head, hidden.flatten(0, 1), labels.flatten())
    stats = TokenStats(*(s.view(labels.shape) for s in flat))
    return Batch(split, blocks, hidden, labels, stats, inner or {})


def inner(states: Any, wanted: str) -> dict[int, Tensor]:
    """Of a model's hidden states, embedding first and the last after the final norm, those before
    the last, where all are `wanted`."""
    return dict(enumerate(states[:-1])) if wanted == "all" else {}


@dataclass
class Found:
    """Rows for the tables, without the columns that all of a measurement share."""

    scalars: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    spectra: list[dict[str, Any]] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        """Whether the loss of every block is a number."""
        return all(math.isfinite(row["loss"]) for row in self.blocks)

    def record(self, recorder: Recorder, step: int) -> None:
        """Hand all of it on, for the tables."""
        for scalar in self.scalars:
            recorder.scalar(step, **scalar)
        for table in ("blocks", "spectra"):
            for row in getattr(self, table):
                recorder.add(table, step, row)

    def scalar(
        self,
        metric: str,
        value: float,
        split: str = "",
        stderr: float | None = None,
        layer: int | None = None,
    ) -> None:
        row = {"metric": metric, "split": split, "layer": layer, "value": value, "stderr": stderr}
        self.scalars.append(row)
