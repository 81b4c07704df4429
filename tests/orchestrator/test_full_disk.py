"""A disk that is full, a real one of a few megabytes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.orchestrator.test_sweep import assert_same, here, write_grid
from trainables import pretrain

MOUNT = "mount -t tmpfs -o size=24m none {0}"
# In one process's view of the file system alone.
WAYS = (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"])


@pytest.fixture
def disk(tmp_path: Path) -> list[str]:
    """What runs a shell script where {tmp_path}/runs can be a disk of its own."""
    (tmp_path / "runs").mkdir()
    if shutil.which("unshare"):
        for way in WAYS:
            line = [*way, "sh", "-c", MOUNT.format(tmp_path / "runs")]
            if subprocess.run(line, capture_output=True).returncode == 0:
                return [*way, "sh", "-c"]
    pytest.skip("nobody may mount here")


def test_a_full_disk_stops_the_sweep_and_with_room_it_goes_on(
    disk: list[str], tmp_path: Path, cache: Path
) -> None:
    from orchestrator import grid

    fields = {
        "model": {"size": "nano-64"},
        "head": {"rank": "full"},
        "train": {"tokens": 81_920, "batch": 8, "sequence": 64},
        "checkpoints": 8,
        "retries": 0,
    }
    path = write_grid(tmp_path, **fields)
    command = f"{Path(sys.executable).parent / 'lmsat'}"
    script = f"""
        {MOUNT.format("runs")} && head -c 18M /dev/zero > runs/ballast
        {command} sweep --grid tiny.yaml 2>&1; echo "first: $?"
        rm runs/ballast && cp -r runs full
        {command} sweep --grid tiny.yaml 2>&1; echo "second: $?"
        cp -r runs kept
    """
    done = subprocess.run([*disk, script], cwd=tmp_path, capture_output=True, text=True)
    said = done.stdout
    assert "Traceback" not in said + done.stderr, said
    assert re.findall(r"(\w+): (\d+)\n", said)[:1] == [("first", "1")], said
    first, second = said.split("first: 1")
    assert "error: " in first and "No space left on device" in first.splitlines()[-1]
    assert "make room, and the same command goes on" in first.splitlines()[-1]
    assert "second: 0" in second, said
    for kept in ("full", "kept"):
        checked = here(tmp_path, "verify", f"{kept}/tiny")
        assert checked.exit_code == 0, checked.output
    (trial,) = grid.load(path).trials
    steps = sorted((tmp_path / "kept" / "tiny" / "trials" / trial["id"]).glob("checkpoints/*"))
    assert len(steps) == 2
    pretrain.train(trial, tmp_path / "whole", cache)
    assert_same(tmp_path / "kept" / "tiny", tmp_path / "whole")
