"""`pssm fit`, `pssm backtest` and `pssm impact`: their files and pages, and what they refuse."""

import numpy as np
import pandas as pd
import pytest

import pssm
from pssm import datasets
from pssm.cli import main
from pssm.study.commands import _moment
from pssm.study.residual_part import ODD, residuals_of, words_on_tests


@pytest.fixture
def sales(tmp_path):
    rng = np.random.default_rng(1)
    x = 500 + np.cumsum(rng.normal(size=100))
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=100), "other": x,
                          "sales": 1.2 * x + rng.normal(size=100) + 10 * (np.arange(100) >= 70)})  # fmt: skip
    frame.to_csv(tmp_path / "sales.csv", index=False)
    return str(tmp_path / "sales.csv")


def page_of(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    return page


def test_fit(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["fit", "nile", "--starts", "2", "--horizon", "4", "--out", str(out), "--quiet"]) == 0
    found = pd.read_csv(out / "parameters.csv", index_col="parameter")
    assert found.estimate["sigma_obs"] ** 2 == pytest.approx(15099, rel=1e-4)
    assert len(pd.read_csv(out / "forecast.csv")) == 4
    assert pd.read_csv(out / "residuals.csv").time.iloc[0] == 1871
    components = pd.read_csv(out / "components.csv").pivot(index="time", columns="component", values="mean")
    assert list(components) == ["irregular", "level"]
    assert components.sum(axis=1)[1871] == pytest.approx(1120, abs=0.01)
    assert (out / "components.png").stat().st_size > 5000
    page = page_of(out)
    for words in ("nile: local_level", "-640.8941", "no test finds anything wrong", "data:image/png"):
        assert words in page
    assert (out / "states.png").stat().st_size > 5000
    assert (out / "residuals.png").stat().st_size > 5000
    assert "Report:" in capsys.readouterr().out


def test_backtest(tmp_path):
    out = tmp_path / "out"
    call = ["backtest", "elnino", "--model", "seasonal", "--harmonics", "2", "--origins", "3", "--horizon", "6"]
    assert main([*call, "--refit", "first", "--out", str(out), "--quiet"]) == 0
    scores = pd.read_csv(out / "scores.csv")
    assert set(scores.method) == {"ml", "naive", "seasonal naive"}
    assert len(pd.read_csv(out / "origins.csv")) == 9
    page = page_of(out)
    assert "of the naive forecast" in page
    assert "By step ahead" in page


def test_impact(sales, tmp_path, capsys):
    out = tmp_path / "out"
    call = ["impact", sales, "--column", "sales", "--controls", "other", "--from", "2024-03-11", "--method", "ml"]
    assert main([*call, "--out", str(out)]) == 0
    effects = pd.read_csv(out / "effects.csv", index_col=0)
    assert effects.effect_low["average"] < 10 < effects.effect_high["average"]
    page = page_of(out)
    for words in ("From 2024-03-11 on, over 30 steps", "A start that never was", "other"):
        assert words in page
    assert "no effect, as it should be" in capsys.readouterr().out
    assert len(pd.read_csv(out / "steps.csv")) == 100


def test_regressors_of_a_fit(sales, tmp_path):
    out = tmp_path / "out"
    call = ["fit", sales, "--column", "sales", "--inputs", "other", "--starts", "2", "--out", str(out), "--quiet"]
    assert main(call) == 0
    assert "beta[0]" in pd.read_csv(out / "parameters.csv").parameter.to_list()
    assert "No forecast: there are no regressors behind the last value of the series." in page_of(out)


def test_a_file_is_read_as_by_compare(sales, tmp_path, capsys):
    frame = pd.read_csv(sales, parse_dates=["date"])
    frame.loc[95:, "sales"] = np.nan  # known regressors of the future
    frame.loc[20, "sales"] = -999
    frame["date"] = frame["date"].dt.strftime("%d/%m/%Y")
    frame.to_csv(tmp_path / "with_commas.csv", sep=";", decimal=",", index=False)
    out = tmp_path / "out"
    call = ["fit", str(tmp_path / "with_commas.csv"), "--column", "sales", "--inputs", "other", "--missing", "-999"]
    assert main([*call, "--starts", "2", "--out", str(out), "--quiet"]) == 0
    forecast = pd.read_csv(out / "forecast.csv")
    assert forecast.horizon.to_list() == [f"2024-04-0{day}" for day in range(5, 10)]
    assert "decimal mark" in capsys.readouterr().err
    assert "decimal mark" in page_of(out)


LABELS = np.arange("2014-01-01", "2014-04-11", dtype="datetime64[D]").astype("datetime64[s]")


@pytest.mark.parametrize(
    ("text", "dayfirst", "meant"),
    [
        ("2014-03-12", None, "2014-03-12"),
        ("12/03/2014", None, "2014-03-12"),  # 3 December lies outside
        ("12 March 2014", None, "2014-03-12"),
        ("01/03/2014", "yes", "2014-03-01"),
        ("01/03/2014", "no", "2014-01-03"),
    ],
)
def test_a_date_of_the_command_line(text, dayfirst, meant):
    assert _moment(text, LABELS, dayfirst) == np.datetime64(meant)


@pytest.mark.parametrize(("text", "words"), [("01/03/2014", "day or its month first"), ("soon", "must be a date")])
def test_a_date_that_is_none(text, words):
    with pytest.raises(ValueError, match=words):
        _moment(text, LABELS, None)


def test_words_on_residuals():
    class Found:
        table = pd.DataFrame({"ljung_box_p": [ODD / 2, 0.5], "jarque_bera_p": [0.5, 0.5], "h_p": [0.5, np.nan]},
                             index=["a", "b"])  # fmt: skip

    assert words_on_tests(Found)[0].startswith("a: residuals are correlated in time")
    assert words_on_tests(Found)[1:] == ["b: no test finds anything wrong with the residuals."]


def test_residuals_in_the_report_of_a_study(tmp_path):
    y = np.array(datasets.load("nile").y)
    options = {"num_warmup": 100, "num_samples": 100, "num_chains": 2, "horizon": 2, "progress": False}
    study = pssm.compare("local_level", y, ["nuts"], column="flow", time=np.arange(1871, 1971), **options)
    left = residuals_of(study)
    assert left.names == ("flow",)
    assert left.time[0] == 1871
    page = study.report(tmp_path).read_text(encoding="utf-8")
    assert "flow: no test finds anything wrong with the residuals." in page
    assert (tmp_path / "residuals.png").exists()
    study.results["nuts"].fit = None
    assert residuals_of(study) is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["fit", "nil"], "neither a data set"),
        (["fit", "nile", "--starts", "0"], "`--starts` must be at least 1"),
        (["fit", "nile", "--model", "guess"], "`--model` must be one of"),
        (["fit", "nile", "--period", "4"], "`--period` does not go with"),
        (["fit", "macrodata", "--inputs", "infl"], "`--column` is needed beside other columns"),
        (["backtest", "nile", "--refit", "often"], "`--refit` must be all, first, or a number"),
        (["backtest", "nile", "--horizon", "100"], "`horizon` must leave"),
        (["impact", "nile", "--from", "soon"], "`--from` must be a number"),
        (["impact", "nile", "--from", "1990"], "`start` must have data from it on"),
        (["impact", "macrodata", "--column", "infl", "--controls", "infl", "--from", "2000"], "both name"),
    ],
)
def test_refusals(call, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(call) == 2
    assert words in capsys.readouterr().err


def test_results_that_are_there_stay(tmp_path, capsys):
    assert main(["fit", "nile", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
