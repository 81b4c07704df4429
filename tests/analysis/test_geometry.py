import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from IsoScore.IsoScore import IsoScore_star
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from analysis import geometry
from analysis.geometry import GROUPS, MOMENTS, Estimate
from tests.conftest import normal, orthogonal

Array = npt.NDArray[np.float64]
SEEDS = st.integers(0, 2**32)


pytestmark = pytest.mark.usefixtures("one_thread")


def leaning(blocks: int, sequence: int = 7, d: int = 6, seed: int = 0) -> Tensor:
    """States that lean one way, those of a block also another, and the first ones far."""
    hidden = normal(blocks, sequence, d, seed=seed) + torch.arange(d) / 4
    hidden += normal(blocks, 1, d, seed=seed + 1)
    hidden[:, 0] *= 100
    return hidden


def seen(*batches: Tensor) -> geometry.States:
    states = geometry.States(batches[0].shape[-1], batches[0].device)
    for batch in batches:
        states.update(batch)
    return states


def measured(hidden: Tensor) -> dict[str, Estimate]:
    states = seen(hidden)
    return geometry.anisotropy(states) | geometry.dimensions(states)


def jackknife(
    of: Callable[[Tensor], dict[str, float]], hidden: Tensor, groups: int
) -> dict[str, float]:
    """Standard errors from the same measures without the blocks of one group each."""
    owner, kept = torch.arange(len(hidden)) % groups, min(groups, len(hidden))
    without = [of(hidden[owner != group]) for group in range(kept)]
    return {
        name: math.sqrt((kept - 1) * np.var([found[name] for found in without]))
        for name in without[0]
    }


# What is streamed


@pytest.mark.parametrize("sizes", [[1] * 37, [5, 32], [9, 1, 8, 19]])
def test_batches_of_any_size_add_up(sizes: list[int]) -> None:
    hidden = leaning(37)
    one, other = seen(hidden), seen(*hidden.split(sizes))
    assert one.blocks == other.blocks == 37
    for name, value in vars(one).items():
        if name != "blocks":
            np.testing.assert_allclose(vars(other)[name], value, rtol=1e-12, atol=1e-12)


def test_memory_does_not_grow_with_blocks() -> None:
    def size(states: geometry.States) -> int:
        tensors = [value for value in vars(states).values() if isinstance(value, Tensor)]
        assert len(tensors) + 1 == len(vars(states))
        return sum(t.untyped_storage().nbytes() for t in tensors)

    d = 16
    few, many = seen(leaning(3, d=d)), seen(*leaning(300, d=d).split(64))
    assert size(few) == size(many)
    assert size(many) <= 8 * (MOMENTS * (d * d + d + 2) + 3 * GROUPS * (d + 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_read_as_they_are(dtype: torch.dtype) -> None:
    hidden = leaning(9, d=8).to(dtype)
    assert measured(hidden) == measured(hidden.double())


@pytest.mark.parametrize("measure", [geometry.anisotropy, geometry.dimensions])
def test_two_blocks_have_no_interval(measure: Callable[[geometry.States], object]) -> None:
    with pytest.raises(ValueError, match="3 blocks"):
        measure(seen(leaning(2)))
    measure(seen(leaning(3)))


# Anisotropy


def cosines(hidden: Tensor) -> dict[str, float]:
    """Mean cosines pair by pair."""
    states = hidden.double().flatten(0, 1).numpy()
    block, position = np.divmod(np.arange(len(states)), hidden.shape[1])
    kept = np.linalg.norm(states, axis=1) > 0
    states, block, position = states[kept], block[kept], position[kept]
    table = 1 - squareform(pdist(states, "cosine"))
    same = block[:, None] == block[None, :]
    first = position == 0
    return {
        "anisotropy": table[~np.eye(len(table), dtype=bool)].mean(),
        "anisotropy_between": table[~same & ~first[:, None] & ~first[None, :]].mean(),
        "anisotropy_first": table[~same & first[:, None] & first[None, :]].mean(),
    }


@pytest.mark.parametrize("blocks", [4, 10, 40])
@pytest.mark.parametrize("empty", [False, True])
def test_anisotropy_is_the_mean_over_pairs(blocks: int, empty: bool) -> None:
    hidden = leaning(blocks)
    if empty:  # states without a direction
        hidden[0, :2] = hidden[1, 3] = 0
    found, expected = geometry.anisotropy(seen(hidden)), cosines(hidden)
    errors = jackknife(cosines, hidden, GROUPS)
    assert found.keys() == expected.keys()
    for name, (value, stderr) in found.items():
        assert value == pytest.approx(expected[name], abs=1e-12), name
        assert stderr == pytest.approx(errors[name], rel=1e-9), name


def test_tokens_of_a_block_do_not_count_as_different_text() -> None:
    offsets = normal(40, 1, 50)
    found = geometry.anisotropy(seen(offsets.expand(40, 30, 50)))
    assert found["anisotropy"].value > 0.02
    assert abs(found["anisotropy_between"].value) < 0.01


def test_one_direction_is_one_and_opposites_cancel() -> None:
    lengths = torch.arange(1.0, 13).view(3, 4, 1)
    for value, _ in geometry.anisotropy(seen(lengths * torch.ones(6))).values():
        assert value == pytest.approx(1, abs=1e-12)
    signs = torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1)
    for found in list(geometry.anisotropy(seen(signs * torch.ones(4, 5, 6))).values())[1:]:
        assert found.value == pytest.approx(-1 / 3, abs=1e-12)
    basis = torch.eye(12).view(4, 3, 12)
    assert all(v == 0 for v, _ in geometry.anisotropy(seen(basis)).values())


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, scale=st.floats(1e-6, 1e6), lean=st.floats(0, 10))
def test_cosines_know_neither_axes_nor_lengths(seed: int, scale: float, lean: float) -> None:
    hidden = normal(5, 4, 6, seed=seed) + lean
    lengths = scale * normal(5, 4, 1, seed=seed + 1).exp()
    one = geometry.anisotropy(seen(hidden))
    other = geometry.anisotropy(seen(lengths * hidden @ orthogonal(6, seed)))
    for name, (value, stderr) in one.items():
        assert -1 <= value <= 1 + 1e-12
        assert other[name] == pytest.approx((value, stderr), abs=1e-12)


# Dimensions


def explicit(hidden: Tensor) -> dict[str, float]:
    """From the matrix of all states but the first ones."""
    states = hidden[:, 1:].double().flatten(0, 1).numpy()
    sigma = np.linalg.svd(states, compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    variances = np.linalg.svd(states - states.mean(0), compute_uv=False) ** 2 / len(states)
    ratio = variances.sum() ** 2 / (variances**2).sum()
    d = len(variances)
    i = np.arange(min(11, 1 + d // 8), min(500, d // 2) + 1)
    slope = np.polyfit(np.log(i), np.log(variances[i - 1]), 1, w=1 / np.sqrt(i))[0]
    return {
        "rankme": np.exp(-(p * np.log(p)).sum()),
        "participation_ratio": ratio,
        "isoscore_star": (ratio - 1) / (d - 1),
        "alpha_req": -slope,
        "norm": np.linalg.norm(states, axis=1).mean(),
        "mean_share": (states.mean(0) ** 2).sum() / (states**2).sum(1).mean(),
    }


@pytest.mark.parametrize(("blocks", "d"), [(3, 8), (19, 8), (12, 24)])
def test_dimensions_are_those_of_the_explicit_matrix(blocks: int, d: int) -> None:
    hidden = leaning(blocks, 40, d) * torch.linspace(1, 5, d)
    found, expected = geometry.dimensions(seen(hidden)), explicit(hidden)
    errors = jackknife(explicit, hidden, MOMENTS)
    assert found.keys() == expected.keys()
    for name, (value, stderr) in found.items():
        assert value == pytest.approx(expected[name], rel=1e-10), name
        assert stderr == pytest.approx(errors[name], rel=1e-6), name


def test_a_mean_far_off_does_not_hide_the_covariance() -> None:
    hidden = leaning(9, d=8) + 1e4
    found, expected = measured(hidden), explicit(hidden)
    for name in ("participation_ratio", "isoscore_star", "alpha_req"):
        assert found[name].value == pytest.approx(expected[name], rel=1e-6), name


def test_the_first_position_is_kept_apart() -> None:
    hidden = leaning(9, d=8)
    far = hidden.clone()
    far[:, 0] *= -1e3
    assert geometry.dimensions(seen(far)) == geometry.dimensions(seen(hidden))
    one, other = (geometry.anisotropy(seen(h)) for h in (hidden, far))
    assert one["anisotropy_between"] == other["anisotropy_between"]
    assert one["anisotropy_first"] == pytest.approx(other["anisotropy_first"], abs=1e-12)


def test_states_in_few_dimensions_are_counted_so() -> None:
    hidden = normal(10, 50, 3) @ normal(3, 20, seed=1)
    found, expected = geometry.dimensions(seen(hidden)), explicit(hidden)
    assert 2 < found["rankme"].value < 3.01
    assert found["rankme"].value == pytest.approx(expected["rankme"], rel=1e-5)
    assert found["participation_ratio"].value <= 3


@pytest.mark.parametrize("d", [4, 7])
def test_too_few_dimensions_have_no_exponent(d: int) -> None:
    assert math.isnan(measured(leaning(9, d=d))["alpha_req"].value)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, scale=st.floats(1e-6, 1e6))
def test_dimensions_know_neither_axes_nor_scale_and_keep_their_bounds(
    seed: int, scale: float
) -> None:
    hidden, d = leaning(5, 9, 8, seed=seed), 8
    one = geometry.dimensions(seen(hidden))
    other = geometry.dimensions(seen(scale * hidden @ orthogonal(d, seed)))
    for name, (value, stderr) in one.items():
        by = scale if name == "norm" else 1
        assert other[name] == pytest.approx((by * value, by * stderr), rel=1e-6), name
    assert 1 <= one["rankme"].value <= d + 1e-4  # its epsilon adds as much
    assert 1 <= one["participation_ratio"].value <= d
    assert 0 <= one["isoscore_star"].value <= 1
    assert 0 <= one["mean_share"].value <= 1


def test_covariance_is_numpys() -> None:
    hidden = leaning(9)
    expected = np.cov(hidden[:, 1:].flatten(0, 1).T, bias=True)
    np.testing.assert_allclose(geometry.covariance(seen(hidden)), expected, rtol=1e-10)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_ranks_of_k_equal_directions_in_closed_form(k: int) -> None:
    flat = torch.cat([torch.full((k,), 5.0), torch.zeros(8 - k)])
    assert geometry.participation_ratio(flat) == pytest.approx(k, rel=1e-12)
    assert geometry.isoscore_star(flat) == pytest.approx((k - 1) / 7, abs=1e-12)
    assert geometry.rankme(flat) == pytest.approx(k, rel=2e-5)
    assert geometry.rankme(flat, epsilon=0) == pytest.approx(k, rel=1e-12)


def test_participation_of_two_variances() -> None:
    assert geometry.participation_ratio(torch.tensor([3.0, 1.0])) == pytest.approx(1.6, rel=1e-12)


@pytest.mark.parametrize("d", [3, 20])
def test_isoscore_is_its_authors(d: int) -> None:
    points = normal(200, d) * torch.linspace(1, 4, d) + 1
    theirs = IsoScore_star(points.tolist(), torch.zeros(d, d), 0.0).item()  # in float32
    variances = torch.linalg.eigvalsh(torch.cov(points.T))
    assert geometry.isoscore_star(variances) == pytest.approx(theirs, abs=2e-5)


@pytest.mark.parametrize("a", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("d", [8, 80, 1200])
def test_alpha_req_of_a_power_law_is_its_exponent(a: float, d: int) -> None:
    variances = 3 * torch.arange(1, d + 1, dtype=torch.float64) ** -a
    assert geometry.alpha_req(variances) == pytest.approx(a, rel=1e-12)


@pytest.mark.parametrize(
    ("d", "first", "last"), [(8, 2, 4), (40, 6, 20), (80, 11, 40), (1200, 11, 500)]
)
def test_alpha_req_is_a_weighted_line_over_its_range(d: int, first: int, last: int) -> None:
    variances = normal(d).exp().sort(descending=True).values
    i = np.arange(first, last + 1)
    y = np.log(variances.numpy()[first - 1 : last])
    expected = -np.polyfit(np.log(i), y, 1, w=i**-0.5)[0]
    assert geometry.alpha_req(variances) == pytest.approx(expected, rel=1e-9)


# Intervals


def test_standard_errors_are_the_spread_over_data_sets() -> None:
    def simulated(seed: int, blocks: int = 24, d: int = 12) -> dict[str, Estimate]:
        """Tokens of a block share an offset."""
        hidden = normal(blocks, 9, d, seed=seed) + 0.7 * normal(blocks, 1, d, seed=seed + 10_000)
        return measured((hidden + torch.arange(d) / 3) * torch.linspace(1, 5, d))

    found = [simulated(seed) for seed in range(200)]
    for name in found[0]:
        values, errors = np.array([f[name] for f in found]).T
        ratio = np.sqrt((errors**2).mean()) / values.std()
        assert 0.9 < ratio < (1.4 if name == "alpha_req" else 1.25), name


def test_a_bootstrap_would_lower_the_rank() -> None:
    def rankme(states: Tensor) -> float:
        return geometry.rankme(torch.linalg.svdvals(states))

    fresh = np.array([measured(normal(10, 11, 40, seed=s))["rankme"].value for s in range(50)])
    states = normal(10, 11, 40)[:, 1:].flatten(0, 1)
    draws = np.random.default_rng(0).integers(0, len(states), (50, len(states)))
    again = np.array([rankme(states[draw]) for draw in draws])
    assert fresh[0] == pytest.approx(rankme(states), rel=1e-9)
    assert abs(fresh[0] - fresh.mean()) < 3 * fresh.std()
    assert again.mean() < fresh.mean() - 5 * fresh.std()


# CKA


def hsic(x: Array, y: Array) -> float:
    """Song et al. 2012, equation 5, with its n x n matrices."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    middle = k.sum() * m.sum() / ((n - 1) * (n - 2))
    return float((np.trace(k @ m) + middle - 2 / (n - 2) * (k @ m).sum()) / (n * (n - 3)))


def explicit_cka(x: Tensor, y: Tensor) -> float:
    a, b = (s.double().flatten(0, 1).numpy() for s in (x, y))
    return hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b))


def related(blocks: int, d: int = 6, other: int = 9) -> tuple[Tensor, Tensor]:
    x = leaning(blocks, d=d)[:, 1:]
    return x, x @ normal(d, other, seed=5) + 3 * normal(blocks, 6, other, seed=6)


@pytest.mark.parametrize("blocks", [3, 8, 15, 16])
def test_cka_is_that_of_the_explicit_kernels(blocks: int) -> None:
    x, y = related(blocks)
    value, stderr = geometry.cka(x, y)
    assert 0.1 < value < 0.9
    assert value == pytest.approx(explicit_cka(x, y), rel=1e-10)
    groups = np.array_split(np.zeros(blocks), min(blocks, MOMENTS))
    kept = torch.repeat_interleave(torch.tensor([len(group) for group in groups]))
    without = [explicit_cka(x[kept != g], y[kept != g]) for g in range(min(blocks, MOMENTS))]
    k = len(without)
    assert stderr == pytest.approx(math.sqrt((k - 1) * np.var(without)), rel=1e-8)


def test_cka_is_symmetric() -> None:
    x, y = related(8)
    assert geometry.cka(x, y) == pytest.approx(geometry.cka(y, x), rel=1e-12)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, scale=st.floats(1e-6, 1e6))
def test_states_alike_up_to_rotation_scale_and_shift_have_a_cka_of_one(
    seed: int, scale: float
) -> None:
    x = leaning(5, seed=seed)
    y = scale * (x @ orthogonal(6, seed) + normal(6, seed=seed + 1))
    assert geometry.cka(x, y) == pytest.approx((1, 0), abs=1e-9)


def test_unrelated_states_have_no_cka_in_any_number_of_dimensions() -> None:
    x, y = normal(8, 32, 200), normal(8, 32, 200, seed=1)
    a, b = (s.flatten(0, 1) - s.mean((0, 1)) for s in (x, y))
    plain = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    value, stderr = geometry.cka(x, y)
    assert plain > 0.4 and abs(value) < 0.01 and stderr < 0.02


def test_cka_of_two_blocks_has_no_interval() -> None:
    with pytest.raises(ValueError, match="3 blocks"):
        geometry.cka(*related(2))
