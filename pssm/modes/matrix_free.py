"""One Gauss-Newton step on a path whose states are large: messages as a diagonal plus a low rank.

The recursions are those of `mode.py`, with `J_t = diag(delta_t) + K_t K_t'` found by products with columns: of the
transition's Jacobian and its transpose, and of the likelihood's Hessian. A stationary path is a fixed point whatever
the `J_t` are (put `h = -Q^{-1} o` in), and the move is a positive definite matrix times the gradient: so the
compression changes how fast the mode is reached, and how sharp the potentials are there, but not the mode.

Source:
    Range finder: Halko, Martinsson & Tropp 2011. Diagonal from probes: Bekas, Kokiopoulou & Saad 2007.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.batch import map_batch
from pssm.distributions import StatePath
from pssm.linalg.low_rank import (
    Factor,
    condition,
    posterior_mean,
    posterior_slope,
    posterior_variance,
)
from pssm.linalg.potential import Potential
from pssm.linalg.small import matmul
from pssm.modes.coupled import hessian_times

PROBES = 64  # random vectors for the diagonal of a message
OVERSAMPLING = 8  # columns of the range finder beyond the rank
ROUNDS = 4  # of the principal-factor iteration, on the way to the mode; in the end five times as many


class LowRankStep(NamedTuple):
    """One step from a path: where to move, and the messages about the path. Names as in `mode.GaussNewton`.

    Attributes:
        move: `(..., time, state)`.
        slope: `(..., time, state)`.
        diagonal: `(..., time, state)`.
        factor: `(..., time, state, rank)`.
        variance: `(..., time, state)`.
    """

    move: Array
    slope: Array
    diagonal: Array
    factor: Array
    variance: Array


def gauss_newton_matrix_free(
    prior: StatePath, log_lik: Callable[[Array], Array], path: Array, *, sd: Array, rank: int, diagonal: bool
) -> LowRankStep:
    """The step from `path`; `sd` are the noise's standard deviations.

    Costs `O(time state rank)` and some `PROBES` products with the transition's Jacobian and the likelihood's Hessian.
    """
    gradient, times = hessian_times(log_lik, path)
    gradient = jnp.nan_to_num(gradient, posinf=0.0, neginf=0.0)
    n, wide = prior.n_state, min(rank + OVERSAMPLING, prior.n_state)  # messages keep more than is asked for
    probes = jax.random.rademacher(jax.random.key(0), (n, PROBES), path.dtype)
    sketch = jax.random.normal(jax.random.key(1), (n, min(wide + OVERSAMPLING, n)), path.dtype)

    def hessian(columns: Array) -> Array:
        """Minus the Hessian blocks of the likelihood times columns `(..., time, state, many)`."""
        return jnp.nan_to_num(-jnp.moveaxis(jax.lax.map(times, jnp.moveaxis(columns, -1, 0)), 0, -1))

    sd = jnp.broadcast_to(sd, path.shape)
    seen_delta, seen_K = _compress(hessian, sd, probes, sketch, wide, diagonal)

    def one(a: dict[str, Any]) -> LowRankStep:
        z, timed = a["z"], prior.timed(a)

        def back(message: tuple[Array, Array, Array], xs: tuple) -> tuple[tuple, tuple]:
            h, delta, K = message
            g, seen_delta, seen_K, z, z_next, sd, t = xs
            now = {**a, **t}
            update = condition(now["chol_Q"], Potential(K, delta, slope=h))
            mean, jacobian = jax.linearize(lambda x: prior.step(now, x), z)
            transposed = jax.linear_transpose(jacobian, z)
            pull = jax.vmap(lambda x: transposed(x)[0], in_axes=1, out_axes=1)
            push = jax.vmap(jacobian, in_axes=1, out_axes=1)
            carried = pull(update.shrink[:, None] * matmul(K, update.inverse.T))
            thick = jnp.concatenate([seen_K, carried], axis=1)
            thin = update.shrink * delta

            def message_times(columns: Array) -> Array:
                own = seen_delta[:, None] * columns + matmul(thick, matmul(thick.T, columns))
                return own + pull(thin[:, None] * push(columns))

            h = g + pull(posterior_slope(update, mean - z_next)[:, None])[:, 0]
            message = h, *_compress(message_times, sd, probes, sketch, wide, diagonal)
            return message, message

        last = a["g"][-1], a["delta"][-1], a["K"][-1]
        xs = a["g"][:-1], a["delta"][:-1], a["K"][:-1], z[:-1], z[1:], a["sd"][:-1], timed
        _, messages = jax.lax.scan(back, last, xs, reverse=True)
        h, delta, K = (jnp.concatenate([x, y[None]]) for x, y in zip(messages, last, strict=True))

        def absorb(factor: Factor, h: Array, delta: Array, K: Array, mu: Array) -> tuple[Array, Array, Array]:
            update = condition(factor, Potential(K, delta, slope=h))
            return posterior_mean(update, mu), posterior_slope(update, mu), posterior_variance(update, factor)

        first = absorb(a["chol_P0"], h[0], delta[0], K[0], a["m0"] - z[0])

        def forward(x: Array, xs: tuple) -> tuple[Array, tuple]:
            h, delta, K, z, z_next, t = xs
            now = {**a, **t}
            mean, moved = jax.jvp(lambda s: prior.step(now, s), (z,), (x,))
            found = absorb(now["chol_Q"], h, delta, K, mean - z_next + moved)
            return found[0], found

        _, rest = jax.lax.scan(forward, first[0], (h[1:], delta[1:], K[1:], z[:-1], z[1:], timed))
        move, w, variance = (jnp.concatenate([f[None], r]) for f, r in zip(first, rest, strict=True))
        return LowRankStep(move, w, delta, K, variance)

    arrays, cores = prior.arrays()
    values = {"z": path, "g": gradient, "delta": seen_delta, "K": seen_K, "sd": sd}
    own = {"z": 2, "g": 2, "delta": 2, "K": 3, "sd": 2}
    found = map_batch(one, path.shape[:-2], {**arrays, **values}, {**cores, **own})

    def messages(columns: Array) -> Array:
        return found.diagonal[..., None] * columns + found.factor @ (jnp.swapaxes(found.factor, -1, -2) @ columns)

    delta, K = _compress(messages, sd, probes, sketch, min(rank, n), diagonal, 5 * ROUNDS)
    return found._replace(diagonal=delta, factor=K)


def _compress(
    times: Callable[[Array], Array],
    sd: Array,
    probes: Array,
    sketch: Array,
    rank: int,
    diagonal: bool,
    rounds: int = ROUNDS,
) -> tuple[Array, Array]:
    """`split` of matrices known by their products with columns `(..., state, many)`: `(delta, K)`, no gradient."""
    unit = sd[..., None]

    def whitened(columns: Array) -> Array:
        return unit * times(unit * columns)

    probes, sketch = (jnp.broadcast_to(x, (*sd.shape, x.shape[-1])) for x in (probes, sketch))
    seen = whitened(probes)

    def rest_of_diagonal(K: Array) -> Array:
        """Diagonal of the matrix less `K K'`, from the probes."""
        rest = seen - K @ (jnp.swapaxes(K, -1, -2) @ probes)
        return jnp.maximum(jnp.mean(probes * rest, axis=-1), 0.0)

    delta = rest_of_diagonal(sketch[..., :0]) if diagonal else jnp.zeros_like(sd)
    if rank == 0:
        return delta / sd**2, jnp.zeros((*sd.shape, 0), sd.dtype)
    basis = sketch
    for _ in range(2):
        basis = jnp.linalg.qr(whitened(basis) - delta[..., None] * basis)[0]
    inner = jnp.swapaxes(basis, -1, -2) @ whitened(basis)

    def factors(delta: Array) -> Array:
        small = inner - jnp.swapaxes(basis, -1, -2) @ (delta[..., None] * basis)
        values, vectors = jnp.linalg.eigh(0.5 * (small + jnp.swapaxes(small, -1, -2)))
        roots = jnp.sqrt(jnp.maximum(values[..., -rank:], 0.0))
        return basis @ (vectors[..., -rank:] * roots[..., None, :])

    if diagonal:
        delta = jax.lax.fori_loop(0, rounds, lambda _, delta: rest_of_diagonal(factors(delta)), delta)
    return jax.lax.stop_gradient((delta / sd**2, factors(delta) / unit))
