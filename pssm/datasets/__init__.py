"""Small real data shipped as files, series and sets of sequences; a reader for a user's file; simulated clips."""

from pssm.datasets.clips import Clips, bouncing_ball, pendulum_clips
from pssm.datasets.embedded import available, load
from pssm.datasets.read import read_csv, read_table
from pssm.datasets.sequences import Sequences, available_sequences, load_sequences
from pssm.datasets.series import Series
from pssm.datasets.stacked import StackedSeries, stack_series

__all__ = [
    "Clips",
    "Sequences",
    "Series",
    "StackedSeries",
    "available",
    "available_sequences",
    "bouncing_ball",
    "load",
    "load_sequences",
    "pendulum_clips",
    "read_csv",
    "read_table",
    "stack_series",
]
