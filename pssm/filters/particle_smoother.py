"""Whole paths from particles: backward simulation, and conditional sequential Monte Carlo for Gibbs sampling.

Both ask how likely a state follows from each particle of the step before, so `chol_Q` must be regular.

Source:
    Backward simulation: Godsill, Doucet & West 2004. Conditional SMC: Andrieu, Doucet & Holenstein 2010. Ancestor
    sampling: Lindsten, Jordan & Schön 2014.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import as_float, check_count, check_finite, check_shape, is_traced
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Float, KeyLike
from pssm.filters.particle_sweep import ParticleResult, Proposal, Task, follow_density, prepare, sweep
from pssm.filters.resampling import multinomial, positions_to_indices
from pssm.linalg.low_rank import as_factor
from pssm.nonlinear import NonlinearSSM, check_nonlinear
from pssm.ssm import LinearGaussianSSM


def particle_smoother(
    key: KeyLike,
    model: NonlinearSSM | LinearGaussianSSM,
    result: ParticleResult,
    u: ArrayLike | None = None,
    *,
    num_paths: int,
) -> Float[Array, "paths time state"]:
    """Draws whole paths, roughly from `p(z_{1:T} | y_{1:T})`, by backward simulation through a filter's particles.

    The error goes to zero with the filter's number of particles. Cost: `O(num_paths particles)` per step.

    Args:
        key: JAX random key, another one than the filter's.
        model: the model that was filtered; `chol_Q` regular.
        result: from `particle_filter`.
        u: inputs `(time, input)`, as they were given to the filter.
        num_paths: number of paths.

    Returns:
        Paths `(num_paths, time, state)`.

    Raises:
        ValueError: `chol_Q` is singular, or a shape does not fit.
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
    regular = check_regular(model)
    steps, _, n = result.particles.shape
    if n != model.n_state:
        raise ValueError(f"`result` has {n} states and `model` {model.n_state}: give the model that was filtered.")
    inputs = None
    if u is not None:
        inputs = as_float("u", u).astype(model.m0.dtype)
        inputs = inputs[:, None] if inputs.ndim == 1 else inputs
        if inputs.ndim != 2 or len(inputs) != steps:
            raise ValueError(f"`u` must have shape ({steps}, input); got {inputs.shape}.")
    paths = _backward(key, model, as_factor("chol_Q", model.chol_Q), result, inputs, num_paths=num_paths)
    return regular * paths


@partial(jax.jit, static_argnames="num_paths")
def _backward(
    key: Array, model: NonlinearSSM, chol_Q: Any, result: ParticleResult, u: Array | None, *, num_paths: int
) -> Array:
    dtype = result.particles.dtype
    steps = len(result.particles)
    uniforms = jax.random.uniform(key, (steps, num_paths), dtype)
    last = positions_to_indices(jnp.exp(result.log_weights[-1]), uniforms[-1])
    final = result.particles[-1][last]

    def step(z: Array, xs: tuple) -> tuple[Array, Array]:
        particles, log_weights, uniforms, t, u_next = xs
        factor = jax.tree.map(lambda x: x[t + 1], chol_Q) if model.time_varying else chol_Q
        mu = jax.vmap(lambda z: model.transition(z, u_next))(particles)

        def choose(z: Array, uniform: Array) -> Array:
            logits = log_weights + follow_density(factor, mu, z)
            return positions_to_indices(jax.nn.softmax(logits), uniform[None])[0]

        z = particles[jax.vmap(choose)(z, uniforms)]
        return z, z

    xs = (result.particles[:-1], result.log_weights[:-1], uniforms[:-1], jnp.arange(steps - 1))
    _, earlier = jax.lax.scan(step, final, (*xs, None if u is None else u[1:]), reverse=True)
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
    few.

    Args:
        key: JAX random key.
        model: the model; `chol_Q` regular.
        y: observations `(time, obs)`, or `(time,)` for one variable; NaN entries are missing.
        reference: the path before, `(time, state)`.
        u: inputs `(time, input)`.
        num_particles: number of particles, the reference among them.
        proposal: as in `particle_filter`. Potentials must not depend on `reference`.

    Returns:
        A path `(time, state)`.

    Raises:
        ValueError: `chol_Q` is singular, or a shape does not fit.
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
    regular = check_regular(task.model)
    path = as_float("reference", reference).astype(task.y.dtype)
    check_shape("reference", path, (len(task.y), task.model.n_state), "time, state")
    check_finite("reference", path)
    return regular * _conditional_path(key, task, path, num_particles=num_particles, linearize=linearize)


@partial(jax.jit, static_argnames=("num_particles", "linearize"))
def _conditional_path(key: Array, task: Task, reference: Array, *, num_particles: int, linearize: Any) -> Array:
    sweep_key, last_key = jax.random.split(key)
    found = sweep(sweep_key, task, num_particles, linearize, multinomial, 1.0, reference)
    last = multinomial(last_key, found.log_weights[-1])[0]

    def step(i: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        particles, ancestors = xs
        return ancestors[i], particles[i]

    return jax.lax.scan(step, last, (found.particles, found.ancestors), reverse=True)[1]


def check_regular(model: NonlinearSSM) -> Array:
    """Refuses a singular `chol_Q`: a transition then has no density. Returns 1, or under `jit` NaN for such a one."""
    n, noise = model.chol_Q.shape[-2:]
    if noise < n:
        singular = np.True_
    else:
        factors = model.chol_Q.reshape(-1, n, noise)[bool(model.time_varying) :]
        smallest = jnp.linalg.svd(factors, compute_uv=False).min(axis=-1, initial=jnp.inf)
        scale = jnp.abs(factors).max(axis=(1, 2), initial=0.0)
        singular = jnp.any(smallest <= 4 * n * jnp.finfo(factors.dtype).eps * scale)
    if not is_traced(singular) and bool(singular):
        raise ValueError(
            "`chol_Q` is singular, so that the transition has no density and a path cannot be traced backward. Use "
            "`particle_filter` alone, or give the noise-free directions a little noise."
        )
    return jnp.where(singular, jnp.nan, 1.0)
