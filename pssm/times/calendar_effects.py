"""What the calendar knows of a series: holidays, trading days, and the steps at which something happened.

The results are for the models: frames to be given as regressors `u`, whose columns have names, and interventions as
numbers of steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pssm._types import ArrayLike
from pssm.times.labels import as_labels, check_increasing, shown

__all__ = ["holidays", "interventions", "trading_days"]

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday")
DAY, MONTH = np.timedelta64(1, "D"), np.timedelta64(1, "M")


def holidays(
    time: ArrayLike | pd.Index,
    dates: Mapping[str, Any] | pd.Series,
    *,
    before: int = 0,
    after: int = 0,
    each: bool = True,
) -> pd.DataFrame:
    """Regressors for holidays: the number of days of each holiday in every step of a series.

    A step of a month or a week holds all of its days; in a daily series the numbers are 0 and 1, and in a series of
    hours each hour of the day counts one. Labels at the first of a month are starts of steps, those at the last one are
    ends, and those of weeks are the last days of the weeks, as pandas makes them; a `PeriodIndex` leaves no question.

    Args:
        time: the times of the steps, those of the forecast included: a `DatetimeIndex`, a `PeriodIndex`, dates.
        dates: the days of each holiday, by name, `{"easter": ["2023-04-09", "2024-03-31"]}`; or a series of names with
            the dates as index, as the calendars of pandas and of the package `holidays` have it. Give those of the
            future too: a date that is absent is no holiday.
        before: days before the holiday that have an effect of their own.
        after: days after it, likewise.
        each: a column for each of these days, `easter-1`, `easter`, `easter+1`; otherwise one, which counts them all.

    Returns:
        A frame with the index of `time`. A holiday without a date among them has a column of zeros.

    Raises:
        ValueError: times are not dates or do not increase, do not say which days a step has, or a date cannot be read.

    Example:
        >>> days = pd.date_range("2024-03-29", periods=5)
        >>> holidays(days, {"easter": ["2024-03-31"]}, after=1).T
                  2024-03-29  2024-03-30  2024-03-31  2024-04-01  2024-04-02
        easter           0.0         0.0         1.0         0.0         0.0
        easter+1         0.0         0.0         0.0         1.0         0.0

    Source:
        Effects of days about a holiday: Bell & Hillmer 1983; Taylor & Letham 2018.
    """
    for name, days in (("before", before), ("after", after)):
        if isinstance(days, bool) or not isinstance(days, int | np.integer) or days < 0:
            raise ValueError(f"`{name}` must be a number of days, 0 or more; got {days!r}.")
    index = _dates(time)
    first, last = _spans(index)
    columns = {}
    for name, found in _by_name(dates).items():
        shifts = {f"{name}{k:+d}" if k else name: found + k * DAY for k in range(-before, after + 1)}
        counts = {label: _days_within(days, first, last) for label, days in shifts.items()}
        columns |= counts if each else {name: np.sum(list(counts.values()), axis=0)}
    return pd.DataFrame(columns, index=index)


def trading_days(time: ArrayLike | pd.Index) -> pd.DataFrame:
    """Regressors for the days of the week in months or quarters: six contrasts, and leap February.

    `monday` is the number of Mondays in the month minus that of Sundays, and so on; a coefficient is the effect of one
    such day more in place of a Sunday. `leap_february` is 0.75 in February of a leap year and -0.25 in others. All are
    0 on average over the calendar. Give them as `u` with `u_origin=0`; with `moving=True` as well they change slowly.

    Args:
        time: times of the months or quarters, those of the forecast included.

    Returns:
        A frame with the index of `time` and seven columns.

    Raises:
        ValueError: times are not dates, do not increase, or their steps are shorter than a month.

    Example:
        >>> trading_days(pd.period_range("2024-02", periods=2, freq="M")).iloc[:, [0, 3, 6]]
                 monday  thursday  leap_february
        2024-02     0.0       1.0           0.75
        2024-03    -1.0      -1.0           0.00

    Source:
        Bell & Hillmer 1983, "Modeling time series with calendar variation".
    """
    index = _dates(time)
    first, last = _spans(index)
    stop = last + DAY
    length = (stop - first).astype(int)
    if (length < 28).any():
        raise ValueError(
            f"`time` must have steps of a month or longer; got one of {length.min()} days. For daily data take "
            "`seasonal=7`."
        )
    sundays = np.busday_count(first, stop, weekmask="Sun")
    columns: dict[str, np.ndarray] = {
        day: np.busday_count(first, stop, weekmask=day[:3].capitalize()) - sundays for day in DAYS
    }
    months = [pd.period_range(a, b, freq="M") for a, b in zip(first, last, strict=True)]
    columns["leap_february"] = np.array(
        [np.where(m.month == 2, np.where(m.is_leap_year, 0.75, -0.25), 0.0).sum() for m in months]
    )
    return pd.DataFrame(columns, index=index, dtype=float)


def interventions(time: ArrayLike | pd.Index, table: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
    """Interventions with dates (or other labels) as those with numbers of steps, which `pssm.models.structural` takes.

    A label that stands for no step means the first step after it, so that a law of 31 January 1983 begins in a monthly
    series with the first month that is labelled by that day or a later one. A "pulse" is at a step that has the label.

    Args:
        time: labels of the steps, such as the index of the data; with those of the forecast if an event is there.
        table: `{"law": ("step", "1983-01-31"), "strike": ("pulse", "1974-01-01", "1974-03-31")}`.

    Returns:
        The same with numbers of steps, 0 for the first.

    Raises:
        ValueError: a label cannot be read, or lies outside of `time`.

    Example:
        >>> months = pd.date_range("1982-01-31", periods=24, freq="ME")
        >>> interventions(months, {"law": ("step", "1983-01-31"), "jam": ("pulse", "1982-03-01", "1982-04-30")})
        {'law': ('step', 12), 'jam': ('pulse', 2, 3)}
    """
    index = pd.Index(as_labels("time", time))
    check_increasing("time", index if isinstance(index, pd.DatetimeIndex | pd.PeriodIndex) else np.asarray(index))
    found = {}
    for name, spec in table.items():
        kind, *labels = [spec] if isinstance(spec, str) else spec
        exact = kind == "pulse" and len(labels) == 1
        # a pulse from one label to another ends at the last step that is not behind the second
        sides = ["left", "right" if kind == "pulse" else "left"]
        found[name] = (kind, *(_position(name, index, x, s, exact) for x, s in zip(labels, sides, strict=False)))
    return found


def _position(name: str, index: pd.Index, label: Any, side: str, exact: bool) -> int:
    """The number of the first step at or after a label; with `side` "right" that of the last one not behind it."""
    try:
        if isinstance(index, pd.PeriodIndex):
            begin = end = pd.Period(label, freq=index.freq)
        elif isinstance(index, pd.DatetimeIndex):
            begin = pd.Timestamp(label)
            begin = begin.tz_localize(index.tz) if begin.tz is None and index.tz is not None else begin
            end = begin
        elif index.dtype.kind in "iuf":
            begin = end = float(label)
        else:
            begin = end = label
            exact = True
    except (ValueError, TypeError) as error:
        raise ValueError(f"`table` {name!r}: {label!r} cannot be read as a label of `time`: {error}") from None
    if exact:
        if begin not in index:
            raise ValueError(f"`table` {name!r}: there is no step {label!r} in `time`. Give the label of one.")
        return int(index.get_loc(begin))
    place = int(index.searchsorted(end, side=side)) - (side == "right")
    if not 0 <= place < len(index) or begin < index[0]:
        raise ValueError(
            f"`table` {name!r}: {label!r} lies outside of `time`, {shown(index[0])} to {shown(index[-1])}. Labels of "
            "the future may be among them."
        )
    return place


# ---------------------------------------------------------------------------------------------------------------------


def _dates(time: Any) -> pd.DatetimeIndex | pd.PeriodIndex:
    """Times that are dates, on the clock of the wall."""
    index = as_labels("time", time)
    if not isinstance(index, pd.DatetimeIndex | pd.PeriodIndex):
        try:
            if np.asarray(index).dtype.kind in "iufb":
                raise ValueError("numbers are no dates")
            index = pd.DatetimeIndex(pd.to_datetime(np.asarray(index)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"`time` must be dates; got {str(np.asarray(index)[:1])}: {error}.") from None
    check_increasing("time", index)
    return index


def _spans(index: pd.DatetimeIndex | pd.PeriodIndex) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last day of every step."""
    if isinstance(index, pd.PeriodIndex):
        return tuple(np.asarray(x.normalize(), "datetime64[D]") for x in (index.start_time, index.end_time))
    wall = pd.DatetimeIndex(np.asarray(index.tz_localize(None)))  # without a frequency, which pandas may not know
    days = np.asarray(wall.normalize(), "datetime64[D]")
    gaps = np.diff(days).astype(int)
    if not len(gaps) or gaps.min() < 7:  # days, parts of days, and days of which some are absent
        return days, days
    if gaps.min() >= 28:
        months = int(np.gcd.reduce(np.diff(wall.year * 12 + wall.month)))
        month = days.astype("datetime64[M]")
        if (wall.day == 1).all():
            return days, (month + months * MONTH).astype("datetime64[D]") - DAY
        if wall.is_month_end.all() or months == 1:
            return (month - (months - 1) * MONTH).astype("datetime64[D]"), (month + MONTH).astype("datetime64[D]") - DAY
    elif not (gaps % 7).any():
        return days - (int(np.gcd.reduce(gaps)) - 1) * DAY, days
    raise ValueError(
        f"`time` does not say which days a step has: its labels are {gaps.min()} days apart or more, such as "
        f"{shown(index[0])}, {shown(index[1])}. Give a `PeriodIndex`."
    )


def _days_within(days: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """How many of the days are in each of the steps."""
    days = np.sort(days)
    return (np.searchsorted(days, last, "right") - np.searchsorted(days, first, "left")).astype(float)


def _by_name(dates: Any) -> dict[str, np.ndarray]:
    """The days of each holiday, each once."""
    if isinstance(dates, pd.Series):
        dates = {str(name): group.index for name, group in dates.groupby(dates)}
    if not isinstance(dates, Mapping) or not dates:
        raise ValueError('`dates` must be a table such as {"easter": ["2024-03-31"]}, or a series of names by date.')
    found = {}
    for name, days in dates.items():
        try:
            index = pd.DatetimeIndex(pd.to_datetime([days] if isinstance(days, str) else list(days)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"`dates` of {name!r} cannot be read: {error}") from None
        found[str(name)] = np.unique(np.asarray(index.tz_localize(None).normalize(), "datetime64[D]"))
    return found
