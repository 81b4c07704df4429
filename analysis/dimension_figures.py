"""Figure 7 of the paper with numbers of one's own; what a rank costs; how dimensions grow."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from analysis import atomic, chart, dimensions, growth, printed
from analysis.chart import DASHES as LINES
from analysis.chart import PAPER, STYLES, Axis, Chart, Panel, points
from analysis.errors import BadInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(directory: Path, paper: bool = False) -> list[Path]:
    """All of them that the records have, in the directory's report."""
    report = directory / "report"
    drawn = []
    errors = dimensions.curves(directory, "w_errors")
    if not errors.is_empty():
        drawn += printed.write(w_error(errors, paper), report / "w_error", ("png",))
        drawn.append(grown(dimensions.samples(directory), report / "growth.png"))
    ranks = dimensions.curves(directory, "softmax")
    if not ranks.is_empty():
        drawn.append(softmax(ranks, report / "softmax_rank.png"))
    return drawn


def w_error(errors: pl.DataFrame, paper: bool = False) -> Chart:
    """Figure 7: W-error against d. `errors`: dimensions.curves."""
    kept, told = chart.some(errors, "name")
    exact = pl.when("exact").then(pl.lit("exact")).otherwise(pl.lit("estimated"))
    own = points(kept, "line", series="name", x="d", y="w_error", label=exact)
    if paper:
        read = pl.read_csv(PAPER / "w_error.csv", comment_prefix="#")
        whose = pl.format("{}, {}", "corpus", "tokenizer")
        own = pl.concat([points(read, "paper", series=whose, x="d", y="w_error"), own])
    return Chart(
        "w_error", "W-error of n-gram models",
        "What d dimensions leave of the distributions of the next token, counted, by corpus, "
        f"tokenizer, n and estimate.{told} W-error is no softmax rank: docs/dimension.md. After "
        "Godey et al. 2024, section 5.2, Figure 7."
        + (" Grey: read off it." if paper else ""),
        (Panel("", Axis("dimensions d"), Axis("W-error(d)")),), own, "Figure 7",
    )  # fmt: skip


def grown(samples: pl.DataFrame, path: Path) -> Path:
    """The d that halves W-error against tokens of text, a line for each series, and how its law
    carries on to ten times the text."""
    figure, axes = _figure()
    known = samples.drop_nulls("halved").filter(pl.col("halved") > 0)
    for i, ((name,), line) in enumerate(known.group_by("name", maintain_order=True)):
        colour, marker = STYLES[i % len(STYLES)]
        linestyle = LINES[i // len(STYLES) % len(LINES)]
        style: dict[str, Any] = {"color": colour, "linestyle": linestyle}
        tokens, d = line["tokens"].to_numpy(), line["halved"].to_numpy()
        axes.plot(tokens, d, marker=marker, label=name, **style)
        with suppress(BadInput):  # too few samples for a law
            law = growth.fit(tokens, d, line["vocabulary"][0])
            later = tokens[-1] * np.geomspace(1, 10, 20)
            middle, low, high = growth.at(law, later)
            axes.plot(later, middle, alpha=0.4, **style)
            axes.fill_between(later, low, high, color=colour, alpha=0.1, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain(axes)
    axes.set_xlabel("tokens of text (pale: what the law says of more)")
    axes.set_ylabel("d at which W-error is 0.5")
    return _write(figure, axes, path)


def softmax(ranks: pl.DataFrame, path: Path) -> Path:
    """Held-out loss of softmaxes fitted to counts against rank; of smoothed counts dotted."""
    figure, axes = _figure()
    for i, ((name,), line) in enumerate(ranks.group_by("name", maintain_order=True)):
        colour, marker = STYLES[i % len(STYLES)]
        fitted = line.filter(pl.col("rank") > 0).sort("rank")
        axes.plot(fitted["rank"], fitted["loss"], marker=marker, color=colour, label=name)
        for loss in line.filter(pl.col("rank").is_null())["loss"]:
            axes.axhline(loss, color=colour, linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    _plain(axes)
    axes.minorticks_off()
    axes.set_xlabel("rank of the softmax (dotted: smoothed counts, which no rank binds)")
    axes.set_ylabel("held-out loss (nats per token)")
    return _write(figure, axes, path)


def _plain(axes: "Axes") -> None:
    """1M and 16 in place of powers."""
    from matplotlib.ticker import EngFormatter, LogLocator

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(EngFormatter(sep=""))
            axis.set_minor_formatter(EngFormatter(sep=""))
            axis.set_minor_locator(LogLocator(subs=(2, 5)))


def _figure() -> tuple[Any, "Axes"]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write(figure: Any, axes: "Axes", path: Path) -> Path:
    axes.legend(frameon=False, fontsize="x-small")
    atomic.write(path, lambda partial: figure.savefig(partial, format="png", dpi=150))
    return path
