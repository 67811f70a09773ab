"""Diffuse starts, exactly: the filter's first steps, with the limit taken in every product.

While the data have not determined the start, the state is `m + L e + E delta`: `e` standard normal, and `delta` flat,
one entry for each direction that is open. A reading `C_i z + ... + R_i v` of which `C_i E` is not zero is no
innovation: it fixes one entry of `delta` by the others and by `e` and `v`, and so closes one direction. With `f` the
pivot,

    delta_k = (nu_i - C_i L e - R_i v - sum_j (C_i E)_j delta_j) / f,        nu_i = y_i - C_i m - ...

is put into the state, which leaves `e` and `v` as they were. Its share of the log-likelihood is `-log |f|`: the limit
of that of an innovation with variance `kappa f^2`, plus `log(2 pi kappa) / 2`. Readings that are left are those of an
ordinary step. No large number stands for infinity and nothing is subtracted from a covariance, so singular noise,
exact sensors, gaps and float32 are as elsewhere. When all directions are closed the ordinary filter goes on.

Source:
    Ansley & Kohn 1985; Koopman 1997; de Jong 1991. Here on square roots, reading by reading.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Array
from pssm.batch import in_all_of_a_batch
from pssm.filters.covariance import Gains, timed_fields
from pssm.filters.means import Means, shift
from pssm.filters.step import innovation_parts, transition_mean, transition_rows
from pssm.filters.ties import OfStep, what_ties_add
from pssm.linalg import orthogonalise, triangularise, unless
from pssm.linalg.small import affine, matmul
from pssm.missing import split_missing
from pssm.results import FilterResult
from pssm.ssm import LinearGaussianSSM

SPARE = 8  # steps beyond the size of the state that gaps may take before the whole series is filtered here
ROUNDING = 16  # a number of so many times its own rounding error is zero


class Rounded(NamedTuple):
    """Numbers, and how far rounding may have moved each, by a running analysis.

    It decides what is zero: whether a direction is open. No scale of the states or of the readings comes into it.
    """

    value: Array
    error: Array

    def cut(self) -> "Rounded":
        """With zero in place of what may be rounding; derivatives stay as they are."""
        noise = (jnp.abs(self.value) <= ROUNDING * self.error) & (self.value != 0)
        return Rounded(self.value - jax.lax.stop_gradient(jnp.where(noise, self.value, 0.0)), self.error)

    def without(self, column: "Rounded", row: "Rounded", k: Array) -> "Rounded":
        """`self - column row`, of which column `k` is zero."""
        gone = column.value * row.value
        size = jnp.abs(self.value) + jnp.abs(gone)
        error = self.error + column.error * jnp.abs(row.value) + jnp.abs(column.value) * row.error + _eps(size) * size
        is_k = jnp.arange(self.value.shape[1]) == k
        error = jax.lax.stop_gradient(jnp.where(is_k, 0.0, error))
        return Rounded(jnp.where(is_k, 0.0, self.value - gone), error).cut()


def _read(C: Array, table: Rounded, n: int, noise: Array) -> Rounded:
    """`C` times the rows of the state, with `noise` added."""
    value, error = table.value[:n], table.error[:n]
    size = matmul(jnp.abs(C), jnp.abs(value)) + jnp.abs(noise)
    error = jax.lax.stop_gradient(matmul(jnp.abs(C), error) + _eps(size) * size)
    return Rounded(matmul(C, value) + noise, error).cut()


def _eps(x: Array) -> float:
    return float(jnp.finfo(x.dtype).eps)


class Open(NamedTuple):
    """The directions of a step that are open, in the predicted state and in the filtered one, and the way back.

    With `x` the filtered state and `xi` more noise, both standard normal before what comes later is known, and
    `later` the entries of `delta` that are still open, `(e, delta) = known + by_x (x, xi) + by_later later`.

    Attributes:
        before: `E` of the predicted state, `(state, diffuse)`; columns of closed directions are zero.
        after: `E` of the filtered state, likewise.
        known: `(state + diffuse,)`.
        by_x: `(state + diffuse, 2 state + diffuse)`.
        by_later: `(state + diffuse, diffuse)`.
    """

    before: Array
    after: Array
    known: Array
    by_x: Array
    by_later: Array


class Begun(NamedTuple):
    """Steps with open directions: the rows of the filter, each with a time axis, and the state that they lead to.

    Attributes:
        rows: gains and factors, as those of other steps.
        means: predicted, filtered, and the whitened innovations of readings that closed nothing.
        log_likelihoods: `(time,)`.
        open: of each step.
        mean: of the state predicted for the step after these.
        chol: factor of its spread about `mean` and the open directions.
        left: `E` of it; zero where all is closed.
    """

    rows: Gains
    means: Means
    log_likelihoods: Array
    open: Open
    mean: Array
    chol: Array
    left: Array

    @property
    def closed(self) -> Array:
        """Whether no direction is left open."""
        return ~jnp.any(jax.lax.stop_gradient(self.left) != 0)


def first_steps(ssm: LinearGaussianSSM, length: int) -> int:
    """How many steps are taken with open directions before it is asked whether any is left."""
    steps = ssm.n_state + SPARE
    return length if length <= 2 * steps else steps


def begin(ssm: LinearGaussianSSM, y: Array, u: Array | None, steps: int, *, back: bool = False) -> Begun:
    """The first `steps` steps of one series; with `back` also what the way back needs (`Open`, else without rows)."""
    filled, observed = split_missing(y)
    start = np.eye(ssm.n_state)[:, list(ssm.diffuse)]

    def step(carry: tuple, xs: tuple) -> tuple[tuple, tuple]:
        mean, chol, before = carry
        y_t, seen, u_t, u_next, timed = xs
        now = ssm.at(timed)
        row, means, log_likelihood, open_, noise = _one_step(now, mean, chol, before, y_t, seen, u_t, back)
        next_chol, turn_next = orthogonalise(transition_rows(now, row.new_chol))
        # Errors add up in squares over the steps: bounds of a rotation would grow without end.
        errors = jnp.sqrt(matmul(now.A**2, noise**2)) + _eps(y) * matmul(jnp.abs(now.A), jnp.abs(open_.after))
        before = Rounded(matmul(now.A, open_.after), jax.lax.stop_gradient(errors)).cut()
        carry = transition_mean(now, means.new_mean, u_next), next_chol, before
        return carry, (row._replace(turn_next=turn_next), means, log_likelihood, open_)

    xs = filled, observed, u, shift(u), timed_fields(ssm, ahead=True)
    first = ssm.m0, triangularise(ssm.chol_P0), Rounded(jnp.asarray(start, ssm.dtype), jnp.zeros_like(start, ssm.dtype))
    (mean, chol, left), done = jax.lax.scan(step, first, jax.tree.map(lambda x: x[:steps], xs))
    return Begun(*done, mean, chol, left.value)


def _one_step(
    ssm: LinearGaussianSSM,
    mean: Array,
    chol: Array,
    before: Rounded,
    y: Array,
    seen: Array,
    u: Array | None,
    back: bool,
) -> tuple[Gains, Means, Array, Open, Array]:
    n_obs, n = ssm.C.shape
    d = before.value.shape[1]
    # Rows: the state, `e` and `delta` themselves. Columns: a constant, `e`, `v` and what is open of `delta`.
    zeros = jnp.zeros((n, n_obs), y.dtype)
    state = jnp.concatenate([mean[:, None], chol, zeros, before.value], axis=1)
    width = state.shape[1]
    themselves = np.concatenate([np.eye(n, width, 1), np.eye(d, width, width - d)])[: n + d if back else 0]
    more = len(themselves)
    errors = jnp.zeros((n + more, width), y.dtype).at[:n, width - d :].set(before.error)
    rest = y - affine(jnp.zeros_like(ssm.C), ssm.d, ssm.D, mean, u)
    noise = jnp.concatenate([-rest[:, None], zeros.T, ssm.chol_R, jnp.zeros((n_obs, d), y.dtype)], axis=1)

    def close(table: Rounded, xs: tuple) -> tuple[Rounded, tuple[Array, Array]]:
        """One reading: `reading = 0` is solved for one entry of `delta`, if there is an open one in it."""
        C_i, noise_i, seen_i = xs
        reading = _read(C_i[None], table, n, noise_i[None])
        k = width - d + jnp.argmax(jnp.abs(jax.lax.stop_gradient(reading.value[0, width - d :])))
        closes = seen_i & (reading.value[0, k] != 0)
        pivot = jnp.where(closes, reading.value[0, k], 1.0)
        column = Rounded(*(jax.lax.dynamic_index_in_dim(x, k, 1) for x in table))
        after = table.without(column, Rounded(reading.value / pivot, reading.error / jnp.abs(pivot)), k)
        return jax.tree.map(lambda x, y: jnp.where(closes, x, y), after, table), (closes, jnp.log(jnp.abs(pivot)))

    table, (closed, log_pivots) = jax.lax.scan(
        close, Rounded(jnp.concatenate([state, jnp.asarray(themselves, y.dtype)]), errors), (ssm.C, noise, seen)
    )
    mean_now, spread, after = jnp.split(table.value, [1, width - d], axis=1)
    mean_now = mean_now[:, 0]

    ordinary = seen & ~closed
    top = _read(ssm.C, table, n, noise).value[:, 1 : width - d]
    stacked = jnp.concatenate([jnp.where(ordinary[:, None], top, 0.0), spread])
    joint, turn = orthogonalise(jnp.pad(stacked, ((0, 0), (0, more))))
    root, log_norm, tied = innovation_parts(joint[:n_obs, :n_obs], ordinary)
    whitened = root @ jnp.where(ordinary, rest - ssm.C @ mean_now[:n], 0.0)
    found = mean_now + joint[n_obs:, :n_obs] @ whitened

    of_step = jax.lax.stop_gradient(OfStep(stacked[:n_obs], root, turn[:n_obs, : n + n_obs]))
    args = jax.lax.stop_gradient((ssm, of_step, mean_now[:n], y, ordinary, u))
    lacking = unless(~tied, jnp.zeros((), y.dtype), lambda: what_ties_add(*args))
    log_likelihood = jnp.where(jnp.any(ordinary), log_norm - 0.5 * jnp.sum(whitened**2) + lacking, 0.0)
    log_likelihood = log_likelihood - jnp.sum(jnp.where(closed, log_pivots, 0.0))

    x = slice(n_obs, n_obs + n)
    turned = turn[: n_obs + n, : n + n_obs]
    row = Gains(chol, joint[x, x], joint[x, :n_obs], root, log_norm, tied, turned, jnp.zeros(()))
    open_ = Open(before.value, after[:n], found[n:], joint[n_obs + n :, n_obs:], after[n:])
    return row, Means(mean, found[:n], whitened), log_likelihood, open_, table.error[:n, width - d :]


# --------------------------------------------------------------------------------------------------- with what follows


def then(
    ssm: LinearGaussianSSM,
    arrays: tuple[Any, ...],
    begun_only: Callable[[Begun], Any],
    and_rest: Callable[..., Any],
    *,
    back: bool = False,
) -> Any:
    """What is made of a series: by its first steps and an ordinary filter after them, or with all steps like the first.

    Args:
        ssm: an unbatched model with a diffuse start.
        arrays: `y`, `u` and further arrays with the time in front, of one series.
        begun_only: takes a `Begun` of all steps.
        and_rest: takes a `Begun` of the first steps that leave nothing open; the model of the steps after these, which
            starts where they lead; and `arrays` of those.
        back: whether the way back is needed.
    """
    y, u = arrays[:2]
    length = len(y)
    steps = first_steps(ssm, length)
    begun = begin(ssm, y, u, steps, back=back)
    if steps == length:
        return begun_only(begun)
    rest = ssm.steps(steps, length).starting_at(begun.mean, begun.chol)
    later = jax.tree.map(lambda x: x[steps:], arrays)
    closed = in_all_of_a_batch(begun.closed)
    # It is rare, so nothing is kept of it for a derivative: that would be room for all steps, filled with zeros.
    all_steps = jax.checkpoint(lambda ssm, y, u: begun_only(begin(ssm, y, u, length, back=back)))
    return jax.lax.cond(closed, lambda: and_rest(begun, rest, *later), lambda: all_steps(ssm, y, u))


def diffuse_log_likelihood(rest_of: Callable[..., Array], ssm: LinearGaussianSSM, y: Array, u: Array | None) -> Array:
    """`log p(y)` of one series; `rest_of(ssm, y, u)` is that of a series with an ordinary start."""
    return then(
        ssm,
        (y, u),
        lambda begun: begun.log_likelihoods.sum(),
        lambda begun, rest, y, u: begun.log_likelihoods.sum() + rest_of(rest, y, u),
    )


def diffuse_filter(
    rest_of: Callable[..., FilterResult], ssm: LinearGaussianSSM, y: Array, u: Array | None
) -> FilterResult:
    """`kalman_filter` of one series likewise. States that are open have the mean NaN and an infinite variance."""

    def first(begun: Begun) -> FilterResult:
        rows, means, each = begun.rows, begun.means, begun.log_likelihoods
        new_mean, new_chol = where_open(begun.open.after, means.new_mean, rows.new_chol)
        mean, chol = where_open(begun.open.before, means.mean, rows.chol)
        return FilterResult(each.sum(), each, new_mean, new_chol, mean, chol)

    def both(begun: Begun, *rest: Any) -> FilterResult:
        head, tail = first(begun), rest_of(*rest)
        total = head.log_likelihood + tail.log_likelihood
        return FilterResult(total, *(jnp.concatenate(pair) for pair in zip(head[1:], tail[1:], strict=True)))

    return then(ssm, (y, u), first, both)


def where_open(directions: Array, mean: Array, chol: Array) -> tuple[Array, Array]:
    """Means and factors `(time, ...)` with NaN, and infinity on the diagonal, for states that have a part in `E`."""
    is_open = jnp.any(directions != 0, axis=2)
    infinite = jnp.where(jnp.eye(chol.shape[-1], dtype=bool), jnp.inf, 0.0)
    return jnp.where(is_open, jnp.nan, mean), jnp.where(is_open[..., None], infinite, chol)
