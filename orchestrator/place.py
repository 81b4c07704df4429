"""Where a grid is to run: what its machines have, there now and at most.

Plain values: `here` looks at this machine, `named` at a data sheet; cluster.py asks Ray.
"""

import ctypes
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import yaml

from analysis.errors import BadInput, one_line

ENOUGH = 2**20  # CPUs of a place of which only the GPUs are named


class Gpu(NamedTuple):
    """Of NVIDIA's data sheets, without sparsity."""

    memory: int
    """Bytes."""
    bf16: float
    """FLOP/s at the peak."""
    fp32: float
    """FLOP/s at the peak, not in TF32, which torch leaves off."""


# As Ray calls them. Of SXM boards, where there are several.
GPUS = {
    "T4": Gpu(16_000_000_000, 8.1e12, 8.1e12),  # its tensor cores know no bf16
    "L4": Gpu(24_000_000_000, 121e12, 30.3e12),
    "A10G": Gpu(24_000_000_000, 70e12, 35e12),
    "L40S": Gpu(48_000_000_000, 362e12, 91.6e12),
    "A100": Gpu(40_000_000_000, 312e12, 19.5e12),  # Ray says so of both: the smaller
    "A100-40G": Gpu(40_000_000_000, 312e12, 19.5e12),
    "A100-80G": Gpu(80_000_000_000, 312e12, 19.5e12),
    "H100": Gpu(80_000_000_000, 989e12, 67e12),
    "H200": Gpu(141_000_000_000, 989e12, 67e12),
    "B200": Gpu(180_000_000_000, 2250e12, 75e12),
}


@dataclass(frozen=True)
class Node:
    """Machines of one kind."""

    cpus: int
    gpus: int
    gpu: str | None
    """As Ray calls it, such as A100-80G; None where there is none, or nobody knows which."""
    memory: int | None
    """Bytes of one machine; None where nobody knows."""
    count: int
    """There now."""
    most: int
    """There at most, once a cluster has grown: those there now, too."""
    gpu_memory: int | None = None
    """Bytes of one GPU, as it was asked; None: that of its data sheet."""

    @property
    def room(self) -> int | None:
        """Bytes of one GPU; None where nobody knows."""
        return self.gpu_memory or (GPUS[self.gpu].memory if self.gpu in GPUS else None)

    def workers(self, cpus: int, gpus: float) -> int:
        """How many fit on one machine. Of fractions each is of a single GPU."""
        fit = self.cpus // cpus
        if not gpus:
            return fit
        return min(fit, self.gpus * sharing(gpus) if gpus < 1 else int(self.gpus / gpus))


@dataclass(frozen=True)
class Place:
    """All of them."""

    name: str
    """As a message says it: this machine, the cluster, 8xA100-80G."""
    nodes: tuple[Node, ...]
    machines: int | None = None
    """There at most, of all kinds together; None: each kind's most."""


def cores() -> int:
    """Of this machine, as far as this process may use them."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def here() -> Place:
    """This machine."""
    import psutil

    gpus, each = _gpus()
    memory = int(psutil.virtual_memory().total)
    return Place("this machine", (Node(cores(), gpus, None, memory, 1, 1, each),))


def _gpus() -> tuple[int, int | None]:
    """How many this machine has, and the bytes of each. torch, which is slow to load, is asked only
    where there is a driver for it to find them by: NVIDIA's library, or AMD's device."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        if not Path("/dev/kfd").exists():
            return 0, None
    import torch

    gpus = torch.cuda.device_count()
    return gpus, int(torch.cuda.get_device_properties(0).total_memory) if gpus else None


def find(text: str) -> Place:
    """A place by its name, or a file for `ray up`."""
    path = Path(text)
    if path.suffix not in (".yaml", ".yml"):
        return named(text)
    try:
        found = launched(path)
    except Exception as error:  # it may be anything
        raise BadInput(f"--on: {text}: no file for `ray up`: {one_line(error)}") from None
    if not any(node.most for node in found.nodes):
        raise BadInput(f"--on: {text}: it does not say what its machines have")
    return found


def named(text: str) -> Place:
    """So many GPUs of a kind, such as 8xA100-80G, with as many CPUs as they need."""
    found = re.fullmatch(r"([1-9]\d{0,5})x(.+)", text)
    if not found or found[2] not in GPUS:
        known = ", ".join(GPUS)
        raise BadInput(
            f"--on: {text!r}: expected a number and a GPU, such as 8xA100-80G; known are {known}"
        )
    return Place(text, (Node(ENOUGH, int(found[1]), found[2], None, 1, 1),))


def launched(file: Path) -> Place:
    """What `ray up` with this file may start, the head included."""
    config = yaml.safe_load(file.read_text())
    total, nodes = config.get("max_workers", 2), []
    for name, kind in config.get("available_node_types", {}).items():
        head = int(name == config["head_node_type"])
        most = head or min(total, kind.get("max_workers", total))
        nodes.append(node(kind.get("resources", {}), head, most))
    return Place(file.name, tuple(nodes), total + 1)


def node(resources: dict[str, float], count: int, most: int) -> Node:
    """Of Ray's account of a node."""
    prefix = "accelerator_type:"
    kinds = [name.removeprefix(prefix) for name in resources if name.startswith(prefix)]
    memory = resources.get("memory")
    return Node(
        cpus=int(resources.get("CPU", 0)),
        gpus=int(resources.get("GPU", 0)),
        gpu=kinds[0] if kinds else None,
        memory=None if memory is None else int(memory),
        count=count,
        most=most,
    )


def at_once(place: Place, workers: int, cpus: int, gpus: float) -> tuple[int, int]:
    """How many teams of `workers` fit now, and once the cluster has grown. Each worker is given
    `cpus` and `gpus` of one machine; a team may be spread over several, and needs nothing besides.
    """
    fit = sorted(((node.workers(cpus, gpus), node) for node in place.nodes), key=lambda f: -f[0])
    now = most = sum(each * node.count for each, node in fit)
    there = sum(node.count for node in place.nodes)
    left = math.inf if place.machines is None else max(0, place.machines - there)
    for each, node in fit:
        more = min(node.most - node.count, left)
        most, left = most + int(each * more), left - more
    return now // workers, most // workers


def sharing(gpus: float) -> int:
    """How many workers share one GPU where each is given `gpus` of it."""
    return int(1 / gpus + 1e-9) if 0 < gpus < 1 else 1
