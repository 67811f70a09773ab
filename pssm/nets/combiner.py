"""The parts of a deep Kalman filter's posterior: features of the later data, and a network of them and the state."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Array, Float, KeyLike, Series
from pssm.nets.features import run_backward, seen_and_filled


class RecurrentFeatures(eqx.Module):
    """Features `h_t` of the series from step t on, `(time, size)`: a mixer over the features of the steps, backward.

    Args:
        front: features of a step, `(y_t, seen_t, u_t) -> (features,)`, such as `StepMLP`.
        mixer: a sequence mixer of those features, such as `GRU`.
        reverse: whether the mixer runs from the last step with data to the start, which smooths (features after that
            step are zero); else forward: `h_t` knows the past.
    """

    front: Any
    mixer: Any
    reverse: bool = eqx.field(static=True, default=True)

    def __call__(self, y: Series, u: Float[Array, "time input"] | None = None) -> Float[Array, "time size"]:
        """Features of all steps."""

        def features(y: Array, u: Array | None) -> tuple[Array, Array]:
            filled, seen = seen_and_filled(y)
            return self.front(filled, seen, u), seen.any()

        x, some = jax.vmap(features)(y, u)
        return run_backward(self.mixer, x, some) if self.reverse else self.mixer(x)


class Combiner(eqx.Module):
    """`q(z_t | z_{t-1}, h_t)` from `c = (tanh(W z_{t-1} + b) + h_t) / 2`: mean `W_m c`, variance `softplus(W_s c)`.

    Args:
        n_state: size of the state.
        size: size of the features `h_t`.
        key: random key.

    Source:
        Krishnan, Shalit & Sontag 2017, section 4.
    """

    pull: eqx.nn.Linear
    mean: eqx.nn.Linear
    variance: eqx.nn.Linear
    start: Array

    def __init__(self, n_state: int, size: int, *, key: KeyLike):
        key = as_key(key)
        check_count("n_state", n_state)
        one, two, three = jax.random.split(key, 3)
        self.pull = eqx.nn.Linear(n_state, check_count("size", size), key=one)
        self.mean = eqx.nn.Linear(size, n_state, key=two)
        self.variance = eqx.nn.Linear(size, n_state, key=three)
        self.start = jnp.zeros(n_state)

    def __call__(
        self, z: Float[Array, " state"], h: Float[Array, " size"]
    ) -> tuple[Float[Array, " state"], Float[Array, " state"]]:
        """Mean and standard deviation of the next state."""
        c = 0.5 * (jnp.tanh(self.pull(z)) + h)
        variance = jax.nn.softplus(self.variance(c))
        return self.mean(c), jnp.sqrt(variance + 1e-8)  # the root of zero has no slope
