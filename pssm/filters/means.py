"""The half of the filter that sees the data, over a whole series: the means, given the gains of `covariance.py`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.batch import side_by_side
from pssm.filters.covariance import Gains, by_step, spread_rows, timed_fields
from pssm.filters.step import transition_mean, transition_rows, update_factor, update_mean
from pssm.filters.ties import OfStep, contradictions, innovation_rows, what_ties_add
from pssm.linalg import orthogonalise_with_care, triangularise, unless
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
    means = _scan(rows, last, ssm, filled, observed, u)
    log_norm = spread_rows(rows.log_norm, last, len(filled)).reshape(-1, *(1,) * (filled.ndim - 2))
    if rows.tied is not None:
        log_norm = log_norm + by_ties_of_all(jnp.any(rows.tied), ssm, filled, observed, u)
    seen = jnp.any(observed, axis=1)  # a series may end before others that have the same gains
    return means, jnp.where(seen, log_norm - 0.5 * jnp.sum(means.whitened**2, axis=1), 0.0)


def _scan(
    rows: Gains, last: Array | int, ssm: LinearGaussianSSM, filled: Array, observed: Array, u: Array | None
) -> Means:
    row_xs, row_of_step = by_step((rows.gain, rows.root), last, len(filled))

    def step(mean: Array, xs: tuple) -> tuple[Array, Means]:
        row, y_t, observed_t, u_t, u_next, timed = xs
        now = ssm.at(timed)
        new_mean, whitened = update_mean(now, *row_of_step(row), mean, y_t, observed_t, u_t)
        return transition_mean(now, new_mean, u_next), Means(mean, new_mean, whitened)

    xs = row_xs, filled, observed, u, shift(u), timed_fields(ssm, ahead=True)
    return jax.lax.scan(step, _first_mean(ssm, filled), xs, unroll=unroll(ssm.n_state))[1]


def _first_mean(ssm: LinearGaussianSSM, y: Array) -> Array:
    return ssm.m0 if y.ndim == 2 else jnp.broadcast_to(ssm.m0[:, None], (ssm.n_state, y.shape[2]))


def by_ties_of_all(tied: Array, ssm: LinearGaussianSSM, y: Array, observed: Array, u: Array | None) -> Array:
    """`what_ties_add` for all steps, `(time, ...)`, without derivatives; zeros unless an entry is `tied` somewhere.

    It is rare, so gains and means are computed once more: keeping them for it would cost every other model time.
    """
    args = jax.lax.stop_gradient((ssm, y, observed, u))
    return unless(~tied, jnp.zeros((len(y), *y.shape[2:]), y.dtype), lambda: _of_each_step(what_ties_add, *args))


def find_contradictions(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    """Which readings `(time, obs)` of an unbatched series are fixed by others and are not what these say."""
    return _of_each_step(contradictions, ssm, *split_missing(y), u)


def _of_each_step(
    what: Callable[..., Array], ssm: LinearGaussianSSM, y: Array, observed: Array, u: Array | None
) -> Array:
    """A function of `ties.py` for every step."""

    def step(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], Array]:
        (mean, chol), (y_t, seen, u_t, u_next, timed) = carry, xs
        now = ssm.at(timed)
        new = update_factor(now, chol, seen if seen.ndim == 1 else jnp.any(seen, axis=1), orthogonalise_with_care)
        found = what(now, OfStep(innovation_rows(now, chol), new.root, new.turn), mean, y_t, seen, u_t)
        mean = transition_mean(now, update_mean(now, new.gain, new.root, mean, y_t, seen, u_t)[0], u_next)
        return (mean, orthogonalise_with_care(transition_rows(now, new.new_chol))[0]), found

    xs = y, observed, u, shift(u), timed_fields(ssm, ahead=True)
    return jax.lax.scan(step, (_first_mean(ssm, y), triangularise(ssm.chol_P0)), xs)[1]


def shift(u: Array | None) -> Array | None:
    """Inputs one step ahead; the last one is repeated and what comes of it is thrown away."""
    return None if u is None else jnp.concatenate([u[1:], u[-1:]])
