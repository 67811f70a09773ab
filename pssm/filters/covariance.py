"""The half of the filter that never sees the data, over a whole series: covariances, gains and orthogonal factors.

One step is that of `step.py`; the transition to the next one keeps its orthogonal factor too,

    [ A L+  chol_Q ]  =  L' [ Q1  Q2 ]                   L' the next factor of the predicted covariance

Where nothing in this half varies with time, the gain reaches its steady state, mostly after a few dozen steps; the last
row then holds for all later steps. In a batch all elements stop together, so that the loop ends and its rows are not
kept apart.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.batch import in_all_of_a_batch
from pssm.filters.step import transition_rows, update_factor
from pssm.linalg import orthogonalise, triangularise
from pssm.linalg.small import row_of, set_row
from pssm.ssm import TRANSITION, LinearGaussianSSM

OF_COVARIANCES = ("A", "chol_Q", "C", "chol_R")
SHORTEST = 64  # a series below this length is not worth the search for a steady state
FIRST_CHECK = 12


class Gains(NamedTuple):
    """What one step does, whatever the data: the factors of `step.py` and of this module's head.

    `chol` and `new_chol` are `L` and `L+`, `gain` is `Kbar`, `root` is `S^-1/2`, zero where nothing is observed;
    `log_norm` is the part of the log-likelihood without data; `tied` is whether an observed entry is fixed by others
    (`ties.py`), None where none is. `turn` and `turn_next` are the orthogonal factors of the update and of the
    transition to the next step.
    """

    chol: Array
    new_chol: Array
    gain: Array
    root: Array
    log_norm: Array
    tied: Array | None
    turn: Array
    turn_next: Array

    def without_ties(self) -> "Gains":
        """The same where it is known that no entry is tied: what treats ties is then not compiled."""
        return self._replace(tied=None)


def may_reach_steady_state(ssm: LinearGaussianSSM, length: int) -> bool:
    """Whether to look for the steady state of the gain, by what can be known before."""
    return length >= SHORTEST and not set(OF_COVARIANCES) & set(ssm.time_varying)


def spread_rows(rows: Any, last: Array | int, length: int) -> Any:
    """A tree of arrays with `length` rows, those behind `last` equal to it."""
    if isinstance(last, int):
        return rows
    index = jnp.minimum(jnp.arange(length), last)
    return jax.tree.map(lambda x: x[index], rows)


def row_at(rows: Any, t: Array, last: Array | int) -> Any:
    """The row of a tree of arrays that holds at step `t`."""
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


def one_step(ssm: LinearGaussianSSM, chol: Array, observed: Array) -> tuple[Array, Gains]:
    """The next predicted factor, and the row of this step."""
    new = update_factor(ssm, chol, observed)
    next_chol, turn_next = orthogonalise(transition_rows(ssm, new.new_chol))
    return next_chol, Gains(chol, new.new_chol, new.gain, new.root, new.log_norm, new.tied, new.turn, turn_next)


def every_step(ssm: LinearGaussianSSM, observed: Array) -> Gains:
    """A row for each step."""

    def step(chol: Array, xs: tuple) -> tuple[Array, Gains]:
        observed_t, timed = xs
        return one_step(ssm.at(timed), chol, observed_t)

    xs = observed, timed_fields(ssm, ahead=True, names=OF_COVARIANCES)
    return jax.lax.scan(step, triangularise(ssm.chol_P0), xs)[1]


def until_steady_state(ssm: LinearGaussianSSM, observed: Array) -> tuple[Gains, Array, Array | bool]:
    """Rows up to a `last` one, and whether that one is the steady state, which holds for all later steps (if any).

    It is when the predicted covariance has not moved over the last fifth of the steps and no gap lies ahead. There
    is room for `_capacity` rows; those behind the last one are zero. Where that is room for every step, the answer is
    a plain True.
    """
    length = observed.shape[0]
    ragged = jnp.any(observed != observed[-1:], axis=1)
    same_mask_from = jnp.max(jnp.where(ragged, jnp.arange(length) + 1, 0))

    def step(state: tuple) -> tuple:
        t, chol, earlier, check, rows, _ = state
        next_chol, row = one_step(ssm, chol, observed[t])
        rows = jax.tree.map(lambda all_rows, x: set_row(all_rows, x, t), rows, row)
        due = t == check
        still = unmoved(earlier, next_chol) & unmoved(chol, next_chol)  # this row too: not the first one after a gap
        steady = in_all_of_a_batch(due & (t >= same_mask_from) & still)
        earlier = jnp.where(due, next_chol, earlier)
        return t + 1, next_chol, earlier, jnp.where(due, next_check(check), check), rows, steady

    start = triangularise(ssm.chol_P0)
    row = jax.eval_shape(lambda: one_step(ssm, start, observed[0])[1])
    capacity = _capacity(row, length)
    rows = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), row)
    state = jnp.asarray(0), start, start, jnp.asarray(FIRST_CHECK), rows, jnp.asarray(False)
    most = capacity if capacity == length else jnp.where(same_mask_from < capacity, capacity, 0)  # else in vain
    t, _, _, _, rows, steady = jax.lax.while_loop(lambda s: (s[0] < most) & ~s[-1], step, state)
    return rows, t - 1, steady if capacity < length else True


def _capacity(row: Gains, length: int) -> int:
    """Room for the steps before the steady state: filling it with zeros must cost little."""
    return min(length, max(2 * SHORTEST, min(512, 2**19 // sum(x.size for x in jax.tree.leaves(row)))))


def next_check(check: Array) -> Array:
    """Steps between two looks for the steady state grow with their number: slow drifts must show."""
    return 5 * check // 4


def unmoved(before: Array, after: Array) -> Array:
    """Whether two factors agree to rounding: each pivot relative to itself, each row relative to its length."""
    tolerance = 8 * jnp.finfo(after.dtype).eps
    moved = jnp.abs(after - before)
    size = jnp.sqrt(jnp.sum(after**2, axis=1))
    pivots = jnp.abs(jnp.diagonal(after))
    return jnp.all(moved <= tolerance * size[:, None]) & jnp.all(jnp.diagonal(moved) <= tolerance * pivots)
