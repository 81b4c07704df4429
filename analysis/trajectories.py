"""What happens inside models while they train, in the form of Figures 1a to 5 of Godey et al. 2024
(arXiv 2404.07647), a series for each trial. `paper` adds readings off the paper's own figures.

Where the records hold nothing for a figure there is none. Step 0 is left out of logarithmic axes.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from analysis import chart, printed, records
from analysis.chart import PANELS, PAPER, Axis, Chart, Panel, points

INDICES = 100  # of a spectrum, that the paper shows
SPECTRA = ("pythia-14m", "pythia-410m")  # of the paper: one that saturates, one that does not
TOKENS = 2_097_152  # a step of Pythia's
STEP = Axis("training step", log=True)

Table = Callable[[Path], pl.DataFrame]


def draw(directory: Path, paper: bool = False) -> list[Path]:
    """All of them into `directory`/report, as PNG and SVG."""
    report = directory / "report"
    drawn = [printed.write(c, report / c.name, ("png", "svg")) for c in charts([directory], paper)]
    return [file for files in drawn for file in files]


def charts(directories: Sequence[Path], paper: bool = False) -> list[Chart]:
    """As far as there is something to draw; of several directories together."""
    made = (
        (losses, losses_chart),
        (layers, layers_chart),
        (perplexities, perplexity_chart),
        (spectra, spectra_chart),
        (entropies, entropy_chart),
    )
    names = [name for d, _ in named(directories, _series) for name in d["name"]]
    found = []
    for table, make in made:
        frames = [frame for frame, _ in named(directories, table)]
        frame = pl.concat(frames) if frames else pl.DataFrame()
        if not frame.is_empty():
            found.append(make(frame, tuple(dict.fromkeys(names)), paper))
    return found


def named(directories: Sequence[Path], table: Table) -> list[tuple[pl.DataFrame, Path]]:
    """A table of each directory that has it, series by name; of several the directory's name goes
    first."""
    found = []
    for directory in directories:
        frame = table(directory)
        if frame.is_empty():
            continue
        if len(directories) > 1:
            whose = pl.lit(f"{directory.name}: ")
            frame = frame.with_columns(name=pl.concat_str(whose, pl.col("name")))
        found.append((frame, directory))
    return found


def losses(directory: Path) -> pl.DataFrame:
    """Name, step, held-out loss (nats per token), its stderr, and FLOPs (6 N D) where the tokens
    trained on are known: those of the text, not of measuring."""
    found = _scalar(directory, "loss", "held_out").filter(
        pl.col("step") > 0, pl.col("value").is_finite()
    )
    flops = 6 * pl.col("params").cast(pl.Float64) * pl.col("tokens")
    shown = found.with_columns(flops=flops).sort("series", "step")
    return shown.select("name", "step", "flops", loss="value", stderr="stderr")


def layers(directory: Path) -> pl.DataFrame:
    """Name, depth (0 the embedding, 1 the last layer) and anisotropy (mean cosine)."""
    count = pl.col("layer").max().over("series") + 1
    depth = pl.when(pl.col("layer") < 0).then(1.0).otherwise(pl.col("layer") / count)
    found = _scalar(directory, "anisotropy", "held_out").with_columns(depth=depth)
    last = pl.col("step") == pl.col("step").max().over("series")
    shown = found.filter(pl.col("value").is_finite()).filter(last).sort("series", "depth")
    return shown.select("name", "depth", anisotropy="value")


def perplexities(directory: Path) -> pl.DataFrame:
    """Name, step, held-out perplexity (per token) and the last layer's anisotropy, null
    where that was not measured."""
    loss = _scalar(directory, "loss", "held_out").with_columns(perplexity=pl.col("value").exp())
    cosine = _scalar(directory, "anisotropy", "held_out").filter(layer=-1)
    cosine = cosine.select("series", "step", anisotropy=pl.col("value").fill_nan(None))
    shown = loss.filter(pl.col("step") > 0, pl.col("perplexity").is_finite())
    shown = shown.join(cosine, on=["series", "step"], how="left").sort("series", "step")
    return shown.select("name", "step", "perplexity", "anisotropy")


def spectra(directory: Path) -> pl.DataFrame:
    """Name, step, index (1 to 100) and ratio to the head's largest singular value."""
    sigma = records.scan(directory, "spectra").filter(
        pl.col("matrix") == "head", pl.col("step") > 0, pl.col("index") <= INDICES
    )
    top = pl.col("sigma").filter(pl.col("index") == 0).first().over("trial", "step")
    ratios = sigma.with_columns(ratio=pl.col("sigma") / top).filter(
        pl.col("index") > 0, pl.col("ratio").is_finite()
    )
    shown = ratios.collect().join(_series(directory), on="trial").sort("series", "step", "index")
    return shown.select("name", "step", "index", "ratio")


def entropies(directory: Path) -> pl.DataFrame:
    """Name, step and singular entropy (nats), where a logarithm can show it."""
    shown = _scalar(directory, "singular_entropy", "").filter(
        pl.col("step") > 0, pl.col("value").is_finite(), pl.col("value") > 0
    )
    return shown.sort("series", "step").select("name", "step", entropy="value")


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


def losses_chart(frame: pl.DataFrame, names: tuple[str, ...], paper: bool = False) -> Chart:
    """Figure 1a of `losses`, against FLOPs where they are known of all, else steps; from the step
    on at which one of them comes within ln 3 of the worst final one."""
    flops = frame["flops"].null_count() == 0
    x = "flops" if flops else "step"
    final = pl.col("loss").last().over("name").max() + math.log(3)
    near = pl.col("step").filter(pl.col("loss") <= final).min()
    kept, told = chart.some(frame.filter(pl.col("step") >= near), "name")
    stderr = pl.col("stderr")
    own = points(
        kept, "line", series="name", x=x, y="loss",
        low=pl.col("loss") - 1.96 * stderr, high=pl.col("loss") + 1.96 * stderr,
    )  # fmt: skip
    if paper:
        sizes = pl.read_csv(PAPER / "law.csv", comment_prefix="#").select("model", "params")
        read = readings("losses").join(
            sizes.unique(), on="model", how="left", maintain_order="left"
        )
        read = read.with_columns(flops=6.0 * pl.col("params") * pl.col("step") * TOKENS)
        own = pl.concat([points(read, "paper", series="model", x=x, y="loss"), own])
    axis = Axis("training FLOPs (6 N D)", log=True) if flops else STEP
    return Chart(
        "loss_along_training", "Held-out loss along training",
        "Nats per token of held-out text, with 95 % intervals over its blocks, a line for each "
        f"model.{told} After Godey et al. 2024, Figure 1a.{_grey(paper, '1a')}",
        (Panel("", axis, Axis("held-out loss (nats per token)")),), own, "Figure 1a", styled=names,
    )  # fmt: skip


def layers_chart(frame: pl.DataFrame, names: tuple[str, ...], paper: bool = False) -> Chart:
    """Figure 2 of `layers`; the paper's last layers as grey bars beside them."""
    kept, told = chart.some(frame, "name")
    own = points(kept, "line", series="name", x="depth", y="anisotropy")
    if paper:
        read = readings("anisotropy")
        middle = (pl.col("low") + pl.col("high")) / 2
        half = pl.max_horizontal((pl.col("high") - pl.col("low")) / 2, 0.004)
        bars = points(
            read, "paper", series="models", x=pl.lit(1.05), y=middle,
            low=middle - half, high=middle + half,
        )  # fmt: skip
        own = pl.concat([bars, own])
    return Chart(
        "anisotropy_by_depth", "Anisotropy by depth",
        "Mean cosine of the hidden states of distinct tokens of held-out text, at the last step "
        f"measured.{told} After Godey et al. 2024, section 4.1, Figure 2.{_grey(paper, '2')}",
        (Panel("", Axis("depth (0: embedding, 1: last layer)"), Axis("mean cosine")),),
        own, "Figure 2", styled=names,
    )  # fmt: skip


def perplexity_chart(frame: pl.DataFrame, names: tuple[str, ...], paper: bool = False) -> Chart:
    """Figure 3 of `perplexities`, from the step on at which one of them comes within a factor of
    three of the worst final one; the paper's in a panel of their own, as they count words."""
    kept, told = chart.some(frame, "name")
    final = pl.col("perplexity").last().over("name")
    near = pl.col("step").filter(pl.col("perplexity") <= 3 * final.max()).min()

    def line(rows: pl.DataFrame, panel: str, kind: str) -> pl.DataFrame:
        late = rows.filter(pl.col("step") >= near)
        return points(
            late, kind, panel, series="name", x="step", y="perplexity", shade="anisotropy"
        )

    panels = [Panel("ours", STEP, Axis("held-out perplexity (per token)", log=True))]
    own, styled = [line(kept, "ours", "line")], names
    if paper:
        read = readings("perplexity").rename({"model": "name"})
        own.append(line(read, "paper", "line"))
        styled = (*names, *read["name"].unique(maintain_order=True))
        per_word = Axis("WikiText perplexity (per word)", log=True)
        panels.append(Panel("paper", STEP, per_word, "read off the paper's Figure 3"))
    return Chart(
        "perplexity", "Perplexity and anisotropy along training",
        "Held-out perplexity; colour is the mean cosine of the last layer's hidden states (grey "
        f"where it was not measured).{told} After Godey et al. 2024, Figure 3.",
        tuple(panels), pl.concat(own), "Figure 3", "mean cosine", styled,
    )  # fmt: skip


def spectra_chart(frame: pl.DataFrame, names: tuple[str, ...], paper: bool = False) -> Chart:
    """Figure 4 of `spectra`, a panel for each series, then two of the paper's."""
    kept, told = chart.some(frame, "name", PANELS)
    common = {"x": "step", "y": "index", "shade": "ratio"}
    own = [points(kept, "cells", series="name", **common).with_columns(panel="series")]
    index = Axis("index i")
    panels = [Panel(name, STEP, index, name) for name in kept["name"].unique(maintain_order=True)]
    for model in SPECTRA if paper else ():
        steps, ratios = filled(readings("spectra").filter(model=model), range(1, INDICES + 1))
        panels.append(Panel(f"paper {model}", STEP, index, f"{model}, read off the paper"))
        grid = pl.DataFrame({
            "step": np.repeat(steps, INDICES),
            "index": np.tile(np.arange(1, INDICES + 1), len(steps)),
            "ratio": ratios.ravel(),
        })  # fmt: skip
        own.append(points(grid, "cells", f"paper {model}", series=pl.lit(model), **common))
    return Chart(
        "spectrum_heatmap", "Singular values of the head",
        "Each singular value of the head's matrix over the largest of them, along training: dark "
        f"columns are a spectrum with one spike.{told} After Godey et al. 2024, Figure 4.",
        tuple(panels), pl.concat(own), "Figure 4", "\u03c3\u1d62 / \u03c3\u2080 of the head", names,
    )  # fmt: skip


def entropy_chart(frame: pl.DataFrame, names: tuple[str, ...], paper: bool = False) -> Chart:
    """Figure 5 of `entropies`, the paper's pale behind them."""
    kept, told = chart.some(frame, "name")
    own = points(kept, "line", series="name", x="step", y="entropy")
    if paper:
        own = pl.concat(
            [points(readings("entropy"), "paper", series="model", x="step", y="entropy"), own]
        )
    return Chart(
        "singular_entropy", "Singular entropy of the head",
        "KL divergence of the squared singular values' distribution from the uniform one: 0 is "
        f"flat, ln d a single spike.{told} After Godey et al. 2024, section 4.2, Figure "
        f"5.{_grey(paper, '5')}",
        (Panel("", STEP, Axis("singular entropy (nats)", log=True)),),
        own, "Figure 5", styled=names,
    )  # fmt: skip


def _grey(paper: bool, number: str) -> str:
    return f" Grey: read off the paper's Figure {number}." if paper else ""


def _series(directory: Path) -> pl.DataFrame:
    """Series, trial, name: numbered by name, so that a series looks alike in all figures."""
    trials = records.scan(directory, "trials").select("trial", "name", "params").collect()

    def key(row: tuple[str, str]) -> tuple[list[str | int], str]:
        parts = re.split(r"(\d+)", row[1])  # nano-8 comes before nano-16
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], row[0]

    rows = sorted(trials.rows(), key=key)
    return pl.DataFrame(rows, trials.schema, orient="row").with_row_index("series")


def _scalar(directory: Path, metric: str, split: str) -> pl.DataFrame:
    found = records.scan(directory, "scalars").filter(metric=metric, split=split)
    return found.collect().join(_series(directory), on="trial")


def _matrix(spectrum: pl.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, indices, and the ratios of one series by both."""
    wide = spectrum.sort("index").pivot("index", index="step", values="ratio").sort("step")
    ratios = wide.drop("step")
    return wide["step"].to_numpy(), np.array(ratios.columns, dtype=int), ratios.to_numpy()
