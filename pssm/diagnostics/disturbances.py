"""Auxiliary residuals: smoothed disturbances in units of their own spread, which show outliers and breaks."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pssm._checks import check_series
from pssm._types import ArrayLike, KeyLike
from pssm.diagnostics.analysis_plots import plot_disturbances
from pssm.diagnostics.residuals import check_labels
from pssm.filters.disturbances import smooth_disturbances
from pssm.fitting.results import Fit, record_of
from pssm.infer.exact import of_exact_series
from pssm.ssm import LinearGaussianSSM

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LEAST = 1e-6  # of the noise's own size: below, the data say nothing of a disturbance


@dataclass(frozen=True, eq=False)
class Disturbances:
    """What the whole series says of each noise.

    Attributes:
        observation: smoothed noise of the observations, in units of the data, `(time, series)`; NaN where missing.
        state: smoothed noise of the step into each time, in units of the states, `(time, state)`.
        observation_residuals: auxiliary residuals, `observation` by its standard deviation: standard normal numbers
            where the model is right, correlated with their neighbours. NaN where the data say nothing of a noise.
        state_residuals: those of the states.
        names: of the series.
        state_names: of the states.
        time: labels of the steps.
        table: the outliers and breaks, see `disturbances`.
    """

    observation: np.ndarray
    state: np.ndarray
    observation_residuals: np.ndarray
    state_residuals: np.ndarray
    names: tuple[str, ...]
    state_names: tuple[str, ...]
    time: np.ndarray = field(repr=False)
    table: "pd.DataFrame" = field(repr=False)

    def plot(self, *, title: str = "") -> "Figure":
        """Auxiliary residuals over time: a row for each series and for each state that has noise."""
        return plot_disturbances(self, title=title)


def disturbances(
    fit: Fit | LinearGaussianSSM,
    y: ArrayLike | None = None,
    u: ArrayLike | None = None,
    *,
    names: tuple[str, ...] | None = None,
    state_names: tuple[str, ...] | None = None,
    time: ArrayLike | None = None,
    site: str | None = None,
    level: float = 0.05,
    most: int = 100,
    key: KeyLike = 0,
) -> Disturbances:
    """Smoothed disturbances with auxiliary residuals, and what stands out among them.

    A large auxiliary residual of an observation is an outlier; one of a level is a break of the level, one of a slope a
    break of the slope, in the step INTO that time. `.table` has those whose two-sided p-value, times the number of
    steps (Bonferroni), is below `level`. A break of a level also shows, smaller, in the residuals around it. A fit with
    several draws has the average over its draws.

    Args:
        fit: a fit of a model that integrates its states out exactly; or a model, followed by its data.
        y: data `(time, obs)` of a `LinearGaussianSSM`, NaN where missing.
        u: its inputs `(time, input)`.
        names: of the series; by default those of the frame that was fitted.
        state_names: of the states; by default those of the model.
        time: labels of the steps; by default the index of the frame that was fitted.
        site: the observed site, where there are several.
        level: of the test of each series and each state.
        most: number of draws to use.
        key: random key, or a whole number, for the draws of a guide; the same key gives the same draws.

    Returns:
        A `Disturbances`: arrays, `.plot()`, and `.table` with `time`, `kind` ("outlier" or "break"), `name`,
        `disturbance` in the user's units, `residual`, and `p` (adjusted).

    Raises:
        ValueError: the states are not integrated out exactly, data are absent or given twice, there are several series
            in a plate, or labels do not fit.

    Example:
        >>> from pssm import LinearGaussianSSM, datasets
        >>> nile = datasets.load("nile")
        >>> model = LinearGaussianSSM.from_covariances([0.0], [[1e7]], [[1.0]], [[1469.1]], [[1.0]], [[15099.0]])
        >>> found = disturbances(model, nile.y, time=nile.time, names=("flow",), state_names=("level",), level=0.5)
        >>> found.table[["time", "kind", "name"]].values.tolist()
        [[1913, 'outlier', 'flow'], [1899, 'break', 'level']]

    Source:
        Harvey & Koopman 1992; Durbin & Koopman 2012, section 7.5.
    """
    labels = None
    if isinstance(fit, LinearGaussianSSM):
        if y is None:
            raise ValueError("`y` is required: the data of a `LinearGaussianSSM`.")
        found = [np.asarray(x, float)[None] for x in smooth_disturbances(fit, check_series(y, fit.n_obs), u)]
        states = tuple(f"state {i}" for i in range(fit.n_state))
    else:
        if y is not None or u is not None:
            raise ValueError("`y` and `u` go with a `LinearGaussianSSM`; a fit has its own data.")
        labels = record_of(fit).labels
        draws, states = of_exact_series(smooth_disturbances, fit, most=most, site=site, key=key)
        found = [np.asarray(x, float) for x in draws]
    if found[0].ndim != 3:
        raise ValueError(f"`fit` must have one path of states; its series stand in a plate of {found[0].shape[1:-2]}.")
    state, state_sd, obs, obs_sd = found
    aux_state, aux_obs = _standard(state, state_sd).mean(0), _standard(obs, obs_sd).mean(0)
    series, labels = check_labels(names, time, *obs.shape[1:], labels)
    states = states if state_names is None else tuple(state_names)
    if len(states) != state.shape[-1]:
        raise ValueError(f"`state_names` must have {state.shape[-1]} names; got {len(states)}.")
    parts = (("outlier", series, obs.mean(0), aux_obs), ("break", states, state.mean(0), aux_state))
    table = _table(parts, labels, level)
    return Disturbances(obs.mean(0), state.mean(0), aux_obs, aux_state, series, states, labels, table)


def _standard(mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Means by their standard deviations, NaN where the data move a mean by nothing but rounding."""
    largest = np.nanmax(sd, axis=-2, keepdims=True, initial=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sd > LEAST * largest, mean / sd, np.nan)


def _table(parts: tuple, labels: np.ndarray, level: float) -> "pd.DataFrame":
    import pandas as pd
    from scipy import stats

    rows = []
    for kind, names, values, residuals in parts:
        for j, name in enumerate(names):
            count = int((~np.isnan(residuals[:, j])).sum())
            p = np.minimum(2 * count * stats.norm.sf(np.abs(residuals[:, j])), 1.0)
            rows += [(labels[t], kind, name, values[t, j], residuals[t, j], p[t]) for t in np.flatnonzero(p < level)]
    return pd.DataFrame(rows, columns=["time", "kind", "name", "disturbance", "residual", "p"])
