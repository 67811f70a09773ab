"""KL divergences between path distributions, registered with NumPyro: imported for that."""

from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions.kl import kl_divergence

from pssm._types import Array
from pssm.batch import map_batch
from pssm.distributions.chain import LowRankChain
from pssm.distributions.moment_matched import LowRankMomentMatched
from pssm.distributions.state_path import StatePath
from pssm.linalg.low_rank import (
    Factor,
    as_matrix,
    gaussian_entropy,
    posterior_covariance,
    posterior_mean,
    posterior_transition,
)
from pssm.linalg.small import matmul, matvec
from pssm.linalg.square_root import outer, solve_lower, triangularise

LOG_2PI = 1.8378770664093453
CLOSED_FORM = 64  # states up to this size; above, the closed form's matrices cost more than a sampled estimate


@kl_divergence.register(LowRankMomentMatched, StatePath)
def _moment_matched(q: LowRankMomentMatched, p: StatePath) -> Array:
    """The surrogate's term: the sum over steps of the KL from marginal to prediction, made with `q.prior`."""
    return q.kl.sum(-1)


@kl_divergence.register(LowRankChain, StatePath)
def _chain(q: LowRankChain, p: StatePath) -> Array:
    """Closed form where both transitions are linear and the state is small; else NumPyro samples it instead."""
    if not (q.prior.is_linear and p.is_linear) or p.n_state > CLOSED_FORM:
        raise NotImplementedError("no closed form for a nonlinear transition: log q - log p of a draw is used")

    def conditionals(a: dict[str, Any]) -> tuple[Array, Array, Array]:
        """`(M_t, m_t, V_t)` of `z_t = M_t z_{t-1} + m_t + N(0, V_t)`."""
        first, later = q._updates(a)
        timed = q.prior.timed(a)
        zero = jnp.zeros_like(a["m0"])

        def step(update: Any, t: dict[str, Any]) -> tuple[Array, Array, Array]:
            now = {**a, **t}
            mean = posterior_mean(update, q.prior.step(now, zero))
            return posterior_transition(update, now["transition"]), mean, posterior_covariance(update, now["chol_Q"])

        start = jnp.zeros((zero.size, zero.size), zero.dtype), posterior_mean(first, a["m0"])
        start = (*start, posterior_covariance(first, a["chol_P0"]))
        rest = jax.vmap(step)(later, timed)
        M, m, V = (jnp.concatenate([x[None], y]) for x, y in zip(start, rest, strict=True))
        return M, m, V

    M, m, V = q._map(conditionals)
    return -q.entropy() - _expected_log_prob(p, M, m, V, q.batch_shape)


@kl_divergence.register(StatePath, StatePath)
def _paths(q: StatePath, p: StatePath) -> Array:
    """Closed form between linear-Gaussian priors, small states."""
    if not (q.is_linear and p.is_linear) or p.n_state > CLOSED_FORM:
        raise NotImplementedError("no closed form for a nonlinear transition: log q - log p of a draw is used")

    def conditionals(a: dict[str, Any]) -> tuple[Array, Array, Array, Array]:
        timed = q.timed(a)
        zero = jnp.zeros_like(a["m0"])
        steps = q.num_steps - 1

        def step(t: dict[str, Any]) -> tuple[Array, Array, Array]:
            now = {**a, **t}
            return now["transition"], q.step(now, zero), outer(as_matrix(now["chol_Q"]))

        once = jax.vmap(step)(timed) if timed else jax.tree.map(lambda x: jnp.stack([x] * steps), step({}))
        start = jnp.zeros_like(once[0][0]), a["m0"], outer(as_matrix(a["chol_P0"]))
        M, m, V = (jnp.concatenate([x[None], y]) for x, y in zip(start, once, strict=True))
        noise = timed["chol_Q"] if "chol_Q" in timed else a["chol_Q"]
        later = jax.vmap(gaussian_entropy)(noise).sum() if "chol_Q" in timed else steps * gaussian_entropy(noise)
        return M, m, V, gaussian_entropy(a["chol_P0"]) + later

    arrays, cores = q.arrays()
    M, m, V, entropy = map_batch(conditionals, q.batch_shape, arrays, cores)
    return -entropy - _expected_log_prob(p, M, m, V, q.batch_shape)


def _expected_log_prob(p: StatePath, M: Array, m: Array, V: Array, q_batch: tuple[int, ...]) -> Array:
    """`E log p(z)` for `z_t = M_t z_{t-1} + m_t + N(0, V_t)` (`M_1 = 0`) under a linear path prior."""
    batch = jnp.broadcast_shapes(q_batch, p.batch_shape)

    def one(a: dict[str, Any]) -> Array:
        def term(factor: Factor, mean: Array, cov: Array) -> Array:
            """`E log N(r; 0, F F')` for a residual with this mean and covariance, directions without noise left out."""
            chol = triangularise(as_matrix(factor))
            pivots = jnp.diagonal(chol)
            live = pivots > 0
            white = solve_lower(chol, jnp.concatenate([mean[:, None], solve_lower(chol, cov).T], axis=1))
            spread = white[:, 0] ** 2 + jnp.diagonal(white[:, 1:])
            terms = LOG_2PI + 2 * jnp.log(jnp.where(live, pivots, 1.0)) + spread
            return -0.5 * jnp.sum(jnp.where(live, terms, 0.0))

        def step(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], Array]:
            mean, cov = carry
            M, m, V, t = xs
            now = {**a, **t}
            apart = M - now["transition"]
            residual = matvec(M, mean) + m - p.step(now, mean)
            value = term(now["chol_Q"], residual, matmul(apart, matmul(cov, apart.T)) + V)
            return (matvec(M, mean) + m, matmul(M, matmul(cov, M.T)) + V), value

        first = term(a["chol_P0"], a["q_m"][0] - a["m0"], a["q_V"][0])
        xs = a["q_M"][1:], a["q_m"][1:], a["q_V"][1:], p.timed(a)
        return first + jax.lax.scan(step, (a["q_m"][0], a["q_V"][0]), xs)[1].sum()

    arrays, cores = p.arrays()
    values = {"q_M": M, "q_m": m, "q_V": V}
    return map_batch(one, batch, {**arrays, **values}, {**cores, "q_M": 3, "q_m": 2, "q_V": 3})
