"""Which comes first, the collapse of a spectrum or the worsening of the loss.

Godey et al. 2024, Figures 3 and 5. Either is a series along one run, and has no one onset: the
answer depends on how far a series must have moved, so all pairs of thresholds are compared.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import polars as pl

from analysis import monotone, saturation
from analysis.saturation import Onset

LEVEL = 0.95
DIP = 1.2  # standard deviations of noise by which a fit's minimum is too low, by simulation
# Rises above the minimum; 0 is the minimum itself.
ENTROPY = {"minimum": 0.0} | {f"x {k}": math.log(k) for k in (1.25, 1.5, 2, 3)}  # of ln S
LOSS = {"minimum": 0.0, "+.01": 0.01, "+.02": 0.02, "+.05": 0.05, "+.1": 0.1}  # nats
ANISOTROPY = {f"{a}": a for a in (0.3, 0.5, 0.7, 0.9)}  # not rises

Array = npt.NDArray[np.float64]


def crossings(
    steps: Array | npt.NDArray[np.int64], fits: Array, levels: list[float], *, relative: bool
) -> tuple[Array, Array, Array]:
    """Of fits (draws x K; blocks of equal values) the steps from which on they stay above levels,
    or above their minimum by them, where a rise of 0 is the minimum itself: draws x levels, between
    the centers of blocks, and the steps half a checkpoint before and after.

    Never: infinity, and the last step for the earliest. From the start: minus infinity, and the
    first step for the latest.
    """
    draws, k = fits.shape
    at = np.arange(k)
    new = np.diff(fits, axis=1, prepend=np.nan) != 0
    start = np.maximum.accumulate(np.where(new, at, 0), axis=1)
    ends = np.append(new[:, 1:], np.ones((draws, 1), bool), axis=1)
    end = np.minimum.accumulate(np.where(ends, at, k - 1)[:, ::-1], axis=1)[:, ::-1]
    center = (start + end) / 2
    rows = np.arange(draws)
    lowest = fits.argmin(1)
    found = []
    for level in levels:
        if relative and level == 0:
            where = center[rows, lowest]
            never, always = end[rows, lowest] == k - 1, start[rows, lowest] == 0
        else:
            goal = level + relative * fits.min(1)
            under = fits < goal[:, None]
            last = k - 1 - under[:, ::-1].argmax(1)
            never, always = under[:, -1], ~under.any(1)
            next = np.minimum(last + 1, k - 1)
            low, high = fits[rows, last], fits[rows, next]
            share = (goal - low) / np.where(high > low, high - low, 1)
            where = center[rows, last] + share * (center[rows, next] - center[rows, last])
        found.append(np.where(never, np.inf, np.where(always, -np.inf, where)))
    index = np.stack(found, axis=1)
    open = np.isinf(index)

    def step(where: Array) -> Array:
        return np.where(open, index, np.interp(where, at, steps))

    earliest, latest = step(index - 0.5), step(index + 0.5)
    return (
        step(index),
        np.where(index == np.inf, steps[-1], earliest),
        np.where(index == -np.inf, steps[0], latest),
    )


def leads(
    spectral: Onset,
    loss: Onset,
    collapse: Mapping[str, float] = ENTROPY,
    worsening: Mapping[str, float] = LOSS,
    *,
    relative: bool = True,
    draws: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """One row for each pair of thresholds, by name: `collapse`, `worsening`; `collapse_at` and
    `worsening_at` (steps; null: not within the run); `lag`, the first less the second (positive:
    the loss worsens first), with the ends of its 95 % interval, infinite where a run ends too early
    to say; `loss_first` and `spectrum_first`, the shares of draws in which the order is clear; and
    `first`, which of the two the interval says came first, or alone.

    relative: whether the collapse is a rise above the minimum (of ln S) or a level (of anisotropy).
    Both series are drawn anew around their fits, with noise of their own. Where `onset` says "no
    saturation" a series rises nowhere, where it "cannot tell" it may have crossed at any step.
    Intervals hold for levels that the series ends well above: within three standard deviations of
    its last values they cover as little as 86 % (15 checkpoints).
    """
    rng = np.random.default_rng(seed)
    c, c_early, c_late = _drawn(spectral, [*collapse.values()], relative, draws, rng)
    w, w_early, w_late = _drawn(loss, [*worsening.values()], True, draws, rng)
    rows = []
    for i, above in enumerate(collapse):
        for j, worse in enumerate(worsening):
            early, late = c_early[1:, i] - w_late[1:, j], c_late[1:, i] - w_early[1:, j]
            low = float(np.quantile(early, (1 - LEVEL) / 2, method="inverted_cdf"))
            high = float(np.quantile(late, (1 + LEVEL) / 2, method="inverted_cdf"))
            both = float(c[0, i]), float(w[0, j])
            at = [x if math.isfinite(x) else None for x in both]
            lag = None if None in at else both[0] - both[1]
            if lag is not None:  # draws may all be earlier where a rise is as small as the noise
                low, high = min(low, lag), max(high, lag)
            rows.append({
                "collapse": above, "worsening": worse, "collapse_at": at[0], "worsening_at": at[1],
                "lag": lag, "low": low, "high": high,
                "loss_first": float(np.mean(early > 0)),
                "spectrum_first": float(np.mean(late < 0)),
                "first": "loss" if low > 0 else "spectrum" if high < 0 else None,
            })  # fmt: skip
    return pl.DataFrame(
        rows,
        schema_overrides=dict.fromkeys(("collapse_at", "worsening_at", "lag"), pl.Float64)
        | {"first": pl.String},
    )


def _drawn(
    onset: Onset, levels: list[float], relative: bool, draws: int, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Crossings of the fit to the data, then of those to draws."""
    flat = relative and onset.kind == "no saturation"
    if flat or onset.kind == "cannot tell":
        never = np.full((draws + 1, len(levels)), np.inf)
        earliest = onset.steps[-1] if flat else -np.inf
        return never, np.full_like(never, earliest), never
    fit = _fits(onset.values[None], onset.noise)
    drawn = saturation.resample(fit[0], onset.rho, onset.noise, draws, rng)
    fits = np.vstack([fit, _fits(drawn, onset.noise)])
    at, early, late = crossings(onset.steps, fits, levels, relative=relative)
    # Between checkpoints it may have been anywhere.
    inside = np.isfinite(late - early)
    somewhere = early + rng.random(at.shape) * np.where(inside, late - early, 0)
    return at, np.where(inside, somewhere, early), np.where(inside, somewhere, late)


def _fits(series: Array, noise: float) -> Array:
    """Monotone fits follow noise down at their minimum, which would put all rises above it too
    early; they are cut off there."""
    fits = monotone.fit(series)
    floor = np.minimum(monotone.levels(series).min(1), fits.min(1) + DIP * noise)
    return np.maximum(fits, floor[:, None])


def order(table: pl.DataFrame) -> str:
    """What a table of `leads` says in one phrase."""
    first = set(table["first"].drop_nulls())
    if len(first) == 2:
        return "depends on the threshold"
    if not first:
        return "cannot tell"
    some = "" if table["first"].null_count() else ", at every threshold"
    return f"{first.pop()} first{some}"
