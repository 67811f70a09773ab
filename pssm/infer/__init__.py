"""Fits and what follows from them: NumPyro's own samplers and optimisers, states and forecasts from their draws."""

from pssm.devices import shard
from pssm.fitting.corrected import CorrectedFit
from pssm.fitting.fit import fit_mclmc, fit_nuts, fit_svi
from pssm.fitting.nodes import NodesFit
from pssm.fitting.point import PointFit
from pssm.fitting.results import FitRecord, MCMCFit, SVIFit, TrainingError, elbo, posterior_draws, record_of
from pssm.fitting.saved import load, resume, save
from pssm.guides.transport import transport_reparam
from pssm.infer.causal import causal_draws
from pssm.infer.correct import corrected
from pssm.infer.exact import one_step_probabilities
from pssm.infer.importance import EvidenceBound, importance_bound, log_weights
from pssm.infer.nodes import nodes
from pssm.infer.nowcasts import NowcastDraws, nowcast
from pssm.infer.path_marginal import PathMarginal, PathPosterior, path_marginal
from pssm.infer.points import fit_map, fit_ml
from pssm.infer.predict import forecast, sample_states, smoothed_states
from pssm.inspection.check import ModelCheck, check_model
from pssm.kernels.gibbs import particle_gibbs
from pssm.kernels.pseudo_marginal import PseudoMarginal
from pssm.objectives import Constrained, TraceConditionalKL_ELBO, WeightedKL, constrain
from pssm.storage.folder import SavedFitError

__all__ = [
    "Constrained",
    "CorrectedFit",
    "EvidenceBound",
    "FitRecord",
    "MCMCFit",
    "ModelCheck",
    "NodesFit",
    "NowcastDraws",
    "PathMarginal",
    "PathPosterior",
    "PointFit",
    "PseudoMarginal",
    "SVIFit",
    "SavedFitError",
    "TraceConditionalKL_ELBO",
    "TrainingError",
    "WeightedKL",
    "causal_draws",
    "check_model",
    "constrain",
    "corrected",
    "elbo",
    "fit_map",
    "fit_mclmc",
    "fit_ml",
    "fit_nuts",
    "fit_svi",
    "forecast",
    "importance_bound",
    "log_weights",
    "nodes",
    "nowcast",
    "one_step_probabilities",
    "particle_gibbs",
    "path_marginal",
    "load",
    "posterior_draws",
    "record_of",
    "resume",
    "save",
    "sample_states",
    "shard",
    "smoothed_states",
    "transport_reparam",
]
