"""Normal numbers: those of JAX, to the last digits, whatever the shape, the type and the kind of key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pssm.linalg.random import standard_normal


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (7,), (3, 0), (101, 3)])
def test_numbers_are_jaxs_own(shape, dtype):
    with jax.enable_x64(dtype == np.float64):
        for key in (jax.random.key(3), jax.random.PRNGKey(3)):
            found = standard_normal(key, shape, dtype)
            assert found.dtype == dtype
            expected = jax.random.normal(key, shape, dtype)
            np.testing.assert_allclose(found, expected, rtol=8 * np.finfo(dtype).eps)


def test_a_batch_of_keys():
    keys = jax.random.split(jax.random.key(0), 4)
    found = jax.vmap(lambda key: standard_normal(key, (5,), jnp.float32))(keys)
    np.testing.assert_allclose(found, jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys), rtol=1e-6)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_several_keys_are_refused(make):
    with pytest.raises((TypeError, ValueError), match="key"):
        standard_normal(jax.random.split(make(0), 2), (2,), jnp.float32)


def test_other_generators_and_types_are_left_to_jax():
    key = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(standard_normal(key, (4,), jnp.float32), jax.random.normal(key, (4,)))
    key = jax.random.key(0)
    np.testing.assert_array_equal(standard_normal(key, (4,), jnp.bfloat16), jax.random.normal(key, (4,), jnp.bfloat16))
    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(standard_normal(key, (4,), jnp.float32), jax.random.normal(key, (4,)))
