"""Wrong input: every public function of the core refuses it, and the message names the argument in backticks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pssm
from pssm import LinearGaussianSSM

T, N, P, M = 6, 3, 2, 2
RNG = np.random.default_rng(0)
Y, U = RNG.normal(size=(T, P)), RNG.normal(size=(T, M))
ARRAYS = {
    "m0": np.zeros(N),
    "chol_P0": np.eye(N),
    "A": 0.5 * np.eye(N),
    "chol_Q": np.eye(N),
    "C": np.ones((P, N)),
    "chol_R": np.eye(P),
}
COVARIANCES = {
    "m0": np.zeros(N),
    "P0": np.eye(N),
    "A": 0.5 * np.eye(N),
    "Q": np.eye(N),
    "C": np.ones((P, N)),
    "R": np.eye(P),
}
PLAIN = LinearGaussianSSM(**ARRAYS)
DRIVEN = LinearGaussianSSM(**ARRAYS, B=np.ones((N, M)), D=np.ones((P, M)))
FUNCTIONS = {
    "log_likelihood": pssm.log_likelihood,
    "log_likelihoods": pssm.log_likelihoods,
    "kalman_filter": pssm.kalman_filter,
    "kalman_smoother": pssm.kalman_smoother,
    "most_likely_states": pssm.most_likely_states,
    "sample_states": lambda ssm, y, u=None: pssm.sample_states(jax.random.key(0), ssm, y, u),
    "forecast": lambda ssm, y, u=None: pssm.forecast(ssm, y, 2, u, None if u is None else np.ones((2, M))),
}
infinite = Y.copy()
infinite[2, 1] = -np.inf
SERIES = {
    "infinite value": infinite,
    "extra column": np.ones((T, P + 1)),
    "one column where two are due": np.ones((T, 1)),
    "one-dimensional": np.ones(T),
    "transposed": Y.T,
    "no steps": np.ones((0, P)),
    "a number": 1.0,
    "text": "nile",
    "None": None,
    "rows of unequal length": [[1.0, 2.0], [3.0]],
    "complex": Y + 1j,
}
INPUTS = {
    "absent": (DRIVEN, None),
    "too short": (DRIVEN, U[:-1]),
    "too long": (DRIVEN, np.ones((T + 1, M))),
    "extra column": (DRIVEN, np.ones((T, M + 1))),
    "one-dimensional": (DRIVEN, np.ones(T)),
    "NaN": (DRIVEN, np.full((T, M), np.nan)),
    "infinite": (DRIVEN, np.full((T, M), np.inf)),
    "without use": (PLAIN, U),
}
ERRORS = (ValueError, TypeError)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("series", SERIES)
def test_series(function, series):
    with pytest.raises(ERRORS, match="`y`"):
        FUNCTIONS[function](PLAIN, SERIES[series])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_inputs(function, inputs):
    ssm, u = INPUTS[inputs]
    with pytest.raises(ERRORS, match="`u`"):
        FUNCTIONS[function](ssm, Y, u)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("thing", [None, ARRAYS, np.eye(2)], ids=["None", "dict", "array"])
def test_not_a_model(function, thing):
    with pytest.raises(ERRORS, match="`ssm`"):
        FUNCTIONS[function](thing, Y)


@pytest.mark.parametrize("thing", [None, ARRAYS], ids=["None", "dict"])
def test_not_a_model_to_simulate(thing):
    with pytest.raises(ERRORS, match="`ssm`"):
        pssm.simulate(jax.random.key(0), thing, 5)


@pytest.mark.parametrize("shape", [3, (-1,), (2.5,), "ab"])
def test_sample_shape(shape):
    with pytest.raises(ERRORS, match="`sample_shape`"):
        pssm.sample_states(jax.random.key(0), PLAIN, Y, sample_shape=shape)


@pytest.mark.parametrize("method", ["kalman", "", None, 3])
@pytest.mark.parametrize("function", ["log_likelihood", "log_likelihoods", "kalman_filter", "kalman_smoother"])
def test_method(function, method):
    with pytest.raises(ERRORS, match="`method`"):
        getattr(pssm, function)(PLAIN, Y, method=method)


@pytest.mark.parametrize(
    "ahead", [None, np.ones((1, M)), np.ones((3, M)), np.ones((2, M + 1)), np.full((2, M), np.nan)]
)
def test_future_inputs(ahead):
    with pytest.raises(ERRORS, match="`u_future`"):
        pssm.forecast(DRIVEN, Y, 2, U, ahead)


def test_future_inputs_without_use():
    with pytest.raises(ERRORS, match="`u_future`"):
        pssm.forecast(PLAIN, Y, 2, None, np.ones((2, M)))


@pytest.mark.parametrize("count", [0, -1, 2.5, "3", None, True])
def test_counts(count):
    with pytest.raises(ERRORS, match="`num_steps`"):
        pssm.forecast(PLAIN, Y, count)
    with pytest.raises(ERRORS, match="`num_steps`"):
        pssm.simulate(jax.random.key(0), PLAIN, count)


def test_length_of_time_varying_arrays():
    timed = PLAIN.replace(C=np.ones((T, P, N)), time_varying=("C",))
    for call in (
        lambda: pssm.kalman_filter(timed, Y[:-1]),
        lambda: pssm.kalman_smoother(timed, np.ones((T + 1, P))),
        lambda: pssm.simulate(jax.random.key(0), timed, T + 1),
        lambda: pssm.forecast(timed, Y, 1),
    ):
        with pytest.raises(ERRORS, match="`C`"):
            call()


def _axes(name):
    return {"m0": (N,), "chol_P0": (N, N), "A": (N, N), "chol_Q": (N, N), "C": (P, N), "chol_R": (P, P)}[name]


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("wrong", ["scalar", "NaN", "infinite", "None", "text", "complex"])
def test_arrays_of_the_model(name, wrong):
    shape = _axes(name)
    value = {
        "scalar": 1.0,
        "NaN": np.full(shape, np.nan),
        "infinite": np.full(shape, np.inf),
        "None": None,
        "text": "identity",
        "complex": np.ones(shape) + 1j,
    }[wrong]
    with pytest.raises(ERRORS, match=f"`{name}`"):
        LinearGaussianSSM(**{**ARRAYS, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("m0", np.zeros(N + 1)),
        ("m0", np.zeros((N, 1))),
        ("chol_P0", np.eye(N + 1)),
        ("chol_P0", np.ones(N)),
        ("chol_Q", np.ones(N)),
        ("chol_Q", np.ones((N + 1, 2))),
        ("chol_R", np.ones(P)),
        ("chol_R", np.eye(P + 1)),
        ("A", np.ones((N, N + 1))),
        ("A", np.ones(N)),
        ("b", np.ones(N + 1)),
        ("b", 1.0),
        ("d", np.ones(P + 1)),
        ("B", np.ones((N + 1, M))),
        ("B", np.ones(N)),
        ("D", np.ones((P + 1, M))),
    ],
)
def test_shapes_of_the_model(name, value):
    with pytest.raises(ERRORS, match=f"`{name}`"):
        LinearGaussianSSM(**{**ARRAYS, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("P0", np.eye(N) + np.eye(N, k=1)),  # asymmetric
        ("Q", np.eye(N) + 2 * (np.eye(N, k=1) + np.eye(N, k=-1))),  # indefinite
        ("R", -np.eye(P)),
        ("R", np.diag([1.0, -1e-3])),
        ("R", 1.0),
        ("Q", np.ones(N)),
        ("Q", np.ones((N, 2))),
        ("P0", np.eye(N + 1)),
        ("P0", np.full((N, N), np.nan)),
        ("R", None),
        ("A", np.full((N, N), np.nan)),
        ("A", 1.0),
        ("C", np.ones(N)),
        ("m0", np.zeros(N - 1)),
    ],
)
def test_covariances(name, value):
    with pytest.raises(ERRORS, match=f"`{name}`"):
        LinearGaussianSSM.from_covariances(**{**COVARIANCES, name: value})


def test_covariances_that_are_singular_or_rounded_pass():
    ones = np.ones((N, N))
    for P0 in (np.zeros((N, N)), ones, ones + 1e-9 * np.eye(N, k=1), np.diag([1e8, 1.0, 0.0])):
        np.testing.assert_allclose(
            LinearGaussianSSM.from_covariances(**{**COVARIANCES, "P0": P0}).P0, P0, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("names", [("m0",), ("chol_P0",), ("F",), "A", ("a",), (1,), ("b",), 3])
def test_time_varying_names(names):
    with pytest.raises(ERRORS, match="`time_varying`"):
        LinearGaussianSSM(**ARRAYS, time_varying=names)


def test_time_axis_declared_but_absent():
    with pytest.raises(ERRORS, match="`A`"):
        LinearGaussianSSM(**ARRAYS, time_varying=("A",))


def test_time_axis_present_but_not_declared():
    with pytest.raises(ERRORS, match="`A`"):
        LinearGaussianSSM(**{**ARRAYS, "A": np.zeros((T, N, N)), "C": np.zeros((T - 1, P, N))})


def test_time_axes_that_disagree():
    arrays = {**ARRAYS, "A": np.zeros((T, N, N)), "C": np.zeros((T - 1, P, N))}
    with pytest.raises(ERRORS, match="`C`"):
        LinearGaussianSSM(**arrays, time_varying=("A", "C"))


def test_input_matrices_that_disagree():
    with pytest.raises(ERRORS, match="`[BD]`"):
        LinearGaussianSSM(**ARRAYS, B=np.zeros((N, 1)), D=np.zeros((P, 2)))


def test_data_beyond_single_precision_is_warned_of():
    y = 1e6 + 0.01 * np.random.default_rng(0).normal(size=(20, P))
    with pytest.warns(UserWarning, match="jax_enable_x64"):
        pssm.log_likelihood(PLAIN, y)
    with jax.enable_x64(True):
        pssm.log_likelihood(LinearGaussianSSM(**ARRAYS), y)  # no warning


def test_values_are_not_looked_at_inside_jit():
    found = jax.jit(lambda y: pssm.log_likelihood(PLAIN, y))(jnp.full((T, P), jnp.inf))
    assert not np.isfinite(found)


def test_messages_say_what_was_expected_and_what_came():
    with pytest.raises(ValueError, match=r"\(6, 2\).*\(5, 2\)"):
        pssm.kalman_filter(DRIVEN, Y, U[:-1])
    with pytest.raises(ValueError, match=r"\(time, 2\).*\(2, 6\).*transpose"):
        pssm.kalman_filter(PLAIN, Y.T)
    with pytest.raises(ValueError, match="square_root"):
        pssm.kalman_filter(PLAIN, Y, method="square-root")
