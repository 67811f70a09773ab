"""The hook of `shapes.py` is at work: a wrong shape in a call of the package is an error of its own."""

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import shapes
from jaxtyping import Array, Float, TypeCheckError

from pssm.linalg.small import matmul
from pssm.results import ForecastResult


def test_the_package_is_checked():
    with pytest.raises(TypeCheckError, match=r"pssm\.linalg\.small\.matmul\.\n.*'b'"):
        matmul(jnp.ones((2, 3)), jnp.ones((4, 5)))
    with pytest.raises(TypeCheckError):
        jax.jit(matmul)(jnp.ones((2, 3)), jnp.ones((4, 5)))


def test_numpy_arrays_pass():
    assert matmul(jnp.ones((2, 3)).__array__(), jnp.ones((3, 5)).__array__()).shape == (2, 5)


def test_the_fields_of_a_named_tuple_are_checked():
    @shapes.checked
    def predict(y: Float[Array, "time obs"], horizon: int, size: int) -> ForecastResult:
        state = jnp.zeros((horizon, 2))
        return ForecastResult(
            jnp.zeros((horizon, size)), jnp.zeros((horizon, size, size)), state, state[..., None] * state[:, None]
        )

    assert predict(jnp.zeros((5, 1)), 3, 1).mean.shape == (3, 1)
    with pytest.raises(TypeCheckError, match="return value"):
        predict(jnp.zeros((5, 1)), 3, 2)  # `obs` is 1


def test_a_function_without_shapes_is_left_as_it_is():
    def plain(x: Array, n: int) -> Array:
        return x

    assert shapes.checked(plain) is plain


def test_what_is_left_out_is_there_and_has_a_reason():
    for name, reason in shapes.LEFT_OUT.items():
        module, _, function = name.rpartition(".")
        if not hasattr(importlib.import_module(module), function):
            importlib.import_module(name)
        assert len(reason) > 20, name


def test_the_hook_comes_before_the_package():
    program = "import pssm, shapes; shapes.install()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=shapes.__file__.rsplit("/", 1)[0]
    )
    assert "imported already" in done.stderr
