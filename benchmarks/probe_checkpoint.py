"""One checkpoint measured by `lmsat probe`, against its measures run one by one from the textbook.

    python benchmarks/probe_checkpoint.py MODEL.gguf [TOKENS]
    python benchmarks/probe_checkpoint.py --memory

The textbook: a forward pass for each measure of hidden states; the whole logits; all pairs of
cosines; singular values of the n x d states of every layer, of W, of W less its mean and of the
n x V log-probabilities; the projection onto the columns of W by QR. What both find is compared.

--memory: peak memory of one process that measures 10,000 tokens and of one that measures 200,000,
on a model of random weights.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F

from analysis import records
from orchestrator import place, probe
from trainables import corpus, frozen, pretrained, survey

SEQUENCE, BATCH = 512, 8
CACHE = corpus.default_cache()


def task(model: dict[str, Any], tokens: int) -> dict[str, Any]:
    """What `lmsat probe` hands to a worker."""
    tokenizer = pretrained.tokenizer(model)
    text = corpus.identity(probe.CORPUS, tokenizer)
    corpus.prepare(probe.CORPUS, tokenizer, text, CACHE)
    off = dict.fromkeys(("head_only", "cka", "unargmaxable", "gram"), False)
    return {
        **off,
        "trial": "benchmark",
        "name": "benchmark",
        "step": 0,
        "source": {"model": model},
        "corpus": probe.CORPUS,
        "tokenizer": tokenizer,
        "text": text,
        "sequence": SEQUENCE,
        "tokens": tokens,
        "batch": BATCH,
        "layers": [],
        "precision": "fp32",
        "tasks": [],
        "step_tokens": None,
        "download": None,
        "cpus": place.cores(),
        "gpus": 0,
    }


def ours(given: dict[str, Any]) -> dict[tuple[str, int | None], float]:
    with tempfile.TemporaryDirectory() as folder:
        survey.measure(given, Path(folder), CACHE)
        rows = records.scan(Path(folder), "scalars").collect()
    kept = rows.filter(pl.col("split").is_in(["", "held_out"]))
    return {(r["metric"], r["layer"]): r["value"] for r in kept.to_dicts()}


@torch.no_grad()
def textbook(given: dict[str, Any]) -> dict[tuple[str, int | None], float]:
    text = corpus.find(corpus.key(given["text"]), CACHE)
    assert text is not None
    shard = text.shard("held_out")
    sample = corpus.sample(shard, SEQUENCE, given["tokens"])
    ids = torch.from_numpy(corpus.rows(shard, SEQUENCE, sample))
    net = frozen.load(given["source"]["model"], "fp32", torch.device("cpu"))
    w, found, model = net.weight, {}, net.whole()
    d = w.shape[1]

    def forward(of: Callable[[Any, torch.Tensor], Any]) -> list[Any]:
        parts = ids.split(BATCH)
        return [of(model(part[:, :-1], output_hidden_states=True), part[:, 1:]) for part in parts]

    def predictions(out: Any, labels: torch.Tensor) -> list[torch.Tensor]:
        logs = out.logits.log_softmax(-1)
        right = logs.argmax(-1) == labels
        return [
            F.nll_loss(logs.flatten(0, 1), labels.flatten(), reduction="none"),
            right.float().flatten(),
            -(logs.exp() * logs).sum(-1).flatten(),
        ]

    each = [torch.cat(parts).mean().item() for parts in zip(*forward(predictions), strict=True)]
    found |= {(m, None): v for m, v in zip(("loss", "accuracy", "entropy"), each, strict=True)}

    def states() -> Iterator[tuple[int, torch.Tensor]]:
        """Layer by layer, after a pass of their own."""
        parts = forward(lambda out, _: out.hidden_states)
        for layer in range(len(parts[0])):
            last = layer == len(parts[0]) - 1
            yield -1 if last else layer, torch.cat([part[layer] for part in parts])

    for layer, some in states():
        unit = F.normalize(some.flatten(0, 1), dim=-1)
        n = len(unit)
        total = sum((unit @ part.T).double().sum().item() for part in unit.split(4096))
        found["anisotropy", layer] = (total - n) / (n * n - n)
    for layer, some in states():
        sigma = torch.linalg.svdvals(some[:, 1:].flatten(0, 1))
        p = sigma / sigma.sum() + 1e-7
        found["rankme", layer] = torch.exp(-(p * p.log()).sum()).item()
    for layer, some in states():
        wide = some[:, 1:].flatten(0, 1)
        variances = torch.linalg.svdvals(wide - wide.mean(0)).square()
        ratio = variances.sum() ** 2 / variances.square().sum()
        found["participation_ratio", layer] = ratio.item()
    for name, matrix in (("", w), ("_centred", w - w.mean(0))):
        p = torch.linalg.svdvals(matrix).square()
        p = p / p.sum()
        found[f"singular_entropy{name}", None] = (p * (d * p).log()).sum().item()
    hidden = torch.cat(forward(lambda out, _: out.hidden_states[-1])).flatten(0, 1)
    logs = (hidden[: 2 * d].double() @ w.double().T).log_softmax(-1)
    sigma = torch.linalg.svdvals(logs - logs.mean(-1, keepdim=True))
    found["achieved_rank", None] = float((sigma > 1e-10 * sigma[0]).sum())
    basis = torch.linalg.qr(w.double()).Q
    every = SEQUENCE * 16 // 1024
    picked, labels = hidden.view(-1, SEQUENCE, d)[:16, ::every], ids[:16, 1:][:, ::every]
    gradient = (picked.flatten(0, 1) @ w.T).double().softmax(-1)
    gradient -= F.one_hot(labels.flatten(), len(w))
    share = (gradient @ basis).square().sum() / gradient.square().sum()
    found["gradient_survival", None] = share.item()
    return found


def memory() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = corpus.load_tokenizer(_bpe(Path(folder)))
        config = GPTNeoXConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=256,
            num_hidden_layers=6,
            num_attention_heads=8,
            intermediate_size=1024,
        )
        GPTNeoXForCausalLM(config).save_pretrained(folder)
        model = {"pretrained": folder, "revision": None, "gguf_file": None, "pickle": False}
        for tokens in (10_000, 200_000):
            given = task(model, tokens)
            code = (
                "import json, resource, sys\nfrom benchmarks import probe_checkpoint as b\n"
                "b.ours(json.load(sys.stdin))\n"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
            )
            done = subprocess.run(
                [sys.executable, "-c", code],
                input=json.dumps(given),
                text=True,
                capture_output=True,
                check=True,
            )
            peaks[tokens] = int(done.stdout.split()[-1])
            print(f"{tokens:7,} tokens: peak {peaks[tokens] / 1e6:.0f} MB")
    print(f"ratio {peaks[200_000] / peaks[10_000]:.3f}")


def _bpe(folder: Path) -> str:
    source = {**probe.CORPUS}
    text = corpus.prepare(source, 4096, corpus.identity(source, 4096), CACHE)
    (folder / "tokenizer.json").write_bytes(text.tokenizer.read_bytes())
    return str(folder)


def compare(file: Path, tokens: int) -> None:
    torch.set_num_threads(place.cores())
    model = {
        "pretrained": str(file.parent),
        "revision": None,
        "gguf_file": file.name,
        "pickle": False,
    }
    given = task(model, tokens)
    seconds, found = [], []
    for way in (ours, textbook):
        began = time.perf_counter()
        found.append(way(given))
        seconds.append(time.perf_counter() - began)
    for key, value in found[1].items():
        if abs(found[0][key] - value) > 2e-3 * max(1, abs(value)):
            print(f"DIFFERS {key}: {found[0][key]} here, {value} by the textbook")
    print(f"{tokens} tokens, {len(found[1])} measures compared of the {len(found[0])} found here")
    print(f"one probe {seconds[0]:.1f} s, the textbook {seconds[1]:.1f} s", end="")
    print(f", ratio {seconds[1] / seconds[0]:.2f}")


if __name__ == "__main__":
    if "--memory" in sys.argv:
        memory()
    else:
        compare(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 4096)
