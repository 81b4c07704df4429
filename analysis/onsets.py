"""What became of many series: which saturate, from when on, and what collapses before or after.

One row a series; decided together, so that errors in any of them stay at the level asked for.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from analysis import association, leads, saturation
from analysis.curves import SEEN, Array, Curve
from analysis.errors import BadInput
from analysis.saturation import Onset

Law = tuple[float, float, float]
Each = Callable[[Sequence[Curve]], Iterable[Curve]]
# A smaller rise of a spectral series is no collapse: S doubled, a rank halved, a cosine up by .3.
COLLAPSE = {"entropy": math.log(2), "rank": math.log(2), "cosine": 0.3}


@dataclass(frozen=True)
class Verdict:
    curve: Curve
    onset: Onset
    kind: str
    """worsens, recovers, overfits, plateau, not annealed, no saturation, cannot tell; of spectra
    collapses or, less than COLLAPSE, rises."""
    p: float
    """Of the onset, adjusted for the number of series (Holm)."""


def verdicts(
    curves: Sequence[Curve],
    level: float = 0.05,
    margin: float = 0.01,
    after: float | None = None,
    rho: float | None = None,
    laws: Mapping[str, Law] | None = None,
    each: Each = iter,
) -> list[Verdict]:
    """Of each series but those of seen text, which tell overfitting. level: of false alarms, over
    all series of text and over all of spectra. rho: of noise, see `saturation.onset`. laws: by
    model, the loss at its last step that a law predicts, with an interval. each: to count them."""
    found = []
    seen = {c.model: c for c in curves if c.metric == SEEN}
    judged = [c for c in curves if c.metric != SEEN]
    spectra = list(dict.fromkeys(c.metric for c in judged if c.spectral))
    # Noise is alike within all text, and within each spectral metric.
    families = [(level, [c for c in judged if not c.spectral])]
    families += [
        (level / len(spectra), [c for c in judged if c.metric == metric]) for metric in spectra
    ]
    for share, family in families:
        onsets = saturation.together(
            [_onset(c, share, margin, after, rho) for c in each(family)], share, rho
        )
        adjusted = saturation.holm([one.p for one in onsets])
        for curve, one, p in zip(family, onsets, adjusted, strict=True):
            kind = one.kind
            if curve.spectral and kind == "worsens":
                kind = "collapses" if one.rise >= COLLAPSE[curve.kind] else "rises"
            if not curve.spectral:
                other = seen.get(curve.model) if curve.metric == "loss" else None
                kind = saturation.explain(
                    one,
                    seen=_onset(other, share, margin, after, rho) if other else None,
                    law=_beyond(laws, curve, margin),
                    rates=_rates(curve, one),
                )
            found.append(Verdict(curve, one, kind, min(1.0, float(p) * level / share)))
    return found


def _onset(
    curve: Curve, level: float, margin: float, after: float | None, rho: float | None
) -> Onset:
    return saturation.onset(
        curve.steps,
        None if curve.blocks is not None else curve.worse(),
        stderr=curve.error(),
        blocks=curve.blocks,
        level=level,
        margin=margin,
        after=after,
        rho=rho,
    )


def _beyond(laws: Mapping[str, Law] | None, curve: Curve, margin: float) -> Law | None:
    """What a law says of a curve's end, short of it by more than what would not matter."""
    if curve.kind != "loss" or laws is None or curve.model not in laws:
        return None
    value, low, high = laws[curve.model]
    return value, low, high + margin


def _rates(curve: Curve, onset: Onset) -> Array | None:
    if curve.rates is None:
        return None
    return curve.rates[np.isin(curve.steps, onset.steps)]


def lags(found: Sequence[Verdict]) -> pl.DataFrame:
    """`leads.leads` of each model's spectra against its loss (else perplexity): the same columns
    after model, spectrum and loss; and `order`, what they come to."""
    texts = {v.curve.model: v for v in found if v.curve.kind in ("perplexity", "loss")}
    tables = []
    for verdict in found:
        curve, loss = verdict.curve, texts.get(verdict.curve.model)
        if curve.kind not in ("entropy", "cosine") or loss is None:
            continue
        levels = leads.ENTROPY if curve.kind == "entropy" else leads.ANISOTROPY
        relative = curve.kind == "entropy"
        table = leads.leads(verdict.onset, loss.onset, levels, relative=relative)
        names = {"model": curve.model, "spectrum": curve.metric, "loss": loss.curve.metric}
        marked = table.with_columns(**{k: pl.lit(v) for k, v in names.items()})
        tables.append(
            marked.select(*names, *table.columns).with_columns(order=pl.lit(leads.order(table)))
        )
    return pl.concat(tables) if tables else pl.DataFrame()


def runs(found: Sequence[Verdict]) -> pl.DataFrame:
    """One row a model: its facts, the `rise` of its loss above its best, and the last value of
    each spectral series by its metric."""
    rows: dict[str, dict[str, Any]] = {}
    for verdict in found:
        curve, row = verdict.curve, rows.setdefault(verdict.curve.model, {})
        row |= {"model": curve.model, **curve.facts}
        if curve.spectral:
            row[curve.metric] = float(curve.values[-1])
        elif curve.kind in ("loss", "perplexity"):
            row["rise"] = verdict.onset.rise
    table = pl.DataFrame(list(rows.values()), infer_schema_length=None)
    return table.with_columns(pl.selectors.float().fill_nan(None))


def associations(
    table: pl.DataFrame, spectra: Sequence[str], covariates: Sequence[str]
) -> dict[str, association.Association | str]:
    """By spectral metric: how its last value goes with the rise of the loss over `runs`; or why
    that cannot be said."""
    found: dict[str, association.Association | str] = {}
    for name in spectra:
        kept = table.drop_nulls([name, "rise"]) if "rise" in table.columns else table.clear()
        try:
            found[name] = association.correlation(kept, name, "rise", list(covariates))
        except BadInput as error:
            found[name] = str(error)
    return found


def as_json(
    found: Sequence[Verdict],
    lags: pl.DataFrame,
    together: Mapping[str, association.Association | str],
) -> dict[str, Any]:
    """All of it, for machines."""
    numbers = "best_step best final rise low high onset onset_low onset_high rho noise effective"
    return {
        "series": [
            {
                "model": v.curve.model,
                "metric": v.curve.metric,
                "kind": v.kind,
                "reason": v.onset.reason,
                "p": v.onset.p,
                "p_adjusted": v.p,
                "checkpoints": len(v.onset.steps),
                **{name: getattr(v.onset, name) for name in numbers.split()},
            }
            for v in found
        ],
        "lags": lags.to_dicts(),
        "over_runs": {
            k: one if isinstance(one, str) else asdict(one) for k, one in together.items()
        },
    }
