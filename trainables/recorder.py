"""A trial's measurements, on their way to the sweep's tables and to whoever watches."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from analysis import records, sealed

Report = Callable[[dict[str, Any]], None]
SECONDS = 1.0  # between reports of training's progress


class Recorder:
    """Keeps rows until `flush` writes them; `report` shows the scalars that are new.

    Only the first worker of a trial writes and reports, and says how busy its `machine` is.
    `files` are those of the trial that count, by path in the sweep, with their checksums; after a
    checkpoint it goes on from its own.
    """

    def __init__(
        self,
        sweep: Path,
        trial: str,
        steps: int,
        step_tokens: int | None,
        report: Report,
        writes: bool,
        files: dict[str, str] | None = None,
        machine: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        self.sweep, self.trial, self.steps, self.step_tokens = sweep, trial, steps, step_tokens
        self.send, self.writes = report, writes
        self.files = {} if files is None else files
        self.machine, self.seen = machine, -1
        self.sent = 0.0
        self.rows: dict[str, list[dict[str, Any]]] = {
            table: [] for table in records.TABLES if table != "trials"
        }
        self.reported = 0

    def scalar(
        self,
        step: int,
        metric: str,
        value: float,
        split: str = "",
        stderr: float | None = None,
        layer: int | None = None,
    ) -> None:
        row = {
            "tokens": None if self.step_tokens is None else step * self.step_tokens,
            "metric": metric,
            "split": split,
            "layer": layer,
            "value": value,
            "stderr": stderr,
            "time": time.time_ns() // 1_000_000,
        }
        self.add("scalars", step, row)

    def add(self, table: str, step: int, row: dict[str, Any]) -> None:
        self.rows[table].append({"trial": self.trial, "step": step, **row})

    def report(self, step: int, always: bool = True) -> None:
        """Show what is new; unless `always`, at most once in SECONDS."""
        if not always and time.monotonic() - self.sent < SECONDS:
            return
        self.sent = time.monotonic()
        if self.machine and self.writes and step != self.seen:
            self.seen = step
            for metric, value in self.machine().items():
                self.scalar(step, metric, value, "system")
        if self.writes:
            new = self.rows["scalars"][self.reported :]
            self.send({"trial": self.trial, "step": step, "steps": self.steps, "rows": new})
        self.reported = len(self.rows["scalars"])

    def flush(self, step: int) -> None:
        """Write all that is kept, as the segment `step` of each table."""
        self.report(step)
        for table, rows in self.rows.items():
            if self.writes:
                self.keep(records.write(self.sweep, table, self.trial, step, rows))
            rows.clear()
        self.reported = 0

    def row(self, row: dict[str, Any], status: str, step: int) -> None:
        """The trial's own row in the table `trials`."""
        if self.writes:
            whole = {**row, "trial": self.trial, "status": status, "step": step}
            file = records.write(self.sweep, "trials", self.trial, step, [whole])
            if status != "running":
                self.keep(file)

    def keep(self, file: Path | None) -> None:
        """Remember what a file holds."""
        if file:
            self.files[file.relative_to(self.sweep).as_posix()] = sealed.digest(file)
