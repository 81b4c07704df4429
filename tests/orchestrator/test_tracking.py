"""MLflow as a view: a real sqlite store."""

import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from analysis import records
from analysis.errors import BadInput
from orchestrator import ledger, tracking
from orchestrator.tracking import Store


def row(step: int, value: float, metric: str = "loss", **fields: Any) -> dict[str, Any]:
    plain = {"split": "held_out", "layer": None, "time": 1_700_000_000_000 + step}
    return {"step": step, "value": value, "metric": metric, **plain, **fields}


TRIAL = {"id": "t1", "name": "nano-8 r=2 s=0", "model": {"size": "nano-8"}, "head": {"rank": 2}}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tracking.default_uri(tmp_path_factory.mktemp("store"))


@pytest.fixture
def sweep(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Its name is its experiment's: each test has its own."""
    return tmp_path / request.node.name


def entry(sweep: Path, status: str = "running", **tags: Any) -> dict[str, Any]:
    tags = {"rank": 2, "epochs": None, **tags}
    return ledger.write(sweep, {"id": "t1", "trial": TRIAL, "status": status, "tags": tags})


def record(sweep: Path, rows: list[dict[str, Any]]) -> None:
    for one in rows:
        full = {"trial": "t1", "tokens": 0, "stderr": None, **one}
        records.write(sweep, "scalars", "t1", one["step"], [full])


def children(store: Store) -> list[Any]:
    runs = store.client.search_runs([store.experiment])
    return [run for run in runs if "mlflow.parentRunId" in run.data.tags]


def history(store: Store, key: str = "held_out/loss") -> list[tuple[int, float, int]]:
    (run,) = children(store)
    found = store.client.get_metric_history(run.info.run_id, key)
    return [(m.step, m.value, m.timestamp) for m in found]


def test_a_driver_that_comes_back_doubles_nothing(uri: str, sweep: Path) -> None:
    first = Store(uri, sweep)
    record(sweep, [row(1, 5.0), row(2, 4.0)])
    first.bring_up(entry(sweep), None)
    # The same step measured anew has another time; it is there already.
    record(sweep, [{**row(2, 4.0), "time": 1_800_000_000_000}, row(3, 3.5)])
    again = Store(uri, sweep)
    again.bring_up(entry(sweep), [row(3, 3.5)])
    again.bring_up(entry(sweep), [row(4, 3.0)])
    assert (again.parent, again.experiment) == (first.parent, first.experiment)
    start = 1_700_000_000_000
    assert history(again) == [
        (1, 5.0, start + 1),
        (2, 4.0, start + 2),
        (3, 3.5, start + 3),
        (4, 3.0, start + 4),
    ]


def test_runs_are_named_nested_and_described(uri: str, sweep: Path) -> None:
    store = Store(uri, sweep, "a note", "grid1")
    store.bring_up(entry(sweep), [])
    (run,) = children(store)
    tags = {k: v for k, v in run.data.tags.items() if k.startswith("lmsat.")}
    assert tags.pop("lmsat.key").endswith("/t1")
    assert tags == {
        "lmsat.trial": "t1",
        "lmsat.rank": "2",
        "lmsat.grid": "grid1",
        "lmsat.status": "running",
    }
    assert run.info.run_name == "nano-8 r=2 s=0"
    assert run.data.tags["mlflow.parentRunId"] == store.parent
    assert run.data.params == {
        "id": "t1",
        "name": TRIAL["name"],
        "model.size": "nano-8",
        "head.rank": "2",
    }


def test_two_sweeps_of_one_name_share_a_store_and_no_run(uri: str, tmp_path: Path) -> None:
    stores = [Store(uri, tmp_path / folder / "namesake") for folder in "ab"]
    for store in stores:
        store.bring_up(entry(store.sweep), [])
    assert stores[0].experiment == stores[1].experiment
    runs = {run.data.tags["mlflow.parentRunId"] for run in children(stores[0])}
    assert runs == {store.parent for store in stores} and len(runs) == 2


def test_a_store_is_made_whole_and_leaves_nothing_beside_it(uri: str) -> None:
    file = Path(uri.removeprefix("sqlite:///"))
    assert [one for one in file.parent.iterdir() if not one.is_dir()] == [file]


def test_two_stores_in_turn_keep_one_run_each(uri: str, sweep: Path) -> None:
    other, parents = f"sqlite:///{sweep.parent}/other.db", []
    for where in (uri, other, uri, other):
        store = Store(where, sweep)
        store.bring_up(entry(sweep), [])
        parents.append(store.parent)
        assert len(children(store)) == 1
    assert parents[:2] == parents[2:] and len(set(parents)) == 2


def test_of_two_runs_of_one_trial_the_one_that_was_written_to_stays(uri: str, sweep: Path) -> None:
    store = Store(uri, sweep)
    store.bring_up(entry(sweep), [row(1, 5.0)])
    (run,) = children(store)
    store.client.create_run(store.experiment, start_time=1, tags={**run.data.tags})
    twin = {k: v for k, v in run.data.tags.items() if k != "lmsat.status"}
    store.client.create_run(store.experiment, start_time=2, tags=twin)
    assert len(children(store)) == 3
    record(sweep, [row(1, 5.0)])
    Store(uri, sweep).bring_up(entry(sweep), None)
    assert [step for step, *_ in history(store)] == [1]


def test_another_edition_takes_the_place_of_the_run_before(uri: str, sweep: Path) -> None:
    """What was measured anew, and differs."""
    Store(uri, sweep).bring_up(entry(sweep), [row(1, 5.0)])
    store = Store(uri, sweep)
    record(sweep, [row(1, 4.0)])
    store.bring_up(entry(sweep, edition=1), None)
    assert [value for _, value, _ in history(store)] == [4.0]


def test_what_mlflow_would_misstore_is_left_out(uri: str, sweep: Path) -> None:
    store = Store(uri, sweep)
    store.bring_up(entry(sweep), None)
    store.bring_up(entry(sweep), [row(1, math.inf), row(2, math.nan), row(3, 1.0)])
    assert [step for step, *_ in history(store)] == [3]


def test_thousands_of_rows_arrive(uri: str, sweep: Path) -> None:
    store = Store(uri, sweep)
    store.bring_up(entry(sweep), None)
    store.bring_up(entry(sweep), [row(i, float(i)) for i in range(2500)])
    assert len(history(store)) == 2500


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


@pytest.mark.parametrize(
    "uri",
    [
        "http://someone:pass@host:5000",
        "https://token@host",
        "postgresql://mlflow:pa@ss@host/mlflow",
        "simplecache::s3://key:pass@bucket/path",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(BadInput, match="no user or password in a URL") as refusal:
        tracking.resolve(uri, Path("runs"))
    assert "pass" not in str(refusal.value).replace("password", "") and "token@" not in str(refusal)


@pytest.mark.parametrize(
    "url", ["http://host:5000/a@b", "postgresql://mlflow@host/mlflow", "s3://bucket/a:b@c"]
)
def test_a_url_without_a_password_is_none(url: str) -> None:
    tracking.check_secrets("--checkpoints", url)


def test_a_file_that_is_no_store_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, and long enough to be taken for one" * 9)
    with pytest.raises(tracking.NoAnswer, match="file is not a database"):
        Store(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "x")


def test_what_a_store_refuses_is_told_from_its_absence(uri: str, sweep: Path) -> None:
    store = Store(uri, sweep)
    store.bring_up(entry(sweep), None)
    store.client.delete_run(children(store)[0].info.run_id)
    with pytest.raises(Exception) as refusal:
        store.bring_up(entry(sweep), [row(1, 5.0)])
    assert tracking.refused(refusal.value)
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as store_itself:
        store_itself.execute("ALTER TABLE runs RENAME TO elsewhere")
        store.forget()
        with pytest.raises(Exception) as absence:
            store.bring_up(entry(sweep), [row(1, 5.0)])
        store_itself.execute("ALTER TABLE elsewhere RENAME TO runs")
    assert not tracking.refused(absence.value)
    assert tracking.why(absence.value) == "no such table: runs"
