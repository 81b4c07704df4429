"""Whether a loss that was falling along training worsens for good, and from when on.

Godey et al. 2024, section 3, compare the best checkpoint with the last, which is a worsening on
every noisy series. Here the rise from the lowest running mean to the last one is set against
what flat series with noise as autocorrelated give. Improving ones give less while rho is known;
where it is hardly known (few checkpoints, rho of .8 and more) they give more: docs/onset.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import numpy as np
import numpy.typing as npt
from scipy import stats

from analysis.errors import BadInput
from analysis.monotone import (
    RHOS,
    Array,
    Ints,
    assumed,
    autoregressive,
    exceeding,
    levels,
    levels_error,
    measure,
    null,
    posterior,
    window,
)

FEWEST = 8  # checkpoints
MOST = 200  # more are averaged: losses of single steps, say
SLOWEST = 0.75  # rho; with more, noise passes for a lasting rise too often
BURN_IN = 0.02  # of the run: twice the usual warm-up, and the spikes of the first steps
DRAWS = 300  # around the fit, for each of RHOS
FALL = 1.5  # of the rise, before it: noise as slow as the series rises as often as it falls
ANNEALED = 0.5  # of the peak learning rate
TINY = 1e-300

Numbers = Sequence[float] | npt.NDArray[np.number]


@dataclass(frozen=True)
class Onset:
    """What became of one series."""

    kind: str
    """worsens, recovers, no saturation or cannot tell."""
    reason: str
    best_step: int
    best: float
    """The lowest single value, as it is read off: lower than it would be without noise."""
    final: float
    rise: float
    low: float
    high: float
    """Last running mean less the lowest, the bias of having looked for the lowest taken off; and
    the ends of its interval, in the unit of values."""
    p: float
    """Probability of so large a rise without saturation."""
    onset: int | None
    onset_low: int | None
    onset_high: int | None
    """Last step before the fit rises, with its interval; where it worsens or recovers."""
    rho: float
    noise: float
    """Lag-one autocorrelation and standard deviation of what is not trend."""
    effective: float
    """K (1 - rho) / (1 + rho): independent checkpoints that would tell as much."""
    steps: Ints
    values: Array
    fitted: Array
    """Those after the burn-in; and the fit that falls, rises and may fall again."""
    turns: Array
    """Bootstrap draws of the onset, in steps."""
    rhos: Array
    """Log-likelihood of each of `RHOS`."""
    ps: Array
    """p under each of `RHOS`, under SLOW noise, and the text's own, a floor of p."""


def onset(
    steps: Numbers,
    values: Numbers | None = None,
    *,
    stderr: Numbers | None = None,
    blocks: npt.NDArray[np.number] | None = None,
    level: float = 0.05,
    margin: float = 0.01,
    after: float | None = None,
    rho: float | None = None,
    seed: int = 0,
) -> Onset:
    """Decide on one series, lower being better (loss, ln perplexity, error rate).

    stderr: of each value, one text at all steps; taken as unpaired, which is conservative.
    blocks: K x n, of each step the values of the same blocks of text; their means are the values
    then. margin: the rise that would not matter, in the unit of values. after: steps before it
    are left out, by default the first 2 % of the run; more than MOST checkpoints are averaged.
    rho: the autocorrelation of noise to be safe from; by default what the series tells of it.

    worsens where p <= level; recovers where the same holds of a bump that has come back; no
    saturation where even the high end of the rise is below the margin; else cannot tell. From
    fewer than a hundred checkpoints rho is hardly known: p is a mean over rho from 0 to .9, and .9
    is taken where the series did not first fall by half as much again as it rises. Noise slower
    than that passes for a rise too often: then only what exceeds even SLOW noise is one. Raises
    BadInput.
    """
    at, y, errors, text = _checked(steps, values, stderr, blocks, after)
    k, best = len(y), int(y.argmin())
    if k < FEWEST:
        nan, none = float("nan"), np.empty(0)
        return Onset(
            "cannot tell", f"{k} checkpoints after the burn-in; {FEWEST} are needed",
            int(at[best]), float(y[best]), float(y[-1]), nan, nan, nan, 1.0, None, None, None,
            nan, nan, nan, at, y, y, none, np.zeros(len(RHOS)), np.ones(len(RHOS) + 2),
        )  # fmt: skip
    # Draws of its own for each series: those of a family must not err together.
    rng = np.random.default_rng([seed, crc32(y.tobytes())])
    found = measure(y[None])
    fitted, rise, noise = found.fitted[0], float(found.rise[0]), float(found.noise[0])

    # By indirect inference: which rho gives, around this fit, the autocorrelation measured.
    true = noise / null(k).noise
    series = [resample(fitted, r, s, DRAWS, rng) for r, s in zip(RHOS, true, strict=True)]
    around = measure(np.concatenate(series))
    given = around.rho.reshape(len(RHOS), DRAWS)
    likelihood = stats.norm.logpdf(found.rho[0], given.mean(1), given.std(1) + 0.02)
    weights, slow = _weights(likelihood, rho)

    error = _text_error(rise, text, errors)
    nulls = np.concatenate([null(k).rises, null(k).slow])
    ps = np.append(exceeding(nulls, rise / noise), 0.0)
    bumps = np.append(exceeding(null(k).bumps, found.bump[0] / noise), 0.0)
    if error is not None:
        ps[-1] = stats.norm.sf(error[0] / error[1])
        bumps[-1] = stats.norm.sf(found.bump[0] / error[1])
    fell = y[0] - levels(y[None]).min() >= FALL * rise
    p = _p(ps, weights if fell or rho is not None else assumed(RHOS[-1]))
    rho = float(weights @ RHOS)
    if slow:
        p = float(ps[-2:].max())

    picked = rng.choice(around.rise.size, 1000, p=np.repeat(weights / DRAWS, DRAWS))
    of_fit = levels(fitted[None])[0]
    # Studentised, for the noise is as uncertain as the rise and what a fit takes of it differs.
    shifts = (around.rise - (of_fit[-1] - of_fit.min())) / around.noise
    shifts = noise * shifts[picked]
    bias = float(np.median(shifts))
    if error is not None:
        shifts = shifts + error[1] * rng.standard_normal(shifts.size)
    low, high = rise - np.quantile(shifts, [1 - level / 2, level / 2])
    # No draw is below zero, a small rise unseen is: not less than from a level before the last.
    sd, effective = float(weights @ true), k * (1 - rho) / (1 + rho)
    before = float(levels(y[None])[0, -1] - levels(y[None])[0, : -window(k)].min())
    high = max(high, before + stats.norm.ppf(1 - level / 2) * levels_error(sd, k, effective))
    made = Onset(
        "cannot tell", "neither a rise nor its absence is certain",
        int(at[best]), float(y[best]), float(y[-1]), rise - bias, float(low), float(high), p,
        None, None, None, rho, sd, effective,
        at, y, fitted, at[around.turn[picked]].astype(np.float64), likelihood, ps,
    )  # fmt: skip
    if p <= level:
        return _turned(made, "worsens", "ends above its best by more than noise", level)
    if slow:
        return replace(made, reason=f"noise is too slow: {made.effective:.1f} checkpoints' worth")
    if _p(bumps, weights) <= level:
        return _turned(made, "recovers", "a rise beyond noise that has come back", level)
    if high < margin:
        return replace(made, kind="no saturation", reason="any rise is below the margin")
    return made


def together(found: Sequence[Onset], level: float = 0.05, rho: float | None = None) -> list[Onset]:
    """Decide anew on a family of series that may be taken to have one rho, which together they
    tell where one of them hardly does; with errors in any of them at the level (Holm 1979). p is
    that of each series alone under the common rho; `holm` adjusts it."""
    if not found:
        return []
    weights, slow = _weights(np.sum([f.rhos for f in found], axis=0), rho)
    rho = float(weights @ RHOS)
    ps = [float(f.ps[-2:].max()) if slow else _p(f.ps, weights) for f in found]
    new = []
    for one, p, adjusted in zip(found, ps, holm(ps), strict=True):
        made = replace(one, p=p, rho=rho, effective=len(one.steps) * (1 - rho) / (1 + rho))
        if adjusted <= level:
            made = _turned(made, "worsens", "ends above its best by more than noise", level)
        elif made.kind == "worsens":
            made = replace(
                made, kind="cannot tell", reason=f"not certain among {len(found)} series",
                onset=None, onset_low=None, onset_high=None,
            )  # fmt: skip
        new.append(made)
    return new


def holm(p_values: Sequence[float] | Array) -> Array:
    """Adjusted for their number: at most the level where the step-down test rejects (Holm 1979)."""
    p = np.asarray(p_values, np.float64)
    order = p.argsort()
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def resample(
    fitted: Array, rho: float, noise: float, draws: int, rng: np.random.Generator
) -> Array:
    """Series (draws x K) around a fit with AR(1) noise of standard deviation `noise`."""
    return fitted + noise * autoregressive(rho, draws, len(fitted), rng)


def explain(
    onset: Onset,
    *,
    seen: Onset | None = None,
    law: tuple[float, float, float] | None = None,
    rates: Numbers | None = None,
) -> str:
    """The kind, told apart further: `overfits` where loss on unseen text rises by more than that
    on text seen in training (`seen`); `not annealed` where the end may be the learning rate's
    doing: still above half its peak, or higher than at the onset (`rates`: one for each of
    `onset.steps`); `plateau` where nothing rises, nothing falls any more, and the end lies above
    a law's (prediction, low, high)."""
    k = len(onset.steps)
    if k < FEWEST:
        return onset.kind
    lasts = levels(onset.values[None])[0]
    worse = onset.kind == "worsens"
    still = lasts[-1] > lasts[-1 - window(k)] - 2 * levels_error(onset.noise, k, onset.effective)
    if rates is not None and (worse or still):
        rate = np.asarray(rates, np.float64)
        if rate.shape != onset.steps.shape:
            raise BadInput(f"{len(rate)} learning rates for {len(onset.steps)} checkpoints")
        turn = 0 if onset.onset is None else int(np.searchsorted(onset.steps, onset.onset))
        raised = worse and rate[-1] > 1.01 * rate[turn]
        if raised or rate[-1] > ANNEALED * rate.max():
            return "not annealed"
    if worse:
        return "overfits" if seen is not None and seen.high < onset.low else "worsens"
    if law is not None and onset.kind != "recovers" and still and lasts[-1] > law[2]:
        return "plateau"
    return onset.kind


def _checked(
    steps: Numbers,
    values: Numbers | None,
    stderr: Numbers | None,
    blocks: npt.NDArray[np.number] | None,
    after: float | None,
) -> tuple[Ints, Array, Array | None, Array | None]:
    """Steps, values, standard errors and blocks from the burn-in on."""
    at = np.asarray(steps, np.int64)
    text = None if blocks is None else np.asarray(blocks, np.float64)
    if text is not None and (text.ndim != 2 or text.shape[1] < 4):
        raise BadInput(f"blocks of shape {text.shape}; checkpoints x blocks, four or more, are due")
    if values is None and text is None:
        raise BadInput("an onset needs values or blocks")
    y = np.asarray(values, np.float64) if text is None else text.mean(1)
    errors = None if stderr is None or text is not None else np.asarray(stderr, np.float64)
    if (np.diff(at) <= 0).any():
        raise BadInput("steps do not increase strictly; sort them, one value each")
    kept = at >= (BURN_IN * at[-1] if after is None and at.size else after or 0)
    if not kept.any():
        raise BadInput("no checkpoint is left after the burn-in (`after`)")
    for name, array in (("values", y), ("standard errors", errors)):
        if array is not None and array.shape != at.shape:
            raise BadInput(f"{at.size} steps, but {name} of shape {array.shape}; one a step is due")
        if array is not None and not np.isfinite(array[kept]).all():
            where = at[kept & ~np.isfinite(array)][0]
            raise BadInput(f"{name} at step {where} are not finite; leave that step out")
    if errors is not None and (errors < 0).any():
        raise BadInput(f"the standard error at step {at[errors < 0][0]} is below zero")
    return _averaged(at[kept], y[kept], _part(errors, kept), _part(text, kept))


def _averaged(
    at: Ints, y: Array, errors: Array | None, text: Array | None
) -> tuple[Ints, Array, Array | None, Array | None]:
    """Of more than MOST checkpoints, means over neighbours, each at the step in its middle."""
    if len(at) <= MOST:
        return at, y, errors, text
    starts = np.linspace(0, len(at), MOST + 1).astype(int)
    sizes = np.diff(starts)

    def means(array: Array) -> Array:
        shape = (-1,) + (1,) * (array.ndim - 1)
        return np.add.reduceat(array, starts[:-1], axis=0) / sizes.reshape(shape)

    middle = at[starts[:-1] + (sizes - 1) // 2]
    return (
        middle,
        means(y),
        None if errors is None else means(errors),
        None if text is None else means(text),
    )


def _part(array: Array | None, kept: npt.NDArray[np.bool_]) -> Array | None:
    return None if array is None else array[kept]


def _weights(likelihood: Array, rho: float | None) -> tuple[Array, bool]:
    """Probability of each of `RHOS`, by what series tell or as it is to be taken; and whether they
    tell that noise is too slow."""
    if rho is not None:
        return assumed(rho), False
    weights = posterior(likelihood)
    return weights, bool(weights @ RHOS > SLOWEST)


def _p(ps: Array, weights: Array) -> float:
    return float(max(ps[: len(RHOS)] @ weights, ps[-1]))


def _turned(made: Onset, kind: str, reason: str, level: float) -> Onset:
    first = int(np.append(np.diff(made.fitted) > 0, True).argmax())
    low, high = np.quantile(made.turns, [level / 2, 1 - level / 2], method="closest_observation")
    return replace(
        made, kind=kind, reason=reason, onset=int(made.steps[first]), onset_low=int(low),
        onset_high=int(high),
    )  # fmt: skip


def _text_error(
    rise: float, text: Array | None, stderr: Array | None
) -> tuple[float, float] | None:
    """Rise and its standard error as far as the text goes: on each half of the blocks from the
    level that is lowest on the other, paired; or of two unpaired values."""
    if text is None:
        return None if stderr is None else (rise, float(2**0.5 * stderr.mean() + TINY))
    m = window(len(text))
    halves = [text[:, i::2] for i in (0, 1)]
    gaps = []
    for one, other in (halves, halves[::-1]):
        low = int(levels(other.mean(1)[None])[0].argmin())
        gaps.append(one[-m:].mean(0) - one[low : low + m].mean(0))
    gap = np.concatenate(gaps)
    return float(gap.mean()), float(gap.std(ddof=1) / len(gap) ** 0.5 + TINY)
