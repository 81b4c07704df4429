import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.spatial import ConvexHull
from torch import Tensor

from analysis import argmax
from analysis.argmax import unargmaxable
from tests.conftest import normal


def by_linear_programme(weight: Tensor, bias: Tensor | None) -> list[int]:
    """All constraints at once: max t, (w_i - w_j) h + (b_i - b_j) s >= t, h in a box, s in [0, 1].

    Takes the definition as it stands: neither centred nor whitened.
    """
    rows = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
    x = (rows / rows.abs().max()).numpy()
    d = x.shape[1]
    bounds: list[tuple[float | None, float]] = [(-1, 1)] * d + [(None, 1)]
    if bias is not None:
        bounds[d - 1] = (0, 1)
    never = []
    for i in range(len(x)):
        others = np.delete(x, i, 0) - x[i]
        constraints = np.hstack([others, np.ones((len(others), 1))])
        best = linprog(-np.eye(d + 1)[-1], constraints, np.zeros(len(others)), bounds=bounds)
        if -best.fun <= 1e-8:
            never.append(i)
    return never


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("seed", range(24))
def test_a_linear_programme_over_all_constraints_agrees(seed: int, with_bias: bool) -> None:
    sizes = np.random.default_rng(seed)
    vocabulary, d = int(sizes.integers(2, 28)), int(sizes.integers(1, 6))
    weight, bias = normal(vocabulary, d, seed=seed), normal(vocabulary, seed=seed + 100)
    if seed % 3 == 1:  # equal tokens, and tokens on the faces of the hull
        weight, bias = weight.round(), bias.round()
    if seed % 3 == 2:
        weight = weight * 10 ** normal(vocabulary, 1, seed=seed + 200)
    given = bias if with_bias else None
    assert unargmaxable(weight, given) == by_linear_programme(weight, given)


@pytest.mark.parametrize("d", [2, 3])
def test_without_a_bias_the_corners_of_the_hull_win(d: int) -> None:
    weight = normal(500, d)
    corners = set(ConvexHull(weight.numpy()).vertices.tolist())
    assert unargmaxable(weight) == sorted(set(range(500)) - corners)


def test_a_bias_in_one_dimension_is_an_upper_envelope_of_lines() -> None:
    slope, height = normal(60, seed=1), normal(60, seed=2)
    i, j = torch.triu_indices(60, 60, 1)
    crossings = ((height[i] - height[j]) / (slope[j] - slope[i])).sort().values
    between = torch.cat(
        [crossings[:1] - 1, (crossings[1:] + crossings[:-1]) / 2, crossings[-1:] + 1]
    )
    winners = set((between[:, None] * slope + height).argmax(1).tolist())
    assert 2 < len(winners) < 30
    assert unargmaxable(slope[:, None], height) == sorted(set(range(60)) - winners)


def test_tokens_on_a_circle_or_a_sphere_all_win() -> None:
    angles = torch.arange(2000) * 2 * math.pi / 2000
    assert unargmaxable(torch.stack([angles.cos(), angles.sin()], 1)) == []
    assert unargmaxable(torch.nn.functional.normalize(normal(500, 5))) == []


def test_tangents_of_a_parabola_all_win_and_its_reflection_leaves_the_ends() -> None:
    x = torch.linspace(-1, 1, 101, dtype=torch.float64)
    assert unargmaxable(x[:, None], -(x**2)) == []
    assert unargmaxable(x[:, None], x**2) == list(range(1, 100))


def test_mixtures_of_other_tokens_never_win() -> None:
    corners = normal(80, 40)
    shares = torch.distributions.Dirichlet(torch.full((80,), 0.3, dtype=torch.float64))
    torch.manual_seed(0)
    weight = torch.cat([corners, shares.sample((300,)) @ corners])
    assert unargmaxable(weight) == list(range(80, 380))
    midpoints = (corners[:40] + corners[40:]) / 2
    assert unargmaxable(torch.cat([midpoints, corners])) == list(range(40))


def test_a_head_as_wide_as_its_vocabulary_predicts_everything() -> None:
    assert unargmaxable(normal(9, 8)) == []
    assert unargmaxable(normal(9, 20), normal(9, seed=1)) == []


def test_a_head_of_rank_one_predicts_its_extremes() -> None:
    along = normal(50, seed=3)
    inner = sorted(set(range(50)) - {int(along.argmin()), int(along.argmax())})
    assert unargmaxable(along[:, None] * normal(7) + normal(7, seed=4)) == inner


def test_equal_tokens_tie_unless_a_bias_parts_them() -> None:
    weight = normal(6, 8)
    weight[4] = weight[1]
    assert unargmaxable(weight) == [1, 4]
    bias = torch.zeros(6, dtype=torch.float64)
    assert unargmaxable(weight, bias) == [1, 4]
    bias[4] = 1e-3
    assert unargmaxable(weight, bias) == [1]
    assert unargmaxable(torch.ones(3, 2)) == [0, 1, 2]
    assert unargmaxable(torch.ones(3, 2), torch.tensor([0.0, 2.0, 1.0])) == [0, 2]
    assert unargmaxable(torch.ones(1, 2)) == []


def test_what_moves_no_prediction_changes_nothing() -> None:
    weight, bias = normal(200, 4), normal(200, seed=1)
    map_ = normal(4, 4, seed=2) * torch.tensor([1e-3, 1, 1, 1e3])
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    for b in (None, bias):
        expected = unargmaxable(weight, b)
        assert 50 < len(expected) < 200
        assert unargmaxable(weight + normal(4, seed=5), b) == expected
        assert unargmaxable(weight @ map_, b) == expected
        assert unargmaxable(torch.cat([weight, weight @ map_], 1), b) == expected
        moved = unargmaxable(weight[order], None if b is None else b[order])
        assert sorted(order[moved].tolist()) == expected
    # A constant, a multiple, and what moving h does too.
    assert unargmaxable(weight, 3 * bias + weight @ normal(4, seed=6) + 5) == unargmaxable(
        weight, bias
    )
    assert unargmaxable(weight, weight @ normal(4, seed=6)) == unargmaxable(weight)


def test_only_candidates_are_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = normal(300, 4)
    expected = unargmaxable(weight)
    asked = torch.arange(0, 300, 7)
    some = sorted(set(expected) & set(asked.tolist()))
    mask = torch.zeros(300, dtype=torch.bool)
    mask[asked] = True
    assert unargmaxable(weight, candidates=asked) == some
    assert unargmaxable(weight, candidates=mask) == some
    assert unargmaxable(weight, candidates=mask & ~mask) == []
    monkeypatch.setattr(argmax, "SCORES", 1000)  # three tokens at a time
    left: list[int] = []
    assert unargmaxable(weight, progress=lambda what, n: left.append(n)) == expected
    assert left[0] == 300
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_head_that_is_not_finite_is_refused(bad: float) -> None:
    weight, bias = normal(5, 2), torch.tensor([0, 1, bad, 2, 3])
    with pytest.raises(ValueError, match="NaN"):
        unargmaxable(weight, bias)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="NaN"):
        unargmaxable(weight)
