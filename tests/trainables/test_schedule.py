import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainables import schedule


def rates(kind: str, steps: int = 1000, warmup: float = 0.01, final: float = 0.1) -> list[float]:
    return [schedule.learning_rate(s, steps, 2.0, kind, warmup, 0.2, final) for s in range(steps)]


def test_cosine_rises_to_its_peak_and_ends_at_its_share() -> None:
    found = rates("cosine")
    assert found[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert found[10] == 2.0 and found[-1] == pytest.approx(0.2)
    middle = (10 + 999) / 2
    assert found[math.floor(middle)] == pytest.approx(1.1, abs=2e-3)
    assert found[10:] == sorted(found[10:], reverse=True)


def test_wsd_is_constant_and_then_cools_down_linearly() -> None:
    found = rates("wsd", final=0.0)
    assert found[10:801] == [2.0] * 791
    assert found[900] == pytest.approx(1.0) and found[-1] == pytest.approx(0.01)


def test_constant_is_constant() -> None:
    assert set(rates("constant")[10:]) == {2.0}


@given(
    steps=st.integers(1, 300),
    kind=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.floats(0, 1),
    cooldown=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_no_rate_is_zero_or_above_the_peak(
    steps: int, kind: str, warmup: float, cooldown: float, final: float
) -> None:
    for step in range(steps):
        rate = schedule.learning_rate(step, steps, 1.0, kind, warmup, cooldown, final)
        assert 0 <= rate <= 1 + 1e-12


def probes(count: int = 8, kind: str = "log", steps: list[int] | None = None) -> dict[str, Any]:
    return {"count": count, "schedule": kind, "steps": steps}


@given(
    steps=st.integers(1, 10**6), count=st.integers(1, 50), kind=st.sampled_from(["log", "linear"])
)
def test_probes_take_in_the_ends_and_keep_to_their_number(
    steps: int, count: int, kind: str
) -> None:
    found = schedule.probe_steps(steps, probes(count, kind))
    assert len(found) <= count and found == sorted(set(found)) and found[-1] == steps
    assert count == 1 or found[0] == 0


def test_probes_are_even_in_the_logarithm() -> None:
    assert schedule.probe_steps(1000, probes(5)) == [0, 1, 10, 100, 1000]


def test_probes_are_even_in_steps_where_asked() -> None:
    assert schedule.probe_steps(1000, probes(5, "linear")) == [0, 250, 500, 750, 1000]


def test_probes_at_given_steps_take_in_the_last() -> None:
    assert schedule.probe_steps(100, probes(steps=[7, 3, 7, 500])) == [3, 7, 100]


def test_a_flat_loss_is_not_measured_and_a_falling_one_is() -> None:
    falling = schedule.Falling(0.1)
    assert not any(falling(3.0) for _ in range(50))
    # Smoothed: 2.9, 2.81, 2.729.
    assert [falling(2.0) for _ in range(3)] == [True, False, True]


def test_steps_are_whole() -> None:
    assert schedule.steps(400_000, 16, 128) == 195
    assert schedule.steps(10, 16, 128) == 1
