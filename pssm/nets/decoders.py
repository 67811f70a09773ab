"""Decoders `z (state,) -> parameters of the observation`: linear, perceptron, frames."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Array, Float, KeyLike

State = Float[Array, " state"]


class LinearDecoder(eqx.Module):
    """`C z + d`, of the first `num_read` states.

    Args:
        n_state: size of the state.
        n_obs: number of observed variables.
        num_read: number of states that are read; all by default. The others are the dynamics' memory.
        key: random key.
    """

    C: Array
    d: Array

    def __init__(self, n_state: int, n_obs: int, *, num_read: int | None = None, key: KeyLike):
        key = as_key(key)
        read = _num_read(n_state, num_read)
        self.C = jax.random.normal(key, (check_count("n_obs", n_obs), read)) / jnp.sqrt(read)
        self.d = jnp.zeros(n_obs)

    def __call__(self, z: State) -> Float[Array, " obs"]:
        """The mean, or the logits or log-rates."""
        return self.C @ z[: self.C.shape[1]] + self.d


class MLPDecoder(eqx.Module):
    """A perceptron of the state.

    Args:
        n_state: size of the state.
        n_obs: number of observed variables.
        hidden: width of the hidden layers.
        depth: number of hidden layers.
        num_read: number of states that are read; all by default. The others are the dynamics' memory.
        key: random key.
    """

    mlp: eqx.nn.MLP

    def __init__(
        self, n_state: int, n_obs: int, *, hidden: int = 64, depth: int = 1, num_read: int | None = None, key: KeyLike
    ):
        key = as_key(key)
        self.mlp = eqx.nn.MLP(_num_read(n_state, num_read), n_obs, hidden, depth, activation=jax.nn.silu, key=key)

    def __call__(self, z: State) -> Float[Array, " obs"]:
        """The mean, or the logits or log-rates."""
        return self.mlp(z[: self.mlp.in_size])


def _num_read(n_state: int, num_read: int | None) -> int:
    read = n_state if num_read is None else check_count("num_read", num_read)
    if read > n_state:
        raise ValueError(f"`num_read` must be at most the size of the state ({n_state}); got {read}.")
    return read


class FrameDecoder(eqx.Module):
    """A frame from the state: a linear layer, then transposed convolutions that double height and width.

    Args:
        n_state: size of the state.
        shape: `(height, width)` of a frame, divisible by 2 to the number of layers.
        channels: channels before each layer.
        key: random key.
    """

    linear: eqx.nn.Linear
    layers: list[eqx.nn.ConvTranspose2d]
    start: tuple[int, int, int] = eqx.field(static=True)

    def __init__(self, n_state: int, shape: Sequence[int], *, channels: Sequence[int] = (16, 8), key: KeyLike):
        key = as_key(key)
        factor = 2 ** len(channels)
        if len(shape) != 2 or shape[0] % factor or shape[1] % factor:
            raise ValueError(f"`shape` must be (height, width), both divisible by {factor}; got {tuple(shape)}.")
        first, *keys = jax.random.split(key, len(channels) + 1)
        self.start = (channels[0], shape[0] // factor, shape[1] // factor)
        self.linear = eqx.nn.Linear(n_state, channels[0] * self.start[1] * self.start[2], key=first)
        sizes = [*channels, 1]
        self.layers = [
            eqx.nn.ConvTranspose2d(into, out, 4, stride=2, padding=1, key=k)
            for into, out, k in zip(sizes[:-1], sizes[1:], keys, strict=True)
        ]

    def __call__(self, z: State) -> Float[Array, "height width"]:
        """The mean, or the logits or log-rates, of every pixel."""
        x = self.linear(z).reshape(self.start)
        for layer in self.layers:
            x = layer(jax.nn.silu(x))
        return x[0]
