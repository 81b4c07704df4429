"""How laws and onsets are shown: tables on stdout."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from analysis.association import Association
from analysis.onsets import Verdict
from analysis.prediction import Prediction
from analysis.saturation import Onset
from orchestrator.terminal import print_table, short

SHOWN = 20  # rows that a table shows


def print_fit(found: Prediction, files: Sequence[Path]) -> None:
    """Constants, how well they are known, what the law says of others, and what that depends on."""
    fit, level = found.fit, f"{100 * found.level:.0f} %"
    print_table(
        ("", "value", "stderr", level),
        [
            (
                row["name"],
                _number(row["value"]),
                "fixed" if row["fixed"] else _number(row["stderr"]),
                "" if row["fixed"] else _interval(row["low"], row["high"], _number),
            )
            for row in found.constants.to_dicts()
        ],
        title=f"{fit.law.formula}  ({fit.law.name})",
    )
    left = "" if found.left_out is None else f"; of points left out {100 * found.left_out:.2f} %"
    kind = "least squares" if math.isinf(fit.delta) else f"Huber, delta {fit.delta:g}"
    what = "ln loss" if fit.log else "loss"
    print(
        f"{len(fit.data.loss)} points; {kind}, of {what}; root mean square error "
        f"{100 * fit.rmse:.2f} %{left}"
    )
    _print_held_out(found, level)
    if found.new.height:
        row = found.new.to_dicts()[0]
        where = ", ".join(f"{v} = {short(row[v])}" for v in fit.law.variables)
        ends = _interval(row["low"], row["high"], lambda x: f"{x:.4f}")
        print(f"\nat {where}: {row['law']:.4f} nats, {level} {ends}")
    _print_sensitivity(found)
    _print_optimal(found, level)
    for warning in found.warnings:
        print(f"warning: {warning}")
    for file in files:
        print(f"written   {file}")


def _print_held_out(found: Prediction, level: str) -> None:
    rest = found.points.filter(~pl.col("fitted"))
    if rest.is_empty():
        return
    names = [c for c in rest.select(pl.col(pl.String)).columns if rest[c].n_unique() > 1]
    variables = found.fit.law.variables
    rows = [
        (
            " ".join(str(row[c]) for c in names) or f"row {row['row']}",
            *(short(row[v]) for v in variables),
            f"{row['loss']:.3f}",
            f"{row['law']:.3f}",
            _percent(row["deviation"]),
            _interval(row["low"], row["high"], _percent),
        )
        for row in rest.head(SHOWN).to_dicts()
    ]
    more = f", {SHOWN} of {rest.height}" if rest.height > SHOWN else ""
    print_table(
        ("", *variables, "loss", "law", "off by", level),
        rows,
        title=f"\nHeld out: loss in nats against the law{more}",
    )
    for row in found.means.to_dicts():
        ends = _interval(row["low"], row["high"], _percent)
        what = f"mean of {row['count']} ({row['points']})"
        print(f"{what}: {_percent(row['deviation'])}, {level} {ends}")


def _print_sensitivity(found: Prediction) -> None:
    table = found.sensitivity
    if table.is_empty():
        return
    constants = [c for c in table.columns if c not in ("N", "rmse", "deviation")]
    moving = [c for c in constants if table[c].n_unique() > 1]
    print_table(
        ("N counts", *moving, "rms error", "mean off by"),
        [
            (
                row["N"],
                *(_number(row[c]) for c in moving),
                f"{100 * row['rmse']:.2f} %",
                "-" if row["deviation"] is None else _percent(row["deviation"]),
            )
            for row in table.to_dicts()
        ],
        title="\nThe same with other assumptions",
    )


def _print_optimal(found: Prediction, level: str) -> None:
    if found.optimal.is_empty():
        return
    rows = [
        (
            f"{row['compute']:.2g}",
            short(row["N"]),
            _interval(row["N_low"], row["N_high"], short),
            short(row["D"]),
            f"{row['tokens_per_parameter']:.3g}",
            f"{row['loss']:.3f}",
            f"{row['parabola']:.3f}x",
        )
        for row in found.optimal.to_dicts()
    ]
    print_table(
        ("FLOPs", "N", level, "D", "D / N", "loss", "parabola"),
        rows,
        title="\nCompute-optimal sizes (6 N D); parabola: what an IsoFLOP parabola over\n"
        "16-fold N, fitted to this law without noise, would answer for N, as a multiple",
    )
    if found.exponent:
        value, low, high = found.exponent
        ends = _interval(low, high, lambda x: f"{x:.3f}")
        print(f"N grows as FLOPs^{value:.3f}, {level} {ends}")
    if found.isoflop:
        print(f"parabolas through these points themselves: FLOPs^{found.isoflop.exponent:.3f}")


def _number(value: float) -> str:
    return f"{value:.5g}"


def _percent(share: float) -> str:
    return f"{100 * share:+.2f} %"


def _interval(low: float, high: float, form: Any) -> str:
    return f"[{form(low)}, {form(high)}]"


def print_onsets(
    found: Sequence[Verdict],
    lags: pl.DataFrame,
    associations: Mapping[str, Association | str],
    level: float,
    margin: float,
    files: Sequence[Path],
) -> None:
    """A row a series; which came first in each model; what goes together over runs."""
    sure = f"{100 * (1 - level):.4g} %"
    rows = [
        (
            f"{v.curve.model} {v.curve.metric}".strip(),
            v.kind,
            short(v.onset.best_step),
            *(f"{v.curve.back(np.array(x)):.4g}" for x in (v.onset.best, v.onset.final)),
            *_rise(v.onset),
            f"{v.p:.2g}",
            *_turn(v.onset),
        )
        for v in found
    ]
    print_table(
        ("series", "", "best at", "best", "final", "rise", sure, "p", "onset", sure),
        rows,
        title="Rises above the best: nats, ln perplexity, share of errors, ln S or cosine; p is\n"
        f"adjusted for all. worsens: p under {level:g}; no saturation: surely under {margin:g}",
    )
    undecided: dict[str, list[str]] = {}
    for v in found:
        if v.kind == "cannot tell":
            undecided.setdefault(v.onset.reason, []).append(f"{v.curve.model} {v.curve.metric}")
    for reason, names in undecided.items():
        which = f"{len(names)} series" if len(names) > 3 else ", ".join(names)
        print(f"cannot tell: {reason}: {which}")
    _print_lags(lags)
    for name, one in associations.items():
        print(f"\n{name} and the rise of the loss over runs: {_association(one)}")
    for file in files:
        print(f"written   {file}")


def _rise(onset: Onset) -> tuple[str, str]:
    if math.isnan(onset.rise):  # too few checkpoints
        return "-", ""
    return f"{onset.rise:+.3f}", _interval(onset.low, onset.high, lambda x: f"{x:+.3f}")


def _turn(onset: Onset) -> tuple[str, str]:
    if onset.onset is None or onset.onset_low is None or onset.onset_high is None:
        return "-", ""
    return short(onset.onset), _interval(onset.onset_low, onset.onset_high, short)


def _print_lags(lags: pl.DataFrame) -> None:
    if lags.is_empty():
        return
    keys = ["model", "spectrum", "loss"]
    collapses = lags["collapse"].unique(maintain_order=True).to_list()
    for (spectrum,), table in lags.group_by("spectrum", maintain_order=True):
        known = [c for c in collapses if c in table["collapse"].to_list()]
        first = table.filter(worsening="minimum")
        told = pl.any_horizontal(pl.col("collapse_at", "worsening_at").is_not_null())
        first = first.filter(told.any().over("model"))
        if first.is_empty():
            continue
        print_table(
            ("", "loss best", *known, "order"),
            [
                (
                    str(group[0]),
                    short(some["worsening_at"][0]),
                    *(
                        "-" if row["collapse_at"] is None
                        else f"{short(row['collapse_at'])} {_sign(row['first'])}"
                        for row in some.to_dicts()
                    ),
                    some["order"][0],
                )
                for group, some in first.group_by(keys, maintain_order=True)
            ],
            title=f"\nWhen {spectrum} passes a threshold: > surely after the best loss, < before",
        )  # fmt: skip


def _sign(first: str | None) -> str:
    return {"loss": ">", "spectrum": "<", None: " "}[first]


def _association(one: Association | str) -> str:
    if isinstance(one, str):
        return one
    texts = []
    for what, c in (("raw", one.raw), ("partial", one.partial), ("scores", one.normal)):
        if c is not None:
            more = f", {c.needed} runs would show as much" if c.needed and c.p > 0.05 else ""
            texts.append(
                f"{what} rho {c.rho:+.2f} [{c.low:+.2f}, {c.high:+.2f}], p {c.p:.2g}{more}"
            )
    given = f" given {', '.join(one.covariates)}" if one.covariates else ""
    left = "".join(f"; {name} left out: {why}" for name, why in one.dropped.items())
    return f"{'; '.join(texts)} over {one.n} runs{given}{left}"
