"""`bound_gap`: exact on a linear model, an estimate over parameters, a lower bound of the gap elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO

import pssm
from pssm.diagnostics import bound_gap, log_evidence
from pssm.distributions import StatePath, observe
from pssm.guides import AutoStateSpace
from pssm.infer import SVIFit, TraceConditionalKL_ELBO, fit_svi, posterior_draws

T = 10
A, C = 0.9 * np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0], np.random.default_rng(1).normal(size=(4, 3))
SSM = pssm.LinearGaussianSSM(np.zeros(3), np.eye(3), A, 0.5 * np.eye(3), C, 0.7 * np.eye(4))
Y = np.array(pssm.simulate(jax.random.key(0), SSM, T)[1])


def linear(y):
    z = numpyro.sample("z", StatePath(jnp.zeros(3), jnp.eye(3), A, 0.5 * jnp.eye(3), T))
    observe("y", dist.Normal(z @ C.T, 0.7).to_event(2), y)


def poisson(y):
    z = numpyro.sample("z", StatePath(jnp.zeros(3), jnp.eye(3), A, 0.5 * jnp.eye(3), T))
    observe("y", dist.Poisson(jnp.exp(z @ C.T)).to_event(2), y)


def fitted(model, guide, y, loss=None):
    svi = SVI(model, guide, optax.adam(1e-9), loss or Trace_ELBO())
    return SVIFit.of(svi, svi.run(jax.random.key(0), 10, y, progress_bar=False), y)


def test_gap_of_a_linear_model_is_exact(x64):
    evidence = float(pssm.log_likelihood(SSM, Y))
    found = bound_gap(fitted(linear, AutoStateSpace(linear, rank=1), Y), num_particles=2000)
    assert found.kind == "exact"
    np.testing.assert_allclose(found.evidence, evidence, atol=1e-6)
    assert 0 < found.gap < 3
    assert found.gap == pytest.approx(evidence - found.bound, abs=1e-5)


@pytest.mark.slow
def test_a_surrogate_has_a_negative_gap():
    guide = AutoStateSpace(linear, rank=3, family="moment_matched")
    found = bound_gap(fitted(linear, guide, Y.astype(np.float32), TraceConditionalKL_ELBO()))
    assert found.kind == "exact"
    assert found.gap < -5 * found.standard_error


@pytest.mark.slow
def test_elsewhere_the_gap_is_at_least_what_is_found():
    y = np.random.default_rng(2).poisson(1.0, (T, 4)).astype(np.float32)
    found = bound_gap(fitted(poisson, AutoStateSpace(poisson, rank=1), y), num_particles=1000)
    assert found.kind == "at least"
    assert found.gap > 0
    guide = AutoStateSpace(poisson, rank=1, family="moment_matched")
    surrogate = fitted(poisson, guide, y, TraceConditionalKL_ELBO())
    with pytest.raises(ValueError, match="surrogate"):
        bound_gap(surrogate)


def test_gap_over_parameters_is_estimated():
    y = pssm.datasets.load("nile").y
    model = pssm.models.local_level
    fit = fit_svi(model, y, num_steps=2000, progress_bar=False)
    found = bound_gap(fit, num_particles=2000)
    assert found.kind == "estimate"
    other = log_evidence(model, posterior_draws(fit), y, key=5)
    assert found.evidence == pytest.approx(other.log_evidence, abs=0.05)
    assert -3 * found.standard_error < found.gap < 1
