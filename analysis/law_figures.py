"""What a law says beside what was measured (Figure 1b of the paper)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from analysis import atomic, powerlaw
from analysis.chart import STYLES
from analysis.powerlaw import Draws, Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = 7  # curves of a law that a figure can hold
PALE: dict[str, Any] = {"color": "0.55", "linewidth": 1, "zorder": 0}


def law(fit: Fit, draws: Draws, points: pl.DataFrame, path: Path, level: float) -> Path:
    """Losses with the law and its interval, and how far each is from it, with its interval:
    points that were fitted full, held out hollow. `points`: of `prediction.Prediction`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    loss, deviation = figure.subplots(1, 2)
    axis = _axis(fit, points)
    others = [v for v in fit.law.variables if v != axis]
    lines = list(points.group_by(others, maintain_order=True)) if others else [((), points)]
    for i, (values, line) in enumerate(lines):
        colour, marker = STYLES[i % len(STYLES)]
        label = ", ".join(f"{v} = {_short(x)}" for v, x in zip(others, values, strict=True))
        few = len(lines) <= LINES
        if few:
            _curve(loss, fit, draws, axis, line, level)
        for fitted, some in line.group_by("fitted"):
            face = colour if fitted[0] else "white"
            style: dict[str, Any] = {
                "color": colour,
                "marker": marker,
                "linestyle": "",
                "markerfacecolor": face,
            }
            loss.plot(some[axis], some["loss"], **style)
            high, low = some["high"] - some["deviation"], some["deviation"] - some["low"]
            ends = [100 * low.clip(0), 100 * high.clip(0)]
            deviation.errorbar(
                some[axis], 100 * some["deviation"], ends, capsize=2, elinewidth=0.8, **style
            )
        if few:
            loss.plot([], [], color=colour, marker=marker, linestyle="", label=label)
    deviation.axhline(0, **PALE)
    for axes, name in (
        (loss, "loss (nats per token)"),
        (deviation, f"loss over law (%), with {100 * level:.0f} % interval"),
    ):
        axes.set_xscale("log")
        axes.set_xlabel(axis)
        axes.set_ylabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    if not points["fitted"].all():
        loss.plot([], [], "o", color="0.3", label="fitted")
        loss.plot([], [], "o", color="0.3", markerfacecolor="white", label="held out")
    if loss.get_legend_handles_labels()[0]:
        loss.legend(frameon=False, fontsize="x-small")
    constants = ", ".join(f"{k} = {v:.4g}" for k, v in fit.constants.items())
    figure.suptitle(f"{fit.law.formula}    {constants}", fontsize="small")
    atomic.write(path, lambda partial: figure.savefig(partial, format="png", dpi=150))
    return path


def _axis(fit: Fit, points: pl.DataFrame) -> str:
    """The variable that leaves the fewest lines, and of those the first."""
    variables = fit.law.variables
    return min(
        variables,
        key=lambda v: points.select(u for u in variables if u != v).unique().height,
    )


def _curve(
    axes: "Axes", fit: Fit, draws: Draws, axis: str, line: pl.DataFrame, level: float
) -> None:
    x = {axis: np.geomspace(line[axis].min(), line[axis].max(), 60)}  # type: ignore[arg-type]
    x |= {v: np.full(60, line[v][0]) for v in fit.law.variables if v != axis}
    low, high = powerlaw.ends(draws.predict(x), level)
    axes.fill_between(x[axis], low, high, color="0.9", linewidth=0, zorder=-1)
    axes.plot(x[axis], fit.predict(x), **PALE)


def _short(value: float) -> str:
    return f"{value:.3g}".replace("e+0", "e").replace("e+", "e")
