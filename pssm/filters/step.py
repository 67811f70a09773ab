"""One step of the exact filter, on square roots: `predict` and `update`, and the halves that they are made of.

The half that sees no data, with `L` a factor of the predicted covariance, stacks the observation above the state and
triangularises:

    [ C L   chol_R ]     [ S^1/2   0  ] [ Q11  Q12 ]     S = C P C' + R,  K = Kbar S^-1/2 the Kalman gain
    [   L     0    ]  =  [ Kbar    L+ ] [ Q21  Q22 ]     L+ a factor of the filtered covariance

Missing entries are rows of zeros in the first line: their pivot in `S^1/2` is zero and is skipped, and so is an entry
that was known exactly before it was seen (see `ties.py`). Nothing is subtracted from a covariance, so none can turn
negative, and float32 is enough where a covariance recursion needs float64 (Kailath, Sayed & Hassibi 2000, chapter 12).
The other half is a few products of a matrix and a vector.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._checks import as_float, check_finite, check_shape
from pssm._types import Array, ArrayLike, Float
from pssm.batch import over_batches
from pssm.filters.ties import OfStep, innovation_rows, what_ties_add
from pssm.linalg import orthogonalise, solve_lower, triangularise, unless
from pssm.linalg.small import affine, matmul, times
from pssm.missing import split_missing
from pssm.results import PredictResult, UpdateResult
from pssm.ssm import LinearGaussianSSM, check_model

LOG_2PI = math.log(2 * math.pi)
Factorise = Callable[[Array], tuple[Array, Array]]


def predict(ssm: LinearGaussianSSM, mean: ArrayLike, chol: ArrayLike, u: ArrayLike | None = None) -> PredictResult:
    """One step ahead: `N(A mean + b + B u, A P A' + Q)` from the filtered `N(mean, P)`, `P = chol chol'`.

    Leading axes of the model and of the arrays are batch axes.

    Args:
        ssm: the model of one step, `ssm.at_time(t)` of a time-varying one: the step INTO time `t`.
        mean: filtered mean of the state, `(..., state)`.
        chol: any factor of its covariance, `(..., state, columns)`; singular is welcome.
        u: input of the step, `(..., input)`, where the model has `B`.

    Returns:
        A `PredictResult` with `mean`, `chol` (lower triangular) and `cov`.

    Raises:
        ValueError: a shape does not fit, the model varies in time, or `u` is absent where it is needed.

    Example:
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1e7]], [[1.0]], [[1469.1]], [[1.0]], [[15099.0]])
        >>> print(predict(model, [1120.0], [[100.0]]).cov.round())
        [[11469.]]

    Source:
        Kalman 1960; square-root form: Kailath, Sayed & Hassibi 2000, chapter 12.
    """
    _check_one_step(ssm)
    arrays = _checked(ssm, mean, chol)
    inputs = _checked_input(ssm, u, ssm.B is not None)
    return _predict(*common_dtype(ssm, *arrays, inputs))


def update(
    ssm: LinearGaussianSSM, mean: ArrayLike, chol: ArrayLike, y: ArrayLike, u: ArrayLike | None = None
) -> UpdateResult:
    """What one observation `y` makes of the predicted `N(mean, P)`, `P = chol chol'`, and its log-likelihood.

    Leading axes of the model and of the arrays are batch axes.

    Args:
        ssm: the model of one step, `ssm.at_time(t)` of a time-varying one.
        mean: predicted mean of the state, `(..., state)`; `m0` at the first step.
        chol: any factor of its covariance, `(..., state, columns)`; `chol_P0` at the first step.
        y: the observation, `(..., obs)`; NaN entries are missing.
        u: input of the step, `(..., input)`, where the model has `D`.

    Returns:
        An `UpdateResult` with `mean`, `chol` (lower triangular), `cov` and `log_likelihood`. Entries of `y` that are
        tied exactly are treated as in `kalman_filter`; the log-likelihood of a contradiction is minus infinity.

    Raises:
        ValueError: a shape does not fit, the model varies in time, or `u` is absent where it is needed.

    Example:
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1.0]], [[1.0]], [[1.0]], [[1.0]], [[1.0]])
        >>> first = update(model, model.m0, model.chol_P0, [2.0])
        >>> print(first.mean.round(2), first.cov.round(2))
        [1.] [[0.5]]
        >>> second = update(model, *predict(model, first.mean, first.chol), [float("nan")])
        >>> print(second.mean.round(2), second.log_likelihood)
        [1.] 0.0
    """
    _check_one_step(ssm)
    arrays = _checked(ssm, mean, chol)
    observation = as_float("y", y)
    observation = observation[None] if observation.ndim == 0 and ssm.n_obs == 1 else observation
    check_shape("y", observation, (ssm.n_obs,), "obs")
    check_finite("y", observation, allow_nan=True)
    inputs = _checked_input(ssm, u, ssm.D is not None)
    return _update(*common_dtype(ssm, *arrays, observation, inputs))


@jax.jit
def _predict(ssm: LinearGaussianSSM, mean: Array, chol: Array, u: Array | None) -> PredictResult:
    return over_batches(predict_one, ssm, (mean, 1), (chol, 2), (u, 1))


@jax.jit
def _update(ssm: LinearGaussianSSM, mean: Array, chol: Array, y: Array, u: Array | None) -> UpdateResult:
    return over_batches(update_one, ssm, (mean, 1), (chol, 2), (y, 1), (u, 1))


def predict_one(ssm: LinearGaussianSSM, mean: Array, chol: Array, u: Array | None) -> PredictResult:
    """`predict`, unbatched and unchecked."""
    return PredictResult(transition_mean(ssm, mean, u), predict_factor(ssm, chol))


def update_one(ssm: LinearGaussianSSM, mean: Array, chol: Array, y: Array, u: Array | None) -> UpdateResult:
    """`update`, unbatched and unchecked."""
    filled, observed = split_missing(y)
    new = update_factor(ssm, chol, observed)
    new_mean, whitened = update_mean(ssm, new.gain, new.root, mean, filled, observed, u)
    lacking = by_ties(ssm, chol, new, mean, filled, observed, u)
    log_likelihood = jnp.where(jnp.any(observed), new.log_norm - 0.5 * jnp.sum(whitened**2) + lacking, 0.0)
    return UpdateResult(new_mean, new.new_chol, log_likelihood)


# -------------------------------------------------------------------------------------------------------------- halves


class FactorUpdate(NamedTuple):
    """`Kbar`, `L+`, `S^-1/2`, the log-likelihood without data, whether an entry is tied, and the orthogonal factor."""

    gain: Array
    new_chol: Array
    root: Array
    log_norm: Array
    tied: Array
    turn: Array


def update_factor(
    ssm: LinearGaussianSSM, chol: Array, observed: Array, factorise: Factorise = orthogonalise
) -> FactorUpdate:
    """The update of this module's head, from any factor of the predicted covariance, `(state, columns)`."""
    n_obs = ssm.C.shape[0]
    seen = observed[:, None]
    top = jnp.concatenate([matmul(jnp.where(seen, ssm.C, 0.0), chol), jnp.where(seen, ssm.chol_R, 0.0)], axis=1)
    bottom = jnp.concatenate([chol, jnp.zeros((chol.shape[0], n_obs), chol.dtype)], axis=1)
    joint, turn = factorise(jnp.concatenate([top, bottom]))
    parts = innovation_parts(joint[:n_obs, :n_obs], observed)
    return FactorUpdate(joint[n_obs:, :n_obs], joint[n_obs:, n_obs:], *parts, turn)


def innovation_parts(chol_s: Array, observed: Array) -> tuple[Array, Array, Array]:
    """Of `S^1/2`: `S^-1/2`, the log-likelihood without data, and whether an entry is tied."""
    pivots = jnp.diagonal(chol_s)
    live = pivots > 0
    log_norm = -jnp.sum(jnp.where(live, 0.5 * LOG_2PI + jnp.log(jnp.where(live, pivots, 1.0)), 0.0))
    root = solve_lower(chol_s, jnp.eye(len(chol_s), dtype=chol_s.dtype))
    return root, log_norm, jnp.any(observed & ~live)


def transition_rows(ssm: LinearGaussianSSM, chol: Array) -> Array:
    """`[A L+, chol_Q]`, a factor of the next predicted covariance that is not a triangle."""
    return jnp.concatenate([matmul(ssm.A, chol), ssm.chol_Q], axis=1)


def predict_factor(ssm: LinearGaussianSSM, chol: Array) -> Array:
    """The factor of the next predicted covariance."""
    return triangularise(transition_rows(ssm, chol))


def transition_mean(ssm: LinearGaussianSSM, z: Array, u: Array | None) -> Array:
    """`A z + b + B u`, at one time, of one state or of states side by side."""
    return affine(ssm.A, ssm.b, ssm.B, z, u)


def emission_mean(ssm: LinearGaussianSSM, z: Array, u: Array | None) -> Array:
    """`C z + d + D u`, likewise; of whole paths it is the method `signal`."""
    return affine(ssm.C, ssm.d, ssm.D, z, u)


def update_mean(
    ssm: LinearGaussianSSM, gain: Array, root: Array, mean: Array, y: Array, observed: Array, u: Array | None
) -> tuple[Array, Array]:
    """The filtered mean, and the whitened innovation `S^-1/2 (y - prediction)`, zero where nothing is observed.

    `gain` and `root` are those of `update_factor`. Of one series, or of series side by side.
    """
    residual = jnp.where(observed, y - emission_mean(ssm, mean, u), 0.0)
    whitened = times(root, residual)
    return mean + times(gain, whitened), whitened


def by_ties(
    ssm: LinearGaussianSSM, chol: Array, new: Any, mean: Array, y: Array, observed: Array, u: Array | None
) -> Array:
    """`what_ties_add` of a step with the factors `new`, without derivatives."""
    args = jax.lax.stop_gradient((ssm, OfStep(innovation_rows(ssm, chol), new.root, new.turn), mean, y, observed, u))
    return unless(~new.tied, jnp.zeros((), y.dtype), lambda: what_ties_add(*args))


# -------------------------------------------------------------------------------------------------------------- checks


def _check_one_step(ssm: LinearGaussianSSM) -> None:
    check_model(ssm)
    if ssm.time_varying:
        raise ValueError(f"`ssm` must be the model of one step; got {ssm!r}. Pass `ssm.at_time(t)`.")
    if ssm.diffuse:
        raise ValueError(
            "`ssm` has a diffuse start, of which one step knows nothing. Filter the first steps with `kalman_filter`, "
            "until no variance is infinite, and go on from there with `ssm.at_time(t)`."
        )


def _checked(ssm: LinearGaussianSSM, mean: ArrayLike, chol: ArrayLike) -> tuple[Array, Array]:
    m, factor = as_float("mean", mean), as_float("chol", chol)
    check_shape("mean", m, (ssm.n_state,), "state")
    if factor.ndim < 2 or factor.shape[-2] != ssm.n_state:
        raise ValueError(f"`chol` must have shape ({ssm.n_state}, columns); got {factor.shape}.")
    check_finite("mean", m)
    check_finite("chol", factor)
    return m, factor


def _checked_input(ssm: LinearGaussianSSM, u: ArrayLike | None, needed: bool) -> Float[Array, "*batch input"] | None:
    if u is None:
        if needed:
            raise ValueError(f"`u` is required, of shape ({ssm.n_input},): the model has `B` or `D`.")
        return None
    if not ssm.n_input:
        raise ValueError("`u` is given, but the model has neither `B` nor `D` to use it.")
    inputs = as_float("u", u)
    inputs = inputs[None] if inputs.ndim == 0 and ssm.n_input == 1 else inputs
    check_shape("u", inputs, (ssm.n_input,), "input")
    check_finite("u", inputs)
    return inputs


def common_dtype(ssm: LinearGaussianSSM, *arrays: Array | None) -> tuple:
    """Model and arrays in the widest floating-point type among them."""
    dtype = jnp.result_type(ssm.dtype, *(x for x in arrays if x is not None))
    return ssm.astype(dtype), *(None if x is None else x.astype(dtype) for x in arrays)
