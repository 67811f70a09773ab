"""Ready NumPyro models. Each is a plain function for plain `MCMC(NUTS(model))` and `SVI(model, guide, ...)`."""

from pssm.models.structural import autoregression, local_level, local_linear_trend, seasonal, structural

__all__ = ["autoregression", "local_level", "local_linear_trend", "seasonal", "structural"]
