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
Additive smoothing takes p_c = (k_c + s) / (n_c + s V) in the first two. Smoothing by shorter
contexts (Kneser and Ney) is not offered: its rows are dense in a way of their own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh, eigh_tridiagonal, eigvals_banded, eigvalsh, solve_banded
from scipy.sparse import csr_array

from analysis.errors import BadInput
from analysis.ngrams import Counts

DENSE = 16_384  # mixed tokens up to which all eigenvalues are computed, in 8 DENSE^2 bytes
LEADING = 2_000  # eigenvalues computed of more
WEIGHTS = ("rows", "tokens", "unbiased")
_BLOCK = 16  # vectors of a Krylov step: the fewest that keep the products from waiting for memory
_PROBES, _STEPS = 16, 200  # of the quadrature for the tail

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
    _check(counts, weights, least, smoothing, dimensions)
    gram, pure, total, rows = _reduced(counts, weights, least, smoothing)
    mixed = len(gram.diagonal)
    wanted = dimensions or (counts.vocabulary if mixed <= DENSE else LEADING)
    if 3 * wanted >= mixed or mixed <= 32 * _BLOCK:  # then LAPACK takes no longer
        if mixed > DENSE:
            raise BadInput(
                f"dimensions: {wanted}; of {mixed:,} mixed tokens there may be {(mixed - 1) // 3}"
            )
        values = np.sort(np.concatenate([eigvalsh(gram.dense(), overwrite_a=True), pure]))[::-1]
        return Spectrum(values, np.empty((2, 0)), total, 0.0, True, rows, counts.vocabulary)
    leading, residual = _leading(gram, wanted, tolerance)
    known = pure >= leading[-1]
    values = np.sort(np.concatenate([leading, pure[known]]))[::-1]
    tail = _tail(gram, leading[-1], mixed - wanted, total - pure.sum() - leading.sum())
    tail = np.concatenate([tail, [pure[~known], np.ones((~known).sum())]], axis=1)
    tail = tail[:, np.argsort(-tail[0])]
    return Spectrum(values, tail, total, residual, False, rows, counts.vocabulary)


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
    goal = share**2 * spectrum.total
    i = int(np.argmax(left <= goal))
    if i == 0:
        return 0
    return int(np.ceil(at[i] - (at[i] - at[i - 1]) * (goal - left[i]) / (left[i - 1] - left[i])))


def _left(spectrum: Spectrum) -> tuple[Array, Array]:
    """Numbers of dimensions, rising, and what is left of the trace beyond each; 0 at the last."""
    values, (tails, numbers) = spectrum.values, spectrum.tail
    at = np.concatenate([np.arange(len(values) + 1), len(values) + np.cumsum(numbers)])
    parts = np.concatenate([values, tails * numbers])
    # Summed from the small end, where differences from the trace would be lost in rounding.
    left = np.append(np.cumsum(parts[::-1])[::-1], 0.0)
    return at, np.maximum(left, 0.0)


def _check(
    counts: Counts, weights: str, least: int, smoothing: float, dimensions: int | None
) -> None:
    if weights not in WEIGHTS:
        raise BadInput(f"weights: {weights!r}; give one of {', '.join(WEIGHTS)}")
    if not 0 <= smoothing < np.inf:
        raise BadInput(f"smoothing: {smoothing}; a count to add must be finite and not negative")
    if smoothing and weights == "unbiased":
        raise BadInput("smoothing: the unbiased estimate has none; leave it out")
    if dimensions is not None and not 1 <= dimensions <= counts.vocabulary:
        raise BadInput(f"dimensions: {dimensions}; there are 1 to {counts.vocabulary}")
    if least < 1:
        raise BadInput(f"least: {least}; a context that is counted was seen once at least")


@dataclass(frozen=True)
class _Gram:
    """diag(diagonal) + A^T A + U S U^T, m x m."""

    diagonal: Array
    A: csr_array
    U: Array
    S: Array

    def __matmul__(self, X: Array) -> Array:
        return (
            self.diagonal[:, None] * X
            + self.A.T @ (self.A @ X)
            + self.U @ (self.S @ (self.U.T @ X))
        )

    def dense(self) -> Array:
        m = len(self.diagonal)
        G, rows, columns = np.empty((m, m), order="F"), self.A.T.tocsr(), self.A.tocsc()
        for i in range(0, m, 512):
            some = slice(i, i + 512)
            G[:, some] = (rows @ columns[:, some]).toarray() + self.U @ (self.S @ self.U[some].T)
        G[np.diag_indices(m)] += self.diagonal
        return G


def _reduced(
    counts: Counts, weights: str, least: int, smoothing: float
) -> tuple[_Gram, Array, float, int]:
    """The part of the Gram matrix that needs a solver; the other eigenvalues, trace and contexts.

    A token that no context has beside another is an eigenvector (without smoothing) by itself, and
    contexts with one continuation only add to the diagonal.
    """
    V = counts.vocabulary
    n = np.add.reduceat(counts.counts, counts.starts[:-1])
    least = max(least, 2 if weights == "unbiased" else 1)
    kept = n >= least
    if not kept.any():
        raise BadInput(f"least: of {len(n)} contexts none is seen {least} times; give more text")
    scale = {
        "rows": 1 / (n + smoothing * V),
        "tokens": np.sqrt(n) / (n + smoothing * V),
        "unbiased": 1 / np.sqrt(np.maximum(n * (n - 1), 1)),
    }[weights] * kept
    width = np.diff(counts.starts)
    each = np.repeat(scale, width)
    a: Array = counts.counts * each
    squares = a**2 - (a * each if weights == "unbiased" else 0)
    diagonal: npt.NDArray[Any] = np.bincount(counts.tokens, squares, V)

    several = np.repeat(kept & (width > 1), width)
    tokens = counts.tokens[several]
    mixed = np.zeros(V, bool)
    mixed[tokens] = True
    starts = np.concatenate([[0], np.cumsum(width[kept & (width > 1)])])
    A = csr_array(
        (a[several], (np.cumsum(mixed) - 1)[tokens], starts), (len(starts) - 1, mixed.sum())
    )
    alone: npt.NDArray[Any] = np.bincount(counts.tokens, squares - several * a**2, V)

    total = diagonal.sum()
    if not smoothing:
        if total <= 0:
            raise BadInput("weights: unbiased needs a context that is followed by a token twice")
        gram = _Gram(alone[mixed], A, np.zeros((mixed.sum(), 0)), np.zeros((0, 0)))
        return gram, diagonal[~mixed], float(total), int(kept.sum())

    # W + s r 1^T, r (C) the scale, has G + u 1^T + 1 u^T + level 1 1^T. Among tokens alike in G and
    # u, what is orthogonal to 1 is an eigenspace; their mean joins the mixed tokens.
    u = smoothing * np.bincount(counts.tokens, a * each, V)
    level = smoothing**2 * np.sum(scale**2)
    both = np.stack([diagonal, u], axis=1)[~mixed]
    alike, sizes = np.unique(both, axis=0, return_counts=True)
    ones = np.sqrt(np.concatenate([np.ones(mixed.sum()), sizes]))
    U = np.stack([ones, ones * np.concatenate([u[mixed], alike[:, 1]])], axis=1)
    A.resize((A.shape[0], len(ones)))
    gram = _Gram(
        np.concatenate([alone[mixed], alike[:, 0]]), A, U, np.array([[level, 1], [1, 0.0]])
    )
    total += 2 * u.sum() + level * V
    return gram, np.repeat(alike[:, 0], sizes - 1), float(total), int(kept.sum())


def _leading(gram: _Gram, wanted: int, tolerance: float) -> tuple[Array, float]:
    """The leading eigenvalues, falling, and their largest residual, by block Lanczos with full
    reorthogonalisation (Golub and Underwood 1977)."""
    m, rng = len(gram.diagonal), np.random.default_rng(0)
    limit = min(4 * wanted + 10 * _BLOCK, m - _BLOCK)
    Q = np.empty((m, limit + _BLOCK), order="F")
    T = np.zeros((limit + _BLOCK, limit + _BLOCK))
    Q[:, :_BLOCK] = np.linalg.qr(rng.standard_normal((m, _BLOCK)))[0]
    k, check, size = 0, 3 * wanted // 2, 0.0
    while True:
        now, after = slice(k, k + _BLOCK), slice(k + _BLOCK, k + 2 * _BLOCK)
        k += _BLOCK
        known = Q[:, :k]
        Z = gram @ np.ascontiguousarray(Q[:, now])
        C = known.T @ Z
        size = max(size, float(np.abs(C).max()))
        Q[:, after], R = step = np.linalg.qr(Z - known @ C)
        # Of what is next to nothing only rounding is left, which may lie inside the known space.
        least = 1e-8 * size
        while np.abs(np.diag(step[1])).min() < least:
            Q[:, after], again = step = np.linalg.qr(step[0] - known @ (known.T @ step[0]))
            R, least = again @ R, 0.01
        T[now, now] = (C[now] + C[now].T) / 2
        T[after, now], T[now, after] = R, R.T
        full = k + _BLOCK > limit
        if full or (k >= check and _last(T[:k, :k], R, wanted) <= tolerance):
            values, vectors = eigh(T[:k, :k], subset_by_index=[k - wanted, k - 1])
            residual = float(np.linalg.norm(R @ vectors[-_BLOCK:], axis=0).max())
            if full or residual <= tolerance * values[-1]:
                return values[::-1], residual
        if k >= check:
            check += wanted // 8


def _last(T: Array, R: Array, wanted: int) -> float:
    """The residual of the wanted-th leading eigenvalue of T, as a share of the first: it tells, for
    next to nothing, whether those of all are worth their cost. T has 2 _BLOCK + 1 diagonals."""
    k = len(T)
    below = [np.diagonal(T, -i) for i in range(_BLOCK + 1)]
    lower = np.stack([np.pad(d, (0, i)) for i, d in enumerate(below)])
    upper = np.stack([np.pad(d, (i, 0)) for i, d in enumerate(below)])[:0:-1]
    values = eigvals_banded(lower, lower=True)
    shifted = np.concatenate([upper, lower])
    shifted[_BLOCK] -= values[-wanted] + 1e-14 * values[-1]  # or LAPACK might divide by 0
    x = np.ones(k)
    for _ in range(3):
        x = solve_banded((_BLOCK, _BLOCK), shifted, x)
        x /= np.linalg.norm(x)
    return float(np.linalg.norm(R @ x[-_BLOCK:]) / values[-1])


def _tail(gram: _Gram, below: float, number: int, total: float) -> Array:
    """2 x j: eigenvalues under `below` and how many of each, of `number` that sum to `total`."""
    m, rng = len(gram.diagonal), np.random.default_rng(1)
    now = rng.choice([-1.0, 1.0], (m, _PROBES)) / np.sqrt(m)
    before, beta = np.zeros_like(now), np.zeros(_PROBES)
    alphas, betas = np.empty((2, _STEPS, _PROBES))
    for i in range(_STEPS):
        Z = gram @ now - beta * before
        alphas[i] = (Z * now).sum(0)
        Z -= alphas[i] * now
        beta = np.linalg.norm(Z, axis=0)
        beta[beta <= 1e-14 * np.abs(alphas[0])] = 0  # the space is exhausted
        betas[i] = beta
        before, now = now, np.divide(Z, beta, out=np.zeros_like(Z), where=beta > 0)
    nodes, numbers = np.empty((2, _PROBES, _STEPS))
    for i in range(_PROBES):
        nodes[i], vectors = eigh_tridiagonal(alphas[:, i], betas[:-1, i])
        numbers[i] = m / _PROBES * vectors[0] ** 2
    kept = nodes < below
    t, w = nodes[kept], numbers[kept]
    # The least change of the numbers, relative to themselves, that makes both sums right.
    moments = np.array([[w.sum(), w @ t], [w @ t, w @ t**2]])
    a, b = np.linalg.lstsq(moments, np.array([number, total]))[0]
    return np.stack([t, w * np.maximum(a + b * t, 0)])
