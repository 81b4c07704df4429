"""What sweeps and measurements have found, on one page that needs nothing else; and its figures for
print, with every plotted number."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from analysis import (
    atomic,
    bound_figures,
    chart,
    dimension_figures,
    dimensions,
    figures,
    printed,
    records,
    shortfall,
    summary,
    tables,
    trajectories,
    webpage,
)
from analysis.chart import Chart
from analysis.evidence import Evidence
from analysis.webpage import Report, Table

TRIALS = 200  # rows of the table of trials
NAME = "report.html"

# What a figure needs, where it is not there.
NEEDS = {
    "Figure 1a": "a held-out loss along training",
    "Figure 2": "anisotropy by layer: sweeps and `lmsat probe` measure it",
    "Figure 3": "a held-out loss along training",
    "Figure 4": "spectra of heads along training",
    "Figure 5": "singular entropy of heads along training",
    "Figures 6 and 9": "heads on a frozen backbone: a grid of kind rankfit",
    "Figure 7": "counts of n-grams: `lmsat dimension`",
    "Figure 8": "heads on a frozen backbone, and the spectrum of its own: a grid of kind rankfit",
    "Table 1": "tasks measured at two checkpoints or more: `lmsat probe --tasks`",
}


def make(evidence: Evidence, paper: bool = False) -> Report:
    """All that the records allow. `paper`: with the paper's own readings."""
    directories, alive, short = evidence.directories, evidence.alive, evidence.short
    answers = (
        summary.bottleneck(evidence.trained, [one for _, one in evidence.frozen]),
        summary.saturation(evidence.verdicts, evidence.looked),
        summary.shortfall(short),
        summary.language(directories),
    )
    found = trajectories.charts(alive, paper) if alive else []
    if not isinstance(short, str):
        found.append(shortfall.law_chart(short, paper))
    for directory in alive:
        ends = tables.final_losses(directory)
        if ends["rank"].n_unique() > 1:
            found.append(_of(directory, figures.loss_vs_rank(ends), directories))
    for directory, one in evidence.frozen:
        found.append(_of(directory, figures.ranks(one, paper), directories))
        both = bound_figures.w_errors(directory, one)
        if both.height:
            found.append(_of(directory, bound_figures.w_error(one, both, paper), directories))
    for directory in directories:
        errors = dimensions.curves(directory, "w_errors")
        if not errors.is_empty():
            shown = dimension_figures.w_error(errors, paper)
            found.append(_of(directory, shown, directories))
    found.sort(key=lambda c: (not c.number, c.number.replace("Figures", "Figure")))
    missing = {k: why for k, why in NEEDS.items() if k not in {c.number for c in found}}
    if isinstance(short, str):
        missing["Figure 1b"] = short
    shots = [t for d in alive if (t := _zero_shot(d)) is not None]
    if shots:
        missing.pop("Table 1")
    counts = summary.scope(directories)
    facts = ", ".join(f"{number:,} {status}" for status, number in sorted(counts.items()))
    return Report(
        "lmsat: " + ", ".join(d.name for d in directories),
        f"{sum(counts.values()):,} trials ({facts}), {time.strftime('%Y-%m-%d')}",
        tuple(a for a in answers if a is not None),
        tuple(found),
        (*shots, *(_trials(d) for d in alive)),
        dict(sorted(missing.items())),
    )


def write(report: Report, folder: Path, kinds: Sequence[str] = printed.KINDS) -> list[Path]:
    """The page; each figure for print, in files of these kinds; and its numbers."""
    files = [folder / NAME]
    for one in report.charts:
        files += printed.write(one, folder / one.name, tuple(kinds)) if kinds else []
        files.append(chart.write_csv(one, folder / f"{one.name}.csv"))
    atomic.write_text(files[0], webpage.page(report, kinds))
    return files


def as_json(report: Report) -> dict[str, Any]:
    """What it says, for machines; the numbers of figures are in their CSV."""
    return {
        "title": report.title,
        "answers": [{"question": a.question, "lines": [*a.lines]} for a in report.answers],
        "figures": [
            {"name": c.name, "number": c.number, "title": c.title, "points": c.points.height}
            for c in report.charts
        ],
        "missing": report.missing,
    }


def _of(directory: Path, one: Chart, every: Sequence[Path]) -> Chart:
    """Told apart where there are several."""
    if len(every) == 1:
        return one
    name, title = f"{directory.name}_{one.name}", f"{one.title} ({directory.name})"
    return replace(one, name=name, title=title)


def _zero_shot(directory: Path) -> Table | None:
    found = shortfall.zero_shot(directory)
    if found.is_empty():
        return None
    rows = found.select(
        pl.col("name").alias("model"),
        "metric",
        best=pl.format("{} at step {}", pl.col("best").round_sig_figs(4), "best_step"),
        final=pl.format("{} at step {}", pl.col("final").round_sig_figs(4), "final_step"),
        stderr=pl.col("stderr").round_sig_figs(2).cast(pl.String).fill_null("-"),
    )
    caption = (
        "Zero-shot, the best checkpoint beside the last. The best of many noisy numbers is better "
        "than any of them is: whether a task got worse, `lmsat onset` says. After Godey et al. "
        "2024, Table 1."
    )
    return Table(f"Table 1: zero-shot performance ({directory.name})", caption, rows)


def _trials(directory: Path) -> Table:
    rows = records.scan(directory, "trials").filter(pl.col("kind").is_in(list(tables.ALIVE)))
    trials = rows.sort("params", "name", nulls_last=True).collect()
    losses = records.scan(directory, "scalars").filter(split="held_out", metric="loss")
    last = losses.sort("step").group_by("trial").agg(
        loss=pl.col("value").last(), stderr=pl.col("stderr").last()
    )  # fmt: skip
    both = trials.head(TRIALS).join(last.collect(), on="trial", how="left", maintain_order="left")

    def said(column: str, digits: int) -> pl.Expr:
        return pl.col(column).cast(pl.Float64).round(digits).cast(pl.String).fill_null("-")

    shown = both.select(
        "name",
        pl.col("status"),
        N=pl.col("params").cast(pl.String).fill_null("-"),
        d=pl.col("d").cast(pl.String).fill_null("-"),
        rank=pl.col("rank").cast(pl.String).fill_null("full"),
        step=pl.col("step").cast(pl.String),
        loss=said("loss", 4),
        stderr=said("stderr", 4),
    )
    more = f" The first {TRIALS} of {trials.height:,}." if trials.height > TRIALS else ""
    caption = f"The last held-out loss, nats per token, its error over blocks.{more}"
    return Table(f"Trials of {directory.name}", caption, shown)
