"""Smoothing: the posterior of the states given the whole series, its moments and its draws.

Both need, for every `t`, the conditional of `z_t` given `z_{t+1}` and `y_{1:t}`. With `F` a factor of the filtered
covariance it comes from one triangularisation, right also where the predicted covariance is singular:

    [ A F   chol_Q ]        [ G11   0  ]     z_{t+1} = predicted mean + G11 e
    [   F     0    ]  --->  [ G21  G22 ]     z_t     = filtered mean  + G21 e + G22 e'

so `z_t | z_{t+1}` has mean `m + G21 G11^-1 (z_{t+1} - predicted mean)` and factor `G22` (Rauch, Tung & Striebel 1965
in the square-root form of Park & Kailath 1995).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._checks import check_sample_shape
from pssm._types import Array, ArrayLike, Float, Key
from pssm.batch import over_batches
from pssm.filters.covariance import Gains, timed_fields
from pssm.filters.kalman import Means, prepare, scan_filter
from pssm.linalg import orthogonalise, solve_lower, triangularise
from pssm.linalg.small import matmul, matvec
from pssm.results import SmootherResult
from pssm.ssm import LinearGaussianSSM


class _Backward(NamedTuple):
    """`z_t | z_{t+1}, y_{1:t}` is `N(mean + gain (z_{t+1} - next_mean), chol chol')`, stacked over `t = 1..T-1`."""

    mean: Array
    gain: Array
    chol: Array
    next_mean: Array


def kalman_smoother(
    ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None = None, *, method: str = "auto"
) -> SmootherResult:
    """Exact smoothing, `p(z_t | y_{1:T})` for every `t`, with lag-one cross-covariances.

    Args:
        ssm: the model.
        y: observations `(time, obs)`, or `(time,)` for one variable; NaN entries are missing.
        u: inputs `(time, input)`, where the model has `B` or `D`.
        method: as in `kalman_filter`.

    Returns:
        A `SmootherResult`; `cross_cov[t]` is `Cov(z_{t+1}, z_t | y)`.

    Raises:
        ValueError: as in `kalman_filter`.

    Example:
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1e7]], [[1.0]], [[1469.1]], [[1.0]], [[15099.0]])
        >>> kalman_smoother(model, [1120.0, float("nan"), 963.0]).cross_cov.shape
        (2, 1, 1)

    Source:
        Rauch, Tung & Striebel 1965; Park & Kailath 1995.
    """
    ssm, series, inputs = prepare(ssm, y, u, method)
    return over_batches(partial(_smooth, freeze=method == "auto"), ssm, (series, 2), (inputs, 2))


def sample_states(
    key: Key,
    ssm: LinearGaussianSSM,
    y: ArrayLike,
    u: ArrayLike | None = None,
    *,
    sample_shape: tuple[int, ...] = (),
) -> Float[Array, "*sample time state"]:
    """Draws whole paths from `p(z_{1:T} | y_{1:T})`, exactly (forward filtering, backward sampling).

    Args:
        key: JAX random key.
        ssm: the model.
        y: observations `(time, obs)`; NaN entries are missing.
        u: inputs `(time, input)`, where the model has `B` or `D`.
        sample_shape: shape of the set of independent paths; one filter pass serves them all.

    Returns:
        Paths of shape `sample_shape + batch + (time, state)`.

    Raises:
        ValueError: as in `kalman_filter`.

    Example:
        >>> import jax
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1e7]], [[1.0]], [[1469.1]], [[1.0]], [[15099.0]])
        >>> sample_states(jax.random.key(0), model, [1120.0, 1160.0, 963.0], sample_shape=(10,)).shape
        (10, 3, 1)

    Source:
        Carter & Kohn 1994; Fruehwirth-Schnatter 1994.
    """
    sample_shape = check_sample_shape(sample_shape)
    ssm, series, inputs = prepare(ssm, y, u, "auto")
    batch = jnp.broadcast_shapes(ssm.batch_shape, series.shape[:-2], () if inputs is None else inputs.shape[:-2])
    count = 1
    for size in sample_shape:
        count *= size
    noise = jax.random.normal(key, (*batch, count, series.shape[-2], ssm.n_state), series.dtype)

    def one(model: LinearGaussianSSM, y_one: Array, u_one: Array | None, noises: Array) -> Array:
        rows, means, _ = scan_filter(model, y_one, u_one)
        backward = _backward_conditionals(model, rows, means)
        return jax.vmap(lambda e: _draw(backward, means.new_mean[-1], rows.new_chol[-1], e))(noises)

    paths = over_batches(one, ssm, (series, 2), (inputs, 2), (noise, 3))
    paths = jnp.moveaxis(paths, len(batch), 0)
    return paths.reshape(tuple(sample_shape) + paths.shape[1:])


def most_likely_states(
    ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None = None
) -> Float[Array, "*batch time state"]:
    """The most likely path, `argmax p(z_{1:T} | y_{1:T})`: the smoothed means, since the posterior is Gaussian.

    Arguments and errors as in `kalman_smoother`.
    """
    return kalman_smoother(ssm, y, u).mean


# ---------------------------------------------------------------------------------------------------------------------


def _two_rows(ssm: LinearGaussianSSM, r: Gains) -> tuple[Array, Array]:
    """`[G11, 0; G21, G22]` and the orthogonal factor of the module's head, for all `t < T` at once."""

    def one(chol_t: Array, timed: dict[str, Array]) -> tuple[Array, Array]:
        now = ssm.at(timed)
        top = jnp.concatenate([matmul(now.A, chol_t), now.chol_Q], axis=1)
        bottom = jnp.concatenate([chol_t, jnp.zeros((now.n_state, now.chol_Q.shape[1]), chol_t.dtype)], axis=1)
        return orthogonalise(jnp.concatenate([top, bottom]))

    return jax.vmap(one)(r.new_chol[:-1], {name: x[1:] for name, x in timed_fields(ssm, ahead=False).items()})


def _backward_conditionals(ssm: LinearGaussianSSM, rows: Gains, means: Means) -> _Backward:
    """The conditionals for all `t < T`, from the records of the filter."""
    n = ssm.n_state

    def gain(joint: Array) -> Array:
        return solve_lower(joint[:n, :n], joint[n:, :n].T, transpose=True).T

    joint = _two_rows(ssm, rows)[0]
    return _Backward(means.new_mean[:-1], jax.vmap(gain)(joint), joint[:, n:, n:], means.mean[1:])


def _smoothed_means(rows: Gains, means: Means) -> Array:
    """Filtered means plus what the future says of them, `m + L+ x` with `x` the future's message in units of `L+`.

    The message goes back through the orthogonal factors of the filter alone, so no error is amplified on the way.
    """
    n_obs = means.whitened.shape[-1]
    n = means.mean.shape[-1]

    def back(message: Array, xs: tuple[Gains, Means]) -> tuple[Array, Array]:
        row, m = xs
        after = matvec(row.turn_next[:, :n].T, message)
        mean = m.new_mean + matvec(row.new_chol, after)
        return matvec(row.turn[n_obs:, :n].T, after) + matvec(row.turn[:n_obs, :n].T, m.whitened), mean

    return jax.lax.scan(back, jnp.zeros(n, means.mean.dtype), (rows, means), reverse=True)[1]


def _smooth(ssm: LinearGaussianSSM, y: Array, u: Array | None, *, freeze: bool) -> SmootherResult:
    """Moments through orthogonal factors alone: nothing is solved for, so no error grows on the way back.

    The smoothed covariance is `L+ W W' L+'` with `W W' <= 1` what the future leaves of the filtered one. With the
    orthogonal factor `[Q1, Q2; Q3, Q4]` of the two rows above and `V V'` the same for the next predicted covariance,
    `W W' = Q1' V V' Q1 + Q3' Q3`; through the update `V = Q21' W`, and the lag-one covariance is `L' V V' Q1 L+'`.
    """
    r, means, log_liks = scan_filter(ssm, y, u, freeze=freeze)
    n, n_obs = ssm.n_state, ssm.n_obs
    back_rows = r.turn[:, n_obs:, :n]  # Q21
    joint, turn = _two_rows(ssm, r)
    # A row of Q3 whose pivot is rounding points nowhere: the transition added nothing there.
    pivots = jnp.diagonal(joint, axis1=1, axis2=2)[:, n:]
    sizes = jnp.sqrt(jnp.sum(r.new_chol[:-1] ** 2, axis=2))
    real = pivots > 100 * n * jnp.finfo(y.dtype).eps * sizes
    rest = jnp.where(real[..., None], turn[:, n:, :n], 0.0)  # Q3

    def step(left: Array, xs: tuple) -> tuple[Array, tuple[Array, Array]]:
        new_chol, next_chol, forth, q3, q21 = xs
        cross = matmul(matmul(next_chol, left), matmul(left.T, matmul(forth, new_chol.T)))
        kept = triangularise(jnp.concatenate([matmul(forth.T, left), q3.T], axis=1))
        return matmul(q21.T, kept), (triangularise(matmul(new_chol, kept)), cross)

    last = r.new_chol[-1]
    xs = r.new_chol[:-1], r.chol[1:], r.turn_next[:-1, :, :n], rest, back_rows[:-1]
    _, (chol, cross) = jax.lax.scan(step, back_rows[-1].T, xs, reverse=True)
    return SmootherResult(_smoothed_means(r, means), jnp.concatenate([chol, last[None]]), cross, log_liks.sum())


def _draw(backward: _Backward, last_mean: Array, last_chol: Array, noise: Array) -> Array:
    last = last_mean + matvec(last_chol, noise[-1])

    def step(later: Array, xs: tuple[_Backward, Array]) -> tuple[Array, Array]:
        t, e = xs
        z = t.mean + matvec(t.gain, later - t.next_mean) + matvec(t.chol, e)
        return z, z

    _, path = jax.lax.scan(step, last, (backward, noise[:-1]), reverse=True)
    return jnp.concatenate([path, last[None]])
