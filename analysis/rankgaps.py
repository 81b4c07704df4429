"""What a low rank costs models that were trained with it: gaps to a head of rank d."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from analysis import ranks, records, tables
from analysis.ranks import LEVEL, TOLERANCE, Required


@dataclass(frozen=True)
class Trained:
    """All ranks of one size."""

    name: str
    d: int
    factored: bool
    """Whether gaps are to a factored head of rank d; else to the full head."""
    gaps: pl.DataFrame
    """A row for each rank below d, rising: rank, seeds, gap (nats per token, mean over the seeds
    that the head of rank d has too), low, high: over blocks of held-out text and seeds."""
    required: Required | None
    """None where fewer than two ranks were trained besides."""


def trained(sweep: Path, tolerance: float = TOLERANCE) -> list[Trained]:
    """By series: heads of low rank against that of rank d of the same seed, block by block."""
    ends = tables.final_losses(sweep).filter(pl.col("head").is_in(["full", "low-rank"]))
    blocks = records.scan(sweep, "blocks").filter(split="held_out")
    last = ends.select("trial", pl.col("step").cast(pl.Int64)).lazy()
    losses = blocks.join(last, on=["trial", "step"]).collect()
    found = []
    for (name,), some in ends.group_by("series", maintain_order=True):
        if one := _trained(str(name), some, losses, tolerance):
            found.append(one)
    return found


def _trained(
    name: str, ends: pl.DataFrame, losses: pl.DataFrame, tolerance: float
) -> Trained | None:
    d = int(ends["d"][0])
    # A full head may be trained more or less far: beside one of rank d the rank alone differs.
    factored, full = ends.filter(rank=d), ends.filter(pl.col("rank").is_null())
    against = factored if factored.height else full
    lower = ends.filter(pl.col("rank") < d)
    if against.is_empty() or lower.is_empty() or against["seed"].is_duplicated().any():
        return None
    own = losses.filter(pl.col("trial").is_in(ends["trial"].implode()))
    table = own.pivot("block", index="trial", values="loss", sort_columns=True)
    means = dict(zip(table["trial"], table.drop("trial").to_numpy(), strict=True))
    rng = np.random.default_rng(0)
    number = table.width - 1
    shares = ranks.counts(rng, number) / number
    reference = {seed: means[trial] for trial, seed in against.select("trial", "seed").rows()}
    drawn = dict(zip(reference, ranks.counts(rng, len(reference)).T, strict=True))
    rows, draws = [], []
    for (rank,), some in lower.group_by("rank", maintain_order=True):
        both = {seed: trial for trial, seed in some.select("trial", "seed").rows()}
        seeds = sorted(both.keys() & reference.keys())
        if not seeds:
            continue
        gaps = np.stack([(means[both[seed]] - reference[seed]) @ shares.T for seed in seeds])
        weights = np.stack([drawn[seed] for seed in seeds])
        gap = (weights * gaps).sum(0) / np.maximum(weights.sum(0), 1e-300)
        gap[weights.sum(0) == 0] = gap[0]  # a draw without any of its seeds
        low, high = np.quantile(gap[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        rows.append({"rank": rank, "seeds": len(seeds), "gap": gap[0], "low": low, "high": high})
        draws.append(gap)
    if not rows:
        return None
    order, draws = [*(int(row["rank"]) for row in rows), d], [*draws, np.zeros(len(draws[0]))]
    required = None
    if len(rows) > 1:
        required = ranks.required_rank(order, np.stack(draws, axis=1), tolerance)
    return Trained(name, d, bool(factored.height), pl.DataFrame(rows), required)
