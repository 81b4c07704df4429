"""What a law fitted to some models says of others, and what that answer depends on.

Godey et al. 2024, section 3 and Figure 1b: small models against the law of the large ones. The sign
of their answer depends on the E that was held fixed and on what N counts (docs/laws.md).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import polars as pl

from analysis import frontier, points, powerlaw
from analysis.errors import BadInput
from analysis.laws import LAWS, Law
from analysis.powerlaw import Data, Draws, Fit

SHARES = (0.8, 0.9, 1.0, 1.1, 1.2)  # of a fixed E, to see what depends on it
BITS = 1 / math.log(2)


@dataclass(frozen=True)
class Settings:
    """How a law is fitted."""

    fixed: Mapping[str, float]
    delta: float = 1e-3
    """Of Huber's loss, in ln of the loss; infinite: least squares."""
    log: bool = True
    """Whether residuals are those of ln loss."""
    weighted: bool = False
    """By standard errors."""
    kind: powerlaw.Kind = "residual"
    """Of bootstrap."""
    draws: int = 1000
    level: float = 0.95
    """Of intervals."""


@dataclass(frozen=True)
class Prediction:
    fit: Fit
    draws: Draws
    level: float
    constants: pl.DataFrame
    """A row for each: name, value, stderr, low, high, fixed."""
    points: pl.DataFrame
    """A row for each point: row, model, the variables, loss, fitted; law, and of loss / law - 1 the
    deviation, with low and high (of a fitted point only of the law's own spread)."""
    means: pl.DataFrame
    """Mean deviation of the points held out: of all, and by each text column that splits them:
    points, count, deviation, low, high."""
    new: pl.DataFrame
    """Points that nobody has measured: the variables, law, low, high."""
    left_out: float | None
    """Root mean square error of ln loss of each point, or model, by a law fitted without it."""
    sensitivity: pl.DataFrame
    """The same with other fixed E and other counts of N: N, E, rmse, deviation, and constants."""
    optimal: pl.DataFrame
    """Where the law has N and D: compute, N, D, tokens_per_parameter, loss, with _low, _high; and
    parabola: N of a parabola on an IsoFLOP sweep of width 16 over the law's."""
    exponent: tuple[float, float, float] | None
    """Of the optimal N in compute, with its interval."""
    isoflop: frontier.IsoFlop | None
    """Approach 2, where the points are IsoFLOP sweeps."""
    warnings: list[str]


def law(name: str) -> Law:
    """By its name."""
    if name not in LAWS:
        forms = "; ".join(f"{known.name}: {known.formula}" for known in LAWS.values())
        raise BadInput(f"--form: no law is called {name!r}. There are {forms}")
    return LAWS[name]


def predict(
    frame: pl.DataFrame,
    law: Law,
    settings: Settings,
    given: Mapping[str, str],
    where: str | None = None,
    held_out: str | None = None,
    new: Mapping[str, float] | None = None,
    budgets: list[float] | None = None,
) -> Prediction:
    """Fit a law to the rows of a table that meet `where` and set the rows that meet `held_out`, by
    default all others, against it. `given`: where variables are found, see `points.named`."""
    counts = _counts(frame, given) if "N" in law.variables else []
    frame = points.numbered(points.named(frame, [*law.variables, "loss"], given))
    frame = points.named(frame, ["stderr", "model"], given, optional=True)
    kept, rest = _split(frame, where, held_out)
    kept = points.check(kept, law.variables)
    data = _data(kept, law, settings, given)
    found = powerlaw.fit(law, data, settings.fixed, settings.delta, settings.log)
    drawn = powerlaw.bootstrap(found, settings.kind, settings.draws)
    rest = points.check(rest, law.variables)
    every = pl.concat([kept.with_columns(fitted=True), rest.with_columns(fitted=False)])
    warnings = [*found.warnings, *points.doubts(every, given), *_in_bits(found, kept)]
    if law.endpoints and points.steps_within(kept):
        warnings.append(
            f"{law.name} describes ends of annealed runs; these are points along runs, and what "
            "the schedule does goes into the constants (form annealing)"
        )
    sensitivity = _sensitivity(kept, rest, law, settings, given, counts)
    off = sensitivity["deviation"].drop_nulls()
    if (off > 0).any() and (off < 0).any():
        warnings.append(
            "the sign of the mean deviation depends on the E held fixed and on what N counts"
        )
    return Prediction(
        found,
        drawn,
        settings.level,
        _constants(found, drawn, settings.level),
        _points(every, drawn, settings.level),
        _means(rest, drawn, law, settings.level),
        _new(law, drawn, new, settings.level),
        _left_out(found),
        sensitivity,
        *_optimal(found, drawn, budgets),
        warnings,
    )


def _split(
    frame: pl.DataFrame, where: str | None, held_out: str | None
) -> tuple[pl.DataFrame, pl.DataFrame]:
    kept = points.where(frame, where, "--where") if where else frame
    if held_out:
        rest = points.where(frame, held_out, "--predict")
        kept = kept.join(rest, on="row", how="anti")
        if kept.is_empty():
            raise BadInput(f"--predict: {held_out!r} leaves no row to fit")
        return kept, rest
    return kept, frame.join(kept, on="row", how="anti")


def _data(frame: pl.DataFrame, law: Law, settings: Settings, given: Mapping[str, str]) -> Data:
    stderr = groups = None
    if settings.weighted:
        if "stderr" not in frame.columns:
            raise BadInput("--weighted: no column for stderr; --column stderr=NAME")
        stderr = frame["stderr"].cast(pl.Float64).to_numpy()
    if settings.kind == "model":
        if "model" not in frame.columns:
            raise BadInput("--bootstrap model: no column for model; --column model=NAME")
        groups = frame["model"].to_numpy()
    x = {v: frame[v].cast(pl.Float64).to_numpy() for v in law.variables}
    return Data(x, frame["loss"].to_numpy(), stderr, groups)


def _in_bits(found: Fit, kept: pl.DataFrame) -> list[str]:
    """Among losses in nats, those that look like bits."""
    off = np.exp(found.residuals)
    rows = kept["row"].to_numpy()[np.abs(off / BITS - 1) < 0.04]
    if not len(rows) or np.median(np.abs(off - 1)) > 0.04:
        return []
    return [f"row {rows[0]} is {BITS:.2f} times what the law of the others says: in bits?"]


def _constants(found: Fit, drawn: Draws, level: float) -> pl.DataFrame:
    intervals, errors = drawn.interval(level), drawn.stderr
    rows = []
    for name, value in found.constants.items():
        row = {"name": name, "value": value, "fixed": name in found.fixed}
        if not row["fixed"]:
            low, high = intervals[name]
            row |= {"stderr": errors[name], "low": low, "high": high}
        rows.append(row)
    columns = {"name": pl.String, "fixed": pl.Boolean}
    numbers = dict.fromkeys(("value", "stderr", "low", "high"), pl.Float64)
    return pl.DataFrame(rows, {**columns, **numbers}).select("name", *numbers, "fixed")


def _points(every: pl.DataFrame, drawn: Draws, level: float) -> pl.DataFrame:
    found, law = drawn.fit, drawn.fit.law
    x = {v: every[v].to_numpy() for v in law.variables}
    loss = every["loss"].to_numpy()
    with np.errstate(divide="ignore"):  # a draw may have lost every term
        low, high = powerlaw.ends(loss / drawn.predict(x) - 1, level)
    off = loss / found.predict(x) - 1
    if len(held := np.flatnonzero(~every["fitted"].to_numpy())):
        rest = Data({v: some[held] for v, some in x.items()}, loss[held])
        beyond = powerlaw.extrapolate(drawn, rest, level)
        low[held], high[held] = beyond.low, beyond.high
    names = [c for c in ("row", "model") if c in every.columns]
    texts = _kinds(every)
    return every.select(*names, *texts, *law.variables, "loss", "fitted").with_columns(
        law=found.predict(x), deviation=off, low=low, high=high
    )


def _kinds(frame: pl.DataFrame) -> list[str]:
    """Text columns, but for the model's name."""
    return frame.select(pl.col(pl.String).exclude(points.NAMES["model"])).columns


def _means(rest: pl.DataFrame, drawn: Draws, law: Law, level: float) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []

    def add(name: str, some: pl.DataFrame) -> None:
        data = Data({v: some[v].to_numpy() for v in law.variables}, some["loss"].to_numpy())
        mean = powerlaw.extrapolate(drawn, data, level)
        ends = {"low": mean.mean_low, "high": mean.mean_high}
        rows.append({"points": name, "count": some.height, "deviation": mean.mean, **ends})

    if rest.height:
        add("all held out", rest)
        for column in _kinds(rest):
            if 1 < rest[column].n_unique() < rest.height:
                for (value,), some in rest.group_by(column, maintain_order=True):
                    add(f"{column} = {value}", some)
    numbers = dict.fromkeys(("deviation", "low", "high"), pl.Float64)
    return pl.DataFrame(rows, {"points": pl.String, "count": pl.Int64, **numbers})


def _new(law: Law, drawn: Draws, new: Mapping[str, float] | None, level: float) -> pl.DataFrame:
    if not new:
        return pl.DataFrame()
    if set(new) != set(law.variables):
        raise BadInput(
            f"--predict: {law.name} needs {', '.join(law.variables)}, not {', '.join(new)}"
        )
    if any(value <= 0 and v not in points.SIGNED for v, value in new.items()):
        raise BadInput("--predict: values above 0 are needed")
    x = {v: np.array([value], float) for v, value in new.items()}
    low, high = powerlaw.ends(drawn.predict(x)[:, 0], level)
    return pl.DataFrame([{**new, "law": float(drawn.fit.predict(x)[0]), "low": low, "high": high}])


def _left_out(found: Fit) -> float | None:
    try:
        errors = powerlaw.leave_one_out(found)
    except BadInput:  # too few points: then there is no such error
        return None
    return float(np.sqrt(np.mean(errors**2)))


def _sensitivity(
    kept: pl.DataFrame,
    rest: pl.DataFrame,
    law: Law,
    settings: Settings,
    given: Mapping[str, str],
    counts: list[str],
) -> pl.DataFrame:
    """Only where there is something to ask: an E that was fixed, or another count of N."""
    fixed = settings.fixed
    held = [{"E": share * fixed["E"]} for share in SHARES] if "E" in fixed else [{}]
    rows: list[dict[str, Any]] = []
    if len(counts) * len(held) > 1:
        for count, E in product(counts or [""], held):
            some, other = (f.with_columns(N=pl.col(count)) if count else f for f in (kept, rest))
            data = _data(some, law, settings, given)
            try:
                found = powerlaw.fit(law, data, {**fixed, **E}, settings.delta, settings.log)
            except BadInput:
                continue
            row = {"N": count, "rmse": found.rmse, "deviation": None, **found.constants}
            if other.height:
                x = {v: other[v].cast(pl.Float64).to_numpy() for v in law.variables}
                row["deviation"] = float(np.mean(other["loss"].to_numpy() / found.predict(x) - 1))
            rows.append(row)
    if not rows:
        return pl.DataFrame(schema={"deviation": pl.Float64})
    return pl.DataFrame(rows, schema_overrides={"deviation": pl.Float64})


def _counts(frame: pl.DataFrame, given: Mapping[str, str]) -> list[str]:
    """The columns that N could be: the one it is, and what else counts parameters."""
    own = (given.get("N") or str(points.usual(frame, "N"))).strip('"')
    others = [c for c in (*points.NAMES["N"], *points.BODIES) if c in frame.columns and c != own]
    return [own if own in frame.columns else "N", *others]


def _optimal(
    found: Fit, drawn: Draws, budgets: list[float] | None
) -> tuple[pl.DataFrame, tuple[float, float, float] | None, frontier.IsoFlop | None]:
    x = found.data.x
    if found.law.name not in ("chinchilla", "gadre") or not (
        found.constants["A"] > 0 and found.constants["B"] > 0
    ):
        return pl.DataFrame(), None, None
    flops = 6 * x["N"] * x["D"]
    budgets = budgets or [float(c) for c in np.geomspace(flops.min(), flops.max(), 4)]
    best = frontier.frontier(found.constants, drawn.constants, budgets)
    N, D = frontier.design(found.constants, [*budgets, 10 * max(budgets)], 16.0)
    bias = frontier.parabola_bias(found.constants, N, D)
    try:
        isoflop = frontier.isoflop(x["N"], x["D"], found.data.loss)
    except BadInput:  # no sweep at equal compute
        isoflop = None
    table = best.budgets.with_columns(parabola=bias.ratio[: len(budgets)])
    return table, best.exponent, isoflop


def as_json(found: Prediction) -> dict[str, Any]:
    """All of it, for machines; the draws too, so that the law can be used again."""
    fit = found.fit
    return {
        "form": fit.law.name,
        "formula": fit.law.formula,
        "objective": {
            "kind": "squares" if math.isinf(fit.delta) else "huber",
            "of": "ln loss" if fit.log else "loss",
            "delta": fit.delta,
            "value": fit.objective,
        },
        "constants": found.constants.to_dicts(),
        "rmse": fit.rmse,
        "left_out_rmse": found.left_out,
        "covariance": {
            "of": "ln of constants, exponents as they are",
            "names": found.draws.names,
            "values": found.draws.covariance.tolist(),
        },
        "held_out": found.means.to_dicts(),
        "points": found.points.to_dicts(),
        "new": found.new.to_dicts(),
        "sensitivity": found.sensitivity.to_dicts(),
        "compute_optimal": {
            "budgets": found.optimal.to_dicts(),
            "exponent": found.exponent,
            "isoflop_exponent": found.isoflop.exponent if found.isoflop else None,
        },
        "warnings": found.warnings,
        "draws": {name: c.tolist() for name, c in found.draws.constants.items()},
    }
