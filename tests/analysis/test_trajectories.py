import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest

from analysis import interactive, printed, records, trajectories
from analysis.chart import Chart

Measured = dict[int, dict[int | None, float]]  # by step and layer


def write(
    sweep: Path, name: str, d: int = 4, params: int | None = None, **measured: Measured
) -> None:
    """A series, with held-out `loss` and `anisotropy`, and `singular_entropy` of the head."""
    blank = dict.fromkeys(records.TABLES["trials"])
    row = blank | {"trial": name, "name": name, "size": "nano", "seed": 0, "d": d, "params": params}
    records.write(sweep, "trials", name, 1, [row])
    scalar: dict[str, Any] = {"trial": name, "stderr": None, "time": 0}
    rows = [
        {
            **scalar,
            "step": step,
            "tokens": 10 * step,
            "metric": metric,
            "layer": layer,
            "value": value,
        }
        | {"split": "" if metric == "singular_entropy" else "held_out"}
        for metric, steps in measured.items()
        for step, layers in steps.items()
        for layer, value in layers.items()
    ]
    records.write(sweep, "scalars", name, 1, rows)


def write_spectra(sweep: Path, name: str, spectra: dict[int, list[float]]) -> None:
    rows = [
        {"trial": name, "step": step, "matrix": "head", "index": i, "sigma": value}
        for step, sigma in spectra.items()
        for i, value in enumerate(sigma)
    ]
    records.write(sweep, "spectra", name, 1, rows)


def alone(values: dict[int, float], layer: int | None = None) -> Measured:
    return {step: {layer: value} for step, value in values.items()}


def drawn(one: Chart, panel: str = "", kind: str = "line") -> dict[str, list[list[float]]]:
    """What each series shows."""
    own = one.points.filter(panel=panel, kind=kind)
    return {
        str(name): [list(row) for row in line.select("x", "y").rows()]
        for (name,), line in own.group_by("series", maintain_order=True)
    }


def only(directory: Path, name: str, paper: bool = False) -> Chart:
    (one,) = (c for c in trajectories.charts([directory], paper) if c.name == name)
    return one


def test_layers_are_those_of_the_last_step_measured_by_depth(tmp_path: Path) -> None:
    deep = {0: {0: 0.9, -1: 0.9}, 7: {0: 0.1, 1: 0.2, 2: 0.4, 3: 0.3, -1: 0.8}}
    write(tmp_path, "deep", anisotropy=deep)
    write(tmp_path, "shallow", anisotropy={5: {0: 0.5, -1: 0.25}})
    write(tmp_path, "old", anisotropy=alone({3: 0.4, 9: 0.6}, -1))
    write(tmp_path, "lost", anisotropy=alone({2: math.nan}, -1))
    assert drawn(only(tmp_path, "anisotropy_by_depth")) == {
        "deep": [[0, 0.1], [0.25, 0.2], [0.5, 0.4], [0.75, 0.3], [1, 0.8]],
        "old": [[1, 0.6]],
        "shallow": [[0, 0.5], [1, 0.25]],
    }


def test_a_depth_counts_layers_that_were_lost_to_nan(tmp_path: Path) -> None:
    write(tmp_path, "a", anisotropy={3: {0: 0.1, 1: 0.2, 2: math.nan, 3: math.nan, -1: math.nan}})
    assert trajectories.layers(tmp_path)["depth"].to_list() == [0, 0.25]


def test_perplexity_is_coloured_by_the_last_layers_anisotropy(tmp_path: Path) -> None:
    write(
        tmp_path,
        "long",
        loss=alone({0: 9.0, 10: 3.0, 20: 2.5, 30: math.nan, 40: 2.0, 50: 9999.0}),
        anisotropy={10: {0: 0.5, -1: 0.125}, 20: {-1: math.nan}, 40: {0: 0.5, -1: 0.75}},
    )
    write(tmp_path, "short", loss=alone({10: 2.75}), anisotropy=alone({10: 0.25}, -1))
    shown = only(tmp_path, "perplexity")
    expected = [[10, math.exp(3.0)], [20, math.exp(2.5)], [40, math.exp(2.0)]]
    found = drawn(shown, "ours")
    assert np.array(found["long"]) == pytest.approx(np.array(expected))
    assert np.array(found["short"]) == pytest.approx(np.array([[10, math.exp(2.75)]]))
    shades = dict(shown.points.group_by("series").agg("shade").rows())
    assert shades == {"long": [0.125, None, 0.75], "short": [0.25]}
    axes, bar = printed.draw(shown).axes
    points, single = axes.collections
    assert points.get_array().tolist() == [0.125, None, 0.75]  # None: masked, drawn grey
    assert points.norm is single.norm and (points.norm.vmin, points.norm.vmax) == (0, 1)
    assert bar.get_ylabel() == "mean cosine"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_perplexity_starts_near_where_it_ends(tmp_path: Path) -> None:
    far = {1: 9.0, 2: 5.0, 4: 3.1, 8: 2.9, 16: 2.0}
    write(tmp_path, "far", loss=alone(far))
    write(tmp_path, "new", loss=alone({1: 9.0, 2: 4.0}))
    found = drawn(only(tmp_path, "perplexity"), "ours")  # from step 2, the first below 3 exp(4)
    assert [x for x, _ in found["far"]] == [2, 4, 8, 16]
    assert [x for x, _ in found["new"]] == [2]


def test_spectra_are_ratios_around_their_steps(tmp_path: Path) -> None:
    write(tmp_path, "a")
    spectra = {0: [9.0, 9.0, 9.0], 1: [4.0, 2.0, 1.0], 4: [8.0, 2.0, 0.0], 5: [0.0, 0.0, 0.0]}
    write_spectra(tmp_path, "a", spectra)
    write(tmp_path, "b")
    write_spectra(tmp_path, "b", {3: [1.0, 0.25]})
    shown = only(tmp_path, "spectrum_heatmap")
    a, b, _ = printed.draw(shown).axes
    (mesh,), (single,) = a.collections, b.collections
    assert mesh.get_array().tolist() == [[0.5, 0.25], [0.25, 0.0]]  # by index, then step
    corners = np.array(mesh.get_coordinates())
    assert corners[0, :, 0] == pytest.approx([0.5, 2, 8])
    assert corners[:, 0, 1].tolist() == [0.5, 1.5, 2.5]
    assert single.get_array().tolist() == [[0.25]]
    left, right = single.get_coordinates()[0, :, 0]
    assert left < 3 < right
    assert [a.get_title(), b.get_title()] == ["a", "b"] and a.get_xscale() == "log"
    (trace,) = interactive.plots(shown)[0]["traces"]
    assert trace["customdata"] == [(0.5, 0.25), (0.25, 0.0)]
    assert trace["x"] == pytest.approx([0.5, 2, 8]) and trace["y"] == [0.5, 1.5, 2.5]


def test_a_wide_head_shows_a_hundred_ratios(tmp_path: Path) -> None:
    write(tmp_path, "a", d=256)
    write_spectra(tmp_path, "a", {1: [1 / (1 + i) for i in range(256)]})
    shown = only(tmp_path, "spectrum_heatmap").points.sort("y")
    assert shown["shade"].to_numpy() == pytest.approx(1 / np.arange(2, 102))


def test_entropy_leaves_out_what_a_logarithm_cannot_show(tmp_path: Path) -> None:
    values = {0: 0.5, 1: 0.25, 2: 0.0, 3: math.nan, 4: 2.0}
    write(tmp_path, "a", singular_entropy=alone(values))
    write(tmp_path, "b", singular_entropy=alone({1: 1.0}))
    shown = only(tmp_path, "singular_entropy")
    assert drawn(shown) == {"a": [[1, 0.25], [4, 2.0]], "b": [[1, 1.0]]}
    assert shown.panels[0].x.log and shown.panels[0].y.log


def test_losses_are_against_flops_where_all_tokens_are_known(tmp_path: Path) -> None:
    write(tmp_path, "a", params=1000, loss=alone({1: 4.0, 8: 3.0, 64: 2.5}))
    found = drawn(only(tmp_path, "loss_along_training"))
    assert found == {"a": [[6 * 1000 * 80, 3.0], [6 * 1000 * 640, 2.5]]}  # 4.0 > 2.5 + ln 3
    write(tmp_path, "b", loss=alone({8: 3.5}))
    assert drawn(only(tmp_path, "loss_along_training"))["b"] == [[8, 3.5]]


@pytest.fixture
def twelve(tmp_path: Path) -> Path:
    for i in range(12):
        name = f"nano-{2**i}"
        write(
            tmp_path,
            name,
            loss=alone({0: 7.0, 10: 3.0, 100: 2.0 + i / 10}),
            anisotropy={0: {0: 0.0, -1: 0.0}, 100: {0: 0.1, -1: i / 12}},
            singular_entropy=alone({0: 0.1, 10: 0.2, 100: 1.0 + i}),
        )
        write_spectra(tmp_path, name, {0: [1.0, 1.0], 10: [2.0, 1.0], 100: [1.0, 0.01]})
    return tmp_path


def test_twelve_series_are_told_apart_and_in_order(twelve: Path) -> None:
    shown = only(twelve, "singular_entropy")
    assert shown.series == [f"nano-{2**i}" for i in range(12)]
    styles = {shown.style(name) for name in shown.series}
    in_grey = {style[1:] for style in styles}
    assert len(styles) == len(in_grey) == 12
    (axes,) = printed.draw(shown).axes
    assert {(x.get_color(), x.get_marker(), x.get_linestyle()) for x in axes.lines} == styles


def test_names_beside_lines_keep_apart(twelve: Path) -> None:
    (axes,) = printed.draw(only(twelve, "singular_entropy", paper=True)).axes
    heights = np.sort([text.get_position()[1] for text in axes.texts])
    assert len(heights) == 7 and np.diff(heights).min() > 0.04
    assert heights[0] >= 0 and heights[-1] <= 1


def test_eight_panels_at_most_and_the_caption_says_so(twelve: Path) -> None:
    shown = only(twelve, "spectrum_heatmap")
    assert [p.name for p in shown.panels] == [f"nano-{2**i}" for i in (0, 2, 3, 5, 6, 8, 9, 11)]
    assert "8 of 12 series are shown" in shown.caption


def test_a_series_looks_alike_in_all_figures(twelve: Path) -> None:
    write(twelve, "a first", anisotropy=alone({1: 0.5}, -1))
    by_depth, entropy = only(twelve, "anisotropy_by_depth"), only(twelve, "singular_entropy")
    assert by_depth.style("nano-1") == entropy.style("nano-1") != by_depth.style("a first")
    assert "a first" not in entropy.series


def test_all_five_are_written_twice_over(twelve: Path) -> None:
    files = trajectories.draw(twelve, paper=True)
    stems = [
        "loss_along_training",
        "anisotropy_by_depth",
        "perplexity",
        "spectrum_heatmap",
        "singular_entropy",
    ]
    assert [f.name for f in files] == [f"{s}.{kind}" for s in stems for kind in ("png", "svg")]
    assert sorted((twelve / "report").iterdir()) == sorted(files)
    before = [f.read_bytes() for f in files]
    for content, file in zip(before, files, strict=True):
        if file.suffix == ".png":
            assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
        else:
            assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
    assert [f.read_bytes() for f in trajectories.draw(twelve, paper=True)] == before


def test_a_dot_in_the_name_of_a_figure_is_not_a_suffix(twelve: Path) -> None:
    files = printed.write(only(twelve, "singular_entropy"), twelve / "lr=0.01")
    assert files == [twelve / f"lr=0.01.{kind}" for kind in ("png", "svg", "pdf")]
    assert files[2].read_bytes().startswith(b"%PDF")


def test_series_of_several_directories_bear_their_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, "a", singular_entropy=alone({1: 1.0}))
    (shown,) = trajectories.charts([tmp_path / "one", tmp_path / "two"])
    assert drawn(shown) == {"one: a": [[1, 1.0]], "two: a": [[1, 1.0]]}


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert trajectories.draw(tmp_path, paper=True) == []
    assert list(tmp_path.iterdir()) == []


def test_an_untrained_model_has_layers_and_no_trajectory(tmp_path: Path) -> None:
    write(
        tmp_path,
        "a",
        loss=alone({0: 7.0}),
        anisotropy={0: {0: 0.0, -1: 0.125}},
        singular_entropy=alone({0: 0.1}),
    )
    write_spectra(tmp_path, "a", {0: [1.0, 0.5]})
    assert [f.stem for f in trajectories.draw(tmp_path)] == ["anisotropy_by_depth"] * 2


def test_the_papers_entropies_are_behind_ours(tmp_path: Path) -> None:
    write(tmp_path, "a", singular_entropy=alone({1: 1.0, 1000: 2.0}))
    shown = only(tmp_path, "singular_entropy", paper=True)
    assert drawn(shown) == {"a": [[1, 1.0], [1000, 2.0]]}
    paper = drawn(shown, kind="paper")
    assert len(paper) == 7 and {"pythia-14m", "pythia-410m", "pythia-1.4b"} <= paper.keys()
    step, entropy = min(paper["pythia-14m"], key=lambda point: point[1])
    assert step == pytest.approx(40_000, abs=1000) and entropy == pytest.approx(0.308, abs=0.001)
    assert paper["pythia-14m"][-1] == pytest.approx([143_000, 4.67], abs=0.01)
    (axes,) = printed.draw(shown).axes
    *theirs, ours = axes.lines
    assert len(theirs) == 7 and all(line.zorder < ours.zorder for line in theirs)
    traces = interactive.plots(shown)[0]["traces"]
    assert [t["name"] for t in traces if not t.get("meta")] == ["a"] and len(traces) == 8


def test_the_papers_losses_are_at_its_flops(tmp_path: Path) -> None:
    write(tmp_path, "a", params=1000, loss=alone({1: 1.0}))
    paper = drawn(only(tmp_path, "loss_along_training", paper=True), kind="paper")
    flops, loss = paper["pythia-14m"][-1]
    assert flops == pytest.approx(6 * 14_067_712 * 140_000 * 2_097_152) and loss == pytest.approx(
        4.363, abs=0.003
    )


def test_the_papers_perplexities_have_a_panel_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "a", loss=alone({1: 1.0}), anisotropy=alone({1: 0.5}, -1))
    shown = only(tmp_path, "perplexity", paper=True)
    ours, paper = shown.panels
    assert "per token" in ours.y.label and [*drawn(shown, "ours")] == ["a"]
    assert "per word" in paper.y.label and "read off" in paper.title
    minima = {}
    for name, line in drawn(shown, "paper").items():
        step, value = min(line, key=lambda point: point[1])
        minima[name] = (step / 1000, round(value, 1))
    assert minima == {
        "pythia-14m": (53, 132.8),
        "pythia-31m": (38, 79.5),
        "pythia-70m": (46, 51.4),
        "pythia-160m": (77, 30.5),
        "pythia-410m": (139, 20.1),
    }
    smallest = shown.points.filter(series="pythia-14m")
    for level, step in ((0.5, 42_000), (0.9, 63_000)):
        assert smallest.filter(pl.col("shade") > level)["x"][0] == step


def test_the_papers_spectra_have_panels_after_ours(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write_spectra(tmp_path, "a", {3: [1.0, 0.25]})
    shown = only(tmp_path, "spectrum_heatmap", paper=True)
    ours, *paper = shown.panels
    assert ours.title == "a" and all("read off" in panel.title for panel in paper)
    _, collapsed, sound, _ = (a.collections for a in printed.draw(shown).axes)
    collapsed, sound = collapsed[0].get_array(), sound[0].get_array()
    assert collapsed.shape == (100, 143)
    read = trajectories.readings("spectra").filter(model="pythia-14m", step=40_000)
    for index, ratio in read.select("index", "ratio").iter_rows():
        assert collapsed[index - 1, 39] == pytest.approx(ratio)
    assert collapsed[:, -1].max() < 0.05 and sound[:, -1].min() > 0.1


def test_the_papers_last_layers_are_bars_beside_ours(tmp_path: Path) -> None:
    write(tmp_path, "a", anisotropy={1: {0: 0.0, -1: 0.5}})
    shown = only(tmp_path, "anisotropy_by_depth", paper=True)
    assert "read off" in shown.caption
    bars = {row["series"]: row for row in shown.points.filter(kind="paper").to_dicts()}
    assert len(bars) == 6 and all(row["x"] > 1 for row in bars.values())
    first = bars["Pythia 14M to 160M"]
    assert (first["low"], first["y"], first["high"]) == pytest.approx((0.96, 0.975, 0.99))
    assert bars["Gemma 2B"]["y"] == 0.57 and bars["GPT-2 small"]["y"] == 0.83


def test_between_the_indices_read_off_a_spectrum_is_a_power_law() -> None:
    known = [1, 4, 16]
    read = pl.DataFrame({"step": [5] * 3 + [2] * 3, "index": known * 2})
    read = read.with_columns(ratio=pl.Series([i**-0.5 for i in known] + [1 / i for i in known]))
    steps, ratios = trajectories.filled(read, range(1, 65))
    assert steps.tolist() == [2, 5]
    assert ratios[0] == pytest.approx(1 / np.arange(1, 65))
    assert ratios[1] == pytest.approx(np.arange(1, 65) ** -0.5)
