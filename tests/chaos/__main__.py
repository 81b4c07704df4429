"""Sweeps under force, held against one that nobody touched:  python -m tests.chaos

Kills without an option, on two cores; `--only faults` all else that may befall a sweep; `--only
driver --seed 3 --count 10` a part, and again.
What was tried is written into docs/reliability.md. Exit code 1 where anything was lost, doubled, or
otherwise.
"""

import itertools
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import click

from tests.chaos import kills
from tests.chaos.streams import FAULTS, STREAMS, Found, Row, Wanted, stream

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
MARKS = "<!-- made by `make chaos` and `make faults` -->", "<!-- end -->"


def rows(found: Found, whom: tuple[str, ...]) -> list[Row]:
    """Of kills, then of faults."""
    at = ", ".join(f"{what} {n}" for what, n in found.at.most_common())
    how = f"at random moments of {found.sweeps} sweeps (struck in all while: {at})"
    killed = [
        (
            f"SIGKILL of {kills.WHOM[who]} loses and doubles nothing",
            how,
            f"{found.struck[who]} kills",
            found.wrong,
        )
        for who in whom
    ]
    return [*killed, *found.rows]


@click.command(help=__doc__)
@click.option("--only", type=click.Choice([*kills.WHOM, "faults", *FAULTS]), multiple=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--count", type=int, help="Of kills of each, or faults; else the usual.")
@click.option("--keep", is_flag=True, help="Leave the sweeps where they are.")
def main(only: tuple[str, ...], seed: int, count: int | None, keep: bool) -> None:
    began, home = time.monotonic(), Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
    print(f"seed {seed}, in {home}", flush=True)
    whom = tuple(w for w in kills.WHOM if not only or w in only)
    wanted = Wanted(whom, tuple(f for f in FAULTS if {f, "faults"} & {*only}), seed, count)
    cores = os.sched_getaffinity(0)
    with ProcessPoolExecutor(len(STREAMS), mp_context=get_context("spawn")) as pool:
        streams = [
            pool.submit(stream, home / str(i), home / "cache", parts, ({core}, cores), wanted)
            for i, (parts, core) in enumerate(zip(STREAMS, itertools.cycle(sorted(cores))))
        ]
        found = sum((one.result() for one in streams), start=Found())
    told = rows(found, whom)
    wrong = [line for row in told for line in row[3]]
    minutes = (time.monotonic() - began) / 60
    print(f"{'nothing' if not wrong else len(wrong)} wrong, {minutes:.0f} minutes")
    write(told, f"{time.strftime('%Y-%m-%d')}, seed {seed}")
    if not wrong and not keep:
        shutil.rmtree(home)
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
