"""Sequence mixers `(time, in) -> (time, size)`: recurrent networks and self-attention; `s5.py` has another.

Output t depends on the inputs up to t. Those that can run step by step have `start() -> state` and
`step(state, x_t) -> (state, out_t)`, with the same results.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Array, Float, KeyLike

Sequence = Float[Array, "time in_size"]
Outputs = Float[Array, "time size"]


def scan_steps(mixer: Any, x: Sequence) -> Outputs:
    """A mixer run step by step."""
    state = jax.tree.map(lambda s: s.astype(jnp.result_type(s, x)) if eqx.is_inexact_array(s) else s, mixer.start())
    return jax.lax.scan(lambda s, x: mixer.step(s, x), state, x)[1]  # a bound method would be hashed


class GRU(eqx.Module):
    """A gated recurrent unit.

    Args:
        in_size: size of an input.
        size: size of the hidden state, which is the output.
        key: random key.

    Source:
        Cho et al. 2014.
    """

    cell: eqx.nn.GRUCell

    causal = True

    def __init__(self, in_size: int, size: int, *, key: KeyLike):
        key = as_key(key)
        self.cell = eqx.nn.GRUCell(check_count("in_size", in_size), check_count("size", size), key=key)

    @property
    def size(self) -> int:
        """Size of an output."""
        return self.cell.hidden_size

    def start(self) -> Array:
        """The state before the first step."""
        return jnp.zeros(self.size, self.cell.weight_hh.dtype)

    def step(self, state: Array, x: Array) -> tuple[Array, Array]:
        """One step."""
        state = self.cell(x, state)
        return state, state

    def __call__(self, x: Sequence) -> Outputs:
        """All steps."""
        return scan_steps(self, x)


class LSTM(eqx.Module):
    """A long short-term memory; arguments as in `GRU`.

    Source:
        Hochreiter & Schmidhuber 1997.
    """

    cell: eqx.nn.LSTMCell

    causal = True

    def __init__(self, in_size: int, size: int, *, key: KeyLike):
        key = as_key(key)
        self.cell = eqx.nn.LSTMCell(check_count("in_size", in_size), check_count("size", size), key=key)

    @property
    def size(self) -> int:
        """Size of an output."""
        return self.cell.hidden_size

    def start(self) -> tuple[Array, Array]:
        """The state before the first step: output and memory."""
        zero = jnp.zeros(self.size, self.cell.weight_hh.dtype)
        return zero, zero

    def step(self, state: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
        """One step."""
        state = self.cell(x, state)
        return state, state[0]

    def __call__(self, x: Sequence) -> Outputs:
        """All steps."""
        return scan_steps(self, x)


class SelfAttention(eqx.Module):
    """One block of self-attention over a window, then a perceptron, each added to its input.

    Scores fall linearly with the distance in time, at a rate of each head, so that no positions are needed and the
    result does not depend on where the series starts.

    Args:
        in_size: size of an input.
        size: size of an output, divisible by `num_heads`.
        num_heads: number of heads.
        window: number of steps that a step attends to, itself included; None for all of them (then there is no `step`).
        causal: whether it attends to the past only. Otherwise also `window - 1` steps ahead.
        key: random key.

    Source:
        Vaswani et al. 2017; the scores: Press, Smith & Lewis 2022.
    """

    into: eqx.nn.Linear
    queries: eqx.nn.Linear
    out: eqx.nn.Linear
    mlp: eqx.nn.MLP
    norms: tuple[eqx.nn.LayerNorm, eqx.nn.LayerNorm]
    num_heads: int = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    causal: bool = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        size: int,
        *,
        num_heads: int = 4,
        window: int | None = None,
        causal: bool = True,
        key: KeyLike,
    ):
        key = as_key(key)
        if size % check_count("num_heads", num_heads):
            raise ValueError(f"`size` must be divisible by `num_heads` ({num_heads}); got {size}.")
        keys = jax.random.split(key, 4)
        self.into = eqx.nn.Linear(in_size, size, key=keys[0])
        self.queries = eqx.nn.Linear(size, 3 * size, key=keys[1])
        self.out = eqx.nn.Linear(size, size, key=keys[2])
        self.mlp = eqx.nn.MLP(size, size, 2 * size, 1, activation=jax.nn.gelu, key=keys[3])
        self.norms = (eqx.nn.LayerNorm(size), eqx.nn.LayerNorm(size))
        self.num_heads, self.causal = num_heads, causal
        self.window = window if window is None else check_count("window", window)

    @property
    def size(self) -> int:
        """Size of an output."""
        return self.out.out_features

    def start(self) -> tuple[Array, Array, Array]:
        """Empty keys and values of the window, and how many of them are filled."""
        if self.window is None or not self.causal:
            raise ValueError("`window` and `causal=True` are needed to run step by step.")
        empty = jnp.zeros((self.window, self.size), self.into.weight.dtype)
        return empty, empty, jnp.zeros((), int)

    def step(self, state: tuple[Array, Array, Array], x: Array) -> tuple[tuple[Array, Array, Array], Array]:
        """One step."""
        keys, values, count = state
        x = self.into(x)
        q, k, v = self._project(x)
        keys, values = (jnp.concatenate([old[1:], new[None]]) for old, new in ((keys, k), (values, v)))
        count = jnp.minimum(count + 1, len(keys))
        age = jnp.arange(len(keys))[::-1]
        out = self._attend(q, keys, values, age, age < count)
        return (keys, values, count), self._finish(x, out)

    def __call__(self, x: Sequence) -> Outputs:
        """All steps."""
        x = jax.vmap(self.into)(x)
        q, k, v = jax.vmap(self._project)(x)
        steps = jnp.arange(len(x))
        age = steps[:, None] - steps
        near = (age >= 0) if self.causal else jnp.ones_like(age, bool)
        if self.window is not None:
            near = near & (jnp.abs(age) < self.window)
        out = jax.vmap(self._attend, in_axes=(0, None, None, 0, 0))(q, k, v, jnp.abs(age), near)
        return jax.vmap(self._finish)(x, out)

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        q, k, v = jnp.split(self.queries(self.norms[0](x)), 3)
        return q, k, v

    def _attend(self, q: Array, keys: Array, values: Array, age: Array, near: Array) -> Array:
        heads, each = self.num_heads, self.size // self.num_heads
        slopes = 2.0 ** (-8.0 * jnp.arange(1, heads + 1) / heads)
        scores = jnp.einsum("hd,thd->ht", q.reshape(heads, each), keys.reshape(-1, heads, each)) / math.sqrt(each)
        scores = jnp.where(near, scores - (slopes[:, None] * age).astype(scores.dtype), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("ht,thd->hd", weights, values.reshape(-1, heads, each)).reshape(-1)

    def _finish(self, x: Array, out: Array) -> Array:
        x = x + self.out(out)
        return x + self.mlp(self.norms[1](x))
