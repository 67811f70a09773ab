"""Smoothing through a diffuse start: moments and draws of the states, back through the steps of `diffuse.py`.

What goes back is said of `(e, delta)` together. The transition has no part in `delta`, and `delta` none in `e`:

    x = Q1' e + ...,   (e, delta) = known + by_x (x, xi) + by_later delta_later,   z = m+ + L+ x + E+ delta_later

so the steps are those of `smoother.py` with a few rows more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.filters.covariance import Gains
from pssm.filters.diffuse import Begun, Open, then, where_open
from pssm.linalg import complement, triangularise
from pssm.linalg.small import matmul, matvec
from pssm.results import SmootherResult
from pssm.ssm import LinearGaussianSSM


class After(NamedTuple):
    """What is known of the step after the first ones.

    Attributes:
        message: mean of its `e`, `(state,)`.
        spread: a factor of the covariance of its `e`, `(state, state)`.
        chol: factor `L` of its predicted state.
    """

    message: Array
    spread: Array
    chol: Array


def diffuse_smoother(
    rest_of: Callable[..., tuple[SmootherResult, Array, Array]], ssm: LinearGaussianSSM, y: Array, u: Array | None
) -> SmootherResult:
    """`kalman_smoother` of one series. States that the data leave open have the mean NaN and an infinite variance.

    `rest_of(ssm, y, u)` is that of a series with an ordinary start, with mean and factor of its first `e`.
    """

    def only(begun: Begun) -> SmootherResult:
        mean, chol, cross = _moments(begun, None)
        return SmootherResult(mean, chol, cross[:-1], begun.log_likelihoods.sum())

    def both(begun: Begun, rest: LinearGaussianSSM, *arrays: Any) -> SmootherResult:
        tail, message, spread = rest_of(rest, *arrays)
        head = _moments(begun, After(message, spread, begun.chol))
        joined = (jnp.concatenate(pair) for pair in zip(head, tail[:3], strict=True))
        return SmootherResult(*joined, begun.log_likelihoods.sum() + tail.log_likelihood)

    return then(ssm, (y, u), only, both, back=True)


def _moments(begun: Begun, after: After | None) -> tuple[Array, Array, Array]:
    """Means, factors and lag-one covariances with the step after, of each step."""
    n, d = begun.left.shape
    dtype = begun.mean.dtype
    pad = jnp.zeros((d, n), dtype)

    def back(carry: tuple, xs: tuple) -> tuple[tuple, tuple[Array, Array, Array]]:
        """Carries `(e, delta)` of the next time: mean, factor of the covariance, and what makes of them a state."""
        mean, V, next_factor = carry
        row, means, open_ = xs
        row, open_ = Gains(*row), Open(*open_)
        forth = row.turn_next[:, :n]
        # x and delta_later, of which `e` says `Q1' e`
        here = jnp.concatenate([matvec(forth.T, mean[:n]), mean[n:]])
        free = complement(row.turn_next).T
        seen = jnp.concatenate([matmul(forth.T, V[:n]), V[n:]])
        W = triangularise(jnp.concatenate([seen, jnp.concatenate([free, pad])], axis=1))
        factor = jnp.concatenate([row.new_chol, open_.after], axis=1)
        cross = matmul(matmul(next_factor, V), matmul(factor, seen).T)
        moments = means.new_mean + matvec(factor, here), triangularise(matmul(factor, W)), cross
        mean, V = _through_update(open_, here, W)
        return (mean, V, jnp.concatenate([row.chol, open_.before], axis=1)), moments

    if after is None:
        first = jnp.zeros(n + d, dtype), jnp.eye(n + d, n, dtype=dtype), jnp.concatenate([begun.chol, begun.left], 1)
    else:
        mean = jnp.concatenate([after.message, jnp.zeros(d, dtype)])
        first = mean, jnp.concatenate([after.spread, pad]), jnp.concatenate([after.chol, pad.T], axis=1)
    first = first[0], jnp.pad(first[1], ((0, 0), (0, d))), first[2]
    xs = tuple(begun.rows), begun.means, tuple(begun.open)
    _, (mean, chol, cross) = jax.lax.scan(back, first, xs, reverse=True)
    return *where_open(left_open(begun), mean, chol), cross


def _through_update(open_: Open, mean: Array, W: Array) -> tuple[Array, Array]:
    """From `(x, delta_later)` to `(e, delta)`: the mean, and a factor of the covariance."""
    n = open_.after.shape[0]
    found = open_.known + matvec(open_.by_x[:, :n], mean[:n]) + matvec(open_.by_later, mean[n:])
    factor = matmul(open_.by_x[:, :n], W[:n]) + matmul(open_.by_later, W[n:])
    return found, triangularise(jnp.concatenate([factor, open_.by_x[:, n:]], axis=1))


def left_open(begun: Begun) -> Array:
    """How each filtered state depends on the directions that are open to the end, `(time, state, diffuse)`."""
    last = jnp.any(begun.left != 0, axis=0)

    n = begun.left.shape[0]

    def back(chain: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
        by_later, after = xs
        found = matmul(after, chain)
        size = matmul(jnp.abs(after), jnp.abs(chain))
        found = jnp.where(jnp.abs(found) <= 1e3 * jnp.finfo(found.dtype).eps * size, 0.0, found)
        return matmul(by_later[n:], chain), found

    chain = jnp.diag(last.astype(begun.left.dtype))
    return jax.lax.scan(back, chain, (begun.open.by_later, begun.open.after), reverse=True)[1]


# --------------------------------------------------------------------------------------------------------------- draws


def diffuse_draws(
    rest_of: Callable[..., tuple[Array, Array]], ssm: LinearGaussianSSM, y: Array, u: Array | None, noise: Array
) -> Array:
    """Paths `(count, time, state)` of one series, as of `sample_states`; NaN where the data leave a state open.

    Args:
        rest_of: `rest_of(ssm, y, u, noise)` are the paths of a series with an ordinary start, with their first `e`.
        ssm: the model.
        y: the series.
        u: inputs.
        noise: standard normal, `(time, count, state + noise of the state + state + diffuse)`.
    """
    width = ssm.n_state + ssm.chol_Q.shape[-1]

    def only(begun: Begun) -> Array:
        last = noise[len(y) - 1, :, :width]
        return _paths(begun, noise, jnp.einsum("ij,cj->ci", begun.rows.turn_next[-1], last))

    def both(begun: Begun, rest: LinearGaussianSSM, y: Array, u: Array | None, later: Array) -> Array:
        tail, e = rest_of(rest, y, u, jnp.moveaxis(later[..., :width], 0, 1))
        return jnp.concatenate([_paths(begun, noise[: len(noise) - len(later)], e), tail], axis=1)

    return then(ssm, (y, u, noise), only, both, back=True)


def _paths(begun: Begun, noise: Array, e: Array) -> Array:
    """Paths of the steps begun, `(count, time, state)`, back from `e` `(count, state)` of the next time."""
    n, d = begun.left.shape
    still_open = jnp.any(left_open(begun) != 0, axis=2)

    def back(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], Array]:
        e, delta = carry
        row, means, open_, free = xs
        row, open_ = Gains(*row), Open(*open_)
        free, xi = free[: -n - d], free[-n - d :]
        x = free[:n] + matvec(row.turn_next[:, :n].T, e - matvec(row.turn_next, free))
        z = means.new_mean + matvec(row.new_chol, x) + matvec(open_.after, delta)
        before = open_.known + matvec(open_.by_x, jnp.concatenate([x, xi])) + matvec(open_.by_later, delta)
        return (before[:n], before[n:]), z

    def one(e: Array, noise: Array) -> Array:
        xs = tuple(begun.rows), begun.means, tuple(begun.open), noise
        path = jax.lax.scan(back, (e, jnp.zeros(d, e.dtype)), xs, reverse=True)[1]
        return jnp.where(still_open, jnp.nan, path)

    return jax.vmap(one, in_axes=(0, 1))(e, noise)
