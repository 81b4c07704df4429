"""Workers that are told that they, or their machines, will be gone: real signals, a real drain."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator import ledger, place
from tests import rays
from tests.mlserver import free_port
from tests.orchestrator.test_sweep import (
    assert_same,
    checkpoints,
    running,
    wait_for,
    workers,
    write_grid,
)
from trainables import pretrain

pytestmark = pytest.mark.skipif(place.cores() < 2, reason="one core")
STEPS = 600
SLOW: dict[str, Any] = {  # saved once on the way, had nobody asked
    "model": {"size": "nano-8"},
    "head": {"rank": "full"},
    "train": {"tokens": STEPS * 512, "batch": 8, "sequence": 64},
    "probes": {"count": 2, "tokens": 1024, "final_tokens": 1024},
    "checkpoints": 2,
    "retries": 0,
}


def steps(sweep: Path) -> dict[str, list[int]]:
    """Of the checkpoints of each trial."""
    found: dict[str, list[int]] = {}
    for path in sorted(checkpoints(sweep)):
        found.setdefault(path.parents[1].name, []).append(int(path.name.removeprefix("step-")))
    return found


def reached(sweep: Path) -> int:
    return min((e["step"] for e in ledger.read(sweep).values()), default=0)


def whole(folder: Path, cache: Path, **fields: object) -> Path:
    from orchestrator import grid

    sweep = folder / "whole"
    sweep.mkdir()
    for trial in grid.load(write_grid(sweep, **fields)).trials:
        assert pretrain.train(trial, sweep, cache).status == "done"
    return sweep


def test_a_worker_that_is_told_to_end_saves_first(tmp_path: Path, cache: Path) -> None:
    grid = {**SLOW, "retries": 1}
    write_grid(tmp_path, **grid)
    sweep = tmp_path / "runs" / "tiny"
    with running(tmp_path) as driver:
        wait_for(lambda: reached(sweep) > 50)
        (worker,) = wait_for(lambda: workers(driver))
        assert not steps(sweep)
        worker.send_signal(signal.SIGTERM)
        psutil.wait_procs([worker], timeout=20)
        (kept,) = steps(sweep).values()
        assert len(kept) == 1 and 50 < kept[0] < STEPS // 2
        said = driver.communicate(timeout=240)[0]
    assert driver.returncode == 0, said
    assert said.count("told to end by SIGTERM, and saved") == 1 and "Traceback" not in said
    (id,) = ledger.read(sweep)
    assert "told to end by SIGTERM" in (sweep / "trials" / id / "errors.txt").read_text()
    assert_same(sweep, whole(tmp_path, cache, **grid))


def test_trials_of_a_machine_that_will_leave_are_saved_at_once_and_lose_a_fifth_at_most(
    tmp_path: Path, cache: Path
) -> None:
    """One of one worker and one of two."""
    tokens = {"tokens": 12 * STEPS * 512, "batch": 8, "sequence": 64}
    both = [
        {"resources": {"workers": 1}, "train": tokens},
        {"resources": {"workers": 2}, "head": {"rank": 2}, "train": tokens},
    ]
    write_grid(tmp_path, **SLOW, trials=both)
    sweep, port = tmp_path / "runs" / "tiny", free_port()
    head, nodes = ["--num-cpus=0", '--resources={"head": 1}'], ["--num-cpus=3"]
    with rays.cluster(port, head, nodes) as address:
        known = {**os.environ, **rays.TOKEN}
        with running(tmp_path, "--address", address, env=known) as driver:
            wait_for(lambda: reached(sweep) > 100)
            leaving = _node(address, known)
            assert not steps(sweep)
            drain = ["drain-node", "--address", address, "--node-id", leaving]
            drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
            drain += ["--deadline-remaining-seconds", "600"]
            subprocess.run([rays.BINARIES / "ray", *drain], env=known, check=True, timeout=60)
            wait_for(lambda: len(steps(sweep)) == 2, 20)
            first = {id: kept[0] for id, kept in steps(sweep).items()}
            interval = 12 * STEPS // SLOW["checkpoints"]
            assert max(first.values()) < interval
            second = wait_for(
                lambda: all(len(k) > 1 for k in steps(sweep).values()) and steps(sweep)
            )
            assert {k[1] - k[0] for k in second.values()} == {interval // 5}
            driver.kill()


def _node(address: str, known: dict[str, str]) -> str:
    """The id of the node that is not the head."""
    ask = "import ray; ray.init('{}', log_to_driver=False, logging_level='ERROR'); print(*["
    ask += "n['NodeID'] for n in ray.nodes() if 'head' not in n['Resources'] and n['Alive']])"
    line = [rays.BINARIES / "python", "-c", ask.format(address)]
    return subprocess.check_output(line, env=known, text=True, timeout=60).split()[-1]
