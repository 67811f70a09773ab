"""Ready NumPyro models. Each is a plain function for plain `MCMC(NUTS(model))` and `SVI(model, guide, ...)`."""

from pssm.models.autoencoders import extended_kalman_vae, kalman_vae
from pssm.models.deep import deep_markov, neural_ssm
from pssm.models.dynamics import lorenz63_system, pendulum_system, ring_attractor_system, van_der_pol_system
from pssm.models.factor import dynamic_factor
from pssm.models.linear import lds, lds_prior, lds_start, lds_values
from pssm.models.multivariate import multivariate_structural
from pssm.models.nonlinear import (
    lorenz63,
    pendulum,
    poisson_lds,
    ring_attractor,
    stochastic_volatility,
    van_der_pol,
)
from pssm.models.panels import panel
from pssm.models.structural import autoregression, local_level, local_linear_trend, seasonal, structural

# The models themselves; `__all__` has their helpers too.
NAMES = (
    "autoregression",
    "deep_markov",
    "dynamic_factor",
    "extended_kalman_vae",
    "kalman_vae",
    "lds",
    "local_level",
    "local_linear_trend",
    "lorenz63",
    "multivariate_structural",
    "neural_ssm",
    "panel",
    "pendulum",
    "poisson_lds",
    "ring_attractor",
    "seasonal",
    "stochastic_volatility",
    "structural",
    "van_der_pol",
)

__all__ = [
    "autoregression",
    "deep_markov",
    "dynamic_factor",
    "extended_kalman_vae",
    "kalman_vae",
    "lds",
    "lds_prior",
    "lds_start",
    "lds_values",
    "local_level",
    "local_linear_trend",
    "lorenz63",
    "lorenz63_system",
    "multivariate_structural",
    "neural_ssm",
    "panel",
    "pendulum",
    "pendulum_system",
    "poisson_lds",
    "ring_attractor",
    "ring_attractor_system",
    "seasonal",
    "stochastic_volatility",
    "structural",
    "van_der_pol",
    "van_der_pol_system",
]
