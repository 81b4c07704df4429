"""How many dimensions a softmax needs for a language, in nats.

A spectrum of probabilities does not say: one-hot rows have no low-rank approximation, and a softmax
of rank 2 fits them. So softmax heads of rank r are fitted to counts of n-grams themselves, each
context with a vector of its own, and judged on occurrences that were held out: exponential-family
principal components (Collins, Dasgupta and Schapire 2001) of the matrix W of Godey et al. 2024,
section 5.2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from analysis.errors import BadInput
from analysis.ngrams import Counts
from analysis.ranks import TOLERANCE, Required, required_rank

SHARES = 0.6, 0.2, 0.2  # of occurrences: to fit, to choose by, to report
RIDGE, STEP, LEAST_RIDGE = 1.0, 3.0, 1e-3  # the first ridge tried, the factor to the next, the last
CYCLE, CYCLES = 50, 10  # iterations between two choices of scale; at most so many times
ROUGH, SETTLED = (
    1e-2,
    2e-3,
)  # nats per token that a cycle has to win for another: to choose, at last
DISCOUNTS, STRENGTHS = np.arange(10) / 10, 4.0 ** np.arange(-3, 7)  # tried for smoothed counts
WORTH = 2e-3  # nats per token that another ridge has to win
SMALL = 0.3  # what new columns begin with, of their size in the logits of smoothed counts
LOGITS = 2**22  # held at a time
DRAWS = 200  # of the bootstrap

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fitted:
    """One model of the next token given its context. Losses in nats per token."""

    rank: int
    """r of logits A B + 1 b^T: a head without bias needs one more. 0: b alone, the unigram model.
    V: nothing binds the contexts."""
    ridge: float
    """Chosen. 0 for models that have none."""
    train: float
    held_out: float
    stderr: float
    """Of held_out, over contexts."""
    by_context: Array
    """(C) nats of the held-out occurrences of each context, summed."""


@dataclass(frozen=True)
class Fits:
    """What ranks cost, on the same occurrences of the same C contexts."""

    share: float
    """Of all that was counted: occurrences of these contexts."""
    tokens: Ints
    """(C) held-out occurrences of each context."""
    unigram: Fitted
    ranks: list[Fitted]
    """Rising."""
    saturated: Fitted
    """Smoothed counts: no context learns from another."""


@dataclass(frozen=True)
class _Part:
    """Some of the occurrences: nnz entries, by rows, of a C x V table of counts."""

    starts: Ints
    rows: Tensor
    columns: Tensor
    counts: Tensor
    totals: Tensor
    """(C) sums of rows."""
    unseen: Ints
    """(C) occurrences, on top, of tokens that are not in the table."""


@dataclass(frozen=True)
class _Model:
    """Logits A B + 1 b^T: C x r, r x V, V; float32."""

    A: Tensor
    B: Tensor
    b: Tensor


def fit(
    counts: Counts,
    ranks: list[int],
    *,
    contexts: int = 20_000,
    least: int = 2,
    seed: int = 0,
    progress: Callable[[int, float, float], None] = lambda rank, ridge, loss: None,
) -> Fits:
    """Softmax models of the given ranks, of the most frequent contexts seen at least `least` times.

    Occurrences are split at random into SHARES. On the first, the cross-entropy summed over them
    plus ridge / 2 (|A|^2 + |B|^2), which is ridge times the nuclear norm of A B, is minimised by
    L-BFGS; on the second each rank's ridge is chosen. Tokens that the first lacks get, under every
    model alike, the share that they have in the second, in equal parts. `progress` hears of each
    fit: rank, ridge and nats per token of the second.

    What is held out is of the same text, not of new documents. Raises BadInput where a rank is
    not in 1..V, or fewer than two contexts are seen often enough.
    """
    ranks = sorted(set(ranks))
    if not ranks or ranks[0] < 1 or ranks[-1] > counts.vocabulary:
        raise BadInput(f"ranks: {ranks}; give numbers from 1 to {counts.vocabulary}")
    (train, choose, report), share, absent = _split(counts, contexts, least, seed)
    # Of tokens that were not fitted, the bits that are the same under all models.
    lost = (choose.unseen.sum() + 0.5) / (choose.unseen.sum() + float(choose.totals.sum()) + 1)
    seen_cost, unseen_cost = (-np.log1p(-lost), np.log(absent / lost)) if absent else (0.0, 0.0)
    tokens = report.totals.numpy().astype(np.int64) + report.unseen

    def judged(rank: int, ridge: float, fitted: float, nats: Array) -> Fitted:
        nats = nats + seen_cost * report.totals.numpy() + unseen_cost * report.unseen
        return Fitted(rank, ridge, fitted, *_mean(nats, tokens), nats)

    frequencies = torch.bincount(train.columns, train.counts)
    most = min(ranks[-1], len(train.totals), len(frequencies))
    A, B = _directions(train, frequencies, most, seed)
    model = _Model(A[:, :0], B[:0], (frequencies / frequencies.sum()).log().float())
    unigram = judged(0, 0.0, _loss(train, model), _nats(report, model))
    found, ridge = [], RIDGE
    for rank in ranks:
        old, new = len(model.B), min(rank, most)
        # Small, so that the start is hardly worse than the end of the last rank.
        wider = torch.cat([model.A, A[:, old:new]], 1), torch.cat([model.B, B[old:new]])
        ridge, model = _search(
            train, choose, _Model(*wider, model.b), ridge, lambda *a, r=rank: progress(r, *a)
        )
        found.append(judged(rank, ridge, _loss(train, model), _nats(report, model)))
    saturated = judged(counts.vocabulary, 0.0, *_smoothed(train, choose, report))
    return Fits(share, tokens, unigram, found, saturated)


def required(fits: Fits, tolerance: float = TOLERANCE) -> Required:
    """The smallest rank whose held-out loss is within `tolerance` nats of the best of the ranks
    tried; the interval over contexts, by bootstrap. A loss that still falls at the last rank makes
    it too small. Raises BadInput where fewer than two ranks were fitted."""
    if len(fits.ranks) < 2:
        raise BadInput(f"ranks: {[f.rank for f in fits.ranks]}; give two or more to compare")
    nats = np.stack([f.by_context for f in fits.ranks], axis=1)
    C = len(nats)
    draws = np.random.default_rng(0).multinomial(C, np.full(C, 1 / C), size=DRAWS)
    weights = np.vstack([np.ones(C), draws])
    # Up to a rank, the best of that rank or less: what a rank can do, every higher one can.
    losses = np.minimum.accumulate(weights @ nats / (weights @ fits.tokens)[:, None], axis=1)
    return required_rank([f.rank for f in fits.ranks], losses - losses[:, -1:], tolerance)


def _split(counts: Counts, contexts: int, least: int, seed: int) -> tuple[list[_Part], float, int]:
    """The parts, over columns of tokens that the first has; the share of all occurrences that
    they hold; and how many tokens of the vocabulary have no column."""
    totals = np.add.reduceat(counts.counts, counts.starts[:-1])
    frequent = np.argsort(-totals, kind="stable")[:contexts]
    frequent = np.sort(frequent[totals[frequent] >= least])
    C = len(frequent)
    if C < 2:
        raise BadInput(f"{C} contexts are seen {least} times or more; give longer text or less n")
    place = np.full(len(totals), -1)
    place[frequent] = np.arange(C)
    rows = np.repeat(place, np.diff(counts.starts))
    kept = rows >= 0
    rows, tokens = rows[kept], counts.tokens[kept]
    thinned = np.random.default_rng(seed).multinomial(counts.counts[kept], SHARES).T
    seen = np.bincount(tokens, thinned[0], counts.vocabulary) > 0
    column = np.cumsum(seen) - 1
    parts = []
    for some in thinned:
        inside = (some > 0) & seen[tokens]
        held = np.bincount(rows[inside], some[inside], C)
        parts.append(
            _Part(
                np.searchsorted(rows[inside], np.arange(C + 1)),
                torch.from_numpy(rows[inside]),
                torch.from_numpy(column[tokens[inside]]),
                torch.from_numpy(some[inside].astype(np.float32)),
                torch.from_numpy(held.astype(np.float32)),
                np.bincount(rows, some, C).astype(np.int64) - held.astype(np.int64),
            )
        )
    if min(float(part.totals.sum()) for part in parts) == 0:
        raise BadInput(f"{thinned.sum()} occurrences are too few to split; give longer text")
    return parts, totals[frequent].sum() / totals.sum(), int((~seen).sum())


def _mean(nats: Array, tokens: Ints) -> tuple[float, float]:
    """Nats per token, and the standard error over contexts."""
    mean, C = nats.sum() / tokens.sum(), len(nats)
    variance = ((nats - mean * tokens) ** 2).sum() * C / (C - 1)
    return float(mean), float(np.sqrt(variance) / tokens.sum())


def _directions(part: _Part, frequencies: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A and B to start from: singular vectors of log(1 + count / (10 f)), f the frequency, which
    is what the logits of smoothed counts have above b."""
    C, V = len(part.totals), len(frequencies)
    f = (frequencies / frequencies.sum()).float()
    row, column = part.totals.clamp(min=1).sqrt(), f.sqrt()
    p, v = part.rows, part.columns
    logits = torch.log1p(part.counts / (10 * f[v])) * row[p] * column[v]
    table = torch.sparse_coo_tensor(torch.stack([p, v]), logits, (C, V), check_invariants=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        U, s, W = torch.svd_lowrank(table, min(rank + 8, C, V), niter=3)
    half = s[:rank].sqrt()
    A, B = U[:, :rank] * half / row[:, None], half[:, None] * W.T[:rank].contiguous() / column
    balance = (B.norm() / A.norm()).sqrt()
    return SMALL * A * balance, B / balance


def _search(
    train: _Part,
    choose: _Part,
    model: _Model,
    ridge: float,
    progress: Callable[[float, float], None],
) -> tuple[float, _Model]:
    """The ridge, of a ladder on which the given one is, that is best on occurrences to choose by:
    up while that helps, or else down; each fit from that of the last. The best is fitted on:
    low ranks settle slowly, and would look worse than they are."""

    def fitted(ridge: float, start: _Model) -> tuple[float, float, _Model]:
        end = _minimised(train, start, ridge, ROUGH)
        loss = _loss(choose, end)
        progress(ridge, loss)
        return loss, ridge, end

    best = fitted(ridge, model)
    for factor in (STEP, 1 / STEP):
        moved = False
        while best[1] * factor >= LEAST_RIDGE:
            other = fitted(best[1] * factor, best[2])
            if best[0] - other[0] < WORTH:
                break
            best, moved = other, True
        if moved:
            break
    _, ridge, model = best
    return ridge, _minimised(train, model, ridge, SETTLED)


def _minimised(part: _Part, model: _Model, ridge: float, settled: float) -> _Model:
    for _ in range(CYCLES):
        won, model = _cycle(part, model, ridge)
        if won < settled:
            break
    return model


def _cycle(part: _Part, model: _Model, ridge: float) -> tuple[float, _Model]:
    """Some iterations of L-BFGS in units in which the curvature is about one (else contexts and
    tokens seen a thousand times as often as others set the pace), and the nats per token won."""
    tokens = float(part.totals.sum())
    N = torch.bincount(part.columns, part.counts).float()
    A, B, b = model.A, model.B, model.b
    spread = ((B * B) @ N / tokens - (B @ N / tokens) ** 2).clamp(min=0)
    power = part.totals @ (A * A) / tokens
    units = (
        (part.totals[:, None] * spread + ridge).rsqrt(),
        (power[:, None] * N + ridge).rsqrt(),
        N.rsqrt(),
    )
    scaled = [(x / unit).requires_grad_() for x, unit in zip((A, B, b), units, strict=True)]
    optimiser = torch.optim.LBFGS(
        scaled,
        max_iter=CYCLE,
        max_eval=2 * CYCLE,
        history_size=10,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    objectives: list[float] = []

    def unscaled() -> _Model:
        return _Model(*(x.detach() * unit for x, unit in zip(scaled, units, strict=True)))

    def closure() -> float:
        objective, gradients = _objective(part, unscaled(), ridge)
        for x, unit, gradient in zip(scaled, units, gradients, strict=True):
            x.grad = gradient * unit
        objectives.append(objective)
        return objective

    optimiser.step(closure)
    return (objectives[0] - min(objectives)) / tokens, unscaled()


def _objective(part: _Part, model: _Model, ridge: float) -> tuple[float, tuple[Tensor, ...]]:
    """Penalised nats, summed, and their gradients."""
    A, B, b = model.A, model.B, model.b
    total = ridge / 2 * float(A.double().square().sum() + B.double().square().sum())
    gA, gB, gb = ridge * A, ridge * B, torch.zeros_like(b)
    for rows, logp, entries, places in _chunks(part, model):
        counts = part.counts[entries]
        total -= float((counts * logp.view(-1)[places]).sum(dtype=torch.float64))
        gradient = logp.exp_().mul_(part.totals[rows, None])
        gradient.view(-1).index_add_(0, places, counts, alpha=-1)
        gA[rows] += gradient @ B.T
        gB += A[rows].T @ gradient
        gb += gradient.sum(0)
    return total, (gA, gB, gb)


def _nats(part: _Part, model: _Model) -> Array:
    """(C) by context."""
    found = torch.zeros(len(part.totals), dtype=torch.float64)
    for _, logp, entries, places in _chunks(part, model):
        nats = -(part.counts[entries] * logp.view(-1)[places]).double()
        found.index_add_(0, part.rows[entries], nats)
    return found.numpy()


def _loss(part: _Part, model: _Model) -> float:
    """Nats per token."""
    return float(_nats(part, model).sum() / part.totals.sum())


def _chunks(part: _Part, model: _Model) -> Iterator[tuple[slice, Tensor, slice, Tensor]]:
    """Some contexts at a time: rows, their log-probabilities, their entries, and where these are
    among the log-probabilities laid flat."""
    C, V = len(model.A), len(model.b)
    size = max(1, LOGITS // V)
    for low in range(0, C, size):
        rows = slice(low, min(low + size, C))
        entries = slice(*part.starts[[rows.start, rows.stop]])
        logp = torch.log_softmax(torch.addmm(model.b, model.A[rows], model.B), 1)
        yield rows, logp, entries, (part.rows[entries] - low) * V + part.columns[entries]


def _smoothed(train: _Part, choose: _Part, report: _Part) -> tuple[float, Array]:
    """Nats per token of the first part, and (C) those of the third: counts of the first with a
    discount, mixed with the unigram (Pitman-Yor, one level: Teh 2006), as is best on the second."""
    V = int(train.columns.max()) + 1
    n = train.totals.double().numpy()
    kinds = np.diff(train.starts)
    f = np.bincount(train.columns.numpy(), train.counts.numpy(), V) / n.sum()
    keys = (train.rows * V + train.columns).numpy()

    def looked_up(part: _Part) -> Callable[[float, float], Array]:
        rows, columns = part.rows.numpy(), part.columns.numpy()
        wanted = rows * V + columns
        at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        held = np.where(keys[at] == wanted, train.counts.numpy()[at], 0)

        def nats(discount: float, strength: float) -> Array:
            back = (strength + discount * kinds[rows]) * f[columns]
            p = (np.maximum(held - discount, 0) + back) / (n[rows] + strength)
            found = np.zeros(len(n))
            np.add.at(found, rows, part.counts.numpy() * -np.log(p))
            return found

        return nats

    nats = looked_up(choose)
    _, *best = min((nats(d, s).sum(), d, s) for d in DISCOUNTS for s in STRENGTHS)
    return looked_up(train)(*best).sum() / n.sum(), looked_up(report)(*best)
