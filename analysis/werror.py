"""How many dimensions the next-token distributions of a text span.

Godey et al. 2024, section 5.2 and Figure 7: W is C x V, a row for each context, of how its
continuations are distributed; W-error(d) is what its best approximation of rank d leaves of it. All
is had from the eigenvalues of the Gram matrix W^T W (V x V), which are the squares of W's singular
values; neither W nor a smoothed W is ever made dense.

Three Gram matrices, of contexts c with counts k_c (V) that sum to n_c:
  rows      sum_c p_c p_c^T with p_c = k_c / n_c: the paper's, every context alike;
  tokens    sum_c n_c p_c p_c^T: every token of the text alike;
  unbiased  sum_c (k_c k_c^T - diag k_c) / (n_c (n_c - 1)) over contexts with n_c >= 2: its
            expectation is that of `rows` with the true distributions in place of samples of them,
            which have too many dimensions. Its own leading eigenvalues hold noise too, set off by
            negative ones: where contexts are seen little it says too few, and the two are bounds.
Additive smoothing takes p_c = (k_c + s) / (n_c + s V) in the first two; analysis/kneserney.py
smooths by shorter contexts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigvalsh
from scipy.sparse import csr_array

from analysis import lanczos
from analysis.errors import BadInput
from analysis.lanczos import Gram
from analysis.ngrams import Counts

DENSE = 16_384  # mixed tokens up to which all eigenvalues are computed, in 8 DENSE^2 bytes
LEADING = 2_000  # eigenvalues computed of more
WEIGHTS = ("rows", "tokens", "unbiased")

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of a Gram matrix W^T W: squares of W's singular values."""

    values: Array
    """The leading ones, falling; all V where `exact`."""
    tail: Array
    """2 x j: estimates of the rest, falling, and how many there are of each (not whole numbers),
    scaled so that both sums, of numbers and of eigenvalues, are right."""
    total: float
    """The trace: the sum of all eigenvalues, the squared Frobenius norm of W."""
    residual: float
    """The largest norm of G v - value v over the values and their unit vectors v: so near to each
    value lies an eigenvalue. 0 where they are LAPACK's."""
    exact: bool
    rows: int
    """Contexts that are in it."""
    vocabulary: int


def spectrum(
    counts: Counts,
    weights: str = "rows",
    least: int = 1,
    smoothing: float = 0.0,
    dimensions: int | None = None,
    tolerance: float = 1e-8,
) -> Spectrum:
    """The spectrum of the contexts that are seen at least `least` times.

    All V eigenvalues without `dimensions`, unless more than DENSE tokens are mixed; otherwise at
    least so many leading ones (LEADING if not given) with residuals of at most `tolerance` of the
    first, or what a Krylov space of four times as many dimensions gives, and a tail by stochastic
    Lanczos quadrature (Ubaru, Chen and Saad 2017). `smoothing` is the count added to every token.

    Raises BadInput where an argument makes no sense, no context is left, or more than a third of
    more than DENSE mixed tokens is asked for.
    """
    check(counts, weights, WEIGHTS, least, dimensions)
    if not 0 <= smoothing < np.inf:
        raise BadInput(f"smoothing: {smoothing}; a count to add must be finite and not negative")
    if smoothing and weights == "unbiased":
        raise BadInput("smoothing: the unbiased estimate has none; leave it out")
    return solved(*_reduced(counts, weights, least, smoothing), dimensions, tolerance)


def check(
    counts: Counts, weights: str, offered: tuple[str, ...], least: int, dimensions: int | None
) -> None:
    """Raises BadInput where an argument makes no sense."""
    if weights not in offered:
        raise BadInput(f"weights: {weights!r}; give one of {', '.join(offered)}")
    if dimensions is not None and not 1 <= dimensions <= counts.vocabulary:
        raise BadInput(f"dimensions: {dimensions}; there are 1 to {counts.vocabulary}")
    if least < 1:
        raise BadInput(f"least: {least}; a context that is counted was seen once at least")


def enough(n: npt.NDArray[np.int64], least: int) -> npt.NDArray[np.bool_]:
    """Which of all contexts, seen n times, are seen `least` times. Raises BadInput if none is."""
    kept = n >= least
    if not kept.any():
        raise BadInput(f"least: of {len(n)} contexts none is seen {least} times; give more text")
    return kept


def solved(
    gram: Gram, pure: Array, total: float, rows: int, dimensions: int | None, tolerance: float
) -> Spectrum:
    """Of the part that `lanczos.reduced` leaves, the other eigenvalues, the trace and how many
    contexts there are; the rest as in `spectrum`."""
    mixed, vocabulary = len(gram.diagonal), len(gram.diagonal) + len(pure)
    wanted = dimensions or (vocabulary if mixed <= DENSE else LEADING)
    if 3 * wanted >= mixed or mixed <= 32 * lanczos.BLOCK:  # then LAPACK takes no longer
        if mixed > DENSE:
            raise BadInput(
                f"dimensions: {wanted}; of {mixed:,} mixed tokens there may be {(mixed - 1) // 3}"
            )
        values = np.sort(np.concatenate([eigvalsh(gram.dense(), overwrite_a=True), pure]))[::-1]
        return Spectrum(values, np.empty((2, 0)), total, 0.0, True, rows, vocabulary)
    leading, residual = lanczos.leading(gram, wanted, tolerance)
    known = pure >= leading[-1]
    values = np.sort(np.concatenate([leading, pure[known]]))[::-1]
    left = total - pure.sum() - leading.sum()
    tail = lanczos.tail(gram, leading[-1], mixed - wanted, left)
    tail = np.concatenate([tail, [pure[~known], np.ones((~known).sum())]], axis=1)
    tail = tail[:, np.argsort(-tail[0])]
    return Spectrum(values, tail, total, residual, False, rows, vocabulary)


def w_error(spectrum: Spectrum, d: npt.ArrayLike) -> Array:
    """||sigma_(d+1:)||_2 / ||W||_F for each number of dimensions d, between 0 and V; section 5.2.

    Beyond the computed values an estimate. Of an unbiased Gram matrix it is 0 where the leading
    eigenvalues have used up the trace.
    """
    at, left = _left(spectrum)
    return np.sqrt(np.interp(np.asarray(d, float), at, left) / spectrum.total)


def reaching(spectrum: Spectrum, share: float) -> int:
    """The smallest d with a W-error of at most `share`, 0 to 1; above len(values) an estimate."""
    at, left = _left(spectrum)
    i = int(np.argmax(np.sqrt(left / spectrum.total) <= share))  # as w_error has it
    if i == 0:
        return 0
    beyond = max(0.0, share**2 * spectrum.total - left[i]) / (left[i - 1] - left[i])
    return int(np.ceil(at[i] - (at[i] - at[i - 1]) * beyond))


def _left(spectrum: Spectrum) -> tuple[Array, Array]:
    """Numbers of dimensions, rising, and what is left of the trace beyond each; 0 at the last."""
    values, (tails, numbers) = spectrum.values, spectrum.tail
    at = np.concatenate([np.arange(len(values) + 1), len(values) + np.cumsum(numbers)])
    parts = np.concatenate([values, tails * numbers])
    # Summed from the small end, where differences from the trace would be lost in rounding.
    left = np.append(np.cumsum(parts[::-1])[::-1], 0.0)
    return at, np.maximum(left, 0.0)


def _reduced(
    counts: Counts, weights: str, least: int, smoothing: float
) -> tuple[Gram, Array, float, int]:
    """What `solved` takes. Contexts with one continuation only add to the diagonal."""
    V = counts.vocabulary
    n = np.add.reduceat(counts.counts, counts.starts[:-1])
    kept = enough(n, max(least, 2 if weights == "unbiased" else 1))
    scale = {
        "rows": 1 / (n + smoothing * V),
        "tokens": np.sqrt(n) / (n + smoothing * V),
        "unbiased": 1 / np.sqrt(np.maximum(n * (n - 1), 1)),
    }[weights] * kept
    width = np.diff(counts.starts)
    each = np.repeat(scale, width)
    a: Array = counts.counts * each
    squares = a**2 - (a * each if weights == "unbiased" else 0)
    total = squares.sum()
    if total <= 0:
        raise BadInput("weights: unbiased needs a context that is followed by a token twice")

    mixing = kept & (width > 1)
    several = np.repeat(mixing, width)
    starts = np.concatenate([[0], np.cumsum(width[mixing])])
    A = csr_array((a[several], counts.tokens[several], starts), (len(starts) - 1, V))
    diagonal: npt.NDArray[Any] = np.bincount(counts.tokens, squares - several * a**2, V)
    U, S = np.zeros((V, 0)), np.zeros((0, 0))
    if smoothing:
        # W + s r 1^T, r (C) the scale, has G + u 1^T + 1 u^T + level 1 1^T.
        u = smoothing * np.bincount(counts.tokens, a * each, V)
        level = smoothing**2 * np.sum(scale**2)
        U, S = np.stack([np.ones(V), u], axis=1), np.array([[level, 1], [1, 0.0]])
        total += 2 * u.sum() + level * V
    gram, pure = lanczos.reduced(Gram(diagonal, A, np.ones(A.shape[0]), U, S))
    return gram, pure, float(total), int(kept.sum())
