"""Which trials run together because they share work: all heads of one frozen backbone."""

import json
from typing import Any

_SHARED = ("kind", "model", "text", "deepspeed", "resources", "probes", "checkpoints", "features")
_SHARED_TRAIN = ("tokens", "batch", "sequence", "precision")


def by_key(trials: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Trials that may share a pass, in the grid's order; a `pretrain` trial shares with none."""
    found: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        facts = [trial[k] for k in _SHARED] + [trial["train"][k] for k in _SHARED_TRAIN]
        key = json.dumps(facts) if trial["kind"] == "rankfit" else trial["id"]
        found.setdefault(key, []).append(trial)
    return found


def split(sizes: dict[str, int], room: int) -> list[list[str]]:
    """Trials (id -> bytes) in as few packs of at most `room` bytes as first fit finds, largest
    first; one too large for any is alone in its own."""
    packs: list[list[str]] = []
    left: list[int] = []
    for id in sorted(sizes, key=lambda i: -sizes[i]):
        at = next((i for i, free in enumerate(left) if free >= sizes[id]), len(packs))
        if at == len(packs):
            packs.append([])
            left.append(room)
        packs[at].append(id)
        left[at] -= sizes[id]
    return packs
