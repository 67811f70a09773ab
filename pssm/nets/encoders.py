"""Encoders: `encode(y, u) -> Potential`, from one series with NaN for missing entries.

The chain's potential at step t approximates the likelihood of the data from t on, `p(y_{t:T} | z_t)`. It is the product
of a factor from the step itself, `alpha_t`, and a factor from the later steps, `beta_{t+1}`. `SmoothingEncoder` makes
both, as published; `SequenceEncoder` makes the product at once. Causal encoders know the past only; they also run
online, by `start() -> state` and `step(state, y_t, u_t) -> (state, Potential)`, with the same results.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pssm._checks import check_choice
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Float, KeyLike, Series
from pssm.linalg.potential import Potential
from pssm.nets.features import StepMLP, run_backward, seen_and_filled
from pssm.nets.mixers import GRU, LSTM, SelfAttention
from pssm.nets.potentials import PotentialHead
from pssm.nets.s5 import S5

Inputs = Float[Array, "time input"]
MIXERS = ("gru", "lstm", "s5", "attention")


class LocalEncoder(eqx.Module):
    """`alpha_t`, the factor from a step's own data; it is constant at a step without data.

    Args:
        front: features of a step, `(y_t, seen_t, u_t) -> (features,)`, such as `StepMLP` or `StridedCNN`.
        head: `PotentialHead` from those features.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> one, two = jax.random.split(jax.random.key(0))
        >>> encode = LocalEncoder(StepMLP(5, 16, key=one), PotentialHead(16, n_state=2, rank=1, key=two))
        >>> alpha = encode(jnp.ones((30, 5)).at[4].set(jnp.nan))
        >>> alpha.K.shape, alpha.diag.shape, bool(alpha.mask[4])
        ((30, 2, 1), (30, 2), False)
    """

    front: Any
    head: PotentialHead

    causal = True

    def numbers(self, y: Array, u: Array | None) -> tuple[Array, Array]:
        """The head's numbers of one step `(size,)`, zero without data, and whether there are data."""
        filled, seen = seen_and_filled(y)
        some = seen.any()
        return jnp.where(some, self.head.numbers(self.front(filled, seen, u)), 0.0), some

    def __call__(self, y: Series, u: Inputs | None = None) -> Potential:
        """Potentials of all steps."""
        numbers, mask = jax.vmap(self.numbers)(y, u)
        return _with_mask(self.head.split(numbers), mask)

    def start(self) -> tuple[()]:
        """Nothing is remembered."""
        return ()

    def step(self, state: tuple[()], y: Array, u: Array | None = None) -> tuple[tuple[()], Potential]:
        """One step."""
        numbers, mask = self.numbers(y, u)
        return (), _with_mask(self.head.split(numbers), mask)


class BackwardEncoder(eqx.Module):
    """`beta_{t+1}`, the factor from the data after t on the state at t, from the numbers of a `LocalEncoder`.

    A mixer runs over them from the end to the start, and its output at t + 1 makes the pseudo-observation of t. The
    last step, and steps without later observations, get none.

    Args:
        mixer: a causal sequence mixer whose inputs are the local encoder's numbers, then the inputs `u`.
        head: `PotentialHead` from its outputs.
    """

    mixer: Any
    head: PotentialHead

    def __call__(self, numbers: Array, mask: Array, u: Inputs | None = None) -> Potential:
        """Potentials, from `(time, size)` numbers that are zero where `mask` `(time,)` is false."""
        x = numbers if u is None else jnp.concatenate([numbers, u], axis=-1)
        out = jax.vmap(self.head.numbers)(run_backward(self.mixer, x, mask))
        after = jnp.cumsum(mask[::-1])[::-1] > 0
        shifted = jnp.concatenate([out[1:], jnp.zeros_like(out[:1])])
        return _with_mask(self.head.split(shifted), jnp.concatenate([after[1:], jnp.zeros(1, bool)]))


class SmoothingEncoder(eqx.Module):
    """`alpha_t` and `beta_{t+1}`: the published pair, of which the guide takes the product.

    Their ranks add up to the guide's.

    Args:
        local: a `LocalEncoder`.
        backward: a `BackwardEncoder`.

    Source:
        Dowling, Zhao & Park 2024.
    """

    local: LocalEncoder
    backward: BackwardEncoder

    causal = False

    def __call__(self, y: Series, u: Inputs | None = None) -> list[Potential]:
        """Both potentials of all steps."""
        numbers, mask = jax.vmap(self.local.numbers)(y, u)
        alpha = _with_mask(self.local.head.split(numbers), mask)
        return [alpha, self.backward(numbers, mask, u)]


class SequenceEncoder(eqx.Module):
    """One potential from a step's features and a mixer's output over the steps after it, or over those before it.

    Args:
        front: features of a step.
        mixer: a sequence mixer of those features.
        head: `PotentialHead` from features and outputs side by side.
        reverse: the mixer runs from the end to the start, which smooths; else forward, and the encoder is causal if the
            mixer is. Where there are no data (from this step on, or at this step if it runs forward), the potential is
            constant.
    """

    front: Any
    mixer: Any
    head: PotentialHead
    reverse: bool = eqx.field(static=True, default=True)

    @property
    def causal(self) -> bool:
        """Whether a potential depends on the past only."""
        return not self.reverse and getattr(self.mixer, "causal", False)

    def __call__(self, y: Series, u: Inputs | None = None) -> Potential:
        """Potentials of all steps."""
        features, mask = jax.vmap(self._features)(y, u)
        if self.reverse:
            mixed, mask = run_backward(self.mixer, features, mask), jnp.cumsum(mask[::-1])[::-1] > 0
        else:
            mixed = self.mixer(features)
        numbers = jax.vmap(self.head.numbers)(jnp.concatenate([features, mixed], axis=-1))
        if not self.reverse and not self.causal:
            mask = jnp.broadcast_to(mask.any(), mask.shape)
        return _with_mask(self.head.split(numbers), mask)

    def start(self) -> Any:
        """The mixer's state before the first step."""
        if not self.causal:
            raise ValueError("`reverse=False` and a causal mixer are needed to run step by step.")
        return self.mixer.start()

    def step(self, state: Any, y: Array, u: Array | None = None) -> tuple[Any, Potential]:
        """One step."""
        features, mask = self._features(y, u)
        state, mixed = self.mixer.step(state, features)
        return state, _with_mask(self.head.split(self.head.numbers(jnp.concatenate([features, mixed]))), mask)

    def _features(self, y: Array, u: Array | None) -> tuple[Array, Array]:
        filled, seen = seen_and_filled(y)
        return self.front(filled, seen, u), seen.any()


def sequence_encoder(
    n_obs: int,
    n_state: int,
    rank: int,
    *,
    mixer: str = "gru",
    size: int = 64,
    causal: bool = False,
    diagonal: bool = True,
    n_input: int = 0,
    data: ArrayLike | None = None,
    key: KeyLike,
) -> SequenceEncoder:
    """A `SequenceEncoder` with usual parts: a perceptron on every step, a mixer, a linear head.

    Args:
        n_obs: number of observed variables.
        n_state: size of the state.
        rank: columns of the potentials' factor: the guide's `rank`.
        mixer: "gru", "lstm", "s5" or "attention" (with a window of 32 steps).
        size: width of all layers.
        causal: the mixer sees the past only; else the steps from here on, or for "attention" both sides.
        diagonal: whether the potentials have a diagonal: needed by all guides except `family="moment_matched"`.
        n_input: number of inputs `u`.
        data: data `(..., obs)` by whose mean and standard deviation the network's input is standardised.
        key: random key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> encode = sequence_encoder(5, 2, 1, mixer="s5", size=16, key=jax.random.key(0))
        >>> encode(jnp.ones((30, 5))).K.shape, encode.causal
        ((30, 2, 1), False)
    """
    key = as_key(key)
    check_choice("mixer", mixer, MIXERS)
    one, two, three = jax.random.split(key, 3)
    front = StepMLP(n_obs, size, hidden=size, n_input=n_input, data=data, key=one)
    if mixer == "attention":
        own: Any = SelfAttention(size, size, window=32, causal=causal, key=two)
    else:
        own = {"gru": GRU, "lstm": LSTM, "s5": S5}[mixer](size, size, key=two)
    head = PotentialHead(2 * size, n_state, rank, diagonal=diagonal, key=three)
    return SequenceEncoder(front, own, head, reverse=not causal and mixer != "attention")


def _with_mask(found: Potential, mask: Array) -> Potential:
    return eqx.tree_at(lambda p: p.mask, found, mask, is_leaf=lambda x: x is None)
