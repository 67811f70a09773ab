"""Moments and quantiles of mixtures of normal distributions, one for each posterior draw, entry by entry."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

from pssm._types import ArrayLike

HALVINGS = 45  # of an interval of some twenty standard deviations


class MixtureMoments(NamedTuple):
    """Moments of a mixture over posterior draws, entry by entry: parameter uncertainty included."""

    mean: np.ndarray
    sd: np.ndarray


def mixture(mean: ArrayLike, variance: ArrayLike, origin: Any = 0) -> MixtureMoments:
    """Law of total variance over the leading axis; the means are counted from `origin`, in whose precision they are."""
    kind = np.result_type(np.asarray(mean), *(() if np.isscalar(origin) else (origin,)))
    mean, variance = np.asarray(mean, float), np.asarray(variance, float)
    sd = np.sqrt(variance.mean(0) + mean.var(0))
    return MixtureMoments((mean.mean(0) + origin).astype(kind), sd.astype(kind))


def mixture_quantiles(mean: np.ndarray, variance: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Quantiles `(level, ...)` of the mixture over the leading axis, by bisection."""
    mean = np.asarray(mean, float)
    sd = np.sqrt(np.maximum(np.asarray(variance, float), 0.0))
    sd, mean = np.broadcast_arrays(sd, mean)
    if len(mean) == 1:  # a normal distribution
        return mean[0] + sd[0] * ndtri(np.reshape(levels, (-1, *(1,) * (mean.ndim - 1))))
    fixed, unit = sd == 0, np.where(sd == 0, 1.0, sd)
    found = []
    for level in levels:
        low, high = (mean - 10 * sd).min(0), (mean + 10 * sd).max(0)
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            below = np.where(fixed, middle >= mean, ndtr((middle - mean) / unit)).mean(0) < level
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        found.append(0.5 * (low + high))
    return np.stack(found)
