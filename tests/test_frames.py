"""Frames and series of pandas, and masked arrays, as data: their index is the time, their columns name the series."""

import warnings
from decimal import Decimal

import numpy as np
import numpyro
import pandas as pd
import pytest
import xarray as xr

from pssm import compare, datasets, fit_em, kalman_filter, models
from pssm._checks import as_float, unmasked
from pssm.diagnostics import to_datatree
from pssm.diagnostics.tree import rehearse
from pssm.infer import fit_nuts, fit_svi, load, resume, save
from pssm.inspection.check import check_model
from pssm.plots import plot_states
from pssm.ssm import LinearGaussianSSM
from pssm.storage.labels import pack_labels, unpack_labels
from pssm.study.forecasts import forecast_saved
from pssm.study.saved import load_plan
from pssm.times.grid import future_labels, labels_after
from pssm.times.labels import as_labels, label_array

pytestmark = pytest.mark.filterwarnings("ignore:SVI has not converged")
STEPS = 24
Y = datasets.load("nile").y[:STEPS, 0]
QUICK = {"svi_steps": 30, "progress": False, "leave_future_out": False, "horizon": 3}

# Ways of labelling a year and a half or so, what a tree has, and the labels of the three steps after.
INDICES = {
    "month ends": pd.date_range("2019-01-31", periods=STEPS, freq="ME"),
    "months": pd.period_range("2019-01", periods=STEPS, freq="M"),
    "quarters": pd.period_range("2015Q1", periods=STEPS, freq="Q"),
    "hours of Berlin": pd.date_range("2020-10-24 20:00", periods=STEPS, freq="h", tz="Europe/Berlin"),
    "days of New York": pd.date_range("2020-03-01", periods=STEPS, tz="America/New_York"),
    "business days": pd.date_range("2020-01-01", periods=STEPS, freq="B"),
    "dates of Python": [x.date() for x in pd.date_range("2020-01-01", periods=STEPS)],
    "texts": [f"{x:%Y-%m}" for x in pd.date_range("2019-01-01", periods=STEPS, freq="MS")],
    "quarters as texts": [str(x) for x in pd.period_range("2015Q1", periods=STEPS, freq="Q")],
    "months since 1659": np.arange("1659-01", "1661-01", dtype="datetime64[M]"),
    "years": list(range(1990, 1990 + STEPS)),
}


@pytest.mark.parametrize("name", INDICES)
def test_every_kind_of_time_through_tree_file_and_figure(name):
    """The tree of a fit with one draw, saved and loaded: `rehearse` compiles nothing."""
    time = INDICES[name]
    tree = rehearse(models.local_level, (Y,), {}, time=time, horizon=3, future_time=future_labels(time, 3))
    labels, future = tree["observed_data"]["time"].values, tree["forecast"]["horizon"].values
    np.testing.assert_array_equal(labels, label_array("time", time))
    assert len(np.unique(labels)) == STEPS
    assert labels.dtype.kind == future.dtype.kind
    if isinstance(time, pd.DatetimeIndex):
        after = time[-1] + time.freq
        assert future[0] == (after.tz_convert("UTC").tz_localize(None) if time.tz else after).to_datetime64()
    if isinstance(time, pd.PeriodIndex):
        assert future[0] == (time[-1] + 1).to_timestamp().to_datetime64()
    if name == "texts":
        assert future.tolist() == ["2021-01", "2021-02", "2021-03"]
    if name == "quarters as texts":
        assert future.tolist() == ["2021Q1", "2021Q2", "2021Q3"]
    forecast = tree["forecast"].to_dataset().expand_dims(series=1, axis=-1)
    drawn = xr.DataTree.from_dict({"observed_data": tree["observed_data"].to_dataset(), "forecast": forecast})
    assert len(plot_states(drawn).axes) == 1


@pytest.mark.parametrize("name", INDICES)
def test_the_plan_of_a_study_keeps_the_labels(name):
    """Saved and loaded as they are: a time zone and a period go on as such."""
    arrays = {}
    given = as_labels("time", INDICES[name])
    entry = pack_labels(given, arrays)
    found = unpack_labels(entry, arrays)
    assert list(found) == list(given)
    assert list(labels_after(found, 3)) == list(labels_after(given, 3))


def test_labels_of_a_frame_come_back(tmp_path):
    """A frame into a fit: index and column are in the tree, also after saving, loading and going on."""
    frame = pd.DataFrame({"flow": Y}, index=INDICES["hours of Berlin"])
    fit = fit_svi(models.local_level, frame, num_steps=30, progress_bar=False)
    longer = resume(fit, num_steps=40, progress_bar=False)
    for found in (fit, load(save(fit, tmp_path / "fit")), longer):
        tree = to_datatree(found, forecast=2, num_samples=10)
        expected = frame.index.tz_convert("UTC").tz_localize(None)
        assert (tree["observed_data"]["time"].values == expected.to_numpy()).all()
        assert tree["observed_data"]["series"].values.tolist() == ["flow"]
        assert tree["forecast"]["horizon"].values[0] == (expected[-1] + pd.Timedelta("1h")).to_datetime64()
    np.testing.assert_array_equal(tree["observed_data"]["y"].values[:, 0], Y.astype(np.float32))


def test_a_series_into_nuts():
    y = pd.Series(Y, index=INDICES["month ends"], name="flow")
    mcmc = fit_nuts(models.local_level, y, num_warmup=10, num_samples=10, num_chains=1, progress_bar=False)
    tree = to_datatree(mcmc, forecast=1)
    assert (tree["observed_data"]["time"].values == y.index.to_numpy()).all()
    assert tree["forecast"]["horizon"].values.tolist() == pd.DatetimeIndex(["2021-01-31"]).to_numpy().tolist()
    again = to_datatree(mcmc, time=np.arange(STEPS), coords={"series": ["other"]})
    assert again["observed_data"]["series"].values.tolist() == ["other"]
    assert again["observed_data"]["time"].values.tolist() == list(range(STEPS))


def test_a_frame_into_a_study(tmp_path):
    frame = pd.DataFrame({"flow": Y}, index=INDICES["months"])
    frame.iloc[5, 0] = np.nan
    study = compare("local_level", frame, ["svi:normal"], out=tmp_path, **QUICK)
    assert study.column == "flow"
    assert study.time[0] == np.datetime64("2019-01-01")
    assert np.isnan(study.y[5, 0])
    tree = study.results["svi:normal"].tree
    assert tree["forecast"]["horizon"].values[-1] == np.datetime64("2021-03-01")
    plan = load_plan(tmp_path)
    assert list(plan.time) == list(frame.index)
    assert list(plan.future_time) == list(pd.period_range("2021-01", periods=3, freq="M"))
    table, _, _ = forecast_saved(tmp_path, 13)
    assert table["time"].iloc[-1] == pd.Timestamp("2022-01-01")


def test_irregular_times_are_known_before_the_work(monkeypatch):
    """The warning comes before anything is run, and stands in the study."""
    time = pd.to_datetime("2020-01-01") + pd.to_timedelta(np.arange(STEPS) ** 2, unit="D")
    order = []
    monkeypatch.setattr("pssm.study.compare.run_method", lambda *a, **k: order.append("run") or _stop())
    with pytest.warns(UserWarning, match="cannot be continued.*`future_time`"):
        study = compare("local_level", Y, ["svi:normal"], time=time, **QUICK)
    assert order == ["run"]
    assert any("`future_time`" in text for text in study.warnings)
    assert any("not equally spaced" in text for text in study.warnings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare("local_level", Y, ["svi:normal"], time=time, future_time=[1, 2, 3], **QUICK)


def _stop():
    raise RuntimeError("not run")


@pytest.mark.parametrize(
    ("time", "words"),
    [
        (INDICES["years"][:5], "`time` must have 24 labels.*got 5"),
        ([*INDICES["years"][:-1], 1990], "`time` must increase.*label 24"),
        ([*INDICES["dates of Python"][:-1], None], "`time`.*row 24 is missing"),
        (pd.MultiIndex.from_product([["a", "b"], range(12)]), "`time`.*2 levels"),
    ],
)
def test_bad_labels_stop_a_study_at_once(time, words, monkeypatch):
    monkeypatch.setattr("pssm.study.compare.run_method", lambda *a, **k: pytest.fail("it was run"))
    with pytest.raises(ValueError, match=words):
        compare("local_level", Y, ["svi:normal"], time=time, **QUICK)


def test_an_index_that_goes_back_is_refused():
    frame = pd.DataFrame({"flow": Y}, index=INDICES["month ends"][::-1])
    for run in (
        lambda: fit_svi(models.local_level, frame),
        lambda: compare("local_level", frame, ["svi:mvn"], **QUICK),
    ):
        with pytest.raises(ValueError, match=r"the index of `y` must increase.*sort_index"):
            run()


MASKED = np.ma.masked_array(Y, mask=np.arange(STEPS) == 3)
MISSING = np.where(np.arange(STEPS) == 3, np.nan, Y)
FORMS = {
    "masked": MASKED,
    "series": pd.Series(MISSING),
    "frame": pd.DataFrame({"a": MISSING}),
    "nullable": pd.Series(MASKED.filled(0), dtype="Float64").mask(np.arange(STEPS) == 3),
    "nullable whole numbers": pd.Series(MASKED.filled(0).astype(int), dtype="Int64").mask(np.arange(STEPS) == 3),
    "objects with NA": pd.Series([pd.NA if np.isnan(v) else v for v in MISSING], dtype=object),
    "objects with None": pd.Series([None if np.isnan(v) else Decimal(str(v)) for v in MISSING], dtype=object),
}


@pytest.mark.parametrize("name", FORMS)
def test_missing_entries_stay_missing_everywhere(name):
    y = FORMS[name]
    np.testing.assert_array_equal(np.ravel(unmasked(y)), MISSING)
    np.testing.assert_array_equal(np.ravel(as_float("y", y)), MISSING.astype(np.float32))
    assert check_model(models.local_level, unmasked(y)).missing == {"y": 1}
    trace = numpyro.handlers.trace(numpyro.handlers.seed(models.local_level, 0)).get_trace(y)
    np.testing.assert_array_equal(np.isnan(trace["y"]["value"][:, 0]), np.isnan(MISSING))
    ssm = LinearGaussianSSM(np.full(1, 1000.0), np.eye(1), np.eye(1), np.eye(1), np.eye(1), np.eye(1))
    assert float(kalman_filter(ssm, y).log_likelihood) == float(kalman_filter(ssm, MISSING).log_likelihood)


def test_a_masked_array_in_a_study(monkeypatch):
    monkeypatch.setattr("pssm.study.compare.run_method", lambda *a, **k: _stop())
    for y in (MASKED, FORMS["nullable"], FORMS["objects with NA"]):
        study = compare("local_level", y, ["svi:normal"], **QUICK)
        np.testing.assert_array_equal(study.y[:, 0], MISSING.astype(np.float32))


def test_frames_into_em_and_models():
    frame = pd.DataFrame({"a": MISSING})
    start = LinearGaussianSSM(
        np.full(1, 1000.0), 100 * np.eye(1), np.eye(1), 50 * np.eye(1), np.eye(1), 100 * np.eye(1)
    )
    options = {"fixed": ("m0", "P0", "A", "C"), "num_iters": 3}
    found, expected = fit_em(frame, start, **options), fit_em(MISSING[:, None], start, **options)
    np.testing.assert_array_equal(found.log_likelihoods, expected.log_likelihoods)


def test_frames_of_other_rows_are_refused(monkeypatch):
    """Regressors stand beside the data row by row; what goes on behind them is the future."""
    y = pd.Series(Y, index=INDICES["months"], name="flow")
    u = pd.DataFrame({"rain": np.arange(30.0)}, index=pd.period_range("2019-01", periods=30, freq="M"))
    for run in (
        lambda: compare("local_level", y, ["svi:normal"], u=u.iloc[1:25], **QUICK),
        lambda: fit_svi(models.local_level, y, u=u, progress_bar=False),
    ):
        with pytest.raises(ValueError, match=r"`u` and the data have different indices.*reindex\(y\.index\)"):
            run()
    seen = []
    monkeypatch.setattr("pssm.study.compare.run_method", lambda *a, **k: seen.append(a[4]) or _stop())
    compare("local_level", y, ["svi:normal"], u=u, **QUICK)
    assert seen[0]["u_future"].tolist() == [[24.0], [25.0], [26.0]]


@pytest.mark.parametrize(
    "y",
    [pd.DataFrame({"flow": Y, "city": "x"}), pd.Series(["1"] * STEPS), pd.Series(pd.date_range("2020", periods=STEPS))],
    ids=["a column of texts", "texts", "dates"],
)
def test_what_is_no_number_is_refused_by_name(y):
    for run in (
        lambda: compare("local_level", y, ["svi:normal"], **QUICK),
        lambda: fit_nuts(models.local_level, y),
        lambda: models.local_level(y),
    ):
        with pytest.raises(TypeError, match="`y` must be numbers.*dtype"):
            run()
