"""Correlations over runs, never over the checkpoints of one.

Godey et al. 2024 find spectra and saturation together in five models; Kulkarni et al. 2026
(2602.20433) hold size, tokens, batch and so on fixed over 108. A run is one row: its spectral
measure, its outcome, its covariates.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.stats import norm, rankdata

from analysis.errors import BadInput

LEVEL, POWER = 0.95, 0.8  # of intervals (and tests at 1 - LEVEL), and of `needed`
DRAWS = 9999  # permutations
# The variance of Fisher's z of ranks, times n - 3 - k: Fieller, Hartley & Pearson 1957. It falls
# short for strong correlations; intervals take 1 + rho^2 / 2 (Bonett & Wright 2000).
FIELLER = 1.06

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Correlation:
    """A coefficient with an interval by Fisher's z and a two-sided p by permutation."""

    rho: float
    low: float
    high: float
    p: float
    needed: int | None
    """Runs that would show a correlation of this size, at 80 % power and a 5 % level; None at 0."""


@dataclass(frozen=True)
class Association:
    """Of two columns of a table, over its n rows."""

    n: int
    raw: Correlation
    """Spearman's."""
    partial: Correlation | None
    """Spearman's given the covariates: Pearson's of what their ranks leave of the ranks. None where
    no covariate is left."""
    normal: Correlation | None
    """The same of normal scores in place of ranks. Ranks of several covariates do not add up to
    the rank of their sum: where four of them make all of a raw -.67, `partial` is still -.1."""
    covariates: tuple[str, ...]
    """Those held fixed; of text a column for each value but the first, `name_value`."""
    dropped: dict[str, str]
    """Covariates that say nothing, with the reason."""


def correlation(
    table: pl.DataFrame, x: str, y: str, covariates: list[str] | None = None, *, seed: int = 0
) -> Association:
    """How x and y go together over runs, raw and given covariates: numbers, booleans or text.

    Rows count as independent: seeds of one configuration are so only given what sets it apart. p is
    by permuted residuals (Freedman & Lane 1983). Neither partial coefficient takes away an effect
    that rises and falls again. BadInput where runs are too few (n <= k + 3), a value is missing, or
    x or y is constant or follows from the covariates.
    """
    covariates = covariates or []
    _check(table, [x, y, *covariates])
    kept, columns, dropped = _independent(table, covariates)
    n, k = table.height, len(kept)
    least = max(k + 4, 5)  # of four runs even a perfect correlation has p = 2/4! > .05
    if n < least:
        raise BadInput(
            f"{n} runs cannot show how {x} goes with {y} given {k} covariates: {least} are the "
            f"least, {needed(0.5, k)} would show a correlation of .5, {needed(0.3, k)} one of .3"
        )
    both = np.stack([rankdata(table[name].to_numpy()) for name in (x, y)])
    for name, values in zip((x, y), both, strict=True):
        if np.ptp(values) == 0:
            raise BadInput(f"{name} is the same in all {n} runs: nothing to correlate")
        if _follows(values, columns):
            raise BadInput(f"{name} follows from {', '.join(kept)}: leave one of these out")
    rng = np.random.default_rng(seed)
    raw = _correlation(both, columns[:0], rng)
    partial = normal = None
    if kept:
        partial = _correlation(both, columns, rng)
        scores, given = (norm.ppf((r - 0.5) / n) for r in (both, columns))
        normal = _correlation(scores, given, rng)
    return Association(n, raw, partial, normal, tuple(kept), dropped)


def needed(rho: float, covariates: int = 0) -> int | None:
    """Runs for 80 % power to tell a (partial) rank correlation from 0 at 5 %, by Fisher's z:
    1.06 ((z_.975 + z_.8) / atanh rho)^2 + 3 + k. None at 0; never fewer than k + 4."""
    if rho == 0:
        return None
    quantiles = norm.ppf((1 + LEVEL) / 2) + norm.ppf(POWER)
    effect = math.atanh(min(abs(rho), 1 - 1e-12))
    return max(math.ceil(FIELLER * (quantiles / effect) ** 2 + 3 + covariates), covariates + 4)


def _check(table: pl.DataFrame, columns: list[str]) -> None:
    for name in columns:
        if name not in table.columns:
            raise BadInput(f"no column {name}: there are {', '.join(table.columns)}")
        column = table[name]
        absent = column.null_count() + (column.is_nan().sum() if column.dtype.is_float() else 0)
        if absent:
            raise BadInput(f"{name} has no value in {absent} of {table.height} runs")
        if columns.count(name) > 1:
            raise BadInput(f"{name} is named twice among x, y and the covariates")


def _independent(
    table: pl.DataFrame, covariates: list[str]
) -> tuple[list[str], Array, dict[str, str]]:
    """Names and ranks (k x n) of the covariates whose ranks are no combination of those before them
    and a constant; why the others are dropped."""
    given = table.select(covariates)
    text = [c.name for c in given if not (c.dtype.is_numeric() or c.dtype == pl.Boolean)]
    kept: list[str] = []
    ranks = np.empty((0, table.height))
    dropped = {c: "constant" for c in text if given[c].n_unique() == 1}
    for column in given.to_dummies(text, drop_first=True) if text else given:
        values = rankdata(column.to_numpy())
        if np.ptp(values) == 0:
            dropped[column.name] = "constant"
        elif _follows(values, ranks):
            weights = np.linalg.lstsq(_with_constant(ranks), values)[0][1:]
            named = [c for c, w in zip(kept, weights, strict=True) if abs(w) > 1e-8]
            dropped[column.name] = f"collinear with {' and '.join(named)}"
        else:
            kept.append(column.name)
            ranks = np.vstack([ranks, values])
    return kept, ranks, dropped


def _with_constant(columns: Array) -> Array:
    return np.vstack([np.ones(columns.shape[1]), columns]).T


def _residual(values: Array, columns: Array) -> Array:
    """What a constant and columns (k x n) leave of values (... x n)."""
    basis = np.linalg.qr(_with_constant(columns))[0]
    return values - values @ basis @ basis.T


def _follows(values: Array, columns: Array) -> bool:
    return bool(np.linalg.norm(_residual(values, columns)) < 1e-8 * np.linalg.norm(values))


def _correlation(both: Array, columns: Array, rng: np.random.Generator) -> Correlation:
    """Of what the columns (k x n) leave of both (2 x n)."""
    k, n = columns.shape
    x, y = _residual(both, columns)
    x /= np.linalg.norm(x)
    rho = float(np.clip(x @ y / np.linalg.norm(y), -1, 1))
    # What Freedman and Lane add back, the fitted values, the second regression takes away again.
    permuted = _residual(rng.permuted(np.tile(y, (DRAWS, 1)), axis=1), columns)
    found = permuted @ x / np.maximum(np.linalg.norm(permuted, axis=1), 1e-9)
    p = (1 + np.sum(np.abs(found) >= abs(rho) - 1e-12)) / (1 + DRAWS)
    # A perfect correlation is one at least half a swap of neighbours short of it.
    most = 1 - 6 / (n**3 - n)
    z = math.atanh(min(max(rho, -most), most))
    half = norm.ppf((1 + LEVEL) / 2) * math.sqrt((1 + rho**2 / 2) / (n - 3 - k))
    low = -1.0 if rho < -most else math.tanh(z - half)
    high = 1.0 if rho > most else math.tanh(z + half)
    return Correlation(rho, low, high, float(p), needed(rho, k))
