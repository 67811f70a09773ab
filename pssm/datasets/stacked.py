"""Many series as one array, NaN where a series has no value: from a list, or from a table with a row for each value."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pssm._checks import check_choice, is_pandas

if TYPE_CHECKING:
    import pandas as pd

ALIGN = ("time", "start", "end")


class StackedSeries(NamedTuple):
    """Series of unequal length side by side.

    Attributes:
        y: `(series, time)`, NaN where a series has no value.
        names: of the series.
        time: labels of the steps; the numbers of the steps where series are aligned by their start or end.
        u: regressors `(series, time, input)`, or None.
    """

    y: np.ndarray
    names: tuple[str, ...]
    time: Any
    u: np.ndarray | None = None


def stack_series(
    data: Any,
    *,
    series: str = "series",
    time: str = "time",
    value: str = "y",
    inputs: Sequence[str] = (),
    align: str | None = None,
) -> StackedSeries:
    """Many series as one array `(series, time)`, for `pssm.models.panel`.

    Args:
        data: a list of one-dimensional arrays, a dict of them by name, or a frame of pandas with one row for each
            value: columns `series`, `time` and `value`.
        series: column with the name of the series; they stand in the order of their first rows.
        time: column with the time: dates, periods or numbers, evenly spaced over all series together. Steps that no
            series has a row for are there, and missing.
        value: column with the values.
        inputs: columns of regressors. A step without a row has those of the nearest row of its series.
        align: "time", one calendar (the default for a frame); "start" (the default for a list), each series from its
            own first step on; or "end", each up to its last.

    Returns:
        A `StackedSeries`.

    Raises:
        ValueError: a column is absent, a series has two rows of one time, or times are uneven.

    Example:
        >>> import pandas as pd
        >>> frame = pd.DataFrame({"series": ["a", "a", "b"], "time": [2001, 2002, 2002], "y": [1.0, 2.0, 5.0]})
        >>> stacked = stack_series(frame)
        >>> stacked.y.tolist(), stacked.names, stacked.time.tolist()
        ([[1.0, 2.0], [nan, 5.0]], ('a', 'b'), [2001, 2002])
        >>> stack_series([[1.0, 2.0, 3.0], [4.0]]).y.tolist()
        [[1.0, 2.0, 3.0], [4.0, nan, nan]]
    """
    framed = is_pandas(data) and hasattr(data, "columns")
    align = ("time" if framed else "start") if align is None else align
    check_choice("align", align, ALIGN)
    if not framed:
        if align == "time":
            raise ValueError('`align="time"` needs the times: give a frame with a row for each value.')
        if inputs:
            raise ValueError("`inputs` are columns of a frame with a row for each value; got a list of series.")
        named = data if isinstance(data, Mapping) else dict(enumerate(data))
        rows = [np.asarray(x, float).reshape(-1) for x in named.values()]
        if not rows:
            raise ValueError("`data` has no series.")
        y = np.full((len(rows), max(1, *(len(x) for x in rows))), np.nan)
        for i, x in enumerate(rows):
            y[i, : len(x)] = x
        y = y if align == "start" else _rolled(y, np.array([y.shape[1] - len(x) for x in rows]))
        return StackedSeries(y, tuple(str(name) for name in named), np.arange(y.shape[1]))
    for argument, column in (("series", series), ("time", time), ("value", value), *(("inputs", c) for c in inputs)):
        if column not in data.columns:
            raise ValueError(
                f"`{argument}`: no column {column!r}; the columns are {', '.join(map(str, data.columns))}."
            )
    if (twice := data.duplicated([series, time])).any():
        row = data[twice].iloc[0]
        raise ValueError(f"`data` has two rows of series {row[series]!r} at {row[time]}; sum or drop one of them.")
    absent = data[series].isna() | data[time].isna()
    if absent.any():
        raise ValueError(f"`data` has no series or no time in row {int(np.flatnonzero(absent)[0])}.")
    steps = _steps(data.set_index(time).index.unique(), time)
    names = data[series].unique()

    def wide(column: str) -> "pd.DataFrame":
        table = data.pivot(index=series, columns=time, values=column)
        return table.reindex(index=names, columns=steps).astype(float)

    y = wide(value).to_numpy()
    own = {c: wide(c).ffill(axis=1).bfill(axis=1).to_numpy() for c in inputs}
    u = np.stack(list(own.values()), axis=-1) if own else None
    if align != "time":
        there = ~np.isnan(y)
        first, last = there.argmax(1), there.shape[1] - 1 - there[:, ::-1].argmax(1)
        shift = -first if align == "start" else y.shape[1] - 1 - last
        y = _rolled(y, shift)
        u = None if u is None else np.stack([_rolled(x, shift) for x in np.moveaxis(u, -1, 0)], axis=-1)
        return StackedSeries(y, tuple(map(str, names)), np.arange(y.shape[1]), u)
    return StackedSeries(y, tuple(map(str, names)), steps, u)


def _rolled(rows: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Each row moved to the right by its own number of steps, its end coming in again at the front."""
    return np.stack([np.roll(row, k) for row, k in zip(rows, shift, strict=True)])


def _steps(times: "pd.Index", name: str) -> "pd.Index":
    """All steps from the first time to the last, absent ones too."""
    import pandas as pd

    from pssm.times.grid import grid_of

    times = times.sort_values()
    if len(times) < 2:
        return times
    grid = grid_of(times if isinstance(times, pd.DatetimeIndex | pd.PeriodIndex) else times.to_numpy())
    if grid is None:
        raise ValueError(
            f"`time`: column {name!r} is not evenly spaced over all series together, or its labels are words. Make "
            "dates of them (`pandas.to_datetime`), or give series without times as a list."
        )
    if not grid.absent:
        return times
    if isinstance(times, pd.PeriodIndex):
        return pd.period_range(times[0], times[-1], freq=times.freq)
    if isinstance(times, pd.DatetimeIndex):
        return pd.date_range(times[0], times[-1], freq=grid.step)
    count = int(round((times[-1] - times[0]) / grid.step)) + 1
    return pd.Index(times[0] + grid.step * np.arange(count)).astype(times.dtype)
