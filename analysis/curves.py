"""Series of checkpoints, from anyone's table or from records: what an onset is looked for in."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from analysis import points, records
from analysis.errors import BadInput

Array = npt.NDArray[np.float64]

# By the end of a metric's name: its kind. The first that fits counts.
KINDS = (
    ("perplexity", r"ppl|perplexity"),
    ("loss", r"loss|nll|cross_entropy|bits_per_byte|bits_per_char|bpb|bpc|bits"),
    ("accuracy", r"acc|acc_norm|accuracy|exact_match|em|f1|mc1|mc2|pass@1"),
    ("error", r"error|error_rate|err"),
    ("entropy", r"singular_entropy(_1|_rank)?(_centred|_functional)?|kl\w*|entropy"),
    ("cosine", r"anisotropy\w*|cosine"),
    ("rank", r"(effective|stable|spectral)_rank\w*|rankme|isoscore\w*|participation_ratio\w*"),
)
SPECTRAL = ("entropy", "cosine", "rank")
POSITIVE = ("perplexity", "entropy", "rank")  # judged by their logarithms
SEEN = "seen/loss"  # on text that training has seen
HEAD = ("singular_entropy", "singular_entropy_functional")


@dataclass(frozen=True)
class Curve:
    """One metric of one model along training."""

    model: str
    metric: str
    kind: str
    """Of KINDS."""
    steps: Array
    """K, rising."""
    values: Array
    """K, in the metric's own unit."""
    stderr: Array | None = None
    blocks: Array | None = None
    """K x n, in nats per token: the losses of the same n blocks at every step."""
    rates: Array | None = None
    """K: learning rates."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Numbers that are one for the whole series (N, d, ...), and D at its end."""

    @property
    def spectral(self) -> bool:
        return self.kind in SPECTRAL

    def worse(self) -> Array:
        """The values as something that rises when the model gets worse or its spectrum collapses:
        nats, ln perplexity, share of errors, ln of an entropy, minus ln of a rank, a cosine."""
        if self.kind in ("perplexity", "entropy"):
            return np.log(self.values)
        if self.kind == "rank":
            return -np.log(self.values)
        return 1 - self.values if self.kind == "accuracy" else self.values

    def back(self, worse: Array) -> Array:
        """In the metric's own unit again."""
        if self.kind in ("perplexity", "entropy"):
            return np.exp(worse)
        if self.kind == "rank":
            return np.exp(-worse)
        return 1 - worse if self.kind == "accuracy" else worse

    def error(self) -> Array | None:
        """Standard errors of `worse`."""
        if self.stderr is None:
            return None
        return self.stderr / self.values if self.kind in POSITIVE else self.stderr


def kind(metric: str) -> str | None:
    """What a metric's name says it is."""
    name = metric.lower().split("/")[-1].removesuffix(",none")
    return next((k for k, pattern in KINDS if re.search(rf"(^|_)({pattern})$", name)), None)


def of_table(
    frame: pl.DataFrame, given: Mapping[str, str], better: str | None = None
) -> list[Curve]:
    """The series of a table: one for each combination of its text columns (model, task, ...), and
    in a wide table for each column that is a metric by its name. `given` names columns: `step`,
    `value`, `stderr`. `better` (lower, higher): of a metric that its name does not tell.
    """
    frame = points.named(frame, ["step"], given)
    if frame["step"].dtype == pl.String:  # step1000
        frame = frame.with_columns(pl.col("step").str.extract(r"(\d+)$").cast(pl.Int64))
    if not points.is_sane(frame["step"].cast(pl.Float64, strict=False)).all():
        raise BadInput("column step: numbers are needed")
    if "value" in given:
        frame = points.named(frame, ["value"], given)
        own = given["value"].strip('"')
        values = {own if own in frame.columns else "value": "value"}
    elif "value" in frame.columns:
        values = {"value": "value"}
    else:
        numeric = frame.select(pl.selectors.numeric()).columns
        values = {c: c for c in numeric if kind(c) and "stderr" not in c}
    if not values:
        raise BadInput(
            f"no column is a metric by its name among {', '.join(frame.columns)}; "
            "--column value=NAME"
        )
    texts = [c for c in frame.select(pl.col(pl.String)).columns if c not in ("step", "metric")]
    for name in filter(kind, texts):
        numbers = frame[name].cast(pl.Float64, strict=False)
        if numbers.count():
            others = frame[name].filter(numbers.is_null()).drop_nulls()
            raise BadInput(
                f"column {name}: numbers are needed, not {others[0] if len(others) else 'text'!r}"
            )
    keys = [*texts, *(c for c in ("seed", "trial") if c in frame.columns and c not in texts)]
    named = ["metric"] if "metric" in frame.columns and "value" in values else []
    found = []
    for name, column in values.items():
        groups = (
            frame.group_by(keys + named, maintain_order=True) if keys + named else [((), frame)]
        )
        for group, rows in groups:
            label = dict(zip(keys + named, group, strict=True))
            metric = str(label.pop("metric")) if named else name
            found.append(_curve(rows, column, metric, label, given, better))
    return found


def _curve(
    rows: pl.DataFrame,
    column: str,
    metric: str,
    label: dict[str, object],
    given: Mapping[str, str],
    better: str | None,
) -> Curve:
    what = kind(metric)
    if better is not None:
        what = {"lower": what or "error", "higher": what or "accuracy"}[better]
    model = " ".join(str(v) for v in label.values() if v is not None)
    if what is None:
        raise BadInput(f"is a lower {metric} better, or a higher? say --better lower or higher")
    rows = rows.drop_nulls(column).sort("step")  # nothing was measured there
    if rows.is_empty():
        raise BadInput(f"{model} {metric}: has no number")
    at = rows["step"].cast(pl.Float64)
    if at.is_duplicated().any():
        twice = rows.filter(at.is_duplicated())["step"][0]
        raise BadInput(
            f"{model} {metric}: step {twice} is there more than once; "
            "what tells its rows apart must be a text column"
        )
    values = rows[column].cast(pl.Float64, strict=False)
    if not (sane := points.is_sane(values)).all():
        raise BadInput(f"{model} {metric}: no number at step {rows.filter(~sane)['step'][0]}")
    array = values.to_numpy()
    if what == "accuracy" and array.max() > 1:  # in percent
        array = array / 100
    if what in POSITIVE and array.min() <= 0:
        raise BadInput(f"{model} {metric}: must be above 0, is {array.min():g}")
    named = rows.select(pl.selectors.numeric()).columns
    facts = _facts(rows, {c: c for c in named if c not in ("step", column)})
    facts |= _facts(
        rows, {v: s.strip('"') for v in ("N", "d", "V") if (s := points.usual(rows, v))}
    )
    if source := points.usual(rows, "D"):
        facts["D"] = float(rows[source.strip('"')][-1])  # so far
    rates = next((rows[c] for c in ("learning_rate", "lr") if c in rows.columns), None)
    return Curve(
        model,
        metric,
        what,
        at.to_numpy(),
        array,
        _stderr(rows, column, given, array),
        rates=None if rates is None or rates.null_count() else rates.cast(pl.Float64).to_numpy(),
        facts=facts,
    )


def _facts(rows: pl.DataFrame, columns: Mapping[str, str]) -> dict[str, float]:
    """What is one number for the whole series."""
    constant = {name: rows[c].drop_nulls().unique() for name, c in columns.items()}
    return {name: float(one[0]) for name, one in constant.items() if len(one) == 1}


def _stderr(
    rows: pl.DataFrame, column: str, given: Mapping[str, str], values: Array
) -> Array | None:
    own = [given.get("stderr"), f"{column}_stderr", "stderr"]
    name = next((n for n in own if n in rows.columns), None)
    if name is None or rows[name].null_count() or not rows[name].dtype.is_numeric():
        return None
    found = rows[name].cast(pl.Float64).to_numpy()
    in_percent = rows[column].max() != values.max()
    return found / 100 if in_percent else found


def of_records(directory: Path, ids: Sequence[str] | None = None) -> list[Curve]:
    """The series of a sweep, or of what was probed, or of these trials of it: held-out and seen
    loss with their blocks, singular entropy of the head as it is and functional, anisotropy of the
    last layer, tasks."""
    kept = pl.lit(True) if ids is None else pl.col("trial").is_in(list(ids))
    trials = records.scan(directory, "trials").filter(kept).sort("name").collect()
    scalars = records.scan(directory, "scalars").filter(kept).sort("step").collect()
    blocks = records.scan(directory, "blocks").filter(kept).sort("step").collect()
    found = []
    for row in trials.iter_rows(named=True):
        named = {"N": "params", "d": "d", "V": "vocabulary"}
        facts = {name: float(row[c]) for name, c in named.items() if row[c] is not None}
        own = scalars.filter(trial=row["trial"])
        if seen := own["tokens"].drop_nulls().to_list():
            facts["D"] = float(seen[-1])
        lr = own.filter(metric="learning_rate").select("step", lr="value")
        for split, metric in (("held_out", "loss"), ("seen", SEEN)):
            wide = blocks.filter(trial=row["trial"], split=split).pivot(
                "block", index="step", values="loss"
            )
            # The last probe sees more blocks: those that all have are compared.
            shared = wide.select(c.name for c in wide if not c.null_count())
            if shared.height < 2 or shared.width < 3:
                continue
            steps, matrix = shared["step"].to_numpy(), shared.drop("step").to_numpy()
            rates = shared.select("step").join(lr, on="step", how="left")["lr"]
            rates = rates.fill_null(strategy="backward")  # step 0 was measured, not taken
            found.append(
                Curve(
                    row["name"],
                    metric,
                    "loss",
                    steps.astype(np.float64),
                    matrix.mean(1),
                    blocks=matrix,
                    rates=None if rates.null_count() else rates.to_numpy(),
                    facts=facts,
                )
            )
        head = pl.col("metric").is_in(HEAD) & pl.col("layer").is_null()
        last = (pl.col("metric") == "anisotropy") & (pl.col("layer") == -1)
        measured = own.filter(head | last | (pl.col("split") == "task"))
        for (metric,), rows in measured.group_by("metric", maintain_order=True):
            what = kind(str(metric))
            if what is None or rows.height < 2:
                continue
            steps, values = rows["step"].to_numpy().astype(np.float64), rows["value"].to_numpy()
            stderr = None if rows["stderr"].null_count() else rows["stderr"].to_numpy()
            found.append(Curve(row["name"], str(metric), what, steps, values, stderr, facts=facts))
    return found
