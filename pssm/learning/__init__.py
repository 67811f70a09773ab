"""Learning the parameters of linear dynamical systems."""

from pssm.learning.em import EMResult, LikelihoodFellError, fit_em
from pssm.learning.priors import MatrixNormalInverseWishart, Prior
from pssm.learning.textures import Compression, DynamicTexture
from pssm.learning.video import Clip, MissingExtraError, read_frames, write_frames

__all__ = [
    "Clip",
    "Compression",
    "DynamicTexture",
    "EMResult",
    "LikelihoodFellError",
    "MatrixNormalInverseWishart",
    "MissingExtraError",
    "Prior",
    "fit_em",
    "read_frames",
    "write_frames",
]
