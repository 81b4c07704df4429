"""What a grid will cost before anything runs: parameters, FLOPs, memory and time of every trial."""

import functools
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.errors import BadInput
from orchestrator import packs
from orchestrator.grid import Grid, blame
from trainables import backbones, corpus, features, frozen, heads, schedule

# Measured with nano models on one core (docs/LOG.md): a step costs its matrix products at this
# share of the core's own matmul speed, plus, for each of the V logits of a token, this many FLOPs'
# worth of memory traffic, plus what a step and a trial cost before they do anything.
CPU_SHARE, LOGIT_FLOPS, STEP_SECONDS, TRIAL_SECONDS = 0.7, 300.0, 0.008, 2.0
PROBE_SECONDS = 0.05  # of one measurement, whatever the tokens
GPU_SHARE = 0.4  # of a GPU's matmul speed; assumed, never measured by us
PROCESS_BYTES = 700_000_000  # of a worker that has imported everything and holds no model
LOAD_BYTES_A_SECOND = 50e6  # of a pretrained model, from a GGUF file
MEMORY_SHARE = 0.8  # of the machine's, for all packs that run at once


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
    probes: float
    """Of these, what measuring takes."""


@dataclass(frozen=True)
class Pack:
    """Trials that run together in one pass."""

    trials: list[str]
    memory: int
    """Bytes its worker needs at its peak."""
    seconds: float
    """On the hardware found here."""
    apart: float
    """Seconds, were each trained head run by itself."""


@dataclass(frozen=True)
class Plan:
    """Of a grid."""

    costs: list[Cost]
    packs: list[Pack]
    at_once: int
    """Packs that fit here side by side."""
    hours: float
    """From start to end, with so many at once."""
    features: int
    """Bytes of hidden states that the cache will hold."""


def plan(grid: Grid, cache: Path) -> Plan:
    """Nothing is started and nothing written. Raises BadInput where a trial cannot run here."""
    with blame(grid.path):
        return of(grid.trials, cache)


def of(trials: list[dict[str, Any]], cache: Path) -> Plan:
    """The plan of some trials."""
    gpu = trials[0]["resources"]["gpus"] > 0
    at_once = min(_fit(trial["resources"]) for trial in trials)
    machine = _Machine(_matmul_speed(gpu), gpu, *_memory_here(gpu))
    shape = functools.cache(lambda key: backbones.shape(backbones.configuration(*json.loads(key))))
    costs, joined, kept = [], [], 0
    for shared in packs.by_key(trials).values():
        text = corpus.find(corpus.key(shared[0]["text"]), cache)
        if shared[0]["kind"] == "rankfit":
            some, several = _frozen(shared, text, machine, at_once)
            costs += some
            joined += several
            kept += _features(shared[0], text, cache)
            continue
        trial, vocabulary = shared[0], _vocabulary(shared[0], text)
        form = shape(json.dumps([trial["model"], vocabulary, trial["train"]["sequence"]]))
        cost = _cost(trial, form, vocabulary, text, machine)
        costs.append(cost)
        joined.append(Pack([cost.id], cost.memory, cost.seconds, cost.seconds))
    names = {cost.id: cost.name for cost in costs}
    for pack in joined:
        if pack.memory > machine.memory:
            raise BadInput(
                f"{names[pack.trials[0]]}: needs about {pack.memory / 1e9:.1f} GB of memory, "
                f"{machine.where} has {machine.memory / 1e9:.1f} GB"
            )
    order = {trial["id"]: i for i, trial in enumerate(trials)}
    seconds = max(sum(p.seconds for p in joined) / at_once, max(p.seconds for p in joined))
    costs.sort(key=lambda cost: order[cost.id])
    return Plan(costs, joined, at_once, seconds / 3600, kept)


@dataclass(frozen=True)
class _Machine:
    speed: float
    """FLOPs a second of one core, or of the GPU."""
    gpu: bool
    memory: int
    where: str

    def seconds(self, flops: float, logits: float, cpus: int = 1) -> float:
        """Of matrix products, and of so many logits."""
        if self.gpu:
            return flops / (GPU_SHARE * self.speed)
        return (flops + LOGIT_FLOPS * logits) / (CPU_SHARE * self.speed * cpus)


def _frozen(
    shared: list[dict[str, Any]], text: corpus.Corpus | None, machine: _Machine, at_once: int
) -> tuple[list[Cost], list[Pack]]:
    """Heads on one backbone, and how they share its pass."""
    t, p, cpus = shared[0]["train"], shared[0]["probes"], shared[0]["resources"]["cpus"]
    form = frozen.shape(shared[0]["model"], t["sequence"])
    held_out = 2 * (p["count"] * p["tokens"] + p["final_tokens"])  # selection and report
    per_token = 2 * form.body + 4 * form.layers * form.d * t["sequence"]
    loading = 4 * (form.body + form.embedding) / LOAD_BYTES_A_SECOND
    passing = machine.seconds(per_token * (t["tokens"] + held_out), 0, cpus)
    passing += loading + TRIAL_SECONDS
    chunk = 3 * 4 * min(512, t["batch"] * t["sequence"]) * form.vocabulary
    states = 4 * form.d * (2 * (p["tokens"] + p["final_tokens"]) + t["batch"] * t["sequence"])
    base = PROCESS_BYTES + 4 * (form.body + 2 * form.embedding) + chunk + states
    costs, sizes = [], {}
    for trial in shared:
        head, tokens = heads.cost(trial["head"], form.vocabulary, form.d), t["tokens"]
        if trial["head"]["kind"] in heads.BASELINES:
            tokens, final = 0, 2 * p["final_tokens"]
        else:
            final, sizes[trial["id"]] = held_out, 16 * head.params
        flops = 2.0 * head.products * (3 * tokens + final)
        steps = schedule.steps(tokens, t["batch"], t["sequence"]) if tokens else 0
        own = machine.seconds(flops, form.vocabulary * (tokens + final / 3), cpus)
        measuring = machine.seconds(2.0 * head.products * final, form.vocabulary * final / 3, cpus)
        costs.append(
            Cost(
                id=trial["id"],
                name=trial["name"],
                d=form.d,
                head=heads.label(trial["head"]),
                rank=trial["head"]["rank"],
                params=form.body + form.embedding + head.params,
                params_without_embeddings=form.body,
                tokens=tokens,
                epochs=tokens / text.tokens["train"] if text else None,
                flops=flops,
                memory=base + 16 * head.params,
                seconds=own + STEP_SECONDS * steps,
                probes=measuring,
            )
        )
    room = int(MEMORY_SHARE * machine.memory / at_once) - base
    split = packs.split(sizes, room) or [[]]
    # Baselines hold no state of their own: they ride with the first pack.
    split[0] += [trial["id"] for trial in shared if trial["id"] not in sizes]
    seconds = {cost.id: cost.seconds for cost in costs}
    joined = [
        Pack(
            trials=ids,
            memory=base + sum(sizes.get(i, 0) for i in ids),
            seconds=passing + sum(seconds[i] for i in ids),
            apart=sum(seconds[i] + (passing if i in sizes else 0) for i in ids),
        )
        for ids in split
    ]
    return costs, joined


def _features(trial: dict[str, Any], text: corpus.Corpus | None, cache: Path) -> int:
    """Bytes that its hidden states will take. Raises BadInput where the cache has no room."""
    if trial["features"] != "cache":
        return 0
    folder = features.directory(trial, cache)
    wanted = features.size(trial, frozen.shape(trial["model"], 1).d, text)
    kept = sum(f.stat().st_blocks * 512 for f in folder.glob("*")) if folder.is_dir() else 0
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if wanted - kept > free:
        raise BadInput(
            f"features: cache needs {(wanted - kept) / 1e9:.2f} GB more in {cache}, which has "
            f"{free / 1e9:.2f} GB free; set LMSAT_CACHE, or leave features out"
        )
    return wanted


def _cost(
    trial: dict[str, Any],
    form: backbones.Shape,
    vocabulary: int,
    text: corpus.Corpus | None,
    machine: _Machine,
) -> Cost:
    t = trial["train"]
    head = heads.cost(trial["head"], vocabulary, form.d)
    tied = form.embedding if trial["model"]["tied"] else 0
    params = form.body + form.embedding + head.params - tied
    per_token = 6 * (form.body + head.products) + 12 * form.layers * form.d * t["sequence"]
    a_step = t["batch"] * t["sequence"]
    step = machine.seconds(a_step * per_token, a_step * vocabulary)
    step += 0 if machine.gpu else STEP_SECONDS
    steps = schedule.steps(t["tokens"], t["batch"], t["sequence"])
    p, times = trial["probes"], len(schedule.probe_steps(steps, trial["probes"]))
    probed = times * 2 * p["tokens"] + p["final_tokens"]
    measuring = machine.seconds(probed * per_token / 3, probed * vocabulary / 3)
    measuring += PROBE_SECONDS * times
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
        seconds=steps * step + measuring + TRIAL_SECONDS,
        probes=measuring,
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
