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
from pssm.distributions import LowRankChain, StatePath
from pssm.linalg.potential import Potential, as_potential
from pssm.linalg.psd_root import factor_from_covariance
from pssm.linalg.square_root import triangularise_once
from pssm.modes.coupled import group_shape, sum_groups
from pssm.modes.mode import DENSE, gauss_newton, noise_scale, split
from pssm.modes.path import mode_path
from pssm.modes.points import Rule, drawn_rule, expand, expected_value, rule_for
from pssm.modes.search import start_path
from pssm.modes.variational_steps import Chain, LogLik, State, around, backward, clipped, forward, select, state_of

DAMPING = (0.0, 0.5, 0.75, 0.875, 0.9375, 0.97, 0.0, 0.75)  # the last two with sites clipped at zero
CLIPPED = 6
SAMPLES = 512  # paths of a bound that is sampled


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


def variational_fit(
    prior: StatePath,
    log_lik: LogLik,
    *,
    start: Potential | tuple[Array, Array] | None = None,
    num_iters: int = 8,
    points: int | None = None,
    line_search: bool = True,
    through: bool = False,
    tolerance: float = 1e-6,
) -> VariationalFit:
    """The chain of full rank with the highest bound `ELBO <= log p(y)`, by natural-gradient steps that all raise it.

    Gradients by the parameters inside `prior` and `log_lik` are those of the bound with the potentials held fixed
    (at the optimum the derivative by the potentials is zero), in forward and in reverse mode. The potentials themselves
    have derivatives only where steps are differentiated `through`.

    Args:
        prior: the path prior, up to 64 states.
        log_lik: log-likelihood of paths `(*batch, time, state)`, of shape `batch`, with axes of length 1 (or none)
            where series share a term; each step's state enters its own summand only.
        start: None for the best of the prior and the modes found from two paths; a `Potential`; or a pair
            `(mean, cov)` of marginals `(*batch, time, state)`, `(*batch, time, state, state)`.
        num_iters: most steps; exactly so many without a line search.
        points: Gauss-Hermite points a dimension. By default 5, 5 and 3 for one to three states, and 2n cubature points
            beyond; 64 fixed antithetic draws where series share a term.
        line_search: whether each step must raise the bound. Without, sites are clipped at zero and no step is damped:
            a fixed amount of work from the start's marginals, such as a density inside of HMC needs.
        through: whether derivatives go through the steps (from the start's marginals, which are held fixed): for a
            function of the potentials other than their bound. Only without a line search.
        tolerance: the search is over when a step gains less, in nats.

    Returns:
        The fit. Its bound is exact up to quadrature (21, 81 or 125 points) for affine transitions of up to three
        states, else the mean over 512 paths of the chain; without a line search that of the fit's own points.

    Raises:
        ValueError: the state is larger than 64, or `through` with a line search.

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
    if through and line_search:
        raise ValueError("`through` needs `line_search=False`: a search has no derivatives; got both.")
    path = start_path(prior, log_lik)
    rule = rule_for(prior.n_state, points)
    coupled = group_shape(log_lik, path) != path.shape[:-2]
    emission = drawn_rule(path.shape) if coupled else rule

    def climbed(path: Array) -> tuple[Chain, Array]:
        first = _first(prior, log_lik, start, path, rule, emission)
        return _climb(prior, log_lik, first, num_iters, tolerance, rule, emission)

    def stepped(moments: tuple[Array, Array]) -> tuple[Chain, Array]:
        return _fixed_steps(prior, log_lik, moments, num_iters, rule, emission)

    if line_search:
        chain, slack = _held(climbed, path)
    else:
        moments = _held(lambda path: _moments(prior, log_lik, start, path, rule), path)
        chain, slack = stepped(moments) if through else _held(stepped, moments)
    mean, root, kl = forward(prior, chain, rule)
    chain = around(chain, mean)
    if not through:
        chain = jax.lax.stop_gradient(chain)
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


def _held(fn: Callable[[Any], Any], x: Any) -> Any:
    """`fn(x)` without derivatives: what it takes from outside, in closures too, is held fixed."""
    converted, outside = jax.closure_convert(fn, x)
    return jax.lax.stop_gradient(converted(jax.lax.stop_gradient(x), *jax.lax.stop_gradient(outside)))


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


def in_form(
    prior: StatePath, potential: Potential, rank: int, diagonal: bool = True, *, signed: bool = True
) -> Potential:
    """A fit's potential with `rank` columns, and the chain's conditional standard deviations as its `scale`."""
    whole = LowRankChain.from_potential(prior, potential)
    scale = jax.lax.stop_gradient(jnp.sqrt(jnp.maximum(whole.conditional_variance(), 0.0)))
    n = prior.n_state
    if rank >= n and diagonal and signed:
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


# The search ----------------------------------------------------------------------------------------------------------


def _first(prior: StatePath, log_lik: LogLik, start: Any, path: Array, rule: Rule, emission: Rule) -> State:
    """The state that a search begins at."""
    if start is not None:
        if not isinstance(start, Potential):
            chain = _one_step(prior, log_lik, start, path, rule, emission)
        else:
            chain = _chain_of(prior, start, path)
        return state_of(prior, log_lik, chain, rule, emission)
    n = prior.n_state
    nothing = Chain(jnp.zeros((*path.shape, n), path.dtype), jnp.zeros_like(path), path)
    mean, root, _ = forward(prior, nothing, rule)
    # An expansion under the wide prior sees a slope where a point may sit on a saddle (z^3 at 0).
    wide, *_ = forward(prior, _step(prior, log_lik, mean, root, rule, emission), rule)
    starts = jnp.stack([path, jnp.where(jnp.isfinite(wide), wide, path)])

    def at_mode(start: Array) -> Chain:
        mode = mode_path(prior, log_lik, rank=n, start=start, strict=False)
        found = gauss_newton(prior, log_lik, mode)
        return Chain(found.J, found.slope, mode + found.move)

    chains = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), nothing, jax.vmap(at_mode)(starts))
    states = jax.vmap(lambda chain: state_of(prior, log_lik, chain, rule, emission))(chains)
    best = jax.tree.map(lambda x: x[0], states)
    for k in (1, 2):
        state = jax.tree.map(lambda x, k=k: x[k], states)
        best = select(state.bound > best.bound, state, best)
    return best


def _chain_of(prior: StatePath, potential: Potential, path: Array) -> Chain:
    p = as_potential(potential, prior.num_steps, prior.n_state, path.dtype, "start.")
    c = jnp.zeros_like(path) if p.center is None else jnp.broadcast_to(p.center, path.shape)
    w = jnp.zeros_like(path) if p.slope is None else jnp.broadcast_to(p.slope, path.shape)
    if p.factor_slope is not None:
        w = w + jnp.einsum("...nr,...r->...n", p.factor, p.factor_slope)
    return Chain(jnp.broadcast_to(_in_full(p), (*path.shape, prior.n_state)), w, c)


def _in_full(p: Potential) -> Array:
    R = p.factor @ jnp.swapaxes(p.factor, -1, -2)
    if p.diagonal is not None:
        R = R + p.diagonal[..., None] * jnp.eye(R.shape[-1], dtype=R.dtype)
    return R if p.precision is None else R + p.precision


def _as_potential(chain: Chain) -> Potential:
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
) -> Chain:
    mean, root = _given(moments, path)
    return _step(prior, log_lik, mean, root, rule, emission)


def _step(prior: StatePath, log_lik: LogLik, mean: Array, root: Array, rule: Rule, emission: Rule) -> Chain:
    """One step without damping, from marginals alone, with sites clipped at zero."""
    sites = expand(log_lik, mean, root, emission)
    blank = Chain(jnp.zeros_like(root), jnp.zeros_like(mean), mean)
    state = State(blank, mean, root, sites.value, sites)
    return backward(prior, state, clipped(prior, sites), jnp.zeros((), mean.dtype), rule)


def _moments(prior: StatePath, log_lik: LogLik, start: Any, path: Array, rule: Rule) -> tuple[Array, Array]:
    """Mean and root of the marginals that a fixed number of steps begins at."""
    if isinstance(start, tuple):
        return _given(start, path)
    if start is not None:
        return forward(prior, _chain_of(prior, start, path), rule)[:2]
    mode = mode_path(prior, log_lik, rank=prior.n_state, start=path, strict=False)
    found = gauss_newton(prior, log_lik, mode)
    return forward(prior, Chain(found.J, found.slope, mode + found.move), rule)[:2]


def _fixed_steps(
    prior: StatePath, log_lik: LogLik, moments: tuple, num_iters: int, rule: Rule, emission: Rule
) -> tuple[Chain, Array]:
    n = prior.n_state
    blank = Chain(jnp.zeros((*moments[0].shape, n), moments[0].dtype), *(jnp.zeros_like(moments[0]),) * 2)

    def body(carry: tuple, _: None) -> tuple[tuple, Array]:
        _, (mean, root) = carry
        chain = _step(prior, log_lik, mean, root, rule, emission)
        mean, root, kl = forward(prior, chain, rule)
        return (chain, (mean, root)), kl

    (chain, _), _ = jax.lax.scan(body, (blank, moments), length=num_iters)
    return chain, jnp.full(group_shape(log_lik, moments[0]), jnp.nan, moments[0].dtype)


def _climb(
    prior: StatePath, log_lik: LogLik, first: State, num_iters: int, tolerance: float, rule: Rule, emission: Rule
) -> tuple[Chain, Array]:
    """The chain after at most `num_iters` steps of each lane, and what the last one gained."""
    dtype = first.mean.dtype
    damping, last = jnp.asarray(DAMPING, dtype), len(DAMPING) - 1

    def body(carry: tuple) -> tuple:
        state, notch, count, slack, done, trials = carry
        clip = notch >= CLIPPED
        sites, kept = state.sites, clipped(prior, state.sites)
        wide = jnp.broadcast_to(clip, state.mean.shape[:-2])[..., None, None, None]
        sites = sites._replace(curvature=jnp.where(wide, kept.curvature, sites.curvature))
        chain = backward(prior, state, sites, damping[notch], rule)
        new = state_of(prior, log_lik, chain, rule, emission)
        gain = new.bound - state.bound
        rounding = 8 * jnp.finfo(dtype).eps * (1.0 + jnp.abs(new.bound))
        better = ~done & jnp.isfinite(new.bound) & (gain >= -rounding)
        over = better & ((gain <= jnp.maximum(tolerance, rounding)) | (count + 1 >= num_iters))
        stuck = ~better & (notch >= last)
        notch = jnp.where(better, jnp.maximum(notch - 1, 0), jnp.minimum(notch + 1, last))
        slack = jnp.where(better, jnp.maximum(gain, 0.0), slack)
        state = select(better, new, state)
        return state, notch, count + better, slack, done | over | stuck, trials + 1

    lanes = first.bound.shape
    carry = (
        first, jnp.zeros(lanes, int), jnp.zeros(lanes, int), jnp.full(lanes, jnp.inf, dtype),
        jnp.zeros(lanes, bool), jnp.zeros((), int),
    )  # fmt: skip
    most = 3 * num_iters + len(DAMPING)
    state, _, count, slack, *_ = jax.lax.while_loop(lambda c: jnp.any(~c[4]) & (c[5] < most), body, carry)
    return around(state.chain, state.mean), jnp.where(count > 0, slack, jnp.inf)
