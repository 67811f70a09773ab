"""Hiding data from an encoder in training: functions `(key, y) -> y` with more NaN, and coordinated dropout.

An encoder that always sees all data learns to copy each step. With hidden steps it has to use the others, and it is
trained on missing data. The likelihood still scores all data, so the bound remains one.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pssm._keys import as_key
from pssm._types import Array, Float, Key, KeyLike, Shaped


def hide_entries(rate: float) -> Callable[[Key, Array], Array]:
    """Hides every entry with probability `rate`."""
    _check_rate(rate)
    return partial(_hide_entries, rate)


def hide_steps(rate: float) -> Callable[[Key, Array], Array]:
    """Hides whole steps of a series `(time, ...)` with probability `rate`."""
    _check_rate(rate)
    return partial(_hide_steps, rate)


def hide_end(shortest: int) -> Callable[[Key, Array], Array]:
    """Hides everything after a random step, never one of the first `shortest`: the situation of a forecast."""
    return partial(_hide_end, shortest)


def _hide_entries(rate: float, key: KeyLike, y: Array) -> Array:
    key = as_key(key)
    return jnp.where(jax.random.bernoulli(key, rate, y.shape), jnp.nan, y)


def _hide_steps(rate: float, key: KeyLike, y: Array) -> Array:
    key = as_key(key)
    hidden = jax.random.bernoulli(key, rate, y.shape[:1])
    return jnp.where(hidden.reshape(-1, *(1,) * (y.ndim - 1)), jnp.nan, y)


def _hide_end(shortest: int, key: KeyLike, y: Array) -> Array:
    key = as_key(key)
    end = jax.random.randint(key, (), shortest, y.shape[0] + 1)
    past = jnp.arange(y.shape[0]) < end
    return jnp.where(past.reshape(-1, *(1,) * (y.ndim - 1)), y, jnp.nan)


def coordinated_dropout(
    key: KeyLike, y: Shaped[Array, "*shape"], rate: float
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Splits the entries at random: those that the encoder sees, and those that the likelihood scores; NaN elsewhere.

    No entry is scored that the encoder has seen, so it cannot learn to copy.

    Args:
        key: random key, a new one at every step of the training.
        y: data.
        rate: share of the entries that are kept from the encoder and scored.

    Returns:
        `(seen, scored)`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> seen, scored = coordinated_dropout(jax.random.key(0), jnp.ones((4, 2)), 0.3)
        >>> bool((jnp.isnan(seen) != jnp.isnan(scored)).all())
        True

    Source:
        Keshtkaran & Pandarinath 2019.
    """
    key = as_key(key)
    _check_rate(rate)
    dropped = jax.random.bernoulli(key, rate, jnp.shape(y))
    return jnp.where(dropped, jnp.nan, y), jnp.where(dropped, y, jnp.nan)


def _check_rate(rate: float) -> None:
    if not 0 <= rate < 1:
        raise ValueError(f"`rate` must be from 0 to below 1; got {rate}.")
