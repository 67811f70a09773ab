"""How a series is filtered, decided before anything is computed, from sizes alone: it costs nothing under `jit`.

What depends on the data themselves (whether the gain does reach its steady state, whether the series of a batch have
their gaps in the same places, whether a step can be collapsed) is left to the pass, which has a `lax.cond` for it.
"""

import warnings
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pssm._checks import check_choice, check_series, is_traced
from pssm._types import Array, ArrayLike
from pssm.filters.collapse import is_wide
from pssm.filters.covariance import may_reach_steady_state
from pssm.filters.step import common_dtype
from pssm.ssm import LinearGaussianSSM, check_inputs, check_model, check_num_steps

METHODS = ("auto", "sequential", "square_root", "parallel")
LEAST_NOISE = 1e3  # in units of the rounding of `y`


class Plan(NamedTuple):
    """What is done, in the order of the decisions. A plan is static: two series of one plan share a compiled program.

    Attributes:
        recursion: "sequential", covariances first and means after, or "parallel" over time, or "low_memory".
        score: the gradient of the log-likelihood in closed form; otherwise the recursion is differentiated.
        shared_gains: the series of a batch are of one model, and share its gains where they have the same gaps.
            Otherwise each series has gains of its own.
        steady_state: covariances are computed until the gain reaches its steady state; otherwise at every step.
        collapse: steps with many more readings than states are brought down to fewer, where series have gains of
            their own.
        ends_matter: False if nothing depends on gains after the last observation of a series. Series of different
            lengths, padded to the longest one, then share their gains too.
    """

    recursion: str
    score: bool
    shared_gains: bool
    steady_state: bool
    collapse: bool
    ends_matter: bool

    def every_step(self) -> "Plan":
        """The same without a search for the steady state."""
        return self._replace(steady_state=False)

    def for_rest(self, ssm: LinearGaussianSSM, length: int) -> "Plan":
        """The same for one series that is a part of this one, of `length` steps."""
        steady_state = self.steady_state and may_reach_steady_state(ssm, length)
        return self._replace(shared_gains=False, steady_state=steady_state)


def plan_for(
    ssm: LinearGaussianSSM, y: Array, u: Array | None = None, *, method: str = "auto", ends_matter: bool = True
) -> Plan:
    """The plan of a model, series `(..., time, obs)`, inputs and a method."""
    series_in_batch = y.ndim > 2 or (u is not None and u.ndim > 2)
    return Plan(
        recursion=method if method in ("parallel", "low_memory") else "sequential",
        score=method in ("auto", "sequential"),
        shared_gains=series_in_batch and not ssm.batch_shape,
        steady_state=method == "auto" and may_reach_steady_state(ssm, y.shape[-2]),
        collapse=is_wide(ssm),
        ends_matter=ends_matter,
    )


def prepare(
    ssm: LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None, method: str, methods: tuple[str, ...] = METHODS
) -> tuple[LinearGaussianSSM, Array, Array | None]:
    """Checks what came in and brings it to one floating-point type."""
    check_choice("method", method, methods)
    check_model(ssm)
    series = check_series(y, ssm.n_obs)
    check_num_steps(ssm, series.shape[-2], "`y`")
    inputs = check_inputs(ssm, u, series.shape[-2])
    ssm, series, inputs = common_dtype(ssm, series, inputs)
    _warn_noise_below_rounding(ssm, series)
    return ssm, series, inputs


def _warn_noise_below_rounding(ssm: LinearGaussianSSM, y: Array) -> None:
    """Says so where more readings than states must agree to within a noise that 32-bit numbers do not resolve."""
    if y.dtype != jnp.float32 or ssm.n_obs <= ssm.n_state or is_traced(y) or is_traced(ssm.chol_R):
        return
    rows = np.asarray(y).reshape(-1, ssm.n_obs)
    rounding = np.finfo(np.float32).eps * np.max(np.abs(rows), axis=0, initial=0.0, where=np.isfinite(rows))
    noise = np.linalg.norm(np.asarray(ssm.chol_R), axis=-1).reshape(-1, ssm.n_obs).min(0, initial=np.inf)
    close = np.flatnonzero((0 < noise) & (noise < LEAST_NOISE * rounding))
    if close.size:
        i = close[0]
        warnings.warn(
            f"`chol_R` gives column {i} of `y` noise of standard deviation {noise[i]:.3g}, where 32-bit numbers of its "
            f"size differ by {rounding[i]:.3g}; and the {ssm.n_obs} observations of a step have to agree to within "
            f"their noise, as there are only {ssm.n_state} states. The log-likelihood, its derivatives and smoothed "
            'states may be wrong: switch on 64-bit arithmetic with jax.config.update("jax_enable_x64", True).',
            stacklevel=4,
        )
