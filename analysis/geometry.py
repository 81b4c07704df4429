"""How hidden states lie in their space."""

from typing import NamedTuple

import torch
from torch import Tensor


class Anisotropy(NamedTuple):
    """Mean cosines, each in [-1, 1]."""

    all_pairs: float
    """Over all pairs of distinct tokens (Godey et al. 2024, section 4.1)."""
    between: float
    """Over pairs of tokens of different blocks, which do not share their context."""
    stderr: float
    """Of `between`: a delete-one-block jackknife."""


def unit_sum(hidden: Tensor) -> tuple[Tensor, int]:
    """Sum (d, float64) of the directions of hidden states (n x d), and how many have one."""
    norms = hidden.double().norm(dim=-1, keepdim=True)
    kept = norms.squeeze(-1) > 0
    return (hidden.double()[kept] / norms[kept]).sum(0), int(kept.sum())


def anisotropy(sums: Tensor, counts: Tensor) -> Anisotropy:
    """Exact mean cosine over all pairs from each block's `unit_sum`, in O(blocks x d).

    sums: blocks x d; counts: blocks. Pairs sum to ||S||^2 - n, of n^2 - n; those between blocks
    to ||S||^2 - sum_b ||S_b||^2, of n^2 - sum_b n_b^2. Raises ValueError below three blocks.
    """
    if len(sums) < 3:
        raise ValueError(f"anisotropy needs at least 3 blocks, got {len(sums)}")
    sums, counts = sums.double(), counts.double()
    total, n = sums.sum(0), counts.sum()
    own = sums.square().sum(1)
    across, pairs = total @ total - own.sum(), n**2 - counts.square().sum()
    # Leaving block b out takes away every pair that has one end in it.
    without = (across - 2 * (sums @ total - own)) / (pairs - 2 * counts * (n - counts))
    spread = (without - without.mean()).square().sum() * (len(sums) - 1) / len(sums)
    return Anisotropy(
        all_pairs=((total @ total - n) / (n**2 - n)).item(),
        between=(across / pairs).item(),
        stderr=torch.sqrt(spread).item(),
    )
