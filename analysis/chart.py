"""A figure as data: what is plotted, as a tidy table, and how to read it. `printed` puts it on
paper, `interactive` on a screen; nothing is drawn that the table does not hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from analysis import atomic, tables

PAPER = Path(__file__).parent / "paper"

POINTS: dict[str, type[pl.DataType]] = {
    "panel": pl.String,
    "series": pl.String,
    "kind": pl.String,
    "x": pl.Float64,
    "y": pl.Float64,
    "low": pl.Float64,  # ends of the interval of y
    "high": pl.Float64,
    "shade": pl.Float64,  # what colour tells
    "label": pl.String,  # of the point
}
# line, dots: of a series. level: a horizontal line at y. paper: read off the paper, pale. cells: of
# a heat map, shaded.
KINDS = ("cells", "paper", "level", "line", "dots")

# Okabe and Ito's colours; each with a marker of its own, to be told apart without colour too.
STYLES = list(
    zip(
        ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6BB3"],
        ["o", "s", "^", "D", "v", "P", "X"],
        strict=True,
    )
)
DASHES = ("-", "--", ":", "-.")
MOST, PANELS = 40, 8  # series of a chart; where each has a panel of its own


@dataclass(frozen=True)
class Axis:
    label: str
    log: bool = False
    ticks: dict[float, str] = field(default_factory=dict)
    """In the place of those that a library finds."""


@dataclass(frozen=True)
class Panel:
    name: str
    x: Axis
    y: Axis
    title: str = ""


@dataclass(frozen=True)
class Chart:
    name: str
    """Of its files."""
    title: str
    caption: str
    """What is shown, of how many seeds, with which intervals, from where."""
    panels: tuple[Panel, ...]
    points: pl.DataFrame
    """POINTS, in the order of drawing."""
    number: str = ""
    """Of the paper's figure."""
    shade: str = ""
    """What `shade` is."""
    styled: tuple[str, ...] = ()
    """Series in the order of their styles; by default that of `points`."""

    def style(self, series: str) -> tuple[str, str, str]:
        """Colour, marker and dashes: another kind of line once colours are used up."""
        names = self.styled or tuple(self.series)
        turn, which = divmod(names.index(series), len(STYLES))
        return (*STYLES[which], DASHES[turn % len(DASHES)])

    @property
    def series(self) -> list[str]:
        """Ours, not the paper's."""
        own = self.points.filter(pl.col("kind").is_in(["line", "dots"]))
        return own["series"].unique(maintain_order=True).to_list()

    @property
    def heading(self) -> str:
        return f"{self.number}: {self.title}" if self.number else self.title


def points(frame: pl.DataFrame, kind: str, panel: str = "", **columns: Any) -> pl.DataFrame:
    """Rows of POINTS: each column by expression, name or value; those left out are null. Rows that
    have no number to show are left out."""
    known = {"kind": pl.lit(kind), "panel": pl.lit(panel), **columns}
    made = frame.select(**{k: known.get(k, pl.lit(None)) for k in POINTS})
    shown = made.cast(POINTS)  # type: ignore[arg-type]
    return shown.filter(pl.col("y").is_finite(), pl.col("x").is_null() | pl.col("x").is_finite())


def some(frame: pl.DataFrame, by: str, most: int = MOST) -> tuple[pl.DataFrame, str]:
    """At most so many of what `by` tells apart, evenly over its order; and what to say of it."""
    names = frame[by].unique(maintain_order=True).to_list()
    if len(names) <= most:
        return frame, ""
    told = f" {most} of {len(names):,} series are shown."
    return frame.filter(pl.col(by).is_in(tables.evenly(names, most))), told


def shown(points: pl.DataFrame, panel: Panel) -> pl.DataFrame:
    """What a panel can show: a logarithm has no place for what is not positive."""
    own = points.filter(panel=panel.name)
    for name, axis in (("x", panel.x), ("y", panel.y)):
        if axis.log:
            own = own.filter((pl.col(name) > 0) | pl.col(name).is_null())
    return own


def write_csv(chart: Chart, path: Path) -> Path:
    """Every plotted number."""
    kept = [c for c in POINTS if chart.points[c].null_count() < chart.points.height]
    text = chart.points.select(kept).write_csv()
    atomic.write_text(path, text)
    return path


def edges(centres: Sequence[float], log: bool) -> list[float]:
    """Of cells around their centres, rising."""
    x = [math.log(c) for c in centres] if log else [*centres]
    gaps = [(b - a) / 2 for a, b in pairwise(x)] or [0.5]
    found = [x[0] - gaps[0], *(a + g for a, g in zip(x[:-1], gaps, strict=False)), x[-1] + gaps[-1]]
    return [math.exp(e) for e in found] if log else found


def short(value: float) -> str:
    """1k, 20M, 1e18."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= value < 1000 * size:
            return f"{value / size:g}{letter}"
    return f"{value:g}".replace("e+", "e")
