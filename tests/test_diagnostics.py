"""Diagnostics of a fit: k-hat, log evidence and leave-future-out density, against closed forms."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_median
from numpyro.infer.autoguide import AutoDelta
from scipy import stats

from pssm import LinearGaussianSSM, kalman_filter
from pssm.diagnostics import khat, leave_future_out, log_evidence
from pssm.diagnostics.bound import elbo_and_khat
from pssm.diagnostics.crossval import _Refit
from pssm.distributions import LinearGaussianMarginal
from pssm.fitting.weights import pareto_shape
from pssm.infer import SVIFit, elbo, fit_nuts, fit_svi

QUIET = {"progress_bar": False}
STEPS = 16
ERRORS = np.random.default_rng(2).normal(size=(STEPS, 1))
CALM = 1.0 + ERRORS
CALM[[3, 11]] = np.nan
JUMP = np.concatenate([ERRORS[:12], ERRORS[12:] + 30.0])


def shifted(y):
    """An unknown shift `mu`, seen through a random walk and noise: everything is normal."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 3.0))
    one = jnp.ones((1, 1))
    ssm = LinearGaussianSSM(jnp.zeros(1), 0.5 * one, one, 0.2 * one, one, one, d=mu[None])
    numpyro.sample("y", LinearGaussianMarginal(ssm, len(y)), obs=y)


# The same with `mu` as a second state that never moves: its one-step densities average over the posterior of `mu`.
AVERAGED = LinearGaussianSSM(
    np.zeros(2), np.diag([0.5, 3.0]), np.eye(2), np.array([[0.2], [0.0]]), np.ones((1, 2)), np.eye(1)
)


def variance_known_up_to_scale(y):
    """Unknown mean and precision, conjugate: the evidence is that of a multivariate t."""
    precision = numpyro.sample("precision", dist.Gamma(3.0, 2.0))
    mean = numpyro.sample("mean", dist.Normal(0.0, 1 / jnp.sqrt(precision)))
    numpyro.sample("y", dist.Normal(mean, 1 / jnp.sqrt(precision)).expand([len(y)]).to_event(1), obs=y)


def guided(scale, df=None):
    """A standard normal or Student's t as the posterior, and a normal guide of another scale, nothing to fit."""

    def model():
        numpyro.sample("x", dist.Normal(0.0, 1.0) if df is None else dist.StudentT(df))

    def guide():
        numpyro.sample("x", dist.Normal(0.0, numpyro.param("scale", scale)))

    svi = SVI(model, guide, numpyro.optim.Adam(1e-9), Trace_ELBO())
    return SVIFit.of(svi, svi.run(jax.random.key(0), 20, **QUIET))


@pytest.fixture(scope="module")
def nuts():
    return {
        name: fit_nuts(shifted, y, num_warmup=300, num_samples=1000, num_chains=2, **QUIET)
        for name, y in {"calm": CALM, "jump": JUMP}.items()
    }


# A normal posterior under a normal guide of `scale < 1` has weights of Pareto shape 1 - scale^2, above 1 bounded ones.
@pytest.mark.parametrize(("scale", "least", "most"), [(1.5, -3.0, 0.2), (0.7, 0.35, 0.65), (0.5, 0.6, 0.9)])
def test_khat_is_the_tail_of_the_weights(scale, least, most):
    assert least < khat(guided(scale), num_particles=20_000) < most


def test_khat_of_a_guide_with_lighter_tails_than_the_posterior_is_above_one_half():
    assert khat(guided(1.0, df=2.0)) > 0.5


@pytest.mark.parametrize("num_particles", [100, 4000])
def test_khat_of_an_exact_guide_is_zero(num_particles):
    assert khat(guided(1.0), num_particles=num_particles) == 0.0


@pytest.mark.parametrize(("noise", "expected"), [(0.0, 0.0), (1e-5, 0.0), (0.5, None), (np.nan, np.inf)])
def test_weights_equal_up_to_rounding_have_no_tail(noise, expected):
    # log weights near -600 in float32: their last digit is 6e-5
    log_weights = (-600 + noise * np.random.default_rng(0).normal(size=2000)).astype(np.float32)
    found = pareto_shape(log_weights)
    assert found == expected if expected is not None else 0 != found < 0.5


def test_khat_is_low_where_the_guide_is_right(svi):
    assert khat(svi, num_particles=1000) < 0.5
    assert khat(svi, num_particles=1000, key=3) == khat(svi, num_particles=1000, key=3)


def test_elbo_and_khat_of_the_same_draws(svi):
    value, error, shape = elbo_and_khat(svi, key=3, num_particles=1000)
    expected, expected_error = elbo(svi, num_particles=4000)
    assert shape == khat(svi, key=3, num_particles=1000)
    assert abs(value - expected) < 4 * np.hypot(error, expected_error) + 1e-3
    assert 0.5 < error / (2 * expected_error) < 2.0


@pytest.fixture(scope="module")
def svi():
    return fit_svi(shifted, CALM, guide="normal", num_steps=1500, learning_rate=0.03, **QUIET)


def test_log_evidence_of_a_state_space_model_is_that_of_the_averaged_model(nuts):
    found = log_evidence(shifted, nuts["calm"].get_samples(group_by_chain=True), CALM)
    exact = oracles.log_likelihood(AVERAGED, CALM)
    assert abs(found.log_evidence - exact) < 4 * found.standard_error + 1e-4
    assert found.standard_error < 0.02
    assert found.khat < 0.7


def test_log_evidence_with_constrained_parameters_is_the_closed_form():
    y = np.array([0.3, -1.0, 2.0, 1.2, 0.1])
    rng = np.random.default_rng(0)
    n, a, b = len(y), 3.0, 2.0
    rate = b + 0.5 * (y @ y - y.sum() ** 2 / (n + 1))
    precision = rng.gamma(a + n / 2, 1 / rate, (1, 4000))
    draws = {"precision": precision, "mean": rng.normal(y.sum() / (n + 1), 1 / np.sqrt((n + 1) * precision))}
    exact = stats.multivariate_t(np.zeros(n), b / a * (np.eye(n) + 1), df=2 * a).logpdf(y)
    found = log_evidence(variance_known_up_to_scale, draws, y)
    assert abs(found.log_evidence - exact) < 4 * found.standard_error + 1e-4
    assert found.standard_error < 0.02


def test_log_evidence_from_draws_elsewhere_distrusts_itself():
    draws = {"mu": np.random.default_rng(0).normal(-0.5, 0.05, (1, 500))}
    assert log_evidence(shifted, draws, CALM).khat > 0.7


@pytest.mark.parametrize("case", ["calm", "jump"])
def test_leave_future_out_is_the_exact_predictive_density(nuts, case):
    y = {"calm": CALM, "jump": JUMP}[case]
    found = leave_future_out(nuts[case], min_observations=6)
    exact = oracles.log_likelihoods(AVERAGED, y)
    steps = np.flatnonzero(~np.isnan(y[:, 0]))[6:]
    np.testing.assert_array_equal(found.elpd_i["time"], steps)
    np.testing.assert_allclose(found.elpd_i, exact[steps], atol=0.1, rtol=0.01)
    assert found.elpd == pytest.approx(exact[steps].sum(), rel=0.01, abs=0.25)
    assert (found.n_refits > 0) == (case == "jump")  # refitted where the importance weights fail, and only there


def test_leave_future_out_several_steps_ahead(nuts):
    found = leave_future_out(nuts["calm"], horizon=3)
    exact = oracles.log_likelihoods(AVERAGED, CALM)
    exact = exact[~np.isnan(CALM[:, 0])]
    blocks = [exact[t : t + 3].sum() for t in range(7, 12)]
    np.testing.assert_allclose(found.elpd_i, blocks, atol=0.15)


def test_leave_future_out_of_an_svi_fit(svi):
    found = leave_future_out(svi, min_observations=10)
    exact = oracles.log_likelihoods(AVERAGED, CALM)
    np.testing.assert_allclose(found.elpd_i, exact[found.elpd_i["time"].values], atol=0.1)


def test_refits_keep_the_settings_of_the_fit():
    mcmc = MCMC(
        NUTS(shifted, target_accept_prob=0.7, dense_mass=True, max_tree_depth=3, init_strategy=init_to_median),
        **{"num_warmup": 20, "num_samples": 10, **QUIET},
    )
    mcmc.run(jax.random.key(0), CALM)
    refit = inspect.getclosurevars(_Refit(mcmc, 0).refit).nonlocals["mcmc"]
    assert refit is not mcmc
    assert (refit.num_warmup, refit.num_samples, refit.num_chains) == (20, 10, 1)
    for name in ("_target_accept_prob", "_dense_mass", "_max_tree_depth", "_init_strategy"):
        assert getattr(refit.sampler, name) == getattr(mcmc.sampler, name), name


def test_refits_of_a_guide_are_fits_to_the_past_and_compiled_once(svi):
    refit = _Refit(svi, 0)
    for steps in (8, 11):
        past, _ = refit.sel_observations(np.arange(steps, len(refit.seen)))
        draws = np.asarray(refit.sample(past)["mu"])
        assert draws.shape == (1, 4000)
        exact = kalman_filter(AVERAGED, past)
        assert draws.mean() == pytest.approx(float(exact.mean[-1, 1]), abs=0.06)
        assert draws.std() == pytest.approx(float(exact.cov[-1, 1, 1]) ** 0.5, rel=0.06)
    assert refit.refit._cache_size() == 1


def test_wrong_settings_of_leave_future_out_are_named(svi):
    for least in (0, 14):
        with pytest.raises(ValueError, match="`min_observations` must be between 1 and 13"):
            leave_future_out(svi, min_observations=least)
    with pytest.raises(ValueError, match="`horizon`"):
        leave_future_out(svi, horizon=0)
    delta = SVI(shifted, AutoDelta(shifted), numpyro.optim.Adam(0.1), Trace_ELBO())
    with pytest.raises(ValueError, match="`fit`.*'normal', 'mvn'.*AutoDelta"):
        leave_future_out(SVIFit.of(delta, delta.run(jax.random.key(0), 20, CALM, **QUIET)))
