"""Maximum likelihood and posterior modes against closed forms and statsmodels, at the boundary, in all units."""

import pickle
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from statsmodels.tsa.statespace.sarimax import SARIMAX
from statsmodels.tsa.statespace.structural import UnobservedComponents

import pssm
from pssm import datasets, infer, models
from pssm.diagnostics import to_datatree
from pssm.fitting.climb import Rules, ascend, newton, to_the_top
from pssm.fitting.ml import PointEngine
from pssm.fitting.target import Target

NILE = np.array(datasets.load("nile").y)
SUNSPOTS = np.array(datasets.load("sunspots").y)
fit_ml = partial(infer.fit_ml, progress_bar=False, num_starts=3)
fit_map = partial(infer.fit_map, progress_bar=False, num_starts=3)


def normal(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    numpyro.deterministic("variance", sigma**2)
    numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


def test_independent_normal_numbers_in_closed_form():
    y = np.random.default_rng(1).normal(3.0, 2.0, 50)
    fit = fit_ml(normal, y)
    mean, sd, n = y.mean(), y.std(), len(y)
    assert fit.params["mu"] == pytest.approx(mean, abs=1e-10)
    assert fit.params["sigma"] == pytest.approx(sd, rel=1e-10)
    assert fit.derived["variance"] == pytest.approx(sd**2, rel=1e-9)
    best = -n / 2 * (np.log(2 * np.pi * sd**2) + 1)
    assert fit.log_likelihood == pytest.approx(best, abs=1e-9)
    assert (fit.num_parameters, fit.num_observations) == (2, 50)
    assert fit.aic == pytest.approx(4 - 2 * best)
    assert fit.aicc == pytest.approx(4 - 2 * best + 12 / 47)
    assert fit.bic == pytest.approx(2 * np.log(50) - 2 * best)
    assert fit.errors["mu"] == pytest.approx(sd / n**0.5, rel=1e-6)
    assert fit.errors["sigma"] == pytest.approx(sd / (2 * n) ** 0.5, rel=1e-6)
    assert fit.errors["variance"] == pytest.approx(2 * sd**2 / (2 * n) ** 0.5, rel=1e-6)
    np.testing.assert_allclose(fit.covariance, np.diag([sd**2 / n, sd**2 / (2 * n)]), rtol=1e-6, atol=1e-8)
    assert fit.converged
    assert fit.decrement < 1e-15
    assert list(fit.summary().index) == ["mu", "sigma", "variance"]
    assert (fit.summary().low_95 < fit.summary().estimate).all()
    assert fit.summary().low_95["sigma"] == pytest.approx(sd * np.exp(-1.959964 / (2 * n) ** 0.5), rel=1e-6)


@pytest.mark.parametrize(("place", "sd"), [(1e6, 1e-3), (0.0, 1e-9), (-1e9, 1e3), (5.0, 1e8)])
def test_data_far_from_the_prior(place, sd):
    y = place + sd * np.random.default_rng(2).normal(size=60)
    fit = fit_ml(normal, y)
    assert fit.log_likelihood == pytest.approx(-30 * (np.log(2 * np.pi * y.var()) + 1), abs=1e-9)
    assert fit.errors["mu"] == pytest.approx(
        y.std() / 60**0.5, rel=1e-2 if place == 1e6 else 1e-5
    )  # digits of 1e6 in 1e-3
    assert fit.converged


def test_improper_priors():
    def model(y):
        mu = numpyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        s = numpyro.sample("s", dist.ImproperUniform(dist.constraints.positive, (), ()))
        numpyro.sample("y", dist.Normal(mu, s), obs=y)

    y = 1e4 + np.random.default_rng(2).normal(size=60)
    for fit in (fit_ml(model, y), fit_map(model, y)):
        np.testing.assert_allclose([fit.params["mu"], fit.params["s"]], [y.mean(), y.std()], rtol=1e-9)


def test_a_maximum_at_infinity_is_said():
    def model(y):
        nu = numpyro.sample("nu", dist.Gamma(2.0, 0.1))
        numpyro.sample("y", dist.StudentT(nu, 0.0, 1.0), obs=y)

    with pytest.warns(UserWarning, match="flat, or rises"):
        assert not fit_ml(model, np.linspace(-1.0, 1.0, 50)).converged


def test_entries_of_a_simplex():
    counts = np.array([5.0, 1.0, 14.0])

    def model(counts):
        p = numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))
        numpyro.factor("likelihood", jnp.sum(counts * jnp.log(p)))
        numpyro.sample("one", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=jnp.zeros(3))

    fit = fit_ml(model, counts)
    share = counts / 20
    np.testing.assert_allclose(fit.params["p"], share, rtol=1e-8)
    np.testing.assert_allclose(fit.errors["p"], np.sqrt(share * (1 - share) / 20), rtol=1e-6)
    assert fit.num_parameters == 2


def test_a_posterior_mode_in_closed_form():
    y = np.array([1.0, 2.0, 4.0, np.nan])

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(-1.0, 2.0))
        pssm.observe("y", dist.Normal(mu, 0.5), y)

    fit = fit_map(model, y)
    precision = 1 / 4 + 3 / 0.25
    assert fit.params["mu"] == pytest.approx((-1 / 4 + 7 / 0.25) / precision, rel=1e-10)
    assert fit.errors["mu"] == pytest.approx(precision**-0.5, rel=1e-6)
    assert fit.objective.startswith("log joint density")
    prior = -0.5 * ((fit.params["mu"] + 1) / 2) ** 2 - np.log(2 * (2 * np.pi) ** 0.5)
    assert fit.log_joint == pytest.approx(fit.log_likelihood + prior, abs=1e-9)
    assert fit.num_observations == 3


def structural(data, **spec):
    """statsmodels' model with the first state as ours has it."""
    y = data[:, 0]
    model = UnobservedComponents(y, **spec)
    first, spread = y[~np.isnan(y)][0], np.nanstd(y)
    model.loglikelihood_burn = 0  # the first observation counts
    scales = [10 * spread, spread][: model.k_states]
    model.ssm.initialize_known(np.array([first, 0.0])[: model.k_states], np.diag(scales) ** 2)
    return model


@pytest.mark.parametrize("gaps", [False, True])
def test_local_level_of_the_nile(gaps):
    y = NILE.copy()
    if gaps:
        y[20:40] = y[60:80] = np.nan
    fit = fit_ml(models.local_level, y)
    model = structural(y, level="llevel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = model.fit(disp=False, maxiter=500)
    ours = np.array([fit.params["sigma_obs"] ** 2, fit.params["sigma_level"] ** 2])
    assert model.loglike(ours) == pytest.approx(fit.log_likelihood, abs=1e-6)
    assert fit.log_likelihood > theirs.llf - 1e-6
    assert fit.num_observations == (60 if gaps else 100)
    errors = np.array([fit.errors["sigma_obs"], fit.errors["sigma_level"]]) * 2 * np.sqrt(ours)
    exact = model.smooth(ours).cov_params_approx  # by second derivatives; their `oim` leaves terms out
    np.testing.assert_allclose(errors, np.sqrt(np.diag(exact)), rtol=1e-5)
    if not gaps:  # Durbin & Koopman 2012, section 2.10.2: 15099 and 1469
        np.testing.assert_allclose(ours, [15099, 1469], rtol=2e-4)


def test_a_seasonal_model_of_el_nino():
    y = np.array(datasets.load("elnino").y)[-240:]
    fit = fit_ml(models.seasonal, y, period=12, harmonics=2)
    model = UnobservedComponents(y[:, 0], level="llevel", freq_seasonal=[{"period": 12, "harmonics": 2}])
    spread = y.std()
    model.ssm.initialize_known(np.r_[y[0], np.zeros(4)], np.diag([100.0, 1, 1, 1, 1]) * spread**2)
    model.loglikelihood_burn = 0
    ours = np.array([fit.params[f"sigma_{n}"] ** 2 for n in ("obs", "level", "seasonal")])
    assert model.loglike(ours) == pytest.approx(fit.log_likelihood, abs=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fit.log_likelihood > model.fit(disp=False, maxiter=300).llf - 1e-3


@pytest.mark.parametrize("order", [1, 2])
def test_autoregression_of_the_sunspots(order):
    fit = fit_ml(models.autoregression, SUNSPOTS, order=order)
    model = SARIMAX(SUNSPOTS[:, 0] - fit.params["mean"], order=(order, 0, 0))
    theirs = model.fit(disp=False)
    best = SARIMAX(SUNSPOTS[:, 0], order=(order, 0, 0), trend="c").fit(disp=False)
    assert fit.log_likelihood > best.llf - 1e-3
    ours = [*fit.derived["phi"], fit.params["sigma_ar"] ** 2]
    assert model.loglike(ours) == pytest.approx(fit.log_likelihood, abs=1e-6)
    np.testing.assert_allclose(fit.errors["phi"], np.sqrt(np.diag(theirs.cov_params_approx))[:order], rtol=1e-2)


def test_a_variance_of_zero_is_found_and_named():
    fit = fit_ml(models.local_linear_trend, NILE)
    assert fit.params["sigma_slope"] == 0.0
    assert fit.at_boundary == ("sigma_slope",)
    assert "boundary" in fit.message
    assert fit.converged
    assert np.isnan(fit.errors["sigma_slope"])
    assert fit.errors["sigma_obs"] > 0
    assert fit.summary().note["sigma_slope"] == "at the boundary"
    model = structural(NILE, level="lltrend")
    variances = [fit.params[f"sigma_{n}"] ** 2 for n in ("obs", "level", "slope")]
    assert model.loglike(variances) == pytest.approx(fit.log_likelihood, abs=1e-6)
    for slope in (1e-3, 0.1, 1.0, 10.0):
        assert model.loglike([*variances[:2], slope]) < fit.log_likelihood


def test_components_that_have_vanished():
    y = np.random.default_rng(3).normal(size=60)
    with pytest.warns(UserWarning, match="does not depend on cycle_period, cycle_damping"):
        fit = fit_ml(models.structural, 5.0 + 0 * y + 0.3 * y, level=False, cycle=(5.0, 6.0))
    assert "sigma_cycle" in fit.at_boundary
    assert fit.errors["mean"] > 0


def test_the_boundary_is_a_limit_from_inside():
    """A likelihood that is finite at zero alone, with respect to another measure, is no maximum."""

    def function(z):  # s = exp(z): rises as s falls to 0.1, then falls without end; at s = 0 it is said to be 5
        if np.isneginf(z[0]):
            return 5.0, np.zeros(1)
        s = np.exp(z[0])
        return -np.log(s) - 0.01 / (2 * s**2), np.array([-1 + 0.01 / s**2])

    rules = Rules(np.zeros(1), np.ones(1), np.array([[True, False]]))
    peak = to_the_top(function, ascend(function, np.zeros(1), rules)[0], rules)
    assert np.exp(peak.z[0]) == pytest.approx(0.1, rel=1e-8)


def test_newton_reaches_the_level_of_rounding():
    def function(z):
        a, b = z
        return -((1 - a) ** 2) - 100 * (b - a**2) ** 2, np.array(
            [2 * (1 - a) + 400 * a * (b - a**2), -200 * (b - a**2)]
        )

    rules = Rules(np.zeros(2), np.ones(2), np.zeros((2, 2), bool))
    peak = newton(function, ascend(function, np.array([-1.2, 1.0]), rules)[0], rules)
    np.testing.assert_allclose(peak.z, 1.0, atol=1e-12)
    assert np.abs(peak.gradient).max() < 1e-10
    np.testing.assert_allclose(peak.information, [[802, -400], [-400, 200]], rtol=1e-6)


@pytest.mark.parametrize(("factor", "offset"), [(1e-9, 0.0), (1e13, 0.0), (1.0, 1e7)])
def test_units_and_the_place_of_zero_change_nothing(factor, offset):
    fit = fit_ml(models.local_level, NILE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*64-bit data whose typical step")
        other = fit_ml(models.local_level, factor * NILE + offset)
    assert other.log_likelihood + 100 * np.log(factor) == pytest.approx(fit.log_likelihood, abs=1e-6)
    for name in ("sigma_level", "sigma_obs"):
        assert other.params[name] / factor == pytest.approx(fit.params[name], rel=1e-5)
        assert other.errors[name] / factor == pytest.approx(fit.errors[name], rel=1e-4)


def test_regression_is_least_squares():
    rng = np.random.default_rng(0)
    x = np.stack([np.ones(40), rng.normal(size=40), rng.normal(size=40) + 100.0], 1)
    y = x @ [1.0, -2.0, 0.5] + rng.normal(size=40)

    def model(y):
        b = numpyro.sample("b", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
        s = numpyro.sample("s", dist.Gamma(2.0, 1.0))
        numpyro.sample("y", dist.Normal(jnp.asarray(x) @ b, s), obs=y)

    fit = fit_ml(model, y)
    best = np.linalg.lstsq(x, y)[0]
    np.testing.assert_allclose(fit.params["b"], best, rtol=1e-5, atol=1e-6)
    variance = np.mean((y - x @ best) ** 2)
    errors = np.sqrt(np.diag(variance * np.linalg.inv(x.T @ x)))
    np.testing.assert_allclose(fit.errors["b"], errors, rtol=1e-4)


def test_it_is_a_fit_like_any_other(tmp_path):
    fit = fit_ml(models.local_level, NILE)
    tree = to_datatree(fit, states=True, forecast=3)
    assert dict(tree["posterior"].sizes) == {"chain": 1, "draw": 1}
    assert "one point, no posterior" in tree.attrs["objective"]
    model = structural(NILE, level="llevel")
    theirs = model.smooth([fit.params["sigma_obs"] ** 2, fit.params["sigma_level"] ** 2])
    np.testing.assert_allclose(tree["smoothed_states"]["mean"][:, 0], theirs.smoothed_state[0], rtol=1e-4)
    found, ahead = infer.forecast(fit, 3), theirs.get_forecast(3)
    np.testing.assert_allclose(found.mean[:, 0], ahead.predicted_mean, rtol=1e-4)
    np.testing.assert_allclose(found.sd[:, 0], ahead.se_mean, rtol=1e-3)
    assert found.draws.shape == (400, 3, 1)
    np.testing.assert_allclose(found.draws.std(0)[:, 0], ahead.se_mean, rtol=0.15)
    assert infer.sample_states(fit).shape == (400, 100, 1)
    again = infer.load(infer.save(fit, tmp_path / "fit"))
    assert again.summary().equals(fit.summary())
    assert again.message == fit.message
    assert pickle.loads(pickle.dumps(fit)).summary().equals(fit.summary())
    assert fit_ml(models.local_level, NILE).summary().equals(fit.summary())


def test_an_interruption_and_its_end(tmp_path, monkeypatch):
    advance = PointEngine.advance

    def interrupted(self, run, count):
        if run.steps >= 1:
            raise KeyboardInterrupt
        return advance(self, run, count)

    monkeypatch.setattr(PointEngine, "advance", interrupted)
    with pytest.warns(UserWarning, match="interrupted with 1 of 3 starts"):
        part = fit_ml(models.local_level, NILE, checkpoint=tmp_path / "fit")
    assert not part.converged
    monkeypatch.undo()
    fit = infer.resume(tmp_path / "fit", progress_bar=False)
    assert fit.converged
    assert fit.summary().equals(fit_ml(models.local_level, NILE).summary())


def test_other_data_by_the_same_program():
    target = Target(models.local_level, (NILE,), {}, traced=True)
    other = NILE[::-1].copy()
    other[80:] = np.nan
    z = np.array([3.0, 5.0])
    value, gradient = target.with_arguments((other,), {})(z)
    fresh = Target(models.local_level, (other,), {})
    assert value == pytest.approx(fresh(z)[0], rel=1e-12)
    np.testing.assert_allclose(gradient, fresh(z)[1], rtol=1e-9)
    assert target.with_arguments((other,), {}).num_observations == 80


def discrete(y):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("y", dist.Normal(k, 1.0), obs=y)


def learned(y):
    a = numpyro.param("a", 1.0)
    numpyro.sample("mu", dist.Normal(a, 1.0))
    numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def nothing_seen(y):
    numpyro.sample("mu", dist.Normal(0.0, 1.0))


def nothing_latent(y):
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def in_parts(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(y), subsample_size=2) as rows:
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])


def too_many(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([len(y) + 1]).to_event(1))
    numpyro.sample("y", dist.Normal(mu[1:], 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (partial(models.autoregression, states="sampled"), "Integrate them out"),
        (discrete, "discrete"),
        (learned, "fit_svi"),
        (nothing_seen, "observes nothing"),
        (nothing_latent, "no latent site"),
        (in_parts, "takes a part of the data"),
        (too_many, "single maximum"),
    ],
)
def test_what_has_no_maximum_likelihood_is_refused(model, words):
    with pytest.raises(ValueError, match=words):
        fit_ml(model, np.arange(6.0))


def test_a_flat_direction_is_said():
    def model(y):
        a, b = (numpyro.sample(n, dist.Normal(0.0, 1.0)) for n in "ab")
        numpyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    with pytest.warns(UserWarning, match="flat, or rises"):
        fit = fit_ml(model, np.arange(6.0))
    assert not fit.converged
    assert np.isnan(fit.errors["a"])
    assert fit.params["a"] + fit.params["b"] == pytest.approx(2.5, abs=1e-6)


def test_draws_of_the_normal_approximation():
    fit = fit_ml(models.local_linear_trend, NILE)
    draws = fit.approximate_draws(4000, key=1)
    assert (draws["sigma_slope"] == 0).all()
    logs = np.log(draws["sigma_obs"])
    assert logs.mean() == pytest.approx(np.log(fit.params["sigma_obs"]), abs=0.01)
    assert logs.std() == pytest.approx(fit.errors["sigma_obs"] / fit.params["sigma_obs"], rel=0.05)


def test_states_integrated_out_by_a_gaussian_filter():
    y = np.random.default_rng(4).normal(size=60) * np.exp(np.repeat([0.0, 1.0, -0.5], 20))
    fit = fit_ml(models.stochastic_volatility, y, states="ekf", num_starts=1)
    assert fit.log_likelihood >= max(fit.starts) - 1e-9
    found = infer.smoothed_states(fit)
    assert found.state.mean.shape == (60, 1)
    assert found.state.mean[20:40].mean() > found.state.mean[40:].mean()
    assert np.isfinite(found.signal.mean).all()


def test_a_model_with_32_bit_numbers_of_its_own():
    """A scan does not mix precisions: the session's own is used, and differences of its size."""
    half = jnp.asarray([0.5], jnp.float32)

    def model(y):
        a, s = numpyro.sample("a", dist.Normal(0.0, 1.0)), numpyro.sample("s", dist.HalfNormal(1.0))
        path = jax.lax.scan(lambda c, _: (half[0] * c + a, c), jnp.zeros((), jnp.float32), length=len(y))[1]
        numpyro.sample("y", dist.Normal(path, s), obs=y)

    y = np.random.default_rng(0).normal(size=40) + 1
    z = 2 * (1 - 0.5 ** np.arange(40))
    fit = fit_ml(model, y)
    assert not fit.engine.function.double
    assert fit.converged
    assert fit.params["a"] == pytest.approx(y @ z / (z @ z), rel=1e-3)
    assert fit.errors["a"] == pytest.approx(fit.params["s"] / (z @ z) ** 0.5, rel=1e-2)
