"""One-step residuals of a model with exact predictions; tests of correlation, normality and changing variance."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from pssm._checks import as_float, check_count, check_series
from pssm._types import ArrayLike, KeyLike
from pssm.diagnostics.analysis_plots import plot_residuals
from pssm.fitting.results import Fit, record_of
from pssm.infer.exact import innovations, one_step
from pssm.ssm import LinearGaussianSSM, check_inputs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Residuals:
    """Standardised one-step residuals: independent standard normal numbers where the model is right.

    Attributes:
        values: `(time, series)`; NaN where nothing was observed.
        names: of the series.
        time: labels of the steps.
        skip: first observations of each series that no test counts.
        lags: of the test of correlation.
        table: one row for each series, see `residuals`.
    """

    values: np.ndarray
    names: tuple[str, ...]
    time: np.ndarray = field(repr=False)
    skip: int
    lags: int
    table: "pd.DataFrame" = field(repr=False)

    def tested(self, j: int) -> np.ndarray:
        """Residuals of a series from its first one that counts, NaN where missing."""
        return _after(self.values[:, j], self.skip)

    def autocorrelation(self, j: int) -> np.ndarray:
        """Autocorrelations of a series at lags 1, 2, ..., of the pairs that were observed."""
        return autocorrelations(self.tested(j), self.lags)[0]

    def plot(self, *, title: str = "") -> "Figure":
        """Residuals over time, their quantiles beside a normal's, and autocorrelations; a row for each series."""
        return plot_residuals(self, title=title)


def residuals(
    fit: Fit | LinearGaussianSSM,
    y: ArrayLike | None = None,
    u: ArrayLike | None = None,
    *,
    lags: int | None = None,
    skip: int | None = None,
    names: tuple[str, ...] | None = None,
    time: ArrayLike | None = None,
    site: str | None = None,
    most: int = 100,
    key: KeyLike = 0,
) -> Residuals:
    """Standardised one-step residuals `L_t^{-1} (y_t - E[y_t | y_{1:t-1}])`, `L_t L_t' = Cov(y_t | y_{1:t-1})`.

    `L_t` is lower triangular: with several series the residual of one is given those before it in the same step. A fit
    with several draws has the average over its draws, whose parameters know the whole series.

    Tests, with statistic and p-value in `.table`: Ljung-Box (correlation in time), Jarque-Bera (normal), and the ratio
    H of the mean squares of the last and the first third (a variance that changes; two-sided F). None of them knows
    that parameters were estimated: Ljung-Box rejects a little too rarely.

    Args:
        fit: a fit of a model that integrates its states out exactly; or a model, followed by its data.
        y: data `(time, obs)` of a `LinearGaussianSSM`, NaN where missing.
        u: its inputs `(time, input)`.
        lags: of the Ljung-Box test; by default 10, or a fifth of the observations if that is less.
        skip: first observations of each series to leave out of the tests, where predictions rest on the first state
            alone; by default as many as there are states, at most a tenth of the series.
        names: of the series; by default those of the frame that was fitted.
        time: labels of the steps, likewise.
        site: the observed site, where there are several.
        most: number of draws to use.
        key: random key, or a whole number, for the draws of a guide; the same key gives the same draws.

    Returns:
        A `Residuals`: `.values`, `.table` with `observations`, `mean`, `sd`, `ljung_box`, `ljung_box_p`, `jarque_bera`,
        `jarque_bera_p`, `skew`, `kurtosis`, `h`, `h_p`, and `.plot()`.

    Raises:
        ValueError: the states are not integrated out exactly, data are absent or given twice, or labels do not fit.

    Example:
        >>> from pssm import datasets, models
        >>> from pssm.infer import fit_ml
        >>> found = residuals(fit_ml(models.local_level, datasets.load("nile").y, progress_bar=False))
        >>> found.values.shape, bool(found.table.ljung_box_p.iloc[0] > 0.05)
        ((100, 1), True)

    Source:
        Harvey 1989, section 5.4; Durbin & Koopman 2012, section 2.12.
    """
    labels = None
    if isinstance(fit, LinearGaussianSSM):
        if y is None:
            raise ValueError("`y` is required: the data of a `LinearGaussianSSM`.")
        series = check_series(y, fit.n_obs)
        inputs = check_inputs(fit, None if u is None else as_float("u", u), series.shape[-2])
        mean, cov = jax.jit(one_step)(fit, series, inputs)
        errors, covariances = np.asarray(series - mean)[None], np.asarray(cov)[None]
        n_state = fit.n_state
    else:
        if y is not None or u is not None:
            raise ValueError("`y` and `u` go with a `LinearGaussianSSM`; a fit has its own data.")
        labels = record_of(fit).labels
        errors, covariances, n_state = innovations(fit, most=most, site=site, key=key)
    values = whiten(errors.astype(float), covariances.astype(float)).mean(0)
    values = np.moveaxis(values, -2, 0).reshape(values.shape[-2], -1)
    num_steps, count = values.shape
    given, labels = check_labels(names, time, num_steps, count, labels)
    most_skipped = int((~np.isnan(values)).sum(0).min(initial=num_steps)) // 10
    skip = min(max(n_state, 1), most_skipped) if skip is None else check_count("skip", skip, least=0)
    fewest = int((~np.isnan(values)).sum(0).min(initial=num_steps)) - skip
    lags = max(1, min(10, fewest // 5)) if lags is None else check_count("lags", lags)
    return Residuals(values, given, labels, skip, lags, _table(values, given, skip, lags))


def check_labels(
    names: tuple[str, ...] | None, time: ArrayLike | None, num_steps: int, count: int, labels: Any = None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the series and labels of the steps; by default those of the frame that was fitted, or plain ones."""
    if names is None and labels is not None and len(labels.columns or ()) == count:
        names = labels.columns
    time = labels.time if time is None and labels is not None else time
    if time is None:
        steps = np.arange(num_steps)
    else:
        from pssm.times.labels import label_array  # pandas takes a second to import

        steps = label_array("time", time)
    given = tuple(f"series {j}" if count > 1 else "y" for j in range(count)) if names is None else tuple(names)
    if len(steps) != num_steps:
        raise ValueError(f"`time` must have {num_steps} labels; got {len(steps)}.")
    if len(given) != count:
        raise ValueError(f"`names` must have {count} names; got {len(given)}.")
    return given, steps


def whiten(errors: np.ndarray, covariances: np.ndarray) -> np.ndarray:
    """`L^{-1} e` over the observed entries of each step; NaN where missing, or known without error from the others."""
    seen = ~np.isnan(errors)
    both = seen[..., :, None] & seen[..., None, :]
    n = errors.shape[-1]
    S = np.where(both, covariances, np.eye(n))
    scale = np.sqrt(np.maximum(np.diagonal(S, axis1=-2, axis2=-1), 1e-300))
    S = S / scale[..., :, None] / scale[..., None, :]
    e = np.where(seen, errors, 0.0) / scale
    L, found = np.zeros_like(S), np.zeros_like(e)
    for j in range(n):
        left = S[..., j, j] - np.sum(L[..., j, :j] ** 2, -1)
        known = left > 1e-6  # of the entry's own variance
        pivot = np.where(known, np.sqrt(np.maximum(left, 1e-300)), 1.0)
        rest = e[..., j] - np.sum(L[..., j, :j] * found[..., :j], -1)
        seen[..., j] &= known
        found[..., j] = np.where(known, rest / pivot, 0.0)
        below = S[..., j:, j] - np.sum(L[..., j:, :j] * L[..., None, j, :j], -1)
        L[..., j:, j] = np.where(known[..., None], below / pivot[..., None], 0.0)
    return np.where(seen, found, np.nan)


def autocorrelations(x: np.ndarray, lags: int) -> tuple[np.ndarray, np.ndarray]:
    """Autocorrelations at lags 1 to `lags` of what was observed, and the number of pairs of each; NaN of a constant."""
    seen = ~np.isnan(x)
    centred = np.where(seen, x - np.nanmean(x), 0.0)
    total = np.sum(centred**2)
    found = [np.sum(centred[k:] * centred[:-k]) for k in range(1, lags + 1)]
    return np.array(found) / (total if total > 0 else np.nan), np.array(
        [np.sum(seen[k:] & seen[:-k]) for k in range(1, lags + 1)]
    )


def _after(x: np.ndarray, skip: int) -> np.ndarray:
    places = np.flatnonzero(~np.isnan(x))
    return x[places[skip] :] if len(places) > skip else x[:0]


def _table(values: np.ndarray, names: tuple[str, ...], skip: int, lags: int) -> "pd.DataFrame":
    import pandas as pd
    from scipy import stats

    rows: list[dict[str, Any]] = []
    for j, name in enumerate(names):
        x = _after(values[:, j], skip)
        known = x[~np.isnan(x)]
        n = len(known)
        row: dict[str, Any] = {"series": name, "observations": n}
        if n > max(lags + 1, 5) and known.std() > 0:
            r, pairs = autocorrelations(x, lags)
            q = n * (n + 2) * float(np.sum(r[pairs > 0] ** 2 / pairs[pairs > 0]))
            normal: Any = stats.jarque_bera(known)
            third = round(len(x) / 3)
            first, last = (part[~np.isnan(part)] for part in (x[:third], x[-third:]))
            h = float(np.mean(last**2) / np.mean(first**2)) if len(first) and len(last) else float("nan")
            tail = stats.f.cdf(h, len(last), len(first))
            row |= {
                "mean": known.mean(),
                "sd": known.std(ddof=1),
                "ljung_box": q,
                "ljung_box_p": float(stats.chi2.sf(q, int(np.sum(pairs > 0)))),
                "jarque_bera": float(normal.statistic),
                "jarque_bera_p": float(normal.pvalue),
                "skew": float(stats.skew(known)),
                "kurtosis": float(stats.kurtosis(known, fisher=False)),
                "h": h,
                "h_p": float(2 * min(tail, 1 - tail)),
            }
        rows.append(row)
    columns = ("series", "observations", "mean", "sd", "ljung_box", "ljung_box_p", "jarque_bera", "jarque_bera_p",
               "skew", "kurtosis", "h", "h_p")  # fmt: skip
    return pd.DataFrame(rows, columns=list(columns)).set_index("series")
