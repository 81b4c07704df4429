import json
import math
from pathlib import Path
from typing import Any

import pytest

from analysis import records
from orchestrator import terminal


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


def test_a_narrow_terminal_leaves_columns_out_and_says_so(
    capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    rows = {"loss": 3.25, "accuracy": 0.5, "stable_rank": 123456.75}
    scalar = {"trial": "a", "step": 1000, "tokens": None, "split": "", "layer": None}
    scalar |= {"stderr": None, "time": 0}
    named = dict.fromkeys(records.TABLES["trials"]) | {"trial": "a", "name": "n" * 60}
    records.write(tmp_path, "trials", "a", 1000, [named])
    found = [{**scalar, "metric": metric, "value": value} for metric, value in rows.items()]
    records.write(tmp_path, "scalars", "a", 1000, found)
    monkeypatch.setenv("COLUMNS", "32")
    monkeypatch.setenv("FORCE_COLOR", "1")
    terminal.print_measured(tmp_path, {}, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "not shown on so narrow a terminal: stable rank"
    assert "1000 3.250 0.500" in lines[-1] and "…" in lines[-1]
    monkeypatch.setenv("COLUMNS", "44")
    terminal.print_measured(tmp_path, {}, as_json=False)
    assert "1000 3.250 0.500   123456.75" in capsys.readouterr().out.splitlines()[-1]


def test_a_table_in_a_pipe_is_not_folded(capsys: Any) -> None:
    terminal.print_table(["name", "value"], [["[red]x" + "y" * 90, "1"]], title="t" * 90)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].split() == ["[red]x" + "y" * 90, "1"]
