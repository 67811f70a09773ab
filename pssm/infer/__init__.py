"""Fits and what follows from them: NumPyro's own samplers and optimisers, states and forecasts from their draws."""

from pssm.fitting.checkpoint import SavedFitError, load, resume, save
from pssm.fitting.devices import shard
from pssm.fitting.fit import SVIFit, TrainingError, elbo, fit_nuts, fit_svi, posterior_draws
from pssm.fitting.train import WeightedKL
from pssm.infer.causal import causal_draws
from pssm.infer.check import ModelCheck, check_model
from pssm.infer.gibbs import particle_gibbs
from pssm.infer.importance import EvidenceBound, importance_bound, log_weights
from pssm.infer.predict import forecast, one_step_probabilities, sample_states, smoothed_states
from pssm.infer.pseudo_marginal import PseudoMarginal
from pssm.infer.transport import transport_reparam
from pssm.objectives.conditional_kl import TraceConditionalKL_ELBO
from pssm.objectives.constraint import Constrained, constrain

__all__ = [
    "Constrained",
    "EvidenceBound",
    "ModelCheck",
    "PseudoMarginal",
    "SVIFit",
    "SavedFitError",
    "TraceConditionalKL_ELBO",
    "TrainingError",
    "WeightedKL",
    "causal_draws",
    "check_model",
    "constrain",
    "elbo",
    "fit_nuts",
    "fit_svi",
    "forecast",
    "importance_bound",
    "log_weights",
    "one_step_probabilities",
    "particle_gibbs",
    "load",
    "posterior_draws",
    "resume",
    "save",
    "sample_states",
    "shard",
    "smoothed_states",
    "transport_reparam",
]
