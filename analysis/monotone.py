"""Order-restricted fits of many series at once, and what they make of noise.

A fit falls, then rises, then may fall again; between its turns it is a least-squares monotone
regression by pooling adjacent violators (Robertson, Wright & Dykstra 1988, section 1.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

RHOS = np.array([0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9])  # lag-one autocorrelations of noise
SLOW = 0.98  # slower than noise is taken to be: what rises by more than this does rises
PRIOR = np.linspace(1, 0.3, 7)  # of them: checkpoints of Pythia, pooled, say .1 to .3
DRAWS = 10_000  # of noise for each of them; of short series more, of long ones fewer
BINS = 28  # positions at which turns are sought first
TWO_TURNS = 20  # checkpoints; with fewer a second turn would follow the noise
CHUNK = 500  # series, where all pairs of turns are tried at once

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def _pool(
    y: Array, piece: Ints | None = None, rows: Sequence[int] | None = None
) -> tuple[Array, Ints, Ints, Array]:
    """Pool adjacent violators in every row (draws x K), pieces of even number falling and odd
    ones rising, each on its own; of `rows` no more than so many, the first, at each position.
    Sums and sizes of blocks, how many each row has, and the sum of squares explained by the fit to
    everything up to each position."""
    n, k = y.shape
    sums, sizes, explained = np.zeros(n * k), np.zeros(n * k), np.zeros((k, n))
    columns = np.ascontiguousarray(y.T)
    # The last block of each row is kept by itself, with where in `sums` it will be.
    a, p, total = columns[0].copy(), np.ones(n), columns[0] ** 2
    first = np.arange(n) * k  # of its piece
    last = first.copy()
    explained[0] = total
    for t in range(1, k):
        m = rows[t] if rows else n
        b, total = columns[t, :m], total[:m]
        total += b**2
        wrong = a[:m] < b * p[:m]
        if piece is not None:
            begun = piece[:m, t] != piece[:m, t - 1]
            wrong &= ~begun
        apart = np.flatnonzero(~wrong)
        at = last[apart]
        sums[at], sizes[at] = a[apart], p[apart]
        a[apart], p[apart], last[apart] = b[apart], 1, at + 1
        if piece is not None:
            first[:m][begun] = last[:m][begun]
        live = np.flatnonzero(wrong)
        left, wide, new, size = a[live], p[live], b[live], np.ones(live.size)
        while live.size:
            both, width = left + new, wide + size
            total[live] += both**2 / width - left**2 / wide - new**2 / size
            at = last[live] - 1
            left, wide = sums[at], sizes[at]
            wrong = (at >= first[live]) & (left * width < both * wide)
            done = live[~wrong]
            a[done], p[done] = both[~wrong], width[~wrong]
            live, left, wide, new, size = (v[wrong] for v in (live, left, wide, both, width))
            last[live] -= 1
        explained[t, :m] = total
    sums[last], sizes[last] = a, p
    blocks = last + 1 - np.arange(n) * k
    return sums.reshape(n, k), sizes.reshape(n, k).astype(np.int64), blocks, explained.T


def _explained(y: Array) -> Array:
    """Of falling fits to everything up to each position."""
    return _pool(y)[3]


def fit(y: Array) -> Array:
    """Least-squares fits to series (draws x K) that fall, rise and, from `TWO_TURNS` checkpoints
    on, may fall again. Of long series turns are sought in means of neighbours first."""
    n, k = y.shape
    width = -(-k // BINS)
    edges = np.arange(0, k, width)
    sizes = np.diff(np.append(edges, k))
    means = np.add.reduceat(y, edges, axis=1) / sizes
    means -= means.mean(1, keepdims=True)
    rise, fall = (np.minimum(i * width, k) for i in _turns(means, k >= TWO_TURNS))
    if width > 1:
        rise = _refined(y, rise, fall)
    at = np.arange(k)
    piece = (at >= rise[:, None]).astype(np.int64) + (at >= fall[:, None])
    sign = 1 - 2 * (piece % 2)
    sums, block, blocks, _ = _pool(y * sign, piece)
    block = np.where(at < blocks[:, None], block, 0)
    level = sums / np.maximum(block, 1)
    return np.repeat(level.ravel(), block.ravel()).reshape(n, k) * sign


def _turns(y: Array, two: bool) -> tuple[Ints, Ints]:
    """Positions of both turns that explain most."""
    n, k = y.shape
    if not two:
        down = _explained(y)
        up = _explained(y[:, ::-1])[:, ::-1]
        both = np.append(down[:, :-1] + up[:, 1:], down[:, -1:] + 1e-12, axis=1)
        return both.argmax(1) + 1, np.full(n, k)
    parts = [_two_turns(part) for part in np.array_split(y, -(-n // CHUNK))]
    rise, fall = (np.concatenate(turns) for turns in zip(*parts, strict=True))
    return rise, fall


def _two_turns(y: Array) -> tuple[Ints, Ints]:
    n, k = y.shape
    down = _explained(y)
    end = np.zeros((n, k))
    end[:, :-1] = _explained(-y[:, ::-1])[:, ::-1][:, 1:]
    later = np.zeros((k - 1, n, k - 1))  # from each position on
    for i in range(1, k):
        later[i - 1, :, : k - i] = -y[:, i:]
    rows = [n * (k - 1 - t) for t in range(k - 1)]
    up = _pool(later.reshape(-1, k - 1), rows=rows)[3].reshape(later.shape)
    best, rise, fall = down[:, -1] + 1e-12, np.full(n, k), np.full(n, k)
    for i in range(1, k):
        found = down[:, i - 1, None] + up[i - 1, :, : k - i] + end[:, i:]
        j = found.argmax(1)
        value = found[np.arange(n), j]
        better = value > best
        best[better], rise[better], fall[better] = value[better], i, i + 1 + j[better]
    return rise, fall


def _refined(y: Array, rise: Ints, fall: Ints) -> Ints:
    """First turn of fits that end before the second, among all positions."""
    k = y.shape[1]
    at = np.arange(k)
    inside = at < fall[:, None]
    z = y - (y * inside).sum(1, keepdims=True) / fall[:, None]
    z = np.where(inside, z, 0)
    down = _explained(z)
    # From the end of the rise backwards it falls; what lies beyond is a piece of its own.
    beyond = (~inside).astype(np.int64)[:, ::-1]
    up = _pool(z[:, ::-1], 2 - 2 * beyond)[3][:, ::-1]
    both = np.where(inside, down, -np.inf)
    both[:, :-1] += np.where(inside[:, 1:], up[:, 1:], 0)
    return np.where(rise < k, np.minimum(both.argmax(1) + 1, k), k)


def window(k: int) -> int:
    """Checkpoints that a level is averaged over: a seventh of the series, at least three."""
    return max(3, k // 7)


def levels(y: Array) -> Array:
    """Running means over the window."""
    m = window(y.shape[1])
    sums = np.cumsum(np.pad(y, ((0, 0), (1, 0))), axis=1)
    return (sums[:, m:] - sums[:, :-m]) / m


@dataclass(frozen=True)
class Measured:
    """Of each series."""

    rise: Array
    """Last level less the lowest."""
    bump: Array
    """The largest rise and fall: the smaller of what a level lies above the lowest before it and
    above the last."""
    noise: Array
    """Root mean square of residuals, not corrected for what the fit takes."""
    rho: Array
    """Lag-one autocorrelation of residuals, not corrected either."""
    fitted: Array
    turn: Ints
    """Last position before the fit rises; the last of all where it does not."""


def measure(y: Array) -> Measured:
    """What decides, of series (draws x K)."""
    k = y.shape[1]
    fitted = fit(y)
    residual = y - fitted
    rising = np.pad(np.diff(fitted, axis=1) > 0, ((0, 0), (0, 1)), constant_values=True)
    squares = (residual**2).sum(1)
    # What is steep is fitted without residuals and does not count: at the start of short series,
    # anywhere in those where the fit may turn twice...
    if k < TWO_TURNS:
        later = np.maximum.accumulate(y[:, ::-1], axis=1)[:, ::-1]
        counted = k - np.cumprod(y[:, :-1] > later[:, 1:], axis=1).sum(1)
    else:
        level_with = np.diff(fitted, axis=1) == 0
        ends = ((0, 0), (0, 1)), ((0, 0), (1, 0))
        counted = np.maximum((np.pad(level_with, ends[0]) | np.pad(level_with, ends[1])).sum(1), 1)
    # ... and what single checkpoints stand off their neighbours is a floor.
    off = np.abs(y[:, 1:-1] - (y[:, 2:] + y[:, :-2]) / 2)
    floor = np.median(off, axis=1) / (0.6745 * 1.5**0.5) / (3 if k < TWO_TURNS else 2)
    # So is the grain of what was counted or rounded.
    gaps = np.diff(np.sort(y, axis=1), axis=1)
    grain = np.where(gaps > 1e-9 * np.abs(y).max(1, keepdims=True), gaps, np.inf).min(1)
    grain = np.where(np.isfinite(grain), grain, 1) / 12**0.5
    level = levels(y)
    up = level - np.minimum.accumulate(level, axis=1)
    return Measured(
        level[:, -1] - level.min(1),
        np.minimum(up, level - level[:, -1:]).max(1),
        np.maximum(np.maximum(np.sqrt(squares / counted), floor), grain),
        (residual[:, 1:] * residual[:, :-1]).sum(1) / np.maximum(squares, 1e-300),
        fitted,
        rising.argmax(1),
    )


def autoregressive(rho: float, draws: int, k: int, rng: np.random.Generator) -> Array:
    """Gaussian noise (draws x K) of variance one, AR(1)."""
    noise = rng.standard_normal((draws, k))
    scale = (1 - rho**2) ** 0.5
    for t in range(1, k):
        noise[:, t] = rho * noise[:, t - 1] + scale * noise[:, t]
    return noise


@dataclass(frozen=True)
class Null:
    """What flat series of K checkpoints give, for each of `RHOS`."""

    rises: Array
    bumps: Array
    """Over noise; sorted, RHOS x draws."""
    slow: Array
    """Rises under noise of SLOW, 1 x draws."""
    noise: Array
    """Mean of the measured noise, where the true one is 1."""


@cache
def null(k: int) -> Null:
    """By simulation, the same each time."""
    rng = np.random.default_rng(k)
    draws = 4 * DRAWS if k < TWO_TURNS else DRAWS * 40 // max(k, 40)
    *found, slow = (measure(autoregressive(rho, draws, k, rng)) for rho in (*RHOS, SLOW))
    return Null(
        np.sort([f.rise / f.noise for f in found]),
        np.sort([f.bump / f.noise for f in found]),
        np.sort(slow.rise / slow.noise)[None],
        np.array([f.noise.mean() for f in found]),
    )


def exceeding(ordered: Array, size: float) -> Array:
    """Of each rho the share of null draws at least as large."""
    if size <= 0:
        return np.ones(len(ordered))
    beyond = np.array([row.size - np.searchsorted(row, size) for row in ordered])
    return (beyond + 1) / (ordered.shape[1] + 1)


def levels_error(noise: float, k: int, effective: float) -> float:
    """Standard error of the difference between two running means."""
    return noise * (2 * k / effective / window(k)) ** 0.5


def posterior(likelihood: Array) -> Array:
    """Probability of each of `RHOS`, from its log-likelihood."""
    weights = PRIOR * np.exp(likelihood - likelihood.max())
    return weights / weights.sum()


def assumed(rho: float) -> Array:
    """All of it on the least of `RHOS` that is not below."""
    return np.eye(len(RHOS))[min(int(np.searchsorted(RHOS, rho - 1e-9)), len(RHOS) - 1)]
