"""Whether what a sweep wrote is still what it wrote, and what to set aside where it is not."""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from analysis import records, sealed
from orchestrator import lease, ledger

if TYPE_CHECKING:
    from orchestrator.progress import Bar

Found = tuple[str, str]  # a file, by its path in the sweep, and what is wrong with it, or ""
Facts = dict[str, dict[str, Any]]  # what is sealed, by path in the sweep; nothing where damaged
_OUTCOME = "trials/{}/outcome.json"


def verify(sweep: Path, mending: bool, bar: "Bar") -> tuple[list[Found], int]:
    """What is damaged, and how many files are whole. With `mending` set it aside; raises BadInput
    while a driver is at work."""
    bar.preparing(f"looking at all of {sweep}")
    bad, whole = [], 0
    total = sum(path.is_file() for path in sweep.rglob("*"))
    for file, what in bar.each(examine(sweep), "files", total):
        if what:
            bad.append((file, what))
        else:
            whole += 1
    if mending:
        with lease.hold(sweep):
            mend(sweep, True, lambda said: None)
    return bad, whole


def examine(sweep: Path) -> Iterator[Found]:
    """Every file of a sweep, or of measurements, that anything hangs on; not the report, which is
    drawn anew. While a driver is at work, those alone that will not change any more."""
    driven = lease.held(sweep)
    facts = _facts(sweep)
    finished = _finished(facts)
    yield from _looked_at(sweep, facts)
    for files in finished.values():
        yield from _summed(sweep, files)
    if driven:
        return
    known = {file for files in finished.values() for file in files}
    for trial in sorted((sweep / "trials").glob("*")):
        if trial.is_dir():
            summed = yield from _checkpoints(sweep, trial.name, _storage(facts))
            if trial.name not in finished:
                yield from _summed(sweep, {f: s for f, s in summed.items() if f not in known})
                known |= summed.keys()
    yield from _readable(sweep, known)


def mend(sweep: Path, deep: bool, say: Callable[[str], None]) -> None:
    """Set aside what is damaged, so that its trial is trained on from its last whole checkpoint;
    `say` is told of each. Unless `deep`, weights and checkpoints are not looked at.

    The sweep must be held. Raises Damaged where its plan is, which nothing here can replace.
    """
    if (sweep / "plan.json").is_file():
        sealed.read(sweep / "plan.json")
    facts = _facts(sweep)
    finished = _finished(facts)
    for pattern in (
        "records/*/*/.*",
        "ledger/.*",
        "trials/*/.*.json.*",
        "trials/*/.*.safetensors.*",
    ):
        for left in sweep.glob(pattern):  # half-written by one that was killed
            left.unlink()

    def again(trial: str, file: str, what: str) -> None:
        say(f"{sweep / file} is {what}: its trial goes on from its last whole checkpoint")
        (sweep / file).unlink(missing_ok=True)
        (sweep / _OUTCOME.format(trial)).unlink(missing_ok=True)
        if known := facts.get(f"ledger/{trial}.json"):
            ledger.write(sweep, {**known, "status": "stopped"})

    for file, what in _looked_at(sweep, facts):
        if what and file.startswith("trials/"):
            again(file.split("/")[1], file, what)
        elif what == "damaged":  # what is only missing may be so because of a kill
            say(f"{sweep / file} is {what}: it is written anew")
            (sweep / file).unlink(missing_ok=True)
    for trial, files in finished.items():
        some = {f: s for f, s in files.items() if deep or f.startswith("records/")}
        for file, what in _summed(sweep, some):
            if what:
                again(trial, file, what)
    known = {file for files in finished.values() for file in files}
    for file, what in _readable(sweep, known):
        if what:
            say(f"{sweep / file} is {what}: what it held is measured again")
            (sweep / file).unlink()
    if deep:
        from trainables import checkpoint

        for folder in (sweep / "trials").glob("*"):
            place = checkpoint.place(_storage(facts), sweep, folder.name)
            for name, _, bad in checkpoint.verify(place):
                if bad:
                    checkpoint.discard(place, name)


def _facts(sweep: Path) -> Facts:
    patterns = ("plan.json", "tracking.json", "ledger/*.json", _OUTCOME.format("*"))
    paths = [path for pattern in patterns for path in sorted(sweep.glob(pattern))]
    return {_name(sweep, path): _read(path) for path in paths}


def _looked_at(sweep: Path, facts: Facts) -> Iterator[Found]:
    """The facts, and what a sweep's plan must have beside it."""
    yield from ((file, "" if held else "damaged") for file, held in facts.items())
    if not (sweep / "trials").is_dir():
        return
    plan, path = facts.get("plan.json", {}), sweep / "grid.yaml"
    if "plan.json" not in facts:
        yield "plan.json", "missing"
    try:
        same = not plan or yaml.safe_load(path.read_bytes()) == plan["grid"]
        yield "grid.yaml", "" if same else "damaged"
    except FileNotFoundError:
        yield "grid.yaml", "missing"
    except (OSError, ValueError, yaml.YAMLError):
        yield "grid.yaml", "damaged"
    for trial in plan.get("trials", []):
        if (entry := f"ledger/{trial['id']}.json") not in facts:
            yield entry, "missing"
    for file, held in facts.items():
        outcome = _OUTCOME.format(Path(file).stem)
        ended = file.startswith("ledger/") and held.get("status") in ledger.FINISHED
        if ended and outcome not in facts:
            yield outcome, "missing"


def _finished(facts: Facts) -> dict[str, dict[str, str]]:
    """The files of each trial that has ended, with their checksums."""
    outcomes = {file: held for file, held in facts.items() if file.endswith("/outcome.json")}
    return {Path(file).parent.name: held.get("files", {}) for file, held in outcomes.items()}


def _summed(sweep: Path, sums: dict[str, str]) -> Iterator[Found]:
    for file, digest in sums.items():
        if not (sweep / file).exists():
            yield file, "missing"
        else:
            yield file, "damaged" if sealed.wrong(sweep, {file: digest}) else ""


def _readable(sweep: Path, known: set[str]) -> Iterator[Found]:
    """Records that nobody has the checksums of."""
    for table in records.TABLES:
        for path in records.files(sweep, table):
            name = _name(sweep, path)
            if name not in known:
                yield name, "" if records.readable(path, table) else "damaged"


def _storage(facts: Facts) -> str | None:
    """Where checkpoints are, if not in the sweep."""
    return facts.get("plan.json", {}).get("checkpoints")


def _checkpoints(
    sweep: Path, trial: str, storage: str | None
) -> Generator[Found, None, dict[str, str]]:
    """A trial's; returns the files that the last whole one knows, with their checksums."""
    from trainables import checkpoint

    place = checkpoint.place(storage, sweep, trial)
    sums: dict[str, str] = {}
    for name, state, bad in checkpoint.verify(place):
        whole = f"{place}/{name}" if storage else _name(sweep, Path(place) / name)
        yield from ((f"{whole}/{file}", "damaged or missing") for file in bad)
        if not bad:
            yield whole, ""
            sums = sums or state["files"]
    return sums


def _read(path: Path) -> dict[str, Any]:
    """What a sealed file holds; nothing where it is damaged."""
    try:
        return sealed.read(path)
    except (OSError, sealed.Damaged):
        return {}


def _name(sweep: Path, path: Path) -> str:
    return path.relative_to(sweep).as_posix()
