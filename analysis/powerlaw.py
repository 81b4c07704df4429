"""Fits of scaling laws, how sure they are, and what they say of models beyond.

L_i = sum_k c_k g_k(x_i; e), c >= 0: the sum of Huber losses of log residuals (Hoffmann et al. 2022,
2203.15556, appendix D.3; Besiroglu et al. 2024, 2404.10102: never their mean, which stops a search
early) or least squares; any constant or exponent may be fixed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from analysis import identifiable
from analysis.errors import BadInput
from analysis.huber import Mask, Problem
from analysis.laws import Array, Law, Values

Groups = npt.NDArray[Any]
Kind = Literal["residual", "pairs", "model"]


@dataclass(frozen=True)
class Data:
    """Points that a law is fitted to."""

    x: Values
    """The law's variables by name, one positive number a point."""
    loss: Array
    """Nats per token."""
    stderr: Array | None = None
    """Of the loss: points weigh 1/stderr^2 of what is fitted, on average 1."""
    groups: Groups | None = None
    """The model that each point is of, where points share one."""

    def at(self, mask: Mask) -> "Data":
        """Some of the points."""
        stderr, groups = (None if a is None else a[mask] for a in (self.stderr, self.groups))
        return Data({v: a[mask] for v, a in self.x.items()}, self.loss[mask], stderr, groups)


@dataclass(frozen=True)
class Fit:
    law: Law
    data: Data
    constants: dict[str, float]
    """Constants and exponents by name, fixed ones too."""
    fixed: dict[str, float]
    objective: float
    delta: float
    log: bool
    warnings: tuple[str, ...] = ()

    def predict(self, x: Values) -> Array:
        """The law's loss at the points of x."""
        return predict(self.law, self.constants, x)

    @property
    def residuals(self) -> Array:
        """ln loss less ln law, of each point."""
        return np.log(self.data.loss / self.predict(self.data.x))

    @property
    def rmse(self) -> float:
        """Root mean square of the residuals."""
        return float(np.sqrt(np.mean(self.residuals**2)))


@dataclass(frozen=True)
class Draws:
    """Bootstrap fits."""

    fit: Fit
    constants: dict[str, Array]
    """Constants and exponents by name, one for each draw."""
    noise: Array
    """Residuals (of what is fitted, at weight 1) to draw from."""
    scale: Array
    """What each draw multiplies them by."""

    def predict(self, x: Values) -> Array:
        """The law's loss, draws x points."""
        return predict(self.fit.law, {name: c[:, None] for name, c in self.constants.items()}, x)

    def interval(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Ends of the central interval of each constant and exponent."""
        return {name: _central(c, level) for name, c in self.constants.items()}

    @property
    def stderr(self) -> dict[str, float]:
        """Half the central 68.27 % interval, which few wild draws do not move."""
        ends = self.interval(0.6827)
        return {name: (high - low) / 2 for name, (low, high) in ends.items()}

    @property
    def names(self) -> list[str]:
        """What is free, in the order of `covariance`."""
        return [name for name in self.constants if name not in self.fit.fixed]

    @property
    def covariance(self) -> Array:
        """Of the logarithms of free constants and of free exponents as they are; not a number
        where a constant was zero in some draw."""
        logs = set(self.fit.law.constants)
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = [
                np.log(c) if n in logs else c for n, c in self.constants.items() if n in self.names
            ]
            return np.atleast_2d(np.cov(columns))

    @property
    def correlation(self) -> Array:
        """Of the same."""
        spread = np.sqrt(np.diag(self.covariance))
        return self.covariance / np.outer(spread, spread)


@dataclass(frozen=True)
class Extrapolation:
    """Held-out points against the law of the others: loss / law - 1."""

    deviation: Array
    low: Array
    high: Array
    """Ends of what its true deviation may be, given the spread of fits and of single points: a
    point that follows the law has zero between them."""
    mean: float
    mean_low: float
    mean_high: float


def predict(law: Law, constants: Mapping[str, float | Array], x: Values) -> Array:
    """The law's loss at points x; the constants may be arrays to broadcast against them."""
    terms = law.terms(x, {name: np.asarray(constants[name]) for name in law.exponents})
    total = sum(np.asarray(constants[c]) * g for c, g in zip(law.constants, terms, strict=True))
    return total + np.zeros(np.broadcast_shapes(*(np.shape(x[v]) for v in law.variables)))


def fit(
    law: Law,
    data: Data,
    fixed: Mapping[str, float] | None = None,
    delta: float = 1e-3,
    log: bool = True,
) -> Fit:
    """Constants and exponents that are least in sum_i w_i Huber_delta(ln law_i - ln loss_i); with
    delta infinite half the weighted sum of squares, without `log` of law - loss itself.

    Raises BadInput for data that no such law can be fitted to; what can be fitted but not trusted
    is in `warnings`.
    """
    fixed = {name: float(value) for name, value in (fixed or {}).items()}
    data = _arrays(law, data)
    others = {"stderr": data.stderr, "groups": data.groups}
    given = {name: values for name, values in others.items() if values is not None}
    identifiable.check(law, data.x, data.loss, given, fixed)
    problem = Problem(law, data.x, fixed, delta, log)
    z, objective = problem.minimum(*_targets(data, log))
    if not len(z):
        raise BadInput(f"{law.name}: no constants that are not negative give a positive loss")
    constants = {name: float(c[0]) for name, c in problem.values(z).items()}
    doubts = identifiable.warnings(law, data.x, constants, fixed)
    return Fit(law, data, constants, fixed, objective, delta, log, doubts)


def _targets(data: Data, log: bool) -> tuple[Array, Array]:
    """What is fitted, and the weights."""
    y = np.log(data.loss) if log else data.loss
    if data.stderr is None:
        return y, np.ones(len(y))
    w = ((data.loss if log else 1.0) / data.stderr) ** 2
    return y, w / w.mean()


def _arrays(law: Law, data: Data) -> Data:
    """The same data in float64."""
    if missing := [v for v in law.variables if v not in data.x]:
        raise BadInput(
            f"{law.name} needs {missing[0]} of every point; there is {', '.join(data.x)}"
        )
    x = {v: np.asarray(values, float) for v, values in data.x.items()}
    stderr = None if data.stderr is None else np.asarray(data.stderr, float)
    groups = None if data.groups is None else np.asarray(data.groups)
    return Data(x, np.asarray(data.loss, float), stderr, groups)


def _central(values: Array, level: float) -> tuple[float, float]:
    low, high = ends(values, level)
    return float(low), float(high)


def ends(values: Array, level: float) -> Array:
    """Of the central interval of draws (the first axis) that holds one more draw with chance
    `level`, however few they are; the default quantiles of 100 draws would give 93 % for 95 %."""
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")


def bootstrap(found: Fit, kind: Kind = "residual", draws: int = 1000, seed: int = 0) -> Draws:
    """Fits to data like these, each from the full data's fit.

    residual: at the same points, the law plus drawn residuals with drawn signs. Where delta is
    small, a fit of p constants all but interpolates p points: the p smallest residuals tell nothing
    and are left out, the others inflated to a variance of sum r^2 / (n - p). Few points do not tell
    how large noise is, either: each draw multiplies it by sqrt((n - p) / chi^2 of n - p degrees),
    which makes intervals as wide as Student's (with a small delta and five or six points for three
    constants a little wider: 80 % intervals hold the truth 80 to 86 % of the time).

    pairs: points are drawn; too wide where delta is small. model: all points of a model together,
    `data.groups`; the only kind that is right where models differ by more than the noise of a
    point, but of five models its 95 % intervals hold the truth 83 to 89 % of the time where this
    does not vary between models (B, b). Draws that could not tell the constants apart are drawn
    again. Raises BadInput where most are such, and where no points are left for noise.
    """
    rng, data, n = np.random.default_rng(seed), found.data, len(found.data.loss)
    problem = Problem(found.law, data.x, found.fixed, found.delta, found.log)
    y, w = _targets(data, found.log)
    p = len(identifiable.inner(found.law, found.constants, found.fixed))
    if not 0 < p < n:
        raise BadInput(f"{n} points fitted by {p} constants leave nothing to tell the noise by")
    law = found.predict(data.x)
    law = np.log(law) if found.log else law
    noise, scale = _pool((y - law) * np.sqrt(w), p), np.ones(draws)
    if kind == "residual":
        scale = np.sqrt((n - p) / rng.chisquare(n - p, draws))
        signs = rng.choice([-1.0, 1.0], (draws, n))
        y = law + signs * rng.choice(noise, (draws, n)) * scale[:, None] / np.sqrt(w)
        w = w[None]
    else:
        w, y = w * _counts(found, kind, draws, rng), y[None]
    z, _ = problem.polish(np.repeat(problem.rows(found.constants), draws, 0), y, w)
    return Draws(found, problem.values(z), np.concatenate([-noise, noise]), scale)


def _pool(residuals: Array, p: int) -> Array:
    """Sizes of all residuals but the p least, inflated to what the noise had before p constants
    were fitted to it."""
    sizes = np.sort(np.abs(residuals))
    kept = sizes[p:]
    return kept * np.sqrt((sizes**2).sum() / max((kept**2).sum(), 1e-300))


def _counts(found: Fit, kind: Kind, draws: int, rng: np.random.Generator) -> Array:
    """Draws x points: how often each is drawn, alone or with its model."""
    n = len(found.data.loss)
    if kind == "model" and found.data.groups is None:
        raise BadInput("a bootstrap by model needs to know which model each point is of")
    groups = np.arange(n) if kind == "pairs" else found.data.groups
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    models = int(member.max()) + 1
    inner = identifiable.inner(found.law, found.constants, found.fixed)
    J = identifiable.jacobian(found.law, found.data.x, found.constants, inner)
    told = np.linalg.eigvalsh(J.T @ J)[0]
    drawn = rng.multinomial(models, np.full(models, 1 / models), 2 * draws)
    counts = drawn[:, member].astype(float)
    least = np.linalg.eigvalsh(np.tensordot(counts, J[:, :, None] * J[:, None], 1))[:, 0]
    good = counts[least > 1e-6 * told]
    if len(good) >= draws:
        return good[:draws]
    what = "points" if kind == "pairs" else "models"
    raise BadInput(
        f"{models} {what} are too few to draw from: most draws would not tell the constants"
    )


def leave_one_out(found: Fit) -> Array:
    """ln loss less ln law of each point, the law fitted without it; without all of its model
    where there are groups. Raises BadInput where too few points would be left."""
    data = found.data
    groups = np.arange(len(data.loss)) if data.groups is None else data.groups
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    problem = Problem(found.law, data.x, found.fixed, found.delta, found.log)
    if len(data.loss) - sizes.max() < len(problem.names):
        raise BadInput(
            f"without {sizes.max()} of {len(data.loss)} points too few are left for"
            f" {len(problem.names)} free constants"
        )
    y, w = _targets(data, found.log)
    without = np.where(member == np.arange(len(sizes))[:, None], 0.0, w)
    start = np.repeat(problem.rows(found.constants), len(sizes), 0)
    z, _ = problem.polish(start, y[None], without)
    values = {name: c[member] for name, c in problem.values(z).items()}
    return np.log(data.loss / predict(found.law, values, data.x))


def extrapolate(drawn: Draws, held_out: Data, level: float = 0.95, seed: int = 0) -> Extrapolation:
    """How far points that were not fitted are off the law."""
    found = drawn.fit
    laws = drawn.predict(held_out.x)
    rng = np.random.default_rng(seed)
    noise = drawn.scale[:, None] * rng.choice(drawn.noise, laws.shape)
    spread = held_out.loss / (laws * np.exp(noise) if found.log else laws + noise) - 1
    low, high = ends(spread, level)
    deviation = held_out.loss / found.predict(held_out.x) - 1
    return Extrapolation(
        deviation, low, high, float(deviation.mean()), *_central(spread.mean(1), level)
    )
