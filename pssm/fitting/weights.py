"""Importance weights of draws: how even they are, equally weighted draws from them, and whether to trust these."""

import jax
import numpy as np

from pssm._types import Key

KHAT_MAX = 0.7  # of the Pareto shape: above it a finite number of weights says too little
LEAST = 0.3  # of the draws must be effective


def pareto_shape(log_weights: np.ndarray) -> float:
    """The shape of the tail of weights, by ArviZ; 0 where that tail is flat, infinite where one is NaN."""
    from arviz_stats.base.array import array_stats  # takes a second

    count = int(np.ceil(min(0.2 * len(log_weights), 3 * np.sqrt(len(log_weights)))))
    tail = np.sort(log_weights)[-count - 1 :]
    if not np.isfinite(tail[-1]):
        return float("inf")
    rounding = 16 * np.finfo(log_weights.dtype).eps * abs(float(tail[-1]))
    if tail[-1] - tail[0] <= max(rounding, 1e-3):
        return 0.0
    kept = log_weights[np.isfinite(log_weights)].astype(np.float64)  # weights of zero have no part in the tail
    return float(array_stats.psislw(-kept)[1])  # takes minus the log ratio


def normalised(log_weights: np.ndarray) -> np.ndarray:
    """Weights that sum to one; all are zero where none is finite."""
    found = np.where(np.isnan(log_weights), -np.inf, np.asarray(log_weights, np.float64))
    top = found.max(initial=-np.inf)
    if not np.isfinite(top):
        return np.zeros(found.shape)
    found = np.exp(found - top)
    return found / found.sum()


def effective(log_weights: np.ndarray) -> float:
    """The effective number of draws, `1 / sum w^2`; 0 where none has a weight."""
    square = float(np.sum(normalised(log_weights) ** 2))
    return 1 / square if square else 0.0


def resampled(key: Key, log_weights: np.ndarray, count: int) -> np.ndarray:
    """Numbers of `count` equally weighted draws, in the order of the draws (systematic resampling)."""
    edges = np.cumsum(normalised(log_weights))
    positions = (np.arange(count) + float(jax.random.uniform(key))) / count * edges[-1]
    return np.minimum(np.searchsorted(edges, positions, side="right"), len(edges) - 1)


def doubts(khat: float, efficiency: float) -> list[str]:
    """Why weights cannot be trusted; none where they can."""
    found = []
    if not khat <= KHAT_MAX:
        found.append(f"k-hat of the weights is {khat:.2f} (over {KHAT_MAX})")
    if not efficiency >= LEAST:
        found.append(f"their effective share is {efficiency:.2f} (under {LEAST})")
    return found
