"""The search for the mode of a path: steps along a direction that climbs, and when it is over.

What counts is the slope of the log density along the step, never a difference of two of its values: with large counts
these are large numbers whose rounding hides a gain of many nats. A Gauss-Newton step is `x = M g`, where `g` is the
gradient and `M` an approximate covariance of the posterior. So the slope along it, `g'x = x' M^{-1} x`, is the squared
length of the step in the posterior's standard deviations, and half of it is the gain that is left.

Source:
    Steps accepted by their slopes where rounding hides the values: Hager & Zhang 2005, "approximate Wolfe conditions".
    The squared length as a measure of what is left (Newton decrement): Boyd & Vandenberghe 2004, section 9.5.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._checks import is_traced
from pssm._types import Array
from pssm.distributions import StatePath
from pssm.modes.coupled import Conjugate, group_shape, sum_groups

Function = Callable[[Array], Array]

TRIALS = 60  # most halvings or doublings of a step
LEFT = 1e-2, 1e-5  # squared length of the step that may be left in the end: in all, and for each number of the path


class Line(NamedTuple):
    """The log density and its slope at a point of the line along a step, for each lane."""

    value: Array
    slope: Array


def start_path(prior: StatePath, log_lik: Function) -> Array:
    """The path of the prior without noise, with the batch shape of the log-likelihood too."""
    start = prior.path_from_noise(jnp.zeros((*prior.batch_shape, prior.noise_size), prior.m0.dtype))
    shape = jnp.broadcast_shapes(start.shape, jax.eval_shape(log_lik, start).shape + prior.event_shape)
    return jnp.broadcast_to(start, shape)


def climb(
    prior: StatePath, log_lik: Function, direction: Function, start: Array, *, num_iters: int, tolerance: float
) -> Array:
    """The path after at most `num_iters` steps along `direction(path)`.

    A lane is an entry of the batch, or the entries that share a term of the likelihood. It is over when the squared
    length of its step in standard deviations is below `tolerance`, or when the step moves no number by more than
    rounding does.
    """
    line, density = along(prior, log_lik), density_of(prior, log_lik)
    coupled = group_shape(log_lik, start) != start.shape[:-2]
    tolerance = 1e-4 * tolerance if coupled else tolerance  # no step squares what is left there

    def body(state: tuple[Array, Array, Array, Conjugate | None]) -> tuple[Array, Array, Array, Conjugate | None]:
        path, count, _, memory = state
        move = direction(path)
        move = jnp.where(jnp.isfinite(move), move, 0.0)
        if memory is not None:
            move, memory = memory.next(density, path, move)
        here = line(path, move)
        going = ~settled(path, move, here, tolerance)
        size = jnp.where(going, _length(lambda s: line(path + _wide(s) * move, move), here, path), 0.0)
        return path + _wide(size) * move, count + 1, jnp.any(size > 0), memory

    state = start, jnp.zeros((), int), jnp.ones((), bool), Conjugate.start(start) if coupled else None
    return jax.lax.while_loop(lambda state: state[2] & (state[1] < num_iters), body, state)[0]


class End(NamedTuple):
    """Where a search has ended, for each lane: whether it is a mode, and the squared length of the step from there."""

    is_mode: Array
    left: Array


def judge(prior: StatePath, log_lik: Function, path: Array, move: Array) -> End:
    """Whether a path is a mode, given the step from it.

    What is left must not matter in a result: a gain of `LEFT` at most, or a step within some units of rounding.
    """
    here = along(prior, log_lik)(path, move)
    enough = LEFT[0] + LEFT[1] * prior.num_steps * prior.n_state
    return End(settled(path, move, here, enough, units=16), here.slope)


def insist(found: Array, end: End, num_iters: int) -> Array:
    """What was found at a path; where that is no mode an error, or NaN (in its lane) where it is traced."""
    if is_traced(end.is_mode):
        return jnp.where(
            end.is_mode.reshape(*end.is_mode.shape, *(1,) * (found.ndim - end.is_mode.ndim)), found, jnp.nan
        )
    if not bool(jnp.all(end.is_mode)):
        raise ValueError(f"`num_iters`: {not_converged(end, num_iters)}")
    return found


def not_converged(end: End, num_iters: int) -> str:
    """In words that no mode was found, and how far it seems to be."""
    left = float(jnp.max(jnp.where(end.is_mode, 0.0, end.left)))
    away = (
        f"the next one has a length of {left**0.5:.3g} standard deviations"
        if left > 0
        else "no step climbs, as at a saddle"
    )
    return (
        f"the search for the mode has not converged after {num_iters} steps, and {away}. Allow more, begin with a "
        "`start` near the mode, or use 64-bit numbers; a density with kinks or jumps (an angle that goes once around), "
        "or without a maximum, has no such mode."
    )


def _wide(size: Array) -> Array:
    return size[..., None, None]


def along(prior: StatePath, log_lik: Function) -> Callable[[Array, Array], Line]:
    """The log density of a path and its slope along a step, for each lane."""
    density = density_of(prior, log_lik)

    def objective(path: Array) -> Array:
        value = density(path)
        return jnp.where(jnp.isfinite(value), value, -jnp.inf)

    return lambda path, move: Line(*jax.jvp(objective, (path,), (move,)))


def density_of(prior: StatePath, log_lik: Function) -> Function:
    """The log density of each lane: of a series, or of those that share a term of the likelihood."""
    return lambda path: sum_groups(prior.log_prob(path), group_shape(log_lik, path)) + log_lik(path)


def settled(path: Array, move: Array, here: Line, tolerance: float, units: int = 4) -> Array:
    """Whether nothing is left to gain; `units` of rounding are those of the largest number of each variable."""
    reach = jnp.max(jnp.abs(path), axis=-2, keepdims=True)
    still = jnp.abs(move) <= units * jnp.finfo(path.dtype).eps * reach
    shared = tuple(i for i, size in enumerate(here.slope.shape) if size != path.shape[i])
    still = jnp.all(jnp.all(still, axis=(-2, -1)), axis=shared, keepdims=True)
    return jnp.isfinite(here.value) & (still | (jnp.abs(here.slope) <= tolerance))


def _length(at: Callable[[Array], Line], here: Line, path: Array) -> Array:
    """The share of a step that is taken, for each lane: 1, 1/2, 1/4, ... or 2, 4, ...; 0 where none is good.

    A share is good where the value rises by a part of what the slope promises; or where it does not fall by more than
    rounding may explain and the slope has become smaller (a share of a short step needs the slope alone).
    """
    rounding = 30 * jnp.finfo(path.dtype).eps ** 0.5 * (1.0 + jnp.abs(here.value))
    short = 1e-2 * path.shape[-2] * path.shape[-1]

    def good(size: Array, there: Line) -> Array:
        gain = size * here.slope
        rises = there.value >= jnp.where(jnp.isfinite(here.value), here.value + 1e-4 * gain, -jnp.inf)
        hidden = there.value >= here.value - rounding * jnp.where(gain <= short, 30.0, 1.0)
        flatter = jnp.isfinite(there.slope) & (jnp.abs(there.slope) <= 0.9 * jnp.abs(here.slope))
        return jnp.isfinite(there.value) & (rises | (hidden & flatter))

    climbs = (here.slope > 0) | ~jnp.isfinite(here.value)

    def shrink(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        size, fits, count = state
        size = jnp.where(fits, size, 0.5 * size)
        return size, fits | good(size, at(size)), count + 1

    one = jnp.ones(here.value.shape, path.dtype)
    first = at(one)
    fits = good(one, first)
    start = one, fits, jnp.zeros((), int)
    size, found, _ = jax.lax.while_loop(lambda s: jnp.any(climbs & ~s[1]) & (s[2] < TRIALS), shrink, start)

    def steep(there: Line) -> Array:  # the step has brought a small part of what can be gained along it
        return there.slope > 0.1 * here.slope

    def grow(state: tuple[Array, Line, Array, Array]) -> tuple[Array, Line, Array, Array]:
        size, last, more, count = state
        there = at(2.0 * size)
        more = more & good(2.0 * size, there) & (there.value >= last.value)
        last = Line(*(jnp.where(more, new, old) for new, old in zip(there, last, strict=True)))
        return jnp.where(more, 2.0 * size, size), last, more & steep(there), count + 1

    start = size, first, climbs & fits & steep(first), jnp.zeros((), int)
    size, *_ = jax.lax.while_loop(lambda s: jnp.any(s[2]) & (s[3] < TRIALS), grow, start)
    return jnp.where(climbs & found, size, 0.0)
