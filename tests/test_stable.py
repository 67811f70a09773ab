"""Stable matrices: one to one, with the determinant that autodiff finds, and stationary whatever goes in.

The determinant. `A = X L^{-1}`, `L L' = 1 + X X'`, `P = L^{-1} X`. With `dX = L E` and `low(S)` the lower triangle with
half the diagonal, `dL = L low(E P' + P E')`, so `dA = L (E - P low(E P' + P E')) L^{-1}`. Conjugation has determinant 1
and `dX -> E` has `det(L)^{-n}`; the bracket is `1 - U V` with `V E = low(E P' + P E')`, `U T = P T`, and
`det(1 - U V) = det(1 - V U)` on lower triangles, which is that of `S -> S - P S P'` on symmetric matrices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.distributions import biject_to

from pssm.distributions import StableMatrixNormal, StableMatrixTransform, stable_matrix
from pssm.distributions.stable import stationary_vector_autoregression

TO_STABLE = StableMatrixTransform()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_one_to_one_with_the_determinant_of_autodiff(n, x64):
    X = 2.0 * jax.random.normal(jax.random.key(n), (n, n))
    A = TO_STABLE(X)
    assert np.abs(np.linalg.eigvals(A)).max() < 1
    np.testing.assert_allclose(TO_STABLE._inverse(A), X, atol=1e-9)
    J = jax.jacfwd(lambda x: TO_STABLE(x.reshape(n, n)).reshape(-1))(X.reshape(-1))
    np.testing.assert_allclose(TO_STABLE.log_abs_det_jacobian(X, A), np.linalg.slogdet(J)[1], atol=1e-9)


def test_batches_and_constraint(x64):
    X = jax.random.normal(jax.random.key(0), (5, 3, 3))
    A = biject_to(stable_matrix)(X)
    each = [TO_STABLE.log_abs_det_jacobian(x, a) for x, a in zip(X, A, strict=True)]
    np.testing.assert_allclose(TO_STABLE.log_abs_det_jacobian(X, A), each, atol=1e-12)
    assert stable_matrix(A).shape == (5,)
    edge = jnp.stack([0.999 * jnp.eye(3), 1.001 * jnp.eye(3), jnp.array([[0.5, 1e6, 0], [0, 0.5, 0], [0, 0, 0]])])
    assert stable_matrix(edge).tolist() == [True, False, True], "what counts are the eigenvalues, not the size"


def test_normal_draws_are_stable_and_have_its_density(x64):
    d = StableMatrixNormal(0.5 * jnp.eye(2), 0.4)
    draws = d.sample(jax.random.key(0), (4000,))
    radius = np.abs(np.linalg.eigvals(draws)).max(-1)
    assert radius.max() < 1
    free = 0.5 * np.eye(2) + 0.4 * np.random.default_rng(0).normal(size=(40_000, 2, 2))
    kept = free[np.abs(np.linalg.eigvals(free)).max(-1) < 1]
    np.testing.assert_allclose(draws.mean(0), kept.mean(0), atol=0.03)
    np.testing.assert_allclose(draws.std(0), kept.std(0), atol=0.03)
    with pytest.raises(ValueError, match="`loc` must be a square matrix"):
        StableMatrixNormal(jnp.zeros((2, 3)))


@pytest.mark.parametrize(("order", "n"), [(1, 3), (3, 2)])
def test_an_autoregression_is_stationary_with_the_covariance_it_says(order, n, x64):
    X = jax.random.normal(jax.random.key(3), (order, n, n))
    coefficients, chol = stationary_vector_autoregression(X)
    size = order * n
    companion = np.eye(size, k=-n)
    companion[:n] = np.concatenate(list(coefficients), axis=1)
    noise = np.zeros((size, size))
    noise[:n, :n] = np.eye(n)
    cov = np.asarray(chol @ chol.T)
    assert np.abs(np.linalg.eigvals(companion)).max() < 1
    np.testing.assert_allclose(companion @ cov @ companion.T + noise, cov, atol=1e-10)
