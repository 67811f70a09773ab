"""Models and data that break other libraries, in float32 and float64, values and gradients."""

import jax
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM


def _random(seed, n, p, steps, **edit):
    rng = np.random.default_rng(seed)
    q = oracles.random_model(rng, n=n, p=p)
    q["chol_P0"], q["chol_Q"], q["chol_R"] = np.eye(n), 0.3 * np.eye(n), 0.5 * np.eye(p)
    q |= edit
    z, y = q["m0"], np.empty((steps, p))
    for t in range(steps):
        z = q["A"] @ z + q["chol_Q"] @ rng.normal(size=q["chol_Q"].shape[1]) if t else z
        y[t] = q["C"] @ z + q["chol_R"] @ rng.normal(size=p)
    return q, y


def _holes(q, y, *where):
    for w in where:
        y[w] = np.nan
    return q, y


def _scaled(c_state, c_obs):
    q, y = _random(7, 2, 2, 30)
    c_state, c_obs = np.asarray(c_state) * np.ones(2), np.asarray(c_obs) * np.ones(2)
    q["m0"], q["chol_P0"], q["chol_Q"] = (
        c_state * q["m0"],
        c_state[:, None] * q["chol_P0"],
        c_state[:, None] * q["chol_Q"],
    )
    q["A"] = c_state[:, None] * q["A"] / c_state
    q["C"] = c_obs[:, None] * q["C"] / c_state
    q["chol_R"] = c_obs[:, None] * q["chol_R"]
    return q, y * c_obs


def _outlier():
    q, y = _random(8, 2, 1, 30)
    y[12] += 1e4 * 0.5
    return q, y


ROT = np.array([[0.9, 0.3], [-0.3, 0.9]])
CASES = {
    "R = 1e-8, more sensors than states": lambda: _random(0, 2, 4, 30, chol_R=1e-4 * np.eye(4)),
    "R strongly correlated": lambda: _random(1, 2, 2, 30, chol_R=np.array([[1.0, 0.0], [0.999, 0.0447]])),
    "duplicated sensors": lambda: _random(2, 2, 2, 30, C=np.array([[1.0, 0.5], [1.0, 0.5]])),
    "P0 = 1e6, R = 1e-2": lambda: _random(3, 2, 1, 30, chol_P0=1e3 * np.eye(2), chol_R=0.1 * np.eye(1)),
    "P0 = 1e8": lambda: _random(3, 2, 1, 30, chol_P0=1e4 * np.eye(2)),
    "P0 = 1e10": lambda: _random(3, 1, 1, 30, chol_P0=1e5 * np.eye(1)),
    "Q = 0": lambda: _random(4, 2, 1, 30, chol_Q=np.zeros((2, 2)), A=ROT),
    "P0 = 0": lambda: _random(5, 2, 2, 30, chol_P0=np.zeros((2, 2))),
    "unstable": lambda: _random(6, 2, 1, 30, A=1.1 * ROT),
    "five states, many sensors": lambda: _random(9, 5, 60, 12),
    "twenty states": lambda: _random(10, 20, 3, 12),
    "missing rows, first and last": lambda: _holes(*_random(11, 2, 2, 30), 0, 29, slice(5, 9), (12, 1), (13, 0)),
    "almost everything missing": lambda: _holes(*_random(12, 2, 2, 30), slice(0, 28)),
    "units of 1e-6": lambda: _scaled(1e-6, 1e-6),
    "units of 1e6": lambda: _scaled(1e6, 1e6),
    "mixed units": lambda: _scaled([1e4, 1e-3], [1e3, 1e-3]),
    "an outlier of 1e4 sd": _outlier,
    "T = p": lambda: _random(13, 2, 6, 6),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_value_and_gradient(name, dtype):
    """The oracle sees the inputs as rounded to the dtype; value to 1e-4 and gradient to 1e-3 in float32."""
    with jax.enable_x64(dtype == np.float64):
        q, y = CASES[name]()
        q = {k: v if k == "time_varying" else np.asarray(v, dtype) for k, v in q.items()}
        y = y.astype(dtype)
        ssm = LinearGaussianSSM(**q)
        value, gradient = jax.jit(jax.value_and_grad(pssm.log_likelihood))(ssm, y)
        wide = {k: np.asarray(v, np.float64) for k, v in q.items() if k != "time_varying"}
        exact = oracles.joseph_log_likelihood(wide, y)
        assert abs(value - exact) <= (1e-4 if dtype == np.float32 else 1e-9) * max(1.0, abs(exact))
        for k in ("chol_Q", "chol_R", "A"):
            if not wide[k].any():
                continue
            expected = _directional(wide, y, k)
            found = float(np.vdot(getattr(gradient, k), wide[k]))  # derivative along the parameter itself
            scale = max(abs(expected), np.isfinite(y).sum())
            assert abs(found - expected) <= (1e-3 if dtype == np.float32 else 1e-6) * scale, k


def _directional(q, y, name, h=1e-6):
    """d/ds of the log-likelihood at `q[name] * exp(s)`, by central differences in extended precision."""
    up, down = (oracles.joseph_log_likelihood({**q, name: q[name] * np.exp(s * h)}, y) for s in (1, -1))
    return (up - down) / (2 * h)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_long_series(dtype):
    """Ten thousand steps, summed without loss."""
    with jax.enable_x64(dtype == np.float64):
        q, y = _random(14, 2, 1, 10_000)
        ssm = LinearGaussianSSM(**{k: v if k == "time_varying" else np.asarray(v, dtype) for k, v in q.items()})
        exact = oracles.joseph_log_likelihood({k: v for k, v in q.items() if k != "time_varying"}, y)
        np.testing.assert_allclose(
            pssm.log_likelihood(ssm, y.astype(dtype)), exact, rtol=1e-5 if dtype == np.float32 else 1e-10
        )


@pytest.mark.parametrize("name", ["P0 = 1e8", "Q = 0", "R = 1e-8, more sensors than states", "duplicated sensors"])
def test_smoother_in_float32(name):
    """Means to 1e-3 posterior sds (or rounding of the state), variances never negative."""
    q, y = CASES[name]()
    ssm32 = LinearGaussianSSM(**{k: v if k == "time_varying" else np.asarray(v, np.float32) for k, v in q.items()})
    y32 = y.astype(np.float32)
    found = pssm.kalman_smoother(ssm32, y32)
    with jax.enable_x64(True):
        wide = LinearGaussianSSM(
            **{k: v if k == "time_varying" else np.asarray(getattr(ssm32, k), np.float64) for k, v in q.items()}
        )
        exact = pssm.kalman_smoother(wide, y32.astype(np.float64))
        sd = np.sqrt(np.diagonal(np.asarray(exact.cov), axis1=1, axis2=2))
        error = np.abs(np.asarray(found.mean, np.float64) - np.asarray(exact.mean))
        assert (error <= 1e-2 * sd + 1e-5 * np.abs(exact.mean).max()).all()
    assert np.linalg.eigvalsh(np.asarray(found.cov, np.float64)).min() >= -1e-6 * np.abs(found.cov).max()
