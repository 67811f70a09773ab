"""Products of small matrices that stay inside a fused loop.

XLA compiles a `lax.scan` into one tight loop when its body is small and has only elementwise operations, reductions
and inner loops; a single `dot`, `scatter` or LAPACK call in the body makes each operation of the step a separate
kernel call, which costs more than all the arithmetic of a small Kalman step. The small products here are written as
multiply-and-sum, the larger ones are ordinary matrix products.
"""

from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl

from pssm._types import Array, Float

TINY = 4  # factorisations are unrolled up to here; compile time grows fast with their size
SMALL = 12  # on the CPUs measured, the gain is 30 x at size 4, 6 x at 12 and gone at 16

MANY = 3 * SMALL**3  # multiplications up to which `times` has no `dot`: twice as fast at 4000, half as fast at 10 000


def matvec(a: Float[Array, "rows cols"], x: Float[Array, " cols"]) -> Float[Array, " rows"]:
    """`a @ x`."""
    if a.size > 2 * SMALL**2:
        return a @ x
    return jnp.sum(a * x[None, :], axis=1)


def times(a: Float[Array, "rows cols"], x: Float[Array, "cols *vectors"]) -> Float[Array, "rows *vectors"]:
    """`a @ x` for a vector, or for many of them side by side, which makes multiply-and-sum faster for longer."""
    if x.ndim == 1:
        return matvec(a, x)
    if a.size * x.shape[1] > MANY:
        return a @ x
    return jnp.sum(a[:, :, None] * x[None, :, :], axis=1)


def affine(matrix: Array, offset: Array | None, by_input: Array | None, z: Array, u: Array | None) -> Array:
    """`matrix z + offset + by_input u` at one time, of one state or of states side by side; None adds nothing."""
    mean = times(matrix, z)
    if offset is not None:
        mean = mean + offset.reshape(-1, *(1,) * (z.ndim - 1))
    return mean if by_input is None or u is None else mean + times(by_input, u)


def along_time(
    a: Float[Array, "... rows cols"], x: Float[Array, "*batch time cols"], timed: bool
) -> Float[Array, "*batch_out time rows"]:
    """`a_t x_t` for vectors along a series, with the axes of a batch in front; `timed`: the matrices differ in time."""
    if a.ndim == 2:
        return jnp.matmul(x, a.T, precision="highest")
    a = a if timed else a[..., None, :, :]
    return jnp.sum(a * x[..., None, :], axis=-1)


def matmul(a: Float[Array, "rows inner"], b: Float[Array, "inner cols"]) -> Float[Array, "rows cols"]:
    """`a @ b`."""
    if a.size * b.shape[1] > 2 * SMALL**3:
        return a @ b
    return jnp.sum(a[:, :, None] * b[None, :, :], axis=1)


def unroll(size: int) -> int:
    """How many steps of a scan over vectors of this size go into one pass of the compiled loop.

    Two take a tenth to a quarter less time up to size 4, four no less, and from size 8 on it makes no difference.
    """
    return 2 if size <= TINY else 1


def batch_first(tree: Any) -> Any:
    """The same arrays, any axis of an outer `vmap` in front.

    For the results of a `custom_jvp` function and of its rule: JAX assumes that both have that axis in the same place.
    """
    return jax.tree.map(lambda x: x.reshape(1, *x.shape).reshape(x.shape), tree)


def row_of(a: Array, i: Array) -> Array:
    """`a[i]` for an index of the loop."""
    return jax.lax.dynamic_index_in_dim(a, i, 0, keepdims=False)


def set_row(a: Array, row: Array, i: Array) -> Array:
    """`a` with row `i` replaced; `a.at[i].set(row)` would be a `scatter`."""
    return jax.lax.dynamic_update_index_in_dim(a, row, i, 0)


def cholesky(a: Float[Array, "rows rows"]) -> Float[Array, "rows rows"]:
    """Lower Cholesky factor of a positive definite matrix."""
    rows = a.shape[0]
    if rows > TINY:
        return jnp.linalg.cholesky(a)
    columns: list[Array] = []
    for j in range(rows):
        column = a[:, j]
        for done in columns:
            column = column - done * done[j]
        column = column / jnp.sqrt(column[j])
        columns.append(jnp.where(jnp.arange(rows) < j, 0.0, column))
    return jnp.stack(columns, axis=1) if rows else a


def invert_lower(factor: Float[Array, "rows rows"]) -> Float[Array, "rows rows"]:
    """Inverse of a lower triangle with a positive diagonal, for use with many right-hand sides."""
    rows = factor.shape[0]
    eye = jnp.eye(rows, dtype=factor.dtype)
    if rows > TINY:
        return jsl.solve_triangular(factor, eye, lower=True)
    return substitute(factor, eye, reverse=False)


def substitute(matrix: Float[Array, "rows rows"], x: Float[Array, "rows cols"], *, reverse: bool) -> Array:
    """Forward substitution with a lower triangle (`reverse`: backward, with an upper one), row by row.

    The diagonal must not be zero; the other triangle is not read.
    """
    rows = matrix.shape[0]
    solved: dict[int, Array] = {}
    for i in reversed(range(rows)) if reverse else range(rows):
        rest = x[i]
        for j, row in solved.items():
            rest = rest - matrix[i, j] * row
        solved[i] = rest / matrix[i, i]
    return jnp.stack([solved[i] for i in range(rows)]) if rows else x
