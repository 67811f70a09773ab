"""A table of files as analysts have them, each with its right reading: values, times, warnings, or a refusal.

No model is run here. A case is a file's text, what `read_table` is told, and what comes out of it.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pssm.datasets import read_table

NAN = float("nan")


@dataclass
class File:
    """A file and its right reading.

    Attributes:
        name: what it is like.
        text: its content.
        y: values of the first column that is read.
        time: labels, dates as texts; not looked at where None.
        columns: the columns that are read, where there is a choice.
        period: the guess of the period.
        say: what the reader is told.
        warns: words of each warning; there may be no other.
        notes: words that are in the notes.
        error: words of the refusal, which names the file.
    """

    name: str
    text: str | bytes
    y: list[float] = field(default_factory=list)
    time: list[Any] | None = None
    columns: tuple[str, ...] | None = None
    period: float | None = None
    say: dict[str, Any] = field(default_factory=dict)
    warns: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: list[str] = field(default_factory=list)


def rows(header: str, times: str, values: str = "1 2 3", sep: str = ",") -> str:
    """A file of two columns: times split at `|`, values at blanks."""
    pairs = zip(times.split("|"), values.split(), strict=True)
    return "\n".join([header, *(f"{t}{sep}{v}" for t, v in pairs)]) + "\n"


DAYS = ["2020-01-31", "2020-02-01", "2020-02-02"]
MONTHS = ["2020-01-01", "2020-02-01", "2020-03-01"]
NUMBERS = [
    File("decimal commas", "t;x\n1;1,5\n2;2,25\n3;3\n", [1.5, 2.25, 3], [1, 2, 3], notes=["decimal mark ','"]),
    File("commas and dots", "t;x\n1;1.234,5\n2;987,5\n", [1234.5, 987.5], notes=["decimal mark ','"]),
    File("the English way", 't,x\n1,"1,234.5"\n2,987.5\n', [1234.5, 987.5], notes=["'1,234.5' is 1234.5"]),
    File("millions", 't,x\n1,"1,234,567"\n2,"987,654"\n', [1234567, 987654]),
    File("millions, continental", "t;x\n1;1.234.567\n2;987.654\n", [1234567, 987654]),
    File("Indian groups", 't,x\n1,"12,34,567"\n2,"9,87,654"\n', [1234567, 987654]),
    File("blanks in thousands", "t;x\n1;1 234,5\n2;987,5\n", [1234.5, 987.5], notes=["thousands"]),
    File("narrow blanks", "t;x\n1;1\u202f234\n2;12\u00a0987\n", [1234, 12987], notes=["thousands"]),
    File("Swiss", "t;x\n1;1'234.50\n2;987.25\n", [1234.5, 987.25], notes=["thousands"]),
    File(
        "1.234 beside 987",
        "t,x\n1,1.234\n2,987\n",
        error=["'1.234' beside '987'", "1234", "`thousands='.'`", "--decimal ."],
    ),
    File("1,234 beside 12", 't,x\n1,"1,234"\n2,12\n', error=["'1,234' beside '12'", "row 1 (line 2)", "--thousands ,"]),
    File("1,234 alone", "t;x\n1;1,234\n2;2,345\n", error=["may be 1.234 or 1234"]),
    File("told: thousands", "t,x\n1,1.234\n2,987\n", [1234, 987], say={"thousands": "."}),
    File("told: decimal", "t,x\n1,1.234\n2,987\n", [1.234, 987], say={"decimal": "."}),
    File("told: decimal comma", 't,x\n1,"1,234"\n2,12\n', [1.234, 12], say={"decimal": ","}),
    File("told: English thousands", 't,x\n1,"1,234"\n2,12\n', [1234, 12], say={"thousands": ","}),
    File("1.234 beside 0.5", "t,x\n1,1.234\n2,0.5\n", [1.234, 0.5]),
    File("three decimals everywhere", "t,x\n1,1.234\n2,2.345\n3,9.871\n", [1.234, 2.345, 9.871], notes=["every cell"]),
    File("three decimals below one", "t,x\n1,1.234\n2,0.345\n3,0.871\n", [1.234, 0.345, 0.871]),
    File(
        "another column decides",
        "t;x;z\n1;1.234;0,5\n2;987;1,25\n",
        [1234, 987],
        say={"column": "x"},
        notes=["other columns"],
    ),
    File("a long number decides", "t,x\n1,1.234\n2,98765\n", [1.234, 98765], notes=["'98765'"]),
    File("two ways at once", "t;x\n1;1.234,5\n2;1,234.5\n", error=["two ways", "--decimal"]),
    File("percent", "t,x\n1,12.5%\n2,13 %\n", [12.5, 13], notes=["is in %"]),
    File("percent in some rows", "t,x\n1,12.5%\n2,0.13\n", error=["percent sign", "row 2"]),
    File("dollars", 't,x\n1,"$1,234.50"\n2,-$2.25\n', [1234.5, -2.25], notes=["is in $"]),
    File("two currencies", "t,x\n1,$5\n2,\u20ac6\n", error=["currency", "row 2"]),
    File("accountants' minus", "t,x\n1,(12.5)\n2,13\n", [-12.5, 13]),
    File("a real minus sign", "t,x\n1,\u221212.5\n2,13\n", [-12.5, 13]),
    File("exponents", "t,x\n1,1.5e3\n2,2.5D+02\n", [1500, 250]),
    File(
        "marks of missing values",
        "t;x\n"
        + "".join(
            f"{i};{x}\n"
            for i, x in enumerate(
                [
                    "1.5",
                    "--",
                    "#N/A",
                    "?",
                    "*",
                    "..",
                    ":",
                    "missing",
                    "N.A.",
                    "-",
                    "n/a",
                    "NULL",
                    "#DIV/0!",
                    "None",
                    "<NA>",
                    ".",
                ]
            )
        ),
        [1.5] + [NAN] * 15,
    ),
    File("a declared mark", "t,x\n1,5\n2,M\n3,6\n", [5, NAN, 6], say={"missing": "M"}),
    File("an undeclared mark", "t,x\n1,5\n2,M\n3,6\n", error=["row 2", "`missing='M'`", "--missing M"]),
    File(
        "-999, named",
        rows("t,x", "1|2|3|4|5|6", "12 13 -999 12.5 11 -999"),
        [12, 13, -999, 12.5, 11, -999],
        warns=["-999 stands 2 times", "row 3 (line 4)", "--missing -999"],
    ),
    File(
        "one -9999 in many",
        "t,x\n" + "".join(f"{i},{20 + i % 7}\n" for i in range(60)) + "60,-9999\n",
        [*[20.0 + i % 7 for i in range(60)], -9999],
        warns=["-9999 stands once"],
    ),
    File(
        "-200 of an air sensor",
        rows("t,x", "1|2|3|4|5|6", "2.6 -200 2.2 -200 1.6 1.2"),
        [2.6, -200, 2.2, -200, 1.6, 1.2],
        warns=["-200 stands 2 times"],
    ),
    File("9999 among degrees", rows("t,x", "1|2|3|4|5", "21 22 9999 20 19"), [21, 22, 9999, 20, 19], warns=["9999"]),
    File(
        "-999 declared",
        rows("t,x", "1|2|3|4|5|6", "12 13 -999.0 12.5 11 -999"),
        [12, 13, NAN, 12.5, 11, NAN],
        say={"missing": -999},
    ),
    File(
        "two sentinels declared",
        rows("t,x", "1|2|3|4", "12 -999 9999 11"),
        [12, NAN, NAN, 11],
        say={"missing": ["-999", 9999]},
    ),
    File("-99 in the right range", rows("t,x", "1|2|3|4|5", "-120 -99 -80 -110 -101"), [-120, -99, -80, -110, -101]),
    File("a large value that is one", rows("t,x", "1|2|3|4|5", "1 2 3 4 70"), [1, 2, 3, 4, 70]),
]

DATES = [
    File(
        "dd/mm/yyyy hh:mm",
        rows("d,x", "31/01/2020 22:00|31/01/2020 23:00|01/02/2020 00:00"),
        [1, 2, 3],
        ["2020-01-31T22:00", "2020-01-31T23:00", "2020-02-01T00:00"],
        period=24.0,
    ),
    File(
        "mm/dd/yyyy h:mm AM",
        rows("d,x", "1/31/2020 11:00 AM|1/31/2020 12:00 PM|1/31/2020 1:00 PM"),
        [1, 2, 3],
        ["2020-01-31T11:00", "2020-01-31T12:00", "2020-01-31T13:00"],
        period=24.0,
    ),
    File(
        "midnight is 12 AM",
        rows("d,x", "1/31/2020 11:30 PM|2/1/2020 12:00 AM|2/1/2020 12:30 AM"),
        [1, 2, 3],
        ["2020-01-31T23:30", "2020-02-01T00:00", "2020-02-01T00:30"],
    ),
    File("31-Jan-2020", rows("d,x", "31-Jan-2020|01-Feb-2020|02-Feb-2020"), [1, 2, 3], DAYS, period=7.0),
    File("31JAN2020", rows("d,x", "31JAN2020|01FEB2020|02FEB2020"), [1, 2, 3], DAYS, period=7.0),
    File(
        "January 31, 2020",
        'd,x\n"January 31, 2020",1\n"February 1, 2020",2\n"February 2, 2020",3\n',
        [1, 2, 3],
        DAYS,
        period=7.0,
    ),
    File(
        "Fri, 31 Jan 2020",
        "d;x\nFri, 31 Jan 2020;1\nSat, 01 Feb 2020;2\nSun, 02 Feb 2020;3\n",
        [1, 2, 3],
        DAYS,
        period=7.0,
    ),
    File("Jan-2020", rows("d,x", "Jan-2020|Feb-2020|Mar-2020"), [1, 2, 3], MONTHS, period=12.0),
    File("Jan-20", rows("d,x", "Jan-20|Feb-20|Mar-20"), [1, 2, 3], MONTHS, period=12.0),
    File("2020 JAN", rows("d,x", "2020 JAN|2020 FEB|2020 MAR"), [1, 2, 3], MONTHS, period=12.0),
    File("01/2020", rows("d,x", "01/2020|02/2020|03/2020"), [1, 2, 3], MONTHS, period=12.0),
    File("2020M01", rows("d,x", "2020M01|2020M02|2020M03"), [1, 2, 3], MONTHS, period=12.0),
    File("202001", rows("month,x", "202001|202002|202003"), [1, 2, 3], MONTHS, period=12.0),
    File("20200131", rows("d,x", "20200131|20200201|20200202"), [1, 2, 3], DAYS, period=7.0),
    File(
        "hours 2020013122",
        rows("stamp,x", "2020013122|2020013123|2020020100"),
        [1, 2, 3],
        ["2020-01-31T22", "2020-01-31T23", "2020-02-01T00"],
        period=24.0,
    ),
    File(
        "2020-W05",
        rows("d,x", "2020-W05|2020-W06|2020-W07"),
        [1, 2, 3],
        ["2020-01-27", "2020-02-03", "2020-02-10"],
        period=365.25 / 7,
    ),
    File(
        "the last week of a long year",
        rows("d,x", "2020-W53|2021-W01|2021-W02"),
        [1, 2, 3],
        ["2020-12-28", "2021-01-04", "2021-01-11"],
        period=365.25 / 7,
    ),
    File(
        "Q1 2020",
        rows("d,x", "Q1 2020|Q2 2020|Q3 2020"),
        [1, 2, 3],
        ["2020-01-01", "2020-04-01", "2020-07-01"],
        period=4.0,
    ),
    File(
        "2020-Q1",
        rows("d,x", "2020-Q1|2020-Q2|2020-Q3"),
        [1, 2, 3],
        ["2020-01-01", "2020-04-01", "2020-07-01"],
        period=4.0,
    ),
    File(
        "1Q2020", rows("d,x", "1Q2020|2Q2020|3Q2020"), [1, 2, 3], ["2020-01-01", "2020-04-01", "2020-07-01"], period=4.0
    ),
    File("half years", rows("d,x", "2020-S1|2020-S2|2021-S1"), [1, 2, 3], ["2020-01-01", "2020-07-01", "2021-01-01"]),
    File(
        "seasons 2019/20", rows("d,x", "2018/19|2019/20|2020/21"), [1, 2, 3], ["2018-01-01", "2019-01-01", "2020-01-01"]
    ),
    File(
        "decimal years of months",
        rows("year,x", "1958.0417|1958.125|1958.2083"),
        [1, 2, 3],
        ["1958-01-01", "1958-02-01", "1958-03-01"],
        period=12.0,
        notes=["decimal years"],
    ),
    File(
        "decimal years from January",
        rows("date,x", "2000.000|2000.083|2000.167"),
        [1, 2, 3],
        ["2000-01-01", "2000-02-01", "2000-03-01"],
        period=12.0,
    ),
    File(
        "decimal quarters",
        rows("date,x", "2000.0|2000.25|2000.5"),
        [1, 2, 3],
        ["2000-01-01", "2000-04-01", "2000-07-01"],
        period=4.0,
    ),
    File(
        "decimal commas in years",
        rows("date;x", "2000,0417|2000,125|2000,2083", sep=";"),
        [1, 2, 3],
        ["2000-01-01", "2000-02-01", "2000-03-01"],
        period=12.0,
    ),
    File("half years as numbers", rows("year,x", "1958.5|1959.5|1960.5"), [1, 2, 3], [1958.5, 1959.5, 1960.5]),
    File(
        "1871.1 is October",
        rows("date,x", "1871.08|1871.09|1871.1|1871.11|1871.12|1872.01", "1 2 3 4 5 6"),
        [1, 2, 3, 4, 5, 6],
        ["1871-08-01", "1871-09-01", "1871-10-01", "1871-11-01", "1871-12-01", "1872-01-01"],
        period=12.0,
    ),
    File(
        "seconds since 1970",
        rows("timestamp,x", "1577836800|1577840400|1577844000"),
        [1, 2, 3],
        ["2020-01-01T00", "2020-01-01T01", "2020-01-01T02"],
        period=24.0,
        notes=["since 1970"],
    ),
    File(
        "offsets over a clock change",
        rows("d,x", "2020-03-29T01:00+01:00|2020-03-29T03:00+02:00|2020-03-29T04:00+02:00"),
        [1, 2, 3],
        ["2020-03-29T00", "2020-03-29T01", "2020-03-29T02"],
        period=24.0,
        notes=["in UTC"],
    ),
    File(
        "the hour that comes twice, with its zone",
        rows("d,x", "2020-10-25 02:00 CEST|2020-10-25 02:00 CET|2020-10-25 03:00 CET"),
        [1, 2, 3],
        ["2020-10-25T00", "2020-10-25T01", "2020-10-25T02"],
        period=24.0,
    ),
    File(
        "days with offsets",
        rows("d,x", "2020-03-28T00:00+01:00|2020-03-29T00:00+01:00|2020-03-30T00:00+02:00"),
        [1, 2, 3],
        ["2020-03-28", "2020-03-29", "2020-03-30"],
        period=7.0,
        notes=["clock on the wall"],
    ),
    File(
        "the hour that comes twice, without",
        rows("d,x", "2020-10-25 01:00|2020-10-25 02:00|2020-10-25 02:00|2020-10-25 03:00", "1 2 3 4"),
        error=["repeats", "clock was turned back", "timezone="],
    ),
    File(
        "the same, told whose clock",
        rows("d,x", "2020-10-25 01:00|2020-10-25 02:00|2020-10-25 02:00|2020-10-25 03:00", "1 2 3 4"),
        [1, 2, 3, 4],
        ["2020-10-24T23", "2020-10-25T00", "2020-10-25T01", "2020-10-25T02"],
        period=24.0,
        say={"timezone": "Europe/Berlin"},
    ),
    File(
        "24:00",
        rows("d,x", "31.01.2020 23:00|31.01.2020 24:00|01.02.2020 01:00"),
        [1, 2, 3],
        ["2020-01-31T23", "2020-02-01T00", "2020-02-01T01"],
        period=24.0,
    ),
    File(
        "newest first",
        rows("d,x", "2020-02-02|2020-02-01|2020-01-31"),
        [3, 2, 1],
        DAYS,
        period=7.0,
        warns=["turned round"],
    ),
    File(
        "newest first, months first",
        rows("d,x", "2/1/2020|1/31/2020|1/30/2020"),
        [3, 2, 1],
        ["2020-01-30", "2020-01-31", "2020-02-01"],
        period=7.0,
        warns=["turned round"],
    ),
    File(
        "day or month",
        rows("d,x", "1/2/2020|2/2/2020|3/2/2020"),
        error=["'1/2/2020'", "--dayfirst yes", "--dayfirst no"],
    ),
    File(
        "day first, told",
        rows("d,x", "1/2/2020|2/2/2020|3/2/2020"),
        [1, 2, 3],
        ["2020-02-01", "2020-02-02", "2020-02-03"],
        period=7.0,
        say={"dayfirst": True},
    ),
    File(
        "month first, told",
        rows("d,x", "1/2/2020|2/2/2020|3/2/2020"),
        [1, 2, 3],
        ["2020-01-02", "2020-02-02", "2020-03-02"],
        period=12.0,
        say={"dayfirst": False},
    ),
    File(
        "equal steps decide",
        rows("d,x", "01/11/2001|01/12/2001|01/01/2002"),
        [1, 2, 3],
        ["2001-11-01", "2001-12-01", "2002-01-01"],
        period=12.0,
        notes=["day first"],
    ),
    File(
        "absent months",
        rows("d,x", "2020-01-31|2020-02-29|2020-04-30|2020-05-31|2020-06-30", "1 2 3 4 5"),
        [1, 2, 3, 4, 5],
        period=12.0,
        warns=["goes by the month", "1 row is absent", "2020-02-29 and 2020-04-30", "equally spaced"],
    ),
    File(
        "holidays",
        rows("d,x", "2020-01-02|2020-01-03|2020-01-06|2020-01-08|2020-01-09|2020-01-10", "1 2 3 4 5 6"),
        [1, 2, 3, 4, 5, 6],
        period=5.0,
        warns=["business day"],
    ),
    File(
        "business days", rows("d,x", "2020-01-02|2020-01-03|2020-01-06|2020-01-07", "1 2 3 4"), [1, 2, 3, 4], period=5.0
    ),
    File("month ends", rows("d,x", "2020-01-31|2020-02-29|2020-03-31"), [1, 2, 3], period=12.0),
    File(
        "a day that is not there",
        rows("d,x", "2020-02-28|2020-02-30|2020-03-01"),
        error=["row 2 (line 3)", "'2020-02-30'"],
    ),
]

COLUMNS = [
    File(
        "a temperature called T",
        "date,T\n2020-01-31,5.5\n2020-02-01,4.5\n2020-02-02,6\n",
        [5.5, 4.5, 6],
        DAYS,
        ("T",),
        7.0,
    ),
    File(
        "T before the date",
        "T,date\n5.5,2020-01-31\n6.5,2020-02-01\n7.5,2020-02-02\n",
        [5.5, 6.5, 7.5],
        DAYS,
        ("T",),
        7.0,
    ),
    File("T and flow", "date,T,flow\n2020-01-31,5,1\n2020-02-01,4,2\n", error=["2 numeric columns", "'T', 'flow'"]),
    File(
        "INDEX of prices",
        "DATE,INDEX\n2020-01-01,100.5\n2020-02-01,101.5\n2020-03-01,102.5\n",
        [100.5, 101.5, 102.5],
        MONTHS,
        ("INDEX",),
        12.0,
    ),
    File("t without a date", "t,x\n0.5,1\n1.0,2\n1.5,3\n", [1, 2, 3], [0.5, 1.0, 1.5], ("x",)),
    File("T that does not count", "T,x\n5.5,1\n4.5,2\n6,3\n", [1, 2, 3], [0, 1, 2], ("x",), say={"column": "x"}),
    File(
        "a date behind an index",
        "index,x,when\n0,1,2020-01-31\n1,2,2020-02-01\n2,3,2020-02-02\n",
        [1, 2, 3],
        DAYS,
        ("x",),
        7.0,
    ),
    File(
        "date and time",
        "date,time,x\n2020-01-31,22:00,1\n2020-01-31,23:00,2\n2020-02-01,00:00,3\n",
        [1, 2, 3],
        ["2020-01-31T22", "2020-01-31T23", "2020-02-01T00"],
        period=24.0,
        notes=["'date' and 'time'"],
    ),
    File(
        "date and hour",
        "date,hour,mw\n2020-01-31,22,1\n2020-01-31,23,2\n2020-02-01,0,3\n",
        [1, 2, 3],
        ["2020-01-31T22", "2020-01-31T23", "2020-02-01T00"],
        ("mw",),
        24.0,
        notes=["'date' and 'hour'"],
    ),
    File(
        "hours from 1 to 24",
        "date,hour,mw\n2020-01-31,23,1\n2020-01-31,24,2\n2020-02-01,1,3\n",
        [1, 2, 3],
        ["2020-01-31T23", "2020-02-01T00", "2020-02-01T01"],
        ("mw",),
        24.0,
    ),
    File(
        "date and hour, named",
        "date,hour,mw\n2020-01-31,22,1\n2020-01-31,23,2\n2020-02-01,0,3\n",
        [1, 2, 3],
        ["2020-01-31T22", "2020-01-31T23", "2020-02-01T00"],
        period=24.0,
        say={"time": ("date", "hour")},
    ),
    File(
        "date alone, named",
        "date,hour,mw\n2020-01-31,22,1\n2020-01-31,23,2\n",
        say={"time": "date"},
        error=["repeats", "--time date --time hour"],
    ),
    File(
        "year, month and day", "year,month,day,x\n2020,1,31,1\n2020,2,1,2\n2020,2,2,3\n", [1, 2, 3], DAYS, ("x",), 7.0
    ),
    File(
        "day, month and year", "day,month,year,x\n31,1,2020,1\n1,2,2020,2\n2,2,2020,3\n", [1, 2, 3], DAYS, ("x",), 7.0
    ),
    File(
        "year alone, named",
        "year,month,day,x\n2020,1,31,1\n2020,2,1,2\n",
        say={"time": "year"},
        error=["repeats", "--time year --time month --time day"],
    ),
    File(
        "year to hour",
        "year,month,day,hour,x\n2020,1,31,22,1\n2020,1,31,23,2\n2020,2,1,0,3\n",
        [1, 2, 3],
        ["2020-01-31T22", "2020-01-31T23", "2020-02-01T00"],
        ("x",),
        24.0,
    ),
    File("names of months", "Year,Month,x\n2020,Jan,1\n2020,Feb,2\n2020,Mar,3\n", [1, 2, 3], MONTHS, ("x",), 12.0),
    File(
        "year and quarter",
        "year,quarter,x\n2020,Q1,1\n2020,Q2,2\n2020,Q3,3\n",
        [1, 2, 3],
        ["2020-01-01", "2020-04-01", "2020-07-01"],
        period=4.0,
    ),
    File(
        "year and week",
        "year,week,x\n2020,52,1\n2020,53,2\n2021,1,3\n",
        [1, 2, 3],
        ["2020-12-21", "2020-12-28", "2021-01-04"],
        period=365.25 / 7,
    ),
    File("year and day of the year", "year,doy,x\n2020,31,1\n2020,32,2\n2020,33,3\n", [1, 2, 3], DAYS, ("x",), 7.0),
    File(
        "year and month, named",
        "y,m,x\n2020,1,1\n2020,2,2\n",
        [1, 2],
        ["2020-01-01", "2020-02-01"],
        say={"time": ("y", "m")},
        period=12.0,
    ),
    File(
        "a place and a number as time",
        "a,m,x\nx,1,1\ny,2,2\n",
        say={"time": ("a", "m"), "column": "x"},
        error=["none is a date or a year"],
    ),
    File("a month of thirteen", "year,month,x\n2020,12,1\n2020,13,2\n", error=["'month'", "row 2", "1 to 12"]),
    File(
        "time of day alone", "time,x\n13:00,1\n14:00,2\n", error=["times of day and no date", "--time date --time time"]
    ),
    File(
        "long format",
        "date,city,x\n2020-01-31,A,1\n2020-01-31,B,2\n2020-02-01,A,3\n2020-02-01,B,4\n",
        error=["repeats", "'city' tells the rows of one time apart"],
    ),
    File("years in a shuffle", "year,x\n2020,1\n2022,2\n2021,3\n", error=["comes after 2022", "Sort the rows"]),
]

LAYOUT = [
    File("comments", "# source: me\n# unit: m\nt,x\n1,5\n# a break\n2,6\n", [5, 6], [1, 2]),
    File("a header in a comment", "# t,x\n1,5\n2,6\n", [5, 6], [1, 2]),
    File("a mark that is no comment", "x\n5\n#N/A\n6\n", [5, NAN, 6]),
    File("blank lines", "\n\nt,x\n1,5\n\n2,6\n\n", [5, 6], [1, 2]),
    File(
        "a row of units",
        "date,flow\n,m3/s\n2020-01-31,5\n2020-02-01,6\n",
        [5, 6],
        ["2020-01-31", "2020-02-01"],
        period=7.0,
        notes=["units"],
    ),
    File(
        "lines above the table",
        "Station 12\nBasel\ndate,x,z\n2020-01-31,5,1\n2020-02-01,6,1\n",
        [5, 6],
        say={"column": "x"},
        period=7.0,
        notes=["first 2 lines"],
    ),
    File("a separator at the end", "t,x,\n1,5,\n2,6,\n", [5, 6], [1, 2], say={"column": "x"}),
    File("blanks as separators", "year  flow\n1871  1120\n1872  1160\n", [1120, 1160], [1871, 1872]),
    File("bars", "t|x\n1|5\n2|6\n", [5, 6], [1, 2]),
    File("a comma in the header", 't;"flow, m3/s"\n1;5\n2;6\n', [5, 6], [1, 2], ("flow, m3/s",)),
    File("a byte-order mark", "\ufefft,x\n1,5\n2,6\n", [5, 6], [1, 2]),
    File("UTF-16 of a spreadsheet", "t\tx\n1\t5\n2\t6\n".encode("utf-16"), [5, 6], [1, 2]),
    File("UTF-16 without its mark", "t\tx\n1\t5\n2\t6\n".encode("utf-16-le"), [5, 6], [1, 2]),
    File(
        "Latin-1",
        "t,Fl\u00fcsse\n1,5\n2,6\n".encode("latin-1"),
        [5, 6],
        [1, 2],
        ("Fl\u00fcsse",),
        notes=["Windows-1252"],
    ),
    File("no header", "2020-01-31,5\n2020-02-01,6\n", error=["must name the columns"]),
    File(
        "a decimal comma that separates",
        "t,x\n1,5,5\n2,6,5\n",
        error=["2 columns in its header but 3 cells", 'decimal=","'],
    ),
    File("a short row", "t,x,z\n1,5,1\n2,6\n3,7,1\n", error=["2 cells in row 2 (line 3)"]),
    File("Excel in disguise", b"PK\x03\x04more", error=["Excel"]),
]

AIR = "Date;Time;CO;;\n" + "".join(
    f"{10 + i // 24}/03/2004;{i % 24:02d}.00.00;{-200 if i in (5, 6) else f'{2 + i % 5},{i % 9 + 1}'};;\n"
    for i in range(30)
)
WILD = [  # as well-known sources write them, with numbers of our own
    File(
        "an air sensor: times with dots, empty columns and rows",
        AIR + ";;;;\n;;;;\n",
        [-200.0 if i in (5, 6) else 2 + i % 5 + (i % 9 + 1) / 10 for i in range(30)],
        period=24.0,
        say={"column": "CO"},
        warns=["-200 stands 2 times"],
        notes=["day first"],
    ),
    File(
        "a meter",
        "Date;Time;A;B\n16/12/2006;17:24:00;4.216;0.418\n16/12/2006;17:25:00;?;?\n16/12/2006;17:26:00;5.36;0.43\n",
        [4.216, NAN, 5.36],
        ["2006-12-16T17:24", "2006-12-16T17:25", "2006-12-16T17:26"],
        say={"column": "A"},
    ),
    File(
        "rented bicycles",
        "instant,dteday,yr,mnth,hr,cnt\n1,2011-01-01,0,1,0,16\n2,2011-01-01,0,1,1,40\n3,2011-01-01,0,1,2,32\n",
        [16, 40, 32],
        ["2011-01-01T00", "2011-01-01T01", "2011-01-01T02"],
        period=24.0,
        say={"column": "cnt"},
    ),
    File(
        "from ... to ...",
        "when,x\n01.01.2020 00:00 - 01.01.2020 01:00,5\n01.01.2020 01:00 - 01.01.2020 02:00,6\n",
        [5, 6],
        ["2020-01-01T00", "2020-01-01T01"],
        period=24.0,
    ),
    File(
        "a statistical office",
        "LAST UPDATE,freq,geo,TIME_PERIOD,OBS_VALUE,FLAG\n12/01/24 23:00,M,DE,2020-01,1.5,\n"
        "12/01/24 23:00,M,DE,2020-02,:,p\n12/01/24 23:00,M,DE,2020-03,1.2,\n",
        [1.5, NAN, 1.2],
        MONTHS,
        ("OBS_VALUE",),
        12.0,
    ),
    File(
        "quotes, newest first",
        '"Date","Price","Change %"\n"01/31/2020","1,225.5","0.35%"\n"01/30/2020","987.5","-0.3%"\n',
        [987.5, 1225.5],
        ["2020-01-30", "2020-01-31"],
        period=7.0,
        say={"column": "Price"},
        warns=["turned round"],
    ),
    File(
        "hours and minutes in one number",
        "date,hhmm,x\n20200101,0,1\n20200101,30,2\n20200101,100,3\n",
        [1, 2, 3],
        ["2020-01-01T00:00", "2020-01-01T00:30", "2020-01-01T01:00"],
        ("x",),
    ),
    File(
        "a head of words",
        "-BEGIN HEADER-\nsome words\n-END HEADER-\nYEAR,MO,DY,T2M\n2020,1,31,5\n2020,2,1,6\n2020,2,2,7\n",
        [5, 6, 7],
        DAYS,
        ("T2M",),
        7.0,
    ),
    File(
        "a foot of words",
        "date,x\n2020-01,1\n2020-02,2\n2020-03,4\n\nSource: bureau\n",
        [1, 2, 4],
        MONTHS,
        ("x",),
        12.0,
        notes=["under the table"],
    ),
    File(
        "an hour that spring takes",
        rows("d,x", "|".join(f"2020-03-29 0{h}:00" for h in (0, 1, 3, 4, 5)), "1 2 3 4 5"),
        [1, 2, 3, 4, 5],
        period=24.0,
        warns=["1 row is absent", "--timezone"],
    ),
    File(
        "milliseconds since 1970",
        rows("ts,x", "1577836800000|1577840400000|1577844000000"),
        [1, 2, 3],
        ["2020-01-01T00", "2020-01-01T01", "2020-01-01T02"],
        period=24.0,
    ),
    File(
        "months without a year",
        "month,x\n11,5\n12,6\n1,7\n",
        [5, 6, 7],
        [0, 1, 2],
        ("x",),
        warns=["'month' does not increase"],
    ),
    File(
        "-1 among counts",
        rows("t,x", "|".join(map(str, range(8))), "100 -1 104 101 -1 103 102 105"),
        [100, -1, 104, 101, -1, 103, 102, 105],
        warns=["-1 stands 2 times"],
    ),
    File(
        "zeros and a few events, one of 99",
        rows("t,x", "|".join(map(str, range(40))), " ".join(["0"] * 35 + ["15", "99", "45", "60", "30"])),
        [0.0] * 35 + [15, 99, 45, 60, 30],
    ),
    File("a unit behind each number", "t,x\n1,5 kg\n2,6 kg\n", error=["'5 kg' is not a number"]),
]

EVERY = NUMBERS + DATES + COLUMNS + LAYOUT + WILD


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_the_right_reading(case, tmp_path):
    path = tmp_path / "my.csv"
    path.write_bytes(case.text if isinstance(case.text, bytes) else case.text.encode())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if case.error:
            with pytest.raises(ValueError, match=r"^`.*my\.csv") as refusal:
                read_table(path, **case.say)
            assert not [word for word in case.error if word not in str(refusal.value)], str(refusal.value)
            return
        series = read_table(path, **case.say)
    np.testing.assert_array_equal(series.y[:, 0], case.y)
    if case.time is not None:
        expected = np.array(case.time, "datetime64" if isinstance(case.time[0], str) else None)
        np.testing.assert_array_equal(series.time, expected)
        assert series.time.dtype.kind == expected.dtype.kind
    assert case.columns in (None, series.columns)
    assert series.period == case.period
    said = " ".join(str(w.message) for w in caught)
    assert bool(said) == bool(case.warns), said
    assert not [word for word in case.warns if word not in said], said
    notes = " ".join(series.notes)
    assert not [word for word in case.notes if word not in notes], notes
    assert all(str(w.message) in series.notes for w in caught)


def test_the_table_is_large():
    assert len(EVERY) >= 100
    assert len({case.name for case in EVERY}) == len(EVERY)


# ---- tables at random: the right reading, or a question

DAY_FORMS = (
    "%Y-%m-%d",
    "%Y/%m/%d",
    "%Y.%m.%d",
    "%d.%m.%Y",
    "%d/%m/%Y",
    "%m/%d/%Y",
    "%d-%m-%Y",
    "%m-%d-%Y",
    "%d %b %Y",
    "%d-%b-%Y",
    "%d%b%Y",
    "%B %d, %Y",
    "%b %d %Y",
    "%a, %d %b %Y",
    "%Y%m%d",
    "%Y-%j",
    "%d/%m/%y",
    "%d-%b-%y",
)
MONTH_FORMS = ("%Y-%m", "%Y/%m", "%m/%Y", "%m.%Y", "%b %Y", "%b-%Y", "%B %Y", "%b-%y", "%Y%m", "%YM%m", "%Y:%m")
CLOCKS = (" %H:%M", " %H:%M:%S", "T%H:%M", " %I:%M %p", "T%H:%M:%SZ", " %H:%M+00:00")
MARKS = ((".", ""), (",", ""), (",", "."), (".", ","), (",", " "), (".", "'"))
ASKED = ("`decimal=", "dayfirst=")


def written(value: float, places: int, decimal: str, thousands: str) -> str:
    return f"{value:,.{places}f}".translate({ord(","): thousands, ord("."): decimal})


@pytest.mark.parametrize("seed", range(8))
def test_a_table_at_random_is_read_right_or_asked_about(seed, tmp_path):
    rng = np.random.default_rng(seed)
    path, asked = tmp_path / "my.csv", 0
    for _ in range(12):
        steps, frequency = (
            int(rng.integers(6, 50)),
            str(rng.choice(["D", "MS", "ME", "h", "30min", "B", "W-TUE", "QS"])),
        )
        start = f"{rng.integers(1970, 2025)}-{rng.integers(1, 13):02d}-{rng.integers(1, 28):02d}"
        time = pd.date_range(start, periods=steps, freq=frequency)
        form = str(rng.choice(DAY_FORMS + MONTH_FORMS if frequency == "MS" else DAY_FORMS))
        form += str(rng.choice(CLOCKS)) if frequency in ("h", "30min") else ""
        (decimal, thousands), places = MARKS[rng.integers(len(MARKS))], int(rng.choice([0, 1, 2, 4]))
        y = np.round(rng.normal(size=steps) * 10 ** rng.integers(0, 6), places)
        texts = [written(value, places, decimal, thousands) for value in y]
        gone = int(rng.integers(steps))
        texts[gone], y[gone] = str(rng.choice(["", "NA", "--", "?"])), NAN
        table = pd.DataFrame({"when": time.strftime(form), "y": texts})[:: int(rng.choice([1, 1, 1, -1]))]
        table.to_csv(path, index=False, sep=str(rng.choice([",", ";", "\t", "|"])))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                series = read_table(path)
            except ValueError as error:
                if not any(word in str(error) for word in ASKED):
                    raise
                asked += 1
                continue
        if "every cell has three digits" not in " ".join(series.notes):
            np.testing.assert_array_equal(series.y[:, 0], y, err_msg=path.read_text())
        np.testing.assert_array_equal(series.time, time.to_numpy(), err_msg=path.read_text())
    assert asked <= 4
