"""The start of a readout: factor analysis of the data, which needs no dynamics and no complete rows."""

import warnings
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pssm._checks import also_called, as_float, check_choice, check_count, check_finite
from pssm._types import Array, ArrayLike, Float
from pssm.learning.em import fit_em
from pssm.ssm import LinearGaussianSSM


class Readout(NamedTuple):
    """A linear readout `y = C z + d + noise` for states of unit variance.

    Attributes:
        C: loadings `(obs, state)`: orthogonal columns, the longest first, the largest entry of each positive.
        d: means `(obs,)`.
        R: variances of the noise `(obs,)`.
        explained: share of each variable's variance that the states explain `(obs,)`.
    """

    C: Float[Array, "obs state"]
    d: Float[Array, " obs"]
    R: Float[Array, " obs"]
    explained: Float[Array, " obs"]


@also_called(n_state="num_states")
def initial_readout(y: ArrayLike, num_states: int, *, method: str = "fa", num_iters: int = 50) -> Readout:
    """A start for the readout of a state-space model, from the data alone.

    Each time step is treated as independent: `y_t = C z_t + d + e_t` with `z_t ~ N(0, I)`, fitted by `fit_em` with the
    transition held at zero. Missing entries are left out one by one, not filled. It does not estimate the dynamics
    (`fit_em(y, num_states)` does); for counts, give it `sqrt(y)` or `log(y + 0.5)`, and `C` is on that scale.

    Args:
        y: `(time, obs)` or `(trial, time, obs)`; NaN entries are missing.
        num_states: size of the state, at most the number of variables; `n_state` is a second name for it.
        method: "fa" (factor analysis: a variance for every variable) or "pca" (probabilistic PCA: one variance).
        num_iters: most iterations of EM.

    Returns:
        A `Readout`.

    Raises:
        ValueError: `y` has another shape or no value in some column, or `num_states` is too large.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> y = rng.normal(size=(200, 1)) * [1.0, -2.0, 3.0] + 0.1 * rng.normal(size=(200, 3)) + 5.0
        >>> readout = initial_readout(y, 1)
        >>> [round(float(x)) for x in readout.C[:, 0]], [round(float(x)) for x in readout.d]
        ([1, -2, 3], [5, 5, 5])

    Source:
        Rubin & Thayer 1982 (factor analysis by EM); Tipping & Bishop 1999 (probabilistic PCA).
    """
    check_choice("method", method, ("fa", "pca"))
    check_count("num_states", num_states)
    series = as_float("y", y)
    check_finite("y", series, allow_nan=True)
    values = np.asarray(series, float).reshape(-1, series.shape[-1]) if series.ndim in (2, 3) else np.zeros((0, 0))
    p = values.shape[1]
    if series.ndim not in (2, 3) or not len(values):
        raise ValueError(f"`y` must have shape (time, obs) or (trial, time, obs); got {series.shape}.")
    if num_states > p:
        raise ValueError(f"`num_states` must be at most the number of variables, {p}; got {num_states}.")
    empty = np.flatnonzero(np.isnan(values).all(0))
    if empty.size:
        raise ValueError(f"`y` has no value in column {empty[0]}. Leave the column out.")
    mean, sd = np.nanmean(values, 0), np.nanstd(values, 0)
    scale = np.where(sd > 0, sd, 1.0) if method == "fa" else np.full(p, max(float(np.sqrt(np.mean(sd**2))), 1e-30))
    scaled = (values - mean) / scale
    _, lengths, axes = np.linalg.svd(np.nan_to_num(scaled), full_matrices=False)
    size = np.zeros(num_states)
    size[: len(lengths)] = lengths[:num_states] / np.sqrt(len(values))
    C = np.zeros((p, num_states))
    C[:, : len(axes)] = axes[:num_states].T
    zero, one = np.zeros((num_states, num_states)), np.eye(num_states)
    start = LinearGaussianSSM.from_covariances(
        np.zeros(num_states), one, zero, one, C * np.maximum(size, 0.1), 0.5 * np.eye(p), d=np.zeros(p)
    )
    kind = {"diagonal": ("R",)} if method == "fa" else {"isotropic": ("R",)}
    data = (np.asarray(series, float) - mean) / scale
    with warnings.catch_warnings():  # a start need not be the maximum
        warnings.filterwarnings("ignore", message="`num_iters`")
        found = fit_em(data, start, fixed=("m0", "P0", "A", "Q"), num_iters=num_iters, floor=1e-6, **kind).ssm
    left, lengths, _ = np.linalg.svd(np.asarray(found.C, float) * scale[:, None], full_matrices=False)
    C = left * lengths * np.sign(left[np.abs(left).argmax(0), np.arange(num_states)])
    R = np.diagonal(np.asarray(found.R, float)) * scale**2
    signal = (C**2).sum(1)
    d = mean + np.asarray(found.d, float) * scale
    return Readout(*(jnp.asarray(x) for x in (C, d, R, signal / np.maximum(signal + R, 1e-30))))
