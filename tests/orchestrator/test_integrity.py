"""Damage of every kind to every file of a sweep: it is found, named, and made good."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from analysis import records, sealed
from orchestrator import grid, integrity, lease, ledger, plan
from orchestrator import sweep as sweeps
from orchestrator.cli import main
from tests.forked import lmsat
from tests.orchestrator.test_sweep import assert_same, write_grid
from tests.trainables.test_pretrain import stop_after
from trainables import pretrain

pytestmark = pytest.mark.usefixtures("one_core")
FIELDS: dict[str, Any] = {
    "model": {"size": "nano-8"},
    "head": {"rank": [2, "full"]},
    "train": {"tokens": 12 * 512, "batch": 8, "sequence": 64},
    "probes": {"count": 2, "tokens": 1024, "final_tokens": 1024},
}


def make(out: Path, cache: Path, stop: int | None = None) -> Path:
    """A sweep as the command leaves it; its second trial asked to stop at a step."""
    loaded = grid.load(write_grid(out, **FIELDS))
    sweep = out / "runs" / "tiny"
    for trial in loaded.trials:
        stopping = stop is not None and trial is loaded.trials[-1]
        ask = stop_after(stop or 0) if stopping else lambda: False
        status, step, files = pretrain.train(trial, sweep, cache, should_stop=ask)
        ledger.write(sweep, {"id": trial["id"], "trial": trial, "status": status, "step": step})
        if not stopping:
            ledger.conclude(sweep, trial["id"], status, step, files)
    sweeps._keep(loaded, plan.plan(loaded, cache).costs, None, sweep)
    return sweep


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Two finished trials."""
    return make(tmp_path_factory.mktemp("swept"), cache)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """One finished, one stopped at step 8 of 12, after checkpoints at 3, 6 and 8."""
    return make(tmp_path_factory.mktemp("halfway"), cache, stop=8)


def truncate(file: Path, dice: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: dice.randrange(len(content))])


def flip(file: Path, dice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def remove(file: Path, dice: random.Random) -> None:
    file.unlink()


def found(sweep: Path) -> list[str]:
    return [file for file, what in integrity.examine(sweep) if what]


@pytest.mark.parametrize("harm", [truncate, flip, remove])
@pytest.mark.parametrize("which", ["swept", "halfway"])
def test_every_harm_to_every_file_is_named(
    which: str, harm: Callable[[Path, random.Random], None], request: pytest.FixtureRequest
) -> None:
    sweep = request.getfixturevalue(which)
    assert found(sweep) == []
    files = [f for f in sorted(sweep.rglob("*")) if f.is_file() and f.parent.name != "driver"]
    assert len(files) > 30
    for number, file in enumerate(files):
        content, name = file.read_bytes(), file.relative_to(sweep).as_posix()
        harm(file, random.Random(number))
        named = name in found(sweep)
        file.write_bytes(content)
        if which == "halfway" and "records/trials" in name:
            continue  # of a trial at work: written anew when it goes on
        assert named, (name, harm.__name__)
    assert found(sweep) == []


def test_the_command_names_them_and_says_what_to_do(swept: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "tiny"
    shutil.copytree(swept, sweep)

    def verify(*more: str) -> Any:
        return CliRunner().invoke(main, ["verify", str(sweep), *more])

    assert verify().exit_code == 0
    victim = records.files(sweep, "scalars")[0]
    trial = victim.parent.name
    truncate(victim, random.Random(1))
    told = verify()
    assert told.exit_code == 1 and victim.name in told.stdout and "--mend" in told.stdout
    (damaged,) = json.loads(verify("--json").stdout)["damaged"]
    assert damaged == {"file": f"records/scalars/{trial}/{victim.name}", "what": "damaged"}
    with lease.hold(sweep):
        assert "another `lmsat`" in verify("--mend").stderr
    assert verify("--mend").exit_code == 0 and not victim.exists()
    missing = json.loads(verify("--json").stdout)["damaged"]  # until the sweep goes on
    assert {m["what"] for m in missing} == {"missing"}
    ids = {p.parent.name for p in sweep.glob("trials/*/outcome.json")}
    assert ids == {p.parent.name for p in swept.glob("trials/*/outcome.json")} - {trial}


def test_a_trial_goes_on_from_before_what_is_damaged(
    swept: Path, halfway: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the last checkpoint a file, then of the records a file that both know."""
    trial = grid.load(halfway.parents[1] / "tiny.yaml").trials[-1]
    caplog.set_level(logging.WARNING)

    def first_step(harmed: Path) -> int:
        """From which it goes on; the end is that of one that was never stopped."""
        sweep, steps = tmp_path / harmed.name, []
        shutil.copytree(halfway, sweep)
        flip(sweep / harmed.relative_to(halfway), random.Random(2))
        outcome = pretrain.train(trial, sweep, cache, lambda p: steps.append(p["step"]))
        assert outcome.status == "done" and sealed.wrong(sweep, outcome.files) == []
        assert_same(sweep, swept)
        return min(steps)

    kept = halfway / "trials" / trial["id"] / "checkpoints"
    assert [p.name for p in sorted(kept.iterdir())] == ["step-000000006", "step-000000008"]
    weights = kept / "step-000000008" / "engine" / "mp_rank_00_model_states.pt"
    assert 6 <= first_step(weights) <= 8
    assert f"step-000000008: damaged (engine/{weights.name}); going on from before" in caplog.text
    assert 6 <= first_step(halfway / f"records/scalars/{trial['id']}/000000000008.parquet") <= 8
    early = halfway / f"records/scalars/{trial['id']}/000000000003.parquet"
    assert first_step(early) < 3
    for step in (6, 8):
        assert (
            f"step-{step:09d}: damaged (records/scalars/{trial['id']}/{early.name})" in caplog.text
        )


def test_the_same_command_makes_good_what_was_damaged(
    swept: Path, tmp_path: Path, cache: Path
) -> None:
    """A record of a finished trial, the ledger's word on it, and one that says it has ended."""
    shutil.copytree(swept.parents[1], tmp_path / "user")
    sweep = tmp_path / "user" / "runs" / "tiny"
    one, other = sorted(p.parent.name for p in sweep.glob("trials/*/outcome.json"))
    flip(sweep / f"records/scalars/{one}/000000000012.parquet", random.Random(3))
    truncate(sweep / f"ledger/{one}.json", random.Random(4))
    truncate(sweep / f"trials/{other}/outcome.json", random.Random(5))
    done = lmsat("sweep", "--grid", "tiny.yaml", cwd=tmp_path / "user")
    assert done.returncode == 0, done.stderr
    for name in (f"scalars/{one}/000000000012.parquet", f"{one}.json", f"{other}/outcome.json"):
        assert f"{name} is damaged" in done.stderr
    assert found(sweep) == []
    assert_same(sweep, swept)


def test_a_damaged_plan_is_not_guessed_at(swept: Path, tmp_path: Path, cache: Path) -> None:
    shutil.copytree(swept.parents[1], tmp_path / "user")
    truncate(tmp_path / "user" / "runs" / "tiny" / "plan.json", random.Random(6))
    line = ["--grid", str(tmp_path / "user" / "tiny.yaml"), "--out", str(tmp_path / "user/runs")]
    done = CliRunner().invoke(main, ["sweep", *line])
    assert done.exit_code == 2 and "plan.json is damaged" in done.stderr.splitlines()[-1]
