"""One trial, on a real DeepSpeed engine and real text."""

import copy
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from analysis import records
from tests.conftest import TIMING, head_section, train_apart, two_workers
from trainables import corpus, heads, pretrain, zoo

OTHER = {"size": None, "residual": None}  # fields of a model that is not on the ladder


def variant(trial: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """The trial with other fields: section={field: value}, or name=value."""
    changed = copy.deepcopy(trial)
    for name, value in sections.items():
        changed[name] = {**changed[name], **value} if isinstance(value, dict) else value
    return changed


def scalars(sweep: Path, trial: dict[str, Any]) -> pl.DataFrame:
    """All that is measured and not timed."""
    table = records.scan(sweep, "scalars", trial["id"]).filter(~pl.col("metric").is_in(TIMING))
    return table.drop("time").sort("step", "split", "metric", "layer").collect()


def losses(sweep: Path, trial: dict[str, Any]) -> list[float]:
    """Of training, logged step by logged step."""
    found = scalars(sweep, trial).filter(
        (pl.col("split") == "train") & (pl.col("metric") == "loss")
    )
    return found["value"].to_list()


def final(sweep: Path, trial: dict[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(sweep / "trials" / trial["id"] / "model" / "model.safetensors")


def stop_after(calls: int) -> Any:
    """A should_stop that says yes at its so-manieth call."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def test_losses_are_golden(tiny_trial: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    outcome = pretrain.train(tiny_trial, tmp_path, cache)
    assert outcome[:2] == ("done", 48)
    found = losses(tmp_path, tiny_trial)
    golden = np.loadtxt(Path(__file__).parent / "golden.txt")
    np.testing.assert_allclose(found, golden, atol=1e-4)


@pytest.mark.parametrize("kind", ["interrupted", "killed"])
def test_a_resumed_trial_equals_an_uninterrupted_one(
    kind: str, tiny_trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # With dropout, so that the generators' state counts.
    trial = variant(tiny_trial, model={**OTHER, "config": str(_gpt2(tmp_path))})
    assert pretrain.train(trial, whole, cache).status == "done"
    if kind == "interrupted":
        assert pretrain.train(trial, parts, cache, should_stop=stop_after(20))[:2] == (
            "stopped",
            20,
        )
    else:

        def die(progress: dict[str, Any]) -> None:
            if progress["step"] >= 12:  # seven steps after a probe, none of them saved
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pretrain.train(trial, parts, cache, report=die)
    torch.manual_seed(99)  # another process would have other generators
    assert pretrain.train(trial, parts, cache).status == "done"
    assert scalars(parts, trial).equals(scalars(whole, trial))
    for name, weight in final(whole, trial).items():
        assert torch.equal(weight, final(parts, trial)[name]), name
    for table in ("blocks", "spectra"):
        a, b = (records.scan(sweep, table).collect() for sweep in (whole, parts))
        keys = records.KEYS[table]
        assert a.sort(keys).equals(b.sort(keys)) and a.height


def _gpt2(folder: Path) -> Path:
    from transformers import GPT2Config

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.1, embd_pdrop=0.1)
    config.save_pretrained(folder / "gpt2")
    return folder / "gpt2"


def test_zero_stages_agree(tiny_trial: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    """The last in a process of its own: a ZeRO-3 engine is not freed."""
    found = []
    for stage in range(4):
        trial = variant(tiny_trial, id=f"stage{stage}", deepspeed={"stage": stage})
        (train_apart if stage == 3 else pretrain.train)(trial, tmp_path, cache)
        assert final(tmp_path, trial)["gpt_neox.embed_in.weight"].shape == (1024, 16)
        found.append(scalars(tmp_path, trial).filter(pl.col("metric") == "loss")["value"])
    assert len(found[0]) == 48 + 2 * 4
    for stage in (1, 2, 3):
        np.testing.assert_allclose(found[stage], found[0], atol=1e-3)


def _worker(
    rank: int, store: Path, trial: dict[str, Any], sweep: Path, cache: Path, stop: int
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    # One worker alone is asked to stop, and all of them do.
    pretrain.train(trial, sweep, cache, should_stop=stop_after(stop if rank else 10**6))


@pytest.mark.parametrize("stage", [0, 2])
def test_the_loop_serves_two_workers_as_it_serves_one(
    stage: int, tiny_trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain.train(tiny_trial, one, cache)
    trial = variant(tiny_trial, deepspeed={"stage": stage})
    for start, stop in enumerate((20, 10**6)):
        two_workers(_worker, trial, two, cache, stop)
        reached = records.scan(two, "trials").collect()
        assert reached["status"].item() == ("done" if start else "running")
    a, b = scalars(one, tiny_trial), scalars(two, trial)
    keys = ["step", "split", "metric", "layer"]
    assert a.select(keys).equals(b.select(keys))
    np.testing.assert_allclose(a["value"], b["value"], rtol=1e-3, atol=1e-4)


def test_accumulation_changes_no_result(
    tiny_trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    parts = variant(tiny_trial, id="parts", deepspeed={"micro_batch": 2})
    for trial in (tiny_trial, parts):
        pretrain.train(trial, tmp_path, cache)
    np.testing.assert_allclose(losses(tmp_path, parts), losses(tmp_path, tiny_trial), atol=1e-4)


ZOO = [
    head_section("sigsoftmax"),
    head_section("monotone", 4),
    head_section("mlp", 4),
    head_section("mos", 4, experts=3),
    head_section("backward", backward=4, directions="own", refresh=10),
]


@pytest.mark.parametrize("head", ZOO, ids=zoo.label)
def test_every_head_trains_and_resumes_bit_for_bit(
    head: dict[str, Any], tiny_trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trial = variant(tiny_trial, head=head)
    pretrain.train(trial, whole, cache)
    pretrain.train(trial, parts, cache, should_stop=stop_after(25))
    pretrain.train(trial, parts, cache)
    assert scalars(parts, trial).equals(scalars(whole, trial))
    found = losses(whole, trial)
    assert np.mean(found[-5:]) < found[0] - 0.5
    rows = scalars(whole, trial).filter(pl.col("metric") == "achieved_rank")
    reached = rows.sort("step")["value"][-1]
    # 32 tokens in 16 dimensions: what is not linear passes the rank of its matrix.
    assert reached == {"backward": 16, "mlp": 3}.get(head["kind"], 32)
    assert records.scan(whole, "trials").collect()["head"].item() == zoo.label(head)


def test_a_mixture_trains_with_its_parameters_sharded(
    tiny_trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    """ZeRO-3, where the chunks that are made again in the backward pass need the head whole."""
    mixture = head_section("mos", 4, experts=3)
    one = variant(tiny_trial, head=mixture)
    sharded = variant(one, id="sharded", deepspeed={"stage": 3})
    pretrain.train(one, tmp_path, cache)
    train_apart(sharded, tmp_path, cache)
    np.testing.assert_allclose(losses(tmp_path, sharded), losses(tmp_path, one), atol=1e-3)


def test_bf16_trains(tiny_trial: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    half = variant(tiny_trial, train={"precision": "bf16"})
    assert pretrain.train(half, tmp_path, cache).status == "done"
    found = losses(tmp_path, half)
    assert found[-1] < found[0] - 0.5
    assert len({round(x, 6) for x in found}) == len(found)  # a bf16 loss would repeat itself
    sharded = variant(half, id="sharded", deepspeed={"stage": 1})
    pretrain.train(sharded, tmp_path, cache)
    np.testing.assert_allclose(losses(tmp_path, sharded), found, atol=2e-3)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_trial_that_diverges_is_marked(
    stage: int, tiny_trial: dict[str, Any], tmp_path: Path, cache: Path, monkeypatch: Any
) -> None:
    honest, calls = heads.LinearHead.forward, iter(range(10**6))

    def broken(self: Any, hidden: torch.Tensor, labels: Any = None) -> torch.Tensor:
        loss = honest(self, hidden, labels)
        return loss * math.nan if labels is not None and next(calls) == 10 else loss

    monkeypatch.setattr(heads.LinearHead, "forward", broken)
    trial = variant(tiny_trial, deepspeed={"stage": stage})
    assert pretrain.train(trial, tmp_path, cache)[:2] == ("diverged", 10)
    assert records.scan(tmp_path, "trials").collect()["status"].to_list() == ["diverged"]
    assert len(losses(tmp_path, trial)) == 10


def test_a_real_explosion_is_marked(
    tiny_trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    wild = variant(tiny_trial, train={"lr": 1e38, "clip": 0.0})
    assert pretrain.train(wild, tmp_path, cache).status == "diverged"


def test_the_exported_model_is_the_trained_one(
    tiny_trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    from transformers import AutoModelForCausalLM

    pretrain.train(tiny_trial, tmp_path, cache)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trials" / tiny_trial["id"] / "model")
    text = corpus.find(corpus.key(tiny_trial["text"]), cache)
    assert text is not None
    shard = text.shard("held_out")
    blocks = records.scan(tmp_path, "blocks").filter(
        (pl.col("split") == "held_out") & (pl.col("step") == 48)
    )
    some = blocks.collect().head(5)
    ids = torch.from_numpy(corpus.rows(shard, 64, some["block"].to_list()))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits.double()
    exact = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(5, 64)
    np.testing.assert_allclose(some["loss"], exact.mean(1), atol=1e-5)


def test_an_exported_low_rank_head_loads_back(
    tiny_trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    low = variant(tiny_trial, head=head_section("linear", 2))
    pretrain.train(low, tmp_path, cache)
    model = pretrain.build(low, 1024)
    model.model.load_state_dict(final(tmp_path, low))
    spectra = records.scan(tmp_path, "spectra").filter(pl.col("step") == 48).collect()
    sigma = spectra.filter(pl.col("matrix") == "head")["sigma"]
    out, down = model.head.factors()
    expected = np.linalg.svd((out @ down).detach().double().numpy(), compute_uv=False)
    np.testing.assert_allclose(sigma[:2], expected[:2], rtol=1e-5)
    assert sigma[2:].to_list() == [0.0] * 14


def test_every_measure_is_there(tiny_trial: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    reports: list[dict[str, Any]] = []
    pretrain.train(tiny_trial, tmp_path, cache, reports.append)
    table = records.scan(tmp_path, "scalars").filter(pl.col("step") == 48).collect()
    each = "loss accuracy entropy perplexity bits_per_byte unigram_loss"
    once = "achieved_rank gradient_survival"
    states = (
        "anisotropy anisotropy_between anisotropy_first rankme isoscore_star participation_ratio "
        "alpha_req norm mean_share"
    )
    spectra = (
        "singular_entropy singular_entropy_1 effective_rank stable_rank spectral_rank "
        "participation_ratio condition_number exponent"
    )
    frequency = [f"frequency_correlation{c}_{i}" for c in ("", "_centred") for i in range(4)]
    deciles = {m for m in table["metric"] if m.startswith("loss_decile_")}
    wanted = {
        "train": {"loss", "gradient_norm", "learning_rate"},
        "seen": set(each.split()),
        "held_out": {*each.split(), *once.split(), *states.split(), *deciles},
        "": {m + c for m in spectra.split() for c in ("", "_centred", "_functional")}
        - {"condition_number_functional"}
        | {*frequency, "frequency_share", "singular_entropy_rank", *TIMING},
    }
    for split, metrics in wanted.items():
        assert set(table.filter(pl.col("split") == split)["metric"]) == metrics
    assert len(deciles) >= 8  # one word may be more than a tenth of all
    of_layers = table.filter(pl.col("layer").is_not_null())
    assert {(row["metric"], row["layer"]) for row in of_layers.to_dicts()} == {
        (metric, layer) for metric in states.split() for layer in (0, 1, -1)
    }
    blocks = records.scan(tmp_path, "blocks").filter(pl.col("split") == "held_out").collect()
    last = blocks.filter(pl.col("step") == 48)
    mean = table.filter((pl.col("split") == "held_out") & (pl.col("metric") == "loss"))
    assert last.height == 4096 // 64
    assert mean["value"].item() == pytest.approx(last["loss"].mean())
    assert mean["stderr"].item() == pytest.approx(last["loss"].std() / 8)
    assert set(blocks.filter(pl.col("step") == 0)["block"]) < set(last["block"])
    assert records.scan(tmp_path, "spectra").collect()["step"].unique().len() == 4
    # What was reported along the way is all that was recorded.
    assert (
        sum(len(r["rows"]) for r in reports) == records.scan(tmp_path, "scalars").collect().height
    )


@pytest.mark.parametrize(
    ("probes", "wanted"),
    [
        ({"schedule": "linear", "count": 4}, [0, 16, 32, 48]),
        ({"steps": [0, 5, 40, 999]}, [0, 5, 40, 48]),
        ({"count": 3}, [0, 1, 48]),
    ],
)
def test_it_measures_when_it_was_asked_to(
    probes: dict[str, Any],
    wanted: list[int],
    tiny_trial: dict[str, Any],
    tmp_path: Path,
    cache: Path,
) -> None:
    trial = variant(tiny_trial, probes={**probes, "layers": "last", "final_tokens": 1024})
    pretrain.train(trial, tmp_path, cache)
    table = scalars(tmp_path, trial).filter(pl.col("metric") == "anisotropy")
    assert table["step"].to_list() == wanted
    assert set(table["layer"]) == {-1}


def test_it_measures_whenever_the_loss_has_fallen_also_when_resumed(
    tiny_trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    trial = variant(tiny_trial, probes={"steps": [0], "loss": 0.25})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain.train(trial, whole, cache)
    assert pretrain.train(trial, parts, cache, should_stop=stop_after(20)).status == "stopped"
    pretrain.train(trial, parts, cache)
    assert scalars(parts, trial).equals(scalars(whole, trial))
    # The same from the losses of every step: their smoothed mean, in closed form.
    every, due = losses(whole, trial), []
    weights = [0.9 ** np.arange(i + 1)[::-1] for i in range(len(every))]
    smoothed = [w @ every[: len(w)] / w.sum() for w in weights]
    before = smoothed[0]
    for step, now in enumerate(smoothed, 1):
        if now <= before - 0.25:
            before = now
            due.append(step)
    found = scalars(whole, trial).filter(pl.col("metric") == "singular_entropy")["step"].to_list()
    assert found == sorted({0, *due, 48}) and len(found) > 5


def test_kept_weights_are_those_of_their_step(
    tiny_trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    trial = {**tiny_trial, "keep_weights": True, "checkpoints": 3}
    pretrain.train(trial, tmp_path, cache)
    folder = tmp_path / "trials" / trial["id"]
    kept = sorted((folder / "weights").iterdir())
    assert [p.name for p in kept] == ["step-000000016", "step-000000032"]
    # A run that stops there has the same weights in its checkpoint.
    other = tmp_path / "other"
    pretrain.train(trial, other, cache, should_stop=stop_after(32))
    from safetensors.torch import load_file

    found = load_file(kept[1] / "model.safetensors")
    state = torch.load(
        next((other / "trials" / trial["id"] / "checkpoints").glob("*/engine/mp_rank_00*")),
        weights_only=False,  # written just above
    )["module"]
    for name, weight in found.items():
        assert torch.equal(weight, state[f"model.{name}"]), name
    assert (kept[1] / "config.json").is_file() and (kept[1] / "tokenizer.json").is_file()


def test_the_gradient_norm_is_the_gradients(
    tiny_trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    pretrain.train(tiny_trial, tmp_path, cache)
    found = scalars(tmp_path, tiny_trial).filter(pl.col("metric") == "gradient_norm")["value"][0]
    text = corpus.find(corpus.key(tiny_trial["text"]), cache)
    assert text is not None
    model = pretrain.build(tiny_trial, 1024)
    ids = corpus.batch(text.shard("train"), 64, 8, tiny_trial["seed"], 0)
    model(torch.from_numpy(ids)).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    assert found == pytest.approx(math.sqrt(squares), rel=1e-5)


@pytest.mark.parametrize("offload", [False, True])
def test_no_compiler_is_called(
    offload: bool, tiny_trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    """On a PATH of compilers that only leave a note of their being called."""
    (tmp_path / "bin").mkdir()
    for name in ("cc", "gcc", "g++", "c++", "clang", "ld", "ninja", "nvcc"):
        compiler = tmp_path / "bin" / name
        compiler.write_text(f"#!/bin/sh\necho {name} $@ >> {tmp_path / 'called'}\nexit 1\n")
        compiler.chmod(0o755)
    env = {**os.environ, "PATH": str(tmp_path / "bin"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "x")}
    trial = variant(tiny_trial, deepspeed={"stage": 2 * offload, "offload": offload})
    train_apart(trial, tmp_path / "sweep", cache, env)
    assert not (tmp_path / "called").exists(), (tmp_path / "called").read_text()
