"""The commands that redo a paper; the work itself is that of the commands, tested by theirs."""

import json
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from analysis.errors import Failed
from orchestrator import grid, ledger, reproduce
from orchestrator.cli import main
from trainables import pretrain


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


def test_heads_are_put_on_the_backbone_that_was_trained(tmp_path: Path, cache: Path) -> None:
    """That of the shipped grid, trained for a moment."""
    trials = grid.load(grid.find("godey2024-nano.yaml")).trials
    (trial,) = (one for one in trials if one["model"]["size"] == "nano-64")
    trial["train"]["tokens"], trial["probes"] = 4096, trial["probes"] | {"final_tokens": 1024}
    sweep = tmp_path / "godey2024-nano"
    assert pretrain.train(trial, sweep, cache).status == "done"
    ledger.write(sweep, {"id": trial["id"], "trial": trial, "status": "done"})
    reproduce.keep_heads(tmp_path)
    heads = grid.load(tmp_path / "godey2024-nano-heads.yaml").trials
    trained = [one for one in heads if one["head"]["kind"] == "linear"]
    assert {one["head"]["rank"] for one in trained} == {2, 4, 8, 16, 32, 64, None}
    assert all(one["name"].startswith(f"nano-64@{trial['id'][:6]} ") for one in heads)
    with pytest.raises(Failed, match="no trial of nano-64"):
        reproduce.keep_heads(tmp_path / "elsewhere")


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
