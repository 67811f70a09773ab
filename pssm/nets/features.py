"""Features of one step: front ends `(y_t, seen_t, u_t) -> features`, with the mask of missing entries as an input.

`y_t` has zeros where entries are missing; `seen_t` is True at the observed ones.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import as_float, check_count
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Bool, Float, KeyLike


def seen_and_filled(y: Array) -> tuple[Array, Array]:
    """Data with zeros for NaN, and where there was something."""
    seen = ~jnp.isnan(y)
    return jnp.where(seen, y, 0.0), seen


def run_backward(mixer: Any, x: Float[Array, "time size"], some: Bool[Array, " time"]) -> Array:
    """A mixer's outputs from the last step with data (`some`) to the first; zero after it.

    The steps after it come last for the mixer, so that a causal one gives the outputs of the series without them.
    """
    after = jnp.cumsum(some[::-1])[::-1] > 0
    padding = len(some) - after.sum()
    out = jnp.roll(mixer(jnp.roll(x[::-1], -padding, axis=0)), padding, axis=0)[::-1]
    return jnp.where(after[:, None], out, 0.0)


class StepMLP(eqx.Module):
    """A perceptron on the entries of a step, on their mask, and on the inputs.

    Args:
        n_obs: number of observed variables.
        num_features: size of the features.
        hidden: width of the hidden layers.
        depth: number of hidden layers.
        n_input: number of inputs `u`, 0 for none.
        data: data `(..., obs)` whose mean and standard deviation the entries are standardised by; they are constants.
        key: random key.
    """

    mlp: eqx.nn.MLP
    location: np.ndarray
    spread: np.ndarray
    num_features: int = eqx.field(static=True)

    def __init__(
        self,
        n_obs: int,
        num_features: int = 64,
        *,
        hidden: int = 64,
        depth: int = 1,
        n_input: int = 0,
        data: ArrayLike | None = None,
        key: KeyLike,
    ):
        key = as_key(key)
        check_count("n_obs", n_obs)
        size = 2 * n_obs + n_input
        act = jax.nn.silu
        self.mlp = eqx.nn.MLP(size, num_features, hidden, depth, activation=act, final_activation=act, key=key)
        self.num_features = num_features
        self.location, self.spread = _moments(data, n_obs)

    def __call__(
        self, y: Float[Array, " obs"], seen: Bool[Array, " obs"], u: Float[Array, " input"] | None = None
    ) -> Float[Array, " features"]:
        """Features of one step."""
        x = jnp.where(seen, (y - self.location) / self.spread, 0.0).astype(y.dtype)
        return self.mlp(jnp.concatenate([x, seen.astype(y.dtype), *(() if u is None else (u,))]))


class AdditiveFeatures(eqx.Module):
    """A sum over the observed entries, `sum_n seen_n phi(y_n, e_n)`, `e_n` a learned vector of each variable.

    The contribution of an entry does not depend on which others are missing.

    Args:
        n_obs: number of observed variables.
        num_features: size of the features.
        hidden: width of `phi`'s hidden layer.
        embedding: size of `e_n`.
        n_input: number of inputs `u`, of which a linear function is added.
        data: as in `StepMLP`.
        key: random key.
    """

    phi: eqx.nn.MLP
    embedding: Array
    inputs: eqx.nn.Linear | None
    location: np.ndarray
    spread: np.ndarray
    num_features: int = eqx.field(static=True)

    def __init__(
        self,
        n_obs: int,
        num_features: int = 64,
        *,
        hidden: int = 32,
        embedding: int = 8,
        n_input: int = 0,
        data: ArrayLike | None = None,
        key: KeyLike,
    ):
        key = as_key(key)
        first, second, third = jax.random.split(key, 3)
        self.phi = eqx.nn.MLP(1 + embedding, num_features, hidden, 1, activation=jax.nn.silu, key=first)
        self.embedding = jax.random.normal(second, (check_count("n_obs", n_obs), embedding))
        self.inputs = eqx.nn.Linear(n_input, num_features, use_bias=False, key=third) if n_input else None
        self.num_features = num_features
        self.location, self.spread = _moments(data, n_obs)

    def __call__(
        self, y: Float[Array, " obs"], seen: Bool[Array, " obs"], u: Float[Array, " input"] | None = None
    ) -> Float[Array, " features"]:
        """Features of one step."""
        x = jnp.where(seen, (y - self.location) / self.spread, 0.0).astype(y.dtype)
        each = jax.vmap(self.phi)(jnp.concatenate([x[:, None], self.embedding], axis=1))
        total = jnp.sum(jnp.where(seen[:, None], each, 0.0), axis=0) / np.sqrt(len(self.embedding))
        return total if self.inputs is None or u is None else total + self.inputs(u)


class StridedCNN(eqx.Module):
    """Convolutions with stride 2 on a frame and on the mask of its pixels; no pooling, which is slow on CPUs.

    Args:
        shape: `(height, width)` or `(channels, height, width)` of a frame.
        num_features: size of the features.
        channels: channels of the layers, each of which halves height and width.
        n_input: number of inputs `u`, which enter the last layer.
        key: random key.
    """

    convolutions: list[eqx.nn.Conv2d]
    last: eqx.nn.Linear
    num_features: int = eqx.field(static=True)

    def __init__(
        self,
        shape: Sequence[int],
        num_features: int = 64,
        *,
        channels: Sequence[int] = (8, 16),
        n_input: int = 0,
        key: KeyLike,
    ):
        key = as_key(key)
        if len(shape) not in (2, 3):
            raise ValueError(f"`shape` must be (height, width) or (channels, height, width); got {tuple(shape)}.")
        depth, (height, width) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
        *keys, last = jax.random.split(key, len(channels) + 1)
        sizes = [2 * depth, *channels]
        self.convolutions = [
            eqx.nn.Conv2d(into, out, 3, stride=2, padding=1, key=k)
            for into, out, k in zip(sizes[:-1], sizes[1:], keys, strict=True)
        ]
        for _ in channels:
            height, width = (height + 1) // 2, (width + 1) // 2
        self.last = eqx.nn.Linear(sizes[-1] * height * width + n_input, num_features, key=last)
        self.num_features = num_features

    def __call__(self, y: Array, seen: Array, u: Float[Array, " input"] | None = None) -> Float[Array, " features"]:
        """Features of one frame."""
        frame, there = (x if x.ndim == 3 else x[None] for x in (y, seen.astype(y.dtype)))
        x = jnp.concatenate([frame, there])
        for convolution in self.convolutions:
            x = jax.nn.silu(convolution(x))
        return jax.nn.silu(self.last(jnp.concatenate([x.ravel(), *(() if u is None else (u,))])))


def _moments(data: ArrayLike | None, n_obs: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every variable, as constants."""
    if data is None:
        return np.zeros(n_obs), np.ones(n_obs)
    values = np.asarray(as_float("data", data), float)
    if values.shape[-1] != n_obs:
        raise ValueError(f"`data` must have {n_obs} variables on its last axis; got shape {values.shape}.")
    values = values.reshape(-1, n_obs)
    count = np.maximum((~np.isnan(values)).sum(0), 1)
    mean = np.nansum(values, 0) / count
    spread = np.sqrt(np.nansum((values - mean) ** 2, 0) / count)
    return mean, np.where(spread > 0, spread, 1.0)
