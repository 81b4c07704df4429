"""Time and error of a head's singular values:  python benchmarks/head_spectrum.py

Heads of Pythia's vocabulary (V = 50304) in fp32, Gaussian with columns that differ a hundredfold in
scale and are then rotated, which makes their condition number about a hundred: lmsat's, torch.svd
(the call of pico-analyze's condition number) and torch.linalg.svdvals, in fp32 and in float64. The
least of several repeats in turn, so that what else the machine does falls on all alike. Checked:
lmsat's relative error, the largest of all singular values, is below 1e-9 of LAPACK's in float64
as SciPy has it.
"""

import time
from collections.abc import Callable

import scipy.linalg
import torch
from torch import Tensor

from analysis import spectrum

VOCABULARY, SIZES, REPEATS, SPREAD = 50304, (128, 512, 768), 5, 100

CONTENDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "lmsat": spectrum.singular_values,
    "torch.svd fp32": lambda w: torch.svd(w).S,
    "svdvals fp32": torch.linalg.svdvals,
    "svdvals float64": lambda w: torch.linalg.svdvals(w.double()),
}


def head(d: int) -> Tensor:
    generator = torch.Generator().manual_seed(d)
    scales = torch.logspace(0, -torch.tensor(SPREAD).log10().item(), d, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    rows = torch.randn(VOCABULARY, d, generator=generator, dtype=torch.float64)
    return (rows @ (scales.unsqueeze(1) * rotation)).float()


def main() -> None:
    for d in SIZES:
        w = head(d)
        exact = torch.from_numpy(scipy.linalg.svdvals(w.double().numpy()))
        print(f"d = {d}, condition number {exact[0] / exact[-1]:.0f}")
        seconds = dict.fromkeys(CONTENDERS, float("inf"))
        errors = {}
        for _ in range(REPEATS):
            for name, values in CONTENDERS.items():
                began = time.perf_counter()
                found = values(w)
                seconds[name] = min(seconds[name], time.perf_counter() - began)
                errors[name] = (found.double() / exact - 1).abs().max().item()
        for name in CONTENDERS:
            ratio = seconds[name] / seconds["lmsat"]
            print(f"  {name:16} {seconds[name]:7.3f} s  {ratio:5.1f} x  error {errors[name]:.0e}")
        assert errors["lmsat"] < 1e-9


if __name__ == "__main__":
    main()
