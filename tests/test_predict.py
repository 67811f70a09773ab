"""States and forecasts from posterior draws, against the exact smoother and forecast for a draw that is repeated."""

import jax
import numpy as np
import pytest
from numpyro import handlers
from scipy import stats

from pssm import datasets, kalman_smoother, models
from pssm import forecast as exact_forecast
from pssm.infer.exact import one_step_probabilities
from pssm.infer.predict import QUANTILES, forecast, sample_states, smoothed_states
from pssm.infer.task import thin

Y = datasets.load("nile").y[:60].copy()
Y[[5, 20, 21, 22]] = np.nan
U = np.random.default_rng(0).normal(size=(64, 2))
VALUES = {"sigma_level": np.float32(40.0), "sigma_obs": np.float32(120.0)}
BETA = np.array([30.0, -50.0], np.float32)


def repeated(count, **values):
    """The same draw, `count` times, in one chain."""
    return {n: np.broadcast_to(x, (1, count, *np.shape(x))).copy() for n, x in values.items()}


def spread_out(count):
    rng = np.random.default_rng(1)
    return {n: (v * rng.lognormal(0.0, 0.4, (2, count // 2))).astype(np.float32) for n, v in VALUES.items()}


def system(model, values, *args, **kwargs):
    """The linear-Gaussian model at given parameters."""
    trace = handlers.trace(handlers.seed(handlers.substitute(model, values), 0)).get_trace(*args, **kwargs)
    return trace["y"]["fn"].ssm


def test_smoothed_states_of_one_draw_are_the_exact_ones():
    found = smoothed_states(models.local_level, repeated(3, **VALUES), Y)
    exact = kalman_smoother(system(models.local_level, VALUES, Y), Y)
    np.testing.assert_allclose(found.state.mean, exact.mean, rtol=1e-5)
    np.testing.assert_allclose(found.state.sd[:, 0], np.sqrt(exact.cov[:, 0, 0]), rtol=1e-4)
    np.testing.assert_allclose(found.signal.mean, found.state.mean, rtol=1e-6)
    np.testing.assert_allclose(found.signal.sd, found.state.sd, rtol=1e-5)


def test_smoothed_states_mix_over_the_draws():
    draws = spread_out(8)
    found = smoothed_states(models.local_level, draws, Y).state
    each = []
    for a, b in zip(draws["sigma_level"].ravel(), draws["sigma_obs"].ravel(), strict=True):
        exact = kalman_smoother(system(models.local_level, {"sigma_level": a, "sigma_obs": b}, Y), Y)
        each.append((exact.mean[:, 0], exact.cov[:, 0, 0]))
    means, variances = np.array(each).transpose(1, 0, 2)
    np.testing.assert_allclose(found.mean[:, 0], means.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.sd[:, 0], np.sqrt(variances.mean(0) + means.var(0)), rtol=1e-3)


def test_forecast_of_one_draw_is_the_exact_one():
    found = forecast(models.local_level, repeated(3, **VALUES), 5, Y)
    exact = exact_forecast(system(models.local_level, VALUES, Y), Y, 5)
    sd = np.sqrt(exact.cov[:, 0, 0])
    np.testing.assert_allclose(found.mean, exact.mean, rtol=1e-5)
    np.testing.assert_allclose(found.sd[:, 0], sd, rtol=1e-4)
    normal = np.asarray(exact.mean)[:, 0] + np.outer(stats.norm.ppf(QUANTILES), sd)
    np.testing.assert_allclose(found.quantiles[:, :, 0], normal, atol=0.03 * sd.max())


def test_forecast_paths_have_the_forecasts_moments():
    found = forecast(models.local_level, repeated(400, **VALUES), 6, Y)
    assert found.draws.shape == (400, 6, 1)
    error = np.abs(found.draws.mean(0) - found.mean) / (found.sd / np.sqrt(400))
    assert error.max() < 4.5
    np.testing.assert_allclose(found.draws.std(0), found.sd, rtol=0.2)
    now, later = found.draws[:, 0, 0], found.draws[:, 5, 0]
    assert np.corrcoef(now, later)[0, 1] > 0.1, "a path is one path, not a draw for each step"


def test_quantiles_are_ordered_and_uncertainty_grows():
    found = forecast(models.local_level, spread_out(100), 12, Y)
    assert (np.diff(found.quantiles, axis=0) > 0).all()
    assert (np.diff(found.sd[:, 0]) > 0).all()
    np.testing.assert_allclose(found.quantiles[2], found.mean, atol=0.1 * found.sd.max())


def test_inputs_enter_states_and_forecast():
    y, past, future = Y, U[:60], U[60:]
    from_first = U - U[0]  # regressors count from their first row
    values = {**VALUES, "beta": BETA}
    draws = repeated(2, **values)
    ssm = system(models.local_level, values, y, u=past)
    states = smoothed_states(models.local_level, draws, y, u=past)
    np.testing.assert_allclose(states.signal.mean, states.state.mean + (from_first[:60] @ BETA)[:, None], rtol=1e-4)
    found = forecast(models.local_level, draws, 4, y, u=past, u_future=future)
    exact = exact_forecast(ssm, y, 4, from_first[:60], from_first[60:])
    np.testing.assert_allclose(found.mean, exact.mean, rtol=1e-5)
    np.testing.assert_allclose(np.diff(found.mean[:, 0]), np.diff(future @ BETA), rtol=1e-3, atol=0.05)


def test_absent_or_needless_future_inputs_are_named():
    draws = repeated(2, **VALUES, beta=BETA)
    with pytest.raises(ValueError, match="`u_future` is required"):
        forecast(models.local_level, draws, 4, Y, u=U[:60])
    with pytest.raises(ValueError, match="`u_future` is given"):
        forecast(models.local_level, repeated(2, **VALUES), 4, Y, u_future=U[60:])


def test_one_step_probabilities_are_uniform_if_the_model_is_right():
    steps = 400
    rng = np.random.default_rng(4)
    y = (100 + np.cumsum(rng.normal(0, 2.0, steps)) + rng.normal(0, 3.0, steps))[:, None]
    y[50:60] = np.nan
    draws = repeated(2, sigma_level=np.float32(2.0), sigma_obs=np.float32(3.0))
    found = one_step_probabilities(models.local_level, draws, y)
    assert found.shape == (steps, 1)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(y))
    assert stats.kstest(found[1:][~np.isnan(y[1:])], "uniform").pvalue > 0.02  # the first is centred on the data
    wrong = one_step_probabilities(models.local_level, repeated(2, sigma_level=0.5, sigma_obs=0.5), y)
    assert stats.kstest(wrong[1:][~np.isnan(y[1:])], "uniform").pvalue < 1e-6


def test_paths_of_states_average_to_the_smoothed_mean():
    draws = repeated(400, **VALUES)
    paths = sample_states(3, models.local_level, draws, Y)
    assert paths.shape == (400, 60, 1)
    exact = smoothed_states(models.local_level, draws, Y, most=2).state
    assert (np.abs(paths.mean(0) - exact.mean) < 4.5 * exact.sd / np.sqrt(400)).all()
    np.testing.assert_allclose(paths.std(0), exact.sd, rtol=0.2)
    np.testing.assert_array_equal(paths, sample_states(jax.random.key(3), models.local_level, draws, Y))


def test_draws_are_thinned_over_all_chains():
    thinned = thin({"a": np.arange(20.0).reshape(2, 10)}, 5)
    np.testing.assert_array_equal(thinned["a"], [0, 4, 9, 14, 19])


@pytest.mark.parametrize("function", [smoothed_states, one_step_probabilities])
def test_model_whose_states_are_not_integrated_out_is_named(function):
    draws = repeated(2, **VALUES, z=np.zeros((60, 1)))
    with pytest.raises(ValueError, match="`model` has no `LinearGaussianMarginal` site"):
        function(models.local_level, draws, Y, states="sampled")


def test_horizon_is_checked():
    with pytest.raises(ValueError, match="`num_steps`"):
        forecast(models.local_level, repeated(2, **VALUES), 0, Y)
