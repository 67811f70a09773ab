"""Maximum likelihood with paths integrated out, and profile likelihoods, against dense computations."""

import jax
import numpy as np
import pytest
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.stats import chi2, norm, poisson
from test_weights import COUNTS, counts, linear

from pssm import datasets, models
from pssm.diagnostics import to_datatree
from pssm.infer import fit_map, fit_ml, forecast, load, path_marginal, save, smoothed_states

pytestmark = pytest.mark.usefixtures("x64")
QUIET = {"progress_bar": False, "num_starts": 2}
Y = np.random.default_rng(3).normal(size=(12, 1)) + np.array([[0.2 * t] for t in range(12)])


def laplace(q: float) -> float:
    """Laplace's value for `counts` at a noise, by a dense Hessian."""

    def loss(z):
        d = z[1:] - 0.9 * z[:-1]
        prior = norm.logpdf(z[0]) + norm.logpdf(d, scale=q).sum()
        return -(prior + poisson.logpmf(2, np.exp(z[0])) + poisson.logpmf(5, np.exp(z[2])))

    found = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-9})
    z = found.x
    move = np.zeros((3, 3))
    for a, b in ((0, 1), (1, 2)):
        g = np.zeros(3)
        g[a], g[b] = -0.9, 1.0
        move += np.outer(g, g) / q**2
    move[0, 0] += 1.0
    hessian = move + np.diag([np.exp(z[0]), 0.0, np.exp(z[2])])
    return -found.fun + 1.5 * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(hessian)[1]


@pytest.fixture(scope="module")
def exact():
    with jax.enable_x64(True):
        return fit_ml(linear, Y, states="marginal", **QUIET)


@pytest.fixture(scope="module")
def sampled():
    with jax.enable_x64(True):
        return fit_ml(linear, Y, approximation="laplace", **QUIET)


def test_linear_model_with_its_path_has_the_exact_maximum(exact, sampled):
    np.testing.assert_allclose(sampled.log_likelihood, exact.log_likelihood, atol=1e-8)
    for name in ("q", "r"):
        np.testing.assert_allclose(sampled.params[name], exact.params[name], rtol=1e-4)
        np.testing.assert_allclose(sampled.errors[name], exact.errors[name], rtol=1e-3)
    assert sampled.aic == pytest.approx(exact.aic)
    assert sampled.num_observations == 12
    assert sampled.converged
    assert "Laplace" in sampled.objective
    assert "Laplace" in sampled.message
    assert "Laplace" not in exact.objective


def test_what_follows_a_fit_takes_its_paths(exact, sampled, tmp_path):
    s = smoothed_states(exact).state
    draws = sampled.draws()["z"][0, :, :, 0]
    np.testing.assert_allclose(draws.mean(0), s.mean[:, 0], atol=5 * float(np.max(s.sd)) / np.sqrt(1000))
    np.testing.assert_allclose(forecast(sampled, 2).mean, forecast(exact, 2).mean, atol=0.1)
    tree = to_datatree(sampled, states=True)
    assert tree["posterior"]["z"].shape == (1, 1000, 12, 1)
    again = load(save(sampled, tmp_path / "fit"), path_marginal(linear, approximation="laplace"))
    np.testing.assert_array_equal(again.draws()["z"], sampled.draws()["z"])


def test_laplace_maximum_against_a_dense_search():
    fit = fit_ml(counts, COUNTS, **QUIET)
    best = minimize_scalar(lambda q: -laplace(q), bounds=(0.05, 3.0), method="bounded", options={"xatol": 1e-7})
    np.testing.assert_allclose(fit.log_likelihood, -best.fun, atol=1e-6)
    np.testing.assert_allclose(fit.params["q"], best.x, rtol=1e-3)
    mode = fit_map(counts, COUNTS, **QUIET)
    prior = np.log(2) + norm.logpdf(float(mode.params["q"]))
    np.testing.assert_allclose(mode.log_joint, laplace(float(mode.params["q"])) + prior, atol=1e-6)
    fall = chi2.ppf(0.9, 1) / 2
    high = brentq(lambda q: laplace(q) + best.fun + fall, best.x, 20.0)
    found = fit.profile("q", 0.9)
    np.testing.assert_allclose(found.high, high, rtol=1e-3)
    assert found.low == 0.0  # without noise the likelihood is not low enough to be left out


def test_profile_of_the_nile_against_a_search_over_the_other_parameter():
    y = np.asarray(datasets.load("nile").y, np.float64)
    fit = fit_ml(models.local_level, y, progress_bar=False, num_starts=2)
    found = fit.profile("sigma_level")
    values = fit.engine.function

    def held(log_sd: float) -> float:
        """The best likelihood over the other coordinate."""
        i = [n for n, _ in values.labels()].index("sigma_level")
        centre = values.values(np.zeros(values.size))["sigma_level"]

        def loss(other):
            z = np.full(values.size, other)
            z[i] = log_sd - np.log(centre)
            return -values(z)[0]

        return -minimize_scalar(loss, bracket=(-1.0, 1.0)).fun

    for end in (found.low, found.high):
        np.testing.assert_allclose(held(np.log(end)), fit.log_likelihood - chi2.ppf(0.95, 1) / 2, atol=1e-4)
    assert found.low < float(fit.params["sigma_level"]) < found.high
    assert (np.diff(found.values) > 0).all()
    assert found.log_likelihoods.max() == pytest.approx(fit.log_likelihood)
    with pytest.raises(ValueError, match="`name` must be one of"):
        fit.profile("sigma")
    with pytest.raises(ValueError, match="`level`"):
        fit.profile("sigma_obs", 2.0)
