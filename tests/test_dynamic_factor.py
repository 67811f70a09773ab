"""`dynamic_factor` beside statsmodels' DynamicFactor, with ragged edges, nowcasts and quarterly figures."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from numpyro import handlers

from pssm import datasets, infer, models

sm = pytest.importorskip("statsmodels.api")
COLUMNS = ["realcons", "realinv", "realdpi", "unemp"]


def growth():
    """Standardised growth of four series, the last values of some not there yet."""
    raw = datasets.load("macrodata", COLUMNS).y
    y = np.column_stack([100 * np.diff(np.log(raw[:, :3]), axis=0), np.diff(raw[:, 3])])
    y = (y - y.mean(0)) / y.std(0)
    y[-1, 1] = y[-2:, 2] = y[60:63, 0] = np.nan
    return y


def at(y, error_order, params):
    """Sites of the model with the values of statsmodels' parameters: one factor, of either sign."""
    loadings = params[:4] * np.sign(params[0])
    phi = params[8]
    values = {
        "loadings_diagonal": loadings[:1],
        "loadings_below": loadings[1:],
        "sigma_obs": np.sqrt(params[4:8]),
        "factor_partial": np.full((1, 1, 1), phi / np.sqrt(1 - phi**2)),
        "d": np.zeros(4),
    }
    if error_order:
        values["error_partial"] = params[9:].reshape(4, 1)
    model = partial(models.dynamic_factor, y, error_order=error_order)
    substituted = handlers.substitute(model, {n: jnp.asarray(x) for n, x in values.items()})
    return handlers.trace(handlers.seed(substituted, 0)).get_trace()["y"]["fn"]


@pytest.mark.parametrize("error_order", [0, 1])
def test_likelihood_is_statsmodels(error_order, x64):
    y = growth()
    peer = sm.tsa.DynamicFactor(y, k_factors=1, factor_order=1, error_order=error_order)
    params = np.array([-0.8, 0.5, 0.4, -0.7, 0.4, 0.6, 0.9, 0.3, 0.6, *([0.3, -0.2, 0.1, 0.4] if error_order else [])])
    assert float(at(y, error_order, params).log_prob(y)) == pytest.approx(peer.loglike(params), abs=1e-6)
    ahead = peer.smooth(params).get_forecast(3)
    found = at(y, error_order, params).forecast(y, 3)
    np.testing.assert_allclose(found.mean, ahead.predicted_mean, atol=1e-7)
    sd = np.sqrt(np.diagonal(found.cov, axis1=1, axis2=2))
    np.testing.assert_allclose(sd, ahead.se_mean, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("error_order", [0, 1])
def test_the_maximum_is_not_below_statsmodels(error_order):
    y = growth()
    peer = sm.tsa.DynamicFactor(y, k_factors=1, factor_order=1, error_order=error_order)
    best = peer.fit(disp=0, maxiter=3000).llf
    fit = infer.fit_ml(models.dynamic_factor, y, error_order=error_order, num_starts=3, progress_bar=False)
    assert fit.converged
    assert fit.log_likelihood >= best - 1e-3  # it has means, too
    assert fit.log_likelihood < best + 3.0, "four means more cannot gain much on data of mean zero"


def test_single_precision_and_units():
    y = growth()[-60:]
    params = np.array([0.8, 0.5, 0.4, -0.7, 0.4, 0.6, 0.9, 0.3, 0.6, 0.3, -0.2, 0.1, 0.4])
    with jax.enable_x64(True):
        wanted = float(at(y, 1, params).log_prob(y))
    assert float(at(y, 1, params).log_prob(y)) == pytest.approx(wanted, rel=1e-5)


QUARTERLY = dict(error_order=1, aggregate={"gdp": "sum"}, every=3, names=("gdp", "sales"))


@pytest.mark.parametrize("states", ["marginal", "sampled"])
def test_quarterly_figures_are_sums_of_months(states, x64):
    """Without noise of its own a figure is the sum of what the states say of its months."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(9, 2)) + [9.0, 2.0]
    y[np.arange(9) % 3 != 2, 0] = np.nan
    y[-1] = np.nan
    model = partial(models.dynamic_factor, y, states=states, **QUARTERLY)
    trace = handlers.trace(handlers.seed(model, 1)).get_trace()
    fn = trace["y"]["fn"]
    assert float(fn.log_prob(y)) == pytest.approx(oracles.log_likelihood(fn.ssm, y), abs=1e-8)
    if states == "sampled":
        assert trace["z"]["infer"]["state_names"] == ("factor_1",)
        return
    assert trace["y"]["infer"]["state_names"] == ("factor_1", "error[gdp]", "error[sales]", "total[gdp]")
    smoothed = fn.smooth(y).mean
    months = trace["loadings"]["value"][0, 0] * smoothed[:, 0] + smoothed[:, 1] + trace["d"]["value"][0]
    np.testing.assert_allclose(months.reshape(3, 3).sum(1)[:2], y[[2, 5], 0], atol=1e-8)
