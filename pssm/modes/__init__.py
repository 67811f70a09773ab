"""The mode of a path and what is found there: Laplace's approximation, potentials of guides and particle filters."""

from pssm.modes.guided import guided_proposal
from pssm.modes.laplace import laplace_path

__all__ = ["guided_proposal", "laplace_path"]
