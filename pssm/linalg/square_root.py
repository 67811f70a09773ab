"""Square roots of covariances: triangular factors that are right for singular input too, with their derivatives.

A covariance never appears in the filters; a factor does. For `P = M M'` with any rectangular `M`, `triangularise(M)`
gives the lower-triangular `L` with `L L' = P` and a diagonal that is never negative. Where a row of `M` depends on the
rows above it, the pivot of that row is exactly zero and so is its column of `L`: the skipped-pivot form of a singular
Cholesky factor. `solve_lower` skips the same pivots, so conditioning on a known quantity has no effect.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl

from pssm._types import Array, Float
from pssm.linalg.small import SMALL, TINY, batch_first, matmul, matvec, row_of, set_row, substitute

FEW = 8  # columns up to which a product column by column beats batched products with a call for each matrix


def triangularise(m: Float[Array, "rows cols"]) -> Float[Array, "rows rows"]:
    """Lower-triangular `L` with `L L' = m m'`, diagonal >= 0; `m` may have any shape and any rank.

    Differentiable to any order where `m` has full row rank. Where it has not, first derivatives of functions of
    `L L'` are right (see `_orthogonalise_jvp`).

    Args:
        m: a factor of shape `(rows, cols)`.

    Returns:
        `L` of shape `(rows, rows)`; the column of a dependent row is exactly zero.

    Example:
        >>> import jax.numpy as jnp
        >>> print(triangularise(jnp.array([[3.0, 4.0], [6.0, 8.0]])))
        [[ 5.  0.]
         [10.  0.]]
    """
    return orthogonalise(m)[0]


@jax.custom_jvp
def triangularise_once(m: Float[Array, "rows cols"]) -> Float[Array, "rows rows"]:
    """`triangularise` by modified Gram-Schmidt, unrolled: three times as fast and slow to compile, for small loops.

    One projection is enough where the orthogonal factor is not needed (Björck 1967). An entry no larger than its own
    rounding error is set to zero here too. Above `SMALL` rows it is `triangularise`.
    """
    rows = m.shape[0]
    if rows > SMALL:
        return triangularise(m)
    unit = 4 * jnp.finfo(m.dtype).eps
    noise, columns = unit * jnp.abs(m), []
    for i in range(rows):
        direction, length = _normalise(jnp.where(jnp.abs(m[0]) > noise[0], m[0], 0.0))
        along = matvec(m[1:], direction)
        columns.append(jnp.concatenate([jnp.zeros(i, m.dtype), length[None], along]))
        m = m[1:] - along[:, None] * direction[None, :]
        noise = noise[1:] + unit * jnp.abs(along)[:, None] * jnp.abs(direction)[None, :]
    return batch_first(jnp.stack(columns, axis=1)) if rows else m[:, :0]


@triangularise_once.defjvp
def _triangularise_once_jvp(primals, tangents):
    return batch_first(jax.jvp(triangularise, primals, tangents))


def solve_lower(
    factor: Float[Array, "rows rows"], x: Float[Array, "rows ..."], *, transpose: bool = False
) -> Float[Array, "rows ..."]:
    """Solves `L w = x` (or `L' w = x`), with `w_i = 0` where the pivot `L_ii` is zero.

    Args:
        factor: lower-triangular `L` of shape `(rows, rows)` as `triangularise` gives it.
        x: a vector `(rows,)` or matrix `(rows, cols)`.
        transpose: solve with `L'` instead.

    Returns:
        `w`, of the shape of `x`.
    """
    rows = factor.shape[0]
    columns = x if x.ndim == 2 else x[:, None]
    live = jnp.diagonal(factor) > 0
    pivots = jnp.where(live, jnp.diagonal(factor), 1.0)
    columns = jnp.where(live[:, None], columns, 0.0)
    triangle = jnp.where(jnp.eye(rows, dtype=bool), pivots, jnp.where(live[:, None], factor, 0.0))
    if rows <= SMALL:
        solved = substitute(triangle.T if transpose else triangle, columns, reverse=transpose)
    else:
        solved = jsl.solve_triangular(triangle, columns, lower=True, trans=1 if transpose else 0)
    return solved if x.ndim == 2 else solved[:, 0]


@jax.custom_jvp
def orthogonalise(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`m = L Q`: `L` lower triangular, the rows of `Q` orthonormal, or zero where a row of `m` is dependent."""
    rows, cols = m.shape
    return _householder(m) if SMALL < rows <= cols else _gram_schmidt(m)


def complement(turn: Array) -> Array:
    """`Q3` with `Q3' Q3 = 1 - Q1' Q1` for orthonormal rows `[Q1, Q2]`, `Q1` square.

    Its rows are the first part of rows orthogonal to those of the factor.
    """
    n = turn.shape[0]
    eye = jnp.eye(n, turn.shape[1], dtype=turn.dtype)
    return orthogonalise(jnp.concatenate([turn, eye]))[1][n:, :n]


def _householder(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By LAPACK's QR, which is fast, unless a row comes near to depending on those above it; then row by row.

    QR spends a direction on every row. Rows of zeros (missing observations) go last, where no row can miss it.
    """
    scale = jnp.sqrt(jnp.sum(m * m, axis=1))
    empty = scale == 0
    index = jnp.arange(m.shape[0])
    keys = jnp.where(empty, index + len(index), index)
    back = jnp.sum(keys[None, :] < keys[:, None], axis=1)  # argsort costs more here
    order = jnp.sum(jnp.where(back[None, :] == index[:, None], index[None, :], 0), axis=1)
    q, r = jnp.linalg.qr(m[order].T)
    sign = jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0).astype(m.dtype)
    factor = jnp.where(empty[None, :] | empty[:, None], 0.0, (r.T * sign[None, :])[back[:, None], back[None, :]])
    turn = jnp.where(empty[:, None], 0.0, (q * sign[None, :]).T[back])
    regular = jnp.all(empty | (jnp.diagonal(factor) > 32 * _near(m) * scale))  # false for NaN
    return unless(regular, (factor, turn), lambda: orthogonalise_with_care(m))


def unless(good: jax.Array, value: Any, otherwise: Callable[[], Any]) -> Any:
    """`value` where it is good. Unlike `lax.cond`, a batch computes `otherwise` only if an element needs it."""
    return jax.lax.while_loop(lambda s: ~s[0], lambda _: (jnp.asarray(True), otherwise()), (good, value))[1]


def _near(m: jax.Array) -> float:
    """A row may depend on those above it where what is left of it is some such share or less."""
    return float(jnp.finfo(m.dtype).eps) ** 0.5


def _rounding(m: jax.Array) -> float:
    return jnp.finfo(m.dtype).eps * (4.0 + 0.5 * m.shape[1] ** 0.5)


def _gram_schmidt(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """By Gram-Schmidt over the rows, and with care where a row comes near to depending on those above it."""
    factor, turn = _plain_gram_schmidt(m)
    scale = jnp.sqrt(jnp.sum(m * m, axis=1))
    regular = jnp.all((scale == 0) | (jnp.diagonal(factor) > 8 * _near(m) * scale))  # false for NaN
    return unless(regular, (factor, turn), lambda: orthogonalise_with_care(m))


def _plain_gram_schmidt(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row projected twice: "twice is enough" (Giraud, Langou & Rozloznik 2005)."""

    def project(row: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        first = matvec(q, row)
        rest = row - matvec(q.T, first)
        second = matvec(q, rest)
        return first + second, *_normalise(rest - matvec(q.T, second))

    return _row_by_row(m, project)


def _row_by_row(m: jax.Array, project: Callable[..., tuple]) -> tuple[jax.Array, jax.Array]:
    """The factors, by what `project` makes of a row and the directions of the rows above it."""
    rows, cols = m.shape
    if rows <= TINY:
        q_rows: list[jax.Array] = []
        l_rows = []
        for i in range(rows):
            coefficients, direction, length = jnp.zeros((0,), m.dtype), *_normalise(m[0])
            if i:
                coefficients, direction, length = project(m[i], jnp.stack(q_rows))
            q_rows.append(direction)
            l_rows.append(jnp.concatenate([coefficients, length[None], jnp.zeros(rows - i - 1, m.dtype)]))
        return jnp.stack(l_rows), jnp.stack(q_rows)

    def one_row(i: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        factor, q = done
        coefficients, direction, length = project(row_of(m, i), q)
        coefficients = jnp.where(jnp.arange(rows) == i, length, coefficients)
        return set_row(factor, coefficients, i), set_row(q, direction, i)

    empty = jnp.zeros((rows, rows), m.dtype), jnp.zeros((rows, cols), m.dtype)
    return jax.lax.fori_loop(0, rows, one_row, empty)


def orthogonalise_with_care(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, and an entry that is no larger than its own rounding error is set to zero after the first projection.

    This distinguishes, entry by entry, a dependent row from a merely small one: factors with entries from 1e-5 to 1e5
    side by side keep their small directions even in float32. The rounding error has two parts: that of the projection
    (a coefficient is off by the rounding of what it is summed up from), and that of the directions themselves, which is
    large (`doubts`) where a row was close to those above it.
    """
    rows, cols = m.shape
    rounding = _rounding(m)

    def one_row(i: jax.Array, done: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        factor, q, doubts = done
        row = row_of(m, i)
        first = matvec(q, row)
        rest = row - matvec(q.T, first)
        noise = rounding * jnp.abs(row) + matvec(doubts.T, matvec(jnp.abs(q), jnp.abs(row)))
        rest = jnp.where(jnp.abs(rest) <= noise, 0.0, rest)
        second = matvec(q, rest)
        again = rest - matvec(q.T, second)
        # If a second projection removes most of the rest, the rest is rounding error: its direction would not be
        # orthogonal to the others.
        size = jnp.sum(rest**2)
        again = jnp.where(jnp.sum(again**2) <= 0.01 * size, 0.0, again)  # NaN stays
        # What was zero stays zero: later rows are judged by each column alone.
        again = jnp.where((rest == 0) & (jnp.abs(again) <= rounding * jnp.sqrt(size)), 0.0, again)
        direction, length = _normalise(again)
        coefficients = jnp.where(jnp.arange(rows) == i, length, first + second)
        doubt = rounding * jnp.abs(direction) + noise / jnp.where(length > 0, length, jnp.inf)
        return set_row(factor, coefficients, i), set_row(q, direction, i), set_row(doubts, doubt, i)

    empty = jnp.zeros((rows, cols), m.dtype)
    return jax.lax.fori_loop(0, rows, one_row, (jnp.zeros((rows, rows), m.dtype), empty, empty))[:2]


def _normalise(row: jax.Array) -> tuple[jax.Array, jax.Array]:
    length = jnp.sqrt(jnp.sum(row * row))
    return row / jnp.where(length > 0, length, 1.0), length


@orthogonalise.defjvp
def _orthogonalise_jvp(primals, tangents):
    """Derivative of `m = L Q`.

    Write `dm = dL Q + L dQ`. Since `Q Q' = 1` on the live rows, `dQ Q' = W` is antisymmetric and `dL = dm Q' - L W`;
    `dL` is lower triangular if the strictly upper part of `L W` equals that of `dm Q'`, that is `W = X` above the
    diagonal with `L X = dm Q'`. Any antisymmetric `W` gives `dL L' + L dL' = dm m' + m dm'`, so where a pivot is zero
    (and `W` is set to zero there) the tangent of `L L'` is still exact, with no division by the pivot.
    """
    (m,), (dm,) = primals, tangents
    factor, q = orthogonalise(m)
    dm_q = matmul(dm, q.T)
    upper = jnp.triu(solve_lower(factor, dm_q), 1)
    d_factor = dm_q - matmul(factor, upper - upper.T)
    d_q = solve_lower(factor, dm - matmul(d_factor, q))
    return (factor, q), (d_factor, d_q)


@jax.jit
def outer(factor: Float[Array, "*batch rows cols"]) -> Float[Array, "*batch rows rows"]:
    """The covariance `F F'` of a factor."""
    cols = factor.shape[-1]
    if not 0 < cols <= FEW:
        return factor @ jnp.swapaxes(factor, -1, -2)
    return sum(factor[..., :, None, k] * factor[..., None, :, k] for k in range(cols))
