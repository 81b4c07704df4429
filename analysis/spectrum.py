"""Singular values of a head, and the scalars made from them.

Godey et al. 2024 (arXiv 2404.07647), section 4.2: the spectrum of the head W (V x d) flattens and
then collapses while small models saturate.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# The Gram matrix squares the condition number: below this sigma_min / sigma_max its smallest
# singular values are no longer good to 1e-9 (4e-10 at 3e-4, 3e-9 at 1e-4).
GRAM_LIMIT = 5e-4
ROWS = 8192  # that are in float64 at once
SUMMED = 512  # rows in one product: longer sums lose digits, and some libraries sum one by one


class Reduced(NamedTuple):
    """What is left of W (V x d) when its rows are forgotten: any spectral measure can be made from
    it later, and it is V / d times smaller. float64."""

    whole: Tensor
    """R (at most d x d) with R^T R = W^T W."""
    centred: Tensor
    """The same of W less its mean over the vocabulary, which softmax cannot see."""
    mean: Tensor
    """d: that mean."""
    shape: tuple[int, int]
    """V, d."""


def reduce(w: Tensor, right: Tensor | None = None) -> Reduced:
    """Of W (V x d), or of W @ right (V x r, r x d) without forming it.

    By Cholesky of the Gram matrix, of which W is read once; by QR where W is too ill-conditioned
    for that. Raises ValueError where W or `right` holds NaN or infinity.
    """
    w, scale = w.detach(), _scale(w)
    both = _triangle(w, scale)
    mean, centred = both[0, 1:] / both[0, 0], both[1:, 1:]
    whole = torch.linalg.qr(both[:, 1:], mode="r").R
    if right is None:
        right_scale, parts = 1.0, [whole, centred, mean]
    else:
        right_scale = _scale(right)
        right = right.detach().double() / right_scale
        parts = [x @ right for x in (whole, centred, mean)]
    parts = [x * right_scale * scale for x in parts]
    return Reduced(parts[0], parts[1], parts[2], (len(w), len(parts[2])))


def save(reduced: Reduced, file: Path) -> None:
    """As an .npz of plain arrays, whatever the file is called."""
    whole, centred, mean = (part.cpu().numpy() for part in reduced[:3])
    with file.open("wb") as f:
        np.savez(f, whole=whole, centred=centred, mean=mean, shape=reduced.shape)


def load(file: Path) -> Reduced:
    """What `save` has written."""
    with np.load(file, allow_pickle=False) as kept:
        parts = [torch.from_numpy(kept[name]) for name in ("whole", "centred", "mean")]
        rows, columns = map(int, kept["shape"])
    return Reduced(parts[0], parts[1], parts[2], (rows, columns))


def triangle(w: Tensor) -> Tensor:
    """R with R^T R = W^T W: see `Reduced`."""
    return reduce(w).whole


def values(r: Tensor, shape: tuple[int, int]) -> Tensor:
    """Singular values of the V x d matrix that R stands for: descending, min(V, d) of them, exact
    zeros beyond the rank that its factors can reach."""
    sigma = torch.linalg.svdvals(r)[: min(shape)]
    return torch.nn.functional.pad(sigma, (0, min(shape) - len(sigma)))


def singular_values(w: Tensor, right: Tensor | None = None, centred: bool = False) -> Tensor:
    """Singular values of W (V x d), or of W @ right (V x r, r x d) without forming it: float64,
    descending. `centred` takes the mean over the vocabulary away first."""
    found = reduce(w, right)
    return values(found.centred if centred else found.whole, found.shape)


def _scale(w: Tensor) -> float:
    """A power of two near the largest entry: squares of w / scale neither overflow nor vanish."""
    low, high = w.detach().aminmax() if w.numel() else (torch.tensor(math.nan),) * 2
    top = max(abs(low.item()), abs(high.item()))
    if not math.isfinite(top):
        raise ValueError("the matrix is empty, or holds NaN or infinity")
    return math.ldexp(1.0, math.frexp(top)[1] - 1)


def _triangle(w: Tensor, scale: float) -> Tensor:
    """R of [1, w / scale]: its first row tells the mean, and the rest is R of w / scale - mean."""
    width = w.shape[1] + 1
    if len(w) >= width:
        gram = torch.zeros(width, width, dtype=torch.float64, device=w.device)
        for part in w.split(SUMMED):
            wide = _wide(part, scale)
            for i in range(0, width, 128):  # of a symmetric matrix only what is right of these
                gram[i : i + 128, i:] += wide[:, i : i + 128].T @ wide[:, i:]
        gram = gram.triu() + gram.triu(1).T
        own, sums = gram[1:, 1:], gram[0, 1:]
        least = torch.linalg.eigvalsh(own - torch.outer(sums, sums) / len(w))[0]
        if least > GRAM_LIMIT**2 * own.norm():
            return torch.linalg.cholesky(gram, upper=True)
    r = torch.zeros(0, width, dtype=torch.float64, device=w.device)
    for part in w.split(ROWS):
        r = torch.linalg.qr(torch.cat([r, _wide(part, scale)]), mode="r").R
    return r


def _wide(part: Tensor, scale: float) -> Tensor:
    """[1, part / scale]."""
    return torch.nn.functional.pad(part.double() / scale, (1, 0), value=1.0)


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
    p = _shares(sigma, power)
    return math.log(len(sigma)) + torch.special.xlogy(p, p).sum().item()


def effective_rank(sigma: Tensor, power: float = 1.0) -> float:
    """exp of the entropy of p, p proportional to sigma^power: Roy & Vetterli 2007 at power 1."""
    p = _shares(sigma, power)
    return math.exp(-torch.special.xlogy(p, p).sum().item())


def stable_rank(sigma: Tensor) -> float:
    """sum sigma^2 / sigma_0^2: Rudelson & Vershynin 2007."""
    return 1 / _shares(sigma, 2).max().item()


def spectral_rank(sigma: Tensor) -> float:
    """sum sigma / sigma_0: nuclear norm over spectral norm."""
    return 1 / _shares(sigma, 1).max().item()


def participation_ratio(sigma: Tensor) -> float:
    """(sum sigma^2)^2 / sum sigma^4."""
    return 1 / _shares(sigma, 2).square().sum().item()


def condition_number(sigma: Tensor) -> float:
    """Largest over smallest singular value; infinite where one is zero."""
    shares = _shares(sigma, 1)
    return math.inf if shares.min() == 0 else (shares.max() / shares.min()).item()


class Exponent(NamedTuple):
    """Of a power law p(x) ~ x^-alpha for x >= start."""

    alpha: float
    stderr: float
    """(alpha - 1) / sqrt(tail): of independent draws, which eigenvalues are only roughly."""
    start: float
    tail: int
    """How many values, from `start` on."""


def exponent(sigma: Tensor) -> Exponent:
    """Of the tail of the eigenvalues sigma^2, by maximum likelihood, the tail chosen by the least
    Kolmogorov-Smirnov distance: Clauset, Shalizi & Newman 2009 (0706.1062), as WeightWatcher's
    alpha. Raises ValueError where fewer than three distinct positive values are left.
    """
    _shares(sigma, 2)
    top = sigma.max().item()  # without it squares may not be finite
    x = np.sort((sigma.double() / top).cpu().numpy())
    x = x[x > 0]
    logs = 2 * np.log(x)  # of the eigenvalues
    starts = np.unique(logs)[:-1]
    if len(starts) < 2:
        raise ValueError("a power law needs three distinct positive singular values")
    best: tuple[float, Exponent] | None = None
    for start in starts:
        first = int(np.searchsorted(logs, start))
        above = logs[first:] - start
        slope = len(above) / above.sum()
        if (distance := _distance(above, slope)) < (best or (np.inf,))[0]:
            error, least = float(slope / len(above) ** 0.5), float(x[first]) * top
            best = (distance, Exponent(float(1 + slope), error, least * least, len(above)))
    assert best is not None
    return best[1]


def _distance(logs: npt.NDArray[np.float64], slope: float) -> float:
    """Kolmogorov-Smirnov, of ln(x / start) from the exponential distribution of rate `slope`; the
    sample's steps are taken from below, as by the authors' program, powerlaw and WeightWatcher."""
    below = np.arange(len(logs)) / len(logs)
    return float(np.abs(1 - np.exp(-slope * logs) - below).max())


def w_error(sigma: Tensor) -> Tensor:
    """|W - W_r| / |W| in Frobenius norms, W_r the truncated SVD of rank r, for r = 0 .. len(sigma):
    the paper's W-error (section 5.1)."""
    shares = _shares(sigma, 2).sort(descending=True).values
    return torch.nn.functional.pad(shares.flip(0).cumsum(0).flip(0), (0, 1)).sqrt()


def functional(centred: Tensor, covariance: Tensor) -> Tensor:
    """Singular values of W_c S^(1/2), from R of W_c (`Reduced.centred`) and the hidden states'
    covariance S (d x d): the spectrum of logits about their mean, which no W -> W G^-1, h -> G h,
    no constant row and no shift of h can move."""
    lengths, axes = torch.linalg.eigh(covariance.double())
    return torch.linalg.svdvals(centred @ (axes * lengths.clamp(min=0).sqrt()))


class Frequency(NamedTuple):
    """How much of a head tells how frequent a token is."""

    raw: list[float]
    """|correlation| of the left singular vectors of W, largest first, with log frequency."""
    centred: list[float]
    """The same of W less its mean over the vocabulary."""
    share: float
    """Of the energy of the centred W along log frequency, taken as a direction of R^V."""


def frequency(
    reduced: Reduced, w: Tensor, right: Tensor | None, log_frequency: Tensor, top: int = 4
) -> Frequency:
    """Of W (V x d), or W @ right. log_frequency: V, such as log unigram probabilities."""
    target = log_frequency.double() - log_frequency.double().mean()
    target = target / target.norm()
    found = []
    for r in (reduced.whole, reduced.centred):
        axes = torch.linalg.svd(r, full_matrices=False).Vh[:top].T
        axes = axes if right is None else right.double() @ axes
        scores = torch.cat([part.double() @ axes for part in w.split(ROWS)])
        least = 1e-12 * scores.norm(dim=0).max()  # what is less is rounding
        scores = scores - scores.mean(0)
        along, whole = (target @ scores).abs(), scores.norm(dim=0)
        found.append(torch.where(whole > least, along / whole, 0.0).clamp(max=1).tolist())
    direction = sum(
        (y @ part.double() for y, part in zip(target.split(ROWS), w.split(ROWS), strict=True)),
        torch.zeros(w.shape[1], dtype=torch.float64, device=w.device),
    )
    direction = direction if right is None else direction @ right.double()
    energy = reduced.centred.square().sum()
    return Frequency(found[0], found[1], (direction @ direction / energy).item())


def survival(r: Tensor, pulled: Tensor) -> Tensor:
    """Energy (n) that is left of each logit gradient g = p - e_y when it is projected onto the
    column space of W, all that a linear head hands back, from W's triangle and `pulled`, g W
    (n x d): Godey & Artzi 2026 (2603.10145). A share of |g|^2, not of norms, which do not add up.
    """
    _, sigma, vt = torch.linalg.svd(r, full_matrices=False)
    kept = sigma > 1e-12 * sigma[0]
    return (pulled.double() @ (vt[kept].T / sigma[kept])).square().sum(-1)


def _shares(sigma: Tensor, power: float) -> Tensor:
    """sigma^power, of sum one."""
    sigma = sigma.double()
    top = sigma.max() if sigma.numel() else sigma.sum()
    if not torch.isfinite(sigma).all() or top <= 0:
        raise ValueError(f"a spectrum needs finite values and a positive largest, not {top.item()}")
    p = (sigma / top) ** power
    return p / p.sum()


def numerical_rank(m: Tensor, tolerance: float = 1e-10) -> int:
    """How many singular values of m lie above `tolerance` times the largest."""
    sigma = singular_values(m)
    return int((sigma > tolerance * sigma[0]).sum())
