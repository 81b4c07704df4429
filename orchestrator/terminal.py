"""What the user is shown: tables and JSON, on stdout. Loads little."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis import atomic

ENDLESS = 10_000  # columns
NAME = 21  # columns that a name is left at least


def print_json(value: Any) -> None:
    """To stdout; NaN and infinity as null, which JSON lacks."""
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def print_line(value: Any) -> None:
    """The same on one line, at once."""
    print(json.dumps(_finite(value), allow_nan=False), flush=True)


def write_json(value: Any, path: Path) -> Path:
    """The same to a file."""
    text = json.dumps(_finite(value), indent=1, allow_nan=False)
    atomic.write_text(path, text)
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", keys: int = 1
) -> None:
    """To stdout, the first column to the left and the others to the right. Columns that do not fit
    beside the others stand below them, again after the first `keys`."""
    if title:
        print(title)
    console, lines = Console(), list(rows)
    if not console.is_terminal:  # a pipe has no width: never fold a row
        console.width = ENDLESS
    for i, columns in enumerate(_side_by_side([headers, *lines], keys, console.width)):
        if i:
            print()
        heads, *cells = ([line[c] for c in columns] for line in [headers, *lines])
        console.print(table(heads, cells, console.width))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    """So wide at most. Where that is narrow only names are cut, never numbers."""
    made = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    numbers = sum(_widths([headers, *rows])[1:])
    made.add_column(Text(headers[0]), no_wrap=True, max_width=max(8, width - numbers - 1))
    for header in headers[1:]:
        made.add_column(Text(header), no_wrap=True, justify="right")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    """Of columns, each with the space after it."""
    return [1 + max(map(len, column)) for column in zip(*lines, strict=True)]


def _side_by_side(lines: Sequence[Sequence[str]], keys: int, width: int) -> list[list[int]]:
    """Which columns there is room for, by block."""
    widths = _widths(lines)
    beside = min(widths[0], NAME) + sum(widths[1:keys])
    blocks, left = [[*range(keys)]], width - beside
    for column in range(keys, len(widths)):
        if widths[column] > left and len(blocks[-1]) > keys:
            blocks.append([*range(keys)])
            left = width - beside
        blocks[-1].append(column)
        left -= widths[column]
    return blocks


def short(value: float | None, unit: str = "") -> str:
    """1.2k, 3.4M, 5.6G, ...; a dash for nothing."""
    if value is None:
        return "-"
    for scale, letter in (
        (1e21, "Z"),
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{letter}{unit}"
    return f"{value:.3g}{unit}"


def duration(seconds: float) -> str:
    """42 s, 3 min 20 s, 5 h 12 min, 4 d 6 h."""
    seconds = round(seconds)
    for size, unit, next_size, next_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // next_size} {next_unit}"
    return f"{seconds} s"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03, or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def print_next(sweep: Path, out: Path, tracking_uri: str | None) -> None:
    """Where everything lies, and what to try."""
    from orchestrator import tracking

    option = "" if out == Path("runs") else f" --out {out}"
    page = sweep / "report" / "report.html"
    files = [page] if page.exists() else sorted(sweep.glob("report/*.png"))
    drawn = "".join(f"\n{'report' if file == page else 'figure'}    {file}" for file in files)
    if (sweep / "grid.yaml").exists():
        more = [f"status {sweep.name}{option}", f"plan --grid {sweep / 'grid.yaml'}"]
    else:
        more = [f"figures {sweep.name}{option} --paper"] if (sweep / "probe.json").exists() else []
    if tracking_uri is None:
        more = [f"ui{option}", *more]
    print(drawn)
    print(f"records   {sweep / 'records'}")
    print(f"MLflow    {tracking_uri or tracking.default_uri(out)}")
    if more:
        print("\nnext      " + "\n          ".join(f"lmsat {command}" for command in more))
