"""Standard normal numbers: those of `jax.random.normal` in a fifth of its time on a CPU.

Random numbers take much of the time of many estimates here: the moves of a particle filter, the draws of a guide. JAX's
generator on a CPU is a loop that looks its shifts up, and XLA does not vectorise it; written out, XLA does.

Source:
    Salmon, Moraes, Dror & Shaw 2011 (Threefry, 2 x 32 bits, 20 rounds).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Array, Key

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)
WORDS = {np.dtype("float32"): 1, np.dtype("float64"): 2}


def standard_normal(key: Key, shape: tuple[int, ...], dtype: Any) -> Array:
    """As `jax.random.normal(key, shape, dtype)`, from the same random bits; the last digit may be rounded otherwise.

    With another generator than JAX's default one, or another type than float32 and float64, it is that function.

    Example:
        >>> key = jax.random.key(0)
        >>> bool(jnp.allclose(standard_normal(key, (2,), jnp.float32), jax.random.normal(key, (2,), jnp.float32)))
        True
    """
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    kind = str(jax.random.key_impl(key)) if typed else jax.config.jax_default_prng_impl
    words = jax.random.key_data(key) if typed else key
    usual = kind == "threefry2x32" and jax.config.jax_threefry_partitionable and words.shape == (2,)
    if not usual or dtype not in WORDS or math.prod(shape) >= 2**32:  # several keys at once: JAX's error
        return jax.random.normal(key, shape, dtype)
    return _numbers(words, tuple(shape), dtype)


@partial(jax.jit, static_argnums=(1, 2))
def _numbers(key: Array, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    count = jax.lax.iota(np.uint32, math.prod(shape)).reshape(shape)
    high, low = threefry(key[0], key[1], jnp.zeros_like(count), count)
    if WORDS[dtype] == 2:
        bits = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        bits = (bits >> np.uint64(12)) | np.float64(1).view(np.uint64)
    else:
        bits = ((high ^ low) >> np.uint32(9)) | np.float32(1).view(np.uint32)
    one = dtype.type(1)
    lowest = np.nextafter(-one, dtype.type(0))
    share = jax.lax.bitcast_convert_type(bits, dtype) - one
    uniform = jnp.maximum(lowest, share * (one - lowest) + lowest)
    # Without the barrier XLA makes the numbers anew for each of their uses.
    return jax.lax.optimization_barrier(dtype.type(math.sqrt(2)) * jax.lax.erf_inv(uniform))


def threefry(key_0: Array, key_1: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Two 32-bit words for each pair of counters."""
    keys = (key_0, key_1, key_0 ^ key_1 ^ PARITY)
    x, y = x + keys[0], y + keys[1]
    for block in range(5):
        for r in ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(r)) | (y >> np.uint32(32 - r)))
        x, y = x + keys[(block + 1) % 3], y + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x, y
