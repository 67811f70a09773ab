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
from pssm.filters.covariance import (
    FIRST_CHECK,
    Gains,
    by_step,
    in_all_of_a_batch,
    next_check,
    over_series,
    row_at,
    timed_fields,
    unmoved,
)
from pssm.filters.kalman import Means, prepare, scan_means
from pssm.linalg import orthogonalise, solve_lower, triangularise
from pssm.linalg.small import matmul, matvec, row_of, set_row
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
    if method == "parallel":
        return _parallel(ssm, series, inputs)
    return _smooth(ssm, series, inputs, freeze=method == "auto")


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

    paths = _draws(ssm, series, inputs, noise)
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


class _Joint(NamedTuple):
    """`G21 G11^-1`, `G22` and the lower rows `Q3` of the orthogonal factor of the module's head."""

    gain: Array
    chol: Array
    rest: Array


def two_rows(ssm: LinearGaussianSSM, new_chol: Array) -> _Joint:
    """The conditional of one step's state on the next one's."""
    n = new_chol.shape[0]
    top = jnp.concatenate([matmul(ssm.A, new_chol), ssm.chol_Q], axis=1)
    bottom = jnp.concatenate([new_chol, jnp.zeros((n, ssm.chol_Q.shape[1]), new_chol.dtype)], axis=1)
    joint, turn = orthogonalise(jnp.concatenate([top, bottom]))
    # A row of Q3 whose pivot is rounding points nowhere: the transition added nothing there.
    pivots = jnp.diagonal(joint)[n:]
    real = pivots > 100 * n * jnp.finfo(new_chol.dtype).eps * jnp.sqrt(jnp.sum(new_chol**2, axis=1))
    gain = solve_lower(joint[:n, :n], joint[n:, :n].T, transpose=True).T
    return _Joint(gain, joint[n:, n:], jnp.where(real[:, None], turn[n:, :n], 0.0))


def _two_rows_of_all(ssm: LinearGaussianSSM, rows: Gains, last: Array | int) -> _Joint:
    """The same for the rows up to `last`; where that is not the end of the series, row by row in a loop."""
    if isinstance(last, int):
        timed = {name: x[1:] for name, x in timed_fields(ssm, ahead=False).items()}
        return jax.vmap(lambda chol, values: two_rows(ssm.at(values), chol))(rows.new_chol[:-1], timed)

    def one(t: Array, done: _Joint) -> _Joint:
        return jax.tree.map(lambda x, row: set_row(x, row, t), done, two_rows(ssm, row_of(rows.new_chol, t)))

    empty = _Joint(*(jnp.zeros_like(rows.new_chol) for _ in _Joint._fields))
    return jax.lax.fori_loop(0, last + 1, one, empty)


# ------------------------------------------------------------------------------------------------------------- moments


@partial(jax.jit, static_argnames="freeze")
def _smooth(ssm: LinearGaussianSSM, y: Array, u: Array | None, *, freeze: bool) -> SmootherResult:
    """Moments through orthogonal factors alone: nothing is solved for, so no error grows on the way back.

    The smoothed covariance is `L+ W W' L+'` with `W W' <= 1` what the future leaves of the filtered one. With the
    orthogonal factor `[Q1, Q2; Q3, Q4]` of the two rows above and `V V'` the same for the next predicted covariance,
    `W W' = Q1' V V' Q1 + Q3' Q3`; through the update `V = Q21' W`, and the lag-one covariance is `L' V V' Q1 L+'`.
    """
    return over_series(_smooth_with, ssm, y, u, freeze=freeze)


def _smooth_with(rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None) -> SmootherResult:
    means, log_liks = scan_means(rows, last, ssm, y, u)
    joint = _two_rows_of_all(ssm, rows, last)
    covariances = _all_covariances if isinstance(last, int) else _settling_covariances
    chol, cross = covariances(rows, joint.rest, last, y.shape[0])
    return SmootherResult(_smoothed_means(rows, last, means), chol, cross, log_liks.sum())


@jax.jit
def _parallel(ssm: LinearGaussianSSM, y: Array, u: Array | None) -> SmootherResult:
    from pssm.filters.parallel import parallel_smoother  # which is built on this module

    return over_batches(parallel_smoother, ssm, (y, 2), (u, 2))


def _smoothed_means(rows: Gains, last: Array | int, means: Means) -> Array:
    """Filtered means plus what the future says of them, `m + L+ x` with `x` the future's message in units of `L+`.

    The message goes back through the orthogonal factors of the filter alone, so no error is amplified on the way.
    """
    length, n_obs = means.whitened.shape
    n = means.mean.shape[-1]

    row_xs, row_of_step = by_step((rows.turn, rows.turn_next, rows.new_chol), last, length)

    def back(message: Array, xs: tuple) -> tuple[Array, Array]:
        row, new_mean, whitened = xs
        turn, turn_next, new_chol = row_of_step(row)
        after = matvec(turn_next[:, :n].T, message)
        mean = new_mean + matvec(new_chol, after)
        return matvec(turn[n_obs:, :n].T, after) + matvec(turn[:n_obs, :n].T, whitened), mean

    xs = row_xs, means.new_mean, means.whitened
    return jax.lax.scan(back, jnp.zeros(n, means.mean.dtype), xs, reverse=True)[1]


def _covariance_back(left: Array, row: Gains, next_chol: Array, rest: Array) -> tuple[Array, Array, Array, Array]:
    """One step back from `V` of the next time: `V` of this one, `W`, the smoothed factor and the lag-one covariance."""
    n = left.shape[0]
    forth = row.turn_next[:, :n]
    cross = matmul(matmul(next_chol, left), matmul(left.T, matmul(forth, row.new_chol.T)))
    kept = triangularise(jnp.concatenate([matmul(forth.T, left), rest.T], axis=1))
    return matmul(_through_update(row), kept), kept, triangularise(matmul(row.new_chol, kept)), cross


def _through_update(row: Gains) -> Array:
    n = row.chol.shape[-1]
    return row.turn[-n:, :n].T


def _all_covariances(rows: Gains, rest: Array, last: Array | int, length: int) -> tuple[Array, Array]:
    """Factors of all steps and lag-one covariances, every step computed."""
    row_xs, row_of_step = by_step((rows, rest), last, length)
    next_xs, next_of_step = by_step(rows.chol, last, length)

    def step(left: Array, xs: tuple) -> tuple[Array, tuple[Array, Array]]:
        row, row_rest = row_of_step(xs[0])
        left, _, chol, cross = _covariance_back(left, row, next_of_step(xs[1]), row_rest)
        return left, (chol, cross)

    final = row_at(rows, jnp.asarray(length - 1), last)
    xs = jax.tree.map(lambda x: x[: length - 1], row_xs), next_xs[1:]
    _, (chol, cross) = jax.lax.scan(step, _through_update(final), xs, reverse=True)
    return jnp.concatenate([chol, final.new_chol[None]]), cross


def _settling_covariances(rows: Gains, rest: Array, last: Array, length: int) -> tuple[Array, Array]:
    """The same where row `last` stands for all later steps.

    Back from the end the covariances settle once more, `late` steps before it; from there to step `last` they stand
    still. Where the room for late rows does not suffice, every step is computed.
    """
    capacity = rows.chol.shape[0]
    final, final_rest = row_at((rows, rest), last, last)
    start = _through_update(final)
    blank = jnp.zeros((capacity, *final.chol.shape), final.chol.dtype)

    def late_step(state: tuple) -> tuple:
        late, left, earlier, check, chols, crosses, _ = state
        late = late + 1
        left, kept, chol, cross = _covariance_back(left, final, final.chol, final_rest)
        due = late == check
        still = in_all_of_a_batch(due & unmoved(earlier, kept))
        check, earlier = jnp.where(due, next_check(check), check), jnp.where(due, kept, earlier)
        return late, left, earlier, check, set_row(chols, chol, late), set_row(crosses, cross, late), still

    room = jnp.minimum(capacity - 1, length - 1 - last)
    state = jnp.asarray(0), start, blank[0], jnp.asarray(FIRST_CHECK), set_row(blank, final.new_chol, 0), blank
    late, left, _, _, late_chol, late_cross, still = jax.lax.while_loop(
        lambda s: (s[0] < room) & ~s[-1], late_step, (*state, jnp.asarray(False))
    )

    def settled() -> tuple[Array, Array]:
        def early_step(i: Array, state: tuple) -> tuple:
            left, chols, crosses = state
            t = last - 1 - i
            row, row_rest = row_at((rows, rest), t, last)
            left, _, chol, cross = _covariance_back(left, row, row_of(rows.chol, t + 1), row_rest)
            return left, set_row(chols, chol, t), set_row(crosses, cross, t)

        _, early_chol, early_cross = jax.lax.fori_loop(0, last, early_step, (left, blank, blank))
        t = jnp.arange(length)
        index = jnp.where(t < last, t, capacity + jnp.minimum(length - 1 - t, late))
        return jnp.concatenate([early_chol, late_chol])[index], jnp.concatenate([early_cross, late_cross])[index[:-1]]

    return jax.lax.cond(
        still | jnp.all(late == length - 1 - last), settled, lambda: _all_covariances(rows, rest, last, length)
    )


# --------------------------------------------------------------------------------------------------------------- draws


@jax.jit
def _draws(ssm: LinearGaussianSSM, y: Array, u: Array | None, noise: Array) -> Array:
    return over_series(_draws_with, ssm, y, u, (noise, 3), freeze=True)


def _draws_with(
    rows: Gains, last: Array | int, ssm: LinearGaussianSSM, y: Array, u: Array | None, noise: Array
) -> Array:
    """Backward sampling, `z_t` given `z_{t+1}`, for each path of `noise`, `(count, time, state)`."""
    length = y.shape[0]
    means, _ = scan_means(rows, last, ssm, y, u)
    joint = _two_rows_of_all(ssm, rows, last)
    joint_xs, joint_of_step = by_step((joint.gain, joint.chol), last, length - 1)

    def step(later: Array, xs: tuple) -> tuple[Array, Array]:
        row, mean, next_mean, e = xs
        gain, chol = joint_of_step(row)
        z = mean + matvec(gain, later - next_mean) + matvec(chol, e)
        return z, z

    def one(e: Array) -> Array:
        end = means.new_mean[-1] + matvec(row_at(rows.new_chol, jnp.asarray(length - 1), last), e[-1])
        xs = joint_xs, means.new_mean[:-1], means.mean[1:], e[:-1]
        return jnp.concatenate([jax.lax.scan(step, end, xs, reverse=True)[1], end[None]])

    return jax.vmap(one)(noise)
