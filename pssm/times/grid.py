"""The even grid that labels of time stand on, by the calendar of pandas, and the labels of the steps after them.

Month ends, business days, hours over a clock change: pandas' offsets name the grid, and labels go on by them. What
stands on no grid is never continued.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pssm.times.labels import as_labels, quoted, shown

# Observations in a season, by the step: (months, days, hours).
SEASONS = {(1, 0, 0): 12.0, (3, 0, 0): 4.0, (0, 7, 0): 365.25 / 7, (0, 1, 0): 7.0, (0, 0, 1): 24.0}
BUSINESS_WEEK = 5.0
_TICKS = {"s": 86_400, "ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}  # in a day
_DAYS = ("%Y-%m-%d", "%Y/%m/%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d %b %Y", "%d-%b-%Y", "%d %B %Y", "%Y%m%d")
_MONTHS = ("%Y-%m", "%Y/%m", "%m/%Y", "%b %Y", "%b-%Y", "%B %Y")
_CLOCKS = (" %H:%M", "T%H:%M", " %H:%M:%S", "T%H:%M:%S")
_FORMS = (*_DAYS, *_MONTHS, *(day + clock for day in _DAYS[:5] for clock in _CLOCKS))  # of texts that go on as texts


class Grid(NamedTuple):
    """An even grid of times, on which some rows may be absent.

    Attributes:
        step: a pandas offset for dates, a number for numbers.
        words: the step in words: "month", "3 months", "business day".
        period: observations in a season; None where it is not known.
        absent: grid points without a row between the first row and the last.
        gap: the first row that has absent rows before it; 0 where there is none.
    """

    step: Any
    words: str
    period: float | None = None
    absent: int = 0
    gap: int = 0


def grid_of(labels: Any) -> Grid | None:
    """The grid that labels (of `as_labels`) stand on; None where there is none, as for words or fewer than two rows."""
    if len(labels) < 2:
        return None
    if isinstance(labels, pd.PeriodIndex):
        each = np.diff(labels.asi8)
        if (each <= 0).any():
            return None
        start = grid_of(labels.to_timestamp())
        gap = _first(each > 1)
        return Grid(1, f"period ({labels.freqstr})", start and start.period, int((each - 1).sum()), gap)
    if isinstance(labels, pd.DatetimeIndex):
        if not (labels.is_monotonic_increasing and labels.is_unique):
            return None
        return _named(labels) or _business_days(labels) or _months(labels) or _fixed(labels)
    values = np.asarray(labels)
    if values.dtype.kind == "M":
        return grid_of(pd.DatetimeIndex(values))
    if values.dtype.kind in "US":
        dates = _as_dates(values)
        return None if dates is None else grid_of(dates[0])
    return _even_numbers(values) if values.dtype.kind in "iuf" else None


def _named(index: pd.DatetimeIndex) -> Grid | None:
    """A grid that pandas has a name for, without a gap."""
    if len(index) < 3:
        return None
    with pd.option_context("future.infer_freq_returns_offset", True):
        found: Any = pd.infer_freq(index)
    if found is None:
        halves = (pd.offsets.SemiMonthBegin(), pd.offsets.SemiMonthEnd())
        found = next((o for o in halves if (_following(index[0], o, len(index) - 1) == index[1:]).all()), None)
        return None if found is None else Grid(found, "half month", 24.0)
    if isinstance(found, pd.offsets.Tick | pd.offsets.Day):
        return _fixed(index)
    if not (_following(index[0], found, len(index) - 1) == index[1:]).all():
        return None
    if isinstance(found, pd.offsets.Week):
        return Grid(found, "week", SEASONS[0, 7, 0]) if found.n == 1 else Grid(found, f"{found.n} weeks")
    if isinstance(found, pd.offsets.BusinessDay):
        return Grid(found, "business day", BUSINESS_WEEK)
    months = int(np.median(np.diff(index.year * 12 + index.month)))
    return Grid(found, _month_words(months), SEASONS.get((months, 0, 0)))


def _business_days(index: pd.DatetimeIndex) -> Grid | None:
    """Days from Monday to Friday of which a few (holidays) are absent."""
    wall = index.tz_localize(None)
    days = wall.normalize()
    step = np.diff(days.to_numpy().astype("datetime64[D]")).astype(int)
    if len(index) < 5 or (days != wall).any() or (wall.day_of_week > 4).any() or not (step > 2).any():
        return None
    dates = days.to_numpy().astype("datetime64[D]")
    each = np.busday_count(dates[:-1], dates[1:])
    if (each == 1).mean() <= 0.5:
        return None
    return Grid(pd.offsets.BDay(), "business day", BUSINESS_WEEK, int((each - 1).sum()), _first(each > 1))


def _months(index: pd.DatetimeIndex) -> Grid | None:
    """The same place in every month, or in every so many months."""
    wall = index.tz_localize(None)
    each = np.diff(wall.year * 12 + wall.month)
    if (each < 1).any() or (wall - wall.normalize()).nunique() > 1:
        return None
    step = int(np.gcd.reduce(each))
    last = int(wall.day.max())  # the 30th of each month is the last day of February
    if bool(wall.is_month_end.all()):
        offset: Any = pd.offsets.MonthEnd(step)
    elif (wall.day == np.minimum(last, wall.days_in_month)).all():
        offset = pd.DateOffset(months=step) if last <= 28 else pd.DateOffset(months=step, day=last)
    else:
        business = (pd.offsets.BMonthEnd(step), pd.offsets.BMonthBegin(step))
        offset = next((o for o in business if all(o.is_on_offset(x) for x in wall)), None)
    if offset is None or (each == step).mean() <= 0.5:
        return None
    absent = int((each // step - 1).sum())
    return Grid(offset, _month_words(step), SEASONS.get((step, 0, 0)), absent, _first(each > step))


def _fixed(index: pd.DatetimeIndex) -> Grid | None:
    """Whole days of the calendar, or a fixed time; days of a time zone may have 23 or 25 hours."""
    wall = index.tz_localize(None)
    daily = (wall - wall.normalize()).nunique() == 1
    times = wall if daily or index.tz is None else index
    each = np.diff(times.asi8)
    step, day = int(np.gcd.reduce(each)), _TICKS[times.unit]
    if (each == step).mean() <= 0.5:
        return None
    absent, gap = int((each // step - 1).sum()), _first(each > step)
    days, rest = divmod(step, day)
    if not rest:
        weeks = days % 7 == 0
        words = _count(days // 7, "week") if weeks else _count(days, "day")
        return Grid(pd.DateOffset(days=days), words, SEASONS.get((0, days, 0)), absent, gap)
    hours, rest = divmod(step, day // 24)
    words = str(pd.Timedelta(step, times.unit)).removeprefix("0 days ") if rest else _count(hours, "hour")
    return Grid(pd.Timedelta(step, times.unit), words, None if rest else SEASONS.get((0, 0, hours)), absent, gap)


def _even_numbers(values: np.ndarray) -> Grid | None:
    """Numbers within a tenth of a step of an even grid: written numbers are rounded (1958.0417, 1958.125)."""
    values = np.asarray(values, float)
    each = np.diff(values)
    if not np.isfinite(values).all() or (each <= 0).any():
        return None
    step = float((values[-1] - values[0]) / (len(values) - 1))
    if np.abs(values - np.linspace(values[0], values[-1], len(values))).max() <= 0.1 * step:
        return Grid(_nice(step), f"step {_nice(step):.6g}")
    step = float(np.median(each))
    count = np.round(each / step)
    if (count < 1).any() or np.abs(each / step - count).max() > 0.1 or (count == 1).mean() <= 0.5:
        return None
    return Grid(_nice(step), f"step {_nice(step):.6g}", None, int((count - 1).sum()), _first(count > 1))


def _nice(step: float) -> float:
    """A step that rounding has changed a little: a whole number, or a part of one (1/12)."""
    for whole in (step, 1 / step):
        if round(whole) and abs(whole - round(whole)) < 1e-3 * whole and (round(whole) < 400 or whole == round(whole)):
            return float(round(whole)) if whole is step else 1 / round(whole)
    return step


def _first(gap: np.ndarray) -> int:
    return int(np.argmax(gap)) + 1 if np.any(gap) else 0


def _month_words(months: int) -> str:
    return _count(months // 12, "year") if months % 12 == 0 else {3: "quarter"}.get(months, _count(months, "month"))


def _count(number: int, unit: str) -> str:
    return unit if number == 1 else f"{number} {unit}s"


def uneven(labels: Any) -> str:
    """What is uneven about the spacing of labels, in words; "" where it is even or labels are words."""
    grid = grid_of(labels)
    if grid is None:
        dated = isinstance(labels, pd.DatetimeIndex | pd.PeriodIndex) or np.asarray(labels).dtype.kind in "iufM"
        if len(labels) < 2 or not dated:
            return ""
        return "is not equally spaced; its rows are treated as equally spaced, and the times are kept as labels"
    if not grid.absent:
        return ""
    rows = "1 row is absent" if grid.absent == 1 else f"{grid.absent} rows are absent"
    return (
        f"goes by the {grid.words}, but {rows}, the first between {shown(labels[grid.gap - 1])} and "
        f"{shown(labels[grid.gap])}; the rows that are there are treated as equally spaced. Add the absent rows with "
        "an empty value (missing)"
    )


# The labels of the future


def labels_after(labels: Any, horizon: int, name: str = "time") -> Any:
    """Labels of the `horizon` steps after those given, of the same kind, by the grid that they stand on.

    Args:
        labels: what `as_labels` takes.
        horizon: number of steps.
        name: of the argument, for the error.

    Raises:
        ValueError: the labels stand on no grid.
    """
    found = as_labels(name, labels)
    if len(found) < 2:
        return np.arange(1, horizon + 1)
    if not isinstance(found, pd.Index) and found.dtype.kind in "US":
        dates = _as_dates(found)
        if dates is not None:
            return np.array([dates[1](x) for x in labels_after(dates[0], horizon, name)])
    grid = grid_of(found)
    if grid is None:
        examples = f"{shown(found[0])}, {shown(found[1])}, ..., {shown(found[-1])}"
        raise ValueError(
            f"{quoted(name)} cannot be continued: the labels ({examples}) are not equally spaced. "
            "Pass the labels of the forecast as `future_time`."
        )
    if isinstance(found, pd.PeriodIndex):
        return pd.period_range(found[-1] + 1, periods=horizon, freq=found.freq)
    if isinstance(found, pd.DatetimeIndex):
        return _following(found[-1], grid.step, horizon)
    if found.dtype.kind == "M":
        return _following(pd.Timestamp(found[-1]), grid.step, horizon).to_numpy().astype(found.dtype)
    after = found[-1] + np.arange(1, horizon + 1) * grid.step
    if found.dtype.kind in "iu" and float(grid.step).is_integer():
        return after.astype(found.dtype)
    return np.round(after, max(0, 10 - int(np.floor(np.log10(grid.step)))))


def future_labels(labels: Any, horizon: int) -> Any:
    """`labels_after`; where labels cannot be continued, the numbers of the steps, with a warning."""
    try:
        return labels_after(labels, horizon)
    except ValueError as error:
        warnings.warn(f"{error} Until then its steps are numbered 1, 2, ...", stacklevel=3)
        return np.arange(1, horizon + 1)


def _following(start: pd.Timestamp, step: Any, count: int) -> pd.DatetimeIndex:
    found = [start]
    for _ in range(count):
        found.append(found[-1] + step)
    return pd.DatetimeIndex(found[1:])


def _as_dates(texts: np.ndarray) -> tuple[Any, Any] | None:
    """Texts that are dates, all of one form, and the function that writes a date in that form; None for other texts.

    Of two forms that fit (day or month first) the one is meant whose dates stand on a grid.
    """
    found = []
    try:
        quarters = pd.PeriodIndex([str(x).upper() for x in texts], freq="Q") if "Q" in str(texts[0]).upper() else None
    except ValueError:
        quarters = None
    if quarters is not None and [str(x) for x in quarters] == [str(x).upper() for x in texts]:
        return quarters, str
    for form in _FORMS:
        dates = pd.DatetimeIndex(pd.to_datetime(pd.Series(texts[:1]), format=form, errors="coerce"))
        if not dates.hasnans:
            dates = pd.DatetimeIndex(pd.to_datetime(pd.Series(texts), format=form, errors="coerce"))
        if not dates.hasnans and list(dates.strftime(form)) == list(texts) and grid_of(dates) is not None:
            found.append((dates, form))
    if len(found) != 1:
        return None
    dates, form = found[0]
    return dates, lambda date: date.strftime(form)
