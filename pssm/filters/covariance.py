"""The half of the filter that never sees the data: covariances, gains and their orthogonal factors.

One step, with `L` a factor of the predicted covariance, stacks the observation above the state and triangularises:

    [ C L   chol_R ]     [ S^1/2   0  ] [ Q11  Q12 ]     S = C P C' + R,  K = Kbar S^-1/2 the Kalman gain
    [   L     0    ]  =  [ Kbar    L+ ] [ Q21  Q22 ]     L+ a factor of the filtered covariance

    [ A L+  chol_Q ]  =  L' [ Q1  Q2 ]                   L' the next factor of the predicted covariance

Missing entries are rows of zeros in the first line: their pivot in `S^1/2` is zero and is skipped, and so is an entry
that was known exactly before it was seen. Nothing is subtracted from a covariance, so none can turn negative, and
float32 is enough where a covariance recursion needs float64 (Kailath, Sayed & Hassibi 2000, chapter 12).

Where nothing in this half varies with time, it comes to a standstill, mostly after a few dozen steps; the last row then
serves all later steps. In a batch all elements stop together, so that the loop ends and its rows are not kept apart.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.batch import in_all_of_a_batch, over_batches
from pssm.filters.collapse import LOG_2PI, basis, collapse, is_wide, where_collapsed
from pssm.linalg import orthogonalise, solve_lower, triangularise
from pssm.linalg.small import batch_first, matmul, row_of, set_row
from pssm.ssm import TRANSITION, LinearGaussianSSM

OF_COVARIANCES = ("A", "chol_Q", "C", "chol_R")
SHORTEST = 64  # a series below this length is not worth the search for a standstill
FIRST_CHECK = 12


class Gains(NamedTuple):
    """What one step does, whatever the data: the factors of this module's head.

    `chol` and `new_chol` are `L` and `L+`, `gain` is `Kbar`, `root` is `S^-1/2`, zero where nothing is observed;
    `log_norm` is the part of the log-likelihood without data. `turn` and `turn_next` are the orthogonal factors of
    the update and of the transition to the next step.
    """

    chol: Array
    new_chol: Array
    gain: Array
    root: Array
    log_norm: Array
    turn: Array
    turn_next: Array


def over_series(
    fn: Callable[..., Any],
    ssm: LinearGaussianSSM,
    y: Array,
    u: Array | None,
    *arrays: tuple[Array, int],
    freeze: bool,
    ends_matter: bool = True,
    one: Callable[..., Any] | None = None,
    each: Callable[..., Any] | None = None,
    together: Callable[..., Any] | None = None,
) -> Any:
    """`fn(rows, last, ssm, y, u, *arrays)` for each series of a batch; row `min(t, last)` of `rows` serves step `t`.

    Series with gaps in the same places share the gains of one model, and one call of `fn`.

    Args:
        fn: takes gains, an unbatched model, and arrays that are unbatched or have the batch axes of all series.
        ssm: a model, with batch axes or without.
        y: series `(..., time, obs)`.
        u: inputs `(..., time, input)`, or None.
        arrays: pairs of a further array and its number of core axes.
        freeze: let the rows end at a standstill. Derivatives, of any order and direction, are those of all steps.
        ends_matter: False if nothing depends on gains after the last observation of a series. Series of different
            lengths, padded to the longest one, then share their gains too.
        one: `one(ssm, y, u, *arrays)` for a series with a model of its own, in place of `fn` with its gains.
        each: the same for series that share a model, but not their gaps.
        together: `together(gaps, ssm, y, u)` for a batch that shares its gains, in place of `fn`; `gaps` are those of
            one series.
    """
    arrays_in = (y, 2), (u, 2), *arrays
    if ssm.batch_shape or not any(x is not None and x.ndim > core for x, core in arrays_in):
        return over_batches(one or partial(with_gains, fn, freeze=freeze), ssm, *arrays_in)

    def separate() -> Any:
        return over_batches(each or partial(with_gains, fn, freeze=False), ssm, *arrays_in)

    shapes = [x.shape[: x.ndim - core] for x, core in arrays_in if x is not None]
    batch = jnp.broadcast_shapes(*shapes)
    spread = [x if x is None else jnp.broadcast_to(x, batch + x.shape[x.ndim - core :]) for x, core in arrays_in]

    def shared(gaps: Array) -> Any:
        if together is not None:
            return together(gaps, ssm, *spread)
        return with_gains(fn, ssm, *spread, gaps=gaps, freeze=freeze)

    gaps = jnp.isnan(y).reshape(math.prod(y.shape[:-2]), *y.shape[-2:])
    common = jnp.all(gaps, axis=0) & (len(gaps) > 0)
    if len(gaps) < 2:
        return shared(common)
    alike = gaps == common
    if not ends_matter:
        steps = jnp.arange(y.shape[-2])
        ends = jnp.max(jnp.where(gaps.all(axis=2), 0, steps + 1), axis=1)
        alike = alike | (steps >= ends[:, None])[:, :, None]
    return jax.lax.cond(jnp.all(alike), lambda: shared(common), separate)


def with_gains(fn: Callable[..., Any], *args: Any, freeze: bool, gaps: Array | None = None) -> Any:
    """`fn(rows, last, *args)` for `args = (ssm, y, ...)` with an unbatched model; see `over_series`."""

    def full(observed: Array, *args: Any) -> Any:
        return fn(every_step(args[0], observed), observed.shape[0] - 1, *args)

    @jax.custom_jvp
    def frozen(observed: Array, *args: Any) -> Any:
        rows, last, served = until_standstill(args[0], observed)
        if served is True:
            return batch_first(fn(rows, last, *args))
        return batch_first(jax.lax.cond(served, lambda: fn(rows, last, *args), lambda: full(observed, *args)))

    frozen.defjvp(lambda primals, tangents: batch_first(jax.jvp(full, primals, tangents)))
    observed = ~(jnp.isnan(args[1]) if gaps is None else gaps)
    general = frozen if freeze and can_freeze(args[0], observed.shape[0]) else full
    if gaps is not None or not is_wide(*args[:2]):
        return general(observed, *args)

    @jax.custom_jvp
    def collapsed(observed: Array, *args: Any) -> Any:
        ssm, y, lacking = collapse(basis(*args[:3]), *args[:3])
        rows = every_step(ssm, ~jnp.isnan(y))
        rows = rows._replace(log_norm=rows.log_norm + lacking)
        return batch_first(fn(rows, len(y) - 1, ssm, y, *args[2:]))

    collapsed.defjvp(lambda primals, tangents: batch_first(jax.jvp(full, primals, tangents)))
    return where_collapsed(partial(collapsed, observed), partial(general, observed), *args)


def can_freeze(ssm: LinearGaussianSSM, length: int) -> bool:
    """Whether covariances may come to a standstill."""
    return length >= SHORTEST and not set(OF_COVARIANCES) & set(ssm.time_varying)


def spread_rows(rows: Any, last: Array | int, length: int) -> Any:
    """A tree of arrays with `length` rows, those behind `last` equal to it."""
    if isinstance(last, int):
        return rows
    index = jnp.minimum(jnp.arange(length), last)
    return jax.tree.map(lambda x: x[index], rows)


def row_at(rows: Any, t: Array, last: Array | int) -> Any:
    """The row of a tree of arrays that serves step `t`."""
    return jax.tree.map(lambda x: row_of(x, jnp.minimum(t, last)), rows)


def by_step(rows: Any, last: Array | int, length: int) -> tuple[Any, Callable[[Any], Any]]:
    """Rows as inputs of a scan over `length` steps, and what makes one step's row of one step's input.

    Rows of every step go in as they are, so that a scan can be differentiated; others are looked up.
    """
    if isinstance(last, int):
        return rows, lambda row: row
    return jnp.arange(length), lambda t: row_at(rows, t, last)


def timed_fields(ssm: LinearGaussianSSM, *, ahead: bool, names: tuple[str, ...] | None = None) -> dict[str, Array]:
    """Time-varying fields as scan inputs, all or those among `names`.

    With `ahead`, transition fields are shifted so that step `t` of the scan carries the transition INTO step `t + 1`;
    the last one is repeated, and what is computed from it is thrown away.
    """
    fields = {name: getattr(ssm, name) for name in ssm.time_varying if names is None or name in names}
    if not ahead:
        return fields
    return {name: jnp.concatenate([x[1:], x[-1:]]) if name in TRANSITION else x for name, x in fields.items()}


class Update(NamedTuple):
    """`Kbar`, `L+`, `S^-1/2`, the part of the log-likelihood without data, and the orthogonal factor."""

    gain: Array
    new_chol: Array
    root: Array
    log_norm: Array
    turn: Array


def update(ssm: LinearGaussianSSM, chol: Array, observed: Array) -> Update:
    """The update of this module's head, from any factor of the predicted covariance, `(state, columns)`."""
    n_obs = ssm.C.shape[0]
    seen = observed[:, None]
    top = jnp.concatenate([matmul(jnp.where(seen, ssm.C, 0.0), chol), jnp.where(seen, ssm.chol_R, 0.0)], axis=1)
    bottom = jnp.concatenate([chol, jnp.zeros((chol.shape[0], n_obs), chol.dtype)], axis=1)
    joint, turn = orthogonalise(jnp.concatenate([top, bottom]))
    chol_s = joint[:n_obs, :n_obs]
    pivots = jnp.diagonal(chol_s)
    live = pivots > 0
    log_norm = -jnp.sum(jnp.where(live, 0.5 * LOG_2PI + jnp.log(jnp.where(live, pivots, 1.0)), 0.0))
    root = solve_lower(chol_s, jnp.eye(n_obs, dtype=chol.dtype))
    return Update(joint[n_obs:, :n_obs], joint[n_obs:, n_obs:], root, log_norm, turn)


def one_step(ssm: LinearGaussianSSM, chol: Array, observed: Array) -> tuple[Array, Gains]:
    """The next predicted factor, and the row of this step."""
    new = update(ssm, chol, observed)
    next_chol, turn_next = orthogonalise(jnp.concatenate([matmul(ssm.A, new.new_chol), ssm.chol_Q], axis=1))
    return next_chol, Gains(chol, new.new_chol, new.gain, new.root, new.log_norm, new.turn, turn_next)


def every_step(ssm: LinearGaussianSSM, observed: Array) -> Gains:
    """A row for each step."""

    def step(chol: Array, xs: tuple) -> tuple[Array, Gains]:
        observed_t, timed = xs
        return one_step(ssm.at(timed), chol, observed_t)

    xs = observed, timed_fields(ssm, ahead=True, names=OF_COVARIANCES)
    return jax.lax.scan(step, triangularise(ssm.chol_P0), xs)[1]


def until_standstill(ssm: LinearGaussianSSM, observed: Array) -> tuple[Gains, Array, Array | bool]:
    """Rows up to a `last` one, and whether that one stands for all later steps (if there are any).

    It does when the predicted covariance has not moved over the last fifth of the steps and no gap lies ahead. There
    is room for `_capacity` rows; those behind the last one are zero. Where that is room for every step, the answer is
    a plain True.
    """
    length = observed.shape[0]
    ragged = jnp.any(observed != observed[-1], axis=1)
    steady_from = jnp.max(jnp.where(ragged, jnp.arange(length) + 1, 0))

    def step(state: tuple) -> tuple:
        t, chol, earlier, check, rows, _ = state
        next_chol, row = one_step(ssm, chol, observed[t])
        rows = jax.tree.map(lambda all_rows, x: set_row(all_rows, x, t), rows, row)
        due = t == check
        still = in_all_of_a_batch(due & (t >= steady_from) & unmoved(earlier, next_chol))
        earlier = jnp.where(due, next_chol, earlier)
        return t + 1, next_chol, earlier, jnp.where(due, next_check(check), check), rows, still

    start = triangularise(ssm.chol_P0)
    row = jax.eval_shape(lambda: one_step(ssm, start, observed[0])[1])
    capacity = _capacity(row, length)
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), row)
    state = jnp.asarray(0), start, start, jnp.asarray(FIRST_CHECK), rows, jnp.asarray(False)
    most = capacity if capacity == length else jnp.where(steady_from < capacity, capacity, 0)  # else in vain
    t, _, _, _, rows, still = jax.lax.while_loop(lambda s: (s[0] < most) & ~s[-1], step, state)
    return rows, t - 1, still if capacity < length else True


def _capacity(row: Gains, length: int) -> int:
    """Room for the steps before a standstill: filling it with zeros must cost little."""
    return min(length, max(2 * SHORTEST, min(512, 2**19 // sum(x.size for x in jax.tree.leaves(row)))))


def next_check(check: Array) -> Array:
    """Steps between two looks for a standstill grow with their number: slow drifts must show."""
    return 5 * check // 4


def unmoved(before: Array, after: Array) -> Array:
    """Whether two factors agree to rounding: each pivot relative to itself, each row relative to its length."""
    tolerance = 8 * jnp.finfo(after.dtype).eps
    moved = jnp.abs(after - before)
    size = jnp.sqrt(jnp.sum(after**2, axis=1))
    pivots = jnp.abs(jnp.diagonal(after))
    return jnp.all(moved <= tolerance * size[:, None]) & jnp.all(jnp.diagonal(moved) <= tolerance * pivots)
