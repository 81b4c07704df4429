"""What is measured at a checkpoint.

A probe is a class made for one measurement: it sees every evaluation batch once, streaming, and
then says what it found. `PROBES` is all there is to register one.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from analysis import geometry, spectrum
from trainables import engine
from trainables.heads import LinearHead, TokenStats, token_stats
from trainables.recorder import Recorder


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


def see(head: LinearHead, split: str, blocks: list[int], hidden: Tensor, labels: Tensor) -> Batch:
    """The batch of these hidden states (blocks x sequence x d) and labels under a head."""
    flat = token_stats(head, hidden.flatten(0, 1), labels.flatten())
    stats = TokenStats(*(s.view(labels.shape) for s in flat))
    return Batch(split, blocks, hidden, labels, stats)


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


class Loss:
    """Loss (nats per token) and accuracy by split, each with the standard error of its mean over
    blocks, for tokens of one block are not independent; and the loss of every block."""

    def __init__(self, unigram: Tensor) -> None:
        self.unigram = unigram
        self.seen: dict[str, dict[str, list[Tensor]]] = {}
        self.blocks: dict[str, list[int]] = {}

    def update(self, batch: Batch) -> None:
        means = {
            "loss": batch.stats.loss.double().mean(1),
            "accuracy": batch.stats.correct.double().mean(1),
            "unigram_loss": -self.unigram[batch.labels].double().mean(1),
        }
        parts = self.seen.setdefault(batch.split, {metric: [] for metric in means})
        for metric, mean in means.items():
            parts[metric].append(mean.cpu())
        self.blocks.setdefault(batch.split, []).extend(batch.blocks)

    def found(self, head: LinearHead) -> Found:
        found = Found()
        for split, parts in self.seen.items():
            for metric, values in parts.items():
                means = torch.cat(values)
                stderr = float(means.std() / len(means) ** 0.5) if len(means) > 1 else None
                found.scalar(metric, float(means.mean()), split, stderr)
            losses = torch.cat(parts["loss"]).tolist()
            found.blocks += [
                {"split": split, "block": block, "loss": loss}
                for block, loss in zip(self.blocks[split], losses, strict=True)
            ]
        return found


class LastLayer:
    """Anisotropy of what the head sees, on held-out text: over all pairs of tokens, between
    blocks, and of first positions alone, which attend to nothing but themselves."""

    def __init__(self, unigram: Tensor) -> None:
        self.sums: dict[str, list[Tensor]] = {"all": [], "first": [], "rest": []}
        self.counts: dict[str, list[int]] = {"all": [], "first": [], "rest": []}

    def update(self, batch: Batch) -> None:
        if batch.split != "held_out":
            return
        for block in batch.hidden:
            for part, states in {"all": block, "first": block[:1], "rest": block[1:]}.items():
                total, count = geometry.unit_sum(states)
                self.sums[part].append(total.cpu())
                self.counts[part].append(count)

    def found(self, head: LinearHead) -> Found:
        found = Found()
        if len(self.sums["all"]) < 3:
            return found
        all_, first, rest = (
            geometry.anisotropy(torch.stack(self.sums[part]), torch.tensor(self.counts[part]))
            for part in ("all", "first", "rest")
        )
        found.scalar("anisotropy", all_.all_pairs, "held_out", layer=-1)
        found.scalar("anisotropy_between", rest.between, "held_out", rest.stderr, layer=-1)
        found.scalar("anisotropy_first", first.between, "held_out", first.stderr, layer=-1)
        return found


class HeadSpectrum:
    """Singular values of the head as it acts (W, or A B), and its singular entropy: over all
    min(V, d) values, over the rank it can reach, and with the vocabulary mean taken away."""

    def __init__(self, unigram: Tensor) -> None:
        pass

    def update(self, batch: Batch) -> None:
        pass

    def found(self, head: LinearHead) -> Found:
        found = Found()
        out, down = head.factors()
        if not all(p.isfinite().all() for p in head.parameters()):
            return found  # the trial has diverged
        sigma = spectrum.singular_values(out, down)
        if sigma[0] == 0:
            return found  # a head that starts at zero has no spectrum yet
        centred = spectrum.singular_values(out, down, centred=True)
        reachable = len(sigma) if down is None else down.shape[0]
        found.scalar("singular_entropy", spectrum.singular_entropy(sigma))
        found.scalar("singular_entropy_rank", spectrum.singular_entropy(sigma[:reachable]))
        found.scalar("singular_entropy_centred", spectrum.singular_entropy(centred))
        found.spectra = [
            {"matrix": "head", "index": i, "sigma": s} for i, s in enumerate(sigma.tolist())
        ]
        return found


class AchievedRank:
    """Rank of the log-probability matrix of 2 d held-out tokens, in float64, centred over the
    vocabulary (a linear head of rank r reaches at most r, and is given 2 r; heads of the zoo may
    pass it)."""

    def __init__(self, unigram: Tensor) -> None:
        self.states: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        if batch.split == "held_out":
            states = batch.hidden.flatten(0, 1)
            missing = 2 * states.shape[1] - sum(map(len, self.states))
            self.states.append(states[: max(0, missing)])

    def found(self, head: LinearHead) -> Found:
        found = Found()
        exact, states = copy.deepcopy(head).double(), torch.cat(self.states).double()
        if type(head) is LinearHead and head.B is not None:
            states = states[: 2 * len(head.B)]
        # Not its call, which would wake ZeRO-3.
        parts = [exact.logits(part).log_softmax(-1) for part in states.split(128)]
        log_probs = torch.cat(parts)
        if log_probs.isfinite().all():
            centred = log_probs - log_probs.mean(-1, keepdim=True)
            found.scalar("achieved_rank", spectrum.numerical_rank(centred.T), "held_out")
        return found


PROBES = (Loss, LastLayer, HeadSpectrum, AchievedRank)


def measure(
    head: LinearHead, batches: Iterable[Batch], unigram: Tensor, kinds: Iterable[Any] = PROBES
) -> Found:
    """Run every probe over the batches, each batch once. unigram: V log-probabilities."""
    probes = [probe(unigram) for probe in kinds]
    for batch in batches:
        for probe in probes:
            probe.update(batch)
    merged = Found()
    # Only now: ZeRO-3 shards the head again after each of its calls.
    with engine.gathered(head):
        for probe in probes:
            found = probe.found(head)
            merged.scalars += found.scalars
            merged.blocks += found.blocks
            merged.spectra += found.spectra
    return merged
