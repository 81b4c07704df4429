"""MLflow, a view of a sweep that can be rebuilt; the only module that knows it.

One experiment a sweep; a parent run for the sweep, a child run for each trial. Only the driver
writes, and it never starts a second run for a trial: run ids are kept in the ledger.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from analysis import atomic
from analysis.errors import BadInput

_STATUS = {"done": "FINISHED", "diverged": "FAILED", "failed": "FAILED", "stopped": "KILLED"}


def default_uri(out: Path) -> str:
    """A sqlite file beside the runs."""
    return f"sqlite:///{out.resolve() / 'mlflow.db'}"


def resolve(uri: str | None, out: Path) -> str:
    """The store to use: `uri`, or a sqlite file beside the runs. Raises BadInput where it names no
    store, or a server that does not answer."""
    import urllib.request

    if uri is None:
        return default_uri(out)
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    if "://" not in uri and not uri.startswith("databricks"):
        raise BadInput(f"--tracking-uri: {uri!r} is no URI; a server is http://HOST:PORT")
    if uri.startswith("http"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10).close()
        except OSError as error:
            raise BadInput(f"--tracking-uri: no MLflow server answers at {uri}: {error}") from None
    return uri


class Tracker:
    """Writes one sweep into MLflow."""

    def __init__(self, uri: str, sweep: Path, name: str) -> None:
        """Open the store, the sweep's experiment and its parent run, or make them."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        from mlflow import MlflowClient

        self.client = MlflowClient(uri)
        kept = sweep / "tracking.json"
        known = json.loads(kept.read_text()) if kept.exists() else {}
        if known.get("uri") != uri:
            known = {"uri": uri, "experiment": self._experiment(uri, sweep, name)}
            parent = self.client.create_run(known["experiment"], run_name=name)
            known["parent"] = parent.info.run_id
            atomic.write_text(kept, json.dumps(known))
        self.uri, self.experiment, self.parent = uri, known["experiment"], known["parent"]
        self.client.update_run(self.parent, status="RUNNING")
        self.grid = ""
        self.steps: dict[str, dict[str, set[int]]] = {}  # logged, by run and metric

    def _experiment(self, uri: str, sweep: Path, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            where = (sweep.parent / "mlartifacts").as_uri() if uri.startswith("sqlite") else None
            return str(self.client.create_experiment(name, artifact_location=where))
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def describe(self, note: str, grid: str) -> None:
        """What the sweep is, for those who find it in the UI; `grid` is the grid's hash."""
        self.grid = grid
        self.client.set_experiment_tag(self.experiment, "mlflow.note.content", note)
        self.client.set_tag(self.parent, "mlflow.note.content", note)
        self.tag(self.parent, {"grid": grid})

    def children(self) -> dict[str, str]:
        """The run of each trial that has one."""
        found: dict[str, str] = {}
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment],
                f"tags.`mlflow.parentRunId` = '{self.parent}'",
                max_results=1000,
                page_token=token,
            )
            found |= {run.data.tags["lmsat.trial"]: run.info.run_id for run in page}
            if not (token := page.token):
                return found

    def child(self, trial: dict[str, Any], tags: dict[str, Any]) -> str:
        """A new run for a trial, under the sweep's."""
        from mlflow.entities import Param

        given = {"mlflow.parentRunId": self.parent, "lmsat.grid": self.grid}
        given |= {f"lmsat.{key}": str(v) for key, v in tags.items() if v is not None}
        given["lmsat.trial"] = trial["id"]
        run = self.client.create_run(self.experiment, tags=given, run_name=trial["name"])
        params = [Param(key, str(value)[:6000]) for key, value in flat(trial)]
        self.client.log_batch(run.info.run_id, params=params)
        self.steps[run.info.run_id] = {}
        return str(run.info.run_id)

    def tag(self, run: str, tags: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(run, tags=[RunTag(f"lmsat.{k}", str(v)) for k, v in tags.items()])

    def restart(self, run: str) -> None:
        """Show a run from before as running again."""
        self.client.update_run(run, status="RUNNING")

    def discard(self, run: str) -> None:
        """Delete a run: what MLflow holds cannot be written anew."""
        self.client.delete_run(run)

    def log(self, run: str, rows: Iterable[dict[str, Any]]) -> None:
        """Rows of `scalars` as metrics, with their own timestamps; those of steps that the run
        has already are left out, so nothing is there twice."""
        from mlflow.entities import Metric

        if run not in self.steps:
            self.steps[run] = self._logged(run)
        logged, metrics = self.steps[run], []
        for row in rows:
            key, value = metric_name(row), row["value"]
            # MLflow stores infinity as 1.8e308.
            if row["step"] in logged.setdefault(key, set()) or not -1e300 < value < 1e300:
                continue
            logged[key].add(row["step"])
            metrics.append(Metric(key, value, row["time"], row["step"]))
        for start in range(0, len(metrics), 1000):
            self.client.log_batch(run, metrics=metrics[start : start + 1000])

    def _logged(self, run: str) -> dict[str, set[int]]:
        """The steps of each metric that a run has from before."""
        keys = self.client.get_run(run).data.metrics
        history = self.client.get_metric_history
        return {key: {metric.step for metric in history(run, key)} for key in keys}

    def finish(self, run: str, status: str) -> None:
        self.client.set_terminated(run, _STATUS[status])

    def close(self, finished: bool) -> None:
        """End the sweep's own run."""
        self.client.set_terminated(self.parent, "FINISHED" if finished else "KILLED")

    def artifact(self, file: Path, run: str | None = None, folder: str | None = None) -> None:
        """Keep a file with a run, or with the sweep."""
        self.client.log_artifact(run or self.parent, str(file), folder)


def metric_name(row: dict[str, Any]) -> str:
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
