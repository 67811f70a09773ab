"""The command line on files as they come: how a file is read, regressors and their future, and words on all of it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pssm import compare
from pssm.cli import _parser, main
from pssm.diagnostics import load_tree
from pssm.study.saved import load_plan
from pssm.study.series_arguments import input_options, read_series

pytestmark = pytest.mark.filterwarnings("ignore:SVI has not converged")
QUICK = ["--methods", "svi:normal", "--steps", "2000", "--quiet", "--budget", "0"]
TEMPERATURES = [5 * i % 7 for i in range(36)]
LOAD = "date,hour,mw,temp\n" + "".join(
    f"2020-01-{1 + i // 24:02d},{i % 24},{'' if i >= 30 else 100 + 5 * t},{t}\n" for i, t in enumerate(TEMPERATURES)
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(text, *options):
    Path("my.csv").write_text(text)
    return read_series(_parser().parse_args(["compare", "my.csv", *options]))


@pytest.mark.parametrize(
    ("text", "options", "y", "time"),
    [
        ("t,x\n1,1.234\n2,987\n", ["--thousands", "."], [1234, 987], [1, 2]),
        ("t,x\n1,1.234\n2,987\n", ["--decimal", "."], [1.234, 987], [1, 2]),
        ("t,x\n1,5\n2,-999\n3,M\n", ["--missing", "-999", "--missing", "M"], [5, np.nan, np.nan], [1, 2, 3]),
        ("d,x\n1/2/2020,5\n2/2/2020,6\n", ["--dayfirst", "yes"], [5, 6], ["2020-02-01", "2020-02-02"]),
        ("d,x\n1/2/2020,5\n2/2/2020,6\n", ["--dayfirst", "no"], [5, 6], ["2020-01-02", "2020-02-02"]),
        ("a,b,x\n2020,5,1\n2020,6,2\n", ["--time", "a", "--time", "b"], [1, 2], ["2020-05-01", "2020-06-01"]),
        (
            "d,x\n2020-07-01 00:00,1\n2020-07-01 01:00,2\n",
            ["--timezone", "Europe/Berlin"],
            [1, 2],
            ["2020-06-30T22", "2020-06-30T23"],
        ),
    ],
)
def test_options_say_how_a_file_is_read(text, options, y, time):
    series = read(text, *options)
    np.testing.assert_array_equal(series.y[:, 0], y)
    np.testing.assert_array_equal(series.time, np.array(time, "datetime64" if isinstance(time[0], str) else None))


def test_what_there_is_to_say_is_said(capsys):
    read("d,x\n2020-01-03,5\n2020-01-02,6\n2020-01-01,7\n")
    assert "pssm: `time`: the rows of 'my.csv' go from new to old" in capsys.readouterr().err


def test_inputs_of_a_file_and_their_future():
    series = read(LOAD, "--column", "mw", "--inputs", "temp")
    assert series.y.shape == (30, 1)
    assert series.u[:, 0].tolist() == TEMPERATURES[:30]
    assert series.u_future[:, 0].tolist() == TEMPERATURES[30:]
    assert series.future_time[0] == np.datetime64("2020-01-02T06")
    assert series.inputs == ("temp",)
    options, ahead, horizon = input_options(series, "local_level", None)
    assert (list(options), len(ahead), horizon) == (["u"], 6, 6)
    assert input_options(series, "local_level", 2)[2] == 2


def test_a_gap_within_the_series_is_no_future():
    series = read("t,x,u\n1,5,1\n2,,2\n3,6,3\n4,,4\n5,,\n", "--column", "x", "--inputs", "u")
    np.testing.assert_array_equal(series.y[:, 0], [5, np.nan, 6])
    assert series.u_future.tolist() == [[4]]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (LOAD, ["--column", "mw", "--inputs", "tmp"], ["`inputs`", "'tmp'", "Did you mean 'temp'"]),
        (LOAD, ["--column", "mw", "--inputs", "mw"], ["`inputs` and `column`", "'mw'"]),
        (LOAD, ["--column", "mw", "--inputs", "temp", "--horizon", "9"], ["`--horizon` 9", "there are 6"]),
        (
            LOAD,
            ["--column", "mw", "--inputs", "temp", "--model", "stochastic_volatility"],
            ["`u`", "no inputs"],
        ),
        ("t,x,u\n1,5,1\n2,6,\n3,6,3\n", ["--column", "x", "--inputs", "u"], ["`inputs`", "'u'", "row 2 (line 3)"]),
        ("t,x\n1,5\n2,6\n", ["--decimal", ";"], ["`decimal`", "';'"]),
        ("t,x\n1,5\n2,6\n", ["--decimal", ",", "--thousands", ","], ["`decimal` and `thousands`"]),
        ("d,x\n2020-07-01 00:00,1\n2020-07-01 01:00,2\n", ["--timezone", "Europe/Berln"], ["`timezone`", "Berln"]),
        ("date,hour,mw\n2020-01-31,22,1\n2020-01-31,23,2\n", ["--time", "date"], ["--time date --time hour"]),
    ],
)
def test_refusals_name_the_next_step(capsys, text, options, words):
    Path("my.csv").write_text(text)
    assert main(["compare", "my.csv", *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("pssm: ")
    assert not [word for word in words if word not in message], message
    assert not Path("results").exists()


@pytest.mark.parametrize(("kind", "engine"), [("xlsx", "openpyxl"), ("parquet", "pyarrow")])
def test_an_absent_engine_is_named(capsys, monkeypatch, kind, engine):
    def absent(*args, **kwargs):
        raise ImportError("Missing optional dependency")

    monkeypatch.setattr(pd, "read_excel", absent)
    monkeypatch.setattr(pd, "read_parquet", absent)
    Path(f"my.{kind}").write_bytes(b"PK")
    assert main(["compare", f"my.{kind}"]) == 2
    assert f"pip install {engine}" in capsys.readouterr().err


def test_tables_of_excel_and_parquet(monkeypatch):
    """Through pandas, whose engines are stood in for: typed columns, a row above the table, an index of dates."""
    days = pd.date_range("2020-01-01", periods=3)
    sheet = pd.DataFrame([[None, None], ["day", "x"], *([d, v] for d, v in zip(days, (1.5, None, 3), strict=True))])
    monkeypatch.setattr(pd, "read_excel", lambda *a, **k: sheet)
    monkeypatch.setattr(pd, "read_parquet", lambda *a, **k: pd.DataFrame({"x": [1.5, np.nan, 3]}, index=days))
    for name in ("my.xlsx", "my.parquet"):
        Path(name).write_bytes(b"")
        series = read_series(_parser().parse_args(["compare", name]))
        np.testing.assert_array_equal(series.y[:, 0], [1.5, np.nan, 3])
        np.testing.assert_array_equal(series.time, days.to_numpy().astype("datetime64[D]"))
        assert series.columns == ("x",)


def test_an_embedded_series_takes_no_options_of_files(capsys):
    assert main(["compare", "nile", "--missing", "-999"]) == 2
    assert "`--missing` goes with a file" in capsys.readouterr().err


def test_inputs_reach_the_forecast(capsys):
    """From the file to the report: the forecast follows the regressor; so does a later one, from the saved study."""
    Path("my.csv").write_text(LOAD)
    command = ["compare", "my.csv", "--column", "mw", "--inputs", "temp", "--out", "out", *QUICK]
    assert main([*command, "--model", "local_level"]) == 0
    forecast = load_tree("out/svi-normal.nc")["forecast"]
    assert forecast["horizon"].values[0] == np.datetime64("2020-01-02T06:00")
    mean = forecast["mean"].values[:, 0]
    assert np.corrcoef(mean, TEMPERATURES[30:])[0, 1] > 0.99
    assert load_plan("out").u_future.shape == (6, 1)
    assert main(["forecast", "out"]) == 0
    table = pd.read_csv("out/forecast/forecast.csv")
    np.testing.assert_allclose(table["mean"], mean, rtol=1e-3)
    assert main(["forecast", "out", "--horizon", "7", "--force"]) == 2
    assert "`horizon` must be at most 6" in capsys.readouterr().err


def test_a_study_without_the_inputs_of_its_future(monkeypatch):
    def stop(*args, **kwargs):
        raise RuntimeError("not run")

    monkeypatch.setattr("pssm.study.compare.run_method", stop)
    y, u = np.arange(20.0), np.arange(20.0)
    with pytest.warns(UserWarning, match="no forecast.*`u_future`"):
        study = compare("local_level", y, ["svi:normal"], u=u, progress=False)
    assert "u_future" in study.warnings[0]
    with pytest.raises(ValueError, match="`u_future` must have a row for each of the 10 steps.*got 3"):
        compare("local_level", y, ["svi:normal"], u=u, u_future=u[:3], progress=False)
    with pytest.raises(ValueError, match="`u_future` is given without `u`"):
        compare("local_level", y, ["svi:normal"], u_future=u[:10], progress=False)
