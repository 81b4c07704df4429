"""Synthetic worlds whose answer is known: a Markov chain over V words, each word's hidden state a
fixed point on a sphere, the next word drawn from a head that we chose."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from torch import Tensor

from analysis import ranks, tables
from orchestrator import grid
from trainables import heads, rankfit

V, D = 128, 24


def states() -> Tensor:
    """V x d, each of norm sqrt(d): what RMSNorm leaves as it is."""
    torch.manual_seed(1)
    h = torch.randn(V, D)
    return h / h.norm(dim=1, keepdim=True) * D**0.5


def equal_spectrum(rank: int, scale: float) -> Tensor:
    """W (V x d), rank r, all r singular values the same; columns sum to zero."""
    torch.manual_seed(2)
    out = torch.randn(V, rank)
    out, _ = torch.linalg.qr(out - out.mean(0))
    down, _ = torch.linalg.qr(torch.randn(D, rank))
    return scale * out @ down.T


def world(folder: Path, log_probs: Tensor, tokens: int, w: Tensor | None = None) -> None:
    """A model of no layers with these states, and a text sampled from p(next word | word)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=D, num_hidden_layers=0,
        num_attention_heads=1, tie_word_embeddings=False, rms_norm_eps=1e-12,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(states())
        if w is not None:
            model.lm_head.weight.copy_(w)
    model.save_pretrained(folder / "model")
    words = [f"w{i}" for i in range(V)]
    tokenizer = Tokenizer(models.WordLevel({x: i for i, x in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    generator = torch.Generator().manual_seed(7)
    # Many chains side by side, each a document.
    chains, length = 64, tokens // 64
    text = torch.empty(chains, length, dtype=torch.long)
    text[:, 0] = torch.randint(V, (chains,), generator=generator)
    for i in range(1, length):
        p = log_probs[text[:, i - 1]].exp()
        text[:, i] = torch.multinomial(p, 1, generator=generator)[:, 0]
    rows = [json.dumps({"text": " ".join(words[t] for t in chain)}) for chain in text.tolist()]
    (folder / "text.jsonl").write_text("\n".join(rows))


def fit(folder: Path, cache: Path, **fields: Any) -> ranks.Fitted:
    base = {
        "kind": "rankfit",
        "corpus": {"files": "text.jsonl", "held_out": 0.2},
        "model": {"pretrained": "model"},
        "train": {"tokens": 400_000, "batch": 64, "sequence": 32, "lr": [1e-2, 3e-2],
                  "weight_decay": 0.0},
        "probes": {"count": 1, "final_tokens": 60_000},
    }  # fmt: skip
    (folder / "world.yaml").write_text(yaml.safe_dump({**base, **fields}))
    trials = grid.load(folder / "world.yaml").trials
    assert {o.status for o in rankfit.fit(trials, folder, cache).values()} == {"done"}
    (found,) = ranks.fitted(folder)
    return found


def test_in_a_world_of_rank_20_the_required_rank_is_20(tmp_path: Path, cache: Path) -> None:
    w = equal_spectrum(20, scale=5.0)
    world(tmp_path, (states() @ w.T).log_softmax(-1), 600_000, w)
    found = fit(tmp_path, cache, head={"rank": [8, 16, 18, 19, 20, 21, 22]})
    gaps = {r["rank"]: r["gap"] for r in found.heads.iter_rows(named=True) if r["lr"]}
    tolerance = 0.02
    assert gaps[19] > tolerance, "the tolerance must lie below the gap at 19"
    required = found.required["linear"]
    assert required.low <= 20 <= required.high and required.rank == 20
    # The truth itself is the model's own head: no one beats it by more than chance.
    own = found.heads.filter(pl.col("family") == "own")["gap"].item()
    assert -0.05 < own < 0.005


@pytest.mark.parametrize("truth", ["mixture", "linear"])
def test_a_mixture_wins_where_the_truth_is_one_and_not_where_it_is_linear(
    tmp_path: Path, cache: Path, truth: str
) -> None:
    """Rank 3, two experts, against a linear head of rank 3."""
    torch.manual_seed(3)
    section = dict.fromkeys(("experts", "backward", "directions", "refresh"))
    section |= {"kind": "mos", "rank": 3, "experts": 2, "init": "scaled"}  # type: ignore[dict-item]
    mixture = heads.make(section, V, D)
    with torch.no_grad():
        mixture.weight.mul_(24)
        mixed = mixture(states()).log_softmax(-1)
    w = equal_spectrum(3, scale=9.0)
    log_probs = mixed if truth == "mixture" else (states() @ w.T).log_softmax(-1)
    world(tmp_path, log_probs.detach(), 600_000)
    fit(tmp_path, cache, trials=[
        {"head": {"rank": 3}, "train": {"lr": [3e-2, 1e-1]}},
        {"head": {"kind": "mos", "experts": 2, "rank": 3}, "train": {"lr": [3e-2, 1e-1]}},
    ])  # fmt: skip
    ended = ranks._ended(tmp_path).filter(pl.col("rank") == 3).sort("selection_loss")
    best = {k: ended.filter(pl.col("head") == k)["trial"][0] for k in ("low-rank", "mos-2")}
    gain, error = tables.paired_difference(tmp_path, best["low-rank"], best["mos-2"])
    if truth == "mixture":
        assert gain > 0.05 and gain > 5 * error
    else:
        assert gain < 0.005
