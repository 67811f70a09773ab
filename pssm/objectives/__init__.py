"""Objectives of variational inference: what SVI minimises, and what each number is."""

from pssm.objectives.conditional_kl import TraceConditionalKL_ELBO
from pssm.objectives.constraint import Constrained, constrain
from pssm.objectives.sticking_the_landing import StickingTheLanding_ELBO
from pssm.objectives.weighted_kl import WeightedKL

__all__ = ["Constrained", "StickingTheLanding_ELBO", "TraceConditionalKL_ELBO", "WeightedKL", "constrain"]
