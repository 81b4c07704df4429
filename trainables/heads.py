"""The head zoo: what turns a hidden state (d) into log-probabilities over the vocabulary (V).

A head called with hidden states alone gives logits; called with labels too, the mean loss in nats
per token, without ever holding all the logits.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 512  # tokens whose logits exist at once


class LinearHead(nn.Module):
    """A head whose logits are W h: full, or of rank r as W = A B."""

    A: nn.Parameter | None
    B: nn.Parameter | None

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

        def normal(rows: int, columns: int, deviation: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns) * deviation)

        if rank is None:
            self.weight = normal(vocabulary, d, d**-0.5)
            self.A = self.B = None
        else:
            self.A = normal(vocabulary, rank, rank**-0.5 * rank / d)
            self.B = normal(rank, d, d**-0.5 * d / rank)

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """(W, None) or (A, B)."""
        return (self.weight, None) if self.A is None else (self.A, self.B)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden (... x d) -> logits (... x V); with labels (...), the mean loss, in fp32."""
        out, down = self.factors()
        if down is not None:
            hidden = F.linear(hidden, down)
        if labels is None:
            return F.linear(hidden, out)
        return F.linear_cross_entropy(
            hidden.flatten(0, -2).float(),
            out.float(),
            labels.flatten(),
            options=nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK),
        )


class TokenStats(NamedTuple):
    """For each token."""

    loss: Tensor
    """Nats, fp32."""
    correct: Tensor
    """Whether the likeliest token is the right one."""


@torch.no_grad()
def token_stats(head: nn.Module, hidden: Tensor, labels: Tensor) -> TokenStats:
    """Loss and accuracy of each of n tokens (hidden n x d, labels n), CHUNK tokens at a time.

    Goes through the head's own call: with ZeRO-3 its parameters exist nowhere else.
    """
    losses, correct = [], []
    for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        logits = head(h).float()
        losses.append(F.cross_entropy(logits, y, reduction="none"))
        correct.append(logits.argmax(-1) == y)
    return TokenStats(torch.cat(losses), torch.cat(correct))
