"""Compute-optimal sizes: the law's own answer, and that of IsoFLOP parabolas with its bias.

A budget of C floating-point operations is spent as C = 6 N D (Hoffmann et al. 2022, 2203.15556).
N counts what the law's N counted. Sizes come from the law, for a parabola in ln N is not unbiased
even without noise (2603.22339): it is fitted only to be shown beside them, with that bias.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from analysis.errors import BadInput

LEVEL = 0.95  # of intervals
SAME = 0.05  # by how much of itself compute may vary within one IsoFLOP budget
MEASURES = ("N", "D", "tokens_per_parameter", "loss")

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Optimum:
    """What to spend a budget on; arrays of one shape. Where a term has vanished, sizes are 0 or
    infinite and the exponent is nan; where both have, any size is best: nan."""

    N: Array
    D: Array
    tokens_per_parameter: Array
    loss: Array
    exponent: Array
    """N grows as C to this power, D as C to one minus it."""


@dataclass(frozen=True)
class Frontier:
    budgets: pl.DataFrame
    """A row for each: compute, and N, D, tokens_per_parameter and loss with _low and _high."""
    exponent: tuple[float, float, float]
    """N grows as C to this power: the law's own, low, high."""


@dataclass(frozen=True)
class IsoFlop:
    """Approach 2 of Hoffmann et al. 2022: a parabola in ln N for each budget, then a power law
    through their minima."""

    compute: Array
    N: Array
    loss: Array
    """Of the minima, one for each budget."""
    inside: npt.NDArray[np.bool_]
    """Whether the minimum is within the sizes tried; else it is extrapolated."""
    exponent: float
    factor: float
    """N = factor C^exponent."""


@dataclass(frozen=True)
class Bias:
    """Approach 2 without noise, set against the law that made its losses."""

    compute: Array
    ratio: Array
    """N of the parabola over the true optimum, one for each budget."""
    exponent: float
    """Of the parabolas, less the true one."""


def optimum(constants: Mapping[str, Array | float], compute: Array | float) -> Optimum:
    """The N and D that minimise L = E + A/N^a + B/D^b at 6 N D = compute (operations).

    constants: those of the law by name, numbers or arrays over draws; one exponent c stands for
    a and b. Broadcast against compute. N = G (C/6)^(b/(a+b)), G = (a A/(b B))^(1/(a+b)): Hoffmann
    et al. 2022, equation 4. Raises BadInput for other constants, or ones that are negative or not
    finite, and for compute that is not above 0.
    """
    E, A, B, a, b = _law(constants)
    pairs = _positive("compute", compute) / 6
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        log_n = (np.log(a * A) - np.log(b * B) + b * np.log(pairs)) / (a + b)
        N, D = np.exp(log_n), np.exp(np.log(pairs) - log_n)
        # A term of A = 0 or B = 0 adds nothing, at whatever end its size has gone to.
        loss = E + np.where(A > 0, A * N**-a, 0) + np.where(B > 0, B * D**-b, 0)
        exponent = np.where((A > 0) & (B > 0), b / (a + b), np.nan)
        parts = N, D, D / N, loss, exponent
    return Optimum(*(np.array(part) for part in np.broadcast_arrays(*parts)))


def frontier(
    constants: Mapping[str, float],
    draws: Mapping[str, Array],
    budgets: list[float],
) -> Frontier:
    """The optimum at each budget, from a fit's constants, with intervals from those of its draws
    (arrays of one length), which may have lost a term: the interval then ends at 0 or infinity."""
    _, A, B, _, _ = _law(constants)
    if not (A > 0 and B > 0):
        raise BadInput(
            f"A is {A:g} and B is {B:g}: where a term has vanished no size is best; it takes "
            "losses over both N and D to find one"
        )
    best, drawn = optimum(constants, np.array(budgets)), optimum(draws, np.array(budgets)[:, None])

    columns = {"compute": np.array(budgets, dtype=np.float64)}
    for name in MEASURES:
        low, high = _ends(getattr(drawn, name), np.inf)
        columns |= {name: getattr(best, name), f"{name}_low": low, f"{name}_high": high}
    low, high = _ends(drawn.exponent[0], 1.0)
    return Frontier(pl.DataFrame(columns), (float(best.exponent[0]), float(low), float(high)))


def _ends(draws: Array, most: float) -> tuple[Array, Array]:
    """Of the interval, over the last axis: observed values, as the infinite have no mean; draws
    that leave the answer open (nan) count as 0 at the lower end and as `most` at the upper."""
    low, high = (
        np.quantile(np.where(np.isnan(draws), end, draws), at, -1, method="closest_observation")
        for at, end in (((1 - LEVEL) / 2, 0.0), ((1 + LEVEL) / 2, most))
    )
    return low, high


def isoflop(N: Array, D: Array, loss: Array) -> IsoFlop:
    """From runs (three arrays of one length) at a few budgets, told apart by 6 N D.

    Raises BadInput where runs are not at budgets, a budget has fewer than three sizes, its
    parabola has no minimum, or there are fewer than two budgets.
    """
    N, D, loss = (_positive(name, v) for name, v in (("N", N), ("D", D), ("loss", loss)))
    minima = [_minimum(c, N[runs], loss[runs]) for c, runs in _budgets(6 * N * D)]
    if len(minima) < 2:
        raise BadInput("a power law needs runs at two budgets or more; there is one")
    compute, best, low, inside = (np.array(column) for column in zip(*minima, strict=True))
    exponent, intercept = np.polyfit(np.log(compute), np.log(best), 1)
    return IsoFlop(compute, best, low, inside, float(exponent), float(np.exp(intercept)))


def design(
    constants: Mapping[str, float], budgets: list[float], width: float, sizes: int = 9
) -> tuple[Array, Array]:
    """N and D of an IsoFLOP sweep: at each budget, sizes evenly spaced in ln N about the law's
    optimum, the largest `width` times the smallest."""
    if not width > 1 or sizes < 3:
        raise BadInput(f"{sizes} sizes over a width of {width:g}: it takes 3 and a width above 1")
    steps = width ** np.linspace(-0.5, 0.5, sizes)
    N = optimum(constants, np.array(budgets)).N[:, None] * steps
    return N.ravel(), (np.array(budgets)[:, None] / 6 / N).ravel()


def parabola_bias(constants: Mapping[str, float], N: Array, D: Array) -> Bias:
    """What `isoflop` would answer on these runs if their losses were the law's own, against the
    law's optimum. From Taylor error: with a = b and sizes centred on the optimum it is none."""
    E, A, B, a, b = _law(constants)
    N, D = _positive("N", N), _positive("D", D)
    found = isoflop(N, D, E + A * N**-a + B * D**-b)
    true = optimum(constants, found.compute)
    return Bias(found.compute, found.N / true.N, found.exponent - float(true.exponent[0]))


def _law(constants: Mapping[str, Array | float]) -> tuple[Array, Array, Array, Array, Array]:
    """E, A, B, a, b."""
    tied = set(constants) == {"E", "A", "B", "c"}
    if not tied and set(constants) != {"E", "A", "B", "a", "b"}:
        raise BadInput(
            f"constants {', '.join(sorted(constants))}: compute-optimal sizes are those of "
            "E + A/N^a + B/D^b, with E, A, B and a, b, or c for both"
        )
    found = []
    for name in ("E", "A", "B", *("cc" if tied else "ab")):
        value = np.asarray(constants[name], dtype=np.float64)
        least = np.nextafter(0, 1) if name in "abc" else 0
        if not np.all((value >= least) & np.isfinite(value)):
            raise BadInput(
                f"constant {name} must be finite and {'above' if least else 'at least'} 0"
            )
        found.append(value)
    E, A, B, a, b = found
    return E, A, B, a, b


def _positive(name: str, values: Array | float) -> Array:
    values = np.asarray(values, dtype=np.float64)
    if not np.all((values > 0) & np.isfinite(values)):
        raise BadInput(f"{name} must be above 0 and finite everywhere")
    return values


def _budgets(compute: Array) -> list[tuple[float, npt.NDArray[np.int64]]]:
    """Each budget (its runs' geometric mean) with its runs, rising."""
    order = np.argsort(compute, kind="stable")
    gaps = np.flatnonzero(np.diff(np.log(compute[order])) > np.log1p(SAME))
    groups = []
    for runs in np.split(order, gaps + 1):
        own = compute[runs]
        if own.max() > own.min() * (1 + SAME):
            raise BadInput(
                f"6 N D runs on from {own.min():.3g} to {own.max():.3g} with no gap: IsoFLOP runs "
                f"keep within {SAME:.0%} of their budget"
            )
        groups.append((float(np.exp(np.log(own).mean())), runs))
    return groups


def _minimum(compute: float, N: Array, loss: Array) -> tuple[float, float, float, bool]:
    """compute, N and loss at the bottom of the parabola, and whether N is within those tried."""
    if len(np.unique(N)) < 3:
        raise BadInput(f"budget {compute:.3g} has {len(np.unique(N))} sizes; a parabola needs 3")
    # About the mean, where ln N would make the powers nearly collinear.
    middle = np.log(N).mean()
    curve, slope, level = np.polyfit(np.log(N) - middle, loss, 2)
    if curve <= 0:
        raise BadInput(f"losses at budget {compute:.3g} do not bend upwards: no size is best")
    at = -slope / (2 * curve)
    best = float(np.exp(middle + at))
    return compute, best, float(level + slope * at / 2), bool(N.min() <= best <= N.max())
