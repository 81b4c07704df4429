"""The tidy tables of a sweep: one row per measured value, in parquet, written once, scanned lazily.

    runs/<sweep>/records/<table>/<trial>/<segment>.parquet

A segment is named by the step it was written at, so a resumed trial that measures a step again
writes the same file again. Where two segments hold one key, the later segment counts.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
from polars.io.plugins import register_io_source

from analysis import atomic, sealed

_KEY = {"trial": pl.String, "step": pl.Int64}

TABLES: dict[str, dict[str, type[pl.DataType]]] = {
    "scalars": {
        **_KEY,
        "tokens": pl.Int64,  # seen in training so far
        "split": pl.String,  # train, seen, held_out; "" where none applies
        "metric": pl.String,
        "layer": pl.Int32,  # null where none applies; -1 is the last, after the final norm
        "value": pl.Float64,
        "stderr": pl.Float64,
        "time": pl.Int64,  # of the measurement, ms since 1970, so that MLflow can be rebuilt
    },
    "blocks": {**_KEY, "split": pl.String, "block": pl.Int32, "loss": pl.Float64},  # nats per token
    "spectra": {**_KEY, "matrix": pl.String, "index": pl.Int32, "sigma": pl.Float64},
    "w_errors": {**_KEY, "d": pl.Int32, "w_error": pl.Float64, "exact": pl.Boolean},
    "softmax": {
        **_KEY,
        "rank": pl.Int32,  # 0 of the unigram model; null of smoothed counts, which no rank binds
        "ridge": pl.Float64,
        "train": pl.Float64,  # nats per token
        "loss": pl.Float64,  # held out
        "stderr": pl.Float64,
    },
    "required": {
        **_KEY,
        "tolerance": pl.Float64,  # nats per token
        "rank": pl.Int32,
        "low": pl.Int32,
        "high": pl.Int32,
        "at_least": pl.Int32,  # a rank of this is this or less
        "at_most": pl.Int32,  # above it: more than this
    },
    "trials": {
        "trial": pl.String,
        "name": pl.String,
        "kind": pl.String,
        "size": pl.String,
        "head": pl.String,
        "init": pl.String,  # scaled, svd, normal; null for a baseline
        "rank": pl.Int32,  # null for a full head
        "seed": pl.Int64,
        "search": pl.String,  # shared by trials that differ in learning rate alone
        "d": pl.Int32,
        "vocabulary": pl.Int32,
        "params": pl.Int64,
        "params_without_embeddings": pl.Int64,  # neither input embedding nor head
        "lr": pl.Float64,
        "tokens": pl.Int64,  # to be trained on, or measured
        "tokens_per_param": pl.Float64,
        "epochs": pl.Float64,
        "corpus": pl.String,  # this and what follows of `dimension` alone
        "tokenizer": pl.String,
        "n": pl.Int32,
        "estimate": pl.String,
        "status": pl.String,  # running, done, diverged, failed
        "step": pl.Int64,
    },
}
KEYS = {
    "scalars": ["trial", "step", "split", "metric", "layer"],
    "blocks": ["trial", "step", "split", "block"],
    "spectra": ["trial", "step", "matrix", "index"],
    "w_errors": ["trial", "step", "d"],
    "softmax": ["trial", "step", "rank"],
    "required": ["trial", "step", "tolerance"],
    "trials": ["trial"],
}


def write(
    sweep: Path, table: str, trial: str, segment: int, rows: Iterable[Mapping[str, Any]]
) -> Path | None:
    """Write one segment whole or not at all; its file, if there is a row. Raises where a row does
    not fit the table's schema."""
    frame = pl.DataFrame(list(rows), schema=TABLES[table], strict=True)
    if frame.is_empty():
        return None
    path = _file(sweep, table, trial, segment)
    atomic.write(path, frame.write_parquet)
    return path


def settle(sweep: Path, trial: str, kept: Container[str]) -> None:
    """Of a trial that has ended keep these files alone: all else was written before a crash, and
    again after it."""
    for table in TABLES:
        for path in files(sweep, table, trial):
            if path.relative_to(sweep).as_posix() not in kept:
                path.unlink()


def segments(sweep: Path, table: str, trial: str) -> set[int]:
    """The segments that are on disk."""
    return {int(file.stem) for file in files(sweep, table, trial)}


def drop(sweep: Path, trial: str, segment: int) -> None:
    """Forget a segment of all tables; `trials` first, which says that the others are whole."""
    for table in reversed(TABLES):
        _file(sweep, table, trial, segment).unlink(missing_ok=True)


def scan(sweep: Path, table: str, trial: str | None = None) -> pl.LazyFrame:
    """The table of a sweep, or of one of its trials: each key once, the later segment's row.

    Raises sealed.Damaged, once it is collected, where a file cannot be read as that table."""
    found = files(sweep, table, trial)
    if not found:
        return pl.LazyFrame(schema=TABLES[table])
    frame = _open(found, table).unique(KEYS[table], keep="last", maintain_order=True)

    def read(
        columns: list[str] | None, predicate: pl.Expr | None, rows: int | None, batch: int | None
    ) -> Iterator[pl.DataFrame]:
        wanted = frame if predicate is None else frame.filter(predicate)
        wanted = wanted if columns is None else wanted.select(columns)
        try:
            yield (wanted if rows is None else wanted.head(rows)).collect()
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
            for file in found:
                if not readable(file, table):
                    raise sealed.Damaged(str(file)) from None
            raise

    return register_io_source(read, schema=TABLES[table])


def files(sweep: Path, table: str, trial: str | None = None) -> list[Path]:
    """The segments of a sweep, or of one of its trials, in order."""
    folder = sweep / "records" / table
    return sorted(
        folder.glob("*/*.parquet") if trial is None else (folder / trial).glob("*.parquet")
    )


def _file(sweep: Path, table: str, trial: str, segment: int) -> Path:
    return sweep / "records" / table / trial / f"{segment:012d}.parquet"


def _open(files: list[Path], table: str) -> pl.LazyFrame:
    return pl.scan_parquet(files, schema=TABLES[table], missing_columns="insert")


def readable(file: Path, table: str) -> bool:
    """Whether a file can be read as that table: not whether it holds what was written."""
    try:
        _open([file], table).collect()
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException):
        return False
    return True
