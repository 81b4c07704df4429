"""What else befalls a sweep: notice, damage, a full disk, a lost store, a second driver, a trial
that cannot be trained. Each gives how many faults there were, and what was wrong."""

import json
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import polars as pl
import psutil
import yaml
from click.testing import CliRunner

from analysis import records
from orchestrator import ledger
from orchestrator.cli import main
from tests import same
from tests.chaos.kills import Subject
from tests.chaos.runs import Command, Home, command, finish, wait
from tests.mlserver import Server
from trainables import schedule

Found = tuple[int, list[str]]  # faults tried, what was wrong


def notice(home: Home, subject: Subject, rng: random.Random, count: int) -> Found:
    """SIGTERM to workers: they save at once, whatever the interval, and their trials go on."""
    wrong, told, sweeps = list[str](), 0, 0
    while told < count and not wrong:
        sweeps += 1
        out = home.folder / f"notice-{sweeps}"
        with _sweep(home, subject, out) as started:
            wait(started.workers, subject.patience)
            while told < count and not wait(started.ended, rng.uniform(1, 8)):
                if not _at_work(out / "chaos"):
                    continue
                at, workers = time.time(), started.workers()[:1]
                for worker in workers:
                    with suppress(psutil.NoSuchProcess):
                        worker.terminate()
                _, alive = psutil.wait_procs(workers, timeout=30)
                wrong += [f"told to end, and there after 30 s: {one}" for one in alive]
                again = trained_again(out, at, files(out), subject)
                if again is not None:
                    told += 1
                    print(f"notice {told}: {again:.0%} of an interval trained again", flush=True)
                    wrong += [f"{again:.0%} of an interval trained again"] if again > 0.2 else []
            wait(started.ended, subject.patience)
        wrong += _compare(home, subject, out, noticed=True)
    return told, wrong


def _at_work(sweep: Path) -> bool:
    """Whether a trial has begun that is not at its end."""
    begun = {row.parent.name for row in records.files(sweep, "trials")}
    return any(not (sweep / "trials" / id / "outcome.json").exists() for id in begun)


def files(out: Path) -> dict[Path, float]:
    """When checkpoints were made, and trials began."""
    found = [*saved(out), *records.files(out / "chaos", "trials")]
    return {path: path.stat().st_mtime for path in found if path.exists()}


def trained_again(
    out: Path, at: float, before: dict[Path, float], subject: Subject
) -> float | None:
    """What a trial that was interrupted then trains twice, as a share of the steps between its
    regular checkpoints; None where none was at work. `before`: what there was when it was dead."""
    sweep = out / "chaos"
    begun: dict[str, float] = {}  # when it last began
    for path, when in before.items():
        if path.suffix == ".parquet" and when < at:
            id = path.parent.name
            begun[id] = max(when, begun.get(id, 0.0))

    def resumed() -> tuple[str, int] | None:
        for path in set(files(out)) - {p for p, when in before.items() if when < at}:
            id, step = path.parent.name, path.stem
            if id in begun and pl.read_parquet(path)["status"][0] == "running":
                return id, int(step)
        return None

    if not (found := wait(resumed, 20 + subject.began)):
        return None
    id, step = found
    made = before.get(sweep / "trials" / id / "checkpoints" / f"step-{step:09d}", 0.0)
    trained = at - max(made, begun[id])
    entry = ledger.entry(sweep, id)
    interval = schedule.every(entry["steps"], entry["trial"]["checkpoints"])
    losses = pl.col("split") == "train", pl.col("metric") == "loss"
    rows = records.scan(sweep, "scalars", id).filter(*losses).sort("step").collect()
    pace = (rows["time"].diff() / rows["step"].diff()).median() / 1e3  # seconds a step
    return max(0.0, trained / pace / interval)


def damage(home: Home, subject: Subject, rng: random.Random, count: int) -> Found:
    """Any file of a finished sweep is damaged: `lmsat verify` names it, and no other."""
    wrong = []
    for number in range(1, count + 1):
        out = home.folder / "damaged"
        shutil.copytree(subject.out, out)
        file = rng.choice(_files(out / "chaos"))
        how = _hurt(file, rng)
        said = CliRunner().invoke(main, ["verify", str(out / "chaos"), "--json"])
        named = {one["file"] for one in json.loads(said.stdout)["damaged"]}
        name = str(file.relative_to(out / "chaos"))
        print(f"damage {number}: {name} {how}: exit code {said.exit_code}, {named}", flush=True)
        if said.exit_code != 1 or named != {name}:
            wrong.append(f"{name} {how}: verify ended with {said.exit_code} and named {named}")
        shutil.rmtree(out)
    return count, wrong


def recovery(home: Home, subject: Subject, rng: random.Random, count: int) -> Found:
    """Some files of a killed sweep are damaged: the last valid ones are gone on from, loudly."""
    wrong: list[str] = []
    for number in range(1, count + 1):
        out = home.folder / f"hurt-{number}"
        with _sweep(home, subject, out) as started:
            wait(partial(saved, out), subject.patience)
            wait(started.ended, rng.uniform(0, 10))
        going = [s for s in saved(out) if not (s.parents[1] / "outcome.json").exists()]
        last = max(going or saved(out), key=lambda step: step.stat().st_mtime)
        hurt = [
            rng.choice([f for f in last.rglob("*") if f.is_file()]),
            rng.choice([*out.glob("chaos/records/*/*/*.parquet")]),
        ]
        said = [f"{file.relative_to(out / 'chaos')} {_hurt(file, rng)}" for file in hurt]
        print(f"recovery {number}: {', '.join(said)}", flush=True)
        wrong += [f"{said}: {line}" for line in _compare(home, subject, out)]
        if "damaged" not in _log(out).read_text():
            wrong.append(f"{said}: nothing was said of it")
    return 2 * count, wrong


def full_disk(home: Home, subject: Subject, rng: random.Random, count: int) -> Found:
    """No room at some point: a clear stop, what was before it whole; more room, and it goes on.
    Where all fits but MLflow's copies, the sweep is at its end, and says what MLflow lacks."""
    wrong = []
    files = [f.stat() for f in subject.out.rglob("*") if f.is_file()]
    found = {f.st_ino: -(-f.st_size // 4096) * 4096 for f in files}  # a file's links count once
    whole = sum(found.values())
    for number in range(1, count + 1):
        out, size = home.folder / f"full-{number}", int(whole * rng.uniform(0.3, 0.8))
        out.mkdir()
        with _disk(out, size) as inside:
            with _sweep(home, subject, out, before=inside) as started:
                wait(started.ended, subject.patience)
            code, last = started.process.returncode, started.said.strip().splitlines()[-1]
            print(f"disk of {size / 1e6:.1f} MB: exit code {code}, {last}", flush=True)
            stopped = code == 1 and "No space left" in last
            lacking = code == 0 and "disk is full): `lmsat track " in started.said
            if not (stopped or lacking) or "Traceback" in started.said:
                wrong.append(f"disk of {size} bytes: exit code {code}, {last}")
            with command(home, _log(out), "verify", str(out / "chaos"), before=inside) as checked:
                wait(checked.ended, subject.patience)
            if checked.process.returncode:
                wrong.append(f"disk of {size} bytes: damaged: {checked.said[-300:]}")
            subprocess.run([*inside, "mount", "-o", "remount,size=1g", str(out)], check=True)
            with _sweep(home, subject, out, before=inside) as started:
                wait(started.ended, subject.patience)
            kept = out.with_name(f"{out.name}-kept")
            subprocess.run([*inside, "cp", "-a", str(out), str(kept)], check=True)
        out.rmdir()
        kept.rename(out)
        wrong += _compare(home, subject, out)
    return count, wrong


def rivals(home: Home, subject: Subject, rng: random.Random, count: int) -> Found:
    """More commands for one sweep, two of them at once: one drives, all others are refused."""
    out, wrong = home.folder / "rivals", []
    with _sweep(home, subject, out) as first, _sweep(home, subject, out) as second:
        wait(lambda: first.ended() or second.ended(), subject.patience)
        driver, ended = (first, [second]) if second.ended() else (second, [first])
        while len(ended) < count and not driver.ended():
            wait(driver.ended, rng.uniform(0, 3))
            rival = finish(home, _log(out), *_wanted(subject, out))
            ended += [rival] if not driver.ended() else []
        wait(driver.ended, subject.patience)
    codes = [one.process.returncode for one in ended]
    print(f"rivals: {codes} beside {driver.process.returncode}", flush=True)
    if {*codes} != {2} or driver.process.returncode:
        wrong.append(f"exit codes {codes} beside {driver.process.returncode}")
    return len(ended), wrong + _compare(home, subject, out)


def hopeless(home: Home, subject: Subject, rng: random.Random, count: int) -> Found:
    """A trial that fails always is tried again as often as the grid says, and the others finish."""
    out, wrong = home.folder / "hopeless", []
    entries = ledger.read(subject.out / "chaos")
    broken = rng.choice(sorted(entries))
    model, head = (entries[broken]["trial"][part] for part in ("model", "head"))
    raw = yaml.safe_load(subject.grid.read_text())
    raw["trials"] = [
        {
            "model": {"size": model["size"]},
            "head": {"rank": head["rank"] or "full"},
            "retries": count,
            "deepspeed": {"stage": 1},  # which cannot go on from what stage 0 has saved
        }
    ]
    for kept in subject.out.glob(f"chaos/records/*/{broken}"):
        shutil.copytree(kept, out / kept.relative_to(subject.out))
    checkpoints = Path("chaos") / "trials" / broken / "checkpoints"
    shutil.copytree(subject.out / checkpoints, out / checkpoints)
    grid = home.grid("hopeless", raw)
    ran = finish(home, _log(out), "sweep", "--grid", str(grid), "--out", str(out))
    entry, sweep = ledger.entry(out / "chaos", broken), out / "chaos"
    tries = (sweep / "trials" / broken / "errors.txt").read_text().count("cannot go on with")
    print(f"hopeless: {entry['status']} after {tries} tries: {entry['error']}", flush=True)
    if (ran.process.returncode, entry["status"], tries) != (1, "failed", count + 1):
        wrong.append(f"exit code {ran.process.returncode}, {entry['status']} after {tries} tries")
    different = same.differences(sweep, subject.out / "chaos")
    return count + 1, wrong + [d for d in different if broken not in d and "MLflow sweep" not in d]


def lost_store(home: Home, subject: Subject, rng: random.Random, count: int) -> Found:
    """MLflow's server is killed and comes back, answers no more for a minute, goes for good."""
    out, wrong, tried = home.folder / "store", [], 0
    home.folder.joinpath("server").mkdir()
    server = Server(home.folder / "server")
    try:
        with _sweep(home, subject, out, "--tracking-uri", server.uri) as started:
            while tried < count and not wait(started.ended, rng.uniform(1, subject.began)):
                tried += 1
                print(f"store {tried}: {'killed' if tried % 2 else 'stopped'}", flush=True)
                if tried % 2:
                    server.kill()
                    wait(started.ended, rng.uniform(5, 20))
                    server.start()
                else:
                    psutil.Process(server.process.pid).suspend()
                    wait(started.ended, 60)
                    psutil.Process(server.process.pid).resume()
            wait(started.ended, subject.patience)
        if started.process.returncode or "Traceback" in started.said:
            wrong.append(f"exit code {started.process.returncode}: {started.said[-300:]}")
        wrong += same.differences(out / "chaos", subject.out / "chaos", uri=server.uri)
    finally:
        server.kill()
    ran = finish(home, _log(out), "track", str(out / "chaos"))
    if ran.process.returncode:
        wrong.append(f"track ended with {ran.process.returncode}: {ran.said[-300:]}")
    return tried + 1, wrong + same.differences(out / "chaos", subject.out / "chaos")


def _wanted(subject: Subject, out: Path, *more: str) -> list[str]:
    return ["sweep", "--grid", str(subject.grid), "--out", str(out), *more]


def _log(out: Path) -> Path:
    return out.with_suffix(".log")


@contextmanager
def _sweep(
    home: Home, subject: Subject, out: Path, *more: str, before: tuple[str, ...] = ()
) -> Iterator[Command]:
    with command(home, _log(out), *_wanted(subject, out, *more), before=before) as started:
        yield started


def _compare(home: Home, subject: Subject, out: Path, noticed: bool = False) -> list[str]:
    """Go on with the sweep to its end; what is otherwise than where nobody interfered."""
    try:
        last = finish(home, _log(out), *_wanted(subject, out), seconds=subject.patience)
    except TimeoutError as error:
        return [str(error)]
    wrong = [f"exit code {last.process.returncode}"] if last.process.returncode else []
    return wrong + same.differences(out / "chaos", subject.out / "chaos", noticed=noticed)


def saved(out: Path) -> set[Path]:
    return set(out.glob("chaos/trials/*/checkpoints/step-*"))


@contextmanager
def _disk(folder: Path, size: int) -> Iterator[tuple[str, ...]]:
    """A disk of so many bytes there; what comes before a command that is to see it."""
    line = f"mount -t tmpfs -o size={size} none {folder} && echo ready && exec sleep 3600"
    with subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", line], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout and holder.stdout.readline() == "ready\n"
            yield "nsenter", f"--target={holder.pid}", "--user", "--mount", "--preserve-credentials"
        finally:
            holder.kill()


def _files(sweep: Path) -> list[Path]:
    """All that anything hangs on, but for grid.yaml, of which plan.json has a copy."""
    folders = (sweep / name for name in ("ledger", "records", "trials"))
    return sorted([sweep / "plan.json", *(f for d in folders for f in d.rglob("*") if f.is_file())])


def _hurt(file: Path, rng: random.Random) -> str:
    """Damage a file as disks and copies do; how."""
    held = bytearray(file.read_bytes())
    how, place = (
        rng.choice(("a bit", "cut", "empty", "gone", "zeros", "more")),
        rng.randrange(len(held)),
    )
    if how == "a bit":
        held[place] ^= 1 << rng.randrange(8)
    elif how == "zeros":
        held[place:] = bytes(len(held[place:]))
    elif how == "more":
        held += rng.randbytes(8)
    else:
        held = held[: place if how == "cut" else 0]
    file.unlink() if how == "gone" else file.write_bytes(held)
    return how
