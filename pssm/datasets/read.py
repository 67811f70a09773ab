"""A user's own series from a file."""

import os
from collections.abc import Sequence
from pathlib import Path

from pssm.datasets.series import Series


def read_table(
    path: str | os.PathLike[str],
    column: str | Sequence[str] | None = None,
    time: str | Sequence[str] | None = None,
    *,
    inputs: str | Sequence[str] | None = None,
    missing: str | float | Sequence[str | float] = (),
    decimal: str | None = None,
    thousands: str | None = None,
    dayfirst: bool | None = None,
    timezone: str | None = None,
    separator: str | None = None,
    sheet: str | int = 0,
) -> Series:
    r"""A series from a file with a header row: CSV and other text, Excel or Parquet, by the file's ending.

    Rows are taken as equally spaced steps; the times are labels, and give a guess of the period: 12 for months, 4 for
    quarters, 365.25 / 7 for weeks, 7 for days, 5 for business days, 24 for hours. `Series.notes` says how the file was
    read wherever another reading was possible; what may matter is warned of.

    Text may be separated by commas, semicolons, tabs, `|` or blanks, in UTF-8, UTF-16 or Windows-1252. Lines that begin
    with `#`, blank lines and a row of units under the header are left out. Missing are empty cells and the usual marks
    (NA, N/A, #N/A, NaN, null, none, missing, `.`, `..`, `-`, `--`, `?`, `*`, `:`, in any case of letters).

    Args:
        path: the file.
        column: the column to read, or several. May be left out where the file has one numeric column besides the time.
        time: the column of times, or the columns that make it together: a date and a time, or year, month, day, hour.
            Default: the columns whose values are dates, else those called year, month and so on, else one that is
            called time or counts the rows, else 0..T-1. Numbers stay numbers; dates become datetime64: 2001-12-29,
            29.12.2001, 12/29/2001 1:00 PM, 29-Dec-2001, Dec 2001, 12/2001, 2001-W52, 2001Q4, Q4 2001, 20011229, 200112,
            2001.9583, with offsets (in UTC). Newest first is turned round.
        inputs: columns of regressors; rows behind the last value of the series are the future (`Series.u_future`).
        missing: further cells or numbers that mean a missing value, such as -999.
        decimal: the decimal mark, "." or ","; by default the cells decide, and where they do not, this is asked for.
        thousands: the mark between thousands, likewise.
        dayfirst: whether 1/2/2001 is in February; by default the dates whose steps are equal are meant.
        timezone: of times without an offset, such as "Europe/Berlin", where a clock change makes them repeat; in UTC
            afterwards.
        separator: between the cells of a text; by default the one that makes rows of equal length.
        sheet: of an Excel file, its name or number.

    Returns:
        A `Series` with `y` of shape `(time, n_obs)`, float64; `units` is empty where the file has none.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: pandas has no engine for such files; the message has the line that installs one.
        ValueError: no table, no rows, an unknown or ambiguous `column`, a cell that is not a finite number or may be
            one of two, no value at all, times that cannot be read or do not increase. The message names file, column,
            row and cell.

    Warns:
        UserWarning: rows are absent or not equally spaced, were turned round, or a number may stand for "no value".

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "river.csv"
        >>> _ = file.write_text("day;flow\n31-Jan-2001;3,5\n28-Feb-2001;--\n31-Mar-2001;4,25\n")
        >>> river = read_table(file)
        >>> river.columns, river.y[:, 0].tolist(), river.period
        (('flow',), [3.5, nan, 4.25], 12.0)
    """
    from pssm.datasets.numbers import Marks  # pandas takes a second to import
    from pssm.datasets.reading import read

    marks = Marks.of(decimal, thousands, missing)
    return read(
        Path(path),
        column,
        time,
        inputs,
        marks,
        dayfirst=dayfirst,
        timezone=timezone,
        separator=separator,
        sheet=sheet,
    )


read_csv = read_table
