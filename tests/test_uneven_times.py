"""Structural models at uneven times: at even ones they are the plain models, elsewhere the sums of their equations."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

from pssm import models
from pssm.sde import LinearSDE, discretise, integrated_walk, matern, oscillator

VALUES = {
    "sigma_level": 0.4,
    "sigma_slope": 0.1,
    "sigma_seasonal": 0.2,
    "cycle_period": 5.0,
    "cycle_damping": 0.7,
    "sigma_cycle": 0.5,
    "matern_length": 2.0,
    "sigma_matern": 0.6,
    "sigma_obs": 0.3,
    "mean": 1.0,
    "beta": np.array([0.5]),
}
T = np.array([0.0, 0.3, 0.3, 1.9, 2.0, 6.5])
Y = np.array([1.0, 0.4, np.nan, 2.0, 1.5, 0.3])
U = np.arange(6.0)


def ssm_of(model, y=Y, **kwargs):
    return marginal_of(model, y, **kwargs).ssm


def marginal_of(model, y, **kwargs):
    values = jax.tree.map(jnp.asarray, VALUES)
    return handlers.trace(handlers.substitute(model, values)).get_trace(y, **kwargs)["y"]["fn"]


PLAIN = {
    "level": models.local_level,
    "seasonal": partial(models.seasonal, period=4.5, harmonics=2),
    "cycle": partial(models.structural, level=False, cycle=True, u=U),
    "matern": partial(models.structural, matern=1.5),
}


@pytest.mark.parametrize("name", PLAIN)
def test_at_even_times_they_are_the_plain_models(name, x64):
    plain, timed = ssm_of(PLAIN[name]), ssm_of(PLAIN[name], t=np.arange(6.0) + 2.0)
    assert set(timed.time_varying) <= {"A", "chol_Q"}
    for field in ("m0", "P0", "A", "Q", "C", "R", "d", "D"):
        one, other = getattr(plain, field), getattr(timed, field)
        if one is not None:
            other = other[1:] if {"Q": "chol_Q"}.get(field, field) in timed.time_varying else other
            np.testing.assert_allclose(other, np.broadcast_to(one, other.shape), atol=1e-12, err_msg=field)


@pytest.mark.parametrize("name", ["level", "cycle", "seasonal", "matern"])
def test_missing_steps_may_be_left_out(name, x64):
    """Times 0, 1, 4, 5 are six steps of which two are missing."""
    y = np.array([1.0, 0.4, 2.0, 1.5])
    full = np.array([1.0, 0.4, np.nan, np.nan, 2.0, 1.5])
    model = PLAIN[name] if name != "cycle" else partial(models.structural, level=False, cycle=(3.0, 9.0))

    def score(y, **kwargs):
        kwargs |= {"location": 0.0, "scale": 1.0}
        return log_density(model, (y,), kwargs, {k: jnp.asarray(VALUES[k]) for k in VALUES if k != "beta"})[0]

    want = jax.jit(score)(full)
    found = jax.jit(partial(score, t=np.array([0.0, 1.0, 4.0, 5.0])))(y)
    assert float(found) == pytest.approx(float(want), abs=1e-9)


def equations(name):
    """What the model is a sum of, with the values above."""
    turn = 2 * np.pi / 4.5
    waves = [LinearSDE(k * turn * jnp.array([[0.0, 1.0], [-1, 0]]), 0.2 * jnp.eye(2), *[None] * 3) for k in (1, 2)]
    level = integrated_walk(0.4)
    stationary = 0.5 / np.sqrt(1 - 0.7**2)
    return {
        "trend": [integrated_walk(0.1, order=2)._replace(L=jnp.diag(jnp.array([0.4, 0.1])))],
        "seasonal": [level, *waves],
        "cycle": [level, oscillator(-5.0, -1 / np.log(0.7), stationary)],  # it turns the other way round
        "matern": [level, matern(2.0, 0.6, smoothness=2.5)],
    }[name]


@pytest.mark.parametrize("name", ["trend", "seasonal", "cycle", "matern"])
def test_closed_forms_are_the_equations_discretised(name, x64):
    model = {
        "trend": models.local_linear_trend,
        "seasonal": partial(models.seasonal, period=4.5, harmonics=2),
        "cycle": partial(models.structural, cycle=True),
        "matern": partial(models.structural, matern=2.5),
    }[name]
    ssm, at = ssm_of(model, t=T), 0
    for sde in equations(name):
        size = len(sde.F)
        part = slice(at, at + size)
        A, chol_Q = jax.vmap(lambda gap, s=sde: discretise(s.F, s.L, gap))(jnp.diff(T))
        found = jnp.broadcast_to(ssm.A, (6, *ssm.A.shape[-2:]))[1:, part, part]
        np.testing.assert_allclose(found, A, atol=1e-12)
        np.testing.assert_allclose(ssm.Q[1:, part, part], chol_Q @ chol_Q.swapaxes(1, 2), atol=1e-12)
        at += size
    assert at == ssm.n_state


def test_scores_have_gradients_and_states_may_be_sampled(x64):
    model = partial(models.structural, trend=True, cycle=True, matern=0.5)
    values = {name: VALUES[name] for name in VALUES if name not in ("mean", "beta")}
    score = jax.jit(jax.value_and_grad(lambda v: log_density(model, (Y,), {"t": T}, v)[0]))
    value, slopes = score(values)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in slopes.values())
    marginal = marginal_of(model, Y, t=T)
    dense = oracles.log_likelihood(marginal.ssm, Y[:, None])
    assert float(marginal.log_prob(Y[:, None])) == pytest.approx(dense, abs=1e-8)
    trace = handlers.trace(handlers.seed(partial(model, states="sampled"), 0)).get_trace(t=T)
    assert trace["z"]["value"].shape == (6, marginal.ssm.n_state)
    assert trace["y"]["value"].shape == (6, 1)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"t": T[:-1]}, "`t` must have shape"),
        ({"t": T[::-1]}, "`t` must not go back"),
        ({"t": T, "ar": 1}, "`ar` counts steps"),
        ({"t": T, "cycle": (0.0, 3.0)}, "`cycle` must be bounds with 0 <"),
        ({"matern": 2.0}, "`smoothness` must be one of"),
    ],
)
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        handlers.trace(handlers.seed(models.structural, 0)).get_trace(Y, **kwargs)
