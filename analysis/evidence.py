"""What records have to say, gathered once for the summary, the figures and the paper's claims."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from analysis import onsets, rankgaps, ranks, records, shortfall, tables
from analysis.curves import Curve, of_records
from analysis.onsets import Verdict
from analysis.prediction import Prediction
from analysis.rankgaps import Trained
from analysis.ranks import TOLERANCE, Fitted

JUDGED = 100  # trials whose saturation is decided on; of more, evenly by name


@dataclass(frozen=True)
class Evidence:
    directories: Sequence[Path]
    alive: Sequence[Path]
    """Those of them that hold models seen along training."""
    trained: Sequence[Trained]
    frozen: Sequence[tuple[Path, Fitted]]
    verdicts: Sequence[Verdict]
    looked: str
    """How many trials the verdicts are on, where not on all."""
    short: Prediction | str
    """Of the law, or why it cannot be said."""


def gather(
    directories: Sequence[Path],
    tolerance: float = TOLERANCE,
    preparing: Callable[[str], None] = lambda what: None,
    each: onsets.Each = iter,
) -> Evidence:
    """From sweeps, probes and counts. `tolerance`: nats per token by which a head may fall short.
    `preparing` is told what is done, `each` counts the series that are decided on."""
    kinds = {d: tables.kinds(d) for d in directories}
    alive = [d for d in directories if kinds[d] & tables.ALIVE]
    preparing("losses and laws")
    short = shortfall.shortfall(alive)
    preparing("ranks")
    trained = [one for d in alive for one in rankgaps.trained(d, tolerance)]
    fitted = [d for d in directories if "rankfit" in kinds[d]]
    frozen = [(d, one) for d in fitted for one in ranks.fitted(d, tolerance)]
    preparing("saturation")
    verdicts, looked = judged(alive, each)
    return Evidence(directories, alive, trained, frozen, verdicts, looked, short)


def judged(directories: Sequence[Path], each: onsets.Each = iter) -> tuple[list[Verdict], str]:
    """Of series of losses, heads and hidden states; and how many of the trials were looked at."""
    curves, seen, every = list[Curve](), 0, 0
    for directory in directories:
        trials = records.scan(directory, "trials").filter(pl.col("kind").is_in(list(tables.ALIVE)))
        ids = trials.sort("name", "trial").select("trial").collect()["trial"].to_list()
        some = tables.evenly(ids, JUDGED)
        every, seen = every + len(ids), seen + len(some)
        found = of_records(directory, some)
        if len(directories) > 1:
            found = [replace(c, model=f"{directory.name}: {c.model}") for c in found]
        curves += found
    looked = "" if seen == every else f"{seen} of {every:,} trials"
    return onsets.verdicts(curves, each=each), looked
