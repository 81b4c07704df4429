"""What the report says, of worlds whose answers are known."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from analysis import (
    chart,
    claims,
    comparison,
    evidence,
    rankgaps,
    records,
    report,
    shortfall,
    summary,
    webpage,
)
from analysis.prediction import Prediction
from tests import kinds


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made") / "pretrain"
    kinds.pretrain(made)
    return made


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return kinds.every(tmp_path_factory.mktemp("every"))


@pytest.fixture(scope="module")
def made(every: list[Path]) -> webpage.Report:
    return report.make(evidence.gather(every), paper=True)


def test_gaps_of_trained_heads_are_those_of_the_world(sweep: Path) -> None:
    found = rankgaps.trained(sweep)
    assert [one.name for one in found] == [f"nano-{d}" for d in kinds.WIDTHS]
    for one in found:
        assert one.factored and one.gaps["seeds"].to_list() == [2, 2]
        gaps = dict(one.gaps.select("rank", "gap").rows())
        assert gaps == {r: pytest.approx(g, abs=1e-9) for r, g in kinds.GAPS.items()}
        # Noise of .02 a block and head, blocks' own difficulty of .5 cancelled.
        width = (one.gaps["high"] - one.gaps["low"]).to_numpy()
        expected = 2 * 1.96 * 0.02 * math.sqrt(2) / math.sqrt(2 * kinds.BLOCKS)
        assert width == pytest.approx(expected, rel=0.6) and (width < 0.03).all()
        assert one.required is not None and one.required.at_least == 4
        # Between 8 and d, straight in log r from .1 to 0.
        share = 1 - 0.02 / kinds.GAPS[8]
        expected_rank = math.ceil(math.exp(math.log(8) + share * math.log(one.d / 8)) - 1e-9)
        assert one.required.rank == pytest.approx(expected_rank, abs=1)


def test_without_a_factored_head_of_rank_d_the_full_one_is_the_measure(tmp_path: Path) -> None:
    kinds.pretrain(tmp_path, (0,))
    rows = pl.read_parquet(tmp_path / "records" / "trials" / "all" / "000000000000.parquet")
    kept = rows.filter(pl.col("rank").is_null() | (pl.col("rank") < pl.col("d")))
    kept.write_parquet(tmp_path / "records" / "trials" / "all" / "000000000000.parquet")
    assert not any(one.factored for one in rankgaps.trained(tmp_path))
    lines = summary.bottleneck(rankgaps.trained(tmp_path), []).lines
    assert "against the full head, d = 16: rank 4 costs +0.400 nats" in lines[0]


def test_small_models_fall_short_of_the_law_by_what_the_world_says(sweep: Path) -> None:
    found = shortfall.shortfall([sweep])
    assert isinstance(found, Prediction)
    constants = found.fit.constants
    assert constants["a"] == pytest.approx(kinds.ALPHA, rel=0.01)
    assert constants["E"] == pytest.approx(kinds.E, rel=0.01)
    means = {row["points"]: row["deviation"] for row in found.means.to_dicts()}
    rises = [kinds.RISE * (d == 16) / (kinds.end(d) / (1 + kinds.SHORT)) for d in kinds.SMALL]
    final = np.mean([kinds.SHORT + rise for rise in rises])
    (last,) = (value for points, value in means.items() if "final" in points)
    (best,) = (value for points, value in means.items() if "best" in points)
    assert last == pytest.approx(final, abs=0.002) and best == pytest.approx(0.08, abs=0.002)


def test_what_saturates_is_named_with_its_onset(made: webpage.Report) -> None:
    (answer,) = (a for a in made.answers if "saturated" in a.question)
    worse, *rest = answer.lines
    assert worse.startswith("4 of 25 series: worsens: ")
    for rank in ("4", "8", "16", "full"):
        found = re.search(rf"pretrain: nano-16 r={rank} s=0 loss from step ([\d,]+) \[", worse)
        assert found and abs(int(found[1].replace(",", "")) - kinds.TURN) <= 300
    assert any("no saturation" in line for line in rest)


def test_of_very_many_trials_some_are_judged_and_the_report_says_so(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "JUDGED", 5)
    verdicts, looked = evidence.judged([sweep])
    assert len({v.curve.model for v in verdicts}) == 5 and looked == "5 of 48 trials"
    assert "5 of 48 trials were looked at" in summary.saturation(verdicts, looked).lines[0]


def test_records_of_every_kind_give_every_figure(made: webpage.Report) -> None:
    numbers = [c.number for c in made.charts]
    assert set(numbers) == {
        "Figure 1a", "Figure 1b", "Figure 2", "Figure 3", "Figure 4", "Figure 5",
        "Figures 6 and 9", "Figure 7", "Figure 8", "",
    }  # fmt: skip
    assert made.missing == {}
    (table,) = (t for t in made.tables if t.title.startswith("Table 1"))
    (row,) = table.rows.to_dicts()
    assert row["metric"] == kinds.TASK
    assert (row["best"], row["final"]) == ("0.8 at step 20", "0.7 at step 30")
    questions = [a.question for a in made.answers]
    assert len(questions) == 4 and "How many dimensions does the text need?" in questions


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    kinds.dimension(tmp_path)
    alone = report.make(evidence.gather([tmp_path]))
    assert [c.number for c in alone.charts] == ["Figure 7"]
    assert len(alone.missing) == 9 and "rankfit" in alone.missing["Figure 8"]
    assert "there is" not in alone.missing["Figure 1b"]
    page = webpage.page(alone)
    assert all(f"<li>{figure}: " in page for figure in alone.missing)


def test_a_name_is_text_on_the_page(made: webpage.Report) -> None:
    page = webpage.page(made)
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    # Nothing but what is written there: no address that a browser would follow by itself.
    own = page.replace(re.search(r"<script>/\*\*.*?</script>", page, re.S)[0], "")  # type: ignore[index]
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", own)


def test_every_plotted_number_is_in_the_csv_and_on_the_page(
    made: webpage.Report, tmp_path: Path
) -> None:
    page = webpage.page(made)
    data = json.loads(re.search(r'id="charts">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    for one in made.charts:
        read = pl.read_csv(chart.write_csv(one, tmp_path / "c.csv"), infer_schema_length=None)
        assert read["y"].to_numpy() == pytest.approx(one.points["y"].to_numpy())
        shown = sum(chart.shown(one.points, panel).height for panel in one.panels)
        cells = one.points["kind"].eq("cells").any()
        drawn = sum(
            sum(map(len, trace["customdata"])) if cells else len(trace["x"])
            for plot in data[one.name]["plots"]
            for trace in plot["traces"]
            if cells or trace.get("line", {}).get("dash") != "dash" or "marker" in trace
        )
        levels = one.points.filter(kind="level").height
        assert drawn == shown - levels


def test_two_sweeps_are_compared_block_by_block(sweep: Path, tmp_path: Path) -> None:
    kinds.pretrain(tmp_path, moved=0.05)
    found = comparison.compare(sweep, tmp_path)
    assert found.trials.height == 48 and found.trials["paired"].all()
    assert found.trials["difference"].to_numpy() == pytest.approx(0.05, abs=1e-9)
    # The same noise on both sides: a difference without any.
    assert (found.trials["high"] - found.trials["low"]).max() < 1e-6  # type: ignore[operator]
    assert found.mean is not None and found.mean == pytest.approx((0.05, 0.05, 0.05), abs=1e-9)
    assert (found.only_first, found.only_second) == ([], [])


def test_other_text_is_compared_without_pairs(sweep: Path, tmp_path: Path) -> None:
    kinds.pretrain(tmp_path, (0,), moved=0.05)
    file = tmp_path / "records" / "scalars" / "all" / "000000000000.parquet"
    rows = pl.read_parquet(file)
    other = pl.when(pl.col("metric") == "unigram_loss").then(7.0).otherwise("value")
    rows.with_columns(value=other).write_parquet(file)
    found = comparison.compare(sweep, tmp_path)
    assert found.trials.height == 24 and not found.trials["paired"].any()
    assert len(found.only_first) == 24 and found.only_second == []
    width = (found.trials["high"] - found.trials["low"]).to_numpy()
    assert width == pytest.approx(2 * 1.96 * 0.5 * math.sqrt(2 / kinds.BLOCKS), rel=0.4)


def test_claims_are_judged_by_what_the_world_is(
    every: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest model worsens, every spectrum collapses but the probed one's, of which three
    checkpoints tell nothing, no layer differs, two fall short."""
    monkeypatch.setattr(evidence, "JUDGED", 12)
    found = {c.says: (c.verdict, c.found) for c in claims.judge(evidence.gather(every))}
    verdicts = [verdict for verdict, _ in found.values()]
    assert verdicts == [
        "agrees", "agrees", "agrees", "cannot tell", "disagrees", "cannot tell", "disagrees",
        "agrees", "cannot tell", "cannot tell", "disagrees",
    ]  # fmt: skip
    (at,) = (numbers for says, (_, numbers) in found.items() if "W-error of the model's" in says)
    assert re.fullmatch(r"m, linear: 0\.1 nats at W-error 0\.\d\d", at)
    (low,) = (numbers for says, (_, numbers) in found.items() if "low rank on a frozen" in says)
    assert low.startswith("m: rank 4 of d = 32 +0.")
    (both,) = (numbers for says, (_, numbers) in found.items() if "comes with" in says)
    worsens, harmless = both.split("; ")
    assert worsens.startswith("the spectrum collapses, the loss worsens: pretrain: nano-16 r=")
    assert harmless.startswith("the spectrum collapses, the loss does not worsen: pretrain: nano-")
    assert "nano-16" not in harmless and "nano-32" not in worsens


@pytest.mark.parametrize(
    ("kinds_by_size", "verdict"),
    [
        (("worsens", "no saturation", "no saturation"), "agrees"),
        (("worsens", "cannot tell", "no saturation"), "agrees"),
        (("cannot tell", "worsens", "no saturation"), "agrees"),
        (("worsens", "worsens", "cannot tell"), "cannot tell"),
        (("worsens", "no saturation", "worsens"), "disagrees"),
        (("no saturation", "no saturation", "cannot tell"), "disagrees"),
        (("cannot tell", "no saturation", "no saturation"), "cannot tell"),
        (("worsens", "cannot tell", "cannot tell"), "cannot tell"),
    ],
)
def test_what_is_not_known_of_the_ends_decides_nothing(
    every: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    kinds_by_size: tuple[str, ...],
    verdict: str,
) -> None:
    """Of the smallest where none worsens, of the largest where one does."""
    monkeypatch.setattr(evidence, "JUDGED", 2)
    known = evidence.gather(every[:1])
    loss = next(v for v in known.verdicts if v.curve.kind == "loss" and not v.curve.spectral)
    made = [
        replace(loss, kind=kind, curve=replace(loss.curve, model=f"m{n}", facts={"N": float(n)}))
        for n, kind in enumerate(kinds_by_size)
    ]
    found = claims.judge(replace(known, verdicts=made))
    assert found[0].verdict == verdict
    assert "m0" in found[0].found and "m2" in found[0].found


def test_without_evidence_no_claim_is_judged(tmp_path: Path) -> None:
    records.write(tmp_path, "trials", "t", 0, [])
    judged = claims.judge(evidence.gather([tmp_path]))
    assert {c.verdict for c in judged} == {"cannot tell"} and len(judged) == 11
    assert all(c.found for c in judged)
