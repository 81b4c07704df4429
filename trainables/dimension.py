"""How many dimensions a corpus needs: its n-grams counted part by part, measured sample by sample.

A sample is the first so many tokens of all documents, training and held-out text alike, in one
random order: the smaller ones are in the larger. Parts are counted by themselves, and those of a
sample merged, which is exact: an n-gram lies in one document, and in the part of its last token.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from analysis import kneserney, ngrams, softmaxrank, werror
from analysis.dimensions import LEVELS
from analysis.ngrams import Counts
from trainables import corpus
from trainables.corpus import Corpus
from trainables.recorder import Recorder

SOFTMAX = "softmax"
"""The estimate in nats."""
DIMENSIONS = (500, 1000, 2000, 4000, 8000, 12000)
"""At which MLflow shows W-error."""
TOLERANCES = (0.02, 0.05, 0.1)
"""Nats per token for which a rank is told."""
POINTS = 500  # of a curve of W-error, where it is estimated

Documents = npt.NDArray[np.int64]


def documents(text: Corpus) -> Documents:
    """(documents x 3): split (0 training, 1 held out), first token and end, in random order. A
    tokenizer without an end of text makes one document of a split."""
    end = corpus.end_of(Tokenizer.from_file(str(text.tokenizer)))
    found = []
    for split, name in enumerate(text.tokens):
        shard = text.shard(name)
        stops = np.flatnonzero(shard == end) + 1 if end is not None else np.array([len(shard)])
        starts = np.concatenate([[0], stops[:-1]])
        found.append(np.stack([np.full(len(stops), split), starts, stops], axis=1))
    return np.random.default_rng(0).permutation(np.concatenate(found))


def chunks(text: Corpus, order: Documents, start: int, stop: int, n: int) -> Iterator[Any]:
    """Token ids, document by document, of the n-grams whose last token is one of tokens `start` to
    `stop` of the documents in this order."""
    shards = [text.shard(name) for name in text.tokens]
    ends = np.cumsum(order[:, 2] - order[:, 1])
    for i in range(int(np.searchsorted(ends, start, "right")), len(order)):
        split, first, last = order[i]
        before = ends[i] - (last - first)
        if before >= stop:
            return
        low = max(first, first + start - before - (n - 1))
        yield shards[split][low : min(last, first + stop - before)]


def count(task: dict[str, Any], cache: Path) -> None:
    """Count the n-grams of one part and keep them in the task's folder."""
    text = _text(task, cache)
    some = chunks(text, documents(text), task["start"], task["stop"], task["n"])
    ngrams.save(ngrams.count(some, task["n"], text.vocabulary), Path(task["folder"]))


def measure(task: dict[str, Any], directory: Path) -> None:
    """Measure one sample by one estimate and write its records; the row in `trials` last, which
    says that they are whole. Raises BadInput where too little was counted."""
    began = time.perf_counter()
    counts = ngrams.merge([ngrams.load(Path(folder)) for folder in task["parts"]])
    recorder = Recorder(directory, task["trial"], 0, 1, lambda _: None, True)
    step = task["step"]
    totals = np.add.reduceat(counts.counts, counts.starts[:-1])
    for metric, value in (
        ("contexts", len(totals)),
        ("ngrams", len(counts.tokens)),
        ("seen_once", float((totals == 1).mean())),
    ):
        recorder.scalar(step, metric, value, "corpus")
    if task["estimate"] == SOFTMAX:
        _softmax(task, counts, recorder)
    else:
        _spectrum(task, counts, recorder)
    recorder.scalar(step, "seconds", time.perf_counter() - began, "corpus")
    recorder.flush(step)
    kept = ("name", "corpus", "tokenizer", "n", "estimate", "vocabulary")
    row = {key: task["shown"][key] for key in kept} | {"kind": "dimension", "tokens": step}
    recorder.row(row, "done", step)


def _spectrum(task: dict[str, Any], counts: Counts, recorder: Recorder) -> None:
    found = spectrum(counts, task["estimate"], task["least"], task["smoothing"], task["leading"])
    known, V, step = len(found.values), counts.vocabulary, task["step"]
    # Every d that is exact; of the others as many as a curve needs.
    rest = np.geomspace(max(1, known), V, POINTS).round().astype(int)
    at = np.union1d(np.arange(1, known + 1), rest)
    errors = dict(zip(at.tolist(), werror.w_error(found, at).tolist(), strict=True))
    for d, error in errors.items():
        recorder.add("w_errors", step, {"d": d, "w_error": error, "exact": d <= known})
    told = [d for d in DIMENSIONS if d <= V]
    for d, error in zip(told, werror.w_error(found, told).tolist(), strict=True):
        recorder.scalar(step, f"w_error_{d:05d}", error, "corpus")
    for name, share in LEVELS.items():
        recorder.scalar(step, name, werror.reaching(found, share), "corpus")
    recorder.scalar(step, "rows", found.rows, "corpus")
    recorder.scalar(step, "residual", found.residual / found.values[0], "corpus")
    recorder.scalar(step, "exact_to", V if found.exact else known, "corpus")


def spectrum(
    counts: Counts,
    estimate: str,
    least: int | None,
    smoothing: float | None,
    leading: int | None,
) -> werror.Spectrum:
    """By kneser-ney or one of werror's weights, or else by rows. `least`: times that contexts are
    seen; `smoothing`: the count added; `leading`: singular values that are enough."""
    dimensions = leading and min(leading, counts.vocabulary)
    if estimate == "kneser-ney":
        return kneserney.spectrum(counts, dimensions=dimensions)
    return werror.spectrum(
        counts,
        weights=estimate if estimate in werror.WEIGHTS else "rows",
        least=least or 1,
        smoothing=smoothing or 0.0,
        dimensions=dimensions,
    )


def _softmax(task: dict[str, Any], counts: Counts, recorder: Recorder) -> None:
    ranks = [rank for rank in task["ranks"] if rank <= counts.vocabulary]
    fits, step = softmaxrank.fit(counts, ranks, contexts=task["contexts"]), task["step"]
    recorder.scalar(step, "share", fits.share, "corpus")
    for one in (fits.unigram, *fits.ranks, fits.saturated):
        saturated = one is fits.saturated
        recorder.add("softmax", step, {
            "rank": None if saturated else one.rank, "ridge": one.ridge, "train": one.train,
            "loss": one.held_out, "stderr": one.stderr,
        })  # fmt: skip
        name = "loss_smoothed" if saturated else f"loss_rank_{one.rank:05d}"
        recorder.scalar(step, name, one.held_out, "corpus", one.stderr)
    for tolerance in TOLERANCES:
        required = softmaxrank.required(fits, tolerance)
        recorder.add("required", step, asdict(required))
        recorder.scalar(step, f"required_rank_{tolerance:g}", required.rank, "corpus")


def _text(task: dict[str, Any], cache: Path) -> Corpus:
    return corpus.prepare(task["corpus"], task["tokenizer"], task["text"], cache)
