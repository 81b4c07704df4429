"""Eigenvalues of a symmetric matrix that is known by its products.

The leading ones by block Lanczos (Golub and Underwood 1977), how the others are spread by
stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh, eigh_tridiagonal, eigvals_banded, solve_banded
from scipy.sparse import csr_array

BLOCK = 16  # vectors of a Krylov step: the fewest that keep the products from waiting for memory
_PROBES, _STEPS = 16, 200  # of the quadrature for the tail

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gram:
    """diag(diagonal) + A^T diag(signs) A + U S U^T, m x m."""

    diagonal: Array
    A: csr_array
    signs: Array
    U: Array
    S: Array

    def __matmul__(self, X: Array) -> Array:
        return (
            self.diagonal[:, None] * X
            + self.A.T @ (self.signs[:, None] * (self.A @ X))
            + self.U @ (self.S @ (self.U.T @ X))
        )

    def dense(self) -> Array:
        m = len(self.diagonal)
        G, columns = np.empty((m, m), order="F"), self.A.tocsc()
        rows = self.A.T.multiply(self.signs).tocsr()
        for i in range(0, m, 512):
            some = slice(i, i + 512)
            G[:, some] = (rows @ columns[:, some]).toarray() + self.U @ (self.S @ self.U[some].T)
        G[np.diag_indices(m)] += self.diagonal
        return G


def reduced(gram: Gram) -> tuple[Gram, Array]:
    """The part that needs a solver, and the other eigenvalues.

    What A does not mix is an eigenvector by itself where there is no U. With one, among those
    alike in the diagonal and in U what is orthogonal to 1 is an eigenspace; their mean stays.
    """
    mixed = np.bincount(gram.A.indices, minlength=len(gram.diagonal)) > 0
    each = np.concatenate([gram.diagonal[:, None], gram.U], axis=1)
    kept, ones, others = each[mixed], np.ones(mixed.sum()), gram.diagonal[~mixed]
    if gram.U.shape[1]:
        alike, sizes = np.unique(each[~mixed], axis=0, return_counts=True)
        kept, ones = np.concatenate([kept, alike]), np.concatenate([ones, np.sqrt(sizes)])
        others = np.repeat(alike[:, 0], sizes - 1)
    places = (np.cumsum(mixed) - 1)[gram.A.indices]
    A = csr_array((gram.A.data, places, gram.A.indptr), (gram.A.shape[0], len(kept)))
    return Gram(kept[:, 0], A, gram.signs, ones[:, None] * kept[:, 1:], gram.S), others


def leading(gram: Gram, wanted: int, tolerance: float) -> tuple[Array, float]:
    """The leading eigenvalues, falling, and their largest residual, by block Lanczos with full
    reorthogonalisation (Golub and Underwood 1977)."""
    m, rng = len(gram.diagonal), np.random.default_rng(0)
    limit = min(4 * wanted + 10 * BLOCK, m - BLOCK)
    Q = np.empty((m, limit + BLOCK), order="F")
    T = np.zeros((limit + BLOCK, limit + BLOCK))
    Q[:, :BLOCK] = np.linalg.qr(rng.standard_normal((m, BLOCK)))[0]
    k, check, size = 0, 3 * wanted // 2, 0.0
    while True:
        now, after = slice(k, k + BLOCK), slice(k + BLOCK, k + 2 * BLOCK)
        k += BLOCK
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
        full = k + BLOCK > limit
        if full or (k >= check and _last(T[:k, :k], R, wanted) <= tolerance):
            values, vectors = eigh(T[:k, :k], subset_by_index=[k - wanted, k - 1])
            residual = float(np.linalg.norm(R @ vectors[-BLOCK:], axis=0).max())
            if full or residual <= tolerance * values[-1]:
                return values[::-1], residual
        if k >= check:
            check += wanted // 8


def _last(T: Array, R: Array, wanted: int) -> float:
    """The residual of the wanted-th leading eigenvalue of T, as a share of the first: it tells, for
    next to nothing, whether those of all are worth their cost. T has 2 BLOCK + 1 diagonals."""
    k = len(T)
    below = [np.diagonal(T, -i) for i in range(BLOCK + 1)]
    lower = np.stack([np.pad(d, (0, i)) for i, d in enumerate(below)])
    upper = np.stack([np.pad(d, (i, 0)) for i, d in enumerate(below)])[:0:-1]
    values = eigvals_banded(lower, lower=True)
    shifted = np.concatenate([upper, lower])
    shifted[BLOCK] -= values[-wanted] + 1e-14 * values[-1]  # or LAPACK might divide by 0
    x = np.ones(k)
    for _ in range(3):
        x = solve_banded((BLOCK, BLOCK), shifted, x)
        x /= np.linalg.norm(x)
    return float(np.linalg.norm(R @ x[-BLOCK:]) / values[-1])


def tail(gram: Gram, below: float, number: int, total: float) -> Array:
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
