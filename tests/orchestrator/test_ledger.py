from pathlib import Path
from typing import Any

import pytest

from analysis import sealed
from orchestrator import lease, ledger


def entry(status: str) -> dict[str, Any]:
    return {"id": "t", "status": status, "step": 5, "error": None}


def test_the_workers_word_outlives_the_driver(tmp_path: Path) -> None:
    ledger.write(tmp_path, entry("running"))
    ledger.conclude(tmp_path, "t", "done", 48, {"records/x.parquet": "0a"})
    found = ledger.read(tmp_path)["t"]
    assert (found["status"], found["step"]) == ("done", 48) and "files" not in found
    kept = sealed.read(tmp_path / "trials" / "t" / "outcome.json")
    assert kept["files"] == {"records/x.parquet": "0a"}


def test_running_without_a_driver_is_stopped(tmp_path: Path) -> None:
    ledger.write(tmp_path, entry("running"))
    with lease.hold(tmp_path):
        assert ledger.read(tmp_path)["t"]["status"] == "running"
    assert ledger.read(tmp_path)["t"]["status"] == "stopped"


def test_an_entry_is_written_whole(tmp_path: Path) -> None:
    ledger.write(tmp_path, entry("waiting"))
    written = ledger.write(tmp_path, entry("running"))
    assert sealed.read(tmp_path / "ledger" / "t.json") == written
    assert [p.name for p in (tmp_path / "ledger").iterdir()] == ["t.json"]


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_a_flipped_bit_of_the_ledger_is_not_read(at: int, tmp_path: Path) -> None:
    """Wherever it is; unless it is a space of the layout."""
    ledger.conclude(tmp_path, "t", "done", 48, {"records/scalars/x.parquet": "0a" * 32})
    file = tmp_path / "trials" / "t" / "outcome.json"
    before, content = ledger.outcome(tmp_path, "t"), bytearray(file.read_bytes())
    content[at % len(content)] ^= 1 << at % 8
    file.write_bytes(content)
    try:
        assert ledger.outcome(tmp_path, "t") == before
    except sealed.Damaged as damaged:
        assert f"{file} is damaged" in str(damaged)
