import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orchestrator import packs, search


def trial(lr: float, group: str = "s", beyond: int = 0, **more: Any) -> dict[str, Any]:
    head = {"kind": "linear", "rank": 4}
    base = {"kind": "rankfit", "head": head, "search": group, "beyond": beyond, "extend": 2}
    return {**base, "id": f"{group}-{lr}", "train": {"lr": lr}, **more}


def rates(found: Any) -> list[tuple[str, float, float]]:
    return [(t["search"], rate, t["beyond"]) for t, rate in found]


def test_a_best_rate_on_the_edge_is_gone_beyond() -> None:
    some = [trial(1e-3), trial(1e-2), trial(3e-3)]
    low = {"s-0.001": 1.0, "s-0.003": 2.0, "s-0.01": 3.0}
    assert rates(search.extended(some, low)) == [("s", 3.33e-4, -1)]
    high = {"s-0.001": 3.0, "s-0.003": 2.0, "s-0.01": 1.0}
    assert rates(search.extended(some, high)) == [("s", 0.0333, 1)]
    inside = {"s-0.001": 3.0, "s-0.003": 1.0, "s-0.01": 2.0}
    assert rates(search.extended(some, inside)) == []


def test_each_end_is_extended_so_often_and_no_more() -> None:
    some = [trial(1e-3), trial(1e-2)]
    losses = {"s-0.001": 9.0, "s-0.01": 5.0}
    tried = []
    while found := list(search.extended(some, losses)):
        ((edge, rate),) = found
        tried.append(rate)
        some.append(trial(rate, beyond=edge["beyond"]))
        losses[some[-1]["id"]] = 5.0 - len(tried)
    assert tried == [0.1, 1.0]


def test_a_search_waits_for_all_its_trials_and_gives_up_where_all_diverge() -> None:
    some = [trial(1e-3), trial(1e-2), trial(1e-3, "other"), trial(1e-2, "other")]
    losses = {"s-0.001": 1.0, "other-0.001": math.inf, "other-0.01": math.inf}
    assert rates(search.extended(some, losses)) == []
    diverged = {**losses, "s-0.01": math.inf}
    assert rates(search.extended(some, diverged)) == [("s", 1e-4, -1)]


def test_what_is_not_searched_is_left_alone() -> None:
    own = trial(1e-3, head={"kind": "own", "rank": None}, search=None)
    scratch = [trial(1e-3, "p", kind="pretrain"), trial(1e-2, "p", kind="pretrain")]
    losses = {t["id"]: 1.0 for t in [own, *scratch, trial(1e-3)]}
    assert rates(search.extended([own, *scratch, trial(1e-3)], losses)) == []


@given(st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 50), max_size=20))
def test_packs_hold_every_trial_once_and_fit(sizes: dict[str, int]) -> None:
    room = 60
    found = packs.split(sizes, room)
    assert sorted(i for pack in found for i in pack) == sorted(sizes)
    assert all(pack and sum(sizes[i] for i in pack) <= room for pack in found)
    # First fit leaves no two packs that one could hold.
    totals = sorted(sum(sizes[i] for i in pack) for pack in found)
    assert len(totals) < 2 or totals[0] + totals[1] > room


def test_a_trial_too_large_for_any_pack_is_alone() -> None:
    assert packs.split({"a": 100, "b": 10, "c": 5}, 20) == [["a"], ["b", "c"]]
