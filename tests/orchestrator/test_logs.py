"""lmsat logs: what happened to one trial."""

import json
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from orchestrator import lease, ledger
from orchestrator import logs as trial_logs
from orchestrator.cli import main
from tests import made


def logs(sweep: Path, *args: str) -> Result:
    return CliRunner().invoke(main, ["logs", str(sweep), *args])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Of six trials: done, failed, running, done, done, waiting."""
    states = {1: "failed", 2: "running", 5: "waiting"}
    return made.sweep(tmp_path_factory.mktemp("logs"), cache, states)


def test_a_trial_is_found_by_id_name_or_a_part_that_no_other_has(sweep: Path) -> None:
    for id, entry in ledger.read(sweep).items():
        name = entry["trial"]["name"]
        for given in (id, id[:6], name, name.replace(" ", "_").replace("=", ""), name[:-4]):
            assert trial_logs.find(sweep, given)["id"] == id, given


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nano-8", "3 trials of SWEEP are called so: "),
        ("r4", "2 trials of SWEEP are called so: "),
        ("nano-16_r5", "no trial of SWEEP is called so; near are nano-16_r"),
        ("zzz", "no trial of SWEEP is called so; near are "),
        ("", "6 trials of SWEEP are called so: "),
    ],
)
def test_what_is_near_is_told(sweep: Path, given: str, said: str) -> None:
    done = logs(sweep, given)
    assert done.exit_code == 2 and done.stdout == ""
    assert said.replace("SWEEP", str(sweep)) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_everything_is_told_in_order_of_time(sweep: Path) -> None:
    title, *lines = logs(sweep, "nano-16_r2").stdout.splitlines()
    assert title.startswith("nano-16 r=2 s=0  ") and "/trials/" in title
    assert [*lines] == sorted(lines)
    assert lines[0].endswith("step   0  loss 6.134 · held out 6.134±.010 · 50k tokens/s")
    (failure,) = [line for line in lines[:-1] if "failed" in line]
    assert failure.startswith("01-01 01:00:00") and failure.endswith("RuntimeError: it would not")
    assert lines[-1].endswith("step  64  failed: RuntimeError: it would not")


def test_held_out_losses_are_all_told_and_training_at_a_readable_density(sweep: Path) -> None:
    found = json.loads(logs(sweep, "nano-8_r2", "--json").stdout)
    measured = [e for e in found["events"] if e["what"] == "measured"]
    held_out = [e["step"] for e in measured if "held_out_loss" in e]
    assert held_out == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    assert trial_logs.LINES < len(measured) < trial_logs.LINES + len(held_out)
    assert measured[-1]["held_out_loss"] == pytest.approx(5.315, abs=1e-3)


def test_a_trial_that_waits_has_little_to_tell(sweep: Path) -> None:
    assert len(logs(sweep, "nano-16_rfull").stdout.splitlines()) == 2


def test_following_tells_each_thing_once_and_ends_with_the_trial(
    tmp_path: Path, cache: Path
) -> None:
    sweep = made.sweep(tmp_path, cache, {2: "running"})
    (entry,) = [e for e in ledger.read(sweep).values() if e["status"] == "stopped"]
    trial = entry["trial"]

    def work() -> None:
        time.sleep(1.5)
        made.record(sweep, entry["id"], "done", made.STEPS)
        ledger.write(sweep, {**entry, "step": made.STEPS, "status": "done"})

    with lease.hold(sweep):
        ledger.write(sweep, {**entry, "status": "running"})
        worker = threading.Thread(target=work)
        worker.start()
        done = logs(sweep, trial["name"], "--follow")
        worker.join()
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert len(lines) == len({*lines}) and lines[-1].endswith("step 128  done")
    told = [int(line.split("step")[1].split()[0]) for line in lines[1:]]
    assert 64 in told and told == sorted(told) and told[-2:] == [128, 128]


def test_following_what_nobody_trains_ends_at_once(sweep: Path) -> None:
    done = logs(sweep, "nano-8_r4", "--follow")
    assert done.exit_code == 0 and done.stdout.splitlines()[-1].endswith("stopped")
