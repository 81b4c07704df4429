"""Killed at any moment: workers, the driver, all processes of a cluster.

A sweep is killed again and again, going on by the same command, until it is finished; then it is
held against one that nobody touched, and the next begins.
"""

import random
import shutil
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from orchestrator import grid as grids
from tests import same
from tests.chaos.runs import Command, Home, command, wait
from trainables import corpus

Strike = tuple[str, str]  # whom, when
WHOM = {"worker": "a worker", "driver": "the driver", "cluster": "driver, Ray and all workers"}

# How often so; after a change in which folders under --out, if any; at most how many seconds later.
MOMENTS: dict[str, tuple[int, str, float]] = {
    "any time": (6, "", 0.0),
    "start": (2, "", 0.0),
    "checkpoint": (2, "chaos/trials/*/checkpoints", 0.06),
    "records": (1, "chaos/records/*/*", 0.02),
    "MLflow": (2, "mlflow.db", 0.02),
    "trial's end": (1, "chaos/trials/*", 0.4),
    "sweep's end": (1, "chaos/report", 2.0),
    "birth": (0, ".", 3.0),  # of a new sweep and of MLflow's store
}


@dataclass
class Subject:
    """A grid, and what came of it where nobody interfered."""

    grid: Path
    out: Path
    began: float
    """Seconds from the command to the first checkpoint."""

    @property
    def patience(self) -> float:
        """Seconds after which a command is taken for stuck."""
        return 60 + 20 * self.began


def untouched(home: Home, name: str, grid: Path) -> Subject:
    """Run the grid to its end. Raises RuntimeError where it does not come to it."""
    trial = grids.load(grid).trials[0]  # its text first, which no other command will wait for
    corpus.prepare(trial["corpus"], trial["tokenizer"], trial["text"], home.cache)
    out, log = home.folder / f"{name}-whole", home.folder / f"{name}-whole.log"
    with command(home, log, "sweep", "--grid", str(grid), "--out", str(out)) as started:
        wait(lambda: any(out.glob("chaos/trials/*/checkpoints/step-*")) or started.ended(), 200)
        began = time.monotonic() - started.began
        if not wait(started.ended, 400) or started.process.returncode:
            raise RuntimeError(f"{grid} does not even run alone:\n{started.said}")
    return Subject(grid, out, began)


def draw(whom: dict[str, int], seed: str) -> list[Strike]:
    """So many strikes at each, in any order, at moments drawn by their weights."""
    rng = random.Random(seed)
    victims = [who for who, count in whom.items() for _ in range(count)]
    rng.shuffle(victims)
    weights = [weight for weight, _, _ in MOMENTS.values()]
    drawn = zip(victims, rng.choices(list(MOMENTS), weights, k=len(victims)), strict=True)
    # At a sweep's end there are no workers any more.
    late = ("worker", "sweep's end")
    return [("worker", "trial's end") if strike == late else strike for strike in drawn]


@dataclass
class Attack:
    """On sweeps of one grid."""

    home: Home
    subject: Subject
    name: str
    """The seed; and of its sweeps' folders, as one that was there before has a store still open."""
    struck: Counter[Strike] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    """What a sweep was at when it was struck."""
    sweeps: int = 0
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.name)

    def go(self, strikes: list[Strike]) -> None:
        """Stops early where anything is wrong, with the sweep left as it is."""
        left = strikes[::-1]
        while left and not self.wrong:
            self.sweeps += 1
            out = self.home.folder / f"{self.name}-{self.sweeps}"
            log = out.with_suffix(".log")
            try:
                while self._run(out, log, left):
                    pass
            except (TimeoutError, RuntimeError) as error:
                self.wrong += [str(error)]
            self._look(out, log)

    def _run(self, out: Path, log: Path, left: list[Strike]) -> bool:
        """One command, struck until it is dead or at its end; whether to give it again."""
        fresh, struck = not out.exists(), False
        wanted = ["sweep", "--grid", str(self.subject.grid), "--out", str(out)]
        started = Command(self.home, log, *wanted)
        try:
            while left:
                who, moment = left[-1]
                moment = "birth" if fresh and who != "worker" else moment
                fresh = False
                if not self._await(who, moment, out, started):
                    break
                if self._strike(who, moment, out, started):
                    left.pop()
                    struck = True
                    if who != "worker":
                        return True
            if not wait(started.ended, self.subject.patience):
                raise TimeoutError(f"not at its end after {self.subject.patience:.0f} s")
        finally:
            if not started.ended():
                started.kill_all()
        code = started.process.returncode
        if code and not (code == 1 and struck):  # 1: a trial was struck too often
            raise RuntimeError(f"exit code {code}: {started.said[-300:]}")
        return bool(code)

    def _await(self, who: str, moment: str, out: Path, started: Command) -> bool:
        """Whether the moment to strike comes before the command's end."""
        _, folders, pause = MOMENTS[moment]
        began = self.subject.began
        if who == "worker":  # there may be several, one after the other
            wait(lambda: started.workers() or started.ended(), self.subject.patience, 0.2)
            span = 0.2 * began
        else:  # MLflow is opened first of all
            span = {"birth": 0.0, "MLflow": 0.2 * began}.get(moment, began)
        wait(started.ended, self.rng.uniform(0, span))
        if folders:
            before = _stirred(out, folders)
            wait(lambda: started.ended() or _stirred(out, folders) != before, 20, 0.01)
            time.sleep(self.rng.uniform(0, pause))
        return not started.ended()

    def _strike(self, who: str, moment: str, out: Path, started: Command) -> bool:
        """Whether there was anybody to kill."""
        at = _doing(out / "chaos", started)
        if who == "driver":
            started.kill()  # what is left of the others meets the next command
        elif who == "cluster":
            started.kill_all()
        else:
            victims = started.workers()
            if not victims:
                return False
            with suppress(psutil.NoSuchProcess):
                self.rng.choice(victims).kill()
        self.struck[who, moment] += 1
        self.found[at] += 1
        number, after = self.struck.total(), time.monotonic() - started.began
        where = f"{self.name} sweep {self.sweeps}"
        print(f"{where}, kill {number}: {who}, {moment}, {after:.1f} s, {at}", flush=True)
        return True

    def _look(self, out: Path, log: Path) -> None:
        """At the finished sweep, beside the one that nobody touched."""
        if "Traceback" in log.read_text():
            self.wrong += [f"a traceback in {log}"]
        if not wait(lambda: not self.home.left(), 60):
            self.wrong += [f"still running: {one}" for one in self.home.left()]
        self.wrong += same.differences(out / "chaos", self.subject.out / "chaos")
        lines = [f"{len(self.wrong)} differences, {out}", *self.wrong[:20]]
        said = "\n  ".join(lines) if self.wrong else "the same"
        print(f"{self.name} sweep {self.sweeps}: {said}", flush=True)
        if not self.wrong:
            shutil.rmtree(out)


def _stirred(out: Path, folders: str) -> list[int]:
    """When these last changed."""
    found = []
    for one in [out] if folders == "." else out.glob(folders):
        with suppress(OSError):
            found.append(one.stat().st_mtime_ns)
    return found


def _doing(sweep: Path, started: Command) -> str:
    """What a sweep is at, as its files and processes show."""
    if list(sweep.glob("trials/*/checkpoints/.partial-*")):
        return "saving"
    if list(sweep.glob("records/*/*/.*")):
        return "writing records"
    if started.workers():
        return "training"
    return "ending" if list(sweep.glob("report/*.png")) else "starting"
