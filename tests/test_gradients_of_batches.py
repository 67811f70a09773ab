"""The gradient of a batch of models, made by `vmap`, is that of one after the other: `grad` of `vmap` of a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import pssm
from pssm import LinearGaussianSSM, NonlinearSSM

STEPS, MODELS = 70, 3  # long enough for a steady state
RNG = np.random.default_rng(0)
Y = jnp.asarray(RNG.normal(size=(MODELS, STEPS, 1)), jnp.float32)
WEIGHTS = jnp.asarray(RNG.normal(size=(STEPS, 2)), jnp.float32)
SCALES = jnp.array([0.4, 0.5, 0.6])
EYE = jnp.eye(2)


def linear(scale):
    return LinearGaussianSSM(jnp.zeros(2), EYE, 0.9 * EYE + 0.05, scale * EYE, jnp.ones((1, 2)), jnp.eye(1))


def filtered(scale, y):
    found = pssm.kalman_filter(linear(scale), y)
    return jnp.sum(found.mean * WEIGHTS) + jnp.sum(found.cov)


def smoothed(scale, y):
    found = pssm.kalman_smoother(linear(scale), y)
    return jnp.sum(found.mean * WEIGHTS) + jnp.sum(found.cross_cov)


def scored(scale, y):
    """A derivative of the log-likelihood's closed-form gradient, also by the data."""
    return jnp.sum(jax.grad(lambda y: pssm.log_likelihood(linear(scale), y))(y) * WEIGHTS[:, :1])


def extended(scale, y):
    system = NonlinearSSM(
        jnp.zeros(2), EYE, lambda z, u: jnp.tanh(z), scale * EYE, lambda z: dist.Normal(z[:1], 1.0).to_event(1)
    )
    return pssm.gaussian_filter(system, y[:6]).log_likelihood


@pytest.mark.parametrize("fn", [filtered, smoothed, scored, extended], ids=lambda f: f.__name__)
def test_gradient_of_a_batch_is_that_of_each(fn):
    together = jax.jit(jax.grad(lambda s, y: jax.vmap(fn)(s, y).sum(), (0, 1)))(SCALES, Y)
    one = jax.jit(jax.grad(fn, (0, 1)))
    each = [one(s, y) for s, y in zip(SCALES, Y, strict=True)]
    for found, expected in zip(together, zip(*each, strict=True), strict=True):
        expected = jnp.stack(expected)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
