"""Modes of paths whose noise is singular and whose start is wide: Laplace and guided filters against the Kalman filter.

A linear-Gaussian model has an exact answer, whatever the noise: a difference is an error of the search or of rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from pssm import LinearGaussianSSM, NonlinearSSM
from pssm.filters import kalman_filter, particle_filter, simulate
from pssm.modes import guided_proposal, laplace_path

pytestmark = pytest.mark.usefixtures("x64")  # single precision by its arrays: the right value is in double

T = 100
LOADS = {  # of the two trends' levels on two noise columns
    "one column for both": [[0.1, 0.0], [-0.06, 0.0]],
    "columns in proportion": [[0.13, 0.07], [0.26, 0.14]],
    "nearly one column": [[0.1, 0.0], [0.03, 1e-6]],
    "two columns": [[0.1, 0.02], [0.03, 0.07]],
    "no noise": [[0.0, 0.0], [0.0, 0.0]],
}
STARTS = {  # factors of P0
    "1e-2": 1e-2 * np.eye(4),
    "1e2": 1e2 * np.eye(4),
    "1e4": 1e4 * np.eye(4),
    "1e8": 1e8 * np.eye(4),
    "singular": np.diag([100.0, 0.0, 1.0, 0.0]),
    "known": np.zeros((4, 4)),
}


def trends(loads, start, dtype=np.float64, sd=0.05):
    """Two trends whose slopes have no noise."""
    eye, none = np.eye(2), np.zeros((2, 2))
    A, C = np.block([[eye, eye], [none, eye]]), np.hstack([eye, none])
    chol_Q = np.vstack([loads, none])
    return LinearGaussianSSM(*(jnp.asarray(x, dtype) for x in (np.zeros(4), start, A, chol_Q, C, sd * eye)))


def series(loads, start):
    """A series that the model can make, with gaps, begun at numbers that suit all starts but the known ones."""
    begun = 0.1 * np.eye(4) if np.any(start) else start
    y = np.array(simulate(jax.random.key(0), trends(loads, begun), T)[1])
    y[10:14, 0] = np.nan
    y[50] = np.nan
    return jnp.asarray(y)


@jax.jit
def kalman(model, y):
    return kalman_filter(model, y).log_likelihood


@jax.jit
def laplace(model, y):
    return laplace_path(model, y)


@jax.jit
def guided(model, y):
    found = particle_filter(jax.random.key(1), model, y, num_particles=50, proposal=guided_proposal(model, y))
    return found.log_likelihood, found.ess


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("loads", LOADS)
def test_linear_gaussian_is_exact(loads, start):
    y = series(LOADS[loads], STARTS[start])
    model = trends(LOADS[loads], STARTS[start])
    right = kalman(model, y)
    close = 1e-9 * (1e3 + abs(float(right)))
    np.testing.assert_allclose(laplace(model, y).log_likelihood, right, rtol=0, atol=close)
    estimate, ess = guided(model, y)
    np.testing.assert_allclose(estimate, right, rtol=0, atol=3e-4 if start == "1e8" else 10 * close)
    assert ess.min() > 50 * (1 - 1e-3)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("loads", LOADS)
def test_laplace_in_single_precision(loads, start):
    y = series(LOADS[loads], STARTS[start])
    right = float(kalman(trends(LOADS[loads], STARTS[start]), y))
    found = laplace(trends(LOADS[loads], STARTS[start], np.float32), y.astype(np.float32)).log_likelihood
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=0.1)


def test_the_search_is_exact_too():
    """The same model as a function and a distribution, which the search has to find out about."""
    linear = trends(LOADS["one column for both"], STARTS["1e4"])
    A, C = linear.A, linear.C
    model = NonlinearSSM(
        linear.m0,
        linear.chol_P0,
        lambda z, u: A @ z,
        linear.chol_Q,
        lambda z: dist.Normal(C @ z, 0.05).to_event(1),
    )
    y = series(LOADS["one column for both"], STARTS["1e4"])
    right, found = kalman(linear, y), jax.jit(lambda y: laplace_path(model, y))(y)
    np.testing.assert_allclose(found.log_likelihood, right, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.mean, laplace(linear, y).mean, atol=1e-6)
