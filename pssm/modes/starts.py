"""Paths from which the search for a mode may begin, where there may be several modes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pssm._types import Array, Key
from pssm.distributions import StatePath
from pssm.linalg.low_rank import apply_factor
from pssm.linalg.random import standard_normal
from pssm.nonlinear import NonlinearSSM

PARTICLES = 50


def further_starts(model: NonlinearSSM, y: Array, u: Array | None) -> Callable[[Array], Array]:
    """`k -> path`, for `mode_path`: a path of few particles, with random numbers that are the same in each call.

    Particles go where the data are explained: into the mode that has most of the mass, as a rule, where the path
    without noise may lie in the basin of another one, or on a saddle.
    """
    prior = StatePath.from_ssm(model, len(y), u)
    return lambda k: particle_path(jax.random.fold_in(jax.random.key(0), k), model, prior, y, u)


def particle_path(key: Key, model: NonlinearSSM, prior: StatePath, y: Array, u: Array | None) -> Array:
    """A path of a small bootstrap filter, traced back from its heaviest particle at the end."""
    arrays, _ = prior.arrays()
    steps, count, dtype = prior.num_steps, PARTICLES, prior.m0.dtype
    noise_key, shift_key = jax.random.split(key)
    noise = standard_normal(noise_key, (steps, count, max(f.shape[-1] for f in (prior.chol_P0, prior.chol_Q))), dtype)
    shifts = jax.random.uniform(shift_key, (steps,), dtype)

    def weights(z: Array, y: Array, u: Array | None) -> Array:
        found = jax.vmap(lambda x: model.log_prob(y, x, u))(z)
        return jnp.where(jnp.isfinite(found), found, -jnp.inf)

    def chosen(log_w: Array, shift: Array) -> Array:
        """Systematic resampling; all alike where no weight is finite."""
        top = jnp.max(log_w)
        share = jnp.where(jnp.isfinite(top), jnp.exp(log_w - jnp.where(jnp.isfinite(top), top, 0.0)), 1.0)
        edges = jnp.cumsum(share / jnp.sum(share))
        found = jnp.searchsorted(edges, (jnp.arange(count) + shift) / count)
        return jnp.minimum(found, count - 1)

    n = prior.n_state
    first = arrays["m0"] + jax.vmap(lambda e: apply_factor(arrays["chol_P0"], e))(noise[0, :, :n])
    now = None if u is None else u[0]

    def step(state: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        z, log_w = state
        e, shift, y, u, timed = xs
        a = {**arrays, **timed}
        parents = chosen(log_w, shift)
        width = prior.chol_Q.shape[-1]
        moved = jax.vmap(lambda x, e: prior.step(a, x) + apply_factor(a["chol_Q"], e[:width]))(z[parents], e)
        moved = jnp.where(jnp.isfinite(moved), moved, z[parents])
        return (moved, weights(moved, y, u)), (moved, parents)

    later_u = None if u is None else u[1:]
    start = first, weights(first, y[0], now)
    (_, last), (paths, parents) = jax.lax.scan(
        step, start, (noise[1:], shifts[1:], y[1:], later_u, prior.timed(arrays))
    )

    def back(i: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        z, parents = xs
        return parents[i], z[i]

    heaviest = jnp.argmax(last).astype(parents.dtype)
    root, rest = jax.lax.scan(back, heaviest, (paths, parents), reverse=True)
    return jnp.concatenate([first[root][None], rest])
