import io
import itertools
import json
import math
import re
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import terminal
from orchestrator.cli import main
from tests import kinds, made
from tests.malformed import drawn
from tests.ptys import ESCAPES, Terminal

PAPER = Path(__file__).parents[2] / "analysis" / "paper"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "-"), (0.154, "0.154"), (999.0, "999"), (88_600, "88.6k"), (2.37e12, "2.37T")],
)
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert terminal.short(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(4.4, "4 s"), (200, "3 min 20 s"), (18_720, "5 h 12 min"), (367_200, "4 d 6 h")],
)
def test_durations_are_read_at_a_glance(seconds: float, shown: str) -> None:
    assert terminal.duration(seconds) == shown


def test_json_has_no_nan(capsys: Any) -> None:
    terminal.print_json({"a": [math.nan, 1.5, {"b": math.inf}]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, {"b": None}]}


def test_a_narrow_terminal_cuts_names_and_no_numbers(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    terminal.print_table(["name", "value", "more"], [["n" * 60, "1.2345678", "[+1, -2]"]])
    lines = capsys.readouterr().out.splitlines()
    assert all("1.2345678" in x and "[+1, -2]" in x and "…" in x for x in lines[1:])


WORD = st.text("abcxyz0189.±[]-", min_size=1, max_size=14)


@settings(drawn, max_examples=40)
@given(st.data(), st.integers(40, 120))
def test_whatever_the_width_all_numbers_are_there_beside_their_names(
    data: st.DataObject, width: int
) -> None:
    count, height = data.draw(st.integers(2, 18)), data.draw(st.integers(1, 4))
    cells = [[data.draw(WORD) for _ in range(count)] for _ in range(height + 1)]
    names = [f"{i} {data.draw(st.text('nm', max_size=60))}" for i in range(height + 1)]
    with pytest.MonkeyPatch.context() as patch, io.StringIO() as out, redirect_stdout(out):
        patch.setenv("COLUMNS", f"{width}")
        patch.setenv("FORCE_COLOR", "1")
        rows = [[name, *line] for name, line in zip(names, cells, strict=True)]
        terminal.print_table(rows[0], rows[1:])
        lines = ESCAPES.sub("", out.getvalue()).splitlines()
    assert all(len(line) <= width for line in lines)
    blocks = [[*block] for blank, block in itertools.groupby(lines, key=bool) if blank]
    assert all(len(block) == height + 1 for block in blocks)
    for i, (name, line) in enumerate(zip(names, cells, strict=True)):
        told = [block[i] for block in blocks]
        assert all(one.startswith(name[:8].strip()) for one in told)
        ends = [one.removeprefix(_name(one, name)) for one in told]
        assert " ".join(ends).split() == line


def _name(line: str, name: str) -> str:
    """As much of it as the line has."""
    return name if line.startswith(name) else line[: line.index("…") + 1]


COMMANDS = [
    "status made --out .",
    "logs made nano-8_r2 --out .",
    "verify made --out .",
    "compare made made --out .",
    "fit made --form rank --draws 20 --out .",
    "fit law.csv --fix B=410.7,b=0.28,E=1.69 --draws 20",
    "plan --grid made.yaml",
    "plan --grid gpu.yaml --on 8xA100-80G",
]
# And tables of records of every kind.
ALL = f"""\
from pathlib import Path
from orchestrator import result_tables
from orchestrator.cli import main
for line in {COMMANDS}:
    try:
        main(line.split())
    except SystemExit as done:
        assert not done.code, line
result_tables.print_results(Path("pretrain"), {{"pretrain"}}, False)
result_tables.print_results(Path("rankfit"), {{"rankfit"}}, False)
result_tables.print_measured(Path("pretrain"), {{}}, False)
"""
SENTENCES = ("written ", "next ", "note: ", "figure ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    made.sweep(folder, cache)
    on_gpus = {**made.GRID, "name": "gpu", "resources": {"gpus": 1, "workers": 8}}
    (folder / "gpu.yaml").write_text(yaml.safe_dump(on_gpus))
    kinds.every(folder)
    shutil.copy(PAPER / "law.csv", folder)
    return folder


def test_tables_fit_eighty_columns(folder: Path) -> None:
    shown = Terminal(sys.executable, "-c", ALL, cwd=folder)
    assert shown.end() == 0, shown.shown[-2000:]
    tables = [line for line in shown.lines if "  " in line and not line.startswith(SENTENCES)]
    assert len(tables) > 100
    assert [line for line in tables if len(line.rstrip()) > 80] == []


@pytest.mark.parametrize("line", COMMANDS)
def test_in_a_pipe_rows_are_whole_and_bare(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(main, line.split())
    assert done.exit_code == 0 and "\x1b" not in done.output and "…" not in done.stdout


def test_help_fits_and_has_examples_of_options_that_there_are() -> None:
    for name, command in main.commands.items():
        said = CliRunner().invoke(main, [name, "--help"]).stdout
        assert max(map(len, said.splitlines())) <= 80, name
        examples = [line for line in said.splitlines() if re.search(rf"\blmsat {name}\b", line)]
        assert examples and "Example" in said, name
        known = {option for parameter in command.params for option in parameter.opts}
        for line in examples:
            used = {word for word in shlex.split(line) if word.startswith("--")}
            assert used <= known, (name, used - known)


def test_a_table_in_a_pipe_is_not_folded(capsys: Any) -> None:
    terminal.print_table(["name", "value"], [["[red]x" + "y" * 90, "1"]], title="t" * 90)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].split() == ["[red]x" + "y" * 90, "1"]
