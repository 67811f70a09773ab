"""Smoothed disturbances: what a whole series says of the noises of its transitions and of its observations.

The factors of `smoother.py` have them. In units of the noises themselves, with `e` the next predicted state, `x` the
filtered one, `w` the whitened innovation, and `v` the noise of the observation,

    noise of the transition = Q2' e + ...        v = Q12' w + Q22' x + ...

where the dots are of no mean, and independent of the data. So nothing is the difference of two states.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array, ArrayLike, Float
from pssm.batch import over_batches
from pssm.filters.covariance import Gains, every_step, timed_fields
from pssm.filters.diffuse import begin
from pssm.filters.means import scan_means
from pssm.filters.plan import prepare
from pssm.filters.smoother import what_is_left
from pssm.linalg import triangularise
from pssm.linalg.small import matmul, matvec
from pssm.ssm import LinearGaussianSSM


class DisturbanceResult(NamedTuple):
    """Means of the noises given the whole series, and how far the data can move them.

    Attributes:
        state: `E[chol_Q e_t | y]`, of the step INTO t, `(time, state)`; 0 at the first time, which no step precedes.
        state_sd: standard deviation of `state` over series of the model, `(time, state)`; 0 where there is no noise.
        obs: `E[chol_R v_t | y]`, `(time, obs)`; NaN where `y` is missing.
        obs_sd: standard deviation of `obs` over series of the model.
    """

    state: Float[Array, "*batch time state"]
    state_sd: Float[Array, "*batch time state"]
    obs: Float[Array, "*batch time obs"]
    obs_sd: Float[Array, "*batch time obs"]


def smooth_disturbances(ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None = None) -> DisturbanceResult:
    """Smoothed disturbances of transitions and observations, exact. Arguments and errors as in `kalman_smoother`.

    Example:
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1e7]], [[1.0]], [[1469.1]], [[1.0]], [[15099.0]])
        >>> smooth_disturbances(model, [1120.0, 1160.0, 963.0]).state.shape
        (3, 1)

    Source:
        de Jong & Penzer 1998; Durbin & Koopman 2012, section 4.5.
    """
    return _smooth(*prepare(ssm, y, u, "auto"))


@jax.jit
def _smooth(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> DisturbanceResult:
    return over_batches(_of_one_series, ssm, (y, 2), (u, 2))


def _of_one_series(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> DisturbanceResult:
    n, n_obs = ssm.n_state, ssm.n_obs
    if ssm.diffuse:
        begun = begin(ssm, y, u, len(y), back=True)
        rows, whitened, more = begun.rows, begun.means.whitened, begun.open.by_x[:, :n, n:]
    else:
        more = None
        rows = every_step(ssm, ~jnp.isnan(y))
        whitened = scan_means(rows, len(y) - 1, ssm, y, u)[0].whitened
    eye = jnp.eye(n, dtype=y.dtype)

    def back(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
        """`e` and `V` of the next time (`smoother.py`): the noise into it, and all of this time."""
        (e, V), (row, w, more_t, timed) = carry, xs
        row, now = Gains(*row), ssm.at(timed)
        forth, noise = row.turn_next[:, :n], row.turn_next[:, n:]
        into_next = _moments(now.chol_Q, matvec(noise.T, e), noise, V)
        x, W = matvec(forth.T, e), what_is_left(row.turn_next, matmul(forth.T, V))
        q_obs, q_state = row.turn[:n_obs], row.turn[n_obs:]
        at_once = jnp.concatenate([q_obs[:, n:], q_state[:, n:]])
        left = jnp.zeros((n_obs + n, n), y.dtype).at[n_obs:].set(W)  # of `w` nothing is left
        of_obs = _moments(now.chol_R, matvec(at_once.T, jnp.concatenate([w, x])), at_once, left)
        e = matvec(q_obs[:, :n].T, w) + matvec(q_state[:, :n].T, x)
        V = matmul(q_state[:, :n].T, W)
        if more_t is not None:  # a reading that closes an open direction of the start says nothing of `e`
            V = triangularise(jnp.concatenate([V, more_t], axis=1))
        return (e, V), (*into_next, *of_obs)

    # After the last time nothing is known: e = 0 and V = 1. What is said of a step beyond it is thrown away.
    xs = tuple(rows), whitened, more, timed_fields(ssm, ahead=True)
    _, (state, state_sd, obs, obs_sd) = jax.lax.scan(back, (jnp.zeros(n, y.dtype), eye), xs, reverse=True)
    state, state_sd = (jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]]) for x in (state, state_sd))
    return DisturbanceResult(state, state_sd, *(jnp.where(jnp.isnan(y), jnp.nan, x) for x in (obs, obs_sd)))


def _moments(factor: Array, mean: Array, turn: Array, left: Array) -> tuple[Array, Array]:
    """`F m`, and the standard deviations of `F turn'` times what the data know: all but `left left'`."""
    known = jnp.eye(len(turn), dtype=left.dtype) - matmul(left, left.T)
    spread = matmul(factor, turn.T)
    return matvec(factor, mean), jnp.sqrt(jnp.maximum(jnp.sum(matmul(spread, known) * spread, axis=1), 0.0))
