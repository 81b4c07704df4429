"""What is wrong with a cluster is named, with what to do: made-up facts, then real Rays."""

import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from analysis.errors import BadInput
from orchestrator import doctor, facts, place
from tests import rays, schemas
from tests.forked import lmsat
from tests.mlserver import free_port
from tests.orchestrator.test_sweep import command, write_grid

GB = 1e9
FOLDERS = {"storage": "/shared/runs", "cache": "/shared/cache"}
GOOD = {"error": None, "read_back": True, "same": True}
HEALTHY: dict[str, Any] = {
    "versions": {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "lmsat": "0.1.0"},
    "code": "0123abcd",
    "gpus": 8,
    "believed": 8.0,
    "shared": dict.fromkeys(FOLDERS, GOOD),
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
        {"shared": {"storage": {**GOOD, "error": "not there"}, "cache": GOOD}},
        ("storage", "/shared/runs: not there", "give another --out"),
    ),
    "storage that swallows writes": (
        {"shared": {"storage": {**GOOD, "read_back": False}, "cache": GOOD}},
        ("storage", "the driver does not see what this node writes", "mount"),
    ),
    "storage with another content": (
        {"shared": {"storage": {**GOOD, "same": False}, "cache": GOOD}},
        ("storage", "something else", "mount"),
    ),
    "a cache of its own": (
        {"shared": {"storage": GOOD, "cache": {**GOOD, "error": "another folder of that name"}}},
        ("cache", "/shared/cache: another folder", "set LMSAT_CACHE"),
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


def judged(**broken: Any) -> list[doctor.Finding]:
    """Of two nodes, one of them with something changed."""
    nodes = {"sound": copy.deepcopy(HEALTHY), "node-1": {**copy.deepcopy(HEALTHY), **broken}}
    return doctor.judge(HEALTHY, nodes, FOLDERS)


def test_healthy_nodes_are_found_so_in_every_check() -> None:
    findings = judged()
    assert {one.level for one in findings} == {"ok"}
    checks = {"versions", "GPUs", "storage", "cache", "disk", "clock", "ports"}
    checks |= {"shared memory", "open files"}
    assert {one.check for one in findings if one.node == "node-1"} == checks


@pytest.mark.parametrize("how", [*BROKEN, *WARNED])
def test_one_broken_node_is_named_with_what_to_do(how: str) -> None:
    broken, (check, found, todo) = {**BROKEN, **WARNED}[how]
    (bad,) = [one for one in judged(**broken) if one.level != "ok"]
    assert (bad.check, bad.node) == (check, "node-1")
    assert bad.level == ("wrong" if how in BROKEN else "warning")
    assert found in bad.found
    assert todo in bad.todo


@pytest.mark.parametrize(
    ("workers", "gpus", "level", "found"),
    [
        (1, 9, "wrong", "wants 9, the cluster has 8 on one machine"),
        (1, 0.5, "ok", "trials of 1 x (4 cpus, 0.5 gpus): room for 16"),
        (2, 4, "ok", "room for 1 at once"),
        (3, 4, "warning", "3 x (4 cpus, 4 gpus): no room yet, for 2 once"),
        (7, 4, "wrong", "room for 6 at most"),
    ],
)
def test_trials_that_never_fit_are_wrong_and_those_that_will_a_warning(
    workers: int, gpus: float, level: str, found: str
) -> None:
    """Of three machines of 8 GPUs, one of them there, and a small head."""
    head, large = place.Node(2, 0, None, None, 1, 1), place.Node(64, 8, None, None, 1, 3)
    wanted = {"resources": {"workers": workers, "cpus": 4, "gpus": gpus}}
    (finding,) = doctor.room(place.Place("the cluster", (head, large)), [wanted] * 2)
    assert (finding.check, finding.level) == ("grid", level)
    assert found in finding.found
    assert bool(finding.todo) == (level != "ok")


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


def test_this_machine_is_examined_and_left_as_it_was(tmp_path: Path) -> None:
    env = {**os.environ, "LMSAT_CACHE": "deep/runs/cache"}
    done = lmsat("doctor", "--json", "--out", "deep/runs", cwd=tmp_path, env=env)
    findings = schemas.check("doctor", done.stdout)
    wrong = [one for one in findings if one["level"] == "wrong"]
    assert (done.returncode, done.stderr.count("to mend")) == ((1, 1) if wrong else (0, 0))
    assert {one["check"] for one in wrong} <= {"disk", "shared memory", "open files"}  # its own
    (disk,) = [one for one in findings if one["check"] == "disk" and "cache" in one["found"]]
    free = float(disk["found"].split(" GB")[0])
    assert free == pytest.approx(psutil.disk_usage(str(tmp_path)).free / 1e9, rel=0.2)
    assert not list(tmp_path.iterdir())


# Of a cluster of two nodes on this machine.


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of the driver and the head; the other node has a folder of that name of its own."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def environment(shared: Path) -> dict[str, str]:
    """The driver's. Its cache is not there yet."""
    cache = str(shared / "cache" / "lmsat")
    return {**os.environ, **rays.TOKEN, "RAY_NUM_REDIS_GET_RETRIES": "1", "LMSAT_CACHE": cache}


@pytest.fixture(scope="module")
def hiding(shared: Path) -> list[str]:
    """What hides the storage from a command, where that is allowed."""
    hide = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(shared)]
    if not shutil.which("unshare") or subprocess.run([*hide, "true"]).returncode:
        return []
    return hide


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, hiding: list[str]) -> Iterator[str]:
    """A head that is well, and a node with another lmsat, GPUs that are not there, few open files
    and, where it can be made so, other storage."""
    path = tmp_path_factory.mktemp("path")
    other = path / "lmsat-9.9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: lmsat\nVersion: 9.9.9\n")
    head = ["--num-cpus=1", "--node-name=head", f"--ray-client-server-port={free_port()}"]
    broken = ["--num-cpus=1", "--node-name=broken", "--num-gpus=2"]
    few = ["sh", "-c", 'ulimit -n 1024 && exec "$0" "$@"']
    shim = ["env", f"PYTHONPATH={path}", "CUDA_VISIBLE_DEVICES=90,91"]
    with rays.cluster(free_port(), head, broken, before=[*hiding, *few, *shim]) as address:
        yield address


def test_a_broken_node_of_a_real_cluster_is_told_from_a_sound_one(
    address: str, shared: Path, environment: dict[str, str], hiding: list[str], tmp_path: Path
) -> None:
    """And a grid of teams, on a cluster whose head cannot wait for them."""
    wanted = [{"head": {"rank": n}, "resources": {"workers": n}} for n in (2, 4)]
    write_grid(tmp_path, model={"size": "nano-8"}, trials=wanted)
    asked = ("doctor", "--json", "--address", address, "--out", str(shared), "--grid", "tiny.yaml")
    done = lmsat(*asked, env=environment, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    found = [f for f in json.loads(done.stdout) if f["node"] != "driver"]
    grid = {f["node"]: f for f in found if f["check"] == "grid" and f["level"] == "wrong"}
    assert "wants 4 with 1 cpus each, the cluster has room for 2 at most" in grid["all"]["found"]
    assert "lacks the resource `head`" in grid["head"]["found"]
    assert "--resources='{\"head\": 1}'" in grid["head"]["todo"]
    found = [f for f in found if f["check"] != "grid"]
    assert {f["node"] for f in found} == {"head", "broken"}
    wrong = {(f["node"], f["check"]): f["found"] for f in found if f["level"] == "wrong"}
    machine = {"disk", "shared memory", "open files"}  # may be so on this machine
    assert {check for node, check in wrong if node == "head"} <= machine
    assert wrong["broken", "versions"] == "lmsat 9.9.9, the driver has 0.1.0"
    assert wrong["broken", "GPUs"] == "torch sees 0, Ray believes in 2"
    assert wrong["broken", "open files"] == "at most 1024"
    if hiding:
        assert "another folder" in wrong["broken", "storage"]
        assert wrong["broken", "cache"] == f"{shared}/cache/lmsat: not there"
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
    (finding, *_) = doctor.run(
        f"127.0.0.1:{free_port()}", tmp_path, tmp_path / "cache", None, [], None
    )
    assert (finding.check, finding.level) == ("cluster", "wrong")
    assert "refused" in finding.found
    with pytest.raises(BadInput, match="HOST:PORT"):
        doctor.run("tomorrow", tmp_path, tmp_path / "cache", None, [], None)
    assert not list(tmp_path.iterdir())
