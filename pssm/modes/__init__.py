"""The mode of a path and what is found there: Laplace's approximation, potentials for guides and particle filters."""

from pssm.modes.guided import guided_proposal
from pssm.modes.laplace import laplace_path
from pssm.modes.path import mode_path, mode_potentials
from pssm.modes.variational import VariationalFit, variational_fit, variational_potentials

__all__ = [
    "VariationalFit",
    "guided_proposal",
    "laplace_path",
    "mode_path",
    "mode_potentials",
    "variational_fit",
    "variational_potentials",
]
