"""`pssm fit`, `pssm backtest` and `pssm impact`: their files and pages, and what they refuse."""

import numpy as np
import pandas as pd
import pytest

from pssm.cli import main
from pssm.study.analysis import ODD, _tests


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
    assert "No forecast: the regressors of the future are not known." in page_of(out)


def test_words_on_residuals():
    class Found:
        table = pd.DataFrame({"ljung_box_p": [ODD / 2, 0.5], "jarque_bera_p": [0.5, 0.5], "h_p": [0.5, np.nan]},
                             index=["a", "b"])  # fmt: skip

    assert _tests(Found)[0].startswith("a: residuals are correlated in time")
    assert _tests(Found)[1:] == ["b: no test finds anything wrong with the residuals."]


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
