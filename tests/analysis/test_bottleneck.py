import math

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor

from analysis import bottleneck, spectrum
from analysis.errors import BadInput
from tests.conftest import normal

Array = npt.NDArray[np.float64]
SEEDS = st.integers(0, 2**32)
SIZES = st.integers(2, 12)

pytestmark = pytest.mark.usefixtures("one_thread")


def loss(w: Tensor, h: Tensor, y: Tensor, bias: Tensor | float = 0.0) -> float:
    return torch.nn.functional.cross_entropy(h @ w.T + bias, y).item()


def column(table: pl.DataFrame, name: str, method: str) -> list[float]:
    return table.filter(pl.col("method") == method)[name].to_list()


def draw(vocabulary: int, d: int, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    w, h = normal(vocabulary, d, seed=seed), normal(n, d, seed=seed + 1)
    return w, h, torch.from_numpy(np.random.default_rng(seed).integers(0, vocabulary, n))


# Bounds that always hold


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(1, 20), SEEDS, st.sampled_from([0.01, 1, 30]), st.booleans())
def test_what_is_called_a_bound_is_one(
    vocabulary: int, d: int, n: int, seed: int, scale: float, biased: bool
) -> None:
    """Of any head, flat or sharp, of any states and tokens, and of either truncation; and bounds
    that follow from another are above it."""
    w, h, y = draw(vocabulary, d, n, seed)
    h = scale * h + normal(d, seed=seed + 2)
    bias = normal(vocabulary, seed=seed + 3) if biased else None
    table = bottleneck.bounds(w, h, y, list(range(d + 1)), bias)
    for row in table.iter_rows(named=True):
        rounding = 1e-9 * (1 + row["theorem"])
        assert row["slope"] <= row["gap"] + rounding
        for bound in bottleneck.ALWAYS:
            assert row["gap"] <= row[bound] + rounding, bound
        assert row["sharp"] <= min(row["gradient"], row["first_order"]) + rounding
        assert row["first_order"] <= min(row["first_order_sigma"], row["theorem"]) + rounding
        assert row["gradient"] == pytest.approx(row["slope"] + row["second_order"])
        assert row["logit_matrix"] <= row["second_order"] * (1 + 1e-9) + rounding


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0.01, 20))
def test_the_bounds_hold_between_any_two_distributions(seed: int, size: float) -> None:
    """ln E e^v of a variable of mean 0 with three values, of which one may be rare."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([0.2, 1, 1])
    v = size * rng.standard_normal(3)
    v -= p @ v
    moments = [torch.tensor([x], dtype=torch.float64) for x in (p @ v**2, v.max(), np.ptp(v))]
    assert math.log(p @ np.exp(v)) <= bottleneck._excess(*moments).item() * (1 + 1e-9) + 1e-12


def test_no_bound_is_above_the_largest_value() -> None:
    """Neither where the least is rare and far away nor where exp of the largest overflows."""
    variance, most = torch.tensor([1e4, 1e6]).double(), torch.tensor([10.0, 900]).double()
    assert bottleneck._excess(variance, most, most + 1000).tolist() == [10, 900]


@pytest.mark.parametrize("method", ["plain", "weighted"])
def test_the_gap_is_that_of_the_truncated_head(method: str) -> None:
    """In chunks, with a bias, against the cross-entropy of the head made by numpy's SVD; the
    weighted one of W S^(1/2)."""
    w, h, y = draw(40, 6, 300, 0)
    bias = normal(40, seed=9)
    root = np.eye(6)
    if method == "weighted":
        w = w - w.mean(0)
        root = np.asarray(scipy.linalg.sqrtm((h.T @ h).numpy()))
    left, sigma, right = np.linalg.svd(w.numpy() @ root, full_matrices=False)
    found = bottleneck.bounds(w, h, y, [0, 2, 5, 6], bias)
    for rank, gap in zip([0, 2, 5, 6], column(found, "gap", method), strict=True):
        cut = (left[:, :rank] * sigma[:rank]) @ right[:rank] @ np.linalg.inv(root)
        expected = loss(torch.from_numpy(cut), h, y, bias) - loss(w, h, y, bias)
        assert gap == pytest.approx(expected, abs=1e-11)


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h, y = draw(40, 6, 50, 0)
    whole = bottleneck.bounds(w, h, y, [0, 3])
    monkeypatch.setattr(bottleneck, "SCORES", 40 * 7)
    monkeypatch.setattr(bottleneck, "CACHED", 40 * 3)
    np.testing.assert_allclose(
        bottleneck.bounds(w, h, y, [0, 3]).drop("method"), whole.drop("method"), atol=1e-11
    )


def test_the_slope_is_that_of_autograd() -> None:
    """<G, dW> with G by backward."""
    w, h, y = draw(20, 5, 60, 1)
    w.requires_grad_()
    torch.nn.functional.cross_entropy(h @ w.T, y).backward()
    a, b = spectrum.truncation(w)
    assert w.grad is not None
    expected = (w.grad * (a[:, :2] @ b[:2] - w.detach())).sum().item()
    found = bottleneck.bounds(w, h, y, [2])
    assert column(found, "slope", "plain") == pytest.approx([expected], rel=1e-9)


def test_first_order_bounds_are_met_by_confident_mistakes() -> None:
    """All mass is and stays on wrong token 1; W moves s from it to the right token 0, and is cut
    off: gap, sqrt 2 |u|, sqrt 2 sigma |h| and the theorem are one number, 2 s."""
    s = 3.0
    w = torch.tensor([[s], [-s], [0]]).double()
    bias = torch.tensor([0.0, 60, 0]).double()
    table = bottleneck.bounds(w, torch.ones(1, 1), torch.tensor([0]), [0], bias)
    for name in ("gap", "sharp", "first_order", "first_order_sigma", "theorem"):
        assert column(table, name, "plain") == pytest.approx([2 * s]), name


def test_first_order_bounds_agree_where_nothing_is_longer_than_another() -> None:
    """Two orthogonal columns of equal length on unit vectors, each as often."""
    w = torch.tensor([[1, 1], [-1, 1], [1, -1], [-1, -1]]).double()
    (row, _) = bottleneck.bounds(w, torch.eye(2), torch.tensor([0, 1]), [0]).to_dicts()
    expected = pytest.approx(2**0.5 * 2)
    for name in ("first_order", "first_order_sigma", "theorem"):
        assert row[name] == expected, name


@pytest.mark.parametrize("size", [0.1, 0.01])
def test_second_order_bounds_are_met_by_a_coin(size: float) -> None:
    """p = 1/2 on two tokens, each seen once, and a small u that tells them apart: the gap is
    |u|^2 / 4 to leading order, and there is no slope."""
    w = torch.tensor([[size], [-size]]).double()
    table = bottleneck.bounds(w, torch.ones(2, 1), torch.tensor([0, 1]), [0], -w[:, 0])
    for row in table.iter_rows(named=True):
        assert abs(row["slope"]) < 1e-15
        assert row["second_order"] == pytest.approx(row["logit_matrix"])
        assert row["gap"] / row["second_order"] == pytest.approx(1, abs=size**2)


def test_the_sharp_bound_is_the_gap_to_leading_order_and_the_plain_one_v_times_that() -> None:
    """Flat p over V tokens: E_p e^v - 1 -> |u|^2 / 2V, so |u|^2 / 4 is V / 2 too large."""
    vocabulary = 256
    w, h, y = draw(vocabulary, 4, 2000, 3)
    table = bottleneck.bounds(1e-4 * w, h, y, [0, 2])
    for row in table.iter_rows(named=True):
        excess = row["gap"] - row["slope"]
        assert (row["sharp"] - row["slope"]) / excess == pytest.approx(1, abs=1e-3)
        assert row["second_order"] / excess == pytest.approx(vocabulary / 2, rel=1e-3)


# Minimisers


def trained(h: Array, y: Array, vocabulary: int, decay: float = 0.0) -> Tensor:
    """Softmax regression without bias, to the minimum."""
    n, d = h.shape

    def objective(flat: Array) -> tuple[float, Array]:
        w = flat.reshape(vocabulary, d)
        log_q = log_softmax(h @ w.T, axis=1)
        error = np.exp(log_q)
        error[np.arange(n), y] -= 1
        value = -log_q[np.arange(n), y].mean() + decay / 2 * (w**2).sum()
        return value, (error.T @ h / n + decay * w).ravel()

    options = {"maxiter": 5000, "gtol": 1e-10, "ftol": 1e-16}
    start = np.zeros(vocabulary * d)
    best = scipy.optimize.minimize(objective, start, method="L-BFGS-B", jac=True, options=options)
    return torch.from_numpy(best.x.reshape(vocabulary, d))


@pytest.mark.parametrize("seed", range(3))
def test_a_minimiser_needs_no_gradient_term(seed: int) -> None:
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((600, 6)) @ np.diag([3, 2, 1, 1, 0.3, 0.1])
    noise = rng.gumbel(size=(600, 10))
    y = (h @ rng.standard_normal((6, 10)) / 3 + noise).argmax(1)
    w = trained(h, y, 10)
    table = bottleneck.bounds(w, torch.from_numpy(h), torch.from_numpy(y), list(range(7)))
    assert table["slope"].abs().max() < 1e-6  # type: ignore[operator]
    for row in table.iter_rows(named=True):
        assert -1e-6 <= row["gap"] <= row["second_order"] + 1e-6
        if row["method"] == "weighted":  # this is where the bound by the logit matrix is from
            assert row["logit_matrix"] == pytest.approx(row["second_order"], rel=1e-6, abs=1e-12)


def test_without_the_gradient_the_second_order_bound_fails_elsewhere() -> None:
    """A head that is regularised is no minimiser: cut off what it has learnt in a weak direction
    and more is lost than |u|^2 / 4; with the slope the bound holds."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((500, 4)) * np.array([4, 2, 1, 0.5])
    y = (h @ rng.standard_normal((4, 8)) + rng.gumbel(size=(500, 8))).argmax(1)
    w = trained(h, y, 8, decay=0.5)
    table = bottleneck.bounds(w, torch.from_numpy(h), torch.from_numpy(y), list(range(4)))
    broken = table.filter(pl.col("gap") > pl.col("second_order"))
    assert broken.height > 0
    assert (broken["gap"] <= broken["sharp"]).all() and (broken["slope"] > 0).all()


def test_weight_decays_gradient_is_known() -> None:
    """At the minimum of loss + decay/2 |W|^2, G = -decay W: a truncated SVD's slope is
    decay sum_{i>r} sigma_i^2."""
    rng = np.random.default_rng(1)
    h = rng.standard_normal((400, 4))
    y = (h @ rng.standard_normal((4, 8)) + rng.gumbel(size=(400, 8))).argmax(1)
    w = trained(h, y, 8, decay=0.02)
    table = bottleneck.bounds(w, torch.from_numpy(h), torch.from_numpy(y), [0, 1, 2, 3])
    expected = [0.02 * tail**2 for tail in column(table, "tail", "plain")]
    np.testing.assert_allclose(column(table, "slope", "plain"), expected, rtol=1e-5)


# What comes of a table


def test_constants_are_those_of_the_law_they_are_asked_about() -> None:
    """Gaps 0.3 tail^2, at tails 1, 2 and 4: the largest ratio is 1.2, least squares
    .3 (1 + 8 + 64) / (1 + 4 + 16), the power 2. Full rank says nothing."""
    table = pl.DataFrame({
        "rank": [1, 2, 3, 4], "method": "plain", "gap": [4.8, 1.2, 0.3, -1e-17],
        "tail": [4.0, 2.0, 1.0, 0.0], "theorem": [28.0, 14.0, 7.0, 0.0],
    })  # fmt: skip
    (row,) = bottleneck.constants(table).to_dicts()
    assert row["smallest"] == pytest.approx(1.2) and row["proved"] == pytest.approx(7)
    assert row["least_squares"] == pytest.approx(0.3 * 73 / 21)
    assert row["power"] == pytest.approx(2)


def test_looseness_is_bound_over_gap() -> None:
    w, h, y = draw(20, 5, 400, 2)
    table = bottleneck.bounds(w, h, y, [0, 5])
    loose = bottleneck.looseness(table)
    for row, ratio in zip(table.to_dicts(), loose.to_dicts(), strict=True):
        if row["gap"] > 0 and row["rank"] == 0:
            assert ratio["sharp"] == pytest.approx(row["sharp"] / row["gap"])
        if row["gap"] <= 0:
            assert ratio["sharp"] is None


def test_bad_input_is_said_in_one_line() -> None:
    w, h, y = draw(20, 5, 10, 2)
    with pytest.raises(BadInput, match="ranks from 0 to 5"):
        bottleneck.bounds(w, h, y, [6])
    with pytest.raises(BadInput, match="finite"):
        bottleneck.bounds(w, h * math.nan, y, [2])
    with pytest.raises(BadInput, match="positive"):
        bottleneck.ideal(np.eye(3))


# The paper's lemmas


def conditionals(contexts: int, vocabulary: int, seed: int) -> Array:
    return np.random.default_rng(seed).dirichlet(np.full(vocabulary, 2.0), contexts)


@settings(max_examples=20, deadline=None)
@given(SIZES, SIZES, SEEDS)
def test_the_ideal_head_predicts_the_conditionals(contexts: int, v: int, seed: int) -> None:
    p = conditionals(contexts, v, seed)
    w = bottleneck.ideal(p)
    np.testing.assert_allclose(np.exp(log_softmax(w.T, axis=1)), p, rtol=1e-9)
    assert np.linalg.matrix_rank(w, tol=1e-9) <= v - 1


def test_the_ideal_head_is_a_minimiser_and_obeys_the_second_order_bound() -> None:
    """Text in which each context is followed by each token as often as p says: counts."""
    counts = np.random.default_rng(0).integers(1, 9, (15, 10))
    contexts, tokens = (np.repeat(ids.ravel(), counts.ravel()) for ids in np.indices((15, 10)))
    w = torch.from_numpy(bottleneck.ideal(counts / counts.sum(1, keepdims=True)))
    h = torch.eye(15).double()[contexts]
    table = bottleneck.bounds(w, h, torch.from_numpy(tokens), list(range(16)))
    assert table["slope"].abs().max() < 1e-12  # type: ignore[operator]
    assert (table["gap"] <= table["second_order"] + 1e-12).all()
    weighted = table.filter(pl.col("method") == "weighted")
    shares = counts.sum(1).astype(float)
    best = bottleneck.optima(counts / counts.sum(1, keepdims=True), list(range(16)), shares)
    np.testing.assert_allclose(weighted["gap"], best["truncated"], atol=1e-12)
    np.testing.assert_allclose(weighted["logit_matrix"], best["second_order"], atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(3, 20))
def test_lemma_5_1_with_the_right_coefficient(seed: int, vocabulary: int) -> None:
    """(L(W* + eps M) - L(W*)) / eps tends to it, the error at most eps |C M x|^2 / 4; what the
    appendix prints stays as wrong at eps = 1e-6 as at 1."""
    rng = np.random.default_rng(seed)
    p = conditionals(5, vocabulary, seed)
    w = bottleneck.ideal(p)
    m = rng.standard_normal(w.shape)
    m /= np.linalg.norm(m)
    context, token = int(rng.integers(5)), int(rng.integers(vocabulary))
    logits, change = w[:, context], m[:, context]
    right, printed = bottleneck.first_order(logits, change, token)
    for eps in (1e-1, 1e-2, 1e-3, 1e-4):
        rise = log_softmax(logits)[token] - log_softmax(logits + eps * change)[token]
        assert abs(rise) <= 2**0.5 * eps  # the lemma, |M x| <= 1
        assert -1e-10 <= rise / eps - right <= eps / 4 + 1e-10
    assert abs(rise / eps - printed) > 100 * abs(rise / eps - right)


def test_the_printed_coefficient_changes_with_what_softmax_cannot_see() -> None:
    p = conditionals(1, 6, 0)
    logits, change = bottleneck.ideal(p)[:, 0], normal(6).numpy()
    right, printed = bottleneck.first_order(logits, change, 2)
    moved = bottleneck.first_order(logits + 1, change, 2)
    assert moved[0] == pytest.approx(right) and abs(moved[1] - printed) > 0.1


@pytest.mark.parametrize("rank", [0, 1, 5, 9])
def test_lemma_5_2_is_eckart_and_young(rank: int) -> None:
    """Of the ideal head: distance as numpy's singular values say, and no nearer head of the rank
    among perturbed and random ones."""
    w = torch.from_numpy(bottleneck.ideal(conditionals(14, 10, 0)))
    a, b = spectrum.truncation(w)
    nearest = (w - a[:, :rank] @ b[:rank]).norm().item()
    sigma = np.linalg.svd(w.numpy())[1]
    assert nearest == pytest.approx(math.sqrt((sigma[rank:] ** 2).sum()), rel=1e-9, abs=1e-12)
    for seed in range(20):
        left = a[:, :rank] + 0.1 * normal(10, rank, seed=seed)
        right = torch.linalg.lstsq(left, w).solution  # the best for this left factor
        assert (w - left @ right).norm() >= nearest


def test_what_is_minimised_has_its_own_gradient() -> None:
    p, x = conditionals(4, 5, 1), np.random.default_rng(0).standard_normal(9 * 2)
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    expected = scipy.optimize.approx_fprime(
        x, lambda at: bottleneck._divergence(at, p, weights)[0], 1e-7
    )
    np.testing.assert_allclose(bottleneck._divergence(x, p, weights)[1], expected, atol=1e-6)


def test_optima_are_between_full_rank_and_the_truncation() -> None:
    """Falling in rank; at rank 0 the divergence from a uniform p, in closed form; from V - 1 on
    nothing; and better than the truncation in between."""
    p = conditionals(9, 6, 0)
    found = bottleneck.optima(p, list(range(7)))
    gaps = found["gap"].to_numpy()
    assert gaps[0] == pytest.approx(np.mean((p * np.log(p * 6)).sum(1)))
    assert (np.diff(gaps) < 1e-12).all() and np.abs(gaps[5:]).max() < 1e-12
    assert (gaps <= found["truncated"].to_numpy()).all()
    assert (found["truncated"] <= found["second_order"] + 1e-12).all()
    assert gaps[2] < 0.95 * found["truncated"][2]


@pytest.mark.parametrize("rank", [1, 2])
def test_no_random_start_finds_a_better_optimum(rank: int) -> None:
    p = conditionals(7, 5, 3)

    def divergence(flat: Array) -> float:
        x, a = flat[: 7 * rank].reshape(7, rank), flat[7 * rank :].reshape(rank, 5)
        return float((p * (np.log(p) - log_softmax(x @ a, axis=1))).sum() / 7)

    rng = np.random.default_rng(rank)
    starts = rng.standard_normal((6, 12 * rank))
    best = min(scipy.optimize.minimize(divergence, start, tol=1e-9).fun for start in starts)
    assert bottleneck.optima(p, [rank])["gap"][0] == pytest.approx(best, abs=1e-8)


def test_logits_of_rank_2_cost_nothing_at_rank_2() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((30, 2)) @ rng.standard_normal((2, 8))
    p = np.exp(log_softmax(logits, axis=1))
    gaps = bottleneck.optima(p, [1, 2])["gap"]
    assert gaps[0] > 0.01 and abs(gaps[1]) < 1e-12


def test_the_optimums_gap_goes_with_the_square_of_the_tail() -> None:
    """Theorem 5.3 says the first power. Logits of rank 3 and t times a rest: as t falls the gap
    is t^2 times something between min p / 2 and 1/4 of the tail's square."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((20, 3)) @ rng.standard_normal((3, 8))
    rest = rng.standard_normal((20, 8))
    logs = []
    for t in (0.1, 0.03, 0.01):
        p = np.exp(log_softmax(first + t * rest, axis=1))
        (row,) = bottleneck.optima(p, [3]).to_dicts()
        assert p.min() / 2 * 0.9 < row["gap"] / row["tail"] ** 2 < 1 / 4
        logs.append((math.log(row["tail"]), math.log(row["gap"])))
    powers = np.diff(logs, axis=0)
    np.testing.assert_allclose(powers[:, 1] / powers[:, 0], 2, atol=0.1)
