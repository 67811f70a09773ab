"""A series as it would have been predicted: a step ahead along it, dynamically from a date on, and beyond its end."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_count, check_series
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.diagnostics.analysis_plots import plot_predictions
from pssm.diagnostics.residuals import check_labels
from pssm.fitting.results import Fit
from pssm.infer.exact import one_step, whole_system
from pssm.infer.mixtures import mixture, mixture_quantiles
from pssm.infer.task import exact_task, steps_of
from pssm.ssm import LinearGaussianSSM, check_inputs, check_num_steps

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ONE_STEP, DYNAMIC, AHEAD = "one step", "dynamic", "forecast"


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of every step of a series, and of some steps after it.

    Attributes:
        mean, sd, low, high: `(time, series)`, with noise of the observation and, for a fit with several draws, with the
            spread of the parameters.
        observed: the data there; NaN where missing, and after their end.
        kind: of each step, "one step" (given all data before it), "dynamic" or "forecast" (given the data before
            `dynamic`, or all).
        names: of the series.
        time: labels of the steps.
        level: of the intervals.
    """

    mean: np.ndarray
    sd: np.ndarray
    low: np.ndarray
    high: np.ndarray
    observed: np.ndarray = field(repr=False)
    kind: np.ndarray = field(repr=False)
    names: tuple[str, ...]
    time: np.ndarray = field(repr=False)
    level: float

    @property
    def table(self) -> "pd.DataFrame":
        """A row for each step and series: `time`, `series`, `kind`, `observed`, `mean`, `sd`, `low`, `high`."""
        import pandas as pd

        count = len(self.names)
        columns = {name: getattr(self, name).ravel() for name in ("observed", "mean", "sd", "low", "high")}
        steps = {"time": np.repeat(self.time, count), "series": np.tile(self.names, len(self.time))}
        return pd.DataFrame({**steps, "kind": np.repeat(self.kind, count), **columns})

    def plot(self, *, title: str = "") -> "Figure":
        """Data beside predictions with their intervals, a panel for each series."""
        return plot_predictions(self, title=title)


def predictions(
    fit: Fit | LinearGaussianSSM,
    y: ArrayLike | None = None,
    u: ArrayLike | None = None,
    *,
    dynamic: Any = None,
    horizon: int = 0,
    u_future: ArrayLike | None = None,
    level: float = 0.9,
    names: tuple[str, ...] | None = None,
    time: ArrayLike | None = None,
    future_time: ArrayLike | None = None,
    site: str | None = None,
    most: int = 400,
    parameters: str | None = None,
    key: KeyLike = 0,
) -> Predictions:
    """Predictions in sample and out of it, `p(y_t | y_{1:t-1})`; from `dynamic` on `p(y_t | y_{1:d-1})`, exact.

    The parameters are those of the fit, which has seen all of the data: `pssm.diagnostics.backtest` fits anew.

    Args:
        fit: a fit of a model that integrates its states out exactly; or a model, followed by its data.
        y: data `(time, obs)` of a `LinearGaussianSSM`, NaN where missing.
        u: its inputs `(time, input)`.
        dynamic: the first step that does not know the data of the step before: a label of `time` (a date, a number), or
            its number where the labels are no numbers; True for the first step, None for no such step. Inputs stay
            known.
        horizon: steps after the end of the data.
        u_future: inputs of these, as in `pssm.infer.forecast`.
        level: of the intervals.
        names: of the series.
        time: labels of the steps; by default the index of the frame that was fitted, or 0, 1, ...
        future_time: labels of the steps after the data; by default those of `time` go on.
        site: the observed site, where there are several.
        most: number of draws to use.
        parameters: of a fit at one point: "fixed" or "laplace", as in `pssm.infer.forecast`.
        key: random key, or a whole number, for the draws of a guide; the same key gives the same draws.

    Returns:
        A `Predictions`: `.mean`, `.sd`, `.low`, `.high`, `.table`, `.plot()`.

    Raises:
        ValueError: the states are not integrated out exactly, data are absent or given twice, `dynamic` is no step,
            inputs of the future are absent, or labels do not fit.

    Example:
        >>> from pssm import datasets, models
        >>> from pssm.infer import fit_ml
        >>> nile = datasets.load("nile")
        >>> fit = fit_ml(models.local_level, nile.y, progress_bar=False)
        >>> found = predictions(fit, time=nile.time, dynamic=1960, horizon=5)
        >>> found.table.groupby("kind", sort=False).size().to_dict()
        {'one step': 89, 'dynamic': 11, 'forecast': 5}

    Source:
        Durbin & Koopman 2012, sections 4.3 and 4.11.
    """
    check_count("horizon", horizon, least=0)
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1; got {level}.")
    labels, task, origin = None, None, 0
    if isinstance(fit, LinearGaussianSSM):
        if y is None:
            raise ValueError("`y` is required: the data of a `LinearGaussianSSM`.")
        data = np.asarray(check_series(y, fit.n_obs))
    else:
        if y is not None or u is not None:
            raise ValueError("`y` and `u` go with a `LinearGaussianSSM`; a fit has its own data.")
        task = exact_task(fit, most=most, key=key, site=site, parameters=parameters)
        labels, origin = task.labels, task.origins[1]
        trace = task.source.trace({n: x[0] for n, x in task.draws.items()})
        data = np.asarray(trace[task.source.site]["value"])
    steps = data.shape[-2] if data.ndim > 1 else len(data)
    flat = np.moveaxis(data, -2, 0).reshape(steps, -1) if data.ndim > 1 else data[:, None]
    series, shown = check_labels(names, time, steps, flat.shape[1], labels)
    first = _first_dynamic(dynamic, shown)
    if task is None:
        mean, cov = _of_system(fit, data, first, u, horizon, u_future)
        mean, variance = mean[None], np.diagonal(cov, axis1=-2, axis2=-1)[None]
    else:
        mean, variance = _of_fit(task, first, horizon, u_future)
    mean, variance = (
        np.moveaxis(x, -2, 1).reshape(len(x), steps + horizon, -1).astype(float) for x in (mean, variance)
    )
    above = np.tile(np.ravel(origin), flat.shape[1] // np.size(origin))  # of series side by side
    low, high = mixture_quantiles(mean, variance, ((1 - level) / 2, (1 + level) / 2)) + above
    moments = mixture(mean, variance, above)
    kind = np.where(np.arange(steps + horizon) < first, ONE_STEP, DYNAMIC).astype("<U8")
    kind[steps:] = AHEAD
    observed = np.concatenate([flat.astype(float), np.full((horizon, flat.shape[1]), np.nan)])
    whole = shown if not horizon else np.concatenate([shown, labels_behind(time, labels, shown, horizon, future_time)])
    return Predictions(moments.mean, moments.sd, low, high, observed, kind, series, whole, level)


def _of_system(
    ssm: Any, data: np.ndarray, first: int, u: ArrayLike | None, horizon: int, u_future: ArrayLike | None
) -> tuple[np.ndarray, np.ndarray]:
    """Moments of every step of a model."""
    steps = data.shape[-2]
    check_num_steps(ssm, steps + horizon, "`y` with the horizon", or_more=True)
    inputs = check_inputs(ssm, u, steps)
    if horizon and inputs is not None:
        inputs = jnp.concatenate([inputs, check_inputs(ssm, u_future, horizon, "u_future")], axis=-2)
    whole = ssm if ssm.num_steps is None else ssm.steps(0, steps + horizon)
    mean, cov = jax.jit(one_step)(whole, _hidden(jnp.asarray(data), first, horizon), inputs)
    return np.asarray(mean), np.asarray(cov)


def _of_fit(task: Any, first: int, horizon: int, u_future: Any) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances of every step for each draw."""
    source = task.source
    ahead = steps_of(task, source.num_steps, horizon, u_future) if horizon else None

    def one(sample: dict[str, Array], key: Key) -> tuple[Array, Array]:
        ssm, y, u, _ = whole_system(source, sample, key, ahead)
        mean, cov = one_step(ssm, _hidden(y, first, horizon), u)
        return mean, jnp.diagonal(cov, axis1=-2, axis2=-1)

    return task.map(one)


def _hidden(y: Array, first: int, horizon: int) -> Array:
    """The data without those from a step on, and with steps behind them."""
    longer = jnp.concatenate([y, jnp.full((*y.shape[:-2], horizon, y.shape[-1]), jnp.nan, y.dtype)], axis=-2)
    return jnp.where((jnp.arange(longer.shape[-2]) < first)[:, None], longer, jnp.nan)


def _first_dynamic(dynamic: Any, labels: np.ndarray) -> int:
    """The number of the first step that does not know the data of the step before."""
    steps = len(labels)
    if dynamic is None or dynamic is False:
        return steps
    if dynamic is True:
        return 0
    words = f"`dynamic` must be a label from {labels[0]} to {labels[-1]}, or the number of a step; got {dynamic!r}."
    if isinstance(dynamic, int | np.integer) and labels.dtype.kind not in "iuf":
        if not 0 <= dynamic < steps:
            raise ValueError(words)
        return int(dynamic)
    return place_of(dynamic, labels, words)


def place_of(label: Any, labels: np.ndarray, words: str) -> int:
    """The first step whose label is not before a date or a number; or which has this text as its label.

    Raises:
        ValueError: there is none; `words` say so.
    """
    if labels.dtype.kind == "M":
        import pandas as pd

        moment: Any = None
        for kind in (pd.Period, pd.Timestamp) if isinstance(label, str) else (pd.Timestamp,):
            try:
                moment = kind(label) if not isinstance(label, pd.Period) else label
            except (ValueError, TypeError):
                continue
            break
        if moment is None or moment is pd.NaT:
            raise ValueError(words)
        moment = moment.start_time if isinstance(moment, pd.Period) else moment
        moment = moment if moment.tzinfo is None else moment.tz_convert("UTC").tz_localize(None)
        label = moment.to_datetime64()
    elif labels.dtype.kind in "iuf":
        if isinstance(label, bool) or not isinstance(label, int | float | np.number):
            raise ValueError(words)
    elif str(label) in labels:
        return int(np.flatnonzero(labels == str(label))[0])
    else:
        raise ValueError(words)
    after = np.flatnonzero(labels >= label)
    if not len(after) or (label < labels[0]):
        raise ValueError(words)
    return int(after[0])


def labels_behind(time: Any, labels: Any, shown: np.ndarray, horizon: int, future_time: Any) -> np.ndarray:
    """Labels of the steps after the data: those given, or those that go on by the calendar."""
    from pssm.times.grid import future_labels  # pandas takes a second to import
    from pssm.times.labels import label_array

    if future_time is not None:
        found = label_array("future_time", future_time)
    else:
        given = labels.time if time is None and labels is not None else time
        plain = given is None
        found = label_array(
            "time", np.arange(len(shown), len(shown) + horizon) if plain else future_labels(given, horizon)
        )
    if len(found) != horizon:
        raise ValueError(f"`future_time` must have {horizon} labels; got {len(found)}.")
    return found
