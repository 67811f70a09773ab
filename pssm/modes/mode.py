"""The mode of a path, and potentials that approximate the backward messages there: where guides start.

The observations enter through one function only, their log-likelihood as a function of the whole path; its gradient and
its Hessian, block by block in time, come from automatic differentiation. With the transition linearised along a path
`z` (`A_t` its Jacobian, `o_t = f(z_{t-1}) - z_t` its residual) and sites `(g_t, W_t)` (gradient and minus the Hessian),
the messages about the path, `log p(y_{t:T} | z_t + x) = h_t'x - x'J_t x / 2`, go backward

    J_t = W_t + A' (1 + J Q)^{-1} J A,    h_t = g_t + A' (1 + J Q)^{-1} (h - J o)        (J, h, A, Q, o of step t + 1)

and the mean forward, `x_t = mu + Q w`, `mu = o_t + A x_{t-1}`, `w = (1 + J_t Q)^{-1} (h_t - J_t mu)`. This is a
Gauss-Newton step; on a linear-Gaussian model one step is exact. At the mode, `w_t` is the slope of the message there
and `J_t` its curvature: what a potential of rank `state` needs. A smaller rank keeps the slope and cuts the curvature,
so that the conditional means along the mode stay exact.

For large states `matrix_free.py` does the same without n x n arrays.

Source:
    Iterated smoothing is Gauss-Newton: Bell 1994. Principal factors: Harman 1976, chapter 8.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.batch import map_batch
from pssm.distributions import StatePath
from pssm.linalg.low_rank import Diagonal, Factor, as_matrix
from pssm.linalg.potential import Potential
from pssm.linalg.small import cholesky, invert_lower, matmul, matvec
from pssm.modes.coupled import hessian_times
from pssm.modes.matrix_free import gauss_newton_matrix_free

DENSE = 64  # states up to this size get messages as matrices, larger ones (with diagonal noise) as low-rank forms


PotentialsAtMode = Potential  # with its `scale`; written around the mode


def potentials_at(
    prior: StatePath, log_lik: Callable[[Array], Array], path: Array, *, rank: int, diagonal: bool = True
) -> Potential:
    """The potentials at a path that is the mode, up to one more step.

    With the path held fixed the step's derivatives stand for those of the mode (implicit differentiation), so
    gradients by the parameters of `prior` and `log_lik` flow through the centre and the slope. They are exact where a
    Gauss-Newton step is a Newton step (a linear transition, a concave likelihood, matrices as messages), and as good as
    its curvature elsewhere. They do not flow through the curvatures, whose derivatives the step at a mode does not
    need.
    """
    sd = jax.lax.stop_gradient(noise_scale(prior))
    if is_large(prior):
        found = gauss_newton_matrix_free(prior, log_lik, path, sd=sd, rank=rank, diagonal=diagonal)
        K, diag = found.factor, found.diagonal
    else:
        found = gauss_newton(prior, log_lik, path)
        J, sd = jax.lax.stop_gradient(found.J), jnp.broadcast_to(sd, path.shape)
        diag, K = jax.lax.map(lambda x: split(*x, rank, diagonal), (_flat(J, 2), _flat(sd, 1)), batch_size=4096)
        diag, K = diag.reshape(sd.shape), K.reshape(*sd.shape, K.shape[-1])
    K, diag, scale = jax.lax.stop_gradient((K, diag, jnp.sqrt(found.variance)))
    return Potential(K, diag, center=path + found.move, slope=found.slope, scale=scale)


def is_large(prior: StatePath) -> bool:
    """Whether the messages are low-rank forms."""
    factors = prior.chol_P0, prior.chol_Q
    return prior.n_state > DENSE and all(isinstance(f, Diagonal) for f in factors)


def _flat(x: Array, core: int) -> Array:
    return x.reshape(-1, *x.shape[x.ndim - core :])


def noise_scale(prior: StatePath) -> Array:
    """Standard deviations of the noise at every step, `(..., time, state)`; 1 where there is none."""
    found = noise_sd(prior)
    return jnp.where(found > 0, found, 1.0)


def noise_sd(prior: StatePath) -> Array:
    """Standard deviations of the noise at every step, `(..., time, state)`; 0 where there is none."""

    def sd(factor: Factor) -> Array:
        if isinstance(factor, Diagonal):
            return jnp.abs(factor.scale)
        squared = jnp.sum(factor**2, -1)
        return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)

    first, later = sd(prior.chol_P0)[..., None, :], sd(prior.chol_Q)
    if "chol_Q" in prior.time_varying:
        later = later[..., 1:, :]
    else:
        later = jnp.broadcast_to(later[..., None, :], (*later.shape[:-1], prior.num_steps - 1, prior.n_state))
    batch = jnp.broadcast_shapes(first.shape[:-2], later.shape[:-2])
    return jnp.concatenate([jnp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (first, later)], axis=-2)


class GaussNewton(NamedTuple):
    """One step from a path: where to move, and the messages about the path.

    Attributes:
        move: `x`, `(..., time, state)`.
        slope: `w`, slope of the message at `path + x`, `(..., time, state)`.
        J: curvature of the messages, `(..., time, state, state)`.
        variance: diagonal of the conditional covariances `(Q^{-1} + J)^{-1}`, `(..., time, state)`.
        quadratic: `- sum_t |F_t' w_t|^2 / 2`, the log density of the noise that drives `path + x` where the transition
            is linear, or `x` is zero, `(...,)`.
    """

    move: Array
    slope: Array
    J: Array
    variance: Array
    quadratic: Array


def gauss_newton(prior: StatePath, log_lik: Callable[[Array], Array], path: Array) -> GaussNewton:
    """The Gauss-Newton step from `path` and the messages about it."""
    gradient, curvature = sites(log_lik, path)
    curvature = jax.lax.stop_gradient(curvature)

    def one(a: dict[str, Any]) -> GaussNewton:
        z, g, W = a["z"], a["g"], a["W"]
        timed = prior.timed(a)

        def linearise(x: Array, t: dict[str, Any]) -> tuple[Array, Array]:
            now = {**a, **t}
            return prior.step(now, x), jax.jacfwd(lambda s: prior.step(now, s))(x)

        means, A = jax.vmap(linearise)(z[:-1], timed)
        residual = means - z[1:]

        def back(message: tuple[Array, Array], xs: tuple) -> tuple[tuple, tuple]:
            J, h = message
            g, W, A, o, t = xs
            factor = as_matrix({**a, **t}["chol_Q"])
            reduce, spread, _ = through_noise(factor, J)
            h_before = matvec(reduce, h - matvec(J, o))
            J_before = matmul(matmul(reduce, J), reduce.T) + matmul(spread, spread.T)
            message = W + matmul(A.T, matmul(J_before, A)), g + matvec(A.T, h_before)
            return message, message

        last = W[-1], g[-1]
        _, (J, h) = jax.lax.scan(back, last, (g[:-1], W[:-1], A, residual, timed), reverse=True)
        J, h = jnp.concatenate([J, last[0][None]]), jnp.concatenate([h, last[1][None]])

        def absorb(factor: Factor, J: Array, h: Array, mu: Array) -> tuple[Array, Array, Array, Array]:
            rows = as_matrix(factor)
            reduce, _, inverse = through_noise(rows, J)
            pull = h - matvec(J, mu)
            root = matmul(rows, inverse.T)
            driven = matvec(root.T, pull)
            x = mu + matvec(root, driven)  # not `mu + Q w`: a wide `Q` would blow up the rounding of `w`
            noise = matvec(inverse.T, driven)  # `F'w`, not from `w` for the same reason
            return x, matvec(reduce, pull), jnp.sum(root**2, axis=1), -0.5 * jnp.sum(noise**2)

        first = absorb(a["chol_P0"], J[0], h[0], a["m0"] - z[0])

        def forward(x: Array, xs: tuple) -> tuple[Array, tuple]:
            J, h, A, o, t = xs
            found = absorb({**a, **t}["chol_Q"], J, h, o + matvec(A, x))
            return found[0], found

        _, rest = jax.lax.scan(forward, first[0], (J[1:], h[1:], A, residual, timed))
        move, slope, variance, noise = (jnp.concatenate([f[None], r]) for f, r in zip(first, rest, strict=True))
        return GaussNewton(move, slope, J, variance, jnp.sum(noise))

    arrays, cores = prior.arrays()
    batch = path.shape[:-2]
    values, own = {"z": path, "g": gradient, "W": curvature}, {"z": 2, "g": 2, "W": 3}
    return map_batch(one, batch, {**arrays, **values}, {**cores, **own})


def through_noise(factor: Array, J: Array) -> tuple[Array, Array, Array]:
    """`G = (1 + J Q)^{-1}`, `S` with `G J = G J G' + S S'` (nothing cancels), and the inverse of `chol(1 + F'J F)`."""
    loaded = matmul(J, factor)
    inner = matmul(factor.T, loaded)
    inverse = invert_lower(cholesky(jnp.eye(inner.shape[0], dtype=J.dtype) + 0.5 * (inner + inner.T)))
    spread = matmul(matmul(loaded, inverse.T), inverse)
    return jnp.eye(J.shape[0], dtype=J.dtype) - matmul(spread, factor.T), spread, inverse


def sites(log_lik: Callable[[Array], Array], path: Array) -> tuple[Array, Array]:
    """Gradient and minus the Hessian of the log-likelihood at every step, the latter without negative curvature.

    Each state enters its own summand only, so a Hessian-vector product with the same unit vector at every step gives
    one column of all blocks.
    """
    n = path.shape[-1]
    gradient, times = hessian_times(log_lik, path)
    hessian = jnp.moveaxis(jax.lax.map(times, jnp.eye(n, dtype=path.dtype)), 0, -1)
    curvature = -0.5 * (hessian + jnp.swapaxes(hessian, -1, -2))
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
    curvature = jnp.where(jnp.isfinite(curvature), curvature, 0.0)
    if n == 1:
        return gradient, jnp.maximum(curvature, 0.0)
    values, vectors = jnp.linalg.eigh(curvature)
    return gradient, (vectors * jnp.maximum(values, 0.0)[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)


def split(J: Array, sd: Array, rank: int, diagonal: bool, rounds: int = 30) -> tuple[Array, Array]:
    """`J` as `diag(delta) + K K'` by principal factors in units of the noise `sd`: `(delta, K)`."""
    n = J.shape[0]
    whitened = sd[:, None] * J * sd
    rank = min(rank, n)

    def factors(delta: Array) -> Array:
        values, vectors = jnp.linalg.eigh(whitened - jnp.diag(delta))
        return vectors[:, n - rank :] * jnp.sqrt(jnp.maximum(values[n - rank :], 0.0))

    delta = jnp.zeros_like(sd)
    if diagonal and rank < n:
        variances = jnp.diagonal(whitened)

        def improve(_: int, delta: Array) -> Array:
            return jnp.maximum(variances - jnp.sum(factors(delta) ** 2, axis=1), 0.0)

        delta = jax.lax.fori_loop(0, rounds, improve, 0.5 * variances) if rank else variances
    K = factors(delta)
    return delta / sd**2, K / sd[:, None]
