"""Paths of a model that has integrated them out: by weights from the chains of its approximation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Array, Key
from pssm.fitting.draws import trace_with
from pssm.guides.guided_filter import guided_paths
from pssm.linalg.random import standard_normal

BLOCK = 10  # steps between two looks at the filter's weights
TOGETHER = 50  # draws in a piece of a compiled program


def by_paths(key: Key, chain: Any, log_lik: Any, size: int, picks: int) -> tuple[Array, Array, Array]:
    """Of the likelihood of each series: the log estimate, the sd of one path's log weight, paths by their weights.

    Args:
        key: random key.
        chain: a `LowRankChain`, the proposal.
        log_lik: of a path `(*batch, time, state)`, `(*batch,)`.
        size: paths, in pairs of opposite noise.
        picks: paths to return, `(picks, *batch, time, state)`.
    """
    noise_key, pick_key = jax.random.split(key)
    half = standard_normal(noise_key, (size // 2, *chain.batch_shape, chain.prior.noise_size), chain.K.dtype)
    paths = chain.path_from_noise(jnp.concatenate([half, -half]))
    weights = jax.vmap(log_lik)(paths) - chain.log_ratio(paths)
    weights = jnp.where(jnp.isnan(weights), -jnp.inf, weights)
    value = jax.nn.logsumexp(weights, axis=0) - jnp.log(size)
    chosen = jax.random.categorical(pick_key, weights, axis=0, shape=(picks, *weights.shape[1:]))
    spread = jnp.where(jnp.isfinite(weights).all(0), jnp.std(weights, axis=0), jnp.inf)
    return value, spread, jnp.take_along_axis(paths, chosen[..., None, None], axis=0)


def by_filter(key: Key, chain: Any, log_lik: Any, size: int, picks: int) -> tuple[Array, Array, Array]:
    """The same by a particle filter that the chain steers; of a single series."""
    value, _, paths = guided_paths(key, chain, log_lik, size, min(BLOCK, chain.prior.num_steps), picks)
    return value, jnp.zeros(()), paths


def deterministic(model: Any, values: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The deterministic sites of draws `(draw, ...)`."""

    def one(row: dict[str, Array]) -> dict[str, Array]:
        trace = trace_with(model, row, *args, **kwargs)
        return {n: site["value"] for n, site in trace.items() if site["type"] == "deterministic" and n not in row}

    rows = {n: jnp.asarray(x) for n, x in values.items()}
    found = jax.jit(lambda rows: jax.lax.map(one, rows, batch_size=TOGETHER))(rows)
    return {n: np.asarray(x) for n, x in found.items()}


def paths_at(
    model: Any, params: dict[str, Any], count: int, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Draws `(1, count, ...)` of the paths given the parameters, with all other sites."""

    def draw(params: dict[str, Array], key: Key) -> dict[str, Array]:
        found = model.posterior(params, *args, **kwargs)
        paths = {
            n: by_paths(jax.random.fold_in(key, i), chain, found.series[n].log_lik, 2 * count, count)[2]
            for i, (n, chain) in enumerate(found.chains.items())
        }
        return jax.vmap(found.split)(paths)

    paths = jax.jit(draw)({n: jnp.asarray(x) for n, x in params.items()}, key)
    values = {n: np.broadcast_to(x, (count, *np.shape(x))) for n, x in params.items()}
    values |= {n: np.asarray(x) for n, x in paths.items()}
    return {n: x[None] for n, x in {**values, **deterministic(model.plain_model, values, args, kwargs)}.items()}
