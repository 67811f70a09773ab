"""Small real data shipped as files, series and sets of sequences; a reader for a user's file; simulated clips.

Also regressors of the calendar, from `pssm.times.calendar_effects`: holidays, trading days, dates of interventions.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pssm.datasets.clips import Clips, bouncing_ball, pendulum_clips
from pssm.datasets.embedded import available, load
from pssm.datasets.read import read_csv, read_table
from pssm.datasets.sequences import Sequences, available_sequences, load_sequences
from pssm.datasets.series import Series
from pssm.datasets.stacked import StackedSeries, stack_series

if TYPE_CHECKING:
    from pssm.times.calendar_effects import holidays, interventions, trading_days

__all__ = [
    "Clips",
    "Sequences",
    "Series",
    "StackedSeries",
    "available",
    "available_sequences",
    "bouncing_ball",
    "holidays",
    "interventions",
    "load",
    "load_sequences",
    "pendulum_clips",
    "read_csv",
    "read_table",
    "stack_series",
    "trading_days",
]


def __getattr__(name: str) -> Any:
    """The calendar's functions bring pandas with them, and are imported when first asked for."""
    if name in ("holidays", "interventions", "trading_days"):
        return getattr(importlib.import_module("pssm.times.calendar_effects"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
