"""What MODEL, --revisions and --checkpoints stand for."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from analysis.errors import BadInput
from orchestrator import grid, ledger, series
from tests.conftest import TINY
from trainables import pretrain


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A sweep of three trials in it: one done, its weights kept along the way, one under way, and
    one that is yet to begin."""
    runs = tmp_path_factory.mktemp("runs")
    short = {"tokens": 3072, "batch": 8, "sequence": 64}
    raw = {**yaml.safe_load(TINY), "train": short, "checkpoints": 3, "keep_weights": True}
    raw |= {"model": {"size": "nano-8"}, "head": {"rank": [2, 4, "full"]}}
    (runs / "tiny.yaml").write_text(yaml.safe_dump(raw))
    sweep = runs / "tiny"
    for i, trial in enumerate(grid.load(runs / "tiny.yaml").trials):
        calls = iter(range(3))
        stop: list[Callable[[], bool]] = [lambda: False, lambda n=calls: next(n, None) is None]
        if i < len(stop):
            pretrain.train(trial, sweep, cache, should_stop=stop[i])
        ledger.write(sweep, {"id": trial["id"], "trial": trial, "status": "waiting"})
    (sweep / "plan.json").write_text("{}")
    return runs


def resolve(
    *models: str | Path, revisions: tuple[str, ...] = (), out: Path = Path("runs"), **options: Any
) -> list[series.Series]:
    given = {"folders": (), "tensor": None, "pickle": False, **options}
    return series.resolve(tuple(map(str, models)), revisions, out=out, **given)


def folder(path: Path) -> series.Series:
    (found,) = resolve(folders=(str(path),))
    return found


@pytest.mark.parametrize(
    ("pattern", "revisions"),
    [
        ("main", ["main"]),
        ("step{1..3}", ["step1", "step2", "step3"]),
        ("step{5..5}", ["step5"]),
        ("step{1000..3000..1000}", ["step1000", "step2000", "step3000"]),
        ("step{1..6..2}", ["step1", "step3", "step5"]),
        ("step{008..010}", ["step008", "step009", "step010"]),
        ("step{0,1,512}", ["step0", "step1", "step512"]),
        ("{a,b}-step{1..2}", ["a-step1", "a-step2", "b-step1", "b-step2"]),
        ("step{1..3..2}-{a,b}", ["step1-a", "step1-b", "step3-a", "step3-b"]),
    ],
)
def test_braces_stand_for_revisions(pattern: str, revisions: list[str]) -> None:
    assert list(series.expand(pattern)) == revisions


@pytest.mark.parametrize("pattern", ["{main,step{1..2}}", "{step{1..2},main}"])
def test_braces_may_be_nested(pattern: str) -> None:
    assert set(series.expand(pattern)) == {"main", "step1", "step2"}


@pytest.mark.parametrize("pattern", ["step{3..1}", "step{1..9..0}"])
def test_an_empty_range_is_refused(pattern: str) -> None:
    with pytest.raises(BadInput, match=r"^--revisions: \{.*\} is empty; write"):
        list(series.expand(pattern))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step1000", 1000),
        ("stage1-step1000-tokens5B", 1000),
        ("checkpoint-500", 500),
        ("ckpt_20", 20),
        ("global_step0", 0),
        ("seed3-Step_40", 40),
        ("step-000000016", 16),
        ("main2-700", 700),
    ],
)
def test_a_step_is_read_off_a_name(name: str, step: int) -> None:
    assert series.step(name) == step


@pytest.mark.parametrize("name", ["main", "step", ""])
def test_a_name_without_a_step_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="no training step in this name"):
        series.step(name)


def test_a_hub_model_is_a_series_of_its_revisions() -> None:
    (found,) = resolve("owner/name", revisions=("step{10..20..10}", "step3", "step10"))
    assert (found.name, found.identity, found.bare) == ("name", "owner/name", False)
    assert [(at, source["model"]["revision"]) for at, source in found.sources.items()] == [
        (3, "step3"),
        (10, "step10"),
        (20, "step20"),
    ]
    assert {s["model"]["pretrained"] for s in found.sources.values()} == {"owner/name"}


@pytest.mark.parametrize("revisions", [(), ("main",)])
def test_one_revision_without_a_number_is_step_0(revisions: tuple[str, ...]) -> None:
    (found,) = resolve("gpt2", revisions=revisions)
    assert [(at, s["model"]["revision"]) for at, s in found.sources.items()] == [
        (0, revisions[0] if revisions else None)
    ]


@pytest.mark.parametrize(
    ("revisions", "told"),
    [
        (("main", "step1"), "main: no training step"),
        (("seed1-step7", "seed2-step7"), "seed2-step7 and seed1-step7 are both named by step 7"),
    ],
)
def test_revisions_that_are_no_steps(revisions: tuple[str, ...], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        resolve("owner/name", revisions=revisions)


def test_checkpoints_of_a_folder_go_by_number_not_by_name(tmp_path: Path) -> None:
    for name in ("step9", "step10", "step100"):
        (tmp_path / name).mkdir()
    found = folder(tmp_path)
    assert list(found.sources) == [9, 10, 100]
    places = [s["model"]["pretrained"] for s in found.sources.values()]
    assert places == [str(tmp_path / name) for name in ("step9", "step10", "step100")]
    assert (found.name, found.identity) == (tmp_path.name, str(tmp_path))


def test_what_is_no_checkpoint_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / ".checkpoint-6").mkdir()  # half written
    (tmp_path / "logs").mkdir()
    for file in ("events.7.out", "log8.txt", "config.json", "optimizer-9.pt"):
        (tmp_path / file).touch()
    assert list(folder(tmp_path).sources) == [5]


def test_files_of_a_folder_are_checkpoints(tmp_path: Path) -> None:
    for file in ("w-1.gguf", "w-2.gguf"):
        (tmp_path / file).touch()
    models = [source["model"] for source in folder(tmp_path).sources.values()]
    assert [(m["pretrained"], m["gguf_file"]) for m in models] == [
        (str(tmp_path), "w-1.gguf"),
        (str(tmp_path), "w-2.gguf"),
    ]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["step7", "checkpoint-7"], "step7 and checkpoint-7 are both named by step 7"),
        (["step7", "step8.npy"], "holds both models and bare matrices"),
        (["logs"], "holds no checkpoints; .* such as step1000"),
        ([], "holds no checkpoints"),
    ],
)
def test_folders_that_are_no_series(tmp_path: Path, names: list[str], told: str) -> None:
    for name in names:
        path = tmp_path / name
        path.touch() if path.suffix else path.mkdir()
    with pytest.raises(BadInput, match=told):
        folder(tmp_path)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^--checkpoints: .*/none: no such folder$"):
        folder(tmp_path / "none")


def test_one_checkpoint_of_any_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: Path
) -> None:
    np.save(tmp_path / "head.npy", np.eye(3))
    (tmp_path / "m.Q8_0.gguf").touch()
    monkeypatch.chdir(tmp_path)
    found = resolve("head.npy", "m.Q8_0.gguf", ".", backbone / "model", tensor="a", pickle=True)
    assert [one.name for one in found] == ["head", "m.Q8_0", tmp_path.name, "model"]
    assert [one.bare for one in found] == [True, False, False, False]
    matrix, gguf, here, model = (one.sources[0] for one in found)
    assert matrix == {"matrix": str(tmp_path / "head.npy"), "tensor": "a"}
    plain = {"revision": None, "gguf_file": None, "pickle": True}
    assert gguf["model"] == {
        **plain,
        "pretrained": str(tmp_path),
        "gguf_file": "m.Q8_0.gguf",
        "pickle": False,
    }
    assert here["model"] == {**plain, "pretrained": str(tmp_path)}
    assert model["model"] == {**plain, "pretrained": str(backbone / "model")}


def test_a_sweep_is_a_series_for_each_trial_that_has_weights(runs: Path) -> None:
    by_rank = {e["trial"]["head"]["rank"]: e["trial"] for e in ledger.read(runs / "tiny").values()}
    found = {one.identity: one for one in resolve("tiny", out=runs)}
    assert found == {one.identity: one for one in resolve(runs / "tiny")}
    assert set(found) == {by_rank[2]["id"], by_rank[4]["id"]}
    whole, part = (found[by_rank[rank]["id"]] for rank in (2, 4))
    assert (whole.name, whole.trial) == (by_rank[2]["name"], by_rank[2])
    folder = runs.resolve() / "tiny" / "trials" / whole.identity
    assert whole.sources == {
        2: {"trial": by_rank[2], "weights": str(folder / "weights" / "step-000000002")},
        4: {"trial": by_rank[2], "weights": str(folder / "weights" / "step-000000004")},
        6: {"trial": by_rank[2], "weights": str(folder / "model")},
    }
    assert list(part.sources) == [2]


def test_one_trial_of_a_sweep(runs: Path) -> None:
    every = {one.identity: one for one in resolve("tiny", out=runs)}
    for id, one in every.items():
        assert resolve(runs / "tiny" / "trials" / id) == [one]
    (waiting,) = ledger.read(runs / "tiny").keys() - every.keys()
    (runs / "tiny" / "trials" / waiting).mkdir()
    with pytest.raises(BadInput, match=f"{waiting}: no weights here yet; .* keep_weights: true"):
        resolve(runs / "tiny" / "trials" / waiting)


def test_revisions_are_of_the_hub_alone(runs: Path, backbone: Path) -> None:
    for name in (backbone / "model", runs / "tiny", runs / "tiny" / "trials"):
        with pytest.raises(BadInput, match=r"--revisions: .* is here, not on a hub"):
            resolve(name, revisions=("step1",))
    with pytest.raises(BadInput, match=r"--revisions: tiny is here"):
        resolve("tiny", revisions=("step1",), out=runs)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none.gguf", "no such file"),
        ("none.npy", "no such file"),
        ("./none", "no such file"),
        ("/none", "no such file"),
        ("a/b/c", "no sweep, file or folder, and no hub name"),
        ("two words", "no sweep, file or folder, and no hub name"),
    ],
)
def test_names_of_nothing(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=told):
        resolve(name)


def test_a_file_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "head.bin").touch()
    with pytest.raises(BadInput, match=r"head.bin: neither a folder nor a .gguf, .npy, .safetens"):
        resolve(tmp_path / "head.bin")


def test_two_series_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "pythia").mkdir()
    with pytest.raises(BadInput, match=r"^pythia: stands twice among the models"):
        resolve(tmp_path / "pythia", "EleutherAI/pythia")


def test_a_fingerprint_tells_a_checkpoint_that_was_written_anew(tmp_path: Path) -> None:
    np.save(tmp_path / "step1.npy", np.eye(3))
    (model := tmp_path / "model").mkdir()
    (model / "config.json").write_text("{}")
    gguf = tmp_path / "w.gguf"
    gguf.write_bytes(b"w")
    for name, file in (
        ("step1.npy", "step1.npy"),
        ("model", "model/config.json"),
        *[("w.gguf",) * 2],
    ):
        (one,) = resolve(tmp_path / name)
        before = series.fingerprint(one.sources[0])
        assert series.fingerprint(one.sources[0]) == before
        os.utime(tmp_path / file, (1, 1))
        assert series.fingerprint(one.sources[0]) != before
    (one,) = resolve("owner/name", revisions=("step{1..2}",))
    assert json.loads(series.fingerprint(one.sources[1]))["revision"] == "step1"
    assert len({series.fingerprint(source) for source in one.sources.values()}) == 2
