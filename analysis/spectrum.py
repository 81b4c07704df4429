"""Singular values of a head, and the scalars made from them.

Godey et al. 2024 (arXiv 2404.07647), section 4.2: the spectrum of the head W (V x d) flattens and
then collapses while small models saturate.
"""

import math

import torch
from torch import Tensor

# The Gram matrix squares the condition number: past this sigma_min / sigma_max its smallest
# singular values are no longer good to 1e-9.
GRAM_LIMIT = 1e-4


def triangle(w: Tensor) -> Tensor:
    """R (d x d, float64) with R^T R = W^T W for W (V x d, V >= d).

    By Cholesky of the Gram matrix, which is 30 times smaller than a head; by QR where W is too
    ill-conditioned for that. Raises ValueError where W holds NaN or infinity.
    """
    w = w.detach().double()
    gram = w.T @ w
    if not torch.isfinite(gram).all():
        raise ValueError("the matrix holds NaN, infinity, or values too large to square")
    eigenvalues = torch.linalg.eigvalsh(gram)
    if eigenvalues[0] > GRAM_LIMIT**2 * eigenvalues[-1]:
        return torch.linalg.cholesky(gram, upper=True)
    return torch.linalg.qr(w, mode="r").R


def singular_values(w: Tensor, right: Tensor | None = None, centred: bool = False) -> Tensor:
    """Singular values of W (V x d), or of W @ right (V x r, r x d) without forming it: float64,
    descending, min(V, d) of them, exact zeros beyond rank r.

    `centred` takes the mean over the vocabulary away first: softmax cannot see it.
    """
    w = w.detach().double()
    if centred:
        w = w - w.mean(0)
    small = triangle(w) if w.shape[0] >= w.shape[1] else w
    if right is not None:
        small = small @ right.detach().double()
    sigma = torch.linalg.svdvals(small)
    width = w.shape[1] if right is None else right.shape[1]
    return torch.nn.functional.pad(sigma, (0, min(w.shape[0], width) - len(sigma)))


def truncation(w: Tensor, moment: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors A (V x d) and B (d x d), float64, whose first r columns and rows are, for every r,
    the best rank-r head for W (V x d).

    Without `moment` the truncated SVD of W: least Frobenius norm of W - A B (Eckart & Young, the
    paper's Lemma 5.2). With the hidden states' second moment E[h h^T] (d x d) the least squared
    error of logits, E|C (W - A B) h|^2, where C takes the mean over the vocabulary away, which
    softmax cannot see; rows of B then have E[(B h)_i^2] = 1. Directions in which no hidden state
    was seen are left out.
    """
    w = w.detach().double()
    if moment is None:
        _, _, vt = torch.linalg.svd(triangle(w))
        return w @ vt.T, vt
    w = w - w.mean(0)
    values, vectors = torch.linalg.eigh(moment.double())
    seen = values > 1e-12 * values[-1]
    root = values.where(seen, 0).sqrt()
    inverse = torch.where(seen, 1 / root, 0)
    half = (vectors * root) @ vectors.T
    # Columns largest first, as an SVD has them.
    right = torch.linalg.eigh(half @ (w.T @ w) @ half).eigenvectors.flip(1)
    return w @ (half @ right), right.T @ ((vectors * inverse) @ vectors.T)


def singular_entropy(sigma: Tensor, power: float = 2.0) -> float:
    """KL(p || uniform) in nats, p proportional to sigma^power: 0 is flat, ln(len(sigma)) rank one.

    The paper's Figure 5 shows power 2 (recovered from its Figure 4; its text leaves it open).
    Raises ValueError where the spectrum is all zero or not finite.
    """
    sigma = sigma.double()
    top = sigma.max()
    if not torch.isfinite(top) or top <= 0:
        raise ValueError(f"a spectrum needs a positive finite largest value, not {top.item()}")
    p = (sigma / top) ** power
    p = p / p.sum()
    return math.log(len(sigma)) + torch.special.xlogy(p, p).sum().item()


def numerical_rank(m: Tensor, tolerance: float = 1e-10) -> int:
    """How many singular values of m lie above `tolerance` times the largest."""
    sigma = singular_values(m)
    return int((sigma > tolerance * sigma[0]).sum())
