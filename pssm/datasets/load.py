"""Time series from files: the embedded ones by name, a user's own from a CSV file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Shaped

from pssm._checks import check_choice
from pssm.datasets.table import (
    PERIODS,
    Table,
    check_column,
    check_increasing,
    is_number,
    looks_numeric,
    parse_dates,
    read_table,
    spacing,
    to_numbers,
    to_times,
)

_TIME_NAMES = ("time", "date", "datetime", "year", "month", "week", "quarter", "t", "index")


@dataclass(frozen=True, eq=False)
class Series:
    """A time series with its labels: one row per time step, one column per observed variable.

    Attributes:
        name: short name; the file's name without its ending for a user's file.
        y: values `(time, n_obs)` in `units`; NaN = missing.
        time: label of each row `(time,)`: dates (datetime64) or numbers, strictly increasing.
        columns: name of each column of `y`.
        units: units of `y` in words; empty where unknown.
        description: the measured quantity.
        period: observations per seasonal cycle, `None` where there is none or it is unknown.
        source: where the data come from.
    """

    name: str
    y: Float64[np.ndarray, "time n_obs"]
    time: Shaped[np.ndarray, " time"]
    columns: tuple[str, ...]
    units: str
    description: str
    period: float | None
    source: str


@dataclass(frozen=True)
class _About:
    default: str
    units: dict[str, str]
    description: str
    period: float | None
    source: str


_DOLLARS = "billions of chained 2005 US dollars, seasonally adjusted annual rate"
_EMBEDDED = {
    "nile": _About(
        "volume", {"volume": "10^8 m^3"}, "yearly flow of the Nile at Aswan, 1871-1970", None,
        "G. W. Cobb (1978), The Problem of the Nile, Biometrika 65.2, 243-51",
    ),
    "sunspots": _About(
        "sunactivity", {"sunactivity": "sunspot number"}, "yearly sunspot number, 1700-2008", None,
        "US National Geophysical Data Center",
    ),
    "co2": _About(
        "co2", {"co2": "ppmv"}, "weekly CO2 in the air at Mauna Loa, 1958-2001, with gaps", PERIODS["weekly"],
        "C. D. Keeling and T. P. Whorf (2004), Carbon Dioxide Information Analysis Center, Oak Ridge",
    ),
    "elnino": _About(
        "temperature", {"temperature": "degrees Celsius"},
        "monthly sea surface temperature of the Pacific, Nino 1+2 region, 1950-2010", PERIODS["monthly"],
        "US National Weather Service, ERSST.V3B",
    ),
    "macrodata": _About(
        "infl",
        {
            **dict.fromkeys(("realgdp", "realcons", "realinv", "realgovt", "realdpi"), _DOLLARS),
            "cpi": "1982-84 = 100", "m1": "billions of US dollars", "tbilrate": "percent per year",
            "unemp": "percent", "pop": "millions", "infl": "percent per year", "realint": "percent per year",
        },
        "quarterly US macroeconomic series, 1959Q1-2009Q3; the first infl and realint are 0 by convention",
        PERIODS["quarterly"],
        "Federal Reserve Bank of St. Louis (FRED) and US Bureau of Labor Statistics, compiled by S. Seabold",
    ),
}  # fmt: skip


def load(name: str, column: str | Sequence[str] | None = None) -> Series:
    """An embedded series by name; see `available` for the names and PROVENANCE.md beside the files for their origin.

    Args:
        name: `nile`, `sunspots`, `co2`, `elnino` or `macrodata`.
        column: one column or several. Default: `infl` for macrodata, the only column of the others.

    Returns:
        A `Series` with `y` of shape `(time, n_obs)`; NaN = missing.

    Raises:
        ValueError: unknown `name` or `column`; the message lists the known ones.

    Example:
        >>> nile = load("nile")
        >>> nile.y.shape, nile.units, int(nile.time[0])
        ((100, 1), '10^8 m^3', 1871)
        >>> load("macrodata", ["infl", "unemp"]).columns
        ('infl', 'unemp')
    """
    check_choice("name", name, list(_EMBEDDED))
    about = _EMBEDDED[name]
    series = read_csv(Path(__file__).parent / f"{name}.csv", about.default if column is None else column, "time")
    units = "; ".join(dict.fromkeys(about.units[c] for c in series.columns))
    return replace(series, units=units, description=about.description, period=about.period, source=about.source)


def available() -> list[tuple[str, int, int, str]]:
    """The embedded series.

    Returns:
        One `(name, time steps, missing values, description)` per series; missing values of the default column.

    Example:
        >>> [row[:3] for row in available()][:3]
        [('nile', 100, 0), ('sunspots', 309, 0), ('co2', 2284, 59)]
    """
    every = [load(name) for name in _EMBEDDED]
    return [(s.name, len(s.y), int(np.isnan(s.y).sum()), s.description) for s in every]


def read_csv(
    path: str | os.PathLike[str], column: str | Sequence[str] | None = None, time: str | None = None
) -> Series:
    r"""A series from a CSV file with a header row; a cell that is empty, NA, NaN or `.` is missing.

    Separators may be comma, semicolon or tab. Rows are taken as equally spaced steps; the times are labels, and give
    a guess of the period: 12 for monthly dates, 4 for quarterly, 365.25 / 7 for weekly, 7 for daily.

    Args:
        path: the file, UTF-8.
        column: the column to read, or several. May be left out where the file has one numeric column besides the time.
        time: the column of times. Default: the one called time, date, datetime, year, month, week, quarter, t or index
            (year with month or quarter beside it are put together), else the first column of dates, else 0..T-1.
            Numbers stay numbers; dates (2001-12-29, 2001-12, 2001Q4, 29.12.2001, 12/29/2001, Dec 2001) become
            datetime64.

    Returns:
        A `Series` with `y` of shape `(time, n_obs)`, float64; `units` is empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a CSV file, no rows, an unknown or ambiguous `column`, a cell that is not a finite number, no
            value at all, times that cannot be read or do not increase. The message names file, column, row and cell.

    Warns:
        UserWarning: the times are not equally spaced.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "river.csv"
        >>> _ = file.write_text("date,flow\n2001-01,3.5\n2001-02,\n2001-03,4.0\n")
        >>> river = read_csv(file)
        >>> river.columns, river.y[:, 0].tolist(), river.period
        (('flow',), [3.5, nan, 4.0], 12.0)
    """
    table = read_table(Path(path))
    wanted = [column] if isinstance(column, str) else list(column) if column is not None else None
    for one in wanted or []:
        check_column(table, "column", one)
    if time is not None:
        check_column(table, "time", time)
    if wanted is not None and (not wanted or len(set(wanted)) < len(wanted)):
        raise ValueError(f"`column` must name one or more different columns; got {column!r}.")
    time_columns = [time] if time is not None else _find_time(table, wanted or [])
    columns = wanted if wanted is not None else [_only_numeric(table, time_columns)]
    y = np.stack([to_numbers(table, c) for c in columns], axis=1)
    labels = _read_time(table, time_columns)
    if time_columns:
        check_increasing(table, time_columns[-1], labels)
    what = f"{', '.join(columns)} of {table.path.name}"
    return Series(table.path.stem, y, labels, tuple(columns), "", what, spacing(labels)[1], str(table.path))


def _find_time(table: Table, wanted: list[str]) -> list[str]:
    """The time column (two where the year has its month or quarter beside it; none where rows are just counted)."""
    free = {name.lower(): name for name in reversed(list(table.cells)) if name not in wanted}
    if len(table.cells) == 1:
        return []
    named = [free[known] for known in _TIME_NAMES if known in free]
    if named and named[0].lower() == "year":
        for part in ("month", "quarter"):
            if part in free and all(map(is_number, table.cells[free[part]])):
                return [named[0], free[part]]
    if named:
        return named[:1]
    for name, cells in table.cells.items():
        if name not in wanted and not looks_numeric(cells):
            try:
                if 2 * np.isnat(parse_dates(cells)).sum() <= len(cells):  # one bad cell: `_read_time` names it
                    return [name]
            except ValueError:  # dates, but day and month are ambiguous: `_read_time` reports it
                return [name]
    return []


def _only_numeric(table: Table, time_columns: list[str]) -> str:
    others = [name for name in table.cells if name not in time_columns]
    data = [name for name in others if name.lower() not in _TIME_NAMES] or others
    numeric = data if len(data) == 1 else [name for name in data if looks_numeric(table.cells[name])]
    if len(numeric) == 1:
        return numeric[0]
    found = f"{len(numeric)} numeric columns" if numeric else "no numeric column"
    shown = ", ".join(map(repr, numeric or table.cells))
    raise ValueError(f"`column` is needed: {str(table.path)!r} has {found} besides the time. Choose from {shown}.")


def _read_time(table: Table, time_columns: list[str]) -> np.ndarray:
    if not time_columns:
        return np.arange(len(table.lines))
    name, cells = time_columns[-1], table.cells[time_columns[-1]]
    if len(time_columns) == 2:
        letter = "Q" if name.lower() == "quarter" else "M"
        years = table.cells[time_columns[0]]
        cells = [f"{y.removesuffix('.0')}{letter}{c.removesuffix('.0')}" for y, c in zip(years, cells, strict=True)]
    elif looks_numeric(cells):
        return to_times(table, name)
    try:
        dates = parse_dates(cells)
    except ValueError as error:
        raise ValueError(f"`time`: in {table.where(name, 0)}, {error}") from None
    if np.isnat(dates).any():
        row = int(np.isnat(dates).argmax())
        raise ValueError(
            f"`time` must be a number or a date in every row; {table.where(name, row)} is neither. Write dates as "
            "YYYY-MM-DD, or name another column as `time`."
        )
    return dates
