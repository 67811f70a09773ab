"""Correlated noise of state and observation against the dense Gaussian of both noises."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM, correlated_noise


def dense(q, cov, steps, into_next, timed=()):
    """Mean and covariance of all states and then all readings, every variable a linear map of the noises `(v, w)`.

    `cov` is `[R, S'; S, Q]`, one for each time where it varies; its `w` acts on the step into its time, or after it.
    """
    n, p = q["A"].shape[-1], q["C"].shape[-2]

    def at(name, t):
        return q[name][t] if name in timed else q[name]

    width = n + p
    total = n + steps * width
    spread = np.zeros((total, total))
    spread[:n, :n] = q["chol_P0"] @ q["chol_P0"].T
    for t in range(steps):
        rows = slice(n + t * width, n + (t + 1) * width)
        spread[rows, rows] = cov[t] if np.ndim(cov) == 3 else cov
    mean, row = q["m0"], np.eye(n, total)
    means, maps, y_means, y_maps = [], [], [], []
    for t in range(steps):
        if t:
            noise = n + (t - into_next) * width + p
            mean, row = at("A", t) @ mean, at("A", t) @ row
            row[:, noise : noise + n] += np.eye(n)
        reading = at("C", t) @ row
        reading[:, n + t * width : n + t * width + p] += np.eye(p)
        means.append(mean), maps.append(row.copy()), y_means.append(at("C", t) @ mean), y_maps.append(reading)
    weights = np.concatenate(maps + y_maps)
    return np.concatenate(means + y_means), weights @ spread @ weights.T


@pytest.mark.parametrize("into_next", [False, True])
@pytest.mark.parametrize("kind", ["full", "singular", "perfect", "C and A vary", "noise varies"])
def test_the_dense_gaussian(kind, into_next, x64):
    steps, rng = 9, np.random.default_rng(5)
    timed = {"C and A vary": ("A", "C"), "noise varies": ("chol_Q", "chol_R")}.get(kind, ())
    q = oracles.random_model(rng, n=3, p=2, steps=steps, timed=timed)
    lead = (steps,) if "chol_Q" in timed else ()
    factor = rng.normal(size=(*lead, 5, {"singular": 3, "perfect": 2}.get(kind, 5)))
    cov = factor @ np.swapaxes(factor, -1, -2)
    R, S, Q = cov[..., :2, :2], cov[..., 2:, :2], cov[..., 2:, 2:]
    plain = LinearGaussianSSM.from_covariances(
        q["m0"], q["chol_P0"] @ q["chol_P0"].T, q["A"], Q, q["C"], R, time_varying=timed
    )
    if into_next and "chol_Q" in timed:
        with pytest.raises(ValueError, match="`into_next` needs constant noise"):
            correlated_noise(plain, S, into_next=True)
        return
    model = correlated_noise(plain, S, into_next=into_next)
    y = rng.normal(size=(steps, 2))
    if kind == "perfect":  # readings that the model can make
        y = np.array(pssm.simulate(jax.random.key(0), model, steps)[1])
    y[2, 0] = y[4] = np.nan
    mean, spread = dense(q, cov, steps, into_next, timed)
    j = oracles.Joint(mean, spread, steps, 3, 2)
    index, values = oracles.seen(j, y, steps)
    found = pssm.kalman_smoother(model, y)
    want = [oracles.condition(j, j.z(t), index, values) for t in range(steps)]
    np.testing.assert_allclose(found.mean[:, :3], np.stack([m for m, _ in want]), atol=1e-7)
    np.testing.assert_allclose(found.cov[:, :3, :3], np.stack([c for _, c in want]), atol=1e-7)
    if kind != "perfect":
        S_y = spread[np.ix_(index, index)]
        r = values - mean[index]
        value = -0.5 * (len(r) * np.log(2 * np.pi) + np.linalg.slogdet(S_y)[1] + r @ np.linalg.solve(S_y, r))
        np.testing.assert_allclose(found.log_likelihood, value, rtol=1e-9)


def test_without_correlation_it_is_the_same_model(x64):
    rng = np.random.default_rng(0)
    plain = LinearGaussianSSM(**oracles.random_model(rng, m=1, offsets=True)).replace(diffuse=[True, False, False])
    u, y = rng.normal(size=(20, 1)), rng.normal(size=(20, 2))
    for into_next in (False, True):
        model = correlated_noise(plain, np.zeros((3, 2)), into_next=into_next)
        np.testing.assert_allclose(pssm.log_likelihood(model, y, u), pssm.log_likelihood(plain, y, u), rtol=1e-10)


def test_derivatives_batches_and_32_bits():
    q = oracles.random_model(np.random.default_rng(1), n=2, p=1)
    y = np.random.default_rng(2).normal(size=(3, 15, 1))
    plain = LinearGaussianSSM(**{k: v for k, v in q.items()}).replace(chol_R=np.array([1.0, 2.0, 3.0])[:, None, None])

    def value(scale):
        return pssm.log_likelihood(correlated_noise(plain, scale * jnp.array([[0.2], [0.1]])), y).sum()

    slope = (value(1.01) - value(0.99)) / 0.02
    np.testing.assert_allclose(jax.jit(jax.grad(value))(1.0), slope, rtol=2e-2, atol=2e-2)


def test_what_is_refused(x64):
    plain = LinearGaussianSSM(**oracles.random_model(np.random.default_rng(1), n=2, p=1))
    with pytest.raises(ValueError, match=r"`S` must have shape \(2, 1\)"):
        correlated_noise(plain, np.zeros((1, 2)))
    with pytest.raises(ValueError, match="must be a covariance"):
        correlated_noise(plain, 100 * np.ones((2, 1)))
