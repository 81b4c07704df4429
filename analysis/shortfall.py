"""How far small models fall short of the law of larger ones: Godey et al. 2024, section 3, Figure
1b, as far as records allow."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from analysis import prediction, records, tables, trajectories
from analysis.chart import PAPER, Axis, Chart, Panel, points
from analysis.errors import BadInput
from analysis.prediction import Prediction

LEAST = 5  # sizes: four fit three constants, and one is held out


def ends(directory: Path) -> pl.DataFrame:
    """Final and best held-out loss (nats per token) of each model with its own full head: name,
    kind, params, tokens, step, loss."""
    trials = records.scan(directory, "trials").filter(
        pl.col("kind").is_in(list(tables.ALIVE)),
        pl.col("rank").is_null(),
        pl.col("params").is_not_null(),
        pl.col("status") == "done",
    )
    losses = records.scan(directory, "scalars").filter(
        pl.col("step") > 0, split="held_out", metric="loss"
    )
    rows = losses.select("trial", "step", seen="tokens", loss="value").join(
        trials.select("trial", "name", "params"), on="trial"
    )
    along = rows.filter(pl.col("loss").is_finite()).sort("trial", "step").collect()
    final = along.group_by("trial", maintain_order=True).last()
    best = along.sort("loss", maintain_order=True).group_by("trial").first()
    columns = ("name", "params", pl.col("seen").alias("tokens"), "step", "loss")
    both = [final.select(pl.lit("final").alias("kind"), *columns)]
    both.append(best.select(pl.lit("best").alias("kind"), *columns))
    return pl.concat(both).sort("params", "name", "kind")


def shortfall(directories: Sequence[Path]) -> Prediction | str:
    """The law E + A/N^a of the larger two thirds of models that saw the same text equally long,
    and how far the smaller ones are from it; or why that cannot be said."""
    frames = [frame for frame, _ in trajectories.named(directories, ends)]
    every = pl.concat(frames) if frames else pl.DataFrame()
    final = every.filter(kind="final") if every.height else every
    if final.is_empty():
        return "no model with a full head and a held-out loss"
    alike = pl.coalesce("tokens", "step")
    most = final.group_by(alike.alias("seen")).agg(pl.col("params").n_unique()).sort("params")
    sizes = final.filter(alike == most["seen"][-1])["params"].unique().sort()
    if len(sizes) < LEAST:
        return f"{LEAST} sizes trained equally long are needed, there are {len(sizes)}"
    smallest = int(sizes[len(sizes) - max(4, round(len(sizes) * 2 / 3))])
    names = final.filter(alike == most["seen"][-1])["name"]
    kept = every.filter(pl.col("name").is_in(names.implode())).rename({"name": "model"})
    try:
        return prediction.predict(
            kept.select("model", "kind", "params", "loss"),
            prediction.law("power"),
            prediction.Settings({}),
            {},
            f"params >= {smallest} and kind = 'final'",
            f"params < {smallest}",
        )
    except BadInput as error:
        return str(error)


def by_kind(found: Prediction) -> dict[str, dict[str, float]]:
    """How far the models held out are off the law, of `final` and of `best` losses: their mean
    deviation with low and high, and count."""
    rows = {row["points"].removeprefix("kind = "): row for row in found.means.to_dicts()}
    alone = found.points.filter(~pl.col("fitted"))  # one of each kind is its own mean
    for row in alone.to_dicts():
        rows.setdefault(row["kind"], {**row, "count": 1})
    return {kind: rows[kind] for kind in ("final", "best") if kind in rows}


def law_chart(found: Prediction, paper: bool = False) -> Chart:
    """Figure 1b: losses beside the law, and how far they are from it, in percent."""
    rows = found.points.with_columns(
        series=pl.when("fitted").then(pl.lit("fitted")).otherwise(
            pl.format("held out, {}", "kind")
        ),
        percent=100 * pl.col("deviation"), low=100 * pl.col("low"), high=100 * pl.col("high"),
    )  # fmt: skip
    common = {"series": "series", "x": "N", "label": "model"}
    made = [
        points(rows.sort("N").unique("N", maintain_order=True), "line", "loss",
               series=pl.lit("law of the larger models"), x="N", y="law"),
        points(rows, "dots", "loss", **common, y="loss"),
        points(rows, "dots", "off", **common, y="percent", low="low", high="high"),
    ]  # fmt: skip
    if paper:
        read = pl.read_csv(PAPER / "law.csv", comment_prefix="#")
        pale = {"series": pl.format("{}, paper", "kind"), "x": "params"}
        made.append(points(read.sort("kind", "params"), "paper", "loss", **pale, y="loss"))
    constants = ", ".join(f"{k} = {v:.4g}" for k, v in found.fit.constants.items())
    N = Axis("parameters N, with embeddings", log=True)
    return Chart(
        "law", "Losses and the law of the larger models",
        f"{found.fit.law.formula}, {constants}, of the larger models' final losses; what the "
        f"smaller ones' are off it, {100 * found.level:.0f} % intervals. After Godey et al. 2024, "
        "Figure 1b." + (" Grey: read off it." if paper else ""),
        (
            Panel("loss", N, Axis("held-out loss (nats per token)")),
            Panel("off", N, Axis("loss over law (%)")),
        ),
        pl.concat(made), "Figure 1b",
    )  # fmt: skip


def zero_shot(directory: Path) -> pl.DataFrame:
    """Table 1: of each model and task metric its best and its last checkpoint: name, metric, best,
    best_step, final, final_step, stderr (of the final). Empty where no task was measured twice."""
    lower = pl.col("metric").str.contains("perplexity|ppl|loss|bits")
    rows = (
        records.scan(directory, "scalars")
        .filter(split="task")
        .join(records.scan(directory, "trials").select("trial", "name"), on="trial")
        .sort("name", "metric", "step")
        .with_columns(rank=pl.when(lower).then(pl.col("value")).otherwise(-pl.col("value")))
        .collect()
    )
    by = rows.group_by("name", "metric", maintain_order=True)
    first = pl.col("rank").arg_min()
    return (
        by.agg(
            best=pl.col("value").get(first),
            best_step=pl.col("step").get(first),
            final=pl.col("value").last(),
            final_step=pl.col("step").last(),
            stderr=pl.col("stderr").last(),
            checkpoints=pl.len(),
        )
        .filter(pl.col("checkpoints") > 1)
        .drop("checkpoints")
    )
