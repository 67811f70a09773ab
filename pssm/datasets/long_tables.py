"""Tables with a row for each value of each series, made wide by pandas."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pssm.times.grid import grid_of


def wide_of(
    data: pd.DataFrame, series: str, time: str, value: str, inputs: Sequence[str]
) -> tuple[tuple[str, ...], Any, np.ndarray, np.ndarray | None]:
    """Names, steps, values `(series, time)` and regressors `(series, time, input)` of a long table."""
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
    steps = _steps(pd.Index(data[time].unique()), time)
    names = data[series].unique()

    def wide(column: str) -> pd.DataFrame:
        table = data.pivot(index=series, columns=time, values=column)
        return table.reindex(index=names, columns=steps).astype(float)

    y = wide(value).to_numpy()
    own = {c: wide(c).ffill(axis=1).bfill(axis=1).to_numpy() for c in inputs}
    u = np.stack(list(own.values()), axis=-1) if own else None
    return tuple(map(str, names)), steps, y, u


def _steps(times: pd.Index, name: str) -> pd.Index:
    """All steps from the first time to the last, absent ones too."""
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
    places = np.round((times - times[0]) / grid.step).astype(int)
    steps = times[0] + grid.step * np.arange(places[-1] + 1)
    steps[places] = times  # written numbers are rounded (1958.0417)
    return pd.Index(steps).astype(times.dtype)
