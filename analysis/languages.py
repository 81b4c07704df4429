"""Languages whose rank is known, to tell how far an estimate of it is from the truth.

Next-token distributions P (C contexts x V): of rank r as probabilities, or of rank r as logits, and
samples of them as counts. Estimates of W-error (Godey et al. 2024, section 5.2) are then held
against that of P itself.
"""

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from analysis.errors import BadInput
from analysis.ngrams import Counts
from analysis.werror import Spectrum

KINDS, MIX, LOGIT = 0.6, 0.3, 1.5  # Dirichlet of kinds and of mixtures; deviation of a logit

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def mixture(contexts: int, vocabulary: int, rank: int, seed: int = 0) -> Array:
    """P (C x V) of rank `rank`: each context mixes as many distributions. As logits, of full rank.

    Raises BadInput where the rank is not in 1..min(C, V)."""
    rng = _checked(contexts, vocabulary, rank, seed)
    kinds = rng.dirichlet(np.full(vocabulary, KINDS), rank)
    mixed = rng.dirichlet(np.full(rank, MIX), contexts) @ kinds
    return mixed / mixed.sum(1, keepdims=True)


def softmaxes(contexts: int, vocabulary: int, rank: int, seed: int = 0) -> Array:
    """P (C x V) of logits A B + 1 b^T, A B of rank `rank` and b as wide. As probabilities, of full
    rank. Raises BadInput where the rank is not in 1..min(C, V)."""
    rng = _checked(contexts, vocabulary, rank, seed)
    A, B = rng.standard_normal((contexts, rank)), rng.standard_normal((rank, vocabulary))
    logits = A @ B / np.sqrt(rank) + rng.standard_normal(vocabulary)
    return softmax(LOGIT * logits, axis=1)


def zipf(contexts: int, tokens: int, seed: int = 0) -> Ints:
    """(C) how often each context occurs in a text of `tokens`: the i-th with chance ~ 1/i."""
    share = 1 / np.arange(1, contexts + 1)
    return np.random.default_rng(seed).multinomial(tokens, share / share.sum())


def sample(P: Array, occurrences: Ints, seed: int = 0) -> Counts:
    """Counts, as of bigrams, of what followed contexts that occur so often (C), drawn from P
    (C x V); a context's key is its row in P. Raises BadInput where none occurs."""
    k = np.random.default_rng(seed).multinomial(occurrences, P)
    keys = np.flatnonzero(occurrences)
    if not len(keys):
        raise BadInput("occurrences: all are 0; a context has to occur")
    rows, tokens = np.nonzero(k[keys])
    starts = np.searchsorted(rows, np.arange(len(keys) + 1))
    counts = k[keys][rows, tokens]
    return Counts(2, P.shape[1], keys.astype(np.uint64), starts, tokens.astype(np.int32), counts)


def spectrum(P: Array, weights: npt.ArrayLike | None = None) -> Spectrum:
    """What `werror.spectrum` would find if each row were known: of P (C x V), all rows alike, or
    weighted (C) by how often each context occurs."""
    W = P if weights is None else P * np.sqrt(weights)[:, None]
    values = np.zeros(V := P.shape[1])
    values[: len(P)] = np.linalg.svd(W, compute_uv=False) ** 2
    return Spectrum(values, np.empty((2, 0)), float(values.sum()), 0.0, True, len(P), V)


def _checked(contexts: int, vocabulary: int, rank: int, seed: int) -> np.random.Generator:
    if not 1 <= rank <= min(contexts, vocabulary):
        raise BadInput(
            f"rank: {rank}; {contexts} contexts and {vocabulary} tokens have one of 1 to "
            f"{min(contexts, vocabulary)}"
        )
    return np.random.default_rng(seed)
