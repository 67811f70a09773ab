"""Exact filters and smoothers for linear-Gaussian models."""

from pssm.filters.kalman import forecast, kalman_filter, log_likelihoods, simulate
from pssm.filters.score import log_likelihood
from pssm.filters.smoother import kalman_smoother, most_likely_states, sample_states

__all__ = [
    "forecast",
    "kalman_filter",
    "kalman_smoother",
    "log_likelihood",
    "log_likelihoods",
    "most_likely_states",
    "sample_states",
    "simulate",
]
