"""Ready NumPyro models. Each is a plain function for plain `MCMC(NUTS(model))` and `SVI(model, guide, ...)`."""

from pssm.models.factor import dynamic_factor
from pssm.models.linear import lds, lds_prior, lds_start, lds_values
from pssm.models.structural import autoregression, local_level, local_linear_trend, seasonal, structural

# The models themselves; `__all__` has their helpers too.
NAMES = ("autoregression", "dynamic_factor", "lds", "local_level", "local_linear_trend", "seasonal", "structural")

__all__ = [
    "autoregression",
    "dynamic_factor",
    "lds",
    "lds_prior",
    "lds_start",
    "lds_values",
    "local_level",
    "local_linear_trend",
    "seasonal",
    "structural",
]
