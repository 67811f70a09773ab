"""Nonlinear equations at uneven times: on a linear drift they approach the exact discretisation as gaps get short."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.linalg import expm

import pssm
from pssm.nonlinear_sde import NonlinearSDE, refine
from pssm.sde import LinearSDE

F = np.array([[-0.3, 1.0], [-1.0, -0.2]])
L = np.array([[0.0], [0.5]])
T = np.array([0.0, 0.4, 0.5, 0.5, 1.7])
Y = np.array([1.0, 0.8, np.nan, 0.9, -0.5])


def seen(z):
    return dist.Normal(z[:1], 0.3).to_event(1)


def linear():
    return NonlinearSDE(lambda z, u: jnp.asarray(F) @ z, L, [1.0, 0.0], 0.5 * np.eye(2), seen)


@pytest.mark.parametrize(
    ("flow", "moved", "close"),
    [
        ("euler", lambda gap: np.eye(2) + gap * F, 1e-12),
        (
            "runge_kutta",
            lambda gap: sum(np.linalg.matrix_power(gap * F, k) / [1, 1, 2, 6, 24][k] for k in range(5)),
            1e-12,
        ),
        ("diffrax", lambda gap: expm(gap * F), 1e-7),
    ],
)
def test_one_step_of_each_flow(flow, moved, close, x64):
    model, inputs = linear().at(T, flow=flow)
    z = jnp.array([0.7, -0.4])
    found = jax.jit(jax.vmap(lambda u: model.transition(z, u)))(inputs)
    want = [moved(gap) @ np.asarray(z) for gap in np.diff(T, prepend=0.0)]
    np.testing.assert_allclose(found, want, atol=close)
    Q = model.chol_Q @ model.chol_Q.swapaxes(1, 2)
    np.testing.assert_allclose(Q[4], 1.2 * L @ L.T, atol=1e-12)


def test_as_gaps_get_short_it_is_the_equation(x64):
    exact = LinearSDE(F, L, np.eye(1, 2), np.array([1.0, 0.0]), 0.25 * np.eye(2)).at(T, [[0.3]])
    want = float(pssm.log_likelihood(exact, Y))
    errors = []
    for gap in (0.02, 0.01):
        t, y, _, _ = refine(T, Y, gap)
        model, inputs = linear().at(t)
        errors.append(float(pssm.gaussian_filter(model, y, inputs).log_likelihood) - want)
    assert abs(errors[0]) < 0.1
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)  # first order


def test_inputs_act_over_the_gap_before_their_time(x64):
    def drift(z, u):
        return u - 0.0 * z

    sde = NonlinearSDE(drift, np.zeros((1, 1)), [0.0], [[0.0]], lambda z, u: dist.Normal(z + u, 1.0).to_event(1))
    u = np.array([9.0, 1.0, 2.0, 3.0, 4.0])
    model, inputs = sde.at(T, u)
    z, _ = model.simulate(jax.random.key(0), 5, inputs)
    np.testing.assert_allclose(z[:, 0], np.cumsum([0.0, 0.4, 0.2, 0.0, 4.8]), atol=1e-12)
    assert float(model.emission(z[1], inputs[1]).mean[0]) == pytest.approx(1.4)


@pytest.mark.slow
def test_a_gradient_goes_through_the_solver(x64):
    def score(damping, flow):
        def drift(z, u):
            return jnp.stack([z[1], -jnp.sin(z[0]) - damping * z[1]])

        model, inputs = NonlinearSDE(drift, L, [1.0, 0.0], 0.5 * np.eye(2), seen).at(0.3 * T, flow=flow)
        return pssm.gaussian_filter(model, Y, inputs).log_likelihood

    found = {flow: jax.jit(jax.grad(partial(score, flow=flow)))(0.3) for flow in ("runge_kutta", "diffrax")}
    assert np.isfinite(found["diffrax"])
    assert float(found["diffrax"]) == pytest.approx(float(found["runge_kutta"]), rel=1e-3)


def test_refining_keeps_what_was_there():
    t, y, u, given = refine(T, Y, 0.25, np.arange(5.0))
    np.testing.assert_allclose(t[given], T)
    np.testing.assert_array_equal(y[given], Y)
    assert np.isnan(y[~given]).all()
    assert np.diff(t).max() <= 0.25 + 1e-9
    np.testing.assert_array_equal(u[~given], [1.0, 4.0, 4.0, 4.0, 4.0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: linear().at(T, flow="magic"), "`flow` must be one of"),
        (lambda: linear().at(T, np.zeros((3, 1))), "`u` must have shape"),
        (lambda: linear().at(T[::-1]), "`t` must not go back"),
        (lambda: refine(T, Y, 0.0), "`max_gap` must be positive"),
        (lambda: refine(T, Y[:-1], 1.0), "`y` must have 5 time steps"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
