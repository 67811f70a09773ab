"""Fits: NumPyro's own results, convergence in words, errors that name the argument, a start scaled by the data."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_median, init_to_value
from numpyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from numpyro.infer.svi import SVIRunResult
from numpyro.primitives import mutable as numpyro_mutable

from pssm import datasets, models, observe
from pssm.diagnostics import to_datatree
from pssm.fitting.results import convergence
from pssm.infer import elbo, fit_nuts, fit_svi, posterior_draws, resume

Y = datasets.load("nile").y


def normal_mean(y):
    """Conjugate: `mu | y` is normal and the evidence is known."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.deterministic("twice", 2 * mu)
    with numpyro.plate("n", len(y)):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


MEAN_DATA = np.array([0.5, 1.5, 1.0, 2.0])


def exact_evidence():
    n = len(MEAN_DATA)
    cov = np.eye(n) + 1.0
    return -0.5 * (n * np.log(2 * np.pi) + np.linalg.slogdet(cov)[1] + MEAN_DATA @ np.linalg.solve(cov, MEAN_DATA))


@pytest.fixture(scope="module")
def svi():
    return fit_svi(normal_mean, MEAN_DATA, guide="normal", num_steps=3000, progress_bar=False)


@pytest.fixture(scope="module")
def nuts():
    return fit_nuts(normal_mean, MEAN_DATA, num_warmup=200, num_samples=300, num_chains=2, progress_bar=False)


def test_nuts_returns_numpyros_mcmc(nuts):
    assert type(nuts) is MCMC
    assert nuts.get_samples(group_by_chain=True)["mu"].shape == (2, 300)
    assert float(nuts.get_samples()["mu"].mean()) == pytest.approx(1.0, abs=0.12)  # exact: sum(y) / (n + 1)


def test_nuts_is_numpyros_own_run():
    mcmc = fit_nuts(normal_mean, MEAN_DATA, key=5, num_warmup=50, num_samples=20, num_chains=1, progress_bar=False)
    own = MCMC(NUTS(normal_mean), num_warmup=50, num_samples=20, progress_bar=False)
    own.run(jax.random.key(5), MEAN_DATA)
    np.testing.assert_array_equal(mcmc.get_samples()["mu"], own.get_samples()["mu"])


FIELD = "adapt_state.step_size"
OPTIONS = {"num_warmup": 30, "num_samples": 20, "num_chains": 1, "progress_bar": False, "thinning": 5}


def test_nuts_takes_numpyros_start_thinning_and_fields(tmp_path):
    """The same draws as NumPyro's own, in one go, in pieces, and after a break."""
    start = init_to_value(values={"mu": 3.0})
    options = {**OPTIONS, "init_strategy": start, "extra_fields": (FIELD,)}
    own = MCMC(NUTS(normal_mean, init_strategy=start), num_warmup=30, num_samples=20, thinning=5, progress_bar=False)
    own.run(jax.random.key(5), MEAN_DATA, extra_fields=(FIELD,))
    first = fit_nuts(normal_mean, MEAN_DATA, key=5, **options)
    fit_nuts(normal_mean, MEAN_DATA, key=5, chunk=7, checkpoint=tmp_path / "fit", **{**options, "num_samples": 10})
    for fit in (first, resume(tmp_path / "fit", normal_mean, num_samples=20, progress_bar=False)):
        np.testing.assert_allclose(fit.get_samples()["mu"], own.get_samples()["mu"], rtol=1e-5)
        np.testing.assert_allclose(fit.get_extra_fields()[FIELD], own.get_extra_fields()[FIELD], rtol=1e-5)
        assert fit.get_samples()["mu"].shape == (4,)
    assert to_datatree(first)["posterior"].sizes["draw"] == 4


@pytest.mark.parametrize(
    ("fit", "option", "words"),
    [
        (fit_nuts, {"step_size": 0.1}, "`step_size` is an option of `numpyro.infer.NUTS`"),
        (fit_nuts, {"postprocess_fn": None}, "`postprocess_fn` is an option of `numpyro.infer.MCMC`"),
        (fit_svi, {"optim": None}, "`optim` is an option of `numpyro.infer.SVI`"),
        (fit_nuts, {"thinning": 3, "num_samples": 10}, "`num_samples` must be a multiple of `thinning`"),
        (fit_nuts, {"extra_fields": "energy"}, "`extra_fields` must be a tuple"),
    ],
)
def test_options_do_not_go_to_the_model(fit, option, words):
    with pytest.raises((TypeError, ValueError), match=words):
        fit(normal_mean, MEAN_DATA, **option)


def test_masked_entries_are_missing():
    """In every fit, as NaN would be."""

    def model(y, x):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        observe("y", dist.Normal(mu * x, 1.0), y)

    wrong = np.array([0.5, 999.0, 1.0, 2.0])
    options = {"num_warmup": 20, "num_samples": 10, "num_chains": 1, "progress_bar": False}
    gap = np.where(wrong > 900, np.nan, wrong)
    for fit, numbers in ((fit_nuts, options), (fit_svi, {"num_steps": 10, "progress_bar": False})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ten steps
            found = [
                posterior_draws(fit(model, y, x=np.ones(4), **numbers)) for y in (gap, np.ma.masked_greater(wrong, 900))
            ]
        np.testing.assert_array_equal(found[0]["mu"], found[1]["mu"])


def test_svi_returns_numpyros_result_and_says_that_it_converged(svi):
    assert isinstance(svi, SVIRunResult)
    assert svi.losses.shape == (3000,)
    assert svi.converged is True
    assert "nats" in svi.message
    assert isinstance(svi.svi, SVI)
    assert set(svi.params) == {"mu_auto_loc", "mu_auto_scale"}
    assert float(svi.params["mu_auto_loc"]) == pytest.approx(1.0, abs=0.02)
    assert float(svi.params["mu_auto_scale"]) == pytest.approx(5**-0.5, rel=0.03)


def test_elbo_of_an_exact_guide_is_the_evidence(svi):
    value, error = elbo(svi, num_particles=2000)
    assert abs(value - exact_evidence()) < 4 * error + 0.002
    assert value < exact_evidence() + 4 * error


def test_draws_of_svi_are_one_chain_with_deterministic_sites(svi):
    draws = posterior_draws(svi, num_samples=50)
    assert {n: x.shape for n, x in draws.items()} == {"mu": (1, 50), "twice": (1, 50)}
    np.testing.assert_allclose(draws["twice"], 2 * draws["mu"], rtol=1e-6)


def test_draws_of_nuts_keep_their_chains(nuts):
    draws = posterior_draws(nuts)
    assert {n: x.shape for n, x in draws.items()} == {"mu": (2, 300), "twice": (2, 300)}


def test_too_few_steps_are_warned_of():
    with pytest.warns(UserWarning, match="not converged.*`num_steps` \\(now 30\\)"):
        fit = fit_svi(models.local_level, Y, num_steps=30, progress_bar=False)
    assert fit.converged is False
    assert "fell" in fit.message


@pytest.mark.parametrize(("fall", "converged"), [(0.0, True), (0.05, True), (2.0, False)])
def test_loss_that_is_flat_at_the_end_alone_has_not_converged(fall, converged):
    time = np.linspace(0, 1, 1000)
    losses = 100 + fall * np.maximum(0.7 - time, 0) + np.random.default_rng(0).normal(0, 0.2, 1000)
    assert convergence(losses)[0] == converged


def test_loss_that_turns_nan_names_the_step():
    def breaks(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 100.0))
        numpyro.factor("wall", jnp.where(mu > 3.0, jnp.nan, 0.0))
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(FloatingPointError, match=r"nan at step \d+ of 2000.*`learning_rate`"):
        fit_svi(breaks, 10.0, guide="normal", num_steps=2000, key=1, progress_bar=False)


def test_unknown_guide_names_the_argument():
    with pytest.raises(ValueError, match="`guide`.*'mvm'.*'mvn'"):
        fit_svi(models.local_level, Y, guide="mvm", progress_bar=False)


@pytest.mark.parametrize("name", ["num_warmup", "num_samples", "num_chains"])
def test_nuts_counts_are_checked(name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        fit_nuts(models.local_level, Y, **{name: 0})


def test_svi_steps_are_checked():
    with pytest.raises(ValueError, match="`num_steps`"):
        fit_svi(models.local_level, Y, num_steps=3)


def test_what_is_not_a_fit_is_named():
    with pytest.raises(TypeError, match="`fit`.*got str"):
        posterior_draws("nuts")


@pytest.mark.filterwarnings("ignore:SVI has not converged")
def test_start_is_scaled_by_the_data():
    plain, large = (fit_svi(models.local_level, Y * f, num_steps=30, key=2, progress_bar=False) for f in (1.0, 1e6))
    shift = len(Y) * np.log(1e6)  # of the density, by the change of units alone
    assert float(plain.losses[0]) < 1500
    assert float(large.losses[0]) - shift == pytest.approx(float(plain.losses[0]), rel=0.02)


def test_own_guide_optimiser_and_loss_are_used():
    guide = AutoDiagonalNormal(normal_mean)
    fit = fit_svi(
        normal_mean,
        MEAN_DATA,
        guide=guide,
        optimizer=numpyro.optim.Adam(0.02),
        loss=Trace_ELBO(num_particles=4),
        num_steps=1500,
        progress_bar=False,
    )
    assert fit.svi.guide is guide
    assert float(posterior_draws(fit, num_samples=500)["mu"].mean()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.filterwarnings("ignore:SVI has not converged")
def test_compiled_start_is_numpyros_start():
    fit = fit_svi(normal_mean, MEAN_DATA, guide="normal", num_steps=20, progress_bar=False)
    guide = AutoNormal(normal_mean, init_loc_fn=init_to_median(num_samples=50), init_scale=0.1)
    own = SVI(normal_mean, guide, fit.svi.optim, fit.svi.loss).run(jax.random.key(0), 20, MEAN_DATA, progress_bar=False)
    np.testing.assert_allclose(fit.losses, own.losses, rtol=1e-5)
    for name, value in own.params.items():
        np.testing.assert_allclose(fit.params[name], value, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:SVI has not converged")
def test_parameters_bounded_by_what_the_model_computes_and_mutable_sites():
    def model(y, power):
        top = numpyro.param("top", 1.0, constraint=dist.constraints.interval(0.0, jnp.max(y) ** int(power)))
        count = numpyro_mutable("count", {"calls": jnp.zeros(())})
        count["calls"] = count["calls"] + 1.0
        mu = numpyro.sample("mu", dist.Normal(0.0, top))
        numpyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)

    fit = fit_svi(model, MEAN_DATA, "2", guide="normal", loss=Trace_ELBO(), num_steps=20, progress_bar=False)
    assert 0 < fit.params["top"] < 4.0
    assert fit.state.mutable_state["count"]["calls"] > 20
    assert np.isfinite(posterior_draws(fit, num_samples=5)["mu"]).all()


def test_start_that_cannot_be_compiled_is_run_as_ever():
    def model(y):
        top = numpyro.param("top", lambda key: float(jax.random.uniform(key)) + 1.0)
        mu = numpyro.sample("mu", dist.Normal(0.0, top))
        numpyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)

    fit = fit_svi(model, MEAN_DATA, guide="mvn", num_steps=1000, progress_bar=False)
    assert fit.losses[-1] < fit.losses[0]


@pytest.mark.filterwarnings("ignore:.*transitions diverged")
def test_missing_data_and_keyword_arguments_reach_the_model():
    y = Y.copy()
    y[20:40] = np.nan
    fit = fit_nuts(
        models.local_level, y, num_warmup=30, num_samples=10, num_chains=1, progress_bar=False, scale=1.0, location=0.0
    )
    assert np.isfinite(posterior_draws(fit)["sigma_obs"]).all()
    assert fit._kwargs == {"scale": 1.0, "location": 0.0}


@pytest.mark.parametrize(
    ("fit", "few"), [(fit_nuts, {"num_warmup": 5, "num_samples": 5}), (fit_svi, {"num_steps": 10})]
)
def test_part_of_a_joint_event_stops_a_fit_in_words(fit, few):
    def model(y):
        a = numpyro.sample("a", dist.HalfNormal(1.0))
        observe("y", dist.Dirichlet(a * jnp.ones(3)), y)

    with pytest.raises(ValueError, match="`obs` has an event with some entries missing.*Dirichlet"):
        fit(model, np.array([[0.2, np.nan, 0.3]]), progress_bar=False, **few)
