"""Atomic, verified save and resume.

    checkpoints/step-000000120/{engine/…, generators-<rank>.json, state.json, manifest.json}

A checkpoint appears whole, by one rename, with a checksum of every file in it; what fails its
checksums is passed over, loudly, for the one before.
"""

import base64
import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)


def save(engine: Any, folder: Path, state: dict[str, Any], keep: int = 1) -> None:
    """Commit the engine, the generators and `state` (which has a step) and drop older checkpoints.

    Every worker calls it; the folder is shared by all of them.
    """
    rank, final = dist.get_rank(), folder / f"step-{state['step']:09d}"
    partial = folder / f".partial-{final.name}"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag="engine")
    (partial / f"generators-{rank}.json").write_text(json.dumps(_generators()))
    dist.barrier()
    if rank == 0:
        facts = {"world": dist.get_world_size(), "stage": engine.zero_optimization_stage()}
        (partial / "state.json").write_text(json.dumps({**state, **facts}))
        sums = {str(f.relative_to(partial)): _digest(f) for f in _files(partial)}
        (partial / "manifest.json").write_text(json.dumps(sums))
        for file in _files(partial):
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        _sync(folder)
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load(engine: Any, folder: Path) -> dict[str, Any] | None:
    """Bring the engine and the generators to the last whole checkpoint; its state, or None.

    Raises RuntimeError where it was written by another number of workers or ZeRO stage.
    """
    latest = [_latest(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(latest)
    if latest[0] is None:
        return None
    state: dict[str, Any] = json.loads((latest[0] / "state.json").read_text())
    here = {"world": dist.get_world_size(), "stage": engine.zero_optimization_stage()}
    for what, value in here.items():
        if state[what] != value:
            raise RuntimeError(
                f"{latest[0]}: written with {what} {state[what]}, cannot go on with {what} {value}"
            )
    engine.load_checkpoint(str(latest[0]), tag="engine")
    rank = dist.get_rank()
    _restore(json.loads((latest[0] / f"generators-{rank}.json").read_text()))
    return state


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with a checkpoint: nothing, or its missing and damaged files."""
    try:
        sums = json.loads((checkpoint / "manifest.json").read_text())
    except (OSError, ValueError):
        return ["manifest.json"]
    return [
        name
        for name, digest in sums.items()
        if not (checkpoint / name).is_file() or _digest(checkpoint / name) != digest
    ]


def _latest(folder: Path) -> Path | None:
    for checkpoint in sorted(folder.glob("step-*"), reverse=True):
        if not (bad := verify(checkpoint)):
            return checkpoint
        log.warning("%s is damaged (%s): trying the one before", checkpoint, ", ".join(bad))
    return None


def _generators() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {k: base64.b64encode(s.numpy().tobytes()).decode() for k, s in states.items()}


def _restore(generators: dict[str, str]) -> None:
    def state(name: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(generators[name])), dtype=torch.uint8)

    torch.set_rng_state(state("cpu"))
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(state("cuda"))


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
