"""Where series turn: Figure 3's story, a panel a series."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis import atomic
from analysis.chart import STYLES
from analysis.onsets import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = 24
COLUMNS = 4
ORDER = ("worsens", "overfits", "not annealed", "recovers", "collapses", "plateau")
COLOURS = {"no saturation": STYLES[2][0], "cannot tell": "0.5", "recovers": STYLES[4][0]}


def onsets(verdicts: Sequence[Verdict], path: Path) -> Path:
    """Each series with its fit, its best point, and its onset with the interval: those that turn
    first, PANELS at most."""
    from matplotlib.figure import Figure

    def turning(verdict: Verdict) -> int:
        return ORDER.index(verdict.kind) if verdict.kind in ORDER else len(ORDER)

    shown = sorted(verdicts, key=turning)[:PANELS]
    # Of a model all series side by side.
    models = list(dict.fromkeys(v.curve.model for v in shown))
    shown.sort(key=lambda v: models.index(v.curve.model))
    columns = min(COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(shown) :]:
        axes.remove()
    for axes, verdict in zip(grid, shown, strict=False):
        _panel(axes, verdict)
    if len(shown) < len(verdicts):
        figure.suptitle(f"{len(shown)} of {len(verdicts)} series", fontsize="medium")
    atomic.write(path, lambda partial: figure.savefig(partial, format="png", dpi=130))
    return path


def _panel(axes: "Axes", verdict: Verdict) -> None:
    from matplotlib.ticker import EngFormatter

    curve, found = verdict.curve, verdict.onset
    colour = COLOURS.get(verdict.kind, STYLES[1][0])
    axes.plot(curve.steps, curve.values, ".", color="0.6", markersize=3, zorder=1, rasterized=True)
    axes.plot(found.steps, curve.back(found.fitted), color=colour, linewidth=1.2)
    best = curve.back(np.array([found.best]))
    axes.plot([found.best_step], best, "*", color="black", markersize=7, zorder=3)
    if found.onset is not None and found.onset_low is not None and found.onset_high is not None:
        axes.axvspan(found.onset_low, found.onset_high, color=colour, alpha=0.15, linewidth=0)
        axes.axvline(found.onset, color=colour, linewidth=0.8, linestyle="--")
    # The steep beginning is not what the panel is about.
    late = curve.values[curve.steps >= found.steps[0] + 0.05 * np.ptp(found.steps)]
    room = 0.1 * (np.ptp(late) or 1.0)
    axes.set_ylim(late.min() - room, late.max() + room)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(f"{curve.model}, {curve.metric}\n{verdict.kind}", fontsize="x-small")
    axes.tick_params(labelsize="x-small")
    axes.spines[["top", "right"]].set_visible(False)
