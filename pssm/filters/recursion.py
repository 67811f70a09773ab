"""Linear recursions over time, for one series or for many that share a model.

Only one product in a step of the means has to wait for the step before; all others are made for all steps at once,
outside of the loop. Arrays are `(time, size, ...)` with the axes of the series last: a step is one product of a matrix
with the vectors of all series, and processors work on neighbouring series side by side.
"""

import math
from typing import Any, overload

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.filters.covariance import by_step
from pssm.linalg.small import matmul, row_of, times


@overload
def time_first(x: Array) -> Array: ...
@overload
def time_first(x: None) -> None: ...
def time_first(x: Array | None) -> Array | None:
    """`(..., time, size)` as `(time, size, ...)`."""
    return None if x is None else jnp.moveaxis(x, (-2, -1), (0, 1))


def series_first(x: Array) -> Array:
    """`(time, size, ...)` as `(..., time, size)`."""
    return jnp.moveaxis(x, (0, 1), (-2, -1))


def spread_over(series: tuple[int, ...], tree: Any) -> Any:
    """What all series share, once for each."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*series, *x.shape)), tree) if series else tree


def add(x: Array, offset: Array) -> Array:
    """`x + offset` for `x` of shape `(time, size, ...)` and an offset `(size,)` or `(time, size)`."""
    return x + offset.reshape(*offset.shape, *(1,) * (x.ndim - 2)) if x.ndim > 1 else x + offset


def apply(a: Array, x: Array) -> Array:
    """`a x`, with `a` a matrix or one for each step; `x` is a vector or `(time, cols, ...)`."""
    if x.ndim == 1:
        return times(a, x)
    if x.ndim == 2:  # multiply-and-sum is fused, where a batched product with one vector each is not
        return x @ a.T if a.ndim == 2 else jnp.sum(a * x[:, None, :], axis=2)
    flat = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    product = jnp.broadcast_to(a, (len(x), *a.shape[-2:])) @ flat
    return product.reshape(*product.shape[:2], *x.shape[2:])


def apply_rows(rows: Array, last: Array | int, x: Array) -> Array:
    """`rows[min(t, last)] x_t` for every step."""
    if isinstance(last, int):
        return apply(rows, x)
    early = len(rows)
    late = apply(row_of(rows, last), x)
    before = (jnp.arange(early) < last).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.concatenate([jnp.where(before, apply(rows, x[:early]), late[:early]), late[early:]])


def product(*factors: Array) -> Array:
    """The product of matrices, some of them one for each step."""
    *before, found = factors
    for a in reversed(before):
        axes = (0 if a.ndim == 3 else None, 0 if found.ndim == 3 else None)
        found = matmul(a, found) if axes == (None, None) else jax.vmap(matmul, axes)(a, found)
    return found


def recursion(
    rows: Array, last: Array | int, start: Array, inputs: Array, less: Array | None = None, *, reverse: bool = False
) -> Array:
    """`x` before each step of `x <- (rows_t - less_t) x + inputs_t`, from `start`; with `reverse`, from the last step.

    Args:
        rows: matrices `(steps, size, size)`; step `t` takes row `min(t, last)`.
        last: see `rows`.
        start: `(size,)`.
        inputs: `(time, size, ...)`.
        less: as `rows`. The two products are subtracted, not the matrices: a slow recursion, its matrix nearly the
            identity, would add up the rounding of a difference for as long as it remembers.
        reverse: run back in time.
    """
    size = len(start)
    joined = rows if less is None else jnp.concatenate([jnp.broadcast_to(rows, less.shape), less], axis=-2)
    row_xs, row_of_step = by_step(joined, last, len(inputs))

    def step(x: Array, xs: tuple) -> tuple[Array, Array]:
        row, now = xs
        moved = times(row_of_step(row), x)
        return moved[:size] + (now if less is None else now - moved[size:]), x

    flat = inputs.reshape(*inputs.shape[:2], *([math.prod(inputs.shape[2:])] if inputs.ndim > 2 else []))
    start = jnp.broadcast_to(start.reshape(size, *(1,) * (flat.ndim - 2)), flat.shape[1:])
    return jax.lax.scan(step, start, (row_xs, flat), reverse=reverse)[1].reshape(inputs.shape)
