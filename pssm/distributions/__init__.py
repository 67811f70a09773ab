"""NumPyro distributions over state paths and over series."""

from pssm.distributions import kl as _registered  # noqa: F401
from pssm.distributions.chain import LowRankChain
from pssm.distributions.conditioned import ConditionedPath
from pssm.distributions.filter_marginal import GaussianFilterMarginal
from pssm.distributions.history import HistoryMarginal
from pssm.distributions.marginal import LinearGaussianMarginal, real_or_missing_matrix
from pssm.distributions.moment_matched import LowRankMomentMatched
from pssm.distributions.non_centred import NonCenteredPath
from pssm.distributions.partly_centred import PartiallyCenteredPath
from pssm.distributions.posterior import ImputedSeries, LinearGaussianPosterior
from pssm.distributions.stable import StableMatrixNormal, StableMatrixTransform, stable_matrix
from pssm.distributions.state_path import StatePath
from pssm.linalg.potential import Potential
from pssm.observed import WithMissing, observe

__all__ = [
    "ConditionedPath",
    "GaussianFilterMarginal",
    "HistoryMarginal",
    "ImputedSeries",
    "LinearGaussianMarginal",
    "LinearGaussianPosterior",
    "LowRankChain",
    "LowRankMomentMatched",
    "NonCenteredPath",
    "PartiallyCenteredPath",
    "Potential",
    "StableMatrixNormal",
    "StableMatrixTransform",
    "StatePath",
    "WithMissing",
    "observe",
    "real_or_missing_matrix",
    "stable_matrix",
]
