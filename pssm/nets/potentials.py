"""Pseudo-observations: an encoder's Gaussian factors on the states, and the layer that makes them from numbers.

A pseudo-observation is a `Potential` (see there for the formula), as a rule in the tied form: the likelihood of
something like an observation of the state. The product of two is one of the same form.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pssm._checks import check_count, check_shape
from pssm._keys import as_key
from pssm._types import Array, KeyLike
from pssm.linalg.potential import Potential

PseudoObservation = Potential  # what an encoder calls it


def as_pseudo_observation(found: Any, sd: Array, rank: int, diagonal: bool) -> Potential:
    """An encoder's result for one series, in the units of the state and of the right shape.

    Accepted: a `Potential`, or several as a list or tuple, of which the product is taken; a tuple `(k, K)` or
    `(k, K, diag)` of arrays; numbers `(time, potential_size)`, of which `split_numbers` makes one.

    Args:
        found: the encoder's result.
        sd: standard deviations of the transition noise, `(time, state)`.
        rank: columns of `K`.
        diagonal: whether there must be a diagonal.

    Raises:
        TypeError, ValueError: something else, or another shape.
    """
    steps, n = sd.shape
    if eqx.is_array(found):
        check_shape("encoder", found, (steps, potential_size(n, rank, diagonal)), "time, numbers of a potential")
        found = split_numbers(found, n, rank, diagonal)
    elif isinstance(found, list | tuple) and found and all(isinstance(p, Potential) for p in found):
        parts = [p.in_state_units(sd) for p in found]
        found = parts[0]
        for part in parts[1:]:
            found = found + part
    elif isinstance(found, tuple) and len(found) in (2, 3):
        k, K = (jnp.asarray(x) for x in found[:2])
        diag = jnp.asarray(found[2]) if len(found) == 3 and found[2] is not None else None
        found = Potential(K, diag, slope=k)
    if not isinstance(found, Potential):
        raise TypeError(
            "`encoder` must return a Potential (PseudoObservation), a tuple (k, K, diag) or an array of numbers; "
            f"got {type(found).__name__}."
        )
    shapes = {"K": (steps, n, rank), "diag": (steps, n), "c": (steps, n), "k": (steps, n), "b": (steps, rank)}
    for name, shape in shapes.items():
        x = getattr(found, name)
        if x is not None and x.shape != shape:
            raise ValueError(f"`encoder` must give `{name}` of shape {shape}; got {x.shape}.")
    if (found.diagonal is not None) != diagonal:
        have, want = ("a", "no") if found.diagonal is not None else ("no", "a")
        raise ValueError(f"`encoder` gives {have} diagonal, and the guide's family has {want} one.")
    return found.in_state_units(sd)


def potential_size(n_state: int, rank: int, diagonal: bool = True, tied: bool = True) -> int:
    """How many numbers one step's potential takes."""
    slope = rank + (n_state if diagonal else 0) if tied else n_state
    return n_state * rank + (n_state if diagonal else 0) + slope


def split_numbers(x: Array, n_state: int, rank: int, diagonal: bool = True, tied: bool = True) -> Potential:
    """Unconstrained numbers `(..., potential_size)` as pseudo-observations in units of the noise.

    Zeros give a potential with a diagonal of 0.7 and centre zero. `K` is held below 30 by a soft cap.
    """
    K, width, slope = jnp.split(x, [n_state * rank, n_state * (rank + diagonal)], axis=-1)
    K = 30.0 * jnp.tanh(K.reshape(*x.shape[:-1], n_state, rank) / 30.0)
    diag = jax.nn.softplus(width) if diagonal else None
    if not tied:
        return Potential(K, diag, slope=slope, relative=True)
    b, c = slope[..., :rank], slope[..., rank:]
    return Potential(K, diag, b if rank else None, c if diagonal else None, relative=True)


class PotentialHead(eqx.Module):
    """A linear layer from features to a pseudo-observation.

    Args:
        num_features: size of the features.
        n_state: size of the state.
        rank: columns of `K`.
        diagonal: whether there is a diagonal besides.
        tied: the tied form (default), or a free slope `k` as published.
        key: random key.
    """

    linear: eqx.nn.Linear
    n_state: int = eqx.field(static=True)
    rank: int = eqx.field(static=True)
    diagonal: bool = eqx.field(static=True)
    tied: bool = eqx.field(static=True)

    def __init__(
        self, num_features: int, n_state: int, rank: int, *, diagonal: bool = True, tied: bool = True, key: KeyLike
    ):
        key = as_key(key)
        check_count("rank", rank, least=0 if diagonal else 1)
        self.linear = eqx.nn.Linear(num_features, potential_size(n_state, rank, diagonal, tied), key=key)
        self.n_state, self.rank, self.diagonal, self.tied = n_state, rank, diagonal, tied

    @property
    def size(self) -> int:
        """Size of the result of `numbers`."""
        return self.linear.out_features

    def numbers(self, features: Array) -> Array:
        """`(size,)` numbers of one step, from features `(num_features,)`."""
        return self.linear(features)

    def split(self, numbers: Array) -> Potential:
        """Numbers `(..., size)` as a pseudo-observation."""
        return split_numbers(numbers, self.n_state, self.rank, self.diagonal, self.tied)
