import numpy as np
import pytest
import torch

from analysis import geometry


def blocks(seed: int = 0) -> list[torch.Tensor]:
    """Five blocks of unequal length, in a space that leans one way."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (7, 3, 9, 1, 5)
    return [torch.randn(n, 6, generator=generator) + torch.arange(6.0) / 4 for n in lengths]


def measure(parts: list[torch.Tensor]) -> geometry.Anisotropy:
    sums, counts = zip(*(geometry.unit_sum(p) for p in parts), strict=True)
    return geometry.anisotropy(torch.stack(sums), torch.tensor(counts))


def cosines(parts: list[torch.Tensor]) -> tuple[float, float]:
    """Mean cosine over all pairs, and over pairs of different blocks, pair by pair."""
    states = torch.cat(parts).double().numpy()
    owner = np.repeat(range(len(parts)), [len(p) for p in parts])
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    table = unit @ unit.T
    apart = owner[:, None] != owner[None, :]
    return table[~np.eye(len(table), dtype=bool)].mean(), table[apart].mean()


def test_anisotropy_is_the_mean_over_pairs() -> None:
    found, (all_pairs, between) = measure(blocks()), cosines(blocks())
    assert found.all_pairs == pytest.approx(all_pairs, abs=1e-12)
    assert found.between == pytest.approx(between, abs=1e-12)


def test_the_standard_error_is_a_jackknife_over_blocks() -> None:
    parts = blocks()
    without = np.array([cosines(parts[:i] + parts[i + 1 :])[1] for i in range(len(parts))])
    n = len(parts)
    expected = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    assert measure(parts).stderr == pytest.approx(expected, rel=1e-9)


def test_states_without_a_direction_are_left_out() -> None:
    parts = blocks()
    padded = [torch.cat([p, torch.zeros(2, 6)]) for p in parts]
    assert measure(padded) == pytest.approx(measure(parts))


def test_one_direction_is_one_and_opposites_cancel() -> None:
    same = [torch.ones(4, 6) * (i + 1) for i in range(3)]
    assert measure(same).all_pairs == pytest.approx(1)
    opposite = [torch.ones(2, 6), -torch.ones(2, 6), torch.ones(2, 6), -torch.ones(2, 6)]
    assert measure(opposite).between == pytest.approx(-1 / 3)


def test_two_blocks_have_no_interval() -> None:
    with pytest.raises(ValueError, match="3 blocks"):
        measure(blocks()[:2])
