"""Tables and figures of what was measured, from records made by hand."""

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import polars as pl
import pytest
from scipy.special import expit

from analysis import chart, dimension_figures, dimensions, records

V = 1000


def limit(tokens: int) -> float:
    """d that goes to 800 as a law of `growth` says."""
    return float(V * expit(np.log(4) - 3 * (tokens / 10_000) ** -0.5))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two series, of three samples and of one."""
    for trial, estimate, samples in (
        ("a", "paper", (40_000, 20_000, 10_000)),
        ("b", "softmax", (9,)),
    ):
        for tokens in samples:
            row: dict[str, Any] = {"split": "corpus", "tokens": tokens, "trial": trial}
            row |= {"step": tokens, "time": 0}
            d = limit(tokens)
            values = {"contexts": 3 * tokens} | (
                {"halved": d, "tenth": d, "hundredth": float(V)} if trial == "a" else {}
            )
            rows = [{**row, "metric": name, "value": value} for name, value in values.items()]
            records.write(tmp_path, "scalars", trial, tokens, rows)
            key = {"trial": trial, "step": tokens}
            if trial == "a":
                errors = ({"d": i, "w_error": 1 - i / V, "exact": i < 500} for i in range(1, V + 1))
                records.write(tmp_path, "w_errors", trial, tokens, [{**key, **e} for e in errors])
            else:
                losses = {None: 3.0, 4: 3.1, 0: 6.0, 2: 4.0}
                found = [{**key, "rank": r, "loss": x, "stderr": 0.1} for r, x in losses.items()]
                records.write(tmp_path, "softmax", trial, tokens, found)
            shown = {"corpus": "c", "tokenizer": "t", "n": 3, "vocabulary": V, "estimate": estimate}
            whole = {"trial": trial, "name": f"c t {estimate}", "kind": "dimension", **shown}
            records.write(tmp_path, "trials", trial, tokens, [{**whole, "step": tokens}])
    return tmp_path


def test_samples_are_in_order_and_curves_are_of_the_largest(directory: Path) -> None:
    samples = dimensions.samples(directory)
    assert samples["tokens"].to_list() == [10_000, 20_000, 40_000, 9]
    assert dimensions.whole(samples)["tokens"].to_list() == [40_000, 9]
    errors = dimensions.curves(directory, "w_errors")
    assert errors["tokens"].unique().to_list() == [40_000] and errors["d"].is_sorted()
    softmax = dimensions.curves(directory, "softmax")
    assert softmax["rank"].to_list() == [0, 2, 4, None]


def test_w_error_is_told_at_each_d_and_of_none_beyond_the_vocabulary(directory: Path) -> None:
    (row,) = dimensions.at(dimensions.curves(directory, "w_errors"), [10, 900, 2000]).to_dicts()
    assert row == {
        "name": "c t paper", "exact": 499, "10": pytest.approx(0.99), "900": pytest.approx(0.1),
        "2000": None,
    }  # fmt: skip


def test_growth_is_carried_on_where_samples_allow(directory: Path) -> None:
    grown = dimensions.growths(dimensions.samples(directory))
    assert grown["level"].to_list() == [0.5, 0.5, 0.1, 0.1]  # at V, a d is no answer
    for row in grown.to_dicts():
        assert row["d"] == pytest.approx(limit(40_000 * row["times"]), rel=0.005)
        assert row["low"] <= row["d"] <= row["high"]
    # A straight line in the two smaller samples says too much of a curve that bends.
    assert 0 < grown["missed"][0] < 0.5


def test_figures_show_every_series(directory: Path) -> None:
    drawn = dimension_figures.draw(directory)
    assert [path.name for path in drawn] == ["w_error.png", "growth.png", "softmax_rank.png"]
    bare = [matplotlib.image.imread(path) for path in drawn]
    drawn = dimension_figures.draw(directory, paper=True)
    with_paper = [matplotlib.image.imread(path) for path in drawn]
    assert (bare[0] != with_paper[0]).any() and (bare[1] == with_paper[1]).all()
    for image in bare:
        assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 10


def test_the_paper_s_readings_fall_with_d() -> None:
    readings = pl.read_csv(chart.PAPER / "w_error.csv", comment_prefix="#")
    assert set(readings["tokenizer"]) == {"llama2", "pythia"}
    for _, line in readings.group_by("tokenizer", "corpus"):
        assert line.sort("d")["w_error"].is_sorted(descending=True)
    at_1000 = readings.filter(pl.col("d") == 1000)["w_error"]
    assert at_1000.is_between(0.45, 0.6).all() and len(at_1000) == 6
