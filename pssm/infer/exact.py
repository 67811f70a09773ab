"""One step ahead along a series, and other results of models that integrate their states out exactly, by draws."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Array, Key, KeyLike
from pssm.filters import kalman_filter
from pssm.fitting.results import Fit
from pssm.infer.horizon import Horizon
from pssm.infer.task import exact_task
from pssm.linalg import outer
from pssm.ssm import LinearGaussianSSM


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
    task = exact_task(fit, draws, args, kwargs, most=most, key=0, site=site)
    source = task.source

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
    task = exact_task(fit, draws, args, kwargs, most=most, key=key, site=site)
    source = task.source

    def one(sample: dict[str, Array], key: Array) -> Any:
        trace = source.trace(sample)
        d = source.fn(trace)
        return what(d.ssm, source.series(trace), d.u)

    trace = source.trace({name: x[0] for name, x in task.draws.items()})
    return task.map(one), state_names_of(trace, source)


def state_names_of(trace: dict[str, Any], source: Any) -> tuple[str, ...]:
    """Names of the states that are integrated out: those that the model gives them, or numbers."""
    names = trace[source.site].get("infer", {}).get("state_names")
    n_state = source.fn(trace).ssm.n_state
    return tuple(names) if names else tuple(f"state {i}" for i in range(n_state))


class System(NamedTuple):
    """The system of one draw over all steps of the data and of a forecast; all is counted from `origin`.

    Attributes:
        ssm: the model.
        y: the data `(..., time, obs)`, without the steps of the forecast.
        u: inputs of all steps, or None.
        origin: what observations are counted from, or None.
    """

    ssm: LinearGaussianSSM
    y: Array
    u: Array | None
    origin: Any


def whole_system(source: Any, sample: dict[str, Array], key: Key, ahead: Horizon | None) -> System:
    """The system of a draw, over the steps of the data and, if any, of a forecast; `key` draws numbers of its steps."""
    trace = source.trace(sample)
    d = source.fn(trace)
    if ahead is None:
        return System(d.ssm, source.series(trace), d.u, d.origin)
    ssm, y, u, u_next, _ = source.longer(sample, key, ahead)
    if u is not None and u_next is not None:
        lead = jnp.broadcast_shapes(u.shape[:-2], u_next.shape[:-2])
        u = jnp.concatenate([jnp.broadcast_to(x, (*lead, *x.shape[-2:])) for x in (u, u_next)], axis=-2)
    return System(ssm, y, u, d.origin)


def one_step(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[Array, Array]:
    """Mean `(..., time, obs)` and covariance of each observation given those before it."""
    f = kalman_filter(ssm, y, u)
    factor = ssm.with_time_axis("C") @ f.predicted_chol
    return ssm.signal(f.predicted_mean, u), outer(factor) + outer(ssm.with_time_axis("chol_R"))
