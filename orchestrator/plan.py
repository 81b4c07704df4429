"""What a grid will cost before anything runs: parameters, FLOPs, memory and time of every trial."""

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.errors import BadInput, blame
from orchestrator import fits, packs, sizes
from orchestrator import place as places
from orchestrator.fits import PROCESS_BYTES, Machine
from orchestrator.grid import Grid
from orchestrator.place import Place
from orchestrator.sizes import Size
from trainables import backbones, corpus, pretrained, schedule, zero, zoo

# Measured with nano models on one core (docs/LOG.md): what a step and a trial cost before they do
# anything.
STEP_SECONDS, TRIAL_SECONDS = 0.008, 2.0
PROBE_SECONDS = 0.05  # of one measurement, whatever the tokens
LOAD_BYTES_A_SECOND = 50e6  # of a pretrained model, from a GGUF file


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
    """Bytes a worker needs at its peak: of its GPU, or of the machine where it has none."""
    seconds: float
    """On the hardware of the place."""
    probes: float
    """Of these, what measuring takes."""
    workers: int = 1
    gpus: float = 0
    """Of each worker."""
    stage: int = 0
    """Of ZeRO."""
    offload: bool = False
    micro_batch: int | None = None
    """Sequences that a worker holds at once; None: its share of the batch."""
    host: int = 0
    """Bytes of the machine's memory that a worker with a GPU needs besides."""


@dataclass(frozen=True)
class Pack:
    """Trials that run together in one pass."""

    trials: list[str]
    memory: int
    """Bytes each of its workers needs at its peak, as in Cost."""
    seconds: float
    """On the hardware of the place."""
    apart: float
    """Seconds, were each trained head run by itself."""


@dataclass(frozen=True)
class Plan:
    """Of a grid."""

    costs: list[Cost]
    packs: list[Pack]
    at_once: int
    """Packs that fit there side by side, once the place has grown."""
    hours: float
    """From start to end, with so many at once."""
    features: int
    """Bytes of hidden states that the cache will hold."""
    place: str
    waits: bool
    """Whether the place must grow before some trial can start."""
    sizes: list[Size]
    """Of models that several workers or a GPU train, each with its largest head."""
    speeds: list[float]
    """FLOP/s of its GPUs at their peak: the times assume GPU_SHARE of them."""
    notes: list[str]
    """What nobody knows, and what was assumed instead."""


def plan(grid: Grid, cache: Path, place: Place | None = None) -> Plan:
    """Of running it at a place, by default on this machine. Nothing is started and nothing
    written. Raises BadInput where a trial can never run there."""
    with blame(grid.path):
        return of(grid.trials, cache, place)


def of(trials: list[dict[str, Any]], cache: Path, place: Place | None = None) -> Plan:
    """The plan of some trials."""
    place = place or places.here()
    teams = [fits.teams(place, trial["resources"]) for trial in trials]
    shape = functools.cache(lambda key: backbones.planned(*json.loads(key)))
    costs: list[Cost] = []
    joined: list[Pack] = []
    needs, kept, speeds = [], 0, set()
    largest: dict[str, tuple[zero.Shape, Size]] = {}
    for shared in packs.by_key(trials).values():
        trial, model = shared[0], None
        text = corpus.find(corpus.key(trial["text"]), cache)
        machine = fits.machine(place, trial["resources"], trial["train"]["precision"])
        if machine.gpu:
            speeds.add(machine.speed)
        if trial["kind"] == "rankfit":
            some, several = _frozen(shared, text, machine)
            kept += _features(trial, text, cache)
        else:
            vocabulary = _vocabulary(trial, text)
            form = shape(json.dumps([trial["model"], vocabulary, trial["train"]["sequence"]]))
            model = sizes.model(trial, form, vocabulary)
            cost = _cost(trial, form, model, text, machine)
            some, several = [cost], [Pack([cost.id], cost.memory, cost.seconds, cost.seconds)]
            if cost.workers > 1 or cost.gpus:
                alike = ("tokens", "batch", "sequence", "precision")
                train = [trial["train"][field] for field in alike]
                key = json.dumps([trial["model"], trial["resources"], train])
                if key not in largest or model.params > largest[key][0].params:
                    hours = cost.seconds / 3600
                    largest[key] = model, sizes.by_stage(trial, model, machine, hours)
        costs += some
        joined += several
        for pack in several:
            name = next(cost.name for cost in some if cost.id == pack.trials[0])
            needs.append(fits.Need(name, pack.memory, some[0].host, trial, model))
    fits.check(place, needs)
    at_once = min(most for _, most in teams)
    seconds = max(sum(p.seconds for p in joined) / at_once, max(p.seconds for p in joined))
    order = {trial["id"]: i for i, trial in enumerate(trials)}
    costs.sort(key=lambda cost: order[cost.id])
    notes = dict.fromkeys(n for t in trials for n in fits.unknown(place, t["resources"]))
    return Plan(
        costs=costs,
        packs=joined,
        at_once=at_once,
        hours=seconds / 3600,
        features=kept,
        place=place.name,
        waits=not all(now for now, _ in teams),
        sizes=[size for _, size in largest.values()],
        speeds=sorted(speeds),
        notes=list(notes),
    )


def _frozen(
    shared: list[dict[str, Any]], text: corpus.Corpus | None, machine: Machine
) -> tuple[list[Cost], list[Pack]]:
    """Heads on one backbone, and how they share its pass."""
    t, p, r, ds = (shared[0][key] for key in ("train", "probes", "resources", "deepspeed"))
    workers, cpus = r["workers"], r["cpus"]
    form = pretrained.shape(shared[0]["model"], t["sequence"])
    held_out = 2 * (p["count"] * p["tokens"] + p["final_tokens"])  # selection and report
    per_token = 2 * form.body + 4 * form.layers * form.d * t["sequence"]
    loading = 4 * (form.body + form.embedding) / LOAD_BYTES_A_SECOND
    passing = machine.seconds(per_token * (t["tokens"] / workers + held_out), 0, cpus)
    passing += loading + TRIAL_SECONDS
    chunks = max(3, *(sizes.chunks(trial["head"]) for trial in shared))
    a_step = t["batch"] * t["sequence"] // workers
    chunk = 4 * chunks * min(zero.CHUNK, a_step) * form.vocabulary
    states = 4 * form.d * (2 * (p["tokens"] + p["final_tokens"]) + a_step)
    weights = 4 * (form.body + 2 * form.embedding)
    base = (0 if machine.gpu else PROCESS_BYTES) + weights + chunk + states
    costs, trained = [], {}
    for trial in shared:
        head, tokens = zoo.cost(trial["head"], form.vocabulary, form.d), t["tokens"]
        needed = zero.states(head.params, ds["stage"], workers, "fp32", False)
        held = int(needed.states + needed.update)
        if trial["head"]["kind"] in zoo.BASELINES:
            tokens, final = 0, 2 * p["final_tokens"]
        else:
            final, trained[trial["id"]] = held_out, held
        flops = 2.0 * head.products * (3 * tokens / workers + final)
        steps = schedule.steps(tokens, t["batch"], t["sequence"]) if tokens else 0
        own = machine.seconds(flops, form.vocabulary * (tokens / workers + final / 3), cpus)
        measuring = machine.seconds(2.0 * head.products * final, form.vocabulary * final / 3, cpus)
        costs.append(
            Cost(
                id=trial["id"],
                name=trial["name"],
                d=form.d,
                head=zoo.label(trial["head"]),
                rank=trial["head"]["rank"],
                params=form.body + form.embedding + head.params,
                params_without_embeddings=form.body,
                tokens=tokens,
                epochs=tokens / text.tokens["train"] if text else None,
                flops=2.0 * head.products * (3 * tokens + final),
                memory=base + held,
                seconds=own + STEP_SECONDS * steps,
                probes=measuring,
                workers=workers,
                gpus=r["gpus"],
                **ds,
                host=PROCESS_BYTES + weights if machine.gpu else 0,
            )
        )
    split = packs.split(trained, machine.room - base) or [[]]
    # Baselines hold no state of their own: they ride with the first pack.
    split[0] += [trial["id"] for trial in shared if trial["id"] not in trained]
    seconds = {cost.id: cost.seconds for cost in costs}
    joined = [
        Pack(
            trials=ids,
            memory=base + sum(trained.get(i, 0) for i in ids),
            seconds=passing + sum(seconds[i] for i in ids),
            apart=sum(seconds[i] + (passing if i in trained else 0) for i in ids),
        )
        for ids in split
    ]
    return costs, joined


def _features(trial: dict[str, Any], text: corpus.Corpus | None, cache: Path) -> int:
    """Bytes that its hidden states will take. Raises BadInput where the cache has no room."""
    if trial["features"] != "cache":
        return 0
    from trainables import features

    folder = features.directory(trial, cache)
    wanted = features.size(trial, pretrained.shape(trial["model"], 1).d, text)
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
    model: zero.Shape,
    text: corpus.Corpus | None,
    machine: Machine,
) -> Cost:
    """Workers share a step's tokens; each measures all there is to measure."""
    t, r, ds = (trial[key] for key in ("train", "resources", "deepspeed"))
    head = zoo.cost(trial["head"], model.vocabulary, form.d)
    per_token = 6 * (form.body + head.products) + 12 * form.layers * form.d * t["sequence"]
    a_step = t["batch"] * t["sequence"]
    step = machine.seconds(a_step * per_token, a_step * model.vocabulary) / r["workers"]
    step += 0 if machine.gpu else STEP_SECONDS
    steps = schedule.steps(t["tokens"], t["batch"], t["sequence"])
    p, times = trial["probes"], len(schedule.probe_steps(steps, trial["probes"]))
    probed = times * 2 * p["tokens"] + p["final_tokens"]
    measuring = machine.seconds(probed * per_token / 3, probed * model.vocabulary / 3)
    measuring += PROBE_SECONDS * times
    needed = sizes.memory(trial, model, ds["stage"], ds["offload"], ds["micro_batch"])
    # A worker with a GPU makes the model in the machine's memory first.
    host = PROCESS_BYTES + max(needed.host, 4 * model.params)
    return Cost(
        id=trial["id"],
        name=trial["name"],
        d=form.d,
        head=zoo.label(trial["head"]),
        rank=trial["head"]["rank"],
        params=int(model.params),
        params_without_embeddings=form.body,
        tokens=t["tokens"],
        epochs=t["tokens"] / text.tokens["train"] if text else None,
        flops=float(per_token * t["tokens"]),
        memory=int(needed.total if machine.gpu else PROCESS_BYTES + needed.total + needed.host),
        seconds=steps * step + measuring + TRIAL_SECONDS,
        probes=measuring,
        workers=r["workers"],
        gpus=r["gpus"],
        **ds,
        host=int(host) if machine.gpu else 0,
    )


def _vocabulary(trial: dict[str, Any], text: corpus.Corpus | None) -> int:
    if text:
        return text.vocabulary
    if isinstance(trial["tokenizer"], int):
        return trial["tokenizer"]
    return corpus.load_tokenizer(trial["tokenizer"]).get_vocab_size()
