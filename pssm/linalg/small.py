"""Products of tiny matrices that stay inside a fused loop.

XLA compiles a `lax.scan` into one tight loop when its body holds nothing but elementwise work and reductions; a single
`dot` or LAPACK call in the body costs more than all the arithmetic of a small Kalman step. Below `SMALL` the products
here are written as multiply-and-sum, above it they are ordinary matrix products.
"""

import jax.numpy as jnp

from pssm._types import Array, Float

SMALL = 12  # on the CPUs measured, the gain is 30 x at size 4, 6 x at 12 and gone at 16


def matvec(a: Float[Array, "rows cols"], x: Float[Array, " cols"]) -> Float[Array, " rows"]:
    """`a @ x`."""
    if max(a.shape) > SMALL:
        return a @ x
    return jnp.sum(a * x, axis=1)


def matmul(a: Float[Array, "rows inner"], b: Float[Array, "inner cols"]) -> Float[Array, "rows cols"]:
    """`a @ b`."""
    if max(*a.shape, *b.shape) > SMALL:
        return a @ b
    return jnp.sum(a[:, :, None] * b[None, :, :], axis=1)
