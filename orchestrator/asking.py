"""A new grid from four answers: sizes, head ranks, corpus and budget.

An answer is judged by loading the grid that it would make.
"""

import functools
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from analysis import atomic
from analysis.errors import BadInput
from orchestrator import grid, plan
from orchestrator.grid import Grid
from orchestrator.plan import Plan

DEFAULTS = {
    "size": "nano-16,nano-32,nano-64",
    "rank": "4,8,16,32,full",
    "corpus": "sotu",
    "budget": "400k",
}
QUESTIONS = {
    "size": "Sizes (nano-4 to nano-256, pythia-14m to pythia-12b)",
    "rank": "Head ranks (numbers, full)",
    "corpus": "Corpus (a package, a file or glob of .txt, .jsonl or .parquet, {hub: NAME})",
    "budget": "Budget (tokens of a trial: 400k, 2M; or time for all: 10 min, 2 h)",
}
LETTERS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}
UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
STEP = 16 * 128  # tokens
FEWEST = 20  # steps that a budget of time must allow

TEXT = """\
# What a grid may say: README.md. Any field may be a list and is then an axis; the grid is their
# product.
#   lmsat plan --grid {file}     what it will cost
#   lmsat sweep --grid {file}    run it; the same again goes on where it stopped
name: {name}
corpus: {corpus}
tokenizer: {{train_bpe: 4096}}    # entries, made for the corpus; or a tokenizer.json, a hub name
model:
  size: {size}
head:
  rank: {rank}    # r of W = A B; a head has no rank above the model's d
seed: 0    # [0, 1, 2] trains all of it three times: how much is chance?
train:
  tokens: {tokens:_}    # of each trial
  batch: 16    # sequences a step
  sequence: 128    # tokens a sequence
  # lr: 1e-3    # at its peak; by default that of the model's size
probes: {{count: 8}}    # how often heads and hidden states are measured along training
# resources: {{workers: 1, cpus: 1, gpus: 1}}    # of one trial; as many run at once as fit
"""

Prompt = Callable[[str, str, Callable[[str], str]], str]


@dataclass(frozen=True)
class New:
    """A grid that was written."""

    grid: Grid
    plan: Plan | None
    unfit: str
    """Why there is no plan: it can never run on this machine."""


def place(name: str, force: bool) -> Path:
    """The file of a grid of that name. Raises BadInput where there is one already."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else Path(f"{name}.yaml")
    grid.check_name("NAME", file.stem)
    if not file.parent.is_dir():
        raise BadInput(f"NAME: {file.parent}: no such folder")
    if file.exists() and not force:
        raise BadInput(f"{file} is there already; give another NAME, or --force")
    return file


def write(file: Path, given: dict[str, str], prompt: Prompt | None, cache: Path) -> New:
    """Write the grid of these answers to `file`. `prompt(question, default, check)` asks for the
    others, anew while `check` raises BadInput; None: nobody is there, and defaults are taken."""
    answers = dict(DEFAULTS)

    def take(name: str, answer: str) -> str:
        """The answer, if a grid can be made with it and those before it."""
        try:
            _tokens(file, {**answers, name: answer}, cache)
        except BadInput as error:
            said = str(error).removeprefix(f"--{name}: ")
            raise BadInput(f"--{name}: {said}") from None
        answers[name] = answer
        return answer

    for name, answer in given.items():
        take(name, answer)
    for name, question in QUESTIONS.items():
        if prompt and name not in given:
            prompt(question, DEFAULTS[name], functools.partial(take, name))
    written = _text(file, answers, _tokens(file, answers, cache))
    made = _load(file, written)
    planned, unfit = None, ""
    try:
        planned = plan.of(made.trials, cache)
    except BadInput as error:
        unfit = str(error)
    atomic.write_text(file, written)
    return New(made, planned, unfit)


def _tokens(file: Path, answers: dict[str, str], cache: Path) -> int:
    """Of each trial, as the budget says or allows. Raises BadInput where these answers make no
    grid."""
    budget = answers["budget"].strip()
    if found := re.fullmatch(r"([\d._]*\d[\d._]*(?:e\d+)?) ?([kMGBT]?)(?: ?tokens)?", budget):
        try:
            tokens = int(float(found[1]) * LETTERS[found[2]])
        except ValueError:
            raise BadInput(f"--budget: {found[1]!r} is no number") from None
        _load(file, _text(file, answers, tokens))
        return tokens
    if not (found := re.fullmatch(r"(\d+\.?\d*) ?(s|min|h|d)", budget)):
        raise BadInput(
            f"--budget: tokens such as 400k or 2M, or time such as 10 min or 2 h, not {budget!r}"
        )
    few, many = FEWEST * STEP, 100 * FEWEST * STEP
    first, second = (
        3600 * plan.of(_load(file, _text(file, answers, tokens)).trials, cache).hours
        for tokens in (few, many)
    )
    rest = float(found[1]) * UNITS[found[2]] - first
    if rest < 0:
        least = round(first) + 1
        raise BadInput(f"--budget: {budget} is too short: {FEWEST} steps a trial take {least} s")
    return _round(few + rest / (second - first) * (many - few))


def _round(tokens: float) -> int:
    """Down to two digits."""
    unit = 10 ** max(0, len(str(int(tokens))) - 2)
    return int(tokens) // unit * unit


def _text(file: Path, answers: dict[str, str], tokens: int) -> str:
    return TEXT.format(
        file=file,
        name=file.stem,
        corpus=_flow(_corpus(file, answers["corpus"])),
        size=_list(answers["size"]),
        rank=_list(answers["rank"]),
        tokens=tokens,
    )


def _corpus(file: Path, answer: str) -> dict[str, Any]:
    """A grid's `corpus`: as it is in YAML, or a file, or else a package."""
    try:
        read = yaml.safe_load(answer)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):
        read = None
    if isinstance(read, dict):
        return read
    if not Path(answer).exists() and not any(c in answer for c in "/*."):
        return {"package": answer}
    # A grid's paths are relative to its file, the answer's to where it was given.
    here = "://" in answer or file.absolute().parent == Path.cwd()
    return {"files": answer if here else str(Path(answer).absolute())}


def _list(answer: str) -> str:
    words = [word for word in re.split(r"[\s,\[\]]+", answer) if word]
    return _flow([int(word) if word.isdecimal() else word for word in words])


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()


def _load(file: Path, written: str) -> Grid:
    """As it will be read from `file`, which need not be there yet. Raises BadInput."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=".", suffix=".yaml") as beside:
        beside.write(written)
        beside.flush()
        try:
            return grid.load(Path(beside.name))
        except BadInput as error:
            raise BadInput(str(error).removeprefix(f"{beside.name}: ")) from None
