"""A sweep that is killed comes out as one that is not; and the comparison sees what is not so.

`make chaos` does the former for half an hour and more.
"""

import contextlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from safetensors.torch import load_file, save_file

from analysis import records
from orchestrator import ledger, tracking
from tests import same
from tests.chaos import kills, runs

pytestmark = pytest.mark.usefixtures("one_core")
GRID: dict[str, Any] = {
    **runs.PRETRAIN,
    "model": {"size": "nano-8"},
    "seed": 0,
}


@pytest.fixture(scope="module")
def home(cache: Path) -> Iterator[runs.Home]:
    with tempfile.TemporaryDirectory(prefix="lmsat-", dir="/tmp") as folder:
        yield runs.Home(Path(folder), cache)


@pytest.fixture(scope="module")
def whole(home: runs.Home) -> kills.Subject:
    return kills.untouched(home, "tiny", home.grid("tiny", GRID))


def test_nothing_is_lost_or_doubled_whatever_is_killed(
    home: runs.Home, whole: kills.Subject
) -> None:
    attack = kills.Attack(home, whole, "fast")
    strikes = [("cluster", "birth"), ("driver", "checkpoint")]
    attack.go(strikes)
    assert attack.wrong == []
    assert attack.struck == dict.fromkeys(strikes, 1)


@pytest.fixture
def copy(whole: kills.Subject, tmp_path: Path) -> Path:
    """The sweep's directory, with a store of its own."""
    shutil.copytree(whole.out, tmp_path / "runs")
    with contextlib.closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db")) as store, store:
        store.execute(
            "update runs set artifact_uri = replace(artifact_uri, ?, ?)",
            (str(whole.out), str(tmp_path / "runs")),
        )
    return tmp_path / "runs" / "chaos"


def test_times_are_no_difference(whole: kills.Subject, copy: Path) -> None:
    for file in records.files(copy, "scalars"):
        frame = pl.read_parquet(file)
        slower = pl.when(pl.col("metric") == "probe_seconds").then(9.0).otherwise("value")
        frame.with_columns(time=pl.col("time") + 1, value=slower).write_parquet(file)
    assert same.differences(copy, whole.out / "chaos") == []


def test_every_difference_is_seen(whole: kills.Subject, copy: Path) -> None:
    trial, other = sorted(ledger.read(copy))
    whole_facts = {name for name, _ in same.facts(copy, same.kept(copy))}
    expected = {
        *_in_the_ledger(copy, trial),
        *_in_the_weights(copy, trial),
        *_in_the_checkpoint(copy, trial),
        *_in_the_records(copy, trial),
        *_in_mlflow(copy, trial, other),
    }
    for step in (copy / "trials" / other / "checkpoints").iterdir():
        expected |= {f for f in whole_facts if f.startswith(f"trials/{other}/checkpoints")}
        shutil.rmtree(step)
    found = {line.partition(": ")[0] for line in same.differences(copy, whole.out / "chaos")}
    assert found == expected


def _in_the_ledger(sweep: Path, trial: str) -> set[str]:
    (sweep / "trials" / trial / "outcome.json").unlink()
    ledger.write(sweep, {**ledger.entry(sweep, trial), "status": "failed"})
    return {f"ledger {trial}"}


def _in_the_weights(sweep: Path, trial: str) -> set[str]:
    """One bit."""
    name = f"trials/{trial}/model/model.safetensors"
    weights = load_file(sweep / name)
    one = min(weights)
    weights[one].view(-1).view(torch.int32)[0] ^= 1
    save_file(weights, sweep / name)
    return {f"{name} {one}"}


def _in_the_checkpoint(sweep: Path, trial: str) -> set[str]:
    """In the last one: a bit of a moment, a generator, the batch to come."""
    last = max((sweep / "trials" / trial / "checkpoints").glob("step-*"))
    where = last.relative_to(sweep)
    (file,) = (last / "engine").glob("*.pt")
    held = torch.load(file, weights_only=False)
    held["optimizer"]["state"][3]["exp_avg_sq"].view(-1).view(torch.int32)[0] ^= 1
    torch.save(held, file)
    changed = {f"{where}/engine/{file.name} optimizer state 3 exp_avg_sq"}
    for name, key, value in (("generators-0", "cpu", "AAAA"), ("state", "ahead", 1.0)):
        kept = last / f"{name}.json"
        kept.write_text(json.dumps({**json.loads(kept.read_text()), key: value}))
        changed.add(f"{where}/{name}.json {key}")
    return changed


def _in_the_records(sweep: Path, trial: str) -> set[str]:
    """A value, a row less, a row more."""
    file = records.files(sweep, "blocks", trial)[0]
    frame = pl.read_parquet(file)
    first, last = (", ".join(map(str, frame.row(i)[:-1])) for i in (0, -1))
    loss = pl.when(pl.int_range(pl.len()) == 0).then(1.0).otherwise("loss")
    frame[:-1].with_columns(loss=loss).write_parquet(file)
    more = {"trial": trial, "step": 7, "matrix": "head", "index": 0, "sigma": 1.0}
    records.write(sweep, "spectra", trial, 7, [more])
    return {
        f"records/blocks {first}",
        f"records/blocks {last}",
        f"records/spectra {trial}, 7, head, 0",
    }


def _in_mlflow(sweep: Path, trial: str, other: str) -> set[str]:
    """A metric twice, one otherwise, a tag, a status, a file that is gone, a second run and
    model."""
    client = MlflowClient(tracking.default_uri(sweep.parent))
    experiment = client.get_experiment_by_name("chaos").experiment_id
    runs = {r.data.tags.get("lmsat.trial"): r for r in client.search_runs([experiment])}
    id, parent = runs[trial].info.run_id, runs[None].info.run_id
    again = client.get_metric_history(id, "train/loss")[5]
    client.log_metric(id, again.key, again.value, again.timestamp + 1, again.step)
    client.log_metric(id, "train/loss", 1.0, step=10**6)
    client.set_tag(id, "lmsat.head", "other")
    client.set_terminated(id, "KILLED")
    (sweep.parent / "mlartifacts" / parent / "artifacts" / "loss_vs_rank.png").unlink()
    double = client.create_run(experiment, tags={"lmsat.trial": other}, run_name="double")
    client.log_param(double.info.run_id, "kind", "pretrain")
    model = client.create_logged_model(experiment, "double", tags={"lmsat.trial": other})
    client.log_outputs(runs[other].info.run_id, [LoggedModelOutput(model.model_id, 7)])
    return {
        f"MLflow {trial} metric train/loss {again.step}",
        f"MLflow {trial} metric train/loss 1000000",
        f"MLflow {trial} tag lmsat.head",
        f"MLflow {trial}",
        "MLflow sweep artifact loss_vs_rank.png",
        f"MLflow {other}",
        f"MLflow {other} tag lmsat.trial",
        f"MLflow {other} param kind",
        f"MLflow {other} model",
        f"MLflow model {other}",
    }
