"""Learning the parameters of linear dynamical systems."""

from pssm.learning.em import EMResult, LikelihoodFellError, fit_em
from pssm.learning.priors import MatrixNormalInverseWishart, Prior
from pssm.learning.readout import Readout, initial_readout
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
    "Readout",
    "fit_em",
    "initial_readout",
    "read_frames",
    "write_frames",
]
