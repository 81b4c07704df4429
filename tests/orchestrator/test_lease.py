"""One driver a sweep, on this machine and on others."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.errors import BadInput
from orchestrator import lease

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom orchestrator import lease\n"
    "if sys.argv[2:]: lease._machine = lambda: sys.argv[2]\n"
    "with lease.hold(Path(sys.argv[1])) as held:\n    print('held', flush=True)\n"
    "    held.lost.wait(60)\n    print('lost', held.lost.is_set(), flush=True)\n"
)


@contextlib.contextmanager
def holder(sweep: Path, *machine: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the sweep, as if on another machine where one is named."""
    command = [sys.executable, "-c", HOLD, str(sweep), *machine]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        try:
            yield other
        finally:
            other.kill()


def refused(sweep: Path) -> bool:
    try:
        with lease.hold(sweep):
            return False
    except BadInput as error:
        assert "another `lmsat` is at work" in str(error)
        return True


def test_a_sweep_has_one_driver_and_the_hold_dies_with_it(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        assert refused(tmp_path) and lease.held(tmp_path)
        other.send_signal(signal.SIGSTOP)  # slow is not dead
        assert refused(tmp_path)
        other.kill()
        other.wait()
        assert not lease.held(tmp_path) and not refused(tmp_path)
    assert not lease.held(tmp_path)


def test_one_of_many_that_begin_at_once_holds_it(tmp_path: Path) -> None:
    for _ in range(20):
        gate, held = threading.Barrier(8), []

        def begin(gate: threading.Barrier = gate, held: list[bool] = held) -> None:
            gate.wait()
            with contextlib.suppress(BadInput), lease.hold(tmp_path):
                held.append(True)
                time.sleep(0.05)

        threads = [threading.Thread(target=begin) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert held == [True]


def test_another_machines_driver_is_overtaken_once_it_is_silent_and_learns_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(tmp_path, "elsewhere") as other:
        assert refused(tmp_path)
        other.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(lease, "SILENCE", 0.5)
        time.sleep(0.6)
        with lease.hold(tmp_path) as mine:
            assert lease.overtaken(tmp_path, mine.number - 1)
            other.send_signal(signal.SIGCONT)
            assert other.stdout is not None and other.stdout.readline() == "lost True\n"
            assert other.wait() == 0
            assert not mine.lost.is_set() and not lease.overtaken(tmp_path, mine.number)


def test_signs_of_life_keep_the_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "SILENCE", 1.0)
    with lease.hold(tmp_path):
        monkeypatch.setattr(lease, "_machine", lambda: "elsewhere")
        time.sleep(1.5)
        assert refused(tmp_path)


def test_a_number_that_another_process_has_now_is_not_its_holder(tmp_path: Path) -> None:
    with lease.hold(tmp_path):
        (claim,) = (tmp_path / "driver").glob("*.json")
        known = json.loads(claim.read_text())
        assert known["pid"] == os.getpid()
        claim.write_text(json.dumps({**known, "began": known["began"] - 60}))
        assert not lease.held(tmp_path)


def test_a_damaged_claim_counts_while_it_is_fresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = tmp_path / "driver" / "000004.json"
    claim.parent.mkdir()
    claim.write_text('{"pid": 12')
    assert refused(tmp_path)
    monkeypatch.setattr(lease, "SILENCE", 0.0)
    with lease.hold(tmp_path) as mine:
        assert mine.number == 5
