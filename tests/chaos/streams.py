"""What is tried at once: each stream in a process of its own, one part after the other."""

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator import grid as grids
from tests.chaos import faults, inputs, kills, nodes, runs
from trainables import pretrain

# Of the kills, by part.
SHARES = {"pretrain": 0.52, "pair": 0.04, "rankfit": 0.36, "team": 0.04, "rankfit-team": 0.04}
# What is promised, how it is tried, how often.
FAULTS: dict[str, tuple[str, str, Callable[..., faults.Found], int]] = {
    "notice": (
        "A worker that is told to end saves first",
        "SIGTERM to workers at random moments; a checkpoint newer than it",
        faults.notice,
        4,
    ),
    "nodes": (
        "Nodes may go; with notice a fifth of the time between checkpoints is lost at most",
        "Ray nodes killed, every other one drained before, while others join",
        nodes.leave,
        8,
    ),
    "damage": (
        "`lmsat verify` names every damaged file, and no other",
        "one file cut, emptied, zeroed, lengthened, deleted, or with a bit flipped",
        faults.damage,
        30,
    ),
    "recovery": (
        "The last valid checkpoint and records are gone on from, loudly",
        "a killed sweep's last checkpoint and a record damaged",
        faults.recovery,
        2,
    ),
    "store": (
        "MLflow may be away; lost for good, `lmsat track` makes it anew",
        "the server killed and started again, stopped for a minute, killed for good",
        faults.lost_store,
        3,
    ),
    "disk": (
        "A full disk is a clear stop; with room the sweep goes on",
        "a tmpfs of random size, enlarged afterwards",
        faults.full_disk,
        2,
    ),
    "rivals": (
        "A sweep has one driver",
        "the same command twice at once, and at random moments of a sweep",
        faults.rivals,
        4,
    ),
    "hopeless": (
        "A trial that always fails is retried as the grid says, and the others finish",
        "a checkpoint that the trial cannot go on from",
        faults.hopeless,
        2,
    ),
    "inputs": (
        "Malformed input ends in one line, with the right exit code",
        "every command, file and record: cut, flipped, mutated (tests/test_malformed_*.py)",
        inputs.malformed,
        1,
    ),
}
Row = tuple[str, str, str, list[str]]  # promise, how it was tried, how often, what was wrong
# What goes on at once, in a process and on a core of its own each, one part after the other.
STREAMS = (
    ("pretrain", "pair", "store", "damage", "rivals", "hopeless", "inputs"),
    ("rankfit", "rankfit-team", "team", "notice", "nodes", "recovery", "disk"),
)
# On all cores, with two workers; and of which grid.
WIDE = {
    "pair": "pretrain",
    "team": "team",
    "rankfit-team": "rankfit-team",
    "nodes": "nodes",
}


@dataclass
class Wanted:
    """What to try, and how often."""

    whom: tuple[str, ...]
    faults: tuple[str, ...]
    seed: int
    count: int | None


@dataclass
class Found:
    """What came of it."""

    sweeps: int = 0
    struck: Counter[str] = field(default_factory=Counter)
    """By whom."""
    at: Counter[str] = field(default_factory=Counter)
    """By what the sweep was at."""
    wrong: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    """Of faults."""

    def __add__(self, other: "Found") -> "Found":
        parts = zip(vars(self).values(), vars(other).values(), strict=True)
        return Found(*(a + b for a, b in parts))


class Bench:
    """The subjects, each made when it is first asked for."""

    def __init__(self, home: runs.Home) -> None:
        self.home, self.made = home, dict[str, kills.Subject]()

    def __getitem__(self, name: str) -> kills.Subject:
        if name not in self.made:
            grid = runs.GRIDS[name]
            if grid.get("kind") == "rankfit":
                grid = {**grid, "model": {"pretrained": str(self._model())}}
            made = kills.untouched(self.home, name, self.home.grid(name, grid))
            print(f"{name}: untouched, {made.began:.0f} s to its first checkpoint", flush=True)
            self.made[name] = made
        return self.made[name]

    def _model(self) -> Path:
        """What heads are trained on."""
        grid, cache = self.home.grid("pretrain", runs.GRIDS["pretrain"]), self.home.cache
        (trial,) = (t for t in grids.load(grid).trials if t["name"] == runs.BACKBONE)
        pretrain.train(trial, self.home.folder / "backbone", cache)
        return self.home.folder / "backbone" / "trials" / trial["id"] / "model"


def stream(
    folder: Path,
    cache: Path,
    parts: tuple[str, ...],
    cores: tuple[set[int], set[int]],
    wanted: Wanted,
) -> Found:
    """One part after the other, on its own of the cores, or on all."""
    folder.mkdir()
    home = runs.Home(folder, cache)
    bench, found = Bench(home), Found()
    for part in parts:
        os.sched_setaffinity(0, cores[part in WIDE])
        found += strike(bench, part, wanted) if part in SHARES else befall(bench, part, wanted)
    return found


def befall(bench: Bench, name: str, wanted: Wanted) -> Found:
    """One fault, as often as is wanted."""
    if name not in wanted.faults:
        return Found()
    promise, how, fault, usual = FAULTS[name]
    rng = random.Random(f"{name} {wanted.seed}")
    tried, wrong = fault(bench.home, bench[WIDE.get(name, "short")], rng, wanted.count or usual)
    print("\n  ".join([f"{name}: {len(wrong)} wrong", *wrong[:20]]), flush=True)
    return Found(rows=[(promise, how, f"{tried} faults", wrong)])


def strike(bench: Bench, name: str, wanted: Wanted) -> Found:
    """One grid's share of the kills."""
    share = round((wanted.count or 50) * SHARES[name])
    if not wanted.whom or not share:
        return Found()
    attack = kills.Attack(bench.home, bench[WIDE.get(name, name)], f"{name}-{wanted.seed}")
    attack.go(kills.draw(dict.fromkeys(wanted.whom, share), attack.name))
    struck = Counter[str]()
    for (who, _), times in attack.struck.items():
        struck[who] += times
    return Found(attack.sweeps, struck, attack.found, attack.wrong)
