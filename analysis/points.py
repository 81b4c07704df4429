"""Measured points from anyone's table: read, named by the variables of laws, checked."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from analysis.errors import BadInput

PAPER = Path(__file__).parent / "paper"
READERS = {
    ".csv": lambda path: pl.read_csv(path, comment_prefix="#", infer_schema_length=None),
    ".tsv": lambda path: pl.read_csv(path, separator="\t", infer_schema_length=None),
    ".parquet": pl.read_parquet,
    ".jsonl": lambda path: pl.read_ndjson(path, infer_schema_length=None),
    ".ndjson": lambda path: pl.read_ndjson(path, infer_schema_length=None),
}
# What a variable is called in the wild, likeliest first.
NAMES: dict[str, tuple[str, ...]] = {
    "N": ("N", "params", "params_total", "parameters", "n_params", "num_params"),
    "D": ("D", "tokens", "n_tokens", "num_tokens", "training_tokens", "tokens_seen"),
    "d": ("d", "d_model", "hidden_size"),
    "r": ("r", "rank", "head_rank"),
    "V": ("V", "vocabulary", "vocab_size", "vocab"),
    "U": ("U", "unique_tokens"),
    "loss": ("loss", "final_loss", "val_loss", "eval_loss", "validation_loss", "test_loss"),
    "stderr": ("stderr", "loss_stderr", "se"),
    "step": ("step", "steps", "iteration", "global_step", "checkpoint"),
    "model": ("model", "name", "trial"),
}
BODIES = ("params_without_embeddings", "params_nonemb", "non_embedding_params")
SIGNED = ("S2",)  # an annealing area: nothing at first, and less where the rate is raised again
LARGEST = 1e100  # of numbers: the squares of larger ones are none
SHOWN = 5  # rows that a message names


def read(path: Path) -> pl.DataFrame:
    """A CSV, TSV, parquet or JSONL table; one that is not there may ship with lmsat."""
    if path.suffix not in READERS:
        raise BadInput(f"{path}: a table is one of {' '.join(READERS)}, or a sweep")
    if not path.is_file() and (PAPER / path.name).is_file() and path.parent == Path():
        path = PAPER / path.name
    try:
        frame = READERS[path.suffix](path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such table, and no sweep of that name") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        raise BadInput(f"{path}: cannot be read: {_line(error)}") from None
    if frame.is_empty():
        raise BadInput(f"{path}: has no rows")
    for column in frame.columns:
        if twice := re.fullmatch(r"(.*)_duplicated_\d+", column):  # as the library calls it
            raise BadInput(f"{path}: column {twice[1]} stands twice; rename or remove one")
    return frame


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def where(frame: pl.DataFrame, condition: str, option: str) -> pl.DataFrame:
    """The rows that meet a condition in SQL, such as `params >= 4e8 and kind = 'final'`."""
    try:
        kept = frame.filter(pl.sql_expr(condition))
    except (pl.exceptions.PolarsError, TypeError) as error:
        message = f"{option}: {_line(error)}; columns: {', '.join(frame.columns)}"
        raise BadInput(message) from None
    if kept.is_empty():
        raise BadInput(f"{option}: no row meets {condition!r}")
    return kept


def named(
    frame: pl.DataFrame, wanted: Sequence[str], given: Mapping[str, str], optional: bool = False
) -> pl.DataFrame:
    """With a column for each variable that is wanted: as given (a column, or an expression such as
    `step * 2097152`), or else the first of its usual NAMES that the table has."""
    for variable in wanted:
        found = given.get(variable) or usual(frame, variable)
        if found is None:
            if optional:
                continue
            message = f"no column for {variable} among {', '.join(frame.columns)}"
            raise BadInput(f"{message}; say which: --column {variable}=NAME")
        try:
            frame = frame.with_columns(pl.sql_expr(found).alias(variable))
        except (pl.exceptions.PolarsError, TypeError) as error:
            raise BadInput(f"--column {variable}={found}: {_line(error)}") from None
    return frame


def usual(frame: pl.DataFrame, variable: str) -> str | None:
    """The column that a variable most likely is."""
    names = NAMES.get(variable, (variable,))
    # N is not n, but Loss is loss.
    lower = {c.lower(): c for c in frame.columns if len(c) > 1}
    known = {c: c for c in frame.columns}
    found = (table[name] for table in (known, lower) for name in names if name in table)
    return next((f'"{name}"' for name in found), None)


def is_sane(column: pl.Series) -> pl.Series:
    """Of each value, whether it is a number that can be computed with."""
    return (column.abs() < LARGEST).fill_null(False) & column.is_not_nan().fill_null(False)


def numbered(frame: pl.DataFrame) -> pl.DataFrame:
    """With the row of each point in its table, from 1, for messages."""
    return frame.with_row_index("row", offset=1)


def check(frame: pl.DataFrame, variables: Sequence[str]) -> pl.DataFrame:
    """The points as floats, exact repetitions left out. Raises where a loss or variable is not a
    positive number, or where rows that are alike in all else disagree in their loss."""
    for name in (*variables, "loss"):
        if not frame[name].dtype.is_numeric():
            raise BadInput(f"column {name}: numbers are needed, not {frame[name].dtype}")
        column = frame[name].cast(pl.Float64)
        good = is_sane(column) & ((column > 0).fill_null(False) | (name in SIGNED))
        if not good.all():
            bad = frame.filter(~good)
            value = bad[name][0]
            raise BadInput(
                f"column {name}: positive numbers are needed; {_rows(bad)}"
                f" {'has' if bad.height == 1 else 'have'} {'nothing' if value is None else value}"
                + (" and more" if bad.height > 1 else "")
            )
    # Floats may be other measurements; what tells points apart is text and whole numbers.
    kinds = frame.select(pl.col(pl.String, pl.Boolean), pl.selectors.integer()).columns
    keys = sorted({*variables, *kinds} - {"row", "loss"})
    repeated = frame.filter(pl.struct(keys).is_duplicated())
    differing = repeated.filter(pl.col("loss").n_unique().over(keys) > 1)
    if differing.height:
        alike = differing.join(differing.head(1), on=keys, how="semi", nulls_equal=True)
        raise BadInput(
            f"{_rows(alike)} are the same point ({', '.join(keys)}) with different losses; "
            "keep one, or add a column that tells them apart, such as seed"
        )
    kept = frame.unique([*keys, "loss"], keep="first", maintain_order=True)
    return kept.with_columns(pl.col(*variables, "loss").cast(pl.Float64))


def _rows(frame: pl.DataFrame) -> str:
    rows = [str(row) for row in frame["row"].head(SHOWN)]
    more = ", ..." if frame.height > SHOWN else ""
    return f"row{'s' if frame.height > 1 else ''} {', '.join(rows)}{more}"


def doubts(frame: pl.DataFrame, given: Mapping[str, str]) -> list[str]:
    """What looks like another unit than parameters, tokens and nats."""
    found = []
    for name, few, what in (("N", 1e3, "parameters"), ("D", 1e4, "tokens")):
        if name not in frame.columns:
            continue
        values = frame[name].unique().sort()
        if (least := float(values[0])) < few:
            found.append(
                f"{name} goes down to {least:g}: {what}, or millions of them? "
                f"then --column '{name}=1e6 * ...'"
            )
        jumps = (values / values.shift(1)).fill_null(1.0)
        if (jumps > 1e4).any():
            at = int(jumps.arg_max() or 0)
            found.append(
                f"{name} jumps from {values[at - 1]:g} to {values[at]:g}: are its units mixed?"
            )
    ceiling = math.log(frame["V"].max()) if "V" in frame.columns else 12.0  # type: ignore[arg-type]
    if (most := float(frame["loss"].max())) > 1.1 * ceiling:  # type: ignore[arg-type]
        found.append(
            f"a loss of {most:g} is above that of a uniform guess: is it in nats per token?"
        )
    source = (given.get("loss") or usual(frame, "loss") or "").lower()
    if any(word in source for word in ("ppl", "perplexity", "bits", "bpb")) and "ln" not in source:
        found.append(f"{source} is fitted as nats per token; a perplexity needs ln(...)")
    return found


def steps_within(frame: pl.DataFrame) -> bool:
    """Whether points lie along runs: one model at several steps."""
    if not {"model", "step"} <= set(frame.columns):
        return False
    others = [c for c in ("model", "seed", "N") if c in frame.columns]
    return bool((frame.group_by(others).agg(pl.col("step").n_unique())["step"] > 1).any())
