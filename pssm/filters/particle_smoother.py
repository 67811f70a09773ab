"""Whole paths from particles: backward simulation, and conditional sequential Monte Carlo for Gibbs sampling.

Both ask how likely a state follows from each particle of the step before. A transition with a singular `chol_Q` has no
density. The noise that drives a path has one: there the later noise is kept, the path goes on from another particle by
the same noise, and the particle counts by the likelihood of the observations along it.

Source:
    Backward simulation: Godsill, Doucet & West 2004. Conditional SMC: Andrieu, Doucet & Holenstein 2010. Ancestor
    sampling: Lindsten, Jordan & Schön 2014; with the later noise kept (models that are not Markov in it): the same,
    section 5, and Lindsten & Schön 2013, section 4.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import as_float, check_count, check_finite, check_shape, is_traced
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Float, KeyLike
from pssm.filters.particle_sweep import (
    ParticleResult,
    Proposal,
    Task,
    follow_density,
    prepare,
    rest_density,
    sweep,
)
from pssm.filters.resampling import multinomial, positions_to_indices
from pssm.linalg import solve_lower, triangularise
from pssm.linalg.low_rank import as_factor, as_matrix
from pssm.linalg.small import matvec
from pssm.nonlinear import NonlinearSSM, check_nonlinear
from pssm.ssm import LinearGaussianSSM


def particle_smoother(
    key: KeyLike,
    model: NonlinearSSM | LinearGaussianSSM,
    result: ParticleResult,
    u: ArrayLike | None = None,
    *,
    num_paths: int,
    y: ArrayLike | None = None,
) -> Float[Array, "paths time state"]:
    """Draws whole paths, roughly from `p(z_{1:T} | y_{1:T})`, by backward simulation through a filter's particles.

    The error goes to zero with the filter's number of particles. Cost: `O(num_paths particles)` per step.

    With a singular `chol_Q` a path follows the ancestors of a particle of the last step. The early states of the paths
    then come from few particles: take many. With `y` the paths are drawn through the noise that drives them, at a cost
    of `O(num_paths particles time)` per step; this helps where a difference of the states dies out.

    Args:
        key: JAX random key, another one than the filter's.
        model: the model that was filtered.
        result: from `particle_filter`.
        u: inputs `(time, input)`, as they were given to the filter.
        num_paths: number of paths.
        y: the observations, as they were given to the filter; of use with a singular `chol_Q` alone.

    Returns:
        Paths `(num_paths, time, state)`.

    Raises:
        ValueError: a shape does not fit.
        TypeError: `result` is not from `particle_filter`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> from pssm.filters import particle_filter
        >>> model = NonlinearSSM(jnp.zeros(1), jnp.eye(1), lambda z, u: 0.9 * z, 0.3 * jnp.eye(1),
        ...                      lambda z: dist.Poisson(jnp.exp(z)).to_event(1))
        >>> found = particle_filter(jax.random.key(0), model, [1, 0, 0, 2], num_particles=100)
        >>> particle_smoother(jax.random.key(1), model, found, num_paths=20).shape
        (20, 4, 1)
    """
    key = as_key(key)
    check_count("num_paths", num_paths)
    if not isinstance(result, ParticleResult):
        raise TypeError(f"`result` must be a ParticleResult, from `particle_filter`; got {type(result).__name__}.")
    model = check_nonlinear(model)
    steps, _, n = result.particles.shape
    if n != model.n_state:
        raise ValueError(f"`result` has {n} states and `model` {model.n_state}: give the model that was filtered.")
    inputs = None
    if u is not None:
        inputs = as_float("u", u).astype(model.m0.dtype)
        inputs = inputs[:, None] if inputs.ndim == 1 else inputs
        if inputs.ndim != 2 or len(inputs) != steps:
            raise ValueError(f"`u` must have shape ({steps}, input); got {inputs.shape}.")
    series = jnp.full((steps, model.emission_size(None if inputs is None else inputs[0])), jnp.nan, model.m0.dtype)
    if y is not None:
        series = model.check_series(y, u)[0].astype(series.dtype)
        if len(series) != steps:
            raise ValueError(f"`y` must have {steps} steps, as `result`; got {len(series)}.")
    noise = None if model.noise_function is not None else as_factor("chol_Q", model.chol_Q)
    task = Task(model, series, inputs, as_factor("chol_P0", model.chol_P0), noise, None)
    by_noise = partial(_trace if y is None else _backward_by_noise, num_paths=num_paths)
    singular = is_singular(task)
    return _either(singular, by_noise, partial(_backward, num_paths=num_paths), key, task, result)


def _either(singular: Any, by_noise: Any, by_density: Any, *args: Any) -> Array:
    """One of the two ways; traced, both are compiled and one is run."""
    if is_traced(singular):
        return jax.lax.cond(singular, by_noise, by_density, *args)
    return (by_noise if bool(singular) else by_density)(*args)


@partial(jax.jit, static_argnames="num_paths")
def _trace(key: Array, task: Task, result: ParticleResult, *, num_paths: int) -> Array:
    """Paths along the ancestors of particles of the last step."""
    uniforms = jax.random.uniform(key, (num_paths,), result.particles.dtype)
    last = positions_to_indices(jnp.exp(result.log_weights[-1]), uniforms)
    return jax.vmap(partial(_along_ancestors, result))(last)


def _along_ancestors(result: ParticleResult, last: Array) -> Array:
    def step(i: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        particles, ancestors = xs
        return ancestors[i], particles[i]

    return jax.lax.scan(step, last, (result.particles, result.ancestors), reverse=True)[1]


@partial(jax.jit, static_argnames="num_paths")
def _backward_by_noise(key: Array, task: Task, result: ParticleResult, *, num_paths: int) -> Array:
    """Backward simulation in the noise: each particle goes on by the noise that is already drawn."""
    z, steps = result.particles, len(result.particles)
    before = jax.vmap(lambda z, chosen: z[chosen])(z[:-1], result.ancestors[1:])
    times = jnp.arange(1, steps)
    noise = jax.vmap(lambda *xs: jax.vmap(lambda z, new: noise_of_step(task, xs[0], z, new, xs[3]))(xs[1], xs[2]))(
        times, before, z[1:], None if task.u is None else task.u[1:]
    )
    noise = jnp.concatenate([jnp.zeros_like(z[:1]), noise])  # entry 0 is not used: the first state is taken itself
    uniforms = jax.random.uniform(key, (num_paths, steps), z.dtype)

    def one(uniforms: Array) -> Array:
        last = positions_to_indices(jnp.exp(result.log_weights[-1]), uniforms[-1:])[0]
        own = jnp.zeros(z.shape[::2], z.dtype).at[-1].set(noise[-1, last])

        def step(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            own, _ = carry
            t = steps - 2 - k
            # `y_t` itself is in the weights already.
            follows = rest_density(task, t, z[t], own) - _densities(task, t, z[t])
            logits = result.log_weights[t] + jnp.where(jnp.isnan(follows), -jnp.inf, follows)
            i = positions_to_indices(jax.nn.softmax(logits), uniforms[t][None])[0]
            return own.at[t].set(noise[t, i]), i

        own, first = jax.lax.fori_loop(0, steps - 1, step, (own, last))
        return path_of_noise(task, z[0, first], own)

    return jax.lax.map(one, uniforms)


def _densities(task: Task, t: Array, z: Array) -> Array:
    return jax.vmap(lambda z: task.model.log_prob(task.y[t], z, None if task.u is None else task.u[t]))(z)


def noise_of_step(task: Task, t: Array, z: Array, new: Array, u: Array | None) -> Array:
    """The noise, in units of `Task.root`, that leads from `z` to the state `new` at step `t`."""
    apart = new - task.model.transition(z, u).astype(new.dtype)
    return solve_lower(task.root(t, z, u), apart[:, None])[:, 0]


def path_of_noise(task: Task, first: Array, noise: Array) -> Array:
    """The path from its first state by the noise of the later steps, `(time, state)`."""

    def step(z: Array, xs: tuple) -> tuple[Array, Array]:
        t, e, u = xs
        z = task.model.transition(z, u).astype(z.dtype) + matvec(task.root(t, z, u), e)
        return z, z

    steps = len(noise)
    xs = jnp.arange(1, steps), noise[1:], None if task.u is None else task.u[1:]
    return jnp.concatenate([first[None], jax.lax.scan(step, first, xs)[1]])


@partial(jax.jit, static_argnames="num_paths")
def _backward(key: Array, task: Task, result: ParticleResult, *, num_paths: int) -> Array:
    dtype = result.particles.dtype
    steps, model = len(result.particles), task.model
    uniforms = jax.random.uniform(key, (steps, num_paths), dtype)
    last = positions_to_indices(jnp.exp(result.log_weights[-1]), uniforms[-1])
    final = result.particles[-1][last]

    def step(z: Array, xs: tuple) -> tuple[Array, Array]:
        particles, log_weights, uniforms, t, u_next = xs
        mu = jax.vmap(lambda z: model.transition(z, u_next))(particles)
        if task.chol_Q is None:
            factor, each = jax.vmap(lambda z: model.noise(t + 1, z, u_next))(particles), 0
        else:
            factor, each = task.factor(t + 1), None

        def choose(z: Array, uniform: Array) -> Array:
            logits = log_weights + follow_density(factor, mu, z, each)
            return positions_to_indices(jax.nn.softmax(logits), uniform[None])[0]

        z = particles[jax.vmap(choose)(z, uniforms)]
        return z, z

    xs = (result.particles[:-1], result.log_weights[:-1], uniforms[:-1], jnp.arange(steps - 1))
    _, earlier = jax.lax.scan(step, final, (*xs, None if task.u is None else task.u[1:]), reverse=True)
    return jnp.moveaxis(jnp.concatenate([earlier, final[None]]), 0, 1)


def conditional_smc(
    key: KeyLike,
    model: NonlinearSSM | LinearGaussianSSM,
    y: ArrayLike,
    reference: ArrayLike,
    u: ArrayLike | None = None,
    *,
    num_particles: int,
    proposal: Proposal = None,
) -> Float[Array, "time state"]:
    """A new path given an old one, so that `p(z_{1:T} | y_{1:T})` stays as it is: a step of MCMC over whole paths.

    One of the particles follows the reference, with ancestors drawn anew (ancestor sampling); the others are resampled
    at every step, independently. The path that comes back is one of the particles' at the end. It leaves the posterior
    invariant for any number of particles from 2, and moves on the faster the more there are; a guided proposal needs
    few. With a singular `chol_Q` the reference keeps its noise when its ancestor changes; this costs one pass over the
    rest of the series for each particle and step.

    Args:
        key: JAX random key.
        model: the model.
        y: observations `(time, obs)`, or `(time,)` for one variable; NaN entries are missing.
        reference: the path before, `(time, state)`.
        u: inputs `(time, input)`.
        num_particles: number of particles, the reference among them.
        proposal: as in `particle_filter`. Potentials must not depend on `reference`.

    Returns:
        A path `(time, state)`.

    Raises:
        ValueError: a shape does not fit, or `reference` is a path that the noise cannot make.
        TypeError: `proposal` is none of these.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist
        >>> model = NonlinearSSM(jnp.zeros(1), jnp.eye(1), lambda z, u: 0.9 * z, 0.3 * jnp.eye(1),
        ...                      lambda z: dist.Poisson(jnp.exp(z)).to_event(1))
        >>> conditional_smc(jax.random.key(0), model, [1, 0, 0, 2], jnp.zeros((4, 1)), num_particles=20).shape
        (4, 1)
    """
    key = as_key(key)
    check_count("num_particles", num_particles, least=2)
    task, linearize = prepare(model, y, u, num_particles, proposal)
    path = as_float("reference", reference).astype(task.y.dtype)
    check_shape("reference", path, (len(task.y), task.model.n_state), "time, state")
    check_finite("reference", path)
    options = {"num_particles": num_particles, "linearize": linearize}
    ways = partial(_conditional_by_noise, **options), partial(_conditional_path, **options)
    found = _either(is_singular(task), *ways, key, task, path)
    if not is_traced(found) and bool(jnp.isnan(found).any()):
        raise ValueError(
            "`reference` is not a path that the noise can make: `chol_Q` is singular, and a step of the path goes "
            "where there is no noise. Start from a draw of the model, or from a path of `particle_smoother`."
        )
    return found


@partial(jax.jit, static_argnames=("num_particles", "linearize"))
def _conditional_path(key: Array, task: Task, reference: Array, *, num_particles: int, linearize: Any) -> Array:
    sweep_key, last_key = jax.random.split(key)
    found = sweep(sweep_key, task, num_particles, linearize, multinomial, 1.0, reference)
    return _along_ancestors(found, multinomial(last_key, found.log_weights[-1])[0])


@partial(jax.jit, static_argnames=("num_particles", "linearize"))
def _conditional_by_noise(key: Array, task: Task, reference: Array, *, num_particles: int, linearize: Any) -> Array:
    """The same in the noise of the path; NaN where the noise cannot make the reference."""
    model = task.model
    first = solve_lower(triangularise(as_matrix(task.chol_P0)), (reference[0] - model.m0)[:, None])[:, 0]
    times, inputs = jnp.arange(1, len(reference)), None if task.u is None else task.u[1:]
    later = jax.vmap(partial(noise_of_step, task))(times, reference[:-1], reference[1:], inputs)
    made = jax.vmap(lambda t, z, e, u: model.transition(z, u).astype(z.dtype) + matvec(task.root(t, z, u), e))(
        times, reference[:-1], later, inputs
    )
    start = model.m0 + matvec(triangularise(as_matrix(task.chol_P0)), first)
    apart = jnp.abs(jnp.concatenate([start[None], made]) - reference)
    allowed = jnp.finfo(reference.dtype).eps ** 0.5 * (1.0 + jnp.max(jnp.abs(reference)))
    sweep_key, last_key = jax.random.split(key)
    noise = jnp.concatenate([first[None], later])
    found = sweep(sweep_key, task, num_particles, linearize, multinomial, 1.0, reference_noise=noise)
    path = _along_ancestors(found, multinomial(last_key, found.log_weights[-1])[0])
    return jnp.where(jnp.max(apart) <= allowed, path, jnp.nan)


def is_singular(task: Task) -> Any:
    """Whether the noise is singular, so that a transition has no density; a function is asked at `m0`."""
    model = task.model
    if task.chol_Q is None:
        factors = model.noise(0, model.m0, None if task.u is None else task.u[0])[None]
    else:
        factors = model.chol_Q.reshape(-1, *model.chol_Q.shape[-2:])[bool(model.time_varying) :]
    n, noise = factors.shape[-2:]
    if noise < n:
        return np.True_
    smallest = jnp.linalg.svd(factors, compute_uv=False).min(axis=-1, initial=jnp.inf)
    scale = jnp.abs(factors).max(axis=(1, 2), initial=0.0)
    return jnp.any(smallest <= 4 * n * jnp.finfo(factors.dtype).eps * scale)
