"""Expectation maximisation for linear dynamical systems, from any number of sequences."""

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from pssm._checks import also_called, check_count
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Float, KeyLike
from pssm.learning.arguments import (
    check_size,
    choose_form,
    conform,
    found_start,
    make_limits,
    make_structure,
    sequences,
    start_like,
    tied_noise,
)
from pssm.learning.constraints import Spaces, checked_pairs, make_spaces
from pssm.learning.first import most_likely_start
from pssm.learning.maximise import Limits, Structure, maximise
from pssm.learning.moments import expectations
from pssm.learning.polish import polish
from pssm.learning.priors import Prior, checked, log_prior
from pssm.learning.sensors import at_floor, doubts
from pssm.learning.start import perturbed
from pssm.learning.units import stacked, units_of
from pssm.ssm import LinearGaussianSSM, check_model

MOST = 64  # iterations in one call
FAR, AFTER = 5.0, 10  # nats by which another start must be better to be spoken of, after so many iterations
LONGEST_CALL = 0.1  # seconds, after which a call gets no more iterations: for the progress bar and Ctrl-C


class EMResult(NamedTuple):
    """The result of EM.

    Attributes:
        ssm: the model.
        log_likelihoods: `log p(y)` of the start, after the first iteration, and so on; the last is that of `ssm`.
        log_priors: log density of the parameters at the same points, up to a constant; zeros without a prior. The sum
            of the two never falls.
        reason: why it stopped: "converged", "num_iters", "polished", "interrupted", "floor" (a variance of the noise
            is as small as it may be, and rounding ends the climb), or "stuck" (`polish_steps` took no step, although a
            slope is left).
    """

    ssm: LinearGaussianSSM
    log_likelihoods: np.ndarray
    log_priors: np.ndarray
    reason: str

    @property
    def log_joint(self) -> np.ndarray:
        """The objective of EM: `log_likelihoods + log_priors`."""
        return self.log_likelihoods + self.log_priors


class LikelihoodFellError(RuntimeError):
    """The log-likelihood fell, which exact EM cannot do; `result` is the fit before the fall, of the fit's own type.

    The usual cause is rounding: badly scaled data, or float32 where the problem needs float64.
    """

    def __init__(self, message: str, result: Any):
        super().__init__(message)
        self.result = result


@also_called(num_states="ssm", n_state="ssm")
def fit_em(
    y: ArrayLike | list[ArrayLike],
    ssm: LinearGaussianSSM | int,
    *,
    u: ArrayLike | list[ArrayLike] | None = None,
    num_iters: int = 100,
    tol: float = 1e-6,
    fixed: tuple[str, ...] = ("m0", "P0"),
    diagonal: tuple[str, ...] = (),
    isotropic: tuple[str, ...] = (),
    tied: dict[str, list[int]] | None = None,
    constraint: Mapping[str, Any] | tuple[ArrayLike, ArrayLike] | None = None,
    prior: Prior | None = None,
    missing: str = "auto",
    floor: float = 1e-8,
    restarts: int = 0,
    polish_steps: int = 0,
    key: KeyLike = 0,
    progress_bar: bool = False,
) -> EMResult:
    """Maximum likelihood by EM, exact: the parameters of a time-invariant model from one or many sequences.

    `fixed=` and the others name parameters as in `LinearGaussianSSM.from_covariances`: `m0`, `P0`, `A`, `B`, `b`, `Q`,
    `C`, `D`, `d`, `R`. Parameters that are None in the start (`b`, `d`, `B`, `D`) are not fitted. Noise that is zero
    at the start, in any direction, stays zero: companion forms keep their structure; do not start at zero otherwise.

    The fit does not depend on units: inside, each sensor has a spread near 1, and where the model has an offset `d` it
    counts from its mean, subtracted in 64 bits. Log-likelihoods and results are in the user's units.

    Args:
        y: `(time, obs)`, `(sequence, time, obs)`, or a list of `(time_i, obs)`; NaN entries are missing.
        ssm: where to start, or a number of states (`num_states` and `n_state` are second names): the start is then
            found by subspace identification, with a mean `d`, and with `B` and `D` where there are inputs.
        u: inputs, shaped as `y`, where the model has `B` or `D`.
        num_iters: most iterations.
        tol: stop when an iteration gains less than `tol` nats for each observed value; 0 for never.
        fixed: parameters that are held. `P0` by default: from one sequence alone it shrinks to zero. A free `m0` with a
            singular `P0` (zero: the first state is a parameter) moves to the maximum of the likelihood itself.
        diagonal: covariances among `P0`, `Q`, `R` that are diagonal, as one of size 1 x 1 always is.
        isotropic: covariances that are a multiple of the identity.
        tied: for a covariance, the group of each variable; it is diagonal, with one variance for each group.
        constraint: for the names in it, linear constraints on the entries: an array of the parameter's shape in which
            NaN is free and the other entries are held, or a pair `(f, G)` with `vec(X) = f + G a`, columns of `X` one
            below the other; `a` is fitted. Any of the parameters; covariances need symmetric matrices. A pair without a
            name is that of `A`. The start is brought to it.
        prior: conjugate priors, see `Prior`; EM then finds a mode of the posterior (MAP) and it is the sum of
            log-likelihood and log prior that must not fall.
        missing: exact form of the update where entries are missing: "augmented" for any `R`, "observed" (fewer
            iterations) for a diagonal one; "auto" takes the second where it can.
        floor: least eigenvalue of a fitted covariance, relative to the variance of each sensor (`R`) or the states
            (`Q`, `P0`), within a factor of two (units are powers of two); never more than the least one of the start.
            In 32 bits at least 2e-6.
        restarts: further starts, near the first one, each with a fifth of the iterations; EM continues with the best.
        polish_steps: most steps of L-BFGS after EM, which is slow near the maximum. They do not keep to `floor`.
        key: random key or whole number, for the restarts; the default too is the same in each call, and gives the same
            draws.
        progress_bar: show one.

    Returns:
        An `EMResult`. Ctrl-C ends the run and returns the fit so far.

    Warns:
        UserWarning: iterations ended before convergence, with an estimate of what was left; a sensor is constant, a
            copy of another or stuck; the noise of a sensor went to the floor, so that the likelihood has no maximum
            above it; `polish_steps` took no step from a slope; 32 bits do not hold an offset.

    Raises:
        LikelihoodFellError: the log-likelihood (with a prior, its sum with the log prior) fell; the error carries the
            result so far.
        ValueError: a shape does not fit, a name is unknown, or a full `R` has too few data to be fitted.

    Example:
        >>> import jax.numpy as jnp
        >>> from pssm import LinearGaussianSSM, datasets
        >>> one = jnp.eye(1)
        >>> start = LinearGaussianSSM([1000.0], 1000.0 * one, one, 50.0 * one, one, 50.0 * one)
        >>> result = fit_em(datasets.load("nile").y, start, fixed=("m0", "P0", "A", "C"), num_iters=50)
        >>> result.ssm.R.shape
        (1, 1)

    Source:
        Shumway & Stoffer 1982; missing entries with any `R`, linear constraints, a certain start: Holmes 2013.
    """
    check_count("num_iters", num_iters)
    check_count("restarts", restarts, least=0)
    check_count("polish_steps", polish_steps, least=0)
    given = None if isinstance(ssm, int) else ssm
    if given is not None:
        check_model(given)
        if given.time_varying or given.batch_shape:
            what = "time-varying arrays" if given.time_varying else "batch axes"
            raise ValueError(f"`ssm` must be time-invariant and without batch axes; it has {what}.")
    rows = stacked(y, None if given is None else given.n_obs)
    groups = None if rows is None else tied_noise(rows.shape[1], isotropic, tied or {})
    named = frozenset(constraint) if isinstance(constraint, Mapping) else frozenset()
    units = units_of(y, u, given, () if isinstance(fixed, str) else tuple(fixed), groups, named)
    y, u = units.data(y), units.inputs(u)
    if isinstance(ssm, int):  # of sensors with a spread of exactly 1: the start then does not depend on units either
        ssm = units.spread(found_start(units.even(y), check_count("ssm", ssm), u))
    else:
        ssm = units.into(ssm)
    series, inputs, lengths = sequences(ssm, y, u)
    dtype = jnp.result_type(ssm.dtype, series.dtype)
    ssm, series = ssm.astype(dtype), series.astype(dtype)
    inputs = None if inputs is None else inputs.astype(dtype)
    if series.shape[1] < 2:
        raise ValueError(f"`y` must have a sequence of at least 2 steps to learn a transition; got {series.shape[1]}.")
    structure = make_structure(ssm, fixed, diagonal, isotropic, tied or {}, tuple(named))
    if ssm.diffuse and not {"m0", "P0"} <= set(structure.fixed):
        raise ValueError('`fixed` must have "m0" and "P0": the diffuse start of `ssm` has no parameters to learn.')
    pairs = checked_pairs(constraint, ssm, structure.fixed, (*diagonal, *isotropic, *(tied or {})))
    form = choose_form(ssm, series, lengths, structure, missing)
    if prior is None or prior.emission is None:
        check_size(series, lengths, structure, ssm.n_state, pairs)
    ssm = conform(ssm, structure, Spaces())
    ssm, spaces = make_spaces(ssm, {name: units.pair(name, *pair) for name, pair in pairs.items()}, structure.fixed)
    limits, own = make_limits(ssm, series, floor), checked(prior, ssm)
    count = jnp.asarray(np.sum(~np.isnan(np.asarray(series))), dtype)
    data = _Data(series, inputs, lengths, limits, spaces, units.prior(own, ssm), count)
    shift = np.array([units.log_jacobian, units.log_prior_change(own)])
    run = partial(_run, data=data, form=form, structure=structure, tol=tol, progress_bar=progress_bar, shift=shift)
    try:
        result = _best(run, ssm, data, structure, num_iters, restarts, polish_steps, key, shift)
    except LikelihoodFellError as error:
        error.result = error.result._replace(ssm=units.back(error.result.ssm, given, structure.fixed, pairs))
        raise
    found = doubts(result, ssm, rows, limits, structure, tol)
    if given is not None and result.reason != "interrupted" and not pairs and num_iters >= AFTER:
        found += _other_start(result, ssm, y, u, run, structure)
    for text in found:
        warnings.warn(text, stacklevel=3)
    return result._replace(ssm=units.back(result.ssm, given, structure.fixed, pairs))


def _best(
    run: Callable[..., EMResult],
    ssm: LinearGaussianSSM,
    data: "_Data",
    structure: Structure,
    num_iters: int,
    restarts: int,
    polish_steps: int,
    key: KeyLike,
    shift: np.ndarray,
) -> EMResult:
    """The fit from the start or the best of several, polished if it is to be; the model in the units of EM."""
    if restarts:
        seeds = jax.random.split(as_key(key), restarts)
        starts = [ssm, *(conform(perturbed(ssm, seed, structure.fixed), structure, data.spaces) for seed in seeds)]
        tries = [_attempt(run, start, max(num_iters // 5, 1)) for start in starts]
        best = max(tries, key=lambda r: r.log_joint[-1] if len(r.log_joint) else -np.inf)
        if any(r.reason == "interrupted" for r in tries):
            return best._replace(reason="interrupted")
        ssm = best.ssm
    result = run(ssm, num_iters=num_iters)
    if polish_steps and result.reason != "interrupted":
        found = polish(result.ssm, data.y, data.u, structure, data.spaces, data.prior, polish_steps)
        value, density = found.log_likelihood + shift[0], found.log_prior + shift[1]
        if found.moved and value + density > result.log_joint[-1]:
            values = np.append(result.log_likelihoods, value), np.append(result.log_priors, density)
            result = EMResult(found.ssm, *values, "polished")
        elif not found.flat:
            result = result._replace(reason="stuck")
    return result


def _other_start(
    result: EMResult, ssm: LinearGaussianSSM, y: Any, u: Any, run: Callable[..., EMResult], structure: Structure
) -> list[str]:
    """Whether a start from the data is far above the result after a few iterations: the given one was far away."""
    other = start_like(ssm, y, u, structure)
    if other is None:
        return []
    try:
        tried = _attempt(partial(run, progress_bar=False), conform(other, structure, Spaces()), AFTER).log_joint
    except (ValueError, FloatingPointError, np.linalg.LinAlgError):  # no start for these data
        return []
    apart = float(tried[-1] - result.log_joint[-1]) if len(tried) else 0.0
    if not apart > FAR:
        return []
    return [
        f"`ssm`: the fit from this start ends {apart:.3g} nats below where a start from the data is after "
        f"{AFTER} iterations. Start from the data: `fit_em(y, {ssm.n_state})`."
    ]


def _attempt(run: Callable[..., EMResult], start: LinearGaussianSSM, num_iters: int) -> EMResult:
    """A restart's result, or its fit before the log-likelihood fell: the other starts still run."""
    try:
        return run(start, num_iters=num_iters)
    except LikelihoodFellError as error:
        return error.result


class _Data(NamedTuple):
    """The quantities that do not change between iterations; `count` is the number of observed values."""

    y: Array
    u: Array | None
    lengths: Array | None
    limits: Limits
    spaces: Spaces
    prior: Prior
    count: Array


def _run(
    ssm: LinearGaussianSSM,
    *,
    data: _Data,
    form: str,
    structure: Structure,
    num_iters: int,
    tol: float,
    progress_bar: bool,
    shift: np.ndarray,
) -> EMResult:
    """EM from a start; `shift` makes of log-likelihood and log prior those in the user's units."""
    found = np.zeros((0, 2))
    evaluated, current, reason = ssm, ssm, "num_iters"
    last, room = -np.inf, 1
    with tqdm(total=num_iters, disable=not progress_bar, desc="EM") as bar:
        try:
            while reason == "num_iters" and len(found) <= num_iters:
                began = time.perf_counter()
                room = min(room, num_iters + 1 - len(found))
                step = _climb(evaluated, current, last, room, data, tol, form=form, structure=structure)
                evaluated, current, last = step.evaluated, step.current, step.last
                found = np.concatenate([found, np.asarray(step.values)[: int(step.count)] + shift])
                if step.fell and len(found) > 1 and at_floor(evaluated, data.limits, structure).size:
                    found, reason = found[:-1], "floor"  # where rounding is larger than what is left to gain
                    break
                if step.fell:
                    raise LikelihoodFellError(
                        f"The log-likelihood went from {found[-2].sum() if len(found) > 1 else None} to "
                        f"{found[-1].sum()} in iteration {len(found) - 1}. Rescale the data to unit variance, or use "
                        "64-bit arithmetic.",
                        EMResult(evaluated, *found[:-1].T, "fell"),
                    )
                bar.update(len(found) - 1 - bar.n)
                bar.set_postfix_str(f"log-likelihood {found[-1, 0]:.6g}", refresh=False)
                if step.converged:
                    reason = "converged"
                if time.perf_counter() - began < LONGEST_CALL:
                    room = min(2 * room, MOST)
        except KeyboardInterrupt:
            reason = "interrupted"
    return EMResult(evaluated, *found.T, reason)


class _Climb(NamedTuple):
    """The state after some iterations.

    Attributes:
        evaluated: the last model whose log-likelihood is known.
        current: the one after it.
        last: log-likelihood plus log prior of `evaluated`.
        values: log-likelihood and log prior of each model so far, `(MOST, 2)`, in the first `count` rows.
        count: number of these models.
        fell: whether the last row is below the one before, so that `evaluated` is the model before.
        converged: whether the last gain was below `tol`.
    """

    evaluated: LinearGaussianSSM
    current: LinearGaussianSSM
    last: Array
    values: Array
    count: Array
    fell: Array
    converged: Array


@partial(jax.jit, static_argnames=("form", "structure"))
def _climb(
    evaluated: LinearGaussianSSM,
    current: LinearGaussianSSM,
    last: ArrayLike,
    room: int,
    data: _Data,
    tol: float,
    *,
    form: str,
    structure: Structure,
) -> _Climb:
    """At most `room` iterations in one program: a call for each would cost more than a small model's iteration."""
    dtype = current.dtype
    slack = 1e-9 if dtype == jnp.float64 else 1e-5

    def iterate(state: _Climb) -> _Climb:
        new, values = _iterate(state.current, data, form=form, structure=structure)
        value = jnp.sum(values)
        fell = ~jnp.isfinite(value) | (value < state.last - slack * (1 + jnp.abs(value)))
        converged = ~fell & (tol > 0) & (value - state.last < tol * (1 + data.count))
        kept = jax.tree.map(partial(jnp.where, fell), state.evaluated, state.current)
        all_values = state.values.at[state.count].set(values)
        return _Climb(kept, new, jnp.where(fell, state.last, value), all_values, state.count + 1, fell, converged)

    no = jnp.zeros((), bool)
    start = _Climb(
        evaluated, current, jnp.asarray(last, dtype), jnp.zeros((MOST, 2), dtype), jnp.zeros((), int), no, no
    )
    return jax.lax.while_loop(lambda s: (s.count < room) & ~s.fell & ~s.converged, iterate, start)


def _iterate(
    ssm: LinearGaussianSSM, data: _Data, *, form: str, structure: Structure
) -> tuple[LinearGaussianSSM, Float[Array, "2"]]:
    """The next model, and the log-likelihood and log prior of this one."""
    moments = expectations(ssm, data.y, data.u, data.lengths, form)
    new = maximise(ssm, moments, structure, data.limits, data.spaces, data.prior)
    if data.spaces.first is not None:
        new = most_likely_start(new, data.y, data.u, data.spaces.first, data.prior)
    return new, jnp.stack([moments.log_likelihood, log_prior(ssm, data.prior)])
