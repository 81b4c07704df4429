"""What happens inside models while they train, in the form of Figures 2 to 5 of Godey et al. 2024
(arXiv 2404.07647), a series for each trial. `paper` adds readings off the paper's own figures.

Each figure is written as `path`.png and `path`.svg; where the records hold nothing for it, not at
all. Of very many series the first by name are drawn. Step 0 is left out of logarithmic axes.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from analysis import atomic, records
from analysis.figures import PAPER, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST, PANELS = 100, 8  # series of a figure; where each has a panel of its own
INDICES = 100  # of a spectrum, that the paper shows
SPECTRA = ("pythia-14m", "pythia-410m")  # of the paper: one that saturates, one that does not
LINES = ("-", "--", ":", "-.")
NOTE = {"fontsize": "small", "color": "0.4", "loc": "right"}


def anisotropy_by_depth(directory: Path, path: Path, paper: bool = False) -> list[Path]:
    """Figure 2: mean cosine in each layer, at the last step at which it was measured."""
    return _write(layers_figure, layers(directory), path, paper)


def perplexity(directory: Path, path: Path, paper: bool = False) -> list[Path]:
    """Figure 3: held-out perplexity (per token) along training, coloured by anisotropy."""
    return _write(perplexity_figure, perplexities(directory), path, paper)


def spectrum_heatmap(directory: Path, path: Path, paper: bool = False) -> list[Path]:
    """Figure 4: the head's singular values over the largest of them, along training."""
    return _write(spectra_figure, spectra(directory), path, paper, PANELS)


def singular_entropy(directory: Path, path: Path, paper: bool = False) -> list[Path]:
    """Figure 5: singular entropy of the head (nats) along training."""
    return _write(entropy_figure, entropies(directory), path, paper)


def draw(directory: Path, paper: bool = False) -> list[Path]:
    """All four into `directory`/report, as far as there is something to draw."""
    every = (anisotropy_by_depth, perplexity, spectrum_heatmap, singular_entropy)
    report = directory / "report"
    return [file for f in every for file in f(directory, report / f.__name__, paper)]


def layers(directory: Path) -> pl.DataFrame:
    """Series, name, depth (0 the embedding, 1 the last layer) and anisotropy (mean cosine)."""
    count = pl.col("layer").max().over("series") + 1
    depth = pl.when(pl.col("layer") < 0).then(1.0).otherwise(pl.col("layer") / count)
    found = _scalar(directory, "anisotropy", "held_out").with_columns(depth=depth)
    last = pl.col("step") == pl.col("step").max().over("series")
    shown = found.filter(pl.col("value").is_finite()).filter(last).sort("series", "depth")
    return shown.select("series", "name", "depth", anisotropy="value")


def perplexities(directory: Path) -> pl.DataFrame:
    """Series, name, step, held-out perplexity (per token) and the last layer's anisotropy, null
    where that was not measured."""
    loss = _scalar(directory, "loss", "held_out").with_columns(perplexity=pl.col("value").exp())
    cosine = _scalar(directory, "anisotropy", "held_out").filter(layer=-1)
    cosine = cosine.select("series", "step", anisotropy=pl.col("value").fill_nan(None))
    shown = loss.filter(pl.col("step") > 0, pl.col("perplexity").is_finite())
    shown = shown.join(cosine, on=["series", "step"], how="left").sort("series", "step")
    return shown.select("series", "name", "step", "perplexity", "anisotropy")


def spectra(directory: Path) -> pl.DataFrame:
    """Series, name, step, index (1 to 100) and ratio to the head's largest singular value."""
    sigma = records.scan(directory, "spectra").filter(
        pl.col("matrix") == "head", pl.col("step") > 0, pl.col("index") <= INDICES
    )
    top = pl.col("sigma").filter(pl.col("index") == 0).first().over("trial", "step")
    ratios = sigma.with_columns(ratio=pl.col("sigma") / top).filter(
        pl.col("index") > 0, pl.col("ratio").is_finite()
    )
    shown = ratios.collect().join(_series(directory), on="trial").sort("series", "step", "index")
    return shown.select("series", "name", "step", "index", "ratio")


def entropies(directory: Path) -> pl.DataFrame:
    """Series, name, step and singular entropy (nats), where a logarithm can show it."""
    shown = _scalar(directory, "singular_entropy", "").filter(
        pl.col("step") > 0, pl.col("value").is_finite(), pl.col("value") > 0
    )
    return shown.sort("series", "step").select("series", "name", "step", entropy="value")


def readings(name: str) -> pl.DataFrame:
    """Read off the paper: `anisotropy`, `perplexity`, `spectra` or `entropy`."""
    return pl.read_csv(PAPER / f"{name}.csv", comment_prefix="#")


def filled(spectrum: pl.DataFrame, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Steps of one model of the paper, and its ratios (steps x indices) between the indices that
    were read off: straight in ln(ratio) over ln(index), and going on so beyond the last."""
    steps, known, ratios = _matrix(spectrum)
    x, y, known = np.log(indices), np.log(ratios), np.log(known)
    left = np.clip(np.searchsorted(known, x) - 1, 0, len(known) - 2)
    share = (x - known[left]) / (known[left + 1] - known[left])
    return steps, np.exp(y[:, left] * (1 - share) + y[:, left + 1] * share)


def layers_figure(frame: pl.DataFrame, paper: bool = False) -> "Figure":
    """Draw `layers`, and the paper's last layers as grey bars beside them."""
    figure, (axes,) = _figure(5.2, 3.4)
    for style, line in _lines(frame):
        axes.plot(line["depth"], line["anisotropy"], markersize=4, **style)
    lowest = min(0.0, *frame["anisotropy"])
    axes.set(xlim=(-0.04, 1.07 if paper else 1.04), ylim=(lowest - 0.03, 1.03))
    if paper:
        ends = []
        for models, low, high in readings("anisotropy").iter_rows():
            middle, half = (low + high) / 2, max((high - low) / 2, 0.004)
            bar = (middle - half, middle + half)
            axes.fill_between([1.03, 1.07], *bar, color="0.5", alpha=0.5, linewidth=0)
            ends.append((models, 1.07, middle))
        axes.set_title("grey: last layers, read off the paper's Figure 2", **NOTE)
        _name_ends(axes, ends)
    axes.set(xlabel="depth (0: embedding, 1: last layer)", ylabel="mean cosine of hidden states")
    _legend(figure, axes)
    return figure


def perplexity_figure(frame: pl.DataFrame, paper: bool = False) -> "Figure":
    """Draw `perplexities` from the step on at which one of them comes within a factor of three of
    the worst final one; and the paper's in a panel of their own, as they count words."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    panels = [("held-out perplexity (per token)", "", frame)]
    if paper:
        pythia = readings("perplexity").with_columns(series=pl.col("model").rle_id(), name="model")
        panels.append(("WikiText perplexity (per word)", "read off the paper's Figure 3", pythia))
    figure, grid = _figure(5.2, 3.6, len(panels))
    scale = ScalarMappable(Normalize(0, 1), "viridis")
    scale.cmap = scale.cmap.with_extremes(bad="0.85")  # where anisotropy was not measured
    colours = {"cmap": scale.cmap, "norm": scale.norm, "plotnonfinite": True}
    final = pl.col("perplexity").last().over("series")
    start = pl.col("step").filter(pl.col("perplexity") <= 3 * final.max()).min()
    for axes, (label, note, panel) in zip(grid, panels, strict=True):
        ends = []
        for style, line in _lines(panel.filter(pl.col("step") >= start)):
            x, y, cosine = line["step"], line["perplexity"], line["anisotropy"].fill_null(np.nan)
            axes.plot(x, y, color="0.6", linewidth=0.8, linestyle=style["linestyle"], zorder=1)
            rim = {"marker": style["marker"], "edgecolors": "0.25", "linewidths": 0.3}
            axes.scatter(x, y, 18, cosine, **rim, **colours)
            ends.append((style["label"], x[-1], y[-1]))
        _log(axes, "xy")
        _name_ends(axes, ends)
        axes.set(xlabel="training step", ylabel=label)
        axes.set_title(note, **NOTE)
    figure.colorbar(scale, ax=grid, label="mean cosine of last hidden states", aspect=30)
    return figure


def spectra_figure(frame: pl.DataFrame, paper: bool = False) -> "Figure":
    """Draw `spectra`, a panel for each series, then two of the paper's."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    panels = []
    for style, line in _lines(frame):
        steps, _, ratios = _matrix(line)
        panels.append((style["label"], steps, ratios))
    for model in SPECTRA if paper else ():
        read = readings("spectra").filter(model=model)
        panels.append((f"{model}, read off the paper", *filled(read, range(1, INDICES + 1))))
    figure, grid = _figure(2.6, 2.2, len(panels))
    scale = ScalarMappable(PowerNorm(0.5, 0, 1), "plasma")  # a collapse is among small ratios
    for axes, (title, steps, ratios) in zip(grid, panels, strict=True):
        edges = (_between(steps), np.arange(ratios.shape[1] + 1) + 0.5)
        colours = {"cmap": scale.cmap, "norm": scale.norm, "rasterized": True}
        axes.pcolormesh(*edges, ratios.T, **colours)
        _log(axes, "x")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.set_title(title, fontsize="small")
    figure.supxlabel("training step", fontsize="medium")
    figure.supylabel("index i of the singular value", fontsize="medium")
    figure.colorbar(scale, ax=grid, label=r"$\sigma_i / \sigma_0$ of the head", aspect=30)
    return figure


def entropy_figure(frame: pl.DataFrame, paper: bool = False) -> "Figure":
    """Draw `entropies`, the paper's pale behind them."""
    figure, (axes,) = _figure(5.2, 3.4)
    for style, line in _lines(frame):
        dense = max(1, len(line) // 24)
        axes.plot(line["step"], line["entropy"], markersize=4, markevery=dense, **style)
    ends = []
    if paper:
        for (model,), line in readings("entropy").group_by("model", maintain_order=True):
            axes.plot(line["step"], line["entropy"], color="0.75", linewidth=1, zorder=0)
            ends.append((str(model), line["step"][-1], line["entropy"][-1]))
        axes.set_title("grey: read off the paper's Figure 5", **NOTE)
    _log(axes, "xy")
    _name_ends(axes, ends)
    axes.set(xlabel="training step", ylabel="singular entropy of the head (nats)")
    _legend(figure, axes)
    return figure


def _series(directory: Path) -> pl.DataFrame:
    """Series, trial, name: numbered by name, so that a series looks alike in all figures."""
    trials = records.scan(directory, "trials").select("trial", "name").collect()

    def key(row: tuple[str, str]) -> tuple[list[str | int], str]:
        parts = re.split(r"(\d+)", row[1])  # nano-8 comes before nano-16
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], row[0]

    rows = sorted(trials.rows(), key=key)
    return pl.DataFrame(rows, trials.schema, orient="row").with_row_index("series")


def _scalar(directory: Path, metric: str, split: str) -> pl.DataFrame:
    found = records.scan(directory, "scalars").filter(metric=metric, split=split)
    return found.collect().join(_series(directory), on="trial")


def _lines(frame: pl.DataFrame) -> Iterator[tuple[dict[str, Any], pl.DataFrame]]:
    """Each series with its style: another kind of line once colours and markers are used up."""
    for (i, name), line in frame.group_by("series", "name", maintain_order=True):
        turn, which = divmod(int(i), len(STYLES))
        colour, marker = STYLES[which]
        dashes = LINES[turn % len(LINES)]
        yield {"label": name, "color": colour, "marker": marker, "linestyle": dashes}, line


def _matrix(spectrum: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, indices, and the ratios of one series by both."""
    wide = spectrum.sort("index").pivot("index", index="step", values="ratio").sort("step")
    ratios = wide.drop("step")
    return wide["step"].to_numpy(), np.array(ratios.columns, dtype=int), ratios.to_numpy()


def _between(steps: np.ndarray) -> np.ndarray:
    """Edges of cells around steps on a logarithmic axis."""
    x = np.log(steps)
    gaps = np.diff(x) / 2 if len(x) > 1 else np.array([0.5])
    return np.exp(np.concatenate([x[:1] - gaps[0], x[:-1] + gaps[: len(x) - 1], x[-1:] + gaps[-1]]))


def _figure(width: float, height: float, count: int = 1) -> tuple["Figure", "np.ndarray"]:
    """A figure and `count` axes of this size in inches, at most four in a row."""
    from matplotlib.figure import Figure

    columns, rows = min(count, 4), -(-count // 4)
    size = (1.2 + width * columns, 0.6 + height * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid[:count]


def _log(axes: "Axes", which: str) -> None:
    """Logarithmic axes with plain numbers: probes lie evenly in log(step)."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

    plain = {"x": EngFormatter(sep=""), "y": FuncFormatter(lambda value, _: f"{value:g}")}
    for x_or_y in which:
        axes.set(**{f"{x_or_y}scale": "log"})
        axis = getattr(axes, f"{x_or_y}axis")
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axis.set_major_formatter(plain[x_or_y])
        axis.set_minor_locator(NullLocator())


def _name_ends(axes: "Axes", ends: list[tuple[str, float, float]]) -> None:
    """Name lines beside the axes, tied to their last points (name, x, y) and apart."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[2])
    points = axes.transData.transform([end[1:] for end in ends])
    heights = axes.transAxes.inverted().transform(points)[:, 1]
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


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, names = axes.get_legend_handles_labels()
    # As many columns as the figure is wide enough for; below the axes, not at their cost.
    columns = min(4, max(1, 105 // (8 + max(map(len, names)))))
    figure.set_figheight(figure.get_figheight() + 0.16 * -(-len(names) // columns))
    small = {"fontsize": "x-small", "frameon": False}
    figure.legend(handles, names, loc="outside lower center", ncols=columns, **small)


def _write(
    build: Callable[[pl.DataFrame, bool], "Figure"],
    frame: pl.DataFrame,
    path: Path,
    paper: bool,
    most: int = MOST,
) -> list[Path]:
    """Both files of a figure, the same figure to the same bytes."""
    import matplotlib

    if frame.is_empty():
        return []
    series = frame["series"].unique().sort()
    figure = build(frame.filter(pl.col("series").is_in(series[:most].implode())), paper)
    if len(series) > most:
        figure.suptitle(f"the first {most} of {len(series)} series by name", fontsize="medium")
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]
    for file in files:
        kind = file.suffix[1:]
        plain = {"Date": None} if kind == "svg" else {}
        with matplotlib.rc_context({"svg.hashsalt": "lmsat"}):
            atomic.write(file, partial(figure.savefig, format=kind, dpi=150, metadata=plain))
    return files
