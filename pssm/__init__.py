"""Probabilistic state-space models: NumPyro building blocks for time series with a hidden state.

Start with a ready model (`pssm.models.local_level`) and NumPyro's own `MCMC(NUTS(model))` or `SVI`; take
`LinearGaussianMarginal` or `StatePath` from `pssm.distributions` into a model of your own; call `kalman_filter`,
`kalman_smoother` and the rest on a `LinearGaussianSSM` directly; run `pssm.compare` to learn which inference to
trust. In every series NaN means missing; time is the axis before the last; covariances enter as factors (`chol_Q`).
"""

import importlib

from pssm import datasets as datasets
from pssm import distributions as distributions
from pssm import guides as guides
from pssm import infer as infer
from pssm import models as models
from pssm import nets as nets
from pssm import sde as sde
from pssm._version import __version__ as __version__
from pssm.aggregation import aggregate as aggregate
from pssm.correlated import correlated_noise as correlated_noise
from pssm.distributions import observe as observe
from pssm.filters import DisturbanceResult as DisturbanceResult
from pssm.filters import ParticleResult as ParticleResult
from pssm.filters import conditional_smc as conditional_smc
from pssm.filters import forecast as forecast
from pssm.filters import gaussian_filter as gaussian_filter
from pssm.filters import gaussian_smoother as gaussian_smoother
from pssm.filters import kalman_filter as kalman_filter
from pssm.filters import kalman_smoother as kalman_smoother
from pssm.filters import log_likelihood as log_likelihood
from pssm.filters import log_likelihoods as log_likelihoods
from pssm.filters import most_likely_states as most_likely_states
from pssm.filters import particle_filter as particle_filter
from pssm.filters import particle_smoother as particle_smoother
from pssm.filters import predict as predict
from pssm.filters import sample_states as sample_states
from pssm.filters import simulate as simulate
from pssm.filters import smooth_disturbances as smooth_disturbances
from pssm.filters import update as update
from pssm.learning import DynamicTexture as DynamicTexture
from pssm.learning import EMResult as EMResult
from pssm.learning import fit_em as fit_em
from pssm.nonlinear import NonlinearSSM as NonlinearSSM
from pssm.results import FilterResult as FilterResult
from pssm.results import ForecastResult as ForecastResult
from pssm.results import PredictResult as PredictResult
from pssm.results import SmootherResult as SmootherResult
from pssm.results import UpdateResult as UpdateResult
from pssm.ssm import LinearGaussianSSM as LinearGaussianSSM


def __getattr__(name: str):
    """What brings pandas, xarray or ArviZ with it (seconds to import) is imported when first asked for."""
    if name in ("diagnostics", "plots"):
        return importlib.import_module(f"pssm.{name}")
    if name in ("compare", "Study"):
        from pssm.study import compare as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
