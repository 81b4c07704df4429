"""The arithmetic of ZeRO against its paper, and against what a real DeepSpeed engine holds."""

import gc
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis.errors import BadInput
from tests.conftest import head_section, two_workers
from trainables import backbones, engine, heads, pretrain, zero

# Rajbhandari et al. 2020, table 1: GB of a model of 7.5 billion parameters, by workers, in stages
# 1, 2, 3. Its caption's figure 1 gives 120 without ZeRO.
TABLE = {
    1: (120, 120, 120),
    4: (52.5, 41.3, 30),
    16: (35.6, 21.6, 7.5),
    64: (31.4, 16.6, 1.88),
    256: (30.4, 15.4, 0.47),
    1024: (30.1, 15.1, 0.12),
}
# Brown et al. 2020, table D.1: parameters of GPT-3 models, petaFLOP/s-days of 300 billion tokens.
GPT3 = {2.65e9: 55.2, 6.66e9: 139, 12.85e9: 268, 174.6e9: 3640}
A100 = 80e9  # bytes
SIZE, VOCABULARY, PRECISIONS = "nano-256", 4096, ("fp32", "bf16")


@pytest.mark.parametrize("workers", TABLE)
def test_model_states_are_those_of_the_zero_paper(workers: int) -> None:
    found = [zero.states(7.5e9, stage, workers, "bf16", False).states / 1e9 for stage in range(4)]
    assert found[0] == 120
    # As the paper rounds: to three digits, or to hundredths of a GB.
    assert found[1:] == pytest.approx(TABLE[workers], rel=0.003, abs=0.006)


def _trial(size: str) -> dict[str, Any]:
    """What `pretrain.build` reads of it."""
    return {
        "seed": 0,
        "model": {"size": size, "residual": None, "tied": False},
        "head": head_section("linear"),
        "train": {"sequence": 512},
    }


def _held() -> list[int]:
    """Bytes of every storage that a tensor holds which came alive since the last `gc.freeze`."""
    for _ in range(4):  # each of gloo's threads holds what it sent last until it has new work
        torch.distributed.all_reduce(torch.zeros(1))
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return list(storages.values())


def _engine_holds(precision: str, stage: int) -> dict[str, Any]:
    """Of a real engine in two steps of two micro-batches: bytes at the most before an update and
    within it, without buckets; and how many buckets after each micro-batch of the last step."""
    gc.freeze()
    bucket = zero.bytes_each(precision) * zero.BUCKET
    model = pretrain.build(_trial(SIZE), VOCABULARY)
    params = sum(p.numel() for p in model.parameters())
    batch = 2 * torch.distributed.get_world_size()
    run = engine.start(model, batch, 1, 1e-3, 0.1, 1.0, precision, stage)
    ids, before, within = torch.zeros(1, 33, dtype=torch.long), [], []
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    inner.register_step_pre_hook(lambda *_: within.append(_held()))
    for _ in range(4):
        run.backward(run(ids))
        before.append(_held())
        run.step()
    engine.stop(run)
    return {
        "params": params,
        "before": max(sum(size for size in held if size != bucket) for held in before),
        "within": max(sum(size for size in held if size != bucket) for held in within),
        "buckets": [held.count(bucket) for held in before[2:]],
    }


def _measure(rank: int, store: Path, workers: int, out: Path) -> None:
    """Alone, each process measures one precision; together, both measure both."""
    if workers == 2:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=2
        )
    engine.join(1, gpu=False)
    mine = PRECISIONS if workers == 2 else PRECISIONS[rank : rank + 1]
    # Stage 3 last: its engine is not freed.
    for stage, precision in itertools.product(range(4), mine):
        found = _engine_holds(precision, stage)
        if workers == 1 or rank == 0:
            (out / f"{precision}-{stage}").write_text(json.dumps(found))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_engine_holds_what_the_arithmetic_says(workers: int, tmp_path: Path) -> None:
    two_workers(_measure, workers, tmp_path)
    for stage, precision in itertools.product(range(4), PRECISIONS):
        found = json.loads((tmp_path / f"{precision}-{stage}").read_text())
        said = zero.states(found["params"], stage, workers, precision, False)
        # Stage 3 shards no parameter of fewer than 100,000 elements.
        near = 0.03 if stage == 3 else 0.005
        assert found["before"] == pytest.approx(said.states, rel=near), (stage, precision)
        # Of the two groups, weights and the rest, one is updated at a time.
        assert found["within"] == pytest.approx(said.states + said.update, rel=near)
        # While gradients come in; in stage 1 until all have, in stage 3 always.
        assert found["buckets"] == ([0, 0], [1, 0], [0, 0], [1, 1])[stage]


def _peak(work: Any) -> int:
    """Bytes at the highest that `work` allocates on top of what there was."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    at, highest = 0, 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            at += event.nbytes()
            highest = max(highest, at)
    return highest


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("size", "sequence", "micro"), [("nano-256", 256, 4), ("pythia-14m", 512, 2)]
)
def test_a_pass_allocates_activations_and_loss(
    size: str, sequence: int, micro: int, precision: str, one_thread: None
) -> None:
    model = pretrain.build(_trial(size), VOCABULARY)
    model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    ids, shape = torch.zeros(micro, sequence + 1, dtype=torch.long), backbones.LADDER[size]
    tokens, kept = micro * sequence, []
    form = zero.Shape(0, shape.layers, shape.d, shape.heads, VOCABULARY)
    said = zero.activations(form, tokens, precision) + zero.loss(form, tokens, precision)
    assert _peak(lambda: kept.append(model(ids))) == pytest.approx(said, rel=0.03)


KINDS = [
    {"rank": 8},
    {"kind": "sigsoftmax"},
    {"kind": "monotone"},
    {"kind": "mlp", "rank": 8},
    {"kind": "mos", "experts": 3},
]


@pytest.mark.parametrize("section", KINDS, ids=lambda s: s.get("kind", "linear"))
def test_a_loss_holds_its_chunks_of_logits(section: dict[str, Any], one_thread: None) -> None:
    head = heads.make({**head_section("linear"), **section}, VOCABULARY, 64)
    hidden = torch.randn(1024, 64, requires_grad=True)
    labels = torch.zeros(1024, dtype=torch.long)
    chunks = zero.CHUNKS[section.get("kind", "linear")] * section.get("experts", 1)
    shape = zero.Shape(0, 1, 64, 1, VOCABULARY, section.get("rank"), chunks)
    peak = _peak(lambda: head(hidden, labels).backward())
    assert peak == pytest.approx(zero.loss(shape, 1024, "fp32"), rel=0.06)


def test_a_chunk_is_that_of_the_heads() -> None:
    assert zero.CHUNK == heads.CHUNK


def _shape(name: str) -> zero.Shape:
    """Of a Pythia model."""
    d, layers, count, _, vocabulary, _ = backbones.LADDER[name]
    params = 2 * vocabulary * d + layers * (12 * d * d + 13 * d) + 2 * d
    return zero.Shape(params, layers, d, count, vocabulary)


@given(
    room=st.floats(5e9, 2e11),
    name=st.sampled_from([name for name in backbones.LADDER if name.startswith("pythia")]),
    workers=st.sampled_from([1, 2, 8, 64]),
    precision=st.sampled_from(PRECISIONS),
)
def test_the_choice_fits_and_nothing_simpler_does(
    room: float, name: str, workers: int, precision: str
) -> None:
    shape, share = _shape(name), 8
    ways = [(stage, False) for stage in range(4)] + [(2, True), (3, True)]
    totals = {
        (*way, micro): zero.memory(shape, 2048, micro, way[0], workers, precision, way[1]).total
        for way in ways
        for micro in (1, 2, 4, 8)
    }
    try:
        chosen = zero.choose(room, shape, 2048, share * workers, workers, precision)
    except BadInput as error:
        assert min(totals.values()) > room
        assert f"{min(totals.values()) / 1e9:.1f} GB" in str(error)
        return
    way, micro = (chosen.stage, chosen.offload), chosen.micro_batch
    assert chosen.memory.total == totals[*way, micro] <= room
    assert all(totals[*simpler, 1] > room for simpler in ways[: ways.index(way)])
    assert all(totals[*way, larger] > room for larger in (2, 4, 8) if larger > micro)


def test_the_ladder_is_counted_as_it_is_built() -> None:
    """The closed form of the test above, against the model itself."""
    for name in ("pythia-14m", "pythia-410m"):
        vocabulary = backbones.LADDER[name].vocabulary
        model = {"size": name, "residual": None, "tied": False}
        form = backbones.shape(backbones.configuration(model, vocabulary, 2048))
        assert _shape(name).params == form.body + 2 * form.embedding
        assert _shape(name).heads == form.heads


def test_offloading_moves_states_to_the_host() -> None:
    shape = _shape("pythia-6.9b")
    for stage in (2, 3):
        here, away = (zero.memory(shape, 2048, 1, stage, 8, "bf16", off) for off in (False, True))
        assert here.total - away.total == pytest.approx(here.gradients + here.optimizer)
        # Ren et al. 2021: all but the weights, and gradients in fp32 there.
        assert away.host == pytest.approx(16 * shape.params / 8)
    with pytest.raises(BadInput, match="1 cannot offload"):
        zero.memory(shape, 2048, 1, 1, 8, offload=True)


def test_a_cpu_is_filled_and_not_asked_for_a_whole_bucket() -> None:
    """Nor does it offload: there is nowhere else."""
    shape = _shape("pythia-14m")
    gpu, cpu = (zero.memory(shape, 64, 1, 1, 2, "fp32", gpu=gpu) for gpu in (True, False))
    assert gpu.buffers == 4 * (500_000_000 + shape.params)
    assert cpu.buffers == 4 * 2 * shape.params
    with pytest.raises(BadInput):
        zero.choose(cpu.total / 2, shape, 64, 2, 2, "fp32", gpu=False)


GIVEN: dict[str, Any] = {"stage": None, "offload": None, "micro_batch": None}


def test_the_defaults_fit_eight_gpus_of_40_gb() -> None:
    """With a tenth to spare, and with twice the sequences not; 12b takes more."""
    for size in (name for name in backbones.LADDER if name.startswith("pythia")):
        usual = zero.settings(GIVEN, size, 2048, 128, "bf16")
        room = 0.9 * (49e9 if size == "pythia-12b" else 40e9)
        stage, micro = usual["stage"], usual["micro_batch"]
        assert zero.memory(_shape(size), 2048, micro, stage, 8).total <= room
        assert micro == 128 or zero.memory(_shape(size), 2048, 2 * micro, stage, 8).total > room
    nano = zero.settings(GIVEN, "nano-64", 128, 8, "fp32")
    assert nano == {"stage": 0, "offload": False, "micro_batch": None}
    assert set(zero._usual()) == {*backbones.LADDER, "other"}


@given(
    share=st.integers(1, 300),
    sequence=st.sampled_from([128, 1024, 2048, 8192]),
    size=st.sampled_from(["pythia-70m", "pythia-1.4b", "pythia-12b", "other"]),
    precision=st.sampled_from(PRECISIONS),
)
def test_a_default_micro_batch_divides_the_share_and_keeps_to_its_tokens(
    share: int, sequence: int, size: str, precision: str
) -> None:
    usual = zero.settings(GIVEN, size, 2048, 2**20, "bf16")["micro_batch"]
    micro = zero.settings(GIVEN, size, sequence, share, precision)["micro_batch"]
    most = usual * 2048 * {"bf16": 1, "fp32": 0.5}[precision]
    assert share % micro == 0 and (micro == 1 or micro * sequence <= most)
    assert not any(share % m == 0 and m * sequence <= most for m in range(micro + 1, share + 1))


def test_what_a_grid_gives_stays() -> None:
    given = {"stage": 2, "offload": True, "micro_batch": 3}
    assert zero.settings(given, "pythia-12b", 2048, 12, "bf16") == given
    none = {"stage": 0, "offload": False, "micro_batch": None}
    assert zero.settings(GIVEN, None, 2048, 12, "bf16") == none
    with pytest.raises(BadInput, match=r"deepspeed.offload: stage 0 cannot"):
        zero.settings({**GIVEN, "offload": True}, "pythia-14m", 2048, 12, "bf16")


def test_a_batch_that_the_workers_cannot_share_is_refused() -> None:
    with pytest.raises(BadInput, match="10 is not a multiple of the 8 workers"):
        zero.choose(A100, _shape("pythia-14m"), 2048, 10, 8)


@pytest.mark.parametrize("params", GPT3)
def test_hours_are_those_of_gpt3(params: float) -> None:
    days = zero.hours(params, 300e9, 1, 1e15, 1.0) / 24
    assert days == pytest.approx(GPT3[params], rel=0.01)
    eight = zero.hours(params, 300e9, 8, 312e12, 0.4)
    assert eight * 8 * 312e12 * 0.4 == pytest.approx(24 * days * 1e15)


def test_stage_3_sends_half_as_much_again() -> None:
    sent = [zero.traffic(7.5e9, stage) for stage in range(4)]
    assert sent[0] == sent[1] == sent[2] == 2 * 2 * 7.5e9
    assert sent[3] == 1.5 * sent[0]
