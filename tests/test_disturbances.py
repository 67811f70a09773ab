"""The disturbance smoother against the dense joint Gaussian and statsmodels; outliers and breaks that are planted."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pandas as pd
import pytest

from pssm import LinearGaussianSSM, datasets, models
from pssm.diagnostics import disturbances
from pssm.filters import smooth_disturbances
from pssm.infer import fit_ml

STEPS = 6
KINDS = {
    "plain": dict(),
    "inputs": dict(m=2, offsets=True),
    "time-varying": dict(timed=("A", "chol_Q", "C", "chol_R")),
    "singular Q": dict(n=4, p=1, width=1),
    "more sensors than states": dict(n=2, p=5),
    "one state": dict(n=1, p=1),
}


def dense(ssm, y, u):
    """Means of all noises given `y`, and the variances of these means, by the joint of noises and readings."""
    q, timed = oracles.parameters(ssm)

    def at(name, t):
        return q[name][t] if name in timed else q[name]

    n, p = ssm.n_state, ssm.n_obs
    width = at("chol_Q", 0).shape[1]
    size = n + STEPS * (width + p)  # the first state's noise, then those of each step
    path, readings, mean = np.zeros((n, size)), [], []
    path[:, :n], centre = q["chol_P0"], q["m0"]
    state_of, obs_of = [], []
    for t in range(STEPS):
        start = n + t * (width + p)
        state = np.zeros((n, size))
        state[:, start : start + width] = at("chol_Q", t) if t else 0
        if t:
            centre = at("A", t) @ centre
            centre = centre + (0 if q["b"] is None else at("b", t)) + (0 if q["B"] is None else at("B", t) @ u[t])
            path = at("A", t) @ path + state
        obs = np.zeros((p, size))
        obs[:, start + width : start + width + p] = at("chol_R", t)
        readings.append(at("C", t) @ path + obs)
        shift = (0 if q["d"] is None else at("d", t)) + (0 if q["D"] is None else at("D", t) @ u[t])
        mean.append(at("C", t) @ centre + shift)
        state_of.append(state)
        obs_of.append(obs)
    G, error = np.concatenate(readings), (np.asarray(y) - np.array(mean)).ravel()
    seen = ~np.isnan(error)
    G, error = G[seen], error[seen]
    weights = np.linalg.solve(G @ G.T, G)
    found = []
    for parts in (np.array(state_of), np.array(obs_of)):
        gain = parts @ weights.T
        found += [gain @ error, np.sqrt(np.maximum(np.einsum("tij,jk,tik->ti", gain, G @ G.T, gain), 0))]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_the_dense_joint(kind, x64):
    rng = np.random.default_rng(3)
    q = oracles.random_model(rng, steps=STEPS, **KINDS[kind])
    ssm = LinearGaussianSSM(**q)
    u = rng.normal(size=(STEPS, ssm.n_input)) if ssm.n_input else None
    y = oracles.with_holes(rng, 2 * rng.normal(size=(STEPS, ssm.n_obs)))
    y[2] = np.nan
    state, state_sd, obs, obs_sd = dense(ssm, y, u)
    found = smooth_disturbances(ssm, y, u)
    np.testing.assert_allclose(found.state, state, atol=1e-10)
    np.testing.assert_allclose(found.state_sd, state_sd, atol=1e-7)
    seen = ~np.isnan(y)
    assert np.isnan(found.obs)[~seen].all()
    np.testing.assert_allclose(found.obs[seen], obs[seen], atol=1e-10)
    np.testing.assert_allclose(found.obs_sd[seen], obs_sd[seen], atol=1e-7)


def test_in_32_bits():
    rng = np.random.default_rng(3)
    ssm = LinearGaussianSSM(**oracles.random_model(rng, steps=STEPS))
    y = 2 * rng.normal(size=(STEPS, ssm.n_obs))
    state, state_sd, obs, obs_sd = dense(ssm, y, None)
    found = smooth_disturbances(ssm, y)
    for a, b in zip(found, (state, state_sd, obs, obs_sd), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_they_are_those_of_statsmodels(x64):
    import statsmodels.api as sm

    y = np.array(datasets.load("nile").y)
    y[20:30] = np.nan
    model = sm.tsa.UnobservedComponents(y[:, 0], "llevel")
    model.ssm.initialize_known(np.zeros(1), 1e7 * np.eye(1))
    model.update(np.array([15099.0, 1469.1]))
    truth = model.ssm.smooth()
    ssm = LinearGaussianSSM.from_covariances([0.0], [[1e7]], [[1.0]], [[1469.1]], [[1.0]], [[15099.0]])
    found = smooth_disturbances(ssm, y)
    np.testing.assert_allclose(found.state[1:, 0], truth.smoothed_state_disturbance[0, :-1], atol=1e-8)
    variance = 1469.1 - truth.smoothed_state_disturbance_cov[0, 0, :-1]
    np.testing.assert_allclose(found.state_sd[1:, 0] ** 2, variance, rtol=1e-8)
    seen = ~np.isnan(y[:, 0])
    np.testing.assert_allclose(found.obs[seen, 0], truth.smoothed_measurement_disturbance[0, seen], atol=1e-8)
    both = smooth_disturbances(ssm, np.stack([y, y[::-1]]))
    np.testing.assert_allclose(both.state[0], found.state, rtol=1e-10)


def planted(seed=0):
    rng = np.random.default_rng(seed)
    level = np.cumsum(0.3 * rng.normal(size=120))
    level[80:] += 8
    y = level + 0.5 * rng.normal(size=120)
    y[30] += 6
    y[50] = np.nan
    return y[:, None]


def test_outlier_and_break_are_found():
    ssm = LinearGaussianSSM([0.0], [[10.0]], [[1.0]], [[0.3]], [[1.0]], [[0.5]])
    time = pd.date_range("2020-01-01", periods=120, freq="D").to_numpy()
    found = disturbances(ssm, planted(), time=time, names=("sales",), state_names=("level",))
    largest = found.table.loc[found.table.groupby("kind").residual.idxmax()].set_index("kind")
    assert largest.time["break"] == time[80]
    assert largest.time["outlier"] == time[30]
    assert largest.name["break"] == "level"
    assert 3 < largest.disturbance["outlier"] < 6  # a part of it is taken for a level
    assert np.isnan(found.observation_residuals[50, 0])
    assert len(found.plot().axes) == 2


def test_of_a_fit():
    fit = fit_ml(models.local_level, planted(), num_starts=1, progress_bar=False)
    found = disturbances(fit)
    assert found.state_names == ("level",)
    assert {30, 80} <= set(found.table.time)


def test_nothing_is_found_where_nothing_is():
    ssm = LinearGaussianSSM([0.0], [[1.0]], [[0.9]], [[0.5]], [[1.0]], [[0.5]])
    keys = jax.random.split(jax.random.key(1), 200)
    from pssm import simulate

    y = np.asarray(jax.jit(jax.vmap(lambda k: simulate(k, ssm, 40)[1]))(keys))
    found = smooth_disturbances(ssm, y)
    residuals = np.asarray(found.state[:, 1:, 0] / found.state_sd[:, 1:, 0])
    assert abs(residuals.std() - 1) < 0.03
    assert abs(np.asarray(found.obs / found.obs_sd).std() - 1) < 0.03
    tables = [disturbances(ssm, series).table for series in y[:20]]
    assert sum(len(table) for table in tables) <= 6  # 2 tests of 5 % a series


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: disturbances(s), "`y` is required"),
        (lambda s: disturbances(s, jnp.zeros((5, 1)), names=("a", "b")), "`names` must have 1 names"),
        (lambda s: disturbances(s, jnp.zeros((5, 1)), state_names=("a", "b")), "`state_names` must have 1 names"),
        (lambda s: disturbances(s, jnp.zeros((2, 5, 1))), "one path of states"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call(LinearGaussianSSM([0.0], [[1.0]], [[0.9]], [[0.5]], [[1.0]], [[0.5]]))
