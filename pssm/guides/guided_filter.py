"""A particle filter steered by a guide's chain, for models known by their likelihood as a function of the path."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pssm._types import Array, Key
from pssm.distributions import LowRankChain
from pssm.filters.resampling import ess as ess_of
from pssm.filters.resampling import systematic
from pssm.linalg.low_rank import Factor, Update, log_normaliser, log_ratio, posterior_sample
from pssm.linalg.random import standard_normal


def guided_filter(
    key: Key, chain: LowRankChain, log_lik: Callable[[Array], Array], num_particles: int, block: int
) -> tuple[Array, Array]:
    """The estimate and the smallest ESS of `guided_paths`."""
    return guided_paths(key, chain, log_lik, num_particles, block, 0)[:2]


def guided_paths(
    key: Key, chain: LowRankChain, log_lik: Callable[[Array], Array], num_particles: int, block: int, num_paths: int
) -> tuple[Array, Array, Array]:
    """An estimate of `log int p(z) exp(log_lik(z)) dz`, unbiased before the logarithm, the smallest ESS, and paths.

    Particles move by the chain's conditionals. At a block's end their weight looks ahead, by the normaliser of the
    next conditional, `Z_{t+1}(z_t)`, which stands for the observations to come. The likelihood of a block is the
    difference that its states make to `log_lik` with a reference path elsewhere.

    Args:
        key: random key.
        chain: an unbatched chain.
        log_lik: log-likelihood of a path `(time, state)`, a sum over steps.
        num_particles: number of particles.
        block: steps between two looks at the weights.
        num_paths: trajectories of particles to draw by their weights in the end, `(num_paths, time, state)`. With such
            a path for each estimate, draws weighted by the estimates are of the exact posterior.
    """
    prior, N = chain.prior, num_particles
    steps = prior.num_steps - 1
    num_blocks = -(-steps // block)
    pad = num_blocks * block - steps
    shape = prior.event_shape
    reference = jnp.zeros(shape, chain.k.dtype) if chain.center is None else chain.center

    def blocks(x: Array) -> Array:
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (pad, *x.shape[1:]))])
        return x.reshape(num_blocks, block, *x.shape[1:])

    def one(a: dict[str, Any]) -> tuple[Array, Array, Array]:
        first, later = chain._updates(a)
        base = log_lik(reference)
        padded = jnp.concatenate([reference, jnp.broadcast_to(reference[-1:], (pad, *reference.shape[1:]))])

        def gained(start: Array | int, rows: Array) -> Array:
            """What the states `rows (N, length, state)` from `start` on add to the log-likelihood."""

            def path(z: Array) -> Array:
                whole = jax.lax.dynamic_update_slice(padded, z, (start, 0))
                return log_lik(whole[: prior.num_steps]) - base

            return jax.lax.map(path, rows, batch_size=min(N, 256))

        def draw(key: Array, update: Update, factor: Factor, mu: Array) -> tuple[Array, Array]:
            e_key, w_key = jax.random.split(key)
            noise = standard_normal(e_key, factor.shape[-1:], mu.dtype)
            z = posterior_sample(update, factor, mu, noise, standard_normal(w_key, (update.columns,), mu.dtype))
            return z, -log_ratio(update, factor, mu, z)

        def ahead(update: Update, now: dict[str, Any], z: Array) -> Array:
            """`log Z(z)` of the next conditional."""
            return jax.vmap(lambda x: log_normaliser(update, now["chol_Q"], prior.step(now, x)))(z)

        start_key, scan_key = jax.random.split(key)
        pick_key = jax.random.fold_in(scan_key, 2)
        draw_first = jax.vmap(lambda k: draw(k, first, a["chol_P0"], a["m0"]))
        z, weights = draw_first(jax.random.split(start_key, N))
        z_first = z
        weights = weights + gained(0, z[:, None])
        if not steps:
            paths = z[jax.random.categorical(pick_key, weights, shape=(num_paths,))][:, None]
            return base + jax.nn.logsumexp(weights) - jnp.log(N), ess_of(weights), paths

        timed = prior.timed(a)

        def step(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], Array]:
            z, weights = carry
            key, update, t, real = xs
            now = {**a, **t}
            move = jax.vmap(lambda k, x: draw(k, update, now["chol_Q"], prior.step(now, x)))
            moved, ratio = move(jax.random.split(key, N), z)
            z, weights = jnp.where(real, moved, z), weights + jnp.where(real, ratio, 0.0)
            return (z, weights), z

        def one_block(carry: tuple, xs: tuple) -> tuple[tuple, tuple]:
            z, weights, total = carry
            keys, resample_key, updates, t, real, start, (next_update, next_t, last) = xs
            (z, weights), rows = jax.lax.scan(step, (z, weights), (keys, updates, t, real))
            weights = weights + gained(start, jnp.moveaxis(rows, 0, 1))
            look = jnp.where(last, 0.0, ahead(next_update, {**a, **next_t}, z))
            seen = weights + look
            ess = ess_of(seen)
            need = (ess < 0.5 * N) & ~last
            chosen = jnp.where(need, systematic(resample_key, seen), jnp.arange(N))
            total = total + jnp.where(need, jax.nn.logsumexp(seen) - jnp.log(N), 0.0)
            weights = jnp.where(need, -look[chosen], weights)
            return (z[chosen], weights, total), (ess, (rows, chosen) if num_paths else ())

        following = jax.tree.map(lambda x: jnp.roll(blocks(x)[:, 0], -1, axis=0), (later, timed))
        last = jnp.arange(num_blocks) == num_blocks - 1
        xs = (
            jax.random.split(scan_key, num_blocks * block).reshape(num_blocks, block),
            jax.random.split(jax.random.fold_in(scan_key, 1), num_blocks),
            jax.tree.map(blocks, later),
            jax.tree.map(blocks, timed),
            (jnp.arange(num_blocks * block) < steps).reshape(num_blocks, block),
            1 + block * jnp.arange(num_blocks),
            (*following, last),
        )
        (_, weights, total), (ess, seen) = jax.lax.scan(one_block, (z, weights, jnp.zeros((), z.dtype)), xs)
        value = total + base + jax.nn.logsumexp(weights) - jnp.log(N)
        if not num_paths:
            return value, ess.min(), z_first[:0, None]

        def back(index: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
            rows, chosen = xs
            index = chosen[index]
            return index, rows[:, index]

        last_index = jax.random.categorical(pick_key, weights, shape=(num_paths,))
        index, rows = jax.lax.scan(back, last_index, seen, reverse=True)  # (blocks, block, paths, state)
        rest = rows.reshape(num_blocks * block, *rows.shape[2:])[:steps]
        return value, ess.min(), jnp.moveaxis(jnp.concatenate([z_first[index][None], rest]), 0, 1)

    return chain._map(one)
