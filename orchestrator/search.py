"""What `rankfit` adds to a grid: baselines that nobody trains, and more learning rates where the
best lies on the edge of those tried."""

import math
from collections.abc import Iterator
from typing import Any

from orchestrator import packs
from trainables import pretrained, zoo

# Learning rates tried where a grid names none, by the head's start; the paper's for normal.
RATES = {
    "scaled": (3e-3, 1e-2, 3e-2),
    "svd": (1e-4, 3e-4, 1e-3),
    "normal": (2e-3, 5e-3, 1e-2, 2e-2),
}


def completed(trials: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What every figure of a frozen backbone needs beside its low-rank heads, not yet named or
    numbered: factored heads of rank d (or gaps mix rank with convergence), the model's own head,
    and that head's truncated SVD at each rank, plain and weighted."""
    for shared in packs.by_key(trials).values():
        d = pretrained.shape(shared[0]["model"], shared[0]["train"]["sequence"]).d
        unused = dict.fromkeys(shared[0]["head"])
        ranks = sorted({t["head"]["rank"] for t in shared if (t["head"]["rank"] or d) < d})
        for trial in shared:
            if trial["head"]["kind"] == "linear" and trial["head"]["rank"]:
                yield {**trial, "head": {**trial["head"], "rank": d}}
        for kind, rank in [
            ("own", None),
            *((kind, rank) for kind in ("svd", "svd-weighted") for rank in ranks),
        ]:
            yield {**shared[0], "seed": None, "head": {**unused, "kind": kind, "rank": rank}}


def extended(
    trials: list[dict[str, Any]], losses: dict[str, float]
) -> Iterator[tuple[dict[str, Any], float]]:
    """(trial, learning rate) to try next: beyond the edge where the best rate of a search lies.

    losses: selection loss of every finished trial, infinite where it diverged. Rates go on in the
    ratio of the last two, at most `extend` times at either end.
    """
    searches: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if trial["kind"] == "rankfit" and trial["head"]["kind"] not in zoo.BASELINES:
            searches.setdefault(trial["search"], []).append(trial)
    for found in searches.values():
        found.sort(key=lambda t: t["train"]["lr"])
        tried = [losses.get(t["id"], math.nan) for t in found]
        if len(found) < 2 or any(map(math.isnan, tried)) or min(tried) == math.inf:
            continue
        best = tried.index(min(tried))
        for side, edge, inner in ((-1, 0, 1), (1, len(found) - 1, len(found) - 2)):
            beyond = sum(t["beyond"] == side for t in found)
            if best == edge and beyond < found[edge]["extend"]:
                rate = found[edge]["train"]["lr"] ** 2 / found[inner]["train"]["lr"]
                yield {**found[edge], "beyond": side}, float(f"{rate:.3g}")
