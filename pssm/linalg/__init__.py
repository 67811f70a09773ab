"""Linear algebra of covariance factors."""

from pssm.linalg.square_root import factor_from_covariance, orthogonalise, outer, solve_lower, triangularise

__all__ = ["factor_from_covariance", "orthogonalise", "outer", "solve_lower", "triangularise"]
