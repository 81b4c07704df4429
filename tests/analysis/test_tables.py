from pathlib import Path

import numpy as np
import pytest

from analysis import figures, printed, records, tables


def trial(id: str, size: str, rank: int | None, loss: float, sweep: Path) -> None:
    """A finished trial of ten steps in the sweep's records."""
    row = dict.fromkeys(records.TABLES["trials"])
    row |= {
        "kind": "pretrain",
        "trial": id,
        "name": f"{size} r={rank or 'full'} s=0",
        "size": size,
        "rank": rank,
    }
    row |= {"seed": 0, "params_without_embeddings": len(size), "status": "done", "step": 10}
    records.write(sweep, "trials", id, 10, [row])
    scalar = {"trial": id, "tokens": 1, "split": "held_out", "layer": None, "time": 0}
    scalars = [
        {**scalar, "step": step, "metric": metric, "value": value, "stderr": 0.01}
        for step, metric, value in (
            (0, "loss", 9.0),
            (10, "loss", loss),
            (10, "unigram_loss", 6.0),
            (10, "accuracy", 0.1),
        )
    ]
    records.write(sweep, "scalars", id, 10, scalars)


def test_final_losses_are_those_of_the_last_step_in_order(tmp_path: Path) -> None:
    trial("a", "big", None, 4.0, tmp_path)
    trial("b", "big", 16, 4.5, tmp_path)
    trial("c", "big", 4, 5.0, tmp_path)
    found = tables.final_losses(tmp_path)
    assert found["trial"].to_list() == ["c", "b", "a"]
    assert found["loss"].to_list() == [5.0, 4.5, 4.0]
    assert found["series"].unique().to_list() == ["big"]
    assert tables.unigram_loss(found) == 6.0


def test_unfinished_trials_are_not_in_the_table(tmp_path: Path) -> None:
    trial("a", "big", None, 4.0, tmp_path)
    row = records.scan(tmp_path, "trials").collect().to_dicts()[0]
    records.write(tmp_path, "trials", "a", 10, [{**row, "status": "diverged"}])
    assert tables.final_losses(tmp_path).is_empty()


def test_latest_takes_the_last_step(tmp_path: Path) -> None:
    trial("a", "big", None, 4.0, tmp_path)
    assert tables.latest(tmp_path) == {"a": {"loss": 4.0}}


def test_paired_differences_cancel_what_makes_a_block_hard(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    hard, noise = random.normal(5, 2, 200), random.normal(0, 0.01, (2, 200))
    for id, shift, rows in (("a", 0.1, slice(0, 150)), ("b", 0.0, slice(0, 200))):
        losses = hard + shift + noise["ab".index(id)]
        records.write(
            tmp_path,
            "blocks",
            id,
            10,
            [
                {"trial": id, "step": 10, "split": "held_out", "block": i, "loss": losses[i]}
                for i in range(200)[rows]
            ],
        )
    gap, stderr = tables.paired_difference(tmp_path, "a", "b")
    expected = (0.1 + noise[0] - noise[1])[:150]
    assert gap == pytest.approx(expected.mean())
    assert stderr == pytest.approx(expected.std(ddof=1) / np.sqrt(150))
    assert stderr < 0.01 < hard.std() / np.sqrt(150)
    with pytest.raises(ValueError, match="share 0"):
        tables.paired_difference(tmp_path, "a", "c")


def test_the_figure_is_drawn_from_the_table(tmp_path: Path) -> None:
    for i, rank in enumerate([4, 16, None]):
        trial(f"a{i}", "big", rank, 5.0 - i, tmp_path)
    shown = figures.loss_vs_rank(tables.final_losses(tmp_path))
    line = shown.points.filter(kind="line").select("x", "y", "label").rows()
    assert line == [(4, 5.0, "4"), (16, 4.0, "16"), (32, 3.0, "full")]
    assert "1 seed," in shown.caption
    path, *_ = printed.write(shown, tmp_path / "report" / "f")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
