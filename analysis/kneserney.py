"""Next-token distributions smoothed by shorter contexts, and the dimensions that they span.

Interpolated smoothing of Kneser and Ney, with one discount D for each length of context (Chen and
Goodman 1999, section 2.7):

    p_c(v) = (k_cv - D) / n_c [where k_cv > 0] + D t_c / n_c p_c'(v)

k_cv is how often v follows c, n_c the sum and t_c the number of such v, c' the context c without
its first token. Of shorter contexts k_cv is how many distinct tokens come before c v; the empty one
falls back on 1 / V. D = n1 / (n1 + 2 n2), of n1 k_cv that are 1 and n2 that are 2, each taken to be
one at least, so that D is within 0 and 1. All comes from counts of n-grams of one length: what the
first n - 1 tokens of a chunk say of shorter contexts is left out.

The rows of W, p_c, are dense, but W = S + L E W', with S sparse, L diagonal, W' of the shorter
contexts and E telling which is whose. So, D diagonal and B as sparse as S,

    W^T D W + W^T B + B^T W = S^T D S + S^T B + B^T S + W'^T D' W' + W'^T B' + B'^T W'

with D' = E^T L D L E diagonal again and B' = E^T L (D S + B) as sparse as S'. From B = 0 at the
longest contexts down to the empty one this gives the Gram matrix (and its trace) as one of sparse
rows, none of which is of a fallback, and of rank two.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, vstack

from analysis import lanczos, werror
from analysis.errors import BadInput
from analysis.lanczos import Gram
from analysis.ngrams import Counts

WEIGHTS = ("rows", "tokens")
_HALF = np.uint64(32)

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Order:
    """C contexts of one length, followed by nnz distinct tokens in all. Both are packed."""

    contexts: Words
    """(C) the place of c' among the shorter contexts, and the first token of c; rising."""
    grams: Words
    """(nnz) the place of c, and the token v; rising."""
    shares: Array
    """(nnz) (k_cv - D) / n_c."""
    left: Array
    """(C) D t_c / n_c, for the shorter context to share out."""
    shorter: Ints
    """(nnz) the place of c' v among the shorter n-grams; none of the empty context."""


@dataclass(frozen=True)
class Model:
    n: int
    vocabulary: int
    orders: tuple[Order, ...]
    """By length of context, 0 to n - 1."""
    seen: Ints
    """How often each of the longest contexts is seen."""


def estimate(counts: Counts) -> Model:
    """The smoothed distributions after all contexts, seen or not."""
    tokens = counts.contexts()
    places: npt.NDArray[Any] = np.zeros(len(tokens), np.uint64)
    contexts = [places[:1]]
    for i in reversed(range(counts.n - 1)):
        found, places = np.unique(_packed(places, tokens[:, i]), return_inverse=True)
        contexts.append(found)
    grams = _packed(np.repeat(places, np.diff(counts.starts)), counts.tokens)
    order = np.argsort(grams)
    grams, k = grams[order], counts.counts[order]
    seen = np.bincount(_unpacked(grams)[0], k).astype(np.int64)
    orders = []
    for some in reversed(contexts):
        owners, following = _unpacked(grams)
        fewer, shorter, before = np.unique(
            _packed(_unpacked(some)[0][owners], following), return_inverse=True, return_counts=True
        )
        n, once, twice = np.bincount(owners, k), max(1, (k == 1).sum()), max(1, (k == 2).sum())
        discount = once / (once + 2 * twice)
        shares, left = (k - discount) / n[owners], discount * np.bincount(owners) / n
        orders.append(Order(some, grams, shares, left, shorter))
        grams, k = fewer, before
    return Model(counts.n, counts.vocabulary, tuple(reversed(orders)), seen)


def probabilities(model: Model, grams: npt.NDArray[np.integer]) -> Array:
    """(m) of the last token of each n-gram (m x n token ids) after the ones before it; what is not
    known of a context is left out from its beginning.

    Raises BadInput where a token is outside the vocabulary, or an n-gram has not n tokens.
    """
    if grams.ndim != 2 or grams.shape[1] != model.n:
        raise BadInput(f"grams: an array of {grams.shape}; give one of m x {model.n} token ids")
    outside = (grams < 0) | (grams >= model.vocabulary)
    if outside.any():
        raise BadInput(
            f"grams: token {grams[outside][0]} is not in a vocabulary of {model.vocabulary}"
        )
    p = np.full(len(grams), 1 / model.vocabulary)
    places, known = np.zeros(len(grams), np.int64), np.ones(len(grams), bool)
    for length, order in enumerate(model.orders):
        if length:
            places, here = _find(order.contexts, _packed(places, grams[:, -1 - length]))
            known &= here
        entries, follows = _find(order.grams, _packed(places, grams[:, -1]))
        p = np.where(known, follows * order.shares[entries] + order.left[places] * p, p)
    return p


def spectrum(
    counts: Counts,
    weights: str = "rows",
    least: int = 1,
    dimensions: int | None = None,
    tolerance: float = 1e-8,
) -> werror.Spectrum:
    """What `werror.spectrum` finds, of smoothed rows p_c: every context alike (`rows`) or every
    token of the text (`tokens`). Contexts that are seen less than `least` times have no row, but
    are smoothed by.

    Raises BadInput for what `werror.spectrum` does.
    """
    werror.check(counts, weights, WEIGHTS, least, dimensions)
    model = estimate(counts)
    kept = werror.enough(model.seen, least)
    gram, total = _gram(model, kept * (model.seen if weights == "tokens" else 1.0))
    return werror.solved(*lanczos.reduced(gram), total, int(kept.sum()), dimensions, tolerance)


def _gram(model: Model, d: npt.NDArray[Any]) -> tuple[Gram, float]:
    """W^T D W and its trace, D (C) of the longest contexts.

    S^T D S + S^T B + B^T S is (a S + B / a)^T (a S + B / a) - (B / a)^T (B / a) with a^2 = D.
    """
    V, total = model.vocabulary, 0.0
    diagonal, rows, signs = np.zeros(V), [csr_array((0, V))], [np.zeros(0)]
    b: npt.NDArray[Any] = np.zeros(len(model.orders[-1].grams))
    for order, below in zip(model.orders[:0:-1], model.orders[-2::-1], strict=True):
        owners, tokens = _unpacked(order.grams)
        mass = d[owners] * order.shares + b
        squares = order.shares * (mass + b)
        total += squares.sum()
        width = np.bincount(owners)
        mixing = (width > 1) & (d > 0)
        several = mixing[owners]
        diagonal += np.bincount(tokens, np.where(several, 0, squares), V)
        root = np.sqrt(d[owners[several]])
        small = b[several] / root
        starts = np.concatenate([[0], np.cumsum(width[mixing])])
        for sign, values in (1.0, root * order.shares[several] + small), (-1.0, small):
            if values.any():  # not so for B = 0
                shape = (len(starts) - 1, V)
                rows.append(csr_array((values, tokens[several], starts), shape))
                signs.append(np.full(shape[0], sign))
        b = np.bincount(order.shorter, order.left[owners] * mass)
        d = np.bincount(_unpacked(order.contexts)[0], order.left**2 * d, len(below.contexts))
    last = model.orders[0]
    p, u = np.full(V, last.left[0] / V), np.zeros(V)
    p[last.grams] += last.shares
    u[last.grams] = b
    total += d[0] * p @ p + 2 * u @ p
    U, S = np.stack([p, u], axis=1), np.array([[d[0], 1], [1, 0]])
    return Gram(diagonal, vstack(rows, "csr"), np.concatenate(signs), U, S), float(total)


def _packed(places: npt.NDArray[np.integer], tokens: npt.NDArray[np.integer]) -> Words:
    return places.astype(np.uint64) << _HALF | tokens.astype(np.uint64)


def _unpacked(words: Words) -> tuple[Ints, Ints]:
    """Places and tokens."""
    return (words >> _HALF).astype(np.int64), (words & (2**_HALF - np.uint64(1))).astype(np.int64)


def _find(rising: Words, words: Words) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Where each word is, and if it is at all."""
    places = np.minimum(np.searchsorted(rising, words), len(rising) - 1)
    return places, rising[places] == words
