"""The structural models: their marginal density, agreement of marginal and sampled states, scaling and errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.linalg
from numpyro import handlers
from numpyro.infer import Predictive
from numpyro.infer.util import log_density
from scipy import stats

from pssm import models
from pssm.distributions import StatePath
from pssm.models.components import stationary_autoregression

STEPS = 8
U = np.random.default_rng(1).normal(size=(STEPS, 2))
MODELS = {
    "local_level": models.local_level,
    "local_level inputs": partial(models.local_level, u=U),
    "local_linear_trend": models.local_linear_trend,
    "seasonal dummy": partial(models.seasonal, period=4),
    "seasonal harmonics": partial(models.seasonal, period=6.5, harmonics=2),
    "autoregression": partial(models.autoregression, order=2),
    "autoregression inputs": partial(models.autoregression, order=3, u=U),
    "structural": partial(models.structural, trend=True, seasonal=4, cycle=True, ar=2, u=U),
    "structural stationary": partial(models.structural, level=False, cycle=(3.0, 6.0), ar=1),
}


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


# The series are shorter than some of the models' states: quick, and exact all the same.
pytestmark = pytest.mark.filterwarnings("ignore:`y` has . observed values")


def series():
    y = 100 + np.cumsum(np.random.default_rng(2).normal(size=STEPS))
    y[[0, 3, 4]] = np.nan
    return y


def parameters_of(model, y):
    """A draw of the parameters with plain marginal states, and the site `y` that goes with it."""
    trace = handlers.trace(handlers.seed(model, 3)).get_trace(y)
    sites = {k: s["value"] for k, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    return sites, trace


def prior_log_density(trace, names):
    return sum(float(trace[name]["fn"].log_prob(trace[name]["value"]).sum()) for name in names)


@pytest.mark.parametrize("name", MODELS)
def test_marginal_density_is_the_dense_one(name):
    sites, trace = parameters_of(MODELS[name], series())
    marginal = trace["y"]["fn"]
    expected = oracles.log_likelihood(marginal.ssm, series()[:, None], marginal.u)
    np.testing.assert_allclose(marginal.log_prob(trace["y"]["value"]), expected, rtol=1e-9)
    joint = log_density(MODELS[name], (series(),), {}, sites)[0]
    np.testing.assert_allclose(joint, expected + prior_log_density(trace, sites), rtol=1e-9)


@pytest.mark.parametrize("name", ["local_level inputs", "local_linear_trend", "seasonal harmonics"])
def test_sampled_states_are_the_marginal_times_their_posterior(name):
    """log p(z, y | params) = log p(y | params) + log p(z | y, params), the latter from the dense joint."""
    model = partial(MODELS[name], states="sampled")
    sites, trace = parameters_of(MODELS[name], series())
    marginal = trace["y"]["fn"]
    j = oracles.joint(marginal.ssm, STEPS, marginal.u)
    n = marginal.ssm.n_state
    mean, cov = oracles.condition(j, np.arange(STEPS * n), *oracles.seen(j, series()[:, None], STEPS))
    root = np.linalg.cholesky((cov + cov.T) / 2)
    z = mean + root @ np.random.default_rng(4).normal(size=mean.size)
    sampled_trace = handlers.trace(handlers.seed(model, 0)).get_trace(series())
    assert isinstance(sampled_trace["z"]["fn"], StatePath)
    found = log_density(model, (series(),), {}, {**sites, "z": z.reshape(STEPS, n)})[0]
    posterior = -0.5 * np.sum(np.linalg.solve(root, z - mean) ** 2 + np.log(2 * np.pi)) - np.log(np.diag(root)).sum()
    expected = log_density(MODELS[name], (series(),), {}, sites)[0] + posterior
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize("name", ["seasonal dummy", "autoregression", "autoregression inputs", "structural"])
def test_sampled_noise_integrates_to_the_marginal(name):
    """Where the noise is sampled, the joint is a Gaussian in `z_base`: integrate it exactly from its derivatives."""
    model = partial(MODELS[name], states="sampled")
    sites, trace = parameters_of(MODELS[name], series())
    marginal = log_density(MODELS[name], (series(),), {}, sites)[0]
    base = handlers.trace(handlers.seed(model, 0)).get_trace(series())["z_base"]["value"]

    def joint(e):
        return log_density(model, (series(),), {}, {**sites, "z_base": e})[0]

    value, gradient, hessian = jax.jit(lambda e: (joint(e), jax.grad(joint)(e), jax.hessian(joint)(e)))(0 * base)
    size = base.size
    integral = value + 0.5 * gradient @ np.linalg.solve(-hessian, gradient)
    integral += 0.5 * size * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(-hessian)[1]
    np.testing.assert_allclose(integral, marginal, rtol=1e-8)


# --- autoregression ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 4])
def test_stationary_autoregression_solves_the_lyapunov_equation(order):
    partial_correlations = np.random.default_rng(order).uniform(-0.9, 0.9, order)
    phi, chol = stationary_autoregression(jnp.asarray(partial_correlations), jnp.asarray(0.7))
    companion = np.concatenate([np.asarray(phi)[None], np.eye(order - 1, order)])
    assert np.abs(np.linalg.eigvals(companion)).max() < 1
    noise = np.zeros((order, order))
    noise[0, 0] = 0.7**2
    expected = scipy.linalg.solve_discrete_lyapunov(companion, noise)
    np.testing.assert_allclose(chol @ chol.T, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(chol, np.tril(chol))


@pytest.mark.parametrize("x64", [False, True])
def test_exactly_observed_autoregression_with_missing_entries(x64):
    with jax.enable_x64(x64):
        y = jnp.asarray(series())
        _, trace = parameters_of(partial(models.autoregression, order=3), y)
        ssm = trace["y"]["fn"].ssm
        assert (np.asarray(ssm.chol_R) == 0).all()
        assert ssm.chol_Q.shape == (3, 1)
        found = trace["y"]["fn"].log_prob(trace["y"]["value"])
        expected = oracles.log_likelihood(ssm, np.asarray(y)[:, None])
        np.testing.assert_allclose(found, expected, rtol=1e-9 if x64 else 2e-4)


# --- scaling, prediction, edges ---------------------------------------------------------------------------------------

SCALED = ("sigma", "mean", "beta")


@pytest.mark.parametrize("name", ["local_linear_trend", "structural", "autoregression inputs"])
def test_a_change_of_unit_moves_the_posterior_with_it(name):
    """y -> 1000 y: scales and effects times 1000 have the same density up to the Jacobian of the units."""
    sites, _ = parameters_of(MODELS[name], series())
    unit = 1000.0
    scaled = {k: unit * v if k.startswith(SCALED) else v for k, v in sites.items()}
    count = sum(np.size(v) for k, v in sites.items() if k.startswith(SCALED)) + np.sum(~np.isnan(series()))
    before = log_density(MODELS[name], (series(),), {}, sites)[0]
    after = log_density(MODELS[name], (unit * series(),), {}, scaled)[0]
    np.testing.assert_allclose(after, before - count * np.log(unit), rtol=1e-9)


def test_prior_scale_and_location_are_arguments():
    trace = handlers.trace(handlers.seed(models.local_level, 0)).get_trace(series(), location=7.0, scale=3.0)
    assert trace["y"]["fn"].ssm.m0[0] == 7.0
    np.testing.assert_allclose(trace["y"]["fn"].ssm.chol_P0, [[30.0]])
    np.testing.assert_allclose(
        trace["sigma_obs"]["fn"].log_prob(1.0), stats.halfnorm.logpdf(1.0, scale=3.0), rtol=1e-12
    )
    default = handlers.trace(handlers.seed(models.local_level, 0)).get_trace(series())["y"]["fn"].ssm
    np.testing.assert_allclose(default.m0, series()[1])
    np.testing.assert_allclose(default.chol_P0, [[10 * np.nanstd(series())]])


@pytest.mark.parametrize("states", ["marginal", "sampled"])
@pytest.mark.parametrize("name", ["local_level inputs", "seasonal dummy", "autoregression", "structural"])
def test_without_data_it_predicts(name, states):
    draws = Predictive(MODELS[name], num_samples=3)(jax.random.key(0), num_steps=STEPS, states=states)
    assert draws["y"].shape == (3, STEPS, 1)
    assert np.isfinite(draws["y"]).all()
    if states == "sampled":
        assert draws["z"].shape[:2] == (3, STEPS)


@pytest.mark.filterwarnings("ignore:`y` with one observed value")
@pytest.mark.parametrize("states", ["marginal", "sampled"])
@pytest.mark.parametrize(
    "model", [models.local_level, partial(models.seasonal, period=3), partial(models.autoregression, order=2)]
)
def test_one_time_step(model, states):
    trace = handlers.trace(handlers.seed(model, 0)).get_trace([5.0], states=states)
    sites = {k: s["value"] for k, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    assert np.isfinite(log_density(model, ([5.0],), {"states": states}, sites)[0])
    assert handlers.seed(model, 0)(num_steps=1, states=states) is None


@pytest.mark.filterwarnings("ignore:`y` with one constant value")
@pytest.mark.parametrize("states", ["marginal", "sampled"])
def test_constant_and_all_missing_series(states):
    for y in (np.full(STEPS, 3.0), np.full(STEPS, np.nan)):
        for model in (models.local_level, partial(models.autoregression, order=2)):
            trace = handlers.trace(handlers.seed(model, 0)).get_trace(y, states=states)
            total = sum(s["fn"].log_prob(s["value"]).sum() for s in trace.values() if s["type"] == "sample")
            assert np.isfinite(total)


@pytest.mark.parametrize(
    ("message", "model", "settings"),
    [
        ("`num_steps`", models.local_level, {"y": None}),
        ("`num_steps`", models.local_level, {"num_steps": STEPS + 1}),
        ("`num_steps`", models.local_level, {"y": None, "num_steps": 0}),
        ("`y`", models.local_level, {"y": np.ones((STEPS, 2))}),
        ("`y`", models.local_level, {"y": np.array([1.0, np.inf])}),
        ("`y`", models.local_level, {"y": np.ones((2, STEPS, 1))}),
        ("`u`", models.local_level, {"u": U[:-1]}),
        ("`u`", models.autoregression, {"u": U[:-1]}),
        ("`states`", models.local_linear_trend, {"states": "marginals"}),
        ("`states`", models.autoregression, {"states": "sample"}),
        ("`order`", models.autoregression, {"order": 0}),
        ("`ar`", models.structural, {"ar": -1}),
        ("`cycle`", models.structural, {"cycle": (5.0, 3.0)}),
        ("`level`", models.structural, {"level": False}),
        ("`seasonal`", models.structural, {"harmonics": 2}),
        ("`seasonal`", models.structural, {"seasonal": 1}),
        ("`harmonics`", models.seasonal, {"period": 4, "harmonics": 3}),
        ("`harmonics`", models.seasonal, {"period": 4, "harmonics": 0}),
    ],
)
def test_errors_name_the_argument(message, model, settings):
    settings = {"y": series()} | settings
    with pytest.raises(ValueError, match=message):
        handlers.seed(model, 0)(settings.pop("y"), **settings)


def test_a_structural_model_without_a_level_has_a_mean():
    """It is in the distribution of the data, and not only a site."""
    trace = handlers.trace(handlers.seed(partial(models.structural, level=False, ar=1), 0))
    found = trace.get_trace(num_steps=3, location=1e3, scale=1.0)
    np.testing.assert_allclose(found["y"]["fn"].mean[:, 0], found["mean"]["value"], rtol=1e-6)
