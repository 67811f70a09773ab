"""Ready NumPyro models. Each is a plain function for plain `MCMC(NUTS(model))` and `SVI(model, guide, ...)`."""

from pssm.models.deep import neural_ssm
from pssm.models.dynamics import lorenz63_system, pendulum_system, ring_attractor_system, van_der_pol_system
from pssm.models.factor import dynamic_factor
from pssm.models.linear import lds, lds_prior, lds_start, lds_values
from pssm.models.nonlinear import (
    lorenz63,
    pendulum,
    poisson_lds,
    ring_attractor,
    stochastic_volatility,
    van_der_pol,
)
from pssm.models.structural import autoregression, local_level, local_linear_trend, seasonal, structural

# The models themselves; `__all__` has their helpers too.
NAMES = (
    "autoregression",
    "dynamic_factor",
    "lds",
    "local_level",
    "local_linear_trend",
    "lorenz63",
    "neural_ssm",
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
    "dynamic_factor",
    "lds",
    "lds_prior",
    "lds_start",
    "lds_values",
    "local_level",
    "local_linear_trend",
    "lorenz63",
    "lorenz63_system",
    "neural_ssm",
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
