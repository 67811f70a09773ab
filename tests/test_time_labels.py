"""Labels of time: what is taken, the grid that they stand on, and the labels of the future by the calendar."""

import datetime as dt

import numpy as np
import pandas as pd
import pytest

from pssm.times.grid import future_labels, grid_of, labels_after, uneven
from pssm.times.labels import as_labels, check_increasing, label_array

# Frequencies of pandas, and the period that follows from them.
YEAR_OF_WEEKS = 365.25 / 7
FREQUENCIES = {
    **dict.fromkeys(("MS", "ME", "BME", "BMS", "WOM-3FRI"), 12.0),
    **dict.fromkeys(("QS", "QE", "QE-JAN", "BQE"), 4.0),
    **dict.fromkeys(("W-SUN", "W-WED"), YEAR_OF_WEEKS),
    **dict.fromkeys(("YS", "YE", "YE-JUN", "2MS", "2D", "2W-FRI", "4h", "30min", "15min", "s", "100ms", "ns"), None),
    **{"B": 5.0, "D": 7.0, "SMS": 24.0, "h": 24.0},
}


@pytest.mark.parametrize(("frequency", "period"), FREQUENCIES.items())
@pytest.mark.parametrize("zone", [None, "Europe/Berlin", "America/New_York"])
def test_labels_go_on(frequency, period, zone):
    """Each frequency over three years, over clock changes: the first part is continued as pandas continues it."""
    every = pd.date_range("2019-03-28", periods=60, freq=frequency, tz=zone)
    past, future = every[:30], every[30:]
    found = labels_after(past, 30)
    assert list(found) == list(future)
    grid = grid_of(past)
    assert (grid.period, grid.absent) == (period, 0)
    assert uneven(past) == ""
    if zone is None:  # the same from datetime64
        np.testing.assert_array_equal(labels_after(past.to_numpy(), 30), future.to_numpy())


LABELS = [
    ("middle of the month", ["2020-01-15", "2020-02-15", "2020-03-15"], ["2020-04-15", "2020-05-15"]),
    ("the 30th", ["2020-01-30", "2020-02-29", "2020-03-30", "2020-04-30"], ["2020-05-30", "2020-06-30"]),
    ("month ends from February on", ["2021-02-28", "2021-03-31", "2021-04-30"], ["2021-05-31", "2021-06-30"]),
    ("two month ends", ["2021-01-31", "2021-02-28"], ["2021-03-31", "2021-04-30"]),
    ("two quarter ends", ["2001-12-31", "2002-03-31"], ["2002-06-30", "2002-09-30"]),
    ("leap days", ["2012-02-29", "2016-02-29"], ["2020-02-29", "2024-02-29"]),
    ("two days", ["2020-02-28", "2020-02-29"], ["2020-03-01", "2020-03-02"]),
    ("a month is absent", ["2020-01-01", "2020-02-01", "2020-04-01", "2020-05-01"], ["2020-06-01", "2020-07-01"]),
]


@pytest.mark.parametrize(("past", "future"), [case[1:] for case in LABELS], ids=[case[0] for case in LABELS])
def test_dates_without_a_name_go_on(past, future):
    assert list(labels_after(pd.to_datetime(past), 2)) == list(pd.to_datetime(future))
    assert labels_after(past, 2).tolist() == future  # texts go on as texts


@pytest.mark.parametrize(
    ("past", "future"),
    [
        ([1990, 1991, 1992], [1993, 1994]),
        ([0, 2, 4], [6, 8]),
        ([0.1, 0.2, 0.3], [0.4, 0.5]),
        ([1.0, 1.5, 2.0], [2.5, 3.0]),
        ([7], [1, 2]),
        (np.round(1958 + (np.arange(30) + 0.5) / 12, 4), np.round(1958 + (np.arange(30, 32) + 0.5) / 12, 4)),
        ([1, 2, 4, 5, 6], [7, 8]),
    ],
)
def test_numbers_go_on(past, future):
    np.testing.assert_allclose(labels_after(np.asarray(past), 2), future, atol=1e-4)


@pytest.mark.parametrize(
    ("past", "future"),
    [
        (["2020Q3", "2020Q4"], ["2021Q1", "2021Q2"]),
        (["2020-11", "2020-12"], ["2021-01", "2021-02"]),
        (["Nov 2020", "Dec 2020"], ["Jan 2021", "Feb 2021"]),
        (["30/11/2020", "31/12/2020"], ["31/01/2021", "28/02/2021"]),
        (["2020-01-01 22:00", "2020-01-01 23:00"], ["2020-01-02 00:00", "2020-01-02 01:00"]),
        (["20201231", "20210101"], ["20210102", "20210103"]),
    ],
)
def test_texts_go_on_in_their_own_form(past, future):
    assert labels_after(past, 2).tolist() == future


def test_periods_and_dates_of_python():
    months = pd.period_range("2020-11", periods=3, freq="M")
    assert list(labels_after(months, 2)) == list(pd.period_range("2021-02", periods=2, freq="M"))
    days = [dt.date(2020, 1, 31), dt.date(2020, 2, 29), dt.date(2020, 3, 31)]
    assert list(labels_after(days, 1)) == [pd.Timestamp("2020-04-30")]


IRREGULAR = [
    pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-09"]),
    pd.to_datetime(["2020-01-01 10:00:01", "2020-01-01 10:00:59", "2020-01-01 10:02:03"]),
    np.array([1.0, 2.0, 9.0]),
    np.array(["spring", "summer", "autumn"]),
    np.array(["2020-01-01", "2020-01-02", "2020-01-09"]),
    np.array(["01/02/2020", "02/02/2020", "03/02/2020"]),  # days or months: not known
]


@pytest.mark.parametrize("labels", IRREGULAR, ids=str)
def test_irregular_times_are_never_continued_silently(labels):
    with pytest.raises(ValueError, match="cannot be continued.*`future_time`"):
        labels_after(labels, 3)
    with pytest.warns(UserWarning, match="cannot be continued.*`future_time`"):
        assert future_labels(labels, 3).tolist() == [1, 2, 3]


def test_absent_rows_are_named():
    months = pd.date_range("2020-01-31", periods=9, freq="ME").delete([3, 4])
    assert "goes by the month, but 2 rows are absent, the first between 2020-03-31 and 2020-06-30" in uneven(months)
    trading = pd.date_range("2020-01-01", periods=40, freq="B").delete([7])
    assert "goes by the business day, but 1 row is absent" in uneven(trading)
    assert "not equally spaced" in uneven(pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-09"]))
    assert uneven(np.array(["a", "b"])) == ""


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (pd.period_range("2020Q1", periods=2, freq="Q"), np.array(["2020-01-01", "2020-04-01"], "datetime64[D]")),
        (
            pd.date_range("2020-06-01", periods=2, tz="Europe/Berlin"),
            np.array(["2020-05-31T22", "2020-06-01T22"], "M8[s]"),
        ),
        ([dt.date(2020, 1, 1), dt.date(2020, 1, 2)], np.array(["2020-01-01", "2020-01-02"], "M8[D]")),
        ([dt.datetime(2020, 1, 1, tzinfo=dt.UTC)], np.array(["2020-01-01"], "M8[D]")),
        (["a", "b"], np.array(["a", "b"])),
        (pd.Series(["a", "b"]), np.array(["a", "b"])),
        (pd.Index([1, 2], dtype="Int64"), np.array([1, 2])),
        (np.array([3, 4], dtype=object), np.array([3, 4])),
        (np.array([1, 2], dtype=np.float16), np.array([1.0, 2.0])),
        ([dt.time(1), dt.time(2)], np.array(["01:00:00", "02:00:00"])),
        (pd.CategoricalIndex(["x", "y"]), np.array(["x", "y"])),
        (np.array(["2020", "2021"], "M8[Y]"), np.array(["2020", "2021"], "M8[Y]")),
        ("one", np.array(["one"])),
    ],
    ids=repr,
)
def test_labels_that_files_hold(labels, expected):
    found = label_array("time", labels)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype.kind == expected.dtype.kind


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros((2, 2)), r"`time`.*shape \(2, 2\)"),
        (pd.MultiIndex.from_tuples([("a", 1), ("a", 2)]), "`time`.*index of 2 levels"),
        ([dt.date(2020, 1, 1), None], "`time`.*row 2 is missing"),
        ([1.0, np.nan], "`time`.*row 2 is missing"),
        (pd.interval_range(0, 2), "`time`.*interval"),
        ([1j, 2j], "`time`.*complex"),
        ([dt.datetime(2020, 1, 1), dt.datetime(2020, 1, 2, tzinfo=dt.UTC)], "`time`.*with and without a time zone"),
    ],
    ids=str,
)
def test_labels_that_are_refused(labels, words):
    with pytest.raises(ValueError, match=words):
        as_labels("time", labels)


def test_times_must_increase():
    check_increasing("time", as_labels("time", ["b", "a"]))
    with pytest.raises(ValueError, match=r"`time` must increase.*label 3 \(2020-01-02\).*sort_index"):
        check_increasing("time", pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-02"]))
