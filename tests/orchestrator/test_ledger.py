import json
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.errors import BadInput
from orchestrator import ledger


def entry(status: str) -> dict:
    return {"id": "t", "status": status, "step": 5, "run": "r"}


def test_the_workers_word_outlives_the_driver(tmp_path: Path) -> None:
    ledger.write(tmp_path, entry("running"))
    ledger.conclude(tmp_path, "t", "done", 48)
    found = ledger.read(tmp_path)["t"]
    assert (found["status"], found["step"], found["run"]) == ("done", 48, "r")


def test_running_without_a_driver_is_stopped(tmp_path: Path) -> None:
    ledger.write(tmp_path, entry("running"))
    with ledger.driving(tmp_path):
        pass
    assert ledger.read(tmp_path)["t"]["status"] == "stopped"


HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom orchestrator import ledger\n"
    "with ledger.driving(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


def test_a_sweep_has_one_driver_and_the_hold_dies_with_it(tmp_path: Path) -> None:
    ledger.write(tmp_path, entry("running"))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with (
            pytest.raises(BadInput, match="another `lmsat` is at work"),
            ledger.driving(tmp_path),
        ):
            pass
        assert ledger.read(tmp_path)["t"]["status"] == "running"
        other.kill()
    with ledger.driving(tmp_path):
        pass


def test_an_entry_is_written_whole(tmp_path: Path) -> None:
    ledger.write(tmp_path, entry("waiting"))
    written = ledger.write(tmp_path, entry("running"))
    assert json.loads((tmp_path / "ledger" / "t.json").read_text()) == written
    assert [p.name for p in (tmp_path / "ledger").iterdir()] == ["t.json"]
