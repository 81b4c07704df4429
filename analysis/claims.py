"""What Godey et al. 2024 claim, each beside what records say: agrees, disagrees, cannot tell."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from analysis import bound_figures, dimensions, onsets, shortfall, summary, tables
from analysis.evidence import Evidence
from analysis.onsets import Verdict

AGREES, DISAGREES, CANNOT = "agrees", "disagrees", "cannot tell"
DEPARTS = 0.1  # nats: a gap that Figure 8 would show as leaving the flat part
NEAR = (0.5, 0.7)  # of the W-error .6 beyond which the paper sees losses depart
HALVES = (1000, 2000)  # dimensions, of W-error


@dataclass(frozen=True)
class Claim:
    figure: str
    says: str
    """The paper, in our words, with its number."""
    verdict: str
    found: str
    """The numbers of these records, or why nothing can be said."""


def judge(evidence: Evidence) -> list[Claim]:
    """Each claim, in the paper's order."""
    return [Claim(figure, says, *find(evidence)) for figure, says, find in CLAIMS]


Found = tuple[str, str]


def _only_small(
    wanted: Callable[[Verdict], bool], kind: str, needed: str
) -> Callable[[Evidence], Found]:
    """Whether series of that verdict are there, and none is of the largest model."""

    def find(evidence: Evidence) -> Found:
        series = _by_size(evidence, wanted)
        known = [v for v in series if v.kind != "cannot tell"]
        if len(known) < 2:
            return CANNOT, _why(series, f"{needed} along training of two models or more")
        fell = [v for v in known if v.kind == kind]
        # What decides: the largest, once a smaller one fell; else the smallest, which should have.
        end = _size(series[-1] if fell else series[0])
        if any(_size(v) == end for v in fell):
            return DISAGREES, _each(series)
        if not any(_size(v) == end for v in known):
            return CANNOT, _each(series)
        return (AGREES if fell else DISAGREES), _each(series)

    return find


def _is_entropy(verdict: Verdict) -> bool:
    return verdict.curve.metric == "singular_entropy"


def _short_of_law(kind: str) -> Callable[[Evidence], Found]:
    def find(evidence: Evidence) -> Found:
        if isinstance(evidence.short, str):
            return CANNOT, evidence.short
        row = shortfall.by_kind(evidence.short)[kind]
        low, high = 100 * row["low"], 100 * row["high"]
        found = f"{100 * row['deviation']:+.1f} % [{low:+.1f}, {high:+.1f}], models: {row['count']}"
        return (AGREES if low > 0 else DISAGREES if high < 0 else CANNOT), found

    return find


def _anisotropic(evidence: Evidence) -> Found:
    last = _last(evidence, "anisotropy")
    if len(last) < 2:
        return CANNOT, "the last layer's anisotropy of two sizes is needed"
    (_, first), (_, other) = last[0], last[-1]
    small, large = _plain([last[0][0], last[-1][0]])
    found = f"{small} {first:.2f}, {large} {other:.2f}"
    return (AGREES if first - other > onsets.COLLAPSE["cosine"] else DISAGREES), found


def _together(evidence: Evidence) -> Found:
    losses = {v.curve.model: v for v in evidence.verdicts if v.curve.metric == "loss"}
    pairs = [
        (losses[v.curve.model], v)
        for v in _by_size(evidence, _is_entropy)
        if v.curve.model in losses
    ]
    known = [(a, b) for a, b in pairs if "cannot tell" not in (a.kind, b.kind)]
    fell = [a for a, b in known if b.kind == "collapses"]
    both = [a for a in fell if a.kind == "worsens"]
    harmless = [a for a in fell if a.kind != "worsens"]
    if not fell:
        return CANNOT, "no spectrum surely collapses"
    said = {"the loss worsens": both, "the loss does not worsen": harmless}
    found = "; ".join(
        f"the spectrum collapses, {what}: {_names(_plain([v.curve.model for v in some]))}"
        for what, some in said.items()
        if some
    )
    return (AGREES if both and not harmless else DISAGREES), found


def _low_ranks(evidence: Evidence) -> Found:
    lines, lost = [], []
    for _, one in evidence.frozen:
        heads = one.heads.filter(pl.col("rank").is_not_null(), pl.col("lr").is_not_null())
        first = heads.drop_nulls("gap").sort("rank").head(1)
        if first.height:
            row = first.row(0, named=True)
            lost.append(row["low"] > 0)
            gap = f"{row['gap']:+.2f} nats [{row['low']:+.2f}, {row['high']:+.2f}]"
            lines.append(f"{one.name}: rank {row['rank']} of d = {row['d']} {gap}")
    if not lines:
        return CANNOT, "no heads of low rank on a frozen backbone"
    return (AGREES if all(lost) else DISAGREES), "; ".join(lines)


def _knee(evidence: Evidence) -> Found:
    lines, deep = [], []
    for _, one in evidence.frozen:
        for family, required in one.required.items():
            d = int(one.heads["d"].max() or 0)  # type: ignore[arg-type]
            lines.append(f"{one.name}, {family}: d = {d}, {summary.required(required)}")
            deep.append(d >= HALVES[0])
    if not any(deep):
        return CANNOT, "; ".join([*lines, "no backbone here has 1,000 dimensions"])
    agree = any(r.rank > 512 for _, one in evidence.frozen for r in one.required.values())
    return (AGREES if agree else DISAGREES), "; ".join(lines)


def _halved(evidence: Evidence) -> Found:
    lines, found = [], []
    for directory in evidence.directories:
        samples = dimensions.samples(directory)
        if samples.is_empty() or "halved" not in samples.columns:
            continue
        for row in dimensions.whole(samples).filter(estimate="paper").to_dicts():
            lines.append(f"{row['name']}: {row['halved']:,.0f} of V = {row['vocabulary']:,}")
            if row["vocabulary"] > 8 * HALVES[1]:
                found.append(HALVES[0] <= row["halved"] <= HALVES[1])
    if not found:
        said = "; ".join(lines) or "nothing was counted"
        return CANNOT, f"{said}; a vocabulary of 16,000 or more is needed"
    return (AGREES if all(found) else DISAGREES), "; ".join(lines)


def _departs(evidence: Evidence) -> Found:
    lines, near = [], []
    for directory, one in evidence.frozen:
        both = bound_figures.w_errors(directory, one).drop_nulls("gap")
        for (family,), line in both.group_by("family", maintain_order=True):
            line = line.sort("w_error")
            if line.height > 2 and line["gap"].max() > DEPARTS:  # type: ignore[operator]
                at = float(np.interp(DEPARTS, line["gap"].sort(), line["w_error"]))
                lines.append(f"{one.name}, {family}: {DEPARTS} nats at W-error {at:.2f}")
                near.append(NEAR[0] <= at <= NEAR[1])
    if not lines:
        return CANNOT, "heads on a frozen backbone with the spectrum of its own are needed"
    return (AGREES if all(near) else DISAGREES), "; ".join(lines)


def _tasks(evidence: Evidence) -> Found:
    tasks = [v for v in evidence.verdicts if v.curve.kind == "accuracy"]
    known = [v for v in tasks if v.kind != "cannot tell"]
    if not known:
        return CANNOT, _why(tasks, "tasks of lm-evaluation-harness at many checkpoints")
    worse = [f"{v.curve.model} {v.curve.metric}" for v in known if v.kind == "worsens"]
    found = f"{len(worse)} of {len(known)} tasks worsen: {_names(worse)}"
    return (AGREES if worse else DISAGREES), found


def _by_size(evidence: Evidence, wanted: Callable[[Verdict], bool]) -> list[Verdict]:
    return sorted(filter(wanted, evidence.verdicts), key=_size)


def _size(verdict: Verdict) -> float:
    return verdict.curve.facts.get("N", 0.0)


def _last(evidence: Evidence, metric: str) -> list[tuple[str, float]]:
    """The last value of each model's series, by size."""
    found = _by_size(evidence, lambda v: v.curve.metric == metric)
    return [(v.curve.model, float(v.curve.values[-1])) for v in found]


def _why(verdicts: Sequence[Verdict], needed: str) -> str:
    return _each(verdicts) if verdicts else f"{needed} are needed"


def _each(verdicts: Sequence[Verdict]) -> str:
    """What became of each, and why that is not certain."""
    names = _plain([v.curve.model for v in verdicts])
    reasons = [f" ({v.onset.reason})" if v.kind == "cannot tell" else "" for v in verdicts]
    rows = zip(names, verdicts, reasons, strict=True)
    return _names([f"{name} {v.kind}{reason}" for name, v, reason in rows])


def _plain(names: Sequence[str]) -> list[str]:
    """Without rank and seed, where these do not tell them apart."""
    short = [re.sub(tables.VARIANT, "", name) for name in names]
    return short if len(set(short)) == len(set(names)) else [*names]


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) or "none") + more


CLAIMS: tuple[tuple[str, str, Callable[[Evidence], Found]], ...] = (
    ("1a", "the loss of models up to 160M gets worse late in training, larger ones' does not",
     _only_small(lambda v: v.curve.kind == "loss", "worsens", "held-out losses")),
    ("1b", "final checkpoints of small models are 8 % above the law of the larger ones",
     _short_of_law("final")),
    ("1b", "their best checkpoints are about 4 % above it", _short_of_law("best")),
    ("Table 1", "zero-shot scores of a saturated model fall with it", _tasks),
    ("2", "small models' last layers are anisotropic (.96 to .99), larger ones' not (.15 to .2)",
     _anisotropic),
    ("4, 5", "small models' spectra flatten, then collapse; large ones' do not",
     _only_small(_is_entropy, "collapses", "singular entropies")),
    ("3, 5", "the collapse comes with the saturation", _together),
    ("6", "heads of low rank on a frozen model lose", _low_ranks),
    ("6", "ranks below 1,000 lose noticeably", _knee),
    ("7", "1,000 to 2,000 dimensions halve the W-error of 5-grams", _halved),
    ("8", "losses depart where the W-error of the model's own head passes .6", _departs),
)  # fmt: skip


def table(claims: Sequence[Claim]) -> pl.DataFrame:
    """Figure, claim, verdict, found: a row a claim."""
    rows = [(c.figure, c.says, c.verdict, c.found) for c in claims]
    return pl.DataFrame(rows, ["figure", "the paper says", "verdict", "found here"], orient="row")
