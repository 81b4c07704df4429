"""What a low rank costs: heads on a frozen backbone, compared block by block.

Godey et al. 2024, section 5.1 and Figure 6. Of each head the learning rate is chosen on one part
of the held-out text and its loss reported on another; gaps are paired over blocks of that part.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.optimize import isotonic_regression

from analysis import records

TOLERANCE = 0.02  # nats per token by which a head may fall short of one of rank d
DRAWS, LEVEL = 1000, 0.95  # of the bootstrap, and of its intervals

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Required:
    """The smallest rank whose gap is under the tolerance, between ranks interpolated in log r."""

    rank: int
    low: int
    high: int
    """Ends of the interval."""
    at_least: int
    """The grid's lowest rank: an answer of this says `this or less`."""
    at_most: int
    """The highest rank below d: an answer above it says `more than this`."""
    tolerance: float

    def said(self, rank: int) -> str:
        """An answer, or an end of its interval, as far as the ranks tried tell it."""
        if rank <= self.at_least:
            return f"{self.at_least} or less"
        return f"more than {self.at_most}" if rank > self.at_most else str(rank)


@dataclass(frozen=True)
class Fitted:
    """All heads on one backbone."""

    name: str
    heads: pl.DataFrame
    """One row for each head (family, rank) at its chosen learning rate, means over seeds: family,
    head, d, rank, lr, edge, seeds, loss, stderr, accuracy, gap, low, high. Baselines too. edge: lr
    is the lowest or highest tried. gap: to the head of rank d of its family, or else of the linear
    heads; with its interval."""
    unigram: float
    """Cross-entropy of the same text under word frequencies."""
    required: dict[str, Required]
    """By family of linear heads."""


def selection_losses(sweep: Path) -> dict[str, float]:
    """Of every finished `rankfit` trial, on the text to choose by; infinite where it diverged."""
    ended = _ended(sweep).select("trial", "status", "selection_loss").rows()
    return {trial: loss if status == "done" else math.inf for trial, status, loss in ended}


def _ended(sweep: Path) -> pl.DataFrame:
    """Finished trials with their last measurements."""
    trials = records.scan(sweep, "trials").filter(
        (pl.col("kind") == "rankfit") & pl.col("status").is_in(["done", "diverged"])
    )

    def last(metric: str, split: str) -> pl.LazyFrame:
        rows = records.scan(sweep, "scalars").filter(
            (pl.col("metric") == metric) & (pl.col("split") == split)
        )
        return rows.select("trial", "step", value="value", stderr="stderr")

    both = ["trial", "step"]
    for name, metric, split in (
        ("selection_loss", "loss", "selection"),
        ("loss", "loss", "held_out"),
        ("accuracy", "accuracy", "held_out"),
        ("unigram_loss", "unigram_loss", "held_out"),
    ):
        columns = {name: "value"} | ({"stderr": "stderr"} if name == "loss" else {})
        trials = trials.join(last(metric, split).select(*both, **columns), on=both, how="left")
    # The name without backbone, rank, seed and rate: what is left tells families apart.
    family = pl.struct("name", "size").map_elements(_family, return_dtype=pl.String)
    return (
        trials.with_columns(family=family)
        .sort("rank", "lr", "name", "trial", nulls_last=True)
        .collect()
    )


def _family(row: dict[str, str]) -> str:
    words = row["name"].removeprefix(row["size"]).split()
    kept = [w for w in words if not w.startswith(("r=", "s=", "lr="))]
    return " ".join(kept if kept and "=" not in kept[0] else ["linear", *kept])


def fitted(sweep: Path, tolerance: float = TOLERANCE) -> list[Fitted]:
    """By backbone: every head at its best rate, its gap to full rank, and the required rank."""
    ended = _ended(sweep)
    blocks = records.scan(sweep, "blocks").filter(pl.col("split").is_in(["selection", "held_out"]))
    last = ended.select("trial", pl.col("step").cast(pl.Int64)).lazy()
    losses = blocks.join(last, on=["trial", "step"]).collect()
    found = []
    done = ended.filter(pl.col("status") == "done")
    # One text, one number: heads judged on other text are another figure.
    text = pl.col("unigram_loss").round(9)
    for _, some in done.group_by("size", text, maintain_order=True):
        own = some.filter(pl.col("head") == "own")
        if own.height:
            name = own["name"][0].removesuffix(" own").replace(" own ", " ")
            found.append(_backbone(name, some, losses, tolerance))
    return found


def _backbone(name: str, done: pl.DataFrame, blocks: pl.DataFrame, tolerance: float) -> Fitted:
    draws = _Draws(done, blocks)
    d = done["d"][0]
    linear = done.filter(pl.col("head").is_in(["full", "low-rank"]))["family"].unique().to_list()
    references: dict[str, Array] = {}
    for family in linear:
        of_full_rank = done.filter((pl.col("family") == family) & (pl.col("rank") == d))
        if (losses := draws.losses(of_full_rank)) is not None:
            references[family] = losses
    rows, required = [], {}
    for (family,), heads in done.group_by("family", maintain_order=True):
        own = references.get(str(family))
        reference = own if own is not None else _best(references)
        gaps: dict[int, Array] = {}
        for (rank,), seeds in heads.group_by("rank", maintain_order=True):
            found = draws.losses(seeds)
            if found is None:
                continue
            gap = None if reference is None else found - reference
            rows.append({"family": family, **draws.row(seeds), **_interval(gap)})
            if gap is not None and rank is not None:
                gaps[int(rank)] = gap
        if own is not None and len(gaps) > 1:
            order = sorted(gaps)
            required[str(family)] = required_rank(
                order, np.stack([gaps[r] for r in order], axis=1), tolerance
            )
    unigram = float(done["unigram_loss"].drop_nulls()[0])
    numbers = dict.fromkeys(("lr", "gap", "low", "high"), pl.Float64)  # where all are None too
    table = pl.DataFrame(rows, schema_overrides=numbers, infer_schema_length=None)
    return Fitted(name, table, unigram, required)


def _best(references: dict[str, Array]) -> Array | None:
    return min(references.values(), key=lambda r: float(r[0]), default=None)


def _interval(draws: Array | None) -> dict[str, float | None]:
    if draws is None:
        return {"gap": None, "low": None, "high": None}
    low, high = np.quantile(draws[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"gap": float(draws[0]), "low": float(low), "high": float(high)}


class _Draws:
    """Bootstrap draws over blocks, seeds and, through the blocks to choose by, learning rates.

    The same blocks and seeds for all heads of a draw, so that gaps are paired. Draw 0 is the data
    as they are.
    """

    def __init__(self, done: pl.DataFrame, blocks: pl.DataFrame) -> None:
        rng = np.random.default_rng(0)
        self.seeds = sorted(done["seed"].drop_nulls().unique().to_list()) or [None]
        self.counts = counts(rng, len(self.seeds))
        self.means: dict[str, dict[str, Array]] = {}
        for split in ("selection", "held_out"):
            table = blocks.filter(
                (pl.col("split") == split) & pl.col("trial").is_in(done["trial"].to_list())
            ).pivot("block", index="trial", values="loss", sort_columns=True)
            matrix = table.drop("trial").to_numpy()
            shares = counts(rng, matrix.shape[1]) / matrix.shape[1]
            self.means[split] = dict(zip(table["trial"], matrix @ shares.T, strict=True))

    def losses(self, trials: pl.DataFrame) -> Array | None:
        """Report loss of one head in each draw, given its trials (seeds and rates); None where it
        has not every seed."""
        total, weight = np.zeros(DRAWS + 1), np.zeros(DRAWS + 1)
        for i, seed in enumerate(self.seeds):
            some = trials.filter(pl.col("seed").is_null() | (pl.col("seed") == seed))
            if some.is_empty():
                return None
            selection = np.stack([self.means["selection"][t] for t in some["trial"]])
            report = np.stack([self.means["held_out"][t] for t in some["trial"]])
            chosen = np.take_along_axis(report, selection.argmin(0)[None], 0)[0]
            total += self.counts[:, i] * chosen
            weight += self.counts[:, i]
        return total / weight

    def row(self, trials: pl.DataFrame) -> dict[str, Any]:
        """The head as it is reported: at the best rate of each seed."""
        best = trials.sort("selection_loss").group_by("seed", maintain_order=True).first()
        rates = trials["lr"].drop_nulls().unique().sort().to_list()
        lr = best["lr"].median()
        edge = len(rates) > 1 and bool(best["lr"].is_in([rates[0], rates[-1]]).any())
        return {
            "head": best["head"][0],
            "d": best["d"][0],
            "rank": best["rank"][0],
            "lr": lr,
            "edge": edge,
            "seeds": best.height,
            "loss": best["loss"].mean(),
            "stderr": best["stderr"].mean(),
            "accuracy": best["accuracy"].mean(),
        }


def counts(rng: np.random.Generator, n: int) -> Array:
    """(draws + 1) x n: how often each of n is drawn; the first row all ones."""
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=DRAWS)
    return np.vstack([np.ones(n), drawn])


def required_rank(ranks: list[int], gaps: Array, tolerance: float = TOLERANCE) -> Required:
    """From gaps in nats (draws x ranks, the first draw the data's own) to full rank, which is the
    last of the ranks: each draw made monotone in r, then interpolated in log r.

    An answer at the lowest rank is censored, and so is one above the last rank before full.
    """
    answers = [_crossing(ranks, draw, tolerance) for draw in gaps]
    low, high = np.quantile(
        answers[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="closest_observation"
    )
    return Required(answers[0], int(low), int(high), ranks[0], ranks[-2], tolerance)


def _crossing(ranks: list[int], gaps: Array, tolerance: float) -> int:
    falling = isotonic_regression(gaps, increasing=False).x
    under = int(np.argmax(falling <= tolerance))
    if falling[under] > tolerance:
        return ranks[-1]
    if under == 0:
        return ranks[0]
    (r0, g0), (r1, g1) = ((ranks[i], falling[i]) for i in (under - 1, under))
    share = (g0 - tolerance) / (g0 - g1)
    return math.ceil(math.exp(math.log(r0) + share * math.log(r1 / r0)) - 1e-9)
