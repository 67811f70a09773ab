"""The maximum of a smooth function of one vector: L-BFGS from a start, Newton steps to the end, the boundary.

A function gives `(value, gradient)` in NumPy's float64, minus infinity where it is not finite. Coordinates that may
reach the boundary of what they stand for do so at plus or minus infinity.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Function = Callable[[np.ndarray], tuple[float, np.ndarray]]
FAR = 35.0  # of a start: e^-35 is nothing beside 1
NEAR = 16.0  # likewise: the boundary must be the limit of what is inside
SLACK = 1e-3  # nats that the boundary may lie lower before the other coordinates have followed
WORST = 1e100  # for the line search, in place of infinity


class Rules(NamedTuple):
    """What is known of the coordinates.

    Attributes:
        centre: where they are expected, `(size,)`.
        scale: how far from there.
        ends: `(size, 2)`, whether there is a boundary at minus and at plus infinity.
        double: whether the function has the digits of 64-bit numbers.
    """

    centre: np.ndarray
    scale: np.ndarray
    ends: np.ndarray
    double: bool = True

    @property
    def step(self) -> float:
        """Of differences, in standard errors."""
        return 1e-4 if self.double else 3e-2


class Peak(NamedTuple):
    """Where a climb has ended.

    Attributes:
        z: the point; infinite coordinates are at the boundary.
        value: of the function.
        gradient: by the coordinates; 0 for those at the boundary.
        information: minus the second derivatives, `(size, size)`, NaN for coordinates at the boundary.
        decrement: nats that a Newton step would still gain.
    """

    z: np.ndarray
    value: float
    gradient: np.ndarray
    information: np.ndarray
    decrement: float

    @property
    def free(self) -> np.ndarray:
        """The coordinates that are not at the boundary."""
        return np.isfinite(self.z)


def ascend(function: Function, start: np.ndarray, rules: Rules, most: int = 500) -> tuple[np.ndarray, float]:
    """L-BFGS over the finite coordinates of a start, in units of their scales."""
    from scipy.optimize import minimize  # takes a fifth of a second

    free = np.isfinite(start)
    if not free.any():
        return start, function(start)[0]
    centre, scale = rules.centre[free], rules.scale[free]

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = start.copy()
        z[free] = centre + scale * w
        value, gradient = function(z)
        slope = np.where(np.isfinite(gradient[free]), gradient[free] * scale, 0.0)
        return (-value, -slope) if np.isfinite(value) else (WORST, np.zeros_like(slope))

    bounded = rules.ends[free].any(1)
    room = [(-FAR / s, FAR / s) if b else (None, None) for b, s in zip(bounded, scale, strict=True)]
    options = {"maxiter": most, "maxcor": 20, "ftol": 1e-13 if rules.double else 1e-9, "gtol": 1e-7}
    found = minimize(loss, (start[free] - centre) / scale, jac=True, method="L-BFGS-B", bounds=room, options=options)
    z = start.copy()
    z[free] = centre + scale * found.x
    return z, (-float(found.fun) if found.fun < WORST else -np.inf)


def information(function: Function, z: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Minus the second derivatives by the finite coordinates, by central differences of the gradient."""
    free = np.flatnonzero(np.isfinite(z))
    found = np.full((len(z), len(z)), np.nan)
    rows = []
    for i in free:
        up, down = z.copy(), z.copy()
        step = max(steps[i], 1e3 * np.spacing(abs(z[i])))
        up[i] += step
        down[i] -= step
        rows.append((function(down)[1][free] - function(up)[1][free]) / (up[i] - down[i]))
    matrix = np.array(rows).reshape(len(free), len(free))
    found[np.ix_(free, free)] = (matrix + matrix.T) / 2
    return found


def newton(function: Function, z: np.ndarray, rules: Rules, most: int = 60) -> Peak:
    """Newton's steps, shortened where they do not climb, until the slopes are at the level of rounding.

    What counts is the gain that a step promises, in nats, which knows no units: the scales of `rules` are where the
    steps of differences begin, no more.
    """
    free = np.isfinite(z)
    value, gradient = function(z)
    spread = rules.scale.copy()
    decrement = np.inf
    for count in range(most + 1):
        matrix = information(function, z, rules.step * spread)
        if not free.any() or not np.isfinite(matrix[np.ix_(free, free)]).all():
            break
        wider = _spread(np.diagonal(matrix), spread, rules, free)
        if count < most and np.abs(np.log10(wider / spread)).max() > 1:
            spread = wider
            continue
        spread = wider
        unit, slope = spread[free], np.where(np.isfinite(gradient[free]), gradient[free], 0.0) * spread[free]
        eigen, basis = np.linalg.eigh(matrix[np.ix_(free, free)] * unit[:, None] * unit)
        move = basis @ ((basis.T @ slope) / np.maximum(np.abs(eigen), 1e-6))
        decrement = float(slope @ move) / 2
        rounding = (1e-14 if rules.double else 1e-7) * max(abs(value), 1.0)
        if count == most or decrement <= rounding * 1e-6:
            break
        move *= min(1.0, 10 / np.abs(move).max())
        for shorter in 0.5 ** np.arange(12):
            new = z.copy()
            new[free] += shorter * unit * move
            reached, slopes = function(new)
            climbs = reached > value + 1e-4 * shorter * decrement
            smaller = np.linalg.norm(slopes[free] * unit) < np.linalg.norm(slope)
            if climbs or (smaller and abs(reached - value) <= 100 * rounding):
                break
        else:
            break
        z, value, gradient = new, reached, slopes
    return Peak(z, value, np.where(free, gradient, 0.0), matrix, decrement)


def _spread(curvature: np.ndarray, before: np.ndarray, rules: Rules, free: np.ndarray) -> np.ndarray:
    """Standard errors of single coordinates by their curvature; without a boundary they may lie in any units."""
    most = np.where(rules.ends.any(1), rules.scale, 1e4 * before)
    found = 1 / np.sqrt(np.maximum(np.abs(np.where(free, curvature, 1.0)), 1e-300))
    return np.where(free, np.minimum(found, most), before)


def depends(function: Function, z: np.ndarray, value: float, i: int, rules: Rules) -> bool:
    """Whether the function changes with a coordinate, wherever it goes."""
    far = (1.0, 10.0, FAR) if rules.ends[i].any() else (1.0, 1e3, 1e6, 1e12)
    for step in far:
        for sign in (-1.0, 1.0):
            other = z.copy()
            other[i] += sign * step * rules.scale[i]
            reached = function(other)[0]
            if np.isfinite(reached) and abs(reached - value) > (1e-9 if rules.double else 1e-5) * max(abs(value), 1.0):
                return True
    return False


def to_the_top(function: Function, z: np.ndarray, rules: Rules) -> Peak:
    """From the end of an ascent to the maximum, coordinate by coordinate at the boundary where that is as high."""
    value = function(z)[0]
    tried: set[tuple[int, int]] = set()
    close = 1e-9 if rules.double else 1e-6
    peak = None
    for _ in range(4 * len(z) + 4):
        best = max(_at_the_boundary(function, z, value, rules, tried), default=None)
        if best is not None:
            _, i, end = best
            tried.add((i, end))
            there = z.copy()
            there[i] = (-np.inf, np.inf)[end]
            there, reached = ascend(function, there, rules)
            if reached >= value - close * max(abs(value), 1.0):
                z, value, peak = there, reached, None
            continue
        if peak is None:
            peak = newton(function, z, rules)
            z, value = peak.z, peak.value
            continue
        off = _off_the_boundary(function, z, value, rules)
        if off is None:
            break
        z, value = ascend(function, off, rules)
        peak = None
    return newton(function, z, rules) if peak is None else peak


def _at_the_boundary(function, z, value, rules: Rules, tried) -> list[tuple[float, int, int]]:
    """`(value, coordinate, end)` of boundaries about as high as a point, of coordinates that matter."""
    found = []
    for i, end in zip(*np.nonzero(rules.ends), strict=True):
        if not np.isfinite(z[i]) or (i, end) in tried:
            continue
        there, middle = z.copy(), z.copy()
        there[i], middle[i] = (
            (-np.inf, np.inf)[end],
            rules.centre[i] + (rules.scale[i] if end == 0 else -rules.scale[i]),
        )
        reached = function(there)[0]
        if not reached >= value - SLACK or abs(function(middle)[0] - value) <= 1e-8 * max(abs(value), 1.0):
            continue
        near = z.copy()
        near[i] = rules.centre[i] + (-NEAR, NEAR)[end]
        if abs(function(near)[0] - reached) < SLACK:  # the limit, and not a density with respect to something else
            found.append((reached, int(i), int(end)))
    return found


def _off_the_boundary(function, z, value, rules: Rules) -> np.ndarray | None:
    """A higher point off the boundary, with one of its coordinates inside again; None where there is none."""
    for i in np.flatnonzero(~np.isfinite(z)):
        away = -np.sign(z[i])
        for far in (8.0, 5.0, 3.0, 1.5, 0.0):
            inside = z.copy()
            inside[i] = rules.centre[i] - away * far
            if function(inside)[0] > value + SLACK:
                return inside
    return None
