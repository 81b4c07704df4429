"""How far a sweep is, told by its ledger and its records to whoever looks on."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from analysis import sealed, tables
from orchestrator import lease, ledger
from orchestrator.terminal import duration, print_json, print_table, short, table

EVERY = 1.0  # seconds from one look to the next, at least
LINES = 10.0  # and from one line to the next where there is no terminal
MANY = 100  # trials, beyond which those done or waiting are only counted
LOOKED_AT = ("running", "stopped", "failed", "diverged")
HEADERS = ("trial", "id", "status", "step", "share", "held-out", "tokens/s")

Row = dict[str, Any]


class Status:
    """Of a sweep, to be looked at again and again: what has not changed is read once."""

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self.costs = {t["id"]: t for t in sealed.read(sweep / "plan.json")["trials"]}
        self.entries: dict[str, Row] = {}
        self.latest: dict[str, dict[str, float]] = {}
        self.read: dict[str, int] = {}  # when each entry that was read had been written
        self.rows: list[Row] = []
        self.driven = False
        """Whether somebody is at work on it."""
        self.look()

    def look(self) -> None:
        """Take up what is new. Raises sealed.Damaged."""
        self.driven = lease.held(self.sweep)
        changed = False
        for file in (self.sweep / "ledger").glob("*.json"):
            written = file.stat().st_mtime_ns
            if self.read.get(file.stem) != written:
                self.entries[file.stem] = ledger.entry(self.sweep, file.stem)
                self.read[file.stem] = written
                changed = True
        if changed:
            self.latest = tables.latest(self.sweep)
        # Learning rates that were added on the way come last.
        order = dict.fromkeys([*(id for id in self.costs if id in self.entries), *self.entries])
        self.rows = [self._row(id) for id in order]

    def _row(self, id: str) -> Row:
        entry, status = self.entries[id], self.entries[id]["status"]
        return {
            "trial": entry["trial"]["name"],
            "id": id,
            "status": "stopped" if status == "running" and not self.driven else status,
            "step": entry["step"],
            "steps": entry["steps"],
            "share": 1.0 if status in ledger.FINISHED else entry["step"] / max(1, entry["steps"]),
            "loss": self.latest.get(id, {}).get("loss"),
            "tokens_per_second": self.latest.get(id, {}).get("tokens_per_second"),
            "error": entry.get("error"),
        }

    @property
    def counts(self) -> dict[str, int]:
        """How many trials are in each state."""
        found: dict[str, int] = dict.fromkeys(("done", "running", "waiting"), 0)
        for row in self.rows:
            found[row["status"]] = found.get(row["status"], 0) + 1
        return found

    @property
    def seconds_left(self) -> float | None:
        """What was planned for the rest, at the pace of what has a speed. None where nothing
        runs."""
        running = [row for row in self.rows if row["status"] == "running"]
        if not running:
            return None
        timed = [row for row in self.rows if row["tokens_per_second"] and row["id"] in self.costs]
        took = sum(self.costs[r["id"]]["tokens"] / r["tokens_per_second"] for r in timed)
        planned = sum(self.costs[row["id"]]["seconds"] for row in timed)
        pace = took / planned if timed else 1.0
        left = [pace * self._planned(row) * (1 - row["share"]) for row in running]
        rest = sum(pace * self._planned(r) for r in self.rows if r["status"] == "waiting")
        return max(*left, (sum(left) + rest) / len(running), 0.0)

    def _planned(self, row: Row) -> float:
        return float(self.costs.get(row["id"], {}).get("seconds", 0.0))

    def __str__(self) -> str:
        parts = [f"{n} {status}" for status, n in self.counts.items()]
        if self.rows:
            parts.append(f"{100 * sum(r['share'] for r in self.rows) / len(self.rows):.0f} %")
        speeds = [r["tokens_per_second"] or 0.0 for r in self.rows if r["status"] == "running"]
        if any(speeds):
            parts.append(f"{short(sum(speeds))} tokens/s")
        if (left := self.seconds_left) is not None:
            parts.append(f"{duration(left)} left")
        return " · ".join(parts)


def show(status: Status, every: bool, as_json: bool) -> None:
    """Every trial, or of very many those to look at; and what to do next."""
    if as_json:
        print_json(
            {
                "sweep": str(status.sweep),
                "driven": status.driven,
                "counts": status.counts,
                "seconds_left": status.seconds_left,
                "trials": status.rows,
            }
        )
        return
    rows = status.rows
    if not every and len(rows) > MANY:
        rows = [row for row in rows if row["status"] in LOOKED_AT]
    print_table(HEADERS, [_cells(row) for row in rows])
    print(status)
    if len(rows) < len(status.rows):
        print(f"{len(rows)} of {len(status.rows)} trials are shown; all with --all")
    for row in rows:
        if row["error"]:
            print(f"{row['trial']} {row['status']}: {row['error']}")
    if not status.driven and any(row["status"] != "done" for row in rows):
        print(f"\nnext      {again(status.sweep)}")


def again(sweep: Path) -> str:
    """The command that goes on with it."""
    return f"lmsat sweep --grid {sweep / 'grid.yaml'} --out {sweep.parent}"


def watch(status: Status) -> None:
    """On a terminal a table that stays live until nobody is at work any more; else a line now and
    then."""
    console, said = Console(), 0.0
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while status.driven:
            began = time.monotonic()
            if console.is_terminal:
                live.update(Group(_live(status, console), Text(str(status))), refresh=True)
            elif began - said > LINES:
                print(status, flush=True)
                said = began
            status.look()
            # Of ten thousand trials a look takes seconds: look for a tenth of the time at most.
            time.sleep(max(EVERY, 9 * (time.monotonic() - began)))


def _live(status: Status, console: Console) -> Any:
    """As many trials as there is room for, those to look at first."""
    room = max(1, console.height - 3)
    urgent = sorted(status.rows, key=lambda row: row["status"] not in LOOKED_AT)[:room]
    chosen = {row["id"] for row in urgent}
    rows = [_cells(row) for row in status.rows if row["id"] in chosen]
    return table(HEADERS, rows, console.width)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row["trial"],
        row["id"],
        row["status"],
        f"{row['step']}/{row['steps']}",
        f"{100 * row['share']:.0f} %",
        "-" if row["loss"] is None else f"{row['loss']:.3f}",
        short(row["tokens_per_second"]),
    )
