"""Time and error of exact anisotropy:  python benchmarks/anisotropy.py

The mean cosine over all pairs of 50,000 hidden states of d = 768 in fp32, with their standard
errors: lmsat's, which streams past them once and gathers what it needs for dimensions, too; the
sum of directions alone, without those or an interval; and the definition, n^2 products in chunks,
in fp32 and in float64. The least of several repeats; the definition runs once. Checked: lmsat's
is the definition's in float64 to 1e-6.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from analysis import geometry

BLOCKS, SEQUENCE, D, CHUNK, REPEATS = 200, 250, 768, 1000, 7


def streamed(hidden: Tensor, dimensions: bool) -> float:
    states = geometry.States(D, hidden.device)
    for batch in hidden.split(8):
        states.update(batch)
    if dimensions:
        geometry.dimensions(states)
    return geometry.anisotropy(states)["anisotropy"].value


def directions(hidden: Tensor) -> float:
    total, n = torch.zeros(D, dtype=torch.float64), BLOCKS * SEQUENCE
    for batch in hidden.split(8):
        total += torch.nn.functional.normalize(batch.double(), dim=-1).sum((0, 1))
    return ((total @ total - n) / (n**2 - n)).item()


def pairwise(hidden: Tensor, dtype: torch.dtype) -> float:
    unit = torch.nn.functional.normalize(hidden.flatten(0, 1).to(dtype), dim=-1)
    n = len(unit)
    total = sum((part @ unit.T).sum(dtype=torch.float64).item() for part in unit.split(CHUNK))
    return (total - n) / (n**2 - n)


def timed(measure: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Seconds, and what was measured."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        value = measure()
        seconds.append(time.perf_counter() - began)
    return min(seconds), value


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BLOCKS, SEQUENCE, D, generator=generator) + torch.linspace(0, 1, D)
    found = {
        "lmsat": timed(lambda: streamed(hidden, dimensions=False), REPEATS),
        "lmsat with dimensions": timed(lambda: streamed(hidden, dimensions=True), REPEATS),
        "directions alone": timed(lambda: directions(hidden), REPEATS),
        "pairwise fp32": timed(lambda: pairwise(hidden, torch.float32), 1),
        "pairwise float64": timed(lambda: pairwise(hidden, torch.float64), 1),
    }
    exact = found["pairwise float64"][1]
    for name, (seconds, value) in found.items():
        ratios = " ".join(
            f"{found[f'pairwise {kind}'][0] / seconds:6.1f} x {kind}"
            for kind in ("fp32", "float64")
        )
        print(f"{name:22} {seconds:7.2f} s  {ratios}  error {abs(value - exact):.0e}")
    assert abs(found["lmsat"][1] - exact) < 1e-6


if __name__ == "__main__":
    main()
