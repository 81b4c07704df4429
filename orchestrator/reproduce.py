"""Redo a paper: the commands that redo its figures, one after the other, then its claims beside
what was found.

Each step is a command that may be typed by itself; what is done already is not done again.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

from analysis import atomic, claims, evidence, report
from analysis.errors import BadInput, Failed
from analysis.webpage import Table
from orchestrator import grid, ledger

FIGURES = ("1a", "1b", "2", "3", "4", "5", "6", "7", "8", "9", "table-1")
EARLY = ("1a", "1b", "2", "3", "4", "5", "table-1")
SMALL = ("14m", "31m", "70m", "160m", "410m")
LARGE = (*SMALL, "1b", "1.4b", "2.8b", "6.9b", "12b")
TASKS = "lambada_openai,wikitext,sciq,arc_easy"  # of Table 1; StoryCloze must be asked for by hand


@dataclass(frozen=True)
class Step:
    figures: tuple[str, ...]
    command: tuple[str, ...]
    """What follows `lmsat`; {out} is where all of it goes."""
    name: str
    """Of the directory that it fills."""


def _pythia(sizes: Sequence[str], tokens: int) -> tuple[str, ...]:
    models = [f"EleutherAI/pythia-{size}" for size in sizes]
    text = "{hub: monology/pile-uncopyrighted, documents: 1000}"  # a tenth: 50k tokens and more
    return (
        "probe", *models, "--revisions", "step{5000..140000..5000}", "--corpus", text,
        "--tokens", str(tokens), "--tasks", TASKS, "--gpus", "1", "--delete",
    )  # fmt: skip


def _counts(*arguments: str) -> tuple[str, ...]:
    """Figure 7's estimate, and the one that noise does not add to."""
    return (
        "dimension", *arguments, "--estimate", "paper", "--estimate", "unbiased", "--samples", "1",
    )  # fmt: skip


SCALES: dict[str, tuple[Step, ...]] = {
    "nano": (
        Step(EARLY[:-1], ("sweep", "--grid", "godey2024-nano.yaml"), "godey2024-nano"),
        Step(
            ("6", "8", "9"),
            ("sweep", "--grid", "{out}/godey2024-nano-heads.yaml"),
            "godey2024-nano-heads",
        ),
        Step(
            ("7",),
            _counts("--tokenizer", "4096", "--tokenizer", "16384", "--leading", "2000"),
            "godey2024-nano-ngrams",
        ),
    ),
    "small": (
        Step(EARLY, _pythia(SMALL, 50_000), "godey2024-small-pythia"),
        Step(("6", "8", "9"), ("sweep", "--grid", "godey2024-small.yaml"), "godey2024-small"),
        Step(
            ("7",),
            _counts("--corpus", "{hub: stanfordnlp/imdb}", "--tokenizer", "EleutherAI/pythia-14m"),
            "godey2024-small-ngrams",
        ),
    ),
    "paper": (
        Step(EARLY, _pythia(LARGE, 50_000), "godey2024-paper-pythia"),
        Step(("6", "8", "9"), ("sweep", "--grid", "godey2024-paper.yaml"), "godey2024-paper"),
        Step(
            ("7",),
            _counts(
                "--corpus", "{hub: stanfordnlp/imdb}", "--corpus",
                "{hub: monology/pile-uncopyrighted, documents: 200_000}", "--tokenizer",
                "EleutherAI/pythia-14m",
            ),
            "godey2024-paper-ngrams",
        ),
    ),
}  # fmt: skip


def steps(scale: str, figure: str | None) -> list[Step]:
    """Those that a figure needs, or all; what they build on goes first."""
    found = [s for s in SCALES[scale] if figure is None or figure in s.figures]
    if not found:
        raise BadInput(f"--figure: {figure} is not redone at scale {scale}; leave it out")
    if scale == "nano" and any("heads" in s.name for s in found):
        first = SCALES["nano"][0]
        found = found if first in found else [first, *found]
    return found


def argv(step: Step, out: Path) -> list[str]:
    """What follows `lmsat`."""
    words = [word.replace("{out}", str(out)) for word in step.command]
    name = [] if step.command[0] == "sweep" else ["--name", step.name]
    return [*words, *name, "--out", str(out)]


def typed(step: Step, out: Path) -> str:
    """As one would type it."""
    return "lmsat " + shlex.join(argv(step, out))


def run(wanted: Sequence[Step], out: Path, said: Callable[[str], None]) -> dict[str, float]:
    """Every step, in seconds. Raises Failed where one fails; what is done stays done."""
    seconds = {}
    for step in wanted:
        if step.name == "godey2024-nano-heads":
            keep_heads(out)
        said(f"Figures {', '.join(step.figures)}: {typed(step, out)}")
        began = time.monotonic()
        words = [sys.executable, "-c", "from orchestrator.cli import main; main()"]
        code = subprocess.run([*words, *argv(step, out)], stdout=sys.stderr).returncode
        if code:
            raise Failed(f"{typed(step, out)}: ended with {code}; the same command goes on")
        seconds[step.name] = time.monotonic() - began
    return seconds


def redo(
    wanted: Sequence[Step], out: Path, said: Callable[[str], None]
) -> tuple[dict[str, Any], Path]:
    """Every step, then the report of all that there is; claims and seconds, and the page."""
    seconds = run(wanted, out, said)
    said("claims and report ...")
    directories = [(out / step.name).resolve() for step in wanted]
    known = evidence.gather(directories)
    found, made = claims.judge(known), report.make(known, paper=True)
    caption = "Each claim of Godey et al. 2024 beside what these records say."
    told = Table("The paper's claims", caption, claims.table(found))
    page = report.write(replace(made, tables=(told, *made.tables)), directories[0] / "report")[0]
    return {"claims": [asdict(claim) for claim in found], "seconds": seconds}, page


def print_claims(answer: dict[str, Any], page: Path) -> None:
    """A paragraph a claim: tables of sentences are not read."""
    for one in answer["claims"]:
        print(f"{one['figure']:>8}  {one['verdict'].upper()}: {one['says']}")
        print(fill(one["found"], 78, initial_indent=" " * 10, subsequent_indent=" " * 10))
    minutes = sum(answer["seconds"].values()) / 60
    print(f"\n{minutes:.1f} minutes\nreport    {page}")


def keep_heads(out: Path) -> None:
    """Write the grid of heads, on the backbone that was trained. Raises Failed without one."""
    entries = ledger.read(out / "godey2024-nano")
    ids = [id for id, entry in entries.items() if entry["trial"]["name"].startswith("nano-64")]
    if not ids:
        raise Failed(f"{out / 'godey2024-nano'}: has no trial of nano-64")
    text = grid.find("godey2024-nano-heads.yaml").read_text()
    backbone = (out / "godey2024-nano" / "trials" / ids[0] / "model").resolve()
    atomic.write_text(out / "godey2024-nano-heads.yaml", text.replace("BACKBONE", str(backbone)))
