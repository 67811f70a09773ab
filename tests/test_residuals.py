"""One-step residuals and their tests against statsmodels at the same parameters."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from statsmodels.tsa.statespace.mlemodel import MLEModel

from pssm import LinearGaussianSSM, datasets, models
from pssm.diagnostics import residuals
from pssm.diagnostics.residuals import autocorrelations, whiten
from pssm.infer import fit_ml, fit_nuts

NILE = np.array(datasets.load("nile").y)
A = np.array([[0.9, 0.2], [-0.1, 0.7]])
C = np.array([[1.0, 0.0], [0.5, 1.0], [1.0, 1.0]])
Q, R, P0 = np.diag([0.5, 0.3]), np.array([[1.0, 0.3, 0.0], [0.3, 0.8, 0.1], [0.0, 0.1, 0.5]]), np.diag([4.0, 2.0])


def several(gaps):
    rng = np.random.default_rng(5)
    z, rows = rng.normal(size=2) * 2, []
    for _ in range(80):
        rows.append(C @ z + np.linalg.cholesky(R) @ rng.normal(size=3))
        z = A @ z + np.sqrt(np.diag(Q)) * rng.normal(size=2)
    y = np.array(rows)
    if gaps:
        y[10:14] = y[30, 1] = y[50:55, 0] = y[60, 1:] = np.nan
    return y


def theirs(y):
    model = MLEModel(y, k_states=2, k_posdef=2)
    model.ssm["design"], model.ssm["obs_cov"], model.ssm["transition"] = C, R, A
    model.ssm["selection"], model.ssm["state_cov"] = np.eye(2), Q
    model.ssm.initialize_known(np.zeros(2), P0)
    return model.ssm.filter()


@pytest.mark.parametrize("gaps", [False, True])
def test_residuals_of_several_series(gaps):
    y = several(gaps)
    ssm = LinearGaussianSSM.from_covariances(np.zeros(2), P0, A, Q, C, R)
    found = residuals(ssm, y)
    expected = theirs(y).standardized_forecasts_error.T
    np.testing.assert_array_equal(np.isnan(found.values), np.isnan(y))
    np.testing.assert_allclose(found.values, np.where(np.isnan(y), np.nan, expected), rtol=2e-4, atol=2e-5)
    assert found.names == ("series 0", "series 1", "series 2")
    assert (found.table.drop(columns="observations") > -10).all(axis=None)


def test_tests_are_those_of_statsmodels():
    fit = fit_ml(models.local_level, NILE, num_starts=1, progress_bar=False)
    found = residuals(fit, skip=1, lags=8)
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    model = UnobservedComponents(NILE[:, 0], level="llevel")
    model.ssm.initialize_known(NILE[0], np.array([[100 * NILE.var()]]))
    model.loglikelihood_burn = 1
    other = model.smooth([fit.params["sigma_obs"] ** 2, fit.params["sigma_level"] ** 2])
    np.testing.assert_allclose(found.values[:, 0], other.filter_results.standardized_forecasts_error[0], atol=1e-4)
    row = found.table.iloc[0]
    box, p = other.test_serial_correlation("ljungbox", lags=8)[0][:, -1]
    np.testing.assert_allclose([row.ljung_box, row.ljung_box_p], [box, p], rtol=1e-3)
    np.testing.assert_allclose(row[["jarque_bera", "jarque_bera_p", "skew", "kurtosis"]].astype(float),
                               other.test_normality("jarquebera")[0], rtol=1e-3)  # fmt: skip
    np.testing.assert_allclose([row.h, row.h_p], other.test_heteroskedasticity("breakvar")[0], rtol=1e-3)
    assert len(found.plot(title="Nile").axes) == 3


def test_what_is_wrong_is_found():
    rng = np.random.default_rng(0)
    ssm = LinearGaussianSSM.from_covariances([0.0], [[1.0]], [[0.5]], [[0.75]], [[1.0]], [[1.0]])
    noise = rng.normal(size=300)
    wild = np.where(np.arange(300) % 30 == 0, 12.0, noise)
    walk, louder = np.cumsum(noise) / 3, noise * np.where(np.arange(300) < 150, 1.0, 3.0)
    test = {"jarque_bera_p": wild, "ljung_box_p": walk, "h_p": louder}
    for name, y in test.items():
        assert residuals(ssm, y * 1.0).table[name].iloc[0] < 1e-3, name
    white = LinearGaussianSSM.from_covariances([0.0], [[0.0]], [[0.0]], [[0.0]], [[1.0]], [[1.0]])
    normal = rng.permutation(norm.ppf((np.arange(300) + 0.5) / 300))
    fine = residuals(white, normal).table.iloc[0]
    assert min(fine.jarque_bera_p, fine.ljung_box_p, fine.h_p) > 0.01
    assert abs(fine.sd - 1) < 0.02


def test_copies_and_exact_sensors_have_no_residual_of_their_own():
    S = np.array([[[2.0, 2.0], [2.0, 2.0]], [[2.0, 1.0], [1.0, 2.0]]])
    found = whiten(np.array([[1.0, 1.0], [1.0, np.nan]]), S)
    np.testing.assert_allclose(found, [[2**-0.5, np.nan], [2**-0.5, np.nan]])


def test_a_constant_has_no_autocorrelation():
    found, pairs = autocorrelations(np.full(10, 3.0), 3)
    assert np.isnan(found).all()
    assert pairs.tolist() == [9, 8, 7]


def test_draws_are_averaged_and_batches_stand_side_by_side():
    fit = fit_nuts(models.local_level, NILE, num_warmup=100, num_samples=50, num_chains=1, progress_bar=False)
    found = residuals(fit, time=np.arange(1871, 1971), names=("flow",))
    point = residuals(fit_ml(models.local_level, NILE, num_starts=1, progress_bar=False))
    assert np.corrcoef(found.values[1:, 0], point.values[1:, 0])[0, 1] > 0.99
    assert found.table.index[0] == "flow"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: residuals(LinearGaussianSSM(jnp.zeros(1), *[jnp.eye(1)] * 5)), "`y` is required"),
        (lambda: residuals(LinearGaussianSSM(jnp.zeros(1), *[jnp.eye(1)] * 5), NILE, lags=0), "`lags`"),
        (lambda: residuals(LinearGaussianSSM(jnp.zeros(1), *[jnp.eye(1)] * 5), NILE, names=("a", "b")), "`names`"),
        (lambda: residuals(LinearGaussianSSM(jnp.zeros(1), *[jnp.eye(1)] * 5), NILE, time=[1, 2]), "`time`"),
        (lambda: residuals(_sampled()), "no `LinearGaussianMarginal` site"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def _sampled():
    model = partial(models.stochastic_volatility)
    return fit_nuts(model, NILE[:9] / 1000, num_warmup=5, num_samples=5, num_chains=1, progress_bar=False)
