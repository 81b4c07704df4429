"""Forms of scaling laws. A law is a sum of terms, each a constant that is not negative times a
known function of the variables and of exponents; one is added in ten lines.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

from analysis.errors import BadInput

Array = npt.NDArray[np.float64]
Values = Mapping[str, Array]


@dataclass(frozen=True)
class Law:
    """L = sum_k c_k g_k(variables; exponents), in nats per token, c_k >= 0."""

    name: str
    formula: str
    source: str
    variables: tuple[str, ...]
    """N parameters, D tokens, d hidden size, r head rank, V vocabulary, ..."""
    constants: tuple[str, ...]
    """The c_k, in the order of the terms."""
    exponents: Mapping[str, tuple[float, float]]
    """By name, each with the range that is searched."""
    terms: Callable[[Values, Values], tuple[Array, ...]]
    """The g_k from the variables and exponents by name, broadcast against each other."""
    endpoints: bool = True
    """Whether it describes ends of annealed runs, not the points along one."""


ONE: Array = np.ones(())  # the term of E

CHINCHILLA = Law(
    "chinchilla",
    "L = E + A/N^a + B/D^b",
    "Hoffmann et al. 2022 (2203.15556), equation 10; Godey et al. 2024, section 3",
    ("N", "D"),
    ("E", "A", "B"),
    {"a": (0.02, 1.5), "b": (0.02, 1.5)},
    lambda x, e: (ONE, x["N"] ** -e["a"], x["D"] ** -e["b"]),
)
POWER = Law(
    "power",
    "L = E + A/N^a",
    "Kaplan et al. 2020 (2001.08361), with an offset",
    ("N",),
    ("E", "A"),
    {"a": (0.02, 2.0)},
    lambda x, e: (ONE, x["N"] ** -e["a"]),
)
GADRE = Law(
    "gadre",
    "L = E + A/N^c + B/D^c",
    "Gadre et al. 2024 (2403.08540), equation 4: theirs with tied exponents",
    ("N", "D"),
    ("E", "A", "B"),
    {"c": (0.02, 1.5)},
    lambda x, e: (ONE, x["N"] ** -e["c"], x["D"] ** -e["c"]),
)


def _rank_power(x: Values, e: Values) -> Array:
    return x["r"] ** -e["c"] - x["d"] ** -e["c"]


# Rank terms vanish at full rank, so that E, or E + A/N^a + B/D^b, is the loss of a head of rank d
# whatever ranks were tried: with a bare C/r^c the limit would move with the form.
RANK = Law(
    "rank",
    "L = E + C (1/r^c - 1/d^c)",
    "ours; ranks of Godey et al. 2024, section 5.1. One backbone; E is its loss at full rank",
    ("r", "d"),
    ("E", "C"),
    {"c": (0.05, 4.0)},
    lambda x, e: (ONE, _rank_power(x, e)),
)
RANK_SHIFTED = Law(
    "rank-shifted",
    "L = E + C (1/(r+s)^c - 1/(d+s)^c)",
    "ours: the rank law with a bend at r = s, so that the loss at rank 0 is finite",
    ("r", "d"),
    ("E", "C"),
    {"c": (0.05, 6.0), "s": (0.05, 500.0)},
    lambda x, e: (ONE, (x["r"] + e["s"]) ** -e["c"] - (x["d"] + e["s"]) ** -e["c"]),
)
RANK_HARMONIC = Law(
    "rank-harmonic",
    "L = E + C ((1/r + 1/d)^c - (2/d)^c)",
    "ours: of the rank laws with one exponent the best at ranks left out of Figure 6",
    ("r", "d"),
    ("E", "C"),
    {"c": (0.05, 4.0)},
    lambda x, e: (
        ONE,
        (1 / x["r"] + 1 / x["d"]) ** e["c"] - (1 / x["d"] + 1 / x["d"]) ** e["c"],
    ),
)
# C is one for all sizes and tokens: the two Pythias of Figure 6 agree on it within 5 %, at one
# budget of tokens; whether it moves with D they cannot say. That d grows with N along a ladder does
# no harm: the term is 0 in full heads, which alone decide A, B, a and b.
CHINCHILLA_RANK = Law(
    "chinchilla-rank",
    "L = E + A/N^a + B/D^b + C (1/r^c - 1/d^c)",
    "ours: chinchilla with the rank law",
    ("N", "D", "r", "d"),
    ("E", "A", "B", "C"),
    {"a": (0.02, 1.5), "b": (0.02, 1.5), "c": (0.05, 4.0)},
    lambda x, e: (ONE, x["N"] ** -e["a"], x["D"] ** -e["b"], _rank_power(x, e)),
)
VOCABULARY = Law(
    "vocabulary",
    "L = E + A/N^a + B/D^b + F/(V d)^v",
    # Losses in nats per token do not compare across tokenizers, and unigram-normalised ones, for
    # which the source states the form, are negative, which a fit on log loss cannot take.
    "Tao et al. 2024 (2407.13623), approach 3, for losses in nats or bits per byte in place of "
    "unigram-normalised ones; N without vocabulary parameters, D in bytes",
    ("N", "D", "V", "d"),
    ("E", "A", "B", "F"),
    {"a": (0.02, 1.5), "b": (0.02, 1.5), "v": (0.02, 1.5)},
    lambda x, e: (ONE, x["N"] ** -e["a"], x["D"] ** -e["b"], (x["V"] * x["d"]) ** -e["v"]),
)
ANNEALING = Law(
    "annealing",
    "L = E + A/S1^a - C S2",
    "Tissue et al. 2024 (2408.11029), equation 1, along runs of one model; S1, S2 of `areas`",
    ("S1", "S2"),
    ("E", "A", "C"),
    {"a": (0.02, 2.0)},
    lambda x, e: (ONE, x["S1"] ** -e["a"], -x["S2"]),
    endpoints=False,
)
REPETITION = Law(
    "repetition",
    "L = E + A/N^a + B/D'^b, D' = U + U R (1 - exp(-(D/U - 1)/R))",
    "Muennighoff et al. 2023 (2305.16264), section 3, without their discount on parameters; "
    "U unique tokens, R the repetitions after which more are worth little (they find 15.4)",
    ("N", "D", "U"),
    ("E", "A", "B"),
    {"a": (0.02, 1.5), "b": (0.02, 1.5), "R": (0.5, 200.0)},
    lambda x, e: (ONE, x["N"] ** -e["a"], effective_tokens(x["D"], x["U"], e["R"]) ** -e["b"]),
)


def effective_tokens(D: Array, U: Array, R: Array) -> Array:
    """What D tokens, of which U are unique, are worth in unique tokens: D in a first epoch, and
    U (1 + R) at most. Muennighoff et al. 2023, section 3."""
    unique = np.minimum(U, D)
    return unique - unique * R * np.expm1(-(D / unique - 1) / R)


def areas(rates: Array, decay: float = 0.999) -> tuple[Array, Array]:
    """S1 and S2 after every step, from the learning rates of all steps of a run from its first.

    S1 is the sum of the rates so far; S2 the sum so far of m_i = decay m_(i-1) + rate_(i-1) -
    rate_i. Steps of the warm-up count at the peak rate: its rise would otherwise be an annealing
    below zero, a debt of peak/(1 - decay) for the whole run. Tissue et al. 2024, equation 1.
    """
    rates = np.asarray(rates, dtype=np.float64)
    if rates.ndim != 1 or not rates.size or not np.all(np.isfinite(rates)) or rates.min() < 0:
        raise BadInput("learning rates must be a series of finite numbers >= 0, one for each step")
    if not 0 <= decay < 1:
        raise BadInput(f"decay is {decay}; it must be at least 0 and under 1")
    peak = int(rates.argmax())
    held = np.concatenate([np.full(peak, rates[peak]), rates[peak:]])
    momentum = lfilter([1.0], [1.0, -decay], -np.diff(held, prepend=held[0]))
    return np.cumsum(held), np.cumsum(momentum)


LAWS = {
    law.name: law
    for law in (
        CHINCHILLA,
        POWER,
        GADRE,
        RANK,
        RANK_SHIFTED,
        RANK_HARMONIC,
        CHINCHILLA_RANK,
        VOCABULARY,
        ANNEALING,
        REPETITION,
    )
}
