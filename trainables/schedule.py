"""What happens at which step: learning rates, probes, checkpoints. Steps count from 0."""

import math
from typing import Any


def steps(tokens: int, batch: int, sequence: int) -> int:
    """Whole optimiser steps of batch x sequence tokens; at least one."""
    return max(1, tokens // (batch * sequence))


def learning_rate(
    step: int,
    steps: int,
    peak: float,
    schedule: str,
    warmup: float,
    cooldown: float,
    final: float,
) -> float:
    """The rate at which step `step` (of 0 .. steps - 1) is taken.

    warmup and cooldown are shares of the run, final the last rate as a share of the peak.
    cosine: to final over all that follows the warm-up (Pythia: warmup 0.01, final 0.1).
    wsd: constant, then linear to final over the cool-down (Haegele et al. 2024, 2405.18392).
    constant: constant after the warm-up.
    """
    warm = math.ceil(warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        done = (step - warm) / max(1, steps - 1 - warm)
        return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)
    assert schedule == "wsd"
    cool = math.ceil(cooldown * steps)
    left = min(1.0, (steps - step) / cool) if cool else 1.0
    return peak * (final + (1 - final) * left)


def rate(train: dict[str, Any], step: int, steps: int) -> float:
    """The same from a trial's `train` section."""
    shape = (train["schedule"], train["warmup"], train["cooldown"], train["final_lr"])
    return learning_rate(step, steps, train["lr"], *shape)


def probe_steps(steps: int, wanted: dict[str, Any]) -> list[int]:
    """When to measure, by a trial's `probes` section: at the steps it names and the last; or at
    most `count` times, at 0, `steps` and between them equally apart in log(step) or in step."""
    count = wanted["count"]
    if wanted["steps"] is not None:
        return sorted({*(s for s in wanted["steps"] if s < steps), steps})
    if count < 2:
        return [steps]
    if wanted["schedule"] == "linear":
        return sorted({round(steps * i / (count - 1)) for i in range(count)})
    spread = (round(steps ** (i / (count - 2))) for i in range(count - 1)) if count > 2 else ()
    return sorted({0, *spread, steps})


class Falling:
    """Says when the training loss, smoothed over about ten steps, has fallen by `by` nats since it
    was last measured. `state` is all it knows, for a checkpoint."""

    def __init__(self, by: float | None, state: list[float] | None = None) -> None:
        self.by = by
        self.state = state or [0.0, 0.0, math.inf]  # smoothed sum, its weight, loss when measured

    def __call__(self, loss: float) -> bool:
        """After each step."""
        if self.by is None:
            return False
        total, weight, before = self.state
        total, weight = 0.9 * total + 0.1 * loss, 0.9 * weight + 0.1
        now = total / weight
        fallen = now <= before - self.by
        # Step 0 is measured anyway: the first loss is its.
        self.state = [total, weight, now if fallen or math.isinf(before) else before]
        return fallen and math.isfinite(before)


def every(steps: int, times: int) -> int:
    """The interval, in steps, that divides a run into `times` nearly equal parts."""
    return max(1, math.ceil(steps / max(1, times)))


def hurried(interval: int) -> int:
    """The interval between checkpoints, in steps, while the machine is about to leave."""
    return max(1, interval // 5)
