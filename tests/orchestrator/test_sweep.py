"""Whole sweeps through the command line: real Ray, DeepSpeed, MLflow, text."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
import yaml
from click.testing import CliRunner, Result
from mlflow import MlflowClient

from analysis import records, tables
from orchestrator import cluster, lease, ledger, place, progress, tracking
from orchestrator.cli import main
from tests import schemas
from tests.conftest import TIMING, TINY
from tests.forked import SCRIPT, Forked, lmsat
from tests.mlserver import free_port
from trainables import pretrain


def command(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    # The installed script, as a user has it: `python -m` would put the directory on the path.
    return subprocess.run([str(SCRIPT), *args], capture_output=True, text=True, **options)


def here(folder: Path, *args: str) -> Result:
    """The same in this process, which has loaded everything: for what starts no workers."""
    with chdir(folder):
        return CliRunner().invoke(main, args)


def write_grid(folder: Path, **fields: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(TINY), **fields}, sort_keys=False))
    return path


def measured(sweep: Path) -> dict[str, pl.DataFrame]:
    """All records of a sweep but times."""
    tables = ("scalars", "blocks", "spectra", "trials")
    found = {t: records.scan(sweep, t).sort(records.KEYS[t]).collect() for t in tables}
    found["scalars"] = found["scalars"].filter(~pl.col("metric").is_in(TIMING)).drop("time")
    return found


def assert_same(sweep: Path, uninterrupted: Path) -> None:
    """Of all the trials that the second one has."""
    found, wanted = measured(sweep), measured(uninterrupted)
    trials = wanted["trials"]["trial"].implode()
    for table, frame in wanted.items():
        assert frame.height
        assert frame.equals(found[table].filter(pl.col("trial").is_in(trials))), table


SECRETS = {name: f"{name} tells nobody" for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN")}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A finished sweep of four trials, started beside a user's own folder named `analysis`."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "analysis").mkdir()
    (folder / "analysis" / "__init__.py").write_text("raise ImportError('the user's own')\n")
    write_grid(folder)
    done = command("sweep", "--grid", "tiny.yaml", cwd=folder, env={**os.environ, **SECRETS})
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def test_every_trial_is_done_and_recorded(swept: Path) -> None:
    found = measured(swept / "runs" / "tiny")
    assert found["trials"]["status"].to_list() == ["done"] * 4
    assert found["trials"]["step"].to_list() == [48] * 4
    for metric, rows in {"gradient_norm": 48, "loss": 48 + 2 * 4, "stable_rank": 4}.items():
        each = found["scalars"].filter(pl.col("metric") == metric).group_by("trial").len()
        assert each["len"].to_list() == [rows] * 4
    assert found["spectra"].height == 3 * 4 * 2 * (8 + 16)  # matrices, steps, heads, sizes
    assert {e["status"] for e in ledger.read(swept / "runs" / "tiny").values()} == {"done"}


def test_no_file_and_no_line_tells_a_secret_of_the_environment(swept: Path) -> None:
    written = [file.read_bytes() for file in swept.rglob("*") if file.is_file()]
    assert len(written) > 40
    assert not any(b"tells nobody" in content for content in written)


def test_the_user_sees_the_table_and_what_is_next(swept: Path) -> None:
    shown, said = (swept / "stdout").read_text(), (swept / "stderr").read_text()
    losses = tables.final_losses(swept / "runs" / "tiny")
    for row in losses.iter_rows(named=True):
        assert f"{row['loss']:.3f}±{row['stderr']:.3f}".replace("±0.", "±.") in shown
    assert max(map(len, shown.splitlines()[:4])) <= 80
    for words in ("unigram cross-entropy", "report/report.html", "records", "MLflow", "lmsat ui"):
        assert words in shown
    assert "4 done · 0 running · 0 waiting" in said and "\x1b" not in shown + said
    assert "Traceback" not in said and "Warning" not in said


def test_mlflow_shows_what_the_records_hold(swept: Path) -> None:
    sweep = swept / "runs" / "tiny"
    client = MlflowClient(tracking.default_uri(swept / "runs"))
    (experiment,) = (e for e in client.search_experiments() if e.name == "tiny")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (r for r in runs if "mlflow.parentRunId" not in r.data.tags)
    children = [r for r in runs if r is not parent]
    assert len(children) == 4 and {r.info.status for r in runs} == {"FINISHED"}
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    kept = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert kept == {file.name for file in (sweep / "report").iterdir()} | {"grid.yaml"}
    assert {"report.html", "loss_vs_rank.png", "spectrum_heatmap.csv"} <= kept
    assert "lmsat sweep --grid" in parent.data.tags["mlflow.note.content"]
    scalars = records.scan(sweep, "scalars").collect()
    for run in children:
        tags, own = run.data.tags, scalars.filter(pl.col("trial") == run.data.tags["lmsat.trial"])
        wanted = ("head", "d", "params", "tokens_per_param", "epochs")
        assert {f"lmsat.{tag}" for tag in wanted} <= set(tags)
        assert tags["lmsat.status"] == "done"
        assert (tags["lmsat.head"] == "full") == ("lmsat.rank" not in tags)
        stored = [
            (m.key, m.step, m.value, m.timestamp)
            for key in run.data.metrics
            for m in client.get_metric_history(run.info.run_id, key)
        ]
        recorded = [
            (tracking.metric_name(r), r["step"], r["value"], r["time"])
            for r in own.iter_rows(named=True)
        ]
        assert sorted(stored) == sorted(recorded)
        (spectra,) = client.list_artifacts(run.info.run_id, "spectra")
        assert spectra.path.endswith(f"{tags['lmsat.trial']}.parquet")


def test_the_same_grid_again_trains_nothing(swept: Path) -> None:
    sweep = swept / "runs" / "tiny"
    before = {p: p.stat().st_mtime_ns for p in (sweep / "records").rglob("*.parquet")}
    client = MlflowClient(tracking.default_uri(swept / "runs"))
    experiment = client.get_experiment_by_name("tiny").experiment_id
    runs = {r.info.run_id for r in client.search_runs([experiment])}
    # Other hardware, another place for the grid: the same trials.
    again = write_grid(swept, deepspeed={"micro_batch": 4}, checkpoints=9)
    done = lmsat("sweep", "--grid", again, "--json", cwd=swept)
    assert done.returncode == 0 and "4 of 4 trials are finished already" in done.stderr
    assert "starting Ray" not in done.stderr
    assert {r["loss"] for r in schemas.check("sweep", done.stdout)["trials"]} == set(
        tables.final_losses(sweep)["loss"]
    )
    assert before == {p: p.stat().st_mtime_ns for p in (sweep / "records").rglob("*.parquet")}
    assert runs == {r.info.run_id for r in client.search_runs([experiment])}
    write_grid(swept)
    # And by the grid that the sweep itself keeps.
    kept = here(swept.parent, "sweep", "--grid", str(sweep / "grid.yaml"), "--out", f"{swept}/runs")
    assert kept.exit_code == 0 and "4 of 4 trials are finished already" in kept.stderr


def test_a_changed_grid_under_an_old_name_is_refused(swept: Path) -> None:
    before = (swept / "runs" / "tiny" / "plan.json").read_text()
    changed = swept / "changed.yaml"
    changed.write_text(TINY.replace("24_576", "32_768"))
    done = here(swept, "sweep", "--grid", str(changed))
    assert done.exit_code == 2 and done.stdout == ""
    assert "train.tokens was 24576, is 32768" in done.stderr.splitlines()[-1]
    assert (swept / "runs" / "tiny" / "plan.json").read_text() == before


def test_a_second_driver_is_refused(swept: Path) -> None:
    with lease.hold(swept / "runs" / "tiny"):
        done = lmsat("sweep", "--grid", "tiny.yaml", cwd=swept)
    assert done.returncode == 2 and "another `lmsat` is at work" in done.stderr


def test_status_shows_every_trial(swept: Path) -> None:
    shown = json.loads(lmsat("status", "tiny", "--json", cwd=swept).stdout)["trials"]
    assert [t["trial"] for t in shown] == [
        "nano-8 r=2 s=0",
        "nano-8 r=full s=0",
        "nano-16 r=2 s=0",
        "nano-16 r=full s=0",
    ]
    assert {(t["status"], t["step"], t["steps"]) for t in shown} == {("done", 48, 48)}
    table = here(swept, "status", "runs/tiny").stdout
    assert all(f"{t['loss']:.3f}" in table and t["id"] in table for t in shown)


def test_plan_and_dry_run_agree_and_write_nothing(swept: Path, tmp_path: Path) -> None:
    grid = write_grid(tmp_path)
    plan = json.loads(command("plan", "--grid", str(grid), "--json").stdout)
    dry = here(tmp_path, "sweep", "--grid", str(grid), "--dry-run", "--json")
    kept = json.loads((swept / "runs" / "tiny" / "plan.json").read_text())
    ids = [[t["id"] for t in p["trials"]] for p in (plan, json.loads(dry.stdout), kept)]
    assert ids[0] == ids[1] == ids[2]
    assert not (tmp_path / "runs").exists()
    shown = here(tmp_path, "plan", "--grid", str(grid)).stdout
    assert all(t["id"] in shown and t["name"] in shown for t in plan["trials"])
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80


@contextmanager
def serving(args: list[str], port: int, **options: Any) -> Iterator[str]:
    """A server of ours or MLflow's until the block ends; its address."""
    with subprocess.Popen(args, start_new_session=True, **options) as server:
        try:
            for _ in range(240):
                assert server.poll() is None, "the server ended"
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def running(folder: Path, *more: str, env: dict[str, str] | None = None) -> Forked:
    """A sweep of long trials, at work; on an MLflow server if one is named."""
    said = folder / "said"
    return Forked("sweep", "--grid", "tiny.yaml", *more, cwd=folder, out=said, err=said, env=env)


def wait_for(what: Any, seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def workers(driver: Forked) -> list[psutil.Process]:
    """Ray workers that run a trial now."""
    family = psutil.Process(driver.pid).children(recursive=True)
    return [p for p in family if re.match(r"ray::.*\.train", " ".join(p.cmdline()))]


def checkpoints(sweep: Path) -> set[Path]:
    return set((sweep / "trials").glob("*/checkpoints/step-*"))


def saved(sweep: Path) -> int:
    return len(checkpoints(sweep))


LONG = {"train": {"tokens": 98_304, "batch": 8, "sequence": 64}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The long grid's records, trained trial by trial without Ray."""
    from orchestrator import grid

    folder = tmp_path_factory.mktemp("whole")
    for trial in grid.load(write_grid(folder, **LONG)).trials:
        pretrain.train(trial, folder, cache)
    return folder


def test_ctrl_c_saves_and_the_same_command_goes_on(
    tmp_path: Path, cache: Path, uninterrupted: Path
) -> None:
    """With the runs on an MLflow server."""
    write_grid(tmp_path, **LONG)
    port, sweep = free_port(), tmp_path / "runs" / "tiny"
    store = f"sqlite:///{tmp_path}/server.db"
    server = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    server += ["--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1"]
    server += ["--port", str(port)]
    # Its runners of jobs, unused here, are eight processes that take half a minute to start.
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with serving(server, port, cwd=tmp_path, env=env) as address:
        with running(tmp_path, "--tracking-uri", address) as driver:
            wait_for(lambda: saved(sweep) >= 1)
            driver.send_signal(signal.SIGINT)
            said = driver.communicate(timeout=120)[0]
        assert driver.returncode == 130
        assert "running trials are being saved" in said and "the same command goes on" in said
        assert "Traceback" not in said
        statuses = [e["status"] for e in ledger.read(sweep).values()]
        assert "stopped" in statuses and "running" not in statuses and "failed" not in statuses
        client = MlflowClient(address)
        experiment = client.get_experiment_by_name("tiny").experiment_id
        before = {r.info.run_id for r in client.search_runs([experiment])}
        again = lmsat("sweep", "--grid", "tiny.yaml", "--tracking-uri", address, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert_same(sweep, uninterrupted)
        runs = client.search_runs([experiment])
        assert len(runs) == 5 and before <= {r.info.run_id for r in runs}
        assert {r.info.status for r in runs} == {"FINISHED"}
        for run in runs:
            for key in run.data.metrics:
                steps = [m.step for m in client.get_metric_history(run.info.run_id, key)]
                assert len(steps) == len(set(steps)), (run.info.run_name, key)


def test_a_killed_workers_trial_is_resumed_and_its_slot_comes_back(
    tmp_path: Path, cache: Path, uninterrupted: Path
) -> None:
    write_grid(tmp_path, **LONG, seed=[0, 1])
    sweep = tmp_path / "runs" / "tiny"
    with running(tmp_path) as driver:
        victim = wait_for(lambda: saved(sweep) and workers(driver))[0]
        victim.kill()
        killed = time.time() * 1000
        said = driver.communicate(timeout=240)[0]
    assert driver.returncode == 0, said
    assert len(ledger.read(sweep)) == 8
    assert_same(sweep, uninterrupted)
    # Of the trials that began after the kill, two were at work at the same time.
    spans = (
        records.scan(sweep, "scalars")
        .group_by("trial")
        .agg(first=pl.col("time").min(), last=pl.col("time").max())
        .filter(pl.col("first") > killed)
        .sort("first")
        .collect()
    )
    assert spans.height >= 3
    assert (spans["last"].shift() > spans["first"]).any()


def test_one_trials_end_is_not_the_others(tmp_path: Path, cache: Path) -> None:
    """One diverges, one can never run; the others finish."""
    from orchestrator import grid

    path = write_grid(
        tmp_path,
        retries=1,
        trials=[
            {"model": {"size": "nano-8"}, "head": {"rank": 2}, "train": {"lr": 1e38, "clip": 0}},
            {"model": {"size": "nano-8"}, "head": {"rank": "full"}, "deepspeed": {"stage": 1}},
        ],
    )
    trials = {t["name"]: t for t in grid.load(path).trials}
    broken = trials["nano-8 r=full s=0 stage=1 lr=0.04"]
    sweep, calls = tmp_path / "runs" / "tiny", iter(range(20))
    stage0 = {**broken, "deepspeed": {**broken["deepspeed"], "stage": 0}}
    pretrain.train(stage0, sweep, cache, should_stop=lambda: next(calls, None) is None)
    done = lmsat("sweep", "--grid", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 1
    found = {e["trial"]["name"]: e for e in ledger.read(sweep).values()}
    statuses = {name: entry["status"] for name, entry in found.items()}
    assert statuses == {
        "nano-8 r=2 s=0 clip=0 lr=1e+38": "diverged",
        "nano-8 r=full s=0 stage=1 lr=0.04": "failed",
        "nano-16 r=2 s=0 lr=0.02": "done",
        "nano-16 r=full s=0 lr=0.02": "done",
    }
    assert "written with stage 0, cannot go on with stage 1" in found[broken["name"]]["error"]
    log = sweep / "trials" / broken["id"] / "errors.txt"
    assert log.read_text().count("\nRuntimeError: ") == 2  # once, and once more
    assert f"{broken['name']}: RuntimeError: " in done.stderr and str(log.name) in done.stderr
    assert "1 failed after their retries" in done.stderr and "Traceback" not in done.stderr
    assert "lr=1e+38 diverged" in done.stderr and "stage=1 lr=0.04 failed" in done.stderr
    table = records.scan(sweep, "trials").collect()
    assert dict(zip(table["name"], table["status"], strict=True)) == statuses
    client = MlflowClient(tracking.default_uri(tmp_path / "runs"))
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    ended = {r.info.run_name: r.info.status for r in runs}
    assert {n: ended[n] for n in statuses} == {
        n: "FINISHED" if s == "done" else "FAILED" for n, s in statuses.items()
    }


@pytest.mark.skipif(place.cores() < 2, reason="one core")
def test_as_many_items_are_worked_on_at_once_as_there_is_room_for(tmp_path: Path) -> None:
    def meet(folder: Path) -> None:
        (folder / str(os.getpid())).touch()
        until = time.monotonic() + 60
        while len(list(folder.iterdir())) < 2:
            assert time.monotonic() < until, "nobody else came"
            time.sleep(0.05)

    watcher = progress.Bar(quiet=True)
    found = cluster.fan_out(meet, lambda item: None, [tmp_path] * 2, 1, 0, watcher)
    assert sorted(found) == [(0, None), (1, None)]
