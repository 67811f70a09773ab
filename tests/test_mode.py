"""Gradients through the mode: those of the mode itself, found by finite differences of the whole search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pssm.distributions import StatePath
from pssm.modes.mode import potentials_at
from pssm.modes.path import mode_path

STEPS, C = 5, np.random.default_rng(0).normal(size=(4, 2))
Y = np.random.default_rng(1).poisson(2.0, (STEPS, 4)).astype(float)
A = np.array([[0.8, 0.3], [-0.3, 0.8]])
THETA = np.array([0.5, 0.9, 0.2])  # scale of the noise, persistence, offset of the log rate


def parts(theta):
    prior = StatePath(theta[2] * jnp.ones(2), jnp.eye(2), theta[1] * A, theta[0] * jnp.eye(2), STEPS)

    def log_lik(z):
        rate = z @ C.T + theta[2]
        return (Y * rate - jnp.exp(rate)).sum((-1, -2))

    return prior, log_lik


@jax.jit
def at_mode(theta):
    frozen = jax.lax.stop_gradient(theta)
    path = jax.lax.stop_gradient(mode_path(*parts(frozen), rank=2, num_iters=50))
    found = potentials_at(*parts(theta), path, rank=2)
    return found.center, found.k


@pytest.mark.parametrize("what", [0, 1], ids=["centre", "slope"])
def test_gradient_is_that_of_the_mode(x64, what):
    found = jax.jit(jax.jacrev(lambda theta: at_mode(theta)[what]))(THETA)
    assert np.abs(found).max() > 0.1
    for i, unit in enumerate(np.eye(3)):
        step = 1e-4 * unit
        expected = (at_mode(THETA + step)[what] - at_mode(THETA - step)[what]) / 2e-4
        np.testing.assert_allclose(found[..., i], expected, rtol=1e-5, atol=1e-6)


def test_rounding_of_the_density_does_not_end_the_search():
    counts = np.random.default_rng(0).poisson(3e4, (2, 5)).astype(np.float32)
    walk = StatePath(np.zeros(1, np.float32), 5.0 * np.eye(1), np.eye(1), 5.0 * np.eye(1), 5)

    def log_lik(z):
        return jnp.sum(counts * z[..., 0] - jnp.exp(z[..., 0]), axis=-1)

    found = jax.jit(lambda: mode_path(walk, log_lik, rank=1))()
    np.testing.assert_allclose(found[..., 0], np.log(counts), rtol=3e-6)  # the prior is wide
