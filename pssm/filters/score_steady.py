"""The same derivative where the gain reaches its steady state: the steps after that all at once.

There the recursion of `score_back.py` is `gam <- F' gam Theta` plus a term that is linear in the products, with `F` and
`Theta` fixed. All that is wanted is the sum of `gam` over these steps, which solves a linear equation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.filters.covariance import OF_COVARIANCES, Gains, row_at, until_steady_state
from pssm.filters.means import scan_means
from pssm.filters.score_back import Products, covariances_back, gradient_of, products_of, rho_back, scan_back, score
from pssm.linalg.small import batch_first, matvec, row_of
from pssm.ssm import LinearGaussianSSM


@jax.custom_jvp
def steady_score(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[Array, tuple]:
    """`score` where the gain may reach its steady state; higher derivatives are those of `score`."""
    rows, last, steady = until_steady_state(ssm, ~jnp.isnan(y))
    if steady is True:
        return batch_first(_score_by_steady_state(ssm, y, u, rows, last))

    def by_steady_state() -> tuple[Array, tuple]:
        return _score_by_steady_state(ssm, y, u, rows.without_ties(), last)

    steady = steady & ~jnp.any(rows.tied)
    return batch_first(jax.lax.cond(steady, by_steady_state, lambda: score(ssm, y, u)))


@steady_score.defjvp
def _steady_score_jvp(primals: tuple, tangents: tuple) -> tuple:
    return batch_first(jax.jvp(score, primals, tangents))


def _score_by_steady_state(
    ssm: LinearGaussianSSM, y: Array, u: Array | None, rows: Gains, last: Array
) -> tuple[Array, tuple]:
    """`score` where row `last` is the steady state of the gain."""
    length, n = y.shape[0], ssm.n_state
    means, log_liks = scan_means(rows, last, ssm, y, u)
    back = scan_back(rows, last, ssm, means)
    w, lam = means.whitened, back.lam

    # The sum of gam from `border` on is found at once. What reaches the steps before it comes from the next `window`
    # steps alone: Theta^window is negligible. Without such a window (or room for it) every step is computed.
    final = jax.tree.map(lambda x: x[last], rows)
    powers = _powers(ssm, final, length)
    window, vanishes = powers.window, powers.vanishes & (powers.window <= length - last)
    border = jnp.where(vanishes, last, length)
    first = jnp.where(vanishes, jnp.minimum(last + window, length), length)

    def running(state: tuple) -> Array:
        return state[0] > 0

    def step(state: tuple) -> tuple:
        t, gam, rho, at_border, total = state
        t = t - 1
        row = row_at(rows, t, last)
        grads, gam = covariances_back(ssm, row, products_of(row_of(w, t), row_of(lam, t)), gam)
        total = jax.tree.map(lambda s, g: s + jnp.where(t < border, g, 0.0), total, grads)
        return t, gam, rho_back(row, row_of(w, t), rho), jnp.where(t == border, gam, at_border), total

    zero = jnp.zeros((n, n), y.dtype)
    beyond = jnp.where(first < length, matvec(final.chol.T, back.next_lam[first - 1]), 0.0)
    total = {name: jnp.zeros_like(getattr(ssm, name)) for name in OF_COVARIANCES}
    _, gam, rho, at_border, total = jax.lax.while_loop(running, step, (first, zero, beyond, zero, total))

    late = jnp.arange(length) >= border
    late_w = jnp.where(late[:, None], w, 0.0)
    products = Products(late_w.T @ late_w, lam.T @ late_w, jnp.sum(late))
    after = covariances_back(ssm, final, products, jnp.zeros_like(gam))[1]  # the terms of all these steps
    after = powers.solve(after - powers.back @ at_border @ powers.turn) - at_border
    tail = covariances_back(ssm, final, products, jnp.where(vanishes, after, 0.0))[0]
    total = jax.tree.map(lambda s, g: s + jnp.where(vanishes, g, 0.0), total, tail)
    return log_liks.sum(), gradient_of(ssm, u, means, back, total, gam, rho)


class _Powers(NamedTuple):
    """`F'` (`back`) and `Theta` (`turn`) of `gam <- F' gam Theta`, with the powers that make the sum over all steps.

    `window` is a power of two, `vanishes` tells whether `Theta^window` is below rounding.
    """

    back: Array
    turn: Array
    window: Array
    vanishes: Array

    def solve(self, x: Array) -> Array:
        """`x + F' x Theta + F'^2 x Theta^2 + ...` up to the window, by doubling."""

        def double(state: tuple) -> tuple:
            count, x, back, turn = state
            return 2 * count, x + back @ x @ turn, back @ back, turn @ turn

        return jax.lax.while_loop(lambda s: s[0] < self.window, double, (1, x, self.back, self.turn))[1]


def _powers(ssm: LinearGaussianSSM, row: Gains, length: int) -> _Powers:
    n_obs, n = ssm.C.shape
    turn = row.turn_next[:, :n] @ row.turn[n_obs:, :n]
    back = ssm.A.T - ssm.C.T @ (row.root.T @ (row.gain.T @ ssm.A.T))
    rounding = jnp.finfo(turn.dtype).eps

    def square(state: tuple) -> tuple:
        count, power = state
        return 2 * count, power @ power

    def large(state: tuple) -> Array:
        return (state[0] < length) & (jnp.sum(state[1] ** 2) > rounding**2)

    window, power = jax.lax.while_loop(large, square, (1, turn))
    return _Powers(back, turn, window, jnp.sum(power**2) <= rounding**2)
