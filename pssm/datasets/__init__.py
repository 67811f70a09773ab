"""Small real data shipped as files, series and sets of sequences; a reader for a user's CSV file; simulated clips."""

from pssm.datasets.clips import Clips, bouncing_ball, pendulum_clips
from pssm.datasets.load import Series, available, load, read_csv
from pssm.datasets.sequences import Sequences, available_sequences, load_sequences

__all__ = [
    "Clips",
    "Sequences",
    "Series",
    "available",
    "available_sequences",
    "bouncing_ball",
    "load",
    "load_sequences",
    "pendulum_clips",
    "read_csv",
]
