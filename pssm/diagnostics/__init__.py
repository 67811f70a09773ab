"""The quality of a fit: labelled results, importance diagnostics, cross-validation."""

from typing import TYPE_CHECKING

from pssm.diagnostics.backtest import Backtest, backtest
from pssm.diagnostics.bound import Evidence, khat, log_evidence
from pssm.diagnostics.calibration import Calibration, simulation_based_calibration
from pssm.diagnostics.decompose import Decomposition, decompose
from pssm.diagnostics.disturbances import Disturbances, disturbances
from pssm.diagnostics.gap import BoundGap, bound_gap
from pssm.diagnostics.impact import Impact, impact
from pssm.diagnostics.news import News, news
from pssm.diagnostics.predictions import Predictions, predictions
from pssm.diagnostics.residuals import Residuals, residuals
from pssm.diagnostics.scores import scores
from pssm.diagnostics.tree import to_datatree
from pssm.diagnostics.tree_files import load_tree, save_tree

if TYPE_CHECKING:
    from pssm.diagnostics.crossval import leave_future_out

__all__ = [
    "Backtest",
    "BoundGap",
    "Calibration",
    "Decomposition",
    "Disturbances",
    "Evidence",
    "Impact",
    "News",
    "Predictions",
    "Residuals",
    "backtest",
    "bound_gap",
    "decompose",
    "disturbances",
    "impact",
    "khat",
    "leave_future_out",
    "load_tree",
    "log_evidence",
    "news",
    "predictions",
    "residuals",
    "save_tree",
    "scores",
    "simulation_based_calibration",
    "to_datatree",
]


def __getattr__(name: str):
    """`leave_future_out` imports ArviZ, which takes seconds: only at its first use."""
    if name == "leave_future_out":
        from pssm.diagnostics.crossval import leave_future_out

        return leave_future_out
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
