"""Diagonal-plus-low-rank algebra: conditioning a Gaussian on a potential of low rank without an n x n matrix.

The Gaussian is `N(mu, Q)` with `Q = F F'`, the potential

    psi(z) = exp(k'x + (K b)'x - x'(diag(delta) + K K')x / 2),    x = z - c,

with `K` of shape `(n, r)`. Their product is Gaussian with a covariance that does not depend on `mu`,
`V = (Q^{-1} + diag(delta) + K K')^{-1}`. For a diagonal `Q` write `s = 1 / (1 + delta q)`, `Qt = s q` and
`Y Y' = 1 + K'Qt K` (r x r, eigenvalues at least 1); then

    mean       m = x + Qt K (Y Y')^{-1} (b - K'(x - c)),   x = s mu + (1 - s) c + Qt k
    step       m - mu = Q w,   w = s (delta (c - mu) + k + K (Y Y')^{-1} (b - K'(x - c)))
    sample     the same with e ~ N(0, Qt) added to x and N(0, 1) taken from b          (Matheron's rule)
    map        m + e - Qt K (Y Y')^{-1} (1 + Y^{-1})^{-1} K'e: one draw from as many normals as Q has columns
    log |V|    = log |Q| + sum log s - 2 sum log Y_ii

Nothing is divided by `q`, so noise-free directions are exact. No large numbers cancel where `K` is large, since `K`
multiplies only differences from `c`. Cost O(n r + r^2). With a general factor `F` the diagonal of the potential becomes
n further columns of `K`: O(n^2 (n + r)), meant for small states.

Potentials may be negative as long as `V` is positive definite. A negative `delta` needs `1 + delta q > 0`: `s` is then
above one. With a general factor, or with a `precision` matrix `M` in the potential, the negative part of `delta` and
`M` come first: with `L L' = 1 + F'(M + diag(min(delta, 0)))F` the factor `F L^{-T}` of `Qt` takes the place of `F`, and

    N = M + diag(min(delta, 0)),     x = mu + Qt (k + N (c - mu)),     w = (1 - N Qt)(N (c - mu) + k + K (...)).

What is not positive definite on the way gives NaN.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from pssm._checks import as_float, is_traced
from pssm._types import Array, Float
from pssm.linalg.potential import Potential
from pssm.linalg.small import cholesky, invert_lower, matmul, matvec
from pssm.linalg.square_root import triangularise

LOG_2PI = 1.8378770664093453


class Diagonal(eqx.Module):
    """A diagonal factor of a covariance, given by its diagonal: `chol_Q=Diagonal(sd)`.

    Use it in place of a matrix where the state is large: no n x n array is made.

    Args:
        scale: standard deviations, `(..., state)`; zeros are allowed.
    """

    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return (*self.scale.shape, self.scale.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of axes of the matrix."""
        return self.scale.ndim + 1

    def to_matrix(self) -> Array:
        """The matrix itself, `(..., state, state)`."""
        return self.scale[..., None] * jnp.eye(self.scale.shape[-1], dtype=self.scale.dtype)


Factor = Array | Diagonal


def as_factor(name: str, x: Any) -> Factor:
    """`x` as a factor: a `Diagonal` where it is one, or a concrete square matrix (not traced) that is diagonal."""
    if isinstance(x, Diagonal):
        return Diagonal(as_float(name, x.scale))
    array = as_float(name, x)
    if array.shape[-2:] == (1, 1):
        return Diagonal(array[..., 0])
    if is_traced(array) or array.ndim < 2 or array.shape[-1] != array.shape[-2]:
        return array
    values = np.asarray(array)
    diagonal = np.diagonal(values, axis1=-2, axis2=-1)
    if np.count_nonzero(values) != np.count_nonzero(diagonal):
        return array
    return Diagonal(jnp.asarray(diagonal))


def as_matrix(factor: Factor) -> Array:
    """The factor as a matrix `(..., state, noise)`."""
    return factor.to_matrix() if isinstance(factor, Diagonal) else factor


def apply_factor(factor: Factor, x: Float[Array, " noise"]) -> Float[Array, " state"]:
    """`F x`."""
    return factor.scale * x if isinstance(factor, Diagonal) else matvec(factor, x)


def apply_transpose(factor: Factor, x: Float[Array, "state cols"]) -> Float[Array, "noise cols"]:
    """`F' x` for the columns of `x`."""
    return factor.scale[:, None] * x if isinstance(factor, Diagonal) else matmul(factor.T, x)


class Update(NamedTuple):
    """All quantities for conditioning `N(mu, F F')` on a potential, except `mu`. Symbols as in the module's head.

    Attributes:
        potential: every part filled in; in the general case with the square roots of `delta` in front of `K`, and `N`
            as its precision.
        shrink: `s`; one in the general case.
        root: the factor of `Qt`.
        offset: `(1 - s) c + Qt k`.
        gain: `Qt K (Y Y')^{-1}`.
        inverse: `Y^{-1}`.
        half_logdet: `(log |Q| - log |V|) / 2`.
        kl_constant: the part of `KL(N(m, V) || N(mu, Q))` that does not depend on `mu`.
        pull: `Qt N`; None where there is no `N`.
    """

    potential: Potential
    shrink: Array
    offset: Array
    gain: Array
    inverse: Array
    half_logdet: Array
    kl_constant: Array
    root: Factor
    pull: Array | None

    @property
    def columns(self) -> int:
        """Columns of `K`: how many normal numbers `posterior_sample` takes beside the noise."""
        return self.potential.rank


def condition(factor: Factor, p: Potential) -> Update:
    """Prepares the update of `N(mu, F F')` by the potential of one step; `mu` comes later."""
    K = p.factor
    n, rank = K.shape
    zero = jnp.zeros(n, K.dtype)
    k, c, delta = (zero if x is None else x for x in (p.slope, p.center, p.diagonal))
    b = jnp.zeros(rank, K.dtype) if p.factor_slope is None else p.factor_slope
    matrix, pull = None, None
    if isinstance(factor, Diagonal) and p.precision is None:
        sd = factor.scale
        widen = 1.0 + delta * sd**2
        shrink = 1.0 / jnp.where(widen > 0, widen, jnp.nan)
        log_shrink = -jnp.log1p(delta * sd**2)
        first_logdet, first_trace = -0.5 * jnp.sum(log_shrink), jnp.sum(shrink - 1.0)
        root = Diagonal(sd * jnp.sqrt(shrink))
        scaled = (sd * jnp.sqrt(shrink))[:, None] * K
        loaded = (sd**2 * shrink)[:, None] * K
        moved = sd**2 * shrink * k
        traced = (sd * shrink)[:, None] * K  # Q^{-1/2} Qt K
    else:
        root, matrix = as_matrix(factor), p.precision
        if p.diagonal is not None:
            lowered = jnp.diag(jnp.minimum(delta, 0.0))
            matrix = lowered if matrix is None else matrix + lowered
            # The offset changes no value; it keeps the derivative with respect to `delta` right where that is zero.
            extra = jnp.sqrt(jnp.maximum(delta, 0.0) + 1e6 * jnp.finfo(delta.dtype).tiny)
            K = jnp.concatenate([extra[:, None] * jnp.eye(n, dtype=K.dtype), K], axis=1)
            b = jnp.concatenate([jnp.zeros(n, b.dtype), b])
            delta = zero
        shrink, first_logdet, first_trace, thin = jnp.ones_like(zero), 0.0, 0.0, None
        if matrix is not None:
            inner = matmul(root.T, matmul(matrix, root))
            lower = cholesky(jnp.eye(inner.shape[0], dtype=K.dtype) + 0.5 * (inner + inner.T))
            thin = invert_lower(lower)
            first_logdet = jnp.sum(jnp.log(jnp.diagonal(lower)))
            first_trace = jnp.sum(thin**2) - inner.shape[0]
            root = matmul(root, thin.T)
            pull = matmul(root, matmul(root.T, matrix))
        scaled = matmul(root.T, K)
        loaded = matmul(root, scaled)
        moved = matvec(root, matvec(root.T, k))
        traced = scaled if thin is None else matmul(thin.T, scaled)
    chol = cholesky(jnp.eye(K.shape[1], dtype=K.dtype) + matmul(scaled.T, scaled))
    inverse = invert_lower(chol)
    half_logdet = jnp.sum(jnp.log(jnp.diagonal(chol))) + first_logdet
    removed = jnp.sum(matmul(traced, inverse.T) ** 2)
    return Update(
        potential=Potential(K, delta, b, c, k, precision=matrix),
        shrink=shrink,
        root=root,
        offset=(1.0 - shrink) * c + moved,
        gain=matmul(loaded, matmul(inverse.T, inverse)),
        inverse=inverse,
        half_logdet=half_logdet,
        kl_constant=half_logdet + 0.5 * (first_trace - removed),
        pull=pull,
    )


def posterior_mean(update: Update, mu: Float[Array, " state"]) -> Float[Array, " state"]:
    """Mean `m` of the conditioned Gaussian."""
    return _absorb(update, _before_factor(update, mu), update.potential.factor_slope)


def posterior_sample(update: Update, factor: Factor, mu: Array, noise: Array, pull_noise: Array) -> Array:  # noqa: ARG001
    """A draw from the conditioned Gaussian; `noise (noise,)` and `pull_noise (columns of K,)` are standard normal."""
    e = apply_factor(update.root, noise)
    return _absorb(update, _before_factor(update, mu) + e, update.potential.factor_slope - pull_noise)


def map_gain(update: Update) -> Float[Array, "state cols"]:
    """`Qt K (Y Y')^{-1} (1 + Y^{-1})^{-1}`, for `posterior_map`: once for all draws, outside of any scan.

    With `W = Qt^{1/2} K Y^{-T}` the conditioned covariance is `Qt^{1/2} (1 - W W') Qt^{1/2}`. A root of the bracket is
    `1 - W S W'` where `S = (1 + Y^{-1})^{-1}`, since `S + S' - S W'W S' = 1`: no eigenvalues are needed.
    """
    one = jnp.eye(update.inverse.shape[0], dtype=update.inverse.dtype)
    return matmul(update.gain, invert_lower(one + update.inverse))


def posterior_map(update: Update, lift: Array, factor: Factor, mu: Array, noise: Array) -> Array:  # noqa: ARG001
    """`m + G noise` with `G G' = V`: a draw that is one to one with its standard normal `noise (noise,)`.

    `lift` is `map_gain(update)`. Where `Q` is singular so is `G`, along the same directions.
    """
    e = apply_factor(update.root, noise)
    return posterior_mean(update, mu) + e - matvec(lift, matvec(update.potential.factor.T, e))


def _before_factor(update: Update, mu: Array) -> Array:
    """`x`: the mean after all of the potential but its factor."""
    x = update.shrink * mu + update.offset
    return x if update.pull is None else x + matvec(update.pull, update.potential.center - mu)


def _absorb(update: Update, x: Array, pull: Array) -> Array:
    return x + matvec(update.gain, pull - matvec(update.potential.factor.T, x - update.potential.center))


def posterior_transition(update: Update, A: Float[Array, "state state"]) -> Float[Array, "state state"]:
    """`dm / dz` where `mu = A z + ...`."""
    moved = update.shrink[:, None] * A if update.pull is None else A - matmul(update.pull, A)
    return moved - matmul(update.gain, matmul(update.potential.factor.T, moved))


def posterior_slope(update: Update, mu: Float[Array, " state"]) -> Float[Array, " state"]:
    """`w` with `m - mu = Q w`, without a division by `Q`."""
    p = update.potential
    x = _before_factor(update, mu)
    rest = p.factor_slope - matvec(p.factor.T, x - p.center)
    a = matvec(update.inverse.T, matvec(update.inverse, rest))
    if update.pull is None:
        return update.shrink * (p.diagonal * (p.center - mu) + p.slope + matvec(p.factor, a))
    w = matvec(p.precision, p.center - mu) + p.slope + matvec(p.factor, a)
    return w - matvec(update.pull.T, w)


def kl(update: Update, factor: Factor, mu: Float[Array, " state"]) -> Array:
    """`KL(N(m, V) || N(mu, Q))`."""
    w = posterior_slope(update, mu)
    return update.kl_constant + 0.5 * jnp.sum(apply_transpose(factor, w[:, None]) ** 2)


def log_ratio(update: Update, factor: Factor, mu: Float[Array, " state"], z: Float[Array, " state"]) -> Array:
    """`log N(z; m, V) - log N(z; mu, Q)`, finite and exact for a singular `Q` too."""
    p, w = update.potential, posterior_slope(update, mu)
    step = apply_factor(factor, apply_transpose(factor, w[:, None])[:, 0])
    rest = z - (mu + step)
    quadratic = jnp.sum(matvec(p.factor.T, rest) ** 2)
    if update.pull is None:
        quadratic = quadratic + jnp.sum(p.diagonal * rest**2)
    else:
        quadratic = quadratic + jnp.vdot(rest, matvec(p.precision, rest))
    return update.half_logdet + jnp.vdot(rest, w) + 0.5 * (jnp.vdot(step, w) - quadratic)


def log_potential(p: Potential, z: Float[Array, " state"]) -> Array:
    """`log psi(z)`."""
    x = z if p.center is None else z - p.center
    pull = matvec(p.factor.T, x)
    value = -0.5 * jnp.sum(pull**2)
    value = value if p.slope is None else value + jnp.vdot(p.slope, x)
    value = value if p.factor_slope is None else value + jnp.vdot(p.factor_slope, pull)
    value = value if p.precision is None else value - 0.5 * jnp.vdot(x, matvec(p.precision, x))
    return value if p.diagonal is None else value - 0.5 * jnp.sum(p.diagonal * x**2)


def log_normaliser(update: Update, factor: Factor, mu: Float[Array, " state"]) -> Array:
    """`log int N(z; mu, Q) psi(z) dz`: minus the log ratio at the centre, where the potential is one."""
    return -log_ratio(update, factor, mu, update.potential.center)


def posterior_variance(update: Update, factor: Factor) -> Float[Array, " state"]:  # noqa: ARG001
    """Diagonal of `V`."""
    if not isinstance(update.root, Diagonal):
        return jnp.diagonal(posterior_covariance(update, factor))
    noise = update.root.scale**2
    removed = matmul(noise[:, None] * update.potential.factor, update.inverse.T)
    return noise - jnp.sum(removed**2, axis=1)


def posterior_covariance(update: Update, factor: Factor) -> Float[Array, "state state"]:
    """`V` as a matrix, in the form that cannot turn negative; for small states and tests."""
    matrix = as_matrix(update.root)
    n = update.potential.factor.shape[0]
    keep = jnp.eye(n, dtype=matrix.dtype) - matmul(update.gain, update.potential.factor.T)
    root = jnp.concatenate([matmul(keep, matrix), update.gain], axis=1)
    return matmul(root, root.T)


def gaussian_entropy(factor: Factor) -> Array:
    """Entropy of `N(0, F F')`: `log |2 pi e Q| / 2` over the directions that have noise."""
    pivots = jnp.abs(factor.scale) if isinstance(factor, Diagonal) else jnp.diagonal(triangularise(factor))
    live = pivots > 0
    return jnp.sum(jnp.where(live, 0.5 * (LOG_2PI + 1.0) + jnp.log(jnp.where(live, pivots, 1.0)), 0.0))


def not_definite(first: Factor, later: Factor, timed: bool, p: Potential) -> np.ndarray:
    """Where `1 + F'N F` is not positive definite, `N` the negative part, `(..., time)`; in NumPy, for checks."""
    n = p.factor.shape[-2]
    matrix = np.zeros((n, n)) if p.precision is None else np.asarray(p.precision, float)
    if p.diagonal is not None:
        matrix = matrix + np.minimum(np.asarray(p.diagonal, float), 0.0)[..., None] * np.eye(n)
    found = []
    for factor, steps in ((first, slice(None, 1)), (later, slice(1, None))):
        if isinstance(factor, Diagonal):
            F = np.asarray(factor.scale, float)[..., None] * np.eye(n)
        else:
            F = np.asarray(factor, float)
        F = F[..., 1:, :, :] if timed and steps.stop is None else F[..., None, :, :]
        N = matrix[..., steps, :, :]
        inner = np.swapaxes(F, -1, -2) @ N @ F
        found.append(np.linalg.eigvalsh(np.eye(inner.shape[-1]) + inner)[..., 0] <= 0)
    batch = np.broadcast_shapes(*(x.shape[:-1] for x in found))
    return np.concatenate([np.broadcast_to(x, (*batch, x.shape[-1])) for x in found], axis=-1)
