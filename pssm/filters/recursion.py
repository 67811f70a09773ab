"""Linear recursions over time, for one series or for many that share a model.

Only one product in a step of the means has to wait for the step before; all others are made for all steps at once,
outside of the loop. Arrays are `(time, ..., size)`: series stand side by side behind the time, so a step is one product
of a matrix with the vectors of all of them.
"""

from typing import Any, overload

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.filters.covariance import by_step
from pssm.linalg.small import matmul, times


@overload
def time_first(x: Array) -> Array: ...
@overload
def time_first(x: None) -> None: ...
def time_first(x: Array | None) -> Array | None:
    """`(..., time, size)` as `(time, ..., size)`."""
    return None if x is None else jnp.moveaxis(x, -2, 0)


def series_first(x: Array) -> Array:
    """`(time, ..., size)` as `(..., time, size)`."""
    return jnp.moveaxis(x, 0, -2)


def spread_over(series: tuple[int, ...], tree: Any) -> Any:
    """What all series share, once for each."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*series, *x.shape)), tree) if series else tree


def apply(a: Array, x: Array) -> Array:
    """`a x` for each vector of `x`, `(..., cols)`; `a` is `(rows, cols)`, or `(time, rows, cols)` for `(time, ...)`."""
    if a.ndim == 2:
        return x @ a.T if x.ndim > 1 else times(a, x)
    if x.ndim == 2:  # fused, where batched products with one vector each are not
        return jnp.sum(a * x[:, None, :], axis=2)
    return jnp.einsum("trc,t...c->t...r", a, x)


def add(x: Array, offset: Array) -> Array:
    """`x + offset` with `offset` a vector, or one for each step of `x`, `(time, ..., size)`."""
    if offset.ndim == 1:
        return x + offset
    return x + offset.reshape(offset.shape[0], *(1,) * (x.ndim - 2), -1)


def apply_rows(rows: Array, last: Array | int, x: Array) -> Array:
    """`rows[min(t, last)] x_t` for every step."""
    if isinstance(last, int):
        return apply(rows, x)
    early = len(rows)
    late = apply(jax.lax.dynamic_index_in_dim(rows, last, 0, keepdims=False), x)
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
        inputs: `(time, ..., size)`.
        less: as `rows`. The two products are subtracted, not the matrices: a slow recursion, its matrix nearly the
            identity, would add up the rounding of a difference for as long as it remembers.
        reverse: run back in time.
    """
    size = start.shape[-1]
    joined = rows if less is None else jnp.concatenate([jnp.broadcast_to(rows, less.shape), less], axis=-2)
    row_xs, row_of_step = by_step(joined, last, inputs.shape[0])

    def step(x: Array, xs: tuple) -> tuple[Array, Array]:
        row, now = xs
        moved = times(row_of_step(row), x)
        return moved[..., :size] - moved[..., size:] + now if less is not None else moved + now, x

    start = jnp.broadcast_to(start, inputs.shape[1:])
    return jax.lax.scan(step, start, (row_xs, inputs), reverse=reverse)[1]
