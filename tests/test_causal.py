"""Filter mode: exact on a linear model, and nothing of the future in it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import pssm
from pssm.distributions import StatePath, observe
from pssm.guides import AutoStateSpace
from pssm.infer import SVIFit, causal_draws

T, ORIGINS, DRAWS = 12, [0, 4, 12], 2000
A, Q, C, R = np.array([[0.9, 0.2], [-0.2, 0.9]]), 0.4 * np.eye(2), np.array([[1.0, 0.5]]), np.array([[0.6]])
SSM = pssm.LinearGaussianSSM(np.zeros(2), np.eye(2), A, Q, C, R)


def linear(y):
    z = numpyro.sample("z", StatePath(jnp.zeros(2), jnp.eye(2), A, Q, T))
    observe("y", dist.Normal(z @ C.T, R[0, 0]).to_event(2), y)


def counts(y):
    scale = numpyro.sample("scale", dist.LogNormal(-1.0, 0.2))
    z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), scale * jnp.eye(1), T))
    observe("y", dist.Poisson(jnp.exp(z)).to_event(2), y)


def fitted(model, y, guide=None):
    svi = SVI(model, guide or AutoStateSpace(model, rank=2), optax.adam(1e-9), Trace_ELBO())
    return SVIFit.of(svi, svi.run(jax.random.key(0), 10, y, progress_bar=False), y)


@pytest.mark.slow
def test_filtered_and_forecast_states_are_the_exact_ones(x64):
    y = np.array(pssm.simulate(jax.random.key(0), SSM, T)[1])
    y[2] = np.nan
    draws = causal_draws(fitted(linear, y), ORIGINS, num_samples=DRAWS)["z"]
    assert draws.shape == (3, DRAWS, T, 2)
    for origin, found in zip(ORIGINS, draws, strict=True):
        past = np.where(np.arange(T)[:, None] < origin, y, np.nan)
        exact = pssm.kalman_smoother(SSM, past)  # given the past alone: filtered at origin - 1, a forecast after it
        sd = np.sqrt(np.diagonal(exact.cov, axis1=1, axis2=2))
        assert (np.abs(found.mean(0) - exact.mean) / sd).max() < 5 / np.sqrt(DRAWS)
        np.testing.assert_allclose(found.std(0), sd, rtol=0.08)


@pytest.fixture(scope="module")
def fit():
    return fitted(counts, np.random.default_rng(0).poisson(1.0, (T, 1)).astype(np.float32))


def test_the_future_cannot_reach_a_causal_draw(fit):
    y = fit.args[0]
    before = causal_draws(fit, [5], num_samples=500)
    fit.args = (np.where(np.arange(T)[:, None] < 5, y, y + 50),)
    after = causal_draws(fit, [5], num_samples=500)
    fit.args = (y,)
    for name in ("z", "scale"):
        np.testing.assert_array_equal(before[name], after[name])
    smoothed = fit.svi.guide.sample_posterior(jax.random.key(0), fit.params, y, sample_shape=(500,))["z"]
    assert before["z"][0, :, -1].std() > 1.2 * smoothed[:, -1].std(), "smoothed states know the end of the series"


def test_bad_origins_are_named(fit):
    for origins in ([13], [-1], [], 3):
        with pytest.raises(ValueError, match="`origins`"):
            causal_draws(fit, origins)


def test_other_guides_are_named():
    fit = fitted(counts, np.ones((T, 1), np.float32), AutoNormal(counts))
    with pytest.raises(TypeError, match="AutoStateSpace.*AutoNormal"):
        causal_draws(fit, [1])
