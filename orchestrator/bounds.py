"""A model's own head cut to rank r: what that costs on held-out text, and what theory allows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from analysis import bottleneck
from analysis.bottleneck import ALWAYS, MINIMISER
from analysis.errors import BadInput
from orchestrator import probe, series
from orchestrator.series import Series
from orchestrator.terminal import print_table, short
from trainables import corpus, frozen, heads, pretrained
from trainables.evaluation import parts
from trainables.features import Features

TOKENS = 5000  # a minute of one core at V = 50k and d = 576
BATCH = 8  # sequences that go through the model at once


@dataclass(frozen=True)
class Bounded:
    name: str
    label: str
    """The same for a file's name."""
    loss: float
    """Of the model's own head, whole, on the same tokens; in nats, as all is."""
    vocabulary: int
    d: int
    tokens: int
    table: pl.DataFrame
    """Of bottleneck.bounds."""


def find(name: str, revision: str | None, out: Path, pickle: bool) -> Series:
    """The one model of that name, as `lmsat probe` finds it. Raises BadInput where it is none, or
    several."""
    found = series.resolve((name,), (revision,) if revision else (), (), out, None, pickle)
    if len(found) > 1:
        sweep = Path(name) if Path(name).is_dir() else out / name
        one = sweep / "trials" / found[0].identity
        raise BadInput(f"{name}: {len(found)} models; give one of them, such as {one}")
    return found[0]


def run(
    one: Series,
    source: dict[str, Any] | None,
    tokenizer: str | None,
    tokens: int | None,
    sequence: int | None,
    cuts: list[int] | None,
    cache: Path,
    progress: corpus.Progress,
) -> Bounded:
    """The last checkpoint of a series; what is None is chosen by the model (`usual` cuts) or as
    `lmsat probe` does. Raises BadInput where the model has no body or no linear head, or the
    ranks or tokens are not to be had."""
    if one.bare:
        raise BadInput(f"{one.name}: a matrix alone; its body is needed, for hidden states")
    text = probe.text(one, source, tokenizer, sequence)
    shards = corpus.prepare(text["corpus"], text["tokenizer"], text["text"], cache, progress)
    wanted = probe.tokens(tokens, TOKENS, text["sequence"], shards)
    model = _model(one.sources[max(one.sources)])
    progress(f"loading {one.name}", 0)
    backbone = frozen.load(model, "fp32", torch.device("cpu"))
    vocabulary, d = backbone.weight.shape
    if shards.vocabulary > vocabulary:
        raise BadInput(
            f"--tokenizer: it has {shards.vocabulary} tokens, more than the {vocabulary} of "
            f"{one.name}"
        )
    hidden, labels = _seen(Features(backbone, shards, text["sequence"], None), wanted)
    progress(f"cutting {one.name}", 0)
    chosen = cuts or usual(one.trial["head"]["rank"] or d if one.trial else d)
    table = bottleneck.bounds(backbone.weight, hidden, labels, chosen, backbone.bias)
    with torch.no_grad():
        loss = heads.Fixed(backbone.weight, None, backbone.bias)(hidden, labels).item()
    return Bounded(one.name, pretrained.name(model), loss, vocabulary, d, len(labels), table)


def usual(rank: int) -> list[int]:
    """Powers of two below a head's rank: from 8 on, or from 1 of one of rank 64 or less."""
    least = 1 if rank <= 64 else 8
    return [2**i for i in range(rank.bit_length()) if least <= 2**i < rank] or [0]


def _model(source: dict[str, Any]) -> dict[str, Any]:
    if "model" in source:
        return dict(source["model"])
    return {"pretrained": source["weights"], "revision": None, "gguf_file": None}


def _seen(states: Features, tokens: int) -> tuple[Tensor, Tensor]:
    """Hidden states (n x d) and the tokens that come next (n)."""
    sample = corpus.sample(states.text.shard("held_out"), states.sequence, tokens)
    seen = [states.both("held_out", some) for some in parts(sample, BATCH)]
    hidden, labels = (torch.cat(each).flatten(0, 1) for each in zip(*seen, strict=True))
    return hidden, labels


def as_json(found: Bounded) -> dict[str, Any]:
    return {
        "model": found.name,
        "loss": found.loss,
        "vocabulary": found.vocabulary,
        "d": found.d,
        "tokens": found.tokens,
        "bounds": found.table.to_dicts(),
        "looseness": bottleneck.looseness(found.table).to_dicts(),
        "constants": bottleneck.constants(found.table).to_dicts(),
    }


HEADINGS = {
    "slope": "slope",
    "gap": "gap",
    "sharp": "sharp",
    "gradient": "gradient",
    "first_order": "length",
    "first_order_sigma": "sigma",
    "theorem": "theorem",
    "second_order": "square*",
    "logit_matrix": "logits*",
}
METHODS = {
    "plain": "truncated SVD",
    "weighted": "truncation weighted by the hidden states' second moment",
}


def print_bounds(found: Bounded, files: list[Path]) -> None:
    """Gap and bounds, how loose they are, and the theorem's constant."""
    print(
        f"{found.name}: loss {found.loss:.3f} nats on {found.tokens} held-out tokens, "
        f"V = {found.vocabulary}, d = {found.d}"
    )
    _print(found.table, list(HEADINGS), "What a cut costs and what it can cost, in nats:")
    bounds = [*ALWAYS, *MINIMISER]
    _print(bottleneck.looseness(found.table), bounds, "How loose: bound over gap,")
    print("* at an unregularised minimiser of this text only; no bound of others, as under 1 shows")
    rows = [
        (row["method"], *("-" if v is None else short(v) for v in list(row.values())[1:]))
        for row in bottleneck.constants(found.table).to_dicts()
    ]
    print_table(
        ("", "smallest", "least squares", "proved", "power"),
        rows,
        title="\nTheorem 5.3, gap <= c tail: the smallest c that holds here, that of\n"
        "least squares, the one proved; and the power of the tail that the gap goes with",
    )
    for file in files:
        print(f"written   {file}")


def _print(table: pl.DataFrame, columns: list[str], title: str) -> None:
    """A table for each method."""
    for (method,), rows in table.group_by("method", maintain_order=True):
        print_table(
            ("r", *(HEADINGS[c] for c in columns)),
            [(str(row["rank"]), *(short(row[c]) for c in columns)) for row in rows.to_dicts()],
            title=f"\n{title} {METHODS[str(method)]}",
        )
