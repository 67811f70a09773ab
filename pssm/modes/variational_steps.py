"""What a step on the variational bound is made of; the formulas are in the head of `variational.py`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.batch import map_batch
from pssm.distributions import StatePath
from pssm.linalg.low_rank import Diagonal, Factor, as_matrix
from pssm.linalg.small import cholesky, invert_lower, matmul, matvec
from pssm.linalg.square_root import triangularise_once
from pssm.modes.coupled import group_shape, sum_groups
from pssm.modes.mode import noise_scale
from pssm.modes.points import Expansion, Rule, expand

FLOOR = 0.02  # least eigenvalue of `1 + F'R F`

LogLik = Callable[[Array], Array]


class Chain(NamedTuple):
    """Potentials in full: curvature `(..., n, n)`, slope and centre."""

    R: Array
    w: Array
    c: Array


class State(NamedTuple):
    """A chain with its marginals (`root root'` their covariances), bound and sites."""

    chain: Chain
    mean: Array
    root: Array
    bound: Array
    sites: Expansion


class _Pieces(NamedTuple):
    """A step's conditional: `E E' = V`, `G = 1 - V R`, `G F`, and the constant of its KL divergence."""

    E: Array
    G: Array
    GF: Array
    kl: Array


def _pieces(F: Array, R: Array) -> _Pieces:
    inner = matmul(F.T, matmul(R, F))
    lower = cholesky(jnp.eye(inner.shape[0], dtype=R.dtype) + 0.5 * (inner + inner.T))
    thin = invert_lower(lower)
    E = matmul(F, thin.T)
    G = jnp.eye(R.shape[0], dtype=R.dtype) - matmul(E, matmul(E.T, R))
    kl = jnp.sum(jnp.log(jnp.diagonal(lower))) + 0.5 * (jnp.sum(thin**2) - inner.shape[0])
    return _Pieces(E, G, matmul(E, thin), kl)


def _absorb(p: _Pieces, R: Array, w: Array, c: Array, mu: Array, spread: Array) -> tuple[Array, Array, Array]:
    """The marginal of a step from that of `f`, `N(mu, spread spread')`: mean, root and expected KL divergence."""
    pull = w - matvec(R, mu - c)
    mean = mu + matvec(p.E, matvec(p.E.T, pull))
    root = triangularise_once(jnp.concatenate([matmul(p.G, spread), p.E], axis=1))
    kl = p.kl + 0.5 * jnp.sum(matvec(p.GF.T, pull) ** 2) + 0.5 * jnp.sum(matmul(p.GF.T, matmul(R, spread)) ** 2)
    return mean, root, kl


def _map(prior: StatePath, fn: Callable[[dict[str, Any]], Any], batch: tuple[int, ...], **values: Any) -> Any:
    """`fn` for each series; `values` have the batch axes in front."""
    arrays, cores = prior.arrays()
    own = {name: jax.tree.map(lambda x: x.ndim - len(batch), x) for name, x in values.items()}
    return map_batch(fn, batch, {**arrays, **values}, {**cores, **own})


def _factor(prior: StatePath, a: dict[str, Any], t: dict[str, Any]) -> Array:
    return as_matrix({**a, **t}["chol_Q"])


def forward(prior: StatePath, chain: Chain, rule: Rule) -> tuple[Array, Array, Array]:
    """Marginal means, roots of the covariances, and the expected KL divergence of each series."""
    points, weights = (jnp.asarray(x, chain.w.dtype) for x in rule)

    def one(a: dict[str, Any]) -> tuple[Array, Array, Array]:
        R, w, c = a["chain"]
        timed = prior.timed(a)
        F0 = as_matrix(a["chol_P0"])
        nothing = jnp.zeros((prior.n_state, 0), w.dtype)
        first = _absorb(_pieces(F0, R[0]), R[0], w[0], c[0], a["m0"], nothing)
        later = jax.vmap(lambda R, t: _pieces(_factor(prior, a, t), R))(R[1:], timed)

        def step(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], tuple]:
            (m, root), (p, R, w, c, t) = carry, xs
            now = {**a, **t}
            if prior.is_linear:
                mu, spread = prior.step(now, m), matmul(now["transition"], root)
            else:
                values = jax.vmap(lambda xi: prior.step(now, m + matvec(root, xi)))(points)
                mu = jnp.sum(weights[:, None] * values, axis=0)
                spread = (jnp.sqrt(weights)[:, None] * (values - mu)).T
            found = _absorb(p, R, w, c, mu, spread)
            return found[:2], found

        _, rest = jax.lax.scan(step, first[:2], (later, R[1:], w[1:], c[1:], timed), length=prior.num_steps - 1)
        mean, root, kl = (jnp.concatenate([f[None], r]) for f, r in zip(first, rest, strict=True))
        return mean, root, kl.sum()

    return _map(prior, one, chain.w.shape[:-2], chain=chain)


def backward(prior: StatePath, now: State, sites: Expansion, beta: Array, rule: Rule) -> Chain:
    """The chain after a step with this damping (`beta` of the shape of the batch), around the marginals' means."""
    points, weights = (jnp.asarray(x, now.mean.dtype) for x in rule)
    old = around(now.chain, now.mean)

    def one(a: dict[str, Any]) -> Chain:
        m, root, (R, w, _) = a["mean"], a["root"], a["old"]
        beta, (g, W) = a["beta"], a["sites"]
        timed = prior.timed(a)

        def message(F: Array, R: Array, w: Array) -> tuple[Array, Array]:
            G = _pieces(F, R).G
            L = matmul(G.T, R)
            return 0.5 * (L + L.T), matvec(G.T, w)

        before = jax.vmap(lambda R, w, t: message(_factor(prior, a, t), R, w))(R[1:], w[1:], timed)
        before = jax.tree.map(lambda x: jnp.where(beta > 0, beta * x, 0.0), before)
        own = jnp.where(beta > 0, beta * R, 0.0) + (1 - beta) * W, jnp.where(beta > 0, beta * w, 0.0) + (1 - beta) * g
        fixed = None if "chol_Q" in timed else _pinv(a["chol_Q"])

        def back(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple, tuple]:
            (R, w), (t, (L_old, rho_old), target, m, root, own, up) = carry, xs
            at = {**a, **t}
            F = _factor(prior, a, t)
            R = _floored(R, F, fixed if up is None else up)
            L, rho = message(F, R, w)
            L, rho = L - L_old, rho - rho_old

            def change(x: Array) -> Array:
                d = prior.step(at, x) - target
                return jnp.vdot(rho, d) - 0.5 * jnp.vdot(d, matvec(L, d))

            if prior.is_linear:
                A = at["transition"]
                slope = matvec(A.T, rho - matvec(L, prior.step(at, m) - target))
                bend = -matmul(A.T, matmul(L, A))
            else:
                xs = jax.vmap(lambda xi: m + matvec(root, xi))(points)
                slope = jnp.sum(weights[:, None] * jax.vmap(jax.grad(change))(xs), axis=0)
                bend = jnp.sum(weights[:, None, None] * jax.vmap(jax.hessian(change))(xs), axis=0)
            R_before = own[0] - bend
            return (0.5 * (R_before + R_before.T), own[1] + slope), (R, w)

        ups = jax.vmap(_pinv)(timed["chol_Q"]) if fixed is None else None
        earlier = jax.tree.map(lambda x: x[:-1], (m, root, own))
        xs = (timed, before, m[1:], *earlier, ups)
        last = jax.tree.map(lambda x: x[-1], own)
        (R0, w0), (R, w) = jax.lax.scan(back, last, xs, length=prior.num_steps - 1, reverse=True)
        R0 = _floored(R0, as_matrix(a["chol_P0"]), _pinv(a["chol_P0"]))
        return Chain(jnp.concatenate([R0[None], R]), jnp.concatenate([w0[None], w]), m)

    values = {"mean": now.mean, "root": now.root, "old": old, "sites": sites[1:]}
    return _map(prior, one, now.mean.shape[:-2], **values, beta=jnp.broadcast_to(beta, now.mean.shape[:-2]))


def _pinv(factor: Factor) -> Array:
    if isinstance(factor, Diagonal):
        live = factor.scale != 0
        return jnp.diag(jnp.where(live, 1.0 / jnp.where(live, factor.scale, 1.0), 0.0))
    return jnp.linalg.pinv(factor)


def _floored(R: Array, F: Array, inverse: Array) -> Array:
    """`R` with eigenvalues of `1 + F'R F` of at least `FLOOR`; `inverse` is the pseudo-inverse of `F`."""
    M = matmul(F.T, matmul(R, F))
    added = psd_part((FLOOR - 1.0) * jnp.eye(M.shape[0], dtype=M.dtype) - M)
    inverse = jax.lax.stop_gradient(inverse)
    return R + matmul(inverse.T, matmul(added, inverse))


def around(chain: Chain, mean: Array) -> Chain:
    """The same potentials, written around other points."""
    moved = jnp.sum(chain.R * (mean - chain.c)[..., None, :], axis=-1)
    return Chain(chain.R, chain.w - moved, mean)


def state_of(prior: StatePath, log_lik: LogLik, chain: Chain, rule: Rule, emission: Rule) -> State:
    """The state of a chain; a bound that is not finite counts as the lowest."""
    mean, root, kl = forward(prior, chain, rule)
    sites = expand(log_lik, mean, root, emission)
    bound = sites.value - sum_groups(kl, group_shape(log_lik, mean))
    return State(chain, mean, root, jnp.where(jnp.isfinite(bound), bound, -jnp.inf), sites)


def clipped(prior: StatePath, sites: Expansion) -> Expansion:
    """Sites without negative curvature, in units of the noise."""
    sd = jax.lax.stop_gradient(noise_scale(prior))
    unit = jnp.broadcast_to(sd[..., :, None] * sd[..., None, :], sites.curvature.shape)
    n = prior.n_state
    kept = jax.vmap(psd_part)((sites.curvature * unit).reshape(-1, n, n)).reshape(unit.shape)
    return sites._replace(curvature=kept / unit)


def psd_part(M: Array) -> Array:
    """The symmetric matrix without its negative eigenvalues, with its derivative (equal eigenvalues are no trouble).

    Up to two rows in closed form: inside of a loop over time a call of LAPACK costs more than all the rest.
    """
    size = M.shape[0]
    if size == 1:
        return jnp.maximum(M, 0.0)
    if size > 2:
        return _psd_part(0.5 * (M + M.T))
    half = 0.5 * (M[0, 0] + M[1, 1])
    away = M - half * jnp.eye(2, dtype=M.dtype)
    square = away[0, 0] ** 2 + away[0, 1] * away[1, 0]
    apart = square > 0
    length = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)
    up, down = jnp.maximum(half + length, 0.0), jnp.maximum(half - length, 0.0)
    share = jnp.where(apart, (up - down) / jnp.where(apart, 2 * length, 1.0), jnp.where(half > 0, 1.0, 0.0))
    return 0.5 * (up + down) * jnp.eye(2, dtype=M.dtype) + share * away


@jax.custom_jvp
def _psd_part(M: Array) -> Array:
    values, vectors = jnp.linalg.eigh(M)
    return matmul(vectors * jnp.maximum(values, 0.0), vectors.T)


@_psd_part.defjvp
def _psd_part_jvp(primals: tuple, tangents: tuple) -> tuple:
    """Divided differences of `max(x, 0)` between the eigenvalues (Daleckii & Krein 1965)."""
    (M,), (dM,) = primals, tangents
    values, vectors = jnp.linalg.eigh(M)
    kept = jnp.maximum(values, 0.0)
    gap = values[:, None] - values[None, :]
    same = jnp.abs(gap) <= 1e-6 * jnp.abs(values).max()
    between = (kept[:, None] - kept[None, :]) / jnp.where(same, 1.0, gap)
    slope = jnp.where(same, jnp.where(values > 0, 1.0, 0.0)[:, None], between)
    inner = matmul(vectors.T, matmul(dM, vectors)) * slope
    return matmul(vectors * kept, vectors.T), matmul(vectors, matmul(inner, vectors.T))


def select(take: Array, new: State, old: State) -> State:
    """The new state in the lanes that take it."""

    def choose(x: Array, y: Array) -> Array:
        return jnp.where(take.reshape(*take.shape, *(1,) * (x.ndim - take.ndim)), x, y)

    return jax.tree.map(choose, new, old)
