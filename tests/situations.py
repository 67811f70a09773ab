"""Situations that users of NumPyro meet: one line of a table each, right in every way of running it, or refused.

A table is a dict of `Situation` by name. `cases(TABLE)` gives the parameters of a test and `check` is its body:

    @pytest.mark.parametrize(("name", "precise", "jitted"), cases(TABLE))
    def test_right_or_refused(name, precise, jitted):
        check(TABLE[name], precise, jitted)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@dataclass(frozen=True)
class Situation:
    """What a user runs, and what is right.

    Attributes:
        run: a function of `args`, whose array arguments are traced in the case under `jit`; other arrays by `Fresh`.
        right: the right value (or a tree of values), from scipy, a grid or a dense Gaussian in double precision; or a
            function without arguments that computes it.
        refused: a pattern of the one line of the error, where it must be refused; `error` is its class.
        args: NumPy arrays.
        jit: "same" where the jitted function must do the same; "nan" where it must not give a finite number (its
            error needs values); "eager" where there is nothing to jit (the function runs whole fits or reads files).
        close: largest relative error in double and in single precision; of numbers below 1 it is absolute.
        precisions: which to run, True for double.
    """

    run: Callable[..., Any]
    right: Any = None
    refused: str | None = None
    error: type[Exception] | tuple[type[Exception], ...] = (ValueError, TypeError)
    args: tuple[Any, ...] = ()
    jit: str = "same"
    close: tuple[float, float] = (1e-8, 1e-4)
    precisions: tuple[bool, ...] = (True, False)


class Fresh:
    """NumPy arrays as new JAX arrays, in the precision of now: JAX keeps an array that a program has seen as it was.

    J = Fresh(ROOT=ROOT)
    J.ROOT
    """

    def __init__(self, **arrays: np.ndarray):
        self._arrays = arrays

    def __getattr__(self, name: str) -> jax.Array:
        return jnp.array(self._arrays[name].tolist())


def cases(table: dict[str, Situation]) -> list[Any]:
    """Every way of running every line."""
    return [
        pytest.param(name, precise, jitted, id=f"{name}-{'f64' if precise else 'f32'}-{'jit' if jitted else 'eager'}")
        for name, situation in table.items()
        for precise in situation.precisions
        for jitted in ((False,) if situation.jit == "eager" else (False, True))
    ]


def check(situation: Situation, precise: bool, jitted: bool) -> None:
    """Right, or refused in one line."""
    with jax.enable_x64(precise):
        run = jax.jit(situation.run) if jitted else situation.run
        if situation.refused is not None and not (jitted and situation.jit == "nan"):
            with pytest.raises(situation.error, match=situation.refused) as caught:
                run(*situation.args)
            assert "\n" not in str(caught.value).strip()
            return
        found = jax.tree.map(np.asarray, run(*situation.args))
        if jitted and situation.jit == "nan":
            assert not any(np.isfinite(x).any() for x in jax.tree.leaves(found)), found
            return
        right = situation.right() if callable(situation.right) else situation.right
        assert jax.tree.structure(found) == jax.tree.structure(right)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert a.shape == b.shape
            np.testing.assert_allclose(
                a, b, rtol=0, atol=situation.close[not precise] * max(1.0, np.abs(b).max(initial=0))
            )
