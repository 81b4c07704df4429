"""What a grid will cost before anything runs: parameters, FLOPs, memory and time of every trial."""

import functools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.errors import BadInput
from orchestrator.grid import Grid, blame
from trainables import backbones, corpus, heads, schedule

# Measured with nano models on one core (docs/LOG.md): a step costs its matrix products at this
# share of the core's own matmul speed, plus, for each of the V logits of a token, this many FLOPs'
# worth of memory traffic, plus what a step and a trial cost before they do anything.
CPU_SHARE, LOGIT_FLOPS, STEP_SECONDS, TRIAL_SECONDS = 0.7, 300.0, 0.008, 2.0
GPU_SHARE = 0.4  # of a GPU's matmul speed; assumed, never measured by us
PROCESS_BYTES = 700_000_000  # of a worker that has imported everything and holds no model


@dataclass(frozen=True)
class Cost:
    """Of one trial."""

    id: str
    name: str
    d: int
    head: str
    rank: int | None
    params: int
    """All of them: both embeddings, the head as it is factored."""
    params_without_embeddings: int
    """Neither input embedding nor head."""
    tokens: int
    epochs: float | None
    """Over the training text; None until it has been tokenised."""
    flops: float
    """Of training."""
    memory: int
    """Bytes a worker needs at its peak."""
    seconds: float
    """On the hardware found here."""


@dataclass(frozen=True)
class Plan:
    """Of a grid."""

    costs: list[Cost]
    at_once: int
    """Trials that fit here side by side."""
    hours: float
    """From start to end, with so many at once."""


def plan(grid: Grid, cache: Path) -> Plan:
    """Nothing is started and nothing written. Raises BadInput where a trial cannot run here."""
    with blame(grid.path):
        return _plan(grid, cache)


def _plan(grid: Grid, cache: Path) -> Plan:
    gpu = grid.trials[0]["resources"]["gpus"] > 0
    at_once = min(_fit(trial["resources"]) for trial in grid.trials)
    speed = _matmul_speed(gpu)
    shape = functools.cache(lambda key: backbones.shape(backbones.configuration(*json.loads(key))))
    costs = []
    for trial in grid.trials:
        text = corpus.find(corpus.key(trial["text"]), cache)
        vocabulary = _vocabulary(trial, text)
        form = shape(json.dumps([trial["model"], vocabulary, trial["train"]["sequence"]]))
        costs.append(_cost(trial, form, vocabulary, text, speed, gpu))
    memory, where = _memory_here(gpu)
    for cost in costs:
        if cost.memory > memory:
            raise BadInput(
                f"{cost.name}: needs about {cost.memory / 1e9:.1f} GB of memory, "
                f"{where} has {memory / 1e9:.1f} GB"
            )
    seconds = sum(c.seconds for c in costs) / at_once
    return Plan(costs, at_once, max(seconds, max(c.seconds for c in costs)) / 3600)


def _cost(
    trial: dict[str, Any],
    form: backbones.Shape,
    vocabulary: int,
    text: corpus.Corpus | None,
    speed: float,
    gpu: bool,
) -> Cost:
    t = trial["train"]
    head = heads.cost(trial["head"], vocabulary, form.d)
    tied = form.embedding if trial["model"]["tied"] else 0
    params = form.body + form.embedding + head.params - tied
    per_token = 6 * (form.body + head.products) + 12 * form.layers * form.d * t["sequence"]
    if gpu:
        step = t["batch"] * t["sequence"] * per_token / (GPU_SHARE * speed)
    else:
        work = (per_token + LOGIT_FLOPS * vocabulary) / CPU_SHARE
        step = STEP_SECONDS + t["batch"] * t["sequence"] * work / speed
    steps = schedule.steps(t["tokens"], t["batch"], t["sequence"])
    probed = trial["probes"]["count"] * 2 * trial["probes"]["tokens"]
    probed += trial["probes"]["final_tokens"]
    seconds = steps * step + probed * per_token / 3 / speed + TRIAL_SECONDS
    return Cost(
        id=trial["id"],
        name=trial["name"],
        d=form.d,
        head=heads.label(trial["head"]),
        rank=trial["head"]["rank"],
        params=params,
        params_without_embeddings=form.body,
        tokens=t["tokens"],
        epochs=t["tokens"] / text.tokens["train"] if text else None,
        flops=float(per_token * t["tokens"]),
        memory=_memory(trial, form, params, vocabulary),
        seconds=seconds,
    )


def _memory(trial: dict[str, Any], form: backbones.Shape, params: int, vocabulary: int) -> int:
    """Model states: 16 bytes a parameter, fp32 (weights 4, gradients 4, Adam 8) or mixed (2, 2,
    and 12 for the fp32 copy and Adam): Rajbhandari et al. 2020, section 3.1. Activations: 34
    bytes for each of sequence x batch x d x layers in 16 bits (Korthikanti et al. 2022, equation
    1, without the attention scores), twice that in 32. And a chunk of logits, three times over.
    """
    t = trial["train"]
    micro = trial["deepspeed"]["micro_batch"] or t["batch"]
    width = 2 if t["precision"] == "bf16" else 4
    activations = 17 * width * micro * t["sequence"] * form.d * form.layers
    logits = 3 * 4 * min(512, micro * t["sequence"]) * vocabulary
    return PROCESS_BYTES + 16 * params + activations + logits


def _vocabulary(trial: dict[str, Any], text: corpus.Corpus | None) -> int:
    if text:
        return text.vocabulary
    if isinstance(trial["tokenizer"], int):
        return trial["tokenizer"]
    return corpus.load_tokenizer(trial["tokenizer"]).get_vocab_size()


def cores() -> int:
    """Of this machine, as far as this process may use them."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _fit(resources: dict[str, Any]) -> int:
    """How many trials fit on this machine at once. Raises BadInput where not even one does."""
    cpus, gpus = cores(), 0
    if resources["gpus"]:
        import torch

        gpus = torch.cuda.device_count()
    for what, wanted, found in (
        ("cpus", resources["cpus"], cpus),
        ("gpus", resources["gpus"], gpus),
    ):
        if wanted > found:
            raise BadInput(f"resources.{what}: a trial wants {wanted}, this machine has {found}")
    at_once = cpus // resources["cpus"]
    return min(at_once, int(gpus / resources["gpus"])) if resources["gpus"] else at_once


def _memory_here(gpu: bool) -> tuple[int, str]:
    """Bytes, and of what."""
    if gpu:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory), "a GPU here"
    import psutil

    return int(psutil.virtual_memory().total), "this machine"


def _matmul_speed(gpu: bool) -> float:
    """FLOPs a second of one core, or of the GPU in bf16, on a matrix product."""
    import torch

    n, dtype, device = (4096, torch.bfloat16, "cuda") if gpu else (512, torch.float32, "cpu")
    a, threads = torch.ones(n, n, dtype=dtype, device=device), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            (a @ a).sum().item()
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return 2 * n**3 / best
