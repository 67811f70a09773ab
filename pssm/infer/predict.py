"""States and forecasts from posterior draws: exact given the parameters, averaged over their posterior."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Key
from pssm.distributions import LinearGaussianMarginal
from pssm.filters import forecast as exact_forecast
from pssm.filters import kalman_filter, kalman_smoother, simulate
from pssm.filters import sample_states as exact_sample_states
from pssm.filters.kalman import continuation
from pssm.fitting.results import flatten_draws, trace_with
from pssm.ssm import check_inputs

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class MixtureMoments(NamedTuple):
    """Moments of a mixture of Gaussians over posterior draws, entry by entry: parameter uncertainty included."""

    mean: np.ndarray
    sd: np.ndarray


class StateMoments(NamedTuple):
    """Smoothed states and signal: `state` `(time, state)` and `signal` `(time, obs)`, without observation noise."""

    state: MixtureMoments
    signal: MixtureMoments


class ForecastDraws(NamedTuple):
    """A posterior predictive forecast.

    Attributes:
        mean: `(horizon, obs)`.
        sd: `(horizon, obs)`.
        quantiles: `(5, horizon, obs)` at 5, 25, 50, 75 and 95 %.
        draws: `(draw, horizon, obs)`: whole future paths, one for each posterior draw used.
    """

    mean: np.ndarray
    sd: np.ndarray
    quantiles: np.ndarray
    draws: np.ndarray


def marginal_site(trace: dict[str, Any]) -> tuple[str, LinearGaussianMarginal, Array] | None:
    """Name, distribution and value of the observed `LinearGaussianMarginal` of a trace, or None if it has none."""
    for name, site in trace.items():
        if site["type"] != "sample":
            continue
        fn = site["fn"]
        while isinstance(fn, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution):
            fn = fn.base_dist
        if isinstance(fn, LinearGaussianMarginal):
            return name, fn, site["value"]
    return None


def _thin(draws: dict[str, Any], most: int) -> dict[str, Array]:
    """At most `most` draws, evenly spaced over all chains."""
    flat = flatten_draws(draws)
    total = next(iter(flat.values())).shape[0]
    rows = np.linspace(0, total - 1, min(most, total)).astype(int)
    return {name: x[rows] for name, x in flat.items()}


def _over_draws(
    fn: Callable[..., Any],
    model: Callable[..., Any],
    draws: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    most: int,
    key: Key | int | None = None,
) -> Any:
    """`fn(distribution, data)` for posterior draws of a model with a `LinearGaussianMarginal`, in batches.

    With a `key`, `fn` gets a key of its own for every draw as its third argument.
    """
    thinned = _thin(draws, most)
    first = {name: x[0] for name, x in thinned.items()}
    if marginal_site(trace_with(model, first, *args, **kwargs)) is None:
        raise ValueError(
            "`model` has no `LinearGaussianMarginal` site, so its states cannot be integrated out exactly. "
            'pssm\'s linear models have one with states="marginal".'
        )

    def one(sample_and_keys: tuple[dict[str, Array], tuple[Array, ...]]) -> Any:
        sample, own_key = sample_and_keys
        site = marginal_site(trace_with(model, sample, *args, **kwargs))
        if site is None:
            raise ValueError("`model` has a `LinearGaussianMarginal` site for some parameters only.")
        return fn(site[1], site[2], *own_key)

    count = next(iter(thinned.values())).shape[0]
    keys = () if key is None else (jax.random.split(as_key(key), count),)
    return jax.jit(lambda s: jax.lax.map(one, s, batch_size=50))((thinned, keys))


def smoothed_states(
    model: Callable[..., Any], draws: dict[str, Any], *args: Any, most: int = 400, **kwargs: Any
) -> StateMoments:
    """Posterior moments of states and signal: the exact smoother, averaged over at most `most` posterior draws.

    Args:
        model: a model with a `LinearGaussianMarginal` site.
        draws: posterior draws with leading axes `(chain, draw)`.
        args: the model's positional arguments.
        most: how many draws to use.
        kwargs: the model's keyword arguments.

    Returns:
        A `StateMoments`.

    Raises:
        ValueError: the model has no `LinearGaussianMarginal` site.
    """

    def one(d: LinearGaussianMarginal, y: Array) -> tuple[Array, ...]:
        s = kalman_smoother(d.ssm, y, d.u)
        variance = jnp.sum(s.chol**2, -1)
        factor = d.ssm.with_time_axis("C") @ s.chol
        return s.mean, variance, d.ssm.signal(s.mean, d.u), jnp.sum(factor**2, -1)

    mean, variance, signal, signal_variance = _over_draws(one, model, draws, args, kwargs, most)
    return StateMoments(_mixture(mean, variance), _mixture(signal, signal_variance))


def forecast(
    model: Callable[..., Any],
    draws: dict[str, Any],
    num_steps: int,
    *args: Any,
    u_future: ArrayLike | None = None,
    key: Key | int = 0,
    most: int = 400,
    **kwargs: Any,
) -> ForecastDraws:
    """Posterior predictive forecast of the next `num_steps` steps, from the filtered end of the series.

    Given parameters the forecast is exact; the draws mix over the posterior of the parameters.

    Args:
        model: a model with a `LinearGaussianMarginal` site.
        draws: posterior draws with leading axes `(chain, draw)`.
        num_steps: the horizon.
        args: the model's positional arguments (the data).
        u_future: inputs of the future steps `(num_steps, input)`, where the model has inputs.
        key: random key, or a whole number.
        most: how many posterior draws to use; 20 predictive draws are made of each.
        kwargs: the model's keyword arguments.

    Returns:
        A `ForecastDraws`.

    Raises:
        ValueError: the model has no `LinearGaussianMarginal` site, or inputs for the future are absent.
    """
    check_count("num_steps", num_steps)

    def one(d: LinearGaussianMarginal, y: Array, path_key: Array) -> tuple[Array, Array, Array]:
        f = exact_forecast(d.whole_ssm, y, num_steps, d.u, u_future)
        inputs = check_inputs(d.ssm, u_future, num_steps, "u_future")
        path = simulate(path_key, continuation(d.whole_ssm, y, num_steps, d.u, inputs), num_steps, inputs)[1]
        return f.mean, jnp.diagonal(f.cov, axis1=-2, axis2=-1), path

    mean, variance, paths = (np.asarray(x) for x in _over_draws(one, model, draws, args, kwargs, most, key))
    moments = _mixture(mean, variance)
    return ForecastDraws(moments.mean, moments.sd, _mixture_quantiles(mean, variance), paths)


def sample_states(
    key: Key | int, model: Callable[..., Any], draws: dict[str, Any], *args: Any, most: int = 400, **kwargs: Any
) -> np.ndarray:
    """One whole path of the states for each of at most `most` posterior draws, `(draw, time, state)`, exact.

    Arguments and errors as in `smoothed_states`.
    """

    def one(d: LinearGaussianMarginal, y: Array, path_key: Array) -> Array:
        return exact_sample_states(path_key, d.ssm, y, d.u)

    return np.asarray(_over_draws(one, model, draws, args, kwargs, most, key))


def one_step_probabilities(
    model: Callable[..., Any], draws: dict[str, Any], *args: Any, most: int = 400, **kwargs: Any
) -> np.ndarray:
    """Predictive distribution function at each observation, `P(Y_t <= y_t | y_{1:t-1})`, `(time, obs)`; NaN if missing.

    Uniform if the model is right. Parameters are drawn from the posterior given the whole series: the past-only
    posterior would be slightly wider. Arguments and errors as in `smoothed_states`.
    """

    def one(d: LinearGaussianMarginal, y: Array) -> Array:
        f = kalman_filter(d.ssm, y, d.u)
        mean = d.ssm.signal(f.predicted_mean, d.u)
        factor, noise = d.ssm.with_time_axis("C") @ f.predicted_chol, d.ssm.with_time_axis("chol_R")
        variance = jnp.sum(factor**2, -1) + jnp.sum(noise**2, -1)
        return jax.scipy.stats.norm.cdf(y, mean, jnp.sqrt(variance))

    return np.asarray(_over_draws(one, model, draws, args, kwargs, most)).mean(0)


def _mixture(mean: ArrayLike, variance: ArrayLike) -> MixtureMoments:
    """Law of total variance over the leading axis."""
    mean, variance = np.asarray(mean), np.asarray(variance)
    return MixtureMoments(mean.mean(0), np.sqrt(variance.mean(0) + mean.var(0)))


def _mixture_quantiles(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Quantiles of the mixture, entry by entry: 99 evenly spaced quantiles of every component, pooled."""
    levels = (np.arange(99) + 0.5) / 99
    spread = np.asarray(jax.scipy.special.ndtri(levels)).reshape(-1, *(1,) * mean.ndim)
    values = mean + np.sqrt(variance) * spread
    return np.quantile(values.reshape(-1, *mean.shape[1:]), QUANTILES, axis=0, method="hazen")
