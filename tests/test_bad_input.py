"""Wrong input to the core: every message names the argument."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM

GOOD = oracles.random_model(np.random.default_rng(0), n=3, p=2)
COVARIANCES = dict(m0=np.zeros(2), P0=np.eye(2), A=np.eye(2), Q=np.eye(2), C=np.ones((1, 2)), R=np.eye(1))


def model(**changes):
    return LinearGaussianSSM(**{**GOOD, **changes})


def covariances(**changes):
    return LinearGaussianSSM.from_covariances(**{**COVARIANCES, **changes})


Y = np.zeros((5, 2))
CASES = {
    "inf in y": ("y", lambda: pssm.log_likelihood(model(), np.where(np.eye(5, 2) > 0, np.inf, 0.0))),
    "extra column": ("y", lambda: pssm.log_likelihood(model(), np.zeros((5, 3)))),
    "one column of two": ("y", lambda: pssm.kalman_filter(model(), np.zeros((5, 1)))),
    "one-dimensional y": ("y", lambda: pssm.kalman_smoother(model(), np.zeros(5))),
    "transposed y": ("y", lambda: pssm.log_likelihood(model(), Y.T)),
    "no steps": ("y", lambda: pssm.log_likelihood(model(), np.zeros((0, 2)))),
    "text": ("y", lambda: pssm.log_likelihood(model(), [["a", "b"]])),
    "NaN in A": ("A", lambda: model(A=np.full((3, 3), np.nan))),
    "short m0": ("m0", lambda: model(m0=np.zeros(2))),
    "A not square": ("A", lambda: model(A=np.zeros((2, 3)))),
    "chol_P0": ("chol_P0", lambda: model(chol_P0=np.eye(2))),
    "scalar chol_R": ("chol_R", lambda: model(chol_R=0.5)),
    "vector chol_Q": ("chol_Q", lambda: model(chol_Q=np.ones(3))),
    "wrong b": ("b", lambda: model(b=np.zeros(2))),
    "wrong B": ("B", lambda: model(B=np.zeros((2, 1)))),
    "B and D disagree": ("[BD]", lambda: model(B=np.zeros((3, 1)), D=np.zeros((2, 2)))),
    "scalar R": ("R", lambda: covariances(R=1.0)),
    "vector Q": ("Q", lambda: covariances(Q=np.ones(2))),
    "asymmetric P0": ("P0", lambda: covariances(P0=[[1.0, 0.5], [0.0, 1.0]])),
    "indefinite Q": ("Q", lambda: covariances(Q=[[1.0, 2.0], [2.0, 1.0]])),
    "negative R": ("R", lambda: covariances(R=[[-1.0]])),
    "undeclared time axis": ("A", lambda: pssm.log_likelihood(model(A=np.zeros((5, 3, 3)), C=np.zeros((4, 2, 3))), Y)),
    "unknown time_varying": ("time_varying", lambda: model(time_varying=("m0",))),
    "time_varying as text": ("time_varying", lambda: model(time_varying="A")),
    "time_varying absent": ("b", lambda: model(time_varying=("b",))),
    "time axes disagree": ("C", lambda: model(A=np.zeros((5, 3, 3)), C=np.zeros((4, 2, 3)), time_varying=("A", "C"))),
    "wrong length": ("A", lambda: pssm.log_likelihood(model(A=np.zeros((4, 3, 3)), time_varying=("A",)), Y)),
    "u absent": ("u", lambda: pssm.log_likelihood(model(B=np.zeros((3, 1))), Y)),
    "u unwanted": ("u", lambda: pssm.log_likelihood(model(), Y, np.zeros((5, 1)))),
    "u short": ("u", lambda: pssm.log_likelihood(model(B=np.zeros((3, 1))), Y, np.zeros((4, 1)))),
    "u with NaN": ("u", lambda: pssm.log_likelihood(model(B=np.zeros((3, 1))), Y, np.full((5, 1), np.nan))),
    "u_future absent": ("u_future", lambda: pssm.forecast(model(B=np.zeros((3, 1))), Y, 2, np.zeros((5, 1)))),
    "method": ("method", lambda: pssm.kalman_filter(model(), Y, method="fast")),
    "num_steps": ("num_steps", lambda: pssm.simulate(jax.random.key(0), model(), 0)),
    "horizon": ("num_steps", lambda: pssm.forecast(model(), Y, -1)),
    "not a model": ("ssm", lambda: pssm.log_likelihood({"A": 1}, Y)),
}


@pytest.mark.parametrize("name", CASES)
def test_message_names_the_argument(name):
    argument, call = CASES[name]
    with pytest.raises((ValueError, TypeError), match=f"`{argument}`"):
        call()


def test_data_beyond_single_precision_is_warned_of():
    y = 1e6 + 0.01 * np.random.default_rng(0).normal(size=(20, 2))
    with pytest.warns(UserWarning, match="jax_enable_x64"):
        pssm.log_likelihood(model(), y)
    with jax.enable_x64(True):
        pssm.log_likelihood(model(), y)  # no warning


def test_values_are_not_looked_at_inside_jit():
    found = jax.jit(lambda y: pssm.log_likelihood(model(), y))(jnp.full((5, 2), jnp.inf))
    assert not np.isfinite(found)
