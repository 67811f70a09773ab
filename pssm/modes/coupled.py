"""Series that share a term of the likelihood, such as a sum over them: one mode, and a block of curvature for each.

`log_lik(paths)` says which: it has the batch shape of the paths where each series has its own terms, and length 1 (or
no axis at all) where the series along an axis share one. A posterior that has one factor for each series is best with
the mean at the joint mode and with the series' own blocks of the curvature, which is exact for Gaussians.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array


def group_shape(log_lik: Callable[[Array], Array], path: Array) -> tuple[int, ...]:
    """The batch shape of paths with length 1 along the axes whose series share a term."""
    batch, shape = path.shape[:-2], jax.eval_shape(log_lik, path).shape
    shape = (1,) * (len(batch) - len(shape)) + shape
    return tuple(size if own == size else 1 for own, size in zip(shape, batch, strict=True))


def sum_groups(values: Array, groups: tuple[int, ...]) -> Array:
    """Sums over the series that share a term; the axes stay."""
    return values.sum(tuple(i for i, size in enumerate(groups) if size != values.shape[i]), keepdims=True)


def hessian_times(log_lik: Callable[[Array], Array], path: Array) -> tuple[Array, Callable[[Array], Array]]:
    """The gradient at a path, and the Hessian's blocks of each series and step times vectors `(..., time, state)`.

    Each state enters its own summand only, so one product with a vector at every step gives the product with all
    blocks; of series that share a term, one series at a time.
    """
    slope = jax.grad(lambda z: jnp.sum(log_lik(z)))
    groups = group_shape(log_lik, path)
    joined = tuple(1 if own == size else size for own, size in zip(groups, path.shape[:-2], strict=True))
    count = math.prod(joined)
    member = jnp.arange(count).reshape(joined)[..., None, None]

    def times(v: Array) -> Array:
        v = jnp.broadcast_to(v, path.shape)

        def one(total: Array, which: Array) -> tuple[Array, None]:
            found = jax.jvp(slope, (path,), (jnp.where(member == which, v, 0.0),))[1]
            return total + jnp.where(member == which, found, 0.0), None

        if count == 1:
            return jax.jvp(slope, (path,), (v,))[1]
        return jax.lax.scan(one, jnp.zeros_like(path), jnp.arange(count))[0]

    return slope(path), times


class Conjugate(NamedTuple):
    """What a search by conjugate gradients remembers of its last step."""

    slope: Array
    move: Array
    direction: Array

    @classmethod
    def start(cls, path: Array) -> "Conjugate":
        """Nothing."""
        return cls(*(jnp.zeros_like(path),) * 3)

    def next(self, objective: Callable[[Array], Array], path: Array, move: Array) -> tuple[Array, "Conjugate"]:
        """The step from a path, where `move` is that of each series with the others held fixed.

        Taken by all of them at once the moves go too far, or hardly on where the series trade off against each other:
        they are the preconditioned gradient here (Polak & Ribiere), and the length is that of a Newton step.
        """
        slope_of = jax.grad(lambda z: jnp.sum(objective(z)))
        slope = slope_of(path)
        slope = jnp.where(jnp.isfinite(slope), slope, 0.0)
        gained = jnp.sum(self.slope * self.move)
        share = jnp.maximum(jnp.sum(slope * (move - self.move)) / jnp.where(gained > 0, gained, 1.0), 0.0)
        direction = move + jnp.where(gained > 0, share, 0.0) * self.direction
        direction = jnp.where(jnp.sum(slope * direction) > 0, direction, move)  # begins again where it does not climb
        curved = jax.jvp(slope_of, (path,), (direction,))[1]
        rise, bend = jnp.sum(slope * direction), -jnp.sum(direction * curved)
        length = jnp.where((rise > 0) & (bend > 0), rise / jnp.where(bend > 0, bend, 1.0), 1.0)
        return length * direction, Conjugate(slope, move, direction)
