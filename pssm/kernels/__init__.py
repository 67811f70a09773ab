"""Kernels for NumPyro's samplers whose likelihood or path comes from a particle filter."""

from pssm.kernels.gibbs import particle_gibbs
from pssm.kernels.pseudo_marginal import PseudoMarginal

__all__ = ["PseudoMarginal", "particle_gibbs"]
