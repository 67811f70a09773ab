"""Cells of a CSV file to numbers, dates and a seasonal period; every error names the file, the column, row and cell."""

import csv
import re
import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np

MISSING = frozenset({"", ".", "na", "nan", "n/a", "<na>", "null", "none"})
PERIODS = {"monthly": 12.0, "quarterly": 4.0, "weekly": 365.25 / 7, "daily": 7.0}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)
_QUARTER_OR_MONTH = re.compile(r"(\d{4})[- ]?([QM])(\d{1,2})", re.IGNORECASE)  # 1959Q1, 1959-q1, 1959M01
_ISO = re.compile(r"\d{4}-\d\d(-\d\d([T ]\d\d:\d\d(:\d\d)?)?)?")
_HAS_YEAR = re.compile(r"\d{4}")
_TEXT_FORMATS = ("%Y/%m/%d", "%Y/%m", "%d.%m.%Y", "%b %Y", "%B %Y", "%d %b %Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y")
_SLASH_FORMATS = ("%m/%d/%Y", "%d/%m/%Y", "%m-%d-%Y", "%d-%m-%Y")  # month first or day first: see `_slash_dates`


@dataclass(frozen=True, eq=False)
class Table:
    """The text of a CSV file: `cells[column]` has one stripped string per row, `lines` each row's line in the file."""

    path: Path
    cells: dict[str, list[str]]
    lines: list[int]

    def where(self, column: str, row: int) -> str:
        """Words for one cell: file, column, row (first row of data = 1), line of the file, and the text itself."""
        place, cell = f"row {row + 1} (line {self.lines[row]})", self.cells[column][row]
        return f"column {column!r} of {str(self.path)!r}, {place}: {cell if len(cell) <= 60 else cell[:57] + '...'!r}"


def suggestion(value: str, choices: list[str]) -> str:
    """` Did you mean 'flow'?` where one of `choices` is close to `value` (in any case of letters), else nothing."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = get_close_matches(str(value).lower(), list(by_lower), n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def read_table(path: Path) -> Table:
    """Reads a CSV file with a header row; the separator (comma, semicolon or tab) is the header's most frequent."""
    if not path.exists():
        near = [p.name for p in path.parent.glob("*.csv")] if path.parent.is_dir() else []
        raise FileNotFoundError(f"`path`: no file {str(path)!r}.{suggestion(path.name, near)}")
    if path.is_dir():
        raise ValueError(f"`path` must be a CSV file; {str(path)!r} is a folder. Name a file in it.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"`path` must be a CSV file; {str(path)!r} is not UTF-8 text. Save it as CSV (UTF-8).")
    first = next((line for line in text.splitlines() if line.strip()), "")
    reader = csv.reader(text.splitlines(), delimiter=max(",;\t", key=first.count), skipinitialspace=True, strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise ValueError(f"`path` must be a CSV file; {str(path)!r} cannot be split into cells: {error}.") from None
    while rows and not any(rows[0][1]):
        rows.pop(0)
    if not rows:
        raise ValueError(f"`path` must be a CSV file with a header row and data; {str(path)!r} is empty.")
    header = _header(path, rows.pop(0)[1])
    while rows and (not any(rows[-1][1]) if len(header) > 1 else not rows[-1][1]):
        rows.pop()
    if len(header) == 1:  # a blank line in a file of one column is a missing value
        rows = [(line, row or [""]) for line, row in rows]
    rows = [(line, row) for line, row in rows if any(row) or len(row) == len(header)]
    if not rows:
        raise ValueError(f"`path` must have rows of data; {str(path)!r} has only its header, {', '.join(header)}.")
    for i, (line, row) in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(
                f"`path`: {str(path)!r} has {len(header)} columns in its header but {len(row)} cells in row {i + 1} "
                f"(line {line}): {','.join(row)!r}. Add the absent cells (empty = missing) or quote cells with commas."
            )
    cells = {name: [row[j] for _, row in rows] for j, name in enumerate(header)}
    return Table(path, cells, [line for line, _ in rows])


def _header(path: Path, names: list[str]) -> list[str]:
    """Column names: a nameless first one is `index` (as pandas writes it), another nameless one `column_<j>`."""
    if all(_NUMBER.fullmatch(name) for name in names):
        raise ValueError(f"`path`: the first row of {str(path)!r} must name the columns; got {', '.join(names)}.")
    names = [name or ("index" if j == 0 else f"column_{j + 1}") for j, name in enumerate(names)]
    twice = [name for j, name in enumerate(names) if name in names[:j]]
    if twice:
        raise ValueError(f"`path`: the header of {str(path)!r} has column {twice[0]!r} twice. Rename one of them.")
    return names


def is_missing(cell: str) -> bool:
    """True for the cells that mean a missing value: empty, `.`, NA, NaN, N/A, null, None (any case)."""
    return cell.lower() in MISSING


def is_number(cell: str) -> bool:
    """True for a plain decimal number or an infinity; no thousands separators, no units."""
    return _NUMBER.fullmatch(cell) is not None


def looks_numeric(cells: list[str]) -> bool:
    """True where at least half of the cells that are not missing are numbers (a few bad cells are worth an error)."""
    present = [cell for cell in cells if not is_missing(cell)]
    return bool(present) and 2 * sum(map(is_number, present)) >= len(present)


def to_numbers(table: Table, column: str) -> np.ndarray:
    """One column as float64, missing cells NaN; refuses text, infinite values and an empty column."""
    values = np.full(len(table.lines), np.nan)
    for row, cell in enumerate(table.cells[column]):
        if is_missing(cell):
            continue
        if not is_number(cell):
            raise ValueError(
                f"`column` must be numeric; {table.where(column, row)} is not a number. Write numbers as 1234.5 and "
                "leave the cell of a missing value empty."
            )
        values[row] = float(cell)
        if np.isinf(values[row]):
            raise ValueError(
                f"`column` must be finite; {table.where(column, row)} is infinite. Leave the cell of a missing value "
                "empty."
            )
    if np.isnan(values).all():
        raise ValueError(
            f"`column` must have at least one value; all {len(values)} cells of column {column!r} of "
            f"{str(table.path)!r} are missing."
        )
    return values


def check_column(table: Table, argument: str, name: str) -> None:
    """Refuses a name that is not in the header, and says which are."""
    if name not in table.cells:
        names = list(table.cells)
        raise ValueError(
            f"`{argument}` must be a column of {str(table.path)!r}, one of {', '.join(map(repr, names))}; got {name!r}."
            f"{suggestion(name, names)}"
        )


def to_times(table: Table, column: str) -> np.ndarray:
    """One column of numeric times: int64 where all are written as whole numbers, else float64; none may be missing."""
    cells = table.cells[column]
    for row, cell in enumerate(cells):
        if not is_number(cell) or np.isinf(float(cell)):
            raise ValueError(f"`time` must be a finite number in every row; {table.where(column, row)} is not one.")
    try:
        return np.array([int(cell) for cell in cells], dtype=np.int64)
    except (ValueError, OverflowError):
        return np.array([float(cell) for cell in cells])


def parse_dates(cells: list[str]) -> np.ndarray:
    """Dates as datetime64 (days where no time of day is given), NaT where a cell is not a date this reader knows."""
    matches = [_QUARTER_OR_MONTH.fullmatch(cell) for cell in cells]
    if any(matches):
        cells = [_first_month(match) if match else cell for match, cell in zip(matches, cells, strict=True)]
    best = _iso_dates(cells)
    if best is None:
        best = _other_dates(cells)
    days = best.astype("datetime64[D]")
    return days if np.array_equal(days[~np.isnat(best)], best[~np.isnat(best)]) else best.astype("datetime64[s]")


def _iso_dates(cells: list[str]) -> np.ndarray | None:
    """Dates such as 2001-12, 2001-12-29 and 2001-12-29 18:30 without pandas; `None` if there is anything else."""
    if not all(map(_ISO.fullmatch, cells)):
        return None
    try:
        return np.array(cells, dtype="datetime64[us]")
    except ValueError:  # there is no 30 February: the slow way finds out which cell it is
        return None


def _other_dates(cells: list[str]) -> np.ndarray:
    import pandas as pd  # here, because importing pandas is slow

    text = pd.Series([(cell if _HAS_YEAR.search(cell) and not is_number(cell) else "") for cell in cells], dtype=object)

    def parse(pattern: str) -> np.ndarray:
        parsed = pd.to_datetime(text, format=pattern, errors="coerce", utc=True)
        return parsed.dt.tz_localize(None).to_numpy().astype("datetime64[us]")

    best = parse("ISO8601")
    if np.isnat(best).any():
        tried = [best, *map(parse, _TEXT_FORMATS), _slash_dates([parse(pattern) for pattern in _SLASH_FORMATS])]
        best = min(tried, key=lambda dates: np.isnat(dates).sum())
    return best


def _first_month(match: re.Match[str]) -> str:
    """ISO date of the first day of a quarter or month such as 1959Q2; text that is no date if there is none such."""
    year, kind, number = match.groups()
    month = 3 * int(number) - 2 if kind in "Qq" else int(number)
    return f"{year}-{month:02d}-01" if 1 <= month <= 12 else f"not a date: {match[0]}"


def _slash_dates(tried: list[np.ndarray]) -> np.ndarray:
    """The reading of 1/2/1990 (month or day first) that parses; if both do, the one that gives regular steps."""
    fewest = min(np.isnat(dates).sum() for dates in tried)
    left = [dates for dates in tried if np.isnat(dates).sum() == fewest]
    if len(left) > 1 and fewest == 0:
        regular = [dates for dates in left if (dates[1:] > dates[:-1]).all() and spacing(dates)[0]]
        if len(regular) != 1 and not all(np.array_equal(dates, left[0]) for dates in left):
            raise ValueError("day and month cannot be told apart. Write the dates as YYYY-MM-DD.")
        left = regular or left
    return left[0]


def spacing(time: np.ndarray) -> tuple[bool, float | None]:
    """Whether increasing times are equally spaced (calendar months, quarters and years count), and the period guess."""
    if len(time) < 2:
        return True, None
    if not np.issubdtype(time.dtype, np.datetime64):  # numbers: within a tenth of a step of an even grid
        grid = np.linspace(float(time[0]), float(time[-1]), len(time))
        return bool(np.abs(time - grid).max() <= 0.1 * (grid[1] - grid[0])), None
    days = np.diff(time.astype("datetime64[s]")) / np.timedelta64(1, "D")
    months = np.diff(time.astype("datetime64[M]").astype(int))
    for kind, step in (("daily", 1), ("weekly", 7)):
        if (days == step).all():
            return True, PERIODS[kind]
    for kind, step, least, most in (("monthly", 1, 26, 35), ("quarterly", 3, 85, 96), ("yearly", 12, 360, 371)):
        if (months == step).all() and days.min() >= least and days.max() <= most:
            return True, PERIODS.get(kind)
    return bool(np.ptp(days) < 1e-9), None


def check_increasing(table: Table, column: str, time: np.ndarray) -> None:
    """Refuses times that repeat or go back, and warns where they are not equally spaced."""
    bad = np.flatnonzero(~(time[1:] > time[:-1]))
    if bad.size:
        row = int(bad[0]) + 1
        what = "repeats the row before" if time[row] == time[row - 1] else f"comes after {time[row - 1]}"
        raise ValueError(
            f"`time` must increase from row to row; {table.where(column, row)} {what}. Sort the rows by time and keep "
            "one row per time."
        )
    if not spacing(time)[0]:
        warnings.warn(
            f"`time`: column {column!r} of {str(table.path)!r} is not equally spaced; its rows are treated as equally "
            "spaced, and the times are kept as labels. If rows are absent, add them with an empty value (missing).",
            stacklevel=3,
        )
