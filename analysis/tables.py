"""Tables made from a sweep's records."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import polars as pl

from analysis import records

ALIVE = {"pretrain", "probe"}  # kinds of trials that are seen along training
VARIANT = r" [rs]=\S+"  # of a trial's name: rank and seed
T = TypeVar("T")


def kinds(directory: Path) -> set[str]:
    """Of the trials that have records there."""
    return set(records.scan(directory, "trials").select("kind").unique().collect()["kind"])


def evenly(items: Sequence[T], most: int) -> Sequence[T]:
    """At most so many of them, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def final_losses(sweep: Path) -> pl.DataFrame:
    """One row for each finished `pretrain` trial: the columns of `trials`, and of its last step
    the held-out `loss` and `unigram_loss` (nats per token) with the loss's `stderr`; and `series`,
    its name without rank and seed. By size, then rank, full heads last."""
    trials = records.scan(sweep, "trials").filter(
        (pl.col("status") == "done") & (pl.col("kind") == "pretrain")
    )
    scalars = records.scan(sweep, "scalars").filter(
        (pl.col("split") == "held_out") & pl.col("metric").is_in(["loss", "unigram_loss"])
    )
    losses = (
        scalars.join(trials.select("trial", "step"), on=["trial", "step"])
        .group_by("trial")
        .agg(
            loss=pl.col("value").filter(pl.col("metric") == "loss").first(),
            stderr=pl.col("stderr").filter(pl.col("metric") == "loss").first(),
            unigram_loss=pl.col("value").filter(pl.col("metric") == "unigram_loss").first(),
        )
    )
    return (
        trials.join(losses, on="trial")
        .with_columns(series=pl.col("name").str.replace_all(VARIANT, ""))
        .sort("params_without_embeddings", "size", "rank", "seed", "name", nulls_last=True)
        .collect()
    )


def unigram_loss(losses: pl.DataFrame) -> float:
    """What knowing word frequencies alone would cost on the held-out text: the mean over trials
    of `final_losses`, which agree but for the blocks they were given."""
    return float(losses.select(pl.col("unigram_loss").mean()).item())


def probe_shares(sweep: Path) -> tuple[float, float] | None:
    """What measuring took, as shares of the time of training proper: along the way, and at each
    trial's last step. None where no training was timed."""
    timed = (
        records.scan(sweep, "scalars")
        .filter(pl.col("metric").is_in(["probe_seconds", "training_seconds"]))
        .with_columns(last=pl.col("step") == pl.col("step").max().over("trial"))
        .group_by("metric", "last")
        .agg(pl.col("value").sum())
        .collect()
    )
    seconds = {(row["metric"], row["last"]): row["value"] for row in timed.to_dicts()}
    training = sum(v for (metric, _), v in seconds.items() if metric == "training_seconds")
    if not training:
        return None
    along, last = (seconds.get(("probe_seconds", at), 0.0) / training for at in (False, True))
    return along, last


def measured(directory: Path) -> pl.DataFrame:
    """One row for each measured checkpoint of each series, by name, then step: `name`, `step`, and
    a column for every metric of held-out text, of the head and of tasks; of layers the last."""
    names = records.scan(directory, "trials").select("trial", "name")
    return (
        records.scan(directory, "scalars")
        .filter(
            pl.col("split").is_in(["", "held_out", "task"])
            & (pl.col("layer").is_null() | (pl.col("layer") == -1))
        )
        # Of hidden states, where the head has a metric of the same name.
        .with_columns(
            metric=pl.when(pl.col("layer").is_null())
            .then(pl.col("metric"))
            .otherwise("last_" + pl.col("metric"))
        )
        .join(names, on="trial")
        .collect()
        .pivot("metric", index=["name", "step"], values="value", sort_columns=True)
        .sort("name", "step")
    )


def by_layer(directory: Path) -> pl.DataFrame:
    """One row for each layer of each series at its last step, in order of depth: `name`, `layer`,
    and a column for every metric of hidden states."""
    names = records.scan(directory, "trials").select("trial", "name")
    return (
        records.scan(directory, "scalars")
        .filter(pl.col("layer").is_not_null())
        .filter(pl.col("step") == pl.col("step").max().over("trial"))
        .join(names, on="trial")
        .collect()
        .pivot("metric", index=["name", "layer"], values="value", sort_columns=True)
        .sort("name", pl.col("layer") < 0, "layer")
    )


def latest(sweep: Path) -> dict[str, dict[str, float]]:
    """The last held-out loss and speed of every trial that has any, by trial and metric."""
    rows = (
        records.scan(sweep, "scalars")
        .filter(
            ((pl.col("split") == "held_out") & (pl.col("metric") == "loss"))
            | (pl.col("metric") == "tokens_per_second")
        )
        .sort("step")
        .group_by("trial", "metric")
        .agg(pl.col("value").last())
        .collect()
    )
    found: dict[str, dict[str, float]] = {}
    for row in rows.iter_rows(named=True):
        found.setdefault(row["trial"], {})[row["metric"]] = row["value"]
    return found


def paired_difference(sweep: Path, a: str, b: str) -> tuple[float, float]:
    """Held-out loss of trial a less that of b at their last common step, in nats per token, with
    its standard error: over the evaluation blocks that both saw, block by block, so that what
    makes a block hard cancels. Raises ValueError where they share fewer than two blocks."""
    blocks = records.scan(sweep, "blocks").filter(pl.col("split") == "held_out")

    def last(trial: str) -> pl.LazyFrame:
        own = blocks.filter(pl.col("trial") == trial)
        return own.filter(pl.col("step") == pl.col("step").max()).select("block", "loss")

    both = last(a).join(last(b), on="block", suffix="_b")
    gaps = both.select(gap=pl.col("loss") - pl.col("loss_b")).collect()["gap"]
    if len(gaps) < 2:
        raise ValueError(f"{a} and {b} share {len(gaps)} evaluation blocks; two are needed")
    mean, spread = gaps.mean(), gaps.std()
    assert isinstance(mean, float) and isinstance(spread, float)
    return mean, spread / len(gaps) ** 0.5
