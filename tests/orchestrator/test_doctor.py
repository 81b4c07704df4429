"""What is wrong with a cluster is named, with what to do: made-up facts, then real Rays."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from analysis.errors import BadInput
from orchestrator import doctor, facts
from tests.orchestrator.test_sweep import command

GB = 1e9
HEALTHY: dict[str, Any] = {
    "versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "lmsat": "0.1.0"},
    "code": "0123abcd",
    "gpus": 8,
    "believed": 8.0,
    "storage": {"error": None, "read_back": True, "same": True},
    "free": {"/shared/runs": 900 * GB, "/tmp": 50 * GB},
    "shm": 64 * GB,
    "object_store": 50 * GB,
    "ahead": (-0.02, 0.01),
    "files": 65536,
    "world": ["Ray's GCS on port 6379"],
    "token": True,
}
# How a node is broken, the check that says so, what is found, and what to do.
BROKEN = {
    "another torch": (
        {"versions": {**HEALTHY["versions"], "torch": "2.12.0"}},
        ("versions", "torch 2.12.0, the driver has 2.13.0", "constraints.txt"),
    ),
    "another Python": (
        {"versions": {**HEALTHY["versions"], "python": "3.12.1"}},
        ("versions", "python 3.12.1, the driver has 3.11.7", "install"),
    ),
    "no lmsat": (
        {"versions": {**HEALTHY["versions"], "lmsat": None}, "code": None},
        ("versions", "lmsat missing", "install"),
    ),
    "other code of the same version": (
        {"code": "feedbeef"},
        ("versions", "other code of lmsat: feedbeef, the driver has 0123abcd", "install"),
    ),
    "a GPU fell off the bus": ({"gpus": 7}, ("GPUs", "sees 7, Ray believes in 8", "nvidia-smi")),
    "torch that cannot be imported": (
        {"gpus": "torch: libcudart.so.12: cannot open"},
        ("GPUs", "libcudart", "torch"),
    ),
    "storage not mounted": (
        {"storage": {"error": "not there", "read_back": False, "same": False}},
        ("storage", "/shared/runs: not there", "mount"),
    ),
    "storage that swallows writes": (
        {"storage": {"error": None, "read_back": False, "same": True}},
        ("storage", "the driver does not see what this node writes", "mount"),
    ),
    "storage with another content": (
        {"storage": {"error": None, "read_back": True, "same": False}},
        ("storage", "something else", "mount"),
    ),
    "a full disk": (
        {"free": {"/shared/runs": 900 * GB, "/tmp": 4.9 * GB}},
        ("disk", "4.9 GB free in /tmp", "free 5 GB"),
    ),
    "a container's little /dev/shm": (
        {"shm": 0.064 * GB},
        ("shared memory", "0.1 GB, Ray's object store 50.0", "--shm-size=51g"),
    ),
    "a fast clock": ({"ahead": (2.5, 2.6)}, ("clock", "2.5 s or more ahead", "synchronise")),
    "a slow clock": ({"ahead": (-90.2, -90.0)}, ("clock", "90.0 s or more behind", "synchronise")),
    "few open files": ({"files": 1024}, ("open files", "at most 1024", "ulimit -n 65536")),
}
WARNED = {
    "a dashboard for all": (
        {"world": ["Ray's dashboard on port 8265"]},
        ("ports", "dashboard on port 8265", "127.0.0.1"),
    ),
    "a cluster without a token": ({"token": False}, ("ports", "GCS on port 6379", "RAY_AUTH_MODE")),
    "GPUs that Ray does not know": ({"believed": 6.0}, ("GPUs", "Ray believes in 6", "--num-gpus")),
}


def judged(wanted: float = 1, **broken: Any) -> list[doctor.Finding]:
    """Of two nodes, one of them with something changed."""
    nodes = {"sound": copy.deepcopy(HEALTHY), "node-1": {**copy.deepcopy(HEALTHY), **broken}}
    return doctor.judge(HEALTHY, nodes, wanted, "/shared/runs")


def test_healthy_nodes_are_found_so_in_every_check() -> None:
    findings = judged(wanted=8)
    assert {one.level for one in findings} == {"ok"}
    checks = "versions GPUs storage disk shared memory clock open files ports"
    assert {one.check for one in findings if one.node == "node-1"} == {
        *checks.replace("shared memory", "").replace("open files", "").split(),
        "shared memory",
        "open files",
    }


@pytest.mark.parametrize("how", [*BROKEN, *WARNED])
def test_one_broken_node_is_named_with_what_to_do(how: str) -> None:
    broken, (check, found, todo) = {**BROKEN, **WARNED}[how]
    (bad,) = [one for one in judged(**broken) if one.level != "ok"]
    assert (bad.check, bad.node) == (check, "node-1")
    assert bad.level == ("wrong" if how in BROKEN else "warning")
    assert found in bad.found
    assert todo in bad.todo


def test_gpus_that_a_grid_wants_are_asked_of_one_node_and_not_of_all_together() -> None:
    (bad,) = [one for one in judged(wanted=9) if one.level != "ok"]
    assert (bad.check, bad.level) == ("GPUs", "wrong")
    assert "wants 9, the best node has 8" in bad.found
    without = {"head": {**HEALTHY, "gpus": 0, "believed": 0.0}}
    assert [f.level for f in doctor.graphics(without, 0)] == ["ok"]
    assert [f.level for f in doctor.graphics(without, 0.5)] == ["ok", "wrong"]


@given(
    skew=st.floats(-100, 100),
    going=st.floats(0, 10),
    coming=st.floats(0, 10),
)
def test_a_slow_answer_is_no_wrong_clock(skew: float, going: float, coming: float) -> None:
    read = going + skew  # the driver sends at 0 and receives at going + coming
    nodes = {"node-1": {**HEALTHY, "ahead": (read - going - coming, read)}}
    (finding,) = doctor.clocks(nodes)
    if abs(skew) <= doctor.SKEW:
        assert finding.level == "ok"
    if abs(skew) > doctor.SKEW + going + coming + 1e-9:
        assert finding.level == "wrong"
        assert ("ahead of" in finding.found) == (skew > 0)


SERVE = """\
import socket, sys, time
with socket.socket() as s:
    s.bind((sys.argv[1], 0)); s.listen(); print(s.getsockname()[1], flush=True); time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ports are read in /proc")
def test_a_server_open_to_the_world_is_told_from_one_on_loopback() -> None:
    found, open_to = {}, ("0.0.0.0", "127.0.0.1")
    for address in open_to:
        code = [sys.executable, "-c", SERVE, address, "mlflow"]
        with subprocess.Popen(code, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            port = int(server.stdout.readline())
            found[address] = f"MLflow on port {port}" in facts._world()
            server.kill()
    assert found == {"0.0.0.0": True, "127.0.0.1": False}


def test_mlflow_is_asked_and_nothing_stays_there(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    (finding,) = doctor._store(None, tmp_path, tmp_path / "token")
    assert (finding.level, "can be written to" in finding.found) == ("ok", True)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert "lmsat-doctor" not in [one.name for one in client.search_experiments()]

    damaged = tmp_path / "damaged.db"
    damaged.write_text("no database" * 1000)
    (finding,) = doctor._store(f"sqlite:///{damaged}", tmp_path, tmp_path / "other")
    assert finding.level == "wrong"

    (finding,) = doctor._store(f"http://127.0.0.1:{free_port()}", tmp_path, tmp_path / "token")
    assert finding.level == "wrong"
    assert "no MLflow server answers" in finding.found
    with pytest.raises(BadInput, match="no URI"):
        doctor._store("mlruns", tmp_path, tmp_path / "token")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_this_machine_is_examined_and_left_as_it_was(tmp_path: Path) -> None:
    done = command("doctor", "--json", "--out", "deep/runs", cwd=tmp_path)
    findings = json.loads(done.stdout)
    wrong = [one for one in findings if one["level"] == "wrong"]
    assert (done.returncode, done.stderr.count("to mend")) == ((1, 1) if wrong else (0, 0))
    assert {one["check"] for one in wrong} <= {"disk", "shared memory", "open files"}  # its own
    (disk,) = [one for one in findings if one["check"] == "disk" and "deep" in one["found"]]
    free = float(disk["found"].split(" GB")[0])
    assert free == pytest.approx(psutil.disk_usage(str(tmp_path)).free / 1e9, rel=0.2)
    assert not list(tmp_path.iterdir())


# Of a cluster of two nodes on this machine.

TOKEN = "ab" * 32


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of the driver and the head; the other node has a folder of that name of its own."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    quick = {"RAY_NUM_REDIS_GET_RETRIES": "1", "RAY_worker_niceness": "0"}
    return {**os.environ, **quick, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@pytest.fixture(scope="module")
def hiding(shared: Path) -> list[str]:
    """What hides the storage from a command, where that is allowed."""
    hide = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(shared)]
    if not shutil.which("unshare") or subprocess.run([*hide, "true"]).returncode:
        return []
    return hide


@pytest.fixture(scope="module")
def address(shared: Path, environment: dict[str, str], hiding: list[str]) -> Iterator[str]:
    """A head that is well, and a node with another lmsat, GPUs that are not there, few open files
    and, where it can be made so, other storage."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as name:  # sockets: a short path
        folder = Path(name)
        other = folder / "path" / "lmsat-9.9.9.dist-info"
        other.mkdir(parents=True)
        (other / "METADATA").write_text("Metadata-Version: 2.1\nName: lmsat\nVersion: 9.9.9\n")
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1"]
        ray += ["--disable-usage-stats", f"--temp-dir={folder}/"]
        head = [*ray, "--head", f"--port={port}", "--node-name=head"]
        head += ["--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
        broken = [*ray, f"--address=127.0.0.1:{port}", "--node-name=broken", "--num-gpus=2"]
        few = ["sh", "-c", 'ulimit -n 1024 && exec "$0" "$@"']
        shim = {**environment, "PYTHONPATH": str(folder / "path"), "CUDA_VISIBLE_DEVICES": "90,91"}
        started: list[subprocess.Popen[bytes]] = []
        try:
            for i, (line, env) in enumerate(
                ((head, environment), ([*hiding, *few, *broken], shim))
            ):
                log = folder / f"{i}.log"
                with log.open("wb") as to:
                    started.append(subprocess.Popen(line, env=env, stdout=to, stderr=to))
                until = time.monotonic() + 30
                while "Ray runtime started" not in log.read_text():
                    assert time.monotonic() < until, log.read_text()
                    time.sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            own = [p for one in started for p in (psutil.Process(one.pid), *children(one.pid))]
            for process in own:
                process.kill()
            for one in started:
                one.wait()


def children(pid: int) -> list[psutil.Process]:
    return list(psutil.Process(pid).children(recursive=True))


def test_a_broken_node_of_a_real_cluster_is_told_from_a_sound_one(
    address: str, shared: Path, environment: dict[str, str], hiding: list[str]
) -> None:
    asked = ("doctor", "--json", "--address", address, "--out", str(shared))
    done = command(*asked, env=environment)
    assert done.returncode == 1, done.stderr
    found = [f for f in json.loads(done.stdout) if f["node"] != "driver"]
    assert {f["node"] for f in found} == {"head", "broken"}
    wrong = {(f["node"], f["check"]): f["found"] for f in found if f["level"] == "wrong"}
    machine = {"disk", "shared memory", "open files"}  # may be so on this machine
    assert {check for node, check in wrong if node == "head"} <= machine
    assert wrong["broken", "versions"] == "lmsat 9.9.9, the driver has 0.1.0"
    assert wrong["broken", "GPUs"] == "torch sees 0, Ray believes in 2"
    assert wrong["broken", "open files"] == "at most 1024"
    if hiding:
        assert "another folder" in wrong["broken", "storage"]
    assert ("head", "storage") not in wrong
    assert not list(shared.iterdir())


def test_a_refused_token_is_one_clear_line(address: str, environment: dict[str, str]) -> None:
    other = {**environment, "RAY_AUTH_TOKEN": "cd" * 32, "RAY_ADDRESS": address}
    done = command("doctor", env=other, cwd=tempfile.gettempdir())
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert "RAY_AUTH_TOKEN" in line


def test_no_cluster_at_an_address_is_found_at_once_and_no_address_is_bad_input(
    tmp_path: Path,
) -> None:
    (finding, *_) = doctor.run(f"127.0.0.1:{free_port()}", tmp_path, None, 0, None)
    assert (finding.check, finding.level) == ("cluster", "wrong")
    assert "refused" in finding.found
    with pytest.raises(BadInput, match="HOST:PORT"):
        doctor.run("tomorrow", tmp_path, None, 0, None)
    assert not list(tmp_path.iterdir())
