"""What a sweep's driver does with news of a trial: into the ledger, into MLflow, to the watcher."""

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from analysis import records
from analysis.errors import Failed, full
from orchestrator import ledger, plan, tracker
from orchestrator.tracker import Tracker
from trainables import corpus, schedule, zoo


class Preparing(Protocol):
    """Whoever waits for something to begin."""

    def preparing(self, what: str, count: int = 0) -> None: ...


class Watcher(Preparing, tracker.Watcher, Protocol):
    """Whoever looks on."""

    def started(self, costs: list[plan.Cost], statuses: dict[str, str]) -> None: ...
    def running(self, trial: str) -> None: ...
    def progress(self, trial: str, step: int, steps: int) -> None: ...
    def ended(self, trial: str, status: str, error: str | None) -> None: ...
    def stopping(self) -> None: ...


class Driver:
    """What the driver knows: it writes the ledger and MLflow, and tells the watcher."""

    def __init__(self, sweep: Path, tracker: Tracker, watcher: Watcher, cache: Path) -> None:
        self.sweep, self.tracker, self.watcher = sweep, tracker, watcher
        self._text = functools.cache(lambda key: _counts(corpus.find(key, cache)))
        self.costs: dict[str, plan.Cost] = {}
        self.packs: list[list[str]] = []
        self.entries: dict[str, dict[str, Any]] = {}
        self.active: set[str] = set()
        self.tries: dict[str, int] = {}  # to begin a trial, in vain
        self.reached: dict[str, int] = {}  # the furthest step that was heard of
        self.stopped = False
        self.full: str | None = None  # why, where a disk is

    def add(self, trials: list[dict[str, Any]], planned: plan.Plan) -> None:
        """Take up what the ledger knows of these trials, and bring MLflow up to the records."""
        self.costs |= {cost.id: cost for cost in planned.costs}
        self.packs += [pack.trials for pack in planned.packs]
        known, changed = ledger.read(self.sweep), []
        for trial in trials:
            id, t = trial["id"], trial["train"]
            entry = {"status": "waiting", "step": 0, **known.get(id, {})}
            if entry["status"] not in ledger.FINISHED:
                entry |= {"status": "waiting", "error": None}
            trained = trial["head"]["kind"] not in zoo.BASELINES
            steps = schedule.steps(t["tokens"], t["batch"], t["sequence"]) if trained else 0
            # The trial anew: the grid may have given it other hardware.
            entry |= {"id": id, "steps": steps, "trial": trial, "tags": self._tags(id)}
            entry["text"] = self._text(corpus.key(trial["text"]))
            self.entries[id] = entry
            if entry != known.get(id):
                changed.append(entry)
        with ThreadPoolExecutor(16) as pool:  # each write waits for the disk
            written = pool.map(functools.partial(ledger.write, self.sweep), changed)
            self.entries |= {entry["id"]: entry for entry in written}
        for trial in trials:
            self.tracker.update(self.entries[trial["id"]])
        statuses = {i: entry["status"] for i, entry in self.entries.items()}
        self.watcher.started(list(self.costs.values()), statuses)

    @property
    def pending(self) -> list[str]:
        return [i for i, e in self.entries.items() if e["status"] not in ledger.FINISHED]

    @property
    def waiting(self) -> list[str]:
        return [i for i, e in self.entries.items() if e["status"] == "waiting"]

    def on_start(self, id: str) -> None:
        self.active.add(id)
        self._set(id, status="running", error=None)
        self.tracker.update(self.entries[id])
        self.watcher.running(id)

    def on_result(self, result: dict[str, Any]) -> bool:
        """Whether the trial has got further than ever before."""
        id = result["trial"]
        entry = self.entries[id]
        if warning := result.get("warning"):
            self.watcher.warned(warning)
            return False
        self.tracker.update(entry, result["rows"])
        self.watcher.progress(id, result["step"], result["steps"])
        if time.time() - entry["updated"] > 2:
            self._set(id, step=result["step"])
        before = self.reached.get(id, 0)
        self.reached[id] = max(before, result["step"])
        return result["step"] > before

    def on_failure(self, pack: list[str], failure: str) -> None:
        """Keep what was said, and stop where a disk is full."""
        self.full = self.full or full(failure)
        if self.full:
            self.watcher.warned(self.full)
            (self.sweep / "stop").touch()
            return
        for id in pack:
            log = self.sweep / "trials" / id / "errors.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{failure.strip()}\n\n")
        self.watcher.warned(f"{self.costs[pack[0]].name}: {last_line(failure)}")

    def on_lost(self, failure: str) -> None:
        """Everything that ran has ended with one failure. Raises Failed where nothing did run."""
        if not self.active:
            raise Failed(failure)
        lost = [*self.active]
        self.on_failure(lost, failure)
        for id in lost:
            if ledger.outcome(self.sweep, id) or not self.again(id):
                self.on_end(id, failure)

    def again(self, id: str) -> bool:
        """Whether to try once more to begin a trial."""
        self.tries[id] = self.tries.get(id, 0) + 1
        if self.tries[id] > self.entries[id]["trial"]["retries"]:
            return False
        self.active.discard(id)
        self._set(id, status="waiting")
        return True

    def on_end(self, id: str, error: str | None = None) -> None:
        self.active.discard(id)
        outcome = ledger.outcome(self.sweep, id)
        if outcome:
            self._set(id, **outcome)
        else:
            self._set(id, status="failed" if error else "stopped", error=error)
        entry = self.entries[id]
        if entry["status"] == "failed":
            self._record_failure(entry)
        self.tracker.update(entry)
        self.watcher.ended(id, entry["status"], error)

    def _set(self, id: str, **news: Any) -> None:
        self.entries[id] = ledger.write(self.sweep, {**self.entries[id], **news})

    def _tags(self, id: str) -> dict[str, Any]:
        """What MLflow is to show beside the trial's own fields."""
        cost = self.costs[id]
        return {
            "head": cost.head,
            "rank": cost.rank,
            "d": cost.d,
            "params": cost.params,
            "params_without_embeddings": cost.params_without_embeddings,
            "tokens_per_param": f"{cost.tokens / cost.params:.4g}",
            "epochs": cost.epochs and f"{cost.epochs:.4g}",
        }

    def _record_failure(self, entry: dict[str, Any]) -> None:
        for row in records.scan(self.sweep, "trials", entry["id"]).collect().to_dicts():
            records.write(
                self.sweep, "trials", entry["id"], row["step"], [{**row, "status": "failed"}]
            )


def _counts(text: corpus.Corpus | None) -> dict[str, dict[str, int]] | None:
    """Of a text's parts, by what is counted."""
    if text is None:
        return None
    return {"tokens": text.tokens, "documents": text.documents, "bytes": text.bytes}


def last_line(failure: str) -> str:
    """Of a traceback: what went wrong."""
    lines = [line for line in failure.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "its worker died"
