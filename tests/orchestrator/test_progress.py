from typing import Any

from orchestrator import progress
from orchestrator.plan import Cost


def cost(id: str, seconds: float = 10.0) -> Cost:
    return Cost(id, f"trial {id}", 8, "full", None, 10, 5, 1000, None, 1e9, 100, seconds, 0.0)


def test_what_went_wrong_is_shown_as_it_is(capsys: Any) -> None:
    """Square brackets are no markup, a long line is one line, and there is no colour in a pipe."""
    watcher, error = progress.Progress(), "ValueError: [/bad] [red]" + "x" * 100
    watcher.started([cost("a")], {"a": "waiting"})
    watcher.running("a")
    watcher.ended("a", "failed", error)
    said = capsys.readouterr().err
    assert f"trial a failed: {error}\n" in said and "\x1b" not in said


def test_the_line_counts_and_foretells(capsys: Any, monkeypatch: Any) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    watcher = progress.Progress()
    watcher.started([cost("a", 10), cost("b", 30)], {"a": "waiting", "b": "waiting"})
    watcher.running("a")
    watcher.progress("a", 0, 10)
    clock[0] = 5.0
    watcher.progress("a", 5, 10)
    # Half of a quarter of the work took 5 s: seven more such parts are left.
    assert watcher._line() == "0 done · 1 running · 1 waiting · 100 tokens/s · 35 s left"
    watcher.ended("a", "done", None)
    assert watcher._line().startswith("1 done · 0 running · 1 waiting")
    watcher.ended("b", "stopped", None)
    assert "1 stopped" in watcher._line()
