"""Filters and smoothers: exact for linear-Gaussian models, approximate for others."""

from pssm.filters.ahead import forecast
from pssm.filters.disturbances import DisturbanceResult, smooth_disturbances
from pssm.filters.gaussian import gaussian_filter, gaussian_smoother
from pssm.filters.kalman import kalman_filter, log_likelihoods, simulate
from pssm.filters.particle import particle_filter
from pssm.filters.particle_smoother import conditional_smc, particle_smoother
from pssm.filters.particle_sweep import ParticleResult
from pssm.filters.score import log_likelihood
from pssm.filters.smoother import kalman_smoother, most_likely_states, sample_states
from pssm.filters.step import predict, update

__all__ = [
    "DisturbanceResult",
    "ParticleResult",
    "conditional_smc",
    "forecast",
    "gaussian_filter",
    "gaussian_smoother",
    "kalman_filter",
    "kalman_smoother",
    "log_likelihood",
    "log_likelihoods",
    "most_likely_states",
    "particle_filter",
    "particle_smoother",
    "predict",
    "sample_states",
    "simulate",
    "smooth_disturbances",
    "update",
]
