"""Random keys: whole numbers are accepted wherever a key is, and keys of either kind."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Key, KeyLike


def as_key(key: KeyLike, name: str = "key") -> Key:
    """A JAX random key from a key of either kind or a whole number.

    Args:
        key: `jax.random.key(0)`, the older `jax.random.PRNGKey(0)`, or a whole number.
        name: of the argument.

    Returns:
        A key as `jax.random.key` makes it; the same random numbers for all three.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        return jax.random.key(key)
    if isinstance(key, jax.Array | np.ndarray):
        if is_key(key) and not key.ndim:
            return key
        if not key.ndim and jnp.issubdtype(key.dtype, jnp.integer):
            return jax.random.key(key)
        if key.ndim == 1 and key.dtype == jnp.uint32:
            return jax.random.wrap_key_data(jnp.asarray(key))
        raise TypeError(f"`{name}` must be one random key or a whole number; got {key.dtype} of shape {key.shape}.")
    raise TypeError(f"`{name}` must be a random key, `jax.random.key(0)`, or a whole number; got {key!r}.")


def is_key(x: Any) -> bool:
    """Whether `x` is an array of typed random keys."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
