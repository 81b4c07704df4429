"""The head zoo: what turns a hidden state (d) into log-probabilities over the vocabulary (V).

A head called with hidden states alone gives logits: numbers whose softmax is its distribution.
Called with labels too it gives the mean loss in nats per token, in fp32 or better, without ever
holding all the logits.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainables import zoo
from trainables.zoo import KNOTS

CHUNK = 512  # tokens whose logits exist at once
CACHED = 2**18  # logits that a core's cache holds
LINEAR = 0.2  # the argument up to which tanh is taken for linear: 1.3 % off
REACH = 16.0  # of the monotone function: its pieces lie between -REACH and REACH


class LinearHead(nn.Module):
    """Logits W h: full, or of rank r as W = A B. The parent of the zoo."""

    weight: Tensor
    A: Tensor | None
    B: Tensor | None
    refresh: int | None = None

    def __init__(self, vocabulary: int, d: int, rank: int | None) -> None:
        """W (V x d), or A (V x r) and B (r x d), drawn from the global generator.

        For hidden states of unit variance (what the final norm leaves) logits start with variance
        one. The paper draws A and B from N(0, 1): logits of scale sqrt(r d), a softmax that is
        one-hot before it has seen a word, and a start far above ln V.

        How A and B share that scale decides how fast a head learns: Adam moves every entry by the
        learning rate, so logits move by lr d under a full head but by lr r |B h| under A. With
        |B h| of order d / r both move alike; of order one, rank 4 at d = 64 ended 0.66 nats worse
        at the same learning rate (docs/LOG.md), which would pass for a bottleneck.
        """
        super().__init__()
        if rank is None:
            self.weight = _normal(vocabulary, d, d**-0.5)
            self.A = self.B = None
        else:
            self.A = _normal(vocabulary, rank, rank**-0.5 * rank / d)
            self.B = _normal(rank, d, d**-0.5 * d / rank)

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """(W, None) or (A, B): the matrix that faces the vocabulary."""
        return (self.weight, None) if self.A is None else (self.A, self.B)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (... x d) -> logits (... x V)."""
        out, down = self.factors()
        return F.linear(hidden if down is None else F.linear(hidden, down), out)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of n tokens (hidden n x d, labels n)."""
        out, down = self.factors()
        return F.linear_cross_entropy(
            _wide(hidden if down is None else F.linear(hidden, down)),
            _wide(out),
            labels,
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK),
        )

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden (... x d) -> logits (... x V); with labels (...), the mean loss."""
        if labels is None:
            return self.logits(hidden)
        return self.loss(hidden.flatten(0, -2), labels.flatten())

    def renew(self) -> None:
        """Called by the training loop every `refresh` steps, with the head's parameters whole."""


class _Chunked(LinearHead):
    """A head whose logits are not linear: each chunk's are made again in the backward pass."""

    def nll(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Summed loss of one chunk."""
        return F.cross_entropy(_wide(self.logits(hidden)), labels, reduction="sum")

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        total = hidden.new_zeros((), dtype=_wide(hidden[:0]).dtype)
        for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            total = total + checkpoint(self.nll, h, y, use_reentrant=False)
        return total / len(labels)


class Fixed(_Chunked):
    """A head as it is given: W, or A B, and a bias. Never trained."""

    out: Tensor
    down: Tensor | None
    bias: Tensor | None

    def __init__(self, out: Tensor, down: Tensor | None, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        for name, value in (("out", out), ("down", down), ("bias", bias)):
            self.register_buffer(name, value)

    def factors(self) -> tuple[Tensor, Tensor | None]:
        return self.out, self.down

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        return logits if self.bias is None else logits + self.bias


class Sigsoftmax(_Chunked):
    """p proportional to exp(z) sigmoid(z), z = W h: Kanai et al. 2018 (1805.10829)."""

    def logits(self, hidden: Tensor) -> Tensor:
        z = _wide(super().logits(hidden))
        return z + F.logsigmoid(z)


class Monotone(_Chunked):
    """Softmax of f(z), z = W h, with one learnable increasing f: Ganea et al. 2019 (1902.08077).

    f is piecewise linear with KNOTS pieces of positive slope between -REACH and REACH and goes on
    with its outer slopes beyond; it starts as the identity.
    """

    def __init__(self, vocabulary: int, d: int, rank: int | None) -> None:
        super().__init__(vocabulary, d, rank)
        self.slopes = nn.Parameter(torch.full((KNOTS,), math.log(math.e - 1)))  # softplus: 1

    def logits(self, hidden: Tensor) -> Tensor:
        z = _wide(super().logits(hidden))
        slopes, width = F.softplus(_wide(self.slopes)), 2 * REACH / KNOTS
        at = ((z.detach() + REACH) / width).floor().clamp(0, KNOTS - 1).long()
        below = F.pad(slopes.cumsum(0)[:-1], (1, 0)) * width - REACH
        return below[at] + slopes[at] * (z + REACH - at * width)


class Mlp(_Chunked):
    """Logits A B gelu(C h): a small network before an output of rank r - 1, with at most the
    parameters of a linear head of rank r.

    C is m x d, m as large as the rank given up pays for: floor((V + r d) / (d + r - 1)). A network
    of r units alone (A gelu(B h)) died in training: every unit turned negative for every token.
    """

    def __init__(self, vocabulary: int, d: int, rank: int) -> None:
        width = zoo.mlp_width(vocabulary, d, rank)
        super().__init__(vocabulary, width, rank - 1)
        self.C = _normal(width, d, d**-0.5)

    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(F.gelu(F.linear(hidden, self.C)))


class MixtureOfSoftmaxes(_Chunked):
    """p = sum_k pi_k softmax(A c tanh(B_k h)), pi = softmax(P h): Yang et al. 2018 (1711.03953).

    K experts share A (V x r, or V x d where no rank is given); B_k is r x d, P is K x d. c = d / r
    changes nothing that the head can express, only how fast it learns: see LinearHead.
    """

    def __init__(self, vocabulary: int, d: int, rank: int | None, experts: int) -> None:
        r = rank or d
        super().__init__(vocabulary, r, None)
        self.scale = d / r
        self.weight = _normal(vocabulary, r, r**-0.5 / self.scale)
        self.experts = _normal(experts * r, d, d**-0.5)
        self.prior = _normal(experts, d, d**-0.5)

    def _parts(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (... x K x V) and log-weight (... x K) of each expert."""
        states = self.scale * torch.tanh(F.linear(hidden, self.experts))
        each = F.linear(states.unflatten(-1, (len(self.prior), -1)), self.weight)
        return _wide(each), _wide(F.linear(hidden, self.prior)).log_softmax(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Log-probabilities: a mixture has no logits of its own."""
        each, weight = self._parts(hidden)
        return torch.logsumexp(each.log_softmax(-1) + weight.unsqueeze(-1), dim=-2)

    def nll(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of the right tokens alone: no mixture over the whole vocabulary."""
        each, weight = self._parts(hidden)
        right = each.gather(-1, labels[:, None, None].expand(*each.shape[:2], 1)).squeeze(-1)
        return -torch.logsumexp(weight + right - each.logsumexp(-1), dim=-1).sum()


class LowRankBackward(LinearHead):
    """A full head whose gradient reaches the backbone through r directions only.

    Forward pass and gradient of W are exact; the gradient of the hidden states is multiplied by
    Q Q^T (Q: d x r, orthonormal), not rescaled. Q holds the top right singular vectors of W, found
    anew every `refresh` steps, or, as its control, a random subspace drawn once. It tells gradient
    flow from expressivity: Godey & Artzi 2026 (2603.10145) and its critics.
    """

    basis: Tensor

    def __init__(self, vocabulary: int, d: int, backward: int, refresh: int | None) -> None:
        super().__init__(vocabulary, d, None)
        self.refresh = refresh
        basis, _ = torch.linalg.qr(torch.randn(d, backward))
        self.register_buffer("basis", basis)

    def renew(self) -> None:
        w = self.weight.detach().double()
        self.basis.copy_(torch.linalg.eigh(w.T @ w).eigenvectors[:, -self.basis.shape[1] :])

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return super().loss(_Through.apply(hidden, self.basis), labels)


class _Through(torch.autograd.Function):
    """The identity, whose gradient passes through a subspace."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, basis: Tensor) -> Tensor:
        ctx.save_for_backward(basis)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (basis,) = ctx.saved_tensors
        return gradient @ basis @ basis.T, None


PLAIN = {  # made of V, d and a rank
    "linear": LinearHead,
    "sigsoftmax": Sigsoftmax,
    "monotone": Monotone,
}


def make(head: dict[str, Any], vocabulary: int, d: int) -> LinearHead:
    """The head of a trial's `head` section, drawn from the global generator."""
    kind, rank = head["kind"], head["rank"]
    if kind == "mos":
        return MixtureOfSoftmaxes(vocabulary, d, rank, head["experts"])
    if kind == "backward":
        refresh = head["refresh"] if head["directions"] == "own" else None
        return LowRankBackward(vocabulary, d, head["backward"], refresh)
    if kind == "mlp":
        return Mlp(vocabulary, d, rank)
    return PLAIN[kind](vocabulary, d, rank)


def start(
    head: LinearHead, init: str, own: Tensor | None = None, svd: tuple[Tensor, Tensor] | None = None
) -> None:
    """Give a new head another start than its own, which is `scaled`.

    normal: N(0, 1), as in the paper (logits of scale sqrt(r d)). svd: `own` (V x d) for a full
    head, else the best rank-r head, the first r columns and rows of the factors `svd`
    (`spectrum.truncation`), which share their scale as LinearHead's do; of a mixture every expert
    starts there, where tanh is nearly linear, a tenth apart from the others.
    """
    with torch.no_grad():
        if init == "normal":
            for matrix in head.factors():
                if matrix is not None:
                    matrix.normal_()
        elif init == "svd":
            assert own is not None and svd is not None
            r = head.factors()[0].shape[1]
            if isinstance(head, MixtureOfSoftmaxes):
                spread = 1 + 0.1 * torch.randn_like(head.experts)
                down = svd[1][:r].to(spread).repeat(len(head.prior), 1)
                head.experts.copy_(LINEAR * down * spread)
                head.weight.copy_(svd[0][:, :r] / (LINEAR * head.scale))
            elif head.A is None or head.B is None:
                head.weight.copy_(own)
            else:
                d = head.B.shape[1]
                head.A.copy_(svd[0][:, :r] * r / d)
                head.B.copy_(svd[1][:r] * d / r)


def _normal(rows: int, columns: int, deviation: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * deviation)


def _wide(x: Tensor) -> Tensor:
    """In fp32, or float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


class TokenStats(NamedTuple):
    """For each token."""

    loss: Tensor
    """Nats, fp32."""
    correct: Tensor
    """Whether the likeliest token is the right one."""
    entropy: Tensor
    """Of the predicted distribution, nats, fp32."""


@torch.no_grad()
def token_stats(head: nn.Module, hidden: Tensor, labels: Tensor) -> TokenStats:
    """Of each of n tokens (hidden n x d, labels n), a few at a time.

    Goes through the head's own call: with ZeRO-3 its parameters exist nowhere else.
    """
    size, found, at = CHUNK, [], 0
    while at < len(labels):
        h, y = hidden[at : at + size], labels[at : at + size]
        z, at = _wide(head(h)), at + len(h)
        if z.device.type == "cpu":  # logits that stay in a core's cache: twice as fast
            size = max(64, CACHED // z.shape[-1])
        z = z - z.amax(-1, keepdim=True)
        right, exps = z.gather(-1, y[:, None]).squeeze(-1), z.exp()
        whole = exps.sum(-1)
        logs, correct = whole.log(), right == 0
        # Ties, as under a head of zeros, go to the first; argmax is slow, and few need it.
        correct[correct.clone()] = z[correct].argmax(-1) == y[correct]
        found.append((logs - right, correct, logs - torch.linalg.vecdot(exps, z) / whole))
    return TokenStats(*(torch.cat(parts) for parts in zip(*found, strict=True)))
