"""States and forecasts from posterior draws, averaged over their posterior: of any fit, or of a model and its draws."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pssm._checks import check_count
from pssm._types import ArrayLike, KeyLike
from pssm.fitting.results import Fit
from pssm.infer.mixtures import MixtureMoments, mixture, mixture_quantiles
from pssm.infer.sources import CodesSource, ExactSource, PathSource
from pssm.infer.task import steps_of, task_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FUTURES = 10  # paths for each draw, where a forecast's quantiles are those of paths


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
    task = task_of(fit, draws, args, kwargs, most, key, site)
    mean, variance, signal, signal_variance = task.map(task.source.moments)
    state_origin, origin = task.origins
    return StateMoments(mixture(mean, variance, state_origin), mixture(signal, signal_variance, origin))


def forecast(
    fit: Fit | Callable[..., Any],
    draws: Any = None,
    num_steps: int | None = None,
    *args: Any,
    horizon: int | None = None,
    u_future: ArrayLike | None = None,
    y_future: ArrayLike | None = None,
    origin: int | None = None,
    future: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    site: str | None = None,
    key: KeyLike = 0,
    most: int = 400,
    parameters: str | None = None,
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
        u_future: inputs of the future steps `(horizon, input)`, where the model has an argument `u`. Rows of a frame
            are found by the labels of the steps, its columns by the names of `u`, where the fit had frames.
        y_future: values of the future that are known, `(horizon, obs)`, NaN where they are not: a scenario. All else is
            given these too, exactly, for models that integrate their states out. A frame may have the rows and the
            series that are known only, in any order. Parameters do not learn from them.
        origin: number of observations that are known; all by default. Sampled states need a guide that can be asked
            given the past alone.
        future: `(args, kwargs)`, the model's arguments for the steps of series and forecast, data NaN in the future;
            by default the first argument is taken for the data, and `u` for the inputs.
        site: the observed site, where there are several.
        key: random key, or a whole number; the same key gives the same forecast.
        most: number of posterior draws to use.
        parameters: of a fit at one point (`fit_ml`, `fit_map`): "fixed", as if they were known (the default), or
            "laplace", drawn from the normal approximation around it.
        kwargs: the model's keyword arguments, where a model is given.

    Returns:
        A `ForecastDraws`; entries that are known are as given, without spread.

    Raises:
        ValueError: the model has no states, inputs for the future are absent, its longer arguments cannot be told, a
            frame has other rows or columns, or `y_future` is given for states that are not integrated out exactly.
    """
    if callable(fit):
        horizon = check_count("num_steps", num_steps if horizon is None else horizon)
    else:
        horizon, draws = check_count("horizon", draws if horizon is None else horizon), None
    task = task_of(fit, draws, args, kwargs, most, key, site, parameters)
    source, steps = task.source, task.source.num_steps
    known = steps if origin is None else origin
    if not 0 < known <= steps:
        raise ValueError(f"`origin` must be from 1 to {steps}, the steps of the series; got {origin}.")
    if y_future is not None and not isinstance(source, ExactSource):
        raise ValueError(
            "`y_future` needs a model whose states are integrated out exactly (`LinearGaussianMarginal`). Or append "
            "these rows to the data, NaN where nothing is known, and fit again."
        )
    ahead = steps_of(task, known, horizon, u_future, y_future, future)
    start = task.origins[1]
    if isinstance(source, CodesSource):
        task = task.redrawn(ahead.args, ahead.kwargs)
    elif isinstance(source, PathSource):
        task = task.given_past(known) if known < steps else task
    elif known < steps and (drawn := [*source.paths, *dict(source.steps)]):
        raise ValueError(f"`origin`: the draws of {drawn} know the whole series. Fit the beginning of the series.")
    times = most if task.count == 1 else 1 if isinstance(source, ExactSource) else FUTURES
    mean, variance, paths = task.map(lambda sample, key: source.future(sample, key, ahead), times)
    if task.count == 1 and isinstance(source, ExactSource):  # the moments of a point do not depend on the key
        mean, variance = mean[:1], variance[:1]
    moments, paths = mixture(mean, variance, start), paths + start
    if isinstance(source, ExactSource):
        found = moments.mean, moments.sd, mixture_quantiles(mean, variance, QUANTILES) + start, paths
        return ForecastDraws(*found) if ahead.y_future is None else _as_given(ForecastDraws(*found), ahead.y_future)
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
        task = task_of(fit, None, (), {}, most, key, None)
    else:
        task = task_of(model, draws, args, kwargs, most, fit, None)
    return task.map(task.source.draw, most if task.count == 1 else 1) + task.origins[0]


def _as_given(found: ForecastDraws, y_future: ArrayLike) -> ForecastDraws:
    """The forecast with known values as they came: no rounding, no spread."""
    known = np.asarray(y_future, float)
    known = known[:, None] if known.ndim == 1 else known

    def put(x: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(known), x, known)

    sd = np.where(np.isnan(known), found.sd, 0.0)
    return ForecastDraws(put(found.mean), sd, put(found.quantiles), put(found.draws))
