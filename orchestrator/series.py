"""MODEL -> the ordered checkpoints of one model: anyone's, or a sweep's trials.

A checkpoint is a step and a `source`, plain values that `trainables.survey` can load.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from analysis.errors import BadInput
from orchestrator import ledger
from trainables import corpus, pretrained, schedule, tensors

T = TypeVar("T")

MOST = 100_000  # names that braces make
ASKED = 3  # of a series' checkpoints, before all are taken for missing
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)(?:\.\.(\d+))?\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Series:
    """The checkpoints of one model, by training step."""

    name: str
    identity: str
    """Where it lies, or what it is called on the hub."""
    sources: dict[int, dict[str, Any]]
    trial: dict[str, Any] | None = None
    """Of a sweep."""

    @property
    def bare(self) -> bool:
        """A matrix without a model."""
        return "matrix" in next(iter(self.sources.values()))

    def ask(self, about: Callable[[dict[str, Any]], T]) -> T:
        """What is alike in all: of the last source that can tell, of the last few. Raises BadInput
        where none of these can."""
        error: BadInput | None = None
        for source in list(self.sources.values())[: -ASKED - 1 : -1]:
            try:
                return about(source)
            except BadInput as problem:
                error = problem
        raise BadInput(f"{self.name}: {error}")


def resolve(
    models: tuple[str, ...],
    revisions: tuple[str, ...],
    folders: tuple[str, ...],
    out: Path,
    tensor: str | None,
    pickle: bool,
) -> list[Series]:
    """The series of every MODEL and every folder of checkpoints. Raises BadInput, one line, where
    one is nowhere to be found."""
    expanded = [one for pattern in revisions for one in expand(pattern)]
    found: list[Series] = []
    for name in models:
        found += _series(name, expanded, out, tensor, pickle)
    found += [_folder(Path(name), tensor, pickle) for name in folders]
    names = [series.name for series in found]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"{name}: stands twice among the models; probe them one by one")
    return found


def expand(pattern: str) -> Iterator[str]:
    """As a shell's braces: step{1..3} is step1, step2, step3; {1000..3000..1000} goes by 1000;
    {08..10} is 08, 09, 10; {a,b} is a, b. Nested ones may say a name twice."""
    found = _RANGE.search(pattern)
    if not found:
        yield pattern
        return
    first, last, stride, listed = found.groups()
    if listed is not None:
        values = listed.split(",")
    else:
        by = int(stride or 1)
        if by < 1 or int(first) > int(last):
            raise BadInput(f"--revisions: {found[0]} is empty; write {{FIRST..LAST..STRIDE}}")
        if int(last) - int(first) >= MOST * by:
            raise BadInput(f"--revisions: {found[0]} is more than {MOST:,} names")
        width = len(first) if first.startswith("0") else 0
        values = [str(n).zfill(width) for n in range(int(first), int(last) + 1, by)]
    for value in values:
        yield from expand(pattern[: found.start()] + value + pattern[found.end() :])


def step(name: str) -> int:
    """The training step that a revision, folder or file is named by: the number after `step` or
    `checkpoint`, or else the last one in it. Raises BadInput where there is none."""
    named = re.search(r"(?:step|checkpoint|ckpt)[-_]?(\d+)", name, re.IGNORECASE)
    last = re.findall(r"\d+", name)
    if not named and not last:
        raise BadInput(f"{name}: no training step in this name; such as step1000 is expected")
    return int(named[1] if named else last[-1])


def _series(
    name: str, revisions: list[str], out: Path, tensor: str | None, pickle: bool
) -> list[Series]:
    path = Path(name)
    if revisions and (path.exists() or (out / name / "plan.json").is_file()):
        raise BadInput(f"--revisions: {name} is here, not on a hub; give --checkpoints its folder")
    for directory in (out / name, path):
        if (directory / "plan.json").is_file():
            return _sweep(directory)
    if path.parent.name == "trials" and (path.parent.parent / "plan.json").is_file():
        return _sweep(path.parent.parent, path.name)
    if path.exists():
        only = _source(path, tensor, pickle)
        if "matrix" in only:
            tensors.check(path, tensor)
        return [Series(_plain_name(path), str(path.resolve()), {0: only})]
    if name.endswith((".gguf", *tensors.MATRICES)) or name.startswith((".", "/")):
        raise BadInput(f"{name}: no such file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise BadInput(f"{name}: no sweep, file or folder, and no hub name")

    def source(revision: str | None) -> dict[str, Any]:
        return {"model": _model(name, revision, None, pickle)}

    if not revisions:
        return [Series(Path(name).name, name, {0: source(None)})]
    if len(revisions) == 1 and not re.search(r"\d", revisions[0]):
        return [Series(Path(name).name, name, {0: source(revisions[0])})]
    return [Series(Path(name).name, name, _by_step({r: source(r) for r in revisions}))]


def _by_step(sources: dict[str, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    steps: dict[int, str] = {}
    for name in sources:
        other = steps.setdefault(step(name), name)
        if other != name:
            raise BadInput(f"{name} and {other} are both named by step {step(name)}")
    return {at: sources[steps[at]] for at in sorted(steps)}


def _model(
    name: str, revision: str | None = None, gguf: str | None = None, pickle: bool = False
) -> dict[str, Any]:
    return {"pretrained": name, "revision": revision, "gguf_file": gguf, "pickle": pickle}


def _source(path: Path, tensor: str | None, pickle: bool) -> dict[str, Any]:
    """Of one checkpoint on this machine."""
    path = path.resolve()
    if path.is_dir():
        return {"model": _model(str(path), pickle=pickle)}
    if path.suffix == ".gguf":
        return {"model": _model(str(path.parent), gguf=path.name)}
    if path.suffix in tensors.MATRICES:
        return {"matrix": str(path), "tensor": tensor}
    known = ", ".join((".gguf", *tensors.MATRICES))
    raise BadInput(f"{path}: neither a folder nor a {known} file")


def _plain_name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else path.stem


def _folder(folder: Path, tensor: str | None, pickle: bool) -> Series:
    """A folder whose folders or files are the checkpoints of one model."""
    if not folder.is_dir():
        raise BadInput(f"--checkpoints: {folder}: no such folder")
    kinds = (".gguf", *tensors.MATRICES)
    inside = [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
        and re.search(r"\d", path.name)
        and (path.is_dir() or path.suffix in kinds)
    ]
    if not inside:
        raise BadInput(
            f"--checkpoints: {folder} holds no checkpoints; folders or files named by their step "
            "are expected, such as step1000"
        )
    sources = _by_step({path.name: _source(path, tensor, pickle) for path in inside})
    if len({"matrix" in source for source in sources.values()}) > 1:
        raise BadInput(f"--checkpoints: {folder} holds both models and bare matrices")
    return Series(folder.resolve().name, str(folder.resolve()), sources)


def _sweep(directory: Path, only: str | None = None) -> list[Series]:
    """Every pretrained trial's kept weights, and its last."""
    found = []
    for id, entry in ledger.read(directory).items():
        trial, folder = entry["trial"], directory.resolve() / "trials" / id
        if trial["kind"] != "pretrain" or (only and id != only):
            continue
        t = trial["train"]
        steps = schedule.steps(t["tokens"], t["batch"], t["sequence"])
        places = {int(p.name.split("-")[1]): p for p in sorted(folder.glob("weights/step-*"))}
        if (folder / "model").is_dir():
            places[steps] = folder / "model"
        sources = {at: {"trial": trial, "weights": str(p)} for at, p in sorted(places.items())}
        if sources:
            found.append(Series(trial["name"], id, sources, trial))
    if not found:
        raise BadInput(
            f"{only or directory}: no weights here yet; a trial leaves them at its end, and along "
            "the way with keep_weights: true in the grid"
        )
    return found


def tokenizer(series: Series) -> str:
    """What its text is made into tokens by: of the last checkpoint that has one. Raises BadInput
    where none has."""

    def name(source: dict[str, Any]) -> str:
        found = source["weights"] if "weights" in source else pretrained.tokenizer(source["model"])
        corpus.load_tokenizer(found)
        return found

    try:
        return series.ask(name)
    except BadInput as error:
        raise BadInput(f"{error}; give one with --tokenizer") from None


def fingerprint(source: dict[str, Any]) -> str:
    """What tells whether a checkpoint is still the same: of files their sizes and times, of a hub's
    the revision's name."""
    place = source.get("weights") or source.get("matrix") or source["model"]["pretrained"]
    path = Path(place)
    if "model" in source and source["model"]["gguf_file"]:
        path = path / source["model"]["gguf_file"]
    if not path.exists():
        return json.dumps(source["model"])
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return json.dumps([[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files])
