"""Loss against head rank, of models trained with it and of heads on frozen backbones."""

import polars as pl

from analysis import chart, tables
from analysis.chart import PAPER, Axis, Chart, Panel, points
from analysis.ranks import LEVEL, Fitted

HEADS = "Godey et al. 2024, section 5.1, Figures 6 and 9"


def loss_vs_rank(losses: pl.DataFrame) -> Chart:
    """Held-out loss against head rank, a line for each series (mean over seeds); full heads stand
    apart on the right. `losses`: `tables.final_losses`."""
    ranks = sorted(losses["rank"].drop_nulls().unique().to_list())
    full = 2 * ranks[-1] if ranks else 1
    means = losses.group_by("series", "rank", maintain_order=True).agg(
        pl.col("loss").mean(),
        pl.col("stderr").pow(2).mean().sqrt(),  # blocks are the same for all seeds
        seeds=pl.len(),
    )
    kept, told = chart.some(means, "series")
    rank = pl.col("rank").fill_null(full)
    own = points(
        kept.with_columns(at=rank), "line", series="series", x="at", y="loss",
        low=pl.col("loss") - 1.96 * pl.col("stderr"), high=pl.col("loss") + 1.96 * pl.col("stderr"),
        label=pl.format("{}", pl.col("rank").cast(pl.String).fill_null("full")),
    )  # fmt: skip
    unigram = pl.DataFrame({"y": [tables.unigram_loss(losses)]})
    own = pl.concat([points(unigram, "level", series=pl.lit("unigram cross-entropy"), y="y"), own])
    ticks = {float(r): str(r) for r in ranks} | {float(full): "full"}
    fewest, most = means.select(least=pl.col("seeds").min(), most=pl.col("seeds").max()).row(0)
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    return Chart(
        "loss_vs_rank", "Held-out loss by head rank, trained from scratch",
        f"Each point a model trained with a head of that rank; means over {seeds} "
        f"seed{'' if most == 1 else 's'}, 95 % intervals over blocks of held-out text.{told} The "
        "paper has heads on frozen models only (Figure 6).",
        (Panel("", Axis("head rank r", True, ticks), Axis("held-out loss (nats per token)")),), own,
    )  # fmt: skip


def ranks(fitted: Fitted, paper: bool = True) -> Chart:
    """Figures 6 and 9: loss, accuracy, gap to full rank and chosen learning rate against rank, the
    paper's own gaps and rates pale."""
    heads = fitted.heads.with_columns(percent=100 * pl.col("accuracy"))
    known = heads.filter(pl.col("rank").is_not_null())
    common = {"series": "family", "x": "rank"}
    error = 1.96 * pl.col("stderr")
    low, high = pl.col("loss") - error, pl.col("loss") + error
    rates = known.with_columns(lr=pl.col("lr").cast(pl.Float64)).drop_nulls("lr")
    edge = pl.when(pl.col("edge")).then(pl.lit("the lowest or highest rate tried"))
    found = [
        points(known, "line", "loss", **common, y="loss", low=low, high=high),
        points(known, "line", "accuracy", **common, y="percent"),
        points(known, "line", "gap", **common, y="gap", low="low", high="high"),
        points(rates, "line", "rate", **common, y="lr", label=edge),
    ]
    whole = heads.filter(pl.col("rank").is_null()).with_columns(
        name=pl.when(pl.col("family") == "own")
        .then(pl.lit("the model's own head"))
        .otherwise("full, " + pl.col("family"))
    )
    unigram = pl.DataFrame({"name": "unigram cross-entropy", "loss": fitted.unigram})
    found += [
        points(whole, "level", "loss", series="name", y="loss"),
        points(unigram, "level", "loss", series="name", y="loss"),
        points(whole, "level", "accuracy", series="name", y="percent"),
    ]
    if paper:
        read = pl.read_csv(PAPER / "heads.csv", comment_prefix="#")
        last = pl.col("loss").filter(pl.col("rank") == pl.col("rank").max()).first()
        read = read.with_columns(gap=pl.col("loss") - last.over("model"))
        theirs = {"series": pl.format("{}, paper", "model"), "x": "rank"}
        found += [
            points(read, "paper", "gap", **theirs, y="gap"),
            points(read, "paper", "rate", **theirs, y="lr"),
        ]
    seeds, d = known.select(pl.col("seeds").max(), pl.col("d").max()).row(0)
    rank = Axis("head rank r", True, {float(r): str(r) for r in _ticks(known["rank"].unique())})
    return Chart(
        f"ranks_{fitted.name}", f"Heads on {fitted.name}, frozen",
        f"Heads of each rank on one frozen backbone (d = {d}), the rate of each chosen on other "
        f"text; {seeds} seed{'' if seeds == 1 else 's'}. Loss with 95 % intervals over blocks; the "
        f"gap to a factored head of rank d paired by block, {100 * LEVEL:.0f} % intervals over "
        f"blocks, seeds and choice of rate. After {HEADS}."
        + (" Grey: read off these figures." if paper else ""),
        (
            Panel("loss", rank, Axis("loss (nats per token)")),
            Panel("accuracy", rank, Axis("accuracy (%)")),
            Panel("gap", rank, Axis("gap to rank d (nats per token)")),
            Panel("rate", rank, Axis("chosen peak learning rate", log=True)),
        ),
        pl.concat(found), "Figures 6 and 9",
    )  # fmt: skip


def _ticks(ranks: pl.Series) -> list[int]:
    """Those nearly a factor of two apart, so that they can be read."""
    kept: list[int] = []
    for rank in sorted(ranks, reverse=True):
        if not kept or kept[-1] > 1.8 * rank:
            kept.append(rank)
    return kept[::-1]
