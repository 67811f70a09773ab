"""The embedded series against statsmodels, the sets of sequences, and what `read_csv` takes and refuses."""

import hashlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pssm.datasets import Sequences, Series, available, available_sequences, load, load_sequences, read_csv

NAMES = ("nile", "sunspots", "co2", "elnino", "macrodata")


def write(tmp_path, text, name="my.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def reference(name):
    data = pytest.importorskip("statsmodels.datasets")
    frame = getattr(data, name).load_pandas().data
    if name == "elnino":
        return frame.to_numpy()[:, 1:].reshape(-1, 1), ("temperature",)
    columns = [c for c in frame.columns if c.lower() not in ("year", "quarter")]
    return frame[columns].to_numpy(), tuple(c.lower() for c in columns)


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_statsmodels(name):
    values, columns = reference(name)
    series = load(name, columns)
    assert series.columns == columns
    assert series.y.dtype == np.float64
    np.testing.assert_array_equal(series.y, values)


def test_times_are_those_of_statsmodels():
    data = pytest.importorskip("statsmodels.datasets")
    index = data.co2.load_pandas().data.index.to_numpy()
    np.testing.assert_array_equal(load("co2").time, index.astype("datetime64[D]"))
    np.testing.assert_array_equal(load("nile").time, data.nile.load_pandas().data["year"])
    np.testing.assert_array_equal(load("sunspots").time, data.sunspots.load_pandas().data["YEAR"])
    elnino, macro = load("elnino").time, load("macrodata").time
    assert (str(elnino[0]), str(elnino[-1])) == ("1950-01-01", "2010-12-01")
    assert (str(macro[0]), str(macro[-1])) == ("1959-01-01", "2009-07-01")


def test_available_lists_length_and_missing_count():
    rows = {name: (steps, missing) for name, steps, missing, _ in available()}
    assert rows == {
        "nile": (100, 0),
        "sunspots": (309, 0),
        "co2": (2284, 59),
        "elnino": (732, 0),
        "macrodata": (203, 0),
    }


@pytest.mark.parametrize(
    ("name", "period", "columns"),
    [
        ("nile", None, ("volume",)),
        ("sunspots", None, ("sunactivity",)),
        ("co2", 365.25 / 7, ("co2",)),
        ("elnino", 12.0, ("temperature",)),
        ("macrodata", 4.0, ("infl",)),
    ],
)
def test_defaults_and_labels(name, period, columns):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        series = load(name)
    assert isinstance(series, Series)
    assert series.name == name
    assert series.columns == columns
    assert series.y.shape == (len(series.time), 1)
    assert series.period == period
    assert series.units
    assert series.description
    assert series.source


def test_unknown_names_are_met_with_the_known_ones():
    with pytest.raises(ValueError, match=r"`name`.*'sunspots'.*got 'nlie'.*Did you mean 'nile'"):
        load("nlie")
    with pytest.raises(ValueError, match=r"`column`.*'realgdp'.*got 'INFL'.*Did you mean 'infl'"):
        load("macrodata", "INFL")


def test_an_import_brings_no_pandas_and_a_load_no_statsmodels():
    code = "import sys, pssm.datasets as d; had = 'pandas' in sys.modules; d.load('co2'); d.load('macrodata'); "
    code += "sys.exit('statsmodels' in sys.modules or had)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- sets of sequences


def test_japanese_vowels_is_what_its_authors_describe():
    # Numbers of utterances, lengths and the first frame as in the repository's description and file.
    vowels = load_sequences("japanese_vowels")
    assert isinstance(vowels, Sequences)
    np.testing.assert_array_equal(np.bincount(vowels.train_labels), [30] * 9)
    np.testing.assert_array_equal(np.bincount(vowels.test_labels), [31, 35, 88, 44, 29, 24, 40, 50, 29])
    every = vowels.train + vowels.test
    assert (min(map(len, every)), max(map(len, every)), sum(map(len, every))) == (7, 29, 9961)
    assert {x.shape[1] for x in every} == {12} == {len(vowels.columns)}
    assert {x.dtype for x in every} == {np.dtype(float)}
    assert all(np.isfinite(x).all() for x in every)
    assert len(vowels.classes) == 9
    published = [1.860936, -0.207383, 0.261557, -0.214562, -0.171253, -0.118167]
    np.testing.assert_allclose(vowels.train[0][0, :6], published, atol=5e-5)
    assert "CC BY 4.0" in vowels.licence
    assert "Kudo" in vowels.licence
    assert vowels.source


def test_japanese_vowels_has_not_changed():
    vowels = load_sequences("japanese_vowels")
    values = np.round(np.concatenate(vowels.train + vowels.test) * 1e4).astype("<i2")
    found = hashlib.sha256(values.tobytes()).hexdigest()
    assert found == "e88cdff0b5f461d655e17b5bcf772e54ce713d814ba91b623b2fc52c8537e98e"


def test_a_caller_who_writes_into_a_set_changes_no_later_load():
    load_sequences("japanese_vowels").train[0][:] = 0.0
    assert load_sequences("japanese_vowels").train[0].any()


def test_available_sequences_lists_number_and_longest():
    assert [row[:3] for row in available_sequences()] == [("japanese_vowels", 640, 29)]
    with pytest.raises(ValueError, match=r"`name`.*'japanese_vowels'.*got 'vowels'"):
        load_sequences("vowels")


def test_an_import_reads_no_file():
    code = "import sys, builtins, numpy as np; np.load = None; import pssm.datasets"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- what read_csv takes


def test_round_trip_of_a_frame_written_by_pandas(tmp_path):
    pd = pytest.importorskip("pandas")
    index = pd.date_range("2001-01-01", periods=30, freq="MS")
    values = np.random.default_rng(0).normal(size=30)
    values[[3, 17]] = np.nan
    path = tmp_path / "flow.csv"
    pd.Series(values, index, name="flow").to_csv(path)  # pandas leaves the name of the index empty
    series = read_csv(path)
    np.testing.assert_array_equal(series.y[:, 0], values)
    np.testing.assert_array_equal(series.time, index.to_numpy())
    assert (series.name, series.columns, series.period, series.source) == ("flow", ("flow",), 12.0, str(path))


def test_every_way_of_writing_a_missing_value(tmp_path):
    series = read_csv(write(tmp_path, "t,y\n0,1\n1,\n2,NA\n3,NaN\n4,.\n5, nan \n6,null\n7,2\n"))
    assert np.isnan(series.y[1:7, 0]).all()
    assert series.y[[0, 7], 0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "time", "period"),
    [
        ("flow\n1\n\n3\n", [0, 1, 2], None),  # one column: a blank line is a missing value
        ("year,flow\n1990,1\n1991,2\n", [1990, 1991], None),
        ("T,flow\n0.5,1\n1.0,2\n", [0.5, 1.0], None),
        ("a,flow\nx,1\ny,2\n", [0, 1], None),
        ("when;flow\n2001-01-01;1\n2001-01-02;2\n", ["2001-01-01", "2001-01-02"], 7.0),
        ("Date\tflow\n2001-01-29\t1\n2001-02-05\t2\n", ["2001-01-29", "2001-02-05"], 365.25 / 7),
        ("month,flow\n2001-01-31,1\n2001-02-28,2\n", ["2001-01-31", "2001-02-28"], 12.0),
        ("date,flow\nDec 2001,1\nJan 2002,2\n", ["2001-12-01", "2002-01-01"], 12.0),
        ("date,flow\n31.12.2001,1\n31.03.2002,2\n", ["2001-12-31", "2002-03-31"], 4.0),
        ("quarter,flow\n2001q4,1\n2002-Q1,2\n", ["2001-10-01", "2002-01-01"], 4.0),
        ("date,flow\n2001-06-01,1\n2002-06-01,2\n2003-06-01,3\n", ["2001-06-01", "2002-06-01", "2003-06-01"], None),
        ("date,flow\n1/31/2001,1\n2/1/2001,2\n", ["2001-01-31", "2001-02-01"], 7.0),
        ("date,flow\n01/11/2001,1\n01/12/2001,2\n01/01/2002,3\n", ["2001-11-01", "2001-12-01", "2002-01-01"], 12.0),
        ("year,month,flow\n2001,12,1\n2002,1,2\n", ["2001-12-01", "2002-01-01"], 12.0),
        ("date,index\n2001-01-01,1\n2001-01-02,2\n", ["2001-01-01", "2001-01-02"], 7.0),
        ("time,flow\n2001-01-01 00:30,1\n2001-01-01 01:00,2\n", ["2001-01-01T00:30", "2001-01-01T01:00"], None),
        ("\ufefftime,flow\r\n1,1\r\n2,2\r\n,\r\n\r\n", [1, 2], None),  # as a spreadsheet program writes it
    ],
)
def test_times_and_periods(tmp_path, text, time, period):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        series = read_csv(write(tmp_path, text))
    expected = np.array(time, dtype="datetime64" if isinstance(time[0], str) else None)
    np.testing.assert_array_equal(series.time, expected)
    assert series.time.dtype.kind == expected.dtype.kind
    assert series.period == period
    assert series.y.shape == (len(time), 1)


def test_choice_of_columns(tmp_path):
    path = write(tmp_path, "time,place,flow,level\n0,a,1,5\n1,b,2,6\n")
    assert read_csv(path, "level").y.tolist() == [[5], [6]]
    assert read_csv(path, ["level", "flow"]).y.tolist() == [[5, 1], [6, 2]]
    assert read_csv(path, "flow", time="level").time.tolist() == [5, 6]
    assert read_csv(path, "time").y.tolist() == [[0], [1]]


@pytest.mark.parametrize("rows", ["2001-01-01,1\n2001-01-02,2\n2001-01-09,3\n", "1,1\n2,2\n4,3\n"])
def test_irregular_times_are_kept_with_a_warning(tmp_path, rows):
    path = write(tmp_path, "time,flow\n" + rows)
    with pytest.warns(UserWarning, match=r"`time`.*'time'.*my\.csv.*treated as equally spaced") as caught:
        series = read_csv(path)
    assert len(series.time) == 3
    assert series.period is None
    assert caught[0].filename == __file__


# ---- what read_csv refuses: each message names the thing

GOOD = "time,flow,level\n0,1,5\n1,2,6\n"


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("", {}, ["`path`", "my.csv", "empty"]),
        ("\n \n", {}, ["`path`", "my.csv", "empty"]),
        (",,\n,,\n", {}, ["`path`", "my.csv", "empty"]),
        (b"PK\x03\x04\x00\x00", {}, ["`path`", "my.csv", "not text", "Excel"]),
        (b"\x01\x02\xff\x00\x00\x07", {}, ["`path`", "my.csv", "not text in UTF-8"]),
        ('t,y\n0,"1\n1,2\n', {}, ["`path`", "my.csv", "cannot be split"]),
        ("time,flow\n", {}, ["`path`", "my.csv", "only its header", "flow"]),
        ("1871,1120\n1872,1160\n", {}, ["`path`", "my.csv", "must name the columns", "1871, 1120"]),
        ("t,y,y\n0,1,2\n", {}, ["`path`", "my.csv", "'y' twice"]),
        ("t,y\n0,1\n1,2,3\n", {}, ["`path`", "my.csv", "row 2 (line 3)", "'1,2,3'"]),
        (GOOD, {"column": "Flwo"}, ["`column`", "my.csv", "'flow', 'level'", "'Flwo'", "Did you mean 'flow'"]),
        (GOOD, {"column": "flow", "time": "tim"}, ["`time`", "my.csv", "'tim'", "Did you mean 'time'"]),
        (GOOD, {}, ["`column`", "my.csv", "2 numeric columns", "'flow', 'level'"]),
        (GOOD, {"column": []}, ["`column`", "one or more"]),
        (GOOD, {"column": ["flow", "flow"]}, ["`column`", "different"]),
        ("time,a,b\n0,x,y\n1,z,w\n", {}, ["`column`", "my.csv", "no numeric column", "'a', 'b'"]),
        ("time,flow\n0,1\n1,2\n2,12a\n", {}, ["`column`", "'flow'", "my.csv", "row 3 (line 4)", "'12a'"]),
        ('time,flow\n0,1\n1,"1,200"\n', {}, ["`column`", "'flow'", "my.csv", "row 2 (line 3)", "'1,200'"]),
        ("time,flow\n0,1\n1,1_0\n", {}, ["`column`", "'flow'", "row 2 (line 3)", "'1_0'"]),
        ("time,flow,id\n0,1,7\n1,?,8\n", {}, ["`column`", "2 numeric columns", "'flow', 'id'"]),
        ("time,place\n0,here\n1,there\n", {"column": "place"}, ["`column`", "'place'", "row 1 (line 2)", "'here'"]),
        ("time,flow\n0,\n1,NA\n", {}, ["`column`", "'flow'", "my.csv", "all 2 cells"]),
        ("time,flow\n0,1\n1,-inf\n", {}, ["`column`", "'flow'", "my.csv", "row 2 (line 3)", "'-inf'"]),
        ("time,flow\n0,1\n1,1e999\n", {}, ["`column`", "'flow'", "row 2 (line 3)", "'1e999'"]),
        ("time,flow\n0,1\n2,1\n1,1\n", {}, ["`time`", "'time'", "my.csv", "row 3 (line 4)", "'1'", "after 2"]),
        ("time,flow\n0,1\n1,1\n1,1\n", {}, ["`time`", "'time'", "my.csv", "row 3 (line 4)", "'1'", "repeats"]),
        (
            "d,y\n2001-01-02,1\n2001-01-01,2\n2001-01-03,2\n",
            {},
            ["`time`", "'d'", "row 2 (line 3)", "'2001-01-01'", "2001-01-02"],
        ),
        ("d,y\n2001-01-02,1\n2001-01-02,2\n", {}, ["`time`", "'d'", "row 2 (line 3)", "'2001-01-02'", "repeats"]),
        ("d,y\n2001-01-01,1\n\n2001-02-30,2\n", {}, ["`time`", "'d'", "row 2 (line 4)", "'2001-02-30'", "YYYY-MM-DD"]),
        ("time,y\n2001-01-01,1\nnow,2\n", {}, ["`time`", "'time'", "row 2 (line 3)", "'now'"]),
        ("time,y\n2001Q4,1\n2002Q5,2\n", {}, ["`time`", "'time'", "row 2 (line 3)", "'2002Q5'"]),
        ("year,y\n1990,1\n,2\n", {}, ["`time`", "'year'", "row 2 (line 3)", "''"]),
        ("time,y\n01/02/2001,1\n02/02/2001,2\n04/02/2001,2\n", {}, ["`time`", "'time'", "'01/02/2001'", "YYYY-MM-DD"]),
        ("year,month,y\n2001,1,1\n2001,13,2\n", {}, ["`time`", "'month'", "row 2 (line 3)", "'13'"]),
    ],
)  # fmt: skip
def test_errors_name_the_thing(tmp_path, text, arguments, words):
    with pytest.raises(ValueError, match="^`(path|column|time)`") as caught:
        read_csv(write(tmp_path, text), **arguments)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def test_absent_files_and_folders(tmp_path):
    write(tmp_path, GOOD, "river.csv")
    with pytest.raises(FileNotFoundError, match=r"`path`.*rivr\.csv.*Did you mean 'river\.csv'"):
        read_csv(tmp_path / "rivr.csv")
    with pytest.raises(FileNotFoundError, match=r"`path`.*nowhere"):
        read_csv(tmp_path / "nowhere" / "a.csv")
    with pytest.raises(ValueError, match=r"`path`.*is a folder"):
        read_csv(tmp_path)


# ---- properties

numbers = st.one_of(st.just(float("nan")), st.floats(allow_nan=False, allow_infinity=False))


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(numbers, min_size=1, max_size=20).filter(lambda v: not np.isnan(v).all()), start=st.integers(-9, 9)
)
def test_any_values_come_back_bit_for_bit(tmp_path_factory, values, start):
    rows = "".join(f"{start + i},{'' if np.isnan(v) else repr(v)}\n" for i, v in enumerate(values))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`column`.*far outside")  # which some draws are
        series = read_csv(write(tmp_path_factory.mktemp("csv"), "t,y\n" + rows))
    np.testing.assert_array_equal(series.y[:, 0], values)
    np.testing.assert_array_equal(series.time, np.arange(start, start + len(values)))


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet='ty,;\n01.-"aN/Q ', max_size=60))
def test_any_text_is_read_or_refused_in_words(tmp_path_factory, text):
    path, refusal = write(tmp_path_factory.mktemp("csv"), text), ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            series = read_csv(path)
        except ValueError as error:
            refusal = str(error)
    if refusal:
        assert refusal.startswith(("`path`", "`column`", "`time`"))
    else:
        assert series.y.shape == (len(series.time), 1)
        assert not np.isinf(series.y).any()
