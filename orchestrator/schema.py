"""The fields of a grid file: what each means, its default, and what it may be."""

import difflib
import reprlib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from trainables import backbones


def _number(value: Any) -> Any:
    """YAML reads 4e5 and 1e-3 as text."""
    if isinstance(value, bool):
        raise ValueError("expected a number, not a yes or no")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError("expected a number") from None
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, Field(min_length=1, max_length=1000)]
Integer = Annotated[int, BeforeValidator(_number), Field(le=10**15)]
Positive = Annotated[Integer, Field(ge=1)]
Real = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[Real, Field(le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Source(_Section):
    """The text: exactly one of package, files, hub."""

    package: Text | None = None
    """Text that ships inside an installed Python package: its .txt files."""
    files: Text | None = None
    """A path, glob or fsspec URL of .txt (one document a file), .jsonl or .parquet (one a row)."""
    hub: Text | None = None
    """A dataset by its Hugging Face name, or a local dataset directory; read as a stream."""
    config: Text | None = None
    """The hub dataset's configuration."""
    split: Text = "train"
    """The hub dataset's split to read."""
    text: Text = "text"
    """The column that holds the text."""
    date: Text | None = None
    """The column that holds an ISO date; .txt files may begin their names with one."""
    documents: Positive | None = None
    """Read at most so many documents."""
    held_out: Annotated[Share, Field(gt=0, lt=1)] = 0.1
    """Share of the text that is never trained on."""
    held_out_by: Literal["document", "date"] = "document"
    """Hold out documents by the hash of their text, or the latest ones."""

    @model_validator(mode="after")
    def _one_source(self) -> "Source":
        if sum(s is not None for s in (self.package, self.files, self.hub)) != 1:
            raise ValueError("give exactly one of package, files, hub")
        return self


class Bpe(_Section):
    """A tokenizer made for the corpus."""

    train_bpe: Annotated[Positive, Field(ge=257, le=10**7)]
    """Entries of a byte-level BPE trained on the training text (bytes and one end mark: 257)."""


class Model(_Section):
    """The backbone: size or config (from scratch), or pretrained (of rankfit)."""

    size: Text | None = None
    """A size of the ladder: nano-4 to nano-256, pythia-14m to pythia-12b."""
    config: Text | None = None
    """Any causal language model of transformers: a hub name, or a config.json, or its folder."""
    pretrained: Text | None = None
    """A trained causal language model: a hub name, a local folder, or that of a finished trial."""
    revision: Text | None = None
    """Of a pretrained hub model: branch, tag or commit."""
    gguf_file: Text | None = None
    """The file in the pretrained model's folder, where it is GGUF."""
    residual: Literal["parallel", "sequential"] | None = None
    """Attention and MLP side by side, as in Pythia (the default there), or one after the other."""
    tied: bool = False
    """Share the weights of input embedding and head (a full head only)."""

    @model_validator(mode="after")
    def _one_model(self) -> "Model":
        if sum(s is not None for s in (self.size, self.config, self.pretrained)) != 1:
            raise ValueError("give exactly one of size, config, pretrained")
        for field in ("revision", "gguf_file"):
            if getattr(self, field) and not self.pretrained:
                raise ValueError(f"{field}: goes with pretrained only")
        if self.pretrained and self.tied:
            raise ValueError(
                "tied: the embedding of a frozen backbone cannot be trained as its head; "
                "leave it out"
            )
        if self.pretrained and self.residual:
            raise ValueError("residual: a pretrained model has its own; leave it out")
        if self.size and self.size not in backbones.LADDER:
            raise ValueError(_unknown("size", self.size, backbones.LADDER))
        return self


class Head(_Section):
    """The softmax head."""

    kind: Literal["linear", "sigsoftmax", "monotone", "mlp", "mos", "backward"] = "linear"
    """linear: softmax(W h). sigsoftmax: p ~ exp(z) sigmoid(z). monotone: softmax of a learnable
    increasing function of the logits. mlp: A B gelu(C h)
    with the parameters of a linear head of that rank. mos: a mixture of softmaxes. backward: a
    full head whose hidden gradient passes through few directions only."""
    rank: Annotated[Positive | None, BeforeValidator(lambda r: None if r == "full" else r)] = None
    """r of W = A B (A: V x r, B: r x d), or full, the default."""
    init: Literal["scaled", "svd", "normal"] = "scaled"
    """The start. scaled: logits of variance one. svd: the best rank-r head for the pretrained
    model's own, weighted by its hidden states (of rankfit). normal: N(0, 1), as in the paper."""
    experts: Positive | None = None
    """Of mos: how many softmaxes."""
    backward: Positive | None = None
    """Of backward: how many directions."""
    directions: Literal["own", "random"] = "own"
    """Of backward: the top right singular vectors of W, or a random subspace, its control."""
    refresh: Positive = 100
    """Of backward: steps after which its own directions are found anew."""

    @model_validator(mode="after")
    def _whole(self) -> "Head":
        for kind, needed in (("mos", "experts"), ("backward", "backward")):
            if self.kind == kind and getattr(self, needed) is None:
                raise ValueError(f"{needed}: missing for {kind}")
        return self


class Train(_Section):
    """How the trial is trained: AdamW, betas 0.9 and 0.95, eps 1e-8."""

    tokens: Positive
    """To train on; rounded down to whole steps."""
    batch: Positive = 16
    """Sequences a step, over all workers."""
    sequence: Annotated[Positive, Field(ge=2)] = 128
    """Tokens a sequence."""
    lr: Annotated[Real, Field(gt=0)] | None = None
    """Peak learning rate; by default that of the model's size. In rankfit a list is a search (by
    default the usual ones of head.init): the best on one part of the held-out text is reported on
    another."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine decay, constant with a linear cool-down, or constant."""
    warmup: Share = 0.01
    """Share of the run over which the rate rises."""
    cooldown: Share = 0.2
    """Share of the run over which wsd cools down."""
    final_lr: Share = 0.1
    """The last learning rate, as a share of the peak."""
    weight_decay: Real = 0.1
    """On matrices; not on norms and biases."""
    clip: Real = 1.0
    """Norm to which the gradient is clipped; 0: not at all."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations; optimiser and loss are fp32. In rankfit, of the backbone."""

    @model_validator(mode="after")
    def _one_step(self) -> "Train":
        if self.tokens < self.batch * self.sequence:
            raise ValueError(
                f"tokens: {self.tokens} is less than one step of batch x sequence = "
                f"{self.batch} x {self.sequence}"
            )
        return self


class DeepSpeed(_Section):
    """How the engine holds the model; changes cost, not results. With several workers or a GPU the
    defaults are those of trainables/deepspeed.yaml for the size."""

    stage: Annotated[Integer, Field(ge=0, le=3)] | None = None
    """Of ZeRO; else 0."""
    offload: bool | None = None
    """Keep the optimizer in the machine's memory (stages 2 and 3); else no."""
    micro_batch: Positive | None = None
    """Sequences a worker holds at once; else its share of the batch."""


class Resources(_Section):
    """Of one trial; they change cost, not results."""

    workers: Positive = 1
    """Processes that train it together; cpus and gpus are of each."""
    cpus: Positive = 1
    """Cores, and threads."""
    gpus: Share = 0
    """1 for a GPU, which is all that a worker uses; a fraction shares one."""


class Probes(_Section):
    """What is measured along training, and when; always at the last step."""

    schedule: Literal["log", "linear"] = "log"
    """At steps equally apart in their logarithm, or in themselves."""
    count: Annotated[Integer, Field(ge=1)] = 8
    """How often, first and last step included."""
    steps: Annotated[list[Annotated[Integer, Field(ge=0)]], Field(min_length=1)] | None = None
    """At these steps instead. A list here is no axis."""
    loss: Annotated[Real, Field(gt=0)] | None = None
    """Of pretrain: also whenever the training loss has fallen by so many nats."""
    layers: Literal["all", "last"] = "all"
    """Of pretrain: whose hidden states are looked at."""
    tokens: Positive | None = None
    """Held-out tokens at each, and as many seen ones; by default one for 200 of training, 2,048
    (of rankfit 8,192) to 65,536."""
    final_tokens: Positive = 65536
    """Held-out tokens at the end."""


class Trial(_Section):
    """One cell of a grid."""

    kind: Literal["pretrain", "rankfit"] = "pretrain"
    """pretrain: from scratch. rankfit: a head on the hidden states of a frozen pretrained model."""
    corpus: Source
    """The text."""
    tokenizer: Bpe | Text | None = None
    """{train_bpe: N}, a local tokenizer.json (or its folder), or a hub name; of rankfit the
    model's own by default."""
    model: Model
    """The backbone."""
    head: Head = Head()
    """The softmax head."""
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    """Of weights and of the order of the text."""
    train: Train
    """How it is trained."""
    deepspeed: DeepSpeed = DeepSpeed()
    """How the engine holds the model."""
    resources: Resources = Resources()
    """What one trial is given."""
    probes: Probes = Probes()
    """What is measured."""
    checkpoints: Positive = 4
    """How many times a run is saved, evenly apart."""
    retries: Annotated[Integer, Field(ge=0)] = 2
    """How often a trial that fails is tried again without getting any further."""
    keep_weights: bool = False
    """Of pretrain: keep the weights of every checkpoint, for `lmsat probe`."""
    log_model: bool | None = None
    """Of pretrain with a linear head: the trained model in MLflow, to load without lmsat. By
    default where that writes or sends at most 100 MB; beside the runs a full head's is a link."""
    system_metrics: bool = False
    """Of pretrain: processor, memory and GPU of the first worker's machine along training."""
    features: Literal["pass", "cache"] = "pass"
    """Of rankfit. pass: hidden states are made when needed. cache: kept on disk, for more epochs,
    more learning rates and later sweeps."""
    extend: Annotated[Integer, Field(ge=0)] = 3
    """Of rankfit: learning rates tried beyond either end of the list, while the best lies there."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "Trial":
        frozen = self.kind == "rankfit"
        if frozen and self.model.pretrained is None:
            raise ValueError("model.pretrained: missing; rankfit needs a trained model")
        if not frozen and self.model.pretrained is not None:
            raise ValueError("model.pretrained: is for kind: rankfit; pretrain starts from scratch")
        if not frozen and self.tokenizer is None:
            raise ValueError("tokenizer: missing")
        if frozen and isinstance(self.tokenizer, Bpe):
            raise ValueError("tokenizer: a pretrained model has its own; leave it out")
        if frozen and self.head.kind == "backward":
            raise ValueError(
                "head.kind: backward is for pretrain; no gradient reaches a frozen backbone"
            )
        if not frozen and self.head.init == "svd":
            raise ValueError("head.init: svd is for rankfit; it starts from a pretrained head")
        if not frozen and self.features == "cache":
            raise ValueError("features: cache is for rankfit; a backbone in training has no cache")
        if frozen and self.probes.loss:
            raise ValueError("probes.loss: is for pretrain; heads of a pack are measured together")
        for field in ("keep_weights", "log_model", "system_metrics"):
            if frozen and getattr(self, field):
                raise ValueError(f"{field}: is for kind: pretrain")
        return self

    @model_validator(mode="after")
    def _whole_shares(self) -> "Trial":
        batch, workers, gpus = self.train.batch, self.resources.workers, self.resources.gpus
        if batch % workers:
            raise ValueError(
                f"resources.workers: {workers} cannot share train.batch, {batch}, evenly"
            )
        if batch // workers % (self.deepspeed.micro_batch or 1):
            raise ValueError(
                f"deepspeed.micro_batch: {self.deepspeed.micro_batch} does not divide "
                + (
                    f"train.batch, {batch}"
                    if workers == 1
                    else f"a worker's {batch // workers} sequences"
                )
            )
        if workers > 1 and gpus % 1:
            raise ValueError(
                f"resources.gpus: {gpus:g}; several workers cannot share a GPU, give each a whole"
            )
        if 0 < gpus < 1e-4:
            raise ValueError(f"resources.gpus: {gpus:g}; 0.0001 is the least share of one")
        return self


_SECTIONS: dict[str, type[BaseModel]] = {
    "corpus": Source,
    "tokenizer": Bpe,
    "model": Model,
    "head": Head,
    "train": Train,
    "deepspeed": DeepSpeed,
    "resources": Resources,
    "probes": Probes,
}


def explain(error: ValidationError) -> str:
    """The first thing that is wrong, in one line: field, and what would be right."""
    errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    path = [str(part) for part in errors[0]["loc"] if part not in ("Bpe", "str")]
    where, kind, given = ".".join(path), errors[0]["type"], reprlib.repr(errors[0]["input"])
    if kind == "extra_forbidden":
        section: type[BaseModel] = _SECTIONS[path[0]] if len(path) > 1 else Trial
        return f"{where}: " + _unknown("field", path[-1], section.model_fields)
    if kind == "missing":
        return f"{where}: missing"
    if path == ["tokenizer"]:
        return f"tokenizer: expected {{train_bpe: N}}, a file or a hub name, not {given}"
    if kind == "model_type":
        fields = ", ".join(_SECTIONS[path[0]].model_fields)
        return f"{where}: expected fields ({fields}), not {given}"
    message = errors[0]["msg"].removeprefix("Value error, ")
    message = f"{where}: {message}" if where else message
    return message + ("" if isinstance(errors[0]["input"], dict) else f", not {given}")


def _unknown(what: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else "known are " + ", ".join(known)
    return f"unknown {what} {name!r}; {hint}"
