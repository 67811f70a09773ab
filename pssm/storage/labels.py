"""Labels of time steps as JSON and named arrays, and back: dates, periods, times of a zone, numbers and texts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from pssm.storage.folder import SavedFitError
from pssm.storage.packing import pack, unpack
from pssm.times.labels import FrameLabels, label_array


def pack_labels(labels: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Labels of `as_labels`, or None, as JSON; arrays go into `arrays`."""
    if labels is None:
        return None
    if isinstance(labels, pd.PeriodIndex):
        return {"period": labels.freqstr, "of": pack(np.asarray(labels.asi8), arrays)}
    zone = str(labels.tz) if isinstance(labels, pd.DatetimeIndex) and labels.tz is not None else None
    labels = label_array("time", labels)
    if labels.dtype.kind == "M":
        entry = {"unit": np.datetime_data(labels.dtype)[0], "of": pack(labels.astype(np.int64), arrays)}
        return entry if zone is None else {**entry, "zone": zone}
    if labels.dtype.kind in "biuf":
        return {"of": pack(labels, arrays)}
    return {"texts": [str(x) for x in labels]}


def unpack_labels(entry: Any, arrays: dict[str, np.ndarray]) -> Any:
    """What `pack_labels` was given."""
    if entry is None:
        return None
    if "texts" in entry:
        return np.array([str(x) for x in entry["texts"]])
    values = unpack(entry["of"], arrays)
    if "period" in entry:
        return _of_pandas(lambda: pd.PeriodIndex.from_ordinals(np.asarray(values, np.int64), freq=str(entry["period"])))
    if "unit" not in entry:
        return values
    if entry["unit"] not in ("Y", "M", "W", "D", "h", "m", "s", "ms", "us", "ns"):
        raise SavedFitError("`path`: the time labels have no unit of time.")
    dates = values.astype(f"datetime64[{entry['unit']}]")
    if "zone" not in entry:
        return dates
    return _of_pandas(lambda: pd.DatetimeIndex(dates).tz_localize("UTC").tz_convert(str(entry["zone"])))


def _of_pandas(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (ValueError, KeyError, TypeError) as error:  # a frequency or a zone that there is not
        raise SavedFitError(f"`path`: the time labels cannot be read: {error}") from None


def pack_frame(labels: FrameLabels | None, arrays: dict[str, np.ndarray]) -> Any:
    """The labels of a frame."""
    if labels is None:
        return None
    names = {name: x and list(x) for name, x in (("columns", labels.columns), ("inputs", labels.inputs))}
    return {"time": pack_labels(labels.time, arrays), **names}


def unpack_frame(entry: Any, arrays: dict[str, np.ndarray]) -> FrameLabels | None:
    """What `pack_frame` was given."""
    if not isinstance(entry, dict):
        return None
    names = [tuple(map(str, x)) if (x := entry.get(name)) else None for name in ("columns", "inputs")]
    return FrameLabels(unpack_labels(entry.get("time"), arrays), *names)
