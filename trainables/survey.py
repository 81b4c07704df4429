"""One checkpoint of a series, measured: loaded, seen on held-out text, recorded.

A task is plain values, so that any worker can take it. Its `source` is one of three: `model` (as
a grid names a pretrained model), `trial` and `weights` (of a sweep: a head of the zoo needs to be
built as it was trained), `matrix` and `tensor` (a file: its head measures only).
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from analysis import argmax, atomic, geometry, records, spectrum
from analysis.errors import BadInput
from trainables import (
    backbones,
    corpus,
    findings,
    frozen,
    hub,
    pretrain,
    pretrained,
    probes,
    tasks,
    tensors,
)
from trainables.heads import Fixed, LinearHead
from trainables.recorder import Recorder

CKA_TOKENS = 4096  # that are compared with the last checkpoint's, in three blocks or more


class Backbone(Protocol):
    def layers(self, ids: Tensor, wanted: str) -> tuple[Tensor, dict[int, Tensor]]: ...
    def whole(self) -> Any: ...


class Loaded(NamedTuple):
    """A checkpoint in memory; of a head alone there is no backbone."""

    backbone: Backbone | None
    head: LinearHead
    row: dict[str, Any]
    """For the table `trials`, but for how it ended."""


def measure(task: dict[str, Any], directory: Path, cache: Path) -> None:
    """Measure a checkpoint and write its records; the row in `trials` last, which says that they
    are whole. Raises BadInput where it cannot be loaded."""
    torch.set_num_threads(task["cpus"])
    device = torch.device("cuda" if task["gpus"] else "cpu")
    recorder = Recorder(directory, task["trial"], 0, task["step_tokens"], lambda _: None, True)
    step, began = task["step"], time.perf_counter()
    text = _text(task, cache)
    known = findings.text(text, device) if text else None
    loaded = _load(task, text, device)
    if loaded.backbone is None:
        found = probes.HeadSpectrum(known).found(loaded.head)
        if not found.spectra:
            raise BadInput("the head holds NaN or infinity, or is all zero")
    else:
        assert text is not None and known is not None
        states: dict[int, list[Tensor]] = {}
        batches = _batches(task, text, loaded.backbone, loaded.head, states, device)
        with torch.no_grad():
            found = probes.measure(loaded.head, batches, known)
        if not found.finite:
            raise BadInput("its held-out loss is not a number")
        if task["cka"]:
            _compare(task, directory, states, found)
        if task["tasks"]:
            found.scalars += tasks.evaluate(loaded.backbone.whole(), text.tokenizer, task["tasks"])
    if task["unargmaxable"] and probes.is_linear(loaded.head):
        # B h is any vector of R^r: what A forbids, A B forbids, and the other way round.
        out, bias = loaded.head.factors()[0], getattr(loaded.head, "bias", None)
        bias = None if bias is None else bias.cpu()
        found.scalar("unargmaxable", len(argmax.unargmaxable(out.cpu(), bias)))
    if task["gram"]:
        _keep_gram(loaded.head, directory / "grams" / f"{task['trial']}-{step:012d}.npz")
    found.record(recorder, step)
    recorder.scalar(step, "probe_seconds", time.perf_counter() - began)
    recorder.flush(step)
    recorder.row(loaded.row, "done", step)


def _text(task: dict[str, Any], cache: Path) -> corpus.Corpus | None:
    if task["text"] is None:
        return None
    return corpus.prepare(task["corpus"], task["tokenizer"], task["text"], cache)


def ahead(task: dict[str, Any]) -> None:
    """Fetch what a task will need, so that it need not wait."""
    if "model" in task["source"] and not task["head_only"]:
        _fetched(task)


def drop(task: dict[str, Any]) -> None:
    """Delete what was fetched for a task, where it asks for that."""
    if task["download"]:
        shutil.rmtree(task["download"], ignore_errors=True)


def _fetched(task: dict[str, Any]) -> dict[str, Any]:
    """The model, on this machine."""
    model = task["source"]["model"]
    if pretrained.folder(model["pretrained"]):
        return dict(model)
    name, revision = model["pretrained"], model["revision"]
    folder = hub.download(name, revision, model["pickle"], _downloads(task))
    return {**model, "pretrained": str(folder), "revision": None}


def _downloads(task: dict[str, Any]) -> Path | None:
    return Path(task["download"]) if task["download"] else None


def _load(task: dict[str, Any], text: corpus.Corpus | None, device: torch.device) -> Loaded:
    source = task["source"]
    if "matrix" in source:
        head = tensors.matrix(Path(source["matrix"]), source["tensor"]).to(device)
        return Loaded(None, head, _row(task, head, None))
    if "trial" in source:
        assert text is not None
        folder, head_only = Path(source["weights"]), task["head_only"]
        net = _own(source["trial"], folder, text.vocabulary, head_only).to(device)
        row = pretrain.describe(source["trial"], net, text) | {"kind": "probe"}
        return Loaded(None if head_only else net, net.head, row)
    if task["head_only"]:
        head = tensors.head(source["model"], _downloads(task)).to(device)
        return Loaded(None, head, _row(task, head, pretrained.shape(source["model"], 1)))
    model = _fetched(task)
    backbone = frozen.load(model, task["precision"], device)
    head = Fixed(backbone.weight, None, backbone.bias)
    return Loaded(backbone, head, _row(task, head, pretrained.shape(model, task["sequence"])))


def _row(task: dict[str, Any], head: Fixed, shape: backbones.Shape | None) -> dict[str, Any]:
    out, down = head.factors()
    row: dict[str, Any] = dict.fromkeys(records.TABLES["trials"])
    for column in ("trial", "status", "step"):
        del row[column]
    row |= {
        "name": task["name"],
        "kind": "probe",
        "size": task["name"],
        "head": "full" if down is None else "low-rank",
        "rank": None if down is None else len(down),
        "d": (out if down is None else down).shape[1],
        "vocabulary": len(out),
    }
    if shape:
        own = sum(w.numel() for w in (out, down) if w is not None)
        row["params"] = shape.body + shape.embedding + (0 if shape.tied else own)
        row["params_without_embeddings"] = shape.body
    return row


def _own(
    trial: dict[str, Any], folder: Path, vocabulary: int, head_only: bool
) -> pretrain.LanguageModel:
    """A model that a sweep has trained, with its head of the zoo; `head_only`: nothing else of it
    is read."""
    from safetensors import safe_open

    net = pretrain.build(trial, vocabulary)
    names = {id(weight): name for name, weight in net.model.named_parameters()}
    wanted = {names[id(w)] for w in (net.head if head_only else net).parameters()}
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            weights = {name: file.get_tensor(name) for name in wanted & set(file.keys())}
            whole = wanted == (weights.keys() if head_only else set(file.keys()))
        net.model.load_state_dict(weights, strict=False)
    except Exception as error:  # the library's own kind
        reason = str(error).split("\n")[0]
        raise BadInput(f"{folder}: cannot be loaded: {reason}") from None
    if not whole:
        raise BadInput(f"{folder}: not the weights of {trial['name']}")
    return net.eval().requires_grad_(False)


def _batches(
    task: dict[str, Any],
    text: corpus.Corpus,
    backbone: Backbone,
    head: LinearHead,
    states: dict[int, list[Tensor]],
    device: torch.device,
) -> Iterator[findings.Batch]:
    """Held-out blocks, the same for all checkpoints; the first states of each layer are kept in
    `states`, where they will be compared."""
    shard, sequence, kept = text.shard("held_out"), task["sequence"], 0
    sample = corpus.sample(shard, sequence, task["tokens"])
    ids = torch.from_numpy(corpus.rows(shard, sequence, sample))
    for start in range(0, len(sample), task["batch"]):
        now = sample[start : start + task["batch"]]
        part = ids[start : start + task["batch"]].to(device)
        hidden, inner = backbone.layers(part[:, :-1], "last" if task["layers"] == [-1] else "all")
        if task["layers"] != [-1] and (unknown := set(task["layers"]) - {-1, *inner}):
            raise BadInput(
                f"--layers: {min(unknown)}: the model has 0 to {len(inner) - 1} and last"
            )
        if task["layers"]:
            inner = {layer: s for layer, s in inner.items() if layer in task["layers"]}
        if task["cka"] and (room := max(3, CKA_TOKENS // sequence) - kept) > 0:
            kept += len(now)
            for layer, some in {**inner, -1: hidden}.items():
                states.setdefault(layer, []).append(some[:room, 1:].cpu())
        yield findings.see(head, "held_out", now, hidden, part[:, 1:], inner)


def reference(directory: Path, trial: str) -> Path:
    """Where the states of a series' last checkpoint lie, that others are compared with."""
    return directory / "reference" / f"{trial}.safetensors"


def _compare(
    task: dict[str, Any], directory: Path, states: dict[int, list[Tensor]], found: findings.Found
) -> None:
    """Linear CKA of each layer to the last checkpoint's, whose states lie on disk."""
    from safetensors.torch import load_file, save_file

    file = reference(directory, task["trial"])
    here = {str(layer): torch.cat(parts).float() for layer, parts in states.items()}
    if task["cka"] == "reference":
        atomic.write(file, lambda partial: save_file(here, partial))
    if not file.exists():
        raise BadInput("the last checkpoint, to be compared with, could not be measured")
    for layer, there in load_file(file).items():
        value, stderr = geometry.cka(here[layer], there)
        found.scalar("cka_to_last", value, "held_out", stderr, int(layer))


def _keep_gram(head: LinearHead, file: Path) -> None:
    reduced = spectrum.reduce(*head.factors())
    atomic.write(file, lambda partial: spectrum.save(reduced, partial))
