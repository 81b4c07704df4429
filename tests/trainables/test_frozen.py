from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from analysis import records
from analysis.errors import BadInput
from trainables import frozen, pretrain, pretrained

CPU = torch.device("cpu")
SMALL: dict[str, dict[str, Any]] = {
    "GPTNeoX": {"intermediate_size": 64},
    "Llama": {"intermediate_size": 64, "num_key_value_heads": 2},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 16},  # what its head sees is not its hidden size
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},  # a bias in the head
    "Cohere": {"intermediate_size": 64, "logit_scale": 0.5},  # logits are half of W h
}


def section(path: Path, **fields: Any) -> dict[str, Any]:
    unused = dict.fromkeys(("size", "config", "revision", "gguf_file", "residual"))
    return {**unused, "tied": False, "pretrained": str(path), **fields}


def saved(folder: Path, kind: str, **more: Any) -> Any:
    """A small model of random weights, and what it makes of some tokens."""
    shared = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=100, **{**shared, **SMALL.get(kind, {}), **more}
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", SMALL)
def test_own_head_on_its_states_gives_the_models_own_logits(tmp_path: Path, kind: str) -> None:
    model = saved(tmp_path, kind)
    ids = torch.randint(100, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    found = frozen.load(section(tmp_path), "fp32", CPU)
    mine = F.linear(found.hidden(ids), found.weight, found.bias)
    assert (mine - logits).abs().max() < 1e-5
    assert found.weight.shape == (100, pretrained.shape(section(tmp_path), 16).d)
    assert not any(p.requires_grad for p in found.model.parameters())


def test_a_gguf_file_is_read(tmp_path: Path) -> None:
    """A Llama of random weights, written with the gguf library itself."""
    import gguf

    model = saved(tmp_path / "plain", "Llama", tie_word_embeddings=False)
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(100)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    inner = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for key, value in model.state_dict().items():
        parts, weights = key.removeprefix("model.").removesuffix(".weight"), value.numpy()
        if parts.startswith("layers."):
            _, layer, rest = parts.split(".", 2)
            if rest in ("self_attn.q_proj", "self_attn.k_proj"):  # GGUF interleaves the halves
                heads = 4 if rest.endswith("q_proj") else 2
                form = (heads, 2, weights.shape[0] // heads // 2, weights.shape[1])
                weights = weights.reshape(form).swapaxes(1, 2).reshape(weights.shape)
            writer.add_tensor(f"blk.{layer}.{inner[rest]}.weight", weights.copy())
        else:
            writer.add_tensor(f"{names[parts]}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = torch.arange(20)[None]
    found = frozen.load(section(tmp_path, gguf_file="small.gguf"), "fp32", CPU)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert (F.linear(found.hidden(ids), found.weight) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("rank", [None, 4])
def test_a_trial_of_a_sweep_is_loaded_with_the_head_it_has(
    tmp_path: Path, cache: Path, tiny_trial: dict[str, Any], rank: int | None
) -> None:
    tiny_trial["head"]["rank"] = rank
    tiny_trial["train"]["tokens"] = 2048
    pretrain.train(tiny_trial, tmp_path, cache)
    model = section(tmp_path / "trials" / tiny_trial["id"])
    found = frozen.load(model, "fp32", CPU)
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "trials" / tiny_trial["id"] / "model" / "model.safetensors")
    built = pretrain.build(tiny_trial, 1024)
    built.model.load_state_dict(weights)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = built.head(built.hidden(ids))
    assert (F.linear(found.hidden(ids), found.weight) - logits).abs().max() < 1e-5
    assert pretrained.name(model) == f"nano-16@{tiny_trial['id'][:6]}"
    for file in records.files(tmp_path, "trials"):
        file.write_bytes(b"")
    assert pretrained.name(model) == tiny_trial["id"]


@pytest.mark.parametrize("head", [{"kind": "mos", "experts": 2}, {"kind": "sigsoftmax"}])
def test_a_head_that_is_not_linear_is_refused(
    tmp_path: Path, cache: Path, tiny_trial: dict[str, Any], head: dict[str, Any]
) -> None:
    """Before anything is started; a sigsoftmax's weights look like a linear head's."""
    tiny_trial["head"] |= head
    tiny_trial["train"]["tokens"] = 2048
    pretrain.train(tiny_trial, tmp_path, cache)
    model = section(tmp_path / "trials" / tiny_trial["id"])
    with pytest.raises(BadInput, match=f"output head is not linear but {head['kind']}"):
        pretrained.shape(model, 16)


def test_capped_logits_are_refused_by_their_setting_and_by_their_numbers(tmp_path: Path) -> None:
    saved(tmp_path, "Gemma2", intermediate_size=64, final_logit_softcapping=1.0)
    with pytest.raises(BadInput, match=r"logits are not W h \(final_logit_softcapping is 1.0\)"):
        pretrained.shape(section(tmp_path), 16)
    with pytest.raises(BadInput, match=r"logits are not those of its output matrix"):
        frozen.load(section(tmp_path), "fp32", CPU)


def test_missing_weights_are_refused_not_drawn_at_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved(tmp_path, "Llama")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"weights are missing: model.norm.weight"):
        frozen.load(section(tmp_path), "fp32", CPU)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    model = saved(tmp_path, "Llama")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"cannot be loaded"):
        frozen.load(section(tmp_path), "fp32", CPU)


def test_fingerprint_follows_the_contents_alone(tmp_path: Path) -> None:
    saved(tmp_path / "a", "Llama")
    saved(tmp_path / "b", "Llama")
    before = pretrained.fingerprint(section(tmp_path / "a"))
    assert before == pretrained.fingerprint(section(tmp_path / "b"))
    saved(tmp_path / "b", "Llama", rope_theta=5e5)
    assert before != pretrained.fingerprint(section(tmp_path / "b"))
