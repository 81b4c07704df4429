"""Which trial is where; survives any crash.

    ledger/<trial>.json           the driver's word: the trial, its state, its MLflow run
    trials/<trial>/outcome.json   the worker's last word, which outlives the driver

One file a trial and one writer a file; `read` lets the worker's word win.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from analysis import atomic
from analysis.errors import BadInput

FINISHED = ("done", "diverged")  # nothing more to train


def write(sweep: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Keep a trial's entry, and return it with the time: id, trial, status (waiting, running,
    done, diverged, stopped, failed), step, run and store (of MLflow), tracked, error."""
    entry = {**entry, "updated": time.time()}
    atomic.write_text(sweep / "ledger" / f"{entry['id']}.json", json.dumps(entry))
    return entry


def conclude(sweep: Path, trial: str, status: str, step: int) -> None:
    """The worker's word on how its trial ended: done or diverged."""
    said = json.dumps({"status": status, "step": step})
    atomic.write_text(sweep / "trials" / trial / "outcome.json", said)


def outcome(sweep: Path, trial: str) -> dict[str, Any]:
    """What the worker said of the end: status and step, or nothing yet."""
    try:
        said: dict[str, Any] = json.loads((sweep / "trials" / trial / "outcome.json").read_text())
    except FileNotFoundError:
        return {}
    return said


def entry(sweep: Path, trial: str) -> dict[str, Any]:
    """What is known of one trial."""
    known = json.loads((sweep / "ledger" / f"{trial}.json").read_text())
    return {**known, **outcome(sweep, trial)}


def read(sweep: Path) -> dict[str, dict[str, Any]]:
    """Every trial's entry, by id. While no driver is at work a trial cannot be running: what a
    dead driver left so is `stopped`."""
    entries = {p.stem: entry(sweep, p.stem) for p in sorted((sweep / "ledger").glob("*.json"))}
    if not is_driven(sweep):
        for known in entries.values():
            if known["status"] == "running":
                known["status"] = "stopped"
    return entries


def make(sweep: Path, out: Path) -> None:
    """The directory of a sweep that will be driven. Raises BadInput, naming `out`, where it cannot
    be written to."""
    try:
        sweep.mkdir(parents=True, exist_ok=True)
        (sweep / "driver.lock").touch()
    except OSError as error:
        raise BadInput(f"--out: cannot write to {out}: {error.strerror}") from None


@contextmanager
def driving(sweep: Path) -> Iterator[None]:
    """Hold the sweep as its only driver. Raises BadInput where another one does; the hold ends
    with the process, however it dies."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(sweep / "driver.lock", timeout=0):
            yield
    except Timeout:
        raise BadInput(
            f"{sweep}: another `lmsat` is at work here; see `lmsat status {sweep}`"
        ) from None


def is_driven(sweep: Path) -> bool:
    try:
        with driving(sweep):
            return False
    except BadInput:
        return True
