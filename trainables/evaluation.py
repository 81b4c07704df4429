"""What heads on frozen hidden states are judged by: held-out blocks, the same for all heads, and
the model's own head, whole and truncated.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from analysis import spectrum
from trainables import corpus, findings, heads, probes
from trainables.features import Features
from trainables.heads import LinearHead
from trainables.recorder import Recorder

MOMENT_TOKENS = 16  # for each of d: of training text, for the second moment of hidden states


class Evaluation:
    """Measures heads; keeps the hidden states that it measures them on."""

    def __init__(self, states: Features, wanted: dict[str, Any], size: int) -> None:
        """wanted: the grid's `probes`; size: blocks that go through the backbone at once."""
        self.states, self.wanted, self.size = states, wanted, size
        self.text = findings.text(states.text, states.backbone.device)
        self.samples: dict[bool, list[tuple[str, list[int], Tensor, Tensor]]] = {}

    @torch.no_grad()
    def measure(
        self, head: LinearHead, recorder: Recorder, step: int, kinds: Any, last: bool
    ) -> bool:
        """Record what the probes find; whether all losses are finite. `last`: on more blocks."""
        found = probes.measure(head, self._batches(head, last), self.text, kinds)
        found.record(recorder, step)
        return found.finite

    def _batches(self, head: LinearHead, last: bool) -> Iterator[findings.Batch]:
        for part in self._sample(last):
            yield findings.see(head, *part)

    def _sample(self, last: bool) -> list[tuple[str, list[int], Tensor, Tensor]]:
        """Blocks to choose a learning rate by (selection) and blocks to report (held_out)."""
        if last not in self.samples:
            tokens = self.wanted["final_tokens" if last else "tokens"]
            shard, sequence = self.states.text.shard("held_out"), self.states.sequence
            samples = corpus.halves(shard, sequence, tokens)
            self.samples[last] = [
                (split, part, *self.states.both("held_out", part))
                for split, sample in zip(("selection", "held_out"), samples, strict=True)
                for part in parts(sample, self.size)
            ]
        return self.samples[last]

    def baseline(self, kind: str, rank: int) -> LinearHead:
        """The model's own head, or its best rank-r head: svd, svd-weighted."""
        own = self.states.backbone
        if kind == "own":
            return heads.Fixed(own.weight, None, own.bias)
        out, down = self.weighted if kind == "svd-weighted" else self.plain
        return heads.Fixed(out[:, :rank].float(), down[:rank].float(), own.bias)

    @functools.cached_property
    def plain(self) -> tuple[Tensor, Tensor]:
        """Factors of the model's own head, for every rank: see `spectrum.truncation`."""
        return spectrum.truncation(self.states.backbone.weight)

    @functools.cached_property
    def weighted(self) -> tuple[Tensor, Tensor]:
        """The same, weighted by what hidden states look like on the first of the training text."""
        weight, sequence = self.states.backbone.weight, self.states.sequence
        shard, d = self.states.text.shard("train"), weight.shape[1]
        wanted = math.ceil(max(MOMENT_TOKENS * d, 8192) / sequence)
        count = min(corpus.blocks(shard, sequence), wanted)
        moment = torch.zeros(d, d, dtype=torch.float64, device=weight.device)
        for part in parts(corpus.batch_blocks(shard, sequence, count, 0, 0), self.size):
            hidden = self.states.both("train", part)[0].flatten(0, 1).double()
            moment += hidden.T @ hidden
        return spectrum.truncation(weight, moment / (count * sequence))


def parts(blocks: list[int], size: int) -> Iterator[list[int]]:
    """In order, `size` at a time."""
    for start in range(0, len(blocks), size):
        yield blocks[start : start + size]
