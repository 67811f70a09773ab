"""The half of the filter that sees the data, over a whole series: the means, given the gains of `covariance.py`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.batch import side_by_side
from pssm.filters.covariance import Gains, by_step, spread_rows, timed_fields
from pssm.filters.step import transition_mean, update_mean
from pssm.linalg.small import unroll
from pssm.missing import split_missing
from pssm.ssm import LinearGaussianSSM


class Means(NamedTuple):
    """The filter's predicted and filtered means, and what the observations taught.

    All `(time, size)`, or `(time, size, series)`. `whitened` is `S^-1/2 (y - prediction)`, zero where nothing is
    observed.
    """

    mean: Array
    new_mean: Array
    whitened: Array


def scan_means(
    rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None
) -> tuple[Means, Array]:
    """The means of the series `y`, `(..., time, obs)`, given the gains, and `(time, series)` log-likelihoods.

    Series stand side by side, so that each product of a step is one for all of them.
    """
    filled, observed = split_missing(side_by_side(y))
    u = side_by_side(u)
    length = len(filled)
    row_xs, row_of_step = by_step((rows.gain, rows.root), last, length)

    def step(mean: Array, xs: tuple) -> tuple[Array, Means]:
        row, y_t, observed_t, u_t, u_next, timed = xs
        now = ssm.at(timed)
        new_mean, whitened = update_mean(now, *row_of_step(row), mean, y_t, observed_t, u_t)
        return transition_mean(now, new_mean, u_next), Means(mean, new_mean, whitened)

    xs = row_xs, filled, observed, u, shift(u), timed_fields(ssm, ahead=True)
    start = ssm.m0 if y.ndim == 2 else jnp.broadcast_to(ssm.m0[:, None], (ssm.n_state, filled.shape[2]))
    means = jax.lax.scan(step, start, xs, unroll=unroll(ssm.n_state))[1]
    log_norm = spread_rows(rows.log_norm, last, length).reshape(-1, *(1,) * (filled.ndim - 2))
    seen = jnp.any(observed, axis=1)  # a series may end before others that have the same gains
    return means, jnp.where(seen, log_norm - 0.5 * jnp.sum(means.whitened**2, axis=1), 0.0)


def shift(u: Array | None) -> Array | None:
    """Inputs one step ahead; the last one is repeated and what comes of it is thrown away."""
    return None if u is None else jnp.concatenate([u[1:], u[-1:]])
