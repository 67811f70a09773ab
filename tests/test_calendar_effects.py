"""Regressors of the calendar: holidays, trading days, and dates of interventions; counted by hand."""

import calendar
import datetime as dt

import numpy as np
import pandas as pd
import pytest

from pssm.datasets import holidays, interventions, trading_days

CHRISTMAS = {"christmas": ["2022-12-25", "2023-12-25", "2024-12-25"]}


def test_a_daily_series_with_days_around():
    days = pd.date_range("2022-12-20", "2023-12-31")
    found = holidays(days, CHRISTMAS, before=2, after=1)
    assert list(found.columns) == ["christmas-2", "christmas-1", "christmas", "christmas+1"]
    for column, day in zip(found, (23, 24, 25, 26), strict=True):
        ones = found.index[found[column] == 1]
        assert [str(x.date()) for x in ones] == [f"2022-12-{day}", f"2023-12-{day}"]
        assert found[column].sum() == 2
    together = holidays(days, CHRISTMAS, before=2, after=1, each=False)
    np.testing.assert_array_equal(together["christmas"], found.sum(axis=1))


@pytest.mark.parametrize(
    ("time", "counts"),
    [
        (pd.period_range("2023-11", periods=3, freq="M"), [0, 2, 0]),
        (pd.date_range("2023-11-01", periods=3, freq="MS"), [0, 2, 0]),
        (pd.date_range("2023-11-30", periods=3, freq="ME"), [0, 2, 0]),
        (pd.date_range("2023-11-15", periods=3, freq=pd.DateOffset(months=1)), [0, 2, 0]),
        (pd.DatetimeIndex(["2023-08-31", "2023-12-31", "2024-02-29"]), [0, 2, 0]),  # even months, one absent
        (pd.date_range("2023-03-31", periods=4, freq="QE"), [0, 0, 0, 2]),
        (pd.date_range("2023-01-01", periods=4, freq="QS"), [0, 0, 0, 2]),
        (pd.date_range("2022-12-31", periods=2, freq="YE"), [2, 2]),
        (pd.date_range("2023-12-17", periods=3, freq="W"), [0, 1, 1]),  # Monday to Sunday: the 24th, then the 25th
        (pd.date_range("2023-12-24 12:00", periods=3, freq="12h"), [1, 1, 1]),
        (pd.date_range("2023-12-24 23:00", periods=3, freq="h", tz="Europe/Berlin"), [1, 1, 1]),
        (pd.DatetimeIndex(["2023-12-22", "2023-12-25", "2023-12-27"]), [0, 1, 0]),  # days of which some are absent
        ([dt.date(2023, 12, 24), dt.date(2023, 12, 25)], [1, 1]),
        (["2023-12-25", "2023-12-26"], [1, 0]),
    ],
)
def test_days_of_every_kind_of_step(time, counts):
    found = holidays(time, CHRISTMAS, before=1, each=False)
    assert found["christmas"].tolist() == counts
    assert len(found.index) == len(counts)


def test_tables_of_other_libraries():
    names = pd.Series(["New Year", "Labour Day"], index=[dt.date(2024, 1, 1), dt.date(2024, 5, 1)])
    found = holidays(pd.date_range("2024-01-01", periods=366), names)
    assert found.sum().to_dict() == {"New Year": 1.0, "Labour Day": 1.0}
    from pandas.tseries.holiday import USFederalHolidayCalendar

    table = USFederalHolidayCalendar().holidays("2024-01-01", "2024-12-31", return_name=True)
    assert holidays(pd.period_range("2024-01", periods=12, freq="M"), table).to_numpy().sum() == len(table) == 11


def test_trading_days_by_hand():
    months = pd.period_range("1999-01", periods=12 * 28, freq="M")
    found = trading_days(months)
    for month in (months[1], months[13], months[100], months[-1]):
        weeks = calendar.monthcalendar(month.year, month.month)
        count = [sum(week[k] != 0 for week in weeks) for k in range(7)]
        assert found.loc[month].tolist()[:6] == [c - count[6] for c in count[:6]]
        leap = 0.0 if month.month != 2 else 0.75 if calendar.isleap(month.year) else -0.25
        assert found.loc[month, "leap_february"] == leap
    np.testing.assert_allclose(found.sum(), 0, atol=1e-12)  # 28 years: the whole cycle of the calendar
    ends = trading_days(months.to_timestamp(how="end").normalize())
    np.testing.assert_array_equal(ends, found)
    quarters = trading_days(pd.period_range("1999Q1", periods=4 * 28, freq="Q"))
    np.testing.assert_allclose(quarters.to_numpy()[0], found.to_numpy()[:3].sum(0))


def test_dates_of_interventions():
    months = pd.date_range("2020-01-31", periods=12, freq="ME")
    table = {
        "law": ("step", "2020-03"),
        "day": ("step", "2020-03-31"),
        "jam": ("pulse", "2020-03-15", "2020-05-31"),
        "one": ("pulse", "2020-07-31"),
        "phase": ("ramp", dt.date(2020, 3, 31), pd.Timestamp("2020-06-30")),
    }
    found = interventions(months, table)
    steps = {
        "law": ("step", 2),
        "day": ("step", 2),
        "jam": ("pulse", 2, 4),
        "one": ("pulse", 6),
        "phase": ("ramp", 2, 5),
    }
    assert found == steps
    assert interventions(months.to_period("M"), {"a": ("pulse", "2020-03")}) == {"a": ("pulse", 2)}
    assert interventions(np.arange(1900, 1920), {"a": ("step", 1910)}) == {"a": ("step", 10)}
    assert interventions(["a", "b", "c"], {"x": ("slope", "b")}) == {"x": ("slope", 1)}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: holidays(d, CHRISTMAS, before=-1), "`before` must be a number of days"),
        (lambda d: holidays(np.arange(5), CHRISTMAS), "`time` must be dates"),
        (lambda d: holidays(d[::-1], CHRISTMAS), "`time` must increase"),
        (lambda d: holidays(d, {}), "`dates` must be a table"),
        (lambda d: holidays(d, {"x": ["someday"]}), "`dates` of 'x' cannot be read"),
        (lambda d: holidays(pd.date_range("2020-01-01", periods=5, freq="10D"), CHRISTMAS), "Give a `PeriodIndex`"),
        (trading_days, "steps of a month or longer"),
        (lambda d: interventions(d, {"x": ("step", "1999-01-01")}), "lies outside of `time`"),
        (lambda d: interventions(d, {"x": ("step", "never")}), "cannot be read as a label"),
        (lambda d: interventions(d[::2], {"x": ("pulse", str(d[1].date()))}), "there is no step"),
    ],
)
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(pd.date_range("2023-12-20", periods=9))
