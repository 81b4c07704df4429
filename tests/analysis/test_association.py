import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis import association
from analysis.association import Correlation, correlation, needed
from analysis.errors import BadInput


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(association, "DRAWS", 199)


def partial(table: pl.DataFrame, covariates: list[str]) -> Correlation:
    found = correlation(table, "x", "y", covariates).partial
    assert found is not None
    return found


def spearman(table: pl.DataFrame, a: str, b: str, given: list[str]) -> float:
    """The recursion formula on scipy's coefficients."""
    if not given:
        return float(stats.spearmanr(table[a], table[b]).statistic)
    *rest, z = given
    ab, az, bz = (spearman(table, *pair, rest) for pair in ((a, b), (a, z), (b, z)))
    return (ab - az * bz) / math.sqrt((1 - az**2) * (1 - bz**2))


def gaussian(
    rng: np.random.Generator, n: int, k: int, rho: float, confounding: float
) -> tuple[pl.DataFrame, float]:
    """Runs whose x and y correlate by rho given k covariates that push x up and y down, and the
    population's partial rank correlation: of the pairwise 6/pi asin(r/2)."""
    within = np.eye(k + 2)
    within[0, 1] = within[1, 0] = rho
    mixing = np.eye(k + 2)
    if k:
        mixing[0, 2:], mixing[1, 2:] = confounding / k**0.5, -confounding / k**0.5
    covariance = mixing @ within @ mixing.T
    scale = np.sqrt(np.diag(covariance))
    ranked = 6 / np.pi * np.arcsin(covariance / np.outer(scale, scale) / 2)
    precision = np.linalg.inv(ranked)
    truth = -precision[0, 1] / math.sqrt(precision[0, 0] * precision[1, 1])
    names = ["x", "y", *(f"z{i}" for i in range(k))]
    data = rng.multivariate_normal(np.zeros(k + 2), covariance, n, method="cholesky")
    return pl.DataFrame(data, names, orient="row"), truth


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(6, 30), st.integers(2, 9))
def test_coefficients_are_scipys_and_the_recursion_formulas(seed: int, n: int, values: int) -> None:
    rng = np.random.default_rng(seed)
    table = pl.DataFrame(rng.integers(0, values, (n, 4)), ["x", "y", "z0", "z1"])
    try:
        found = correlation(table, "x", "y", ["z0", "z1"])
    except BadInput:  # all equal, or determined: drawn rarely, and refused below
        return
    assert found.raw.rho == pytest.approx(spearman(table, "x", "y", []), abs=1e-12)
    assert found.partial is not None
    assert found.partial.rho == pytest.approx(
        spearman(table, "x", "y", list(found.covariates)), abs=1e-9
    )


def test_coefficients_do_not_depend_on_scales() -> None:
    """Parameters or their logarithms: ranks, and normal scores, are the same."""
    table, _ = gaussian(np.random.default_rng(0), 20, 2, 0.4, 1.0)
    assert correlation(table, "x", "y", ["z0", "z1"]) == correlation(
        table.select(pl.all().exp()), "x", "y", ["z0", "z1"]
    )


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize(
    ("n", "k", "rho"), [(9, 0, 0.3), (30, 0, 0.9), (9, 4, 0.6), (35, 4, 0.5), (35, 4, -0.9)]
)
def test_intervals_cover_as_often_as_they_say(n: int, k: int, rho: float) -> None:
    """95 % of 500 worlds, three standard errors (2.9 %) either side, and never all of them."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(500):
        table, truth = gaussian(rng, n, k, rho, 0.8)
        found = correlation(table, "x", "y", [f"z{i}" for i in range(k)])
        of = found.partial or found.raw
        hits.append(of.low <= truth <= of.high)
    assert 0.921 <= np.mean(hits) <= 0.99


def test_p_is_that_of_all_permutations() -> None:
    rng = np.random.default_rng(3)
    table, _ = gaussian(rng, 7, 0, 0.7, 0)
    exact = stats.permutation_test(
        (table["x"].to_numpy(),),
        lambda x: stats.spearmanr(x, table["y"]).statistic,
        permutation_type="pairings",
        n_resamples=10_000,
    ).pvalue
    found = correlation(table, "x", "y").raw
    assert 0.01 < exact < 0.9
    assert found.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999))


@pytest.mark.usefixtures("few_draws")
def test_p_keeps_its_level_in_a_confounded_grid() -> None:
    """Three covariates of three levels each make all of a raw correlation of about -.6: one by
    one in 20 a test at 5 % fires (500 worlds, three standard errors), the raw one always."""
    rng = np.random.default_rng(0)
    raw, fired, fired_normal = [], [], []
    for _ in range(500):
        levels = rng.integers(0, 3, (40, 3)) - 1.0
        x, y = rng.standard_normal((2, 40)) + [[1], [-1]] * levels.sum(1)
        table = pl.DataFrame({"x": x, "y": y, **{f"z{i}": levels[:, i] for i in range(3)}})
        found = correlation(table, "x", "y", ["z0", "z1", "z2"])
        assert found.partial is not None and found.normal is not None
        raw.append(found.raw.p <= 0.05)
        fired.append(found.partial.p <= 0.05)
        fired_normal.append(found.normal.p <= 0.05)
    assert np.mean(raw) > 0.9
    assert 0.02 <= np.mean(fired) <= 0.08 and 0.02 <= np.mean(fired_normal) <= 0.08


@pytest.mark.usefixtures("few_draws")
def test_p_keeps_its_level_where_covariates_take_half_of_the_runs() -> None:
    rng = np.random.default_rng(0)
    fired = []
    for _ in range(500):
        table, _ = gaussian(rng, 9, 4, 0.0, 0.0)
        fired.append(partial(table, ["z0", "z1", "z2", "z3"]).p <= 0.05)
    assert 0.02 <= np.mean(fired) <= 0.08


@pytest.mark.usefixtures("few_draws")
def test_normal_scores_take_away_what_ranks_leave() -> None:
    """Four covariates make all of a raw -.67 between x and y; ranks of the four do not add up to
    the rank of their sum, so about a seventh of it stays, of normal scores a quarter of that."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        table, _ = gaussian(rng, 94, 4, 0.0, 1.5)
        found = correlation(table, "x", "y", [f"z{i}" for i in range(4)])
        assert found.partial is not None and found.normal is not None
        rows.append((found.raw.rho, found.partial.rho, found.normal.rho))
    raw, ranks, normal = np.mean(rows, 0)
    assert raw == pytest.approx(-0.67, abs=0.02)
    assert -0.13 < ranks < -0.08
    assert abs(normal) < 0.04


def test_one_confounder_is_taken_away() -> None:
    table, truth = gaussian(np.random.default_rng(1), 108, 1, 0.0, 1.5)
    found = correlation(table, "x", "y", ["z0"])
    assert found.partial is not None and abs(truth) < 0.02
    assert found.raw.rho < -0.6 and found.raw.p < 0.001
    assert found.partial.low < 0 < found.partial.high and found.partial.p > 0.05


def test_runs_needed_are_the_published_ones_and_give_that_power(few_draws: None) -> None:
    assert [needed(r, 4) for r in (0.5, -0.3, 0.13)] == [35, 94, 494]
    assert needed(0.0, 4) is None and needed(1.0, 4) == 8
    rng = np.random.default_rng(0)
    latent = 2 * math.sin(math.pi * 0.5 / 6)  # a rank correlation of .5
    shown = []
    for _ in range(500):
        table, _ = gaussian(rng, 35, 4, latent, 0.0)
        shown.append(partial(table, ["z0", "z1", "z2", "z3"]).p <= 0.05)
    assert 0.75 <= np.mean(shown) <= 0.87


def test_too_few_runs_are_refused_with_the_number_they_would_take() -> None:
    table, _ = gaussian(np.random.default_rng(0), 7, 4, 0.5, 0.0)
    with pytest.raises(BadInput, match=r"7 runs .* given 4 covariates: 8 are the least, 35 would"):
        correlation(table, "x", "y", ["z0", "z1", "z2", "z3"])
    with pytest.raises(BadInput, match=r"4 runs .* 5 are the least"):
        correlation(table.head(4), "x", "y")
    assert correlation(table.head(5), "x", "y").n == 5


def test_covariates_that_say_nothing_are_dropped_by_name() -> None:
    table, _ = gaussian(np.random.default_rng(0), 12, 2, 0.5, 1.0)
    more = table.with_columns(
        batch=pl.lit(8), residual=pl.lit("parallel"), tokens=20 * pl.col("z1").exp(),
    )  # fmt: skip
    found = correlation(more, "x", "y", ["batch", "z0", "residual", "z1", "tokens"])
    assert found.covariates == ("z0", "z1")
    assert found.dropped == {
        "residual": "constant", "batch": "constant", "tokens": "collinear with z1",
    }  # fmt: skip
    plain = correlation(table, "x", "y", ["z0", "z1"])
    assert (found.partial, found.normal) == (plain.partial, plain.normal)


def test_text_and_booleans_are_levels() -> None:
    rng = np.random.default_rng(0)
    table, _ = gaussian(rng, 24, 0, 0.5, 0.0)
    kind = [["wsd", "cosine", "none"][i] for i in rng.integers(0, 3, 24)]
    table = table.with_columns(schedule=pl.Series(kind), parallel=pl.Series(rng.random(24) < 0.5))
    coded = table.with_columns(
        **{f"schedule_{k}": (pl.col("schedule") == k).cast(pl.Float64) for k in ("cosine", "none")},
        parallel=pl.col("parallel").cast(pl.Float64),
    )
    table = table.with_columns(annealed=pl.col("schedule") != kind[0])
    found = correlation(table, "x", "y", ["schedule", "parallel", "annealed"])
    assert len(found.covariates) == 3
    others = " and ".join(f"schedule_{k}" for k in list(dict.fromkeys(kind))[1:])
    assert found.dropped == {"annealed": f"collinear with {others}"}
    assert found.partial is not None
    expected = partial(coded, ["schedule_cosine", "schedule_none", "parallel"])
    assert found.partial.rho == pytest.approx(expected.rho, abs=1e-12)


def test_a_perfect_correlation_of_few_runs_is_not_certain() -> None:
    table = pl.DataFrame({"x": [1.0, 2, 3, 4, 5], "y": [5.0, 4, 3, 2, 1]})
    found = correlation(table, "x", "y").raw
    assert found.rho == pytest.approx(-1) and found.low == -1 < found.high < 0
    assert found.p == pytest.approx(2 / 120, abs=0.005)


@pytest.mark.parametrize(
    ("change", "covariates", "message"),
    [
        ({"x": 1.0}, ["z0"], "x is the same in all 20 runs"),
        ({"y": float("nan")}, ["z0"], "y has no value in 20 of 20"),
        ({"z0": None}, ["z0"], "z0 has no value in 20 of 20"),
        ({}, ["size"], "no column size: there are x, y, z0"),
        ({}, ["x"], "x is named twice"),
        ({"y": pl.col("z0") ** 3}, ["z0"], "y follows from z0"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(
    change: dict[str, object], covariates: list[str], message: str
) -> None:
    table, _ = gaussian(np.random.default_rng(0), 20, 1, 0.3, 1.0)
    with pytest.raises(BadInput, match=message) as error:
        correlation(table.with_columns(**change), "x", "y", covariates)
    assert "\n" not in str(error.value)
