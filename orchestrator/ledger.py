"""Which trial is where; survives any crash.

    ledger/<trial>.json           the driver's word: the trial, and its state
    trials/<trial>/outcome.json   the worker's last word, which outlives the driver

One file a trial and one writer a file; `read` lets the worker's word win.
"""

import time
from pathlib import Path
from typing import Any

from analysis import records, sealed
from analysis.errors import BadInput
from orchestrator import lease

FINISHED = ("done", "diverged")  # nothing more to train


def write(sweep: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Keep a trial's entry, and return it with the time: id, trial, status (waiting, running,
    done, diverged, stopped, failed), step, tags (for MLflow), error."""
    entry = {**entry, "updated": time.time()}
    sealed.write(sweep / "ledger" / f"{entry['id']}.json", entry)
    return entry


def conclude(sweep: Path, trial: str, status: str, step: int, files: dict[str, str]) -> None:
    """The worker's word on how its trial ended: done or diverged, and what there is of it: files
    by path in the sweep, with their checksums."""
    records.settle(sweep, trial, files)
    said = {"status": status, "step": step, "files": files}
    sealed.write(sweep / "trials" / trial / "outcome.json", said)


def outcome(sweep: Path, trial: str) -> dict[str, Any]:
    """What the worker said of the end: status and step, or nothing yet. Raises Damaged."""
    try:
        said = sealed.read(sweep / "trials" / trial / "outcome.json")
    except FileNotFoundError:
        return {}
    return {"status": said["status"], "step": said["step"]}


def entry(sweep: Path, trial: str) -> dict[str, Any]:
    """What is known of one trial. Raises Damaged."""
    return {**sealed.read(sweep / "ledger" / f"{trial}.json"), **outcome(sweep, trial)}


def read(sweep: Path) -> dict[str, dict[str, Any]]:
    """Every trial's entry, by id. While no driver is at work a trial cannot be running: what a
    dead driver left so is `stopped`."""
    entries = {p.stem: entry(sweep, p.stem) for p in sorted((sweep / "ledger").glob("*.json"))}
    if not lease.held(sweep):
        for known in entries.values():
            if known["status"] == "running":
                known["status"] = "stopped"
    return entries


def make(sweep: Path, out: Path) -> None:
    """The directory of a sweep that will be driven. Raises BadInput, naming `out`, where it cannot
    be written to."""
    try:
        (sweep / "driver").mkdir(parents=True, exist_ok=True)
        (sweep / "driver" / ".writable").touch()
        (sweep / "driver" / ".writable").unlink()
    except OSError as error:
        raise BadInput(f"--out: cannot write to {out}: {error.strerror}") from None
