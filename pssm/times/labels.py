"""Labels of time steps as they are given, and as arrays that files hold."""

import datetime as dt
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pssm._types import ArrayLike


class FrameLabels(NamedTuple):
    """What a frame of pandas says of its numbers.

    Attributes:
        time: labels of its rows; None where its index only counts them.
        columns: names of its columns; None where it has none.
        inputs: names of the columns of the inputs `u` that came as a frame beside it; None where there are none.
    """

    time: Any
    columns: tuple[str, ...] | None
    inputs: tuple[str, ...] | None = None


def frame_labels(x: Any) -> FrameLabels | None:
    """The labels of a frame or a series; None for what is neither.

    Raises:
        ValueError: the index has several levels, lacks a label, or does not increase.
    """
    if not isinstance(x, pd.DataFrame | pd.Series):
        return None
    time = None
    if not (isinstance(x.index, pd.RangeIndex) and x.index.start == 0 and x.index.step == 1):
        time = as_labels("the index of `y`", x.index)
        check_increasing("the index of `y`", time)
    return FrameLabels(time, column_names(x))


def column_names(x: Any) -> tuple[str, ...] | None:
    """What a frame or a series calls its columns; None where it has no names, or is neither."""
    if not isinstance(x, pd.DataFrame | pd.Series):
        return None
    names = list(x.columns) if isinstance(x, pd.DataFrame) else [x.name]
    return None if None in names else tuple(str(name) for name in names)


def as_labels(name: str, labels: ArrayLike | Iterable[Any]) -> Any:
    """Labels as a `DatetimeIndex` or `PeriodIndex` of pandas, or an array of numbers or texts.

    Raises:
        ValueError: they have more than one axis or level, a label is missing, or they are neither dates, numbers nor
            texts.
    """
    if isinstance(labels, pd.MultiIndex):
        raise ValueError(
            f"{quoted(name)} must have one label for each step; got an index of {labels.nlevels} levels. Give one of "
            "them, or one series at a time."
        )
    if isinstance(labels, pd.Series | pd.Index):
        found: Any = pd.Index(labels)
    else:
        found = np.asarray(labels if np.ndim(labels) else [labels])
        if found.ndim != 1:
            raise ValueError(
                f"{quoted(name)} must be a list of labels, one for each step or entry; got shape {found.shape}."
            )
        as_type = {"U": str, "S": str}.get(found.dtype.kind, np.float32 if found.dtype == np.float16 else None)
        found = pd.Index(found if as_type is None else found.astype(as_type))  # pandas has no half floats
    if found.dtype == object:
        found = found.infer_objects()
    missing = np.flatnonzero(found.isna())
    if missing.size:
        raise ValueError(f"{quoted(name)} must have a label in every row; that of row {missing[0] + 1} is missing.")
    if found.dtype == object and len(found) and all(isinstance(x, pd.Period) for x in found):
        found = pd.PeriodIndex(found)
    elif found.dtype == object and len(found) and all(isinstance(x, dt.date) for x in found):
        aware = [getattr(x, "tzinfo", None) is not None for x in found]
        if any(aware) and not all(aware):
            raise ValueError(f"{quoted(name)} has dates with and without a time zone. Give all of them one.")
        same = len({str(getattr(x, "tzinfo", None)) for x in found}) == 1
        found = pd.DatetimeIndex(pd.to_datetime(list(found), utc=True if any(aware) and not same else None))
    if isinstance(found, pd.DatetimeIndex | pd.PeriodIndex):
        return found
    if isinstance(found, pd.IntervalIndex) or found.dtype.kind == "c":
        raise ValueError(
            f"{quoted(name)} must be dates, numbers or texts; got {found.dtype}. Give the start of each step."
        )
    if pd.api.types.is_bool_dtype(found.dtype) or pd.api.types.is_numeric_dtype(found.dtype):
        return np.asarray(found.to_numpy(), dtype={"i": np.int64, "u": np.uint64, "b": bool}.get(found.dtype.kind))
    if found.dtype.kind == "m":
        return found.to_numpy()
    return np.array([str(x) for x in found])


def label_array(name: str, labels: ArrayLike | Iterable[Any]) -> np.ndarray:
    """Labels of an axis as an array that a netCDF file can hold: numbers, texts or dates without a time zone.

    A period is the date of its start, a time with a zone is UTC; other labels stay what they are.
    """
    found = as_labels(name, labels)
    if isinstance(found, pd.PeriodIndex):
        found = found.to_timestamp()
    if isinstance(found, pd.DatetimeIndex) and found.tz is not None:
        found = found.tz_convert("UTC").tz_localize(None)
    return np.asarray(found)


def check_same_index(y: Any, name: str, x: Any) -> None:
    """Refuses a frame beside the data whose rows are other steps; what is no frame, or only counts its rows, passes.

    Raises:
        ValueError: the indices differ.
    """
    frames = pd.DataFrame | pd.Series
    if not (isinstance(y, frames) and isinstance(x, frames)) or y.index.equals(x.index):
        return
    if any(isinstance(z.index, pd.RangeIndex) and z.index.start == 0 for z in (y, x)):
        return
    rows = [f"{shown(z.index[0])} to {shown(z.index[-1])}, {len(z)} rows" if len(z) else "no row" for z in (x, y)]
    raise ValueError(
        f"`{name}` and the data have different indices: {rows[0]}, and {rows[1]}. Give `{name}` the rows of the data: "
        f"`{name}.reindex(y.index)`."
    )


def quoted(name: str) -> str:
    """The name of an argument in backticks, or words that have some."""
    return name if "`" in name else f"`{name}`"


def check_increasing(name: str, labels: Any) -> None:
    """Refuses dates and numbers that repeat or go back; words have no order."""
    if not isinstance(labels, pd.Index) and labels.dtype.kind not in "iufM":
        return
    bad = np.flatnonzero(~(np.asarray(labels[1:] > labels[:-1])))
    if bad.size:
        row = int(bad[0]) + 1
        raise ValueError(
            f"{quoted(name)} must increase from step to step; label {row + 1} ({shown(labels[row])}) does not come "
            f"after {shown(labels[row - 1])}. Sort the steps by time (pandas: `frame.sort_index()`), one row for each."
        )


def shown(label: Any) -> str:
    """A label in words, without a time of day where there is none."""
    return str(label).removesuffix(" 00:00:00").removesuffix("T00:00:00").removesuffix("T00:00:00.000000")
