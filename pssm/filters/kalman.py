"""The exact filter in square-root form, and simulation, which needs nothing but a forward pass.

A plan is made first (`plan.py`). Covariances and gains come next (`covariance.py`) and do not see the data; the means
follow (`means.py`), each step no more than a few products of a matrix and a vector (`step.py`).
"""

from functools import partial

import jax
import jax.numpy as jnp

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Float, KeyLike
from pssm.batch import apart, for_each, over_batches
from pssm.filters.covariance import Gains, spread_rows, timed_fields
from pssm.filters.diffuse import diffuse_filter
from pssm.filters.means import scan_means, shift
from pssm.filters.parallel import parallel_filter
from pssm.filters.passes import run
from pssm.filters.plan import Plan, plan_for, prepare
from pssm.filters.refused import possible
from pssm.filters.step import emission_mean, transition_mean
from pssm.linalg.random import standard_normal
from pssm.linalg.small import matvec
from pssm.nonlinear import NonlinearSSM
from pssm.results import FilterResult
from pssm.ssm import LinearGaussianSSM, check_inputs, check_model, check_num_steps


def kalman_filter(
    ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None = None, *, method: str = "auto"
) -> FilterResult:
    """Exact filtering, `p(z_t | y_{1:t})` for every `t`, and the log-likelihood.

    Args:
        ssm: the model.
        y: observations `(time, obs)`, or `(time,)` for one variable; NaN entries are missing.
        u: inputs `(time, input)`, where the model has `B` or `D`.
        method: all work on square roots. `"auto"` computes covariances until the gain reaches its steady state;
            `"sequential"` and `"square_root"` compute those of every step; `"parallel"` is an associative scan over
            time, for GPUs.

    Returns:
        A `FilterResult`. An entry of `y` that others of its step, or the data before it, fix exactly (exact sensors)
        adds no dimension: the density is with respect to the subspace that the step's entries can move in, whatever
        their order. Where it is not as they fix it, the log-likelihood is minus infinity. While a diffuse start is not
        determined, means are NaN and variances infinite (covariances with them NaN).

    Raises:
        ValueError: a shape does not fit the model, `y` has an infinite value or no time step, or `method` is unknown;
            or, outside of `jit`, the data contradict the model.

    Example:
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1e7]], [[1.0]], [[1469.1]], [[1.0]], [[15099.0]])
        >>> result = kalman_filter(model, [1120.0, 1160.0, float("nan"), 1210.0])
        >>> result.mean.shape, result.log_likelihoods.shape
        ((4, 1), (4,))

    Source:
        Kalman 1960; square-root form: Kailath, Sayed & Hassibi 2000, chapter 12.
    """
    ssm, series, inputs = prepare(ssm, y, u, method)
    result = _filter(plan_for(ssm, series, inputs, method=method), ssm, series, inputs)
    return possible(result, result.log_likelihood, ssm, series, inputs)


def log_likelihoods(
    ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None = None, *, method: str = "auto"
) -> Float[Array, "*batch time"]:
    """`log p(y_t | y_{1:t-1})` for every step. Arguments and errors as in `kalman_filter`."""
    ssm, series, inputs = prepare(ssm, y, u, method)
    plan = plan_for(ssm, series, inputs, method=method, ends_matter=False)
    each = _log_likelihoods(plan, ssm, series, inputs)
    return possible(each, each, ssm, series, inputs)


def simulate(
    key: KeyLike, ssm: LinearGaussianSSM | NonlinearSSM, num_steps: int, u: ArrayLike | None = None
) -> tuple[Float[Array, "*batch time state"], Float[Array, "*batch time obs"]]:
    """Draws states and observations from the model, `p(z_{1:T}, y_{1:T})`.

    Args:
        key: JAX random key.
        ssm: the model, linear-Gaussian or not.
        num_steps: number of time steps, at least 1.
        u: inputs `(num_steps, input)`, where the model has `B` or `D`.

    Returns:
        `(z, y)` of shapes `(num_steps, state)` and `(num_steps, obs)`.

    Raises:
        ValueError: `num_steps` is below 1 or not the length of the time-varying arrays, or `u` does not fit.

    Example:
        >>> import jax
        >>> one = [[1.0]]
        >>> z, y = simulate(jax.random.key(0), LinearGaussianSSM([0.0], one, one, one, one, one), 5)
        >>> z.shape, y.shape
        ((5, 1), (5, 1))
    """
    key = as_key(key)
    check_count("num_steps", num_steps)
    if isinstance(ssm, NonlinearSSM):
        return ssm.simulate(key, num_steps, u)
    check_model(ssm)
    check_num_steps(ssm, num_steps, "`num_steps`")
    inputs = check_inputs(ssm, u, num_steps)
    inputs = None if inputs is None else inputs.astype(ssm.dtype)
    batch = jnp.broadcast_shapes(ssm.batch_shape, () if inputs is None else inputs.shape[:-2])
    state_key, obs_key = jax.random.split(key)
    state_noise = standard_normal(state_key, (*batch, num_steps, ssm.n_state + ssm.chol_Q.shape[-1]), ssm.dtype)
    obs_noise = standard_normal(obs_key, (*batch, num_steps, ssm.n_obs), ssm.dtype)
    return over_batches(_simulate, ssm, (inputs, 2), (state_noise, 2), (obs_noise, 2))


# ---------------------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="plan")
def _log_likelihoods(plan: Plan, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    if ssm.diffuse:
        return _filter(plan, ssm, y, u).log_likelihoods
    if plan.recursion == "parallel":
        return over_batches(parallel_filter, ssm, (y, 2), (u, 2)).log_likelihoods

    def of_each_step(rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
        return scan_means(rows, last, ssm, y, u)[1].T.reshape(y.shape[:-1])

    return run(of_each_step, plan, ssm, y, u)


@partial(jax.jit, static_argnames="plan")
def _filter(plan: Plan, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> FilterResult:
    if ssm.diffuse:

        def rest(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> FilterResult:
            return _filter(plan.for_rest(ssm, len(y)), ssm, y, u)

        return over_batches(partial(diffuse_filter, rest), ssm, (y, 2), (u, 2))
    if plan.recursion == "parallel":
        return over_batches(parallel_filter, ssm, (y, 2), (u, 2))
    return run(_filter_result, plan, ssm, y, u)


def _filter_result(rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> FilterResult:
    """Everything the filter knows, given the gains. XLA drops the fields that the caller ignores."""
    means, log_liks = scan_means(rows, last, ssm, y, u)
    batch, log_liks = y.shape[:-2], log_liks.T.reshape(y.shape[:-1])
    chol, new_chol = for_each(batch, spread_rows((rows.chol, rows.new_chol), last, y.shape[-2]))
    return FilterResult(
        log_liks.sum(-1), log_liks, apart(means.new_mean, batch), new_chol, apart(means.mean, batch), chol
    )


@jax.jit
def _simulate(ssm: LinearGaussianSSM, u: Array | None, state_noise: Array, obs_noise: Array) -> tuple[Array, Array]:
    n_state = ssm.n_state

    def step(z: Array, xs: tuple) -> tuple[Array, tuple[Array, Array]]:
        noise, next_noise, v, u_t, u_next, timed = xs
        now = ssm.at(timed)
        y = emission_mean(now, z, u_t) + matvec(now.chol_R, v)
        return transition_mean(now, z, u_next) + matvec(now.chol_Q, next_noise), (z, y)

    first, later = state_noise[0, :n_state], state_noise[:, n_state:]
    start = ssm.m0 + matvec(ssm.chol_P0, first)
    xs = state_noise, jnp.roll(later, -1, axis=0), obs_noise, u, shift(u), timed_fields(ssm, ahead=True)
    return jax.lax.scan(step, start, xs)[1]
