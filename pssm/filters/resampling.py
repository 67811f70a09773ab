"""Resampling: whole numbers of copies of each particle, on average in proportion to its weight.

Weights come and go as logarithms. A particle of weight zero gets no copy.

Source:
    Douc, Cappé & Moulines 2005 (the four schemes, and that all but "multinomial" vary less than it).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pssm._keys import as_key
from pssm._types import Array, Float, Key, KeyLike

LogWeights = Float[Array, " particles"]


def ess(log_weights: LogWeights) -> Array:
    """Effective number of particles, `(sum w)^2 / sum w^2`; 0 where no weight is positive."""
    top = jnp.max(log_weights)
    w = jnp.exp(log_weights - jnp.where(top > -jnp.inf, top, 0.0))
    return jnp.sum(w) ** 2 / jnp.maximum(jnp.sum(w**2), jnp.finfo(w.dtype).tiny)


def normalise(log_weights: LogWeights) -> tuple[LogWeights, Array]:
    """Log weights that sum to one, and the log of the sum before.

    A weight that is not a number counts as zero (the state of such a particle overflowed). Where all are zero the sum's
    log is -inf, and the weights become equal so that what follows is finite.
    """
    log_weights = jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)
    size = jax.nn.logsumexp(log_weights)
    dead = size == -jnp.inf
    even = -jnp.log(jnp.asarray(log_weights.shape[0], log_weights.dtype))
    return jnp.where(dead, even, log_weights - jnp.where(dead, 0.0, size)), size


def systematic(key: KeyLike, log_weights: LogWeights) -> Array:
    """One uniform number, evenly spaced positions: the least random of the four."""
    key = as_key(key)
    count = log_weights.shape[0]
    shift = jax.random.uniform(key, (), log_weights.dtype)
    return positions_to_indices(_weights(log_weights), (jnp.arange(count) + shift) / count)


def stratified(key: KeyLike, log_weights: LogWeights) -> Array:
    """One uniform number in each of as many equal strata."""
    key = as_key(key)
    count = log_weights.shape[0]
    shifts = jax.random.uniform(key, (count,), log_weights.dtype)
    return positions_to_indices(_weights(log_weights), (jnp.arange(count) + shifts) / count)


def multinomial(key: KeyLike, log_weights: LogWeights) -> Array:
    """Independent draws."""
    key = as_key(key)
    uniforms = jax.random.uniform(key, log_weights.shape, log_weights.dtype)
    return positions_to_indices(_weights(log_weights), uniforms)


def residual(key: KeyLike, log_weights: LogWeights) -> Array:
    """`floor(N w)` copies for certain; the rest independently, in proportion to what is left of the weights."""
    key = as_key(key)
    count = log_weights.shape[0]
    expected = count * _weights(log_weights)
    certain = jnp.floor(expected)
    sure = jnp.searchsorted(jnp.cumsum(certain), jnp.arange(count), side="right", method="scan_unrolled")
    rest = positions_to_indices(expected - certain, jax.random.uniform(key, (count,), log_weights.dtype))
    return jnp.where(jnp.arange(count) < jnp.sum(certain), sure, rest).astype(jnp.int32)


def positions_to_indices(weights: Array, positions: Array) -> Array:
    """Which of `weights` (any sum) stands at each of the `positions`, shares of their sum in `[0, 1)`."""
    cumulative = jnp.cumsum(weights)
    total = cumulative[-1]
    # Rounding may put a position at the very end, where a weight of zero could stand.
    below = jnp.minimum(positions.astype(total.dtype) * total, jnp.nextafter(total, jnp.zeros_like(total)))
    found = jnp.searchsorted(cumulative, below, side="right", method="scan_unrolled")
    return jnp.minimum(found, weights.shape[0] - 1).astype(jnp.int32)


def _weights(log_weights: LogWeights) -> Array:
    return jnp.exp(normalise(log_weights)[0])


RESAMPLERS: dict[str, Callable[[Key, LogWeights], Array]] = {
    "systematic": systematic,
    "stratified": stratified,
    "multinomial": multinomial,
    "residual": residual,
}
