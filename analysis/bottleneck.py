"""What cutting a head to rank r costs, and what theory says it can cost at most.

Godey et al. 2024 (arXiv 2404.07647), section 6, with sharper forms of their Theorem 5.3. A head
W (V x d) on hidden states h_1 .. h_n whose next tokens are y_1 .. y_n has the loss mean_i
lse(W h_i) - (W h_i)_{y_i}. Let W' be another head, u_i = C (W' - W) h_i, where C takes the mean
over the vocabulary away, which softmax cannot see, p_i = softmax(W h_i), g_i = p_i - e_{y_i}, and
the gap what W' loses more. All in nats per token.

First order. By the mean value theorem the gap is <q - e_y, u> for a q of the simplex, and
|q - e_y| <= sqrt 2: gap <= sqrt 2 mean |u|. With S = mean h h^T the right side is at most
sqrt(2 mean |u|^2) <= sqrt(2 lambda_max(S)) |W' - W|_F: Theorem 5.3 with its constant. Of equal
order, gap <= sqrt(2 tr S) sigma_{r+1}. Both for the truncated SVD, and for the weighted truncation
because its mean |u|^2 is no larger. Equal where all mass is, and stays, on a wrong token.

Second order. The gap is exactly mean <g, u> + ln E_p e^v, v = u - E_p u. The first term, <G, W' -
W> with G the loss's gradient, bounds it from below (Jensen). The second is, by token, at most
1. |u|^2 / 4: its Hessian in u, diag(q) - q q^T, has no eigenvalue above 1/2 (`gradient`);
2. range(u)^2 / 8, Hoeffding's lemma, at most (1) because range(u)^2 <= 2 |u|^2;
3. max v = m, and with it <g, u> + m <= range(u) <= sqrt 2 |u|;
4. ln(1 + Var_p(u) (e^m - 1 - m) / m^2), Bennett's: (e^v - 1 - v) / v^2 rises with v.
`sharp` takes the least of (2) to (4). It is exact to leading order, Var_p(u) / 2, where (1) is
V / 2 times that if p is flat. (1) is equal to leading order where p is 1/2 on two tokens and u
tells them apart.

Minimiser. Where W minimises the loss on these very tokens, without regularisation, G = 0: the gap
is at most mean |u|^2 / 4. The rank-r head of the least mean |u|^2 is the weighted truncation, and
its u_i are what the truncated SVD leaves of the matrix Z (n x V) of centred logits: the best
rank-r head loses at most 1/(4n) sum_{i>r} sigma_i(Z)^2 <= lambda_max(S)/4 sum_{i>r} sigma_i(W)^2,
the square of the theorem's order. No better order exists: ln E_p exp(u - E_p u) = Var_p(u)/2 +
O(|u|^3), Var_p(u) >= min_j p_j |u|^2, and by Eckart and Young sum_i |u_i|^2 >= sum_{i>r}
sigma_i(Z)^2 for any head of rank r.
"""

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor

from analysis import spectrum
from analysis.errors import BadInput

Array = npt.NDArray[np.float64]
Factors = tuple[Tensor, Tensor]

ALWAYS = ("sharp", "gradient", "first_order", "first_order_sigma", "theorem")
"""Columns of `bounds` that no head, state or token can exceed."""
MINIMISER = ("second_order", "logit_matrix")
"""Bounds where W is an unregularised minimiser on the same tokens."""
SCORES = 2**23  # logits held at a time
CACHED = 2**19  # and gone through at a time: twice as fast as from memory
OPTIONS = {"maxiter": 5000, "maxfun": 10_000, "gtol": 1e-12, "ftol": 1e-15}  # of L-BFGS


def bounds(
    w: Tensor, hidden: Tensor, tokens: Tensor, ranks: list[int], bias: Tensor | None = None
) -> pl.DataFrame:
    """Gap and bounds, in nats per token, of the head W (V x d) cut to each rank (0 to d), on
    hidden states (n x d) before next tokens (n); a bias (V) stays as it is. A row for each rank,
    rising, and method: `plain`, the truncated SVD of W, and `weighted` by the second moment of
    these states (spectrum.truncation). See the module for the derivations.

    gap; slope, <G, dW>, which it is never below; the bounds of ALWAYS and MINIMISER, sharp and
    gradient with the slope in; tail, sqrt(sum_{i>r} sigma_i(W)^2), of which `theorem` is a
    multiple. logit_matrix is about the best head of rank r and the weighted truncation alone.

    float64; a minute of one core at V = 50k, d = 576, n = 5,000 and ten ranks. Raises BadInput
    where a rank is not one of 0 to d, or W or a state is not finite.
    """
    w, h = w.detach().double(), hidden.detach().double()
    ranks, d = sorted(set(ranks)), w.shape[1]
    if not ranks or ranks[0] < 0 or ranks[-1] > d:
        raise BadInput(f"ranks {ranks}: a head with {d} columns is cut to ranks from 0 to {d}")
    if not (torch.isfinite(w).all() and torch.isfinite(h).all() and len(h)):
        raise BadInput("bounds need finite weights and at least one hidden state, all finite")
    moment = h.T @ h / len(h)
    reduced = spectrum.reduce(w)
    sigma = spectrum.values(reduced.whole, reduced.shape)
    logits = spectrum.functional(reduced.centred, moment)
    largest = torch.linalg.eigvalsh(moment)[-1].item()
    rows = []
    for method in ("plain", "weighted"):
        factors = spectrum.truncation(w, None if method == "plain" else moment)
        found = _measured(w, h, tokens, ranks, bias, factors).tolist()
        for rank, (gap, slope, length, square, excess) in zip(ranks, found, strict=True):
            tail = sigma[rank:].norm().item()
            rows.append({
                "rank": rank, "method": method, "gap": gap, "slope": slope,
                "sharp": slope + excess,
                "gradient": slope + square / 4,
                "first_order": 2**0.5 * length,
                "first_order_sigma": sigma[rank : rank + 1].sum().item()
                * (2 * moment.trace().item()) ** 0.5,
                "theorem": (2 * largest) ** 0.5 * tail,
                "second_order": square / 4,
                "logit_matrix": logits[rank:].square().sum().item() / 4,
                "tail": tail,
            })  # fmt: skip
    return pl.DataFrame(rows).sort("rank", "method")


def _measured(
    w: Tensor, h: Tensor, tokens: Tensor, ranks: list[int], bias: Tensor | None, cut: Factors
) -> Tensor:
    """Means over tokens (ranks x 5) of `_terms`, u being what the columns of A and rows of B from
    r on add to centred logits, taken away."""
    a, b = cut[0] - cut[0].mean(0), cut[1]
    sums = torch.zeros(len(ranks), 5, dtype=torch.float64, device=w.device)
    size, rows = (max(1, held // len(w)) for held in (SCORES, CACHED))
    for part, y in zip(h.split(size), tokens.long().split(size), strict=True):
        scores = part @ w.T if bias is None else torch.addmm(bias.double(), part, w.T)
        log_p = scores.log_softmax(1)
        p, u = log_p.exp(), torch.zeros_like(log_p)
        inner, above = part @ b.T, w.shape[1]
        # Down from full rank, where u = 0: each product is made once, and small gaps stay exact.
        for i in reversed(range(len(ranks))):
            u.addmm_(inner[:, ranks[i] : above], a[:, ranks[i] : above].T, alpha=-1)
            above = ranks[i]
            for few in zip(*(x.split(rows) for x in (log_p, p, u, y)), strict=True):
                sums[i] += _terms(*few).sum(1)
    return sums / len(h)


def _terms(log_p: Tensor, p: Tensor, u: Tensor, y: Tensor) -> Tensor:
    """By token (5 x n): gap, <g, u>, |u|, |u|^2 and the least bound of ln E_p e^v."""
    own, high, low = u.gather(1, y[:, None])[:, 0], u.amax(1), u.amin(1)
    gap = torch.logsumexp(log_p + u, 1) - own
    length = torch.linalg.vector_norm(u, dim=1)
    mean = torch.einsum("nv,nv->n", p, u)
    v = u - mean[:, None]
    variance = torch.einsum("nv,nv->n", p, v.square_())
    excess = _excess(variance, high - mean, high - low)
    return torch.stack([gap, mean - own, length, length**2, excess])


def _excess(variance: Tensor, most: Tensor, span: Tensor) -> Tensor:
    """Least bound of ln E e^v, v of mean 0, from its variance, its maximum and its range."""
    m = most.clamp(min=1e-6)  # below this the ratio is 1/2 + m / 6
    bennett = torch.log1p(variance * (torch.expm1(m) - m) / m**2)
    return torch.minimum(torch.minimum(bennett, most), span**2 / 8)


def looseness(table: pl.DataFrame) -> pl.DataFrame:
    """Bound over gap, by rank and method, of what `bounds` has found; a bound of less than 1 does
    not hold. Null where the gap is not positive, which all bounds hold for."""
    gap = pl.when(pl.col("gap") > 0).then("gap")
    return table.select("rank", "method", *(pl.col(c) / gap for c in (*ALWAYS, *MINIMISER)))


def constants(table: pl.DataFrame) -> pl.DataFrame:
    """Theorem 5.3's constant, gap = c tail, by method: the least that bounds all measured gaps
    (`smallest`), that of least squares, and the one proved; and the power k of gap ~ tail^k
    (least squares of logarithms, over positive gaps), of which the theorem asks 1 or more."""
    cut = table.filter(pl.col("tail") > 0)
    gap, tail = pl.col("gap"), pl.col("tail")
    logs = [pl.when(gap > 0).then(column).log() for column in (gap, tail)]
    return cut.group_by("method", maintain_order=True).agg(
        smallest=(gap / tail).max(),
        least_squares=(gap * tail).sum() / (tail**2).sum(),
        proved=(pl.col("theorem") / tail).first(),
        power=pl.cov(*logs) / logs[1].var(),
    )


def ideal(p: Array) -> Array:
    """W* (V x contexts) of conditionals p (contexts x V): the paper's eq. 1, its ideal states x_i*
    being unit vectors, one for each context. Logits ln p less their mean.

    Raises BadInput unless all of p is positive, as else the least loss is at infinity.
    """
    if p.ndim != 2 or not (p > 0).all() or not np.allclose(p.sum(1), 1, rtol=0, atol=1e-9):
        raise BadInput("conditionals must be a matrix of positive rows, each of sum 1")
    logs = np.log(p)
    return np.asarray((logs - logs.mean(1, keepdims=True)).T)


def first_order(logits: Array, change: Array, token: int) -> tuple[float, float]:
    """d/d eps of the loss of `token` under logits + eps change (V each) at 0: as it is, sum_j p_j
    change_j - change_token, and as Appendix A.1 prints it, sum_j exp(change_j) / sum_j
    exp(logits_j) for the first term. Lemma 5.1 holds with the first and not with the second."""
    p = np.exp(log_softmax(logits))
    printed = np.exp(change).sum() / np.exp(logits).sum()
    return float(p @ change - change[token]), float(printed - change[token])


def optima(p: Array, ranks: list[int], shares: Array | None = None) -> pl.DataFrame:
    """Rank-d heads for conditionals p (contexts x V), by rank: gap of the best that was found, in
    nats per token; of the truncated SVD of W*, rows weighted by the contexts' shares (uniform by
    default); the second-order bound of both; and tail, sqrt(sum_{i>d} sigma_i^2) of the weighted
    W*.

    The paper's eq. 2, by L-BFGS in both factors from the truncated SVD: a local minimum, never
    above it. Raises BadInput as `ideal` does.
    """
    logits = ideal(p).T
    weights = np.full(len(p), 1 / len(p)) if shares is None else shares / shares.sum()
    left, sigma, right = np.linalg.svd(np.sqrt(weights)[:, None] * logits, full_matrices=False)
    left /= np.sqrt(weights)[:, None]
    rows = []
    for rank in sorted(set(ranks)):
        scale = np.sqrt(sigma[:rank])
        x, a = left[:, :rank] * scale, right[:rank].T * scale
        start = np.concatenate([x, a]).ravel()
        best = truncated = _divergence(start, p, weights)[0]
        if rank:
            best = minimize(_divergence, start, (p, weights), "L-BFGS-B", True, options=OPTIONS).fun
        square = float((sigma[rank:] ** 2).sum())
        rows.append({
            "rank": rank, "gap": float(best), "truncated": truncated, "second_order": square / 4,
            "tail": square**0.5,
        })  # fmt: skip
    return pl.DataFrame(rows)


def _divergence(factors: Array, p: Array, weights: Array) -> tuple[float, Array]:
    """sum_i weights_i KL(p_i | softmax(A x_i)), and its gradient; factors: X above A, flat."""
    x, a = np.split(factors.reshape(sum(p.shape), -1), [len(p)])
    log_q = log_softmax(x @ a.T, axis=1)
    loss = weights @ (p * (np.log(p) - log_q)).sum(1)
    gradient = weights[:, None] * (np.exp(log_q) - p)
    return float(loss), np.concatenate([gradient @ a, gradient.T @ x]).ravel()
