"""Values that are not there yet: each series of a fit after its own last value, and gaps, given all that is known."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_count
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.batch import over_batches
from pssm.filters.ahead import draw_given_some, given_some
from pssm.fitting.results import Fit
from pssm.infer.mixtures import mixture, mixture_quantiles
from pssm.infer.predict import QUANTILES, ForecastDraws
from pssm.infer.task import exact_task, steps_of
from pssm.ssm import LinearGaussianSSM


class NowcastDraws(NamedTuple):
    """All values of the series and of the steps after it: observed ones as they are, the others predicted.

    Attributes:
        mean, sd: `(..., time + horizon, obs)`; the sd of an observed value is 0.
        quantiles: `(5, ..., time + horizon, obs)` at 5, 25, 50, 75 and 95 %.
        draws: `(draw, ..., time + horizon, obs)`, jointly over steps and series.
        last: step of the last observed value of each series, `(..., obs)`; -1 where there is none.
    """

    mean: np.ndarray
    sd: np.ndarray
    quantiles: np.ndarray
    draws: np.ndarray
    last: np.ndarray

    def after_last(self, num_steps: int) -> ForecastDraws:
        """Forecasts of each series from its own end: row `h` of a column is `h + 1` steps after its last value.

        Raises:
            ValueError: there are not so many steps; ask `nowcast` for a longer `horizon`.
        """
        check_count("num_steps", num_steps)
        steps = self.mean.shape[-2]
        short = self.last.max() + num_steps - steps + 1
        if short > 0:
            raise ValueError(f"`num_steps` must be at most {num_steps - short}; give `nowcast` {short} steps more.")
        rows = self.last[..., None, :] + 1 + np.arange(num_steps)[:, None]

        def own(x: np.ndarray) -> np.ndarray:
            lead = x.shape[: x.ndim - self.mean.ndim]
            return np.take_along_axis(x, np.broadcast_to(rows, lead + rows.shape), axis=-2)

        return ForecastDraws(own(self.mean), own(self.sd), own(self.quantiles), own(self.draws))


def nowcast(
    fit: Fit | Callable[..., Any],
    draws: dict[str, Any] | None = None,
    *args: Any,
    horizon: int = 0,
    u_future: ArrayLike | None = None,
    site: str | None = None,
    key: KeyLike = 0,
    most: int = 400,
    **kwargs: Any,
) -> NowcastDraws:
    """Every value that is missing, given every value that is known: ragged ends, gaps, and `horizon` steps more.

    `p(y_missing | y_observed)`, exact for each posterior draw: series that end earlier are forecast from their own
    end with what the others say, noise that is correlated over series included.

    Args:
        fit: a fit of any method; or a model with a `LinearGaussianMarginal` site, followed by its draws and arguments.
        draws: posterior draws with leading axes `(chain, draw)`; not with a fit.
        args: the model's positional arguments, likewise.
        horizon: steps after the series.
        u_future: inputs of these steps, `(horizon, input)`, where the model has an argument `u`.
        site: the observed site, where there are several.
        key: random key, or a whole number; the same key gives the same draws.
        most: number of posterior draws to use.
        kwargs: the model's keyword arguments, where a model is given.

    Returns:
        A `NowcastDraws`; `.after_last(h)` are forecasts of each series from its own last value.

    Raises:
        ValueError: the model does not integrate its states out, or its longer arguments cannot be told.

    Example:
        >>> from pssm import models
        >>> y = np.random.default_rng(0).normal(size=(30, 2)).cumsum(0)
        >>> y[27:, 1] = np.nan  # three values are not published yet
        >>> point = {"sigma_level": np.ones((1, 1, 2)), "sigma_obs": np.ones((1, 1, 2)), "partial_level": [[[0.5]]]}
        >>> found = nowcast(models.multivariate_structural, point, y, horizon=2)
        >>> found.mean.shape, found.last.tolist(), found.after_last(2).mean.shape
        ((32, 2), [29, 26], (2, 2))

    Source:
        Durbin & Koopman 2012, section 4.10; Banbura, Giannone, Modugno & Reichlin 2013.
    """
    horizon = check_count("horizon", horizon, least=0)
    task = exact_task(fit, draws, args, kwargs, most=most, key=key, site=site)
    source = task.source
    ahead = steps_of(task, source.num_steps, horizon, u_future, strict=True) if horizon else None
    first = {name: x[0] for name, x in task.draws.items()}
    trace = source.trace(first, ahead)
    value = np.asarray(trace[source.site]["value"])
    if value.shape[-2] != source.num_steps + horizon:
        raise ValueError(f"`horizon`: the model has {value.shape[-2]} steps also where its data are longer.")
    seen = ~np.isnan(value)
    steps = np.arange(value.shape[-2])[:, None]
    last = np.where(seen, steps, -1).max(-2)

    def one(sample: dict[str, Array], key: Key) -> tuple[Array, Array, Array]:
        trace = source.trace(sample, ahead)
        d, y = source.fn(trace), source.series(trace)
        return _predicted(key, d.ssm, y, d.u)

    mean, variance, paths = task.map(one, most if task.count == 1 else 1)
    start = task.origins[1]
    moments = mixture(mean, variance, start)
    known = np.where(seen, value, 0.0)

    def keep(x: np.ndarray) -> np.ndarray:
        return np.where(seen, known, x)

    quantiles = mixture_quantiles(mean, variance, QUANTILES) + start
    return NowcastDraws(keep(moments.mean), np.where(seen, 0.0, moments.sd), keep(quantiles), keep(paths + start), last)


def _predicted(key: Key, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[Array, Array, Array]:
    """Mean, variance and a draw of all values given those observed."""

    def one(ssm: LinearGaussianSSM, key: Key, y: Array, u: Array | None) -> tuple[Array, Array, Array]:
        found = given_some(ssm, y, u)
        return found.mean, jnp.diagonal(found.cov, axis1=-2, axis2=-1), draw_given_some(key, ssm, y, u)

    batch = jnp.broadcast_shapes(ssm.batch_shape, y.shape[:-2])
    keys = jax.random.split(key, batch) if batch else key
    return over_batches(one, ssm, (keys, 0), (y, 2), (u, 2))
