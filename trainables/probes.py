"""What is measured at a checkpoint.

A probe is a class made for one measurement: it sees every evaluation batch once, streaming, and
then says what it found. `PROBES` is all there is to register one.
"""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis import geometry, spectrum
from trainables import engine
from trainables.findings import Batch, Found, Text
from trainables.heads import Fixed, LinearHead, LowRankBackward

DECILES = 10
SURVIVAL_TOKENS, SURVIVAL_BLOCKS = 1024, 16


class Loss:
    """Loss (nats per token), accuracy and more by split, each with the standard error of its mean
    over blocks, for tokens of one block are not independent; and the loss of every block."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self.seen: dict[str, dict[str, list[Tensor]]] = {}
        self.blocks: dict[str, list[int]] = {}

    def update(self, batch: Batch) -> None:
        means = {
            "loss": batch.stats.loss,
            "accuracy": batch.stats.correct,
            "entropy": batch.stats.entropy,
            "unigram_loss": -self.text.unigram[batch.labels],
        }
        parts = self.seen.setdefault(batch.split, {metric: [] for metric in means})
        for metric, each in means.items():
            parts[metric].append(each.double().mean(1).cpu())
        self.blocks.setdefault(batch.split, []).extend(batch.blocks)

    def found(self, head: LinearHead) -> Found:
        found = Found()
        for split, parts in self.seen.items():
            for metric, values in parts.items():
                means = torch.cat(values)
                mean = float(means.mean())
                stderr = float(means.std() / len(means) ** 0.5) if len(means) > 1 else None
                found.scalar(metric, mean, split, stderr)
                if metric == "loss" and mean < 700:
                    more = {
                        "perplexity": (math.exp(mean), math.exp(mean)),
                        "bits_per_byte": self._bits(mean, split),
                    }
                    for name, (value, slope) in more.items():
                        error = None if stderr is None else slope * stderr
                        found.scalar(name, value, split, error)
            losses = torch.cat(parts["loss"]).tolist()
            found.blocks += [
                {"split": split, "block": block, "loss": loss}
                for block, loss in zip(self.blocks[split], losses, strict=True)
            ]
        return found

    def _bits(self, loss: float, split: str) -> tuple[float, float]:
        """Bits per byte, and by how much they rise with the loss."""
        slope = 1 / (math.log(2) * self.text.bytes_per_token[split])
        return loss * slope, slope


class Deciles:
    """Held-out loss by how frequent the token is: the training text's tokens, most frequent first,
    cut into tenths of running text. A decile's error is a delete-one-block jackknife."""

    def __init__(self, text: Text) -> None:
        order = text.unigram.argsort(descending=True)
        p = text.unigram.double()[order].exp()
        at = (DECILES * (p.cumsum(0) - p / 2)).long().clamp(max=DECILES - 1)
        self.decile = torch.empty_like(at)
        self.decile[order] = at
        self.sums: list[Tensor] = []
        self.counts: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        if batch.split != "held_out":
            return
        one_hot = F.one_hot(self.decile[batch.labels], DECILES).double()
        self.counts.append(one_hot.sum(1).cpu())
        self.sums.append((one_hot * batch.stats.loss.double().unsqueeze(-1)).sum(1).cpu())

    def found(self, head: LinearHead) -> Found:
        found = Found()
        sums, counts = torch.cat(self.sums), torch.cat(self.counts)
        for decile in range(DECILES):
            own, n = sums[:, decile], counts[:, decile]
            if n.sum() > n.max():  # in two blocks or more
                stderr = _jackknife_ratio(own, n)
                value = (own.sum() / n.sum()).item()
                found.scalar(f"loss_decile_{decile}", value, "held_out", stderr)
        return found


class Layers:
    """How hidden states lie in their space, on held-out text, layer by layer (-1 is what the head
    sees); and the functional spectrum, of the logits that a linear head makes of them."""

    def __init__(self, text: Text) -> None:
        self.states: dict[int, geometry.States] = {}

    def update(self, batch: Batch) -> None:
        if batch.split != "held_out":
            return
        for layer, hidden in {**batch.inner, -1: batch.hidden}.items():
            if layer not in self.states:
                self.states[layer] = geometry.States(hidden.shape[-1], hidden.device)
            self.states[layer].update(hidden)

    def found(self, head: LinearHead) -> Found:
        found = Found()
        for layer, states in self.states.items():
            if states.blocks < 3 or not states.moments.isfinite().all():
                continue
            estimates = geometry.anisotropy(states) | geometry.dimensions(states)
            for metric, (value, stderr) in estimates.items():
                if math.isfinite(value):
                    found.scalar(metric, value, "held_out", stderr, layer)
            if layer == -1 and is_linear(head) and _is_finite(head):
                reduced = spectrum.reduce(*head.factors())
                sigma = spectrum.functional(reduced.centred, geometry.covariance(states))
                beyond = min(reduced.shape) - len(sigma)  # the rank of a factored head
                _spectrum(found, "functional", F.pad(sigma, (0, beyond)))
        return found


class HeadSpectrum:
    """Singular values of the head as it acts (W, or A B), whole and with the vocabulary mean taken
    away, and what is made of them; of the whole also over the rank that it can reach."""

    def __init__(self, text: Text | None = None) -> None:
        self.text = text

    def update(self, batch: Batch) -> None:
        pass

    def found(self, head: LinearHead) -> Found:
        found = Found()
        out, down = head.factors()
        if not _is_finite(head):
            return found  # the trial has diverged
        reduced = spectrum.reduce(out, down)
        sigma = spectrum.values(reduced.whole, reduced.shape)
        if sigma[0] == 0:
            return found  # a head that starts at zero has no spectrum yet
        reachable = len(sigma) if down is None else down.shape[0]
        _spectrum(found, "head", sigma)
        _spectrum(found, "head_centred", spectrum.values(reduced.centred, reduced.shape))
        found.scalar("singular_entropy_rank", spectrum.singular_entropy(sigma[:reachable]))
        if self.text is not None:
            # Rows that pad the vocabulary are of tokens as frequent as any that never occurs.
            known = self.text.unigram
            logs = F.pad(known, (0, len(out) - len(known)), value=known.min().item())
            share = spectrum.frequency(reduced, out, down, logs)
            found.scalar("frequency_share", share.share)
            for name, values in (("", share.raw), ("_centred", share.centred)):
                for i, value in enumerate(values):
                    found.scalar(f"frequency_correlation{name}_{i}", value)
        return found


class AchievedRank:
    """Rank of the log-probability matrix of 2 d held-out tokens, in float64, centred over the
    vocabulary (a linear head of rank r reaches at most r, and is given 2 r; heads of the zoo may
    pass it)."""

    def __init__(self, text: Text) -> None:
        self.states: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        states = batch.hidden.flatten(0, 1)
        missing = 2 * states.shape[1] - sum(map(len, self.states))
        if batch.split == "held_out" and missing > 0:
            self.states.append(states[:missing].clone())  # a view would keep the whole batch

    def found(self, head: LinearHead) -> Found:
        found = Found()
        if not _is_finite(head):
            return found
        states = torch.cat(self.states).double()
        centred = _linear_logs(head, states) if is_linear(head) else _logs(head, states)
        if centred.isfinite().all():
            found.scalar("achieved_rank", spectrum.numerical_rank(centred), "held_out")
        return found


def _logs(head: LinearHead, states: Tensor) -> Tensor:
    """V x n log-probabilities, centred."""
    exact = copy.deepcopy(head).double()
    # Not its call, which would wake ZeRO-3.
    parts = [exact.logits(part).log_softmax(-1) for part in states.split(128)]
    logs = torch.cat(parts)
    return (logs - logs.mean(-1, keepdim=True)).T


def _linear_logs(head: LinearHead, states: Tensor) -> Tensor:
    """d x n with the singular values of the centred log-probabilities, which are W_c h + b_c."""
    out, down = head.factors()
    if down is not None:
        states = states[: 2 * len(down)] @ down.double().T
    if (bias := getattr(head, "bias", None)) is not None:
        out = torch.cat([out.double(), bias.double()[:, None]], 1)
        states = F.pad(states, (0, 1), value=1.0)
    return spectrum.reduce(out).centred @ states.T


class GradientSurvival:
    """The share of the energy of the logits' gradient that lies in the head's column space, all
    that reaches the backbone: over some held-out tokens of some blocks, with a delete-one-block
    jackknife."""

    def __init__(self, text: Text) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []

    def update(self, batch: Batch) -> None:
        if batch.split == "held_out":
            every = -(-batch.labels.shape[1] * SURVIVAL_BLOCKS // SURVIVAL_TOKENS)
            for hidden, labels in zip(batch.hidden, batch.labels, strict=True):
                if len(self.parts) < SURVIVAL_BLOCKS:
                    self.parts.append((hidden[::every].clone(), labels[::every]))

    def found(self, head: LinearHead) -> Found:
        found = Found()
        if not is_linear(head) or not _is_finite(head) or len(self.parts) < 2:
            return found
        out, pulled, energies = head.factors()[0].double(), [], []
        hidden, labels = (torch.cat(part) for part in zip(*self.parts, strict=True))
        for h, y in zip(hidden.split(256), labels.split(256), strict=True):
            gradient = head.logits(h).double().softmax(-1)
            gradient[torch.arange(len(y)), y] -= 1
            pulled.append(gradient @ out)
            energies.append(gradient.square().sum(-1))
        kept = spectrum.survival(spectrum.triangle(out), torch.cat(pulled))
        both = torch.stack([kept, torch.cat(energies)])
        left, whole = both.view(2, len(self.parts), -1).sum(2).cpu()
        if whole.sum() > 0:
            stderr = _jackknife_ratio(left, whole)
            found.scalar("gradient_survival", (left.sum() / whole.sum()).item(), "held_out", stderr)
        return found


def _spectrum(found: Found, matrix: str, sigma: Tensor) -> None:
    """A matrix's singular values, and what is made of them; nothing of one that is all zero."""
    found.spectra += [
        {"matrix": matrix, "index": i, "sigma": s} for i, s in enumerate(sigma.tolist())
    ]
    if sigma[0] == 0:
        return
    suffix = matrix.removeprefix("head").strip("_")
    suffix = f"_{suffix}" if suffix else ""
    found.scalar(f"singular_entropy{suffix}", spectrum.singular_entropy(sigma))
    found.scalar(f"singular_entropy_1{suffix}", spectrum.singular_entropy(sigma, power=1))
    found.scalar(f"effective_rank{suffix}", spectrum.effective_rank(sigma))
    found.scalar(f"stable_rank{suffix}", spectrum.stable_rank(sigma))
    found.scalar(f"spectral_rank{suffix}", spectrum.spectral_rank(sigma))
    found.scalar(f"participation_ratio{suffix}", spectrum.participation_ratio(sigma))
    above = sigma[sigma > 0]  # a factored head has zeros beyond its rank
    if matrix != "functional":  # a layer norm leaves states no variance in one direction
        found.scalar(f"condition_number{suffix}", spectrum.condition_number(above))
    if len(above.unique()) >= 3:
        law = spectrum.exponent(sigma)
        found.scalar(f"exponent{suffix}", law.alpha, stderr=law.stderr)


def is_linear(head: LinearHead) -> bool:
    """Whether its log-probabilities are W h + b, but for a number each."""
    return type(head) in (LinearHead, LowRankBackward, Fixed)


def _is_finite(head: LinearHead) -> bool:
    return all(bool(w.isfinite().all()) for w in head.factors() if w is not None)


def _jackknife_ratio(above: Tensor, below: Tensor) -> float:
    """Standard error of sum(above) / sum(below), leaving one block out at a time."""
    without = (above.sum() - above) / (below.sum() - below)
    k = len(without)
    return math.sqrt((without - without.mean()).square().sum().item() * (k - 1) / k)


PROBES = (Loss, Deciles, Layers, HeadSpectrum, AchievedRank, GradientSurvival)


def measure(
    head: LinearHead, batches: Iterable[Batch], text: Text, kinds: Iterable[Any] = PROBES
) -> Found:
    """Run every probe over the batches, each batch once."""
    probes = [probe(text) for probe in kinds]
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
