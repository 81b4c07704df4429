"""What a model takes of each worker's memory, as the grid has it and in all of ZeRO's stages."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.errors import BadInput
from orchestrator.fits import PROCESS_BYTES, Machine
from trainables import backbones, zero, zoo


@dataclass(frozen=True)
class Size:
    """What a model takes of each of several workers, or of a GPU, whatever the grid has chosen."""

    name: str
    workers: int
    states: list[float]
    """Bytes of parameters, gradients and optimizer in ZeRO's stages 0 to 3."""
    totals: list[float]
    """Bytes at the peak in these stages, one sequence at a time."""
    best: zero.Choice | None
    """The least stage that fits, with its largest micro-batch; None: none does."""
    best_total: float | None
    """Bytes at its peak."""
    hours: float
    gpu_hours: float


def model(trial: dict[str, Any], form: backbones.Shape, vocabulary: int) -> zero.Shape:
    """Of a trial from scratch, head and all."""
    head = zoo.cost(trial["head"], vocabulary, form.d)
    return zero.Shape(
        params=form.body + head.params + (0 if trial["model"]["tied"] else form.embedding),
        layers=form.layers,
        d=form.d,
        heads=form.heads,
        vocabulary=vocabulary,
        rank=trial["head"]["rank"],
        chunks=chunks(trial["head"]),
    )


def chunks(head: dict[str, Any]) -> int:
    """Of logits, that its loss holds at once."""
    return zero.CHUNKS.get(head["kind"], 1) * (head["experts"] or 1)


def memory(
    trial: dict[str, Any], model: zero.Shape, stage: int, offload: bool, micro_batch: int | None
) -> zero.Memory:
    """Of one worker, did it hold the model so."""
    t, r = trial["train"], trial["resources"]
    micro = micro_batch or t["batch"] // r["workers"]
    precision, gpu = t["precision"], r["gpus"] > 0
    return zero.memory(model, t["sequence"], micro, stage, r["workers"], precision, offload, gpu)


def by_stage(trial: dict[str, Any], model: zero.Shape, machine: Machine, hours: float) -> Size:
    """All the ways to hold it; `hours` it takes."""
    t, r = trial["train"], trial["resources"]
    room = machine.room if machine.gpu else machine.room - PROCESS_BYTES
    shared = t["batch"], r["workers"], t["precision"], machine.gpu
    try:
        best = zero.choose(room, model, t["sequence"], *shared)
    except BadInput:
        best = None
    stages = [memory(trial, model, stage, False, 1) for stage in range(4)]
    return Size(
        name=trial["model"]["size"] or Path(trial["model"]["config"]).name,
        workers=r["workers"],
        states=[needed.states for needed in stages],
        totals=[needed.total for needed in stages],
        best=best,
        best_total=best.memory.total if best else None,
        hours=hours,
        gpu_hours=hours * r["workers"] * r["gpus"],
    )
