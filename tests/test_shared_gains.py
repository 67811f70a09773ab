"""Batches of series under one model: gains are shared where the gaps are the same, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM
from pssm.filters.kalman import log_likelihoods
from pssm.filters.passes import common_mask

STEPS, SERIES = 70, 3


def build(gaps, dtype=np.float64, timed=()):
    rng = np.random.default_rng(5)
    q = oracles.random_model(rng, n=3, p=2, m=1, offsets=True, steps=STEPS, timed=timed)
    q["A"] = 0.3 * q["A"]
    ssm = LinearGaussianSSM(**{k: v if k == "time_varying" else np.asarray(v, dtype) for k, v in q.items()})
    y = rng.normal(size=(SERIES, STEPS, 2)).astype(dtype)
    u = rng.normal(size=(SERIES, STEPS, 1)).astype(dtype)
    if gaps != "none":
        y[:, 4:6], y[:, 9, 0] = np.nan, np.nan
    if gaps == "different":
        y[1, 20] = np.nan
    return ssm, y, u


weights = np.arange(1.0, SERIES + 1)


def weighted(ssm, y, u):
    return jnp.vdot(jnp.asarray(weights), pssm.log_likelihood(ssm, y, u))


total = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2)))
single = jax.jit(jax.value_and_grad(pssm.log_likelihood, argnums=(0, 1, 2)))


@pytest.mark.parametrize("gaps", ["none", "same", "different"])
@pytest.mark.parametrize("timed", [(), ("A", "C", "chol_R", "b")], ids=["constant", "timed"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_likelihood_and_gradient(gaps, timed, dtype):
    with jax.enable_x64(dtype == np.float64):
        ssm, y, u = build(gaps, dtype, timed)
        value, (by_model, by_data, by_input) = total(ssm, y, u)
        ones = [single(ssm, y[i], u[i]) for i in range(SERIES)]
        tolerance = 1e-10 if dtype == np.float64 else 1e-4
        np.testing.assert_allclose(value, sum(w * v for w, (v, _) in zip(weights, ones, strict=True)), rtol=tolerance)
        for name in ("m0", "chol_P0", "A", "chol_Q", "C", "chol_R", "b", "d", "B", "D"):
            expected = sum(w * getattr(g[0], name) for w, (_, g) in zip(weights, ones, strict=True))
            atol = tolerance * np.abs(expected).max()
            np.testing.assert_allclose(getattr(by_model, name), expected, atol=atol, err_msg=name)
        for i, (_, g) in enumerate(ones):
            np.testing.assert_allclose(by_data[i], weights[i] * g[1], atol=10 * tolerance)
            np.testing.assert_allclose(by_input[i], weights[i] * g[2], atol=10 * tolerance)


@pytest.mark.parametrize("gaps", ["same", "different"])
def test_filter_smoother_and_draws(gaps, x64):
    ssm, y, u = build(gaps)
    key = jax.random.key(0)
    for function in (pssm.kalman_filter, pssm.kalman_smoother):
        batch = function(ssm, y, u)
        for i in range(SERIES):
            for name, x in function(ssm, y[i], u[i])._asdict().items():
                np.testing.assert_allclose(getattr(batch, name)[i], x, atol=1e-10, err_msg=name)
    draws = pssm.sample_states(key, ssm, y, u, sample_shape=(4,))
    assert draws.shape == (4, SERIES, STEPS, 3)
    assert np.ptp(draws, axis=0).min() > 0


def test_derivatives_of_any_order_and_direction(x64):
    ssm, y, u = build("same")

    def function(s):
        model = ssm.replace(A=s * ssm.A, C=s * ssm.C, chol_R=s * ssm.chol_R, chol_P0=s * ssm.chol_P0)
        return pssm.log_likelihood(model, y, u).sum()

    slope, forward = jax.jit(jax.grad(function)), jax.jit(lambda s: jax.jvp(function, (s,), (1.0,))[1])
    np.testing.assert_allclose(forward(1.1), slope(1.1), rtol=1e-12)
    expected = (slope(1.1 + 1e-4) - slope(1.1 - 1e-4)) / 2e-4
    for second in (jax.hessian(function), jax.grad(jax.grad(function))):
        np.testing.assert_allclose(jax.jit(second)(1.1), expected, rtol=1e-6)


def test_inside_another_vmap(x64):
    """As chains run side by side: one model for each chain, shared by the series of a chain."""
    ssm, y, u = build("same")

    def function(s):
        return pssm.log_likelihood(ssm.replace(chol_R=s * ssm.chol_R), y, u).sum()

    scales = jnp.array([0.7, 1.3])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(function)))(scales)
    for i, s in enumerate(scales):
        value, slope = jax.jit(jax.value_and_grad(function))(s)
        np.testing.assert_allclose([values[i], slopes[i]], [value, slope], rtol=1e-10)


def test_series_of_different_lengths(x64):
    """Padded to one length they share their gains too, where nothing is asked about the steps after their end."""
    ssm, y, u = build("same")
    y[1, 40:], y[2, 66:] = np.nan, np.nan
    value, (by_model, by_data, by_input) = total(ssm, y, u)
    steps = log_likelihoods(ssm, y, u)
    for i, (end, weight) in enumerate(zip((STEPS, 40, 66), weights, strict=True)):
        expected = single(ssm, y[i, :end], u[i, :end])
        value = value - weight * expected[0]
        by_model = jax.tree.map(lambda a, b, w=weight: a - w * b, by_model, expected[1][0])
        np.testing.assert_allclose(by_data[i, :end], weight * expected[1][1], atol=1e-9)
        np.testing.assert_allclose(by_input[i, :end], weight * expected[1][2], atol=1e-9)
        np.testing.assert_allclose(steps[i].sum(), expected[0], rtol=1e-12)
        assert not np.any(by_data[i, end:])
        assert not np.any(by_input[i, end:])
    for rest in (value, *jax.tree.leaves(by_model)):
        np.testing.assert_allclose(rest, 0, atol=1e-7)


@pytest.mark.parametrize(
    ("gaps", "ends_matter"), [("same", True), ("ends", False), ("ends", True), ("different", False)]
)
def test_which_batches_share_their_gains(gaps, ends_matter, x64):
    _, y, _ = build("same" if gaps == "ends" else gaps)
    if gaps == "ends":
        y[1, 40:], y[2, 66:] = np.nan, np.nan
    observed, agree = common_mask(jnp.asarray(y), ends_matter)
    assert agree == (gaps == "same" or (gaps == "ends" and not ends_matter))
    np.testing.assert_array_equal(observed, (~np.isnan(y)).any(0))


@pytest.mark.parametrize("models", [False, True], ids=["one model", "models"])
def test_a_batch_of_no_series(models):
    ssm, y, u = build("none")
    y, u = y[:0], u[:0]
    if models:
        ssm = ssm.replace(A=np.zeros((0, 3, 3), np.float32))
    assert pssm.log_likelihood(ssm, y, u).shape == (0,)
    assert pssm.kalman_filter(ssm, y, u).chol.shape == (0, STEPS, 3, 3)
    assert pssm.kalman_smoother(ssm, y, u).mean.shape == (0, STEPS, 3)
    assert pssm.sample_states(jax.random.key(0), ssm, y, u, sample_shape=(2,)).shape == (2, 0, STEPS, 3)
