"""Figures for print: colour-blind safe, told apart without colour too."""

from pathlib import Path

import polars as pl

from analysis import atomic, tables
from analysis.ranks import Fitted

PAPER = Path(__file__).parent / "paper"

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


def ranks(fitted: Fitted, path: Path) -> Path:
    """Heads on a frozen backbone in the form of the paper's Figures 6 and 9: loss, accuracy, gap to
    full rank (beside the paper's own readings, pale) and chosen learning rate against rank."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    (loss, accuracy), (gap, rate) = figure.subplots(2, 2)
    known = fitted.heads.filter(pl.col("rank").is_not_null())
    for i, (name, line) in enumerate(known.group_by("family", maintain_order=True)):
        colour, marker = STYLES[i % len(STYLES)]
        style = {"label": str(name[0]), "color": colour, "marker": marker}
        x, low, high = line["rank"], line["gap"] - line["low"], line["high"] - line["gap"]
        loss.errorbar(x, line["loss"], line["stderr"], capsize=2, **style)
        accuracy.plot(x, 100 * line["accuracy"], **style)
        gap.errorbar(x, line["gap"], [low.clip(0), high.clip(0)], capsize=2, **style)
        if line["lr"].null_count() == 0:
            rate.plot(x, line["lr"], **style)
    for i, (name, line) in enumerate(
        fitted.heads.filter(pl.col("rank").is_null()).group_by("family", maintain_order=True)
    ):
        label = "the model's own head" if name[0] == "own" else f"full, {name[0]}"
        style = {"label": label, "color": "0.2", "linestyle": ("--", "-.", ":")[i % 3]}
        loss.axhline(line["loss"][0], **style)
        accuracy.axhline(100 * line["accuracy"][0], **style)
    loss.axhline(fitted.unigram, color="0.6", linestyle=":", label="unigram cross-entropy")
    paper = pl.read_csv(PAPER / "heads.csv", comment_prefix="#")
    for (name,), line in paper.group_by("model", maintain_order=True):
        full = line.filter(pl.col("rank") == pl.col("rank").max())["loss"][0]
        pale = {"color": "0.8", "zorder": 0, "linewidth": 1}
        gap.plot(line["rank"], line["loss"] - full, **pale)
        at = (line["rank"][-2], line["loss"][-2] - full)
        gap.annotate(
            f"{name}, paper", at, color="0.5", fontsize="x-small", rotation=90, va="top", ha="right"
        )
        rate.plot(line["rank"], line["lr"], **pale)
    labels = (
        "loss (nats per token)",
        "accuracy (%)",
        "gap to rank d (nats per token)",
        "chosen peak learning rate",
    )
    for axes, label in zip((loss, accuracy, gap, rate), labels, strict=True):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
        axes.tick_params(axis="x", labelsize="small")
        axes.set_xlabel("head rank r")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    gap.set_yscale("symlog", linthresh=0.01)
    rate.set_yscale("log")
    figure.legend(
        *loss.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize="small",
    )
    figure.suptitle(f"Heads on {fitted.name}, frozen", fontsize="medium")
    atomic.write(path, lambda partial: figure.savefig(partial, format="png", dpi=150))
    return path
