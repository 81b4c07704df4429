"""The size ladder: Pythia 14M to 12B (Biderman et al. 2023) and nano sizes for a laptop; and any
Hugging Face causal language model by its configuration.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from analysis.errors import BadInput, one_line
from trainables import hub


class Size(NamedTuple):
    """The shape of a GPT-NeoX model, and the peak learning rate it trains well at."""

    d: int
    layers: int
    heads: int
    lr: float
    vocabulary: int = 50304  # of the published model
    rotary: float = 0.25  # share of each head's dimensions that carry the position


# Learning rates: nano sizes from a search on State of the Union text (docs/LOG.md), the others
# as published.
LADDER = {
    "nano-4": Size(4, 2, 1, 4e-2, rotary=1.0),
    "nano-8": Size(8, 2, 1, 4e-2, rotary=1.0),
    "nano-16": Size(16, 2, 1, 2e-2, rotary=1.0),
    "nano-32": Size(32, 2, 2, 2e-2, rotary=1.0),
    "nano-64": Size(64, 2, 4, 1e-2, rotary=1.0),
    "nano-128": Size(128, 2, 8, 5e-3, rotary=1.0),
    "nano-256": Size(256, 4, 8, 2e-3, rotary=1.0),
    "pythia-14m": Size(128, 6, 4, 1e-3),
    "pythia-31m": Size(256, 6, 8, 1e-3),
    "pythia-70m": Size(512, 6, 8, 1e-3),
    "pythia-160m": Size(768, 12, 12, 6e-4),
    "pythia-410m": Size(1024, 24, 16, 3e-4),
    "pythia-1b": Size(2048, 16, 8, 3e-4),
    "pythia-1.4b": Size(2048, 24, 16, 2e-4),
    "pythia-2.8b": Size(2560, 32, 32, 1.6e-4),
    "pythia-6.9b": Size(4096, 32, 32, 1.2e-4, vocabulary=50432),
    "pythia-12b": Size(5120, 36, 40, 1.2e-4, vocabulary=50688),
}


def configuration(model: dict[str, Any], vocabulary: int, sequence: int) -> Any:
    """The transformers configuration of `model`: a ladder size, or `config`, a hub name or file.

    model: size or config, residual ("parallel", "sequential" or None for the model's own), tied.
    Raises BadInput for what transformers cannot load as a causal language model.
    """
    from transformers import GPTNeoXConfig

    if model.get("size"):
        size = LADDER[model["size"]]
        return GPTNeoXConfig(
            hidden_size=size.d,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.d,
            vocab_size=vocabulary,
            max_position_embeddings=max(2048, sequence),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": size.rotary,
            },
            use_parallel_residual=model["residual"] != "sequential",
            tie_word_embeddings=model["tied"],
            bos_token_id=None,
            eos_token_id=None,
        )
    config = _load(model["config"])
    if model["residual"]:
        if not hasattr(config, "use_parallel_residual"):
            raise BadInput(
                f"model.residual: {config.model_type} models have no such choice; leave it out"
            )
        config.use_parallel_residual = model["residual"] == "parallel"
    limit = getattr(config, "max_position_embeddings", None)
    if limit and sequence > limit:
        raise BadInput(
            f"train.sequence: {sequence} is more than the {limit} positions of the model"
        )
    config.vocab_size, config.tie_word_embeddings = vocabulary, model["tied"]
    return config


def width(model: dict[str, Any]) -> int:
    """d of a model, without building it."""
    if model["size"]:
        return LADDER[model["size"]].d
    return int(_load(model["config"]).get_text_config().hidden_size)


def fingerprint(config: str) -> str:
    """What a `config` depends on: a local file's contents, or the hub name."""
    if not Path(config).exists():
        return config
    settings = _load(config).to_dict()
    for incidental in ("transformers_version", "_name_or_path"):
        settings.pop(incidental, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _load(name: str) -> Any:
    if not Path(name).exists():
        hub.revision("model", name, "model.config")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # each model checks its settings in its own way
        raise BadInput(
            f"model.config: {name!r} holds no configuration of a model: {one_line(error)}"
        ) from None


def build(config: Any, field: str = "model.config") -> Any:
    """The causal language model of a configuration, fp32, with the random state as it stands.
    `field` is the grid's, for what is wrong."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError:
        raise BadInput(
            f"{field}: {config.model_type!r} is not a causal language model of transformers"
        ) from None
    except Exception as error:  # of torch, about sizes
        raise BadInput(
            f"{field}: no {config.model_type} can be built so: {one_line(error)}"
        ) from None
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise BadInput(f"{field}: {config.model_type!r} has no linear output head of its own")
    return model


class Shape(NamedTuple):
    """What a configuration comes to."""

    d: int
    layers: int
    heads: int
    """Of attention."""
    embedding: int
    """Parameters of the input embedding; the model's own untied full head has as many."""
    body: int
    """All parameters but input embedding and head."""
    vocabulary: int
    """Rows of the head: V."""
    tied: bool
    """Whether input embedding and head are one."""


def planned(model: dict[str, Any], vocabulary: int, sequence: int) -> Shape:
    """Of what `configuration` takes; of the ladder in closed form, which waits for no library."""
    if not model["size"]:
        return shape(configuration(model, vocabulary, sequence))
    d, layers, heads = LADDER[model["size"]][:3]
    body = layers * (12 * d * d + 13 * d) + 2 * d  # matrices, biases and norms; the last norm
    return Shape(d, layers, heads, vocabulary * d, body, vocabulary, model["tied"])


def shape(config: Any, field: str = "model.config") -> Shape:
    """Counted on the model itself, built without memory for its weights."""
    import torch

    with torch.device("meta"):
        model = build(config, field)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    apart = {id(embedding): embedding.numel(), id(head): head.numel()}
    return Shape(
        d=head.shape[1],
        layers=config.get_text_config().num_hidden_layers,
        heads=getattr(config.get_text_config(), "num_attention_heads", None) or 0,
        embedding=embedding.numel(),
        body=sum(p.numel() for p in model.parameters()) - sum(apart.values()),
        vocabulary=head.shape[0],
        tied=embedding is head,
    )
