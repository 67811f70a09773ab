"""The exact filter in square-root form, and what needs nothing but a forward pass: simulation and forecasts.

Covariances and gains come first, in `covariance.py`, and do not see the data. The means follow here, each step no more
than a few products of a matrix and a vector.
"""

import warnings
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_choice, check_count, check_series, is_traced
from pssm._types import Array, ArrayLike, Float, Key
from pssm.batch import apart, for_each, over_batches, side_by_side
from pssm.filters.covariance import Gains, by_step, over_series, spread_rows, timed_fields
from pssm.linalg import outer, triangularise
from pssm.linalg.random import standard_normal
from pssm.linalg.small import affine, matmul, matvec, times, unroll
from pssm.missing import split_missing
from pssm.nonlinear import NonlinearSSM
from pssm.results import FilterResult, ForecastResult
from pssm.ssm import (
    LinearGaussianSSM,
    check_inputs,
    check_model,
    check_num_steps,
)

METHODS = ("auto", "sequential", "square_root", "parallel")
LEAST_NOISE = 1e3  # in units of the rounding of `y`


def kalman_filter(
    ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None = None, *, method: str = "auto"
) -> FilterResult:
    """Exact filtering, `p(z_t | y_{1:t})` for every `t`, and the log-likelihood.

    Args:
        ssm: the model.
        y: observations `(time, obs)`, or `(time,)` for one variable; NaN entries are missing.
        u: inputs `(time, input)`, where the model has `B` or `D`.
        method: all work on square roots. `"auto"` stops computing covariances once they stand still; `"sequential"`
            and `"square_root"` compute those of every step; `"parallel"` is an associative scan over time, for GPUs.

    Returns:
        A `FilterResult`. An entry of `y` whose variance given everything before it is exactly zero (exact
        observation of a known state) has no density and contributes nothing to the log-likelihood.

    Raises:
        ValueError: a shape does not fit the model, `y` has an infinite value or no time step, or `method` is unknown.

    Example:
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1e7]], [[1.0]], [[1469.1]], [[1.0]], [[15099.0]])
        >>> result = kalman_filter(model, [1120.0, 1160.0, float("nan"), 1210.0])
        >>> result.mean.shape, result.log_likelihoods.shape
        ((4, 1), (4,))

    Source:
        Kalman 1960; square-root form: Kailath, Sayed & Hassibi 2000, chapter 12.
    """
    ssm, series, inputs = prepare(ssm, y, u, method)
    if method == "parallel":
        return _parallel(ssm, series, inputs)
    return _filter(ssm, series, inputs, freeze=method == "auto")


def log_likelihoods(
    ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None = None, *, method: str = "auto"
) -> Float[Array, "*batch time"]:
    """`log p(y_t | y_{1:t-1})` for every step. Arguments and errors as in `kalman_filter`."""
    ssm, series, inputs = prepare(ssm, y, u, method)
    if method == "parallel":
        return _parallel(ssm, series, inputs).log_likelihoods
    return _log_likelihoods(ssm, series, inputs, freeze=method == "auto")


def simulate(
    key: Key, ssm: LinearGaussianSSM | NonlinearSSM, num_steps: int, u: ArrayLike | None = None
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


def forecast(
    ssm: LinearGaussianSSM,
    y: ArrayLike,
    num_steps: int,
    u: ArrayLike | None = None,
    u_future: ArrayLike | None = None,
) -> ForecastResult:
    """Exact moments of the `num_steps` steps that follow the series.

    The first row is one full transition after the last observation: `A P A' + Q`, not `P`.

    Args:
        ssm: the model. Time-varying arrays must cover `time + num_steps` steps, or more.
        y: observations `(time, obs)`; NaN entries are missing.
        num_steps: the horizon, at least 1.
        u: inputs of the observed steps `(time, input)`, where the model has `B` or `D`.
        u_future: inputs of the future steps `(num_steps, input)`, likewise.

    Returns:
        A `ForecastResult` with `num_steps` rows.

    Raises:
        ValueError: a shape does not fit, or inputs for the future are absent.

    Example:
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1e7]], [[1.0]], [[1469.1]], [[1.0]], [[15099.0]])
        >>> forecast(model, [1120.0, 1160.0, 963.0], 2).mean.shape
        (2, 1)
    """
    check_model(ssm)
    check_count("num_steps", num_steps)
    series = check_series(y, ssm.n_obs)
    length = series.shape[-2]
    check_num_steps(ssm, length + num_steps, "`y` with the forecast horizon", or_more=True)
    inputs = check_inputs(ssm, u, length)
    future = check_inputs(ssm, u_future, num_steps, "u_future")
    ssm, series, inputs, future = _common_dtype(ssm, series, inputs, future)

    def one(model: LinearGaussianSSM, y_one: Array, u_one: Array | None, u_next: Array | None) -> ForecastResult:
        return _prior_moments(continuation(model, y_one, num_steps, u_one, u_next), num_steps, u_next)

    return over_batches(one, ssm, (series, 2), (inputs, 2), (future, 2))


def continuation(
    ssm: LinearGaussianSSM, y: Array, num_steps: int, u: Array | None = None, u_future: Array | None = None
) -> LinearGaussianSSM:
    """The model of the `num_steps` steps after an unbatched series: its first state is the one-step prediction.

    `simulate` on it draws future paths, its prior moments are the forecast. Arguments as in `forecast`.
    """
    length = y.shape[0]
    kept = _filter(ssm.steps(0, length), y, u, freeze=True)
    rest = ssm.steps(length, length + num_steps)
    first = rest.at({name: getattr(rest, name)[0] for name in rest.time_varying})
    u_first = None if u_future is None else u_future[0]
    chol = triangularise(jnp.concatenate([matmul(first.A, kept.chol[-1]), first.chol_Q], axis=1))
    return rest.starting_at(transition_mean(first, kept.mean[-1], u_first), chol)


# ---------------------------------------------------------------------------------------------------------------------


def prepare(
    ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None, method: str, methods: tuple[str, ...] = METHODS
) -> tuple[LinearGaussianSSM, Array, Array | None]:
    """Checks what came in and brings it to one floating-point type."""
    check_choice("method", method, methods)
    check_model(ssm)
    series = check_series(y, ssm.n_obs)
    check_num_steps(ssm, series.shape[-2], "`y`")
    inputs = check_inputs(ssm, u, series.shape[-2])
    ssm, series, inputs = _common_dtype(ssm, series, inputs)
    _warn_noise_below_rounding(ssm, series)
    return ssm, series, inputs


def _warn_noise_below_rounding(ssm: LinearGaussianSSM, y: Array) -> None:
    """Says so where more readings than states must agree to within a noise that 32-bit numbers do not resolve."""
    if y.dtype != jnp.float32 or ssm.n_obs <= ssm.n_state or is_traced(y) or is_traced(ssm.chol_R):
        return
    rows = np.asarray(y).reshape(-1, ssm.n_obs)
    rounding = np.finfo(np.float32).eps * np.max(np.abs(rows), axis=0, initial=0.0, where=np.isfinite(rows))
    noise = np.linalg.norm(np.asarray(ssm.chol_R), axis=-1).reshape(-1, ssm.n_obs).min(0, initial=np.inf)
    close = np.flatnonzero((0 < noise) & (noise < LEAST_NOISE * rounding))
    if close.size:
        i = close[0]
        warnings.warn(
            f"`chol_R` gives column {i} of `y` noise of standard deviation {noise[i]:.3g}, where 32-bit numbers of its "
            f"size differ by {rounding[i]:.3g}; and the {ssm.n_obs} observations of a step have to agree to within "
            f"their noise, as there are only {ssm.n_state} states. The log-likelihood, its derivatives and smoothed "
            'states may be wrong: switch on 64-bit arithmetic with jax.config.update("jax_enable_x64", True).',
            stacklevel=4,
        )


def _common_dtype(ssm: LinearGaussianSSM, *arrays: Array | None) -> tuple:
    dtype = jnp.result_type(ssm.dtype, *(x for x in arrays if x is not None))
    return ssm.astype(dtype), *(None if x is None else x.astype(dtype) for x in arrays)


def shift(u: Array | None) -> Array | None:
    """Inputs one step ahead; the last one is repeated and what comes of it is thrown away."""
    return None if u is None else jnp.concatenate([u[1:], u[-1:]])


def transition_mean(ssm: LinearGaussianSSM, z: Array, u: Array | None) -> Array:
    """`A z + b + B u`, at one time, of one state or of states side by side."""
    return affine(ssm.A, ssm.b, ssm.B, z, u)


def emission_mean(ssm: LinearGaussianSSM, z: Array, u: Array | None) -> Array:
    """`C z + d + D u`, likewise; of whole paths it is the method `signal`."""
    return affine(ssm.C, ssm.d, ssm.D, z, u)


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
        gain, root = row_of_step(row)
        residual = jnp.where(observed_t, y_t - emission_mean(now, mean, u_t), 0.0)
        whitened = times(root, residual)
        new_mean = mean + times(gain, whitened)
        return transition_mean(now, new_mean, u_next), Means(mean, new_mean, whitened)

    xs = row_xs, filled, observed, u, shift(u), timed_fields(ssm, ahead=True)
    start = ssm.m0 if y.ndim == 2 else jnp.broadcast_to(ssm.m0[:, None], (ssm.n_state, filled.shape[2]))
    means = jax.lax.scan(step, start, xs, unroll=unroll(ssm.n_state))[1]
    log_norm = spread_rows(rows.log_norm, last, length).reshape(-1, *(1,) * (filled.ndim - 2))
    seen = jnp.any(observed, axis=1)  # a series may end before others that have the same gains
    return means, jnp.where(seen, log_norm - 0.5 * jnp.sum(means.whitened**2, axis=1), 0.0)


@partial(jax.jit, static_argnames="freeze")
def _log_likelihoods(ssm: LinearGaussianSSM, y: Array, u: Array | None, *, freeze: bool) -> Array:
    def each_step(rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
        return scan_means(rows, last, ssm, y, u)[1].T.reshape(y.shape[:-1])

    return over_series(each_step, ssm, y, u, freeze=freeze, ends_matter=False)


@partial(jax.jit, static_argnames="freeze")
def _filter(ssm: LinearGaussianSSM, y: Array, u: Array | None, *, freeze: bool) -> FilterResult:
    return over_series(filter_result, ssm, y, u, freeze=freeze)


def filter_result(rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> FilterResult:
    """Everything the filter knows, given the gains. What is not used costs nothing."""
    means, log_liks = scan_means(rows, last, ssm, y, u)
    batch, log_liks = y.shape[:-2], log_liks.T.reshape(y.shape[:-1])
    chol, new_chol = for_each(batch, spread_rows((rows.chol, rows.new_chol), last, y.shape[-2]))
    return FilterResult(
        log_liks.sum(-1), log_liks, apart(means.new_mean, batch), new_chol, apart(means.mean, batch), chol
    )


@jax.jit
def _parallel(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> FilterResult:
    from pssm.filters.parallel import parallel_filter  # which is built on this module

    return over_batches(parallel_filter, ssm, (y, 2), (u, 2))


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


def _prior_moments(ssm: LinearGaussianSSM, num_steps: int, u: Array | None) -> ForecastResult:
    """Moments before any observation: a filter that sees nothing, and the emission on top."""
    nothing = jnp.full((num_steps, ssm.n_obs), jnp.nan, ssm.dtype)
    prior = _filter(ssm, nothing, u, freeze=True)

    def emit(mean: Array, chol: Array, u_t: Array | None, timed: dict[str, Array]) -> tuple[Array, Array]:
        now = ssm.at(timed)
        return emission_mean(now, mean, u_t), outer(jnp.concatenate([matmul(now.C, chol), now.chol_R], axis=1))

    mean, cov = jax.vmap(emit)(prior.predicted_mean, prior.predicted_chol, u, timed_fields(ssm, ahead=False))
    return ForecastResult(mean, cov, prior.predicted_mean, prior.predicted_cov)
