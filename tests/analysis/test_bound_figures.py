from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from analysis import bound_figures, chart, figures, printed, ranks, records
from analysis.ranks import Fitted
from tests.analysis import test_ranks

PNG = b"\x89PNG\r\n\x1a\n"
HEADS = {
    "family": str, "rank": pl.Int32, "lr": float, "loss": float, "stderr": float, "gap": float,
    "low": float, "high": float,
}  # fmt: skip


def fitted(name: str, d: int) -> Fitted:
    """Two families of trained heads, a full head, and baselines."""
    rows: list[tuple[Any, ...]] = [
        ("linear", r, 1e-2, 3 + 1 / r, 0.01, 1 / r, 0.9 / r, 1.1 / r) for r in (2, 4, d)
    ]
    rows += [("mos-2", 4, 1e-3, 3.1, 0.01, 0.1, 0.05, 0.2)]
    rows += [("linear", None, 1e-2, 2.9, 0.01, -0.1, -0.2, 0.0)]
    rows += [("own", None, None, 2.8, 0.01, -0.2, -0.3, -0.1)]
    rows += [("svd", 2, None, 9.0, 0.01, 6.0, 5.0, 7.0)]
    return Fitted(name, pl.DataFrame(rows, HEADS, orient="row"), 6.0, {})


def write(sweep: Path, name: str, head: str, spectra: Mapping[str, np.ndarray]) -> None:
    id = name.replace(" ", "_")
    row = dict.fromkeys(records.TABLES["trials"]) | {
        "trial": id, "name": name, "kind": "rankfit", "head": head, "status": "done", "step": 0,
    }  # fmt: skip
    rows = [
        {"trial": id, "step": 0, "matrix": matrix, "index": i, "sigma": float(s)}
        for matrix, sigma in spectra.items()
        for i, s in enumerate(sigma)
    ]
    records.write(sweep, "trials", id, 0, [row])
    records.write(sweep, "spectra", id, 0, rows)


@pytest.fixture
def sweep(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Own heads of two models, one of them seen twice, beside a trained head's and a centred one's
    spectra."""
    rng = np.random.default_rng(0)
    own = {"m": rng.standard_normal((40, 8)), "m-large": rng.standard_normal((40, 16)) ** 3}
    for size, w in own.items():
        sigma = np.linalg.svd(w, compute_uv=False)
        for variant in ("", " sequence=64"):
            write(
                tmp_path, f"{size} own{variant}", "own", {"head": sigma, "head_centred": 1 / sigma}
            )
        write(tmp_path, f"{size} r=4 s=0", "low-rank", {"head": sigma[::-1]})
    return tmp_path, own


@pytest.mark.parametrize("variant", ["", " sequence=64"])
@pytest.mark.parametrize("size", ["m", "m-large"])
def test_w_error_is_what_the_best_approximation_of_the_own_head_leaves(
    sweep: tuple[Path, dict[str, np.ndarray]], size: str, variant: str
) -> None:
    """|W - W_r|_F / |W|_F with W_r made; of the trained heads that have a rank, and of no other."""
    folder, own = sweep
    w = own[size]
    d = w.shape[1]
    left, sigma, right = np.linalg.svd(w, full_matrices=False)
    found = bound_figures.w_errors(folder, fitted(f"{size}{variant}", d))
    assert found.select("family", "rank").rows() == [
        ("linear", 2), ("linear", 4), ("linear", d), ("mos-2", 4)
    ]  # fmt: skip
    for rank, error in found.select("rank", "w_error").rows():
        cut = (left[:, :rank] * sigma[:rank]) @ right[:rank]
        expected = np.linalg.norm(w - cut) / np.linalg.norm(w)
        assert error == pytest.approx(expected, abs=1e-12)


def test_without_the_own_heads_spectrum_there_are_no_points(tmp_path: Path) -> None:
    write(tmp_path, "m own", "own", {})
    write(tmp_path, "m r=4 s=0", "low-rank", {"head": np.ones(8)})
    assert bound_figures.w_errors(tmp_path, fitted("m", 8)).is_empty()


def test_figure_8_shows_losses_and_gaps_beside_the_papers_readings(
    sweep: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    one = fitted("m", 8)
    points = bound_figures.w_errors(sweep[0], one)
    shown = bound_figures.w_error(one, points)
    linear = points.filter(family="linear")
    paper = pl.read_csv(chart.PAPER / "werror_loss.csv", comment_prefix="#")
    for column, lowest in (("loss", 0.0), ("gap", paper["loss"].min())):
        own = shown.points.filter(panel=column)
        drawn = own.filter(kind="line", series="linear").select("x", "y").rows()
        assert drawn == linear.select("w_error", column).rows()
        readings = paper.with_columns(pl.col("loss") - lowest).rows()
        assert own.filter(kind="paper").select("x", "y").rows() == readings
    path, *_ = printed.write(shown, tmp_path / "report" / "f")
    assert path.read_bytes()[:8] == PNG


def test_heads_without_one_of_rank_d_are_drawn_without_gaps(tmp_path: Path) -> None:
    """As when those of rank d have diverged."""
    test_ranks.write(tmp_path, np.random.default_rng(0), {4: 0.5, 8: 0.2}, [0])
    write(tmp_path, "m own", "own", {"head": np.ones(32)})
    (found,) = ranks.fitted(tmp_path)
    points = bound_figures.w_errors(tmp_path, found)
    assert points["rank"].to_list() == [4, 8] and points["gap"].null_count() == 2
    for shown in (bound_figures.w_error(found, points), figures.ranks(found)):
        assert shown.points.filter(panel="gap", kind="line").is_empty()
        path, *_ = printed.write(shown, tmp_path / shown.name)
        assert path.read_bytes()[:8] == PNG


def test_the_papers_figure_8_agrees_with_its_figure_6_and_with_w_errors_of_pythia_1b() -> None:
    """PAPER's W-error of each rank, where the curve passes that rank's loss of Figure 6."""
    curve = pl.read_csv(chart.PAPER / "werror_loss.csv", comment_prefix="#")
    heads = pl.read_csv(chart.PAPER / "heads.csv", comment_prefix="#").filter(model="pythia-1b")
    losses = dict(heads.select("rank", "loss").rows())
    told = {32: 0.92, 64: 0.90, 128: 0.88, 256: 0.83, 512: 0.74, 1024: 0.56}
    for rank, error in told.items():
        assert np.interp(losses[rank], curve["loss"], curve["w_error"]) == pytest.approx(
            error, abs=0.006
        )
    assert curve["loss"][0] == pytest.approx(losses[2048], abs=0.005)


def test_the_figure_of_bounds_shows_what_a_logarithm_can(tmp_path: Path) -> None:
    """A panel a method; rank 0 and what is not positive are left out."""
    columns = ("gap", *bound_figures.BOUNDS)
    rows = [
        {"rank": rank, "method": method, **dict.fromkeys(columns, 5.0 / (1 + rank)), "gap": gap}
        for rank, gaps in ((0, (2.0, 2.0)), (4, (1.0, 0.5)), (8, (0.25, -0.1)))
        for method, gap in zip(("plain", "weighted"), gaps, strict=True)
    ]
    table = pl.DataFrame(rows)
    for axes, expected in zip(
        bound_figures._bounds("m", table).axes, ([[4, 1], [8, 0.25]], [[4, 0.5]]), strict=True
    ):
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert lines["measured gap"] == expected
        assert len(lines) == 8 and lines[bound_figures.BOUNDS["theorem"]] == [[4, 1], [8, 5 / 9]]
    assert bound_figures.bounds("m", table, tmp_path / "f.png").read_bytes()[:8] == PNG
