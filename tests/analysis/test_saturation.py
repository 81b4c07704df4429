from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression
from scipy.stats import binom

from analysis import monotone, saturation
from analysis.errors import BadInput
from analysis.monotone import Array
from analysis.saturation import Onset

K = 15
STEPS = np.arange(1, K + 1) * 1000


def noise(rho: float, series: int, k: int = K, seed: int = 1) -> Array:
    return monotone.autoregressive(rho, series, k, np.random.default_rng(seed))


def turning(rise: float, k: int = K, fall: float = 20.0) -> Array:
    """Falls to 0 at two fifths of the series, then rises to `rise` in a quarter of it."""
    at = np.linspace(0, 1, k)
    return fall * np.maximum(0, 1 - at / 0.4) ** 2 + rise * np.clip((at - 0.4) / 0.25, 0, 1)


def decide(series: Array, **options: float) -> list[Onset]:
    steps = np.arange(1, series.shape[1] + 1) * 1000
    return [saturation.onset(steps, y, after=0, **options) for y in series]  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough around each of hundreds of fits."""
    monkeypatch.setattr(saturation, "DRAWS", 40)


def squares(y: Array, turns: tuple[int, ...]) -> float:
    """Of residuals of scipy's monotone fits to pieces that fall and rise in turn."""
    pieces = np.split(y, turns)
    return sum(
        float(((p - isotonic_regression(p, increasing=bool(i % 2)).x) ** 2).sum())
        for i, p in enumerate(pieces)
        if len(p)
    )


@given(st.lists(st.integers(-5, 5), min_size=4, max_size=19))
def test_short_fits_are_the_best_of_all_that_fall_and_then_rise(values: list[int]) -> None:
    y = np.array(values, float)
    best = min(squares(y, (i,)) for i in range(1, len(y) + 1))
    fitted = monotone.fit(y[None])[0]
    assert ((y - fitted) ** 2).sum() == pytest.approx(best, abs=1e-9)


def test_longer_fits_may_fall_again_and_are_the_best_of_those() -> None:
    for y in noise(0.5, 5, 24):
        places = [(i, j) for i in range(1, 25) for j in range(i, 25)]
        best = min(squares(y, places_) for places_ in places)
        assert ((y - monotone.fit(y[None])[0]) ** 2).sum() == pytest.approx(best)


def test_long_fits_turn_at_most_twice_and_miss_little() -> None:
    """Turns are sought in means of neighbours, here of three."""
    for y in turning(4.0, 60) + noise(0.3, 3, 60):
        fitted = monotone.fit(y[None])[0]
        moves = np.sign(np.diff(fitted))
        moves = moves[moves != 0]
        assert (np.diff(moves) != 0).sum() <= 2 and moves[0] == -1
        best = min(squares(y, (i, j)) for i in range(1, 61) for j in range(i, 61, 2))
        assert ((y - fitted) ** 2).sum() < 1.1 * best


@pytest.mark.parametrize("k", [10, K])
def test_p_is_uniform_where_rho_is_known(k: int) -> None:
    """2000 new flat series for each rho: not more, and not much fewer, at or below 5 and 1 %."""
    null = monotone.null(k)
    for i in (0, 2, 4):
        found = monotone.measure(noise(monotone.RHOS[i], 2000, k, seed=9))
        p = np.array([monotone.exceeding(null.rises, t)[i] for t in found.rise / found.noise])
        for level in (0.05, 0.01):
            low, high = binom.ppf([0.001, 0.999], 2000, level)
            assert low <= (p <= level).sum() <= high


@pytest.mark.parametrize(
    ("name", "shape", "rho"),
    [
        ("flat", np.zeros(K), 0.0),
        ("flat", np.zeros(K), 0.5),
        ("flat and slow", np.zeros(K), 0.8),
        ("improves", np.arange(1, K + 1) ** -0.5 * 10, 0.3),
        ("a fast start", 100 * np.exp(-np.arange(K) / 2), 0.0),
        ("annealed at the end", -10 * np.clip(np.linspace(-4, 1, K), 0, 1), 0.3),
        ("a bump between", 10 * np.exp(-0.5 * ((np.arange(K) - 7) / 1.5) ** 2), 0.3),
    ],
)
def test_false_alarms_stay_below_the_level(name: str, shape: Array, rho: float) -> None:
    fired = [found.kind == "worsens" for found in decide(shape + noise(rho, 150), margin=1.0)]
    assert sum(fired) <= binom.ppf(0.999, 150, 0.05), name


@pytest.mark.parametrize("rho", [0.8, 0.9])
def test_whoever_asks_to_be_safe_from_slow_noise_is(rho: float) -> None:
    """Improving series of 28 checkpoints, which cannot tell such noise from a slow rise; and what
    rises by twenty times the noise is found all the same."""
    improving = 10 * np.arange(1, 29.0) ** -0.5
    found = decide(improving + noise(rho, 100, 28), rho=0.9)
    assert sum(one.p <= 0.05 for one in found) <= binom.ppf(0.99, 100, 0.05)
    (large,) = decide(turning(20.0, 28)[None] + noise(rho, 1, 28), rho=0.9)
    assert large.kind == "worsens"


def test_rises_beyond_even_slow_noise_are_told_without_asking() -> None:
    slow = noise(0.97, 1, 140, seed=2)
    (large,), (small,) = (decide(turning(rise, 140)[None] + slow) for rise in (50.0, 1.0))
    assert large.rho > saturation.SLOWEST and large.kind == "worsens"
    assert small.rho > saturation.SLOWEST and small.kind == "cannot tell"
    assert "noise is too slow" in small.reason


def test_noise_that_shrinks_along_training_raises_no_alarm() -> None:
    found = decide(noise(0.0, 150) * np.linspace(1.5, 0.75, K))
    assert sum(f.kind == "worsens" for f in found) <= binom.ppf(0.999, 150, 0.05)


def test_power_grows_with_the_rise() -> None:
    """In units of noise; nothing is gained by calling what is there absent."""
    powers = []
    for rise in (2.0, 5.0, 10.0):
        found = decide(turning(rise) + noise(0.0, 60), margin=1.0)
        powers.append(np.mean([f.kind == "worsens" for f in found]))
        assert np.mean([f.kind == "no saturation" for f in found]) < 0.05
    assert powers[0] < powers[1] < powers[2] and powers[1] > 0.5 and powers[2] > 0.95


def test_intervals_cover_the_rise_and_the_onset() -> None:
    """Known to be 5 noises from the sixth checkpoint on; 95 % intervals, 200 series."""
    shape = turning(5.0)
    level = monotone.levels(shape[None])[0]
    found = decide(shape + noise(0.0, 200))
    rise = level[-1] - level.min()
    covered = sum(f.low <= rise <= f.high for f in found)
    assert binom.ppf(0.001, 200, 0.93) <= covered < 200
    assert abs(np.mean([f.rise for f in found]) - rise) < 0.2
    fired = [f for f in found if f.onset is not None]
    turn = STEPS[int(shape.argmin())]
    assert turn == 6000 and len(fired) > 100
    covers = [f.onset_low <= turn <= f.onset_high for f in fired if f.onset_low and f.onset_high]
    assert np.mean(covers) > 0.85
    assert np.mean([f.onset_high - f.onset_low for f in fired if f.onset_low and f.onset_high]) < (
        6000
    )


def test_three_ways_to_decide() -> None:
    flat, rising = 0.001 * noise(0.0, 1)[0], turning(0.1, fall=1.0) + 0.005 * noise(0.0, 1)[0]
    assert saturation.onset(STEPS, flat, margin=0.01, after=0).kind == "no saturation"
    assert saturation.onset(STEPS, flat, margin=0.0001, after=0).kind == "cannot tell"
    assert saturation.onset(STEPS, rising, after=0).kind == "worsens"


@settings(max_examples=20, deadline=None)
@given(st.floats(-5, 5), st.floats(0.01, 100))
def test_unit_and_origin_do_not_matter(origin: float, unit: float) -> None:
    y = turning(5.0) + noise(0.3, 1)[0]
    one = saturation.onset(STEPS, y, after=0)
    other = saturation.onset(STEPS**2, origin + unit * y, after=0)
    assert other.kind == one.kind == "worsens"
    assert other.p == pytest.approx(one.p, rel=0.5)
    assert other.noise == pytest.approx(unit * one.noise, rel=0.2)


def test_one_lucky_or_unlucky_checkpoint_is_no_saturation() -> None:
    improving = 3 + np.linspace(1, 0, K) ** 2 + 0.01 * noise(0.0, 1)[0]
    for at, size in ((K - 3, -0.1), (K - 1, 0.1), (K // 2, -0.1)):
        y = improving.copy()
        y[at] += size
        assert saturation.onset(STEPS, y, after=0).kind != "worsens"


def test_losses_of_single_steps_are_averaged() -> None:
    """As if somebody had averaged them before; the onset is where it was to a two-hundredth."""
    rng, steps = np.random.default_rng(0), np.arange(1, 20_001)
    share = steps / 20_000
    loss = 3 + np.exp(-10 * share) + 0.1 * np.clip(2 * share - 1, 0, None)
    loss += 0.05 * rng.standard_normal(20_000)
    found = saturation.onset(steps, loss, after=0)
    assert found.kind == "worsens" and len(found.steps) == saturation.MOST
    assert found.onset_low is not None and found.onset_high is not None
    assert found.onset_low <= 10_000 <= found.onset_high
    by_hand = saturation.onset(steps[49::100], loss.reshape(200, 100).mean(1), after=0)
    assert found.onset == by_hand.onset and found.p == pytest.approx(by_hand.p)


def test_few_checkpoints_or_slow_noise_tell_nothing() -> None:
    y = turning(10.0)
    few = saturation.onset(STEPS[:7], y[:7], after=0)
    assert few.kind == "cannot tell" and "7 checkpoints" in few.reason
    slow = decide(noise(0.97, 6, 140), margin=100.0)
    assert sum(f.kind == "cannot tell" and "too slow" in f.reason for f in slow) >= 4
    assert all(f.effective == pytest.approx(140 * (1 - f.rho) / (1 + f.rho)) for f in slow)


def test_the_burn_in_is_dropped() -> None:
    y = turning(10.0) + noise(0.0, 1)[0]
    steps = [1, 5, *STEPS]
    found = saturation.onset(steps, [float("inf"), 500.0, *y])
    assert found.steps[0] == 1000 and found.kind == "worsens"
    assert saturation.onset(steps, [9.0, 9.0, *y], after=4000).steps[0] == 4000


def test_a_texts_own_error_stands_against_a_small_rise() -> None:
    """That of unpaired values does not average out over checkpoints."""
    y = turning(10.0) + noise(0.0, 1)[0]
    sure = saturation.onset(STEPS, y, after=0)
    for stderr, kind in ((0.5, "worsens"), (20.0, "cannot tell")):
        found = saturation.onset(STEPS, y, stderr=np.full(K, stderr), after=0)
        assert found.kind == kind and found.p >= sure.p
        assert found.high - found.low > sure.high - sure.low


def test_blocks_are_paired() -> None:
    """Blocks that differ a hundred times as much as checkpoints do hide nothing, where errors
    that know of no blocks hide all."""
    rng = np.random.default_rng(3)
    y = turning(10.0) + noise(0.0, 1)[0]
    blocks = y[:, None] + 100 * rng.standard_normal(64) + rng.standard_normal((K, 64))
    found = saturation.onset(STEPS, blocks=blocks, after=0)
    assert found.kind == "worsens" and found.values == pytest.approx(blocks.mean(1))
    stderr = blocks.std(1, ddof=1) / 8
    hidden = saturation.onset(STEPS, blocks.mean(1), stderr=stderr, after=0)
    assert hidden.kind == "cannot tell"


def test_a_rise_in_few_blocks_is_not_one_of_the_text() -> None:
    """One block of 64 rises, and with it the mean."""
    blocks = np.tile((turning(0.0) + noise(0.0, 1)[0])[:, None], 64)
    blocks[:, 7] += 64 * turning(10.0, fall=0.0)
    assert saturation.onset(STEPS, blocks.mean(1), after=0).kind == "worsens"
    found = saturation.onset(STEPS, blocks=blocks, after=0)
    assert found.kind == "cannot tell" and found.p > 0.05


def test_choosing_the_best_on_the_same_text_raises_no_alarm() -> None:
    """Nothing but the text of each checkpoint differs: 150 series of 16 blocks."""
    rng = np.random.default_rng(4)
    fired = 0
    for _ in range(150):
        blocks = rng.standard_normal(16) + rng.standard_normal((K, 16))
        fired += saturation.onset(STEPS, blocks=blocks, after=0).kind == "worsens"
    assert fired <= binom.ppf(0.999, 150, 0.05)


def test_a_family_tells_its_rho() -> None:
    """Of 30 series that improve or turn: near 0, and near .6."""
    shapes = [np.zeros(K), 10 * np.arange(1, K + 1) ** -0.5, turning(6.0)]
    rhos = []
    for rho in (0.0, 0.6):
        series = [saturation.onset(STEPS, shapes[i % 3] + e, after=0)
                  for i, e in enumerate(noise(rho, 30))]  # fmt: skip
        rhos.append(saturation.together(series)[0].rho)
    assert rhos[0] < 0.2 and 0.3 < rhos[1] < 0.8
    assert saturation.together([]) == []


def test_a_family_of_flat_series_holds_its_level_together() -> None:
    """20 families of 10 at 20 %: alarms in any."""
    flat = decide(noise(0.0, 200))
    families = [flat[i : i + 10] for i in range(0, 200, 10)]
    fired = [any(f.kind == "worsens" for f in saturation.together(s, 0.2)) for s in families]
    assert sum(fired) <= binom.ppf(0.999, 20, 0.2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p: list[float]) -> None:
    """A hypothesis is rejected where all intersections that hold it are (Marcus et al. 1976)."""
    sets = [s for n in range(1, len(p) + 1) for s in combinations(range(len(p)), n)]
    closed = [min(1, max(len(s) * min(p[j] for j in s) for s in sets if i in s))
              for i in range(len(p))]  # fmt: skip
    assert saturation.holm(p) == pytest.approx(closed)


def test_resampled_noise_is_as_it_was_asked_for() -> None:
    rng = np.random.default_rng(0)
    series = saturation.resample(np.arange(50.0), 0.7, 2.0, 4000, rng) - np.arange(50.0)
    assert series.std(0) == pytest.approx(np.full(50, 2.0), rel=0.05)
    pairs = (series[:, 1:] * series[:, :-1]).mean() / (series**2).mean()
    assert pairs == pytest.approx(0.7, abs=0.01)


def test_overfitting_is_a_rise_on_unseen_text_alone() -> None:
    unseen = saturation.onset(STEPS, turning(10.0) + noise(0.0, 1)[0], after=0)
    seen = saturation.onset(STEPS, turning(0.0) + 0.3 * noise(0.0, 1)[0], after=0)
    assert saturation.explain(unseen, seen=seen) == "overfits"
    assert saturation.explain(unseen, seen=unseen) == "worsens" == saturation.explain(unseen)


def test_a_rise_or_a_plateau_under_a_high_rate_is_not_annealed() -> None:
    worse = saturation.onset(STEPS, turning(10.0) + noise(0.0, 1)[0], after=0)
    flat = saturation.onset(STEPS, turning(0.0) + 0.001 * noise(0.0, 1)[0], after=0)
    falling = saturation.onset(STEPS, turning(0.0) - np.arange(K), after=0)
    cosine = 0.55 + 0.45 * np.cos(np.linspace(0, np.pi, K))
    constant, raised = np.ones(K), np.where(np.arange(K) < 9, 0.2, 0.4) + (np.arange(K) < 1)
    for rates in (constant, raised):
        assert saturation.explain(worse, rates=rates) == "not annealed"
    assert saturation.explain(flat, rates=constant) == "not annealed"
    assert saturation.explain(falling, rates=constant) == falling.kind
    assert saturation.explain(worse, rates=cosine) == "worsens"
    assert saturation.explain(flat, rates=cosine) == "no saturation"


def test_a_plateau_ends_above_the_law_and_falls_no_more() -> None:
    flat = saturation.onset(STEPS, 3 + turning(0.0) + 0.001 * noise(0.0, 1)[0], after=0)
    assert saturation.explain(flat, law=(2.8, 2.7, 2.9)) == "plateau"
    assert saturation.explain(flat, law=(2.95, 2.8, 3.1)) == "no saturation"
    falling = saturation.onset(STEPS, np.linspace(5, 3, K) + 0.01 * noise(0.0, 1)[0], after=0)
    assert saturation.explain(falling, law=(2.8, 2.7, 2.9)) == falling.kind == "no saturation"


@pytest.mark.parametrize(
    ("steps", "values", "options", "words"),
    [
        ([1, 2, 2], [1, 2, 3], {}, "strictly"),
        ([1, 2, 3], [1, 2], {}, "one a step"),
        ([10, 20, 30], [1, float("nan"), 3], {}, "step 20"),
        ([1, 2, 3], [1, 2, 3], {"after": 9}, "burn-in"),
        ([], [], {}, "burn-in"),
        ([1, 2, 3], None, {}, "values or blocks"),
        ([1, 2, 3], None, {"blocks": np.ones((3, 2))}, "four or more"),
        ([1, 2, 3], [1, 2, 3], {"stderr": [1, -1, 1]}, "below zero"),
    ],
)
def test_bad_input_is_named(
    steps: list[int], values: list[float], options: dict[str, object], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        saturation.onset(steps, values, **options)  # type: ignore[arg-type]
