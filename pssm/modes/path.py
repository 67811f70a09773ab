"""The search for the mode of a path: where it begins, and whether it has ended at a mode."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._checks import as_float, check_finite, check_shape
from pssm._types import Array, ArrayLike
from pssm.distributions import StatePath
from pssm.linalg.potential import Potential
from pssm.modes.coupled import group_shape
from pssm.modes.damped import damped_climb, is_maximum
from pssm.modes.matrix_free import gauss_newton_matrix_free
from pssm.modes.mode import gauss_newton, is_large, noise_scale, potentials_at
from pssm.modes.search import End, Function, climb, density_of, insist, judge, start_path

OTHERS = 4  # further starts, at most


def mode_potentials(
    prior: StatePath,
    log_lik: Callable[[Array], Array],
    *,
    rank: int,
    diagonal: bool = True,
    start: Array | None = None,
    num_iters: int = 30,
) -> Potential:
    """The mode of the path and potentials of the given rank there.

    Args:
        prior: the path prior.
        log_lik: log-likelihood of paths `(*batch, time, state)`, of shape `batch`, with axes of length 1 (or none)
            where series share a term; each step's state enters its own summand only.
        rank: columns of `K`, at most `state`.
        diagonal: whether a diagonal goes beside them.
        start: a path to start from; by default the prior's path without noise.
        num_iters: most Gauss-Newton steps.

    Returns:
        A `Potential` written around the mode, with the posterior's `scale`; under `jit` NaN in each series whose search
        has not converged.

    Raises:
        ValueError: (outside of `jit`) the search has not converged.
    """
    path = mode_path(prior, log_lik, rank=rank, diagonal=diagonal, start=start, num_iters=num_iters)
    return potentials_at(prior, log_lik, path, rank=rank, diagonal=diagonal)


def mode_path(
    prior: StatePath,
    log_lik: Callable[[Array], Array],
    *,
    rank: int,
    diagonal: bool = True,
    start: Array | None = None,
    num_iters: int = 30,
    tolerance: float | None = None,
    strict: bool = True,
    others: Callable[[Array], Array] | None = None,
) -> Array:
    """The path of highest posterior density near `start`, by Gauss-Newton steps; each of them climbs.

    Args:
        prior: the path prior.
        log_lik: as in `mode_potentials`.
        rank: of the messages, where the state is large (`matrix_free.py`).
        diagonal: whether a diagonal goes beside them.
        start: a path to start from; by default the prior's path without noise.
        num_iters: most Gauss-Newton steps.
        tolerance: the search is over when the squared length of the step, in standard deviations of the posterior, is
            less; 1e-8, in single precision 1e-5.
        strict: whether the path must be a mode. Without, it is as far as the steps have come: a posterior written
            around any path is a posterior.
        others: for one path without a batch, `k -> path`, further starts (see `starts.py`). The first is looked at in
            any case, and searched from where `start` has led to no mode, or where it is so likely as it stands that it
            seems to lie in the basin of a higher one; then so are the rest. The highest mode that was found is taken.

    Returns:
        The path, `(*batch, time, state)`; strictly and under `jit` NaN in each series whose search has not converged.

    Raises:
        ValueError: (strictly, outside of `jit`) the search has not converged.
    """
    if is_large(prior):
        sd = noise_scale(prior)
        step = partial(gauss_newton_matrix_free, prior, log_lik, sd=sd, rank=rank, diagonal=diagonal)
    else:
        step = partial(gauss_newton, prior, log_lik)

    def direction(path: Array) -> Array:
        return step(path).move

    path = start_path(prior, log_lik) if start is None else start
    if tolerance is None:
        tolerance = 1e-8 if path.dtype == jnp.float64 else 1e-5
    options: dict[str, Any] = {"num_iters": num_iters, "tolerance": tolerance}
    alone = group_shape(log_lik, path) == path.shape[:-2]

    def search(path: Array) -> Array:
        if is_large(prior) or not alone:
            return climb(prior, log_lik, direction, path, **options)
        return damped_climb(prior, log_lik, path, **options)

    def end_at(path: Array) -> End:
        found = step(path)
        end = judge(prior, log_lik, path, found.move)
        if is_large(prior) or not alone:
            return end
        return end._replace(is_mode=end.is_mode & is_maximum(prior, log_lik, path, found.slope))

    path = search(path) if others is None else _best_of(prior, log_lik, path, others, search, end_at)
    return insist(path, end_at(path), num_iters) if strict else path


class _Best(NamedTuple):
    """The best end so far, its log density, whether it is a mode, starts looked at, and whether to go on."""

    path: Array
    value: Array
    found: Array
    count: Array
    more: Array


def _best_of(
    prior: StatePath,
    log_lik: Function,
    start: Array,
    others: Callable[[Array], Array],
    search: Function,
    end_at: Callable[[Array], End],
) -> Array:
    """The highest mode that the starts lead to; where there is none the highest end."""
    density = density_of(prior, log_lik)

    def one(s: _Best) -> _Best:
        begin = jax.lax.cond(s.count == 0, lambda: start, lambda: others(s.count))
        raw = density(begin)
        # A path from the posterior lies half a nat for each number below the mode; those at hand lie lower, as a rule.
        promising = (raw + 0.4 * prior.noise_size > s.value) | ~s.found
        path = jax.lax.cond(promising | (s.count > 1), search, lambda path: path, begin)
        value, found = density(path), end_at(path).is_mode
        better = jnp.isfinite(value) & ((found & ~s.found) | ((found == s.found) & (value > s.value)))
        chosen = (jnp.where(better, new, old) for new, old in zip((path, value, found), s[:3], strict=True))
        return _Best(*chosen, s.count + 1, (s.count == 0) | promising | (s.count > 1))

    nothing = jnp.full((), -jnp.inf, start.dtype)
    none = _Best(start, nothing, jnp.zeros((), bool), jnp.zeros((), int), jnp.ones((), bool))
    return jax.lax.while_loop(lambda s: s.more & (s.count <= OTHERS), one, none).path


def linear_mode(prior: StatePath, log_lik: Callable[[Array], Array], start: Array | None = None) -> Array:
    """The mode of a linear-Gaussian model, up to the rounding that one more step takes away.

    One step is exact. There is no search whose end rounding decides: with large residuals or a singular noise the
    slope that is left is a small difference of large numbers.
    """
    path = start_path(prior, log_lik) if start is None else start
    return path + gauss_newton(prior, log_lik, path).move


def check_start(start: ArrayLike, num_steps: int, n_state: int) -> Array:
    """A path that a search may begin at."""
    path = as_float("start", start)
    check_shape("start", path, (num_steps, n_state), "time, state")
    check_finite("start", path)
    return path
