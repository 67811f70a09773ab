"""Smoothing: the posterior of the states given the whole series, its moments and its draws.

Everything goes back through the orthogonal factors of the filter (`covariance.py`), in units of its own factors. With
`x` the filtered state in units of `L+` and `e` the predicted one in units of `L`, both standard normal before what
comes later is known,

    e = Q11' w + Q21' x         through the update, `w` the whitened innovation
    e = Q1 x + Q2 noise         for the next `e`, through the transition: given it, x ~ N(Q1' e, 1 - Q1' Q1)

Nothing is solved for, a singular covariance is no special case, and no error grows on the way back.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pssm._checks import check_sample_shape
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Float, KeyLike
from pssm.batch import apart, for_each, in_all_of_a_batch, over_batches, side_by_side
from pssm.filters.covariance import FIRST_CHECK, Gains, by_step, next_check, row_at, unmoved
from pssm.filters.diffuse_back import diffuse_draws, diffuse_smoother
from pssm.filters.means import Means, scan_means
from pssm.filters.parallel import parallel_smoother
from pssm.filters.passes import of_gains, of_one_series, run
from pssm.filters.plan import Plan, plan_for, prepare
from pssm.filters.refused import determined, possible
from pssm.linalg import complement, triangularise, unless
from pssm.linalg.random import standard_normal
from pssm.linalg.small import SMALL, matmul, row_of, set_row, times
from pssm.results import SmootherResult
from pssm.ssm import LinearGaussianSSM


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
        A `SmootherResult`; `cross_cov[t]` is `Cov(z_{t+1}, z_t | y)`. Where the data do not determine a diffuse start,
        means are NaN and variances infinite, with a warning.

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
    result = _smooth(plan_for(ssm, series, inputs, method=method), ssm, series, inputs)
    result = possible(result, result.log_likelihood, ssm, series, inputs)
    return determined(result, result.mean, ssm)


def sample_states(
    key: KeyLike,
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
    key = as_key(key)
    sample_shape = check_sample_shape(sample_shape)
    ssm, series, inputs = prepare(ssm, y, u, "auto")
    batch = jnp.broadcast_shapes(ssm.batch_shape, series.shape[:-2], () if inputs is None else inputs.shape[:-2])
    count = 1
    for size in sample_shape:
        count *= size
    each = ssm.n_state + ssm.chol_Q.shape[-1]
    if ssm.diffuse:  # the first steps take more
        each += ssm.n_state + sum(ssm.diffuse)
    noise = standard_normal(key, (*batch, count, series.shape[-2], each), series.dtype)

    paths = _draws(plan_for(ssm, series, inputs), ssm, series, inputs, noise)
    paths = jnp.moveaxis(determined(paths, paths, ssm), len(batch), 0)
    return paths.reshape(tuple(sample_shape) + paths.shape[1:])


def most_likely_states(
    ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None = None
) -> Float[Array, "*batch time state"]:
    """The most likely path, `argmax p(z_{1:T} | y_{1:T})`: the smoothed means, since the posterior is Gaussian.

    Arguments and errors as in `kalman_smoother`.
    """
    return kalman_smoother(ssm, y, u).mean


# ---------------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------- moments


@partial(jax.jit, static_argnames="plan")
def _smooth(plan: Plan, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> SmootherResult:
    if ssm.diffuse:

        def rest(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> tuple[SmootherResult, Array, Array]:
            return of_one_series(_moments_with, plan.for_rest(ssm, len(y)), ssm, y, u)

        return over_batches(partial(diffuse_smoother, rest), ssm, (y, 2), (u, 2))
    if plan.recursion == "parallel":
        return over_batches(parallel_smoother, ssm, (y, 2), (u, 2))
    return run(_smooth_with, plan, ssm, y, u)


def _smooth_with(rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> SmootherResult:
    found = _moments_with(rows, last, ssm, y, u)[0]
    chol, cross = for_each(y.shape[:-2], (found.chol, found.cross_cov))
    return found._replace(chol=chol, cross_cov=cross)


def _moments_with(
    rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None
) -> tuple[SmootherResult, Array, Array]:
    """As `smooth_complete`, with the mean and the factor `V` of the first `e`."""
    means, log_liks = scan_means(rows, last, ssm, y, u)
    covariances = _all_covariances if isinstance(last, int) else _covariances_until_steady
    chol, cross, left = covariances(rows, last, y.shape[-2])
    paths, message = _paths(rows, last, means)
    found = SmootherResult(apart(paths, y.shape[:-2]), chol, cross, log_liks.sum(0).reshape(y.shape[:-2]))
    return found, message, left


def smooth_complete(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> SmootherResult:
    """`kalman_smoother` for an unbatched model and series `(series, time, obs)` without gaps, nothing checked.

    All series have the same `chol` and `cross_cov`, which come once, without an axis for the series.
    """
    return of_gains(_moments_with, plan_for(ssm, y, u), jnp.ones(y.shape[-2:], bool), ssm, y, u)[0]


def _paths(rows: Gains, last: Array | int, means: Means, noise: Array | None = None) -> tuple[Array, Array]:
    """Filtered means plus what the future says of them, `m + L+ x` with `x` the future's message in units of `L+`.

    The message goes back through the orthogonal factors of the filter alone, so no error is amplified on the way.
    With `noise`, a draw of `x` and the transition's noise before anything later is known, it is moved to where it
    agrees with the next `e` (Matheron's rule): a draw from the posterior, which takes no covariance of its own. The
    second result is `e` of the first step.
    """
    length, n_obs = means.whitened.shape[:2]
    n = means.mean.shape[1]
    row_xs, row_of_step = by_step((rows.turn, rows.turn_next, rows.new_chol), last, length)

    def back(e: Array, xs: tuple) -> tuple[Array, Array]:
        row, new_mean, whitened, free = xs
        turn, turn_next, new_chol = row_of_step(row)
        x = times(turn_next[:, :n].T, e if free is None else e - times(turn_next, free))
        x = x if free is None else free[:n] + x
        e = times(turn[n_obs:, :n].T, x) + times(turn[:n_obs, :n].T, whitened)
        return e, new_mean + times(new_chol, x)

    e = jnp.zeros_like(means.mean[0])
    if noise is not None:  # nothing is known after the last step: the next `e` is what the draw makes it
        e = times(row_at(rows.turn_next, jnp.asarray(length - 1), last), noise[-1])
    e, paths = jax.lax.scan(back, e, (row_xs, means.new_mean, means.whitened, noise), reverse=True)
    return paths, e


def _covariance_back(left: Array, row: Gains, next_chol: Array) -> tuple[Array, Array, Array, Array]:
    """One step back from `V` of the next time: `V` of this one, `W`, the smoothed factor and the lag-one covariance.

    The smoothed covariance is `L+ W W' L+'`, with `W W'` what the future leaves of the filtered one and `V V'` the same
    of the predicted one: `W W' = Q1' V V' Q1 + Q3' Q3` and `V = Q21' W`. The lag-one covariance is `L' V V' Q1 L+'`.
    """
    n = left.shape[0]
    forth = row.turn_next[:, :n]
    seen = matmul(forth.T, left)
    cross = matmul(matmul(next_chol, left), matmul(seen.T, row.new_chol.T))
    kept = what_is_left(row.turn_next, seen)
    return matmul(_through_update(row), kept), kept, matmul(row.new_chol, kept), cross


def what_is_left(turn: Array, seen: Array) -> Array:
    """`W`, lower triangular. It may be found by subtraction as long as little is subtracted, and that is fast."""
    n = turn.shape[0]

    def with_care() -> Array:
        return triangularise(jnp.concatenate([seen, complement(turn).T], axis=1))

    if n <= SMALL:
        return with_care()
    kept = jnp.linalg.cholesky(jnp.eye(n, dtype=seen.dtype) + seen @ seen.T - turn[:, :n].T @ turn[:, :n])
    return unless(jnp.min(jnp.diagonal(kept)) > 0.1, kept, with_care)


def _through_update(row: Gains) -> Array:
    n = row.chol.shape[-1]
    return row.turn[-n:, :n].T


def _all_covariances(rows: Gains, last: Array | int, length: int) -> tuple[Array, Array, Array]:
    """Factors of all steps, lag-one covariances, and `V` of the first step; every step computed."""
    row_xs, row_of_step = by_step(rows, last, length)
    next_xs, next_of_step = by_step(rows.chol, last, length)

    def step(left: Array, xs: tuple) -> tuple[Array, tuple[Array, Array]]:
        left, _, chol, cross = _covariance_back(left, row_of_step(xs[0]), next_of_step(xs[1]))
        return left, (chol, cross)

    final = row_at(rows, jnp.asarray(length - 1), last)
    xs = jax.tree.map(lambda x: x[: length - 1], row_xs), next_xs[1:]
    left, (chol, cross) = jax.lax.scan(step, _through_update(final), xs, reverse=True)
    return jnp.concatenate([chol, final.new_chol[None]]), cross, left


def _covariances_until_steady(rows: Gains, last: Array, length: int) -> tuple[Array, Array, Array]:
    """The same where row `last` is the steady state of the gain.

    Back from the end the smoothed covariances reach a steady state of their own, `late` steps before it, which holds
    down to step `last`. Where the room for late rows does not suffice, every step is computed.
    """
    capacity = rows.chol.shape[0]
    final = row_at(rows, last, last)
    start = _through_update(final)
    blank = jnp.zeros((capacity, *final.chol.shape), final.chol.dtype)

    def late_step(state: tuple) -> tuple:
        late, left, earlier, check, chols, crosses, _ = state
        late = late + 1
        left, kept, chol, cross = _covariance_back(left, final, final.chol)
        due = late == check
        steady = in_all_of_a_batch(due & unmoved(earlier, kept))
        check, earlier = jnp.where(due, next_check(check), check), jnp.where(due, kept, earlier)
        return late, left, earlier, check, set_row(chols, chol, late), set_row(crosses, cross, late), steady

    room = jnp.minimum(capacity - 1, length - 1 - last)
    state = jnp.asarray(0), start, blank[0], jnp.asarray(FIRST_CHECK), set_row(blank, final.new_chol, 0), blank
    late, left, _, _, late_chol, late_cross, steady = jax.lax.while_loop(
        lambda s: (s[0] < room) & ~s[-1], late_step, (*state, jnp.asarray(False))
    )

    def by_steady_state() -> tuple[Array, Array, Array]:
        def early_step(i: Array, state: tuple) -> tuple:
            left, chols, crosses = state
            t = last - 1 - i
            left, _, chol, cross = _covariance_back(left, row_at(rows, t, last), row_of(rows.chol, t + 1))
            return left, set_row(chols, chol, t), set_row(crosses, cross, t)

        first, early_chol, early_cross = jax.lax.fori_loop(0, last, early_step, (left, blank, blank))
        t = jnp.arange(length)
        index = jnp.where(t < last, t, capacity + jnp.minimum(length - 1 - t, late))
        chol, cross = (jnp.concatenate(x) for x in ((early_chol, late_chol), (early_cross, late_cross)))
        return chol[index], cross[index[:-1]], first

    if capacity == length:
        return by_steady_state()
    return jax.lax.cond(
        steady | jnp.all(late == length - 1 - last), by_steady_state, lambda: _all_covariances(rows, last, length)
    )


# --------------------------------------------------------------------------------------------------------------- draws


@partial(jax.jit, static_argnames="plan")
def _draws(plan: Plan, ssm: LinearGaussianSSM, y: Array, u: Array | None, noise: Array) -> Array:
    if ssm.diffuse:

        def rest(ssm: LinearGaussianSSM, y: Array, u: Array | None, noise: Array) -> tuple[Array, Array]:
            paths, e = of_one_series(_draws_and_start, plan.for_rest(ssm, len(y)), ssm, y, u, noise)
            return paths, e.T

        return over_batches(partial(diffuse_draws, rest), ssm, (y, 2), (u, 2), (jnp.moveaxis(noise, -2, -3), 3))
    return run(_draws_with, plan, ssm, y, u, (noise, 3))


def _draws_with(
    rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None, noise: Array
) -> Array:
    """Each path of `noise`, `(..., count, time, state + noise of the state)`, made a draw from the posterior."""
    return _draws_and_start(rows, last, ssm, y, u, noise)[0]


def _draws_and_start(
    rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None, noise: Array
) -> tuple[Array, Array]:
    """The same, and each path's first `e`, `(state, paths)`."""
    means, _ = scan_means(rows, last, ssm, y, u)
    *batch, count = noise.shape[:-2]
    means = jax.tree.map(lambda x: jnp.repeat(x if batch else x[..., None], count, axis=-1), means)
    paths, e = _paths(rows, last, means, side_by_side(noise))
    return apart(paths, noise.shape[:-2]), e
