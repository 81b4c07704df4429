"""MLflow, a view of a sweep that can be rebuilt; the only module that knows it.

    tracking.json         what is said of the sweep in any store
    tracking/<key>.key    what finds it there
    tracking/<run>.txt    of the store with this run of the sweep: which trials it has whole

One experiment a sweep; a run for the sweep, and under it one for each trial. A run is found by its
tag `lmsat.key`, and made to be what the trial's ledger entry and records say: whatever was written
before, and however often it is done, none is there twice.
"""

import contextlib
import os
import re
import tempfile
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import polars as pl

from analysis import records, sealed
from analysis.errors import BadInput, one_line

_STATUS = {
    "waiting": "SCHEDULED",
    "running": "RUNNING",
    "done": "FINISHED",
    "diverged": "FAILED",
    "failed": "FAILED",
    "stopped": "KILLED",
}
_NOTE = "mlflow.note.content"
_EDITION = "lmsat.edition"  # of measurements that were taken anew, and differ
_PASSING = (401, 403, 408, 429)  # refusals by HTTP that may be over in a while

Row = dict[str, Any]  # of `scalars`
Entry = dict[str, Any]  # of the ledger: id, status, updated, tags, and the trial or what is shown


class NoAnswer(BadInput):
    """The store does not answer."""


class Refused(Exception):
    """By a store that answers otherwise."""


def default_uri(out: Path) -> str:
    """A sqlite file beside the runs."""
    return f"sqlite:///{out.resolve() / 'mlflow.db'}"


def check_secrets(option: str, url: str) -> None:
    """Raises BadInput where a URL holds a password, which would be kept and shown."""
    if re.search(r"^https?://[^/?#]*@|://[^/?#]*:[^/?#]*@", url):
        raise BadInput(
            f"{option}: no user or password in a URL; MLflow and fsspec take them from the "
            "environment or their own files: docs/cluster.md"
        )


def resolve(uri: str | None, out: Path) -> str:
    """The store to use: `uri`, or a sqlite file beside the runs. Raises BadInput where it names no
    store or holds a password, NoAnswer where a server does not answer."""
    import urllib.request

    if uri is None:
        return default_uri(out)
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    if "://" not in uri and not uri.startswith("databricks"):
        raise BadInput(f"--tracking-uri: {uri!r} is no URI; a server is http://HOST:PORT")
    check_secrets("--tracking-uri", uri)
    if uri.startswith("http"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10).close()
        except (OSError, ValueError, HTTPException) as error:
            raise NoAnswer(f"--tracking-uri: no MLflow server answers at {uri}: {error}") from None
    return uri


def connect(uri: str) -> Any:
    """MLflow's client for a store, which has answered once. Raises NoAnswer."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # below it there are tracebacks
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # whoever asks does it again
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow import MlflowClient

    file = Path(uri.removeprefix("sqlite:///"))
    try:
        if uri.startswith("sqlite:///") and not file.exists():
            _make(file)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # a store may fail in any way
        raise NoAnswer(f"--tracking-uri: MLflow at {uri}: {why(error)}") from None
    return client


def _make(file: Path) -> None:
    """A sqlite store, whole or not at all: one whose making was killed can never be opened."""
    from mlflow import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    MlflowClient(f"sqlite:///{partial}").search_experiments(max_results=1)
    with contextlib.suppress(OSError):  # another sweep was first; or there are no links here
        os.link(partial, file)
    partial.unlink()


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


def refused(error: Exception) -> bool:
    """Whether it would be so again, however long one waits."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        code = error.get_http_status_code()
        return bool(400 <= code < 500 and code not in _PASSING)
    mine = (Refused, ValueError, TypeError, LookupError, pl.exceptions.PolarsError)
    return isinstance(error, mine) and not isinstance(error, OSError)


def why(error: Exception) -> str:
    """The cause, without what MLflow and its libraries say around it."""
    cause = (
        r"(?:\[Errno -?\d+\]|\(\w+\.OperationalError\)) (?P<first>[^'\"()<>\[\]]+)|"
        r"(?P<second>Read timed out|Remote end closed connection)"
    )
    found = re.search(cause, str(error))
    return one_line(found["first"] or found["second"]) if found else one_line(error)


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
        tags = {"mlflow.parentRunId": self.parent, "lmsat.key": key, "lmsat.trial": id}
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
        shown = dict(flat(entry["trial"] if "trial" in entry else entry["shown"]))
        if run is None:
            began = min((row["time"] for row in rows), default=None)
            run = self._make(key, str(shown["name"]), tags, began)
        self.runs[id] = run
        self._log(run, {**tags, "lmsat.status": entry["status"]}, shown, rows)
        if entry["status"] not in ("waiting", "running"):
            self.client.set_terminated(run.id, status, int(1e3 * entry["updated"]))
            if entry["status"] in ("done", "diverged"):
                self._keep_spectra(run, id)
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
            self._find(key, edition)
        self.client.set_tag(self.parent, "lmsat.status", status)
        self.client.set_terminated(self.parent, _STATUS[status])
        for kind in ("png", "svg"):
            for figure in sorted((self.sweep / "report").glob(f"*.{kind}")):
                self.attach(self.parent, figure)

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
        tags = {"lmsat.status": "running", "lmsat.grid": self.facts["grid"], _NOTE: note}
        self._log(run, {k: v for k, v in tags.items() if v}, {}, [])
        if note:
            self.client.set_experiment_tag(self.experiment, _NOTE, note)
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
            key, value, known = metric_name(row), row["value"], run.steps
            # MLflow stores infinity as 1.8e308.
            if row["step"] in known.setdefault(key, set()) or not -1e300 < value < 1e300:
                continue
            known[key].add(row["step"])
            metrics.append(Metric(key, value, row["time"], row["step"]))
        if lacking or params:
            self.client.log_batch(run.id, params=params[:100], tags=lacking)
        for start in range(100, len(params), 100):
            self.client.log_batch(run.id, params=params[start : start + 100])
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run.id, metrics=metrics[start : start + 1000])
        run.tags |= tags
        run.params |= shown.keys()
        self.new_values += len(metrics)

    def _keep_spectra(self, run: _Run, id: str) -> None:
        spectra = records.scan(self.sweep, "spectra", id).collect()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{id}.parquet"
            spectra.write_parquet(file)
            self.attach(run.id, file, "spectra")

    def attach(self, run: str, file: Path, folder: str | None = None) -> None:
        """Raises Refused where the store answers, and does not take the file: no reason to keep
        everything else waiting."""
        try:
            self.client.log_artifact(run, str(file), folder)
        except Exception as error:
            self.client.get_experiment(self.experiment)
            raise Refused(f"{file.name}: {why(error)}") from None


def _key(sweep: Path) -> str:
    """What finds a sweep's runs in any store: in the name of a file, as no bit of that can flip."""
    folder = sweep / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    for known in folder.glob("*.key"):
        return known.stem
    key = uuid.uuid4().hex[:16]
    (folder / f"{key}.key").touch()
    return key


def metric_name(row: Row) -> str:
    """held_out/loss, model/stable_rank, held_out/anisotropy/layer_last: split first, layer last."""
    parts = [row["split"] or "model", row["metric"]]
    if row["layer"] is not None:
        parts.append("layer_last" if row["layer"] == -1 else f"layer_{row['layer']:02d}")
    return re.sub(r"[^\w\-./ :]", "_", "/".join(parts))  # what MLflow takes in a name


def flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Every set leaf of nested fields, with its dotted name."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def serve(out: Path, port: int) -> None:
    """Become the MLflow UI on the runs of `out`, on loopback. Raises BadInput where there are
    none, or the port is taken."""
    import socket
    import sys

    if not (out / "mlflow.db").is_file():
        raise BadInput(f"{out}: no runs here; `lmsat sweep --grid ranks.yaml` makes some")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise BadInput(f"--port: {port} cannot be used on 127.0.0.1: {error}") from None
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    command = ["-m", "mlflow", "ui", "--backend-store-uri", default_uri(out)]
    os.execv(sys.executable, [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)])
