"""A directory of measurements that are taken step by step, of which none is taken twice.

    <directory>/ledger/<series>.json records/

What `lmsat probe` and `lmsat dimension` have in common: series of steps, each measured by itself on
some worker, one MLflow run a series. The driver may die at any time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from analysis import records
from analysis.errors import BadInput
from orchestrator import cluster, ledger, tracking
from orchestrator.place import Place
from orchestrator.progress import Bar
from orchestrator.tracker import Tracker

Settings = dict[str, Any]  # of a series; `trial` is a hash of all that changes what is found


def check_place(directory: Path) -> None:
    """Raises BadInput where the directory holds a sweep."""
    if (directory / "plan.json").exists():
        raise BadInput(f"--name: {directory} holds a sweep; give another name")


def check_fits(there: Place, cpus: int, gpus: float = 0) -> int:
    """Cores of the largest machine. Raises BadInput where no machine has what a worker wants."""
    nodes = [node for node in there.nodes if node.most]
    cores = max(node.cpus for node in nodes)
    if cpus > cores:
        raise BadInput(f"--cpus: {cpus} wanted, {there.name} has {cores}")
    most = max(node.gpus for node in nodes)
    if gpus > most:
        raise BadInput(f"--gpus: {gpus:g} wanted, {there.name} has {most}")
    return cores


def check_same(directory: Path, series: dict[str, Settings], hardware: tuple[str, ...]) -> None:
    """Series are told apart by name: two measurements under one would be taken for one. Raises
    BadInput where the directory holds another of one's name; `hardware` changes nothing."""
    if not (directory / "ledger").is_dir():
        return
    for entry in ledger.read(directory).values():
        settings = series.get(entry["name"])
        if settings is None or entry["id"] == settings["trial"]:
            continue
        was, now = (dict(tracking.flat(s)) for s in (entry["settings"], settings))
        changes = [
            f"{key} was {was.get(key)}, is {now.get(key)}"
            for key in was | now
            if was.get(key) != now.get(key) and key not in ("trial", *hardware)
        ]
        what = "; ".join(changes) or "it is another one of that name"
        raise BadInput(
            f"{directory} holds another measurement of {entry['name']} ({what}); give this "
            "one a new --name"
        )


class Measuring:
    """The series of a directory, and how far they are."""

    def __init__(self, directory: Path, tracker: Tracker, bar: Bar) -> None:
        self.directory, self.tracker, self.bar = directory, tracker, bar
        self.entries: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}

    def add(
        self, name: str, settings: Settings, marks: dict[int, str], params: dict[str, Any]
    ) -> list[int]:
        """Take up what is known of a series; its steps that are still to be measured, rising.

        A step counts as measured while its mark is the same. `params`: what MLflow shows.
        """
        id, known = settings["trial"], ledger.read(self.directory)
        entry = {"checkpoints": {}, "edition": 0, **known.get(id, {})}
        entry |= {"id": id, "name": name, "status": "running", "settings": settings, "step": 0}
        whole = records.segments(self.directory, "trials", id)
        kept = {int(at): k["fingerprint"] for at, k in entry["checkpoints"].items()}
        if stale := [at for at, mark in marks.items() if at in whole and kept.get(at) != mark]:
            # What MLflow holds cannot be written anew: another run takes its place.
            entry["edition"] += 1
            whole -= {*stale}
        entry["shown"] = {**params, "id": id, "name": name}
        entry["tags"] = {"checkpoints": len(marks), "edition": entry["edition"] or None}
        left = sorted(marks.keys() - whole)
        for at, mark in sorted(marks.items()):
            status = "waiting" if at in left else "done"
            entry["checkpoints"][str(at)] = {"fingerprint": mark, "status": status}
        for at in left:
            records.drop(self.directory, id, at)
        self.entries[id] = ledger.write(self.directory, entry)
        self.tracker.update(self.entries[id])
        return left

    def go(
        self,
        work: Callable[[Any], None],
        ahead: Callable[[Any], None],
        after: Callable[[Any], None],
        items: list[dict[str, Any]],
        cpus: int,
        gpus: float,
    ) -> None:
        """Do `work` on items, each with `trial` and `step`; `after` in this process. What is said
        of a step is written at once."""
        for index, error in cluster.fan_out(work, ahead, items, cpus, gpus, self.bar):
            after(items[index])
            self._ended(items[index], error)

    @property
    def steps(self) -> int:
        """Of all series, those measured before too."""
        return sum(len(entry["checkpoints"]) for entry in self.entries.values())

    def finish(self) -> None:
        """Say how it ended, or that it was stopped."""
        for id, entry in self.entries.items():
            found = {kept["status"] for kept in entry["checkpoints"].values()}
            ends = (("waiting", "stopped"), ("failed", "failed"))
            status = next((end for kind, end in ends if kind in found), "done")
            self.entries[id] = ledger.write(self.directory, {**entry, "status": status})
            self.tracker.update(self.entries[id])

    def _ended(self, item: dict[str, Any], error: str | None) -> None:
        id, at = item["trial"], item["step"]
        entry = self.entries[id]
        kept = entry["checkpoints"][str(at)]
        kept |= {"status": "failed" if error else "done", "error": error}
        if error:
            records.drop(self.directory, id, at)
            self.failed[f"{entry['name']} step {at}"] = error
        self.entries[id] = ledger.write(self.directory, entry)
        if not error:
            rows = records.scan(self.directory, "scalars", id).filter(step=at)
            self.tracker.update(self.entries[id], rows.collect().to_dicts())
        self.bar.ended(f"{entry['name']} step {at}", error)
