"""One pass of particles through a series: what the particle filter and conditional SMC have in common.

Between two steps a cloud holds where each particle is expected next, so that resampling moves means, not states, and
the transition is evaluated once per particle and step. Weights are carried with their look-ahead (`particle.py` says
what that is), normalised; the sums that normalise them make the estimate of the evidence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._checks import check_choice, check_count
from pssm._types import Array, ArrayLike
from pssm.callables import STATE_NOISE
from pssm.emission_moments import check_moments
from pssm.filters.gaussian import condition_on
from pssm.filters.linearize import NAMES, Linearize, rule
from pssm.filters.resampling import ess, multinomial, normalise
from pssm.linalg import solve_lower, triangularise
from pssm.linalg.low_rank import (
    Factor,
    Update,
    apply_factor,
    as_factor,
    as_matrix,
    condition,
    log_normaliser,
    log_potential,
    posterior_sample,
)
from pssm.linalg.potential import Potential, as_potential
from pssm.linalg.random import standard_normal
from pssm.linalg.small import matvec
from pssm.nonlinear import NonlinearSSM, check_nonlinear

Proposal = str | Linearize | Potential | None  # or any object with attributes `k`, `K`, `diag` and `center`
MAKERS: dict[str, Callable[..., Potential]] = {}  # names of potentials made for a model and its data; rooms above add


class ParticleResult(NamedTuple):
    """What a particle filter found.

    Attributes:
        log_likelihood: log of an unbiased estimate of `p(y_{1:T})`; as a logarithm a lower bound in expectation. -inf
            where at some step no particle was possible.
        log_likelihoods: their summands, `(time,)`: estimates of `log p(y_t | y_{1:t-1})`.
        particles: states, `(time, particles, state)`.
        log_weights: normalised, `(time, particles)`: with them the particles of step t stand for `p(z_t | y_{1:t})`.
        ancestors: `particles[t, i]` came from `particles[t - 1, ancestors[t, i]]`, `(time, particles)`.
        ess: effective number of particles before resampling, `(time,)`, look-ahead included.
        log_look_ahead: log of `Z_{t+1}(z_t)`, `(time, particles)`; zero for a filter that is not guided. Particles are
            resampled by `log_weights + log_look_ahead`; with that sum they stand, roughly, for `p(z_t | y_{1:T})`.
    """

    log_likelihood: Array
    log_likelihoods: Array
    particles: Array
    log_weights: Array
    ancestors: Array
    ess: Array
    log_look_ahead: Array


class Task(NamedTuple):
    """A model, its data and the potentials, checked; a pytree.

    Attributes:
        model: the model.
        y: `(time, obs)`.
        u: `(time, input)`, or None.
        chol_P0: its factor, a `Diagonal` where it can be seen to be one.
        chol_Q: the same; with a time axis where the model's has one; None where the noise depends on the state.
        potentials: with a time axis, or None.
    """

    model: NonlinearSSM
    y: Array
    u: Array | None
    chol_P0: Factor
    chol_Q: Factor | None
    potentials: Potential | None

    def factor(self, t: Array) -> Factor:
        """The factor of the noise into step `t`, the same from every state."""
        return jax.tree.map(lambda x: x[t], self.chol_Q) if self.model.time_varying else self.chol_Q

    def root(self, t: Array, z: Array, u: Array | None) -> Array:
        """The triangular factor of the noise into step `t` from the state `z`, `(state, state)`."""
        factor = self.model.noise(t, z, u).astype(z.dtype) if self.chol_Q is None else as_matrix(self.factor(t))
        return triangularise(factor)


def check_proposal(proposal: Any) -> None:
    """Refuses what is no `proposal` of a particle method; all of them take the same."""
    if isinstance(proposal, str):
        check_choice("proposal", proposal, ("bootstrap", *MAKERS, *NAMES))
    elif not (proposal is None or _is_potential(proposal) or callable(proposal)):
        raise TypeError(
            "`proposal` must be a name, None, a rule of linearisation, or potentials with attributes k, K, diag and "
            f"center (`pssm.guides.guided_proposal`); got {type(proposal).__name__}."
        )


def _is_potential(given: Any) -> bool:
    return isinstance(given, Potential) or all(hasattr(given, name) for name in ("k", "K", "diag", "center"))


def prepare(
    model: Any, y: ArrayLike, u: ArrayLike | None, num_particles: int, proposal: Any
) -> tuple[Task, str | Linearize | None]:
    """The checked task, and what linearises (a name, a function or None); the dtype is the model's."""
    check_count("num_particles", num_particles)
    check_proposal(proposal)
    model = check_nonlinear(model)
    series, inputs = model.check_series(y, u)
    dtype = model.m0.dtype
    proposal = MAKERS[proposal](model, y, u) if isinstance(proposal, str) and proposal in MAKERS else proposal
    potentials = None
    if _is_potential(proposal):
        potentials = as_potential(proposal, len(series), model.n_state, dtype, "proposal.")
        if potentials.batch_shape:
            raise ValueError(f"`proposal.K` must have no batch axes; got shape {potentials.factor.shape}.")
    linearize = None if potentials is not None or proposal == "bootstrap" else proposal
    if linearize is not None:
        check_moments(model.emission(model.m0, None if inputs is None else inputs[0]))
    if potentials is not None and model.noise_function is not None:
        raise ValueError(f"`proposal` has potentials. {STATE_NOISE}")
    noise = None if model.noise_function is not None else as_factor("chol_Q", model.chol_Q)
    factors = as_factor("chol_P0", model.chol_P0), noise
    inputs = None if inputs is None else inputs.astype(dtype)
    return Task(model, series.astype(dtype), inputs, *factors, potentials), linearize


class _Now(NamedTuple):
    """What one step needs besides the particles; `next_update` and `next_factor` belong to the step after it."""

    key: Array
    t: Array
    y: Array
    statistic: Array
    u: Array | None
    u_next: Array | None
    potential: Potential | None
    update: Update | None
    next_update: Update | None
    reference: Array | None = None
    reference_noise: Array | None = None


class _Cloud(NamedTuple):
    """The particles between two steps.

    Attributes:
        mu: where each is expected next, `(particles, state)`.
        log_weights: look-ahead included, normalised.
        log_filtering: the same without it, not normalised.
        factors: of the noise of each one's next step, `(particles, state, noise)`, where it depends on the state.
    """

    mu: Array
    log_weights: Array
    log_filtering: Array
    factors: Array | None


def sweep(
    key: Array,
    task: Task,
    num_particles: int,
    linearize: str | Linearize | None,
    resample: Callable[[Array, Array], Array],
    ess_threshold: Array | float,
    reference: Array | None = None,
    reference_noise: Array | None = None,
) -> ParticleResult:
    """The filter; with a `reference` path `(time, state)`, or with its noise `(time, state)`, conditional SMC.

    The last particle then follows the reference, its ancestors drawn anew; the others are resampled at every step,
    independently of each other. Following the noise of the reference, in units of `Task.root`, it goes on from its new
    ancestor by the same noise, and needs no density of a transition.
    """
    model, y, u, _, _, potentials = task
    steps, N = len(y), num_particles
    t = jnp.arange(steps)
    statistic = model.statistic(y, None if u is None else u[0])
    everything = _Now(jax.random.split(key, steps), t, y, statistic, u, _next(u), potentials, None, None)
    everything = everything._replace(reference=reference, reference_noise=reference_noise)
    first, later = _first_and_rest(everything)
    update, updates = _updates(task)
    if update is not None:  # where nothing follows the first step, its own update stands in, and is not used
        follows = update if steps == 1 else _first_and_rest(updates)[0]
        first = first._replace(update=update, next_update=follows)
        later = later._replace(update=updates, next_update=_next(updates))
    even = jnp.full(N, -jnp.log(N), y.dtype)

    varies = task.chol_Q is None

    def visit(now: _Now, factor: Factor, each: int | None, mu: Array, log_weights: Array) -> tuple[_Cloud, tuple]:
        """Moves the particles from their means `mu`, and weighs them; `each` is the axis of `factor` over particles."""
        z, gain = _move(model, linearize, now, factor, each, mu)
        gain = gain + jax.vmap(lambda z: model.log_prob(now.y, z, now.u))(z)
        ahead = jax.vmap(lambda z: model.transition(z, now.u_next))(z).astype(y.dtype)
        look = jnp.zeros(N, y.dtype)
        if now.potential is not None:
            next_factor = task.factor(jnp.minimum(now.t + 1, steps - 1))
            look = jax.vmap(lambda mu: log_normaliser(now.next_update, next_factor, mu))(ahead)
            look = jnp.where(now.t < steps - 1, look, 0.0)
        log_weights, size = normalise((log_weights + gain + look).astype(y.dtype))
        look = jnp.where(jnp.isfinite(look), look, 0.0)  # such a particle has weight zero
        filtering = log_weights - look
        factors = None
        if varies:
            factors = jax.vmap(lambda z: model.noise(now.t + 1, z, now.u_next))(z).astype(y.dtype)
        return _Cloud(ahead, log_weights, filtering, factors), (z, log_weights, look, size, jax.nn.logsumexp(filtering))

    def step(cloud: _Cloud, now: _Now) -> tuple[_Cloud, tuple]:
        choose_key, move_key = jax.random.split(now.key)
        if reference is None and reference_noise is None:
            need = ess(cloud.log_weights) < ess_threshold * N
            chosen = jax.lax.cond(
                need, lambda: resample(choose_key, cloud.log_weights), lambda: jnp.arange(N, dtype=jnp.int32)
            )
            log_weights = jnp.where(need, even, cloud.log_weights)
        else:
            chosen, log_weights = _conditional(choose_key, task, now, cloud, reference_noise), even
        factor, each = (cloud.factors[chosen], 0) if cloud.factors is not None else (task.factor(now.t), None)
        cloud, out = visit(now._replace(key=move_key), factor, each, cloud.mu[chosen], log_weights)
        return cloud, (*out, chosen)

    start = jnp.broadcast_to(model.m0, (N, model.n_state))
    cloud, out = visit(first, task.chol_P0, None, start, even)
    out = (*out, jnp.arange(N, dtype=jnp.int32))
    _, rest = jax.lax.scan(step, cloud, later)
    z, log_weights, look, size, share, ancestors = (
        jnp.concatenate([a[None], b]) for a, b in zip(out, rest, strict=True)
    )
    if update is not None:
        size = size.at[0].add(log_normaliser(update, task.chol_P0, model.m0))
    # The estimate of p(y_{1:t}) is exp(sum of `size` up to t + `share` at t); at the end nothing looks ahead.
    return ParticleResult(
        log_likelihood=jnp.sum(size),
        log_likelihoods=size + jnp.diff(share, prepend=0.0),
        particles=z,
        log_weights=log_weights - look - share[:, None],
        ancestors=ancestors,
        ess=jax.vmap(ess)(log_weights),
        log_look_ahead=look,
    )


def _updates(task: Task) -> tuple[Update | None, Update | None]:
    """What conditioning on the potentials needs: for the first step, and for the later ones, all at once."""
    if task.potentials is None:
        return None, None
    first, rest = _first_and_rest(task.potentials)
    timed = bool(task.model.time_varying)
    factor = _first_and_rest(task.chol_Q)[1] if timed else task.chol_Q
    return condition(task.chol_P0, first), jax.vmap(condition, in_axes=(0 if timed else None, 0))(factor, rest)


def _first_and_rest(tree: Any) -> tuple[Any, Any]:
    return jax.tree.map(lambda x: x[0], tree), jax.tree.map(lambda x: x[1:], tree)


def _next(tree: Any) -> Any:
    """Entry `t + 1` in place of `t`; the last one stands twice."""
    return jax.tree.map(lambda x: jnp.concatenate([x[1:], x[-1:]]), tree)


def _move(
    model: NonlinearSSM, linearize: str | Linearize | None, now: _Now, factor: Factor, each: int | None, mu: Array
) -> tuple[Array, Array]:
    """New states `(particles, state)` from the transition's means, and `log p - log q` of the move.

    With potentials the normaliser is left out: the look-ahead of the step before has counted it.
    """
    draw_key, pull_key = jax.random.split(now.key)
    N = len(mu)
    if linearize is not None:
        return _move_linearised(model, rule(linearize), now, factor, each, mu)
    noise = standard_normal(draw_key, (N, factor.shape[-1]), mu.dtype)
    if now.update is None:
        z = mu + jax.vmap(apply_factor, in_axes=(each, 0))(factor, noise)
        return _with_reference(now, z, factor, each, mu), jnp.zeros(N, mu.dtype)
    pulls = standard_normal(pull_key, (N, now.update.columns), mu.dtype)
    z = jax.vmap(lambda mu, e, w: posterior_sample(now.update, factor, mu, e, w))(mu, noise, pulls)
    z = _with_reference(now, z, factor, each, mu)
    return z, -jax.vmap(lambda z: log_potential(now.potential, z))(z)


def _with_reference(now: _Now, z: Array, factor: Factor, each: int | None, mu: Array) -> Array:
    """The particles, the last one at the reference where there is one."""
    if now.reference is None and now.reference_noise is None:
        return z
    own: Any = now.reference
    if now.reference_noise is not None:
        root = triangularise(as_matrix(factor) if each is None else as_matrix(factor)[-1])
        own = mu[-1] + matvec(root, now.reference_noise)
    return jnp.concatenate([z[:-1], own[None]])


def _move_linearised(
    model: NonlinearSSM, linearize: Linearize, now: _Now, factor: Factor, each: int | None, mu: Array
) -> tuple[Array, Array]:
    """The affine update of each particle, in the noise that drives it: `z = mu + F x`, so that `F` may be singular."""
    root = triangularise(as_matrix(factor)) if each is None else jax.vmap(triangularise)(as_matrix(factor))
    noise = standard_normal(now.key, mu.shape, mu.dtype)

    def one(mu: Array, root: Array) -> tuple[Array, Array]:
        update = condition_on(model, mu, root, now.statistic, now.u, linearize, 1)
        return update.x, update.chol_x

    centre, chol = jax.vmap(one, in_axes=(0, each))(mu, root)
    x = centre + jax.vmap(matvec)(chol, noise)
    if not (now.reference is None and now.reference_noise is None):  # the noise that leads there
        own: Any = now.reference_noise
        if now.reference is not None:  # `F` is regular then
            last = root if each is None else root[-1]
            own = solve_lower(last, (now.reference - mu[-1])[:, None])[:, 0]
        e = solve_lower(chol[-1], (own - centre[-1])[:, None])[:, 0]
        x, noise = jnp.concatenate([x[:-1], own[None]]), jnp.concatenate([noise[:-1], e[None]])
    pivots = jnp.diagonal(chol, axis1=-2, axis2=-1)
    logdet = jnp.sum(jnp.log(jnp.where(pivots > 0, pivots, 1.0)), axis=-1)
    z = mu + jax.vmap(matvec, in_axes=(each, 0))(root, x)
    z = _with_reference(now, z, factor, each, mu)
    return z, 0.5 * jnp.sum(noise**2 - x**2, axis=-1) + logdet


def _conditional(key: Array, task: Task, now: _Now, cloud: _Cloud, noise: Array | None) -> Array:
    """Ancestors where the last particle is the reference: its own is drawn by how likely the reference follows."""
    others, own = jax.random.split(key)
    chosen = multinomial(others, cloud.log_weights)
    if noise is not None:
        if cloud.factors is None:
            moved = matvec(triangularise(as_matrix(task.factor(now.t))), noise[now.t])
        else:
            moved = jax.vmap(lambda factor: matvec(triangularise(factor), noise[now.t]))(cloud.factors)
        follows = rest_density(task, now.t, cloud.mu + moved, noise)
    else:
        each = None if cloud.factors is None else 0
        follows = follow_density(task.factor(now.t) if each is None else cloud.factors, cloud.mu, now.reference, each)
    last = multinomial(own, cloud.log_filtering + follows)[0]
    return jnp.concatenate([chosen[:-1], last[None]])


def follow_density(factor: Factor, mu: Array, z: Array, each: int | None = None) -> Array:
    """`log p(z | z_{t-1})` up to a constant, for the transition's means `mu (particles, state)`; `F` regular."""

    def one(factor: Factor, mu: Array) -> Array:
        root = triangularise(as_matrix(factor))
        white = solve_lower(root, (z - mu)[:, None])
        return -0.5 * jnp.sum(white**2) - jnp.sum(jnp.log(jnp.diagonal(root)))

    if each is not None:
        return jax.vmap(one)(factor, mu)
    white = solve_lower(triangularise(as_matrix(factor)), (z - mu).T)
    return -0.5 * jnp.sum(white**2, axis=0)


def rest_density(task: Task, t: Array, start: Array, noise: Array) -> Array:
    """`log p(y_t, ..., y_T)` given the states `start (particles, state)` at `t` and the noise of all later steps.

    The noise `(time, state)` is in units of `Task.root`. It is the same for all particles, so its own density does not
    count. One pass over the rest of the series.
    """
    model, steps = task.model, len(task.y)

    def at(x: Array | None, s: Array) -> Array | None:
        return None if x is None else x[s]

    def one(z: Array) -> Array:
        def step(s: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            z, total = carry
            total = total + model.log_prob(task.y[s], z, at(task.u, s)).astype(total.dtype)
            s = jnp.minimum(s + 1, steps - 1)
            u = at(task.u, s)
            ahead = model.transition(z, u).astype(z.dtype) + matvec(task.root(s, z, u), noise[s])
            return ahead, total

        total = jax.lax.fori_loop(t, steps, step, (z, jnp.zeros((), z.dtype)))[1]
        return jnp.where(jnp.isnan(total), -jnp.inf, total)

    return jax.vmap(one)(start)
