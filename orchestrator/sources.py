"""What laws and onsets are asked of: a sweep or probed directory by name, or a table."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from analysis import points, powerlaw, ranks, records, tables
from analysis.curves import Curve, of_records, of_table
from analysis.errors import BadInput, blame
from analysis.laws import LAWS, areas
from orchestrator import ledger
from trainables import schedule

# Of a trial's columns those that its name already tells, or that are alike in all.
UNUSED = ("trial", "search", "series", "size", "kind", "init", "status")
LEVEL = 0.95  # of a law's interval


def directory(name: str, out: Path) -> Path | None:
    """The sweep, or what was probed, of that name; None where it must be a table."""
    found = (d for d in (out / name, Path(name)) if (d / "records").is_dir())
    return next(found, None)


def report(name: str, out: Path) -> Path:
    """Where answers about it are written."""
    found = directory(name, out)
    return (found if found else out / Path(name).stem) / "report"


def table(name: str, out: Path, along: bool) -> pl.DataFrame:
    """The points of a table as they are; of a sweep each finished trial's last held-out loss or,
    `along`, every held-out loss with the areas S1 and S2 of its schedule."""
    sweep = directory(name, out)
    if sweep is None:
        return points.read(Path(name))
    found = _along(sweep) if along else _ends(sweep)
    if found.is_empty():
        raise BadInput(f"{name}: no trial has a held-out loss yet")
    return found.drop(UNUSED, strict=False)


def curves(
    name: str, out: Path, where: str | None, given: dict[str, str], better: str | None
) -> list[Curve]:
    """The series of a table, or of a sweep's records."""
    sweep = directory(name, out)
    if sweep is None:
        frame = points.read(Path(name))
        with blame(name):
            kept = points.where(frame, where, "--where") if where else frame
            return of_table(kept, given, better)
    if where:
        raise BadInput("--where: is for tables; a sweep is taken whole")
    found = of_records(sweep)
    if not found:
        raise BadInput(f"{name}: no trial was measured at two steps or more")
    settings = {entry["trial"]["name"]: _numbers(entry["trial"]) for entry in _entries(sweep)}
    return [replace(c, facts={**settings.get(c.model, {}), **c.facts}) for c in found]


def _numbers(trial: dict[str, Any]) -> dict[str, float]:
    """What may be a covariate: the numbers of a trial's `train`, and its kind of residual."""
    train = {k: float(v) for k, v in trial["train"].items() if isinstance(v, int | float)}
    return {**train, "parallel": float(trial["model"]["residual"] == "parallel")}


def laws(path: Path, series: list[Curve]) -> dict[str, tuple[float, float, float]]:
    """What the law of a fit-*.json says of each model at its last step, with its interval."""
    try:
        answer = json.loads(path.read_text())
        law = LAWS[answer["form"]]
        drawn = {name: np.array(c, float)[:, None] for name, c in answer["draws"].items()}
        constants = {row["name"]: float(row["value"]) for row in answer["constants"]}
        names = (*law.constants, *law.exponents)
        if not constants.keys() == drawn.keys() == set(names):
            raise ValueError(f"the constants of {law.name} are {', '.join(names)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"--law: {path} is no fit-*.json of lmsat fit ({error})") from None
    found = {}
    for one in series:
        if set(law.variables) <= set(one.facts):
            x = {v: np.array([one.facts[v]]) for v in law.variables}
            low, high = powerlaw.ends(powerlaw.predict(law, drawn, x).ravel(), LEVEL)
            found[one.model] = (float(powerlaw.predict(law, constants, x)[0]), low, high)
    if not found:
        raise BadInput(f"--law: {law.name} needs {', '.join(law.variables)} of every series")
    return found


def _ends(sweep: Path) -> pl.DataFrame:
    ends = tables.final_losses(sweep).with_columns(
        rank=pl.coalesce("rank", "d"), unique_tokens=pl.col("tokens") / pl.col("epochs")
    )
    if not ends.is_empty():
        return ends
    heads = [
        b.heads.filter(pl.col("rank").is_not_null()).with_columns(
            name=pl.concat_str(pl.lit(b.name), "family", separator=" ")
        )
        for b in ranks.fitted(sweep)
    ]
    return pl.concat(heads) if heads else ends


def _along(sweep: Path) -> pl.DataFrame:
    losses = records.scan(sweep, "scalars").filter(split="held_out", metric="loss")
    trials = records.scan(sweep, "trials").drop("tokens", "step")
    found = losses.filter(pl.col("step") > 0).drop("split", "metric", "layer", "time")
    rows = found.rename({"value": "loss"}).join(trials, on="trial").sort("name", "step").collect()
    plans = {entry["id"]: entry for entry in _entries(sweep)}
    if rows.is_empty() or not plans:
        return rows
    return pl.concat(
        _areas(some, plans[str(trial)])
        for (trial,), some in rows.group_by("trial", maintain_order=True)
    )


def _entries(sweep: Path) -> list[dict[str, Any]]:
    """What was planned of each trial; nothing of checkpoints that were only probed."""
    return [entry for entry in ledger.read(sweep).values() if "trial" in entry]


def _areas(rows: pl.DataFrame, entry: dict[str, Any]) -> pl.DataFrame:
    train, steps = entry["trial"]["train"], entry["steps"]
    rates = np.array([schedule.rate(train, step, steps) for step in range(steps)])
    after = rows["step"].to_numpy() - 1
    S1, S2 = (area[after] for area in areas(rates))
    return rows.with_columns(S1=S1, S2=S2)
