"""Learning the parameters of linear dynamical systems."""

from pssm.learning.em import EMResult, LikelihoodFellError, fit_em
from pssm.learning.priors import MatrixNormalInverseWishart, Prior
from pssm.learning.textures import Compression, DynamicTexture

__all__ = [
    "Compression",
    "DynamicTexture",
    "EMResult",
    "LikelihoodFellError",
    "MatrixNormalInverseWishart",
    "Prior",
    "fit_em",
]
