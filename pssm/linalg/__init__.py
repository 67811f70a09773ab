"""Linear algebra of covariance factors and potentials."""

from pssm.linalg.low_rank import Diagonal
from pssm.linalg.potential import Potential
from pssm.linalg.psd_root import factor_from_covariance, factors_from_covariances
from pssm.linalg.square_root import (
    complement,
    orthogonalise,
    orthogonalise_with_care,
    outer,
    solve_lower,
    triangularise,
    unless,
)

__all__ = [
    "Diagonal",
    "Potential",
    "complement",
    "factor_from_covariance",
    "factors_from_covariances",
    "orthogonalise",
    "orthogonalise_with_care",
    "outer",
    "solve_lower",
    "triangularise",
    "unless",
]
