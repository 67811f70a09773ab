"""Sensors that send a variance to zero and the likelihood without bound: named, with the reason."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pssm._checks import is_rounded
from pssm.learning.maximise import Limits, Structure
from pssm.ssm import LinearGaussianSSM

LONG_RUN = 0.25  # of the observed values, equal in a row: the sensor is taken for stuck


def odd_sensors(y: np.ndarray) -> list[str]:
    """What is wrong with columns of `(time, obs)`, in words: constant, a copy of another, or stuck.

    Example:
        >>> y = np.random.default_rng(0).normal(size=(50, 1))
        >>> odd_sensors(np.hstack([y, 3 * y + 1, 0 * y]))
        ['sensor 1 is a copy of sensor 0 (up to its unit and offset)', 'sensor 2 is constant']
    """
    found: list[str] = []
    seen = ~np.isnan(y)
    known: dict[bytes, int] = {}
    for k in range(y.shape[1]):
        x = y[seen[:, k], k]
        if len(x) < 2:
            continue
        apart = x - x.mean()
        size = np.abs(apart).max()
        if size <= 1e-13 * np.abs(x).max(initial=0.0):
            found.append(f"sensor {k} is constant")
            continue
        run = _longest_run(x)
        if run >= max(10, LONG_RUN * len(x)):
            found.append(f"sensor {k} is stuck: {run} equal values in a row")
        if len(x) > 2:
            # Rounded, so that copies in other units agree; the sign is that of the largest deviation.
            shape = np.round(apart / apart[np.abs(apart).argmax()], 6) + 0.0
            key = seen[:, k].tobytes() + shape.tobytes()
            if key in known:
                found.append(f"sensor {k} is a copy of sensor {known[key]} (up to its unit and offset)")
            known.setdefault(key, k)
    return found


def _longest_run(x: np.ndarray) -> int:
    """The most equal values in a row."""
    breaks = np.flatnonzero(np.diff(x) != 0)
    return int(np.diff(np.concatenate([[-1], breaks, [len(x) - 1]])).max())


def at_floor(ssm: LinearGaussianSSM, limits: Limits, structure: Structure) -> np.ndarray:
    """The sensors whose noise is as small as it may be."""
    least = float(limits.R)
    if least == 0 or "R" in structure.fixed:
        return np.zeros(0, int)
    R = np.asarray(ssm.R, np.float64)
    if structure.groups("R") is not None:
        return np.flatnonzero(np.diag(R) <= 1.5 * least)
    values, vectors = np.linalg.eigh(R)
    return np.flatnonzero((np.abs(vectors[:, values <= 1.5 * least]) > 0.3).any(1))


def doubts(
    result: Any,
    start: LinearGaussianSSM,
    y: np.ndarray | None,
    limits: Limits,
    structure: Structure,
    tol: float,
) -> list[str]:
    """What a reader of a result of `fit_em` should know, in words; the models are in the units of EM."""
    found: list[str] = []
    odd = [] if y is None or "R" in structure.fixed else odd_sensors(y)
    low = np.setdiff1d(at_floor(result.ssm, limits, structure), at_floor(start, limits, structure))
    if odd:
        found.append(
            f"`y`: {'; '.join(odd[:5])}. The noise of such a sensor goes to zero, and the likelihood has no upper "
            "bound: leave it out, or hold its variance."
        )
    elif low.size:
        found.append(
            f"`R`: the noise of sensors {low[:10].tolist()} went to the floor, {float(limits.R):.2g} of their "
            "variance: the states follow them exactly, and the likelihood may have no upper bound. Take fewer states, "
            "raise `floor`, or give a `prior`."
        )
    gains = np.diff(result.log_joint)
    if result.reason == "num_iters" and tol > 0 and len(gains) > 1 and (left := _left(gains)) > 0.1:
        about = f"some {left:.2g} nats" if np.isfinite(left) else "an unknown number of nats"
        found.append(
            f"`num_iters`: EM ended after {len(gains)} iterations before it converged; the last one gained "
            f"{gains[-1]:.2g} nats, and {about} may be left. Raise `num_iters`, add `polish_steps=200`, or start from "
            "the data (`fit_em(y, num_states)`)."
        )
    if result.reason == "stuck":
        found.append(
            "`polish_steps`: L-BFGS took no step, although a slope is left: the fit is not at a maximum. Scale the "
            "data and states to sizes near 1, use 64 bits, or start elsewhere."
        )
    if y is not None and start.d is not None and start.dtype == jnp.float32 and is_rounded(y):
        found.append(
            "`y` needs 64 bits: the fit subtracted the means in 64, but the offsets `d` of its result are rounded to "
            '32. Subtract a constant from the data, or switch on jax.config.update("jax_enable_x64", True).'
        )
    return found


def _left(gains: np.ndarray) -> float:
    """What is left to gain, if gains go on to shrink as they did in the last iterations."""
    steps = min(5, len(gains) - 1)  # several: rounding makes single gains rough
    first, last = gains[-1 - steps], gains[-1]
    ratio = (last / first) ** (1 / steps) if first > 0 and last > 0 else 0.0
    return float(gains[-1] * ratio / (1 - ratio)) if ratio < 1 else float("inf")
