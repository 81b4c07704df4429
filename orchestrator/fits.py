"""Whether trials fit into a place, by CPUs, GPUs and memory; and how fast a worker is there."""

import functools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from analysis.errors import BadInput
from orchestrator import place as places
from orchestrator.place import GPUS, Node, Place
from trainables import zero

# Measured with nano models on one core (docs/LOG.md): a step costs its matrix products at this
# share of the core's own matmul speed, plus, for each of the V logits of a token, this many FLOPs'
# worth of memory traffic.
CPU_SHARE, LOGIT_FLOPS = 0.7, 300.0
GPU_SHARE = 0.4  # of a GPU's matmul speed; assumed, never measured by us
UNKNOWN = "A100"  # as fast as this is a GPU of which nobody knows the speed
PROCESS_BYTES = 700_000_000  # of a worker that has imported everything and holds no model
MEMORY_SHARE = 0.8  # of the machine's, for all packs that run at once
GPU_ROOM = 0.95  # of a GPU's memory: CUDA and fragmentation have the rest; assumed as well


@dataclass(frozen=True)
class Machine:
    """What each worker of a trial is given, at the least."""

    speed: float
    """FLOP/s at the peak, of one core or of its GPU."""
    gpu: bool
    room: float
    """Bytes of its GPU, or of the machine's memory, that are its own; infinite where nobody
    knows."""
    share: float = 1.0
    """Of the GPU's time."""

    def seconds(self, flops: float, logits: float, cpus: int = 1) -> float:
        """Of matrix products, and of so many logits."""
        if self.gpu:
            return flops / (GPU_SHARE * self.speed * self.share)
        return (flops + LOGIT_FLOPS * logits) / (CPU_SHARE * self.speed * cpus)


class Need(NamedTuple):
    """Of each worker of a pack."""

    name: str
    memory: float
    """Bytes of its GPU, or of the machine where it has none."""
    host: float
    """Bytes of the machine's memory besides, where it has a GPU."""
    trial: dict[str, Any]
    model: zero.Shape | None
    """Where ZeRO can hold it in another way."""


def teams(place: Place, resources: dict[str, Any]) -> tuple[int, int]:
    """How many trials fit now, and at most. Raises BadInput where never even one does."""
    workers, cpus, gpus = (resources[key] for key in ("workers", "cpus", "gpus"))
    now, most = places.at_once(place, workers, cpus, gpus)
    if most:
        return now, most
    nodes = [node for node in place.nodes if node.most]
    one = "a trial" if workers == 1 else "a worker"
    for what in ("cpus", "gpus"):
        best = max((getattr(node, what) for node in nodes), default=0)
        if resources[what] > best:
            where = "" if len(nodes) == 1 else " on one machine"
            raise BadInput(
                f"resources.{what}: {one} wants {resources[what]}, {place.name} has {best}{where}"
            )
    _, fit = places.at_once(place, 1, cpus, gpus)
    each = f"{cpus} cpus" + (f" and {gpus:g} gpus" if gpus else "")
    raise BadInput(
        f"resources.workers: a trial wants {workers} with {each} each, {place.name} has room for "
        f"{fit} at most"
    )


def machine(place: Place, resources: dict[str, Any], precision: str) -> Machine:
    """The slowest and smallest that a worker may be put on."""
    cpus, gpus = resources["cpus"], resources["gpus"]
    nodes = _possible(place, resources)
    if not gpus:
        rooms = [MEMORY_SHARE * n.memory / n.workers(cpus, 0) for n in nodes if n.memory]
        return Machine(_matmul_speed(False, precision), False, min(rooms, default=math.inf))
    rooms = [_room(node, gpus) for node in nodes]
    speed = min(_gpu_speed(node, precision) for node in nodes)
    return Machine(speed, True, min(rooms), min(1.0, gpus))


def check(place: Place, needs: list[Need]) -> None:
    """Raises BadInput where the memory of a place is known and does not do."""
    hungriest = sorted(needs, key=_of_machine, reverse=True)
    for need in needs:
        resources = need.trial["resources"]
        nodes = _possible(place, resources)
        if resources["gpus"]:
            node = min(nodes, key=lambda node: _room(node, resources["gpus"]))
            room = _room(node, resources["gpus"])
            if need.memory > room:
                raise BadInput(
                    f"{need.name}: needs about {need.memory / 1e9:.1f} GB of each GPU; of "
                    f"{_called(place, node)} {room / 1e9:.1f} GB are free for it"
                    + _advice(place, need, room)
                )
        for node in nodes:
            _check_machine(place, node, need, hungriest)


def _check_machine(place: Place, node: Node, need: Need, hungriest: list[Need]) -> None:
    """What the need takes of a machine's memory, and what may run beside it there."""
    own, gpus = _of_machine(need), need.trial["resources"]["gpus"]
    if node.memory is None:
        return
    together = own + sum(_beside(node, need, hungriest))
    if together <= node.memory:
        return
    has = f"{place.name} has {node.memory / 1e9:.1f} GB"
    if len(place.nodes) > 1 or node.most > 1:
        has = f"a machine of {has}"
    needed = f"needs about {own / 1e9:.1f} GB of memory"
    if own <= node.memory:
        needed += f", {together / 1e9:.1f} GB with what runs beside it"
    room = node.memory / node.workers(need.trial["resources"]["cpus"], gpus) - PROCESS_BYTES
    advice = "" if gpus else _advice(place, need, room)
    if not advice and own <= node.memory:
        advice = "; with more resources.cpus for each fewer run at once"
    raise BadInput(f"{need.name}: {needed}, {has}{advice}")


def _beside(node: Node, need: Need, hungriest: list[Need]) -> Iterable[float]:
    """Bytes of the hungriest workers that fit on a machine beside one of this need."""
    resources = need.trial["resources"]
    cpus, gpus = node.cpus - resources["cpus"], node.gpus - resources["gpus"]
    for other in hungriest:
        if cpus < 1:
            return  # of thousands the first few have it all
        r = other.trial["resources"]
        left = r["workers"] - (other is need)
        fit = cpus // r["cpus"]
        if r["gpus"]:
            fit = min(fit, int(gpus / r["gpus"] + 1e-9))
        for _ in range(min(left, fit)):
            cpus, gpus = cpus - r["cpus"], gpus - r["gpus"]
            yield _of_machine(other)


def _of_machine(need: Need) -> float:
    return need.host if need.trial["resources"]["gpus"] else need.memory


def _advice(place: Place, need: Need, room: float) -> str:
    """Another stage or micro-batch, or more workers, that fit into `room` bytes of each."""
    if need.model is None:
        return ""
    t, r = need.trial["train"], need.trial["resources"]
    _, most = places.at_once(place, 1, r["cpus"], r["gpus"])
    for workers in range(r["workers"], min(most, t["batch"]) + 1):
        if t["batch"] % workers:
            continue
        try:
            way = zero.choose(
                room, need.model, t["sequence"], t["batch"], workers, t["precision"], r["gpus"] > 0
            )
        except BadInput:
            continue
        more = "" if workers == r["workers"] else f"resources: {{workers: {workers}}} and "
        offload = ", offload: true" if way.offload else ""
        return (
            f"; {more}deepspeed: {{stage: {way.stage}{offload}, micro_batch: {way.micro_batch}}} "
            "would fit"
        )
    return ""


def unknown(place: Place, resources: dict[str, Any]) -> list[str]:
    """What the plan must assume."""
    if not resources["gpus"]:
        return []
    nodes, found = _possible(place, resources), []
    if any(node.gpu not in GPUS and node.gpu_memory is None for node in nodes):
        kinds = ", ".join(sorted({node.gpu or "unnamed" for node in nodes if node.gpu not in GPUS}))
        found.append(
            f"GPUs of {place.name} that are not known ({kinds}): as fast as {UNKNOWN}, and their "
            "memory is not looked at"
        )
    return found


def _possible(place: Place, resources: dict[str, Any]) -> list[Node]:
    """Where a worker may be put."""
    fits = (n for n in place.nodes if n.workers(resources["cpus"], resources["gpus"]))
    return [node for node in fits if node.most]


def _room(node: Node, gpus: float) -> float:
    """Bytes of a GPU for each worker."""
    return math.inf if node.room is None else GPU_ROOM * node.room / places.sharing(gpus)


def _called(place: Place, node: Node) -> str:
    return f"the {node.gpu} of {place.name}" if node.gpu else f"a GPU of {place.name}"


def _gpu_speed(node: Node, precision: str) -> float:
    """FLOP/s: measured here, else of the data sheet."""
    if node.gpu not in GPUS and node.gpu_memory is not None:
        return _matmul_speed(True, precision)
    kind = GPUS[node.gpu if node.gpu in GPUS else UNKNOWN]
    return kind.bf16 if precision == "bf16" else kind.fp32


@functools.cache
def _matmul_speed(gpu: bool, precision: str) -> float:
    """FLOPs a second of one core (always in fp32), or of the GPU, on a matrix product."""
    import torch

    n, device = (4096, "cuda") if gpu else (512, "cpu")
    dtype = torch.bfloat16 if gpu and precision == "bf16" else torch.float32
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
