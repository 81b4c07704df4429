"""A pretrained causal language model, frozen: what its head sees, and the head it has."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from analysis.errors import BadInput
from trainables import findings, pretrained


@dataclass(frozen=True)
class Frozen:
    """The backbone, and its own head W h + b."""

    model: Any
    weight: Tensor
    """V x d, fp32."""
    bias: Tensor | None
    """V, fp32."""

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """ids (blocks x sequence) -> what the head sees (blocks x sequence x d), fp32."""
        # The head is the identity here, so the model's logits are what went into it (times what
        # the model scales its logits by).
        states: Tensor = self.model(input_ids=ids.to(self.device), use_cache=False).logits
        return states.float()

    @torch.no_grad()
    def layers(self, ids: Tensor, wanted: str) -> tuple[Tensor, dict[int, Tensor]]:
        """The same, and of layers before the last where all are `wanted`: 0 is the embedding."""
        found = self.model(
            input_ids=ids.to(self.device), use_cache=False, output_hidden_states=wanted == "all"
        )
        inner = findings.inner(found.hidden_states, wanted)
        return found.logits.float(), {layer: states.float() for layer, states in inner.items()}

    def whole(self) -> Any:
        """The model with its own head back in its place: `hidden` and `layers` are no more."""
        vocabulary, d = self.weight.shape
        head = nn.Linear(d, vocabulary, bias=self.bias is not None, device="meta")
        dtype = next(self.model.parameters()).dtype
        head.weight = nn.Parameter(self.weight.to(dtype), requires_grad=False)
        if self.bias is not None:
            head.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        self.model.set_output_embeddings(head)
        return self.model


def load(model: dict[str, Any], precision: str, device: torch.device) -> Frozen:
    """The model in fp32 or bf16, its head apart.

    Raises BadInput where weights are missing, or where its logits are not W h + b: that is tried
    on a few tokens.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what is missing is judged here, below
    name, options = pretrained.source(model)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if not model["gguf_file"]:
        # Where the user allows pickles, transformers reads tensors alone from them.
        options["use_safetensors"] = None if model.get("pickle") else True
    try:
        net, found = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:  # of whatever library reads the weights
        raise pretrained.unloadable(name, error) from None
    net.requires_grad_(False).eval().to(device)
    own = net.get_output_embeddings()
    missing, more = set(found["missing_keys"]), set(found["unexpected_keys"])
    prefix = next(n for n, m in net.named_modules() if m is own)
    if missing == {f"{prefix}.weight"} and more == {f"{prefix}.A", f"{prefix}.B"}:
        own.weight = nn.Parameter(_product(Path(name), prefix).to(own.weight), requires_grad=False)
    elif any(key.startswith(f"{prefix}.") for key in more):
        raise BadInput(f"model.pretrained: {name}: its output head is not linear")
    elif missing:
        raise BadInput(f"model.pretrained: {name}: weights are missing: {', '.join(missing)}")
    bias = getattr(own, "bias", None)
    ids = torch.arange(16, device=device)[None] % own.weight.shape[0]
    with torch.no_grad():
        try:
            logits = net(input_ids=ids, use_cache=False).logits.float()
        except Exception as error:  # settings that nothing has looked at before
            raise pretrained.unloadable(name, error) from None
        net.set_output_embeddings(nn.Identity())
        weight, bias = own.weight.float(), None if bias is None else bias.float()
        frozen = Frozen(net, weight, bias)
        mine = nn.functional.linear(frozen.hidden(ids), weight, bias)
    tolerance = 5e-2 if precision == "bf16" else 1e-4
    if (mine - logits).abs().max() > tolerance * logits.abs().max().clamp(min=1):
        raise BadInput(
            f"model.pretrained: {name}: its logits are not those of its output matrix; a linear "
            "output head is needed"
        )
    return frozen


def _product(folder: Path, prefix: str) -> Tensor:
    """W = A B of a factored head that a sweep has trained."""
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    return weights[f"{prefix}.A"] @ weights[f"{prefix}.B"]
