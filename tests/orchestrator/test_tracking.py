"""MLflow as a view: a real sqlite store."""

import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator import tracking


def row(step: int, value: float, metric: str = "loss", **fields: Any) -> dict[str, Any]:
    plain = {"split": "held_out", "layer": None, "time": 1_700_000_000_000 + step}
    return {"step": step, "value": value, "metric": metric, **plain, **fields}


TRIAL = {"id": "t1", "name": "nano-8 r=2 s=0", "model": {"size": "nano-8"}, "head": {"rank": 2}}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking.default_uri(tmp_path_factory.mktemp("store"))


def history(tracker: tracking.Tracker, run: str, key: str) -> list[tuple[int, float, int]]:
    found = tracker.client.get_metric_history(run, key)
    return [(m.step, m.value, m.timestamp) for m in found]


def test_a_driver_that_comes_back_doubles_nothing(uri: str, tmp_path: Path) -> None:
    first = tracking.Tracker(uri, tmp_path, "twice")
    run = first.child(TRIAL, {"rank": 2, "epochs": None})
    first.log(run, [row(1, 5.0), row(2, 4.0)])
    again = tracking.Tracker(uri, tmp_path, "twice")
    assert (again.parent, again.experiment) == (first.parent, first.experiment)
    # The same step measured anew has another time; it is there already.
    again.log(run, [{**row(2, 4.0), "time": 1_800_000_000_000}, row(3, 3.5)])
    start = 1_700_000_000_000
    assert history(again, run, "held_out/loss") == [
        (1, 5.0, start + 1),
        (2, 4.0, start + 2),
        (3, 3.5, start + 3),
    ]


def test_runs_are_named_nested_and_described(uri: str, tmp_path: Path) -> None:
    tracker = tracking.Tracker(uri, tmp_path, "nested")
    tracker.describe("a note", "grid1")
    run = tracker.client.get_run(tracker.child(TRIAL, {"rank": 2, "epochs": None}))
    tags = {k: v for k, v in run.data.tags.items() if k.startswith("lmsat.")}
    assert tags == {"lmsat.trial": "t1", "lmsat.rank": "2", "lmsat.grid": "grid1"}
    assert tracker.children() == {"t1": run.info.run_id}
    assert run.info.run_name == "nano-8 r=2 s=0"
    assert run.data.tags["mlflow.parentRunId"] == tracker.parent
    assert run.data.params == {
        "id": "t1",
        "name": TRIAL["name"],
        "model.size": "nano-8",
        "head.rank": "2",
    }


def test_what_mlflow_would_misstore_is_left_out(uri: str, tmp_path: Path) -> None:
    tracker = tracking.Tracker(uri, tmp_path, "finite")
    run = tracker.child(TRIAL, {"rank": 2, "epochs": None})
    tracker.log(run, [row(1, math.inf), row(2, math.nan), row(3, 1.0)])
    assert [step for step, *_ in history(tracker, run, "held_out/loss")] == [3]


def test_thousands_of_rows_arrive(uri: str, tmp_path: Path) -> None:
    tracker = tracking.Tracker(uri, tmp_path, "many")
    run = tracker.child(TRIAL, {"rank": 2, "epochs": None})
    tracker.log(run, [row(i, float(i)) for i in range(2500)])
    assert len(history(tracker, run, "held_out/loss")) == 2500


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "held_out/loss"),
        ({"split": "", "metric": "singular_entropy"}, "model/singular_entropy"),
        ({"metric": "anisotropy", "layer": -1}, "held_out/anisotropy/layer_last"),
        ({"metric": "anisotropy", "layer": 3}, "held_out/anisotropy/layer_03"),
    ],
)
def test_metrics_have_speaking_names(fields: dict[str, Any], name: str) -> None:
    assert tracking.metric_name(row(1, 1.0, **fields)) == name


def test_a_relative_store_is_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.resolve("sqlite:///a/b.db", Path("runs")) == f"sqlite:///{tmp_path}/a/b.db"
    assert tracking.resolve(None, Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
