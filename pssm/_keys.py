"""Random keys: whole numbers are accepted wherever a key is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Key


def as_key(key: Key | int) -> Key:
    """A JAX random key from a key or a whole number."""
    return jax.random.key(key) if isinstance(key, int | np.integer) else key


def is_key(x: Any) -> bool:
    """Whether `x` is an array of typed random keys."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
