"""Readings that the others of their step, or what is known before, fix exactly: their density, and contradictions.

With exact sensors (zero rows of `chol_R`) the innovation of a step may lie in a subspace for certain: the pivot of a
tied reading in `S^1/2` is zero. Such a step has a density with respect to the length, area, ... in that subspace; its
scale is the root of the product of those eigenvalues of `S` that are not zero. With `G` the live columns of `S^1/2`,
`[L1; W L1]` in the live and the tied rows,

    det(G'G) = det(L1)^2 det(1 + W'W)

The pivots give the first factor, the second is made up for here (from `G`: `W` may be large). So the value does not
depend on the order of the readings. Where the subspace does not move with a parameter, the second factor is a constant;
where it does, densities of different parameters cannot be compared. So it has no derivative. A tied reading must be `W`
times the live ones; where it is not, the data contradict the model, and the log-likelihood is minus infinity.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pssm._types import Array
from pssm.linalg import orthogonalise_with_care
from pssm.linalg.small import affine, matmul, times
from pssm.ssm import LinearGaussianSSM

ROUNDING = 0.4  # a tied reading may be off by `eps ** ROUNDING` of its size: 5e-7 in float64, 2e-3 in float32
LEAST = 1e3  # and by so many roundings of the largest reading of its step: projected data have zeros of that size


class OfStep(NamedTuple):
    """What of a step is needed here: `[C L, chol_R]`, `S^-1/2`, and the orthogonal factor of the update."""

    rows: Array
    root: Array
    turn: Array


def innovation_rows(ssm: LinearGaussianSSM, chol: Array) -> Array:
    """`[C L, chol_R]`."""
    return jnp.concatenate([matmul(ssm.C, chol), ssm.chol_R], axis=1)


def what_ties_add(
    ssm: LinearGaussianSSM, row: OfStep, mean: Array, y: Array, observed: Array, u: Array | None
) -> Array:
    """What one step's log-likelihood lacks, of one series or of series side by side; minus infinity at a contradiction.

    Args:
        ssm: the model of the step.
        row: of the step.
        mean: predicted mean, `(state,)` or `(state, series)`.
        y: readings, likewise, missing ones filled.
        observed: which are not missing.
        u: inputs, where the model has `D`.
    """
    off, log_det = _ties(ssm, row, mean, y, observed, u)
    return jnp.where(jnp.any(off, axis=0), -jnp.inf, 0.0 - 0.5 * log_det)


def contradictions(
    ssm: LinearGaussianSSM, row: OfStep, mean: Array, y: Array, observed: Array, u: Array | None
) -> Array:
    """Which readings of a step are tied and are not what the others say. Arguments as in `what_ties_add`."""
    return _ties(ssm, row, mean, y, observed, u)[0]


def _ties(
    ssm: LinearGaussianSSM, row: OfStep, mean: Array, y: Array, observed: Array, u: Array | None
) -> tuple[Array, Array]:
    """Which tied readings are off, and `log det(1 + W'W)`."""
    seen = observed if observed.ndim == 1 else jnp.any(observed, axis=1)
    columns = jnp.where(seen[:, None], matmul(row.rows, row.turn[: len(y)].T), 0.0)  # of S^1/2: zero where tied
    by_live = matmul(columns, row.root)  # W, in the rows of tied readings
    predicted = affine(ssm.C, ssm.d, ssm.D, mean, u)
    residual = jnp.where(observed, y - predicted, 0.0)
    off = jnp.abs(residual - times(by_live, residual))
    size = jnp.abs(y) + jnp.abs(predicted) + times(jnp.abs(ssm.C), jnp.abs(mean))
    size = size + times(jnp.abs(by_live), jnp.abs(residual))
    rounding = jnp.finfo(y.dtype).eps
    room = rounding**ROUNDING * size + LEAST * rounding * jnp.max(jnp.abs(y), axis=0)
    live = jnp.diagonal(columns) > 0
    tied = observed & ~live.reshape(-1, *(1,) * (y.ndim - 1))
    off = tied & (off > room)
    return off, 2 * (_log_product(orthogonalise_with_care(columns.T)[0]) - _log_product(columns))


def _log_product(factor: Array) -> Array:
    """The log of the product of the pivots that are not zero."""
    pivots = jnp.diagonal(factor)
    return jnp.sum(jnp.log(jnp.where(pivots > 0, pivots, 1.0)))
