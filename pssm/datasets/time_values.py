"""Columns to labels of time: dates as texts or as numbers, and times that several columns make together."""

import re
from typing import Any

import numpy as np
import pandas as pd

from pssm.datasets.cells import Table
from pssm.datasets.dates import AmbiguousDatesError, iso_week, parse_dates, time_of_day
from pssm.datasets.numbers import Marks, is_plain, looks_numeric, to_numbers
from pssm.times.grid import grid_of
from pssm.times.labels import as_labels

# Names and values of the parts of a date.
PARTS: dict[str, tuple[tuple[str, ...], float, float]] = {
    "year": (("year", "yr", "yyyy", "jahr"), 1000, 2300),
    "quarter": (("quarter", "qtr", "q", "quartal"), 1, 4),
    "month": (("month", "mon", "mm", "mo", "mth", "monat"), 1, 12),
    "week": (("week", "wk", "isoweek", "kw"), 1, 53),
    "day of year": (("doy", "yday", "jday", "dayofyear", "julian", "julianday"), 1, 366),
    "day": (("day", "dd", "dy", "dom", "mday", "dayofmonth", "tag"), 1, 31),
    "hour": (("hour", "hr", "hh", "he", "hourending", "stunde", "time", "hours"), 0, 25),
    "minute": (("minute", "min", "mi", "minutes"), 0, 59),
    "second": (("second", "sec", "ss", "seconds"), 0, 60),
}


def is_dated(table: Table, name: str) -> bool:
    """Whether at least half of the cells are dates; one bad cell is worth an error that names it."""
    cells = table.cells[name]
    if cells.dtype != object:
        if pd.api.types.is_datetime64_any_dtype(cells.dtype):
            return True
        return bool(pd.api.types.is_integer_dtype(cells.dtype) and _compact(cells.astype(str), name) is not None)
    if looks_numeric(cells):
        return _compact(cells, name) is not None or _counts_seconds(cells, name) or _counts_years(cells)
    sample = cells.iloc[np.unique(np.linspace(0, len(cells) - 1, 200).astype(int))]
    try:
        return bool(2 * parse_dates(sample).values.isna().sum() <= len(sample))
    except AmbiguousDatesError:
        return True


def parts_of(table: Table, names: list[str]) -> dict[str, str]:
    """Columns by the part of a date that their names and values say."""
    found: dict[str, str] = {}
    for part, (known, _, _) in PARTS.items():
        for name in names:
            if re.sub(r"[^a-z]", "", name.lower()) in known and name not in found.values():
                if _part_values(table, name, part) is not None:
                    found.setdefault(part, name)
    return found


def _part_values(table: Table, name: str, part: str) -> np.ndarray | None:
    """Whole numbers of a part of a date, also of `Q1`, `M01`, `W05` and names of months; None where it is not one."""
    cells = table.cells[name].astype(str).str.strip().str.removesuffix(".0")
    _, least, most = PARTS[part]
    if part == "month" and not cells.str.contains(r"\d").any():
        months = [pd.to_datetime(cells.str[:3], format="%b", errors="coerce")]
        return None if months[0].isna().any() else months[0].dt.month.to_numpy().astype(float)
    letter = {"quarter": "Qq", "month": "Mm", "week": "Ww"}.get(part, "")
    values = np.asarray(pd.to_numeric(cells.str.lstrip(letter) if letter else cells, errors="coerce"), float)
    good = np.isfinite(values)
    if not good.any() or (values[good] % 1 != 0).any() or 2 * good.sum() < len(good):
        return None
    inside = (values[good] >= least) & (values[good] <= most)
    return values if 2 * inside.sum() >= inside.size else None


def read_time(table: Table, columns: list[str], dayfirst: bool | None = None, marks: Marks | None = None) -> np.ndarray:
    """Labels of the rows from the columns that make the time: dates (datetime64) or numbers.

    Raises:
        ValueError: a cell is neither a number nor a date, or no part of a date.
    """
    if not columns:
        return np.arange(len(table.lines))
    if len(columns) > 1:
        return _combined(table, columns, dayfirst)
    name = columns[0]
    cells = table.cells[name]
    if pd.api.types.is_datetime64_any_dtype(cells.dtype):
        return as_dates(pd.DatetimeIndex(cells), table, name)
    if looks_numeric(cells):
        return _numbers(table, name, marks or Marks())
    try:
        found = parse_dates(cells, dayfirst)
    except AmbiguousDatesError as error:
        raise AmbiguousDatesError(f"`time`: in {table.where(name, 0)}, {error}") from None
    if found.values.isna().any():
        row = int(found.values.isna().argmax())
        seconds = time_of_day(cells)
        if seconds is not None:
            raise ValueError(
                f"`time`: column {name!r} of {str(table.path)!r} has times of day and no date. Name the column of the "
                f'date too: `time=("date", {name!r})` (`--time date --time {name}`).'
            )
        raise ValueError(
            f"`time` must be a number or a date in every row; {table.where(name, row)} is neither. Write dates as "
            "YYYY-MM-DD, or name another column as `time`."
        )
    table.notes += [f"`time`: in column {name!r} of {str(table.path)!r} {note}." for note in found.notes]
    values = found.values
    if found.wall is not None:
        values = _of_offsets(found.values, found.wall, table, name)
    return as_dates(values, table, name)


def _of_offsets(utc: pd.DatetimeIndex, wall: pd.DatetimeIndex, table: Table, name: str) -> pd.DatetimeIndex:
    """Instants in UTC; days (and months) by the clock on the wall, whose offset changes in summer."""
    days = bool((wall == wall.normalize()).all()) and grid_of(as_labels("time", wall)) is not None
    if not (utc == wall).all():
        where = "by the clock on the wall" if days else "in UTC"
        table.notes.append(f"`time`: column {name!r} of {str(table.path)!r} has offsets from UTC; it was read {where}.")
    return wall if days else utc


def as_dates(values: pd.DatetimeIndex, table: Table, name: str) -> np.ndarray:
    """Dates as datetime64: days where no row has a time of day."""
    if values.hasnans:
        raise ValueError(
            f"`time` must have a date in every row; {table.where(name, int(values.isna().argmax()))} has none."
        )
    if values.tz is not None:
        values = values.tz_convert("UTC").tz_localize(None)
    found = values.to_numpy()
    for unit in ("D", "s"):
        coarse = found.astype(f"datetime64[{unit}]")
        if (coarse == found).all():
            return coarse
    return found


def _numbers(table: Table, name: str, marks: Marks) -> np.ndarray:
    """Times that are written as numbers: 20200131, 202001, 1871.01, 1958.0417, seconds since 1970, or just numbers."""
    cells = table.cells[name]
    texts = cells.astype(str).str.strip()
    where = f"`time`: column {name!r} of {str(table.path)!r}"
    compact = _compact(texts.str.removesuffix(".0"), name)
    if compact is not None:
        return as_dates(compact, table, name)
    try:
        values = to_numbers(table, name, marks._replace(missing=()), "time")[0]
    except ValueError:
        if not all(map(is_plain, texts)):
            row = next(k for k, x in enumerate(texts) if not is_plain(x))
            raise ValueError(
                f"`time` must be a finite number in every row; {table.where(name, row)} is not one."
            ) from None
        raise
    if np.isnan(values).any():
        row = int(np.isnan(values).argmax())
        raise ValueError(f"`time` must be a finite number in every row; {table.where(name, row)} is not one.")
    if (values % 1 == 0).all():
        return _epoch(values, table, name) if _is_epoch(values, name) else values.astype(np.int64)
    for read, words in ((_year_and_month, "YYYY.MM"), (_decimal_years, "decimal years")):
        dates = read(values, texts)
        if dates is not None:
            table.notes.append(f"{where} was read as {words}: {texts.iloc[0]} is {dates[0].date()}.")
            return as_dates(dates, table, name)
    return values


def _compact(texts: pd.Series, name: str) -> pd.DatetimeIndex | None:
    """Days 20200131, months 202001 and hours 2020013123; months alone must go by equal steps, or be named so."""
    if texts.str.fullmatch(r"\d{1,2}\.(1[5-9]|2[0-2])\d\d").all():  # 01.2020
        values = pd.DatetimeIndex(pd.to_datetime(texts, format="%m.%Y", errors="coerce"))
        even = values[::-1] if len(values) > 1 and values[0] > values[-1] else values
        return None if values.hasnans or grid_of(as_labels("time", even)) is None else values
    lengths = set(texts.str.len())
    if len(lengths) != 1 or not texts.str.fullmatch(r"\d+").all():
        return None
    form = {8: "%Y%m%d", 6: "%Y%m", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}.get(lengths.pop())
    if form is None:
        return None
    values = pd.DatetimeIndex(pd.to_datetime(texts, format=form, errors="coerce"))
    if values.hasnans or (values.year < 1500).any() or (values.year > 2300).any():
        return None
    if form != "%Y%m%d" and not re.search(r"date|time|month|period|yyyymm|stamp", name.lower()):
        forward = values[::-1] if len(values) > 1 and values[0] > values[-1] else values
        if len(values) < 3 or grid_of(as_labels("time", forward)) is None:
            return None
    return values


def _year_and_month(values: np.ndarray, texts: pd.Series) -> pd.DatetimeIndex | None:
    """1871.01, 1871.02, ..., 1871.1 (October), where the months go by equal steps and the decimal years do not."""
    if not texts.str.fullmatch(r"\d{4}[.,]\d{1,2}").all():
        return None
    months = np.array([int(x[5:].ljust(2, "0")) for x in texts])
    if (months < 1).any() or (months > 12).any() or (months == 12).sum() + (months == 1).sum() == 0:
        return None
    count = np.array([int(x[:4]) for x in texts]) * 12 + months
    return _month_starts(count) if len(count) > 1 and (abs(np.diff(count)) == 1).all() else None


def _decimal_years(values: np.ndarray, texts: pd.Series) -> pd.DatetimeIndex | None:
    """Years with a fraction, by equal steps of a month, a quarter, a week or a day; None for just numbers."""
    step = np.diff(values)
    if len(values) < 3 or (values < 1000).any() or (values > 2300).any() or not ((step > 0).all() or (step < 0).all()):
        return None
    typical = float(np.median(abs(step)))
    for parts in (12, 4):
        if abs(typical * parts - 1) < 0.15:
            count = np.floor(values * parts + 0.02).astype(int)  # 2000.0833 is February 2000
            if (abs(np.diff(count)) >= 1).all() and (abs(np.diff(count)) == 1).mean() > 0.5:
                return _month_starts(count * (12 // parts) + 1)
            return None
    years = np.floor(values).astype(int)
    length = 365 + ((years % 4 == 0) & ((years % 100 != 0) | (years % 400 == 0)))
    days = np.floor((values - years) * length + 0.02 * length / 365)
    first = pd.DatetimeIndex([f"{year:04d}-01-01" for year in years]).as_unit("us")
    dates = first + pd.to_timedelta(days, unit="D")
    forward = dates[::-1] if step[0] < 0 else dates
    grid = grid_of(as_labels("time", forward))
    return dates if grid is not None and grid.words in ("day", "week", "business day") else None


def _month_starts(count: np.ndarray) -> pd.DatetimeIndex:
    """First days of months, counted from the year 0 with January as 1."""
    months = (np.asarray(count) - 1 - 1970 * 12).astype("datetime64[M]")
    return pd.DatetimeIndex(months.astype("datetime64[s]"))


def _counts_years(cells: pd.Series) -> bool:
    """Whether texts are years one by one, or decimal years by equal steps of the calendar: no series is like that."""
    if len(cells) < 4 or not all(map(is_plain, cells)):
        return False
    values, texts = cells.astype(float).to_numpy(), cells.astype(str)
    if (values < 1500).any() or (values > 2200).any():
        return False
    step = np.diff(values)
    if (values % 1 == 0).all():
        return bool((step == 1).all() or (step == -1).all())
    return _year_and_month(values, texts) is not None or _decimal_years(values, texts) is not None


def _counts_seconds(cells: pd.Series, name: str) -> bool:
    """Whether texts are seconds since 1970 that increase."""
    if not all(map(is_plain, cells)):
        return False
    values = cells.astype(float).to_numpy()
    return bool(_is_epoch(values, name) and ((np.diff(values) > 0).all() or (np.diff(values) < 0).all()))


def _is_epoch(values: np.ndarray, name: str) -> bool:
    seconds = (values >= 3e8) & (values < 4e9)
    milliseconds = (values >= 3e11) & (values < 4e12)
    return bool(re.search(r"time|epoch|unix|stamp|date|^ts$", name.lower()) and (seconds.all() or milliseconds.all()))


def _epoch(values: np.ndarray, table: Table, name: str) -> np.ndarray:
    unit = "ms" if values[0] > 1e11 else "s"
    table.notes.append(f"`time`: column {name!r} of {str(table.path)!r} was read as {unit} since 1970, in UTC.")
    return as_dates(pd.DatetimeIndex(pd.to_datetime(values.astype(np.int64), unit=unit)), table, name)


# Several columns


def _combined(table: Table, columns: list[str], dayfirst: bool | None) -> np.ndarray:
    """Labels of several columns; where day and month are open, those that go by equal steps with their times of day."""
    try:
        return _combine(table, columns, dayfirst)
    except AmbiguousDatesError:
        both = {first: _combine(table, columns, first) for first in (True, False)}
        even = [first for first, time in both.items() if (grid := grid_of(time)) is not None and not grid.absent]
        if len(even) != 1:
            raise
        words = "the day first" if even[0] else "the month first"
        table.notes.append(
            f"`time`: in {str(table.path)!r} the dates were read with {words}, because their steps are then equal "
            "(`dayfirst=` says otherwise)."
        )
        return both[even[0]]


def _combine(table: Table, columns: list[str], dayfirst: bool | None) -> np.ndarray:
    """Labels of a date and a time of day, or of a year and parts of it, in columns of their own."""
    parts = parts_of(table, columns)
    if "year" not in parts and not any(is_dated(table, name) for name in columns):
        order = ("year", "month", "day", "hour", "minute", "second")  # names say nothing: by their order
        parts = dict(zip(order, columns, strict=False))
        if len(columns) > len(order) or any(_part_values(table, n, p) is None for p, n in parts.items()):
            parts = {}
    if "year" in parts:
        base, rest = _from_year(table, parts)
    else:
        date = next((n for n in columns if is_dated(table, n)), None)
        if date is None:
            raise ValueError(
                f"`time`: of the columns {columns} of {str(table.path)!r} none is a date or a year. Name a column of "
                "dates and one of times, or those of year, month, day and hour."
            )
        base, rest = pd.DatetimeIndex(read_time(table, [date], dayfirst)).as_unit("us"), {}
        parts = {p: n for p, n in parts.items() if p in ("hour", "minute", "second") and n != date}
        rest |= parts
        used = [date, *parts.values()]
        for name in (n for n in columns if n not in used):
            cells = table.cells[name]
            seconds = seconds_of_day(cells)
            if seconds is None:
                row = next((k for k, x in enumerate(cells) if seconds_of_day(cells.iloc[k : k + 1]) is None), 0)
                raise ValueError(f"`time` must have a time of day in every row; {table.where(name, row)} is none.")
            base = base + pd.to_timedelta(seconds, unit="s")
    for part, unit in (("hour", 3600.0), ("minute", 60.0), ("second", 1.0)):
        if part in rest:
            base = base + pd.to_timedelta(unit * _checked(table, rest[part], part), unit="s")
    return as_dates(pd.DatetimeIndex(base).round("us"), table, columns[-1])


def seconds_of_day(cells: pd.Series) -> np.ndarray | None:
    """Seconds of the day of 13:00, 1 PM or 1300; None where a cell is none of these."""
    if cells.dtype == object and time_of_day(cells) is not None:
        return time_of_day(cells)
    texts = cells.astype(str).str.strip().str.removesuffix(".0").str.zfill(4)
    if not texts.str.fullmatch(r"\d{4}").all():
        return None
    hours, minutes = texts.str[:2].astype(int).to_numpy(), texts.str[2:].astype(int).to_numpy()
    return 3600.0 * hours + 60.0 * minutes if (hours <= 24).all() and (minutes < 60).all() else None


def _from_year(table: Table, parts: dict[str, str]) -> tuple[Any, dict[str, str]]:
    """Dates of a year and its quarter, month, week or day, and the parts of the day that are left."""
    year = _checked(table, parts["year"], "year").astype(int)
    first = pd.DatetimeIndex([f"{y:04d}-01-01" for y in year]).as_unit("us")
    rest = {p: n for p, n in parts.items() if p in ("hour", "minute", "second")}
    if "month" in parts:
        month = _checked(table, parts["month"], "month").astype(int)
        first = _month_starts(year * 12 + month).as_unit("us")
        if "day" in parts:
            day = _checked(table, parts["day"], "day")
            late = np.flatnonzero(day > first.days_in_month)
            if late.size:
                raise ValueError(f"`time`: the month has no such day; {table.where(parts['day'], int(late[0]))}.")
            first = first + pd.to_timedelta(day - 1, unit="D")
        return first, rest
    if "quarter" in parts:
        return _month_starts(year * 12 + 3 * _checked(table, parts["quarter"], "quarter").astype(int) - 2), rest
    if "week" in parts:
        weeks = _checked(table, parts["week"], "week").astype(int)
        return pd.DatetimeIndex([iso_week(str(y), str(w)) for y, w in zip(year, weeks, strict=True)]).as_unit(
            "us"
        ), rest
    if "day of year" in parts:
        return first + pd.to_timedelta(_checked(table, parts["day of year"], "day of year") - 1, unit="D"), rest
    return first, rest


def _checked(table: Table, name: str, part: str) -> np.ndarray:
    """The values of a part of a date; refuses one that is none."""
    values = _part_values(table, name, part)
    _, least, most = PARTS[part]
    bad = np.flatnonzero(~((values >= least) & (values <= most))) if values is not None else np.zeros(1, int)
    if values is None or bad.size:
        raise ValueError(
            f"`time`: {table.where(name, int(bad[0]))} is no {part} ({least:g} to {most:g}). Write the dates as "
            "YYYY-MM-DD, or name another column as `time`."
        )
    return values
