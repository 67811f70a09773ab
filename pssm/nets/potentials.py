"""Pseudo-observations: an encoder's Gaussian factors on the states, and the layer that makes them from numbers.

    psi_t(z) = exp((K_t b_t + k_t)'x - x'(diag(diag_t) + K_t K_t')x / 2),    x = z - c_t

In the tied form `k` is absent: as with the messages of a likelihood, the slope then lies in the range of the precision,
and no large numbers cancel in float32. The product of two pseudo-observations has the same form.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from pssm._checks import check_count, check_shape
from pssm._types import Array, Bool, Float, Key


class PseudoObservation(eqx.Module):
    """A Gaussian-shaped factor on the state of every step, `psi` of the module's head.

    Attributes:
        K: factors of the precision, `(..., time, state, rank)`; rank 0 is allowed.
        diag: its diagonal, `(..., time, state)`, not negative; None for none.
        b: slopes along the columns of `K`, `(..., time, rank)`; None for zero.
        c: the centre, `(..., time, state)`; None for zero.
        k: a slope without a precision, `(..., time, state)`; None for zero (the tied form).
        mask: False where the step's factor is constant, `(..., time)`; None for no such step.
        relative: lengths are in units of the transition noise: `K` and `k` are times its standard deviation, `diag`
            times its variance. `b` has no unit, `c` that of the state.
    """

    K: Float[Array, "... state rank"]
    diag: Float[Array, "... state"] | None = None
    b: Float[Array, "... rank"] | None = None
    c: Float[Array, "... state"] | None = None
    k: Float[Array, "... state"] | None = None
    mask: Bool[Array, "..."] | None = None
    relative: bool = eqx.field(static=True, default=False)

    def __add__(self, other: "PseudoObservation") -> "PseudoObservation":
        """The product of the two factors: ranks and precisions add up, centres are averaged by the diagonals."""
        if self.relative or other.relative:
            raise ValueError("`relative`: bring both into the units of the state first, with `in_state_units`.")
        x, y = self.masked(), other.masked()
        zero = jnp.zeros(x.K.shape[:-1], x.K.dtype)
        centres = [zero if p.c is None else p.c for p in (x, y)]
        diags = [zero if p.diag is None else p.diag for p in (x, y)]
        total = diags[0] + diags[1]
        weight = jnp.where(total > 0, diags[1] / jnp.where(total > 0, total, 1.0), 0.5)
        c = centres[0] + weight * (centres[1] - centres[0])
        slopes = []
        for p, own in zip((x, y), centres, strict=True):
            b = jnp.zeros_like(p.K[..., 0, :]) if p.b is None else p.b
            slopes.append(b + jnp.einsum("...nr,...n->...r", p.K, own - c))
        k = None if x.k is None and y.k is None else sum(p.k for p in (x, y) if p.k is not None)
        mask = None if x.mask is None or y.mask is None else x.mask | y.mask
        has_diag = x.diag is not None or y.diag is not None
        b = jnp.concatenate(slopes, axis=-1)
        return PseudoObservation(jnp.concatenate([x.K, y.K], axis=-1), total if has_diag else None, b, c, k, mask)

    def masked(self) -> "PseudoObservation":
        """The same with factors of one where `mask` is false."""
        if self.mask is None:
            return self
        m = self.mask
        diag = None if self.diag is None else jnp.where(m[..., None], self.diag, 0.0)
        k = None if self.k is None else jnp.where(m[..., None], self.k, 0.0)
        return PseudoObservation(jnp.where(m[..., None, None], self.K, 0.0), diag, self.b, self.c, k, m, self.relative)

    def in_state_units(self, sd: Array) -> "PseudoObservation":
        """The same, not relative, for transition noise of standard deviation `sd` `(..., time or 1, state)`."""
        if not self.relative:
            return self
        diag = None if self.diag is None else self.diag / sd**2
        k = None if self.k is None else self.k / sd
        return PseudoObservation(self.K / sd[..., None], diag, self.b, self.c, k, self.mask)

    def arguments(self) -> dict[str, Array]:
        """Arguments of `LowRankChain` beside its prior: `k`, `K`, `diag`, `center`, `b`, without None."""
        if self.relative:
            raise ValueError("`relative`: bring it into the units of the state first, with `in_state_units`.")
        p = self.masked()
        k = jnp.zeros(p.K.shape[:-1], p.K.dtype) if p.k is None else p.k
        found = {"K": p.K, "k": k, "diag": p.diag, "center": p.c, "b": p.b}
        return {name: x for name, x in found.items() if x is not None}


def as_pseudo_observation(found: Any, sd: Array, rank: int, diagonal: bool) -> PseudoObservation:
    """An encoder's result for one series, as a pseudo-observation in the units of the state and of the right shape.

    Accepted: a `PseudoObservation`, or several as a list or tuple, of which the product is taken; a tuple `(k, K)` or
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
    elif isinstance(found, list | tuple) and found and all(isinstance(p, PseudoObservation) for p in found):
        parts = [p.in_state_units(sd) for p in found]
        found = parts[0]
        for part in parts[1:]:
            found = found + part
    elif isinstance(found, tuple) and len(found) in (2, 3):
        k, K = (jnp.asarray(x) for x in found[:2])
        diag = jnp.asarray(found[2]) if len(found) == 3 and found[2] is not None else None
        found = PseudoObservation(K, diag, k=k)
    if not isinstance(found, PseudoObservation):
        raise TypeError(
            "`encoder` must return a PseudoObservation, a tuple (k, K, diag) or an array of numbers; "
            f"got {type(found).__name__}."
        )
    shapes = {"K": (steps, n, rank), "diag": (steps, n), "c": (steps, n), "k": (steps, n), "b": (steps, rank)}
    for name, shape in shapes.items():
        x = getattr(found, name)
        if x is not None and x.shape != shape:
            raise ValueError(f"`encoder` must give `{name}` of shape {shape}; got {x.shape}.")
    if (found.diag is not None) != diagonal:
        have, want = ("a", "no") if found.diag is not None else ("no", "a")
        raise ValueError(f"`encoder` gives {have} diagonal, and the guide's family has {want} one.")
    return found.in_state_units(sd)


def potential_size(n_state: int, rank: int, diagonal: bool = True, tied: bool = True) -> int:
    """How many numbers one step's potential takes."""
    slope = rank + (n_state if diagonal else 0) if tied else n_state
    return n_state * rank + (n_state if diagonal else 0) + slope


def split_numbers(x: Array, n_state: int, rank: int, diagonal: bool = True, tied: bool = True) -> PseudoObservation:
    """Unconstrained numbers `(..., potential_size)` as pseudo-observations in units of the noise.

    Zeros give a potential with a diagonal of 0.7 and centre zero. `K` is held below 30 by a soft cap.
    """
    K, width, slope = jnp.split(x, [n_state * rank, n_state * (rank + diagonal)], axis=-1)
    K = 30.0 * jnp.tanh(K.reshape(*x.shape[:-1], n_state, rank) / 30.0)
    diag = jax.nn.softplus(width) if diagonal else None
    if not tied:
        return PseudoObservation(K, diag, k=slope, relative=True)
    b, c = slope[..., :rank], slope[..., rank:]
    return PseudoObservation(K, diag, b if rank else None, c if diagonal else None, relative=True)


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
        self, num_features: int, n_state: int, rank: int, *, diagonal: bool = True, tied: bool = True, key: Key
    ):
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

    def split(self, numbers: Array) -> PseudoObservation:
        """Numbers `(..., size)` as a pseudo-observation."""
        return split_numbers(numbers, self.n_state, self.rank, self.diagonal, self.tied)
