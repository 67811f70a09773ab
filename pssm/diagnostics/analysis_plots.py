"""Figures of residuals, backtests and impacts, in the look of `pssm.plots`."""

from typing import TYPE_CHECKING, Any

import numpy as np

from pssm.plot_helpers import GREY, INK, SIGNAL, new_figure, positions, shown_text, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is imported when a figure is drawn
    Figure = Any

MOST_SERIES = 6


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
        over_time.plot(x, values, ".-", color=SIGNAL, lw=0.8, ms=4)
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
        for ax in (quantiles, correlations):
            tidy(ax, False)
        if j == 0:
            for ax, text in zip(
                axes[0], ("standardised residuals", "normal quantiles", "autocorrelation by lag"), strict=True
            ):
                ax.set_title(text, loc="left", fontsize=10.5, color=GREY)
    return figure
