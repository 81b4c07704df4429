"""A pretrained causal language model by its files or its name, weights not loaded.

Any model that transformers loads (a hub name, a folder, a GGUF file), or a finished trial of a
sweep. Only safetensors and GGUF files are read: no pickles, no remote code.
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from analysis import records, sealed
from analysis.errors import BadInput, one_line
from trainables import backbones, gguf_header, hub


def folder(name: str) -> Path | None:
    """Where a local model lies: the folder itself, or that of a trial; None for a hub name."""
    path = Path(name)
    if (path / "trials").is_dir() or (path.parent.name == "trials" and path.is_dir()):
        path = path / "model"
        if not (path / "config.json").is_file():
            raise BadInput(
                f"model.pretrained: {name}: no trained model here; give the folder of a finished "
                "trial, runs/SWEEP/trials/ID"
            )
    return path if path.exists() else None


def name(model: dict[str, Any]) -> str:
    """What to call it: the GGUF file's, the folder's or the hub's name; of a trial its size and the
    beginning of its id, nano-64@f63ae3."""
    path = Path(model["pretrained"])
    if model["gguf_file"]:
        return Path(model["gguf_file"]).stem
    trial = path.parent if path.name == "model" else path
    if trial.parent.name == "trials":
        with suppress(sealed.Damaged):
            known = records.scan(trial.parents[1], "trials", trial.name).select("size").collect()
            return f"{Path(known['size'][-1]).name}@{trial.name[:6]}" if len(known) else trial.name
        return trial.name
    return f"{path.name}@{model['revision']}" if model["revision"] else path.name


def tokenizer(model: dict[str, Any]) -> str:
    """The name under which the corpus finds the model's own tokenizer."""
    at = folder(model["pretrained"])
    if at and model["gguf_file"]:
        return str(at / model["gguf_file"])
    if at:
        return str(at)
    return (
        f"{model['pretrained']}@{model['revision']}" if model["revision"] else model["pretrained"]
    )


def fingerprint(model: dict[str, Any]) -> str:
    """What a pretrained model is: a hub commit, or the contents of its files."""
    at = folder(model["pretrained"])
    if at is None:
        return hub.revision("model", model["pretrained"], "model.pretrained", model["revision"])
    patterns = [model["gguf_file"]] if model["gguf_file"] else ["*.safetensors", "config.json"]
    files = sorted({f for pattern in patterns for f in at.glob(pattern)})
    return _digest(tuple((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@functools.cache
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    """Of the contents, in order; sizes and times only say when to read them again."""
    whole = hashlib.sha256()
    for name, *_ in files:
        with Path(name).open("rb") as f:
            whole.update(hashlib.file_digest(f, "sha256").digest())
    return whole.hexdigest()


def shape(model: dict[str, Any], sequence: int) -> backbones.Shape:
    """What the model comes to, without its weights.

    Raises BadInput where it is no causal language model with a linear head, or cannot take
    sequences so long.
    """
    limit = positions(model)
    if limit and sequence > limit:
        raise BadInput(
            f"train.sequence: {sequence} is more than the {limit} positions of the model"
        )
    return _shape(_key(model))


def _key(model: dict[str, Any]) -> str:
    """What tells it from others, for the caches."""
    return json.dumps({key: model[key] for key in ("pretrained", "revision", "gguf_file")})


@functools.cache
def _configuration(model: str) -> Any:
    name, options = source(json.loads(model))
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, **options)
    except Exception as error:  # each model checks its settings in its own way
        raise unloadable(name, error) from None
    if getattr(config, "lmsat_head", "linear") not in ("linear", "backward"):
        raise BadInput(
            f"model.pretrained: {name}: its output head is not linear but {config.lmsat_head}"
        )
    if cap := getattr(config.get_text_config(), "final_logit_softcapping", None):
        raise BadInput(
            f"model.pretrained: {name}: its logits are not W h (final_logit_softcapping is {cap}); "
            "a linear output head is needed"
        )
    return config


def positions(model: dict[str, Any]) -> int | None:
    """How long a sequence it can take."""
    config = _configuration(_key(model))
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def head_names(model: dict[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """Of the tensors in a model's files (`keys`), those that make up its output head, by what they
    are: weight and bias, or A and B of a factored one. A tied weight is the input embedding's."""
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    config = _configuration(_key(model))
    with torch.device("meta"):
        net = backbones.build(config, "model.pretrained")
    # Files may have other names than modules: embed_out for lm_head, or those of the base alone.
    mapping, state = get_model_conversion_mapping(net), net.state_dict()
    kinds = ([m for m in mapping if isinstance(m, k)] for k in (WeightRenaming, WeightConverter))
    rules = (*kinds, net.base_model_prefix, state)
    named = {rename_source_key(key, *rules)[0]: key for key in keys}
    output, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    places = [output, embedding] if output.weight is embedding.weight else [output]
    prefixes = [name for place in places for name, m in net.named_modules() if m is place]
    return {
        part: named[f"{prefix}.{part}"]
        for prefix in reversed(prefixes)  # the head's own, where it is there
        for part in ("weight", "bias", "A", "B")
        if f"{prefix}.{part}" in named
    }


@functools.cache
def _shape(model: str) -> backbones.Shape:
    return backbones.shape(_configuration(model), "model.pretrained")


def source(model: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options for transformers' from_pretrained. Raises BadInput where there is none."""
    name, file, revision = model["pretrained"], model["gguf_file"], model["revision"]
    at = folder(name)
    if at is None:
        hub.revision("model", name, "model.pretrained", revision)
    elif file and not (at / file).is_file():
        found = ", ".join(f.name for f in sorted(at.glob("*.gguf"))) or "none"
        raise BadInput(f"model.gguf_file: {at} has no {file}; it has {found}")
    elif file:
        gguf_header.check(at / file)
    elif not (at / "config.json").is_file():
        raise BadInput(
            f"model.pretrained: {at}: no config.json here; for a GGUF file give gguf_file"
        )
    options = {"gguf_file": file} if file else {}
    if revision:
        options["revision"] = revision
    return str(at or name), options


def unloadable(name: str, error: Exception) -> BadInput:
    return BadInput(f"model.pretrained: {name!r} cannot be loaded: {one_line(error)}")
