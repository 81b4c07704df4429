"""Figures for print: colour-blind safe, told apart without colour too."""

from pathlib import Path

import polars as pl

from analysis import atomic, tables

# Okabe and Ito's colours; each with a marker of its own.
STYLES = list(
    zip(
        ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"],
        ["o", "s", "^", "D", "v", "P", "X"],
        strict=True,
    )
)


def loss_vs_rank(losses: pl.DataFrame, path: Path) -> Path:
    """Held-out loss against head rank, a line for each series (mean over seeds), bars
    of one standard error; full heads stand apart on the right. `losses`: `tables.final_losses`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ranks = sorted(losses["rank"].drop_nulls().unique().to_list())
    full = 2 * ranks[-1] if ranks else 1
    means = losses.group_by("series", "rank", maintain_order=True).agg(
        pl.col("loss").mean(), pl.col("stderr").pow(2).mean().sqrt()
    )
    for i, (name, line) in enumerate(means.group_by("series", maintain_order=True)):
        colour, marker = STYLES[i % len(STYLES)]
        x = line["rank"].fill_null(full)
        axes.errorbar(
            x, line["loss"], line["stderr"], label=name[0], color=colour, marker=marker, capsize=2
        )
    axes.axhline(
        tables.unigram_loss(losses), color="0.5", linestyle=":", label="unigram cross-entropy"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([*ranks, full], [*map(str, ranks), "full"])
    axes.minorticks_off()
    axes.set_xlabel("head rank r")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    atomic.write(path, lambda partial: figure.savefig(partial, format="png", dpi=150))
    return path
