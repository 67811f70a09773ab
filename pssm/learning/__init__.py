"""Learning the parameters of linear dynamical systems."""

from pssm.learning.em import EMResult, LikelihoodFellError, fit_em

__all__ = ["EMResult", "LikelihoodFellError", "fit_em"]
