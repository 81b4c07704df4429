"""Figure 7 of the paper with numbers of one's own; what a rank costs; how dimensions grow."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from analysis import atomic, dimensions, growth
from analysis.errors import BadInput
from analysis.figures import PAPER, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = ("-", "--", "-.", ":")


def draw(directory: Path, paper: bool = False) -> list[Path]:
    """All of them that the records have, in the directory's report."""
    report = directory / "report"
    drawn = []
    errors = dimensions.curves(directory, "w_errors")
    if not errors.is_empty():
        drawn.append(w_error(errors, report / "w_error.png", paper))
        drawn.append(grown(dimensions.samples(directory), report / "growth.png"))
    ranks = dimensions.curves(directory, "softmax")
    if not ranks.is_empty():
        drawn.append(softmax(ranks, report / "softmax_rank.png"))
    return drawn


def w_error(errors: pl.DataFrame, path: Path, paper: bool = False) -> Path:
    """W-error against d, a colour for each text and a dash for each estimate, pale where singular
    values are estimated; the paper's readings (Figure 7) grey behind. `errors`:
    dimensions.curves."""
    figure, axes = _figure()
    texts = errors.select("corpus", "tokenizer", "n").unique(maintain_order=True).rows()
    estimates = errors["estimate"].unique(maintain_order=True).to_list()
    for (name,), line in errors.group_by("name", maintain_order=True):
        corpus, tokenizer, n, estimate = line.select("corpus", "tokenizer", "n", "estimate").row(0)
        colour, marker = STYLES[texts.index((corpus, tokenizer, n)) % len(STYLES)]
        style: dict[str, Any] = {
            "color": colour,
            "linestyle": LINES[estimates.index(estimate) % len(LINES)],
        }
        exact = line.filter("exact")
        rest = line.filter(pl.col("d") >= (exact["d"].max() or 0))
        axes.plot(exact["d"], exact["w_error"], label=name, **style)
        axes.plot(rest["d"], rest["w_error"], alpha=0.4, **style)
        marked = line.filter(pl.col("d").is_in([500, 1000, 2000, 4000, 8000, 12000]))
        axes.plot(marked["d"], marked["w_error"], marker, color=colour, markersize=4)
    if paper:
        readings = pl.read_csv(PAPER / "w_error.csv", comment_prefix="#")
        greys = {"pythia": ("0.7", "Pythia's"), "llama2": ("0.85", "Llama 2's")}
        for (tokenizer, _), line in readings.group_by("tokenizer", "corpus", maintain_order=True):
            grey, whose = greys[str(tokenizer)]
            label = f"the paper's texts, {whose} tokenizer"
            known = label in axes.get_legend_handles_labels()[1]
            axes.plot(
                line["d"], line["w_error"], color=grey, linewidth=1, zorder=0,
                label=None if known else label,
            )  # fmt: skip
    axes.set_xlim(0, 16_000 if paper else None)
    axes.set_ylim(0, 1)
    axes.set_xlabel("dimensions d")
    axes.set_ylabel("W-error(d)")
    return _write(figure, axes, path)


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
