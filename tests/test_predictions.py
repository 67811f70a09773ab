"""Predictions in sample, dynamic ones and those beyond the end, against statsmodels and the dense joint."""

import functools

import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pandas as pd
import pytest
from statsmodels.tsa.statespace.structural import UnobservedComponents

import pssm
from pssm import LinearGaussianSSM, datasets, infer, models
from pssm.diagnostics import predictions
from pssm.distributions import LinearGaussianMarginal

YEARS = datasets.load("nile").time
NILE = np.array(datasets.load("nile").y)
NILE[[10, 40, 41]] = np.nan
FLOWS = pd.DataFrame({"flow": NILE[:, 0]}, index=pd.period_range("1871", periods=100, freq="Y"))
SSM = LinearGaussianSSM.from_covariances([0.0], [[1e7]], [[1.0]], [[1469.1]], [[1.0]], [[15099.0]])


def peer():
    model = UnobservedComponents(NILE[:, 0], "llevel")
    model.ssm.initialize_known(np.zeros(1), 1e7 * np.eye(1))
    return model.smooth([15099.0, 1469.1])


@pytest.mark.parametrize("dynamic", [None, 60])
def test_they_are_those_of_statsmodels(dynamic, x64):
    """A dynamic start leaves the forecasts behind the end of the data with the same past."""
    found = predictions(SSM, NILE, dynamic=dynamic, horizon=6, level=0.95)
    truth = peer().get_prediction(0, 105, dynamic=False if dynamic is None else dynamic)
    inside = slice(0, 100) if dynamic is None else slice(0, 106)
    np.testing.assert_allclose(found.mean[inside, 0], truth.predicted_mean[inside], atol=1e-6)
    np.testing.assert_allclose(found.sd[inside, 0], truth.se_mean[inside], rtol=1e-6)
    band = truth.conf_int(alpha=0.05)
    np.testing.assert_allclose(found.low[inside, 0], band[inside, 0], atol=1e-5)
    np.testing.assert_allclose(found.high[inside, 0], band[inside, 1], atol=1e-5)
    ahead = pssm.forecast(SSM, NILE if dynamic is None else NILE[:60], 6 if dynamic is None else 46)
    np.testing.assert_allclose(found.mean[-6:], ahead.mean[-6:], atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_they_are_those_of_the_dense_joint(dtype):
    """Inputs, offsets, time variation, several series with correlated noise."""
    import jax

    with jax.enable_x64(dtype == np.float64):
        rng = np.random.default_rng(1)
        timed = ("A", "chol_Q", "C", "chol_R", "b", "d", "B", "D")
        params = oracles.random_model(rng, m=2, steps=9, timed=timed, offsets=True)
        ssm = LinearGaussianSSM(**{n: x if n == "time_varying" else x.astype(dtype) for n, x in params.items()})
        y, u = oracles.with_holes(rng, rng.normal(size=(7, 2))).astype(dtype), rng.normal(size=(9, 2)).astype(dtype)
        found = predictions(ssm, y, u[:7], dynamic=4, horizon=2, u_future=u[7:])
        j = oracles.joint(ssm, 9, u)
        for t in range(9):
            mean, cov = oracles.condition(j, j.y(t), *oracles.seen(j, np.concatenate([y, y[:2]]), min(t, 4)))
            tolerance = 1e-9 if dtype == np.float64 else 1e-4
            np.testing.assert_allclose(found.mean[t], mean, atol=tolerance)
            np.testing.assert_allclose(found.sd[t], np.sqrt(np.diag(cov)), atol=tolerance)
    assert found.kind.tolist() == ["one step"] * 4 + ["dynamic"] * 3 + ["forecast"] * 2


@functools.cache
def fitted():
    return infer.fit_ml(models.local_level, FLOWS, num_starts=1, progress_bar=False)


def test_of_a_fit_with_dates():
    found = predictions(fitted(), dynamic="1960", horizon=3)
    assert found.names == ("flow",)
    assert found.time[[0, -1]].astype("M8[D]").astype(str).tolist() == ["1871-01-01", "1973-01-01"]
    assert found.time[found.kind == "dynamic"][0] == np.datetime64("1960-01-01")
    for same in (pd.Period("1960"), pd.Timestamp("1959-06-01"), 89):
        np.testing.assert_array_equal(predictions(fitted(), dynamic=same, horizon=3).mean, found.mean)
    ahead = infer.forecast(fitted(), 14, origin=89)
    np.testing.assert_allclose(found.mean[89:], ahead.mean, rtol=1e-5)
    np.testing.assert_allclose(found.sd[89:], ahead.sd, rtol=1e-4)
    table = found.table
    assert table.shape == (103, 8)
    assert table.observed.isna().sum() == 6
    assert table.groupby("kind").size().to_dict() == {"one step": 89, "dynamic": 11, "forecast": 3}
    figure = found.plot(title="Nile")
    assert len(figure.axes) == 1
    everything = predictions(fitted(), dynamic=True)
    assert (everything.kind == "dynamic").all()
    assert np.ptp(everything.mean) < 1e-2  # nothing is known but the prior


def test_draws_are_a_mixture():
    """A posterior of two draws: moments and bands are those of the mixture."""
    sigma = np.array([[1.0, 3.0]])

    def walk(y, u=None):
        sd = numpyro.sample("sd", dist.HalfNormal(1.0))
        effect = None if u is None else np.ones((1, 1))
        ssm = LinearGaussianSSM(np.zeros(1), np.eye(1), np.eye(1), sd * np.eye(1), np.eye(1), np.eye(1), D=effect)
        numpyro.sample("y", LinearGaussianMarginal(ssm, len(y), u), obs=y)

    class Fixed:
        def __call__(self, num_samples, key, args, kwargs):
            return {"sd": sigma}

    y, u = np.arange(6.0)[:, None], np.linspace(0, 1, 8)[:, None]
    fit = infer.FitRecord("two draws", walk, (y,), {"u": u[:6]}, Fixed(), "none")
    found = predictions(fit, dynamic=4, horizon=2, u_future=u[6:], level=0.8)
    each = []
    for sd in sigma[0]:
        ssm = LinearGaussianSSM([0.0], [[1.0]], [[1.0]], [[sd]], [[1.0]], [[1.0]], D=[[1.0]])
        one = predictions(ssm, y, u[:6], dynamic=4, horizon=2, u_future=u[6:])
        each.append((one.mean[:, 0], one.sd[:, 0] ** 2))
    mean, variance = np.array(each).transpose(1, 0, 2)
    np.testing.assert_allclose(found.mean[:, 0], mean.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.sd[:, 0], np.sqrt(variance.mean(0) + mean.var(0)), rtol=1e-5)
    from scipy import stats

    for edge, share in ((found.low, 0.1), (found.high, 0.9)):
        np.testing.assert_allclose(stats.norm.cdf(edge[:, 0], mean, np.sqrt(variance)).mean(0), share, atol=1e-5)
    with pytest.raises(ValueError, match="`u_future` is required"):
        predictions(fit, horizon=2)


def test_in_sample_coverage_of_a_right_model():
    """One-step bands of 90 % hold 90 % of a series that the model made."""
    import jax

    ssm = LinearGaussianSSM([0.0], [[1.0]], [[0.9]], [[1.0]], [[1.0]], [[1.0]])
    y = np.asarray(pssm.simulate(jax.random.key(5), ssm, 2000)[1])
    found = predictions(ssm, y)
    inside = ((y > found.low) & (y < found.high)).mean()
    assert abs(inside - 0.9) < 4 * (0.09 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dynamic": "1800"}, "`dynamic` must be a label from 1871-01-01"),
        ({"dynamic": "later"}, "`dynamic` must be a label"),
        ({"dynamic": 200}, "`dynamic` must be a label.*or the number of a step; got 200"),
        ({"level": 1.5}, "`level` must lie between 0 and 1"),
        ({"horizon": -1}, "`horizon` must be at least 0"),
        ({"horizon": 2, "future_time": ["2000"]}, "`future_time` must have 2 labels"),
        ({"names": ("a", "b")}, "`names` must have 1 names"),
        ({"y": NILE}, "a fit has its own data"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        predictions(fitted(), **options)


def test_series_of_a_plate_stand_side_by_side():
    """Two series of one model, each as it would be alone."""
    y = np.stack([NILE[:20], NILE[20:40]])

    def both(y):
        s = numpyro.sample("s", dist.HalfNormal(100.0))
        ssm = LinearGaussianSSM([1000.0], 300 * np.eye(1), np.eye(1), s * np.eye(1), np.eye(1), 120 * np.eye(1))
        with numpyro.plate("series", 2):
            numpyro.sample("y", LinearGaussianMarginal(ssm, 20), obs=y)

    class Fixed:
        def __call__(self, num_samples, key, args, kwargs):
            return {"s": np.array([[40.0]])}

    found = predictions(infer.FitRecord("one", both, (y,), {}, Fixed(), "none"), dynamic=15, horizon=2)
    ssm = LinearGaussianSSM([1000.0], [[300.0]], [[1.0]], [[40.0]], [[1.0]], [[120.0]])
    for k in range(2):
        alone = predictions(ssm, y[k], dynamic=15, horizon=2)
        np.testing.assert_allclose(found.mean[:, k], alone.mean[:, 0], rtol=1e-5)
        np.testing.assert_allclose(found.high[:, k], alone.high[:, 0], rtol=1e-5)
    assert found.names == ("series 0", "series 1")
    assert len(found.plot().axes) == 2


def test_labels_that_are_numbers_are_labels(x64):
    found = predictions(SSM, NILE, time=YEARS, dynamic=1960)
    assert found.time[found.kind == "dynamic"][0] == 1960
    with pytest.raises(ValueError, match="`dynamic` must be a label from 1871"):
        predictions(SSM, NILE, time=YEARS, dynamic=60)
