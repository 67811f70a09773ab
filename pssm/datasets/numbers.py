"""Cells to numbers: marks of missing values, decimal and thousands marks, percent signs, sentinels.

A cell is never read as another number without a word: where `1.234` may be 1.234 or 1234, the rest of its column, or of
its file, decides, or the user is asked.
"""

import re
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

MISSING = frozenset(
    "|.|..|...|-|--|---|\u2013|\u2014|na|n.a.|n.a|n/a|n/d|n.d.|nd|nan|-nan|+nan|<na>|nat|null|(null)|none|nil|missing|"
    "not available|no data|nodata|unknown|?|??|*|**|***|:|\\n|#n/a|#na|#n/a n/a|#value!|#ref!|#div/0!|#num!|"
    "#name?|#null!|1.#qnan|-1.#ind|1.#ind|-1.#qnan".split("|")
)
ERROR_MARK = re.compile(r"#(N/?A|VALUE!|REF!|DIV/0!|NUM!|NAME\?|NULL!)", re.IGNORECASE)
# Numbers that instruments and archives write for "no value".
CLASSIC = (-1e30, -1e20, -99999.0, -32768.0, -9999.9, -9999.0, -8888.0, -7777.0, -6999.0, -999.99, -999.9, -999.0,
           -888.0, -777.0, -200.0, -99.99, -99.9, -99.0, 99.0, 99.9, 99.99, 999.0, 999.9, 999.99, 8888.0, 9999.0,
           9999.9, 9999.99, 32767.0, 65535.0, 99999.0, 999999.0, 1e20, 1e30)  # fmt: skip
_PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)
_SHAPE = re.compile(
    r"\d*[.,]?\d*|\d{1,3}(,\d{2,3})*,\d{3}(\.\d*)?|\d{1,3}(\.\d{3})+(,\d*)?"  # 12,34,567.8 in India
)
_SPACES = r"[\s\u00a0\u2007\u2009\u202f'\u2019]"
_CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"


class Marks(NamedTuple):
    """How numbers are written, as far as the user has said.

    Attributes:
        decimal: "." or ","; None where the cells decide.
        thousands: ",", "." or " "; None where the cells decide.
        missing: texts and numbers that mean a missing value, besides the usual ones.
    """

    decimal: str | None = None
    thousands: str | None = None
    missing: tuple[str, ...] = ()

    @classmethod
    def of(cls, decimal: str | None, thousands: str | None, missing: Any) -> "Marks":
        """Checked arguments of a reader."""
        if decimal not in (None, ".", ","):
            raise ValueError(f'`decimal` must be "." or ","; got {decimal!r}.')
        if thousands not in (None, ".", ",", " ", "'"):
            raise ValueError(f'`thousands` must be ",", ".", " " or "\'"; got {thousands!r}.')
        if thousands is not None and decimal == thousands:
            raise ValueError(f"`decimal` and `thousands` must differ; both are {decimal!r}.")
        if missing is None or isinstance(missing, str | int | float | np.number):
            missing = () if missing is None else (missing,)
        return cls(decimal, thousands, tuple(str(x).strip() for x in missing))


def is_missing(cell: str, declared: tuple[str, ...] = ()) -> bool:
    """Whether a cell is one of the usual marks of a missing value (in any case of letters), or a declared one."""
    return cell.lower() in MISSING or cell in declared


def is_plain(cell: str) -> bool:
    """Whether a cell is a plain decimal number or an infinity: no thousands marks, no units."""
    return _PLAIN.fullmatch(cell) is not None


def is_written_number(cell: str) -> bool:
    """Whether a cell is a number in any way of writing one: with thousands marks, a decimal comma, a currency."""
    return _body(cell) is not None


def missing_cells(cells: pd.Series, declared: tuple[str, ...] = ()) -> np.ndarray:
    """Where cells are missing."""
    if cells.dtype != object:
        return cells.isna().to_numpy()
    return np.array([is_missing(cell, declared) for cell in cells], bool)


def looks_numeric(cells: pd.Series, declared: tuple[str, ...] = ()) -> bool:
    """Whether at least half of the cells that are not missing are numbers (a few bad cells are worth an error).

    Of a long column a thousand cells are looked at.
    """
    if cells.dtype != object:
        return pd.api.types.is_numeric_dtype(cells.dtype)
    if len(cells) > 2000:
        every = len(cells) // 1000
        sample = cells.iloc[::every]
        cells = cells if all(is_missing(cell, declared) for cell in sample) else sample
    present = [cell for cell in cells if not is_missing(cell, declared)]
    return bool(present) and 2 * sum(_body(cell) is not None for cell in present) >= len(present)


def to_numbers(table: Any, column: str, marks: Marks, argument: str = "column") -> tuple[np.ndarray, str]:
    """One column as float64, NaN where missing, and its unit where its cells have one ("%", "$").

    Raises:
        ValueError: a cell is no finite number, none has a value, or the meaning of a mark is open.
    """
    cells = table.cells[column]
    missing = missing_cells(cells, marks.missing)
    values, unit = np.full(len(cells), np.nan), ""
    if cells.dtype != object:
        if not pd.api.types.is_numeric_dtype(cells.dtype):
            raise ValueError(f"`{argument}` must be numeric; column {column!r} of {str(table.path)!r} holds dates.")
        values = cells.to_numpy(dtype=float, na_value=np.nan)
    else:
        present = [cell for cell, absent in zip(cells, missing, strict=True) if not absent]
        plain = all(map(is_plain, present))
        if plain and _decide(table, column, argument, [x.lstrip("+-") for x in present], marks) == (".", ","):
            values[~missing] = [float(x) for x in present]
        else:
            values[~missing], unit = _marked(table, column, argument, marks, np.flatnonzero(~missing))
    for row in np.flatnonzero(np.isinf(values)):
        raise ValueError(
            f"`{argument}` must be finite; {table.where(column, int(row))} is infinite. Leave the cell of a missing "
            "value empty."
        )
    for text in marks.missing:
        if is_plain(text):
            values[values == float(text)] = np.nan
    if np.isnan(values).all():
        raise ValueError(
            f"`{argument}` must have at least one value; all {len(values)} cells of column {column!r} of "
            f"{str(table.path)!r} are missing."
        )
    return values, unit


class _Body(NamedTuple):
    """A cell without its sign, currency, percent sign, exponent and blanks."""

    digits: str
    negative: bool
    exponent: str
    percent: bool
    currency: str
    spaced: bool


def _body(cell: str) -> _Body | None:
    """The parts of a cell; None where it is no number in any way of writing one."""
    text = cell.replace("\u2212", "-").strip()
    negative = False
    if text.startswith("(") and text.endswith(")"):  # as accountants write it
        text, negative = text[1:-1].strip(), True
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    sign = re.match(r"[+-]", text)
    if sign:
        negative, text = negative ^ (sign[0] == "-"), text[1:].strip()
    currency = "".join(c for c in text if c in _CURRENCY)
    text = text.strip(_CURRENCY + " ")
    if re.match(r"[+-]", text) and not sign:
        negative, text = negative ^ (text[0] == "-"), text[1:]
    match = re.fullmatch(r"(.*?\d[.,]?)[eEdD]([+-]?\d+)", text)
    text, exponent = (match[1], match[2]) if match else (text, "")
    spaced = re.fullmatch(rf"\d{{1,3}}({_SPACES}\d{{3}})+([.,]\d*)?", text) is not None
    text = re.sub(_SPACES, "", text) if spaced else text
    if not _SHAPE.fullmatch(text) or not text.strip(".,") or len(currency) > 1:
        return None
    return _Body(text, negative, exponent, percent, currency, spaced)


def _marked(table: Any, column: str, argument: str, marks: Marks, rows: np.ndarray) -> tuple[list[float], str]:
    """Numbers with thousands marks, decimal commas, percent or currency signs."""
    cells = table.cells[column]
    bodies = []
    for row in rows:
        body = _body(cells.iloc[row])
        if body is None:
            if is_plain(cells.iloc[row]):  # "inf"
                raise ValueError(
                    f"`{argument}` must be finite; {table.where(column, int(row))} is infinite. Leave the cell of a "
                    "missing value empty."
                )
            raise _no_number(table, column, argument, int(row))
        bodies.append(body)
    for what, each in (("percent sign", [b.percent for b in bodies]), ("currency", [b.currency for b in bodies])):
        if len(set(each)) > 1:
            row = int(rows[each.index(next(x for x in each if x != each[0]))])
            raise ValueError(
                f"`{argument}`: some cells of column {column!r} have a {what} and some have none or another; "
                f"{table.where(column, row)} is the first that differs. Write all in the same unit."
            )
    decimal, thousands = _decide(table, column, argument, [b.digits for b in bodies], marks)
    values = []
    for row, body in zip(rows, bodies, strict=True):
        whole, mark, rest = body.digits.partition(decimal)
        grouped = re.fullmatch(rf"\d{{1,3}}(\{thousands}\d{{2,3}})*\{thousands}\d{{3}}", whole)
        plain = whole.replace(thousands, "") if grouped and thousands else whole
        if not re.fullmatch(r"\d*", plain) or not re.fullmatch(r"\d*", rest) or not (plain or rest):
            raise _no_number(table, column, argument, int(row))
        text = f"{plain or '0'}.{rest or '0'}e{body.exponent or '0'}" if mark or body.exponent else plain
        values.append(-float(text) if body.negative else float(text))
    unit = "%" if bodies and bodies[0].percent else (bodies[0].currency if bodies else "")
    if unit:
        table.notes.append(
            f"`{argument}`: column {column!r} of {str(table.path)!r} is in {unit}: 5 {unit} is read as 5."
        )
    if any(b.spaced for b in bodies):
        table.notes.append(f"`{argument}`: blanks and ' in column {column!r} were read as thousands marks.")
    return values, unit


def _no_number(table: Any, column: str, argument: str, row: int) -> ValueError:
    cell = str(table.cells[column].iloc[row])
    hint = (
        f", or pass `missing={cell!r}` (`--missing {cell}`) if it means that" if re.fullmatch(r"\D{1,12}", cell) else ""
    )
    return ValueError(
        f"`{argument}` must be numeric; {table.where(column, row)} is not a number. Write numbers as 1234.5 and leave "
        f"the cell of a missing value empty{hint}."
    )


# Decimal and thousands marks


def _evidence(digits: list[str]) -> dict[str, str]:
    """A cell, if there is one, for each claim: ". decimal", ". thousands", ". open", the same for ",", and others."""
    found: dict[str, str] = {}
    for text in digits:
        for mark, other in (".,", ",."):
            if mark not in text:
                continue
            after = text.rsplit(mark, 1)[1]
            if other in after:
                claim = "thousands"
            elif text.count(mark) > 1:
                claim = "thousands"
            elif re.fullmatch(rf"[1-9]\d{{0,2}}\{mark}\d{{3}}", text):
                claim = "open"
            else:
                claim = "decimal"
            found.setdefault(f"{mark} {claim}", text)
        if re.fullmatch(r"\d+", text):
            found.setdefault("long" if len(text) > 3 else "short", text)
    return found


def _decide(table: Any, column: str, argument: str, digits: list[str], marks: Marks) -> tuple[str, str]:
    """The decimal and the thousands mark of a column."""
    if marks.decimal or marks.thousands:
        decimal = marks.decimal or ("," if marks.thousands == "." else ".")
        thousands = marks.thousands if marks.thousands in (".", ",") else None  # blanks and ' are none of the two
        return decimal, thousands or {".": ",", ",": "."}[decimal]
    found = _evidence(digits)
    opened = [mark for mark in ".," if f"{mark} open" in found]
    english = not ({", decimal", ". thousands"} & found.keys())
    continental = not ({". decimal", ", thousands"} & found.keys())
    place = f"column {column!r} of {str(table.path)!r}"
    if not (english or continental) or len(opened) == 2 and english == continental:
        cells = [found[k] for k in found if k[0] in ".,"]
        raise ValueError(
            f"`{argument}`: {place} writes numbers in two ways ({cells[0]!r} and {cells[1]!r}). Write all of them in "
            'one, or say which mark is which: `decimal=","` (`--decimal ,`), `thousands="."` (`--thousands .`).'
        )
    if english != continental:
        decimal, thousands = (".", ",") if english else (",", ".")
        if not english or thousands in "".join(digits):
            example = next(x for x in digits if thousands in x or decimal == "," in x)
            value = example.replace(thousands, "").replace(decimal, ".")
            table.notes.append(
                f"`{argument}`: {place} was read with the decimal mark {decimal!r}: {example!r} is {value}."
            )
        return decimal, thousands
    if not opened:
        return ".", ","
    return _open(table, argument, place, opened[0], found, column)


def _open(table: Any, argument: str, place: str, mark: str, found: dict[str, str], column: str) -> tuple[str, str]:
    """`1.234`, and nothing else in the column that says whether it is 1.234 or 1234."""
    other = "," if mark == "." else "."
    example = found[f"{mark} open"]
    elsewhere: set[str] = set()
    for name, cells in table.cells.items():
        if name != column and cells.dtype == object:
            bodies = [_body(cell) for cell in cells if not is_missing(cell)]
            if bodies and all(bodies):
                elsewhere |= {k for k in _evidence([b.digits for b in bodies if b]) if "open" not in k}
    as_decimal = {f"{mark} decimal", f"{other} thousands"} & elsewhere
    as_thousands = {f"{mark} thousands", f"{other} decimal"} & elsewhere
    decided, why, loud = "", "", table.notes
    if bool(as_decimal) != bool(as_thousands):
        decided, why = ("decimal" if as_decimal else "thousands"), "other columns of the file use it so"
    elif "long" in found:
        decided, why = "decimal", f"{found['long']!r} in the same column has no thousands mark"
    elif mark == "." and "short" not in found and table.separator != ";":
        decided, why = "decimal", "every cell has three digits behind it"
        if table.separator != ",":  # where commas separate cells, they are no decimal marks
            loud = table.loud
    if not decided:
        beside = f" beside {found['short']!r}" if "short" in found else ""
        row = next(k for k, x in enumerate(table.cells[column]) if example in x)
        raise ValueError(
            f"`{argument}`: {table.where(column, row)}{beside} may be {example.replace(mark, '.')} or "
            f"{example.replace(mark, '')}. Say which: `decimal={mark!r}` (`--decimal {mark}`) or `thousands={mark!r}` "
            f"(`--thousands {mark}`)."
        )
    value = example.replace(mark, "." if decided == "decimal" else "")
    loud.append(
        f"`{argument}`: {mark!r} in {place} was read as the {decided} mark ({example!r} is {value}), because {why}; "
        f"`decimal=` and `thousands=` (`--decimal`, `--thousands`) say otherwise."
    )
    return (mark, other) if decided == "decimal" else (other, mark)


# Sentinels


def sentinels(values: np.ndarray) -> list[tuple[float, int]]:
    """Numbers that may stand for "no value", and how often: known ones, or repeated ones, far outside of the rest."""
    rest, found = np.sort(values[np.isfinite(values)]), []
    changed = True
    while changed and len(found) < 4:
        changed = False
        for value in (rest[0], rest[-1]) if rest.size else ():
            others = rest[rest != value]
            if others.size < 3:
                continue
            low, high, count = float(others[0]), float(others[-1]), int((rest == value).sum())
            with np.errstate(over="ignore"):
                width = float(np.subtract(*np.quantile(others, [0.95, 0.05])))
                away, span = max(low - value, value - high), high - low
            width = width if width > 0 else span  # zeros with a few events among them
            known = value in CLASSIC and (away > 2 * width or (count > 1 and away > 0.25 * width))
            known |= (value in CLASSIC or count > 1) and value < 0 <= low and away > 0.25 * width
            if known or (count > 1 and span > 0 and away > 5 * span and len(np.unique(others)) >= 5):
                found.append((float(value), count))
                rest, changed = others, True
    return found
