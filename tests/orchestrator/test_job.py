"""A sweep on a cluster, from outside: a real Ray with a token, known by its dashboard alone."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from analysis import records
from orchestrator import ledger
from tests import rays
from tests.forked import lmsat
from tests.mlserver import free_port
from tests.orchestrator.test_sweep import (
    checkpoints,
    here,
    wait_for,
    write_grid,
)

OUTSIDE = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "LMSAT_"))}


@pytest.fixture(scope="module")
def address(cache: Path) -> Iterator[str]:
    """A cluster's dashboard. The cluster alone knows where tokenised text is kept."""
    port, agent = free_port(), free_port()
    head = ["--num-cpus=2", "--node-ip-address=127.0.0.1", "--include-dashboard=true"]
    head += [f"--ray-client-server-port={free_port()}", f"--dashboard-port={port}"]
    head += [f"--dashboard-agent-listen-port={agent}"]  # it starts jobs, by default at one port
    inside = {
        "PATH": f"{rays.BINARIES}:{os.environ['PATH']}",
        "LMSAT_CACHE": str(cache),
        "RAY_JOB_STOP_WAIT_TIME_S": "0",  # where a job wants no other: Ray's 3 might be enough
    }
    with rays.cluster(free_port(), head, **inside):
        wait_for(lambda: answers(port) and answers(agent), 60)
        yield f"http://127.0.0.1:{port}"


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


LONG = {
    "model": {"size": "nano-8"},
    "train": {"tokens": 131_072, "batch": 8, "sequence": 64},
    "probes": {"count": 2, "tokens": 1024, "final_tokens": 2048},
}


def sweeping(folder: Path, address: str) -> subprocess.Popen[str]:
    """A sweep from outside, at work."""
    sweep = ["sweep", "--grid", "tiny.yaml", "--out", str(folder / "storage")]
    return subprocess.Popen(
        [rays.BINARIES / "lmsat", *sweep, "--address", address],
        env={**OUTSIDE, **rays.TOKEN},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_sweep_on_a_cluster_is_shown_here_stops_with_ctrl_c_and_goes_on(
    address: str, tmp_path: Path
) -> None:
    """The grid travels; all else is the cluster's."""
    write_grid(tmp_path, **LONG)
    out = tmp_path / "storage"
    with sweeping(tmp_path, address) as first:
        wait_for(lambda: checkpoints(out / "tiny"))
        first.send_signal(signal.SIGINT)
        shown, said = first.communicate(timeout=120)
    assert first.returncode == 130, said
    assert said.strip() == "asked the job to stop; again to leave it to itself"
    assert "running trials are being saved" in shown
    assert "the same command goes on from here" in shown  # had Ray killed it, it had not said so
    stopped, trials = time.time() * 1000, ledger.read(out / "tiny")
    assert [one["status"] for one in trials.values()] == ["stopped"] * 2
    saved = {
        p.parents[1].name: int(p.name.removeprefix("step-"))
        for p in sorted(checkpoints(out / "tiny"))
    }
    assert 0 < max(saved.values()) < 256

    # The address by the variable that Ray itself reads.
    outside = {**OUTSIDE, **rays.TOKEN, "RAY_ADDRESS": address}
    again = ("sweep", "--grid", "tiny.yaml", "--out", str(out), "--json")
    done = lmsat(*again, env=outside, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {t["trial"] for t in json.loads(done.stdout)["trials"]} == trials.keys()
    assert "2 done · 0 running · 0 waiting" in done.stderr
    assert "Traceback" not in done.stderr
    steps = records.scan(out / "tiny", "scalars").filter(pl.col("metric") == "gradient_norm")
    steps = steps.sort("step").collect()
    assert steps.group_by("trial").agg(pl.col("step").last())["step"].to_list() == [256] * 2
    for id, step in saved.items():  # every second one is recorded; those are not trained again
        own = steps.filter(pl.col("trial") == id)
        assert own.filter(pl.col("time") < stopped)["step"].to_list() == [*range(2, step + 1, 2)]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["storage"]


def test_what_is_bad_input_on_the_cluster_is_bad_input_here(address: str, tmp_path: Path) -> None:
    """A path in the grid is the cluster's: text beside the grid is not there."""
    (tmp_path / "text.txt").write_text("Here, not there.\n" * 1000)
    write_grid(tmp_path, corpus={"files": "text.txt"})
    sweep = ["sweep", "--grid", "tiny.yaml", "--out", str(tmp_path / "runs"), "--address", address]
    done = lmsat(*sweep, env={**OUTSIDE, **rays.TOKEN}, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("error: tiny.yaml: corpus")
    assert "text.txt" in last
    assert not (tmp_path / "runs").exists()


def test_a_second_ctrl_c_leaves_the_job_to_itself(address: str, tmp_path: Path) -> None:
    write_grid(tmp_path)
    with sweeping(tmp_path, address) as sweep:
        wait_for(lambda: "Running entrypoint" in sweep.stdout.readline())
        sweep.send_signal(signal.SIGINT)
        assert sweep.stderr.readline().startswith("asked the job to stop")
        sweep.send_signal(signal.SIGINT)
        said = sweep.communicate(timeout=30)[1]
    assert sweep.returncode == 130
    (job,) = set(re.findall(r"raysubmit_\w+", said))
    for todo in ("logs -f", "stop"):
        assert f"ray job {todo} --address {address} {job}" in said


def test_without_the_token_one_line_says_what_to_do(address: str, tmp_path: Path) -> None:
    write_grid(tmp_path)
    sweep = ["sweep", "--grid", "tiny.yaml", "--out", str(tmp_path / "runs"), "--address", address]
    env = {**OUTSIDE, "RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    done = lmsat(*sweep, env=env, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: --address: {address} refuses")
    assert "ray get-auth-token" in line


def test_where_no_dashboard_answers_one_line_says_what_to_do(tmp_path: Path) -> None:
    write_grid(tmp_path)
    nowhere = f"http://127.0.0.1:{free_port()}"
    sweep = ["sweep", "--grid", "tiny.yaml", "--out", str(tmp_path / "runs"), "--address", nowhere]
    done = lmsat(*sweep, env=OUTSIDE, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert f"{nowhere}: no cluster's dashboard" in line
    assert "`ray dashboard`" in line


def test_an_address_that_cannot_be_is_refused_at_once(tmp_path: Path) -> None:
    write_grid(tmp_path)
    closed = f"127.0.0.1:{free_port()}"
    for address, wanted in (
        ("http://h:1", "--out: a folder that all machines of the cluster share"),
        ("ray://h:1", "from within its cluster"),
        (closed, f"no cluster at {closed}"),
    ):
        done = here(tmp_path, "sweep", "--grid", "tiny.yaml", "--address", address)
        assert done.exit_code == 2
        assert wanted in done.stderr
