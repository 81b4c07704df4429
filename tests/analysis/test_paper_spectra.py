"""Which power of the singular values the paper's singular entropy takes: its Figure 4 and its
Figure 5, read off apart, agree for one."""

import numpy as np
import pytest
import torch

from analysis import trajectories
from analysis.spectrum import singular_entropy

STEPS = [21_000, 40_000, 60_000, 80_000, 100_000, 143_000]


def entropies(power: float) -> np.ndarray:
    """Of pythia-14m (d = 128) at STEPS, from its spectra."""
    read = trajectories.readings("spectra").filter(model="pythia-14m")
    steps, ratios = trajectories.filled(read, range(1, 128))
    chosen = ratios[np.searchsorted(steps, STEPS)]
    spectra = torch.tensor(np.insert(chosen, 0, 1.0, axis=1))
    assert spectra.shape == (len(STEPS), 128)
    return np.array([singular_entropy(sigma, power) for sigma in spectra])


@pytest.fixture(scope="module")
def shown() -> np.ndarray:
    """The same in Figure 5."""
    read = trajectories.readings("entropy").filter(model="pythia-14m").sort("step")
    found = read.filter(read["step"].is_in(STEPS))
    assert found["step"].to_list() == STEPS
    return found["entropy"].to_numpy()


def test_the_paper_takes_squared_singular_values(shown: np.ndarray) -> None:
    assert entropies(2.0) == pytest.approx(shown, rel=0.08)


def test_the_paper_does_not_take_plain_singular_values(shown: np.ndarray) -> None:
    assert (entropies(1.0) < shown / 2).all()


def test_every_model_saturates_in_both_figures_or_in_neither() -> None:
    spectra, entropy = trajectories.readings("spectra"), trajectories.readings("entropy")
    for (model,), read in spectra.group_by("model", maintain_order=True):
        tail = read.filter(index=100).sort("step")["ratio"]
        kl = entropy.filter(model=model).sort("step")["entropy"]
        assert (tail[-1] < tail.max() / 4) == (kl[-1] > 4 * kl.min()), model
