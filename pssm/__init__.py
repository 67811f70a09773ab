"""Probabilistic state-space models: NumPyro building blocks for time series with a hidden state."""

from pssm.filters import (
    forecast as forecast,
    kalman_filter as kalman_filter,
    kalman_smoother as kalman_smoother,
    log_likelihood as log_likelihood,
    most_likely_states as most_likely_states,
    sample_states as sample_states,
    simulate as simulate,
)
from pssm.ssm import LinearGaussianSSM as LinearGaussianSSM
from pssm import distributions as distributions
from pssm.distributions import observe as observe
