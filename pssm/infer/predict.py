"""States and forecasts from posterior draws, averaged over their posterior: of any fit, or of a model and its draws."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.distributions import LinearGaussianMarginal
from pssm.distributions.unwrap import unwrap
from pssm.filters import kalman_filter
from pssm.fitting.results import Fit, flatten_draws, record_of, trace_with
from pssm.infer.causal import causal_draws
from pssm.infer.longer import Horizon, longer_arguments
from pssm.infer.sources import CodesSource, ExactSource, PathSource, source_of, sources_of
from pssm.inspection.forms import integrated, plain_model
from pssm.linalg import outer
from pssm.ssm import LinearGaussianSSM

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FUTURES = 10  # paths for each draw, where a forecast's quantiles are those of paths


class MixtureMoments(NamedTuple):
    """Moments of a mixture over posterior draws, entry by entry: parameter uncertainty included."""

    mean: np.ndarray
    sd: np.ndarray


class StateMoments(NamedTuple):
    """Smoothed states `(..., time, state)`, and the signal `(..., time, obs)`: the mean of observations given them."""

    state: MixtureMoments
    signal: MixtureMoments


class ForecastDraws(NamedTuple):
    """A posterior predictive forecast.

    Attributes:
        mean, sd: `(..., horizon, obs)`.
        quantiles: `(5, ..., horizon, obs)` at 5, 25, 50, 75 and 95 %.
        draws: `(draw, ..., horizon, obs)`: whole future paths.
    """

    mean: np.ndarray
    sd: np.ndarray
    quantiles: np.ndarray
    draws: np.ndarray


def marginal_site(trace: dict[str, Any]) -> tuple[str, LinearGaussianMarginal, Array] | None:
    """Name, distribution and value of the observed `LinearGaussianMarginal` of a trace, or None if it has none."""
    for name, site in trace.items():
        fn = unwrap(site["fn"])[0] if site["type"] == "sample" else None
        if isinstance(fn, LinearGaussianMarginal):
            return name, fn, site["value"]
    return None


def smoothed_states(
    fit: Fit | Callable[..., Any],
    draws: dict[str, Any] | None = None,
    *args: Any,
    most: int = 400,
    site: str | None = None,
    key: KeyLike = 0,
    **kwargs: Any,
) -> StateMoments:
    """Posterior moments of states and signal, averaged over at most `most` posterior draws.

    Where the model integrates its states out they are the exact smoother's for each draw (a Gaussian smoother's for a
    `GaussianFilterMarginal`); where it samples them, or a guide draws them, they are those of the drawn paths.

    Args:
        fit: a fit of any method; or a model with a `LinearGaussianMarginal` site, followed by its draws and arguments.
        draws: posterior draws with leading axes `(chain, draw)`; not with a fit.
        args: the model's positional arguments, likewise.
        most: number of draws to use.
        site: the observed site whose signal is meant, or the path whose states are meant, where there are several.
        key: random key, or a whole number; the same key gives the same draws from a guide.
        kwargs: the model's keyword arguments, where a model is given.

    Returns:
        A `StateMoments`.

    Raises:
        ValueError: the model has no states, or several observed sites.
    """
    task = _task(fit, draws, args, kwargs, most, key, site)
    mean, variance, signal, signal_variance = task.map(task.source.moments)
    state_origin, origin = task.origins
    return StateMoments(_mixture(mean, variance, state_origin), _mixture(signal, signal_variance, origin))


def forecast(
    fit: Fit | Callable[..., Any],
    draws: Any = None,
    num_steps: int | None = None,
    *args: Any,
    horizon: int | None = None,
    u_future: ArrayLike | None = None,
    origin: int | None = None,
    future: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    site: str | None = None,
    key: KeyLike = 0,
    most: int = 400,
    **kwargs: Any,
) -> ForecastDraws:
    """Posterior predictive forecast: `forecast(fit, horizon)`, or `forecast(model, draws, num_steps, *args)`.

    Where the model integrates its states out, the forecast is exact for each posterior draw, its moments and quantiles
    those of the mixture over draws, and `.draws` has one path for each. Elsewhere the path of each posterior draw is
    continued by the model's own transition and emission, ten times. Parameters keep their posterior given the whole
    series, also where `origin` says that the states may know its beginning only.

    Args:
        fit: a fit of any method; or a model with a `LinearGaussianMarginal` site, followed by its draws.
        draws: the horizon where a fit is given; else posterior draws with leading axes `(chain, draw)`.
        num_steps: the horizon, after the draws of a model.
        args: the model's positional arguments (the data), likewise.
        horizon: the horizon by name.
        u_future: inputs of the future steps `(horizon, input)`, where the model has an argument `u`.
        origin: number of observations that are known; all by default. Sampled states need a guide that can be asked
            given the past alone.
        future: `(args, kwargs)`, the model's arguments for the steps of series and forecast, data NaN in the future;
            by default the first argument is taken for the data, and `u` for the inputs.
        site: the observed site, where there are several.
        key: random key, or a whole number; the same key gives the same forecast.
        most: number of posterior draws to use.
        kwargs: the model's keyword arguments, where a model is given.

    Returns:
        A `ForecastDraws`.

    Raises:
        ValueError: the model has no states, inputs for the future are absent, or its longer arguments cannot be told.
    """
    if callable(fit):
        horizon = check_count("num_steps", num_steps if horizon is None else horizon)
    else:
        horizon, draws = check_count("horizon", draws if horizon is None else horizon), None
    task = _task(fit, draws, args, kwargs, most, key, site)
    source, steps = task.source, task.source.num_steps
    known = steps if origin is None else origin
    if not 0 < known <= steps:
        raise ValueError(f"`origin` must be from 1 to {steps}, the steps of the series; got {origin}.")
    try:
        ahead = longer_arguments(source, known, horizon, u_future, future)
    except ValueError as error:
        if not isinstance(source, ExactSource):
            raise
        ahead = Horizon(known, horizon, u_future, source.args, source.kwargs, str(error))
    start = task.origins[1]
    if isinstance(source, CodesSource):
        task = task.redrawn(ahead.args, ahead.kwargs)
    elif isinstance(source, PathSource):
        task = task.given_past(known) if known < steps else task
    elif known < steps and (drawn := [*source.paths, *dict(source.steps)]):
        raise ValueError(f"`origin`: the draws of {drawn} know the whole series. Fit the beginning of the series.")
    times = most if task.count == 1 else 1 if isinstance(source, ExactSource) else FUTURES
    mean, variance, paths = task.map(lambda sample, key: source.future(sample, key, ahead), times)
    moments, paths = _mixture(mean, variance, start), paths + start
    if isinstance(source, ExactSource):
        return ForecastDraws(moments.mean, moments.sd, _mixture_quantiles(mean, variance) + start, paths)
    return ForecastDraws(moments.mean, moments.sd, np.quantile(paths, QUANTILES, axis=0), paths)


def sample_states(
    fit: Fit | KeyLike,
    model: Callable[..., Any] | None = None,
    draws: dict[str, Any] | None = None,
    *args: Any,
    most: int = 400,
    key: KeyLike = 0,
    **kwargs: Any,
) -> np.ndarray:
    """One whole path of the states for each of at most `most` posterior draws, `(draw, ..., time, state)`.

    `sample_states(fit, key=...)` of any fit; or `sample_states(key, model, draws, *args)`, exact, of a model with a
    `LinearGaussianMarginal` site. Arguments and errors as in `smoothed_states`; the same key gives the same paths.
    """
    if model is None:
        task = _task(fit, None, (), {}, most, key, None)
    else:
        task = _task(model, draws, args, kwargs, most, fit, None)
    return task.map(task.source.draw, most if task.count == 1 else 1) + task.origins[0]


def one_step_probabilities(
    fit: Fit | Callable[..., Any],
    draws: dict[str, Any] | None = None,
    *args: Any,
    most: int = 400,
    site: str | None = None,
    **kwargs: Any,
) -> np.ndarray:
    """Predictive distribution function at each observation, `P(Y_t <= y_t | y_{1:t-1})`, `(time, obs)`; NaN if missing.

    Uniform if the model is right. Parameters are drawn from the posterior given the whole series: the past-only
    posterior would be slightly wider. Arguments and errors as in `smoothed_states`, of models that integrate their
    states out exactly.
    """
    task = _task(fit, draws, args, kwargs, most, 0, site)
    source = task.source
    if not isinstance(source, ExactSource):
        raise ValueError("`fit`: its model has no `LinearGaussianMarginal` site, so there are no exact predictions.")

    def one(sample: dict[str, Array], key: Array) -> Array:
        trace = source.trace(sample)
        d, y = source.fn(trace), source.series(trace)
        f = kalman_filter(d.ssm, y, d.u)
        mean = d.ssm.signal(f.predicted_mean, d.u)
        factor, noise = d.ssm.with_time_axis("C") @ f.predicted_chol, d.ssm.with_time_axis("chol_R")
        variance = jnp.sum(factor**2, -1) + jnp.sum(noise**2, -1)
        return jax.scipy.stats.norm.cdf(y, mean, jnp.sqrt(variance))

    return task.map(one).mean(0)


def innovations(
    fit: Fit | Callable[..., Any],
    draws: dict[str, Any] | None = None,
    *args: Any,
    most: int = 100,
    site: str | None = None,
    key: KeyLike = 0,
    **kwargs: Any,
) -> tuple[np.ndarray, np.ndarray, int]:
    """One-step errors `(draw, ..., time, obs)`, NaN where missing, their covariances, and the number of states.

    Arguments and errors as in `one_step_probabilities`.
    """

    def one(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[Array, Array]:
        mean, cov = one_step(ssm, y, u)
        return y - mean, cov

    found, names = of_exact_series(one, fit, draws, *args, most=most, site=site, key=key, **kwargs)
    return *found, len(names)


def of_exact_series(
    what: Callable[[LinearGaussianSSM, Array, Array | None], Any],
    fit: Fit | Callable[..., Any],
    draws: dict[str, Any] | None = None,
    *args: Any,
    most: int = 100,
    site: str | None = None,
    key: KeyLike = 0,
    **kwargs: Any,
) -> tuple[Any, tuple[str, ...]]:
    """`what(ssm, y, u)` of each draw, where the states are integrated out exactly; and the names of the states.

    Further arguments and errors as in `one_step_probabilities`.
    """
    task = _task(fit, draws, args, kwargs, most, key, site)
    source = task.source
    if not isinstance(source, ExactSource):
        raise ValueError("`fit`: its model has no `LinearGaussianMarginal` site, so there are no exact predictions.")

    def one(sample: dict[str, Array], key: Array) -> Any:
        trace = source.trace(sample)
        d = source.fn(trace)
        return what(d.ssm, source.series(trace), d.u)

    trace = source.trace({name: x[0] for name, x in task.draws.items()})
    names = trace[source.site].get("infer", {}).get("state_names")
    n_state = source.fn(trace).ssm.n_state
    return task.map(one), tuple(names) if names else tuple(f"state {i}" for i in range(n_state))


def one_step(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[Array, Array]:
    """Mean `(..., time, obs)` and covariance of each observation given those before it."""
    f = kalman_filter(ssm, y, u)
    factor = ssm.with_time_axis("C") @ f.predicted_chol
    return ssm.signal(f.predicted_mean, u), outer(factor) + outer(ssm.with_time_axis("chol_R"))


# ---------------------------------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    """Posterior draws and the source of their states: `draws` are merged over chains and thinned."""

    source: Any
    draws: dict[str, Array]
    key: Key
    fit: Any = None

    @property
    def count(self) -> int:
        """Number of draws; one where parameters are learned and nothing is drawn."""
        return next((len(x) for x in self.draws.values()), 1)

    @property
    def origins(self) -> tuple[Any, Any]:
        """What states and observations are counted from, mostly 0."""
        return self.source.origins({name: x[0] for name, x in self.draws.items()})

    def map(self, one: Callable[..., Any], times: int = 1) -> Any:
        """`one(sample, key)` for every draw, as often as `times` says, in batches, as NumPy arrays."""
        rows = jnp.repeat(jnp.arange(self.count), times)
        keys = jax.random.split(self.key, len(rows))
        if self.count == 1 and times > 1:  # one point: what does not depend on the key is computed once
            point = {name: x[0] for name, x in self.draws.items()}
            found = jax.jit(jax.vmap(one, (None, 0)))(point, keys)
            return jax.tree.map(np.asarray, found)

        @jax.jit
        def run(draws: dict[str, Array]) -> Any:
            def row(xs: tuple[Array, Array]) -> Any:
                return one({name: x[xs[0]] for name, x in draws.items()}, xs[1])

            return jax.lax.map(row, (rows, keys), batch_size=50)

        return jax.tree.map(np.asarray, run(self.draws))

    def redrawn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Task":
        """Draws from the guide for other arguments."""
        if self.fit is None or record_of(self.fit).guide is None:
            raise ValueError("`fit`: the codes of future frames come from a guide, and this fit has none.")
        found = record_of(self.fit).sample(self.count, self.key, args, kwargs)
        return self._replace(draws=flatten_draws(found))

    def given_past(self, known: int) -> "_Task":
        """Draws whose path knows the first observations only."""
        if self.fit is None or record_of(self.fit).guide is None:
            raise ValueError(
                "`origin`: the drawn states know the whole series. Fit the beginning of the series, or use a model "
                "with its states integrated out, or a guide."
            )
        found = causal_draws(self.fit, [known], num_samples=self.count, key=self.key)
        return self._replace(draws={n: jnp.asarray(x[0]) for n, x in found.items()})


def states_of(
    fit: Fit | Callable[..., Any], draws: dict[str, Any] | None = None, *args: Any, **kwargs: Any
) -> list[tuple[str, str]]:
    """Every observed site with states and the site that has them: a path that it follows, or the series itself."""
    model, _, first, args, kwargs, _ = _run_of(fit, draws, args, kwargs, 1, as_key(0))
    return [(s.site, s.holder) for s in sources_of(model, first, args, kwargs)]


def _task(fit: Any, draws: Any, args: tuple, kwargs: dict[str, Any], most: int, key: Any, site: str | None) -> _Task:
    """From a fit, or from a model with its draws."""
    model, thinned, first, args, kwargs, key = _run_of(fit, draws, args, kwargs, most, as_key(key))
    return _Task(source_of(model, first, args, kwargs, site), thinned, key, fit if draws is None else None)


def _run_of(fit: Any, draws: Any, args: tuple, kwargs: dict[str, Any], most: int, key: Key) -> tuple[Any, ...]:
    """The model that has the states, its draws, the first of them, its arguments, and a key."""
    if draws is not None:
        thinned = _thin(draws, most)
        first = {name: x[0] for name, x in thinned.items()}
        if marginal_site(trace_with(fit, first, *args, **kwargs)) is None:
            raise ValueError(
                "`model` has no `LinearGaussianMarginal` site, so its states cannot be integrated out exactly. "
                'pssm\'s linear models have one with states="marginal".'
            )
        return fit, thinned, first, args, kwargs, key
    if args or kwargs:
        raise TypeError("a fit has its own arguments: `*args` and `**kwargs` go with a model and its draws.")
    record = record_of(fit)
    guide_key, key = jax.random.split(key)
    thinned = _thin(record.draws(most, guide_key), most)
    first = {name: x[0] for name, x in thinned.items()}
    model = plain_model(record.model)
    found = integrated(model, first, record.args, record.kwargs)
    model, kwargs = (model, record.kwargs) if found is None else found
    model = handlers.substitute(model, data=record.params) if record.params else model
    return model, thinned, first, record.args, kwargs, key


def _thin(draws: dict[str, Any], most: int) -> dict[str, Array]:
    """At most `most` draws, evenly spaced over all chains."""
    flat = flatten_draws(draws)
    total = next((len(x) for x in flat.values()), 1)
    rows = np.linspace(0, total - 1, min(most, total)).astype(int)
    return {name: x[rows] for name, x in flat.items()}


def _mixture(mean: ArrayLike, variance: ArrayLike, origin: Any = 0) -> MixtureMoments:
    """Law of total variance over the leading axis; the means are counted from `origin`."""
    mean, variance = np.asarray(mean), np.asarray(variance)
    return MixtureMoments(mean.mean(0) + origin, np.sqrt(variance.mean(0) + mean.var(0)))


def _mixture_quantiles(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Quantiles of the mixture, entry by entry: 99 evenly spaced quantiles of every component, pooled."""
    levels = (np.arange(99) + 0.5) / 99
    spread = np.asarray(jax.scipy.special.ndtri(levels)).reshape(-1, *(1,) * mean.ndim)
    values = mean + np.sqrt(variance) * spread
    return np.quantile(values.reshape(-1, *mean.shape[1:]), QUANTILES, axis=0, method="hazen")
