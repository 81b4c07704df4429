"""What estimates say of languages whose rank is known."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from analysis import softmaxrank, werror
from analysis.errors import BadInput
from analysis.languages import Array, mixture, sample, softmaxes, spectrum, zipf
from analysis.ngrams import Counts

C, V, RANK = 1500, 96, 5
EACH = (1, 2, 10, 100, 1000)

sizes = st.tuples(st.integers(5, 40), st.integers(5, 40), st.integers(1, 5), st.integers(0, 99))


@settings(deadline=None, max_examples=40)
@given(sizes)
def test_ranks_are_those_asked_for(size: tuple[int, int, int, int]) -> None:
    """Of probabilities, and of logits but for a column that all contexts share."""
    contexts, vocabulary, rank, _ = size
    mixed, soft = mixture(*size), softmaxes(*size)
    for P in (mixed, soft):
        assert P.shape == (contexts, vocabulary) and np.all(P > 0)
        np.testing.assert_allclose(P.sum(1), 1)
    assert np.linalg.matrix_rank(mixed) == rank
    logits = np.log(soft)
    logits = logits - logits.mean(1, keepdims=True)
    logits = logits - logits.mean(0)
    assert np.linalg.matrix_rank(logits, tol=1e-8) == min(rank, contexts - 1, vocabulary - 1)


def test_the_same_seed_makes_the_same_language() -> None:
    for make in (mixture, softmaxes):
        assert np.array_equal(make(9, 8, 3, 1), make(9, 8, 3, 1))
        assert not np.array_equal(make(9, 8, 3, 1), make(9, 8, 3, 2))


def dense(counts: Counts) -> npt.NDArray[Any]:
    k = np.zeros((len(counts.keys), counts.vocabulary), int)
    k[np.repeat(np.arange(len(counts.keys)), np.diff(counts.starts)), counts.tokens] = counts.counts
    return k


def test_samples_are_of_the_distributions_and_of_contexts_that_occur() -> None:
    P, occurrences = mixture(6, 5, 2), np.array([4000, 0, 9000, 1, 0, 50_000])
    counts = sample(P, occurrences)
    k, kept = dense(counts), np.flatnonzero(occurrences)
    assert np.array_equal(counts.keys, kept) and np.array_equal(k.sum(1), occurrences[kept])
    assert counts.n == 2 and np.all(counts.counts > 0)
    expected = (occurrences[:, None] * P)[kept]
    large = occurrences[kept] > 1000
    squares = ((k - expected) ** 2 / expected)[large].sum()
    assert chi2.ppf(1e-3, 12) < squares < chi2.ppf(1 - 1e-3, 12)


def test_contexts_occur_by_zipfs_law() -> None:
    n = zipf(50, 200_000, 3)
    expected = 200_000 / np.arange(1, 51) / np.sum(1 / np.arange(1, 51))
    assert n.sum() == 200_000
    assert chi2.ppf(1e-3, 49) < ((n - expected) ** 2 / expected).sum() < chi2.ppf(1 - 1e-3, 49)


def test_the_true_spectrum_is_that_of_endless_samples() -> None:
    """To the noise of 10^7 a context: sums of squares of 1e-7 a row."""
    P = softmaxes(40, 12, 3)
    n = np.random.default_rng(0).integers(1, 9, 40)
    for weights, found in (("rows", spectrum(P)), ("tokens", spectrum(P, n))):
        sampled = werror.spectrum(sample(P, n * 10**7), weights)
        scale = 1 if weights == "rows" else 10**7
        np.testing.assert_allclose(sampled.values / scale, found.values, rtol=2e-3, atol=1e-4)
        assert found.exact and found.rows == 40 and len(found.values) == 12
        assert found.total == pytest.approx(sampled.total / scale, rel=1e-3)


@pytest.fixture(scope="module")
def languages() -> dict[str, Array]:
    return {"mixture": mixture(C, V, RANK), "softmaxes": softmaxes(C, V, RANK)}


def occurrences(how: str, each: int) -> npt.NDArray[np.int64]:
    return np.full(C, each) if how == "alike" else zipf(C, C * each, 1)


@pytest.mark.parametrize("how", ["alike", "zipf"])
def test_of_probabilities_all_but_the_unbiased_say_too_many_dimensions(
    languages: dict[str, Array], how: str
) -> None:
    """Plain rows need most of the vocabulary even with a thousand samples a context, for what is
    five dimensions; the unbiased Gram matrix says too few up to ten, and five from a hundred on."""
    P = languages["mixture"]
    assert werror.w_error(spectrum(P), RANK) < 1e-7
    for each in EACH:
        counts = sample(P, occurrences(how, each), 2)
        for way in (("rows",), ("tokens",), ("rows", 2), ("rows", 1, 0.01)):
            if each == 1 and how == "alike" and way == ("rows", 2):
                continue  # no context is seen twice
            found = werror.spectrum(counts, *way)
            assert werror.reaching(found, 0.01) > V / 2
            assert werror.w_error(found, RANK) > (0.6 if each <= 10 else 0.2)
        if each > 1:
            d = werror.reaching(werror.spectrum(counts, "unbiased"), 0.01)
            assert d <= RANK and (each <= 10 or d == RANK)


def test_plain_rows_come_down_to_the_truth_as_contexts_are_seen_more(
    languages: dict[str, Array],
) -> None:
    """Later where contexts occur by Zipf's law: with more text come new ones, seen once."""
    errors = {}
    for name, P in languages.items():
        true = float(werror.w_error(spectrum(P), RANK))
        for how in ("alike", "zipf"):
            spectra = [werror.spectrum(sample(P, occurrences(how, n), 2)) for n in EACH]
            off = np.array([float(werror.w_error(found, RANK)) - true for found in spectra])
            assert off[-1] > 0 and np.all(np.diff(off[2:]) < 0)
            errors[name, how] = off
        assert np.all(errors[name, "zipf"][3:] > 1.2 * errors[name, "alike"][3:])


def test_logits_of_low_rank_are_many_dimensions_of_probabilities_and_few_of_a_softmax() -> None:
    """Which takes thirty samples a context; plain rows then still say most of V."""
    P = softmaxes(500, V, RANK)
    counts = sample(P, np.full(500, 30), 2)
    assert 6 * RANK < werror.reaching(spectrum(P), 0.01) < V / 2
    assert werror.reaching(werror.spectrum(counts), 0.01) > 0.8 * V
    assert softmaxrank.required(softmaxrank.fit(counts, [3, 4, 5, 6, 8])).rank == RANK


def test_what_cannot_be_made_is_refused() -> None:
    for make in (mixture, softmaxes):
        for rank in (0, 4):
            with pytest.raises(BadInput, match=f"rank: {rank}; 9 contexts and 3 tokens"):
                make(9, 3, rank)
    with pytest.raises(BadInput, match="a context has to occur"):
        sample(mixture(3, 3, 1), np.zeros(3, int))
