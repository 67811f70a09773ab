"""Smoothing: the posterior of the states given the whole series, its moments and its draws.

Both need, for every `t`, the conditional of `z_t` given `z_{t+1}` and `y_{1:t}`. With `F` a factor of the filtered
covariance it comes from one triangularisation, right also where the predicted covariance is singular:

    [ A F   chol_Q ]        [ G11   0  ]     z_{t+1} = predicted mean + G11 e
    [   F     0    ]  --->  [ G21  G22 ]     z_t     = filtered mean  + G21 e + G22 e'

so `z_t | z_{t+1}` has mean `m + G21 G11^-1 (z_{t+1} - predicted mean)` and factor `G22` (Rauch, Tung & Striebel 1965
in the square-root form of Park & Kailath 1995).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array, ArrayLike, Float, Key
from pssm.batch import over_batches
from pssm.filters.kalman import prepare, scan_filter, timed_fields
from pssm.linalg import solve_lower, triangularise
from pssm.linalg.small import matmul, matvec
from pssm.ssm import LinearGaussianSSM, SmootherResult


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
    return over_batches(_smooth, ssm, (series, 2), (inputs, 2))


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
    ssm, series, inputs = prepare(ssm, y, u, "auto")
    batch = jnp.broadcast_shapes(ssm.batch_shape, series.shape[:-2], () if inputs is None else inputs.shape[:-2])
    count = 1
    for size in sample_shape:
        count *= size
    noise = jax.random.normal(key, (*batch, count, series.shape[-2], ssm.n_state), series.dtype)

    def one(model: LinearGaussianSSM, y_one: Array, u_one: Array | None, noises: Array) -> Array:
        backward, last_mean, last_chol, _ = _backward_conditionals(model, y_one, u_one)
        return jax.vmap(lambda e: _draw(backward, last_mean, last_chol, e))(noises)

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


def _backward_conditionals(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[_Backward, Array, Array, Array]:
    """The conditionals for all `t < T`, the filtered moments at `T`, and the log-likelihood."""
    r, log_liks = scan_filter(ssm, y, u)
    mean, chol, predicted_mean = r.new_mean, r.new_chol, r.mean

    def conditional(chol_t: Array, timed: dict[str, Array]) -> tuple[Array, Array]:
        now = ssm.at(timed)
        n = now.n_state
        top = jnp.concatenate([matmul(now.A, chol_t), now.chol_Q], axis=1)
        bottom = jnp.concatenate([chol_t, jnp.zeros((n, now.chol_Q.shape[1]), chol_t.dtype)], axis=1)
        joint = triangularise(jnp.concatenate([top, bottom]))
        gain = solve_lower(joint[:n, :n], joint[n:, :n].T, transpose=True).T
        return gain, joint[n:, n:]

    into_next = {name: x[1:] for name, x in timed_fields(ssm, ahead=False).items()}
    gain, conditional_chol = jax.vmap(conditional)(chol[:-1], into_next)
    return _Backward(mean[:-1], gain, conditional_chol, predicted_mean[1:]), mean[-1], chol[-1], log_liks.sum()


def _smooth(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> SmootherResult:
    backward, last_mean, last_chol, log_lik = _backward_conditionals(ssm, y, u)

    def step(later: tuple[Array, Array], t: _Backward) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        later_mean, later_chol = later
        mean = t.mean + matvec(t.gain, later_mean - t.next_mean)
        carried = matmul(t.gain, later_chol)
        chol = triangularise(jnp.concatenate([carried, t.chol], axis=1))
        return (mean, chol), (mean, chol, matmul(later_chol, carried.T))

    _, (mean, chol, cross) = jax.lax.scan(step, (last_mean, last_chol), backward, reverse=True)
    return SmootherResult(
        jnp.concatenate([mean, last_mean[None]]), jnp.concatenate([chol, last_chol[None]]), cross, log_lik
    )


def _draw(backward: _Backward, last_mean: Array, last_chol: Array, noise: Array) -> Array:
    last = last_mean + matvec(last_chol, noise[-1])

    def step(later: Array, xs: tuple[_Backward, Array]) -> tuple[Array, Array]:
        t, e = xs
        z = t.mean + matvec(t.gain, later - t.next_mean) + matvec(t.chol, e)
        return z, z

    _, path = jax.lax.scan(step, last, (backward, noise[:-1]), reverse=True)
    return jnp.concatenate([path, last[None]])
