"""Forecasts, simulations and sampled paths: exact moments, time indices, inputs, batches, independence of the draws."""

import jax
import jax.numpy as jnp
import nasty
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM

SINGULAR = ("companion_ar3_exact_known_start_gap", "seasonal_exact_zero_sum", "deterministic", "exact_observation")


def model(name, dtype=np.float64):
    case, _ = nasty.truth(name, dtype)
    return case, LinearGaussianSSM(**case["params"])


sample_some = jax.jit(lambda key, ssm, y: pssm.sample_states(key, ssm, y, sample_shape=(50,)))
forecast = jax.jit(pssm.forecast, static_argnums=2)
sample_many = jax.jit(lambda key, ssm, y, u: pssm.sample_states(key, ssm, y, u, sample_shape=(20_000,)))


def dense(params):
    """The object `oracles` reads its arrays from."""

    class Model:
        time_varying = params.get("time_varying", ())

    for k in nasty.NAMES:
        setattr(Model, k, params.get(k))
    return Model


@pytest.mark.parametrize("name", ["ordinary", "missing_correlated_noise", "missing_everything", "one_step", *SINGULAR])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_forecast_equals_the_dense_joint(name, dtype):
    with jax.enable_x64(dtype == np.float64):
        case, ssm = model(name, dtype)
        found = forecast(ssm, case["y"], 5)
        for a, b in zip(found, oracles.forecast(dense(case["params"]), case["y"], 5), strict=True):
            np.testing.assert_allclose(a, b, atol=(1e-9 if dtype == np.float64 else 2e-5) * max(1.0, np.abs(b).max()))


def test_forecast_with_inputs(x64):
    """Offsets and inputs in both equations; the inputs of the past and of the future are told apart."""
    case, ssm = model("inputs_offsets_gaps")
    ahead = np.random.default_rng(0).normal(size=(4, 2))
    found = forecast(ssm, case["y"], 4, case["u"], ahead)
    expected = oracles.forecast(dense(case["params"]), case["y"], 4, np.concatenate([case["u"], ahead]))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("past", [1, 3, 5])
def test_forecast_of_a_time_varying_model(past, x64):
    case, ssm = model("everything_varies_in_time")
    y, u, ahead = case["y"][:past], case["u"], 6 - past
    found = forecast(ssm, y, ahead, u[:past], u[past:])
    for a, b in zip(found, oracles.forecast(dense(case["params"]), y, ahead, u), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11)


def test_first_row_is_one_transition_ahead(x64):
    """For a random walk `P + Q`, not `P`; and the observation has `R` on top."""
    ssm = LinearGaussianSSM.from_covariances([0.0], [[4.0]], [[1.0]], [[3.0]], [[1.0]], [[2.0]])
    y = [1.0, 2.0, 0.5]
    last = pssm.kalman_filter(ssm, y)
    found = forecast(ssm, y, 3)
    np.testing.assert_allclose(found.state_cov[:, 0, 0], last.cov[-1, 0, 0] + 3.0 * np.arange(1, 4), rtol=1e-13)
    np.testing.assert_allclose(found.cov, found.state_cov + 2.0, rtol=1e-13)
    np.testing.assert_allclose(found.mean[:, 0], np.full(3, last.mean[-1, 0]), rtol=1e-13)


def test_forecast_is_smoothing_of_what_is_missing(x64):
    """Appending rows of NaN and filtering gives the forecast's states."""
    case, ssm = model("missing_rows_and_entries")
    padded = np.concatenate([case["y"], np.full((6, 4), np.nan)])
    found, whole = forecast(ssm, case["y"], 6), jax.jit(pssm.kalman_smoother)(ssm, padded)
    np.testing.assert_allclose(found.state_mean, whole.mean[-6:], atol=1e-13)
    np.testing.assert_allclose(found.state_cov, whole.cov[-6:], atol=1e-13)


def test_forecast_is_differentiable(x64):
    """d forecast / d data sums to what shifting the data by a constant does to a random walk: one."""
    ssm = LinearGaussianSSM([0.0], [[1e6]], [[1.0]], [[1.0]], [[1.0]], [[1.0]])
    y = jnp.array([1.0, jnp.nan, 2.0, 4.0])[:, None]
    g = jax.grad(lambda y: pssm.forecast(ssm, y, 3).mean[-1, 0])(y)
    assert g[1, 0] == 0
    np.testing.assert_allclose(g.sum(), 1.0, rtol=1e-6)


def test_simulation_follows_the_equations_without_noise(x64, key):
    """With every noise factor zero the simulation is the recursion of the definition, inputs and time index too."""
    case, ssm = model("everything_varies_in_time")
    still = ssm.replace(chol_P0=0 * ssm.chol_P0, chol_Q=0 * ssm.chol_Q, chol_R=0 * ssm.chol_R)
    params = case["params"] | {k: 0 * case["params"][k] for k in ("chol_P0", "chol_Q", "chol_R")}
    z, y = pssm.simulate(key, still, 6, case["u"])
    np.testing.assert_allclose(y, nasty.simulate(np.random.default_rng(0), params, 6, case["u"]), atol=1e-13)
    np.testing.assert_allclose(z[0], ssm.m0, atol=0)


@pytest.mark.parametrize("name", ["everything_varies_in_time", "companion_ar3_exact", "missing_correlated_noise"])
def test_moments_of_simulations(name, x64, key):
    case, ssm = model(name)
    steps = 6
    z, y = jax.jit(jax.vmap(lambda k: pssm.simulate(k, ssm, steps, case["u"])))(jax.random.split(key, 20_000))
    j = oracles.joint(dense(case["params"]), steps, case["u"])
    draws = np.concatenate([z.reshape(len(z), -1), y.reshape(len(y), -1)], axis=1)
    sd = np.maximum(np.sqrt(np.diag(j.cov)), 1e-9)
    assert np.abs((draws.mean(0) - j.mean) / sd).max() < 5 / np.sqrt(len(draws))
    assert np.abs((np.cov(draws.T) - j.cov) / np.outer(sd, sd)).max() < 7 / np.sqrt(len(draws))


@pytest.mark.parametrize("name", ["ordinary", "missing_rows_and_entries", "everything_varies_in_time", *SINGULAR])
def test_moments_of_sampled_paths(name, x64, key):
    """Mean and covariance of whole paths, over all pairs of times, against the dense posterior."""
    case, ssm = model(name)
    stop = min(len(case["y"]), 8)
    y, u = case["y"][:stop], case["u"]
    if ssm.time_varying:
        stop, y = len(case["y"]), case["y"]
    paths = np.asarray(sample_many(key, ssm, y, u)).reshape(20_000, -1)
    j = oracles.joint(dense(case["params"]), stop, u)
    mean, cov = oracles.condition(j, np.arange(stop * j.n), *oracles.seen(j, y, stop))
    sd = np.sqrt(np.maximum(np.diag(cov), 0))
    known = sd < 1e-6
    np.testing.assert_allclose(paths[:, known], np.broadcast_to(mean[known], paths[:, known].shape), atol=1e-6)
    paths, mean, cov, sd = paths[:, ~known], mean[~known], cov[np.ix_(~known, ~known)], sd[~known]
    assert np.abs((paths.mean(0) - mean) / sd).max(initial=0) < 5 / np.sqrt(len(paths))
    assert np.abs((np.cov(paths.T) - cov) / np.outer(sd, sd)).max(initial=0) < 7 / np.sqrt(len(paths))


@pytest.mark.parametrize("name", ["companion_ar3_exact_known_start_gap", "seasonal_exact_zero_sum", "known_entries"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sampled_paths_obey_what_is_exact(name, dtype, key):
    """Lags are lags and noise-free observations are hit, in every draw."""
    with jax.enable_x64(dtype == np.float64):
        case, ssm = model(name, dtype)
        paths = np.asarray(sample_some(key, ssm, case["y"]))
        assert paths.dtype == dtype
        tolerance = 1e-5 if dtype == np.float32 else 1e-10
        np.testing.assert_allclose(paths[:, 1:, 1:], paths[:, :-1, :-1], atol=tolerance * np.abs(paths).max())
        if not case["params"]["chol_R"].any():
            seen = np.isfinite(case["y"][:, 0])
            expected = np.broadcast_to(case["y"][seen, 0], (50, seen.sum()))
            np.testing.assert_allclose(paths[:, seen, 0], expected, atol=tolerance * np.abs(paths).max())


def test_draws_differ_between_members_of_a_batch_and_keys(x64, key):
    case, ssm = model("missing_rows_and_entries")
    many = ssm.replace(m0=np.tile(ssm.m0, (3, 1)))  # three equal models
    for draw in (
        lambda k: pssm.simulate(k, many, 5)[0],
        lambda k: pssm.simulate(k, many, 5)[1],
        lambda k: pssm.sample_states(k, many, case["y"]),
        lambda k: pssm.sample_states(k, ssm, case["y"], sample_shape=(3,)),
    ):
        one = np.asarray(draw(key)).reshape(3, -1)
        assert all(np.abs(one[i] - one[j]).min() > 0 for i in range(3) for j in range(i))
        np.testing.assert_array_equal(one, np.asarray(draw(key)).reshape(3, -1))
        assert np.abs(one - np.asarray(draw(jax.random.key(1))).reshape(3, -1)).min() > 0


def test_shapes_of_samples(key):
    case, ssm = model("missing_rows_and_entries", np.float32)
    steps = len(case["y"])
    for sample_shape in ((), (1,), (4,), (2, 3)):
        assert pssm.sample_states(key, ssm, case["y"], sample_shape=sample_shape).shape == (*sample_shape, steps, 2)


FUNCTIONS = {
    "log_likelihood": pssm.log_likelihood,
    "gradient": jax.grad(pssm.log_likelihood),
    "hessian in A": lambda ssm, y: jax.hessian(lambda a: pssm.log_likelihood(ssm.replace(A=a), y))(ssm.A),
    "log_likelihoods": pssm.log_likelihoods,
    "kalman_filter": pssm.kalman_filter,
    "kalman_smoother": pssm.kalman_smoother,
    "most_likely_states": pssm.most_likely_states,
    "forecast": lambda ssm, y: pssm.forecast(ssm, y, 3),
    "sample_states": lambda ssm, y: pssm.sample_states(jax.random.key(0), ssm, y),
    "simulate": lambda ssm, y: pssm.simulate(jax.random.key(0), ssm, len(y)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_and_vmap(name, x64):
    """Compiled and batched, over model and data, a function gives what it gives one at a time."""
    case, ssm = model("ordinary")
    f, y = FUNCTIONS[name], case["y"][:6]
    many = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x]), ssm)
    ys = jnp.stack([y, 1.5 * y])
    found = jax.jit(jax.vmap(f))(many, ys)
    for i in range(2):
        expected = jax.jit(f)(jax.tree.map(lambda x, i=i: x[i], many), ys[i])
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-10 * max(1.0, np.abs(b).max()))
    if name != "hessian in A":
        for a, b in zip(jax.tree.leaves(f(ssm, y)), jax.tree.leaves(jax.jit(f)(ssm, y)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10 * max(1.0, np.abs(b).max()))
