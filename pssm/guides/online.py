"""Filtering online with a causal encoder: one observation at a time, compiled once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Float, Key, KeyLike
from pssm.distributions import StatePath
from pssm.distributions.moment_matched import assimilate, predict
from pssm.linalg.low_rank import (
    Diagonal,
    Factor,
    as_matrix,
    condition,
    posterior_mean,
    posterior_sample,
    posterior_variance,
)
from pssm.linalg.potential import Potential
from pssm.linalg.random import standard_normal
from pssm.modes.mode import noise_scale
from pssm.nets.potentials import as_pseudo_observation


class Clipped(eqx.Module):
    """A transition whose image is clipped to `[-limit, limit]`, and its argument to twice that."""

    transition: Callable[..., Array]
    limit: Array

    def __call__(self, z: Array, u: Array | None) -> Array:
        """The clipped mean."""
        z = jnp.clip(z, -2 * self.limit, 2 * self.limit)
        return jnp.clip(self.transition(z, u), -self.limit, self.limit)


class Belief(NamedTuple):
    """What is known of the state after an observation, under the guide.

    Attributes:
        mean: `(state,)`.
        variance: `(state,)`.
        particles: draws, `(num_samples, state)`.
    """

    mean: Float[Array, " state"]
    variance: Float[Array, " state"]
    particles: Float[Array, "num_samples state"]


class OnlineState(NamedTuple):
    """What a filter carries from step to step: the encoder's state, the particles and a random key."""

    encoder: Any
    particles: Float[Array, "num_samples state"]
    key: Key


class OnlineFilter(NamedTuple):
    """A causal guide step by step; made by `AmortizedStateSpace.online`.

    Attributes:
        start: `start(key, y, u=None) -> (OnlineState, Belief)`, the first observation `(obs,)` with NaN for missing.
        step: `step(state, y, u=None) -> (OnlineState, Belief)`, each later one. Compiled at its first call; takes and
            gives arrays, so `jax.lax.scan` and `jax.vmap` (over series) work on it.
        assimilate: `assimilate(state, y, u, noise) -> (OnlineState, Belief)`, the same with given standard normal
            `noise`, `(num_samples, noise_size)`.
        noise_size: how many normal numbers a particle takes.
    """

    start: Callable[..., tuple[OnlineState, Belief]]
    step: Callable[..., tuple[OnlineState, Belief]]
    assimilate: Callable[..., tuple[OnlineState, Belief]]
    noise_size: int


def online_filter(
    encode: Any, prior: StatePath, family: str, rank: int, diagonal: bool, num_samples: int
) -> OnlineFilter:
    """The filter of an encoder and a prior that is the same at every step; see `AmortizedStateSpace.online`."""
    if not (hasattr(encode, "start") and hasattr(encode, "step")):
        raise ValueError("`encoder` must have `start()` and `step(state, y, u)` to filter online; see `pssm.nets`.")
    if prior.batch_shape or prior.time_varying:
        raise ValueError(
            "`online` needs a path whose arrays have no batch axes and are the same at every step; "
            f"got batch shape {prior.batch_shape}, time-varying {prior.time_varying}."
        )
    arrays = {name: x for name, x in prior.arrays()[0].items() if name != "u"}
    sd = noise_scale(prior)[-1:]
    widths = prior.chol_P0.shape[-1], prior.chol_Q.shape[-1]
    matched = family == "moment_matched"
    if matched:
        noise_size = max(widths) + rank + num_samples
    else:
        plain = isinstance(prior.chol_P0, Diagonal) and isinstance(prior.chol_Q, Diagonal)
        noise_size = max(widths) + rank + (prior.n_state if diagonal and not plain else 0)

    def potential(state: Any, y: Array, u: Array | None) -> tuple[Any, Potential]:
        state, found = encode.step(state, y, u)
        found = as_pseudo_observation(jax.tree.map(lambda x: x[None], found), sd, rank, diagonal).psi()
        return state, jax.tree.map(lambda x: x[0], found)

    def chain(factor: Factor, means: Array, p: Potential, noise: Array) -> Belief:
        update = condition(factor, p)
        width, columns = factor.shape[-1], update.columns
        e, w = noise[:, :width], noise[:, max(widths) : max(widths) + columns]
        z = jax.vmap(lambda mu, e, w: posterior_sample(update, factor, mu, e, w))(means, e, w)
        centres = jax.vmap(lambda mu: posterior_mean(update, mu))(means)
        return Belief(centres.mean(0), centres.var(0) + posterior_variance(update, factor), z)

    def gaussian(factor: Factor, mean: Array, spread: Array, p: Potential, noise: Array) -> Belief:
        z, found = assimilate(factor, mean, spread, p, noise)
        own = jnp.sum(as_matrix(factor) ** 2, axis=1)
        return Belief(found.mean, own + jnp.sum(spread**2, 1) - jnp.sum(found.cut**2, 1), z)

    def first(state: Any, y: Array, u: Array | None, noise: Array) -> tuple[Any, Belief]:
        state, p = potential(state, y, u)
        if matched:
            spread = jnp.zeros((prior.n_state, num_samples), prior.m0.dtype)
            return state, gaussian(prior.chol_P0, prior.m0, spread, p, noise)
        return state, chain(prior.chol_P0, jnp.broadcast_to(prior.m0, (num_samples, prior.n_state)), p, noise)

    def later(state: OnlineState, y: Array, u: Array | None, noise: Array) -> tuple[OnlineState, Belief]:
        now = arrays if u is None else {**arrays, "u": u}
        own, p = potential(state.encoder, y, u)
        if matched:
            belief = gaussian(prior.chol_Q, *predict(prior, now, state.particles), p, noise)
        else:
            belief = chain(prior.chol_Q, jax.vmap(lambda z: prior.step(now, z))(state.particles), p, noise)
        return OnlineState(own, belief.particles, state.key), belief

    def draw(key: Key) -> tuple[Key, Array]:
        key, own = jax.random.split(key)
        return key, standard_normal(own, (num_samples, noise_size), prior.m0.dtype)

    def start(key: KeyLike, y: ArrayLike, u: ArrayLike | None = None) -> tuple[OnlineState, Belief]:
        key = as_key(key)
        key, noise = draw(key)
        own, belief = first(encode.start(), _as_array(y, prior), _as_array(u, prior), noise)
        return OnlineState(own, belief.particles, key), belief

    def step(state: OnlineState, y: ArrayLike, u: ArrayLike | None = None) -> tuple[OnlineState, Belief]:
        key, noise = draw(state.key)
        state, belief = later(state, _as_array(y, prior), _as_array(u, prior), noise)
        return state._replace(key=key), belief

    def given_noise(state: OnlineState | None, y: Array, u: Array | None, noise: Array) -> tuple[OnlineState, Belief]:
        if state is None:
            own, belief = first(encode.start(), y, u, noise)
            return OnlineState(own, belief.particles, jax.random.key(0)), belief
        return later(state, y, u, noise)

    return OnlineFilter(jax.jit(start), jax.jit(step), jax.jit(given_noise), noise_size)


def _as_array(x: ArrayLike | None, prior: StatePath) -> Any:
    return None if x is None else jnp.asarray(x, prior.m0.dtype)
