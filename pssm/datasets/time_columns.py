"""Columns to labels of time: which column is the time, one made of several, and dates that are written as numbers.

Values decide, not names alone: a column called `T` is a temperature where its numbers do not count the rows.
"""

import re

import numpy as np
import pandas as pd

from pssm.datasets.cells import Table
from pssm.datasets.dates import time_of_day
from pssm.datasets.numbers import is_plain, looks_numeric
from pssm.datasets.time_values import PARTS, as_dates, is_dated, parts_of, read_time, seconds_of_day
from pssm.times.grid import Grid, grid_of
from pssm.times.labels import shown

# Names that mean the time whatever the values are, and names that may: those must count the rows by equal steps.
STRONG = ("time", "date", "datetime", "timestamp", "date_time", "decimal_date", "decimal date", "year", "yr", "period")
WEAK = ("t", "index", "step", "obs", "month", "week", "quarter", "day", "hour", "minute", "second")
_CHAINS = (("quarter",), ("month", "day", "hour", "minute", "second"), ("week",), ("day of year", "hour", "minute"))


def calendar_name(name: str) -> bool:
    """Whether a column's name is that of a time or of a part of it, so that it is no series."""
    plain = re.sub(r"[^a-z]", "", name.lower())
    whole = ("year", "month", "quarter", "week", "day", "hour", "minute", "second")
    return name.lower() in STRONG or plain in whole or plain in PARTS["day of year"][0]


# Which column


def find_time(table: Table, wanted: list[str]) -> list[str]:
    """The columns that make the time, in the order of their size; none where rows are only counted."""
    free = [name for name in table.cells if name not in wanted]
    if len(table.cells) == 1:
        return []
    dated = [name for name in free if is_dated(table, name)]
    if dated:
        first = dated[0]
        if len(dated) > 1:
            first = min(dated, key=lambda n: (_rank(n), not _ordered(table, [n]), dated.index(n)))
        return _with_clock(table, first, [name for name in free if name != first])
    parts = parts_of(table, free)
    if "year" in parts:
        chains = [
            [parts[p] for p in chain[:k]] for chain in _CHAINS for k in range(len(chain), 0, -1)
            if all(p in parts for p in chain[:k])
        ]  # fmt: skip
        options = [[parts["year"], *rest] for rest in chains]
        return next((o for o in options if _ordered(table, o)), (options or [[parts["year"]]])[0])
    named = sorted((n for n in free if n.lower() in STRONG), key=_rank)
    if named:
        return named[:1]
    for name in sorted((n for n in free if n.lower() in WEAK), key=lambda n: WEAK.index(n.lower())):
        if _counts_rows(table, name):
            return [name]
    return []


def _rank(name: str) -> int:
    return STRONG.index(name.lower()) if name.lower() in STRONG else len(STRONG)


def _with_clock(table: Table, date: str, others: list[str]) -> list[str]:
    """A column of dates, with the time of day in columns beside it where the dates alone repeat."""
    if _ordered(table, [date]):
        return [date]
    clocks = [n for n in others if _is_clock(table, n)]
    parts = parts_of(table, others)
    hours = [parts[p] for p in ("hour", "minute", "second") if p in parts]
    options = [[date, clock] for clock in clocks] + [[date, *hours[:k]] for k in range(len(hours), 0, -1)]
    for option in options:
        if _ordered(table, option):
            named = " and ".join(map(repr, option))
            table.notes.append(f"`time`: the time was made of the columns {named}.")
            return option
    return [date]


def _is_clock(table: Table, name: str) -> bool:
    """Whether a column has times of day: 13:00, or 1300 where its name says so."""
    cells = table.cells[name]
    if cells.dtype == object and time_of_day(cells) is not None:
        return True
    named = re.search(r"time|hour|hhmm|clock", name.lower()) is not None
    return named and seconds_of_day(cells) is not None and bool((cells.astype(float) >= 100).any())


def _ordered(table: Table, columns: list[str]) -> bool:
    """Whether columns make times that increase, or decrease, from row to row."""
    try:
        labels = read_time(Table(table.path, table.cells, table.lines), columns)
    except ValueError:
        return False
    return bool((labels[1:] > labels[:-1]).all() or (labels[1:] < labels[:-1]).all())


def _counts_rows(table: Table, name: str) -> bool:
    """Whether a column's numbers count the rows by equal steps."""
    cells = table.cells[name]
    if cells.dtype == object and not (looks_numeric(cells) and all(map(is_plain, cells))):
        return False
    values = np.asarray(cells, float)
    if len(values) < 2 or not np.isfinite(values).all():
        return len(values) < 2
    grid = grid_of(values)
    late = name.lower() == "t" and len(values) >= 5 and bool((np.diff(values) > 0).all())
    return late or (grid is not None and not grid.absent)


def row_numbers(table: Table, name: str) -> bool:
    """Whether a column is called an index and numbers the rows one by one."""
    if name.lower() not in ("t", "index", "step", "obs", "row") or not _counts_rows(table, name):
        return False
    return bool((np.diff(np.asarray(table.cells[name], float)) == 1).all())


# The order of rows


def in_order(table: Table, columns: list[str], time: np.ndarray) -> tuple[Table, np.ndarray, str]:
    """Rows by increasing time: newest first is turned round, with a word on it; any other order is refused."""
    if len(time) > 1 and (time[1:] < time[:-1]).all():
        words = f"`time`: the rows of {str(table.path)!r} go from new to old; they were turned round."
        return table.rows(np.arange(len(time))[::-1]), time[::-1], words
    bad = np.flatnonzero(~(time[1:] > time[:-1]))
    if bad.size:
        row = int(bad[0]) + 1
        what = "repeats the row before" if time[row] == time[row - 1] else f"comes after {shown(time[row - 1])}"
        raise ValueError(
            f"`time` must increase from row to row; {table.where(columns[-1], row)} {what}. "
            + _next_step(table, columns, time, row)
        )
    return table, time, ""


def _next_step(table: Table, columns: list[str], time: np.ndarray, row: int) -> str:
    """What to do about times that repeat or go back: name a second column, the zone, one series, or sort."""
    others = [n for n in table.cells if n not in columns]
    parts = parts_of(table, others)
    clocks = [n for n in others if _is_clock(table, n)]
    finer = [parts[p] for p in ("quarter", "month", "week", "day of year", "day", "hour", "minute") if p in parts]
    both = list(dict.fromkeys([*columns, *finer, *clocks]))
    if len(both) > len(columns):
        flags = " ".join(f"--time {name}" for name in both)
        return f"If several columns make the time, name all of them: `time={tuple(both)}` (`{flags}`)."
    if time.dtype.kind == "M" and abs(time[row] - time[row - 1]) <= np.timedelta64(1, "h"):
        hour = int((time[row] - time[row].astype("datetime64[D]")) / np.timedelta64(1, "h"))
        if hour <= 3 and np.datetime_data(time.dtype)[0] != "D":
            return (
                'If the clock was turned back there, say whose clock it is: `timezone="Europe/Berlin"` '
                "(`--timezone Europe/Berlin`). Else keep one row per time."
            )
    for name in others:
        pair = pd.DataFrame({"time": time, "other": table.cells[name].astype(str)})
        if not pair.duplicated().any() and 1 < pair["other"].nunique() <= len(pair) / 2:
            return (
                f"Column {name!r} tells the rows of one time apart: keep the rows of one of its values, or make a "
                "column of each (pandas: `frame.pivot`)."
            )
    return "Sort the rows by time and keep one row per time."


def clock_hint(time: np.ndarray, grid: Grid | None) -> str:
    """A word on clocks that are put forward, where an hour of the night is absent."""
    if grid is None or not grid.absent or time.dtype.kind != "M" or np.datetime_data(time.dtype)[0] == "D":
        return ""
    before, after = time[grid.gap - 1], time[grid.gap]
    night = (after - after.astype("datetime64[D]")) <= np.timedelta64(3, "h")
    steps = np.diff(time)
    if night and after - before - steps.min() == np.timedelta64(1, "h"):
        return ' If the clock was put forward there, say whose clock it is: `timezone="Europe/Berlin"` (`--timezone`).'
    return ""


def localised(time: np.ndarray, timezone: str | None, columns: list[str], table: Table) -> np.ndarray:
    """Times of a place's clock in UTC; days stay days."""
    if timezone is None or time.dtype.kind != "M" or np.datetime_data(time.dtype)[0] == "D":
        return time
    local = pd.DatetimeIndex(time)
    backwards = len(time) > 1 and time[0] > time[-1]
    try:
        found = (local[::-1] if backwards else local).tz_localize(timezone, ambiguous="infer")
    except (ValueError, KeyError) as error:  # pandas' own words on a zone, or a time, that does not exist
        raise ValueError(
            f"`timezone`: column {columns[-1]!r} of {str(table.path)!r} does not go with {timezone!r}: {error}"
        ) from None
    found = found.tz_convert("UTC").tz_localize(None)
    return as_dates(found[::-1] if backwards else found, table, columns[-1])
