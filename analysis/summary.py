"""What the records say, in words with the numbers in them; and what they cannot say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from analysis import dimensions, records
from analysis import shortfall as law
from analysis.onsets import Verdict
from analysis.prediction import Prediction
from analysis.rankgaps import Trained
from analysis.ranks import LEVEL, Fitted, Required

NAMED = 6  # that a sentence names


@dataclass(frozen=True)
class Answer:
    question: str
    lines: tuple[str, ...]


def bottleneck(trained: Sequence[Trained], frozen: Sequence[Fitted]) -> Answer:
    """Does the head bottleneck these models, and up to which rank?"""
    lines = [_trained(one) for one in trained]
    for one in frozen:
        for family, r in one.required.items():
            row = one.heads.filter(pl.col("rank").is_not_null(), family=family).head(1)
            lines.append(
                f"{one.name}, frozen, {family} heads: {required(r)}; rank {row['rank'][0]} costs "
                f"{_nats(row['gap'][0], row['low'][0], row['high'][0])}."
            )
    said = tuple(lines) or ("No head of a low rank was trained beside one of rank d.",)
    return Answer("Is the head a bottleneck, and up to which rank?", said)


def _trained(one: Trained) -> str:
    first, last = one.gaps.row(0, named=True), one.gaps.row(-1, named=True)
    whom = f"a factored head of rank d = {one.d}" if one.factored else f"the full head, d = {one.d}"
    costs = f"rank {first['rank']} costs {_nats(first['gap'], first['low'], first['high'])}"
    if len(one.gaps) > 1:
        costs += f", rank {last['rank']} {_nats(last['gap'], last['low'], last['high'])}"
    answer = f"; {required(one.required)}" if one.required else ""
    return f"{one.name}, trained from scratch, against {whom}: {costs}{answer}."


def required(r: Required) -> str:
    """Which rank, with its interval; censored at the ends of the ranks tried."""
    answer, low, high = map(r.said, (r.rank, r.low, r.high))
    interval = "" if answer == low == high else f" ({100 * LEVEL:.0f} %: {low} to {high})"
    return f"to be within {r.tolerance:g} nats takes rank {answer}{interval}"


def _nats(gap: float | None, low: float | None, high: float | None) -> str:
    if gap is None or low is None or high is None:
        return "an unknown number of nats"
    return f"{gap:+.3f} nats [{low:+.3f}, {high:+.3f}]"


def saturation(verdicts: Sequence[Verdict], looked: str) -> Answer:
    """Which trials saturated, and when?"""
    text = [v for v in verdicts if not v.curve.spectral]
    lines = []
    if looked:
        lines.append(f"{looked} were looked at, evenly by name.")
    kinds = ("worsens", "overfits", "not annealed", "plateau", "recovers")
    for kind in kinds:
        of_kind = [v for v in text if v.kind == kind]
        if of_kind:
            lines.append(f"{len(of_kind)} of {len(text)} series: {kind}: {_named(of_kind)}.")
    for kind in ("no saturation", "cannot tell"):
        if number := sum(v.kind == kind for v in text):
            lines.append(f"{number} of {len(text)} series: {kind}.")
    reasons = {v.onset.reason for v in text if v.kind == "cannot tell" and v.onset.reason}
    lines += [f"Where it cannot be told: {reason}." for reason in sorted(reasons)]
    collapsed = [v for v in verdicts if v.kind == "collapses"]
    if collapsed:
        lines.append(f"{len(collapsed)} spectra or geometries collapse: {_named(collapsed)}.")
    elif any(v.curve.spectral for v in verdicts):
        lines.append("No spectrum and no geometry surely collapses.")
    return Answer(
        "Which models saturated, and when?",
        tuple(lines) or ("No model was measured at two steps or more.",),
    )


def _named(verdicts: Sequence[Verdict]) -> str:
    names = [_onset(v) for v in verdicts[:NAMED]]
    more = len(verdicts) - len(names)
    return "; ".join(names) + (f"; and {more} more" if more else "")


def _onset(verdict: Verdict) -> str:
    name = f"{verdict.curve.model} {verdict.curve.metric}".strip()
    one = verdict.onset
    if one.onset is None or one.onset_low is None or one.onset_high is None:
        return name
    return f"{name} from step {one.onset:,.0f} [{one.onset_low:,.0f}, {one.onset_high:,.0f}]"


def shortfall(found: Prediction | str) -> Answer:
    """How far from the law?"""
    question = "How far do small models fall short of the law of larger ones?"
    if isinstance(found, str):
        return Answer(question, (f"Cannot be told: {found}.",))
    lines = [
        f"{kind} losses: {100 * row['deviation']:+.1f} % "
        f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}] off {found.fit.law.formula}, "
        f"models: {row['count']}."
        for kind, row in law.by_kind(found).items()
    ]
    return Answer(question, (*lines, *(f"Careful: {warning}." for warning in found.warnings)))


def language(directories: Sequence[Path]) -> Answer | None:
    """How many dimensions does the text need?"""
    lines = []
    for directory in directories:
        found = dimensions.samples(directory)
        if found.is_empty() or "halved" not in found.columns:
            continue
        for row in dimensions.whole(found).drop_nulls("halved").to_dicts():
            lines.append(f"{row['name']}: d = {row['halved']:,.0f} halves W-error.")
    return Answer("How many dimensions does the text need?", tuple(lines)) if lines else None


def scope(directories: Sequence[Path]) -> Mapping[str, int]:
    """Trials by status, over all directories."""
    counts: dict[str, int] = {}
    for directory in directories:
        rows = records.scan(directory, "trials").group_by("status").len().collect()
        for status, number in rows.rows():
            counts[status] = counts.get(status, 0) + number
    return counts
