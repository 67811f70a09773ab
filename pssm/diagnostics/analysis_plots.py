"""Figures of residuals, predictions, backtests and impacts, in the look of `pssm.plots`."""

from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from pssm.plot_helpers import (
    FORECAST,
    GREY,
    INK,
    LEGEND,
    SIGNAL,
    limit_x,
    method_style,
    new_figure,
    positions,
    shown_text,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is imported when a figure is drawn
    Figure = Any

MOST_SERIES = 6
MOST_PANELS = 12


def plot_residuals(found: Any, *, title: str = "") -> Figure:
    """The figure of `pssm.diagnostics.Residuals`."""
    from scipy import stats

    shown = min(len(found.names), MOST_SERIES)
    figure = new_figure([2.4] * shown, title)
    axes = figure.subplots(shown, 3, squeeze=False, width_ratios=[2.2, 1, 1.2])
    x, _, dates = positions(found.time, len(found.time), None, 0)
    for j, (over_time, quantiles, correlations) in enumerate(axes):
        values = found.values[:, j]
        over_time.axhspan(-1.96, 1.96, color=GREY, alpha=0.15, lw=0)
        over_time.plot(x, values, ".-" if len(x) <= 300 else ".", color=SIGNAL, lw=0.8, ms=4 if len(x) <= 300 else 2)
        over_time.set_ylabel(shown_text(found.names[j]), fontsize=11)
        tidy(over_time, dates)
        known = np.sort(found.tested(j)[~np.isnan(found.tested(j))])
        if len(known) > 2:
            normal = stats.norm.ppf((np.arange(len(known)) + 0.5) / len(known))
            quantiles.plot(normal[[0, -1]], normal[[0, -1]], color=GREY, lw=1)
            quantiles.plot(normal, known, ".", color=SIGNAL, ms=4)
            r = found.autocorrelation(j)
            lags = np.arange(1, len(r) + 1)
            correlations.axhspan(-1.96 / len(known) ** 0.5, 1.96 / len(known) ** 0.5, color=GREY, alpha=0.15, lw=0)
            correlations.vlines(lags, 0, r, color=SIGNAL, lw=2)
            correlations.axhline(0, color=INK, lw=0.8)
            correlations.set_ylim(-1.05, 1.05)
            correlations.xaxis.get_major_locator().set_params(integer=True)
        for ax in (quantiles, correlations):
            tidy(ax, False)
        if j == 0:
            for ax, text in zip(
                axes[0], ("standardised residuals", "normal quantiles", "autocorrelation by lag"), strict=True
            ):
                ax.set_title(text, loc="left", fontsize=10.5, color=GREY)
    return figure


def plot_disturbances(found: Any, *, title: str = "") -> Figure:
    """The figure of `pssm.diagnostics.Disturbances`."""
    rows = [
        (name, residuals[:, j])
        for names, residuals in (
            (found.names, found.observation_residuals),
            (found.state_names, found.state_residuals),
        )
        for j, name in enumerate(names)
        if not np.isnan(residuals[:, j]).all()
    ][: 2 * MOST_SERIES]
    figure = new_figure([1.8] * len(rows), title)
    axes = figure.subplots(len(rows), 1, squeeze=False, sharex=True)[:, 0]
    x, _, dates = positions(found.time, len(found.time), None, 0)
    for ax, (name, values) in zip(axes, rows, strict=True):
        ax.axhspan(-1.96, 1.96, color=GREY, alpha=0.15, lw=0)
        ax.vlines(x, 0, values, color=SIGNAL, lw=1.2)
        ax.axhline(0, color=INK, lw=0.8)
        named = found.table.loc[found.table.name == name]
        marked = np.isin(found.time, named.time.to_numpy())
        ax.plot(np.asarray(x)[marked], values[marked], "o", color=FORECAST, ms=5)
        ax.set_ylabel(shown_text(name), fontsize=11)
        tidy(ax, dates)
    axes[0].set_title("auxiliary residuals", fontsize=11, loc="left")
    return figure


def plot_predictions(found: Any, *, title: str = "") -> Figure:
    """The figure of `pssm.diagnostics.Predictions`."""
    shown = min(len(found.names), MOST_SERIES)
    figure = new_figure([2.8] * shown, title)
    axes = figure.subplots(shown, 1, squeeze=False, sharex=True)[:, 0]
    x, _, dates = positions(found.time, len(found.time), None, 0)
    skip = min(len(x) // 20 + 1, 5)  # where predictions rest on the first state alone
    parts = [
        ("one step", SIGNAL, "one step ahead"),
        ("dynamic", FORECAST, "dynamic"),
        ("forecast", FORECAST, "forecast"),
    ]
    for j, ax in enumerate(axes):
        for kind, color, label in parts:
            steps = np.flatnonzero(found.kind == kind)
            steps = steps[steps >= skip] if kind == "one step" else steps
            if len(steps):
                band = f"{100 * found.level:g} % interval" if kind == "one step" else None
                ax.fill_between(
                    x[steps], found.low[steps, j], found.high[steps, j], color=color, alpha=0.2, lw=0, label=band
                )
                line = "--" if kind == "forecast" else "-"
                ax.plot(x[steps], found.mean[steps, j], line, color=color, lw=1.4, label=label)
                if kind != "one step":
                    ax.axvline(x[steps[0]], color=GREY, lw=0.8, ls=":")
        ax.plot(x, found.observed[:, j], color=INK, lw=1.0, label="data")
        ax.set_ylabel(shown_text(found.names[j]), fontsize=11)
        limit_x(ax, x[0], x[-1])
        tidy(ax, dates)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, **LEGEND)
    return figure


def plot_components(found: Any, *, series: str | None = None, title: str = "") -> Figure:
    """The figure of `pssm.diagnostics.Decomposition`."""
    data = found.data
    names = [str(n) for n in data["series"].values]
    if series is not None and series not in names:
        raise ValueError(f"`series` must be one of {names}; got {series!r}.")
    one = data.isel(series=0 if series is None else names.index(series))
    # A slope is no contribution, but what one looks for: it has a panel beside those that add up.
    own = ("slope", f"slope[{one['series'].item()}]")
    slopes = [str(n) for n in data["state"].values if str(n) in own]
    panels = [*found.components[:MOST_PANELS], *slopes]
    figure = new_figure([2.4] + [1.6] * len(panels), title)
    axes = figure.subplots(1 + len(panels), 1, squeeze=False, sharex=True)[:, 0]
    x, _, dates = positions(data["time"].values, data.sizes["time"], None, 0)
    axes[0].plot(x, one["observed"], color=INK, lw=1.0, label="data")
    axes[0].plot(x, one["signal_mean"], color=SIGNAL, lw=1.4, label="signal")
    axes[0].set_ylabel(shown_text(one["series"].item()), fontsize=11)
    share = f"{100 * found.level:g} % interval"
    z = float(NormalDist().inv_cdf((1 + found.level) / 2))
    for ax, name in zip(axes[1:], panels, strict=True):
        if name in slopes and name not in found.components:
            mean, sd = data["state_mean"].sel(state=name).values, data["state_sd"].sel(state=name).values
            low, high = mean - z * sd, mean + z * sd
        else:
            mean, low, high = (one[n].sel(component=name).values for n in ("mean", "low", "high"))
        if name.startswith("irregular"):
            ax.vlines(x, 0, mean, color=SIGNAL, lw=1.0)
        else:
            ax.fill_between(x, low, high, color=SIGNAL, alpha=0.2, lw=0)
            ax.plot(x, mean, color=SIGNAL, lw=1.3)
            lows, highs = np.nanmin(mean), np.nanmax(mean)
            room = max(highs - lows, 4 * float(np.nanmedian(high - low)), 1e-12)
            edges = max(float(np.nanmin(low)), lows - room), min(float(np.nanmax(high)), highs + room)
            if edges[1] > edges[0]:  # a wide start must not flatten the rest
                ax.set_ylim(edges[0] - 0.05 * (edges[1] - edges[0]), edges[1] + 0.05 * (edges[1] - edges[0]))
        ax.set_ylabel(shown_text(name), fontsize=11)
    for ax in axes:
        limit_x(ax, x[0], x[-1])
        tidy(ax, dates)
    axes[0].fill_between([], [], [], color=SIGNAL, alpha=0.2, lw=0, label=share)
    axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, **LEGEND)
    return figure


def plot_news(found: Any, *, most: int = 12, title: str = "") -> Figure:
    """The figure of `pssm.diagnostics.News`."""
    summary = found.summary.head(MOST_SERIES)
    largest = []
    for _, row in summary.iterrows():
        own = found.table[
            (found.table.target_time == row.target_time) & (found.table.target_series == row.target_series)
        ]
        order = own.impact.abs().sort_values(ascending=False).index[:most]
        largest.append((row, own.loc[order[::-1]], own.impact.sum() - own.loc[order].impact.sum()))
    figure = new_figure([0.9 + 0.28 * max(len(part) + (rest != 0), 1) for _, part, rest in largest], title)
    axes = figure.subplots(len(largest), 1, squeeze=False)[:, 0]
    for ax, (row, part, rest) in zip(axes, largest, strict=True):
        names = [f"{shown_text(r.series)}, {_moment(r.time)} ({r.kind})" for r in part.itertuples()]
        values = part.impact.tolist()
        if len(part) == most and rest:
            names, values = ["all others", *names], [rest, *values]
        colors = [SIGNAL if x >= 0 else FORECAST for x in values]
        ax.barh(range(len(values)), values, color=colors, height=0.7)
        ax.set_yticks(range(len(values)), names)
        ax.axvline(0, color=INK, lw=0.8)
        ax.set_title(
            f"{shown_text(row.target_series)}, {_moment(row.target_time)}: {row.before:.4g} to {row.after:.4g}",
            loc="left", fontsize=11,
        )  # fmt: skip
        tidy(ax, False, grid=False)
    axes[-1].set_xlabel("impact on the forecast", fontsize=11)
    return figure


def _moment(label: Any) -> str:
    """A label of time, without a time of day where there is none."""
    return str(label).removesuffix(" 00:00:00").removesuffix("T00:00:00.000000000")


def plot_backtest(found: Any, *, title: str = "") -> Figure:
    """The figure of `pssm.diagnostics.Backtest`."""
    table, first = found.table, found.table["method"].iloc[0]
    shown = min(found.y.shape[1], MOST_SERIES)
    figure = new_figure([2.8] * shown + [2.4], title)
    axes = figure.subplots(shown + 1, 1, squeeze=False)[:, 0]
    x, _, dates = positions(found.time, len(found.time), None, 0)
    for j, ax in enumerate(axes[:-1]):
        ax.plot(x, found.y[:, j], color=INK, lw=1.0, label="data")
        own = table[(table["method"] == first) & (table["series"] == j)]
        for k, (known, part) in enumerate(own.groupby("known")):
            places = x[known + part["ahead"].to_numpy() - 1]
            band = {"label": "90 % interval"} if k == 0 else {}
            ax.fill_between(places, part["low"], part["high"], color=FORECAST, alpha=0.25, lw=0, **band)
            ax.plot(places, part["mean"], ".-", color=FORECAST, lw=1.4, ms=4, label=f"{first}" if k == 0 else None)
            ax.axvline(x[known - 1], color=GREY, lw=0.5, ls=":")
        start = max(int(table["known"].min()) - 2 * int(table["ahead"].max()) - 20, 0)
        limit_x(ax, x[start], x[-1])
        tidy(ax, dates)
        if j == 0:
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, **LEGEND)
    last = axes[-1]
    for k, (method, part) in enumerate(found.scores.reset_index().groupby("method", sort=False)):
        color, line = method_style(k)
        last.errorbar(part["ahead"], part["crps"], part["crps_se"], color=color, ls=line, marker="o", ms=4, capsize=2,
                      label=shown_text(method))  # fmt: skip
    last.xaxis.get_major_locator().set_params(integer=True)
    last.set_xlabel("steps ahead", fontsize=11)
    last.set_ylabel("CRPS", fontsize=11)
    last.set_ylim(bottom=0)
    tidy(last, False)
    last.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, **LEGEND)
    return figure


def plot_impact(found: Any, *, title: str = "") -> Figure:
    """The figure of `pssm.diagnostics.Impact`."""
    table = found.table
    figure = new_figure([2.6, 2.0, 2.0], title)
    axes = figure.subplots(3, 1, sharex=True)
    x, _, dates = positions(table["time"].to_numpy(), len(table), None, 0)
    after = (table["period"] == "post").to_numpy()
    start = x[np.flatnonzero(after)[0]]
    share = f"{100 * found.level:g} % interval"
    first = min(len(table) // 20 + 1, 5)  # where predictions rest on the first state alone
    parts = (("predicted", "series"), ("effect", "effect of each step"), ("cumulative", "cumulative effect"))
    for ax, (name, label) in zip(axes, parts, strict=True):
        shown = np.arange(len(x)) >= first if name != "cumulative" else after
        low, high = (table[f"{name}_{end}"].to_numpy()[shown] for end in ("low", "high"))
        ax.fill_between(x[shown], low, high, color=FORECAST, alpha=0.25, lw=0, label=share)
        ax.plot(x[shown], table[name].to_numpy()[shown], color=FORECAST, lw=1.4, label="prediction")
        if name == "predicted":
            ax.plot(x, table["observed"], color=INK, lw=1.1, label="data")
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, **LEGEND)
        else:
            ax.axhline(0, color=INK, lw=0.8)
        ax.axvline(start, color=GREY, lw=1.0, ls="--")
        ax.set_ylabel(label, fontsize=11)
        limit_x(ax, x[0], x[-1])
        tidy(ax, dates)
    return figure
