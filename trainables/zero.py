"""Memory and time of training with DeepSpeed's ZeRO, as arithmetic: nothing is started.

Psi is the number of parameters, N of workers. Sources: Rajbhandari et al. 2020 (ZeRO), Ren et al.
2021 (ZeRO-Offload), Korthikanti et al. 2022 (activations), Kaplan et al. 2020 (FLOPs); and what
DeepSpeed 0.19 holds as `engine.start` asks for it, counted in tests/trainables/test_zero.py.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from analysis.errors import BadInput

CHUNK = 512  # tokens whose logits exist at once: that of heads.py, which would load torch
BUCKET = 500_000_000  # elements of DeepSpeed's reduce_bucket_size, allocated whole
LIVE = 1_000_000_000  # parameters that stage 3 has gathered at once (stage3_max_live_parameters)
# Chunks of logits that a head's loss holds at once, forward and back (of mos: for each softmax).
CHUNKS = {"linear": 1, "backward": 1, "mlp": 3, "mos": 4, "sigsoftmax": 5, "monotone": 8}
USUAL = 2048  # tokens of a sequence, in bf16, for which deepspeed.yaml gives micro-batches


@dataclass(frozen=True)
class Shape:
    """Of a model, as far as memory depends on it."""

    params: float
    """All of them, embeddings and head too."""
    layers: int
    d: int
    heads: int
    """Of attention."""
    vocabulary: int
    rank: int | None = None
    """Of its softmax head; None: full."""
    chunks: int = 1
    """Of logits, that its loss holds at once: CHUNKS."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker."""

    parameters: float
    gradients: float
    optimizer: float
    """Adam's two moments, and the fp32 copy of the weights."""
    update: float
    """What the gradients in fp32 add while the optimizer steps."""
    activations: float
    """Kept for the backward pass."""
    loss: float
    """A chunk of logits, and the head in fp32 with its gradient."""
    buffers: float
    """At most: of communication, and parameters that stage 3 has gathered."""
    host: float
    """Offloaded to the machine's memory; not on the GPU."""

    @property
    def states(self) -> float:
        """What stays from step to step: parameters, gradients, optimizer."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """On the GPU at the peak: at the end of the forward pass, or while the optimizer steps."""
        return self.states + self.buffers + max(self.activations + self.loss, self.update)


@dataclass(frozen=True)
class Choice:
    """How a model fits."""

    stage: int
    offload: bool
    micro_batch: int
    memory: Memory


def states(params: float, stage: int, workers: int, precision: str, offload: bool) -> Memory:
    """Model states: bytes that depend on neither batch nor sequence.

    Rajbhandari et al. 2020, section 3.1 and figure 1, in 16 bits: 16 Psi without ZeRO,
    4 Psi + 12 Psi / N (stage 1), 2 Psi + 14 Psi / N (2), 16 Psi / N (3). fp32 without ZeRO needs
    no second copy of the weights and is 16 Psi too; but ZeRO keeps that copy in fp32 as well, and
    is then 8 Psi + 12 Psi / N, 4 Psi + 16 Psi / N, 20 Psi / N. Offloaded (Ren et al. 2021,
    section 3), optimizer and gradients (in fp32) are the host's.
    Raises BadInput for offload below stage 2.
    """
    _check_offload(stage, offload)
    width = bytes_each(precision)
    copy = precision == "bf16" or stage > 0
    share = [params / (workers if stage >= least else 1) for least in (1, 2, 3)]
    gradients, optimizer = width * share[1], (12.0 if copy else 8.0) * share[0]
    # In fp32, for the optimizer; stage 1 has by then dropped the gradients that are not its own.
    dropped = width * (share[1] - share[0])
    update = max(0.0, 4.0 * share[0] - dropped) if copy else 0.0
    return Memory(
        parameters=width * share[2],
        gradients=0.0 if offload else gradients,
        optimizer=0.0 if offload else optimizer,
        update=0.0 if offload else update,
        activations=0.0,
        loss=0.0,
        buffers=0.0,
        host=optimizer + 4.0 * share[0] if offload else 0.0,
    )


def activations(shape: Shape, tokens: int, precision: str) -> float:
    """Bytes that a GPT-NeoX model keeps of `tokens` (micro-batch x sequence) for its backward pass.

    Korthikanti et al. 2022, equation 1, in 16 bits: 34 bytes for each of tokens x d x layers, and
    5 for each attention score. Ours: no scores, fused attention makes them again (of each head and
    token it keeps 4 bytes of normaliser); no dropout masks (-2); both norms share an input (-2,
    not where the residual is sequential); but queries and keys are kept apart from the projection
    that the values are a part of (+4), and the attention's output in two layouts (+2). So 36 in 16
    bits, 72 in 32. At the end the last norm's input and output.
    """
    width, d = bytes_each(precision), shape.d
    each = shape.layers * (18 * width * d + 4 * shape.heads) + 2 * width * d
    return float(tokens * each)


def loss(shape: Shape, tokens: int, precision: str) -> float:
    """Bytes of a head's loss, all fp32: chunks of logits, the gradients of hidden states and head,
    which the forward pass makes, and both themselves where they are bf16. Hidden states and head
    meet in d dimensions, or in as many as its rank. The logits are never whole."""
    copies = 2 if precision == "bf16" else 1
    logits = shape.chunks * min(CHUNK, tokens) * shape.vocabulary
    return 4.0 * (logits + copies * (shape.rank or shape.d) * (shape.vocabulary + tokens))


def memory(
    shape: Shape,
    sequence: int,
    micro_batch: int,
    stage: int,
    workers: int,
    precision: str = "bf16",
    offload: bool = False,
    gpu: bool = True,
) -> Memory:
    """Of one worker: model states, activations, loss and buffers.

    precision: "bf16" (with an fp32 copy of the weights) or "fp32". Buffers: DeepSpeed's bucket, a
    copy of what it sends, and what stage 3 gathers. Without fragmentation, and without what CUDA
    itself takes. Where there is no GPU the system gives memory as it is written to, so that of
    the bucket no more counts than gradients fill.
    """
    tokens, width, filled = micro_batch * sequence, bytes_each(precision), min(shape.params, BUCKET)
    bucket = ((BUCKET if gpu else filled) if stage else 0) + (filled if workers > 1 else 0)
    gathered = min(shape.params, LIVE) if stage == 3 else 0
    return replace(
        states(shape.params, stage, workers, precision, offload),
        activations=activations(shape, tokens, precision),
        loss=loss(shape, tokens, precision),
        buffers=float(width * (bucket + gathered)),
    )


def choose(
    room: float,
    shape: Shape,
    sequence: int,
    batch: int,
    workers: int,
    precision: str = "bf16",
    gpu: bool = True,
) -> Choice:
    """The least stage that fits into `room` bytes a worker, offloading only where none does (and
    from a GPU only), with the largest micro-batch that then fits and divides the worker's share
    of `batch` sequences.

    Raises BadInput where the workers cannot share the batch, or not even one sequence fits.
    """
    if batch % workers:
        raise BadInput(f"train.batch: {batch} is not a multiple of the {workers} workers")
    share, least = batch // workers, float("inf")
    away = ((2, True), (3, True)) if gpu else ()
    for stage, offload in (*((stage, False) for stage in range(4)), *away):
        for micro in (m for m in range(share, 0, -1) if share % m == 0):
            needed = memory(shape, sequence, micro, stage, workers, precision, offload, gpu)
            if needed.total <= room:
                return Choice(stage, offload, micro, needed)
            least = min(least, needed.total)
    raise BadInput(
        f"model: one sequence needs {least / 1e9:.1f} GB on each of {workers} workers, "
        f"which have {room / 1e9:.1f} GB"
    )


def settings(
    given: dict[str, Any], size: str | None, sequence: int, share: int, precision: str
) -> dict[str, Any]:
    """What a grid gives of stage, offload and micro_batch; what it does not, from deepspeed.yaml
    (`other`: of no size), or where size is None stage 0 and the whole share. In sequences of
    another length as many tokens at once, in fp32 half as many, in the largest micro-batch that
    divides `share`, a worker's sequences of a batch.

    Raises BadInput for offload below stage 2.
    """
    plain: dict[str, Any] = {"stage": 0, "offload": False, "micro_batch": None}
    usual = _usual()[size] if size else plain
    whole = given["stage"] is None
    stage = usual["stage"] if whole else given["stage"]
    offload = (usual["offload"] and whole) if given["offload"] is None else given["offload"]
    _check_offload(stage, offload)
    micro = given["micro_batch"]
    if micro is None and usual["micro_batch"]:
        most = max(1, usual["micro_batch"] * USUAL * 2 // (sequence * bytes_each(precision)))
        micro = max(m for m in range(1, min(most, share) + 1) if share % m == 0)
    return {"stage": stage, "offload": offload, "micro_batch": micro}


@functools.cache
def _usual() -> dict[str, dict[str, Any]]:
    file = Path(__file__).with_name("deepspeed.yaml")
    found: dict[str, dict[str, Any]] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


def _check_offload(stage: int, offload: bool) -> None:
    if offload and stage < 2:
        raise BadInput(
            f"deepspeed.offload: stage {stage} cannot offload its optimizer; 2 and 3 can"
        )


def traffic(params: float, stage: int, precision: str = "bf16") -> float:
    """Bytes that a worker sends for one pass forward and back, of many workers: 2 Psi elements
    (reduce-scatter the gradients, gather gradients or weights), 3 Psi in stage 3, which gathers
    the weights twice. Rajbhandari et al. 2020, section 7."""
    return bytes_each(precision) * (3 if stage == 3 else 2) * params


def hours(params: float, tokens: float, workers: int, speed: float, utilisation: float) -> float:
    """Of training, at 6 FLOPs for each parameter and token (Kaplan et al. 2020, section 2.1).

    params: those that multiply, head but no input embedding. speed: FLOP/s of one GPU at its peak.
    """
    return 6 * params * tokens / (workers * speed * utilisation) / 3600


def bytes_each(precision: str) -> int:
    """Of a weight, a gradient or an activation."""
    return {"fp32": 4, "bf16": 2}[precision]
