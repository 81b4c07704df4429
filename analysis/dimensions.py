"""What `lmsat dimension` has measured, as tables."""

from pathlib import Path

import numpy as np
import polars as pl
from scipy.special import expit, logit

from analysis import growth, records
from analysis.errors import BadInput

LEVELS = {"halved": 0.5, "tenth": 0.1, "hundredth": 0.01}
"""W-errors whose numbers of dimensions are told."""
TIMES = np.array([10, 100])
"""As many tokens as the whole corpus has: where growth is carried to."""
NAMES = ("name", "corpus", "tokenizer", "vocabulary", "n", "estimate")


def samples(directory: Path) -> pl.DataFrame:
    """One row for each sample of each series, by name, then tokens: NAMES, `tokens` and a column
    for each metric."""
    return (
        records.scan(directory, "scalars")
        .filter(pl.col("split") == "corpus")
        .join(_names(directory), on="trial")
        .collect()
        .pivot("metric", index=[*NAMES, "step"], values="value", sort_columns=True)
        .rename({"step": "tokens"})
        .sort("name", "tokens")
    )


def whole(samples: pl.DataFrame) -> pl.DataFrame:
    """The largest sample of each series."""
    return samples.filter(pl.col("tokens") == pl.col("tokens").max().over("name"))


def curves(directory: Path, table: str) -> pl.DataFrame:
    """A table of the records (w_errors, softmax, required) at the largest sample of each series:
    NAMES, `tokens` and its own columns."""
    return (
        records.scan(directory, table)
        .filter(pl.col("step") == pl.col("step").max().over("trial"))
        .join(_names(directory), on="trial")
        .select(*NAMES, pl.col("step").alias("tokens"), pl.exclude(*NAMES, "step", "trial"))
        .sort("name", *records.KEYS[table][2:], nulls_last=True)
        .collect()
    )


def at(errors: pl.DataFrame, d: list[int]) -> pl.DataFrame:
    """W-error at each d, a row for each series: `name` and a column for each d, null above V;
    `exact`: up to which d it is. `errors`: curves of w_errors."""
    rows = []
    for (name,), line in errors.group_by("name", maintain_order=True):
        known = np.interp(d, line["d"], line["w_error"], left=np.nan, right=np.nan)
        exact = line.filter("exact")["d"].max() or 0
        rows.append({"name": name, "exact": exact, **dict(zip(map(str, d), known, strict=True))})
    return pl.DataFrame(rows, infer_schema_length=None).fill_nan(None)


def growths(samples: pl.DataFrame) -> pl.DataFrame:
    """How d grows with the corpus by `growth`, rows for each series and level of W-error that has
    samples enough: name, level, exponent, `missed` (what the law of the smaller samples says of the
    largest one, as a share too much), and for each of TIMES: times, d, low, high."""
    rows = []
    for (name,), some in samples.group_by("name", maintain_order=True):
        V, tokens = some["vocabulary"][0], some["tokens"].to_numpy()
        for level in LEVELS if some["estimate"][0] != "softmax" else ():
            try:
                law = growth.fit(tokens, some[level].to_numpy(), V)
            except BadInput:
                continue
            last = law.dimensions[-1]
            missed = V * expit(logit(last / V) + law.left_out) / last - 1
            own = {"name": name, "level": LEVELS[level], "exponent": law.exponent, "missed": missed}
            for times, d, low, high in zip(TIMES, *growth.at(law, tokens[-1] * TIMES), strict=True):
                rows.append({**own, "times": int(times), "d": d, "low": low, "high": high})
    return pl.DataFrame(rows)


def _names(directory: Path) -> pl.LazyFrame:
    trials = records.scan(directory, "trials").filter(pl.col("kind") == "dimension")
    return trials.select("trial", *NAMES)
