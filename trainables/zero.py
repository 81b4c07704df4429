"""Memory and time of training with DeepSpeed's ZeRO, as arithmetic: nothing is started.

Psi is the number of parameters, N of workers. Sources: Rajbhandari et al. 2020 (ZeRO), Ren et al.
2021 (ZeRO-Offload), Korthikanti et al. 2022 (activations), Kaplan et al. 2020 (FLOPs); and what
DeepSpeed 0.19 holds as `engine.start` asks for it, counted in tests/trainables/test_zero.py.
"""

from dataclasses import dataclass, replace

from analysis.errors import BadInput

CHUNK = 512  # tokens whose logits exist at once: that of heads.py, which would load torch
BUCKET = 500_000_000  # elements of DeepSpeed's reduce_bucket_size, allocated whole
LIVE = 1_000_000_000  # parameters that stage 3 has gathered at once (stage3_max_live_parameters)


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
    if offload and stage < 2:
        raise BadInput(f"deepspeed.stage: {stage} cannot offload its optimizer; 2 or 3 can")
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


def activations(layers: int, d: int, heads: int, tokens: int, precision: str) -> float:
    """Bytes that a GPT-NeoX model keeps of `tokens` (micro-batch x sequence) for its backward pass.

    Korthikanti et al. 2022, equation 1, in 16 bits: 34 bytes for each of tokens x d x layers, and
    5 for each attention score. Ours: no scores, fused attention makes them again (of each head and
    token it keeps 4 bytes of normaliser); no dropout masks (-2); both norms share an input (-2,
    not where the residual is sequential); but queries and keys are kept apart from the projection
    that the values are a part of (+4), and the attention's output in two layouts (+2). So 36 in 16
    bits, 72 in 32. At the end the last norm's input and output.
    """
    width = bytes_each(precision)
    return float(tokens * (layers * (18 * width * d + 4 * heads) + 2 * width * d))


def loss(d: int, vocabulary: int, tokens: int, precision: str) -> float:
    """Bytes of a full linear head's loss, all fp32: a chunk of logits, the gradients of hidden
    states and head, which the forward pass makes, and both themselves where they are bf16. The
    logits are never whole."""
    copies = 2 if precision == "bf16" else 1
    return 4.0 * (min(CHUNK, tokens) * vocabulary + copies * d * (vocabulary + tokens))


def memory(
    params: float,
    layers: int,
    d: int,
    heads: int,
    vocabulary: int,
    sequence: int,
    micro_batch: int,
    stage: int,
    workers: int,
    precision: str = "bf16",
    offload: bool = False,
) -> Memory:
    """Of one worker: model states, activations, loss and buffers.

    params: all of them, embeddings and head too. precision: "bf16" (with an fp32 copy of the
    weights) or "fp32". Buffers: DeepSpeed's bucket, a copy of what it sends, and what stage 3
    gathers. Without fragmentation, and without what CUDA itself takes.
    """
    tokens, width = micro_batch * sequence, bytes_each(precision)
    bucket = (BUCKET if stage else 0) + (min(params, BUCKET) if workers > 1 else 0)
    gathered = min(params, LIVE) if stage == 3 else 0
    return replace(
        states(params, stage, workers, precision, offload),
        activations=activations(layers, d, heads, tokens, precision),
        loss=loss(d, vocabulary, tokens, precision),
        buffers=float(width * (bucket + gathered)),
    )


def choose(
    room: float,
    params: float,
    layers: int,
    d: int,
    heads: int,
    vocabulary: int,
    sequence: int,
    batch: int,
    workers: int,
    precision: str = "bf16",
) -> Choice:
    """The least stage that fits into `room` bytes a worker, offloading only where none does, with
    the largest micro-batch that then fits and divides the worker's share of `batch` sequences.

    Raises BadInput where the workers cannot share the batch, or not even one sequence fits.
    """
    if batch % workers:
        raise BadInput(f"train.batch: {batch} is not a multiple of the {workers} workers")
    shape = (params, layers, d, heads, vocabulary, sequence)
    share, least = batch // workers, float("inf")
    for stage, offload in ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True)):
        for micro in (m for m in range(share, 0, -1) if share % m == 0):
            needed = memory(*shape, micro, stage, workers, precision, offload)
            if needed.total <= room:
                return Choice(stage, offload, micro, needed)
            least = min(least, needed.total)
    raise BadInput(
        f"model: one sequence needs {least / 1e9:.1f} GB on each of {workers} workers, "
        f"which have {room / 1e9:.1f} GB"
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
