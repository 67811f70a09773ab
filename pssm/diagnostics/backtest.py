"""Forecasts as they would have been: from many origins in the past, scored against what came and against naive ones."""

import time as clock
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tqdm.auto import tqdm

from pssm._checks import check_count, unmasked_arguments
from pssm._keys import as_key
from pssm._types import ArrayLike, KeyLike
from pssm.diagnostics.analysis_plots import plot_backtest
from pssm.diagnostics.rolling import Ahead, Roller, series_of
from pssm.diagnostics.scores import scores

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LEVEL = 0.9  # of the intervals
MEANS = ("crps", "log_score", "coverage", "width", "mae", "mase")


@dataclass(frozen=True, eq=False)
class Backtest:
    """The outcome of `backtest`.

    Attributes:
        table: a row for each method, origin, step ahead and series: `observed`, `mean`, `sd`, `low`, `high` (90 %),
            `crps`, `log_score`, `error`, `scaled_error`, `inside`, `pit`.
        scores: a row for each method and step ahead, averaged over origins and series: `crps`, `log_score`,
            `coverage`, `width`, `mae`, `rmse`, `mase`, each with a standard error `..._se`; `skill`, the share of the
            seasonal naive forecast's CRPS that is saved.
        origins: a row for each method and origin: `known` observations, `refit`, `seconds`, `note` (why it failed).
        fits: the fits by `(method, known)`, where there was one.
        y: the data `(time, obs)`.
        time: labels of the steps.
        interrupted: whether it was stopped before the end.
    """

    table: "pd.DataFrame"
    scores: "pd.DataFrame"
    origins: "pd.DataFrame"
    fits: dict[tuple[str, int], Any] = field(repr=False)
    y: np.ndarray = field(repr=False)
    time: np.ndarray = field(repr=False)
    interrupted: bool = False

    @property
    def overall(self) -> "pd.DataFrame":
        """The scores of each method over all steps ahead."""
        return _scores(self.table, ["method"])

    def plot(self, *, title: str = "") -> "Figure":
        """The forecasts of the first method beside the data, and the CRPS of every method by step ahead."""
        return plot_backtest(self, title=title)


def backtest(
    model: Callable[..., Any] | None,
    y: ArrayLike,
    *,
    horizon: int = 1,
    origins: int | Sequence[int] = 10,
    refit: bool | int = True,
    methods: str | Callable[..., Any] | Sequence[Any] | Mapping[str, Any] = "ml",
    period: int | None = None,
    time: ArrayLike | None = None,
    num_draws: int = 1000,
    options: Mapping[str, Any] | None = None,
    key: KeyLike = 0,
    progress_bar: bool = True,
    **kwargs: Any,
) -> Backtest:
    """Rolling-origin evaluation: fits the past, forecasts `horizon` steps, scores them, and moves on.

    For the methods with a name the future is missing (NaN) and not cut off, so that all origins share one compiled
    program, except for `"svi:..."`. Inputs in the future are known. Beside the methods stand the naive forecast (the
    last value) and, with a period, the seasonal naive one (the value a season ago), with normal errors as large as
    theirs were in the past.

    Args:
        model: a NumPyro model whose first argument is the data and whose states are integrated out exactly; None where
            all methods are functions.
        y: data `(time,)` or `(time, obs)`, NaN where missing. A `Series` or `DataFrame` gives its index as `time`.
        horizon: steps ahead.
        origins: how many, evenly from the middle of the series to the last with a whole horizon; or the numbers of
            observations known at each.
        refit: fit the parameters anew at each origin; False: at the first alone; a number: at every so many origins.
        methods: "ml", "map", "nuts", "svi:mvn", "svi:normal", or a function `(y, **kwargs) -> fit` that is given the
            past alone; several in a sequence, or by name in a dict.
        period: steps in a season, for the seasonal naive forecast and the scale of MASE.
        time: labels of the steps.
        num_draws: draws of each forecast.
        options: of the fits: `num_starts`, `num_samples`, ...
        key: random key, or a whole number; the same key gives the same draws.
        progress_bar: show a progress bar.
        kwargs: further arguments of the model; `u` and other arrays along time cover all steps. Of a frame beside a
            frame `y` the rows with the same labels are taken.

    Returns:
        A `Backtest`: `.table`, `.scores`, `.overall`, `.origins`, `.plot()`. An origin that fails is a row of
        `.origins` with the reason in `note`. Ctrl-C ends it with what there is. Standard errors take origins as
        independent, which forecasts that overlap are not.

    Raises:
        ValueError: shapes, origins, horizon or methods do not fit.

    Example:
        >>> from pssm import datasets, models
        >>> y = datasets.load("nile").y
        >>> found = backtest(models.local_level, y, horizon=3, origins=4, refit=False, progress_bar=False)
        >>> sorted(set(found.scores.reset_index().method))
        ['ml', 'naive']

    Source:
        Tashman 2000; Hyndman & Koehler 2006 (MASE); Gneiting & Raftery 2007.
    """
    import pandas as pd

    data, labels, kwargs = series_of(y, time, kwargs)
    num_steps = len(data)
    horizon = check_count("horizon", horizon)
    if period is not None:
        check_count("period", period)
    known = _origins(origins, num_steps, horizon)
    every = len(known) if refit is False else 1 if refit is True else check_count("refit", refit)
    _, kwargs = unmasked_arguments((), kwargs)
    wanted = _methods(methods, model)
    rollers: dict[str, Any] = {
        n: Roller(m, model, data, kwargs, horizon, num_draws, options or {}) for n, m in wanted.items()
    }
    rollers |= {"naive": 1} | ({"seasonal naive": period} if period is not None and period > 1 else {})
    rows, notes, fits, interrupted = [], [], {}, False
    keys = jax.random.split(as_key(key), len(known))
    with tqdm(total=len(known) * len(wanted), disable=not progress_bar) as bar:
        try:
            for i, origin in enumerate(known):
                for name, roller in rollers.items():
                    begun = clock.perf_counter()
                    again = i % every == 0
                    note, ahead = "", None
                    try:
                        ahead = _forecast(roller, data, origin, horizon, num_draws, keys[i], again)
                    except Exception as error:  # one origin must not cost the others
                        note = f"{type(error).__name__}: {error}"
                    if isinstance(roller, Roller):
                        bar.update()
                        if ahead is not None and ahead.fit is not None and not isinstance(ahead.fit, dict):
                            fits[name, origin] = ahead.fit
                    took = clock.perf_counter() - begun
                    notes.append(
                        {"method": name, "known": origin, "origin": labels[origin - 1], "refit": again,
                         "seconds": took, "note": note}
                    )  # fmt: skip
                    if ahead is not None:
                        rows += _rows(name, ahead, data, origin, labels, period)
        except KeyboardInterrupt:
            if not rows:
                raise
            interrupted = True
    failed = [n for n in notes if n["note"]]
    if failed and not rows:
        raise ValueError(f"no origin could be forecast; the first reason: {failed[0]['note']}")
    if failed:
        warnings.warn(f"{len(failed)} forecasts failed; see `.origins`. The first: {failed[0]['note']}", stacklevel=2)
    table = pd.DataFrame(rows)
    done = pd.DataFrame(notes)
    return Backtest(table, _scores(table, ["method", "ahead"]), done, fits, data.reshape(num_steps, -1), labels,
                    interrupted)  # fmt: skip


def _origins(origins: int | Sequence[int], num_steps: int, horizon: int) -> list[int]:
    last = num_steps - horizon
    if last < 2:
        raise ValueError(f"`horizon` must leave at least 2 of the {num_steps} steps for a past; got {horizon}.")
    if isinstance(origins, int | np.integer):
        count = check_count("origins", origins)
        return sorted({int(x) for x in np.linspace(max(num_steps // 2, 2), last, count).round() if 2 <= x <= last})
    found = sorted({check_count("origins", x) for x in origins})
    if not found or found[0] < 2 or found[-1] > last:
        raise ValueError(
            f"`origins` must be numbers of known observations from 2 to {last}, so that {horizon} more follow; got "
            f"{list(origins)}."
        )
    return found


def _methods(methods: Any, model: Any) -> dict[str, Any]:
    if isinstance(methods, str) or callable(methods):
        methods = [methods]
    if not isinstance(methods, Mapping):
        methods = {m if isinstance(m, str) else getattr(m, "__name__", f"method {i}"): m for i, m in enumerate(methods)}
    if not methods:
        raise ValueError("`methods` must name at least one method; got none.")
    for name, method in methods.items():
        if name in ("naive", "seasonal naive"):
            raise ValueError(f"`methods`: {name!r} is there anyway; give the method another name.")
        if not callable(method) and model is None:
            raise ValueError(f"`model` is needed for the method {method!r}.")
    return dict(methods)


def _forecast(roller: Any, data: Any, origin: int, horizon: int, num_draws: int, key: Any, again: bool) -> Ahead:
    if isinstance(roller, Roller):
        found = roller(origin, key, again)
        if not np.isfinite(found.mean).all() or not np.isfinite(found.sd).all():
            raise FloatingPointError("the forecast is not finite.")
        return found
    rows = data.reshape(len(data), -1)
    return naive(rows[:origin], rows[origin : origin + horizon], roller, num_draws, key)


def naive(past: np.ndarray, truth: np.ndarray, period: int, num_draws: int, key: Any) -> Ahead:
    """The value a season ago (of 1 step: the last value), with normal errors of its own past, growing by season."""
    horizon, n = truth.shape
    mean, sd = np.full((horizon, n), np.nan), np.full((horizon, n), np.nan)
    for j in range(n):
        step = _errors(past[:, j], period)
        for h in range(horizon):
            seasons = h // period + 1
            same = past[len(past) - 1 + h + 1 - seasons * period :: -period, j]
            same = same[~np.isnan(same)]
            if len(same) and len(step):
                mean[h, j], sd[h, j] = same[0], np.sqrt(np.mean(step**2) * seasons)
    if np.isnan(mean).any():
        raise ValueError(f"too few observations for a naive forecast with a period of {period}.")
    density = -0.5 * ((truth - mean) / sd) ** 2 - np.log(sd * (2 * np.pi) ** 0.5)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
    return Ahead(mean, sd, mean + sd * rng.normal(size=(num_draws, horizon, n)), density)


def _errors(x: np.ndarray, period: int) -> np.ndarray:
    found = x[period:] - x[:-period] if len(x) > period else x[:0]
    return found[~np.isnan(found)]


def _rows(name: str, ahead: Ahead, data: Any, origin: int, labels: Any, period: int | None) -> list[dict[str, Any]]:
    rows = data.reshape(len(data), -1)
    horizon = len(ahead.mean)
    truth, past = rows[origin : origin + horizon], rows[:origin]
    found = scores(ahead.draws, truth, levels=(LEVEL,))
    low, high = np.quantile(ahead.draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    result = []
    for j in range(rows.shape[1]):
        own = _errors(past[:, j], period or 1)
        own = own if len(own) else _errors(past[:, j], 1)
        scale = np.mean(np.abs(own)) if len(own) and np.any(own) else np.nan
        for h in range(horizon):
            error = truth[h, j] - ahead.mean[h, j]
            result.append(
                {
                    "method": name,
                    "known": origin,
                    "ahead": h + 1,
                    "time": labels[origin + h],
                    "series": j,
                    "observed": truth[h, j],
                    "mean": ahead.mean[h, j],
                    "sd": ahead.sd[h, j],
                    "low": low[h, j],
                    "high": high[h, j],
                    "crps": float(found["crps"][h, j]),
                    "log_score": ahead.log_density[h, j],
                    "error": error,
                    "scaled_error": abs(error) / scale,
                    "inside": float(found["inside"][h, j, 0]),
                    "pit": float(found["pit"][h, j]),
                }
            )
    return result


def _scores(table: "pd.DataFrame", by: list[str]) -> "pd.DataFrame":
    """Averages with standard errors over origins; series of one origin are averaged first."""
    import pandas as pd

    seen: Any = table[~table["observed"].isna()]
    parts: Any = pd.DataFrame(
        {
            **{n: seen[n] for n in (*by, "known")},
            "crps": seen["crps"],
            "log_score": seen["log_score"],
            "coverage": seen["inside"],
            "width": seen["high"] - seen["low"],
            "mae": seen["error"].abs(),
            "square": seen["error"] ** 2,
            "mase": seen["scaled_error"],
        }
    )
    one: Any = parts.groupby([*by, "known"], sort=False).mean().groupby(by, sort=False)
    mean, error = one.mean(), one.std() / np.sqrt(one.count())
    found: Any = pd.DataFrame({"origins": one.size()})
    for name in MEANS:
        found[name], found[f"{name}_se"] = mean[name], error[name]
    found["rmse"] = np.sqrt(mean["square"])
    found["rmse_se"] = error["square"] / (2 * found["rmse"])
    methods = found.index.get_level_values("method")
    base = next((n for n in ("seasonal naive", "naive") if n in methods), None)
    if base is not None:
        reference = found.xs(base, level="method")["crps"] if len(by) > 1 else found.loc[base, "crps"]
        compared = found.index.get_level_values("ahead").map(reference) if len(by) > 1 else reference
        found["skill"] = 1 - found["crps"] / np.asarray(compared)
    return found
