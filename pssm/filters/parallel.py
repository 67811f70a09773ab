"""Filter and smoother in parallel over time: `O(log T)` steps on a machine with enough cores, such as a GPU.

Each step of the filter is a map of Gaussians: `z_t` given `z_{t-1}` and `y_t`, with what `y_t` says of `z_{t-1}`. Such
maps compose, and composition is associative, so an associative scan gives all filtered covariances, as factors
throughout. Gains follow for all steps side by side, and make of the means a chain of affine maps: a second scan. The
log-likelihood comes last, from the predicted moments: the one that the first scan could carry along cancels
catastrophically, and so would its means for a wide `P0` in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.filters.covariance import Gains, one_step, timed_fields
from pssm.filters.means import Means, by_ties_of_all, shift
from pssm.filters.step import emission_mean, predict_factor, transition_mean, update_factor, update_mean
from pssm.linalg import complement, solve_lower, triangularise
from pssm.linalg.small import matmul, matvec
from pssm.missing import split_missing
from pssm.results import FilterResult, SmootherResult
from pssm.ssm import LinearGaussianSSM


class _Step(NamedTuple):
    """`z_t ~ N(A z + ..., U U')` given the earlier `z`, of which the data know `Z Z'` (a precision)."""

    A: Array
    U: Array
    Z: Array


def parallel_filter(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> FilterResult:
    """The filter of one series, every step at once; as `kalman_filter`."""
    rows, means, log_liks = _filter(ssm, y, u)
    return FilterResult(log_liks.sum(), log_liks, means.new_mean, rows.new_chol, means.mean, rows.chol)


def parallel_smoother(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> SmootherResult:
    """The smoother of one series, every step at once; as `kalman_smoother`."""
    rows, means, log_liks = _filter(ssm, y, u)
    n_obs, n = ssm.C.shape[-2:]
    rest = jax.vmap(complement)(rows.turn_next[:-1])

    # What the future says, `V` and the message of `smoother.py`, goes back by affine maps that are contractions. The
    # last step has nothing after it: a map that forgets, and V = Q21'.
    forth, q_obs, q_state = rows.turn_next[:, :, :n], rows.turn[:, :n_obs, :n], rows.turn[:, n_obs:, :n]
    back = jnp.einsum("tji,tkj->tik", q_state, forth).at[-1].set(0.0)
    news = jnp.einsum("tji,tj->ti", q_obs, means.whitened)
    spread = jnp.swapaxes(jnp.concatenate([rest, jnp.eye(n, dtype=y.dtype)[None]]) @ q_state, -1, -2)

    def compose(later: tuple, earlier: tuple) -> tuple:
        (M2, g2, D2), (M1, g1, D1) = later, earlier
        return matmul(M1, M2), matvec(M1, g2) + g1, triangularise(jnp.concatenate([matmul(M1, D2), D1], axis=1))

    _, message, V = jax.lax.associative_scan(jax.vmap(compose), (back, news, spread), reverse=True)

    def finish(row: Gains, new_mean: Array, rest: Array, message: Array, V: Array, next_chol: Array) -> tuple:
        forth = row.turn_next[:, :n]
        kept = jnp.concatenate([matmul(forth.T, V), rest.T], axis=1)
        cross = matmul(matmul(next_chol, V), matmul(V.T, matmul(forth, row.new_chol.T)))
        return (
            new_mean + matvec(row.new_chol, matvec(forth.T, message)),
            triangularise(matmul(row.new_chol, kept)),
            cross,
        )

    before = jax.tree.map(lambda x: x[:-1], rows)
    mean, chol, cross = jax.vmap(finish)(before, means.new_mean[:-1], rest, message[1:], V[1:], rows.chol[1:])
    mean, chol = jnp.concatenate([mean, means.new_mean[-1:]]), jnp.concatenate([chol, rows.new_chol[-1:]])
    return SmootherResult(mean, chol, cross, log_liks.sum())


def _filter(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[Gains, Means, Array]:
    """Gains, means and log-likelihoods of all steps."""
    filled, observed = split_missing(y)
    timed, ahead = timed_fields(ssm, ahead=False), timed_fields(ssm, ahead=True)
    steps = jax.vmap(lambda values, seen: _step(ssm.at(values), seen))(timed, observed)
    first = update_factor(ssm.at_time(0), ssm.chol_P0, observed[0]).new_chol
    zero = jnp.zeros_like(first)
    steps = jax.tree.map(lambda x, start: x.at[0].set(start), steps, _Step(zero, first, zero))
    filtered = jax.lax.associative_scan(jax.vmap(_compose), steps).U

    into = {name: x[1:] for name, x in timed.items()}
    chol = jax.vmap(lambda U, values: predict_factor(ssm.at(values), U))(filtered[:-1], into)
    chol = jnp.concatenate([triangularise(ssm.chol_P0)[None], chol])
    rows = jax.vmap(lambda chol, seen, values: one_step(ssm.at(values), chol, seen)[1])(chol, observed, ahead)

    # Predicted means: z_{t+1} = F z_t + g.
    def chain(row: Gains, y_t: Array, seen: Array, u_t: Array | None, u_next: Array | None, values: dict) -> tuple:
        now = ssm.at(values)
        origin = jnp.zeros_like(ssm.m0)
        news = matvec(row.root, jnp.where(seen, y_t - emission_mean(now, origin, u_t), 0.0))
        F = now.A - matmul(now.A, matmul(row.gain, matmul(row.root, now.C)))
        return F, transition_mean(now, matvec(row.gain, news), u_next)

    def compose(one: tuple, two: tuple) -> tuple:
        (F1, g1), (F2, g2) = one, two
        return matmul(F2, F1), matvec(F2, g1) + g2

    F, g = jax.vmap(chain)(rows, filled, observed, u, shift(u), ahead)
    F = jnp.concatenate([zero[None], F[:-1]])
    g = jnp.concatenate([ssm.m0[None], g[:-1]])
    mean = jax.lax.associative_scan(jax.vmap(compose), (F, g))[1]

    def finish(row: Gains, mean: Array, y_t: Array, seen: Array, u_t: Array | None, values: dict) -> tuple:
        new_mean, whitened = update_mean(ssm.at(values), row.gain, row.root, mean, y_t, seen, u_t)
        return Means(mean, new_mean, whitened), row.log_norm - 0.5 * jnp.sum(whitened**2)

    means, log_liks = jax.vmap(finish)(rows, mean, filled, observed, u, timed)
    tied = ~jnp.all(jnp.diagonal(rows.root, axis1=1, axis2=2) != 0, where=observed)
    return rows, means, log_liks + by_ties_of_all(tied, ssm, filled, observed, u)


def _step(ssm: LinearGaussianSSM, seen: Array) -> _Step:
    """The map of one step: an update in which the transition noise is all that is uncertain of the state."""
    new = update_factor(ssm, ssm.chol_Q, seen)
    seen_A = matmul(new.root, matmul(ssm.C, ssm.A))
    # What is observed exactly leaves nothing of the earlier state, not the rounding of a difference.
    left = ssm.A - matmul(new.gain, seen_A)
    rounding = 4 * ssm.A.shape[0] * jnp.finfo(left.dtype).eps
    noise = rounding * (jnp.abs(ssm.A) + matmul(jnp.abs(new.gain), jnp.abs(seen_A)))
    return _Step(jnp.where(jnp.abs(left) <= noise, 0.0, left), new.new_chol, triangularise(seen_A.T))


def _compose(one: _Step, two: _Step) -> _Step:
    """First `one`, then `two` (Yaghoobi, Corenflos, Hassan & Sarkka 2022); right for singular factors as well."""
    n = one.A.shape[0]
    eye = jnp.eye(n, dtype=one.A.dtype)
    top = jnp.concatenate([matmul(one.U.T, two.Z), eye], axis=1)
    joint = triangularise(jnp.concatenate([top, jnp.concatenate([two.Z, jnp.zeros_like(eye)], axis=1)]))
    root, cross, rest = joint[:n, :n], joint[n:, :n], joint[n:, n:]
    kept = one.A - matmul(one.U, matmul(solve_lower(root, cross.T, transpose=True), one.A))
    spread = matmul(two.A, solve_lower(root, one.U.T).T)
    return _Step(
        matmul(two.A, kept),
        triangularise(jnp.concatenate([spread, two.U], axis=1)),
        triangularise(jnp.concatenate([matmul(one.A.T, rest), one.Z], axis=1)),
    )
