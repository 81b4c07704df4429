"""One sweep in one store."""

import contextlib
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import records, sealed
from orchestrator.tracking import models, names
from orchestrator.tracking.names import Row
from orchestrator.tracking.places import Refused, connect, unanswered, why

_STATUS = {
    "waiting": "SCHEDULED",
    "running": "RUNNING",
    "done": "FINISHED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "stopped": "KILLED",
}
_SOURCE = {"mlflow.source.name": "lmsat", "mlflow.source.type": "LOCAL"}  # a column of the UI
_SHOWN = {".html", ".png", ".svg", ".csv"}  # what the UI shows of a report
_LARGEST = 20e6  # bytes of such a file
_EDITION = "lmsat.edition"  # of measurements that were taken anew, and differ

Entry = dict[str, Any]  # of the ledger: id, status, updated, tags, and the trial or what is shown


@dataclass
class _Run:
    """What a run has."""

    id: str
    status: str
    tags: dict[str, str]
    params: set[str]
    steps: dict[str, set[int]]
    """By metric."""


class Store:
    """One sweep in one store. Whatever a method raises, it may be called again after `forget`."""

    def __init__(
        self, uri: str, sweep: Path, note: str = "", grid: str = "", anew: bool = False
    ) -> None:
        """`note` and `grid`, a hash of it, are for those who find the sweep in the UI; without
        them what was said before. `anew`: to look at what is known to be whole, too. Raises
        NoAnswer."""
        self.client = connect(uri)
        self.uri, self.sweep, self.name, self.anew = uri, sweep, sweep.name, anew
        self.key = _key(sweep)
        file = sweep / "tracking.json"
        try:
            known = sealed.read(file)
        except (FileNotFoundError, sealed.Damaged):
            known = {}
        self.facts = {"note": "", "grid": "", **known}
        self.facts |= {k: v for k, v in (("note", note), ("grid", grid)) if v}
        if self.facts != known:
            sealed.write(file, self.facts)
        self.new_runs = self.new_values = 0
        self.doubted: dict[str, str | None] = {}  # runs that may have been made after all
        self.forget()

    def forget(self) -> None:
        """Ask for everything anew: the store may have done what it seemed to have failed in, or
        be another one by now."""
        self.experiment = self.parent = ""
        self.fresh = False  # it has nothing of the sweep yet
        self.local = False  # its files are on a disk of this machine
        self.whole: dict[str, str] = {}
        self.runs: dict[str, _Run] = {}

    def bring_up(self, entry: Entry, rows: list[Row] | None) -> None:
        """Make a trial's run what its entry says, with these rows; or with all its records, where
        there are none given or the run was not known."""
        if not self.parent:
            self.open()
        if entry["status"] == "waiting" and not entry["step"]:
            return  # there is nothing of it yet
        id, status = entry["id"], _STATUS[entry["status"]]
        key = f"{self.key}/{id}"
        tags = {"mlflow.parentRunId": self.parent, "lmsat.key": key, "lmsat.trial": id, **_SOURCE}
        tags |= {"lmsat.grid": self.facts["grid"]} if self.facts["grid"] else {}
        tags |= {f"lmsat.{k}": str(v) for k, v in entry["tags"].items() if v is not None}
        run = self.runs.get(id)
        if run is None:
            if self.whole.get(id) == str(entry["updated"]) and not self.anew:
                return
            rows = None
            run = None if self.fresh else self._find(key, tags.get(_EDITION))
            if run is None and entry["status"] == "waiting":
                return
        if rows is None:
            rows = records.scan(self.sweep, "scalars", id).collect().to_dicts()
        shown = dict(names.flat(entry["trial"] if "trial" in entry else entry["shown"]))
        if run is None:
            began = min((row["time"] for row in rows), default=None)
            run = self._make(key, str(shown["name"]), tags, began)
        if id not in self.runs:
            self._log_text(run, entry)
        self.runs[id] = run
        self._log(run, {**tags, "lmsat.status": entry["status"]}, shown, rows)
        if entry["status"] not in ("waiting", "running"):
            self.client.set_terminated(run.id, status, int(1e3 * entry["updated"]))
            if entry["status"] in ("done", "diverged"):
                self._keep_spectra(run, id)
                self._keep_model(run, key, entry)
            self._mark(id, str(entry["updated"]))
            del self.runs[id]
        elif run.status != status:
            self.client.update_run(run.id, status=status)
            run.status = status

    def finish(self, status: str) -> None:
        """End the sweep's own run, with what was drawn of it."""
        if not self.parent:
            self.open()
        for key, edition in self.doubted.items():
            if run := self._find(key, edition):
                models.one(self.client, self.experiment, key, run.id)
        self.client.set_tag(self.parent, "lmsat.status", status)
        self.client.set_terminated(self.parent, _STATUS[status])
        for file in sorted((self.sweep / "report").glob("*")):
            if file.suffix in _SHOWN and file.stat().st_size <= _LARGEST:
                self.attach(self.parent, file)
        if (self.sweep / "grid.yaml").is_file():
            self.attach(self.parent, self.sweep / "grid.yaml")

    def open(self) -> None:
        """Find the sweep in the store, or make it."""
        known = self.client.get_experiment_by_name(self.name)
        if known is None:
            beside = (self.sweep.parent / "mlartifacts").as_uri()
            where = beside if self.uri.startswith("sqlite") else None
            self.experiment = self.client.create_experiment(self.name, artifact_location=where)
        else:
            self.experiment = known.experiment_id
            if known.lifecycle_stage == "deleted":
                self.client.restore_experiment(self.experiment)
                self.anew = True
        key, note = self.key, self.facts["note"]
        any_run = f"tags.`lmsat.key` LIKE '{key}%'"
        fresh = not self.client.search_runs([self.experiment], any_run, max_results=1)
        run = None if fresh else self._find(key)
        run = run or self._make(key, self.name, {"lmsat.key": key}, None)
        tags = {"lmsat.status": "running", "lmsat.grid": self.facts["grid"], **_SOURCE}
        tags["mlflow.note.content"] = note
        asked = sealed.read(plan)["grid"] if (plan := self.sweep / "plan.json").is_file() else {}
        self._log(run, {k: v for k, v in tags.items() if v}, dict(names.flat(asked)), [])
        experiment = self.client.get_experiment(self.experiment)
        for name, value in names.experiment_tags(note, self.experiment, run.id).items():
            if experiment.tags.get(name) != value:
                self.client.set_experiment_tag(self.experiment, name, value)
        self.local = experiment.artifact_location.startswith("file:")
        self.client.update_run(run.id, status="RUNNING")
        self.parent, self.fresh = run.id, fresh
        if self._marks.exists():
            lines = (line.split() for line in self._marks.read_text().splitlines())
            self.whole = {words[0]: words[-1] for words in lines if words}

    @property
    def _marks(self) -> Path:
        return self.sweep / "tracking" / f"{self.parent}.txt"

    def _mark(self, id: str, updated: str) -> None:
        """The store has all of this trial."""
        if self.whole.get(id) != updated:
            self.whole[id] = updated
            self._marks.parent.mkdir(exist_ok=True)
            with self._marks.open("a") as file:
                file.write(f"{id} {updated}\n")

    def _find(self, key: str, edition: str | None = None) -> _Run | None:
        """The run with this key, if there is one: that which was written to, or the first. Others,
        and other editions, are deleted."""
        found = self.client.search_runs([self.experiment], f"tags.`lmsat.key` = '{key}'")
        own = [run for run in found if run.data.tags.get(_EDITION) == edition]
        own.sort(key=lambda r: ("lmsat.status" not in r.data.tags, r.info.start_time))
        for run in found:
            if run not in own[:1]:
                self.client.delete_run(run.info.run_id)
        if not own:
            return None
        info, data = own[0].info, own[0].data
        history = self.client.get_metric_history
        steps = {name: {m.step for m in history(info.run_id, name)} for name in data.metrics}
        return _Run(info.run_id, info.status, dict(data.tags), {*data.params}, steps)

    def _make(self, key: str, name: str, tags: dict[str, str], began: int | None) -> _Run:
        try:
            made = self.client.create_run(self.experiment, began, tags, name)
        except Exception:
            self.doubted[key] = tags.get(_EDITION)
            raise
        self.new_runs += 1
        return _Run(made.info.run_id, "RUNNING", dict(tags), set(), {})

    def _log(self, run: _Run, tags: dict[str, str], shown: dict[str, Any], rows: list[Row]) -> None:
        """Of all this what the run lacks; rows with their own timestamps."""
        from mlflow.entities import Metric, Param, RunTag

        lacking = [RunTag(k, v) for k, v in tags.items() if run.tags.get(k) != v]
        params = [Param(k, str(v)[:6000]) for k, v in shown.items() if k not in run.params]
        metrics = []
        for row in rows:
            key, value, known = names.metric_name(row), row["value"], run.steps
            # MLflow stores infinity as 1.8e308.
            if row["step"] in known.setdefault(key, set()) or not -1e300 < value < 1e300:
                continue
            known[key].add(row["step"])
            metrics.append(Metric(key, value, row["time"], row["step"]))
        new = len(metrics)
        while lacking or params or metrics:  # a batch holds 1,000 of all, of the first two 100
            self.client.log_batch(run.id, metrics[:800], params[:100], lacking[:100])
            lacking, params, metrics = lacking[100:], params[100:], metrics[800:]
        run.tags |= tags
        run.params |= shown.keys()
        self.new_values += new

    def _log_text(self, run: _Run, entry: Entry) -> None:
        trial = entry.get("trial", {})
        if "text" in trial and "corpus" in trial:
            found = models.datasets(trial, entry.get("text"))
            self.client.log_inputs(run.id, datasets=found)

    def _keep_model(self, run: _Run, key: str, entry: Entry) -> None:
        folder = self.sweep / "trials" / entry["id"] / "model"
        where = self.client, self.experiment, key, run.id
        with self._sending("its model"):
            if "trial" not in entry or not models.wanted(entry["trial"], folder, self.local):
                return
            model = None if self.fresh else models.one(*where)
            try:
                model = model or models.make(*where, entry)
            except Exception:
                self.doubted[key] = run.tags.get(_EDITION)
                raise
            models.fill(self.client, model, folder, entry["step"])

    def _keep_spectra(self, run: _Run, id: str) -> None:
        spectra = records.scan(self.sweep, "spectra", id).collect()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{id}.parquet"
            spectra.write_parquet(file)
            self.attach(run.id, file, "spectra")

    def attach(self, run: str, file: Path, folder: str | None = None) -> None:
        with self._sending(file.name):
            self.client.log_artifact(run, str(file), folder)

    @contextlib.contextmanager
    def _sending(self, what: str) -> Iterator[None]:
        """Raises Refused where the store answers, and does not take files: no reason to keep
        everything else waiting."""
        try:
            yield
        except Exception as error:
            if unanswered(error):
                raise
            self.client.get_experiment(self.experiment)
            raise Refused(f"{what}: {why(error)}") from None


def _key(sweep: Path) -> str:
    """What finds a sweep's runs in any store: in the name of a file, as no bit of that can flip."""
    folder = sweep / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    for known in folder.glob("*.key"):
        return known.stem
    key = uuid.uuid4().hex[:16]
    (folder / f"{key}.key").touch()
    return key


def try_out(uri: str, folder: Path) -> None:
    """Write to a store, and delete it again; `folder` holds a file. Raises NoAnswer, or whatever
    the store fails with."""
    store = Store(uri, folder / "lmsat-doctor")
    store.open()
    try:
        if uri.startswith("http"):  # of a file the artifacts lie in --out
            store.attach(store.parent, next(file for file in folder.iterdir() if file.is_file()))
    finally:
        store.client.delete_run(store.parent)
        store.client.delete_experiment(store.experiment)
