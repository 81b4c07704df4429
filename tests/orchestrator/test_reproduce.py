"""The commands that redo a paper; the work itself is that of the commands, tested by theirs."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from analysis import records
from orchestrator import grid, reproduce
from orchestrator.cli import main


@pytest.mark.parametrize("scale", reproduce.SCALES)
def test_every_step_is_a_command_that_may_be_typed(scale: str, tmp_path: Path) -> None:
    for step in reproduce.SCALES[scale]:
        name, *arguments = shlex.split(reproduce.typed(step, tmp_path))[1:]
        main.commands[name].make_context(name, arguments)  # raises where an option is none


@pytest.mark.parametrize("scale", reproduce.SCALES)
def test_every_figure_is_redone_at_every_scale(scale: str) -> None:
    redone = {figure for step in reproduce.SCALES[scale] for figure in step.figures}
    assert redone == set(reproduce.FIGURES) - ({"table-1"} if scale == "nano" else set())


def test_a_figure_needs_what_it_builds_on() -> None:
    assert [s.name for s in reproduce.steps("nano", "9")] == [
        "godey2024-nano",
        "godey2024-nano-heads",
    ]
    assert [s.name for s in reproduce.steps("nano", "7")] == ["godey2024-nano-ngrams"]


SMALLER = {
    "godey2024-nano.yaml": {
        "[nano-64, nano-32, nano-16, nano-8, nano-4]": "[nano-64, nano-4]",
        "12_000_000": "32_768",
        "count: 60": "count: 3",
    },
    "godey2024-nano-heads.yaml": {
        "[2, 4, 8, 16, 32, 64, full]": "[4, full]",
        "400_000": "16_384",
        "[3e-3, 1e-2, 3e-2]": "[1e-2]",
        "count: 4": "count: 2",
    },
}


def test_heads_are_trained_on_the_backbone_that_was(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figure 9 at nano scale, by grids of one's own of the same names, much smaller."""
    monkeypatch.chdir(tmp_path)
    for name, changes in SMALLER.items():
        shipped = grid.find(name).read_text()
        for wanted, less in changes.items():
            assert wanted in shipped
            shipped = shipped.replace(wanted, less)
        (tmp_path / name).write_text(shipped)
    words = [str(Path(sys.executable).parent / "lmsat"), "reproduce", "godey2024"]
    done = subprocess.run([*words, "--figure", "9", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    trained, frozen = (tmp_path / "runs" / name for name in said["seconds"])
    (backbone,) = records.scan(trained, "trials").filter(size="nano-64").collect()["trial"]
    heads = records.scan(frozen, "trials").filter(pl.col("kind") == "rankfit").collect()
    assert heads["size"].unique().to_list() == [f"nano-64@{backbone[:6]}"]
    assert {4, 64} <= set(heads["rank"])
    (low,) = (one for one in said["claims"] if one["says"].startswith("heads of low rank"))
    assert low["found"].startswith(f"nano-64@{backbone[:6]}: rank 4 of d = 64 ")
    assert "Figure 9" in Path(said["report"]).read_text()


def test_the_commands_are_told_without_being_run(tmp_path: Path) -> None:
    words = ["reproduce", "godey2024", "--out", str(tmp_path / "runs"), "--dry-run"]
    said = CliRunner().invoke(main, words)
    assert said.exit_code == 0 and said.stdout.count("lmsat ") == 3
    told = json.loads(CliRunner().invoke(main, [*words, "--json"]).stdout)
    assert "\n".join(told["commands"]) == said.stdout.strip()
    assert not (tmp_path / "runs").exists()


def test_what_is_not_redone_is_said() -> None:
    said = CliRunner().invoke(main, ["reproduce", "godey2024", "--figure", "table-1"])
    assert said.exit_code == 2 and "table-1 is not redone at scale nano" in said.stderr
