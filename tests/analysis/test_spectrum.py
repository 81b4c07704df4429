import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import powerlaw
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from analysis import geometry, spectrum
from tests.conftest import normal, orthogonal

Array = npt.NDArray[np.float64]

MEASURES: dict[str, Callable[[Tensor], object]] = {
    "singular_entropy": spectrum.singular_entropy,
    "effective_rank": spectrum.effective_rank,
    "stable_rank": spectrum.stable_rank,
    "spectral_rank": spectrum.spectral_rank,
    "participation_ratio": spectrum.participation_ratio,
    "condition_number": spectrum.condition_number,
    "exponent": spectrum.exponent,
    "w_error": spectrum.w_error,
}
SEEDS = st.integers(0, 2**32)
SIGMAS = st.lists(st.floats(1e-150, 1e150), min_size=1, max_size=40)


pytestmark = pytest.mark.usefixtures("one_thread")


def svd(w: Tensor) -> Array:
    return np.asarray(scipy.linalg.svdvals(w.double().numpy()))


def error(found: Tensor, expected: Array) -> float:
    """The largest relative error."""
    return float(np.abs(found.numpy() / expected - 1).max())


def with_spectrum(sigma: Array, rows: int) -> Tensor:
    """rows x len(sigma), rows a power of two, with these singular values and columns of mean zero:
    no factorisation is asked but for a rotation."""
    left = scipy.linalg.hadamard(rows)[:, 1 : len(sigma) + 1] / math.sqrt(rows)
    return torch.from_numpy(left * sigma) @ orthogonal(len(sigma))


# Singular values


@pytest.mark.parametrize("shape", [(300, 20), (21, 20), (20, 20), (12, 30), (1, 5), (5, 1)])
@pytest.mark.parametrize("centred", [False, True])
def test_singular_values_are_lapacks(shape: tuple[int, int], centred: bool) -> None:
    w = normal(*shape) + 1
    expected = svd(w - w.mean(0) if centred else w)
    found = spectrum.singular_values(w, centred=centred)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-14 * svd(w)[0])


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("condition", "allowed"), [(1e1, 1e-13), (1e3, 5e-10), (1e4, 1e-11), (1e5, 1e-10), (1e7, 1e-9)]
)
def test_the_smallest_value_survives_ill_conditioning(
    condition: float, allowed: float, centred: bool
) -> None:
    sigma = np.geomspace(1, 1 / condition, 32)
    w = with_spectrum(sigma, 1024) + (normal(32, seed=1) / 300 if centred else 0)
    assert error(spectrum.singular_values(w, centred=centred), sigma) < allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1e2, 1.5e3, 3e3, 1e4])  # both sides of the limit
def test_a_large_vocabulary_loses_no_digits(condition: float, dtype: torch.dtype) -> None:
    scales = torch.logspace(0, -math.log10(condition), 24, dtype=torch.float64)
    w = (normal(50_304, 24) @ (scales[:, None] * orthogonal(24, seed=1))).to(dtype)
    assert error(spectrum.singular_values(w), svd(w)) < 2e-10


@pytest.mark.parametrize("rank", [1, 5, 19])
def test_what_a_deficient_matrix_lacks_is_rounding(rank: int) -> None:
    w = normal(200, rank, seed=3) @ normal(rank, 20, seed=4)
    found = spectrum.singular_values(w)
    assert error(found[:rank], svd(w)[:rank]) < 1e-12
    assert (found[rank:] < 1e-14 * found[0]).all()
    assert spectrum.numerical_rank(w) == rank


@pytest.mark.parametrize("rank", [1, 5, 20, 30])
@pytest.mark.parametrize("rows", [200, 12])
@pytest.mark.parametrize("centred", [False, True])
def test_a_factored_head_has_the_spectrum_of_its_product(
    rank: int, rows: int, centred: bool
) -> None:
    a, b = normal(rows, rank, seed=3), normal(rank, 20, seed=4)
    product = a @ b
    if centred:
        product = product - product.mean(0)
    found = spectrum.singular_values(a, b, centred=centred)
    assert len(found) == min(rows, 20) and not found[rank:].any()
    expected = svd(product)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-13 * expected[0])


def test_factors_of_any_scale_make_the_same_product() -> None:
    a, b = normal(200, 5), normal(5, 20, seed=1)
    expected = spectrum.singular_values(a, b)[:5].numpy()
    assert error(spectrum.singular_values(a * 1e300, b * 1e-300)[:5], expected) < 1e-12
    assert error(spectrum.singular_values(a * 1e-300, b * 1e300)[:5], expected) < 1e-12


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-20, 1e20, 1e160, 1e300])
@pytest.mark.parametrize("condition", [1e1, 1e5])
def test_no_scale_overflows_or_vanishes(scale: float, condition: float) -> None:
    sigma = np.geomspace(1, 1 / condition, 8)
    found = spectrum.singular_values(with_spectrum(sigma, 64) * scale)
    assert error(found, sigma * scale) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denormal_entries_count(dtype: torch.dtype) -> None:
    whole = (1000 * normal(60, 6)).round()
    least = 2.0 ** (-149 if dtype == torch.float32 else -1074)
    w = (whole * least).to(dtype)
    assert (w.abs() < torch.finfo(dtype).tiny).all() and w.double().equal(whole * least)
    found, expected = spectrum.singular_values(w).numpy(), svd(whole) * least
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=8 * 2.0**-1074)


def test_a_zero_matrix_has_zero_singular_values() -> None:
    assert not spectrum.singular_values(torch.zeros(10, 3)).any()
    assert spectrum.numerical_rank(torch.zeros(10, 3)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(dtype: torch.dtype) -> None:
    w = normal(300, 20).to(dtype)
    assert error(spectrum.singular_values(w), svd(w)) < 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    good, w = normal(10, 3), normal(10, 3)
    w[2, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        spectrum.reduce(w)
    with pytest.raises(ValueError, match="NaN or infinity"):
        spectrum.reduce(good, w[:3])


def test_an_empty_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        spectrum.reduce(torch.zeros(0, 3))


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 60), d=st.integers(1, 12), seed=SEEDS)
def test_rotations_of_tokens_and_of_dimensions_change_nothing(rows: int, d: int, seed: int) -> None:
    w = normal(rows, d, seed=seed)
    turned = orthogonal(rows, seed) @ w @ orthogonal(d, seed + 1)
    one, other = spectrum.singular_values(w), spectrum.singular_values(turned)
    np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_the_centred_spectrum_sees_no_constant_row(size: float) -> None:
    w = normal(300, 20)
    shifted = w + size * normal(20, seed=1)
    one = spectrum.singular_values(w, centred=True)
    assert error(spectrum.singular_values(shifted, centred=True), one.numpy()) < 1e-10
    assert error(spectrum.singular_values(shifted), spectrum.singular_values(w).numpy()) > 0.01


# What is kept of a head


@pytest.mark.parametrize("rows", [3, 100, 3 * spectrum.ROWS // 2])
@pytest.mark.parametrize("condition", [1.0, 1e6])  # by Cholesky, by QR
@pytest.mark.parametrize("factored", [False, True])
def test_what_is_reduced_has_the_same_gram_matrices(
    rows: int, condition: float, factored: bool
) -> None:
    w = normal(rows, 6) * torch.logspace(0, -math.log10(condition), 6, dtype=torch.float64) + 0.1
    right = normal(6, 9, seed=2) if factored else None
    product = w @ right if right is not None else w
    found = spectrum.reduce(w, right)
    assert found.shape == product.shape
    scale = product.square().sum().item()
    for r, whole in ((found.whole, product), (found.centred, product - product.mean(0))):
        assert len(r) <= 6 and r.shape[1] == product.shape[1]
        np.testing.assert_allclose(r.T @ r, whole.T @ whole, rtol=0, atol=1e-14 * scale)
    np.testing.assert_allclose(found.mean, product.mean(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("right", [None, normal(6, 9, seed=2)])
def test_what_is_saved_gives_the_same_measures(tmp_path: Path, right: Tensor | None) -> None:
    before = spectrum.reduce(normal(100, 6), right)
    spectrum.save(before, tmp_path / "partial")
    after = spectrum.load(tmp_path / "partial")
    assert after.shape == before.shape and isinstance(after.shape, tuple)
    assert all(a.equal(b) for a, b in zip(after[:3], before[:3], strict=True))
    one, other = (spectrum.values(r.whole, r.shape) for r in (before, after))
    for measure in MEASURES.values():
        kept = [measure(sigma[:6]) for sigma in (one, other)]
        assert torch.equal(*map(torch.as_tensor, kept))


# Scalars

FLAT = torch.full((64,), 0.3)
ONE = torch.zeros(64).index_fill(0, torch.tensor(5), 7.0)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_entropy_and_ranks_of_flat_and_of_rank_one(power: float) -> None:
    w = orthogonal(64)[:, :16] * 5
    flat = spectrum.singular_values(w)
    for sigma, rank in ((flat, 16), (FLAT, 64), (ONE, 1), (FLAT[:1], 1)):
        kl = math.log(len(sigma)) - math.log(rank)
        assert spectrum.singular_entropy(sigma, power) == pytest.approx(kl, abs=1e-12)
        assert spectrum.effective_rank(sigma, power) == pytest.approx(rank, rel=1e-12)
        assert spectrum.stable_rank(sigma) == pytest.approx(rank, rel=1e-12)
        assert spectrum.spectral_rank(sigma) == pytest.approx(rank, rel=1e-12)
        assert spectrum.participation_ratio(sigma) == pytest.approx(rank, rel=1e-12)
    assert spectrum.condition_number(flat) == pytest.approx(1, rel=1e-12)
    assert spectrum.condition_number(ONE) == math.inf


def test_scalars_of_two_values() -> None:
    sigma = torch.tensor([3.0, 1.0])
    for power, p in ((1.0, 3 / 4), (2.0, 9 / 10)):
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        kl = math.log(2) - entropy
        assert spectrum.singular_entropy(sigma, power) == pytest.approx(kl, rel=1e-12)
        assert spectrum.effective_rank(sigma, power) == pytest.approx(math.exp(entropy), rel=1e-12)
    assert spectrum.stable_rank(sigma) == pytest.approx(10 / 9, rel=1e-12)
    assert spectrum.spectral_rank(sigma) == pytest.approx(4 / 3, rel=1e-12)
    assert spectrum.participation_ratio(sigma) == pytest.approx(100 / 82, rel=1e-12)
    assert spectrum.condition_number(sigma) == pytest.approx(3, rel=1e-12)


def test_powers_are_the_papers_and_roy_and_vetterlis() -> None:
    sigma = normal(10).abs()
    assert spectrum.singular_entropy(sigma) == spectrum.singular_entropy(sigma, 2.0)
    assert spectrum.effective_rank(sigma) == spectrum.effective_rank(sigma, 1.0)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("bad", [[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], []])
def test_nothing_is_made_of_a_spectrum_without_a_scale(measure: str, bad: list[float]) -> None:
    with pytest.raises(ValueError, match="finite values and a positive largest"):
        MEASURES[measure](torch.tensor(bad))


@settings(deadline=None, max_examples=100)
@given(sigma=SIGMAS, scale=st.floats(1e-100, 1e100), seed=SEEDS)
def test_no_measure_knows_scale_or_order(sigma: list[float], scale: float, seed: int) -> None:
    values = torch.tensor(sigma, dtype=torch.float64)
    shuffled = torch.randperm(len(sigma), generator=torch.Generator().manual_seed(seed))
    other = scale * values[shuffled]
    for name, measure in MEASURES.items():
        if name == "exponent":
            continue
        one, two = (torch.as_tensor(measure(v)).tolist() for v in (values, other))
        assert two == pytest.approx(one, rel=1e-9, abs=1e-9), name


@settings(deadline=None, max_examples=100)
@given(SIGMAS)
def test_ranks_keep_their_bounds_and_their_order(sigma: list[float]) -> None:
    values, d = torch.tensor(sigma, dtype=torch.float64), len(sigma)
    for power in (1.0, 2.0):
        kl = spectrum.singular_entropy(values, power)
        assert -1e-12 <= kl <= math.log(d) + 1e-12
        rank = spectrum.effective_rank(values, power)
        assert rank == pytest.approx(d * math.exp(-kl), rel=1e-12)
    shares = (
        [1.0, spectrum.stable_rank(values), spectrum.spectral_rank(values)],
        [spectrum.spectral_rank(values), spectrum.effective_rank(values), float(d)],
        [spectrum.stable_rank(values), spectrum.participation_ratio(values)],
        [spectrum.participation_ratio(values), spectrum.effective_rank(values, 2.0)],
        [spectrum.effective_rank(values, 2.0), spectrum.effective_rank(values)],
    )
    for ordered in shares:
        for low, high in itertools.pairwise(ordered):
            assert low <= high * (1 + 1e-12)
    assert spectrum.condition_number(values) >= 1


def test_a_gaussian_head_has_the_limits_of_marchenko_and_pastur() -> None:
    rows, d = 4000, 400
    sigma, root = spectrum.singular_values(normal(rows, d)), math.sqrt(d / rows)
    assert sigma[0].item() == pytest.approx((1 + root) * rows**0.5, rel=0.01)
    assert sigma[-1].item() == pytest.approx((1 - root) * rows**0.5, rel=0.01)
    assert spectrum.stable_rank(sigma) == pytest.approx(d / (1 + root) ** 2, rel=0.02)
    assert spectrum.participation_ratio(sigma) == pytest.approx(d / (1 + d / rows), rel=0.002)


@pytest.mark.parametrize("shape", [(40, 12), (8, 12)])
def test_w_error_is_that_of_every_truncation(shape: tuple[int, int]) -> None:
    w = normal(*shape)
    left, sigma, right = np.linalg.svd(w.numpy(), full_matrices=False)
    rest = [w.numpy() - (left[:, :r] * sigma[:r]) @ right[:r] for r in range(len(sigma) + 1)]
    expected = np.array([np.linalg.norm(m) for m in rest]) / np.linalg.norm(w.numpy())
    found = spectrum.w_error(spectrum.singular_values(w)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    out, down = spectrum.truncation(w)
    ours = [(w - out[:, :r] @ down[:r]).norm() / w.norm() for r in range(len(sigma) + 1)]
    np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-14)


# The exponent


def pareto(alpha: float, n: int, seed: int) -> Tensor:
    """Singular values whose squares have the density x^-alpha from 2 on."""
    draws = scipy.stats.pareto.rvs(alpha - 1, scale=2, size=n, random_state=seed)
    return torch.from_numpy(np.sqrt(draws))


@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 6.0])
def test_a_power_law_gives_back_its_exponent(alpha: float) -> None:
    found = spectrum.exponent(pareto(alpha, 2000, seed=1))
    assert abs(found.alpha - alpha) < 3 * found.stderr < 0.2 * (alpha - 1)
    assert found.stderr == pytest.approx((found.alpha - 1) / math.sqrt(found.tail), rel=1e-12)


def test_the_standard_error_of_an_exponent_has_its_scale() -> None:
    found = [spectrum.exponent(pareto(2.5, 200, seed)) for seed in range(100)]
    score = np.array([(f.alpha - 2.5) / f.stderr for f in found])
    assert 0.8 < score.std() < 1.5  # the choice of the tail adds to it
    assert abs(np.median(score)) < 0.5


def test_what_lies_below_the_law_is_left_out() -> None:
    body = np.sqrt(np.random.default_rng(0).uniform(0, 2, 500))
    found = spectrum.exponent(torch.cat([torch.from_numpy(body), pareto(3, 500, seed=0)]))
    assert found.start == pytest.approx(2, rel=0.1)
    assert found.alpha == pytest.approx(3, abs=3 * found.stderr)


@pytest.mark.parametrize("kind", ["pareto", "normal", "heavy"])
@pytest.mark.parametrize("seed", range(3))
def test_exponent_and_tail_are_those_of_powerlaw(kind: str, seed: int) -> None:
    draws = np.random.default_rng(seed)
    head = {"normal": draws.standard_normal((300, 90)), "heavy": draws.standard_t(3, (300, 90))}
    sigma = pareto(2.5, 90, seed).numpy() if kind == "pareto" else svd(torch.tensor(head[kind]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = powerlaw.Fit(sigma**2, parameter_ranges={"alpha": [1, None]}, verbose=0)
    ours = spectrum.exponent(torch.from_numpy(sigma))
    assert ours.start == pytest.approx(theirs.xmin, rel=1e-12)
    assert ours.tail == (sigma**2 >= theirs.xmin).sum()
    assert ours.alpha == pytest.approx(theirs.alpha, rel=1e-9)
    assert ours.stderr == pytest.approx(theirs.sigma, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1e150])
def test_an_exponent_knows_no_scale_nor_zeros(scale: float) -> None:
    sigma = pareto(2.5, 100, seed=0)
    one = spectrum.exponent(sigma)
    other = spectrum.exponent(torch.cat([sigma.flip(0) * scale, torch.zeros(7)]))
    assert other.alpha == pytest.approx(one.alpha, rel=1e-9) and other.tail == one.tail


@pytest.mark.parametrize("few", [[1.0], [2.0, 1.0], [2.0, 2.0, 1.0], [2.0, 1.0, 0.0]])
def test_a_law_needs_three_values(few: list[float]) -> None:
    with pytest.raises(ValueError, match="three distinct"):
        spectrum.exponent(torch.tensor(few))
    assert spectrum.exponent(torch.tensor([*few, 3.0, 5.0])).tail >= 2


# The functional spectrum


def covariance(hidden: Tensor) -> Tensor:
    return (hidden - hidden.mean(0)).T @ (hidden - hidden.mean(0)) / len(hidden)


@pytest.mark.parametrize("rank", [None, 3])
def test_the_functional_spectrum_is_that_of_the_logits(rank: int | None) -> None:
    hidden = normal(5, 21, 8) + 2
    states = geometry.States(8, torch.device("cpu"))
    states.update(hidden)
    w = normal(100, rank or 8, seed=1) + 0.3
    right = None if rank is None else normal(rank, 8, seed=2)
    logits = hidden[:, 1:].flatten(0, 1) @ (w if right is None else w @ right).T
    logits = logits - logits.mean(1, keepdim=True)
    expected = svd(logits - logits.mean(0))[:8] / math.sqrt(len(logits))
    reduced = spectrum.reduce(w, right)
    found = spectrum.functional(reduced.centred, geometry.covariance(states)).numpy()
    np.testing.assert_allclose(found, expected[: len(found)], rtol=1e-10)
    assert len(found) == (rank or 8)


@settings(deadline=None, max_examples=20)
@given(seed=SEEDS, shift=st.floats(-100, 100))
def test_no_change_of_gauge_moves_the_functional_spectrum(seed: int, shift: float) -> None:
    w, hidden = normal(60, 6, seed=seed), normal(200, 6, seed=seed + 1)
    gauge = orthogonal(6, seed) * torch.linspace(0.2, 3, 6) @ orthogonal(6, seed + 2)
    expected = spectrum.functional(spectrum.reduce(w).centred, covariance(hidden))
    other = w @ torch.linalg.inv(gauge) + shift * normal(6, seed=seed + 3)
    moved = gauge @ covariance(hidden) @ gauge.T
    found = spectrum.functional(spectrum.reduce(other).centred, moved)
    assert error(found, expected.numpy()) < 1e-8
    plain = spectrum.singular_values(other)
    assert error(plain, spectrum.singular_values(w).numpy()) > 1e-3


# Frequency


def logs(rows: int) -> Tensor:
    """Zipf's law."""
    return -torch.arange(1.0, rows + 1, dtype=torch.float64).log()


@pytest.mark.parametrize("rows", [500, spectrum.ROWS + 100])
@pytest.mark.parametrize("factored", [False, True])
def test_frequency_is_correlated_with_left_singular_vectors(rows: int, factored: bool) -> None:
    w = normal(rows, 6) * torch.linspace(1, 2, 6) + 0.2
    w[:, 0] += logs(rows) / 4
    right = normal(6, 9, seed=1) if factored else None
    product = (w if right is None else w @ right).numpy()
    found = spectrum.frequency(spectrum.reduce(w, right), w, right, logs(rows), top=5)
    for correlations, m in ((found.raw, product), (found.centred, product - product.mean(0))):
        left = np.linalg.svd(m, full_matrices=False)[0][:, :5]
        expected = [abs(np.corrcoef(vector, logs(rows))[0, 1]) for vector in left.T]
        np.testing.assert_allclose(correlations, expected, rtol=1e-9, atol=1e-11)
    target = logs(rows).numpy() - logs(rows).numpy().mean()
    along = (product - product.mean(0)).T @ target / np.linalg.norm(target)
    share = along @ along / ((product - product.mean(0)) ** 2).sum()
    assert found.share == pytest.approx(share, rel=1e-12)


def test_a_planted_direction_of_frequency_is_found() -> None:
    rows = 2000
    w = normal(rows, 8) + 30 * logs(rows)[:, None] * normal(8, seed=1)
    found = spectrum.frequency(spectrum.reduce(w), w, None, logs(rows))
    assert found.raw[0] > 0.98 and found.centred[0] > 0.999
    assert max(found.centred[1:]) < 0.05
    assert found.share > 0.98


def test_without_frequency_there_is_no_correlation() -> None:
    rows = 4000
    w = normal(rows, 8)
    found = spectrum.frequency(spectrum.reduce(w), w, None, logs(rows))
    assert len(found.raw) == len(found.centred) == 4
    assert max(found.raw + found.centred) < 4 / rows**0.5
    assert found.share < 3 / rows


def test_the_share_of_frequency_in_closed_form() -> None:
    along = torch.nn.functional.normalize(logs(64) - logs(64).mean(), dim=0)
    basis = torch.linalg.qr(torch.cat([torch.ones(64, 1), along[:, None], normal(64, 2)], 1)).Q
    w = basis @ torch.diag(torch.tensor([9.0, 3.0, 2.0, 1.0], dtype=torch.float64))
    found = spectrum.frequency(spectrum.reduce(w), w, None, logs(64), top=3)
    assert found.share == pytest.approx(9 / 14, rel=1e-12)
    assert found.centred == pytest.approx([1, 0, 0], abs=1e-12)
    assert found.raw == pytest.approx([0, 1, 0], abs=1e-12)


# What survives of a gradient


def survival(w: Tensor, gradient: Tensor) -> Tensor:
    return spectrum.survival(spectrum.triangle(w), gradient @ w)


def gradients(n: int, rows: int) -> Tensor:
    """p - e_y."""
    p = normal(n, rows, seed=5).softmax(-1)
    return p - torch.eye(rows, dtype=torch.float64)[torch.arange(n) * 3 % rows]


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_what_survives_is_the_orthogonal_projection(condition: float) -> None:
    w = normal(50, 8) @ torch.diag(torch.logspace(0, -math.log10(condition), 8).double())
    g = gradients(12, 50).numpy()
    basis = np.linalg.qr(w.numpy())[0]
    found = survival(w @ orthogonal(8), torch.from_numpy(g)).numpy()
    np.testing.assert_allclose(found, ((g @ basis) ** 2).sum(1), rtol=1e-9)
    left = np.linalg.lstsq(w.numpy(), g.T, rcond=None)[0]
    np.testing.assert_allclose(found, ((w.numpy() @ left) ** 2).sum(0), rtol=1e-9)


def test_a_deficient_head_hands_back_what_its_columns_span() -> None:
    w = normal(50, 3)
    more = torch.cat([w, w @ normal(3, 4, seed=1), torch.zeros(50, 1)], 1)
    g = gradients(12, 50)
    one, other = survival(w, g), survival(more, g)
    np.testing.assert_allclose(other.numpy(), one.numpy(), rtol=1e-10)


def test_all_survives_inside_the_columns_and_nothing_beside_them() -> None:
    w, g = normal(50, 8), gradients(12, 50)
    inside = g @ w @ w.T
    energy = inside.square().sum(1).numpy()
    np.testing.assert_allclose(survival(w, inside).numpy(), energy, rtol=1e-12)
    basis = torch.linalg.qr(w).Q
    beside = g - g @ basis @ basis.T
    assert (survival(w, beside) < 1e-28).all()


def test_a_head_wider_than_its_vocabulary_hands_back_all() -> None:
    g = gradients(12, 20)
    energy = g.square().sum(1).numpy()
    np.testing.assert_allclose(survival(normal(20, 30), g).numpy(), energy, rtol=1e-12)
