"""Charts for print: PNG, SVG and PDF, the same chart to the same bytes."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from analysis import atomic, chart
from analysis.chart import Axis, Chart, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZES = {True: (2.6, 2.2, 4), False: (4.8, 3.4, 2)}  # of panels of cells, of others; in a row
KINDS = ("png", "svg", "pdf")
PALE: dict[str, Any] = {"color": "0.72", "linewidth": 1, "zorder": 0}


def write(shown: Chart, path: Path, kinds: tuple[str, ...] = KINDS) -> list[Path]:
    """`path`.png and the others."""
    import matplotlib

    figure, files = draw(shown), []
    for kind in kinds:
        files.append(path.with_name(f"{path.name}.{kind}"))
        dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
        with matplotlib.rc_context({"svg.hashsalt": "lmsat"}):
            save = partial(figure.savefig, format=kind, dpi=150, metadata=dates)
            atomic.write(files[-1], save)
        figure.set_layout_engine(None)  # laid out by the first, for all
    return files


def draw(shown: Chart) -> "Figure":
    """As a figure of matplotlib, whose axes are the panels in their order."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure

    cells = shown.points["kind"].eq("cells").any()
    width, height, most = SIZES[cells]
    columns = min(most, len(shown.panels))
    rows = -(-len(shown.panels) // columns)
    figure = Figure(figsize=(1.2 + width * columns, 0.6 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(shown.panels) :]:
        axes.remove()
    norm = PowerNorm(0.5, 0, 1) if cells else Normalize(0, 1)
    scale = ScalarMappable(norm, "viridis")
    scale.cmap = scale.cmap.with_extremes(bad="0.85")  # where it was not measured
    for axes, panel in zip(grid, shown.panels, strict=False):
        _panel(axes, shown, panel, scale)
    if shown.shade:
        figure.colorbar(scale, ax=grid[: len(shown.panels)], label=shown.shade, aspect=30)
    _legend(figure)
    return figure


def _panel(axes: "Axes", whole: Chart, panel: Panel, scale: Any) -> None:
    own = chart.shown(whole.points, panel)
    ends = []
    for kind in chart.KINDS:
        for (name,), line in own.filter(kind=kind).group_by("series", maintain_order=True):
            if kind == "cells":
                _cells(axes, line, panel, scale)
            elif kind == "level":
                number = own.filter(kind=kind)["series"].unique(maintain_order=True).to_list()
                dashes = ("--", ":", "-.")[number.index(name) % 3]
                axes.axhline(line["y"][0], color="0.35", linestyle=dashes, label=str(name))
            elif kind == "paper":
                _paper(axes, line)
                ends.append((str(name), line["x"][-1], line["y"][-1]))
            else:
                _line(axes, line, whole.style(str(name)), str(name), kind == "dots", scale)
    for which, axis in (("x", panel.x), ("y", panel.y)):
        _axis(axes, which, axis)
    axes.set_title(panel.title, fontsize="small")
    if own["kind"].eq("paper").any():
        axes.set_title("grey: read off the paper", fontsize="x-small", color="0.4", loc="right")
    axes.spines[["top", "right"]].set_visible(False)
    _name_ends(axes, ends)


def _line(
    axes: "Axes", line: pl.DataFrame, style: tuple[str, str, str], name: str, dots: bool, scale: Any
) -> None:
    colour, marker, dashes = style
    x, y, shaded = line["x"], line["y"], line["shade"].count() > 0
    common: dict[str, Any] = {
        "label": name,
        "color": "0.6" if shaded else colour,
        "linestyle": "" if dots else dashes,
    }
    if shaded:
        axes.plot(x, y, linewidth=0.8, zorder=1, marker=marker, markersize=0.1, **common)
        shades = line["shade"].fill_null(np.nan)
        rim: dict[str, Any] = {
            "marker": marker,
            "edgecolors": "0.25",
            "linewidths": 0.3,
            "plotnonfinite": True,
        }
        axes.scatter(x, y, 18, shades, cmap=scale.cmap, norm=scale.norm, **rim)
    elif line["low"].count():
        ends = (y - line["low"]).clip(0), (line["high"] - y).clip(0)
        bars = np.nan_to_num(np.array([e.fill_null(0).to_numpy() for e in ends]))
        axes.errorbar(x, y, bars, marker=marker, markersize=4, capsize=2, **common)
    else:
        dense = max(1, len(line) // 24)
        axes.plot(x, y, marker=marker, markersize=4, markevery=dense, **common)


def _paper(axes: "Axes", line: pl.DataFrame) -> None:
    """A line, or points with what they range over."""
    if line["low"].count():
        ends = (line["y"] - line["low"], line["high"] - line["y"])
        axes.errorbar(line["x"], line["y"], ends, linestyle="", elinewidth=4, **PALE)
    else:
        axes.plot(line["x"], line["y"], marker="" if len(line) > 1 else "_", **PALE)


def _cells(axes: "Axes", cells: pl.DataFrame, panel: Panel, scale: Any) -> None:
    wide = cells.pivot("x", index="y", values="shade").sort("y")
    steps = sorted(cells["x"].unique())
    values = wide.select(str(x) for x in steps).to_numpy()
    across, up = chart.edges(steps, panel.x.log), chart.edges(wide["y"].to_list(), panel.y.log)
    axes.pcolormesh(across, up, values, cmap=scale.cmap, norm=scale.norm, rasterized=True)


def _axis(axes: "Axes", which: str, wanted: Axis) -> None:
    """Logarithmic axes with plain numbers: probes lie evenly in log(step)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis = getattr(axes, f"{which}axis")
    axes.set(**{f"{which}label": wanted.label})
    if wanted.log:
        axes.set(**{f"{which}scale": "log"})
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: chart.short(value)))
    if wanted.ticks:
        axis.set_ticks(list(wanted.ticks), list(wanted.ticks.values()))
        axis.set_minor_locator(NullLocator())
        axis.set_tick_params(labelsize="small")


def _name_ends(axes: "Axes", ends: list[tuple[str, float, float]]) -> None:
    """Name lines beside the axes, tied to their last points (name, x, y) and apart."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[2])
    places = axes.transData.transform([end[1:] for end in ends])
    heights = axes.transAxes.inverted().transform(places)[:, 1]
    gap = min(0.045, 1 / len(ends))
    for _ in range(1000):
        push = np.maximum(gap - np.diff(heights), 0) / 2
        heights[1:] += push
        heights[:-1] -= push
        heights = heights.clip(0, 1)
    tie = {"arrowstyle": "-", "color": "0.7", "linewidth": 0.5, "shrinkA": 0, "relpos": (0, 0.5)}
    beside: dict[str, Any] = {"textcoords": "axes fraction", "arrowprops": tie, "va": "center"}
    for (name, x, y), height in zip(ends, heights, strict=True):
        axes.annotate(name, (x, y), (1.04, height), fontsize="x-small", color="0.3", **beside)


def _legend(figure: "Figure") -> None:
    """Below the panels, not at their cost; a name once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if not found:
        return
    wide = figure.get_figwidth() * 20  # letters
    columns = min(5, max(1, int(wide // (8 + max(map(len, found))))))
    figure.set_figheight(figure.get_figheight() + 0.16 * -(-len(found) // columns))
    figure.legend(
        [*found.values()], [*found], loc="outside lower center", ncols=columns,
        fontsize="x-small", frameon=False,
    )  # fmt: skip
