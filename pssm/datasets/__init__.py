"""Small real time series shipped as files, and a reader for a user's own CSV file."""

from pssm.datasets.load import Series, available, load, read_csv

__all__ = ["Series", "available", "load", "read_csv"]
