"""Linear equations at uneven times: discretised exactly, with the covariances that they are known for."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy.linalg import expm

import pssm
from pssm.sde import LinearSDE, discretise, integrated_walk, matern, oscillator, semidefinite_cholesky


def quadrature(F, L, step, count=4000):
    """`Q` by a fine midpoint rule."""
    times = (np.arange(count) + 0.5) * step / count
    columns = np.array([expm(F * s) @ L for s in times])
    return np.einsum("sij,skj->ik", columns, columns) * step / count


@pytest.mark.parametrize("seed", range(3))
def test_the_noise_is_the_integral(seed, x64):
    rng = np.random.default_rng(seed)
    F, L = rng.normal(size=(3, 3)), rng.normal(size=(3, 2))
    for step in (0.0, 0.01, 0.8):
        A, chol_Q = discretise(jnp.asarray(F), jnp.asarray(L), step)
        np.testing.assert_allclose(A, expm(F * step), atol=1e-11)
        np.testing.assert_allclose(chol_Q @ chol_Q.T, quadrature(F, L, step), rtol=1e-5, atol=1e-9)


def covariance_of(name, d):
    d = np.abs(d)
    if name == "oscillator":
        return 1.5**2 * np.exp(-d / 3.0) * np.cos(2 * np.pi * d / 1.3)
    r = np.sqrt(2 * name) * d / 0.7
    return 1.5**2 * np.exp(-r) * {0.5: 1, 1.5: 1 + r, 2.5: 1 + r + r**2 / 3}[name]


@pytest.mark.parametrize("name", [0.5, 1.5, 2.5, "oscillator"])
def test_components_have_their_covariances(name, x64):
    t = np.array([0.0, 0.1, 0.1, 0.5, 2.0, 2.7])
    sde = oscillator(1.3, 3.0, 1.5) if name == "oscillator" else matern(0.7, 1.5, smoothness=name)
    _, cov = oracles.observed_moments(sde.at(t, [[0.0]]), len(t))
    np.testing.assert_allclose(cov, covariance_of(name, t[:, None] - t), atol=1e-9)


def test_a_sum_is_a_sum_and_its_likelihood_that_of_the_process(x64):
    t = np.sort(np.random.default_rng(0).uniform(0, 5, 20))
    y = np.random.default_rng(1).normal(size=20)
    sde = matern(0.7, 1.5) + oscillator(1.3, 3.0, 1.5)
    apart = t[:, None] - t
    cov = covariance_of(1.5, apart) + covariance_of("oscillator", apart) + 0.04 * np.eye(20)
    _, logdet = np.linalg.slogdet(2 * np.pi * cov)
    want = -0.5 * (logdet + y @ np.linalg.solve(cov, y))
    assert float(pssm.log_likelihood(sde.at(t, [[0.2]]), y)) == pytest.approx(want, abs=1e-8)


def test_single_precision_is_close(x64):
    t = np.sort(np.random.default_rng(0).uniform(0, 5, 20))
    wide = matern(0.7, 1.5, smoothness=2.5) + oscillator(1.3, 3.0, 1.5)
    found = {}
    for dtype in (jnp.float32, jnp.float64):
        sde, noise = jax.tree.map(lambda x, to=dtype: jnp.asarray(x, to), (wide, np.full((1, 1), 0.2)))
        found[dtype] = pssm.log_likelihood(sde.at(t.astype(dtype), noise), np.sin(t, dtype=dtype))
    assert found[jnp.float32].dtype == jnp.float32
    assert float(found[jnp.float32]) == pytest.approx(float(found[jnp.float64]), abs=1e-2)


def test_walks_at_even_times_are_the_structural_models(x64):
    model = integrated_walk(0.3, order=2, start=[2.0, 1.0]).at(np.arange(5.0), [[0.5]])
    np.testing.assert_allclose(model.A[1], [[1, 1], [0, 1]], atol=1e-14)
    np.testing.assert_allclose(model.Q[1], 0.09 * np.array([[1 / 3, 1 / 2], [1 / 2, 1]]), atol=1e-12)
    np.testing.assert_allclose(model.P0, np.diag([4.0, 1.0]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_steps_long_and_short_have_finite_gradients(dtype, x64):
    t = np.array([0.0, 0.0, 1e-3, 5.0, 500.0])
    y = np.array([0.1, 0.2, np.nan, 0.3, -0.5])

    def score(log_scale):
        sde = jax.tree.map(lambda x: x.astype(dtype), matern(jnp.exp(log_scale), 1.0, smoothness=2.5))
        return pssm.log_likelihood(sde.at(t.astype(dtype), jnp.full((1, 1), 0.1, dtype)), y.astype(dtype))

    value, slope = jax.jit(jax.value_and_grad(score))(dtype(0.0))
    assert np.isfinite(value)
    assert np.isfinite(slope)
    step = 1e-4
    if dtype == jnp.float64:
        numeric = (jax.jit(score)(step) - jax.jit(score)(-step)) / (2 * step)
        assert float(slope) == pytest.approx(float(numeric), rel=1e-5)


def test_a_singular_covariance_has_a_factor(x64):
    cov = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    L = semidefinite_cholesky(jnp.asarray(cov))
    np.testing.assert_allclose(L @ L.T, cov, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: matern(1.0, 1.0, smoothness=1.0), "`smoothness` must be one of"),
        (lambda: matern(1.0, 1.0).at([0.0, 2.0, 1.0], [[1.0]]), "`t` must not go back; it does at index 2"),
        (lambda: matern(1.0, 1.0).at([], [[1.0]]), "`t` must have shape"),
        (lambda: integrated_walk(1.0, start=[1.0, 1.0]), "`start`"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_it_is_a_tree():
    assert len(jax.tree.leaves(LinearSDE(*matern(1.0, 1.0)))) == 5
