"""The mode of a path and what is found there: Laplace's approximation, potentials for guides and particle filters."""

from pssm.modes.guided import guided_proposal
from pssm.modes.laplace import laplace_path
from pssm.modes.mode import mode_path, mode_potentials

__all__ = ["guided_proposal", "laplace_path", "mode_path", "mode_potentials"]
