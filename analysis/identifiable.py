"""What data can tell of a law's constants: whether it can be fitted to them at all, and which of
the constants found are doubtful."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.errors import BadInput
from analysis.laws import Array, Law, Values

Constants = Mapping[str, float]
"""Constants and exponents by name."""


def check(
    law: Law, x: Values, loss: Array, others: Mapping[str, npt.NDArray[Any]], fixed: Constants
) -> None:
    """BadInput where the law cannot be fitted to losses (n) at the points x, others being further
    columns of n."""
    names = [*law.constants, *law.exponents]
    if unknown := [name for name in fixed if name not in names]:
        raise BadInput(f"{law.name} has no constant {unknown[0]}, only {', '.join(names)}")
    columns = {v: x[v] for v in law.variables} | {"loss": loss} | dict(others)
    for name, values in columns.items():
        if values.shape != (loss.size,):
            raise BadInput(f"{name} has {values.size} values for {loss.size} losses")
    free = [name for name in names if name not in fixed]
    if loss.size < max(1, len(free)):
        raise BadInput(f"{law.name} has {len(free)} free constants, there are {loss.size} points")
    middle = {name: float(np.sqrt(low * high)) for name, (low, high) in law.exponents.items()}
    with np.errstate(all="ignore"):
        terms = _terms(law, x, middle)
    positive = [loss, *(a for name, a in others.items() if name == "stderr")]
    bad = [~np.isfinite(terms).all(0), *(~(np.isfinite(a) & (a > 0)) for a in positive)]
    _refuse(np.any(bad, axis=0), columns)
    for name in law.exponents:
        moved = _terms(law, x, {**middle, name: 1.1 * middle[name]})
        theirs = terms[(moved != terms).any(1)]
        if name in free and len(theirs) and not np.ptp(theirs, axis=1).any():
            raise BadInput(f"{name} cannot be fitted{_single(law, x)}: fix {name}")


def edges(law: Law, constants: Constants, fixed: Constants) -> dict[str, float]:
    """Free constants at zero and exponents at an end of their range, with where that is."""
    ends: dict[str, tuple[float, ...]] = dict.fromkeys(law.constants, (0.0,))
    return {
        name: end
        for name, many in (ends | dict(law.exponents)).items()
        if name not in fixed
        for end in many
        if abs(constants[name] - end) <= 1e-9 * end
    }


def inner(law: Law, constants: Constants, fixed: Constants) -> list[str]:
    """What is free and at no edge."""
    at = edges(law, constants, fixed)
    return [name for name in (*law.constants, *law.exponents) if name not in {*fixed, *at}]


def jacobian(law: Law, x: Values, constants: Constants, names: list[str]) -> Array:
    """Derivatives of the log law, points x names, each column of length one (or zero)."""
    c, terms = np.array([constants[name] for name in law.constants]), _terms(law, x, constants)
    columns = []
    for name in names:
        if name in law.constants:
            columns.append(terms[law.constants.index(name)])
        else:
            step = 1e-5 * constants[name]
            up, down = (
                c @ _terms(law, x, {**constants, name: constants[name] + s * step}) for s in (1, -1)
            )
            columns.append((up - down) / (2 * step))
    J = np.stack(columns, 1) / (c @ terms)[:, None]
    return J / np.maximum(np.linalg.norm(J, axis=0), 1e-300)


def warnings(law: Law, x: Values, constants: Constants, fixed: Constants) -> tuple[str, ...]:
    """What makes a fit doubtful, a line each."""
    at, names = edges(law, constants, fixed), inner(law, constants, fixed)
    lines = [f"{name} is at {end:g}, the end of its range" for name, end in at.items()]
    n, free = _terms(law, x, constants).shape[1], len(names) + len(at)
    if n < 2 * free:
        lines.append(f"{n} points for {free} free constants: fewer than two each")
    if names:
        _, sizes, directions = np.linalg.svd(jacobian(law, x, constants, names), False)
        for direction in directions[sizes < 1e-6 * sizes[0]]:
            mixed = [m for m, share in zip(names, np.abs(direction), strict=True) if share > 1e-3]
            what = "cannot be told apart" if len(mixed) > 1 else "makes no difference"
            lines.append(f"{', '.join(mixed)} {what}{_single(law, x)}")
    return tuple(lines)


def _terms(law: Law, x: Values, constants: Constants) -> Array:
    """Terms x points."""
    n = max(x[v].size for v in law.variables)
    e = {name: np.asarray(constants[name]) for name in law.exponents}
    return np.stack([np.broadcast_to(g, (n,)) for g in law.terms(x, e)])


def _single(law: Law, x: Values) -> str:
    single = [v for v in law.variables if np.ptp(x[v]) == 0]
    return f" where {' and '.join(single)} takes one value" if single else ""


def _refuse(bad: npt.NDArray[Any], columns: Mapping[str, npt.NDArray[Any]]) -> None:
    if bad.any():
        i = int(bad.argmax())
        values = ", ".join(f"{name} = {column[i]}" for name, column in columns.items())
        raise BadInput(f"point {i} has {values}; finite, positive numbers are needed")
