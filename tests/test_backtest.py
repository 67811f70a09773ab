"""Rolling origins: forecasts against statsmodels', naive ones in closed form, nothing of the future in the past."""

from functools import partial

import jax
import numpy as np
import pandas as pd
import pytest
from statsmodels.tsa.statespace.structural import UnobservedComponents

from pssm import datasets, models
from pssm.diagnostics import backtest
from pssm.diagnostics.backtest import naive
from pssm.diagnostics.rolling import mixture
from pssm.infer import fit_ml

NILE = np.array(datasets.load("nile").y)
run = partial(backtest, progress_bar=False, options={"num_starts": 2})


def test_forecasts_and_scores_are_those_of_statsmodels():
    found = run(models.local_level, NILE, horizon=3, origins=[60, 80])
    assert found.origins.note.eq("").all()
    for known in (60, 80):
        fit = found.fits["ml", known]
        past = NILE[:known, 0]
        model = UnobservedComponents(past, level="llevel")
        model.ssm.initialize_known(past[:1], np.array([[100 * past.var()]]))
        model.loglikelihood_burn = 0
        theirs = model.smooth([fit.params["sigma_obs"] ** 2, fit.params["sigma_level"] ** 2])
        assert theirs.llf == pytest.approx(fit.log_likelihood, abs=1e-5)
        ahead, truth = theirs.get_forecast(3), NILE[known : known + 3, 0]
        own = found.table[(found.table.method == "ml") & (found.table.known == known)]
        np.testing.assert_allclose(own["mean"], ahead.predicted_mean, rtol=1e-5)
        np.testing.assert_allclose(own["sd"], ahead.se_mean, rtol=1e-5)
        z = (truth - ahead.predicted_mean) / ahead.se_mean
        np.testing.assert_allclose(
            own["log_score"], -0.5 * z**2 - np.log(ahead.se_mean * (2 * np.pi) ** 0.5), rtol=1e-5
        )
        np.testing.assert_allclose(own["low"], ahead.predicted_mean - 1.645 * ahead.se_mean, rtol=0.05)
        np.testing.assert_array_equal(own["observed"], truth)
    one = found.scores.loc[("ml", 1)]
    own = found.table[(found.table.method == "ml") & (found.table.ahead == 1)]
    assert one.mae == pytest.approx(own.error.abs().mean())
    assert one.rmse == pytest.approx((own.error**2).mean() ** 0.5)
    assert one.crps_se == pytest.approx(own.crps.std() / 2**0.5)
    np.testing.assert_allclose(found.scores.skill["naive"], 0)
    assert len(found.plot(title="Nile").axes) == 2


def test_a_function_that_fits_the_past_gives_the_same():
    def cut(y, **kwargs):
        assert not np.isnan(y).any()
        return fit_ml(models.local_level, y, num_starts=2, progress_bar=False)

    found = run(models.local_level, NILE, horizon=2, origins=[70], methods={"ml": "ml", "own": cut})
    table = found.table.set_index("method")
    np.testing.assert_allclose(table.loc["own", "mean"], table.loc["ml", "mean"], rtol=1e-4)
    np.testing.assert_allclose(table.loc["own", "sd"], table.loc["ml", "sd"], rtol=1e-4)


def test_nothing_of_the_future_is_known():
    other = NILE.copy()
    other[75:] += 1e4
    first, second = (run(models.local_level, y, horizon=5, origins=[60, 75], refit=2).table for y in (NILE, other))
    same = first.known <= 75
    pd.testing.assert_frame_equal(first[same][["mean", "sd"]], second[same][["mean", "sd"]])


def test_refits_and_inputs():
    rng = np.random.default_rng(2)
    u = rng.normal(size=(80, 1))
    y = np.cumsum(0.1 * rng.normal(size=80)) + 3 * u[:, 0] + 0.1 * rng.normal(size=80)
    found = run(models.local_level, y, u=u, horizon=2, origins=4, refit=2)
    assert list(found.origins.query("method == 'ml'").refit) == [True, False, True, False]
    assert len(found.fits) == 2
    assert found.overall.mae["ml"] < 0.3 < found.overall.mae["naive"]
    assert len(run(models.local_level, y, u=u, horizon=2, origins=3, refit=False).fits) == 1


def test_naive_forecasts_in_closed_form():
    past = np.array([[1.0], [5.0], [2.0], [7.0], [4.0], [np.nan]])
    truth = np.array([[3.0], [6.0], [1.0]])
    last = naive(past[:5], truth, 1, 20_000, jax.random.key(0))
    sd = np.sqrt(np.mean(np.square([4, -3, 5, -3])))
    np.testing.assert_allclose(last.mean[:, 0], 4.0)
    np.testing.assert_allclose(last.sd[:, 0], sd * np.sqrt([1, 2, 3]))
    np.testing.assert_allclose(last.draws.std(0), last.sd, rtol=0.03)
    season = naive(past, truth, 2, 10, jax.random.key(0))
    np.testing.assert_allclose(season.mean[:, 0], [4.0, 7.0, 4.0])  # a season before is missing: the one before it
    np.testing.assert_allclose(season.sd[:, 0], np.sqrt(np.mean(np.square([1, 2, 2]))) * np.sqrt([1, 1, 2]))


def test_moments_of_a_mixture():
    mean, cov = np.array([[[0.0]], [[2.0]]]), np.array([[[[1.0]]], [[[3.0]]]])
    found = mixture(mean, cov, np.array([[1.0]]), 40_000, jax.random.key(1))
    np.testing.assert_allclose([found.mean[0, 0], found.sd[0, 0]], [1.0, 3**0.5])
    density = (np.exp(-0.5) / (2 * np.pi) ** 0.5 + np.exp(-1 / 6) / (6 * np.pi) ** 0.5) / 2
    np.testing.assert_allclose(found.log_density, np.log(density), rtol=1e-6)
    np.testing.assert_allclose([found.draws.mean(), found.draws.std()], [1.0, 3**0.5], rtol=0.03)


def test_several_series_and_labels():
    frame = pd.DataFrame(
        {"a": NILE[:40, 0], "b": NILE[40:80, 0]}, index=pd.date_range("2000-01-31", periods=40, freq="ME")
    )
    found = run(None, frame, horizon=2, origins=2, period=4, methods=lambda y: _constant(y))
    assert set(found.table.method) == {"<lambda>", "naive", "seasonal naive"}
    assert found.table.time.iloc[0] == frame.index[20]
    assert set(found.table.series) == {0, 1}


def _constant(y):
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    from pssm import LinearGaussianSSM
    from pssm.distributions import LinearGaussianMarginal

    def model(y):
        s = numpyro.sample("s", dist.HalfNormal(500.0))
        one = jnp.eye(2)
        ssm = LinearGaussianSSM(900 * jnp.ones(2), 100 * one, one, 0 * one, one, s * one)
        numpyro.sample("y", LinearGaussianMarginal(ssm, len(y)), obs=y)

    return fit_ml(model, y, num_starts=1, progress_bar=False)


def test_an_origin_that_fails_is_a_row():
    def method(y):
        if len(y) == 60:
            raise RuntimeError("no luck")
        return fit_ml(models.local_level, y, num_starts=1, progress_bar=False)

    with pytest.warns(UserWarning, match="1 forecasts failed.*no luck"):
        found = run(None, NILE, horizon=1, origins=[60, 70], methods={"own": method})
    assert list(found.origins.query("method == 'own'").note) == ["RuntimeError: no luck", ""]
    assert len(found.table.query("method == 'own'")) == 1


def test_an_interruption_keeps_what_there_is():
    def method(y):
        if len(y) == 70:
            raise KeyboardInterrupt
        return fit_ml(models.local_level, y, num_starts=1, progress_bar=False)

    found = run(None, NILE, horizon=1, origins=[60, 70], methods={"own": method})
    assert found.interrupted
    assert set(found.table.known) == {60}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"horizon": 100}, "`horizon` must leave"),
        ({"origins": [99], "horizon": 3}, "`origins` must be numbers of known"),
        ({"methods": "nut"}, "`methods` must be one of"),
        ({"methods": []}, "at least one method"),
        ({"methods": {"naive": "ml"}}, "is there anyway"),
        ({"refit": 0}, "`refit` must be at least 1"),
        ({"time": [1, 2]}, "`time` must have 100"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        run(models.local_level, NILE, **options)
