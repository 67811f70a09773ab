"""The log-likelihood whose gradient keeps little: the state of the filter at some steps, not the factors of every one.

The series is cut into pieces of about `sqrt(T)` steps. Only what enters a piece is kept; going back, a piece's factors
are computed once more from it. So the memory is that of `2 sqrt(T)` steps in place of `T`, for one more forward pass.
"""

import math

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.filters.covariance import one_step, timed_fields
from pssm.filters.means import shift
from pssm.filters.step import by_ties, transition_mean, update_mean
from pssm.linalg import triangularise
from pssm.missing import split_missing
from pssm.ssm import LinearGaussianSSM


def low_memory_log_likelihood(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    """`log p(y)` of one series; as `log_likelihood`."""
    length = y.shape[0]
    piece = math.isqrt(length - 1) + 1
    filled, observed = split_missing(y)

    def into_pieces(x: Array) -> Array:
        """`(pieces, steps, ...)`; the last row fills the last piece, whose further steps see nothing."""
        rest = -length % piece
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (rest, *x.shape[1:]))])
        return x.reshape(-1, piece, *x.shape[1:])

    def step(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], Array]:
        chol, mean = carry
        t, y_t, observed_t, u_t, u_next, timed = xs
        now, seen = ssm.at(timed), observed_t & (t < length)
        next_chol, row = one_step(now, chol, seen)
        new_mean, whitened = update_mean(now, row.gain, row.root, mean, y_t, seen, u_t)
        log_lik = row.log_norm - 0.5 * jnp.sum(whitened**2) + by_ties(now, chol, row, mean, y_t, seen, u_t)
        return (next_chol, transition_mean(now, new_mean, u_next)), log_lik

    @jax.checkpoint
    def run(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], Array]:
        carry, log_liks = jax.lax.scan(step, carry, xs)
        return carry, log_liks.sum()

    steps = -(-length // piece) * piece
    xs = jax.tree.map(into_pieces, (filled, observed, u, shift(u), timed_fields(ssm, ahead=True)))
    xs = jnp.arange(steps).reshape(-1, piece), *xs
    return jax.lax.scan(run, (triangularise(ssm.chol_P0), ssm.m0), xs)[1].sum()
