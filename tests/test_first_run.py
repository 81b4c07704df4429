"""What a newcomer gets: the corners of the shipped grid on real text; and an installed package."""

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from analysis import records, tables
from orchestrator import grid

ROOT = Path(__file__).parents[1]
FEWER = {
    "[nano-16, nano-32, nano-64, nano-128]": "[nano-16, nano-64]",
    "[4, 8, 16, 32, 64, full]": "[4, full]",
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The sweep of `lmsat sweep --grid ranks.yaml` with two of its sizes and two of its ranks."""
    folder = tmp_path_factory.mktemp("first")
    shipped = grid.find("ranks.yaml").read_text()
    for every, some in FEWER.items():
        assert every in shipped
        shipped = shipped.replace(every, some)
    (folder / "ranks.yaml").write_text(shipped)
    script = Path(sys.executable).parent / "lmsat"
    done = subprocess.run(
        [str(script), "sweep", "--grid", "ranks.yaml"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "ranks"


def by_size(losses: pl.DataFrame) -> Iterator[pl.DataFrame]:
    for _, group in losses.group_by("size", maintain_order=True):
        yield group.sort("rank", nulls_last=True)


@pytest.mark.timeout(900)
def test_loss_falls_with_rank_and_with_size(ranks: Path) -> None:
    losses = tables.final_losses(ranks)
    assert losses.height == 4
    for group in by_size(losses):
        low, full = group["trial"][0], group["trial"][-1]
        assert group["rank"][0] == 4 and group["rank"][-1] is None
        gap, stderr = tables.paired_difference(ranks, low, full)
        assert gap > 2 * stderr
    full = losses.filter(pl.col("rank").is_null()).sort("d")["trial"]
    gap, stderr = tables.paired_difference(ranks, full[0], full[-1])
    assert gap > 2 * stderr


def test_every_cell_beats_word_frequencies(ranks: Path) -> None:
    losses = tables.final_losses(ranks)
    assert (losses["loss"] + 2 * losses["stderr"] < losses["unigram_loss"]).all()
    assert 6 < tables.unigram_loss(losses) < 7


def test_no_trial_is_overfitting_in_a_fraction_of_an_epoch(ranks: Path) -> None:
    """Seen and unseen text cost the same, but for their noise: the split does not leak."""
    last = records.scan(ranks, "scalars").filter(pl.col("metric") == "loss")
    last = last.filter(pl.col("step") == pl.col("step").max())
    wide = last.collect().pivot("split", index="trial", values=["value", "stderr"])
    noise = (wide["stderr_seen"] ** 2 + wide["stderr_held_out"] ** 2).sqrt()
    assert ((wide["value_seen"] - wide["value_held_out"]).abs() < 4 * noise).all()


def test_a_wheel_carries_the_three_rooms_and_the_grids(tmp_path: Path) -> None:
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("lmsat-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {f"orchestrator/grids/{p.name}" for p in grid.SHIPPED.glob("*.yaml")}
    shipped |= {f"analysis/page/report.{kind}" for kind in ("css", "js")}
    assert len(shipped) > 5 and shipped | {"trainables/deepspeed.yaml"} <= names
    rooms = {n.split("/")[0] for n in names if n.endswith(".py")}
    assert rooms == {"orchestrator", "trainables", "analysis"}
    assert any(n.endswith("licenses/LICENSE") for n in names)
