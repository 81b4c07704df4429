import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from analysis import curves, points, records
from analysis.errors import BadInput

LONG = pl.DataFrame(
    {
        "model": ["a"] * 3 + ["b"] * 3,
        "params": [70] * 3 + [160] * 3,
        "step": [3, 1, 2] * 2,
        "metric": ["acc"] * 3 + ["ppl"] * 3,
        "value": [0.3, 0.1, 0.2, 30.0, 10.0, 20.0],
        "stderr": [0.03, 0.01, 0.02, 3.0, 1.0, 2.0],
    }
)


@pytest.mark.parametrize(
    ("metric", "kind"),
    [
        ("loss", "loss"),
        ("held_out/loss", "loss"),
        ("word_ppl", "perplexity"),
        ("bits_per_byte", "loss"),
        ("acc_norm,none", "accuracy"),
        ("sciq/acc", "accuracy"),
        ("kl_sigma_uniform_nats", "entropy"),
        ("singular_entropy_functional", "entropy"),
        ("last_layer_anisotropy", "cosine"),
        ("effective_rank_centred", "rank"),
        ("lossy", None),
        ("weather", None),
    ],
)
def test_a_metrics_name_says_what_it_is(metric: str, kind: str | None) -> None:
    assert curves.kind(metric) == kind


def test_a_long_table_holds_a_series_for_each_model_and_metric() -> None:
    a, b = curves.of_table(LONG, {})
    assert (a.model, a.metric, a.kind) == ("a", "acc", "accuracy")
    assert a.steps.tolist() == [1, 2, 3] and a.values.tolist() == [0.1, 0.2, 0.3]
    np.testing.assert_allclose(a.worse(), [0.9, 0.8, 0.7])
    np.testing.assert_allclose(a.error(), [0.01, 0.02, 0.03])
    np.testing.assert_allclose(b.worse(), np.log([10, 20, 30]))
    np.testing.assert_allclose(b.error(), [0.1, 0.1, 0.1])
    assert b.facts["N"] == 160


def test_what_was_not_measured_is_left_out() -> None:
    value = pl.when(pl.col("step") != 2).then("value")
    a, _ = curves.of_table(LONG.with_columns(value=value), {})
    assert a.steps.tolist() == [1, 3] and a.values.tolist() == [0.1, 0.3]


def test_percents_are_shares() -> None:
    percent = LONG.head(3).with_columns(pl.col("value", "stderr") * 100)
    (found,) = curves.of_table(percent, {})
    np.testing.assert_allclose(found.worse(), [0.9, 0.8, 0.7])
    np.testing.assert_allclose(found.error(), [0.01, 0.02, 0.03])


def test_a_wide_table_holds_a_series_for_each_column_that_is_a_metric() -> None:
    found = curves.of_table(points.read(Path("perplexity.csv")), {})
    assert {c.kind for c in found} == {"perplexity", "cosine"}
    assert len({(c.model, c.kind) for c in found}) == len(found) == 10


def test_columns_of_other_names_are_told() -> None:
    other = LONG.rename({"step": "at", "value": "weather"}).drop("metric")
    found = curves.of_table(other, {"step": "at", "value": "weather"}, better="lower")
    assert [c.metric for c in found] == ["weather"] * 2
    text = LONG.with_columns(step="step" + pl.col("step").cast(pl.String))
    assert curves.of_table(text, {})[0].steps.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (LONG.drop("step"), "no column for step among model,"),
        (LONG.drop("value", "metric", "stderr"), "no column is a metric by its name"),
        (LONG.with_columns(metric=pl.lit("weather")), "is a lower weather better, or a higher?"),
        (pl.concat([LONG, LONG.tail(1)]), "b ppl: step 2 is there more than once"),
        (LONG.with_columns(value=0.0), "b ppl: must be above 0"),
        (LONG.with_columns(value=float("nan")), "a acc: no number at step 1"),
        (LONG.with_columns(value=None), "a acc: has no number"),
    ],
)
def test_what_is_no_series_is_refused_in_a_line(table: pl.DataFrame, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        curves.of_table(table, {})
    assert "\n" not in str(caught.value)


def test_records_give_losses_by_the_blocks_that_every_step_saw(tmp_path: Path) -> None:
    trial = dict.fromkeys(records.TABLES["trials"]) | {"trial": "t", "name": "n", "params": 9}
    records.write(tmp_path, "trials", "t", 2, [trial])
    blocks = [
        {
            "trial": "t",
            "step": step,
            "split": "held_out",
            "block": block,
            "loss": 4.0 - step + block,
        }
        for step, count in ((0, 2), (1, 2), (2, 5))  # the last probe sees more
        for block in range(count)
    ]
    records.write(tmp_path, "blocks", "t", 2, blocks)
    empty = dict.fromkeys(records.TABLES["scalars"]) | {"trial": "t", "tokens": 300, "time": 0}
    rows = [
        empty | {"step": step, "split": "", "metric": "singular_entropy", "value": 1.0 + step}
        for step in range(3)
    ]
    rows += [
        empty | {"step": step, "split": "train", "metric": "learning_rate", "value": 0.1 / step}
        for step in (1, 2)
    ]
    records.write(tmp_path, "scalars", "t", 2, rows)
    loss, entropy = curves.of_records(tmp_path)
    assert loss.rates is not None and loss.rates.tolist() == [0.1, 0.1, 0.05]
    assert (loss.model, loss.metric, loss.kind) == ("n", "loss", "loss")
    assert loss.blocks is not None and loss.blocks.tolist() == [[4, 5], [3, 4], [2, 3]]
    assert loss.values.tolist() == [4.5, 3.5, 2.5]
    assert entropy.values.tolist() == [1, 2, 3] and entropy.facts == {"N": 9, "D": 300}
