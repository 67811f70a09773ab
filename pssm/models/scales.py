"""Where the zero of data and regressors lies, and their units: what makes a posterior independent of both.

All of it is computed in 64 bits by NumPy where the data are there as numbers, also inside of `jit`. The centre of
regressors is their first row. It does not move when rows are appended for a forecast, when a part of the series is
hidden, or when a minibatch is taken; the level of a series is therefore that at the first values of its regressors.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.primitives import Messenger

from pssm._checks import as_float, check_finite, check_series, is_rounded, is_traced, unmasked
from pssm._types import Array, ArrayLike
from pssm.distributions.in_units import FromOrigin, from_origin
from pssm.observed import observe

# Where the models stand that count data from an origin where 32 bits cannot hold them.
COUNTED = tuple(f"pssm.models.{room}" for room in ("structural", "linear", "factor", "multivariate", "panels"))


def counts_from_origin(model: Any, kwargs: dict[str, Any] | None = None) -> bool:
    """Whether a model counts its data from an origin: the linear ones of pssm, unless they are given a `location`."""
    options = dict(kwargs or {})
    while isinstance(model, functools.partial | Messenger) or hasattr(model, "plain_model"):
        if isinstance(model, functools.partial):
            model, options = model.func, {**model.keywords, **options}
        else:
            model = model.fn if isinstance(model, Messenger) else model.plain_model
    return getattr(model, "__module__", "") in COUNTED and options.get("location") is None


class Series(NamedTuple):
    """Data of a model.

    Attributes:
        data: what the observed site gets, `(..., time, obs)`.
        values: the same counted from `origin`; 64-bit NumPy numbers where they are known.
        origin: `(obs,)`, only where 32 bits cannot hold the data (heights near 1e7 that differ by centimetres).
        precision: relative distance of neighbouring numbers in the data as they came.
    """

    data: Any
    values: Any
    origin: np.ndarray | None
    precision: float


class Regressors(NamedTuple):
    """Inputs `u` as they came, the `origin` `(input,)` that they are counted from, and their `spread` about it."""

    u: Any
    origin: Any
    spread: Any

    @property
    def differences(self) -> Array:
        """Inputs counted from their origin."""
        return jnp.asarray(from_origin(self.u, self.origin), jnp.result_type(float))


def number(x: Any) -> np.ndarray:
    """A scale or location, in the precision of JAX, as a NumPy array where it is known: a constant inside of `jit`."""
    return x if is_traced(x) else np.asarray(x, jnp.result_type(float))


def series(y: ArrayLike, n_obs: int) -> Series:
    """Data `(..., time, obs)`, checked; `(time,)` is one column where `n_obs` is 1."""
    values = known(y)
    if values is None:
        data = check_series(y, n_obs)
        return Series(data, data, None, float(jnp.finfo(data.dtype).eps))
    kind = np.asarray(unmasked(y)).dtype
    precision = float(np.finfo(kind if kind.kind == "f" else float).eps)
    origin = None
    if n_obs == 1 and values.ndim == 1:
        values = values[:, None]
    if values.ndim > 1 and values.shape[-1] == n_obs and is_rounded(values.reshape(-1, n_obs)):
        origin = np.array([_first(column) for column in values.reshape(-1, n_obs).T])
        check_finite("y", values, allow_nan=True)
        check_series(from_origin(values, origin), n_obs)
        return Series(values, values - origin, origin, precision)
    data = check_series(y, n_obs)
    return Series(data, values, None, precision)


def known(x: ArrayLike) -> np.ndarray | None:
    """An array as 64-bit numbers; None where it is traced, or no array of numbers."""
    if is_traced(x) or any(is_traced(leaf) for leaf in jax.tree.leaves(x)):
        return None
    try:
        return np.asarray(unmasked(x), np.float64)
    except (TypeError, ValueError):
        return None


def _first(column: np.ndarray) -> float:
    seen = np.flatnonzero(~np.isnan(column))
    return float(column[seen[0]]) if len(seen) else 0.0


def moments(found: Series, *, warn: bool = True) -> tuple[Any, Any, Any]:
    """First observed value, mean and spread of each column of the values, `(obs,)` each.

    A column without spread (constant up to rounding, or with one value) has its own size as its spread, or 1 where it
    is zero; one without any value has 0 and 1.
    """
    values = found.values
    xp: Any = jnp if is_traced(values) else np
    rows = values.reshape(-1, values.shape[-1])
    seen = ~xp.isnan(rows)
    filled = xp.where(seen, rows, 0.0)
    count = seen.sum(0)
    mean = filled.sum(0) / xp.maximum(count, 1)
    spread = xp.sqrt((xp.where(seen, rows - mean, 0.0) ** 2).sum(0) / xp.maximum(count, 1))
    first = xp.take_along_axis(filled, xp.argmax(seen, 0)[None], 0)[0]
    size = xp.abs(mean + (0.0 if found.origin is None else found.origin))
    flat = ~(spread > 16 * found.precision * size)
    if warn and xp is np and (flat & (count > 0)).any():
        _say(flat & (count > 0), count, size)
    fallback = xp.where(size > 0, size, 1.0)
    return first, mean, xp.where(flat, fallback, spread)


def _say(flat: np.ndarray, count: np.ndarray, size: np.ndarray) -> None:
    """What can be learned from a series without spread."""
    where = "`y`" if len(flat) == 1 else f"Columns {np.flatnonzero(flat).tolist()} of `y`"
    k = int(np.flatnonzero(flat)[0])
    if count[k] == 1:
        text = (
            f"{where} with one observed value: it says where the level is, and nothing of variances, whose posterior "
            f"is their prior with a scale of {size[k] or 1.0:.3g} (the size of the value; `scale=` sets another)."
        )
    else:
        text = (
            f"{where} with one constant value up to rounding: all that can be learned is that variances are small. "
            "The likelihood has no upper bound as they go to zero, and a sampler does not settle. Their priors have a "
            f"scale of {size[k] or 1.0:.3g} (the size of the value; `scale=` sets another)."
        )
    warnings.warn(text, stacklevel=5)


def warn_of_few(found: Series | None, n_state: int) -> None:
    """Says so where a series has fewer observed values than the model has states."""
    if found is None or is_traced(found.values):
        return
    count = int((~np.isnan(found.values)).sum())
    if 1 < count < n_state:
        warnings.warn(
            f"`y` has {count} observed values, and the model {n_state} states: what so few values do not say is the "
            "prior's. Take fewer components, or a shorter season.",
            stacklevel=4,
        )


def regressors(u: ArrayLike, lead: tuple[int, ...]) -> Regressors:
    """Inputs `(time, input)` (or with the sequences in front, as `lead` has them), counted from their first row."""
    inputs = as_float("u", u)
    inputs = inputs[:, None] if inputs.ndim == 1 else inputs
    if inputs.shape[-2:-1] != lead[-1:] or inputs.ndim > max(len(lead) + 1, 2):
        raise ValueError(f"`u` must have shape ({', '.join(map(str, lead))}, input); got {inputs.shape}.")
    check_finite("u", inputs)
    values = known(u)
    values = inputs if values is None else values.reshape(inputs.shape)
    xp: Any = jnp if is_traced(values) else np
    size = values.shape[-1]
    origin = values[..., 0, :].reshape(-1, size).mean(0)
    apart = (values - origin).reshape(-1, size)
    spread = xp.sqrt(((apart - apart.mean(0)) ** 2).mean(0))
    one = xp.where(xp.abs(origin) > 0, xp.abs(origin), 1.0)
    constant = ~(spread > 16 * float(jnp.finfo(inputs.dtype).eps) * xp.abs(apart).max(0))
    return Regressors(values, origin, number(xp.where(constant, one, spread)))


def located(name: str, prior: dist.Distribution, origin: np.ndarray | None) -> Array:
    """A location that is sampled: the site `name`; or, from an origin, `<name>_above` and `name` as its sum with it.

    Inside the model it counts from the origin. 32 bits hold the sum only roughly; trees of results add in 64 bits.
    """
    if origin is None:
        return jnp.asarray(numpyro.sample(name, prior))
    value = numpyro.sample(f"{name}_above", prior, infer={"above": (name, origin)})
    numpyro.deterministic(name, value + jnp.asarray(origin, jnp.result_type(float)).reshape(jnp.shape(value)))
    return jnp.asarray(value)


def observe_from(name: str, each: Callable[[], dist.Distribution] | dist.Distribution, found: Series | None) -> None:
    """`observe(name, each.to_event(2), data)`, with the data counted from their origin where there is one."""
    base: Any = each
    if found is None or found.origin is None:
        observe(name, base.to_event(2), None if found is None else found.data)
        return
    numpyro.sample(name, FromOrigin(base, found.origin).to_event(2), obs=found.data)
