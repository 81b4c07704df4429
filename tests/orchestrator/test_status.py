"""lmsat status: how far a sweep is, once or live."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from analysis import sealed
from orchestrator import lease, ledger
from orchestrator import status as statuses
from orchestrator.cli import main
from tests import made
from tests.ptys import LMSAT, Terminal


def status(sweep: Path, *args: str) -> Result:
    return CliRunner().invoke(main, ["status", str(sweep), *args])


@pytest.fixture
def sweep(tmp_path: Path, cache: Path) -> Path:
    """Of six trials: done, failed, running, done, done, waiting."""
    return made.sweep(tmp_path, cache, {1: "failed", 2: "running", 5: "waiting"})


def test_each_trial_says_how_far_it_is(sweep: Path) -> None:
    with lease.hold(sweep):
        done = status(sweep)
    rows = [line.split() for line in done.stdout.splitlines()[1:7]]
    assert [row[0] for row in rows] == ["nano-8", "nano-16"] * 3
    assert [row[4] for row in rows] == ["done", "failed", "running", "done", "done", "waiting"]
    assert rows[0][5:] == ["128/128", "100", "%", "5.315", "50k"]
    assert rows[2][5:] == ["64/128", "50", "%", "5.149", "50k"]
    assert rows[5][5:] == ["0/128", "0", "%", "-", "-"]
    line = done.stdout.splitlines()[7]
    assert line.startswith("3 done · 1 running · 1 waiting · 1 failed · 67 % · 50k tokens/s · ")
    assert line.endswith(" left")
    assert "nano-16 r=2 s=0 failed: RuntimeError: it would not" in done.stdout
    assert "next" not in done.stdout  # somebody is at work


def test_the_time_left_is_what_was_planned_at_the_pace_of_what_was_trained(sweep: Path) -> None:
    costs = {cost["id"]: cost for cost in sealed.read(sweep / "plan.json")["trials"]}
    with lease.hold(sweep):
        seen = statuses.Status(sweep)
    by_state: dict[str, list[dict[str, Any]]] = {}
    for row in seen.rows:
        by_state.setdefault(row["status"], []).append(costs[row["id"]])
    timed = [c for state in ("done", "failed", "running") for c in by_state[state]]
    pace = sum(c["tokens"] / 50_000 for c in timed) / sum(c["seconds"] for c in timed)
    (running,), (waiting,) = by_state["running"], by_state["waiting"]
    left = pace * (running["seconds"] / 2 + waiting["seconds"])
    assert seen.seconds_left == pytest.approx(left)
    assert 0 < left < 10


def test_what_a_dead_driver_left_is_stopped_and_the_next_command_is_told(sweep: Path) -> None:
    done = status(sweep)
    assert "0 running" in done.stdout and "1 stopped" in done.stdout
    assert " left\n" not in done.stdout
    again = f"lmsat sweep --grid {sweep}/grid.yaml --out {sweep.parent}"
    assert done.stdout.splitlines()[-1] == f"next      {again}"
    assert json.loads(status(sweep, "--json").stdout)["seconds_left"] is None


def test_of_very_many_trials_those_to_look_at_are_shown(tmp_path: Path, cache: Path) -> None:
    seeds = {"model": {"size": "nano-8"}, "head": {"rank": 2}, "seed": [*range(110)]}
    states = {**dict.fromkeys(range(110), "waiting"), 7: "failed", 9: "stopped", 11: "done"}
    sweep = made.sweep(tmp_path, cache, states, seeds)
    lines = status(sweep).stdout.splitlines()
    assert [line.split()[4] for line in lines[1:3]] == ["failed", "stopped"]
    assert lines[3].startswith("1 done · 0 running · 107 waiting · 1 failed · 1 stopped · 2 %")
    assert lines[4] == "2 of 110 trials are shown; all with --all"
    assert len(status(sweep, "--all").stdout.splitlines()) > 110
    assert len(json.loads(status(sweep, "--json").stdout)["trials"]) == 110


def test_watching_lasts_as_long_as_somebody_is_at_work(sweep: Path) -> None:
    seen = statuses.Status(sweep)
    (running,) = [e for e in seen.entries.values() if e["status"] == "running"]
    with lease.hold(sweep):
        terminal = Terminal(LMSAT, "status", sweep, "--watch", cwd=sweep)
        terminal.see("1 running")
        ledger.write(sweep, {**running, "step": 96})
        terminal.see("96/128")
        ledger.write(sweep, {**running, "step": 128, "status": "done"})
        terminal.see("4 done")
        assert terminal.process.poll() is None
    assert terminal.end() == 0
    assert any(line.startswith("4 done · 0 running") for line in terminal.lines)
    assert "next      lmsat sweep" in terminal.shown


def test_ctrl_c_ends_watching(sweep: Path) -> None:
    with lease.hold(sweep):
        terminal = Terminal(LMSAT, "status", sweep, "--watch", cwd=sweep)
        terminal.see("1 running")
        time.sleep(0.2)
        terminal.process.send_signal(2)
        assert terminal.end() == 130
    assert "Traceback" not in terminal.shown


def test_watching_in_a_pipe_has_no_escape_codes(sweep: Path) -> None:
    done = status(sweep, "--watch")
    assert done.exit_code == 0 and "\x1b" not in done.stdout


def test_watching_and_json_do_not_go_together(sweep: Path) -> None:
    done = status(sweep, "--watch", "--json")
    assert done.exit_code == 2 and "--watch" in done.stderr and done.stdout == ""


def test_an_unknown_name_is_answered_with_those_that_there_are(sweep: Path) -> None:
    for name in ("mode", "nothing-like-it"):
        done = CliRunner().invoke(main, ["status", name, "--out", str(sweep.parent)])
        assert done.exit_code == 2 and done.stderr.endswith("; there are made\n")
    done = CliRunner().invoke(main, ["status", "mode", "--out", str(sweep)])
    assert done.stderr.endswith("; `lmsat sweep` makes one\n")
    assert "Did you mean 'status'?" in CliRunner().invoke(main, ["stauts"]).stderr
