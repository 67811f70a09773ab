"""Stable transition matrices: a parameterisation with a closed form, and a normal prior on it."""

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ParameterFreeTransform, biject_to

from pssm._types import Array, ArrayLike, Float, Key
from pssm.events import of_events
from pssm.linalg.random import standard_normal

TRIES = 10_000


class _StableMatrix(constraints._SingletonConstraint):
    """Square matrices whose eigenvalues have a modulus below 1."""

    event_dim = 2

    def __call__(self, x: Array) -> Array:
        # A stable matrix, squared twenty times, is zero; another is not. This needs no eigenvalues, which GPUs lack.
        power = jnp.asarray(x)
        for _ in range(20):
            power = jnp.nan_to_num(power @ power, nan=jnp.inf)
        return jnp.all(jnp.abs(power) < 1.0, axis=(-2, -1))

    def feasible_like(self, prototype: Array) -> Array:
        return jnp.zeros_like(prototype)


stable_matrix = _StableMatrix()


class StableMatrixTransform(ParameterFreeTransform):
    """All square matrices `X` one to one onto the stable ones: `A = X L^{-1}` with `L L' = 1 + X X'`.

    `L L'` is the stationary covariance of `z_t = A z_{t-1} + N(0, 1)`, because `A L L' A' + 1 = X X' + 1`. With `l_i`
    the eigenvalues of `A`, the determinant of `dA / dX` is `det(L)^{-n} prod_{i <= j} (1 - l_i l_j)`.

    Example:
        >>> A = StableMatrixTransform()(jnp.array([[30.0, 100.0], [0.0, -50.0]]))
        >>> bool(stable_matrix(A))
        True

    Source:
        The correspondence of a stationary autoregression and its partial autocorrelations, of order one: Ansley & Kohn
        1986. The determinant is derived in `tests/test_stable.py`.
    """

    domain = constraints.real_matrix  # pyright: ignore[reportAssignmentType]
    codomain = stable_matrix  # pyright: ignore[reportAssignmentType]

    def __call__(self, x: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
        """The stable matrix of an unconstrained one."""
        return _divided(x, _factor(x @ x.mT))

    def _inverse(self, y: Array) -> Array:
        return y @ jnp.linalg.cholesky(stationary_covariance(y))

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: object = None) -> Array:
        """Of `A` with respect to `X`."""
        n = x.shape[-1]
        rows, cols = np.tril_indices(n)
        # S -> S - A S A' on symmetric matrices, in the entries on and below the diagonal.
        straight = y[..., rows[:, None], rows] * y[..., cols[:, None], cols]
        crossed = y[..., rows[:, None], cols] * y[..., cols[:, None], rows]
        moved = straight + jnp.where(rows == cols, 0.0, crossed)
        logdet = jnp.linalg.slogdet(jnp.eye(len(rows), dtype=y.dtype) - moved)[1]
        half = jnp.sum(jnp.log(jnp.diagonal(_factor(x @ x.mT), axis1=-2, axis2=-1)), axis=-1)
        return logdet - n * half


@biject_to.register(type(stable_matrix))
def _biject_to_stable(constraint: constraints.Constraint) -> StableMatrixTransform:
    return StableMatrixTransform()


class StableMatrixNormal(dist.Distribution):
    """Independent normal entries, given that the matrix is stable; event shape `(n, n)`.

    `log_prob` is that of the entries; the probability that such a matrix is stable, a constant, is left out.

    Args:
        loc: `(n, n)`, stable itself where draws are needed.
        scale: `(n, n)` or a number.

    Example:
        >>> A = StableMatrixNormal(0.5 * jnp.eye(3), 0.3).sample(jax.random.key(0), (10,))
        >>> bool(stable_matrix(A).all())
        True
    """

    arg_constraints = {"loc": constraints.real_matrix, "scale": constraints.positive}
    support = stable_matrix  # pyright: ignore[reportAssignmentType]
    reparametrized_params: list[str] = []

    def __init__(self, loc: ArrayLike, scale: ArrayLike = 1.0, *, validate_args: bool | None = None):
        self.loc = jnp.asarray(loc, jnp.result_type(float, loc))
        if self.loc.ndim < 2 or self.loc.shape[-1] != self.loc.shape[-2]:
            raise ValueError(f"`loc` must be a square matrix (n, n); got shape {self.loc.shape}.")
        self.scale = jnp.broadcast_to(jnp.asarray(scale, self.loc.dtype), self.loc.shape)
        super().__init__(self.loc.shape[:-2], self.loc.shape[-2:], validate_args=validate_args)

    @of_events
    def log_prob(self, value: Array) -> Array:
        """Sum over the entries."""
        return jnp.sum(dist.Normal(self.loc, self.scale).log_prob(value), axis=(-2, -1))

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """By rejection; `loc` after 10 000 tries in vain."""
        shape = sample_shape + self.batch_shape
        locs = jnp.broadcast_to(self.loc, shape + self.event_shape).reshape(-1, *self.event_shape)
        scales = jnp.broadcast_to(self.scale, shape + self.event_shape).reshape(-1, *self.event_shape)

        def one(key: Key, loc: Array, scale: Array) -> Array:
            def draw(state: tuple[Array, Array, Key]) -> tuple[Array, Array, Key]:
                count, _, key = state
                key, own = jax.random.split(key)
                return count + 1, loc + scale * standard_normal(own, loc.shape, loc.dtype), key

            def go_on(state: tuple[Array, Array, Key]) -> Array:
                return (state[0] < TRIES) & jnp.logical_not(stable_matrix(state[1]))

            count, found, _ = jax.lax.while_loop(go_on, draw, draw((jnp.zeros((), int), loc, key)))
            return jnp.where(stable_matrix(found), found, loc)

        return jax.vmap(one)(jax.random.split(key, len(locs)), locs, scales).reshape(shape + self.event_shape)


def stationary_covariance(A: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The solution of `S = A S A' + 1`, for a stable `A` of moderate size (one system of `n^2` equations)."""
    n = A.shape[-1]
    kron = (A[..., :, None, :, None] * A[..., None, :, None, :]).reshape(*A.shape[:-2], n * n, n * n)
    one = jnp.eye(n, dtype=A.dtype)
    vec = jnp.broadcast_to(one.reshape(-1, 1), (*A.shape[:-2], n * n, 1))
    found = jnp.linalg.solve(jnp.eye(n * n, dtype=A.dtype) - kron, vec).reshape(A.shape)
    return 0.5 * (found + found.mT)


def stationary_vector_autoregression(
    X: Float[Array, "order n n"],
) -> tuple[Float[Array, "order n n"], Float[Array, "states states"]]:
    """Coefficients and stationary covariance factor of a vector autoregression with unit innovations.

    Args:
        X: any numbers, `(order, n, n)`; each matrix makes a partial autocorrelation `L^{-1} X` with `L L' = 1 + X X'`.

    Returns:
        `A_1, ..., A_order`, stationary for any `X`, and a factor of the covariance of `(x_t, ..., x_{t-order+1})`.

    Source:
        Ansley & Kohn 1986; Heaps 2023, section 3.
    """
    order, n, _ = X.shape
    one = jnp.eye(n, dtype=X.dtype)
    cov, cov_back = one, one  # of the innovation of the next value, and of the one before the first
    ahead: list[Array] = []
    back: list[Array] = []
    rows = [jnp.eye(n, order * n, dtype=X.dtype)]
    for s in range(order):
        partial = jsl.solve_triangular(_factor(X[s] @ X[s].T), X[s], lower=True)
        L, L_back = jnp.linalg.cholesky(cov), jnp.linalg.cholesky(cov_back)
        last, last_back = _divided(L @ partial, L_back), _divided(L_back @ partial.T, L)
        ahead, back = (
            [a - last @ b for a, b in zip(ahead, back[::-1], strict=True)] + [last],
            [b - last_back @ a for a, b in zip(ahead, back[::-1], strict=True)][::-1] + [last_back],
        )
        cov, cov_back = (
            L @ (one - partial @ partial.T) @ L.T,
            L_back @ (one - partial.T @ partial) @ L_back.T,
        )
        if s < order - 1:
            row = jnp.einsum("sij,sjk->ik", jnp.stack(ahead), jnp.stack(rows[::-1]))
            rows.append(row.at[:, (s + 1) * n : (s + 2) * n].set(jnp.linalg.cholesky(cov)))
    L = jnp.linalg.cholesky(cov)

    def rescaled(x: Array) -> Array:
        return jsl.solve_triangular(L, x, lower=True)

    coefficients = jnp.stack([rescaled(a @ L) for a in ahead])
    return coefficients, jnp.concatenate([rescaled(r) for r in rows[::-1]])


def _factor(product: Array) -> Array:
    return jnp.linalg.cholesky(product + jnp.eye(product.shape[-1], dtype=product.dtype))


def _divided(x: Array, L: Array) -> Array:
    """`x L^{-1}` of a lower-triangular `L`."""
    return jsl.solve_triangular(L, x.mT, lower=True, trans=1).mT
