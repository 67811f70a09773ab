"""Potentials by deterministic steps on the variational bound: no learning rate, no noise, no training.

The chain `q(z_t | z_{t-1}) ~ N(f(z_{t-1}), Q) exp(w_t'x - x'R_t x / 2)`, `x = z_t - c_t`, has signed `R_t`: only
`V = F (1 + F'R F)^{-1} F'` must be positive definite along the noise. `Q = F F'` may be singular: nothing is divided by
it. With `G = 1 - V R` and `d = f - c`

    E[z_t | z_{t-1}] = f + V (w - R d),     log Z(f) = d'rho - d'L d / 2 + const,   rho = G'w,  L = G'R
    ELBO = sum_t E log h_t(z_t) - sum_t E KL(q(z_t | z_{t-1}) || N(f, Q))

One iteration: Gaussian marginals forward (exact for an affine `f`); the sites, `E grad log h_t` and `-E grad^2 log h_t`
under them; then backward, with damping `beta` and `g(x)` the change `(new - beta old)` of `log Z_{t+1}(f(x))`,

    R_t <- beta R_t - (1 - beta) E grad^2 log h_t - E grad^2 g
    w_t <- beta w_t + (1 - beta) E grad log h_t + E grad g

around the marginals' means, and `1 + F'R_t F` floored. For an affine `f` this is a natural-gradient step on the sites.
`beta` is the first of a list that raises the bound; if none does, the sites are clipped at zero.

Source:
    Khan & Lin 2017 (conjugate-computation variational inference); Chang, Wilkinson, Khan & Solin 2020; for chains
    arXiv 2506.17796 and 2511.15409.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_count
from pssm._types import Array
from pssm.batch import map_batch
from pssm.distributions import LowRankChain, StatePath
from pssm.linalg.low_rank import Diagonal, Factor, as_matrix
from pssm.linalg.potential import Potential, as_potential
from pssm.linalg.psd_root import factor_from_covariance
from pssm.linalg.small import cholesky, invert_lower, matmul, matvec
from pssm.linalg.square_root import triangularise_once
from pssm.modes.coupled import group_shape, sum_groups
from pssm.modes.mode import DENSE, gauss_newton, noise_scale, split
from pssm.modes.path import mode_path
from pssm.modes.points import Expansion, Rule, drawn_rule, expand, expected_value, rule_for
from pssm.modes.search import start_path

FLOOR = 0.02  # least eigenvalue of `1 + F'R F`
DAMPING = (0.0, 0.5, 0.75, 0.875, 0.9375, 0.97, 0.0, 0.75)  # the last two with sites clipped at zero
CLIPPED = 6
SAMPLES = 512  # paths of a bound that is sampled

LogLik = Callable[[Array], Array]


class VariationalFit(NamedTuple):
    """The best chain of a path, for fixed parameters.

    Attributes:
        potential: full rank and signed, written around the posterior's mean; for `LowRankChain.from_potential`.
        bound: lower bound on the log evidence, `(*batch,)`, with length 1 where series share a term of the likelihood.
        mean: marginal means, `(*batch, time, state)`; exact for an affine transition.
        cov: marginal covariances, `(*batch, time, state, state)`.
        slack: nats that the last step gained, like `bound`.
        error: standard error of `bound` where it is sampled, else zero.
    """

    potential: Potential
    bound: Array
    mean: Array
    cov: Array
    slack: Array
    error: Array


class _Chain(NamedTuple):
    """Potentials in full: curvature `(..., n, n)`, slope and centre."""

    R: Array
    w: Array
    c: Array


class _State(NamedTuple):
    """A chain with its marginals (`root root'` their covariances), bound and sites."""

    chain: _Chain
    mean: Array
    root: Array
    bound: Array
    sites: Expansion


def variational_fit(
    prior: StatePath,
    log_lik: LogLik,
    *,
    start: Potential | tuple[Array, Array] | None = None,
    num_iters: int = 8,
    points: int | None = None,
    line_search: bool = True,
    tolerance: float = 1e-6,
) -> VariationalFit:
    """The chain of full rank with the highest bound `ELBO <= log p(y)`, by natural-gradient steps that all raise it.

    Gradients by the parameters inside `prior` and `log_lik` are those of the bound with the potentials held fixed
    (at the optimum the derivative by the potentials is zero), in forward and in reverse mode.

    Args:
        prior: the path prior, up to 64 states.
        log_lik: log-likelihood of paths `(*batch, time, state)`, of shape `batch`, with axes of length 1 (or none)
            where series share a term; each step's state enters its own summand only.
        start: None for the better of the path's mode and the prior; a `Potential`; or a pair `(mean, cov)` of
            marginals `(*batch, time, state)`, `(*batch, time, state, state)`.
        num_iters: most steps; exactly so many without a line search.
        points: Gauss-Hermite points a dimension. By default 5, 5 and 3 for one to three states, and 2n cubature points
            beyond; 64 fixed antithetic draws where series share a term.
        line_search: whether each step must raise the bound. Without, sites are clipped at zero and no step is damped:
            a fixed amount of work from the start's marginals, such as a density inside of HMC needs.
        tolerance: the search is over when a step gains less, in nats.

    Returns:
        The fit. Its bound is exact up to quadrature (21, 81 or 125 points) for affine transitions of up to three
        states, else the mean over 512 paths of the chain; without a line search that of the fit's own points.

    Raises:
        ValueError: the state is larger than 64.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> prior = StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), 0.5 * jnp.eye(1), num_steps=30)
        >>> counts = jnp.arange(30) % 3
        >>> fit = variational_fit(prior, lambda z: dist.Poisson(jnp.exp(z[..., 0])).log_prob(counts).sum(-1))
        >>> fit.mean.shape, bool(fit.slack < 1e-5)
        ((30, 1), True)

    Source:
        The module's head.
    """
    check_count("num_iters", num_iters)
    if prior.n_state > DENSE:
        raise ValueError(
            f"`prior` must have at most {DENSE} states for a fit with full matrices; got {prior.n_state}. Use "
            "`mode_potentials`, which needs none, or potentials that are trained."
        )
    path = start_path(prior, log_lik)
    rule = rule_for(prior.n_state, points)
    coupled = group_shape(log_lik, path) != path.shape[:-2]
    emission = drawn_rule(path.shape) if coupled else rule

    def found(_: Array) -> tuple[_Chain, Array]:
        if not line_search:
            return _fixed_steps(prior, log_lik, _moments(prior, log_lik, start, path, rule), num_iters, rule, emission)
        first = _first(prior, log_lik, start, path, rule, emission)
        return _climb(prior, log_lik, first, num_iters, tolerance, rule, emission)

    # Nothing is differentiated through the search: what it takes from outside, in closures too, is held fixed.
    search, outside = jax.closure_convert(found, path)
    chain, slack = jax.lax.stop_gradient(search(jax.lax.stop_gradient(path), *jax.lax.stop_gradient(outside)))
    mean, root, kl = _forward(prior, chain, rule)
    chain = jax.lax.stop_gradient(_around(chain, mean))
    cov = root @ jnp.swapaxes(root, -1, -2)
    potential = _as_potential(chain)
    groups = group_shape(log_lik, mean)
    error = jnp.zeros(groups, mean.dtype)
    if not line_search or (prior.is_linear and prior.n_state <= 3):
        fine = emission if coupled or not line_search else rule_for(prior.n_state, fine=True)
        bound = expected_value(log_lik, mean, root, fine) - sum_groups(kl, groups)
    else:
        bound, error = sampled_bound(prior, log_lik, potential, groups)
    return VariationalFit(potential, bound, mean, cov, slack, error)


def variational_potentials(
    prior: StatePath, log_lik: LogLik, *, rank: int, diagonal: bool = True, **options: Any
) -> Potential:
    """`variational_fit`'s potentials in the form of a guide, beside `mode_potentials`.

    With `rank` of at least the size of the state and a diagonal they are those of the fit, signed where the data want
    it. A smaller rank keeps the slopes and the means, and cuts the curvature to a positive diagonal and factor.

    Args:
        prior: the path prior.
        log_lik: as in `variational_fit`.
        rank: columns of the factor.
        diagonal: whether a diagonal goes beside them.
        options: of `variational_fit`.

    Returns:
        A `Potential` written around the posterior's mean, with the posterior's conditional `scale`.

    Example:
        >>> import jax.numpy as jnp
        >>> prior = StatePath(jnp.zeros(2), jnp.eye(2), 0.9 * jnp.eye(2), 0.5 * jnp.eye(2), num_steps=5)
        >>> variational_potentials(prior, lambda z: -jnp.cosh(z).sum((-2, -1)), rank=1).factor.shape
        (5, 2, 1)
    """
    fit = variational_fit(prior, log_lik, **options)
    return in_form(prior, fit.potential, rank, diagonal)


def in_form(prior: StatePath, potential: Potential, rank: int, diagonal: bool = True) -> Potential:
    """A fit's potential with `rank` columns, and the chain's conditional standard deviations as its `scale`."""
    whole = LowRankChain.from_potential(prior, potential)
    scale = jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(whole.conditional_variance(), 0.0)))
    n = prior.n_state
    if rank >= n and diagonal:
        return Potential(
            potential.factor, potential.diagonal, None, potential.center, potential.slope, scale=scale,
            precision=potential.precision,
        )  # fmt: skip
    R = _in_full(potential)
    sd = jnp.broadcast_to(noise_scale(prior), R.shape[:-1])
    delta, K = jax.vmap(lambda J, s: split(J, s, rank, diagonal))(R.reshape(-1, n, n), sd.reshape(-1, n))
    delta, K = jnp.maximum(delta, 0.0).reshape(R.shape[:-1]), K.reshape(*R.shape[:-1], K.shape[-1])
    return Potential(K, delta, None, potential.center, potential.slope, scale=scale)


def sampled_bound(
    prior: StatePath, log_lik: LogLik, potential: Potential, groups: tuple[int, ...]
) -> tuple[Array, Array]:
    """The bound of a chain as the mean over fixed draws of it, and the standard error."""
    chain = LowRankChain.from_potential(prior, potential)
    draws, kls = chain.sample_with_kl(jax.random.key(0), (SAMPLES,))
    values = jax.lax.map(lambda z: jnp.reshape(log_lik(z), groups), draws, batch_size=64)
    kls = jnp.broadcast_to(kls, (SAMPLES, *draws.shape[1:-2]))
    each = values - jax.vmap(lambda k: sum_groups(k, groups))(kls)
    return each.mean(0), each.std(0) / np.sqrt(SAMPLES - 1)


# What a step is made of ----------------------------------------------------------------------------------------------


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


def _forward(prior: StatePath, chain: _Chain, rule: Rule) -> tuple[Array, Array, Array]:
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


def _backward(prior: StatePath, now: _State, sites: Expansion, beta: Array, rule: Rule) -> _Chain:
    """The chain after a step with this damping (`beta` of the shape of the batch), around the marginals' means."""
    points, weights = (jnp.asarray(x, now.mean.dtype) for x in rule)
    old = _around(now.chain, now.mean)

    def one(a: dict[str, Any]) -> _Chain:
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
        return _Chain(jnp.concatenate([R0[None], R]), jnp.concatenate([w0[None], w]), m)

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
    size = M.shape[0]

    def lack(values: Array) -> Array:
        return jnp.maximum(FLOOR - 1.0 - values, 0.0)

    if size == 1:
        added = lack(M)
    elif size == 2:  # closed form: inside of a loop over time a call of LAPACK costs more than all the rest
        half = 0.5 * (M[0, 0] + M[1, 1])
        away = M - half * jnp.eye(2, dtype=M.dtype)
        length = jnp.sqrt(away[0, 0] ** 2 + away[0, 1] * away[1, 0])
        up, down = lack(half + length), lack(half - length)
        share = jnp.where(length > 0, (up - down) / jnp.where(length > 0, 2 * length, 1.0), 0.0)
        added = 0.5 * (up + down) * jnp.eye(2, dtype=M.dtype) + share * away
    else:
        values, vectors = jnp.linalg.eigh(0.5 * (M + M.T))
        added = matmul(vectors * lack(values), vectors.T)
    return R + matmul(inverse.T, matmul(added, inverse))


# The search ----------------------------------------------------------------------------------------------------------


def _around(chain: _Chain, mean: Array) -> _Chain:
    """The same potentials, written around other points."""
    moved = jnp.sum(chain.R * (mean - chain.c)[..., None, :], axis=-1)
    return _Chain(chain.R, chain.w - moved, mean)


def _state(prior: StatePath, log_lik: LogLik, chain: _Chain, rule: Rule, emission: Rule) -> _State:
    mean, root, kl = _forward(prior, chain, rule)
    sites = expand(log_lik, mean, root, emission)
    bound = sites.value - sum_groups(kl, group_shape(log_lik, mean))
    return _State(chain, mean, root, jnp.where(jnp.isfinite(bound), bound, -jnp.inf), sites)


def _clipped(prior: StatePath, sites: Expansion) -> Expansion:
    """Sites without negative curvature, in units of the noise."""
    if prior.n_state == 1:
        return sites._replace(curvature=jnp.maximum(sites.curvature, 0.0))
    sd = noise_scale(prior)
    unit = sd[..., :, None] * sd[..., None, :]
    values, vectors = jnp.linalg.eigh(sites.curvature * unit)
    kept = (vectors * jnp.maximum(values, 0.0)[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)
    return sites._replace(curvature=kept / unit)


def _select(take: Array, new: _State, old: _State) -> _State:
    def choose(x: Array, y: Array) -> Array:
        return jnp.where(take.reshape(*take.shape, *(1,) * (x.ndim - take.ndim)), x, y)

    return jax.tree.map(choose, new, old)


def _first(prior: StatePath, log_lik: LogLik, start: Any, path: Array, rule: Rule, emission: Rule) -> _State:
    """The state that a search begins at."""
    if start is not None:
        if not isinstance(start, Potential):
            chain = _one_step(prior, log_lik, start, path, rule, emission)
        else:
            chain = _chain_of(prior, start, path)
        return _state(prior, log_lik, chain, rule, emission)
    n = prior.n_state
    nothing = _Chain(jnp.zeros((*path.shape, n), path.dtype), jnp.zeros_like(path), path)
    blank = _state(prior, log_lik, nothing, rule, emission)
    mode = mode_path(prior, log_lik, rank=n, start=path, strict=False)
    found = gauss_newton(prior, log_lik, mode)
    at_mode = _state(prior, log_lik, _Chain(found.J, found.slope, mode + found.move), rule, emission)
    return _select(at_mode.bound > blank.bound, at_mode, blank)


def _chain_of(prior: StatePath, potential: Potential, path: Array) -> _Chain:
    p = as_potential(potential, prior.num_steps, prior.n_state, path.dtype, "start.")
    c = jnp.zeros_like(path) if p.center is None else jnp.broadcast_to(p.center, path.shape)
    w = jnp.zeros_like(path) if p.slope is None else jnp.broadcast_to(p.slope, path.shape)
    if p.factor_slope is not None:
        w = w + jnp.einsum("...nr,...r->...n", p.factor, p.factor_slope)
    return _Chain(jnp.broadcast_to(_in_full(p), (*path.shape, prior.n_state)), w, c)


def _in_full(p: Potential) -> Array:
    R = p.factor @ jnp.swapaxes(p.factor, -1, -2)
    if p.diagonal is not None:
        R = R + p.diagonal[..., None] * jnp.eye(R.shape[-1], dtype=R.dtype)
    return R if p.precision is None else R + p.precision


def _as_potential(chain: _Chain) -> Potential:
    """In the shortest form: one state needs a diagonal alone."""
    none = jnp.zeros((*chain.w.shape, 0), chain.w.dtype)
    if chain.w.shape[-1] == 1:
        return Potential(none, chain.R[..., 0], center=chain.c, slope=chain.w)
    return Potential(none, None, center=chain.c, slope=chain.w, precision=chain.R)


def _given(moments: tuple[Array, Array], path: Array) -> tuple[Array, Array]:
    mean, cov = (jnp.asarray(x, path.dtype) for x in moments)
    root = jax.vmap(triangularise_once)(factor_from_covariance("start", cov).reshape(-1, *cov.shape[-2:]))
    return jnp.broadcast_to(mean, path.shape), jnp.broadcast_to(root.reshape(cov.shape), (*path.shape, path.shape[-1]))


def _one_step(
    prior: StatePath, log_lik: LogLik, moments: tuple[Array, Array], path: Array, rule: Rule, emission: Rule
) -> _Chain:
    mean, root = _given(moments, path)
    return _step(prior, log_lik, mean, root, rule, emission)


def _step(prior: StatePath, log_lik: LogLik, mean: Array, root: Array, rule: Rule, emission: Rule) -> _Chain:
    """One step without damping, from marginals alone, with sites clipped at zero."""
    sites = expand(log_lik, mean, root, emission)
    blank = _Chain(jnp.zeros_like(root), jnp.zeros_like(mean), mean)
    state = _State(blank, mean, root, sites.value, sites)
    return _backward(prior, state, _clipped(prior, sites), jnp.zeros((), mean.dtype), rule)


def _moments(prior: StatePath, log_lik: LogLik, start: Any, path: Array, rule: Rule) -> tuple[Array, Array]:
    """Mean and root of the marginals that a fixed number of steps begins at."""
    if isinstance(start, tuple):
        return _given(start, path)
    if start is not None:
        return _forward(prior, _chain_of(prior, start, path), rule)[:2]
    mode = mode_path(prior, log_lik, rank=prior.n_state, start=path, strict=False)
    found = gauss_newton(prior, log_lik, mode)
    return _forward(prior, _Chain(found.J, found.slope, mode + found.move), rule)[:2]


def _fixed_steps(
    prior: StatePath, log_lik: LogLik, moments: tuple, num_iters: int, rule: Rule, emission: Rule
) -> tuple[_Chain, Array]:
    n = prior.n_state
    blank = _Chain(jnp.zeros((*moments[0].shape, n), moments[0].dtype), *(jnp.zeros_like(moments[0]),) * 2)

    def body(carry: tuple, _: None) -> tuple[tuple, Array]:
        _, (mean, root) = carry
        chain = _step(prior, log_lik, mean, root, rule, emission)
        mean, root, kl = _forward(prior, chain, rule)
        return (chain, (mean, root)), kl

    (chain, _), _ = jax.lax.scan(body, (blank, moments), length=num_iters)
    return chain, jnp.full(group_shape(log_lik, moments[0]), jnp.nan, moments[0].dtype)


def _climb(
    prior: StatePath, log_lik: LogLik, first: _State, num_iters: int, tolerance: float, rule: Rule, emission: Rule
) -> tuple[_Chain, Array]:
    """The chain after at most `num_iters` steps of each lane, and what the last one gained."""
    dtype = first.mean.dtype
    damping, last = jnp.asarray(DAMPING, dtype), len(DAMPING) - 1

    def body(carry: tuple) -> tuple:
        state, notch, count, slack, done, trials = carry
        clip = notch >= CLIPPED
        sites, kept = state.sites, _clipped(prior, state.sites)
        wide = jnp.broadcast_to(clip, state.mean.shape[:-2])[..., None, None, None]
        sites = sites._replace(curvature=jnp.where(wide, kept.curvature, sites.curvature))
        chain = _backward(prior, state, sites, damping[notch], rule)
        new = _state(prior, log_lik, chain, rule, emission)
        gain = new.bound - state.bound
        rounding = 8 * jnp.finfo(dtype).eps * (1.0 + jnp.abs(new.bound))
        better = ~done & jnp.isfinite(new.bound) & (gain >= -rounding)
        over = better & ((gain <= jnp.maximum(tolerance, rounding)) | (count + 1 >= num_iters))
        stuck = ~better & (notch >= last)
        notch = jnp.where(better, jnp.maximum(notch - 1, 0), jnp.minimum(notch + 1, last))
        slack = jnp.where(better, jnp.maximum(gain, 0.0), slack)
        state = _select(better, new, state)
        return state, notch, count + better, slack, done | over | stuck, trials + 1

    lanes = first.bound.shape
    carry = (
        first, jnp.zeros(lanes, int), jnp.zeros(lanes, int), jnp.full(lanes, jnp.inf, dtype),
        jnp.zeros(lanes, bool), jnp.zeros((), int),
    )  # fmt: skip
    most = 3 * num_iters + len(DAMPING)
    state, _, count, slack, *_ = jax.lax.while_loop(lambda c: jnp.any(~c[4]) & (c[5] < most), body, carry)
    return _around(state.chain, state.mean), jnp.where(count > 0, slack, jnp.inf)
