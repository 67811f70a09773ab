"""Frames of pandas that go on behind the data: their rows by the labels of the steps, their columns by name."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pssm._checks import is_pandas, unmasked
from pssm.times.grid import labels_after
from pssm.times.labels import (
    FrameLabels,
    as_labels,
    check_increasing,
    check_same_index,
    label_array,
    quoted,
    shown,
)


def steps_ahead(labels: FrameLabels | None, horizon: int) -> Any:
    """Labels of the steps after the data, by the calendar; None where the data have none, or an uneven time."""
    if labels is None or labels.time is None:
        return None
    try:
        return labels_after(labels.time, horizon)
    except ValueError:
        return None


def rows_beside(y: Any, name: str, x: Any) -> Any:
    """The rows of a frame at the labels of the data, in their order; what is no frame beside a frame is as it is.

    Raises:
        ValueError: a label of the data is not among its own.
    """
    if not (_is_frame(y) and _is_frame(x)) or y.index.equals(x.index):
        return x
    if x.index.is_unique and type(x.index) is type(y.index) and y.index.isin(x.index).all():
        return x.loc[y.index]
    check_same_index(y, name, x)  # which lets rows pass that are only counted
    return x


def inputs_of_steps(name: str, x: Any, steps: Any, num_steps: int, names: Sequence[str] | None, start: int = 0) -> Any:
    """Inputs of some steps, `(num_steps, input)`, from a frame; what is no frame comes back as it is.

    Args:
        name: of the argument, for errors.
        x: a frame with a column for each input, in any order; it may have further columns and further rows.
        steps: labels of the steps; None where they are not known, and the rows are taken as they come.
        num_steps: how many.
        names: of the inputs, where they are known.
        start: number of the first of these steps, as a plain index counts.

    Raises:
        ValueError: an input or a step is not in the frame.
    """
    if not _is_frame(x):
        return x
    frame = _named(name, x, names)
    if names is not None and _has_names(frame):
        absent = [n for n in names if n not in frame.columns]
        if absent:
            raise ValueError(
                f"{quoted(name)} must have the columns {list(names)}, in any order; {absent} "
                f"{'is' if len(absent) == 1 else 'are'} not among {list(frame.columns)}."
            )
        frame = frame[list(names)]
    places = _places(name, frame, steps, start)
    if places is None:
        if len(frame) < num_steps:
            raise ValueError(f"{quoted(name)} must have a row for each of {num_steps} steps; got {len(frame)}.")
        return np.asarray(unmasked(frame.iloc[:num_steps], name), float)
    if (places < 0).any():
        absent = [shown(t) for t in np.asarray(label_array(name, steps))[places < 0]]
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ValueError(
            f"{quoted(name)} must have a row for each of {num_steps} steps, from {shown(steps[0])} to "
            f"{shown(steps[-1])}; {', '.join(absent[:3])}{more} {'is' if len(absent) == 1 else 'are'} not in its index."
        )
    return np.asarray(unmasked(frame.iloc[places], name), float)


def known_of_steps(name: str, x: Any, steps: Any, num_steps: int, names: Sequence[str] | None, start: int = 0) -> Any:
    """Values of some steps that are known, `(num_steps, obs)`, from a frame; NaN where it has no row or column.

    What is no frame comes back as it is. Arguments as in `inputs_of_steps`.

    Raises:
        ValueError: a column is no series, or a row none of the steps.
    """
    if not _is_frame(x):
        return x
    frame = _named(name, x, names)
    values = np.asarray(unmasked(frame, name), float)
    width = frame.shape[1] if names is None else len(names)
    columns = np.arange(frame.shape[1])
    if names is not None and _has_names(frame):
        unknown = [n for n in frame.columns if n not in names]
        if unknown:
            raise ValueError(f"{quoted(name)} has columns {unknown} that are no series; they are {list(names)}.")
        columns = np.array([list(names).index(n) for n in frame.columns], int)
    elif frame.shape[1] != width:
        raise ValueError(f"{quoted(name)} must have {width} columns, or names; got {frame.shape[1]}.")
    places = _places(name, frame, steps, start)
    if places is None:
        rows = np.arange(len(frame))
        if len(rows) > num_steps:
            raise ValueError(f"{quoted(name)} must have at most {num_steps} rows; got {len(rows)}.")
    else:
        found = {int(row): step for step, row in enumerate(places) if row >= 0}
        strange = [row for row in range(len(frame)) if row not in found]
        if strange:
            raise ValueError(
                f"{quoted(name)} has a row for {shown(frame.index[strange[0]])}, which is none of the {num_steps} "
                f"steps from {shown(steps[0])} to {shown(steps[-1])}."
            )
        rows = np.array([found[row] for row in range(len(frame))], int)
    known = np.full((num_steps, width), np.nan)
    known[np.ix_(rows, columns)] = values
    return known


def _is_frame(x: Any) -> bool:
    return is_pandas(x) and isinstance(x, pd.DataFrame | pd.Series)


def _named(name: str, x: Any, names: Sequence[str] | None) -> pd.DataFrame:
    """A frame whose columns are texts; a series without a name is the only column there is."""
    if isinstance(x, pd.Series):
        only = names[0] if names is not None and len(names) == 1 else 0
        x = x.to_frame(only if x.name is None else x.name)
    if not _has_names(x):
        return x
    x = x.set_axis([str(n) for n in x.columns], axis=1)
    if not x.columns.is_unique:
        raise ValueError(f"{quoted(name)} has the column {x.columns[x.columns.duplicated()][0]!r} twice.")
    return x


def _has_names(frame: pd.DataFrame) -> bool:
    return not isinstance(frame.columns, pd.RangeIndex)


def _places(name: str, frame: pd.DataFrame, steps: Any, start: int) -> np.ndarray | None:
    """The row of each step, -1 for none; None where rows are taken as they come."""
    index = frame.index
    if isinstance(index, pd.RangeIndex) and index.step == 1 and index.start in (0, start):
        return None
    have = as_labels(f"the index of {quoted(name)}", index)
    if steps is None:
        check_increasing(f"the index of {quoted(name)}", have)
        return None
    have, wanted = label_array(name, have), label_array(name, steps)
    rows = pd.Index(have)
    if not rows.is_unique:
        raise ValueError(f"{quoted(name)} has two rows for {shown(have[np.flatnonzero(rows.duplicated())[0]])}.")
    if have.dtype.kind in "iuf" and wanted.dtype.kind in "iuf":  # written numbers are rounded
        order = np.argsort(have)
        near = np.min(np.diff(wanted)) / 10 if len(wanted) > 1 else 1e-6 * max(abs(float(wanted[0])), 1.0)
        found = pd.Index(have[order].astype(float)).get_indexer(
            pd.Index(wanted.astype(float)), method="nearest", tolerance=near
        )
        return np.where(found >= 0, order[found], -1)
    return rows.get_indexer(pd.Index(wanted))
