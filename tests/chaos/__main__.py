"""Sweeps under force, held against one that nobody touched:  python -m tests.chaos

Without an option all of it, on two cores; `--only kills --seed 3 --count 10` a part, and again.
What was tried is written into docs/reliability.md. Exit code 1 where anything was lost, doubled, or
otherwise.
"""

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from orchestrator import ledger
from tests.chaos import faults, inputs, kills, nodes, runs

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
MARKS = "<!-- made by `make chaos` -->", "<!-- end -->"
SHARES = {"pretrain": 0.6, "rankfit": 0.24, "team": 0.16}  # of the kills, by grid
# What is promised, how it is tried, how often.
FAULTS: dict[str, tuple[str, str, Callable[..., faults.Found], int]] = {
    "notice": (
        "A worker that is told to end saves first",
        "SIGTERM to workers at random moments; a checkpoint newer than it",
        faults.notice,
        10,
    ),
    "nodes": (
        "Nodes may go; with notice a fifth of the time between checkpoints is lost at most",
        "Ray nodes killed, every other one drained before, while others join",
        nodes.leave,
        6,
    ),
    "damage": (
        "`lmsat verify` names every damaged file, and no other",
        "one file cut, emptied, zeroed, lengthened, deleted, or with a bit flipped",
        faults.damage,
        60,
    ),
    "recovery": (
        "The last valid checkpoint and records are gone on from, loudly",
        "a killed sweep's last checkpoint and a record damaged",
        faults.recovery,
        3,
    ),
    "store": (
        "MLflow may be away; lost for good, `lmsat track` makes it anew",
        "the server killed and started again, stopped for a minute, killed for good",
        faults.lost_store,
        4,
    ),
    "disk": (
        "A full disk is a clear stop; with room the sweep goes on",
        "a tmpfs of random size, enlarged afterwards",
        faults.full_disk,
        3,
    ),
    "rivals": (
        "A sweep has one driver",
        "the same command twice at once, and at random moments of a sweep",
        faults.rivals,
        8,
    ),
    "hopeless": (
        "A trial that always fails is retried as the grid says, and the others finish",
        "a checkpoint that the trial cannot go on from",
        faults.hopeless,
        3,
    ),
    "inputs": (
        "Malformed input ends in one line, with the right exit code",
        "every command, file and record: cut, flipped, mutated (tests/test_malformed_*.py)",
        inputs.malformed,
        1,
    ),
}
Row = tuple[str, str, str, list[str]]  # promise, how it was tried, how often, what was wrong


class Bench:
    """The subjects, each made when it is first asked for."""

    def __init__(self, home: runs.Home) -> None:
        self.home, self.made = home, dict[str, kills.Subject]()

    def __getitem__(self, name: str) -> kills.Subject:
        if name not in self.made:
            grid = runs.GRIDS[name]
            if name == "rankfit":
                grid = {**grid, "model": {"pretrained": str(self._model())}}
            made = kills.untouched(self.home, name, self.home.grid(name, grid))
            print(f"{name}: untouched, {made.began:.0f} s to its first checkpoint", flush=True)
            self.made[name] = made
        return self.made[name]

    def _model(self) -> Path:
        sweep = self["short"].out / "chaos"
        (id,) = (i for i, e in ledger.read(sweep).items() if e["trial"]["name"] == runs.BACKBONE)
        return sweep / "trials" / id / "model"


def struck(bench: Bench, whom: tuple[str, ...], seed: int, count: int) -> Iterator[Row]:
    """Kills of each, over all grids."""
    attacks = []
    for name, share in SHARES.items():
        attack = kills.Attack(bench.home, bench[name], f"{name} {seed}")
        attack.go(kills.draw(dict.fromkeys(whom, round(count * share)), attack.seed))
        attacks.append(attack)
    wrong = [line for attack in attacks for line in attack.wrong]
    found = sum((attack.found for attack in attacks), start=kills.Counter())
    at = ", ".join(f"{what} {n}" for what, n in found.most_common())
    sweeps = sum(attack.sweeps for attack in attacks)
    for who in whom:
        tried = sum(n for a in attacks for (one, _), n in a.struck.items() if one == who)
        yield (
            f"SIGKILL of {kills.WHOM[who]} loses and doubles nothing",
            f"at random moments of {sweeps} sweeps (struck in all while: {at})",
            f"{tried} kills",
            wrong,
        )


@click.command(help=__doc__)
@click.option("--only", type=click.Choice([*kills.WHOM, "kills", *FAULTS]), multiple=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--count", type=int, help="Of kills of each, or faults; else the usual.")
@click.option("--keep", is_flag=True, help="Leave the sweeps where they are.")
def main(only: tuple[str, ...], seed: int, count: int | None, keep: bool) -> None:
    began, home = time.monotonic(), runs.Home(Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp")))
    print(f"seed {seed}, in {home.folder}", flush=True)
    bench, rows = Bench(home), list[Row]()
    whom = tuple(w for w in kills.WHOM if not only or "kills" in only or w in only)
    for name, (promise, how, fault, usual) in FAULTS.items():
        if not only or name in only:
            rng = random.Random(f"{name} {seed}")
            tried, wrong = fault(home, bench["short"], rng, count or usual)
            print("\n  ".join([f"{name}: {len(wrong)} wrong", *wrong[:20]]), flush=True)
            rows.append((promise, how, f"{tried} faults", wrong))
    if whom:
        rows = [*struck(bench, whom, seed, count or 50), *rows]
    wrong = [line for row in rows for line in row[3]]
    minutes = (time.monotonic() - began) / 60
    print(f"{'nothing' if not wrong else len(wrong)} wrong, {minutes:.0f} minutes")
    write(rows, f"{time.strftime('%Y-%m-%d')}, seed {seed}")
    if not wrong and not keep:
        shutil.rmtree(home.folder)
    sys.exit(bool(wrong))


def write(rows: list[Row], when: str) -> None:
    """The rows into the page's table, in the place of those on the same promise."""
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    known, _, after = rest.partition(MARKS[1])
    lines = {line.split("|")[1].strip(): line for line in known.splitlines() if "|" in line}
    lines["promise"] = "| promise | how it is tried | how often | lost, doubled, otherwise | when |"
    lines["---"] = "|---|---|---|---|---|"
    for promise, how, often, wrong in rows:
        lines[promise] = f"| {promise} | {how} | {often} | {len(wrong) or 'nothing'} | {when} |"
    table = "\n".join([lines.pop("promise"), lines.pop("---"), *lines.values()])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
