"""The common parts of the figures: colours and layout, labels, axes and their limits, and arrays taken from a fit."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # matplotlib is imported when a figure is drawn
    Axes = Figure = Any

INK, GREY, _GRID = "#222222", "#767676", "#e3e3e3"
SIGNAL, FORECAST, GOOD = "#0072B2", "#D55E00", "#009E73"
_METHOD_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_METHOD_LINES = ("-", "--", "-.", ":", (0, (7, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
Z50, Z90 = 0.6744897501960817, 1.6448536269514722
_WIDTH = 9.0
_MAX_STATES = 4
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 10.5, "columnspacing": 1.4, "borderaxespad": 0.2}
CENTER: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 10.5, "color": GREY}


def new_figure(heights: Sequence[float], title: str) -> Figure:
    """An empty figure for panels of these heights (inches)."""
    from matplotlib.figure import Figure

    height = min(sum(heights) + 0.5 + (0.3 if title else 0.0), 26.0)
    figure = Figure(figsize=(_WIDTH, height), dpi=100, layout="constrained", facecolor="white")
    if title:
        figure.suptitle(shown_text(title, 90), x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure


def tidy(ax: Axes, dates: bool, *, grid: bool = True) -> None:
    """The look of one panel."""
    ax.set_facecolor("white")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(labelsize=10.5, color=GREY, labelcolor=INK)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(axis="y", color=_GRID, lw=0.8)
    if dates:
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

        locator = AutoDateLocator(minticks=4, maxticks=9)
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def method_style(k: int) -> tuple[str, Any]:
    """Colour and line of the method number `k`."""
    return _METHOD_COLORS[k % len(_METHOD_COLORS)], _METHOD_LINES[k % len(_METHOD_LINES)]


def shown_text(value: object, limit: int = 40) -> str:
    """A label as matplotlib shows it literally: no mathtext, no control characters, not too long, not hidden."""
    text = "".join(c if c.isprintable() else " " for c in str(value)).strip()
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def group(tree: Any, name: str) -> Any:
    """The group as a Dataset, or None."""
    return tree[name].to_dataset() if tree is not None and name in tree.children else None


def matrix(variable: Any) -> np.ndarray:
    """Values as (time, series)."""
    values = np.asarray(variable.values, dtype=float)
    return values[:, None] if values.ndim == 1 else values


def positions(time: np.ndarray, n: int, horizon: Any, h: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Axis positions of the labels in `time` and `horizon`, and whether they are dates.

    Labels that cannot be placed on an axis (words, or out of order) are numbered. A horizon that does not continue the
    time labels (1, 2, ... after dates) is placed after them, a typical step apart.
    """
    x, dates = _numbers(time)
    if x is None or len(x) != n:
        x, dates, horizon = np.arange(n, dtype=float), False, None
    step = float(np.median(np.diff(x))) if n > 1 else 1.0
    future, future_dates = _numbers(horizon) if horizon is not None else (None, False)
    if future is None or future_dates != dates or len(future) != h or (h and future[0] <= x[-1]):
        future = x[-1] + step * np.arange(1, h + 1)
    return x, future, dates


def _numbers(labels: Any) -> tuple[np.ndarray | None, bool]:
    labels = np.asarray(labels)
    dates = labels.dtype.kind == "M"
    if dates:
        from matplotlib.dates import date2num

        values = np.asarray(date2num(labels), dtype=float)
    elif labels.dtype.kind in "iuf":
        values = labels.astype(float)
    else:
        return None, False
    return (values, dates) if np.isfinite(values).all() and (np.diff(values) > 0).all() else (None, False)


def runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and stop of every stretch of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def value_limits(core: Sequence[np.ndarray], extra: Sequence[np.ndarray]) -> tuple[float, float]:
    """Limits that hold `core`, and `extra` as far as it does not squeeze `core` to less than a quarter of the axis."""
    inner = np.concatenate([np.asarray(c, dtype=float).ravel() for c in core])
    inner = inner[np.isfinite(inner)]
    low, high = (inner.min(), inner.max()) if inner.size else (0.0, 1.0)
    room = 1.5 * ((high - low) or abs(high) or 1.0)
    outer = np.concatenate([inner, *(np.asarray(e, dtype=float).ravel() for e in extra)])
    outer = np.clip(outer[np.isfinite(outer)], low - room, high + room)
    low, high = (min(low, outer.min()), max(high, outer.max())) if outer.size else (low, high)
    pad = 0.06 * ((high - low) or abs(high) or 1.0)
    return float(low - pad), float(high + pad)


def limit_x(ax: Axes, start: float, stop: float) -> None:
    """Sets the time axis, with a little room on both sides."""
    pad = 0.012 * ((stop - start) or 1.0)
    ax.set_xlim(start - pad, stop + pad)


# The parts of a figure


def scalar_draws(tree: Any) -> dict[str, np.ndarray]:
    """The finite draws of every scalar of the group `posterior`, by name: `s`, `phi[0]`, ..."""
    posterior = group(tree, "posterior")
    if posterior is None:
        return {}
    result = {}
    for name, variable in posterior.data_vars.items():
        inner = [d for d in variable.dims if d not in ("chain", "draw", "sample")]
        if {"time", "horizon"} & set(inner) or variable.dtype.kind not in "fiub":
            continue
        outer = [d for d in variable.dims if d not in inner]
        shape = [variable.sizes[d] for d in inner]
        values = variable.transpose(*inner, *outer).values.astype(float).reshape(*shape, -1)
        for index in np.ndindex(*shape):
            labels = [posterior[d].values[i] if d in posterior.coords else i for d, i in zip(inner, index, strict=True)]
            entry = f"{name}[{', '.join(str(v) for v in labels)}]" if inner else str(name)
            result[entry] = values[index][np.isfinite(values[index])]
    return result


def shared_range(draws: list[np.ndarray]) -> tuple[float, float]:
    """A range that shows every method, but does not let a wild one squeeze the reference to a line."""
    low, high = np.quantile(draws[0], [0.002, 0.998])
    width = max(high - low, 1e-9 * max(abs(high), 1e-300), np.finfo(float).tiny)
    lows, highs = zip(*(np.quantile(d, [0.005, 0.995]) for d in draws), strict=True)
    left, right = min(low, max(min(lows), low - 1.2 * width)), max(high, min(max(highs), high + 1.2 * width))
    return left - 0.04 * (right - left) - 1e-3 * width, right + 0.04 * (right - left) + 1e-3 * width


def blocks(loss: np.ndarray, start: int, num_blocks: int = 70) -> tuple[np.ndarray, ...]:
    """Middle step, 10 % quantile, median and 90 % quantile of `loss[start:]` in blocks; blocks of NaN are left out."""
    width = max(1, -(-(len(loss) - start) // num_blocks))
    rows = []
    for first in range(start, len(loss), width):
        block = loss[first : first + width]
        block = block[np.isfinite(block)]
        if block.size:
            rows.append((first + (width - 1) / 2, *np.quantile(block, [0.1, 0.5, 0.9])))
    columns = np.array(rows).reshape(-1, 4).T
    return columns[0], columns[1], columns[2], columns[3]


PAST = ("y", "mean", "sd")  # parts that run along the time of the data


def series_parts(y: np.ndarray, smoothed: Any, future: Any, j: int) -> dict[str, np.ndarray]:
    """The parts of the figure of series `j`: data, signal, forecast."""
    parts = {"y": y[:, j]}
    if smoothed is not None and "signal_mean" in smoothed:
        parts["mean"] = matrix(smoothed["signal_mean"])[:, j]
        sd = matrix(smoothed["signal_sd"])[:, j] if "signal_sd" in smoothed else np.zeros_like(parts["mean"])
        parts["sd"] = sd
    if future is not None:
        mean = parts["future"] = matrix(future["mean"])[:, j]
        sd = matrix(future["sd"])[:, j] if "sd" in future else np.zeros_like(mean)
        for name, z in (("q05", -Z90), ("q25", -Z50), ("q75", Z50), ("q95", Z90)):
            parts[name] = matrix(future[name])[:, j] if name in future else mean + z * sd
    return parts


def state_moments(smoothed: Any) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The first states as (name, mean, sd); none when there is one state only, which the signal already shows."""
    if smoothed is None or not {"mean", "sd"} <= set(smoothed) or smoothed["mean"].ndim != 2:
        return []
    mean, sd = matrix(smoothed["mean"]), matrix(smoothed["sd"])
    if mean.shape[1] < 2:
        return []
    names = smoothed["state"].values if "state" in smoothed.coords else np.arange(1, mean.shape[1] + 1)
    labels = [shown_text(n, 18) if isinstance(n, str) else f"state {n}" for n in names]
    return [(labels[k], mean[:, k], sd[:, k]) for k in range(min(mean.shape[1], _MAX_STATES))]
