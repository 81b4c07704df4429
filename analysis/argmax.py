"""Which tokens a softmax head can never predict.

Grivas, Bogoychev and Lopez 2022 (arXiv 2203.06462): where the hidden size is small, rows of the
head may lie in the convex hull of the others, and no hidden state gives such a token the largest
logit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls
from torch import Tensor

from analysis.spectrum import triangle

Array = npt.NDArray[Any]

TOLERANCE = 1e-7  # squares are compared: float64 holds no more
RANK = 1e-10  # of the largest singular value: what lies below it is rounding
RIVALS = 32  # found in a round
SCORES = 2**24  # held at a time


def unargmaxable(
    weight: Tensor,
    bias: Tensor | None = None,
    candidates: Tensor | None = None,
    progress: Callable[[str, int], None] = lambda what, n: None,
) -> list[int]:
    """Ids, ascending, of the tokens i such that no hidden state h has w_i h + b_i > w_j h + b_j
    for all j != i: softmax with the head W (V x d) and the bias b (V) never predicts them.

    Only `candidates` (V, bool, or ids) are asked about, all tokens unless given. Equal tokens tie
    everywhere, so neither wins. To give a head of two factors, W = A B with B of full row rank,
    give A: the product's rounding adds directions. `progress` is told what is being done and how
    many tokens are undecided. Raises ValueError where the head holds NaN or infinity.

    Exact, in float64, where a token wins by more than TOLERANCE: that is the sine of the angle by
    which the best h clears w_i - w_j, all j, in the basis in which the head has equal variance in
    all directions. Tokens closer there than TOLERANCE times the largest distance from the mean
    count as equal.
    """
    points, upward = _whitened(weight, bias)
    vocabulary, rank = points.shape
    undecided = torch.zeros(vocabulary, dtype=torch.bool)
    undecided[slice(None) if candidates is None else candidates] = vocabulary > 1  # alone, it wins
    never = torch.zeros(vocabulary, dtype=torch.bool)
    rivals: dict[int, Array] = {}
    rounding = 4 * rank * torch.finfo(torch.float64).eps
    while undecided.any():
        for ids in undecided.nonzero()[:, 0].split(max(1, SCORES // vocabulary)):
            progress("looking for states that predict tokens", int(undecided.sum()))
            ids = ids[undecided[ids]]
            states = _states(points, ids, rivals, upward)
            norms = states.norm(dim=1)
            # Even its rivals alone surround it.
            never[ids[norms <= TOLERANCE]] = True
            undecided[ids[norms <= TOLERANCE]] = False
            scores, tokens = (states @ points.T).topk(min(RIVALS, vocabulary))
            undecided[tokens[scores[:, 0] - scores[:, 1] > rounding * norms, 0]] = False
            for i, found in zip(ids.tolist(), tokens.numpy(), strict=True):
                known = rivals.get(i, found[:0])
                rivals[i] = np.union1d(known, found[found != i])
                # It beats all it knows, and nobody else comes close.
                undecided[i] &= len(rivals[i]) > len(known)
    return never.nonzero()[:, 0].tolist()


def _whitened(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, bool]:
    """Points (V x r) around 0, the farthest at distance 1, whose products with a state in R^r are
    logits up to a constant; True where the state's last coordinate must not be negative."""
    w = weight.detach().double()
    w = w - w.mean(0)  # softmax cannot see it
    _, sigma, vt = torch.linalg.svd(triangle(w), full_matrices=False)
    kept = sigma > RANK * sigma[0]
    points, upward = w @ (vt[kept].T / sigma[kept]), False
    if bias is not None:
        b = bias.detach().double()
        if not torch.isfinite(b).all():
            raise ValueError("the bias holds NaN or infinity")
        b = b - b.mean()
        # What W can say of the bias moves h by a constant. The rest is a column of its own, whose
        # coordinate is 1, or, as any multiple of a state predicts the same, positive; if 0 wins
        # strictly, so does a little more than 0.
        rest = b - points @ (points.T @ b)
        if upward := bool(rest.norm() > RANK * b.norm()):
            points = torch.cat([points, rest[:, None] / rest.norm()], 1)
    return points / points.norm(dim=1).max().clamp(min=torch.finfo(torch.float64).tiny), upward


def _states(points: Tensor, ids: Tensor, rivals: dict[int, Array], upward: bool) -> Tensor:
    """For each token the state (ids x r) that clears its rivals by the largest angle, of length
    s / (1 + s^2) for the sine s; 0 where none does.

    Least distance programming (Lawson & Hanson 1974, chapter 23): a nonnegative least squares
    problem finds the point nearest to 0 in the hull of the unit vectors from rival to token.
    """
    x, rank = points.numpy(), points.shape[1]
    states = np.zeros((len(ids), rank))
    goal = np.eye(rank + 1)[-1]
    for n, i in enumerate(ids.tolist()):
        # The mean is a mixture of all tokens: who beats the others beats it.
        edges = np.vstack([x[i], x[i] - x[rivals.get(i, np.empty(0, int))]])
        lengths = np.linalg.norm(edges, axis=1, keepdims=True)
        rows = np.insert(edges / np.where(lengths > TOLERANCE, lengths, np.inf), rank, 1, axis=1)
        if upward:
            rows = np.vstack([rows, np.eye(rank + 1)[-2]])
        # Crowded hulls take more steps than the default of three a row.
        mixture, _ = nnls(rows.T, goal, maxiter=100 * len(rows))
        states[n] = (mixture @ rows)[:-1]
    if upward:
        states[:, -1] = states[:, -1].clip(min=0)
    return torch.from_numpy(states)
