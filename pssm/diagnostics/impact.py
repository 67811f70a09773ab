"""What an intervention changed: a series beside the one that its past and its controls would have led to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pssm._checks import check_count, check_finite, unmasked
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.diagnostics.analysis_plots import plot_impact
from pssm.diagnostics.rolling import Roller, series_of
from pssm.distributions import LinearGaussianMarginal
from pssm.filters import sample_states
from pssm.fitting.draws import trace_with
from pssm.fitting.own_arrays import with_own_arrays
from pssm.infer.exact import one_step
from pssm.infer.task import marginal_site
from pssm.linalg.random import standard_normal
from pssm.ssm import LinearGaussianSSM

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Impact:
    """The outcome of `impact`; all numbers are in the units of the data.

    Attributes:
        table: a row for each step: `period` ("pre" or "post"), `observed`, `predicted` with `predicted_low` and
            `predicted_high`, `effect`, `effect_low`, `effect_high`, and from the start on `cumulative`,
            `cumulative_low`, `cumulative_high`. Before the start the predictions are those of one step.
        effects: the rows "average" and "cumulative" over the steps that were observed from the start on: `observed`,
            `predicted`, `effect`, each with `_low` and `_high`, `relative` (to the prediction), `p`.
        placebo: the same for a start that never was, as many steps before the real one; None where the past is too
            short.
        coefficients: of the controls, `mean` and `sd`; None without controls.
        draws: of the series as it would have been, `(draw, steps from the start)`.
        start: label of the first step with the intervention.
        level: of the intervals.
        method, fit: how it was fitted, and the fit (of the data in units of their standard deviation).
        notes: what limits the result, in words.
    """

    table: "pd.DataFrame"
    effects: "pd.DataFrame"
    placebo: "pd.DataFrame | None"
    coefficients: "pd.DataFrame | None"
    draws: np.ndarray = field(repr=False)
    start: Any
    level: float
    method: str
    fit: Any = field(repr=False)
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """The result in words."""
        average, total = self.effects.loc["average"], self.effects.loc["cumulative"]
        share = f"{100 * self.level:g} %"
        steps = int((self.table["period"] == "post").sum())
        sure = average.effect_low > 0 or average.effect_high < 0
        text = [
            f"From {_label(self.start)} on, over {steps} steps, the series averaged {average.observed:.4g}. Without "
            f"the intervention {average.predicted:.4g} would have been expected ({share} interval "
            f"{average.predicted_low:.4g} to {average.predicted_high:.4g}).",
            f"The effect is {average.effect:.4g} a step ({average.effect_low:.4g} to {average.effect_high:.4g}), and "
            f"{total.effect:.4g} in all ({total.effect_low:.4g} to {total.effect_high:.4g}), "
            f"{100 * average.relative:.3g} % of the expectation.",
            f"An effect of this sign by chance has the posterior tail probability {average.p:.3g}"
            + (": the interval leaves out zero." if sure else ": the interval holds zero, so chance can explain it."),
        ]
        if self.placebo is not None:
            fake = self.placebo.loc["average"]
            none = fake.effect_low <= 0 <= fake.effect_high
            text.append(
                f"A placebo start {steps} steps earlier shows {fake.effect:.4g} ({fake.effect_low:.4g} to "
                f"{fake.effect_high:.4g}): "
                + (
                    "no effect, as it should be."
                    if none
                    else "an effect where there was none. Do not trust the model; look at its plot."
                )
            )
        text.append(
            "This holds if the intervention did not touch the controls, and if their relation to the series went on."
            if self.coefficients is not None
            else "This holds if the series would have gone on as it did before. Controls would make it safer."
        )
        return "\n".join([*text, *self.notes])

    def plot(self, *, title: str = "") -> "Figure":
        """The series beside its prediction, the effect of each step, and the cumulative effect."""
        return plot_impact(self, title=title)


def impact(
    y: ArrayLike,
    controls: ArrayLike | None = None,
    start: Any = None,
    *,
    model: Callable[..., Any] | None = None,
    method: str = "nuts",
    level: float = 0.95,
    placebo: bool = True,
    time: ArrayLike | None = None,
    num_draws: int = 1000,
    options: Mapping[str, Any] | None = None,
    key: KeyLike = 0,
) -> Impact:
    """The effect of an intervention: observed minus predicted, from a model that knows the past and the controls.

    The model is fitted to the steps before `start`; from there on the data are missing, the controls are known, and the
    joint posterior of the missing values is the series as it would have been. Inside, data and controls have mean 0 and
    standard deviation 1 before the start; results are in the user's units, so controls may lie anywhere.

    Without `model` it is a level that moves slowly, with regression on the controls, in units of the data's standard
    deviation: `y_t = level_t + beta' u_t + v_t`, `sigma_level ~ HalfNormal(0.05)`, `sigma_obs ~ HalfNormal(1)`,
    `beta ~ Normal(0, 1)`, first level `N(0, 1)`.

    Args:
        y: the series `(time,)`, NaN where missing. A `Series` gives its index as `time`.
        controls: series that the intervention does not touch, `(time, control)`, without gaps. A `DataFrame` gives
            names; beside a frame `y` its rows are found by their labels.
        start: the first step with the intervention: a label of `time` (a date), or its number where there are none.
        model: another model, `(y, u=controls)` or `(y)`, whose states are integrated out exactly, such as
            `functools.partial(pssm.models.structural, trend=True, seasonal=7)`.
        method: "nuts", "ml", "map", "svi:mvn" or "svi:normal"; with "ml" and "map" the parameters are drawn from the
            normal approximation around the maximum.
        level: of the intervals.
        placebo: also try a start that never was, as many steps earlier as there are steps after the real one.
        time: labels of the steps.
        num_draws: paths of the series as it would have been.
        options: of the fit: `num_samples`, `num_warmup`, `num_starts`, ...
        key: random key, or a whole number; the same key gives the same draws.

    Returns:
        An `Impact`: `.effects`, `.table`, `.placebo`, `.summary()` in words, `.plot()`.

    Raises:
        ValueError: `start` is no step with enough data before it, shapes or labels do not fit, or controls have gaps.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = 100 + np.cumsum(rng.normal(size=100))
        >>> y = 1.2 * x + rng.normal(size=100) + 10 * (np.arange(100) >= 70)
        >>> found = impact(y, x, 70, method="ml")
        >>> bool(found.effects.effect_low["average"] < 10 < found.effects.effect_high["average"])
        True

    Source:
        Brodersen, Gallusser, Koehler, Remy & Scott 2015, "Inferring causal impact using Bayesian structural time-series
        models".
    """
    import pandas as pd

    data, labels, beside = series_of(y, time, {"controls": controls})
    data = data[:, 0] if data.ndim == 2 and data.shape[1] == 1 else data
    if data.ndim != 1:
        raise ValueError(f"`y` must be one series of shape (time,); got {data.shape}.")
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1; got {level}.")
    check_count("num_draws", num_draws, least=2)
    x, names = _controls(beside["controls"], len(data))
    first = _first_step(start, labels, data)
    before = data[:first]
    centre, scale = np.nanmean(before), np.nanstd(before)
    scale = scale if scale > 0 else 1.0
    shift = x[:first].mean(0)
    width = np.where(x[:first].std(0) > 0, x[:first].std(0), 1.0)
    kwargs = {"u": (x - shift) / width} if x.shape[1] else {}
    task = _Task((data - centre) / scale, kwargs, method, model or controlled_level, dict(options or {}), num_draws)
    fit_key, fake_key = jax.random.split(as_key(key))
    fit, draws, paths, past = task.run(first, len(data), fit_key)
    paths = centre + scale * paths
    mean, sd = centre + scale * past[0], scale * past[1]
    tails = (1 - level) / 2, (1 + level) / 2
    table = _table(data, labels, first, paths, mean, sd, tails)
    effects = _effects(data[first:], paths, tails)
    fake, notes = None, []
    length = len(data) - first
    if placebo and first - length >= max(10, 2 * (x.shape[1] + 2)) and (~np.isnan(before[: first - length])).sum() > 8:
        found = task.run(first - length, first, fake_key)
        fake = _effects(data[first - length : first], centre + scale * found[2], tails)
    elif placebo:
        notes.append(f"No placebo check: {first} steps before the start are too few for one of {length} steps.")
    if getattr(fit, "at_boundary", ()):
        notes.append(
            f"At the maximum {', '.join(fit.at_boundary)} is at the boundary of its support, and is taken as known: "
            'the intervals are somewhat too narrow. Use `method="nuts"`.'
        )
    coefficients = None
    if x.shape[1] and "beta" in draws:
        beta = draws["beta"].reshape(len(draws["beta"]), -1) * scale / width
        coefficients = pd.DataFrame({"mean": beta.mean(0), "sd": beta.std(0)}, index=names)
    return Impact(table, effects, fake, coefficients, paths, labels[first], level, method, fit, tuple(notes))


def controlled_level(y: ArrayLike, u: ArrayLike | None = None) -> None:
    """The model of `impact`: a slow level and regression, for data with mean 0 and standard deviation 1."""
    one = jnp.ones((1, 1))
    sigma_level = numpyro.sample("sigma_level", dist.HalfNormal(0.05))
    sigma_obs = numpyro.sample("sigma_obs", dist.HalfNormal(1.0))
    D = None
    if u is not None:
        D = numpyro.sample("beta", dist.Normal(0.0, 1.0).expand([jnp.shape(u)[1]]).to_event(1))[None]
    ssm = LinearGaussianSSM(jnp.zeros(1), one, one, sigma_level * one, one, sigma_obs * one, D=D)
    data = jnp.asarray(y).reshape(-1, 1)
    numpyro.sample("y", LinearGaussianMarginal(ssm, len(data), u), obs=data, infer={"state_names": ("level",)})


class _Task:
    """One series and its controls, to be cut at several starts by one compiled program."""

    def __init__(self, y: np.ndarray, kwargs: dict[str, Any], method: str, model: Any, options: Any, num_draws: int):
        self.y, self.model, self.num_draws = y, model, num_draws
        self.kwargs, self.roller = kwargs, Roller(method, model, y, kwargs, 1, num_draws, options)
        self._paths = jax.jit(partial(_paths, with_own_arrays(model)))

    def run(self, start: int, stop: int, key: Key) -> tuple[Any, dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Fit, its draws, paths `(draw, stop - start)` from a start on, and mean and sd of one-step predictions."""
        fit_key, key = jax.random.split(key)
        known = self.roller.past(start)
        fit, draws = self.roller.fitted(known, fit_key, self.num_draws, spread=True)
        rows = np.linspace(0, len(next(iter(draws.values()))) - 1, self.num_draws).round().astype(int)
        keys = jax.random.split(key, self.num_draws)
        with self.roller.precision:
            found = self._paths({n: x[rows] for n, x in draws.items()}, known, self.kwargs, keys)
        paths, mean, cov = (np.asarray(x, float) for x in found)
        spread = np.sqrt(cov.mean(0) + mean.var(0))
        return fit, draws, paths[:, start:stop], np.stack([mean.mean(0), spread])


def _paths(model: Any, draws: dict[str, Array], y: Array, kwargs: dict[str, Any], keys: Key) -> tuple[Array, ...]:
    """For each draw a path of the series given what is known, and moments of one-step predictions."""

    def one(row: tuple[dict[str, Array], Key]) -> tuple[Array, ...]:
        sample, key = row
        state_key, noise_key = jax.random.split(key)
        found: Any = marginal_site(trace_with(model, sample, y, **kwargs))
        d, value = found[1], found[2]
        z = sample_states(state_key, d.ssm, value, d.u)
        noise = standard_normal(noise_key, (d.num_steps, d.ssm.chol_R.shape[-1]), z.dtype)
        path = d.ssm.signal(z, d.u) + (d.ssm.with_time_axis("chol_R") @ noise[..., None])[..., 0]
        mean, cov = one_step(d.ssm, value, d.u)
        return path[:, 0], mean[:, 0], cov[:, 0, 0]

    return jax.lax.map(one, (draws, keys), batch_size=50)


def _controls(controls: Any, num_steps: int) -> tuple[np.ndarray, list[str]]:
    import pandas as pd

    if controls is None:
        return np.zeros((num_steps, 0)), []
    names = [str(n) for n in controls.columns] if isinstance(controls, pd.DataFrame) else None
    x = np.asarray(unmasked(controls), float)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or len(x) != num_steps:
        raise ValueError(f"`controls` must have shape ({num_steps}, control), one row for each step; got {x.shape}.")
    check_finite("controls", jnp.asarray(np.where(np.isfinite(x), 0.0, x)))
    return x, names or [f"control {j}" for j in range(x.shape[1])]


def _first_step(start: Any, labels: np.ndarray, data: np.ndarray) -> int:
    """The number of the first step with the intervention."""
    if start is None:
        raise ValueError("`start` is required: the first step with the intervention.")
    if labels.dtype.kind in "Mm":
        import pandas as pd

        try:
            start = pd.Timestamp(start).to_datetime64()
        except (ValueError, TypeError):
            raise ValueError(f"`start` must be a date, as the labels of time are; got {start!r}.") from None
    try:
        after = np.flatnonzero(labels >= start)
    except TypeError:
        raise ValueError(f"`start` must be comparable with the labels, such as {labels[0]!r}; got {start!r}.") from None
    first = int(after[0]) if len(after) else len(labels)
    seen = int((~np.isnan(data[:first])).sum())
    if first >= len(labels) or np.isnan(data[first:]).all():
        raise ValueError(f"`start` must have data from it on; got {start!r}, and the last label is {labels[-1]!r}.")
    if seen < 5:
        raise ValueError(f"`start` must have at least 5 observations before it; {start!r} has {seen}.")
    return first


def _effects(observed: np.ndarray, paths: np.ndarray, tails: tuple[float, float]) -> "pd.DataFrame":
    """Average and sum over the steps that were observed."""
    import pandas as pd

    seen = ~np.isnan(observed)
    rows = {}
    for name, take in (("average", np.mean), ("cumulative", np.sum)):
        actual, predicted = float(take(observed[seen])), take(paths[:, seen], axis=1)
        low, high = np.quantile(predicted, tails)
        above = (1 + np.sum(predicted >= actual)) / (len(predicted) + 1)
        below = (1 + np.sum(predicted <= actual)) / (len(predicted) + 1)
        centre = float(predicted.mean())
        rows[name] = {
            "observed": actual, "predicted": centre, "predicted_low": low, "predicted_high": high,
            "effect": actual - centre, "effect_low": actual - high, "effect_high": actual - low,
            "relative": (actual - centre) / centre if centre else np.nan, "p": float(min(above, below)),
        }  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index")


def _table(data, labels, first, paths, mean, sd, tails) -> "pd.DataFrame":
    """A row for each step."""
    import pandas as pd
    from scipy.stats import norm

    z = norm.ppf(tails[1])
    predicted, low, high = mean.copy(), mean - z * sd, mean + z * sd
    predicted[first:] = paths.mean(0)
    low[first:], high[first:] = np.quantile(paths, tails, axis=0)
    table = pd.DataFrame({"time": labels, "period": np.where(np.arange(len(data)) < first, "pre", "post")})
    table["observed"], table["predicted"] = data, predicted
    table["predicted_low"], table["predicted_high"] = low, high
    table["effect"], table["effect_low"], table["effect_high"] = data - predicted, data - high, data - low
    steps = np.where(np.isnan(data[first:]), 0.0, data[first:] - paths)
    total = np.cumsum(steps, axis=1)
    blank = np.full(first, np.nan)
    table["cumulative"] = np.concatenate([blank, total.mean(0)])
    for name, q in zip(("cumulative_low", "cumulative_high"), tails, strict=True):
        table[name] = np.concatenate([blank, np.quantile(total, q, axis=0)])
    return table


def _label(start: Any) -> str:
    return str(start)[:10] if isinstance(start, np.datetime64) else str(start)
