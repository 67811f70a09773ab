"""A pass over one or many series by a plan: gains first, then what is made of them.

`what(rows, last, ssm, y, u, *arrays)` makes a result of gains, row `min(t, last)` of which holds at step `t`. Whatever
way the gains come, derivatives (of any order and direction) are those of the recursion with every step.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.batch import over_batches
from pssm.filters.collapse import basis, collapse, where_collapsed
from pssm.filters.covariance import every_step, until_steady_state
from pssm.filters.plan import Plan
from pssm.linalg.small import batch_first
from pssm.ssm import LinearGaussianSSM

What = Callable[..., Any]


def run(what: What, plan: Plan, ssm: LinearGaussianSSM, y: Array, u: Array | None, *arrays: tuple[Array, int]) -> Any:
    """What is made of the gains of each series of a batch.

    Args:
        what: takes gains, an unbatched model, and arrays that are unbatched or, where the gains are shared, have the
            batch axes of all series.
        plan: how.
        ssm: a model, with batch axes or without.
        y: series `(..., time, obs)`.
        u: inputs `(..., time, input)`, or None.
        arrays: pairs of a further array and its number of core axes.
    """
    arrays_in = (y, 2), (u, 2), *arrays
    if not plan.shared_gains:
        return over_batches(partial(of_one_series, what, plan), ssm, *arrays_in)

    def together(observed: Array) -> Any:
        return of_gains(what, plan, observed, ssm, *spread(*arrays_in))

    def apart() -> Any:
        return over_batches(partial(of_one_series, what, plan.every_step()), ssm, *arrays_in)

    return where_gaps_agree(plan, y, together, apart)


def where_gaps_agree(plan: Plan, y: Array, together: Callable[[Array], Any], apart: Callable[[], Any]) -> Any:
    """`together(observed)`, with the mask of all series, where their gaps are in the same places; else `apart()`."""
    observed, agree = common_mask(y, plan.ends_matter)
    return together(observed) if agree is True else jax.lax.cond(agree, lambda: together(observed), apart)


def common_mask(y: Array, ends_matter: bool) -> tuple[Array, Array | bool]:
    """What of a step is observed in any of the series, `(time, obs)`, and whether that is so in all of them.

    One series, or none, agrees with itself. Without `ends_matter` the steps after the last observation of a series are
    not looked at.
    """
    gaps = jnp.isnan(y).reshape(math.prod(y.shape[:-2]), *y.shape[-2:])
    common = jnp.all(gaps, axis=0) & (len(gaps) > 0)
    if len(gaps) < 2:
        return ~common, True
    alike = gaps == common
    if not ends_matter:
        steps = jnp.arange(y.shape[-2])
        ends = jnp.max(jnp.where(gaps.all(axis=2), 0, steps + 1), axis=1)
        alike = alike | (steps >= ends[:, None])[:, :, None]
    return ~common, jnp.all(alike)


def spread(*arrays: tuple[Array | None, int]) -> list[Array | None]:
    """Pairs of an array and its number of core axes, each array with the batch axes of all of them."""
    batch = jnp.broadcast_shapes(*(x.shape[: x.ndim - core] for x, core in arrays if x is not None))
    return [x if x is None else jnp.broadcast_to(x, batch + x.shape[x.ndim - core :]) for x, core in arrays]


def of_one_series(what: What, plan: Plan, *args: Any) -> Any:
    """`args = (ssm, y, u, ...)` of a series with gains of its own, unbatched."""
    observed = ~jnp.isnan(args[1])
    general = partial(of_gains, what, plan, observed)
    if not plan.collapse:
        return general(*args)
    return where_collapsed(partial(_of_collapsed_series, what, observed), general, *args)


def of_gains(what: What, plan: Plan, observed: Array, *args: Any) -> Any:
    """`args = (ssm, ...)` with an unbatched model, and the mask `(time, obs)` that its gains follow from."""
    return (_of_gains_until_steady if plan.steady_state else _of_every_gain)(what, observed, *args)


def _of_every_gain(what: What, observed: Array, *args: Any) -> Any:
    return what(every_step(args[0], observed), observed.shape[0] - 1, *args)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_gains_until_steady(what: What, observed: Array, *args: Any) -> Any:
    rows, last, steady = until_steady_state(args[0], observed)
    if steady is True:
        return batch_first(what(rows, last, *args))

    def by_steady_state() -> Any:
        return what(rows.without_ties(), last, *args)

    steady = steady & ~jnp.any(rows.tied)
    return batch_first(jax.lax.cond(steady, by_steady_state, lambda: _of_every_gain(what, observed, *args)))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _of_collapsed_series(what: What, observed: Array, *args: Any) -> Any:
    ssm, y, lacking = collapse(basis(*args[:3]), *args[:3])
    rows = every_step(ssm, ~jnp.isnan(y))
    rows = rows._replace(log_norm=rows.log_norm + lacking)
    return batch_first(what(rows, len(y) - 1, ssm, y, *args[2:]))


def _of_every_gain_jvp(what: What, primals: tuple, tangents: tuple) -> tuple:
    return batch_first(jax.jvp(partial(_of_every_gain, what), primals, tangents))


_of_gains_until_steady.defjvp(_of_every_gain_jvp)
_of_collapsed_series.defjvp(_of_every_gain_jvp)
