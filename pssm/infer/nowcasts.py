"""Values that are not there yet: each series of a fit after its own last value, and gaps, given all that is known."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_count
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.filters import kalman_smoother
from pssm.filters import sample_states as exact_sample_states
from pssm.fitting.results import Fit
from pssm.infer.predict import ForecastDraws, _mixture, _mixture_quantiles, _task
from pssm.infer.sources import ExactSource, longer_arguments
from pssm.linalg import outer
from pssm.linalg.random import standard_normal


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
        >>> sigma = np.ones((1, 1, 2))
        >>> point = {"sigma_level": sigma, "sigma_obs": sigma, "partial_level": np.zeros((1, 1, 1))}
        >>> found = nowcast(models.multivariate_structural, point, y, horizon=2)
        >>> found.mean.shape, found.last.tolist(), found.after_last(2).mean.shape
        ((32, 2), [29, 26], (2, 2))

    Source:
        Durbin & Koopman 2012, section 4.10; Banbura, Giannone, Modugno & Reichlin 2013.
    """
    horizon = check_count("horizon", horizon, least=0)
    task = _task(fit, draws, args, kwargs, most, key, site)
    source = task.source
    if not isinstance(source, ExactSource):
        raise ValueError(
            "`fit`: its model has no `LinearGaussianMarginal` site, so there is no exact nowcast. Use `forecast`."
        )
    ahead = None
    if horizon:
        try:
            ahead = longer_arguments(source, source.num_steps, horizon, u_future, None)
        except ValueError as error:
            raise ValueError(f"`horizon`: {error}") from None
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
    moments = _mixture(mean, variance, start)
    known = np.where(seen, value, 0.0)

    def keep(x: np.ndarray) -> np.ndarray:
        return np.where(seen, known, x)

    quantiles = _mixture_quantiles(mean, variance) + start
    return NowcastDraws(keep(moments.mean), np.where(seen, 0.0, moments.sd), keep(quantiles), keep(paths + start), last)


def _predicted(key: Key, ssm: Any, y: Array, u: Array | None) -> tuple[Array, Array, Array]:
    """Mean, variance and a draw of all values given those observed.

    With `K` the regression of the noise on that of the observed series of the same step, a missing value is that of
    `(1 - K) (signal + noise) + K y`, with states and noise that know nothing of `y` at this step but through the
    states (Matheron's rule).
    """
    state_key, noise_key = jax.random.split(key)
    s = kalman_smoother(ssm, y, u)
    seen = (~jnp.isnan(y))[..., None].astype(y.dtype)
    chol_R = ssm.with_time_axis("chol_R")
    R = outer(chol_R)
    to_seen = R * jnp.swapaxes(seen, -1, -2)
    K = to_seen @ jnp.linalg.pinv(seen * to_seen, hermitian=True)
    rest = jnp.eye(y.shape[-1], dtype=y.dtype) - K
    filled = jnp.einsum("...ij,...j->...i", K, jnp.where(jnp.isnan(y), 0.0, y))

    def given(x: Array) -> Array:
        return jnp.einsum("...ij,...j->...i", rest, x) + filled

    factor = rest @ ssm.with_time_axis("C") @ s.chol
    variance = jnp.sum(factor**2, -1) + jnp.sum((rest @ chol_R) ** 2, -1)
    path = exact_sample_states(state_key, ssm, y, u)
    noise = standard_normal(noise_key, y.shape, y.dtype)
    drawn = ssm.signal(path, u) + jnp.einsum("...ij,...j->...i", chol_R, noise)
    return given(ssm.signal(s.mean, u)), variance, given(drawn)
