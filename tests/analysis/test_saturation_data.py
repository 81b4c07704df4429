"""The detector on public measurements: which models saturate is known, and which do not."""

from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from analysis import saturation
from analysis.chart import PAPER
from analysis.saturation import Onset

ZERO_SHOT = Path(__file__).parents[3] / "shared" / "reference" / "pythia_v1_zero_shot.csv"
measured = pytest.mark.skipif(
    not ZERO_SHOT.exists(), reason="the public zero-shot evaluations of Pythia are not here"
)

# Loss on the Pile every 5000 steps, read off Figure 1a of Godey et al. 2024 (+-.003 nats).
PILE = {
    "pythia-14m": (
        "4.575 4.4715 4.4343 4.3988 4.3808 4.3942 4.3576 4.3692 4.368 4.3622 "
        "4.3622 4.3779 4.432 4.4372 4.425 4.4401 4.4436 4.4715 4.4378 4.4285 "
        "4.4198 4.3826 4.3622 4.3715 4.3634 4.3622 4.3645 4.3634"
    ),
    "pythia-31m": (
        "4.1326 4.0293 3.9886 3.9745 3.9478 3.9728 3.9397 3.9386 3.9609 3.9321 "
        "3.9353 3.9332 3.9386 3.9423 4.1022 4.0255 4.0076 4.0321 4.0255 4.0071 "
        "3.9962 4.0005 3.994 3.9908 4.0022 4.0283 3.9886 3.9967"
    ),
    "pythia-70m": (
        "3.789 3.6901 3.6511 3.6269 3.6159 3.6093 3.5973 3.5896 3.5918 3.5841 "
        "3.5967 3.5951 3.6258 3.6 3.6269 3.6319 3.6324 3.6709 3.6676 3.6423 "
        "3.639 3.628 3.6258 3.6269 3.6302 3.6324 3.6346 3.6352"
    ),
    "pythia-160m": (
        "3.4684 3.3429 3.294 3.2774 3.2489 3.2571 3.2263 3.2233 3.2143 3.2188 "
        "3.2038 3.2038 3.2083 3.182 3.1767 3.1812 3.1872 3.2271 3.1925 3.1902 "
        "3.2211 3.1977 3.2128 3.2135 3.2173 3.2098 3.2105 3.2353"
    ),
    "pythia-410m": (
        "3.2785 3.1206 3.0526 3.0164 2.9945 2.9726 2.9572 2.9496 2.9309 2.9254 "
        "2.9156 2.9024 2.909 2.8936 2.8893 2.8805 2.8761 2.8783 2.8651 2.8509 "
        "2.8476 2.8454 2.8498 2.8476 2.841 2.841 2.8388 2.8366"
    ),
}


@cache
def pile() -> dict[str, Onset]:
    steps = np.arange(1, 29) * 5000
    return {
        name: saturation.onset(steps, [float(v) for v in losses.split()])
        for name, losses in PILE.items()
    }


def test_three_small_models_worsen_on_the_pile() -> None:
    """By what the paper's table has between best and final loss, or less: its best is the luckiest
    of 28 checkpoints."""
    for name, best, excess in (("31m", 50000, 0.064), ("70m", 50000, 0.051), ("160m", 75000, 0.06)):
        found = pile()[f"pythia-{name}"]
        assert found.kind == "worsens", name
        assert found.onset_low is not None and found.onset_high is not None
        assert found.onset_low <= best <= found.onset_high
        assert 0.5 * excess < found.rise < 1.1 * excess
        assert found.low < excess < found.high + found.noise


def test_a_bump_that_comes_back_is_no_worsening() -> None:
    """14M: from 35k up till 90k, and back at 140k."""
    found = pile()["pythia-14m"]
    assert found.kind == "recovers" and found.p > 0.5 and found.rise < 0.01
    assert found.onset is not None and found.onset < 65000


def test_a_loss_that_falls_to_the_end_does_not_saturate() -> None:
    found = pile()["pythia-410m"]
    assert found.kind == "no saturation" and found.p > 0.5


def test_together_the_same_models_worsen_with_less_doubt() -> None:
    """Five series tell their common rho better than one, and Holm's five-fold price is less."""
    alone = list(pile().values())
    family = saturation.together(alone)
    assert [f.kind for f in family] == [a.kind for a in alone]
    worse = [i for i, f in enumerate(family) if f.kind == "worsens"]
    assert len(worse) == 3 and all(family[i].p < alone[i].p for i in worse)


def test_perplexity_of_wikitext_turns_where_the_paper_shows_it() -> None:
    """Figure 3, 133 checkpoints: minima at 53k, 38k, 46k and 77k; 410M has none."""
    table = pl.read_csv(PAPER / "perplexity.csv", comment_prefix="#")
    for name, turn in (("14m", 53), ("31m", 38), ("70m", 46), ("160m", 77), ("410m", None)):
        series = table.filter(pl.col("model") == f"pythia-{name}").sort("step")
        found = saturation.onset(series["step"].to_numpy(), series["perplexity"].log().to_numpy())
        if turn is None:
            assert found.kind == "no saturation"
            continue
        # 31M is shown from 11k on, after most of its fall: that costs it two digits of p.
        assert found.kind == "worsens" and found.p < (0.02 if name == "31m" else 0.002), name
        assert found.onset is not None and abs(found.onset - 1000 * turn) <= 3000
        assert found.onset_low is not None and found.onset_high is not None
        assert found.onset_low <= 1000 * turn <= found.onset_high <= 81000


@cache
def zero_shot() -> dict[tuple[str, str, str], Onset]:
    """Each model's tasks, as ln perplexity or error rate."""
    ppl = pl.col("metric") == "ppl"
    table = pl.read_csv(ZERO_SHOT, infer_schema_length=None).with_columns(
        loss=pl.when(ppl).then(pl.col("value").log()).otherwise(1 - pl.col("value")),
        error=pl.when(ppl).then(pl.col("stderr") / pl.col("value")).otherwise("stderr"),
    )
    return {
        (str(model), str(task), str(metric)): saturation.onset(
            some["step"].to_numpy(), some["loss"].to_numpy(), stderr=some["error"].to_numpy()
        )
        for (model, task, metric), some in table.sort("step").group_by(
            "model", "task", "metric", maintain_order=True
        )
    }


@measured
def test_each_small_model_alone_worsens_on_lambada() -> None:
    for model in ("pythia-70m", "pythia-160m"):
        for metric in ("ppl", "acc"):
            found = zero_shot()[model, "lambada_openai", metric]
            assert len(found.steps) == 15 and found.kind == "worsens"
            assert found.onset is not None and 43000 <= found.onset <= 73000


@measured
def test_of_all_models_and_tasks_lambada_of_the_small_ones_stands_out() -> None:
    """98 series, errors in any of them at 5 %. The model of 70M on SciQ is the next."""
    series = zero_shot()
    family = dict(zip(series, saturation.together(list(series.values())), strict=True))
    worse = {key for key, found in family.items() if found.kind == "worsens"}
    lambada = {
        (model, "lambada_openai", metric)
        for model in ("pythia-70m", "pythia-160m")
        for metric in ("acc", "ppl")
    }
    assert lambada <= worse <= lambada | {("pythia-70m", "sciq", "acc")}
    assert len(series) == 98


@measured
def test_no_larger_model_worsens_even_alone() -> None:
    """70 series at 5 % each."""
    large = {k: f for k, f in zero_shot().items() if k[0] not in ("pythia-70m", "pythia-160m")}
    assert len(large) == 70
    assert sum(f.kind == "worsens" for f in large.values()) <= 3
    assert not any(f.kind == "worsens" for k, f in large.items() if k[1] == "lambada_openai")


@measured
def test_answers_that_hardly_ever_change_are_no_news() -> None:
    """70M on WSC: 14 of 15 checkpoints the same, one of 104 answers better at one."""
    found = zero_shot()["pythia-70m", "wsc", "acc"]
    assert len(np.unique(found.values)) == 2 and found.kind != "worsens"
    without = saturation.onset(found.steps, found.values)
    assert without.kind != "worsens" and without.p > 0.05
