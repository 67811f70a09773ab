"""Small real data shipped as files, series and sets of sequences, and a reader for a user's own CSV file."""

from pssm.datasets.load import Series, available, load, read_csv
from pssm.datasets.sequences import Sequences, available_sequences, load_sequences

__all__ = ["Sequences", "Series", "available", "available_sequences", "load", "load_sequences", "read_csv"]
