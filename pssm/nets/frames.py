"""Networks of the Kalman autoencoders: the code of a frame, and weights from the earlier codes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Array, Float, KeyLike
from pssm.nets.features import seen_and_filled
from pssm.nets.mixers import LSTM


class FrameEncoder(eqx.Module):
    """`q(a_t | y_t) = N(location(y_t), diag(scale(y_t)^2))`, from one frame with NaN for missing pixels.

    Args:
        front: features of a frame, `(y_t, seen_t, None) -> (num_features,)`, such as `StepMLP` or `StridedCNN`.
        size: size of the code `a_t`.
        highest: bound of the scale, by a sigmoid: near the noise of the code, the posterior has no reason to exceed it.
        key: random key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pssm.nets import StepMLP
        >>> encode = FrameEncoder(StepMLP(256, 64, key=jax.random.key(0)), 2, key=jax.random.key(1))
        >>> location, scale = encode(jnp.ones(256))
        >>> location.shape, scale.shape
        ((2,), (2,))
    """

    front: Any
    head: eqx.nn.Linear
    highest: float = eqx.field(static=True)

    def __init__(self, front: Any, size: int, *, highest: float = 1.0, key: KeyLike):
        key = as_key(key)
        if not highest > 0:
            raise ValueError(f"`highest` must be positive; got {highest}.")
        self.front, self.highest = front, highest
        self.head = eqx.nn.Linear(front.num_features, 2 * check_count("size", size), key=key)

    def __call__(self, y: Float[Array, " obs"]) -> tuple[Float[Array, " size"], Float[Array, " size"]]:
        """Location and scale of the code of one frame."""
        location, scale = jnp.split(self.head(self.front(*seen_and_filled(y), None)), 2)
        return location, self.highest * jax.nn.sigmoid(scale)


class HistoryWeights(eqx.Module):
    """Weights of `num_bases` systems from the codes so far, `w_t = softmax(W h_t + c)`, `h_t = LSTM(a_{t-1}, h_{t-1})`.

    Args:
        size: size of a code; the one before the first is learned.
        num_bases: number of weights.
        hidden: size of the LSTM.
        mixer: another causal mixer of codes that runs step by step, such as `GRU(size, hidden)`.
        key: random key.

    Source:
        Fraccaro, Kamronn, Paquet & Winther 2017.
    """

    mixer: Any
    linear: eqx.nn.Linear
    before: Array

    def __init__(self, size: int, num_bases: int = 3, hidden: int = 50, *, mixer: Any = None, key: KeyLike):
        key = as_key(key)
        one, two = jax.random.split(key)
        self.mixer = LSTM(check_count("size", size), hidden, key=one) if mixer is None else mixer
        self.linear = eqx.nn.Linear(self.mixer.size, check_count("num_bases", num_bases), key=two)
        self.before = jnp.zeros(size)

    def start(self) -> Any:
        """The mixer's state before the first step."""
        return self.mixer.start()

    def step(self, state: Any, before: Float[Array, " size"]) -> tuple[Any, Float[Array, " bases"]]:
        """The weights of a step, from the code of the one before (at the first step, `self.before`)."""
        state, out = self.mixer.step(state, before)
        return state, jax.nn.softmax(self.linear(out))

    def __call__(self, a: Float[Array, "time size"]) -> Float[Array, "time bases"]:
        """The weights of all steps."""
        shifted = jnp.concatenate([self.before[None].astype(a.dtype), a[:-1]])
        return jax.vmap(lambda h: jax.nn.softmax(self.linear(h)))(self.mixer(shifted))
