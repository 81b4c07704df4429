import json
import math
from typing import Any

import pytest

from orchestrator import terminal
from orchestrator.plan import Cost


def cost(id: str, seconds: float = 10.0) -> Cost:
    return Cost(id, f"trial {id}", 8, "full", None, 10, 5, 1000, None, 1e9, 100, seconds)


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


def test_a_table_in_a_pipe_is_not_folded(capsys: Any) -> None:
    terminal.print_table(["name", "value"], [["[red]x" + "y" * 90, "1"]], title="t" * 90)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].split() == ["[red]x" + "y" * 90, "1"]


def test_what_went_wrong_is_shown_as_it_is(capsys: Any) -> None:
    """Square brackets are no markup, a long line is one line, and there is no colour in a pipe."""
    progress, error = terminal.Progress(), "ValueError: [/bad] [red]" + "x" * 100
    progress.started([cost("a")], {"a": "waiting"})
    progress.running("a")
    progress.ended("a", "failed", error)
    said = capsys.readouterr().err
    assert f"trial a failed: {error}\n" in said and "\x1b" not in said


def test_the_line_counts_and_foretells(capsys: Any, monkeypatch: Any) -> None:
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    progress = terminal.Progress()
    progress.started([cost("a", 10), cost("b", 30)], {"a": "waiting", "b": "waiting"})
    progress.running("a")
    progress.progress("a", 0, 10)
    clock[0] = 5.0
    progress.progress("a", 5, 10)
    # Half of a quarter of the work took 5 s: seven more such parts are left.
    assert progress._line() == "0 done · 1 running · 1 waiting · 100 tokens/s · 35 s left"
    progress.ended("a", "done", None)
    assert progress._line().startswith("1 done · 0 running · 1 waiting")
    progress.ended("b", "stopped", None)
    assert "1 stopped" in progress._line()
