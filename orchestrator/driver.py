"""What a sweep's driver does with news of a trial: into the ledger, into MLflow, to the watcher."""

import time
from pathlib import Path
from typing import Any, Protocol

from analysis import atomic, records
from orchestrator import ledger, plan
from orchestrator.tracking import Tracker
from trainables import heads, schedule


class Preparing(Protocol):
    """Whoever waits for something to begin."""

    def preparing(self, what: str, count: int = 0) -> None: ...


class Watcher(Preparing, Protocol):
    """Whoever looks on."""

    def started(self, costs: list[plan.Cost], statuses: dict[str, str]) -> None: ...
    def running(self, trial: str) -> None: ...
    def progress(self, trial: str, step: int, steps: int) -> None: ...
    def ended(self, trial: str, status: str, error: str | None) -> None: ...
    def stopping(self) -> None: ...


class Driver:
    """What the driver knows: it writes the ledger and MLflow, and tells the watcher."""

    def __init__(self, sweep: Path, tracker: Tracker, watcher: Watcher) -> None:
        self.sweep, self.tracker, self.watcher = sweep, tracker, watcher
        self.costs: dict[str, plan.Cost] = {}
        self.packs: list[list[str]] = []
        self.entries: dict[str, dict[str, Any]] = {}
        self.active: set[str] = set()

    def add(self, trials: list[dict[str, Any]], planned: plan.Plan) -> None:
        """Take up what the ledger knows of these trials, and bring MLflow up to the records."""
        self.costs |= {cost.id: cost for cost in planned.costs}
        self.packs += [pack.trials for pack in planned.packs]
        known, runs = ledger.read(self.sweep), self.tracker.children()
        for trial in trials:
            id, t = trial["id"], trial["train"]
            entry = {"status": "waiting", "step": 0, **known.get(id, {}), "run": runs.get(id)}
            if entry["status"] not in ledger.FINISHED:
                entry |= {"status": "waiting", "error": None}
            if entry.get("store") != self.tracker.uri:
                entry |= {"store": self.tracker.uri, "tracked": False}
            trained = trial["head"]["kind"] not in heads.BASELINES
            steps = schedule.steps(t["tokens"], t["batch"], t["sequence"]) if trained else 0
            # The trial anew: the grid may have given it other hardware.
            entry = {**entry, "id": id, "steps": steps, "trial": trial}
            if not entry.get("tracked") and (entry["run"] or entry["status"] in ledger.FINISHED):
                self._track(entry)
            self.entries[id] = ledger.write(self.sweep, entry)
        statuses = {i: entry["status"] for i, entry in self.entries.items()}
        self.watcher.started(list(self.costs.values()), statuses)

    @property
    def pending(self) -> list[str]:
        return [i for i, e in self.entries.items() if e["status"] not in ledger.FINISHED]

    def on_start(self, id: str) -> None:
        entry = self.entries[id]
        self.active.add(id)
        if entry["run"]:
            self.tracker.restart(entry["run"])
        else:
            entry["run"] = self._child(entry["trial"])
        self._set(id, status="running", error=None)
        self.watcher.running(id)

    def on_result(self, result: dict[str, Any]) -> None:
        id = result["trial"]
        entry = self.entries[id]
        self.tracker.log(entry["run"], result["rows"])
        self.watcher.progress(id, result["step"], result["steps"])
        if time.time() - entry["updated"] > 2:
            self._set(id, step=result["step"])

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
        self._track(entry)
        ledger.write(self.sweep, entry)
        self.watcher.ended(id, entry["status"], error)

    def _set(self, id: str, **news: Any) -> None:
        self.entries[id] = ledger.write(self.sweep, {**self.entries[id], **news})

    def _track(self, entry: dict[str, Any]) -> None:
        """Bring MLflow up to the records, and, where the trial has ended, to its end."""
        entry["run"] = entry["run"] or self._child(entry["trial"])
        rows = records.scan(self.sweep, "scalars", entry["id"]).collect().iter_rows(named=True)
        self.tracker.log(entry["run"], rows)
        if entry["status"] == "waiting":
            return
        self.tracker.tag(entry["run"], {"status": entry["status"]})
        if entry["status"] in ledger.FINISHED:
            spectra = self.sweep / "report" / "spectra" / f"{entry['id']}.parquet"
            frame = records.scan(self.sweep, "spectra", entry["id"]).collect()
            atomic.write(spectra, frame.write_parquet)
            self.tracker.artifact(spectra, entry["run"], "spectra")
            entry["tracked"] = True
        self.tracker.finish(entry["run"], entry["status"])

    def _child(self, trial: dict[str, Any]) -> str:
        cost = self.costs[trial["id"]]
        tags = {
            "head": cost.head,
            "rank": cost.rank,
            "d": cost.d,
            "params": cost.params,
            "params_without_embeddings": cost.params_without_embeddings,
            "tokens_per_param": f"{cost.tokens / cost.params:.4g}",
            "epochs": cost.epochs and f"{cost.epochs:.4g}",
        }
        return self.tracker.child(trial, tags)

    def _record_failure(self, entry: dict[str, Any]) -> None:
        for row in records.scan(self.sweep, "trials", entry["id"]).collect().to_dicts():
            records.write(
                self.sweep, "trials", entry["id"], row["step"], [{**row, "status": "failed"}]
            )
