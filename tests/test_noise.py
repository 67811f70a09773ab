"""Noise of observations that is not normal: its densities by quadrature and by SciPy, forecasts, and sampling."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density

from pssm import datasets, infer, models
from pssm.diagnostics import to_datatree
from pssm.linalg.low_rank import as_matrix

STEPS = 12
Y = np.random.default_rng(0).normal(size=STEPS).cumsum()
Y[[3, 4]] = np.nan
SEEN = ~np.isnan(Y)
LEVEL = {"sigma_level": 0.4, "sigma_obs": 0.5}
STUDENT = {**LEVEL, "nu_obs": 4.5}
VOLATILE = {**LEVEL, "phi_log_variance": 0.9, "sigma_log_variance": 0.3}


def trace_of(values, y=Y, **options):
    seeded = handlers.seed(
        handlers.substitute(partial(models.structural, location=0.0, scale=1.0, **options), values), 1
    )
    return handlers.trace(seeded).get_trace(y)


def level_covariance(noise_variance):
    return 100.0 + 0.16 * np.minimum.outer(np.arange(STEPS), np.arange(STEPS)) + np.diag(noise_variance)


def normal(y, covariance):
    seen = ~np.isnan(y)
    return scipy.stats.multivariate_normal.logpdf(y[seen], np.zeros(seen.sum()), covariance[np.ix_(seen, seen)])


@pytest.mark.parametrize("double", [True, False])
def test_given_the_weights_the_density_is_normal(double):
    base = np.random.default_rng(1).normal(size=STEPS)
    with jax.enable_x64(double):
        trace = trace_of({**STUDENT, "noise_base": base}, noise="student_t")
        found = trace["y"]["fn"].log_prob(trace["y"]["value"])
    weights = np.exp(base / np.sqrt(4.5 / 2))
    np.testing.assert_allclose(trace["weight_obs"]["value"], weights, rtol=1e-5)
    np.testing.assert_allclose(found, normal(Y, level_covariance(0.25 / weights)), rtol=1e-9 if double else 1e-5)


def test_weights_integrate_to_student(x64):
    """`int N(y; s, sigma^2 / w) p(w) dw` over the sampler's own coordinate is Student's density."""
    prior = trace_of(STUDENT, noise="student_t")["noise_base"]["fn"].base_dist
    root = np.sqrt(4.5 / 2)
    e = np.linspace(-30, 12, 40001)
    density = np.exp(np.asarray(prior.log_prob(jnp.asarray(e)[:, None]))[:, 0])
    np.testing.assert_allclose(scipy.integrate.trapezoid(density, e), 1.0, rtol=1e-8)
    for gap in (0.0, 0.7, 4.0):
        values = density * scipy.stats.norm.pdf(gap, 0.0, 0.5 / np.exp(0.5 * e / root))
        expected = scipy.stats.t.pdf(gap, 4.5, 0.0, 0.5)
        np.testing.assert_allclose(scipy.integrate.trapezoid(values, e), expected, rtol=1e-7)


@pytest.mark.parametrize("double", [True, False])
def test_log_variance_is_the_recursion(double):
    base = np.random.default_rng(1).normal(size=STEPS)
    with jax.enable_x64(double):
        trace = trace_of({**VOLATILE, "noise_base": base}, noise="stochastic_volatility")
        found = trace["y"]["fn"].log_prob(trace["y"]["value"])
    h = [0.3 / np.sqrt(1 - 0.81) * base[0]]
    for e in base[1:]:
        h.append(0.9 * h[-1] + 0.3 * e)
    np.testing.assert_allclose(trace["log_variance"]["value"], h, rtol=1e-12 if double else 1e-5)
    np.testing.assert_allclose(found, normal(Y, level_covariance(0.25 * np.exp(h))), rtol=1e-9 if double else 1e-5)


@pytest.mark.parametrize("noise", ["student_t", "stochastic_volatility"])
def test_sampled_states_have_the_density_by_hand(noise, x64):
    rng = np.random.default_rng(2)
    level = rng.normal(size=STEPS).cumsum()
    h = 0.5 * rng.normal(size=STEPS)
    values = dict(STUDENT if noise == "student_t" else VOLATILE)
    values["z"] = level[:, None] if noise == "student_t" else np.column_stack([level, h])
    model = partial(models.structural, location=0.0, scale=1.0, noise=noise, states="sampled")
    joint, trace = log_density(model, (Y,), {}, {n: jnp.asarray(x) for n, x in values.items()})
    priors = sum(float(trace[n]["fn"].log_prob(trace[n]["value"])) for n in values if n != "z")
    expected = scipy.stats.norm.logpdf(level[0], 0, 10) + scipy.stats.norm.logpdf(np.diff(level), 0, 0.4).sum()
    if noise == "student_t":
        expected += scipy.stats.t.logpdf(Y, 4.5, level, 0.5)[SEEN].sum()
    else:
        expected += scipy.stats.norm.logpdf(h[0], 0, 0.3 / np.sqrt(1 - 0.81))
        expected += scipy.stats.norm.logpdf(h[1:], 0.9 * h[:-1], 0.3).sum()
        expected += scipy.stats.norm.logpdf(Y, level, 0.5 * np.exp(h / 2))[SEEN].sum()
    np.testing.assert_allclose(joint, expected + priors, rtol=1e-9)


def test_log_variance_at_uneven_times(x64):
    """Steps of one are those without times, and two steps of a half are one."""
    base = np.random.default_rng(1).normal(size=STEPS)
    options = {"noise": "stochastic_volatility"}
    values = {**VOLATILE, "noise_base": base}
    plain = trace_of(values, **options)["log_variance"]["value"]
    timed = trace_of(values, t=np.arange(STEPS), **options)["log_variance"]["value"]
    np.testing.assert_allclose(timed, plain, rtol=1e-10)
    t = np.array([0.0, 0.5, 1.0, 4.0])
    path = trace_of(VOLATILE, Y[:4], t=t, states="sampled", **options)["z"]["fn"]
    A, Q = (np.asarray(as_matrix(x))[:, 1, 1] for x in (path.transition, path.chol_Q))
    np.testing.assert_allclose(A[1] * A[2], 0.9, rtol=1e-12)
    np.testing.assert_allclose(Q[2] ** 2 + (A[2] * Q[1]) ** 2, 0.09, rtol=1e-10)
    np.testing.assert_allclose(A[3] ** 2 * 0.09 / 0.19 + Q[3] ** 2, 0.09 / 0.19, rtol=1e-10)  # stationary


def same_draws(values, count, key, noise):
    """One value of the parameters, many of what belongs to the steps."""
    base = trace_of(values, noise=noise)["noise_base"]["fn"].sample(jax.random.key(key), (count,))
    return {n: np.full((1, count), x) for n, x in values.items()} | {"noise_base": np.asarray(base)[None]}


@pytest.mark.parametrize("noise", ["student_t", "stochastic_volatility"])
def test_forecasts_draw_the_noise_of_the_future(noise, x64):
    """The spread of the forecast is that of the level and of the noise far ahead, whatever the past's noise was."""
    values = STUDENT | {"nu_obs": 8.0} if noise == "student_t" else VOLATILE
    draws = same_draws(values, 4000, 3, noise)
    model = partial(models.structural, location=0.0, scale=1.0, noise=noise)
    found = infer.forecast(model, draws, 40, Y, most=4000)
    step = found.sd[-1, 0] ** 2 - found.sd[-21, 0] ** 2  # twenty steps of the level, and the noise twice
    mean_variance = 0.25 * 8 / 6 if noise == "student_t" else 0.25 * np.exp(0.5 * 0.09 / 0.19)
    last = trace_of({**values, "noise_base": draws["noise_base"][0, 0]}, noise=noise)["y"]["fn"].smooth(Y[:, None])
    level = float(last.cov[-1, 0, 0])
    assert step == pytest.approx(20 * 0.16, abs=0.15)
    assert found.sd[-1, 0] ** 2 - 40 * 0.16 == pytest.approx(level + mean_variance, abs=0.35)


def test_forecasts_keep_the_noise_of_the_past(x64):
    """The first forecast's mean is that of the filter with the drawn weights."""
    draws = same_draws(STUDENT, 1, 4, "student_t")
    model = partial(models.structural, location=0.0, scale=1.0, noise="student_t")
    found = infer.forecast(model, draws, 2, Y)
    fn = trace_of({**STUDENT, "noise_base": draws["noise_base"][0, 0]}, noise="student_t")["y"]["fn"]
    expected = fn.smooth(Y[:, None]).mean[-1, 0]
    np.testing.assert_allclose(found.mean[:, 0], expected, rtol=1e-10)
    with pytest.raises(ValueError, match="`origin`: the draws of .*noise_base"):
        infer.forecast(model, draws, 2, Y, origin=5)


@pytest.mark.parametrize("seasonal", [None, 3])
def test_sampled_paths_go_on(seasonal):
    """A path of its own, or, with a singular noise, the noise that drives it: the same fit, smoothed and forecast."""
    model = partial(models.structural, seasonal=seasonal, noise="student_t", states="sampled")
    mcmc = MCMC(NUTS(model, max_tree_depth=4), num_warmup=20, num_samples=20, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    fit = infer.record_of(mcmc)
    path = np.asarray(mcmc.get_samples()["z"])
    np.testing.assert_allclose(infer.smoothed_states(fit).state.mean, path.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(infer.sample_states(fit), path, rtol=1e-4, atol=1e-5)
    ahead = infer.forecast(fit, 3)
    assert ahead.draws.shape[1:] == (3, 1)
    assert np.isfinite(ahead.sd).all()
    moved = np.abs(ahead.mean[0, 0] - path[:, -1, 0].mean())
    assert moved < 6 * path[:, -1, 0].std() + 3 * np.asarray(mcmc.get_samples()["sigma_level"]).mean() + 3


def test_axes_of_the_steps_are_time():
    model = partial(models.structural, noise="student_t")
    mcmc = MCMC(NUTS(model, max_tree_depth=3), num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    tree = to_datatree(mcmc, time=np.arange(1900, 1900 + STEPS), states=True, forecast=2)
    assert tree["posterior"]["weight_obs"].dims == ("chain", "draw", "time")
    assert tree["posterior"]["time"].values[0] == 1900
    assert tree["smoothed_states"]["state"].values.tolist() == ["level"]


@pytest.mark.slow
def test_outliers_do_not_move_the_level():
    """Three outliers in the Nile: the level is that of the clean series, and the outliers have the least weights."""
    y = np.array(datasets.load("nile").y, float).ravel()
    dirty = y.copy()
    dirty[[20, 50, 80]] += [900.0, -800.0, 1000.0]
    fits = {}
    for name, data, noise in (("clean", y, "normal"), ("normal", dirty, "normal"), ("student", dirty, "student_t")):
        mcmc = MCMC(NUTS(partial(models.structural, noise=noise)), num_warmup=500, num_samples=500, progress_bar=False)
        mcmc.run(jax.random.key(0), data)
        fits[name] = mcmc, infer.smoothed_states(mcmc).state.mean[:, 0]
    error = {n: np.sqrt(np.mean((fits[n][1] - fits["clean"][1]) ** 2)) for n in ("normal", "student")}
    assert error["student"] < 0.5 * error["normal"]
    weights = np.asarray(fits["student"][0].get_samples()["weight_obs"]).mean(0)
    assert set(np.argsort(weights)[:3]) == {20, 50, 80}
    sigma = np.asarray(fits["student"][0].get_samples()["sigma_obs"]).mean()
    assert sigma < np.asarray(fits["normal"][0].get_samples()["sigma_obs"]).mean()
