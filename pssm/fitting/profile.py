"""Intervals by the profile likelihood: one coordinate is held, the others climb."""

from typing import Any, NamedTuple

import numpy as np

from pssm.fitting.climb import NEAR, Peak, Rules, ascend

FAR = 40  # steps outward, each a half longer than the one before


class Profile(NamedTuple):
    """The profile likelihood of one parameter.

    Attributes:
        name: the entry.
        level: of confidence.
        estimate: at the maximum.
        low: lower end; the boundary of the support where the likelihood does not fall enough before it.
        high: upper end, likewise.
        values: of the parameter along the profile, increasing.
        log_likelihoods: the maxima over all other parameters there (log joint densities for a mode).
    """

    name: str
    level: float
    estimate: float
    low: float
    high: float
    values: np.ndarray
    log_likelihoods: np.ndarray


def profile_of(
    function: Any, peak: Peak, rules: Rules, labels: list[tuple[str, str, int]], name: str, level: float
) -> Profile:
    """The profile of the coordinate with a label; arguments as of a `PointFit`.

    Args:
        function: a `Target`.
        peak: its maximum.
        rules: of its coordinates.
        labels: name, site and place of each coordinate.
        name: the entry.
        level: of confidence.
    """
    from scipy.stats import chi2  # takes half a second

    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1; got {level}.")
    known = [label for label, _, _ in labels]
    if name not in known:
        raise ValueError(f"`name` must be one of {known}; got {name!r}.")
    i = known.index(name)
    _, site, place = labels[i]
    if function.values(rules.centre)[site].size != int(np.prod(function.shapes[site])):
        raise ValueError(
            f"`name`: the entries of {site!r} have no coordinates of their own, so {name!r} has no profile."
        )
    fall = float(chi2.ppf(level, 1)) / 2
    held = _Held(function, peak, rules, i)
    at = peak.z[i] if np.isfinite(peak.z[i]) else rules.centre[i] + np.sign(peak.z[i]) * 8.0
    seen = {float(at): peak.value}
    width = (
        1 / np.sqrt(peak.information[i, i]) if np.isfinite(peak.z[i]) and peak.information[i, i] > 0 else rules.scale[i]
    )
    ends = [_end(held, at, sign, width, peak.value - fall, rules, i, seen) for sign in (-1, 1)]

    def value(z: float) -> float:
        point = peak.z.copy()
        point[i] = z
        return float(np.ravel(function.values(point)[site])[place])

    points = sorted(seen)
    found = np.array([value(z) for z in points])
    order = np.argsort(found)
    low, high = sorted(value(z) for z in ends)
    heights = np.array([seen[z] for z in points])[order]
    return Profile(name, level, value(peak.z[i]), low, high, found[order], heights)


class _Held:
    """The maximum over the other coordinates, as a function of one; it begins where the last one ended."""

    def __init__(self, function: Any, peak: Peak, rules: Rules, i: int):
        self.function, self.i, self.last = function, i, peak.z
        self.others = np.delete(np.arange(len(peak.z)), i)
        self.rules = Rules(rules.centre[self.others], rules.scale[self.others], rules.ends[self.others], rules.double)

    def __call__(self, z: float) -> float:
        whole = self.last.copy()
        whole[self.i] = z

        def rest(x: np.ndarray) -> tuple[float, np.ndarray]:
            whole[self.others] = x
            value, gradient = self.function(whole)
            return value, gradient[self.others]

        x, value = ascend(rest, self.last[self.others], self.rules)
        whole[self.others] = x
        self.last = whole.copy()
        return value


def _end(
    held: _Held, at: float, sign: int, width: float, target: float, rules: Rules, i: int, seen: dict[float, float]
) -> float:
    """Where the profile falls to a target on one side; infinite where it does not."""
    from scipy.optimize import brentq

    held.last = held.last.copy()
    start = held.last.copy()

    def above(z: float) -> float:
        seen[float(z)] = held(z)
        return seen[float(z)] - target

    inside, step, bounded = at, width, rules.ends[i][int(sign > 0)]
    for _ in range(FAR):
        outside = inside + sign * step
        if bounded:
            outside = sign * min(sign * outside, sign * rules.centre[i] + NEAR)
        if above(outside) < 0:
            root = brentq(above, *sorted((inside, outside)), xtol=1e-6 * width, rtol=1e-12)
            held.last = start
            return float(root)
        inside, step = outside, 1.5 * step
        if bounded and abs(inside - rules.centre[i]) >= NEAR:
            break
    held.last = start
    return sign * np.inf
