"""What cutting a head costs, beside what theory says of it: Godey et al. 2024, section 6."""

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import torch

from analysis import atomic, records, spectrum
from analysis.chart import PAPER, STYLES, Axis, Chart, Panel, points
from analysis.ranks import Fitted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = {"plain": "truncated SVD", "weighted": "weighted by hidden states"}
BOUNDS = {
    "theorem": r"Theorem 5.3, $\sqrt{2\lambda_{max}}\,(\sum_{i>r}\sigma_i^2)^{1/2}$",
    "first_order_sigma": r"$\sqrt{2\,tr\,S}\;\sigma_{r+1}$",
    "first_order": r"$\sqrt{2}\,|u|$",
    "gradient": r"slope + $|u|^2/4$",
    "sharp": "sharp (Hoeffding, Bennett)",
    "second_order": r"$|u|^2/4$, at a minimiser",
    "logit_matrix": r"$\frac{1}{4n}\sum_{i>r}\sigma_i(Z)^2$, at a minimiser",
}

OWN = {"rank": pl.Int32, "w_error": pl.Float64}


def bounds(name: str, table: pl.DataFrame, path: Path) -> Path:
    """Gap and bounds against rank, both logarithmic, a panel for each way to cut; what is not
    positive is left out. `table`: of `bottleneck.bounds`."""
    return _write(_bounds(name, table), path)


def _bounds(name: str, table: pl.DataFrame) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    for axes, (method, title) in zip(
        figure.subplots(1, 2, sharey=True), METHODS.items(), strict=True
    ):
        rows = table.filter(pl.col("rank") > 0, method=method)
        for (column, label), (colour, marker) in zip(BOUNDS.items(), STYLES, strict=True):
            line = rows.filter(pl.col(column) > 0)
            dashes = "--" if "minimiser" in label else "-"
            axes.plot(
                line["rank"], line[column], dashes, label=label, color=colour, marker=marker,
                markersize=4, linewidth=1,
            )  # fmt: skip
        line = rows.filter(pl.col("gap") > 0)
        axes.plot(line["rank"], line["gap"], "o-", label="measured gap", color="0.2", linewidth=2.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(rows["rank"], map(str, rows["rank"]))
        axes.xaxis.minorticks_off()
        axes.set_xlabel("rank r that the head is cut to")
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("nats per token")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center", ncols=4, frameon=False, fontsize="small",
    )  # fmt: skip
    figure.suptitle(f"The head of {name}, cut", fontsize="medium")
    return figure


def w_errors(sweep: Path, fitted: Fitted) -> pl.DataFrame:
    """The points of Figure 8: those of `fitted.heads` that were trained and have a rank, each with
    spectrum.w_error of the model's own head at that rank. Empty where the sweep's
    records have no spectrum of that."""
    named = records.scan(sweep, "trials").filter(head="own", status="done").collect()
    ids = [
        id
        for id, name in named.select("trial", "name").rows()
        if name.removesuffix(" own").replace(" own ", " ") == fitted.name  # as in ranks.fitted
    ]
    rows = records.scan(sweep, "spectra").filter(pl.col("trial").is_in(ids[:1]), matrix="head")
    sigma = torch.from_numpy(rows.sort("index").collect()["sigma"].to_numpy(writable=True))
    errors = spectrum.w_error(sigma).tolist() if len(sigma) else []
    own = pl.DataFrame({"rank": range(len(errors)), "w_error": errors}, OWN)
    trained = fitted.heads.filter(pl.col("rank").is_not_null(), pl.col("lr").is_not_null())
    return trained.join(own, on="rank").sort("family", "rank")


def w_error(fitted: Fitted, found: pl.DataFrame, paper: bool = True) -> Chart:
    """Figure 8: loss of trained heads against W-error of the model's own, and their gap to full
    rank, which the paper's readings (pale) can be compared with. `found`: of `w_errors`."""
    error = 1.96 * pl.col("stderr")
    common = {"series": "family", "x": "w_error", "label": pl.format("r = {}", "rank")}
    low, high = pl.col("loss") - error, pl.col("loss") + error
    own = fitted.heads.filter(family="own").head(1)
    made = [
        points(found, "line", "loss", **common, y="loss", low=low, high=high),
        points(found, "line", "gap", **common, y="gap", low="low", high="high"),
        points(own, "level", "loss", series=pl.lit("the model's own head"), y="loss"),
    ]
    if paper:
        read = pl.read_csv(PAPER / "werror_loss.csv", comment_prefix="#")
        pale = {"series": pl.lit("Pythia-1B, paper"), "x": "w_error"}
        made += [
            points(read, "paper", "loss", **pale, y="loss"),
            points(read, "paper", "gap", **pale, y=pl.col("loss") - pl.col("loss").first()),
        ]
    across = Axis("W-error(r) of the model's own head")
    return Chart(
        f"werror_{fitted.name}", f"Loss against W-error, heads on {fitted.name}",
        "What rank r leaves of the model's own head, and what a trained head of that rank costs; "
        "intervals as above. After Godey et al. 2024, section 5.2, Figure 8."
        + (" Grey: read off it." if paper else ""),
        (
            Panel("loss", across, Axis("loss (nats per token)")),
            Panel("gap", across, Axis("gap to rank d (nats per token)")),
        ),
        pl.concat(made), "Figure 8",
    )  # fmt: skip


def _write(figure: "Figure", path: Path) -> Path:
    atomic.write(path, lambda partial: figure.savefig(partial, format="png", dpi=150))
    return path
