"""Guides for SVI: the structured low-rank posterior for any model with a state path; Laplace's approximation."""

from pssm.guides.amortized import AmortizedStateSpace
from pssm.guides.auto import AutoStateSpace
from pssm.guides.deep_kalman import DeepKalmanGuide
from pssm.guides.frames import AmortizedFrames
from pssm.guides.paths import PathGuide
from pssm.guides.scan_adapter import AutoScanStateSpace, scan_path
from pssm.modes.guided import guided_proposal
from pssm.modes.laplace import laplace_path

__all__ = [
    "AmortizedFrames",
    "AmortizedStateSpace",
    "AutoScanStateSpace",
    "AutoStateSpace",
    "DeepKalmanGuide",
    "PathGuide",
    "guided_proposal",
    "laplace_path",
    "scan_path",
]
