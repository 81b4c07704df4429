"""Two sweeps side by side: the same trials' losses, and how far they are apart."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from scipy.stats import t

from analysis import records
from analysis.ranks import LEVEL

NORMAL = 1.959964  # of intervals of 95 %


@dataclass(frozen=True)
class Comparison:
    trials: pl.DataFrame
    """A row for each name that both have, as in the first: name, first, second (held-out nats per
    token), difference (second less first), low, high, paired: whether over the same blocks."""
    mean: tuple[float, float, float] | None
    """Of the differences, with its interval over trials; None where there are fewer than two."""
    only_first: list[str]
    only_second: list[str]


def compare(first: Path, second: Path) -> Comparison:
    """Finished trials of one name at their last steps. Where both were judged on the same text
    (one unigram cross-entropy) block by block, so that what makes a block hard cancels; else as
    independent measurements."""
    a, b = _ends(first), _ends(second)
    both = a.join(b, on="name", suffix="_b", maintain_order="left")
    same = (pl.col("unigram_loss") - pl.col("unigram_loss_b")).abs() < 1e-9
    both = both.with_columns(same=same.fill_null(False))
    gaps = _gaps(first, second, both.filter("same"))
    rows = both.join(gaps, on="name", how="left", maintain_order="left")
    apart = (pl.col("stderr").pow(2) + pl.col("stderr_b").pow(2)).sqrt()
    paired = pl.col("gap").is_not_null()
    difference = pl.when(paired).then("gap").otherwise(pl.col("loss_b") - pl.col("loss"))
    error = pl.when(paired).then("gap_error").otherwise(apart)
    rows = rows.with_columns(difference=difference, error=error, paired=paired)
    found = rows.select(
        "name",
        first="loss",
        second="loss_b",
        difference="difference",
        low=pl.col("difference") - NORMAL * pl.col("error"),
        high=pl.col("difference") + NORMAL * pl.col("error"),
        paired="paired",
    )
    names = set(both["name"])
    return Comparison(
        found,
        _mean(found["difference"].to_numpy()),
        [name for name in a["name"] if name not in names],
        [name for name in b["name"] if name not in names],
    )


def _ends(sweep: Path) -> pl.DataFrame:
    """Name, trial, step, and at that step held-out loss, stderr and unigram_loss; a name once."""
    trials = records.scan(sweep, "trials").filter(status="done").select("trial", "name", "step")
    scalars = records.scan(sweep, "scalars").filter(
        pl.col("metric").is_in(["loss", "unigram_loss"]), split="held_out"
    )
    last = pl.col("step") == pl.col("step").max().over("trial", "metric")
    ended = scalars.filter(last).group_by("trial").agg(
        *(
            pl.col(column).filter(metric=metric).first().alias(name)
            for name, metric, column in (
                ("loss", "loss", "value"),
                ("stderr", "loss", "stderr"),
                ("unigram_loss", "unigram_loss", "value"),
            )
        )
    )  # fmt: skip
    found = trials.join(ended, on="trial").sort("name", "trial").collect()
    return found.filter(pl.col("loss").is_finite()).unique("name", maintain_order=True)


def _gaps(first: Path, second: Path, both: pl.DataFrame) -> pl.DataFrame:
    """Mean difference over the blocks that both saw at their ends, and its standard error."""
    sides = []
    for sweep, trial in ((first, "trial"), (second, "trial_b")):
        blocks = records.scan(sweep, "blocks").filter(
            pl.col("trial").is_in(both[trial].implode()), split="held_out"
        )
        last = pl.col("step") == pl.col("step").max().over("trial")
        own = both.select("name", trial=trial).lazy()
        sides.append(blocks.filter(last).join(own, on="trial").select("name", "block", "loss"))
    gap = pl.col("loss_b") - pl.col("loss")
    joined = sides[0].join(sides[1], on=["name", "block"], suffix="_b")
    found = joined.group_by("name").agg(
        gap=gap.mean(), gap_error=gap.std() / pl.len().sqrt(), blocks=pl.len()
    )
    return found.filter(pl.col("blocks") > 1).drop("blocks").collect()


def _mean(differences: np.ndarray) -> tuple[float, float, float] | None:
    if (n := len(differences)) < 2:
        return None
    half = t.ppf((1 + LEVEL) / 2, n - 1) * differences.std(ddof=1) / n**0.5
    middle = float(differences.mean())
    return middle, middle - float(half), middle + float(half)
