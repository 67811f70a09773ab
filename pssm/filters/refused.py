"""Data that contradict the model are refused in words, where values are there; under `jit` they have density zero."""

import warnings
from typing import Any

import jax
import numpy as np

from pssm._checks import is_traced
from pssm._types import Array
from pssm.batch import over_batches
from pssm.filters.means import find_contradictions
from pssm.ssm import LinearGaussianSSM


def possible(result: Any, log_likelihood: Array, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Any:
    """`result` as it is, unless its log-likelihood is minus infinity.

    Raises:
        ValueError: a reading of `y` is fixed by the others of its step, or by what is known before, and is not so.
    """
    if is_traced(log_likelihood) or not np.isneginf(log_likelihood).any():
        return result
    if ssm.diffuse:
        raise ValueError(
            "`y` contradicts the model: a reading without noise is not what the other readings and the steps before "
            "fix exactly. Give it noise in `chol_R`, the state noise in `chol_Q`, or mark it as missing (NaN)."
        )
    off = np.asarray(_off(ssm, y, u))
    if not off.any():
        return result
    place = tuple(int(i) for i in np.argwhere(off)[0])
    *batch, t, sensor = place
    where = f" of series {tuple(batch)}" if batch else ""
    raise ValueError(
        f"`y` contradicts the model at step {t}, column {sensor}{where}: {np.broadcast_to(y, off.shape)[place]:.6g} is "
        "read there without noise, but the other readings and the steps before fix another value exactly. Give column "
        f"{sensor} noise in `chol_R`, the state noise in `chol_Q`, or mark the reading as missing (NaN)."
    )


def determined(result: Any, mean: Array, ssm: LinearGaussianSSM) -> Any:
    """`result` as it is; with a word, where values are there, on states whose diffuse start the data leave open."""
    if ssm.diffuse and not is_traced(mean):
        states = np.flatnonzero(np.isnan(np.asarray(mean)).any(axis=tuple(range(mean.ndim - 1))))
        if states.size:
            warnings.warn(
                f"`y` does not determine the diffuse start of states {states.tolist()}: their mean is NaN and their "
                "variance infinite. Give them a finite `P0`, or more data.",
                stacklevel=3,
            )
    return result


@jax.jit
def _off(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    return over_batches(find_contradictions, ssm, (y, 2), (u, 2))
