import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import polars as pl
import pytest

from analysis import records, trajectories

Measured = dict[int, dict[int | None, float]]  # by step and layer


def write(sweep: Path, name: str, d: int = 4, **measured: Measured) -> None:
    """A series, with held-out `loss` and `anisotropy`, and `singular_entropy` of the head."""
    blank = dict.fromkeys(records.TABLES["trials"])
    row = blank | {"trial": name, "name": name, "size": "nano", "seed": 0, "d": d}
    records.write(sweep, "trials", name, 1, [row])
    scalar: dict[str, Any] = {"trial": name, "tokens": 0, "stderr": None, "time": 0}
    rows = [
        {**scalar, "step": step, "metric": metric, "layer": layer, "value": value}
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


def drawn(axes: Any) -> dict[str, list[list[float]]]:
    """What each labelled line shows."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def names(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_layers_are_those_of_the_last_step_measured_by_depth(tmp_path: Path) -> None:
    deep = {0: {0: 0.9, -1: 0.9}, 7: {0: 0.1, 1: 0.2, 2: 0.4, 3: 0.3, -1: 0.8}}
    write(tmp_path, "deep", anisotropy=deep)
    write(tmp_path, "shallow", anisotropy={5: {0: 0.5, -1: 0.25}})
    write(tmp_path, "old", anisotropy=alone({3: 0.4, 9: 0.6}, -1))
    write(tmp_path, "lost", anisotropy=alone({2: math.nan}, -1))
    (axes,) = trajectories.layers_figure(trajectories.layers(tmp_path)).axes
    assert drawn(axes) == {
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
    frame = trajectories.perplexities(tmp_path)
    axes, bar = trajectories.perplexity_figure(frame).axes
    long, short = axes.lines
    expected = [[10, math.exp(3.0)], [20, math.exp(2.5)], [40, math.exp(2.0)]]
    assert long.get_xydata() == pytest.approx(np.array(expected))
    assert short.get_xydata() == pytest.approx(np.array([[10, math.exp(2.75)]]))
    points, single = axes.collections
    assert np.array(points.get_offsets()) == pytest.approx(np.array(expected))
    assert points.get_array().tolist() == [0.125, None, 0.75]  # None: masked, drawn grey
    assert single.get_array().tolist() == [0.25]
    assert points.norm is single.norm and (points.norm.vmin, points.norm.vmax) == (0, 1)
    assert bar.get_ylabel() == "mean cosine of last hidden states"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert sorted(names(axes)) == ["long", "short"]


def test_perplexity_starts_near_where_it_ends(tmp_path: Path) -> None:
    far = {1: 9.0, 2: 5.0, 4: 3.1, 8: 2.9, 16: 2.0}
    write(tmp_path, "far", loss=alone(far))
    write(tmp_path, "new", loss=alone({1: 9.0, 2: 4.0}))
    axes = trajectories.perplexity_figure(trajectories.perplexities(tmp_path)).axes[0]
    far_line, new_line = axes.lines  # from step 2, the first below 3 exp(4)
    assert far_line.get_xdata().tolist() == [2, 4, 8, 16]
    assert new_line.get_xdata().tolist() == [2]


def test_spectra_are_ratios_around_their_steps(tmp_path: Path) -> None:
    write(tmp_path, "a")
    spectra = {0: [9.0, 9.0, 9.0], 1: [4.0, 2.0, 1.0], 4: [8.0, 2.0, 0.0], 5: [0.0, 0.0, 0.0]}
    write_spectra(tmp_path, "a", spectra)
    write(tmp_path, "b")
    write_spectra(tmp_path, "b", {3: [1.0, 0.25]})
    figure = trajectories.spectra_figure(trajectories.spectra(tmp_path))
    a, b, _ = figure.axes
    (mesh,), (single,) = a.collections, b.collections
    assert mesh.get_array().tolist() == [[0.5, 0.25], [0.25, 0.0]]  # by index, then step
    corners = np.array(mesh.get_coordinates())
    assert corners[0, :, 0] == pytest.approx([0.5, 2, 8])
    assert corners[:, 0, 1].tolist() == [0.5, 1.5, 2.5]
    assert single.get_array().tolist() == [[0.25]]
    left, right = single.get_coordinates()[0, :, 0]
    assert left < 3 < right
    assert [a.get_title(), b.get_title()] == ["a", "b"] and a.get_xscale() == "log"
    assert figure.get_suptitle() == ""


def test_a_wide_head_shows_a_hundred_ratios(tmp_path: Path) -> None:
    write(tmp_path, "a", d=256)
    write_spectra(tmp_path, "a", {1: [1 / (1 + i) for i in range(256)]})
    axes = trajectories.spectra_figure(trajectories.spectra(tmp_path)).axes[0]
    (mesh,) = axes.collections
    assert np.array(mesh.get_array())[:, 0] == pytest.approx(1 / np.arange(2, 102))


def test_entropy_leaves_out_what_a_logarithm_cannot_show(tmp_path: Path) -> None:
    values = {0: 0.5, 1: 0.25, 2: 0.0, 3: math.nan, 4: 2.0}
    write(tmp_path, "a", singular_entropy=alone(values))
    write(tmp_path, "b", singular_entropy=alone({1: 1.0}))
    (axes,) = trajectories.entropy_figure(trajectories.entropies(tmp_path)).axes
    assert drawn(axes) == {"a": [[1, 0.25], [4, 2.0]], "b": [[1, 1.0]]}
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


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
    (axes,) = trajectories.entropy_figure(trajectories.entropies(twelve)).axes
    assert [line.get_label() for line in axes.lines] == [f"nano-{2**i}" for i in range(12)]
    styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
    in_grey = {style[1:] for style in styles}
    assert len(styles) == len(in_grey) == 12
    axes = trajectories.perplexity_figure(trajectories.perplexities(twelve)).axes[0]
    heights = np.sort([text.get_position()[1] for text in axes.texts])
    assert len(heights) == 12 and np.diff(heights).min() > 0.04
    assert heights[0] >= 0 and heights[-1] <= 1


def test_eight_panels_at_most_and_the_title_says_so(twelve: Path) -> None:
    _, svg = trajectories.spectrum_heatmap(twelve, twelve / "some")
    said = re.findall("<!-- (.+) -->", svg.read_text())
    assert [s for s in said if s.startswith("nano-")] == [f"nano-{2**i}" for i in range(8)]
    assert "the first 8 of 12 series by name" in said


def test_a_series_looks_alike_in_all_figures(twelve: Path) -> None:
    write(twelve, "a first", anisotropy=alone({1: 0.5}, -1))
    by_depth = trajectories.layers_figure(trajectories.layers(twelve)).axes[0]
    entropy = trajectories.entropy_figure(trajectories.entropies(twelve)).axes[0]
    (a,) = (line for line in by_depth.lines if line.get_label() == "nano-1")
    assert a.get_marker() == entropy.lines[0].get_marker() == "s"
    assert a.get_color() == entropy.lines[0].get_color()


def test_all_four_are_written_twice_over(twelve: Path) -> None:
    files = trajectories.draw(twelve, paper=True)
    stems = ["anisotropy_by_depth", "perplexity", "spectrum_heatmap", "singular_entropy"]
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
    files = trajectories.singular_entropy(twelve, twelve / "lr=0.01")
    assert files == [twelve / "lr=0.01.png", twelve / "lr=0.01.svg"]


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
    (axes,) = trajectories.entropy_figure(trajectories.entropies(tmp_path), paper=True).axes
    ours, *paper = axes.lines
    assert ours.get_xydata().tolist() == [[1, 1.0], [1000, 2.0]]
    assert len(paper) == 7 and all(line.zorder < ours.zorder for line in paper)
    assert set(names(axes)) >= {"pythia-14m", "pythia-410m", "pythia-1.4b"}
    assert axes.get_legend_handles_labels()[1] == ["a"]
    smallest = paper[0].get_xydata()
    step, entropy = smallest[smallest[:, 1].argmin()]
    assert step == pytest.approx(40_000, abs=1000) and entropy == pytest.approx(0.308, abs=0.001)
    assert smallest[-1].tolist() == pytest.approx([143_000, 4.67], abs=0.01)
    (text,) = (text for text in axes.texts if text.get_text() == "pythia-14m")
    assert text.xy == tuple(smallest[-1])


def test_the_papers_perplexities_have_a_panel_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "a", loss=alone({1: 1.0}), anisotropy=alone({1: 0.5}, -1))
    figure = trajectories.perplexity_figure(trajectories.perplexities(tmp_path), paper=True)
    ours, paper, _ = figure.axes
    assert len(ours.lines) == 1 and "per token" in ours.get_ylabel()
    assert "per word" in paper.get_ylabel() and "read off" in paper.get_title(loc="right")
    minima = {}
    for line, text in zip(paper.lines, reversed(paper.texts), strict=True):  # texts rise
        step, value = min(line.get_xydata(), key=lambda point: point[1])
        minima[text.get_text()] = (step / 1000, round(value, 1))
    assert minima == {
        "pythia-14m": (53, 132.8),
        "pythia-31m": (38, 79.5),
        "pythia-70m": (46, 51.4),
        "pythia-160m": (77, 30.5),
        "pythia-410m": (139, 20.1),
    }
    cosines = paper.collections[0].get_array()
    steps = paper.lines[0].get_xdata()
    assert steps[np.argmax(cosines > 0.5)] == 42_000
    assert steps[np.argmax(cosines > 0.9)] == 63_000


def test_the_papers_spectra_have_panels_after_ours(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write_spectra(tmp_path, "a", {3: [1.0, 0.25]})
    ours, *paper, _ = trajectories.spectra_figure(trajectories.spectra(tmp_path), paper=True).axes
    assert ours.get_title() == "a"
    assert [axes.get_title().split(",")[0] for axes in paper] == ["pythia-14m", "pythia-410m"]
    assert all("read off" in axes.get_title() for axes in paper)
    collapsed, sound = (axes.collections[0].get_array() for axes in paper)
    assert collapsed.shape == (100, 143)
    read = trajectories.readings("spectra").filter(model="pythia-14m", step=40_000)
    for index, ratio in read.select("index", "ratio").iter_rows():
        assert collapsed[index - 1, 39] == pytest.approx(ratio)
    assert collapsed[:, -1].max() < 0.05 and sound[:, -1].min() > 0.1


def test_the_papers_last_layers_are_bars_beside_ours(tmp_path: Path) -> None:
    write(tmp_path, "a", anisotropy={1: {0: 0.0, -1: 0.5}})
    (axes,) = trajectories.layers_figure(trajectories.layers(tmp_path), paper=True).axes
    assert "read off" in axes.get_title(loc="right")
    bars = [bar.get_paths()[0].get_extents() for bar in axes.collections]
    middles = {t.get_text(): t.xy[1] for t in axes.texts}
    assert middles["Pythia 14M to 160M"] == pytest.approx(0.975)
    assert middles["Gemma 2B"] == 0.57 and middles["GPT-2 small"] == 0.83
    assert len(bars) == len(middles) == 6
    assert all(bar.x0 > 1 for bar in bars)
    assert (bars[0].y0, bars[0].y1) == pytest.approx((0.96, 0.99))


def test_between_the_indices_read_off_a_spectrum_is_a_power_law() -> None:
    known = [1, 4, 16]
    read = pl.DataFrame({"step": [5] * 3 + [2] * 3, "index": known * 2})
    read = read.with_columns(ratio=pl.Series([i**-0.5 for i in known] + [1 / i for i in known]))
    steps, ratios = trajectories.filled(read, range(1, 65))
    assert steps.tolist() == [2, 5]
    assert ratios[0] == pytest.approx(1 / np.arange(1, 65))
    assert ratios[1] == pytest.approx(np.arange(1, 65) ** -0.5)
