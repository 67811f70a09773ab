"""Figures of a dynamic texture: its components, its spectrum, its errors, and frames side by side.

They look as those of `pssm.plots`, and are likewise not registered with pyplot.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pssm.plot_helpers import FORECAST, GREY, INK, LEGEND, SIGNAL, limit_x, new_figure, shown_text, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:  # matplotlib is imported when a figure is drawn
    Axes = Figure = Any

_COLUMNS, _ROWS = 6, 4
_STILL = 1e-6  # modulus of an eigenvalue below which there is no mode to speak of


def plot_components(components: np.ndarray, shares: np.ndarray, shape: Sequence[int]) -> Figure:
    """Images of the first components; grey ones in purple (below zero) and orange, each on a scale of its own.

    Args:
        components: columns `(pixels, count)`.
        shares: share of the clip's variance of each, `(count,)`.
        shape: of a frame, `(height, width)` or `(height, width, 3)`.
    """
    shown = components[:, : _ROWS * _COLUMNS]
    count, total = shown.shape[1], components.shape[1]
    which = "Components" if count == total else f"The first {count} of {total} components"
    figure, axes = _grid(-(-count // _COLUMNS), _COLUMNS, shape, f"{which}, with their share of the variance", 0.3)
    for ax, column, share, k in zip(axes.ravel(), shown.T, shares, range(count), strict=False):
        image = column.reshape(shape) / max(np.quantile(np.abs(column), 0.995), 1e-300)  # a few pixels are cut
        look = {"vmin": -1.0, "vmax": 1.0, "cmap": "PuOr_r"} if image.ndim == 2 else {}
        ax.imshow(image if image.ndim == 2 else np.clip(0.5 + 0.5 * image, 0.0, 1.0), interpolation="nearest", **look)
        percent = f"{100 * share:.1f}" if share >= 0.001 else "< 0.1"
        ax.set_title(f"{k + 1}: {percent} %", fontsize=10.5, color=INK)
    for ax in axes.ravel()[count:]:
        ax.set_axis_off()
    return figure


def plot_frames(rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Frames side by side.

    Args:
        rows: by name, as many images in bytes as there are titles; all of one shape.
        titles: stand above the columns.
    """
    shape = next(iter(rows.values()))[0].shape
    figure, axes = _grid(len(rows), len(titles), shape, "", 0.1)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(shown_text(name), fontsize=10.5, color=INK)
        for ax, image in zip(row, images, strict=True):
            look = {"vmin": 0, "vmax": 255, "cmap": "gray"} if image.ndim == 2 else {}
            ax.imshow(image, interpolation="nearest", **look)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=10.5, color=GREY)
    return figure


def plot_spectrum(A: np.ndarray, fps: float) -> Figure:
    """Eigenvalues of a transition in the unit circle, and what they mean: frequency and time of decay of each mode.

    Args:
        A: transition `(state, state)`.
        fps: steps a second.
    """
    from matplotlib.ticker import FuncFormatter

    values = np.linalg.eigvals(A)
    size = np.abs(values)
    figure = new_figure([4.0], f"Eigenvalues of the transition; spectral radius {size.max():.4f}")
    circle, modes = figure.subplots(1, 2)
    turn = np.linspace(0.0, 2 * np.pi, 361)
    circle.plot(np.cos(turn), np.sin(turn), color=GREY, lw=1.0)
    circle.axhline(0.0, color=GREY, lw=0.6)
    circle.axvline(0.0, color=GREY, lw=0.6)
    dots: dict[str, Any] = {"ls": "", "marker": "o", "ms": 6, "color": SIGNAL, "mec": "white", "mew": 0.7}
    circle.plot(np.real(values), np.imag(values), **dots)
    reach = 1.06 * max(1.0, size.max())
    circle.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    circle.set_xlabel("real part", fontsize=11)
    circle.set_ylabel("imaginary part", fontsize=11)
    tidy(circle, False, grid=False)

    damped = (size > _STILL) & (size < 1.0)
    frequency = np.abs(np.angle(values[damped])) * fps / (2 * np.pi)
    modes.plot(frequency, -1.0 / (np.log(size[damped]) * fps), **dots, clip_on=False)
    modes.axhline(1.0 / fps, color=GREY, lw=1.0, ls=":")
    modes.annotate("one frame", (fps / 2, 1.0 / fps), (0, 3), textcoords="offset points", ha="right", color=GREY)
    modes.set_yscale("log")
    modes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    modes.set_xlim(0.0, fps / 2)
    modes.set_xlabel("frequency (cycles a second)", fontsize=11)
    modes.set_ylabel("seconds until a mode is down to 1/e", fontsize=11)
    tidy(modes, False)
    return figure


def plot_errors(
    reconstruction: np.ndarray,
    deviation: np.ndarray,
    by_components: np.ndarray,
    extrapolation: Mapping[str, np.ndarray],
) -> Figure:
    """Root mean square errors: of the reconstruction, by frame and by components, and of the forecast by horizon.

    Args:
        reconstruction: by frame, `(time,)`.
        deviation: of the mean frame, `(time,)`.
        by_components: of the whole clip with 0, 1, ... components.
        extrapolation: by horizon, of "texture" and of what it is compared with; empty where nothing was held out.
    """
    heights = [2.3] * (3 if extrapolation else 2)
    figure = new_figure(heights, "")
    axes = figure.subplots(len(heights), 1)
    styles = {
        "texture": (SIGNAL, "-", "texture"),
        "last frame": (FORECAST, "--", "last frame, held"),
        "mean frame": (GREY, "-.", "mean frame"),
    }
    _lines(axes[0], 1, {"texture": reconstruction, "mean frame": deviation}, styles)
    _name(axes[0], "Reconstruction", "frame")
    axes[1].plot(np.arange(len(by_components)), by_components, color=SIGNAL, lw=1.9, marker="o", ms=3.5)
    axes[1].set_ylim(0.0, 1.08 * by_components.max())
    limit_x(axes[1], 0, len(by_components) - 1)
    _name(axes[1], "What is left of the clip by the number of components", "components")
    if extrapolation:
        _lines(axes[2], 1, extrapolation, styles)
        _name(axes[2], f"Forecast of the last {len(extrapolation['texture'])} frames", "frames ahead")
    figure.align_ylabels(axes)
    return figure


def _lines(ax: Axes, first: int, errors: Mapping[str, np.ndarray], styles: Mapping[str, tuple[str, str, str]]) -> None:
    for name, values in errors.items():
        color, line, label = styles[name]
        x = np.arange(first, first + len(values))
        ax.plot(x, values, color=color, ls=line, lw=1.9, label=label, marker="o" if len(x) == 1 else "")
        limit_x(ax, x[0], x[-1])
    ax.set_ylim(0.0, 1.08 * max(values.max() for values in errors.values()))
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=len(errors), handlelength=2.6, **LEGEND)


def _name(ax: Axes, title: str, xlabel: str) -> None:
    ax.set_title(title, loc="left", fontsize=11.5, color=INK)
    ax.set_xlabel(xlabel, fontsize=11)
    ax.set_ylabel("error of a pixel", fontsize=11)
    ax.xaxis.get_major_locator().set_params(integer=True)
    tidy(ax, False)


def _grid(rows: int, columns: int, shape: Sequence[int], title: str, room: float) -> tuple[Figure, np.ndarray]:
    """An empty figure of `rows` x `columns` images, each with `room` inches above it."""
    height = min(max(8.6 / columns * shape[0] / shape[1], 0.8), 4.0)
    figure = new_figure([rows * (height + room)], title)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.ravel():
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    return figure, axes
