"""Checkpoints of one worker and of several, on a disk and on an S3 server."""

import functools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from analysis import sealed
from orchestrator import grid
from tests.conftest import TINY, in_world
from tests.trainables.test_pretrain import losses, scalars, stop_after, variant
from tests.trainables.test_rankfit import trained, trials
from trainables import checkpoint, engine, pretrain, rankfit

END = 10**6  # never asked to stop


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, Any]:
    """Of 16 steps, in batches that one, two and three workers can share."""
    path = tmp_path_factory.mktemp("grid") / "tiny.yaml"
    path.write_text(TINY)
    short = {"tokens": 16 * 6 * 64, "batch": 6}
    return variant(
        grid.load(path).trials[-1], train=short, probes={"count": 2, "final_tokens": 1024}
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, trial: dict[str, Any], cache: Path) -> Path:
    """The sweep in which one worker trained it and was never stopped."""
    sweep = tmp_path_factory.mktemp("whole")
    assert pretrain.train(trial, sweep, cache)[:2] == ("done", 16)
    return sweep


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server with an empty bucket; the address of one in it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where checkpoints are kept."""
    if request.param == "disk":
        return str(tmp_path / "elsewhere")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def _train(
    trial: dict[str, Any],
    sweep: Path,
    cache: Path,
    stop: int,
    outcome: tuple[str, int],
    storage: str | None = None,
    env: dict[str, str] | None = None,
    dies: bool = False,
) -> None:
    """In a worker; one that `dies` is killed after the shards and before the manifest."""
    os.environ.update(env or {})
    if dies:
        for kind in (checkpoint._Disk, checkpoint._Remote):
            kind.commit = lambda *args: os._exit(9)  # type: ignore[method-assign]
    asked = stop_after(stop)
    assert pretrain.train(trial, sweep, cache, should_stop=asked, storage=storage)[:2] == outcome


def _aws() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k.startswith("AWS_")}


@pytest.mark.parametrize(
    ("stage", "offload", "micro"),
    [(0, False, 1), (1, False, None), (2, True, 1), (3, False, None)],
)
def test_any_number_of_workers_goes_on_where_others_stopped(
    stage: int,
    offload: bool,
    micro: int | None,
    trial: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    cache: Path,
) -> None:
    """Two, then three, then one, against one that is never stopped."""
    cut, wanted = tmp_path / "cut", losses(whole, trial)
    how = {"stage": stage, "offload": offload, "micro_batch": micro}
    other = variant(trial, deepspeed=how)
    folder = cut / "trials" / trial["id"] / "checkpoints"
    for workers, stop in ((2, 5), (3, 10)):
        in_world(workers, _train, other, cut, cache, 5, ("stopped", stop))
        kept = max(folder.iterdir())
        state = json.loads((kept / "state.json").read_text())
        assert (state["world"], state["stage"], state["step"]) == (workers, stage, stop)
        assert kept.name in {name for name, _, bad in checkpoint.verify(kept.parent) if not bad}
        shards = [f.name for f in kept.rglob("*optim_states.pt")]
        assert len(shards) == (workers if stage else 0)
    in_world(1, _train, other, cut, cache, END, ("done", 16))
    assert len(wanted) == 16
    np.testing.assert_allclose(losses(cut, trial), wanted, atol=1e-4)


def test_a_trial_goes_on_from_the_last_whole_checkpoint(
    storage: str,
    trial: dict[str, Any],
    whole: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Though one is damaged, and another without its manifest."""
    keep = functools.partial(checkpoint.save, keep=3)
    monkeypatch.setattr(checkpoint, "save", keep)
    cut = tmp_path / "cut"
    pretrain.train(trial, cut, cache, should_stop=stop_after(13), storage=storage)
    assert not (cut / "trials" / trial["id"] / "checkpoints").exists()
    url = f"{storage}/{trial['id']}"
    files, root = fsspec.url_to_fs(url)
    names = [f"step-{step:09d}" for step in (8, 12, 13)]
    assert sorted(p.rsplit("/", 1)[1] for p in files.ls(root, detail=False)) == names
    weights = f"{root}/{names[2]}/engine/mp_rank_00_model_states.pt"
    flipped = bytearray(files.cat_file(weights))
    flipped[len(flipped) // 2] ^= 1
    files.pipe_file(weights, bytes(flipped))
    files.rm_file(f"{root}/{names[1]}/manifest.json")
    steps: list[int] = []
    again = pretrain.train(trial, cut, cache, lambda p: steps.append(p["step"]), storage=storage)
    assert again[:2] == ("done", 16) and 8 < min(steps) <= 12
    assert caplog.text.count("damaged (engine/mp_rank_00_model_states.pt)") == 1
    assert scalars(cut, trial).equals(scalars(whole, trial))
    # What came after the one that was gone on from, and had no part in this run, is gone.
    assert [p.rsplit("/", 1)[1] for p in sorted(files.ls(root, detail=False, refresh=True))] == [
        "step-000000008",
        "step-000000012",
    ]


def test_a_kill_before_the_manifest_leaves_the_checkpoint_before(
    storage: str, trial: dict[str, Any], whole: Path, tmp_path: Path, cache: Path
) -> None:
    trial = variant(trial, deepspeed={"stage": 2})
    sweep, url = tmp_path / "sweep", f"{storage}/{trial['id']}"
    in_world(2, _train, trial, sweep, cache, 5, ("stopped", 5), storage, _aws())
    with pytest.raises((ProcessExitedException, ProcessRaisedException)):
        in_world(2, _train, trial, sweep, cache, 5, ("stopped", 10), storage, _aws(), True)
    shards = "engine/zero_pp_rank_{}_mp_rank_00_optim_states.pt"
    left = [p for p in _files(url) if "step-000000008" in p]
    assert any(p.endswith(shards.format(1)) for p in left)
    assert not any(p.endswith("manifest.json") for p in left)
    in_world(2, _train, trial, sweep, cache, 5, ("stopped", 10), storage, _aws())
    wanted = ["state.json", "manifest.json", "engine/mp_rank_00_model_states.pt"]
    wanted += [name for rank in (0, 1) for name in (shards.format(rank), f"generators-{rank}.json")]
    kept = [f"step-0000000{step}/{name}" for step in ("08", "10") for name in sorted(wanted)]
    assert _files(url) == kept
    pretrain.train(trial, sweep, cache, storage=storage)
    np.testing.assert_allclose(losses(sweep, trial), losses(whole, trial), atol=1e-4)


def _files(url: str) -> list[str]:
    """What lies under a folder or URL."""
    files, root = fsspec.url_to_fs(url)
    files.invalidate_cache()
    return sorted(p.removeprefix(root).strip("/") for p in files.find(root))


def _heavier(folder: Path, factor: float) -> None:
    """The last matrix of a checkpoint multiplied, and all checksums right."""
    kept = max(folder.glob("step-*"))
    file = kept / "engine" / "mp_rank_00_model_states.pt"
    states = torch.load(file, weights_only=False)  # written just before
    [w for w in states["module"].values() if w.ndim == 2][-1].mul_(factor)
    torch.save(states, file)
    sums = sealed.read(kept / "manifest.json")
    sums["engine/mp_rank_00_model_states.pt"] = sealed.digest(file)
    sealed.write(kept / "manifest.json", sums)
    assert kept.name in {name for name, _, bad in checkpoint.verify(kept.parent) if not bad}


SAID = r"checkpoint of step {}.* the loss ahead was (\d\.\d+) then and is (\d\.\d+) now"


@pytest.mark.parametrize(("precision", "factor"), [("fp32", 1.01), ("bf16", 1.5)])
def test_weights_that_are_not_those_that_were_saved_are_refused(
    precision: str, factor: float, trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    trial = variant(trial, train={"precision": precision})
    folder = tmp_path / "trials" / trial["id"] / "checkpoints"
    pretrain.train(trial, tmp_path, cache, should_stop=stop_after(9))
    assert pretrain.train(trial, tmp_path, cache, should_stop=stop_after(0))[:2] == ("stopped", 9)
    _heavier(folder, factor)
    with pytest.raises(RuntimeError, match=SAID.format(9)):
        pretrain.train(trial, tmp_path, cache)


def test_a_heads_weights_that_are_not_those_that_were_saved_are_refused(
    backbone: Path, cache: Path, tmp_path: Path
) -> None:
    trial = trained(trials(tmp_path, backbone))[0]
    rankfit.fit([trial], tmp_path, cache, should_stop=stop_after(5))
    _heavier(tmp_path / "trials" / trial["id"] / "checkpoints", 1.01)
    with pytest.raises(RuntimeError, match=SAID.format(5)):
        rankfit.fit([trial], tmp_path, cache)


def test_the_loss_ahead_is_that_of_the_next_batchs_first_sequence(
    trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    """Of one sequence to a batch: the loss that training sees next."""
    single = variant(trial, train={"batch": 1, "tokens": 12 * 64})
    pretrain.train(single, tmp_path / "whole", cache)
    pretrain.train(single, tmp_path / "cut", cache, should_stop=stop_after(7))
    kept = max((tmp_path / "cut" / "trials" / trial["id"] / "checkpoints").iterdir())
    ahead = json.loads((kept / "state.json").read_text())["ahead"]
    assert ahead == pytest.approx(losses(tmp_path / "whole", trial)[7], rel=1e-6)


class _Square(torch.nn.Linear):
    """Some weights and a loss."""

    def __init__(self, biases: int) -> None:
        super().__init__(8, biases)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square().mean()


def _draw(folder: Path, drawn: Path, biases: int) -> None:
    """The next random number of each worker: after a checkpoint, or from its own seed."""
    engine.join(1, gpu=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    with checkpoint.latest(folder, 1, drawn) as saved:
        universal = saved is not None and saved.universal
        run = engine.start(_Square(biases), 6, None, 0.1, 0.1, 1.0, "fp32", 1, universal=universal)
        torch.manual_seed(7 + rank)
        if saved:
            checkpoint.load(run, saved)
        else:
            run.backward(run(torch.rand(3, 8)))
            run.step()
            checkpoint.save(run, folder, {"step": 1, "files": {}})
    (drawn / f"{rank} of {world}").write_text(str(torch.rand(1).item()))


def test_workers_that_were_there_go_on_drawing_and_new_ones_start(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    in_world(2, _draw, folder, tmp_path, 32)
    before = _contents(folder)
    in_world(3, _draw, folder, tmp_path, 32)
    assert before and _contents(folder) == before  # it was converted elsewhere
    found = {f.name: float(f.read_text()) for f in tmp_path.glob("? of ?")}
    assert found["0 of 3"] == found["0 of 2"] and found["1 of 3"] == found["1 of 2"]
    assert found["2 of 3"] == torch.rand(1, generator=torch.Generator().manual_seed(9)).item()
    assert len(set(found.values())) == 3


def test_too_many_workers_for_too_few_weights_are_refused(tmp_path: Path) -> None:
    """ZeRO hands out even numbers of weights: of eight to three workers 4, 4 and none."""
    in_world(2, _draw, tmp_path / "checkpoints", tmp_path, 8)
    with pytest.raises(ProcessRaisedException, match="too small for 3 workers to share"):
        in_world(3, _draw, tmp_path / "checkpoints", tmp_path, 8)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_another_zero_stage_cannot_take_over(
    trial: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    pretrain.train(trial, tmp_path, cache, should_stop=stop_after(5))
    other = variant(trial, deepspeed={"stage": 1})
    with pytest.raises(RuntimeError, match="written with stage 0, cannot go on with stage 1"):
        pretrain.train(other, tmp_path, cache)
