"""Texts to dates: every usual way of writing a day, month, quarter, week or time of day, and offsets from UTC.

A column has one way of writing dates. All ways that fit are tried; where several fit and differ (day or month first),
the one is meant whose dates go on by equal steps, and where that does not decide either, the user is asked.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd

from pssm.times.grid import grid_of
from pssm.times.labels import as_labels

_CLOCK = re.compile(
    r"(?P<date>.*?)(?:^|[T ,:]\s*)(?:"
    r"(?P<h>\d{1,2}):(?P<m>\d\d)(?::(?P<s>\d\d(?:[.,]\d+)?))?\s*(?P<half>[ap]\.?m\.?)?"
    r"|(?P<h2>\d{1,2})\s*(?P<half2>[ap]\.?m\.?)"
    r"|(?<=\dT)(?P<h3>\d\d)(?P<m3>\d\d)(?P<s3>\d\d)?"
    r"|(?<=\d-\d\d[ T])(?P<h4>\d\d)"  # 2020-01-31 13
    r")\s*(?P<zone>Z|[A-Z]{3,4}|(?:UTC|GMT)?[+-]\d{1,2}(?::?\d\d)?)?",
    re.IGNORECASE,
)
_ZONES = {  # hours before or after UTC; no others, because "IST" is three zones
    "Z": 0, "UTC": 0, "GMT": 0, "WET": 0, "WEST": 1, "BST": 1, "CET": 1, "CEST": 2, "MEZ": 1, "MESZ": 2, "EET": 2,
    "EEST": 3, "EST": -5, "EDT": -4, "CST": -6, "CDT": -5, "MST": -7, "MDT": -6, "PST": -8, "PDT": -7,
}  # fmt: skip
_WEEKDAY = re.compile(r"(mon|tue|wed|thu|fri|sat|sun)[a-z]*[.,]?\s+", re.IGNORECASE)
_BARE = re.compile(r"\s*[\d/.\-]+(?:[T ]\d\d?:\d\d(?::\d\d)?)?\s*")  # nothing to tidy up
_INTERVAL = re.compile(r"\s*(\S*\d.*:\d\d.*?|\S*\d{4}\S*) (?:-|to|/) (?:.*:\d\d.*|\S*\d{4}\S*)")
_HAS_DIGIT = re.compile(r"\d")

# Formats of a day or a month, and whether the day comes first, where that may be open. Those of the second row are
# tried where none of the first fits all cells.
_FORMATS: tuple[dict[str, bool | None], ...] = (
    {
        "%Y-%m-%d": None, "%Y/%m/%d": None, "%Y.%m.%d": None, "%Y %m %d": None, "%Y%m%d": None, "%Y-%m": None,
        "%Y/%m": None, "%Y %m": None, "%Y%m": None, "%m/%Y": None, "%m-%Y": None, "%m.%Y": None, "%m %Y": None,
        "%d.%m.%Y": True, "%d/%m/%Y": True, "%d-%m-%Y": True, "%d %m %Y": True,
        "%m/%d/%Y": False, "%m-%d-%Y": False, "%m %d %Y": False,
        "%d.%m.%y": True, "%d/%m/%y": True, "%d-%m-%y": True, "%m/%d/%y": False, "%m-%d-%y": False,
        "%d-%b-%Y": None, "%d %b %Y": None, "%d-%B-%Y": None, "%d %B %Y": None, "%d%b%Y": None, "%d/%b/%Y": None,
        "%d. %b %Y": None, "%d. %B %Y": None, "%d-%b-%y": None, "%d %b %y": None, "%d%b%y": None,
        "%b %d %Y": None, "%B %d %Y": None, "%Y-%b-%d": None, "%Y %b %d": None, "%Y %B %d": None, "%Y%b%d": None,
        "%b-%Y": None, "%b %Y": None, "%B %Y": None, "%B-%Y": None, "%b/%Y": None, "%b%Y": None, "%Y-%b": None,
        "%Y %b": None, "%Y %B": None, "%Y%b": None, "%b-%y": None, "%b %y": None, "%b%y": None, "%b'%y": None,
        "%Y-%j": None, "%Y%j": None, "%Y": None,
    },
    {"%m.%d.%Y": False},
)  # fmt: skip
_WIDTHS = {"%Y%m%d": 8, "%Y%m": 6, "%Y%j": 7, "%Y-%j": 8, "%Y": 4}  # strptime is lax


class AmbiguousDatesError(ValueError):
    """Day and month cannot be told apart."""


class Dates(NamedTuple):
    """Dates of a column.

    Attributes:
        values: NaT where a cell is no date.
        notes: how they were read, where another reading was possible.
        wall: the same by the clock on the wall, where the cells have offsets from UTC; else None.
    """

    values: pd.DatetimeIndex
    notes: tuple[str, ...] = ()
    wall: pd.DatetimeIndex | None = None


def parse_dates(cells: pd.Series, dayfirst: bool | None = None) -> Dates:
    """Dates of texts; where they have offsets, in UTC.

    Raises:
        AmbiguousDatesError: day or month first is open, and nothing decides it.
    """
    texts = [_tidy(str(x)) for x in cells]
    days, clock, offset = [], np.zeros(len(texts)), np.full(len(texts), np.nan)
    for k, text in enumerate(texts):
        day, seconds, zone = _time_of_day(text)
        days.append(day)
        clock[k], offset[k] = seconds, zone
    zoned = ~np.isnan(offset)
    shift = pd.to_timedelta(clock, unit="s")

    def whole(values: pd.DatetimeIndex) -> pd.DatetimeIndex:
        return values + shift - pd.to_timedelta(np.where(zoned, offset, 0.0), unit="s")

    readings = _readings(days, dayfirst)
    most = max((int((~v.isna()).sum()) for _, v in readings), default=0)
    best = [(order, v) for order, v in readings if (~v.isna()).sum() == most] if most else []
    if not best:
        return Dates(pd.DatetimeIndex([pd.NaT] * len(texts)))
    (order, values), note = _most_regular(best, whole) if most == len(texts) else (best[0], "")
    notes = (note,) if note else ()
    if not zoned.any():
        return Dates(_seconds(values + shift), notes)
    found = values.where(zoned)  # an offset in some rows only: the others are no instants
    return Dates(_seconds(whole(found)), notes, _seconds(found + shift))


def _seconds(values: pd.DatetimeIndex) -> pd.DatetimeIndex:
    """Microseconds where there are fractions of a second, else seconds."""
    return values.round("us").as_unit("us")


def _tidy(text: str) -> str:
    if _BARE.fullmatch(text):
        return text.strip()
    both = _INTERVAL.fullmatch(text)  # a step from ... to ... is labelled by its start
    text = both[1] if both else text
    text = _WEEKDAY.sub("", re.sub(r"\s+", " ", text.strip()), count=1)
    text = re.sub(r"(?<=\d)(st|nd|rd|th)\b", "", text)
    text = re.sub(r"\b([A-Za-z]{3,4})\.(?=[ -]|\d|$)", r"\1", text)  # "Jan. 2020"
    text = re.sub(r"\bsept\b", "Sep", text, flags=re.IGNORECASE)
    return re.sub(r"(?<=[A-Za-z0-9]),(?= |\d{4})", "", text)


def _time_of_day(text: str) -> tuple[str, float, float]:
    """The date of a text, seconds of the day (24:00 is a day), and seconds from UTC (NaN where there is none)."""
    match = _CLOCK.fullmatch(text)
    zone = float("nan")
    if match is None:
        plain = re.fullmatch(r"(\d{4}-?\d\d-?\d\d)(Z)", text)  # a day of UTC
        return (plain[1], 0.0, 0.0) if plain else (text, 0.0, zone)
    g = match.groupdict()
    hour = int(g["h"] or g["h2"] or g["h3"] or g["h4"])
    half = (g["half"] or g["half2"] or "").replace(".", "").lower()
    if g["zone"]:
        zone = _offset(g["zone"].upper())
        if np.isnan(zone):
            return f"no date: {text}", 0.0, zone
    if hour > (12 if half else 24) or int(g["m"] or g["m3"] or 0) > 59:
        return f"no date: {text}", 0.0, zone
    if half:
        hour = hour % 12 + (12 if half == "pm" else 0)
    seconds = hour * 3600 + int(g["m"] or g["m3"] or 0) * 60 + float((g["s"] or g["s3"] or "0").replace(",", "."))
    return g["date"].strip(" ,"), seconds, zone


def _offset(zone: str) -> float:
    if zone in _ZONES:
        return 3600.0 * _ZONES[zone]
    match = re.fullmatch(r"(?:UTC|GMT)?([+-])(\d{1,2}):?(\d\d)?", zone)
    if match is None:
        return float("nan")
    seconds = 3600.0 * int(match[2]) + 60.0 * int(match[3] or 0)
    return -seconds if match[1] == "-" else seconds


def time_of_day(cells: pd.Series) -> np.ndarray | None:
    """Seconds of the day of a column of times without a date, 18:00 or 18.00.00; None where it has anything else."""
    cells = cells.astype(str).str.replace(r"^\s*(\d{1,2})\.(\d\d)\.(\d\d)\s*$", r"\1:\2:\3", regex=True)
    found = [_time_of_day(str(x).strip()) for x in cells]
    if any(day or not _CLOCK.fullmatch(str(x).strip()) for (day, _, _), x in zip(found, cells, strict=True)):
        return None
    return np.array([seconds for _, seconds, _ in found])


# Ways of writing a day


def _readings(texts: list[str], dayfirst: bool | None) -> list[tuple[bool | None, pd.DatetimeIndex]]:
    """Every reading that fits at least half of the texts, with whether it takes the day first."""
    series = pd.Series(texts, dtype=object).where([bool(_HAS_DIGIT.search(x)) for x in texts], "")
    sample = series.iloc[np.unique(np.linspace(0, len(series) - 1, 40).astype(int))]
    found: list[tuple[bool | None, pd.DatetimeIndex]] = []
    for form, build in _SPECIAL:
        if 2 * sum(form.fullmatch(x) is not None for x in sample) >= len(sample):
            found.append((None, pd.DatetimeIndex([_built(form.fullmatch(x), build) for x in series])))
    for tier in _FORMATS:
        for form, order in tier.items():
            if dayfirst is not None and order is not None and order != dayfirst:
                continue
            if 2 * (~_by_format(sample, form).isna()).sum() >= len(sample):
                found.append((order, _by_format(series, form)))
        if any(not v.isna().any() for _, v in found):
            break
    return found


def _by_format(texts: pd.Series, form: str) -> pd.DatetimeIndex:
    width = _WIDTHS.get(form)
    fits = texts if width is None else texts.where(texts.str.len() == width, "")
    values = pd.to_datetime(fits, format=form, errors="coerce")
    return pd.DatetimeIndex(values).as_unit("us")


def _most_regular(
    best: list[tuple[bool | None, pd.DatetimeIndex]], whole: Callable[[pd.DatetimeIndex], pd.DatetimeIndex]
) -> tuple[tuple[bool | None, pd.DatetimeIndex], str]:
    """Of the readings of all cells the one with equal steps, and a word on that where another was possible."""
    different: list[tuple[bool | None, pd.DatetimeIndex]] = []
    for order, values in best:
        if not any(values.equals(other) for _, other in different):
            different.append((order, values))
    if len(different) == 1:
        return different[0], ""
    ranks = [_regularity(whole(values)) for _, values in different]
    top = [reading for reading, rank in zip(different, ranks, strict=True) if rank == max(ranks)]
    if len(top) > 1 or max(ranks) < 0:
        raise AmbiguousDatesError(
            f"day and month cannot be told apart ({top[0][1][0].date()} or {top[-1][1][0].date()}?). Write the dates "
            "as YYYY-MM-DD, or say which comes first: `dayfirst=True` (`--dayfirst yes`) or `dayfirst=False` "
            "(`--dayfirst no`)."
        )
    chosen = top[0]
    first = {True: "the day first", False: "the month first", None: "the year first"}[chosen[0]]
    return chosen, f"the dates were read with {first}, because their steps are then equal (`dayfirst=` says otherwise)"


def _regularity(values: pd.DatetimeIndex) -> int:
    """2: equal steps; 1: equal steps with absent rows; -1: neither. Newest first counts as its reverse.

    Days that repeat, with a time of day in another column, count once.
    """
    values = values[np.append(True, values[1:] != values[:-1])]
    values = values[::-1] if len(values) > 1 and values[0] > values[-1] else values
    grid = grid_of(as_labels("time", values))
    return -1 if grid is None else 1 if grid.absent else 2


def _built(match: re.Match[str] | None, build: Callable[..., str]) -> pd.Timestamp:
    if match is None:
        return pd.NaT  # pyright: ignore[reportReturnType]
    try:
        return pd.Timestamp(build(*[x for x in match.groups() if x is not None]))
    except ValueError:
        return pd.NaT  # pyright: ignore[reportReturnType]


def _month(year: str, month: int) -> str:
    return f"{int(year):04d}-{month:02d}-01"


def iso_week(year: str, week: str, day: str = "1") -> str:
    """The date of a day (Monday by default) of a week of ISO 8601."""
    return f"{np.datetime64(pd.Timestamp.fromisocalendar(int(year), int(week), int(day)), 'D')}"


def _century(year: str) -> str:
    """A year of two digits, as `strptime` has it: 69 is 1969, 68 is 2068."""
    return str(int(year) + (1900 if int(year) > 68 else 2000))


def _season(first: str, second: str) -> str:
    """The first year of 1999/00 or 1999-2000."""
    if (int(first) + 1) % 10 ** len(second) != int(second):
        raise ValueError("not the year after")
    return _month(first, 1)


_SPECIAL: tuple[tuple[re.Pattern[str], Callable[..., str]], ...] = tuple(
    (re.compile(form, re.IGNORECASE), build)
    for form, build in (
        (r"(\d{4})[-: /]?Q([1-4])", lambda y, q: _month(y, 3 * int(q) - 2)),
        (r"Q([1-4])[-: /']?(\d{4})", lambda q, y: _month(y, 3 * int(q) - 2)),
        (r"([1-4])Q[-: /']?(\d{4})", lambda q, y: _month(y, 3 * int(q) - 2)),
        (r"Q([1-4])[-: /']?(\d\d)", lambda q, y: _month(_century(y), 3 * int(q) - 2)),
        (r"([1-4])Q[-: /']?(\d\d)", lambda q, y: _month(_century(y), 3 * int(q) - 2)),
        (r"(\d{4}):([1-4])", lambda y, q: _month(y, 3 * int(q) - 2)),
        (r"(\d{4}):(\d\d)", lambda y, m: _month(y, int(m))),
        (r"(\d{4})[-: ]?M(\d{1,2})", lambda y, m: _month(y, int(m))),
        (r"M(\d{1,2})[-: /]?(\d{4})", lambda m, y: _month(y, int(m))),
        (r"(\d{4})[-: /]?[HS]([12])", lambda y, h: _month(y, 6 * int(h) - 5)),
        (r"[HS]([12])[-: /]?(\d{4})", lambda h, y: _month(y, 6 * int(h) - 5)),
        (r"(\d{4})[- /]?(?:W|KW|week ?)(\d{1,2})", iso_week),
        (r"(\d{4})-?W(\d\d)-?([1-7])", iso_week),
        (r"(?:W|KW|week) ?(\d{1,2})[- /]+(\d{4})", lambda w, y: iso_week(y, w)),
        (r"(\d{4})[/-](\d{2}|\d{4})", _season),
        (r"FY ?(\d{4})", lambda y: _month(y, 1)),
    )
)
