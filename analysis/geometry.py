"""How hidden states lie in their space: what `States` has streamed past, in memory that does not
grow with the number of tokens.

Intervals are delete-group jackknives over groups of evaluation blocks: tokens of one block share
their context, and a bootstrap would count tokens twice and so lower every rank (RankMe 223.8, its
bootstrap 219.8).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

GROUPS = 32  # of blocks, for what needs d numbers a group
MOMENTS = 8  # for what needs d x d: 8 d^2 float64 a layer are all the memory there is


class Estimate(NamedTuple):
    value: float
    stderr: float


class States:
    """Sums over the hidden states of one layer (n x d), on their device, in float64.

    The first position of each block, which attends to nothing but itself, is kept apart: its norm
    can be a thousand times that of the others.
    """

    def __init__(self, d: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.blocks = 0
        self.counts = zeros(3, GROUPS)  # of states with a direction: of all, first, other positions
        self.pairs = zeros(3, GROUPS)  # squared counts of each block
        self.units = zeros(3, GROUPS, d)  # sum of directions
        self.own = zeros(3, GROUPS)  # squared length of that sum in each block
        self.n = zeros(MOMENTS)
        self.sums = zeros(MOMENTS, d)
        self.norms = zeros(MOMENTS)
        self.moments = zeros(MOMENTS, d, d)

    def update(self, hidden: Tensor) -> None:
        """hidden: blocks x sequence x d."""
        wide = hidden.double()
        norms = wide.norm(dim=-1)
        seen = (norms > 0).double()
        units = torch.where(norms > 0, 1 / norms, 0.0).unsqueeze(-1) * wide
        group = torch.arange(self.blocks, self.blocks + len(wide), device=wide.device) % GROUPS
        for i, part in enumerate((slice(None), slice(1), slice(1, None))):
            count, total = seen[:, part].sum(1), units[:, part].sum(1)
            self.counts[i].index_add_(0, group, count)
            self.pairs[i].index_add_(0, group, count**2)
            self.units[i].index_add_(0, group, total)
            self.own[i].index_add_(0, group, total.square().sum(1))
        for start in range(min(MOMENTS, len(wide))):
            moment = (self.blocks + start) % MOMENTS
            rest = wide[start::MOMENTS, 1:].flatten(0, 1)
            self.n[moment] += len(rest)
            self.sums[moment] += rest.sum(0)
            self.norms[moment] += norms[start::MOMENTS, 1:].sum()
            self.moments[moment].addmm_(rest.T, rest)
        self.blocks += len(wide)


def anisotropy(states: States) -> dict[str, Estimate]:
    """Mean cosines, each in [-1, 1], exact over all pairs in O(n d).

    anisotropy: all pairs of distinct tokens (Godey et al. 2024, section 4.1). anisotropy_between:
    pairs of tokens of different blocks, which do not share their context, first positions left
    out. anisotropy_first: pairs of first positions. Raises ValueError below three blocks.

    Directions S sum to |S|^2 - n over the n^2 - n pairs, and to |S|^2 - sum_b |S_b|^2 over the
    n^2 - sum_b n_b^2 between blocks b.
    """
    if states.blocks < 3:
        raise ValueError(f"anisotropy needs at least 3 blocks, got {states.blocks}")
    kept = min(states.blocks, GROUPS)

    def cosine(i: int, between: bool) -> Estimate:
        def of(group: int | None) -> float:
            own, counts = states.own[i], states.counts[i]
            total, n, within = states.units[i].sum(0), counts.sum(), own.sum()
            pairs = states.pairs[i].sum()
            if group is not None:
                total, n = total - states.units[i, group], n - counts[group]
                within, pairs = within - own[group], pairs - states.pairs[i, group]
            left, among = (within, pairs) if between else (n, n)
            return ((total @ total - left) / (n**2 - among)).item()

        return _jackknife(of, kept)

    return {
        "anisotropy": cosine(0, between=False),
        "anisotropy_between": cosine(2, between=True),
        "anisotropy_first": cosine(1, between=True),
    }


def dimensions(states: States) -> dict[str, Estimate]:
    """How many dimensions the states use, and how: first positions left out.

    rankme, isoscore_star, participation_ratio, alpha_req: see the functions of these names; norm:
    mean length; mean_share: |E h|^2 / E |h|^2, the share of energy in the mean direction. Raises
    ValueError below three blocks.
    """
    if states.blocks < 3:
        raise ValueError(f"an interval needs at least 3 blocks, got {states.blocks}")
    kept, found = min(states.blocks, MOMENTS), {}

    def of(group: int | None) -> dict[str, float]:
        parts = [states.n, states.sums, states.norms, states.moments]
        n, total, norms, moment = (
            p.sum(0) if group is None else p.sum(0) - p[group] for p in parts
        )
        mean, energy = total / n, moment.diagonal().sum() / n
        variances = torch.linalg.eigvalsh(moment / n - torch.outer(mean, mean))
        variances = variances.clamp(min=0).flip(0)
        sigma = torch.linalg.eigvalsh(moment).clamp(min=0).sqrt()
        alpha = alpha_req(variances) if len(variances) >= 8 else math.nan
        return {
            "rankme": rankme(sigma),
            "isoscore_star": isoscore_star(variances),
            "participation_ratio": participation_ratio(variances),
            "alpha_req": alpha,
            "norm": (norms / n).item(),
            "mean_share": (mean @ mean / energy).item(),
        }

    whole, without = of(None), [of(group) for group in range(kept)]
    for name, value in whole.items():
        found[name] = Estimate(value, _spread([w[name] for w in without]))
    return found


def covariance(states: States) -> Tensor:
    """Of the states (d x d), first positions left out."""
    n, mean = states.n.sum(), states.sums.sum(0) / states.n.sum()
    return states.moments.sum(0) / n - torch.outer(mean, mean)


def rankme(sigma: Tensor, epsilon: float = 1e-7) -> float:
    """exp of the entropy of p = sigma / sum(sigma) + epsilon, from the singular values of the
    uncentred n x d states: Garrido et al. 2023 (2210.02885), equation 2."""
    p = sigma.double() / sigma.double().sum() + epsilon
    return math.exp(-torch.special.xlogy(p, p).sum().item())


def participation_ratio(variances: Tensor) -> float:
    """(sum l)^2 / sum l^2 of the covariance's eigenvalues: 1 to d."""
    v = variances.double()
    return (v.sum().square() / v.square().sum()).item()


def isoscore_star(variances: Tensor) -> float:
    """(participation ratio - 1) / (d - 1): 0 on a line, 1 in all directions alike. IsoScore of
    Rudman et al. 2022 (2108.07344) in closed form, and IsoScore* of Rudman & Eickhoff 2024
    (2305.19358) at z = 0: with many more tokens than d nothing is shrunk towards a C_0."""
    return (participation_ratio(variances) - 1) / (len(variances) - 1)


def alpha_req(variances: Tensor) -> float:
    """a of l_i ~ i^-a, a least-squares line through ln l_i over ln i with weights 1 / i: Agrawal et
    al. 2022 (2209.15615, after Stringer et al. 2019). variances: d, descending.

    Over i = 11 .. min(500, d / 2), and from 1 + d / 8 where that is less than 11.
    """
    d = len(variances)
    first, last = min(11, 1 + d // 8), min(500, d // 2)
    i = torch.arange(first, last + 1, dtype=torch.float64)
    y = variances[first - 1 : last].double().cpu().log()
    weight = (1 / i) / (1 / i).sum()
    x = i.log() - weight @ i.log()
    return -((weight * x) @ y / ((weight * x) @ x)).item()


def cka(x: Tensor, y: Tensor) -> Estimate:
    """Linear CKA of two sets of states of the same tokens (blocks x sequence x d, and x d'): 0
    unrelated, 1 alike up to rotation and scale. Kornblith et al. 2019 (1905.00414), with the
    unbiased estimator of HSIC (Song et al. 2012), for the plain one nears 1 where d nears the
    number of tokens. Raises ValueError below three blocks.
    """
    if len(x) < 3:
        raise ValueError(f"an interval needs at least 3 blocks, got {len(x)}")
    x, y = (s.double() - s.double().mean((0, 1)) for s in (x, y))
    pairs = [[_grouped(s) for s in pair] for pair in ((x, y), (x, x), (y, y))]
    crosses = [torch.stack([g.T @ h for g, h in zip(*pair, strict=True)]) for pair in pairs]

    def of(group: int | None) -> float:
        kept = [g for g in range(len(crosses[0])) if g != group]
        values = []
        for pair, cross in zip(pairs, crosses, strict=True):
            a, b = (torch.cat([some[g] for g in kept]) for some in pair)
            values.append(_hsic(a, b, cross[kept].sum(0)))
        return values[0] / math.sqrt(values[1] * values[2])

    return _jackknife(of, len(crosses[0]))


def _grouped(states: Tensor) -> list[Tensor]:
    """Groups of whole blocks, each tokens x d."""
    parts = states.tensor_split(min(MOMENTS, len(states)))
    return [part.flatten(0, 1) for part in parts]


def _hsic(a: Tensor, b: Tensor, cross: Tensor) -> float:
    """Song et al. 2012, equation 5, for linear kernels of n x d states: no n x n matrix."""
    n = len(a)
    own_a, own_b = a.square().sum(1), b.square().sum(1)
    rows_a, rows_b = a @ a.sum(0) - own_a, b @ b.sum(0) - own_b  # sums of the kernels' rows
    trace = cross.square().sum() - own_a @ own_b
    middle = rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2))
    return ((trace + middle - 2 / (n - 2) * (rows_a @ rows_b)) / (n * (n - 3))).item()


def _jackknife(of: Callable[[int | None], float], groups: int) -> Estimate:
    return Estimate(of(None), _spread([of(group) for group in range(groups)]))


def _spread(without: list[float]) -> float:
    """Standard error from the values without one group each."""
    values, k = torch.tensor(without, dtype=torch.float64), len(without)
    return math.sqrt((values - values.mean()).square().sum().item() * (k - 1) / k)
