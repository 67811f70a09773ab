"""Labels of time steps: what they are, the grid that they stand on, and how they go on."""

from pssm.times.grid import Grid, future_labels, grid_of, labels_after, uneven
from pssm.times.labels import FrameLabels, as_labels, check_increasing, frame_labels, label_array, shown

__all__ = [
    "FrameLabels",
    "Grid",
    "as_labels",
    "check_increasing",
    "frame_labels",
    "future_labels",
    "grid_of",
    "label_array",
    "labels_after",
    "shown",
    "uneven",
]
