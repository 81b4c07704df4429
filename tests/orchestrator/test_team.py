"""Trials of several workers, and clusters that grow: real Rays of several nodes."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
import yaml

from orchestrator import grid, ledger, place
from tests import rays
from tests.forked import Forked, lmsat
from tests.mlserver import free_port
from tests.orchestrator.test_sweep import (
    checkpoints,
    here,
    measured,
    running,
    wait_for,
    workers,
    write_grid,
)
from trainables import pretrain

pytestmark = pytest.mark.skipif(place.cores() < 2, reason="one core")
SHORT = {
    "model": {"size": "nano-8"},
    "head": {"rank": "full"},
    "train": {"tokens": 24_576, "batch": 8, "sequence": 64},
    "probes": {"count": 3, "tokens": 1024, "final_tokens": 2048},
}
HEAD = '--resources={"head": 1}'


def alone(user: Path, cache: Path, **fields: Any) -> Path:
    """The same trials, each by one worker in this process."""
    folder = user / "whole"
    folder.mkdir()
    for trial in grid.load(write_grid(folder, **fields)).trials:
        trial = {**trial, "resources": {"workers": 1, "cpus": 1, "gpus": 0}}
        assert pretrain.train(trial, folder, cache).status == "done"
    return folder


def losses(sweep: Path) -> pl.DataFrame:
    return measured(sweep)["scalars"].filter(pl.col("metric") == "loss")


def assert_near(sweep: Path, wanted: Path) -> None:
    """Losses of all steps, trained on and held out, to 1e-4."""
    keys = ["trial", "step", "split", "metric"]
    found = losses(wanted).join(losses(sweep), on=keys, how="full", suffix="_found")
    assert found.height == losses(wanted).height > 40
    worst = (found["value_found"] / found["value"] - 1).abs()
    assert worst.null_count() == 0
    assert worst.max() < 1e-4


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """Of one core each: two workers of a core need both."""
    with rays.cluster(free_port(), ["--num-cpus=1", HEAD], ["--num-cpus=1"]) as address:
        yield address


def test_teams_over_two_nodes_compete_and_equal_one_worker(
    two_nodes: str, tmp_path: Path, cache: Path
) -> None:
    """Two teams of two, of ZeRO 2 and 3, and a trial of one worker, which needs half of either;
    their checkpoints at a URL."""
    both = {
        **SHORT,
        "trials": [
            {"deepspeed": {"stage": 2}, "resources": {"workers": 2}},
            {"model": {"size": "nano-16"}, "deepspeed": {"stage": 3}, "resources": {"workers": 2}},
            {"head": {"rank": 2}},
        ],
    }
    path = write_grid(tmp_path, **both)
    known = {**os.environ, **rays.TOKEN}
    sweep, kept = ["sweep", "--grid", "tiny.yaml"], tmp_path / "kept"
    to = ["--address", two_nodes, "--checkpoints", f"file://{kept}"]
    done = lmsat(*sweep, *to, cwd=tmp_path, env=known)
    assert done.returncode == 0, done.stderr
    assert "3 done" in done.stderr
    ids = {t["id"] for t in grid.load(path).trials}
    assert ids == set(ledger.read(tmp_path / "runs" / "tiny"))
    assert ids == {p.parents[1].name for p in kept.glob("*/step-*/manifest.json")}
    assert not checkpoints(tmp_path / "runs" / "tiny")
    moved = here(tmp_path, *sweep, "--checkpoints", str(tmp_path / "elsewhere"))
    assert moved.exit_code == 2
    assert f"are in file://{kept}; leave the option out" in moved.stderr
    for entry in both["trials"]:
        entry.pop("resources", None), entry.pop("deepspeed", None)
    assert_near(tmp_path / "runs" / "tiny", alone(tmp_path, cache, **both))
    assert {t["id"] for t in grid.load(tmp_path / "whole" / "tiny.yaml").trials} == ids


@pytest.mark.parametrize("nowhere", ["nosuch://bucket/x", "{out}/tiny.yaml/x"])
def test_checkpoints_that_cannot_be_written_are_refused_before_anything_is(
    nowhere: str, tmp_path: Path, cache: Path
) -> None:
    write_grid(tmp_path, **SHORT)
    to = nowhere.format(out=tmp_path)
    done = here(tmp_path, "sweep", "--grid", "tiny.yaml", "--checkpoints", to)
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: --checkpoints: cannot write to {to}: ")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


def members(driver: Forked) -> list[psutil.Process]:
    """The workers of a team that trains now."""
    family = psutil.Process(driver.pid).children(recursive=True)
    return [p for p in family if "RayTrainWorker" in " ".join(p.cmdline())]


def later(sweep: Path, than: Path) -> list[Path]:
    return [found for found in checkpoints(sweep) if found.name > than.name]


def test_a_team_loses_a_worker_and_who_waits_is_stopped_and_one_worker_goes_on(
    tmp_path: Path, cache: Path
) -> None:
    """Two workers of one node, which are free again after either death; ZeRO 2, whose shards one
    worker then takes up."""
    long = {**SHORT, "train": {"tokens": 98_304, "batch": 8, "sequence": 64}, "checkpoints": 16}
    sweep = tmp_path / "runs" / "tiny"
    write_grid(tmp_path, **long, deepspeed={"stage": 2}, resources={"workers": 2})
    with running(tmp_path) as driver:
        first = max(wait_for(lambda: checkpoints(sweep)))
        members(driver)[1].kill()
        second = max(wait_for(lambda: later(sweep, first)))
        (waiter,) = workers(driver)
        waiter.kill()
        third = max(wait_for(lambda: later(sweep, second)))
        driver.send_signal(signal.SIGINT)
        assert driver.wait(120) == 130
    (entry,) = ledger.read(sweep).values()
    assert entry["status"] == "stopped"
    stopped = max(checkpoints(sweep))
    assert stopped.name >= third.name > second.name > first.name
    write_grid(tmp_path, **long, deepspeed={"stage": 2})
    done = lmsat("sweep", "--grid", "tiny.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_near(sweep, alone(tmp_path, cache, **long))


@pytest.fixture
def growing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Ray's own autoscaler over its fake machines: a head that trains nothing, and at most two
    nodes of one core, which go after some idle seconds."""
    for name, value in {"HOME": str(tmp_path), **rays.TOKEN}.items():
        monkeypatch.setenv(name, value)
    port, head = free_port(), "f" * 51 + "00000"  # its id, by which the autoscaler knows it
    config: dict[str, Any] = {
        "cluster_name": "fake",
        "provider": {
            "type": "fake_multinode",
            "disable_node_updaters": True,
            "use_node_id_as_ip": True,
            "head_node_id": head,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0, "head": 1}, "max_workers": 0},
            "small": {"resources": {"CPU": 1}, "min_workers": 0, "max_workers": 2},
        },
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "file_mounts_sync_continuously": False,
    }
    for kind in config["available_node_types"].values():
        kind["node_config"] = {}
    config |= {key: {} for key in ("auth", "docker", "file_mounts")}
    steps = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray")
    config |= {f"{step}_commands": [] for step in (*steps, "worker_start_ray")}
    config |= {key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")}
    file = tmp_path / "ray_bootstrap_config.yaml"  # where `ray up` puts it
    file.write_text(yaml.safe_dump(config))
    arguments = ["--num-cpus=0", HEAD, f"--autoscaling-config={file}"]
    fake = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head,
        "RAY_enable_autoscaler_v2": "0",
    }
    with rays.cluster(port, arguments, **fake) as address:
        yield address


def nodes(address: str) -> int:
    """Of the cluster, the head included."""
    port = address.rpartition(":")[2]
    names = [p.info for p in psutil.process_iter(["name", "cmdline"]) if p.info["cmdline"]]
    raylets = [info for info in names if info["name"] == "raylet"]
    return sum(any(f":{port}" in part for part in info["cmdline"]) for info in raylets)


def test_a_cluster_grows_for_what_is_to_be_done_and_shrinks_again(
    growing: str, tmp_path: Path, cache: Path
) -> None:
    assert nodes(growing) == 1
    two = {**SHORT, "deepspeed": {"stage": 1}}
    write_grid(tmp_path, **two, resources={"workers": 2})
    sweep = ["sweep", "--grid", "tiny.yaml", "--address", growing]
    done = lmsat(*sweep, "--checkpoints", "kept", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "kept").glob("*/step-*/manifest.json"))
    assert_near(tmp_path / "runs" / "tiny", alone(tmp_path, cache, **SHORT))

    wait_for(lambda: nodes(growing) == 1)
    np.save(tmp_path / "head.npy", np.eye(8))
    done = lmsat("probe", "head.npy", cwd=tmp_path, env={**os.environ, "RAY_ADDRESS": growing})
    assert done.returncode == 0, done.stderr
    assert nodes(growing) == 2

    write_grid(tmp_path, name="never", **two, resources={"workers": 4})
    done = lmsat(*sweep, cwd=tmp_path)
    assert done.returncode == 2
    assert "a trial wants 4 with 1 cpus each, the cluster has room for 2 at most" in done.stderr
    assert not (tmp_path / "runs" / "never").exists()
