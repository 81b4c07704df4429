import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import spectrum


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def with_spectrum(sigma: np.ndarray, rows: int) -> torch.Tensor:
    """rows x len(sigma) with exactly these singular values."""
    left = torch.linalg.qr(random(rows, len(sigma), 1)).Q
    right = torch.linalg.qr(random(len(sigma), len(sigma), 2)).Q
    return left @ torch.diag(torch.from_numpy(sigma)) @ right.T


@pytest.mark.parametrize("shape", [(300, 20), (20, 20), (12, 30)])
def test_singular_values_are_numpys(shape: tuple[int, int]) -> None:
    w = random(*shape)
    ours = spectrum.singular_values(w).numpy()
    np.testing.assert_allclose(ours, np.linalg.svd(w.numpy(), compute_uv=False), rtol=1e-10)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5, 1e7])
def test_the_smallest_value_survives_ill_conditioning(condition: float) -> None:
    sigma = np.geomspace(1, 1 / condition, 12)
    ours = spectrum.singular_values(with_spectrum(sigma, 500)).numpy()
    np.testing.assert_allclose(ours, sigma, rtol=2e-9)


@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize("centred", [False, True])
def test_a_factored_head_has_the_spectrum_of_its_product(rank: int, centred: bool) -> None:
    a, b = random(200, rank, 3), random(rank, 20, 4)
    product = (a @ b).numpy()
    if centred:
        product = product - product.mean(0)
    ours = spectrum.singular_values(a, b, centred=centred).numpy()
    assert len(ours) == 20 and not ours[rank:].any()
    expected = np.linalg.svd(product, compute_uv=False)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_what_cannot_be_squared_is_refused(bad: float) -> None:
    w = random(10, 3)
    w[2, 1] = bad
    with pytest.raises(ValueError, match="NaN, infinity"):
        spectrum.singular_values(w)


def test_singular_entropy_in_closed_form() -> None:
    d = 64
    assert spectrum.singular_entropy(torch.ones(d)) == pytest.approx(0, abs=1e-12)
    one = torch.zeros(d)
    one[0] = 3
    assert spectrum.singular_entropy(one) == pytest.approx(math.log(d))
    half = torch.cat([torch.ones(d // 2), torch.zeros(d // 2)])
    assert spectrum.singular_entropy(half) == pytest.approx(math.log(2))
    # Two values, 3 : 1 in sigma, so 9 : 1 in sigma squared.
    p = np.array([0.9, 0.1])
    expected = math.log(2) + (p * np.log(p)).sum()
    assert spectrum.singular_entropy(torch.tensor([3.0, 1.0])) == pytest.approx(expected)
    p = np.array([0.75, 0.25])
    expected = math.log(2) + (p * np.log(p)).sum()
    assert spectrum.singular_entropy(torch.tensor([3.0, 1.0]), power=1) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_no_entropy_of_a_spectrum_without_a_scale(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="positive finite"):
        spectrum.singular_entropy(torch.tensor(bad))


@settings(deadline=None, max_examples=50)
@given(
    sigma=st.lists(st.floats(1e-150, 1e150), min_size=1, max_size=40),
    scale=st.floats(1e-100, 1e100),
    power=st.sampled_from([1.0, 2.0]),
)
def test_singular_entropy_knows_bounds_and_no_scale(
    sigma: list[float], scale: float, power: float
) -> None:
    values = torch.tensor(sigma, dtype=torch.float64)
    entropy = spectrum.singular_entropy(values, power)
    assert -1e-9 <= entropy <= math.log(len(sigma)) + 1e-9
    assert spectrum.singular_entropy(values * scale, power) == pytest.approx(entropy, abs=1e-9)
    assert spectrum.singular_entropy(values.flip(0), power) == pytest.approx(entropy, abs=1e-9)
