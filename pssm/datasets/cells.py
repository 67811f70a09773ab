"""Files to a table of cells: encodings, separators, comments, headers and rows of units; Excel and Parquet by pandas.

The cells of a text file are split by the `csv` module of Python. pandas fills short rows up without a word, and does
not tell on which line of the file a cell stands, which every error here names.
"""

import csv
import re
from collections import Counter
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pssm.datasets.numbers import ERROR_MARK, is_missing, is_plain, is_written_number

EXCEL = (".xlsx", ".xlsm", ".xls", ".xlsb", ".ods")
PARQUET = (".parquet", ".pq", ".feather")
_SEPARATORS = ",;\t|"
_NONE = "\x1f"  # a separator that no file has: one column
_CONTROL = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1e\x7f]")
_VALUE = re.compile(r"\d[\d\-/:. T+Z]*")  # a number or a date: what a header does not consist of


@dataclass(eq=False)
class Table:
    """The cells of a file.

    Attributes:
        path: the file.
        cells: by column, stripped texts, or values as Excel and Parquet have them.
        lines: the line of each row in the file.
        separator: between cells; "" where there is none.
        units: by column, from a row of units.
        notes: how the file was read.
        loud: notes that are warned of.
    """

    path: Path
    cells: dict[str, pd.Series]
    lines: np.ndarray
    separator: str = ""
    units: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    loud: list[str] = field(default_factory=list)

    def where(self, column: str, row: int) -> str:
        """Words for one cell: file, column, row (first row of data = 1), line of the file, and the text itself."""
        cell = str(self.cells[column].iloc[row])
        place = f"row {row + 1} (line {self.lines[row]})"
        return f"column {column!r} of {str(self.path)!r}, {place}: {cell if len(cell) <= 60 else cell[:57] + '...'!r}"

    def rows(self, kept: np.ndarray) -> "Table":
        """The table with these rows."""
        cells = {name: x.iloc[kept].reset_index(drop=True) for name, x in self.cells.items()}
        return Table(self.path, cells, self.lines[kept], self.separator, self.units, self.notes, self.loud)


def suggestion(value: str, choices: list[str]) -> str:
    """` Did you mean 'flow'?` where one of `choices` is close to `value` (in any case of letters), else nothing."""
    by_lower = {choice.lower(): choice for choice in choices}
    close = get_close_matches(str(value).lower(), list(by_lower), n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def check_column(table: Table, argument: str, name: str) -> None:
    """Refuses a name that is not in the header, and says which are."""
    if name not in table.cells:
        names = list(table.cells)
        raise ValueError(
            f"`{argument}` must be a column of {str(table.path)!r}, one of {', '.join(map(repr, names))}; got {name!r}."
            f"{suggestion(name, names)}"
        )


def read_cells(path: Path, *, separator: str | None = None, decimal: str | None = None, sheet: Any = 0) -> Table:
    """The table of a file, by its ending: Excel, Parquet, or text with a header row.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: pandas has no engine for files of this kind; the message has the line that installs one.
        ValueError: the file cannot be split into cells.
    """
    if not path.exists():
        near = [p.name for p in path.parent.glob("*") if p.is_file()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"`path`: no file {str(path)!r}.{suggestion(path.name, near)}")
    if path.is_dir():
        raise ValueError(f"`path` must be a file with a table; {str(path)!r} is a folder. Name a file in it.")
    kind = path.suffix.lower()
    if kind in EXCEL or kind in PARQUET:
        return _by_pandas(path, kind, sheet)
    text, notes = _text(path)
    return _split(path, text, notes, separator, decimal)


# Excel and Parquet


def _by_pandas(path: Path, kind: str, sheet: Any) -> Table:
    engines = {".xls": "xlrd", ".ods": "odfpy", ".xlsb": "pyxlsb"}
    engine = engines.get(kind, "openpyxl") if kind in EXCEL else "pyarrow"
    try:
        if kind in EXCEL:
            found: Any = pd.read_excel(path, sheet_name=sheet, header=None)
            rows = np.flatnonzero(found.notna().any(axis=1))
            if len(rows) < 2:
                raise ValueError(f"`path` must have rows of data; the sheet of {str(path)!r} has {len(rows)} row.")
            head, found = found.iloc[rows[0]], found.iloc[rows[1:]]
            names = _header(path, ["" if pd.isna(x) else str(x).strip() for x in head])
            lines = rows[1:] + 1
            frame = found.infer_objects()
            frame.columns = names
        else:
            frame = (pd.read_feather if kind == ".feather" else pd.read_parquet)(path)
            if not isinstance(frame.index, pd.RangeIndex):
                frame = frame.reset_index()
            frame.columns = _header(path, [str(x) for x in frame.columns])
            lines = np.arange(1, len(frame) + 1)
    except ImportError:
        raise ImportError(
            f"`path`: to read {str(path)!r} pandas needs {engine}: pip install {engine}. Or save the table as CSV."
        ) from None
    if frame.empty:
        raise ValueError(f"`path` must have rows of data; {str(path)!r} has none.")
    cells = {str(name): _typed(frame[name].reset_index(drop=True)) for name in frame.columns}
    return Table(path, cells, np.asarray(lines))


def _typed(values: pd.Series) -> pd.Series:
    """Numbers and dates as they are; anything else as texts, empty where there is nothing."""
    if pd.api.types.is_datetime64_any_dtype(values.dtype):
        return values
    if pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype):
        return values
    return pd.Series(["" if pd.isna(x) else str(x).strip() for x in values], dtype=object)


# Text


def _text(path: Path) -> tuple[str, list[str]]:
    """The text of a file in UTF-8, UTF-16 or Windows-1252, and a note where it is not the first."""
    raw = path.read_bytes()
    if raw[:4] in (b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"PAR1"):
        kind = "Parquet" if raw[:4] == b"PAR1" else "Excel or zip"
        raise ValueError(
            f"`path` must be a text file such as CSV; {str(path)!r} is not text but looks like {kind}. Give it the "
            "ending of its kind (.xlsx, .parquet), or save it as CSV."
        )
    coding = next((c for mark, c in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")) if raw.startswith(mark)), "")
    if not coding and b"\0" in raw:
        first, second = raw[0:2000:2].count(0), raw[1:2000:2].count(0)
        coding = "utf-16-le" if second > 10 * first else "utf-16-be" if first > 10 * second else ""
    for name in (coding,) if coding else ("utf-8-sig", "cp1252", "latin-1"):
        try:
            text = raw.decode(name)
        except UnicodeDecodeError:
            continue
        if _CONTROL.search(text):
            break
        where = {"cp1252": "Windows-1252", "latin-1": "Latin-1"}.get(name)
        return text, [f"`path`: {str(path)!r} is not UTF-8; it was read as {where}."] if where else []
    raise ValueError(
        f"`path` must be a text file such as CSV; {str(path)!r} is not text in UTF-8, UTF-16 or Windows-1252. Save it "
        "as CSV (UTF-8)."
    )


def _split(path: Path, text: str, notes: list[str], separator: str | None, decimal: str | None) -> Table:
    """Cells of a text: comments and what stands above the header left out."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1)]
    comments = [(n, line) for n, line in lines if line.lstrip().startswith("#") and not ERROR_MARK.match(line.strip())]
    left_out = {n for n, _ in comments}
    lines = [(n, line) for n, line in lines if n not in left_out]
    separator = (
        _separator([line for _, line in lines if line.strip()][:60], decimal) if separator is None else separator
    )
    rows = _cells(path, lines, separator)
    while rows and not any(rows[0][1]):
        rows.pop(0)
    if not rows:
        raise ValueError(f"`path` must be a CSV file with a header row and data; {str(path)!r} is empty.")
    skipped = _preamble([row for _, row in rows[:200]])
    if skipped:
        notes.append(
            f"`path`: the first {skipped} lines of {str(path)!r} have fewer cells than the table and were left out."
        )
        rows = rows[skipped:]
    first = rows[0][1]
    if all(_VALUE.fullmatch(cell) or is_missing(cell) for cell in first) and comments:
        above = [n for n, _ in comments if n < rows[0][0]]
        named = _cells(path, [(n, c.lstrip("# \t")) for n, c in comments if n == max(above, default=0)], separator)
        if named and len(named[0][1]) == len(first):  # "# date,flow", as NumPy writes it
            rows.insert(0, named[0])
    header = _header(path, rows.pop(0)[1])
    foot = []
    while len(rows) > 2 and len(header) > 1 and len(rows[-1][1]) < 2 and not is_plain("".join(rows[-1][1])):
        foot += rows.pop()[1]
    if any(foot):
        notes.append(f"`path`: the lines under the table of {str(path)!r} were left out.")
    while rows and (not any(rows[-1][1]) if len(header) > 1 else not rows[-1][1]):
        rows.pop()
    if len(header) == 1:  # a blank line in a file of one column is a missing value
        rows = [(line, row or [""]) for line, row in rows]
    rows = [(line, row) for line, row in rows if any(row) or len(row) == len(header)]
    if not rows:
        raise ValueError(f"`path` must have rows of data; {str(path)!r} has only its header, {', '.join(header)}.")
    width, good = len(header), []
    for i, (line, row) in enumerate(rows):
        if len(row) > width and not any(row[width:]):  # a separator behind the last cell
            row = row[:width]
        if len(row) != width:
            raise ValueError(
                f"`path`: {str(path)!r} has {width} columns in its header but {len(row)} cells in row {i + 1} "
                f"(line {line}): {','.join(row)!r}. Add the absent cells (empty = missing), quote cells with commas, "
                'or say `decimal=","` where a comma is the decimal mark.'
            )
        good.append((line, row))
    units = _units(header, [row for _, row in good])
    if units:
        good = good[1:]
        notes.append(f"`path`: the row under the header of {str(path)!r} was taken for units: {units}.")
    cells = {name: pd.Series([row[j] for _, row in good], dtype=object) for j, name in enumerate(header)}
    return Table(path, cells, np.array([line for line, _ in good]), separator.strip(_NONE), units, notes)


def _cells(path: Path, lines: list[tuple[int, str]], separator: str) -> list[tuple[int, list[str]]]:
    """Stripped cells of lines, with the number of the line."""
    if separator == " ":
        return [(n, line.split()) for n, line in lines]
    reader = csv.reader([line for _, line in lines], delimiter=separator or _NONE, skipinitialspace=True, strict=True)
    try:
        return [(lines[reader.line_num - 1][0], [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise ValueError(f"`path` must be a CSV file; {str(path)!r} cannot be split into cells: {error}.") from None


def _separator(lines: list[str], decimal: str | None) -> str:
    """The separator that splits most lines into the same number of cells, more than one; " " for any white space."""
    best, found = (0.0, 0), ""
    for mark in sorted(_SEPARATORS, key=lambda m: m == decimal):
        if mark == decimal and found:
            continue
        try:
            counts = [len(row) for row in csv.reader(lines, delimiter=mark, skipinitialspace=True)]
        except csv.Error:
            continue
        usual, times = Counter(counts).most_common(1)[0] if counts else (1, 0)
        if usual > 1 and (times / len(counts), usual) > best:
            best, found = (times / len(counts), usual), mark
    if best[0] == 1.0 or not lines:
        return found
    words = {len(line.split()) for line in lines}
    if len(words) == 1 and max(words) > 1:
        return " "
    return found or next((mark for mark in _SEPARATORS if mark in lines[0] and mark != decimal), "")


def _preamble(rows: list[list[str]]) -> int:
    """How many rows above the header have far fewer cells than the table."""
    usual, times = Counter(len(row) for row in rows if any(row)).most_common(1)[0]
    if usual < 2 or times < 3:
        return 0

    def far_fewer(row: list[str]) -> bool:
        return len(row) == 1 or (usual > 3 and sum(map(bool, row)) <= usual // 2)

    return next((k for k, row in enumerate(rows) if not far_fewer(row)), 0)


def _header(path: Path, names: list[str]) -> list[str]:
    """Column names: a nameless first one is `index` (as pandas writes it), another nameless one `column_<j>`."""
    if all(_VALUE.fullmatch(name) or is_plain(name) for name in names):
        raise ValueError(f"`path`: the first row of {str(path)!r} must name the columns; got {', '.join(names)}.")
    names = [name or ("index" if j == 0 else f"column_{j + 1}") for j, name in enumerate(names)]
    twice = [name for j, name in enumerate(names) if name in names[:j]]
    if twice:
        raise ValueError(f"`path`: the header of {str(path)!r} has column {twice[0]!r} twice. Rename one of them.")
    return names


def _units(header: list[str], rows: list[list[str]]) -> dict[str, str]:
    """The first row as units, by column: where it has no number, but words in columns that have numbers below."""
    if len(rows) < 3 or any(_VALUE.fullmatch(cell) or is_written_number(cell) for cell in rows[0]):
        return {}
    shapes = [[re.sub(r"[^\W\d]+", "a", re.sub(r"\d+", "0", cell)) for cell in row] for row in rows[:2]]
    if any("0" in first and first == second for first, second in zip(*shapes, strict=True)):
        return {}  # a row of data: a date, as in the next row
    below = rows[1:60]
    found = {}
    for j, name in enumerate(header):
        numbers = [is_plain(row[j].replace(",", ".")) for row in below if not is_missing(row[j])]
        if numbers and all(numbers) and not is_missing(rows[0][j]):
            found[name] = rows[0][j]
    return found
