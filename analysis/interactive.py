"""Charts for the screen: what Plotly draws, a plot for each panel. Colours of text and grid are the
page's (page/report.js), which knows whether it is dark."""

import math
from typing import Any

import polars as pl

from analysis import chart
from analysis.chart import Axis, Chart, Panel

SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down",
    "P": "cross", "X": "x",
}  # fmt: skip
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
PALE = "rgba(140, 140, 140, 0.6)"
DENSE = 60  # points that a line can be marked at
DIGITS = 5  # significant ones, of what is embedded


def plots(whole: Chart) -> list[dict[str, Any]]:
    """One for each panel: `traces` and `layout` of Plotly, `label` for who cannot see it."""
    return [_plot(whole, panel) for panel in whole.panels]


def legend(whole: Chart) -> list[dict[str, str]]:
    """Name, colour, symbol and dash of each series."""
    return [
        {"name": name, "colour": colour, "dash": DASHES[dashes], "symbol": SYMBOLS[marker]}
        for name in whole.series
        for colour, marker, dashes in [whole.style(name)]
    ]


def _plot(whole: Chart, panel: Panel) -> dict[str, Any]:
    own, traces = chart.shown(whole.points, panel), list[dict[str, Any]]()
    for kind in chart.KINDS:
        for (name,), line in own.filter(kind=kind).group_by("series", maintain_order=True):
            traces.append(_TRACES.get(kind, _line)(line, str(name), whole, panel))
    layout: dict[str, Any] = {
        "xaxis": _axis(panel.x, own["x"].drop_nulls()),
        "yaxis": _axis(panel.y, own["y"]),
    }
    if whole.shade:
        cells = own["kind"].eq("cells").any()
        layout["coloraxis"] = _colours(cells, whole.shade, panel == whole.panels[-1])
    ours = own.filter(pl.col("kind") != "paper")["series"].n_unique()
    label = f"{panel.title or whole.title}: {panel.y.label} against {panel.x.label}, {ours} series"
    return {"traces": traces, "layout": layout, "title": panel.title, "label": label}


def _colours(cells: bool, name: str, last: bool) -> dict[str, Any]:
    bar: dict[str, Any] = {"title": {"text": name, "side": "right"}, "thickness": 12}
    if cells:  # their roots are what is drawn
        ratios = (0, 0.05, 0.2, 0.5, 1)
        bar |= {"tickvals": [r**0.5 for r in ratios], "ticktext": [f"{r:g}" for r in ratios]}
    return {"colorscale": "Viridis", "cmin": 0, "cmax": 1, "colorbar": bar, "showscale": last}


def _line(line: pl.DataFrame, name: str, whole: Chart, panel: Panel) -> dict[str, Any]:
    colour, marker, dashes = whole.style(name)
    dots = line["kind"][0] == "dots"
    symbol: dict[str, Any] = {"symbol": SYMBOLS[marker], "size": 6}
    line = line.with_columns(pl.col("label").fill_null(""))
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers" if dots else "lines" if len(line) > DENSE else "lines+markers",
        "name": name,
        "x": _numbers(line["x"]),
        "y": _numbers(line["y"]),
        "line": {"color": colour, "dash": DASHES[dashes], "width": 1.6},
        "hovertemplate": "%{y:.4g} at %{x:.4g}",
    }
    if line["shade"].count():
        trace["line"] |= {"color": "rgba(140, 140, 140, 0.8)", "width": 1}
        trace["customdata"] = _numbers(line["shade"])
        trace["hovertemplate"] += f"<br>{whole.shade} %{{customdata:.3f}}"
        symbol |= {"color": trace["customdata"], "coloraxis": "coloraxis", "size": 8}
    else:
        symbol["color"] = colour
    if line["low"].count():
        up, down = line["high"] - line["y"], line["y"] - line["low"]
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": _numbers(up.clip(0)),
            "arrayminus": _numbers(down.clip(0)),
            "thickness": 1.2,
            "width": 3,
        }
        trace["customdata"] = line.select(
            pl.format("[{}, {}]", *(pl.col(c).round_sig_figs(4) for c in ("low", "high")))
        ).to_series().fill_null("").to_list()  # fmt: skip
        trace["hovertemplate"] += " %{customdata}"
    if (line["label"] != "").any():
        trace["text"] = line["label"].to_list()
        trace["hovertemplate"] += "<br>%{text}"
    return trace | {"marker": symbol}


def _level(line: pl.DataFrame, name: str, whole: Chart, panel: Panel) -> dict[str, Any]:
    """Over the whole width: Plotly has no such trace, so the ends of what is shown."""
    others = chart.shown(whole.points, panel)["x"].drop_nulls()
    ends = [others.min(), others.max()] if len(others) else [0, 1]
    return {
        "type": "scatter", "mode": "lines", "name": name, "x": ends, "y": [line["y"][0]] * 2,
        "line": {"color": "rgba(128, 128, 128, 1)", "dash": "dash", "width": 1.4},
        "hovertemplate": "%{y:.4g}",
    }  # fmt: skip


def _paper(line: pl.DataFrame, name: str, whole: Chart, panel: Panel) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter", "mode": "lines" if len(line) > 1 else "markers", "name": name,
        "x": _numbers(line["x"]), "y": _numbers(line["y"]), "line": {"color": PALE, "width": 1.2},
        "marker": {"color": PALE}, "hovertemplate": "%{y:.4g} at %{x:.4g}, the paper's", "meta": 1,
    }  # fmt: skip
    if line["low"].count():
        half = (line["high"] - line["low"]) / 2
        trace["error_y"] = {"type": "data", "array": _numbers(half), "thickness": 4, "width": 0}
    return trace


def _cells(cells: pl.DataFrame, name: str, whole: Chart, panel: Panel) -> dict[str, Any]:
    wide = cells.pivot("x", index="y", values="shade").sort("y")
    steps = sorted(cells["x"].unique())
    values = wide.select(pl.col(str(x)).round(3) for x in steps)
    return {
        "type": "heatmap", "name": name, "coloraxis": "coloraxis",
        "z": values.select(pl.all().sqrt().round(3)).rows(),  # a collapse is among small ratios
        "customdata": values.rows(),
        "x": chart.edges(steps, panel.x.log), "y": chart.edges(wide["y"].to_list(), panel.y.log),
        "hovertemplate": "%{customdata:.3f}, index %{y:.0f} at %{x:.4g}",
    }  # fmt: skip


_TRACES = {"cells": _cells, "paper": _paper, "level": _level}


def _axis(axis: Axis, values: pl.Series) -> dict[str, Any]:
    found: dict[str, Any] = {"title": {"text": axis.label}, "type": "log" if axis.log else "linear"}
    if axis.ticks:
        found |= {"tickvals": list(axis.ticks), "ticktext": list(axis.ticks.values())}
    elif axis.log and len(values):
        ticks = _ticks(float(values.min()), float(values.max()))  # type: ignore[arg-type]
        found |= {"tickvals": ticks, "ticktext": [chart.short(tick) for tick in ticks]}
    return found


def _ticks(low: float, high: float) -> list[float]:
    """Of a logarithmic axis: powers of ten; 1, 2 and 5 of them where there are few."""
    steps = (1, 2, 5) if high < 100 * low else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [float(f"{step}e{power}") for power in powers for step in steps]


def _numbers(values: pl.Series) -> list[float | None]:
    return values.round_sig_figs(DIGITS).fill_nan(None).to_list()
