import json
import math
from typing import Any

import pytest

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


def test_a_table_in_a_pipe_is_not_folded(capsys: Any) -> None:
    terminal.print_table(["name", "value"], [["[red]x" + "y" * 90, "1"]], title="t" * 90)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].split() == ["[red]x" + "y" * 90, "1"]
