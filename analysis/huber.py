"""The least Huber objective of a law: a grid, then Newton's steps, of many data sets together.

The objective is sum_i w_i Huber_delta(r_i), with r = ln model - ln loss or, without `log`, model -
loss. Hoffmann et al. 2022 (2203.15556), appendix D.3, minimise it from 4,500 starts; here the
constants are solved for in every cell of a grid over the exponents, and the best cells are
polished. With a small delta the objective is all but a sum of absolute values, where reweighted
least squares crawls: the steps take the true Hessian, and its majoriser, which reweighting would
step by, to damp them and in its place where it is not positive (after Madsen & Nielsen 1990).
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import minimum_filter

from analysis.laws import Array, Law, Values

STEP = 1e-4  # of differences in logarithms of exponents
CELLS = {0: 1, 1: 64, 2: 32, 3: 14, 4: 8}  # of the grid along each free exponent
STARTS = 16  # from low places of the grid, and about as many scattered over its best third
ROUNDS = 200  # of steps; about ten are usual
CHUNK = 1 << 16  # numbers in an array: stay in the cache

Mask = npt.NDArray[np.bool_]


class Problem:
    """A law on given points as a function of rows z = (v, u): logarithms u of free exponents and
    free constants v, each in units that make its term one on average over the points, so that v
    and u are hardly tied to each other."""

    def __init__(
        self, law: Law, x: Values, fixed: Mapping[str, float], delta: float, log: bool
    ) -> None:
        self.law, self.fixed, self.delta, self.log = law, fixed, delta, log
        self.x = {v: np.asarray(x[v], float) for v in law.variables}
        self.n = max((a.size for a in self.x.values()), default=1)
        self.free = [k for k, name in enumerate(law.constants) if name not in fixed]
        self.exponents = [name for name in law.exponents if name not in fixed]
        self.names = [law.constants[k] for k in self.free] + self.exponents
        self.ranges = np.log([law.exponents[e] for e in self.exponents]).reshape(-1, 2)
        zeros = np.zeros(len(self.free))
        self.low = np.concatenate([zeros, self.ranges[:, 0]])
        self.high = np.concatenate([zeros + np.inf, self.ranges[:, 1]])
        self.depends = self._dependence()
        self.classes = _classes(self.depends)

    def rows(self, values: Mapping[str, float]) -> Array:
        """One row of z from constants and exponents by name."""
        u = np.log([[values[name] for name in self.exponents]])
        norms = self._norms(self._raw(u))
        v = [values[self.law.constants[k]] * norms[k].item() for k in self.free]
        return np.concatenate([v, u[0]])[None]

    def values(self, z: Array) -> dict[str, Array]:
        """All constants and exponents by name, one for each row."""
        u = z[:, len(self.free) :]
        norms = self._norms(self._raw(u))
        found = {name: np.full(len(z), value) for name, value in self.fixed.items()}
        found |= {self.law.constants[k]: z[:, i] / norms[k][:, 0] for i, k in enumerate(self.free)}
        found |= {name: np.exp(u[:, j]) for j, name in enumerate(self.exponents)}
        return {name: found[name] for name in (*self.law.constants, *self.law.exponents)}

    def minimum(self, y: Array, w: Array) -> tuple[Array, float]:
        """The best row of z, and its objective, for one set of targets y and weights w; no row
        where the model cannot be positive."""
        z, f = self.polish(self._starts(y, w), y[None], w[None])
        if not len(z):
            return z, np.inf
        best = int(f.argmin())
        return z[best : best + 1], float(f[best])

    def polish(self, z: Array, y: Array, w: Array) -> tuple[Array, Array]:
        """From every row of z to the minimum nearby, and the objective there; y and w (rows x
        points, or one row for all) may differ by row."""
        out, f = np.empty_like(z), np.empty(len(z))
        y, w = (np.broadcast_to(a, (len(z), self.n)) for a in (y, w))
        size = max(1, CHUNK // self.n)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            for i in range(0, len(z), size):
                part = slice(i, i + size)
                out[part], f[part] = self._newton(z[part].copy(), y[part], w[part])
        return out, f

    def _raw(self, u: Array) -> list[Array]:
        """The terms at rows of u: rows x points, or what broadcasts to it."""
        values = {name: np.full((1, 1), value) for name, value in self.fixed.items()}
        values |= {name: np.exp(u[:, j, None]) for j, name in enumerate(self.exponents)}
        return [np.atleast_2d(g) for g in self.law.terms(self.x, values)]

    def _norms(self, terms: list[Array]) -> list[Array]:
        """Of free constants' terms, rows x 1; 1 where a term is fixed, or nothing."""
        one = np.ones((1, 1))
        sizes = [
            np.abs(g).mean(1, keepdims=True) if k in self.free else one for k, g in enumerate(terms)
        ]
        return [np.where(s > 0, s, 1) for s in sizes]

    def _terms(self, u: Array) -> list[Array]:
        terms = self._raw(u)
        return [g / s for g, s in zip(terms, self._norms(terms), strict=True)]

    def _constants(self, z: Array) -> list[Array]:
        c = [np.full((1, 1), self.fixed.get(name, 0.0)) for name in self.law.constants]
        for i, k in enumerate(self.free):
            c[k] = z[:, i, None]
        return c

    def _dependence(self) -> Mask:
        """Terms x exponents: does it depend on it?"""
        middle = self.ranges.mean(1)
        at = np.vstack([middle, middle + 0.1 * np.eye(len(middle))])
        moved = [np.broadcast_to(g, (len(at), self.n)) for g in self._raw(at)]
        return np.array([(g[1:] != g[0]).any(1) for g in moved])

    def _starts(self, y: Array, w: Array) -> Array:
        """Rows of z to polish from."""
        q = len(self.exponents)
        axes = [np.linspace(low, high, CELLS[q]) for low, high in self.ranges]
        cells = (
            np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, q) if q else np.ones((1, 0))
        )
        size = max(1, CHUNK // self.n)
        parts = [self._cells(cells[i : i + size], y, w) for i in range(0, len(cells), size)]
        v, f = (np.concatenate(part) for part in zip(*parts, strict=True))
        shaped = f.reshape([CELLS[q]] * q)
        low = (shaped <= minimum_filter(shaped, 3)).ravel()
        order = np.argsort(f, kind="stable")
        third = order[: -(-len(f) // 3)]
        chosen = np.concatenate(
            [order[low[order]][:STARTS], third[:: max(1, len(third) // STARTS)]]
        )
        return np.hstack([v, cells])[np.unique(chosen[np.isfinite(f[chosen])])]

    def _cells(self, u: Array, y: Array, w: Array) -> tuple[Array, Array]:
        """Of each row of u the free constants that are least squares of relative errors
        (of losses without `log`), the best of all sets that are not negative, and the objective."""
        terms, loss = self._terms(u), np.exp(y) if self.log else y
        scale = np.sqrt(w) / (loss if self.log else 1.0)
        c = self._constants(np.zeros((len(u), len(self.names))))
        model = np.zeros((len(u), self.n)) + sum(ck * g for ck, g in zip(c, terms, strict=True))
        columns = np.empty((len(u), len(self.free), self.n))
        for i, k in enumerate(self.free):
            columns[:, i] = terms[k] * scale
        gram = columns @ columns.swapaxes(1, 2)
        right = columns @ ((loss - model) * scale)[:, :, None]
        v, best = np.zeros((len(u), len(self.free))), np.zeros(len(u))
        for size in range(1, len(self.free) + 1):
            for some in map(list, combinations(range(len(self.free)), size)):
                part = gram[:, some][:, :, some]
                ridge = 1e-12 * np.einsum("bii->b", part)[:, None, None] + 1e-300
                found = np.linalg.solve(part + ridge * np.eye(size), right[:, some])
                gain = (found * right[:, some]).sum((1, 2))
                better = (found >= 0).all((1, 2)) & (gain > best)
                best[better], v[better] = gain[better], 0
                v[np.ix_(better, some)] = found[better, :, 0]
        model += sum(v[:, i, None] * terms[k] for i, k in enumerate(self.free))
        return v, self._objective(model, y, w)[0]

    def _objective(self, model: Array, y: Array, w: Array) -> tuple[Array, Array, Array]:
        """The objective (rows), infinite where the model is not positive but must be; residuals,
        and these cut off at delta (rows x points)."""
        r = (np.log(model) if self.log else model) - y
        cut = np.clip(r, -self.delta, self.delta)
        f = (w * cut * (r - 0.5 * cut)).sum(1)
        return np.where(np.isfinite(f), f, np.inf), r, cut

    def _model(self, z: Array) -> tuple[Array, Array, list[tuple[int, int, Array]]]:
        """The law (rows x points), its derivatives by z (rows x p x points), and those second
        ones that are not zero, with the places in z that they belong to."""
        K, q = len(self.free), len(self.exponents)
        c, u = self._constants(z), z[:, K:]
        terms = self._terms(u)
        model = np.zeros((len(z), self.n)) + sum(ck * g for ck, g in zip(c, terms, strict=True))
        moves = [STEP * np.isin(np.arange(q), members) for members in self.classes]
        up, down = ([self._terms(u + s * move) for move in moves] for s in (1, -1))
        class_of = {j: t for t, members in enumerate(self.classes) for j in members}

        def bend(k: int, t: int) -> Array:
            return (up[t][k] - 2 * terms[k] + down[t][k]) / STEP**2

        first = np.zeros((len(z), K + q, self.n))
        second = []
        for i, k in enumerate(self.free):
            first[:, i] = terms[k]
        for j, t in class_of.items():
            for k in np.flatnonzero(self.depends[:, j]).tolist():
                slope = (up[t][k] - down[t][k]) / (2 * STEP)
                first[:, K + j] += c[k] * slope
                second.append((K + j, K + j, c[k] * bend(k, t)))
                if k in self.free:
                    second.append((self.free.index(k), K + j, slope))
        for i, j in combinations(range(q), 2):
            shared = np.flatnonzero(self.depends[:, i] & self.depends[:, j]).tolist()
            if shared:
                t, o = class_of[i], class_of[j]
                both = [self._terms(u + s * (moves[t] + moves[o])) for s in (1, -1)]
            for k in shared:
                along = (both[0][k] - 2 * terms[k] + both[1][k]) / STEP**2
                second.append((K + i, K + j, c[k] * (along - bend(k, t) - bend(k, o)) / 2))
        return model, first, second

    def _expand(self, z: Array, y: Array, w: Array) -> tuple[Array, Array, Array, Array]:
        """Objective (rows), gradient (rows x p), and Hessian and majoriser (rows x p x p)."""
        model, J, second = self._model(z)
        f, r, cut = self._objective(model, y, w)
        pull = w * cut
        inside = w * (np.abs(r) <= self.delta)
        if self.log:
            slope = 1 / model
            J *= slope[:, None]
            inside -= pull
        major = w * np.minimum(1, self.delta / np.abs(r))
        across = J.swapaxes(1, 2)
        g = (J @ pull[:, :, None])[:, :, 0]
        H, M = (J * inside[:, None]) @ across, (J * major[:, None]) @ across
        if self.log:
            pull *= slope
        for i, j, bend in second:
            h = np.einsum("bn,bn->b", pull, bend)
            H[:, i, j] += h
            if i != j:
                H[:, j, i] += h
        return f, g, H, M

    def _newton(self, z: Array, y: Array, w: Array) -> tuple[Array, Array]:
        f, g, H, M = self._expand(z, y, w)
        out, least = z.copy(), f.copy()
        damping, rows = np.full(len(z), 1e-2), np.arange(len(z))
        for _ in range(ROUNDS):
            step, gain = self._step(z, g, H, M, damping)
            going = gain * (1 + damping) > 1e-11 * f + 1e-28 * w.sum(1)
            if not going.all():
                out[rows], least[rows] = z, f
                rows, z, y, w, f, g, H, M, damping, step, gain = (
                    a[going] for a in (rows, z, y, w, f, g, H, M, damping, step, gain)
                )
            if not len(rows):
                return out, least
            trial = np.clip(z + step, self.low, self.high)
            new = self._expand(trial, y, w)
            better, good = new[0] < f, f - new[0] > 0.5 * gain
            damping = np.where(
                better, np.where(good, damping / 4, damping), np.maximum(4 * damping, 0.1)
            )
            z[better] = trial[better]
            for old, fresh in zip((f, g, H, M), new, strict=True):
                old[better] = fresh[better]
        out[rows], least[rows] = z, f
        return out, least

    def _step(self, z: Array, g: Array, H: Array, M: Array, damping: Array) -> tuple[Array, Array]:
        """The damped step, and how far it should descend."""
        size = np.einsum("bii->bi", M)
        held = ((z <= self.low) & (g >= 0)) | ((z >= self.high) & (g <= 0)) | (size <= 0)
        damped = M * damping[:, None, None] + (1e-13 * size + 1e-300)[:, :, None] * np.eye(
            z.shape[1]
        )
        step, gain = self._boxed(H + damped, g, z, held)
        bad = ~(gain >= 0)
        if bad.any():
            step[bad], gain[bad] = self._boxed((M + damped)[bad], g[bad], z[bad], held[bad])
        return step, gain

    def _boxed(self, A: Array, g: Array, z: Array, held: Mask) -> tuple[Array, Array]:
        """The least of g s + s A s / 2 with what is held staying where it is, and what would leave
        its range stopping at the end of it; and how much less than nothing that is."""
        step = np.zeros_like(z)
        for _ in range(z.shape[1] + 1):  # each round but the last holds one more of some row
            pushed = g + (A @ step[:, :, None])[:, :, 0]
            B = np.where(held[:, :, None] | held[:, None], 0, A)
            B += held[:, :, None] * np.eye(z.shape[1])
            step = np.where(held, step, np.linalg.solve(B, -pushed[:, :, None])[:, :, 0])
            outside = ~held & ((z + step < self.low) | (z + step > self.high))
            if not outside.any():
                break
            edge = np.clip(z + step, self.low, self.high) - z
            held = held | outside
            step = np.where(outside, edge, np.where(held, step, 0))
        gain = -(g * step).sum(1) - 0.5 * np.einsum("bi,bij,bj->b", step, A, step)
        return step, gain


def _classes(depends: Mask) -> list[list[int]]:
    """Exponents that may be moved at once, as no term depends on two of a class."""
    classes: list[list[int]] = []
    for j in range(depends.shape[1]):
        for members in classes:
            if not (depends[:, members].any(1) & depends[:, j]).any():
                members.append(j)
                break
        else:
            classes.append([j])
    return classes
