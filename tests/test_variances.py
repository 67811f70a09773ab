"""Derivatives by variances that are zero: one-sided, so that an optimiser leaves the boundary where it should."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy.optimize import minimize

from pssm import LinearGaussianSSM, log_likelihood

Y = np.array([[0.3], [-0.2], [np.nan], [1.1], [0.4], [-0.6]])
TURN = np.array([[0.8, -0.6], [0.6, 0.8]])


def model(P0, Q, R, A=0.9):
    n = len(P0)
    return LinearGaussianSSM.from_covariances(np.full(n, 0.1), P0, A * np.eye(n), Q, np.ones((1, n)), R)


# name: the covariances (P0, Q, R) as a function of the variance that is zero
ZEROS = {
    "Q": lambda v: (np.eye(1), jnp.full((1, 1), v), 0.5 * np.eye(1)),
    "R": lambda v: (np.eye(1), 0.4 * np.eye(1), jnp.full((1, 1), v)),
    "P0": lambda v: (jnp.full((1, 1), v), 0.4 * np.eye(1), 0.5 * np.eye(1)),
    "Q, with P0 zero too": lambda v: (np.zeros((1, 1)), jnp.full((1, 1), v), 0.5 * np.eye(1)),
    "small units": lambda v: (1e-6 * np.eye(1), jnp.full((1, 1), v), 1e-6 * np.eye(1)),
    "vague start": lambda v: (1e7 * np.eye(1), jnp.full((1, 1), v), 1e5 * np.eye(1)),
    "one of two": lambda v: (np.eye(2), jnp.diag(jnp.stack([v, 0.3 + 0 * v])), 0.5 * np.eye(1)),
    "along an axis that is turned": lambda v: (
        np.eye(2),
        TURN @ jnp.diag(jnp.stack([0.3 + 0 * v, v])) @ TURN.T,
        0.5 * np.eye(1),
    ),
}


@pytest.mark.parametrize("name", ZEROS)
def test_the_slope_at_a_variance_of_zero_is_one_sided(name, x64):
    given = ZEROS[name]

    def dense(v):
        P0, Q, R = (np.asarray(x) for x in given(jnp.asarray(v)))
        m, P, total = np.full(len(P0), 0.1), P0, 0.0
        for t, value in enumerate(Y[:, 0]):
            if t:
                m, P = 0.9 * m, 0.81 * P + Q
            if not np.isnan(value):
                S, e, c = P.sum() + R[0, 0], value - m.sum(), P.sum(1)
                total -= 0.5 * (np.log(2 * np.pi * S) + e**2 / S)
                m, P = m + c * e / S, P - np.outer(c, c) / S
        return total

    h = 1e-5 * float(given(jnp.asarray(0.0))[2][0, 0] or 0.4)
    exact = (-3 * dense(0.0) + 4 * dense(h) - dense(2 * h)) / (2 * h)
    for method in ("auto", "square_root", "parallel"):
        slope = jax.jit(jax.grad(lambda v, method=method: log_likelihood(model(*given(v)), Y, method=method)))(0.0)
        np.testing.assert_allclose(slope, exact, rtol=2e-4, err_msg=method)


@pytest.mark.parametrize("name", ["Q", "R", "P0", "small units"])
def test_in_32_bits(name):
    slope = jax.grad(lambda v: log_likelihood(model(*ZEROS[name](v)), Y))(0.0)
    with jax.enable_x64(True):
        exact = jax.grad(lambda v: log_likelihood(model(*ZEROS[name](v)), Y))(0.0)
    np.testing.assert_allclose(slope, exact, rtol=1e-4)


def test_values_have_no_jitter(x64):
    P0, Q, R = np.diag([1.0, 0.0]), np.diag([0.0, 0.2]), np.zeros((1, 1))
    ssm = model(P0, Q, R)
    for found, given in ((ssm.P0, P0), (ssm.Q, Q), (ssm.R, R)):
        np.testing.assert_allclose(found, given, atol=0, rtol=1e-15)
    y = Y[:2]
    np.testing.assert_allclose(log_likelihood(ssm, y), oracles.log_likelihood(ssm, y), rtol=1e-10)


def test_an_optimiser_with_bounds_leaves_the_boundary_for_the_maximum(x64):
    rng = np.random.default_rng(0)
    y = np.cumsum(rng.normal(size=80))[:, None] + rng.normal(size=(80, 1))

    @jax.jit
    @jax.value_and_grad
    def loss(v):
        one = jnp.eye(1)
        ssm = LinearGaussianSSM.from_covariances(jnp.zeros(1), 100 * one, one, v[0] * one, one, v[1] * one)
        return -log_likelihood(ssm, y)

    def search(start):
        return minimize(lambda v: tuple(map(np.asarray, loss(jnp.asarray(v)))), start, jac=True, bounds=[(0, None)] * 2)

    stuck, inside = (search(start) for start in ([0.0, 1.0], [1.0, 1.0]))
    assert stuck.fun == pytest.approx(inside.fun, abs=1e-5)
    np.testing.assert_allclose(stuck.x, inside.x, rtol=1e-2)
    assert stuck.fun < float(loss(jnp.array([0.0, y.var()]))[0]) - 10
