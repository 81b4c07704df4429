"""How many dimensions corpora need, each with each tokenizer: `lmsat dimension`.

    runs/<name>/dimension.json ledger/<series>.json records/ report/

A series is one estimate of one corpus's n-grams; its steps are samples, of so many tokens, up to
the whole. Ray counts parts, in a folder that is gone in the end, and measures samples.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pydantic import ValidationError

from analysis import atomic, dimension_figures, records, werror
from analysis.errors import BadInput
from orchestrator import cluster, lease, ledger, measuring, schema, tracking
from orchestrator.measuring import Measuring
from orchestrator.progress import Bar
from orchestrator.tracker import Tracker
from trainables import corpus, dimension
from trainables.dimension import SOFTMAX

PART = 2**22  # tokens counted at a time
LEAST = 10_000  # tokens of the smallest sample
HARDWARE = ("corpus", "tokenizer", "shown")  # what they come to is in `text`


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to measure, and how."""

    corpora: list[dict[str, Any]]
    """As in a grid."""
    tokenizers: list[int | str]
    n: list[int]
    estimates: list[str]
    samples: int
    """Each half as large as the next."""
    least: int
    smoothing: float
    leading: int | None
    softmax_n: int
    ranks: list[int]
    contexts: int
    cpus: int
    """Of one worker. 0: as many as leave each enough memory."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A corpus under a tokenizer."""

    name: str
    tokenizer_name: str
    settings: dict[str, Any]
    """corpus, tokenizer, text: what makes it."""
    vocabulary: int
    tokens: int
    longest: int
    """Tokens of a document."""

    def samples(self, count: int) -> list[int]:
        """Tokens of each, rising up to all."""
        halves = (self.tokens >> i for i in range(count))
        return sorted({self.tokens, *(some for some in halves if some >= LEAST)})


def tokenizer(given: str) -> int | str:
    """From --tokenizer: a number of entries to train; or a file, folder or hub name."""
    if not given.isdigit():
        return str(Path(given).resolve()) if Path(given).exists() else given
    try:
        return schema.Bpe.model_validate({"train_bpe": given}).train_bpe
    except ValidationError as error:
        raise BadInput(f"--tokenizer: {given}: {error.errors()[0]['msg']}") from None


def run(
    wanted: Wanted,
    directory: Path,
    tracking_uri: str | None,
    cache: Path,
    spill: Path | None,
    bar: Bar,
    paper: bool,
) -> dict[str, str]:
    """Measure what has not been measured; the samples that failed, each with its reason.

    Raises BadInput where the text or settings cannot be used, or counts not be kept in `spill`, a
    folder (by default in the cache); before anything is written in `directory`.
    """
    directory, cache = directory.resolve(), cache.resolve()
    measuring.check_place(directory)
    uri = tracking.resolve(tracking_uri, directory.parent)
    cores = measuring.check_fits(cluster.look(bar), wanted.cpus)
    pairs = itertools.product(wanted.corpora, wanted.tokenizers)
    texts = [_text(source, tokenizer, cache, bar) for source, tokenizer in pairs]
    series = _all(texts, wanted)
    measuring.check_same(directory, series, HARDWARE)
    kept = {name: records.segments(directory, "trials", s["trial"]) for name, s in series.items()}
    left = [s for name, s in series.items() if not {*s["steps"]} <= kept[name]]
    with _folder(spill, cache) as folder, cluster.on_ray(bar) if left else nullcontext():
        parts, error = _count(left, Path(folder), cache, bar)
        if error:
            return {"counting n-grams": error}
        ledger.make(directory, directory)
        with lease.hold(directory):
            atomic.write_text(directory / "dimension.json", json.dumps(dataclasses.asdict(wanted)))
            bar.preparing("opening MLflow")
            note = f"Dimensions of {len(texts)} texts; records in `{directory}`"
            tracker = Tracker(uri, directory, bar, note)
            measured = Measuring(directory, tracker, bar)
            try:
                items = []
                for name, settings in series.items():
                    marks = dict.fromkeys(settings["steps"], settings["trial"])
                    for step in measured.add(name, settings, marks, settings["shown"]):
                        made = parts[_counted(settings)]
                        some = [str(folder) for end, folder in made.items() if end <= step]
                        items.append({**settings, "step": step, "parts": some})
                # Large ones first: they take longest, and say at once what cannot be.
                items.sort(key=lambda item: -item["step"])
                bar.started(measured.steps, measured.steps - len(items), "samples")
                work = functools.partial(dimension.measure, directory=directory)
                cpus = wanted.cpus or _cpus(items, cores)
                measured.go(work, _nothing, _nothing, items, cpus, 0)
            finally:
                measured.finish()
                dimension_figures.draw(directory, paper)
                tracker.close()
    return measured.failed


def _text(source: dict[str, Any], tokenizer: int | str, cache: Path, bar: Bar) -> Text:
    identity = corpus.identity(source, tokenizer)
    text = corpus.prepare(source, tokenizer, identity, cache, bar.preparing)
    order = dimension.documents(text)
    if isinstance(tokenizer, int):
        short = f"BPE-{tokenizer}"
    else:
        path = Path(tokenizer)
        short = path.parent.name if path.name == "tokenizer.json" else path.stem
    where = source["package"] or source["hub"] or Path(str(source["files"])).stem
    return Text(
        where,
        short,
        {"corpus": source, "tokenizer": tokenizer, "text": identity},
        text.vocabulary,
        sum(text.tokens.values()),
        int((order[:, 2] - order[:, 1]).max()),
    )


def _all(texts: list[Text], wanted: Wanted) -> dict[str, dict[str, Any]]:
    """By name what dimension.measure takes, but for step and parts."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        for one in _series(text, wanted):
            name = one["shown"]["name"]
            if name in found:
                raise BadInput(f"{name}: stands twice; measure them one by one")
            if text.longest < one["n"]:
                raise BadInput(
                    f"--n: no document of {text.name} has {one['n']} tokens, the longest has "
                    f"{text.longest}; give longer text, or smaller n"
                )
            found[name] = one
    return found


def _series(text: Text, wanted: Wanted) -> list[dict[str, Any]]:
    """Of each estimate what changes it, and nothing else."""
    own: dict[str, Any]
    found = []
    spectra = [estimate for estimate in wanted.estimates if estimate != SOFTMAX]
    for n, estimate in itertools.product(wanted.n, spectra):
        own = {
            "least": wanted.least if estimate == "repeated" else None,
            "smoothing": wanted.smoothing if estimate == "additive" else None,
            "leading": wanted.leading,
        }
        found.append(_one(text, n, estimate, own, text.samples(wanted.samples)))
    if SOFTMAX in wanted.estimates:
        own = {"ranks": wanted.ranks, "contexts": wanted.contexts}
        found.append(_one(text, wanted.softmax_n, SOFTMAX, own, [text.tokens]))
    return found


def _one(
    text: Text, n: int, estimate: str, own: dict[str, Any], steps: list[int]
) -> dict[str, Any]:
    facts = {"text": text.settings["text"], "n": n, "estimate": estimate, **own}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    shown = {
        "name": f"{text.name} {text.tokenizer_name} n={n} {estimate}",
        "corpus": text.name,
        "tokenizer": text.tokenizer_name,
        "n": n,
        "estimate": estimate,
        "vocabulary": text.vocabulary,
    }
    return {**text.settings, **facts, "trial": digest, "steps": steps, "shown": shown}


def _folder(spill: Path | None, cache: Path) -> tempfile.TemporaryDirectory[str]:
    where = (spill or cache / "counts").resolve()
    try:
        if not spill:
            where.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="lmsat-", dir=where)
    except OSError as error:
        raise BadInput(f"--spill: {where}: {error.strerror}; give another folder") from None


def _counted(settings: dict[str, Any]) -> str:
    """What makes its counts."""
    return f"{corpus.key(settings['text'])}-{settings['n']}"


def _count(
    left: list[dict[str, Any]], folder: Path, cache: Path, bar: Bar
) -> tuple[dict[str, dict[int, Path]], str | None]:
    """Of each text and n, the folder of each part's counts by the part's end; and what went wrong,
    if anything."""
    steps: dict[str, set[int]] = {}
    shared = {}
    for one in left:
        steps.setdefault(key := _counted(one), {0}).update(one["steps"])
        shared[key] = {k: one[k] for k in ("corpus", "tokenizer", "text", "n")}
    parts: dict[str, dict[int, Path]] = {key: {} for key in steps}
    items = []
    for key, some in steps.items():
        for low, high in itertools.pairwise(sorted(some)):
            ends = np.linspace(low, high, math.ceil((high - low) / PART) + 1).astype(int).tolist()
            for start, stop in itertools.pairwise(ends):
                parts[key][stop] = kept = folder / f"{key}-{stop}"
                items.append({**shared[key], "start": start, "stop": stop, "folder": str(kept)})
    bar.started(len(items), 0, "parts")
    work = functools.partial(dimension.count, cache=cache)
    for _, error in cluster.fan_out(work, _nothing, items, 1, 0, bar):
        bar.ended("counting n-grams", error)
        if error:
            return parts, error
    return parts, None


def _cpus(items: list[dict[str, Any]], cores: int) -> int:
    """Of one worker, so that all have the memory that they need at once."""
    need = 0
    for item in items:
        V, leading = item["shown"]["vocabulary"], item.get("leading") or werror.LEADING
        columns = 2 * V if werror.DENSE >= V else 5 * leading
        need = max(need, 8 * V * columns + 60 * item["step"])
    room = psutil.virtual_memory().available // max(1, need)
    return max(1, cores // max(1, min(len(items), room)))


def _nothing(item: Any) -> None:
    pass
