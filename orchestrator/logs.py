"""What happened to one trial, in order of time: from its records, its ledger and its errors."""

import difflib
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from analysis import records
from analysis.errors import BadInput
from orchestrator import lease, ledger
from orchestrator.completing import slug
from orchestrator.terminal import short

LINES = 20  # of training alone, evenly apart; what was held out is told each time
EVERY = 1.0  # seconds from one look to the next
NEAR = 4  # names that an unknown one is answered with
TOLD = (
    (("train", "loss"), "loss"),
    (("held_out", "loss"), "held_out_loss"),
    (("", "tokens_per_second"), "tokens_per_second"),
)

Event = dict[str, Any]
Entry = dict[str, Any]


def find(sweep: Path, trial: str) -> Entry:
    """The ledger's entry of the trial of that id, name, or part of a name that no other has. Raises
    BadInput with what is near."""
    entries = ledger.read(sweep)
    names = {id: slug(entry["trial"]["name"]) for id, entry in entries.items()}
    wanted = slug(trial.strip())
    words = {*wanted.split("_")}
    for match in (
        lambda id: wanted in (id, names[id]),
        lambda id: words <= {*names[id].split("_")},
        lambda id: wanted in names[id] or id.startswith(wanted),
    ):
        found = [id for id in names if match(id)]
        if len(found) == 1:
            return entries[found[0]]
        if found:
            some = ", ".join(names[id] for id in found[:NEAR])
            more = f" and {len(found) - NEAR} more" if len(found) > NEAR else ""
            raise BadInput(f"{trial}: {len(found)} trials of {sweep} are called so: {some}{more}")
    near = difflib.get_close_matches(wanted, names.values(), NEAR, 0.3)
    known = ", ".join(near or [*names.values()][:NEAR])
    raise BadInput(f"{trial}: no trial of {sweep} is called so; near are {known}")


def events(sweep: Path, entry: Entry) -> list[Event]:
    """Everything that is known, in order of time: `time` (seconds since 1970), `step`, `what`
    (measured, failed, or at the end the trial's state) and what it is about."""
    told = [*_measured(sweep, entry), *_failures(sweep, entry["id"])]
    end = {"step": entry["step"], "what": entry["status"], "error": entry.get("error")}
    return [*sorted(told, key=lambda event: event["time"]), {"time": entry["updated"], **end}]


def _measured(sweep: Path, entry: Entry) -> Iterator[Event]:
    """Every held-out loss, and training's own at a readable density."""
    wanted = pl.any_horizontal(
        (pl.col("split") == split) & (pl.col("metric") == metric) for (split, metric), _ in TOLD
    )
    rows = records.scan(sweep, "scalars", entry["id"]).filter(wanted).sort("step").collect()
    shown = -1
    for (step,), some in rows.group_by("step", maintain_order=True):
        values = {(row["split"], row["metric"]): row for row in some.to_dicts()}
        found = {name: values[key]["value"] for key, name in TOLD if key in values}
        part = int(step) * LINES // max(1, entry["steps"])
        if "held_out_loss" in found or part > shown:
            shown = part
            at = max(row["time"] for row in values.values()) / 1000
            stderr = values.get(("held_out", "loss"), {}).get("stderr")
            yield {"time": at, "step": step, "what": "measured", **found, "stderr": stderr}


def _failures(sweep: Path, id: str) -> Iterator[Event]:
    """Each as it is in errors.txt: a time, and all that was said."""
    file = sweep / "trials" / id / "errors.txt"
    if not file.is_file():
        return
    told = re.split(r"(?m)^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)$", file.read_text(errors="replace"))
    for when, text in zip(told[1::2], told[2::2], strict=True):
        with suppress(ValueError):  # a line of somebody else's, of a day that there is not
            at = datetime.strptime(when, "%Y-%m-%d %H:%M:%S").timestamp()
            yield {"time": at, "step": None, "what": "failed", "error": text.strip()}


def lines(found: Iterable[Event], steps: int) -> Iterator[str]:
    """A line an event."""
    width = len(str(steps))
    for event in found:
        when = time.strftime("%m-%d %H:%M:%S", time.localtime(event["time"]))
        where = " " * (width + 5) if event["step"] is None else f"step {event['step']:{width}}"
        yield f"{when}  {where}  {_what(event)}"


def _what(event: Event) -> str:
    if event["what"] != "measured":
        said = (event.get("error") or "").strip().splitlines()
        return f"{event['what']}: {said[-1].strip()}" if said else str(event["what"])
    parts = [f"loss {event['loss']:.3f}"] if event.get("loss") is not None else []
    if event.get("held_out_loss") is not None:
        known = event["stderr"] is not None
        error = f"±{event['stderr']:.3f}".replace("±0.", "±.") if known else ""
        parts.append(f"held out {event['held_out_loss']:.3f}{error}")
    if event.get("tokens_per_second") is not None:
        parts.append(f"{short(event['tokens_per_second'])} tokens/s")
    return " · ".join(parts)


def follow(sweep: Path, entry: Entry) -> Iterator[Event]:
    """The same, and what comes, until the trial has ended or nobody is at work any more."""
    seen: set[tuple[Any, ...]] = set()
    while True:
        driven = lease.held(sweep)
        entry = ledger.entry(sweep, entry["id"])
        if entry["status"] == "running" and not driven:
            entry["status"] = "stopped"
        *past, last = events(sweep, entry)
        for event in past:
            key = (event["what"], event["step"], event["time"])
            if key not in seen:
                seen.add(key)
                yield event
        if not driven or last["what"] not in ("waiting", "running"):
            yield last
            return
        time.sleep(EVERY)


def as_json(sweep: Path, entry: Entry) -> dict[str, Any]:
    """All of it, for machines."""
    known = {key: entry[key] for key in ("id", "status", "step", "steps")}
    return {
        "sweep": str(sweep),
        "trial": entry["trial"]["name"],
        **known,
        "events": events(sweep, entry),
    }


def title(sweep: Path, entry: Entry) -> str:
    """What it is about, and where more of it lies."""
    folder = sweep / "trials" / entry["id"]
    return f"{entry['trial']['name']}  {entry['id']}  {folder}"
