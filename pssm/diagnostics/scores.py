"""Proper scores of forecasts given as draws, and how often their intervals hold."""

import numpy as np
import xarray as xr

from pssm._checks import unmasked
from pssm._types import ArrayLike
from pssm.times.labels import label_array


def scores(
    draws: ArrayLike,
    y: ArrayLike,
    *,
    levels: tuple[float, ...] = (0.5, 0.9),
    time: ArrayLike | None = None,
) -> xr.Dataset:
    """Scores a forecast, entry by entry; smaller is better for every score.

    Args:
        draws: predictive draws, `(draw, time)` or `(draw, time, obs)`, at least 2.
        y: the observed values, `(time,)` or `(time, obs)`, NaN where missing.
        levels: probabilities of the central intervals that are checked.
        time: labels of the steps; 1, 2, ... by default.

    Returns:
        A dataset over `time` and `obs`, NaN where `y` is; average over the axes that you need, as in
        `scores(draws, y).mean("time")`.

        - `crps`: continuous ranked probability score, `E|X - y| - E|X - X'| / 2`, in units of `y`, unbiased for the
          distribution that the draws come from;
        - `squared_error` of the mean, `absolute_error` of the median;
        - `interval_score` and `inside` (1 or 0) with an axis `level`: width plus `2 / (1 - level)` times the miss;
        - `pit`: the share of draws below `y`, uniform where the forecast is calibrated;
        - `energy` over `time` only: the CRPS of whole vectors of the known entries, with Euclidean distances.

    Raises:
        ValueError: shapes do not fit, fewer than 2 draws, draws that are not finite, or a level outside of (0, 1).

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> found = scores(rng.normal(size=(1000, 50)), rng.normal(size=50))
        >>> bool(0.4 < found.crps.mean() < 0.8), dict(found.inside.sizes)
        (True, {'time': 50, 'obs': 1, 'level': 2})

    Source:
        Gneiting & Raftery 2007; the unbiased form: Ferro 2014.
    """
    x, truth = np.asarray(unmasked(draws), float), np.asarray(unmasked(y), float)
    if truth.ndim == 1 and x.ndim == 2:
        x, truth = x[..., None], truth[:, None]
    if truth.ndim != 2 or x.ndim != 3 or x.shape[1:] != truth.shape:
        raise ValueError(
            f"`draws` must have shape (draw, {', '.join(map(str, np.shape(y)))}), one entry of `y` each; "
            f"got {np.shape(draws)}."
        )
    if len(x) < 2:
        raise ValueError(f"`draws` must hold at least 2 draws; got {len(x)}.")
    if not np.isfinite(x).all():
        raise ValueError("`draws` must be finite; there are NaN or infinite values among them.")
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"`levels` must lie between 0 and 1; got {levels}.")
    labels = np.arange(1, len(truth) + 1) if time is None else label_array("time", time)
    if labels.shape != truth.shape[:1]:
        raise ValueError(f"`time` must have {len(truth)} labels; got shape {labels.shape}.")

    known = ~np.isnan(truth)
    tail = (1 - np.asarray(levels)) / 2
    low, high = (np.moveaxis(np.quantile(x, q, axis=0), 0, -1) for q in (tail, 1 - tail))
    miss = np.maximum(low - truth[..., None], 0) + np.maximum(truth[..., None] - high, 0)
    parts = {
        "crps": np.abs(x - truth).mean(0) - _half_spread(np.sort(x, axis=0)),
        "squared_error": (x.mean(0) - truth) ** 2,
        "absolute_error": np.abs(np.median(x, axis=0) - truth),
        "pit": ((x < truth).mean(0) + (x <= truth).mean(0)) / 2,
    }
    wide = {"interval_score": high - low + miss / tail, "inside": (miss == 0).astype(float)}
    blank = {name: np.where(known, value, np.nan) for name, value in parts.items()}
    blank_wide = {name: np.where(known[..., None], value, np.nan) for name, value in wide.items()}
    return xr.Dataset(
        {name: (("time", "obs"), value) for name, value in blank.items()}
        | {name: (("time", "obs", "level"), value) for name, value in blank_wide.items()}
        | {"energy": ("time", _energy(x, truth, known))},
        coords={"time": labels, "obs": np.arange(truth.shape[1]), "level": np.asarray(levels)},
    )


def _half_spread(x: np.ndarray) -> np.ndarray:
    """`E|X - X'| / 2` from draws in order along the first axis, without the pairs of a draw with itself."""
    count = len(x)
    weights = 2 * np.arange(count) - count + 1
    return np.tensordot(weights, x, axes=1) / (count * (count - 1))


def _energy(x: np.ndarray, y: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The energy score of each step; above 400 draws, pairs of consecutive draws in place of all pairs."""
    found = np.full(len(y), np.nan)
    for t in np.flatnonzero(known.any(1)):
        points = x[:, t, known[t]]
        off = np.linalg.norm(points - y[t, known[t]], axis=1).mean()
        if len(points) <= 400:
            distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
            spread = distances.sum() / (len(points) * (len(points) - 1))
        else:
            spread = np.linalg.norm(np.diff(points, axis=0), axis=1).mean()
        found[t] = off - spread / 2
    return found
