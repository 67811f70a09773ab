"""Figures for state-space fits: the states and the forecast, posteriors side by side, k-hat, and SVI losses.

Every function returns a `matplotlib.figure.Figure` that is not registered with pyplot, laid out for a width of about
900 pixels, in the Okabe-Ito colours, which colour-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pssm.plot_helpers import (
    CENTER,
    FORECAST,
    GOOD,
    GREY,
    INK,
    LEGEND,
    PAST,
    SIGNAL,
    Z90,
    blocks,
    group,
    limit_x,
    matrix,
    method_style,
    new_figure,
    positions,
    runs,
    scalar_draws,
    series_parts,
    shared_range,
    shown_text,
    state_moments,
    tidy,
    value_limits,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # matplotlib is imported when a figure is drawn
    Axes = Figure = Any

__all__ = ["plot_khat", "plot_losses", "plot_posteriors", "plot_states"]

_LONG = 250  # a series with more steps than this gets a second panel with its last part
_MAX_SERIES, _MAX_PARAMETERS = 6, 12


# The states, the data and the forecast


def plot_states(tree: Any, *, title: str = "", ylabel: str = "", time_label: str = "time") -> Figure:
    """Data, smoothed signal with its 90 % interval, and the forecast with its 50 and 90 % intervals.

    Missing observations are hatched. A series of more than 250 steps gets a second panel that shows its last part.
    When the state has more than one coordinate, the first four are drawn below.

    Args:
        tree: DataTree with the group `observed_data` (`y`: time, series; NaN is missing) and, where the fit has them,
            `smoothed_states` (`mean`, `sd`: time, state; `signal_mean`, `signal_sd`: time, series) and `forecast`
            (`mean`, `sd`, `q05`, `q25`, `q75`, `q95`: horizon, series). The attribute `units` of `y` is shown.
        title: heading of the figure.
        ylabel: name of the quantity, used when there is one series.
        time_label: name of the time axis; left out when the time labels are dates.

    Returns:
        The figure; up to six series, one below the other.

    Raises:
        ValueError: `tree` has no observed data.

    Example:
        >>> import numpy as np, xarray as xr
        >>> y = xr.Dataset({"y": (("time", "series"), np.arange(8.0)[:, None])}, coords={"time": np.arange(8)})
        >>> len(plot_states(xr.DataTree.from_dict({"observed_data": y}), ylabel="flow").axes)
        1
    """
    observed, smoothed, future = (group(tree, g) for g in ("observed_data", "smoothed_states", "forecast"))
    if observed is None or "y" not in observed:
        raise ValueError("`tree` must have the group `observed_data` with the variable `y`; got none. Nothing to draw.")
    y = matrix(observed["y"])
    num_steps, num_series = y.shape
    time = observed["time"].values if "time" in observed.coords else np.arange(num_steps)
    future = future if future is not None and "mean" in future else None
    num_future = 0 if future is None else future["mean"].shape[0]
    horizon = future["horizon"].values if future is not None and "horizon" in future.coords else None
    x, x_future, dates = positions(time, num_steps, horizon, num_future)

    shown = min(num_series, _MAX_SERIES)
    names = [shown_text(s) for s in observed["series"].values] if "series" in observed.coords else []
    names = names or [f"series {j + 1}" for j in range(num_series)]
    if num_series == 1 and ylabel:
        names = [shown_text(ylabel)]
    units = observed["y"].attrs.get("units")
    tail = min(max(60, num_steps // 8, 4 * num_future), 240) if num_steps > _LONG else 0
    states = state_moments(smoothed)

    heights = [2.9 if shown == 1 else 2.3] * (shown * (2 if tail else 1)) + [1.3] * len(states)
    figure = new_figure(heights, title)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    panels = iter(axes)
    full = (x[0], (x_future if num_future else x)[-1])
    for j in range(shown):
        parts = series_parts(y, smoothed, future, j)
        label = names[j] + (f" ({shown_text(units)})" if units else "")
        for zoom in (False, True) if tail else (False,):
            ax = next(panels)
            start = num_steps - tail if zoom else 0
            _draw_series(ax, x[start:], x_future, {k: v[start:] if k in PAST else v for k, v in parts.items()})
            limit_x(ax, x[start], full[1])
            ax.set_ylabel(label, fontsize=11)
            tidy(ax, dates)
            if zoom:
                ax.set_title(f"the last {tail} steps", loc="left", fontsize=10.5, color=GREY)
            elif tail:
                ax.axvspan(x[num_steps - tail], full[1], color="#F0E442", alpha=0.22, lw=0, zorder=0)
            if j == 0 and not zoom:
                _legend_above(ax)
    for k, (name, mean, sd) in enumerate(states):
        ax = next(panels)
        ax.fill_between(x, mean - Z90 * sd, mean + Z90 * sd, color=GOOD, alpha=0.25, lw=0)
        ax.plot(x, mean, color=GOOD, lw=1.6)
        ax.set_ylabel(name, fontsize=11)
        ax.set_ylim(value_limits([mean], [mean - Z90 * sd, mean + Z90 * sd]))
        limit_x(ax, *full)
        tidy(ax, dates)
        if k == 0:
            total = smoothed["mean"].shape[1]
            note = f" (the first {len(states)} of {total})" if total > len(states) else ""
            ax.set_title(f"state coordinates with 90 % interval{note}", loc="left", fontsize=10.5, color=GREY)
        if k < len(states) - 1:
            ax.tick_params(labelbottom=False)
            ax.xaxis.get_offset_text().set_visible(False)
    figure.align_ylabels(axes)
    if not dates:
        axes[-1].set_xlabel(shown_text(time_label), fontsize=11)
    if num_series > shown:
        figure.supxlabel(f"{shown} of {num_series} series shown", fontsize=10, color=GREY, x=0.01, ha="left")
    return figure


def _draw_series(ax: Axes, x: np.ndarray, x_future: np.ndarray, parts: Mapping[str, np.ndarray]) -> None:
    y, extra = parts["y"], []
    step = np.diff(x).min() if len(x) > 1 else 1.0
    style = {"facecolor": "#f1f1f1", "edgecolor": "#b5b5b5", "hatch": "////", "lw": 0, "zorder": 0, "label": "missing"}
    short = []  # too short for a visible band: a tick at the bottom
    for start, stop in runs(np.isnan(y)):
        if (stop - start) * step < 0.006 * (x[-1] - x[0]):
            short += list(x[start:stop])
        else:
            ax.axvspan(x[start] - step / 2, x[stop - 1] + step / 2, **style)
    if short:
        ticks = {"transform": ax.get_xaxis_transform(), "color": GREY, "ms": 7, "ls": "", "marker": "|"}
        ax.plot(short, np.full(len(short), 0.02), label="missing", **ticks)
    if "mean" in parts:
        mean, sd = parts["mean"], parts["sd"]
        extra += [mean - Z90 * sd, mean + Z90 * sd]
        ax.fill_between(x, *extra, color=SIGNAL, alpha=0.25, lw=0, label="its 90 % interval")
        ax.plot(x, mean, color=SIGNAL, lw=1.9, label="smoothed signal")
    size = float(np.clip(60.0 / np.sqrt(max(len(y), 1)), 1.3, 4.6))
    ax.plot(x, y, "o", ms=size, mfc=INK, mec="white", mew=0.5 if size > 2.5 else 0, label="data", zorder=3)
    core = [y, parts.get("mean", y)]
    if "future" in parts:
        wide, narrow = (parts["q05"], parts["q95"]), (parts["q25"], parts["q75"])
        ax.fill_between(x_future, *wide, color=FORECAST, alpha=0.18, lw=0, label="forecast, 90")
        ax.fill_between(x_future, *narrow, color=FORECAST, alpha=0.34, lw=0, label="and 50 %")
        ax.plot(x_future, parts["future"], color=FORECAST, lw=1.9, ls=(0, (5, 1.5)))
        ax.axvline((x[-1] + x_future[0]) / 2, color=GREY, lw=0.9, ls=":")
        core, extra = [*core, parts["future"]], [*extra, *wide]
    ax.set_ylim(value_limits(core, extra))


def _legend_above(ax: Axes) -> None:
    """One row above the panel; the two bands of the forecast share an entry."""
    from matplotlib.legend_handler import HandlerTuple

    by_label = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    order = ("data", "smoothed signal", "its 90 % interval", "missing")
    entries: dict[str, Any] = {label: by_label[label] for label in order if label in by_label}
    if "and 50 %" in by_label:
        entries["forecast, 90 and 50 %"] = (by_label["forecast, 90"], by_label["and 50 %"])
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.005, 1.0), "ncols": 5, "handlelength": 1.7}
    pairs = {tuple: HandlerTuple(ndivide=None, pad=0.0)}
    ax.legend(entries.values(), entries.keys(), handler_map=pairs, **place, **LEGEND)


# Posteriors, method by method


def plot_posteriors(trees: Mapping[str, Any], parameters: Sequence[str] | None = None) -> Figure:
    """Marginal posteriors of the parameters, the methods laid over each other.

    Below every density, a bar per method: the dot is the mean, the bar holds the central 90 %. The first method is the
    reference: its density is filled, and it sets the range that is shown.

    Args:
        trees: DataTree by method name, each with the group `posterior`; variables with the dimension `time` (state
            paths) are left out.
        parameters: names to draw, `"phi"` for all entries of a vector or `"phi[0]"` for one; all when None. At most
            twelve are drawn.

    Returns:
        The figure, three parameters in a row.

    Raises:
        ValueError: none of `trees` has one of `parameters`.

    Example:
        >>> import numpy as np, xarray as xr
        >>> draws = xr.Dataset({"s": (("chain", "draw"), np.random.default_rng(0).gamma(2.0, size=(2, 200)))})
        >>> len(plot_posteriors({"nuts": xr.DataTree.from_dict({"posterior": draws})}).axes)
        1
    """
    from arviz_stats.base.array import array_stats

    draws = {method: scalar_draws(tree) for method, tree in trees.items()}
    found = list(dict.fromkeys(name for by_name in draws.values() for name in by_name))
    if parameters is not None:
        wanted = {str(p) for p in parameters}
        found = [name for name in found if name in wanted or name.split("[")[0] in wanted]
    if not found:
        raise ValueError(
            f"`parameters` must name scalars of the group `posterior`; got {parameters!r}, which none of "
            f"{list(trees)} has. Leave it out to draw all."
        )
    shown = found[:_MAX_PARAMETERS]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure([2.5] * rows, "")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for ax, name in zip(axes, shown, strict=False):
        having = {m: by_name[name] for m, by_name in draws.items() if name in by_name and by_name[name].size}
        heights = []
        for k, (method, values) in enumerate(having.items()):
            color, line = method_style(list(draws).index(method))
            if values.size < 20 or np.ptp(values) <= 1e-12 * np.abs(values).max():
                curve = ax.axvline(values.mean(), color=color, ls=line, lw=1.8)
            else:
                room = 0.12 * np.ptp(values)
                floor = 0.0 if values.min() > 0 else -np.inf  # a scale parameter has no density below zero
                limits = (max(values.min() - room, floor), values.max() + room)
                edge = limits[0] == 0.0
                grid, density, _ = array_stats.kde(values, custom_lims=limits, bound_correction=edge)
                (curve,) = ax.plot(grid, density, color=color, ls=line, lw=2.0 if k == 0 else 1.8, zorder=4 - k * 0.01)
                heights.append(density.max())
                if k == 0:
                    ax.fill_between(grid, density, color=color, alpha=0.16, lw=0)
            handles.setdefault(method, curve)
        top = min(max(heights), 3.5 * heights[0]) if heights else 1.0
        for k, (method, values) in enumerate(having.items()):
            color, level = method_style(list(draws).index(method))[0], -top * (0.09 * k + 0.07)
            ax.plot(np.quantile(values, [0.05, 0.95]), [level, level], color=color, lw=2.4, solid_capstyle="butt")
            ax.plot(values.mean(), level, "o", color=color, ms=4.6, mec="white", mew=0.8, zorder=5)
        ax.set_ylim(-top * (0.09 * len(having) + 0.05), 1.06 * top)
        if having:
            ax.set_xlim(shared_range(list(having.values())))
        ax.axhline(0.0, color=GREY, lw=0.8)
        ax.set_title(shown_text(name, 30), loc="left", fontsize=11.5, color=INK)
        tidy(ax, False, grid=False)
        ax.spines["left"].set_visible(False)
        ax.set_yticks([])
        ax.locator_params(axis="x", nbins=4)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    labels = [shown_text(m) for m in handles]
    figure.legend(
        handles.values(), labels, loc="outside upper left", ncols=min(len(labels), 5), handlelength=3.2, **LEGEND
    )
    if len(found) > len(shown):
        figure.supxlabel(f"{len(shown)} of {len(found)} parameters shown", fontsize=10, color=GREY, x=0.01, ha="left")
    return figure


# How good an approximation is


def plot_khat(khats: Mapping[str, Any]) -> Figure:
    r"""PSIS k-hat by method, against the thresholds that say whether importance weights can be relied on.

    Below 0.5 the approximation is good; up to 0.7 importance weights correct it; above, they do not, and the
    approximation is too far from the target.

    Args:
        khats: by method, one k-hat (a bar) or several, such as one per time step (a cloud with its largest marked).

    Returns:
        The figure.

    Example:
        >>> len(plot_khat({"svi:normal": 0.83, "svi:mvn": [0.1, 0.4, 0.3]}).axes)
        1

    Source:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling, JMLR 25, section 3.2.4.
    """
    good, limit = 0.5, 0.7
    values = {method: np.atleast_1d(np.asarray(k, dtype=float)).ravel() for method, k in khats.items()}
    finite = np.concatenate([v[np.isfinite(v)] for v in values.values()] or [np.zeros(0)])
    right = float(np.clip(1.15 * finite.max(initial=0.0) + 0.03, 1.1, 2.0))
    left = float(np.clip(finite.min(initial=0.0) - 0.05, -0.6, 0.0))
    figure = new_figure([0.95 + 0.55 * max(len(values), 1)], "")
    ax = figure.subplots()
    zones = (
        (left, good, GOOD, "good"),
        (good, limit, "#E69F00", "usable"),
        (limit, right, FORECAST, "not reliable"),
    )
    for start, stop, color, label in zones:
        ax.axvspan(start, stop, color=color, alpha=0.13, lw=0)
        ax.text((start + stop) / 2, 1.02, label, transform=ax.get_xaxis_transform(), **CENTER)
    for threshold in (good, limit):
        ax.axvline(threshold, color=GREY, lw=1.1, ls="--")
    for row, k in enumerate(values.values()):
        known = np.clip(k[np.isfinite(k)], left, right)
        worst = np.nan if not k.size or np.isnan(k).all() else float(np.nanmax(k))
        if known.size > 1:
            shift = np.linspace(-0.18, 0.18, 7)[np.arange(known.size) % 7]
            ax.plot(known, row + shift, "o", ms=3.6, color=SIGNAL, alpha=0.5, mew=0)
        if np.isnan(worst):
            ax.text(max(left, 0.0) + 0.01, row, "not available", va="center", fontsize=10.5, color=GREY)
            continue
        end = min(worst, right)
        if k.size == 1:
            ax.plot([0.0, end], [row, row], color=SIGNAL, lw=3.0, solid_capstyle="butt")
        ax.plot(end, row, ">" if worst > right else "D", ms=8, color=SIGNAL, mec="white", mew=0.8, clip_on=False)
        side = -1 if end > left + 0.93 * (right - left) else 1
        word = "" if k.size == 1 else "largest "
        note = ax.annotate(
            f"{word}{worst:.2f}", (end, row), (side * 9, 0), textcoords="offset points", va="center", fontsize=11
        )
        note.set(ha="left" if side > 0 else "right", color=INK, zorder=6)
        note.set_bbox({"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 1.2})
    ax.set_yticks(range(len(values)), [shown_text(m, 28) for m in values])
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.set_xlim(left, right)
    ax.set_xlabel("PSIS k-hat (smaller is better)", fontsize=11)
    tidy(ax, False, grid=False)
    return figure


def plot_losses(losses: Mapping[str, Any]) -> Figure:
    """SVI losses (negative ELBO) along the optimisation: median with the middle 80 %, in blocks of steps.

    The axis is logarithmic where the first losses are much larger than the last; a second panel shows the last half.
    Losses that are not finite are left out and counted in the legend.

    Args:
        losses: by method, the loss at every step.

    Returns:
        The figure.

    Example:
        >>> import numpy as np
        >>> len(plot_losses({"svi:normal": 640.0 + 9e3 * np.exp(-np.arange(900) / 40)}).axes)
        2
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    series = {method: np.asarray(loss, dtype=float).ravel() for method, loss in losses.items()}
    finite = np.concatenate([v[np.isfinite(v)] for v in series.values()] or [np.zeros(0)])
    ends = [v[len(v) // 2 :] for v in series.values()]
    end = np.concatenate([e[np.isfinite(e)] for e in ends] or [np.zeros(0)])
    spread = np.subtract(*np.quantile(end, [0.98, 0.02])) if end.size else 0.0
    dwarfed = bool(finite.size and np.ptp(finite) > 8 * max(spread, 1e-12))
    figure = new_figure([3.4], "")
    axes = figure.subplots(1, 2 if dwarfed else 1, squeeze=False, width_ratios=[3, 2] if dwarfed else [1])[0]
    for k, (method, loss) in enumerate(series.items()):
        color, line = method_style(k)
        bad = int((~np.isfinite(loss)).sum())
        label = shown_text(method) + (f" ({bad:,} steps not finite)" if bad else "")
        for ax, start in zip(axes, (0, len(loss) // 2), strict=False):
            step, low, median, high = blocks(loss, start)
            ax.fill_between(step, low, high, color=color, alpha=0.2, lw=0)
            ax.plot(step, median, color=color, ls=line, lw=1.9, label=label)
    if dwarfed:
        if finite.min() > 0 and finite.max() > 8 * finite.min():
            axes[0].set_yscale("log")
            axes[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes[0].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.4g}" if v < 1e4 else f"{v:,.0f}"))
            axes[0].yaxis.set_minor_formatter(NullFormatter())
        elif finite.min() <= 0 and np.abs(finite).max() > 50 * max(spread, 1e-12):
            axes[0].set_yscale("asinh", linear_width=max(float(np.abs(end).max(initial=0.0)), spread) / 5 or 1.0)
            axes[0].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if abs(v) >= 10 else f"{v:g}"))
        axes[1].set_title("the last half", loc="left", fontsize=10.5, color=GREY)
        axes[1].set_ylim(value_limits([np.quantile(end, [0.01, 0.97])], []))
    for ax in axes:
        ax.set_xlabel("step", fontsize=11)
        tidy(ax, False)
        ax.locator_params(axis="x", nbins=5)
        if ax.get_yscale() == "linear":
            ax.ticklabel_format(axis="y", useOffset=False)
    axes[0].set_ylabel("loss (negative ELBO, nats)", fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=3, handlelength=3.2, **LEGEND)
    return figure
