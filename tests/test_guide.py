"""`AutoStateSpace`: exact where it can be, a bound elsewhere, and the same for every one of NumPyro's objectives."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO

import pssm
from pssm.distributions import StatePath, observe
from pssm.guides import AutoStateSpace
from pssm.infer import SVIFit, TraceConditionalKL_ELBO, importance_bound, log_weights

T, C = 20, np.random.default_rng(0).normal(size=(4, 3))
A = 0.95 * np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]


def linear(y):
    z = numpyro.sample("z", StatePath(jnp.zeros(3), jnp.eye(3), A, 0.5 * jnp.eye(3), T))
    observe("y", dist.Normal(z @ C.T, 0.7).to_event(2), y)


@pytest.fixture
def data(x64):
    ssm = pssm.LinearGaussianSSM(np.zeros(3), np.eye(3), A, 0.5 * np.eye(3), C, 0.7 * np.eye(4))
    y = np.array(pssm.simulate(jax.random.key(1), ssm, T)[1])
    y[3], y[5, 1] = np.nan, np.nan
    return y, float(pssm.log_likelihood(ssm, y))


def untrained(model, y, **options):
    svi = SVI(model, AutoStateSpace(model, **options), optax.adam(1e-9), Trace_ELBO())
    return SVIFit.of(svi, svi.run(jax.random.key(0), 10, y, progress_bar=False), y)


def test_start_is_the_exact_posterior_of_a_linear_gaussian_model(data):
    y, evidence = data
    np.testing.assert_allclose(log_weights(untrained(linear, y, rank=3), num_particles=20), evidence, atol=1e-4)


@pytest.mark.slow
def test_low_rank_start_is_a_bound_that_importance_weights_close(data):
    y, evidence = data
    fit = untrained(linear, y, rank=1)
    weights = log_weights(fit, num_particles=2000)
    assert evidence - 3 < weights.mean() < evidence
    assert importance_bound(fit, num_particles=5000).value == pytest.approx(evidence, abs=0.1)
    filtered = importance_bound(fit, num_particles=2000, resample_every=4)
    assert filtered.standard_error < 0.1
    assert abs(filtered.value - evidence) < 4 * filtered.standard_error + 0.02


def test_conditional_kl_objective_is_unbiased(data):
    y, evidence = data
    fit = untrained(linear, y, rank=3)
    loss = TraceConditionalKL_ELBO(4000).loss(jax.random.key(2), fit.params, linear, fit.svi.guide, y)
    assert -float(loss) == pytest.approx(evidence, abs=0.4)


def test_published_family_says_that_it_is_a_surrogate(data):
    y, evidence = data
    guide = AutoStateSpace(linear, rank=3, family="moment_matched")
    svi = SVI(linear, guide, optax.adam(1e-9), TraceConditionalKL_ELBO())
    state = svi.init(jax.random.key(0), y)
    assert guide.objective.startswith("surrogate")
    assert -float(svi.evaluate(state, y)) > evidence


def test_model_without_a_path_is_named():
    def model(y):
        numpyro.sample("mu", dist.Normal())

    with pytest.raises(ValueError, match="`model` has no unobserved `StatePath` site.*mu"):
        SVI(model, AutoStateSpace(model, rank=1), optax.adam(1e-2), Trace_ELBO()).init(jax.random.key(0), 1.0)
