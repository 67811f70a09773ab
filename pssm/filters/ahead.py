"""Forecasts: the steps after a series, alone or given that some of their values are known already."""

import jax
import jax.numpy as jnp

from pssm._checks import check_count, check_series
from pssm._types import Array, ArrayLike, Key
from pssm.batch import over_batches
from pssm.correlated import noise_as_state
from pssm.filters.covariance import timed_fields
from pssm.filters.kalman import kalman_filter, simulate
from pssm.filters.smoother import kalman_smoother, sample_states
from pssm.filters.step import common_dtype, emission_mean, predict_one
from pssm.linalg import outer
from pssm.linalg.small import matmul
from pssm.results import ForecastResult
from pssm.ssm import (
    LinearGaussianSSM,
    check_inputs,
    check_model,
    check_num_steps,
)


def forecast(
    ssm: LinearGaussianSSM,
    y: ArrayLike,
    num_steps: int,
    u: ArrayLike | None = None,
    u_future: ArrayLike | None = None,
    *,
    y_future: ArrayLike | None = None,
) -> ForecastResult:
    """Exact moments of the `num_steps` steps that follow the series.

    The first row is one full transition after the last observation: `A P A' + Q`, not `P`. With `y_future` they are
    those of `p(y_{T+1:T+h} | y_{1:T}, known entries of y_{T+1:T+h})`: a scenario, or series that are published early.
    Known entries come back as they are, without variance.

    Args:
        ssm: the model. Time-varying arrays must cover `time + num_steps` steps, or more.
        y: observations `(time, obs)`; NaN entries are missing.
        num_steps: the horizon, at least 1.
        u: inputs of the observed steps `(time, input)`, where the model has `B` or `D`.
        u_future: inputs of the future steps `(num_steps, input)`, likewise.
        y_future: values of the future that are known, `(num_steps, obs)`; NaN where they are not.

    Returns:
        A `ForecastResult` with `num_steps` rows.

    Raises:
        ValueError: a shape does not fit, or inputs for the future are absent; or, outside of `jit`, known values
            contradict the model.

    Example:
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1e7]], [[1.0]], [[1469.1]], [[1.0]], [[15099.0]])
        >>> forecast(model, [1120.0, 1160.0, 963.0], 2).mean.shape
        (2, 1)
        >>> known = forecast(model, [1120.0, 1160.0, 963.0], 2, y_future=[float("nan"), 1000.0])
        >>> known.mean[1].tolist(), known.cov[1].tolist()
        ([1000.0], [[0.0]])
    """
    check_model(ssm)
    check_count("num_steps", num_steps)
    series = check_series(y, ssm.n_obs)
    length = series.shape[-2]
    check_num_steps(ssm, length + num_steps, "`y` with the forecast horizon", or_more=True)
    inputs = check_inputs(ssm, u, length)
    future = check_inputs(ssm, u_future, num_steps, "u_future")
    known = check_known(y_future, num_steps, ssm.n_obs)
    ssm, series, inputs, future = common_dtype(ssm, series, inputs, future)
    known = None if known is None else known.astype(series.dtype)

    def one(
        model: LinearGaussianSSM, y_one: Array, u_one: Array | None, u_next: Array | None, y_next: Array | None
    ) -> ForecastResult:
        after = continuation(model, y_one, num_steps, u_one, u_next)
        return _prior_moments(after, num_steps, u_next) if y_next is None else given_some(after, y_next, u_next)

    return over_batches(one, ssm, (series, 2), (inputs, 2), (future, 2), (known, 2))


def check_known(y_future: ArrayLike | None, num_steps: int, n_obs: int) -> Array | None:
    """Known values of the future, `(..., num_steps, obs)`, or None."""
    if y_future is None:
        return None
    known = check_series(y_future, n_obs, "y_future")
    if known.shape[-2] != num_steps:
        raise ValueError(
            f"`y_future` must have a row for each of the {num_steps} steps of the forecast, NaN where nothing is "
            f"known; got {known.shape[-2]}."
        )
    return known


def continuation(
    ssm: LinearGaussianSSM, y: Array, num_steps: int, u: Array | None = None, u_future: Array | None = None
) -> LinearGaussianSSM:
    """The model of the `num_steps` steps after an unbatched series: its first state is the one-step prediction.

    `simulate` on it draws future paths, its prior moments are the forecast. Arguments as in `forecast`.
    """
    length = y.shape[0]
    kept = kalman_filter(ssm.steps(0, length), y, u)
    rest = ssm.steps(length, length + num_steps)
    first = predict_one(rest.at_time(0), kept.mean[-1], kept.chol[-1], None if u_future is None else u_future[0])
    return rest.starting_at(first.mean, first.chol)


def given_some(ssm: LinearGaussianSSM, y: Array, u: Array | None = None) -> ForecastResult:
    """Moments of all entries of an unbatched series given those that are known (not NaN), without variance there."""
    whole = noise_as_state(ssm)
    found = kalman_smoother(whole, y, u)
    seen = ~jnp.isnan(y)
    mean, cov = whole.signal(found.mean, u), outer(whole.with_time_axis("C") @ found.chol)
    open_ = ~seen[:, :, None] & ~seen[:, None, :]
    n = ssm.n_state
    return ForecastResult(
        jnp.where(seen, y, mean), jnp.where(open_, cov, 0.0), found.mean[:, :n], outer(found.chol[:, :n])
    )


def draw_future(
    key: Key,
    ssm: LinearGaussianSSM,
    y: Array,
    num_steps: int,
    u: Array | None = None,
    u_future: Array | None = None,
    y_future: ArrayLike | None = None,
) -> Array:
    """One path of the observations that follow a series, `(..., num_steps, obs)`. Arguments as in `forecast`."""
    after = over_batches(lambda s, y, u, v: continuation(s, y, num_steps, u, v), ssm, (y, 2), (u, 2), (u_future, 2))
    known = check_known(y_future, num_steps, ssm.n_obs)
    if known is None:
        return simulate(key, after, num_steps, u_future)[1]
    batch = jnp.broadcast_shapes(after.batch_shape, known.shape[:-2])
    keys = jax.random.split(key, batch) if batch else key
    return over_batches(lambda s, k, y, u: draw_given_some(k, s, y, u), after, (keys, 0), (known, 2), (u_future, 2))


def draw_given_some(key: Key, ssm: LinearGaussianSSM, y: Array, u: Array | None = None) -> Array:
    """A draw of all entries of an unbatched series given those that are known (not NaN)."""
    whole = noise_as_state(ssm)
    return jnp.where(jnp.isnan(y), whole.signal(sample_states(key, whole, y, u), u), y)


def _prior_moments(ssm: LinearGaussianSSM, num_steps: int, u: Array | None) -> ForecastResult:
    """Moments before any observation: a filter that sees nothing, and the emission on top."""
    prior = kalman_filter(ssm, jnp.full((num_steps, ssm.n_obs), jnp.nan, ssm.dtype), u)

    def emit(mean: Array, chol: Array, u_t: Array | None, timed: dict[str, Array]) -> tuple[Array, Array]:
        now = ssm.at(timed)
        return emission_mean(now, mean, u_t), outer(jnp.concatenate([matmul(now.C, chol), now.chol_R], axis=1))

    mean, cov = jax.vmap(emit)(prior.predicted_mean, prior.predicted_chol, u, timed_fields(ssm, ahead=False))
    return ForecastResult(mean, cov, prior.predicted_mean, prior.predicted_cov)
