"""The steady state of the gain changes nothing: values, gradients and posteriors are those of the full recursion."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM
from pssm.filters.covariance import until_steady_state

STEPS = 150


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    """A series as long as the room for rows has them all, and nothing to fall back to; these are longer."""
    monkeypatch.setattr("pssm.filters.covariance._capacity", lambda row, length: min(length, 100))


def build(kind, dtype=np.float64):
    """A model and a series of 150 steps whose gain reaches its steady state within some dozen of them."""
    rng = np.random.default_rng(3)
    q = oracles.random_model(rng, n=3, p=2, offsets=True)
    q["A"] = 0.7 * np.linalg.qr(q["A"])[0]
    y = 2 * rng.normal(size=(STEPS, 2))
    if kind == "gaps at first":
        y[4:9], y[12, 1] = np.nan, np.nan
    if kind == "a sensor that never speaks":
        y[:, 1] = np.nan
    if kind == "singular noise":
        q["chol_Q"] = q["chol_Q"][:, :1]
    if kind == "exact observation":
        q["chol_R"] = np.diag([0.0, 0.5])
    if kind == "starts where it ends":  # nothing moves at all, while F forgets slowly
        q["A"] = 0.97 * np.eye(3)
        q["chol_Q"] = 0.1 * np.eye(3)
        start = LinearGaussianSSM(**q)
        q["chol_P0"] = np.asarray(pssm.kalman_filter(start, np.zeros((2000, 2))).predicted_chol[-1])
    if kind == "a constant nobody sees":  # its variance is constant, yet nothing is ever forgotten
        q["A"] = np.diag([0.7, 0.5, 1.0])
        q["chol_Q"] = np.diag([0.5, 0.5, 0.0])
        q["chol_P0"] = np.diag([1.0, 1.0, 2.0])
        q["C"][:, 2] = 0.0
    ssm = LinearGaussianSSM(**{k: v if k == "time_varying" else np.asarray(v, dtype) for k, v in q.items()})
    return ssm, y.astype(dtype)


KINDS = [
    "plain",
    "gaps at first",
    "a sensor that never speaks",
    "singular noise",
    "exact observation",
    "starts where it ends",
    "a constant nobody sees",
]
steady_state = jax.jit(lambda ssm, y: until_steady_state(ssm, ~jnp.isnan(y))[1:])
auto, full = (
    jax.jit(jax.value_and_grad(lambda ssm, y, m=m: pssm.log_likelihood(ssm, y, method=m), argnums=(0, 1)))
    for m in ("auto", "sequential")
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_value_and_gradient(kind, dtype):
    with jax.enable_x64(dtype == np.float64):
        ssm, y = build(kind, dtype)
        last, steady = steady_state(ssm, y)
        assert steady
        assert last < STEPS - 10
        (value, gradient), (expected, gradients) = auto(ssm, y), full(ssm, y)
        tight = dtype == np.float64
        np.testing.assert_allclose(value, expected, rtol=1e-12 if tight else 1e-5)
        for name in ("m0", "chol_P0", "A", "chol_Q", "C", "chol_R", "b", "d"):
            a, b = getattr(gradient[0], name), getattr(gradients[0], name)
            np.testing.assert_allclose(a, b, atol=(1e-10 if tight else 1e-3) * np.abs(b).max(), err_msg=name)
        np.testing.assert_allclose(gradient[1], gradients[1], atol=1e-10 if tight else 1e-3)


def test_a_gap_at_the_end_keeps_every_step(x64):
    ssm, y = build("plain")
    y[-3] = np.nan
    assert not steady_state(ssm, y)[1]
    np.testing.assert_allclose(auto(ssm, y)[0], full(ssm, y)[0], rtol=1e-14)


def test_a_gap_just_before_a_look_for_the_steady_state(x64):
    """An exact reading forgets all at once: the next factor is at rest, while that of the step after a gap is not."""
    ssm = LinearGaussianSSM([0.0], [[2.0]], [[0.8]], [[1.2]], [[1.0]], [[0.0]])
    for gap in range(14, 70):
        y = np.random.default_rng(0).normal(size=(STEPS, 1))
        y[gap] = np.nan
        np.testing.assert_allclose(auto(ssm, y)[0], full(ssm, y)[0], rtol=1e-13)


def test_too_slow_for_a_steady_state(x64):
    """The gain of a random walk with little noise reaches its steady state after more steps than the series has."""
    ssm = LinearGaussianSSM([0.0], [[10.0]], [[1.0]], [[0.01]], [[1.0]], [[1.0]])
    y = np.random.default_rng(0).normal(size=(STEPS, 1))
    assert not steady_state(ssm, y)[1]
    for a, b in zip(jax.tree.leaves(auto(ssm, y)), jax.tree.leaves(full(ssm, y)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("kind", ["slow", "gap at the end"])
def test_room_for_every_step(kind, x64):
    if kind == "slow":
        ssm = LinearGaussianSSM([0.0], [[10.0]], [[1.0]], [[0.01]], [[1.0]], [[1.0]])
        y = np.random.default_rng(0).normal(size=(90, 1))
    else:
        ssm, y = build("plain")
        y = y[:90]
        y[-3] = np.nan
    last, steady = steady_state(ssm, y)
    assert steady
    assert last == 89
    for a, b in zip(jax.tree.leaves(auto(ssm, y)), jax.tree.leaves(full(ssm, y)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    for function in (pssm.kalman_filter, pssm.kalman_smoother):
        a, b = (jax.jit(lambda m=m, f=function: f(ssm, y, method=m))() for m in ("auto", "sequential"))
        for name, x in b._asdict().items():
            np.testing.assert_allclose(getattr(a, name), x, atol=1e-11 * np.abs(x).max(), err_msg=name)


UNIT = 2.0**-30  # a power of two: nothing is rounded in another way


def test_change_of_units_changes_nothing(x64):
    """The test for the steady state knows no units: the same step, whatever they are."""
    ssm, y = build("plain")
    scaled = ssm.replace(**{k: UNIT * getattr(ssm, k) for k in ("m0", "chol_P0", "chol_Q", "chol_R", "b", "d")})
    assert steady_state(ssm, y) == steady_state(scaled, UNIT * y)
    np.testing.assert_allclose(auto(scaled, UNIT * y)[0], auto(ssm, y)[0] - y.size * np.log(UNIT), rtol=1e-12)


def test_filter_and_smoother(x64):
    ssm, y = build("gaps at first")
    for function in (pssm.kalman_filter, pssm.kalman_smoother):
        a, b = (jax.jit(lambda m=m, f=function: f(ssm, y, method=m))() for m in ("auto", "sequential"))
        for name, x in b._asdict().items():
            np.testing.assert_allclose(getattr(a, name), x, atol=1e-11 * np.abs(x).max(), err_msg=name)


def test_second_derivatives_in_any_direction(x64):
    ssm, y = build("plain")

    def function(scale):
        return pssm.log_likelihood(ssm.replace(chol_Q=scale * ssm.chol_Q), y)

    by_both = [jax.jit(second(function))(1.2) for second in (jax.hessian, lambda f: jax.grad(jax.grad(f)))]
    step = 1e-4
    slopes = [jax.jit(jax.grad(function))(1.2 + h) for h in (step, -step)]
    np.testing.assert_allclose(by_both, (slopes[0] - slopes[1]) / (2 * step), rtol=1e-6)


def test_a_smoothed_mean_has_a_gradient(x64):
    ssm, y = build("plain")

    def function(scale):
        return pssm.kalman_smoother(ssm.replace(chol_Q=scale * ssm.chol_Q), y).mean[20, 0]

    step = 1e-5
    expected = (function(1.2 + step) - function(1.2 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(function))(1.2), expected, rtol=1e-6)


def test_batches_are_their_elements(x64):
    """Elements with a steady state at different times, and one that never has any, in one call."""
    ssm, y = build("plain")
    others = np.stack([y, y, y])
    others[1, 5] = np.nan
    scales = jnp.array([1.0, 0.3, 3.0])
    models = jax.vmap(lambda s: jax.tree.map(lambda x: x, ssm).replace(chol_R=s * ssm.chol_R))(scales)
    for series in (others, np.where(np.arange(STEPS)[None, :, None] == STEPS - 2, np.nan, others)):
        value, gradient = jax.jit(jax.value_and_grad(lambda m, v: pssm.log_likelihood(m, v).sum()))(models, series)
        one = [full(ssm.replace(chol_R=s * ssm.chol_R), v) for s, v in zip(scales, series, strict=True)]
        np.testing.assert_allclose(value, sum(v for v, _ in one), rtol=1e-12)
        for i, (_, (g, _)) in enumerate(one):
            np.testing.assert_allclose(gradient.chol_R[i], g.chol_R, rtol=1e-8, atol=1e-9)
