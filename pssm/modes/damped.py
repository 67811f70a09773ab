"""The search for the mode of a path by damped Newton steps: each climbs, and a curvature of any sign is used.

The step from a path is that of the signed curvature `S` (of the likelihood, and of the transition's bend) with a
damping beside it, `S + lambda D`, where the diagonal `D` is at least as large as `S` and `-S`: with `lambda >= 1` the
sum is not negative. `lambda` goes up where the curvature of the whole is not positive definite or the step does not
climb, and down to zero, Newton's own step, where it does. Long steps are short ones with more damping: along other
directions than the half of a bad step, and the better ones.

What climbs is decided as in `search.py`: by slopes where rounding hides the values.

Source:
    Levenberg 1944, Marquardt 1963; the gain of a step beside what its slope promises: Nocedal & Wright 2006, chapter 4.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.distributions import StatePath
from pssm.modes.newton import Step, bend, newton_step, signed_sites
from pssm.modes.search import TRIALS, Line, along, settled

LogLik = Callable[[Array], Array]

LEAST, MOST = 1e-4, 1e12  # of the damping, beside zero
RAISE, LOWER = 8.0, 0.1


class _State(NamedTuple):
    """Of all lanes: the path, its slope `w`, the damping, whether the search is over; steps taken, and tried."""

    path: Array
    slope: Array
    damping: Array
    done: Array
    steps: Array
    trials: Array


def damped_climb(prior: StatePath, log_lik: LogLik, start: Array, *, num_iters: int, tolerance: float) -> Array:
    """The path after at most `num_iters` steps that climb.

    A lane (an entry of the batch, each with its own terms of the likelihood) is over when the squared length of
    Newton's step, in standard deviations of the posterior, is below `tolerance`, when the step moves no number by more
    than rounding does, or when no damping makes it climb.
    """
    line = along(prior, log_lik)

    def body(s: _State) -> _State:
        step, here, there = _trial(prior, log_lik, line, s)
        rounding = 30 * jnp.finfo(s.path.dtype).eps ** 0.5 * (1.0 + jnp.abs(here.value))
        rises = there.value >= jnp.where(jnp.isfinite(here.value), here.value + 1e-4 * here.slope, -jnp.inf)
        near = here.slope <= 1e-2 * s.path.shape[-2] * s.path.shape[-1]
        hidden = there.value >= here.value - rounding * jnp.where(near & (s.damping == 0), 30.0, 1.0)
        flatter = jnp.isfinite(there.slope) & (jnp.abs(there.slope) <= 0.9 * jnp.abs(here.slope))
        climbs = (here.slope > 0) | ~jnp.isfinite(here.value)
        good = step.proper & climbs & jnp.isfinite(there.value) & (rises | (hidden & flatter))
        over = step.proper & (s.damping <= LEAST) & settled(s.path, step.move, here, tolerance)
        taken = good & ~s.done & ~over
        lower = jnp.where(s.damping * LOWER < LEAST, 0.0, s.damping * LOWER)
        damping = jnp.where(good, lower, jnp.maximum(RAISE * s.damping, LEAST))
        return _State(
            s.path + jnp.where(taken[..., None, None], step.move, 0.0),
            jnp.where(taken[..., None, None], step.slope, s.slope),
            damping,
            s.done | over | (damping > MOST),
            s.steps + jnp.any(taken),
            s.trials + 1,
        )

    batch = start.shape[:-2]
    zeros = jnp.zeros(batch, start.dtype)
    none = jnp.zeros((), int)
    first = _State(start, jnp.zeros_like(start), zeros, jnp.zeros(batch, bool), none, none)

    def goes_on(s: _State) -> Array:
        return jnp.any(~s.done) & (s.steps < num_iters) & (s.trials < 5 * num_iters + TRIALS)

    return jax.lax.while_loop(goes_on, body, first).path


def _trial(
    prior: StatePath, log_lik: LogLik, line: Callable[[Array, Array], Line], s: _State
) -> tuple[Step, Line, Line]:
    """The step, and the density with its slope along it at both ends."""
    gradient, W = _curvature(prior, log_lik, s.path, s.slope)
    above = jnp.sum(jnp.abs(W), axis=-1)[..., None] * jnp.eye(W.shape[-1], dtype=W.dtype)
    step = newton_step(prior, s.path, gradient, W + s.damping[..., None, None, None] * above)
    proper = step.proper & jnp.all(jnp.isfinite(step.move), axis=(-2, -1))
    move = jnp.where(proper[..., None, None], step.move, 0.0)
    return step._replace(move=move), line(s.path, move), line(s.path + move, move)


def is_maximum(prior: StatePath, log_lik: LogLik, path: Array, slope: Array) -> Array:
    """Whether the curvature at a stationary path is that of a maximum, for each lane: a saddle has slope zero too.

    Args:
        prior: the path prior.
        log_lik: as in `damped_climb`.
        path: the path.
        slope: `w` there, of a Gauss-Newton step.
    """
    return newton_step(prior, path, *_curvature(prior, log_lik, path, slope)).proper


def _curvature(prior: StatePath, log_lik: LogLik, path: Array, slope: Array) -> tuple[Array, Array]:
    """The gradient of the likelihood, and minus its curvature and that of the transition's bend, signed."""
    gradient, W = signed_sites(log_lik, path)
    return gradient, W if prior.is_linear else W + bend(prior, path, slope)
