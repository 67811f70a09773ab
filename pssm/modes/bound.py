"""The best Gaussian chain for a path with an affine transition, and its lower bound on the evidence.

With Gaussian sites about the mean of the chain the posterior is the chain of Newton's step from it, so one pass
gives both. With `W_t` the sites' curvatures, `P_t` the covariances, and `w_t`, `M_t` as in `newton.py`,

    bound = sum_t E log h_t(z_t) + tr(W_t P_t) / 2 - |F_t' w_t|^2 / 2 - log |M_t| / 2.

Source:
    Opper & Archambeau 2009; natural gradients of such sites: Khan & Lin 2017.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.distributions import StatePath
from pssm.filters.linearize import cubature_points, hermite_points
from pssm.modes.newton import LogLik, Step, map_paths, newton_step, signed_sites, through_factors


class Bound(NamedTuple):
    """A Gaussian chain fitted to the posterior of a path with an affine transition.

    Attributes:
        path: its mean, `(*batch, time, state)`.
        cov: covariances of the states, `(*batch, time, state, state)`.
        slope: slopes of the messages at the mean.
        J: their curvatures.
        value: the lower bound on the log evidence, `(*batch,)`; minus infinity where it is not finite.
    """

    path: Array
    cov: Array
    slope: Array
    J: Array
    value: Array


def fit_bound(prior: StatePath, log_lik: LogLik, mean: Array, cov: Array, *, num_iters: int) -> Bound:
    """The Gaussian chain after steps of natural gradients from given moments, and its bound.

    The sites of a step are averages under the moments before it: `g_t = E grad log h_t`, `W_t = E(-Hessian of log h_t)`
    without its negative part. The last step is differentiated by what is inside `prior` and `log_lik`, those before it
    are held fixed: near the optimum the bound does not depend on them to first order.

    Args:
        prior: the path prior, with an affine transition.
        log_lik: as in `find_mode`.
        mean: means to start from, `(*batch, time, state)`.
        cov: covariances likewise.
        num_iters: steps.
    """
    n, still = prior.n_state, jax.lax.stop_gradient
    points, weights = hermite_points(n, 5 if n < 3 else 4) if n <= 3 else cubature_points(n)
    points, weights = jnp.asarray(points, mean.dtype), jnp.asarray(weights, mean.dtype)

    def spread(mean: Array, cov: Array) -> Array:
        root = _root(cov)
        return mean + jnp.sum(root * points.reshape(len(points), *(1,) * (root.ndim - 1), n), axis=-1)

    def average(values: Array) -> Array:
        return jnp.sum(weights.reshape(-1, *(1,) * (values.ndim - 1)) * values, axis=0)

    def step(mean: Array, cov: Array) -> tuple[Step, Array]:
        g, W = jax.vmap(lambda z: signed_sites(log_lik, z))(spread(mean, cov))
        W = _positive(average(W))
        return newton_step(prior, mean, average(g), W, covariances=True), W

    def move(_: int, moments: tuple[Array, Array]) -> tuple[Array, Array]:
        found = step(*moments)[0]
        return moments[0] + found.move, jnp.asarray(found.cov)

    before = still(mean), still(cov)
    before = jax.lax.fori_loop(0, num_iters - 1, lambda i, m: still(move(i, still(m))), before)
    found, W = step(*still(before))
    mean, cov = still(before[0]) + found.move, jnp.asarray(found.cov)
    likelihood = average(jax.vmap(log_lik)(spread(mean, cov)))
    noise = map_paths(
        prior,
        lambda a: jnp.sum(through_factors(prior, a, a["w"]) ** 2),
        {"z": mean, "w": found.slope},
        {"z": 2, "w": 2},
    )
    value = likelihood + 0.5 * jnp.sum(W * cov, axis=(-3, -2, -1)) - 0.5 * noise + jnp.sum(found.messages.half, axis=-1)
    return Bound(mean, cov, found.slope, found.messages.J, jnp.where(jnp.isfinite(value), value, -jnp.inf))


def covariances_at(prior: StatePath, log_lik: LogLik, path: Array) -> Array:
    """Covariances of Laplace's approximation about a path, without negative curvature of the likelihood."""
    gradient, W = signed_sites(log_lik, path)
    return jnp.asarray(newton_step(prior, path, gradient, _positive(W), covariances=True).cov)


def _root(cov: Array) -> Array:
    """A lower factor of covariances `(..., state, state)`, unrolled; zero columns where there is no variance left."""
    n, columns = cov.shape[-1], []
    for j in range(n):
        column = cov[..., :, j]
        for done in columns:
            column = column - done * done[..., j : j + 1]
        pivot = column[..., j : j + 1]
        live = pivot > 1e2 * jnp.finfo(cov.dtype).eps * cov[..., j, j][..., None]
        column = jnp.where(live, column, 0.0) / jnp.sqrt(jnp.where(live, pivot, 1.0))
        columns.append(jnp.where(jnp.arange(n) < j, 0.0, column))
    return jnp.stack(columns, axis=-1)


def _positive(W: Array) -> Array:
    """Curvatures without their negative part; where there is none, with all derivatives."""
    if W.shape[-1] == 1:
        return jnp.maximum(W, 0.0)

    def cut(state: tuple[Array, Array]) -> tuple[Array, Array]:
        W, _ = state
        values, vectors = jnp.linalg.eigh(W)
        return (vectors * jnp.maximum(values, 0.0)[..., None, :]) @ jnp.swapaxes(vectors, -1, -2), jnp.zeros((), bool)

    still = jax.lax.stop_gradient(W)
    negative = jnp.any(_least_pivot(still) < 0)
    kept, _ = jax.lax.while_loop(lambda s: s[1], cut, (still, negative))  # also under `vmap` only where it is needed
    return W + jax.lax.stop_gradient(kept - still)


def _least_pivot(W: Array) -> Array:
    """The smallest pivot of an unrolled factorisation, as zero where rounding may explain it."""
    eps = 1e2 * jnp.finfo(W.dtype).eps
    size, least = jnp.max(jnp.abs(W), axis=(-2, -1)), jnp.zeros(W.shape[:-2], W.dtype)
    for j in range(W.shape[-1]):
        pivot, column = W[..., j, j], W[..., :, j]
        live = pivot > eps * size
        left = jnp.where(live, 0.0, jnp.max(jnp.abs(column), axis=-1))  # a column without a pivot must be empty
        least = jnp.minimum(least, jnp.where(left > 10 * eps * size, -left, 0.0))
        scaled = jnp.where(live[..., None], column / jnp.where(live, pivot, 1.0)[..., None], 0.0)
        W = W - scaled[..., :, None] * column[..., None, :]
    return least
