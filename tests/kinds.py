"""Records of every kind, of worlds whose answers are known."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from analysis import records

E, A, ALPHA = 2.0, 60.0, 0.3
WIDTHS = (16, 32, 64, 128, 256, 512)
SMALL, SHORT = WIDTHS[:2], 0.08  # that fall short of the law by so much
STEPS = [0, 1, *range(100, 2001, 100)]
RISE, TURN = 0.3, 1000  # nats that the smallest model loses after that step
BLOCKS = 40
GAPS = {4: 0.4, 8: 0.1}  # nats that such a head costs
TASK = "sciq/acc"


def params(d: int) -> int:
    return 12 * d * d * 2 + 2 * 1000 * d


def end(d: int) -> float:
    """Of a full head, at its best."""
    return (E + A / params(d) ** ALPHA) * (1 + SHORT * (d in SMALL))


def loss(d: int, rank: int | None, step: int) -> float:
    found = end(d) + GAPS.get(rank or d, 0.0) + 4 * math.exp(-step / 60)
    late = max(0, step - TURN) / (STEPS[-1] - TURN)
    return found + (RISE * late if d == WIDTHS[0] else 0.0)


def pretrain(sweep: Path, seeds: tuple[int, ...] = (0, 1), moved: float = 0.0) -> None:
    """Models of six widths with full heads, and of ranks 4, 8 and d. `moved`: nats, of all."""
    rng = np.random.default_rng(0)
    hard = 0.5 * rng.standard_normal(BLOCKS)
    hard -= hard.mean()
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in records.TABLES}
    for d in WIDTHS:
        for rank in (4, 8, d, None):
            for seed in seeds:
                name = f"nano-{d} r={rank or 'full'} s={seed}"
                id = name.replace(" ", "_")
                for table, rows in _trial(id, name, d, rank, seed, moved, hard, rng):
                    tables[table] += rows
    for table, rows in tables.items():
        records.write(sweep, table, "all", 0, rows)


def _trial(
    id: str, name: str, d: int, rank: int | None, seed: int, moved: float, hard: Any, rng: Any
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    scalars, blocks, spectra = [], [], []
    for step in STEPS:
        noise = 0.02 * rng.standard_normal(BLOCKS)
        each = loss(d, rank, step) + moved + hard + noise - noise.mean()
        key = {"trial": id, "step": step}
        scalar = {**key, "tokens": 1000 * step, "time": step, "stderr": None}
        out = {**scalar, "split": "held_out"}
        error = float(each.std(ddof=1) / BLOCKS**0.5)
        scalars += [
            {**out, "metric": "loss", "value": float(each.mean()), "stderr": error},
            {**out, "metric": "unigram_loss", "value": 6.6},
            {**scalar, "split": "", "metric": "singular_entropy", "value": 0.5 + step / 2000},
        ]
        scalars += [
            {**out, "metric": "anisotropy", "layer": layer, "value": 0.1 + 0.1 * layer % 1}
            for layer in (0, 1, -1)
        ]
        blocks += [{**key, "split": "held_out", "block": i, "loss": x} for i, x in enumerate(each)]
        sigma = np.exp(-np.arange(min(rank or d, 40)) / (5 + step / 100))
        spectra += [{**key, "matrix": "head", "index": i, "sigma": s} for i, s in enumerate(sigma)]
    head = "full" if rank is None else "low-rank"
    row = {
        "trial": id, "name": name, "kind": "pretrain", "size": f"nano-{d}", "head": head,
        "rank": rank, "seed": seed, "d": d, "vocabulary": 1000, "params": params(d),
        "params_without_embeddings": 24 * d * d, "tokens": 1000 * STEPS[-1], "status": "done",
        "step": STEPS[-1],
    }  # fmt: skip
    yield "scalars", scalars
    yield "blocks", blocks
    yield "spectra", spectra
    yield "trials", [row]


def probe(directory: Path) -> None:
    """One model of others, its task best in the middle."""
    row = {"trial": "p", "name": "pythia <script>alert(1)</script>", "kind": "probe", "d": 8}
    row |= {"params": 14_000_000, "status": "done", "step": 30, "head": "full"}
    records.write(directory, "trials", "p", 0, [row])
    scalars = []
    for step, task, entropy in ((10, 0.6, 0.3), (20, 0.8, 0.2), (30, 0.7, 2.0)):
        scalar = {"trial": "p", "step": step, "time": 0, "layer": None, "stderr": 0.01}
        scalars += [
            {**scalar, "split": "task", "metric": TASK, "value": task},
            {**scalar, "split": "", "metric": "singular_entropy", "value": entropy},
            {**scalar, "split": "held_out", "metric": "loss", "value": 3.0},
        ]
    records.write(directory, "scalars", "p", 0, scalars)


def dimension(directory: Path) -> None:
    """Counts of one text."""
    shown = {"corpus": "c", "tokenizer": "t", "n": 3, "vocabulary": 1000, "estimate": "paper"}
    row = {"trial": "n", "name": "c t paper", "kind": "dimension", **shown, "step": 50_000}
    records.write(directory, "trials", "n", 0, [{**row, "status": "done"}])
    key = {"trial": "n", "step": 50_000}
    errors = [{**key, "d": i, "w_error": 1 - i / 1000, "exact": True} for i in range(1, 1001)]
    records.write(directory, "w_errors", "n", 0, errors)
    scalar = {**key, "split": "corpus", "time": 0, "tokens": 50_000}
    records.write(directory, "scalars", "n", 0, [{**scalar, "metric": "halved", "value": 500.0}])


def rankfit(sweep: Path) -> None:
    """Heads on one frozen backbone, and its own head's spectrum."""
    from tests.analysis import test_ranks

    gaps = {4: 0.5, 8: 0.2, 16: 0.01, 32: 0.0}
    test_ranks.write(sweep, np.random.default_rng(0), gaps, [0, 1])
    own = [
        {"trial": "m_own", "step": 7, "matrix": "head", "index": i, "sigma": 1 / (1 + i)}
        for i in range(32)
    ]
    records.write(sweep, "spectra", "m_own", 7, own)


def every(folder: Path) -> list[Path]:
    """A directory of each kind."""
    pretrain(folder / "pretrain", (0,))
    others = (rankfit, probe, dimension)
    for make in others:
        make(folder / make.__name__)
    return [folder / "pretrain", *(folder / make.__name__ for make in others)]
