"""lmsat new: a grid by asking, or without."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator import asking, grid, plan
from orchestrator.cli import main
from tests import malformed
from tests.ptys import LMSAT, Terminal

SMALL = ("--size", "nano-8", "--rank", "2,full", "--budget", "100k")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.chdir(tmp_path)


def new(*args: str) -> Result:
    return CliRunner().invoke(main, ["new", *args])


def test_options_make_a_grid_that_can_be_run(tmp_path: Path) -> None:
    done = new("mine", "--size", "nano-8,nano-16", "--rank", "2 4 full", "--budget", "100k")
    assert done.exit_code == 0, done.output
    loaded = grid.load(tmp_path / "mine.yaml")
    names = [f"nano-{d} r={r} s=0" for d in (8, 16) for r in (2, 4, "full")]
    assert [trial["name"] for trial in loaded.trials] == names
    assert {trial["train"]["tokens"] for trial in loaded.trials} == {100_000}
    cost, following = done.stdout.splitlines()
    assert re.fullmatch(r"mine\.yaml: 6 trials of 100k tokens, about .+ here, \d+ at once", cost)
    assert following == "next      lmsat sweep --grid mine.yaml"
    assert [*map(str, Path().iterdir())] == ["mine.yaml"]


def test_without_a_terminal_defaults_are_taken() -> None:
    assert new().exit_code == 0
    loaded = grid.load(Path("mine.yaml"))
    sizes = asking.DEFAULTS["size"].split(",")
    assert {trial["model"]["size"] for trial in loaded.trials} == {*sizes}


def test_every_line_that_can_be_changed_has_a_comment() -> None:
    new()
    lines = Path("mine.yaml").read_text().splitlines()
    for field in ("tokenizer", "rank", "seed", "tokens", "batch", "sequence", "probes"):
        (line,) = [x for x in lines if x.strip().startswith(f"{field}:")]
        assert "    # " in line, line


def test_a_file_that_is_there_is_kept_but_for_force() -> None:
    Path("mine.yaml").write_text("mine")
    done = new("mine", *SMALL)
    assert done.exit_code == 2 and "mine.yaml is there already" in done.stderr
    assert "--force" in done.stderr and Path("mine.yaml").read_text() == "mine"
    assert new("mine.yaml", *SMALL, "--force").exit_code == 0
    assert len(grid.load(Path("mine.yaml")).trials) == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--size", "nano-5"), "--size: model: unknown size 'nano-5'; did you mean 'nano-"),
        (("--size", ","), "--size: model.size: an empty list"),
        (("--rank", "many"), "--rank: head.rank: expected a number, not 'many'"),
        (("--rank", "0"), "--rank: head.rank"),
        (("--corpus", "nosuch"), "--corpus: corpus.package: no installed package"),
        (("--corpus", "no/*.txt"), "--corpus: corpus.files: nothing at"),
        (("--corpus", "{hub: [}"), "--corpus: corpus.package"),
        (("--budget", "much"), "--budget: tokens such as 400k or 2M, or time such as 10 min"),
        (("--budget", "30m"), "--budget: tokens such as"),
        (("--budget", "1k"), "--budget: train: tokens: 1000 is less than one step"),
        (("--budget", "1 s"), "--budget: 1 s is too short: 20 steps a trial take "),
        (("--budget", "1__2"), "--budget: '1__2' is no number"),
        (("a/b",), "NAME: a: no such folder"),
        (("..",), "NAME: '..'"),
    ],
)
def test_a_bad_answer_is_one_line_and_nothing_is_written(args: tuple[str, ...], said: str) -> None:
    done = new(*args)
    assert done.exit_code == 2 and said in malformed.told(done)
    assert done.stdout == "" and not [*Path().iterdir()]


def test_a_budget_of_time_is_kept_to_and_used() -> None:
    done = new("--size", "nano-8,nano-16", "--rank", "2,full", "--budget", "10 min", "--json")
    told: dict[str, Any] = json.loads(done.stdout)
    seconds = 3600 * plan.plan(grid.load(Path("mine.yaml")), Path("cache")).hours
    assert told["seconds"] == pytest.approx(seconds)
    assert 0.85 * 600 < seconds <= 600
    assert told["tokens"] % 10 ** (len(str(told["tokens"])) - 2) == 0  # two digits


def test_what_can_never_run_here_is_written_and_said() -> None:
    done = new("--size", "pythia-12b", "--rank", "full")
    assert done.exit_code == 0 and "here it cannot run: " in done.stdout
    assert done.stdout.splitlines()[-1] == "next      lmsat plan --grid mine.yaml --on 8xA100-80G"
    assert grid.load(Path("mine.yaml")).trials


def test_files_are_found_from_here_wherever_the_grid_is(tmp_path: Path) -> None:
    malformed.text(tmp_path)
    Path("grids").mkdir()
    for name in ("mine", "grids/mine"):
        done = new(name, *SMALL, "--corpus", "text.jsonl")
        assert done.exit_code == 0, done.output
        (source,) = {trial["corpus"]["files"] for trial in grid.load(Path(f"{name}.yaml")).trials}
        assert source == str(tmp_path / "text.jsonl")


def test_a_terminal_is_asked_and_asked_again(tmp_path: Path) -> None:
    terminal = Terminal(LMSAT, "new", "mine", "--corpus", "sotu", cwd=tmp_path)
    terminal.see("Sizes")
    terminal.see(f"[{asking.DEFAULTS['size']}]")
    terminal.type("nano-5\n")
    terminal.see("did you mean 'nano-")
    terminal.type("nano-8\n")
    terminal.see(f"[{asking.DEFAULTS['rank']}]")
    terminal.type("\n")
    terminal.see(f"[{asking.DEFAULTS['budget']}]")
    terminal.type("much\n")
    terminal.see("tokens such as 400k")
    terminal.type("200k\n")
    assert terminal.end() == 0
    assert "Corpus" not in terminal.shown and "Traceback" not in terminal.shown
    assert "next      lmsat sweep --grid mine.yaml" in terminal.lines
    loaded = grid.load(tmp_path / "mine.yaml")
    assert [trial["name"] for trial in loaded.trials] == [
        "nano-8 r=4 s=0",
        "nano-8 r=8 s=0",
        "nano-8 r=full s=0",
    ]
    assert {trial["train"]["tokens"] for trial in loaded.trials} == {200_000}


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    terminal = Terminal(LMSAT, "new", cwd=tmp_path)
    terminal.see("Sizes")
    terminal.see("]: ")
    time.sleep(1)  # a signal just before readline waits is only looked at after a line
    terminal.type("\x03")
    assert terminal.end() == 130
    assert "Traceback" not in terminal.shown and not [*tmp_path.iterdir()]
