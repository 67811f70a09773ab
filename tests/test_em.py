"""EM: one step is that of a dense reference in all variants; the likelihood never falls; its gradient is the score."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM, fit_em
from pssm.learning import LikelihoodFellError
from pssm.learning.em import _climb
from pssm.learning.moments import expectations

ALL = ("m0", "P0", "A", "B", "b", "Q", "C", "D", "d", "R")
LENGTHS = (7, 4, 9)


def problem(seed=0, m=0, offsets=False, holes=False, diagonal=False, lengths=LENGTHS, **options):
    """A random start and sequences of unequal length, not drawn from it."""
    rng = np.random.default_rng(seed)
    q = oracles.random_model(rng, m=m, offsets=offsets, **options)
    if diagonal:
        q["chol_R"] = np.diag(rng.uniform(0.5, 1.5, len(q["chol_R"])))
    ssm = LinearGaussianSSM(**q)
    ys = [1.5 * rng.normal(size=(length, ssm.n_obs)) for length in lengths]
    ys = [oracles.with_holes(rng, y) if holes else y for y in ys]
    us = [rng.normal(size=(length, m)) for length in lengths] if m else None
    return ssm, ys, us


def compare(found, wanted, atol=1e-8):
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(found, name), value, atol=atol, err_msg=name)


@pytest.mark.parametrize("holes", [False, True], ids=["complete", "holes"])
@pytest.mark.parametrize("options", [{}, {"offsets": True}, {"m": 2, "offsets": True}, {"m": 1}], ids=str)
def test_one_step_is_that_of_the_dense_reference(options, holes, x64):
    ssm, ys, us = problem(holes=holes, **options)
    result = fit_em(ys, ssm, u=us, num_iters=1, fixed=())
    compare(result.ssm, oracles.em_step(ssm, ys, us))
    before = sum(oracles.log_likelihood(ssm, y, None if us is None else us[i]) for i, y in enumerate(ys))
    assert result.log_likelihoods[0] == pytest.approx(before, abs=1e-8)


@pytest.mark.parametrize("options", [{}, {"m": 2, "offsets": True}], ids=str)
def test_one_step_over_the_observed_entries_alone(options, x64):
    ssm, ys, us = problem(holes=True, diagonal=True, **options)
    result = fit_em(ys, ssm, u=us, num_iters=1, fixed=(), diagonal=("R",))
    compare(result.ssm, oracles.em_step(ssm, ys, us, form="observed"))
    other = fit_em(ys, ssm, u=us, num_iters=1, fixed=(), diagonal=("R",), missing="augmented")
    wanted = oracles.em_step(ssm, ys, us)
    compare(other.ssm, wanted | {"R": np.diag(np.diag(wanted["R"]))})
    assert np.abs(other.ssm.R - result.ssm.R).max() > 1e-3, "two forms, two steps"


def test_structures_are_averages_of_the_free_update(x64):
    ssm, ys, _ = problem(p=4, diagonal=True)
    ssm = ssm.replace(chol_R=0.8 * np.eye(4), chol_Q=0.6 * np.eye(3))
    free = oracles.em_step(ssm, ys)
    found = fit_em(ys, ssm, num_iters=1, isotropic=("Q",), tied={"R": [0, 1, 0, 1]}).ssm
    np.testing.assert_allclose(found.Q, np.trace(free["Q"]) / 3 * np.eye(3), atol=1e-8)
    even, odd = np.diag(free["R"])[::2].mean(), np.diag(free["R"])[1::2].mean()
    np.testing.assert_allclose(found.R, np.diag([even, odd, even, odd]), atol=1e-8)
    np.testing.assert_allclose(found.m0, ssm.m0, atol=0)
    np.testing.assert_allclose(found.P0, ssm.P0, atol=0)


def expected_log_joint(ssm, moments):
    """The M-step's objective, up to a constant, as a function of the model."""
    out = 0.0
    for names, cov, r in (
        (("A", "B", "b"), ssm.Q, moments.transition),
        (("C", "D", "d"), ssm.R, moments.emission),
    ):
        parts = [getattr(ssm, name) for name in names]
        coef = jnp.concatenate([x[:, None] if x.ndim == 1 else x for x in parts if x is not None], axis=1)
        W = r.left - coef @ r.cross.T - r.cross @ coef.T + coef @ r.right @ coef.T
        out = out - 0.5 * (r.count * jnp.linalg.slogdet(cov)[1] + jnp.trace(jnp.linalg.solve(cov, W)))
    apart = moments.first_mean - ssm.m0
    first = len(apart) * moments.first_cov + apart.T @ apart
    return out - 0.5 * (len(apart) * jnp.linalg.slogdet(ssm.P0)[1] + jnp.trace(jnp.linalg.solve(ssm.P0, first)))


@pytest.mark.parametrize("form", ["complete", "augmented"])
def test_fishers_identity(form, x64):
    """At the current model the gradient of the expected log joint is that of the log-likelihood."""
    ssm, ys, us = problem(m=1, offsets=True, holes=form == "augmented", lengths=(8, 8))
    y, u = np.stack(ys), np.stack(us)
    moments = expectations(ssm, jnp.asarray(y), jnp.asarray(u), None, form)
    by_em = jax.grad(lambda s: expected_log_joint(s, moments))(ssm)
    exact = jax.grad(lambda s: pssm.log_likelihood(s, y, u).sum())(ssm)
    for name in ("m0", "chol_P0", "A", "chol_Q", "C", "chol_R", "b", "d", "B", "D"):
        a, b = getattr(by_em, name), getattr(exact, name)
        np.testing.assert_allclose(a, b, atol=1e-7 * max(1.0, np.abs(b).max()), err_msg=name)


VARIANTS = [
    dict(fixed=()),
    dict(fixed=(), diagonal=("R",)),
    dict(fixed=("m0", "P0"), isotropic=("R",), diagonal=("Q",)),
    dict(fixed=("m0", "P0", "C"), missing="augmented"),
    dict(fixed=("A", "Q"), diagonal=("P0",)),
]


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(s, marks=pytest.mark.slow) for s in range(5, 50))])
def test_the_likelihood_never_falls(seed, x64):
    options = dict(m=seed % 3, offsets=seed % 2 == 1, holes=seed % 4 > 1)
    ssm, ys, us = problem(seed, lengths=(12, 9, 15), **options)
    result = fit_em(ys, ssm, u=us, num_iters=200, tol=0.0, **VARIANTS[seed % len(VARIANTS)])
    gains = np.diff(result.log_likelihoods)
    assert len(gains) == 200
    assert gains.min() > -1e-9 * np.abs(result.log_likelihoods).max()
    assert result.log_likelihoods[-1] > result.log_likelihoods[0] + 1


def test_a_linear_constraint_on_the_transition(x64):
    """Toeplitz: the diagonal is one number, the rest is zero but for the corner."""
    ssm, ys, _ = problem(offsets=True)
    basis = np.zeros((9, 2))
    basis[[0, 4, 8], 0] = 1.0
    basis[6, 1] = 1.0  # A[0, 2]
    offset = np.zeros(9)
    offset[3] = 0.1  # A[0, 1]
    result = fit_em(ys, ssm, num_iters=30, tol=0.0, constraint=(offset, basis))
    A = np.asarray(result.ssm.A)
    np.testing.assert_allclose(A, [[A[0, 0], 0.1, A[0, 2]], [0, A[0, 0], 0], [0, 0, A[0, 0]]], atol=1e-12)
    # At the maximum no direction of the space is uphill.
    held = ("m0", "P0", "b", "Q", "C", "d", "R")
    long = fit_em(ys, ssm, num_iters=1000, tol=0.0, fixed=held, constraint=(offset, basis)).ssm
    slope = jax.grad(lambda A: sum(pssm.log_likelihood(long.replace(A=A), y) for y in ys))(long.A)
    assert np.abs(basis.T @ np.asarray(slope).T.reshape(-1)).max() < 1e-4


def test_a_free_space_of_transitions_is_no_constraint(x64):
    ssm, ys, us = problem(m=1, offsets=True)
    one = fit_em(ys, ssm, u=us, num_iters=3).ssm
    other = fit_em(ys, ssm, u=us, num_iters=3, constraint=(np.zeros(9), np.eye(9))).ssm
    compare(other, {name: getattr(one, name) for name in ALL})


def test_shapes_of_the_data_do_not_matter(x64):
    ssm, ys, _ = problem(lengths=(6, 6))
    as_list, as_array = (fit_em(y, ssm, num_iters=3).ssm for y in (ys, np.stack(ys)))
    compare(as_list, {name: getattr(as_array, name) for name in ("A", "Q", "C", "R")}, atol=1e-12)
    scalar = LinearGaussianSSM([0.0], [[1.0]], [[0.9]], [[1.0]], [[1.0]], [[1.0]])
    y = np.random.default_rng(0).normal(size=20)
    one, two, three = (fit_em(x, scalar, num_iters=2).ssm.R for x in (y, y[:, None], [y]))
    np.testing.assert_allclose([two, three], [one, one], atol=1e-12)


def test_groups_of_sequences_share_a_program(x64):
    ssm, ys, _ = problem(lengths=(5, 7, 9))
    fit_em(ys, ssm, num_iters=1)
    programs = _climb._cache_size()
    fit_em(problem(seed=1, lengths=(4, 12, 6))[1], ssm, num_iters=1)
    assert _climb._cache_size() == programs


def test_noise_free_directions_stay_and_the_companion_with_them(x64):
    """An autoregression of order two: the second row of `A` and of `Q` are structure, not parameters."""
    rng = np.random.default_rng(0)
    ssm = LinearGaussianSSM(np.zeros(2), np.eye(2), [[0.5, 0.1], [1.0, 0.0]], [[1.0], [0.0]], [[1.0, 0.0]], [[0.5]])
    y = np.zeros(300)
    for t in range(2, 300):
        y[t] = 1.2 * y[t - 1] - 0.5 * y[t - 2] + rng.normal()
    result = fit_em(y + 0.1 * rng.normal(size=300), ssm, num_iters=300, fixed=("m0", "P0", "C"))
    np.testing.assert_allclose(result.ssm.A[1], [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(result.ssm.Q[1], 0.0, atol=1e-6)
    np.testing.assert_allclose(result.ssm.A[0], [1.2, -0.5], atol=0.15)


def test_a_floor_is_kept_and_the_likelihood_still_rises(x64):
    ssm, ys, _ = problem(p=4, lengths=(8,), diagonal=True)
    ssm = ssm.replace(chol_R=np.eye(4))
    with pytest.warns(UserWarning, match="went to the floor"):
        result = fit_em(ys, ssm, num_iters=500, tol=0.0, diagonal=("R",), floor=0.1)
    share = np.diag(result.ssm.R) / np.var(np.concatenate(ys), axis=0)
    assert 0.05 < share.min() < 0.1  # a sensor's unit is the power of two next to its standard deviation
    assert share.max() > 0.2
    assert (np.diff(result.log_likelihoods[:100]) > -1e-9).all()


def test_float32_agrees_with_float64():
    ssm, ys, _ = problem(holes=True, offsets=True)
    with jax.enable_x64(True):
        exact = fit_em(ys, LinearGaussianSSM(**oracles.parameters(ssm)[0]), num_iters=5, tol=0.0).ssm
        exact = {name: np.asarray(getattr(exact, name)) for name in ("A", "Q", "C", "R", "b", "d")}
    found = fit_em([y.astype(np.float32) for y in ys], ssm.astype(np.float32), num_iters=5, tol=0.0).ssm
    for name, b in exact.items():
        np.testing.assert_allclose(getattr(found, name), b, atol=2e-3 * np.abs(b).max(), err_msg=name)


def test_it_stops_with_a_reason(x64):
    ssm, ys, _ = problem()
    assert fit_em(ys, ssm, num_iters=3, tol=0.0).reason == "num_iters"
    result = fit_em(ys, ssm, num_iters=500, tol=1e-3)
    assert result.reason == "converged"
    total = sum(float(pssm.log_likelihood(result.ssm, y)) for y in ys)
    assert result.log_likelihoods[-1] == pytest.approx(total, abs=1e-8), "the last one is the model's"


def test_an_interruption_loses_nothing(x64, monkeypatch):
    ssm, ys, _ = problem()
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return _climb(*args, **kwargs)

    monkeypatch.setattr("pssm.learning.em._climb", interrupted)
    monkeypatch.setattr("pssm.learning.em.LONGEST_CALL", 0.0)
    result = fit_em(ys, ssm, num_iters=50, tol=0.0)
    assert result.reason == "interrupted"
    assert len(result.log_likelihoods) == 3
    monkeypatch.undo()
    compare(result.ssm, {"A": fit_em(ys, ssm, num_iters=2, tol=0.0).ssm.A}, atol=1e-12)


def test_a_fall_is_an_error_that_carries_the_result(x64, monkeypatch):
    ssm, ys, _ = problem()

    def worse(*args, **kwargs):
        step = _climb(*args, **kwargs)
        return step._replace(current=step.current.replace(A=0.0 * step.current.A, C=0.0 * step.current.C))

    monkeypatch.setattr("pssm.learning.em._climb", worse)
    with pytest.raises(LikelihoodFellError, match="went from") as caught:
        fit_em(ys, ssm, num_iters=5)
    assert caught.value.result.ssm is not None
    assert len(caught.value.result.log_likelihoods) >= 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(fixed="A"), TypeError, "`fixed` must be a tuple"),
        (dict(fixed=("chol_Q",)), ValueError, "`fixed` must be one of"),
        (dict(diagonal=("A",)), ValueError, "`diagonal` must be one of"),
        (dict(tied={"R": [0, 1, 2]}), ValueError, "a group for each of 2"),
        (dict(missing="observed"), ValueError, "needs a diagonal"),
        (dict(floor=-1.0), ValueError, "`floor` must not be negative"),
        (dict(num_iters=0), ValueError, "`num_iters` must be at least 1"),
        (dict(constraint=(np.zeros(3), np.eye(3))), ValueError, r"`constraint` must be \(f, G\)"),
        (dict(u=np.zeros((5, 1))), ValueError, "`u` is given"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, error, words):
    ssm, ys, _ = problem(lengths=(9,))
    with pytest.raises(error, match=words):
        fit_em(ys[0], ssm, **options)


def test_bad_data_are_named():
    ssm, ys, _ = problem()
    with pytest.raises(ValueError, match="y\\[1\\]"):
        fit_em([ys[0], np.zeros((4, 3))], ssm)
    with pytest.raises(ValueError, match="`y` has no observed value"):
        fit_em(np.full((5, 2), np.nan), ssm)
    with pytest.raises(ValueError, match="too few for a full `R`.*isotropic"):
        fit_em(np.zeros((5, 2)), ssm)
    with pytest.raises(ValueError, match="at least 2 steps"):
        fit_em(np.zeros((9, 1, 2)), ssm)
    with pytest.raises(ValueError, match="time-invariant"):
        fit_em(np.zeros((9, 2)), ssm.replace(A=np.stack([ssm.A] * 9), time_varying=("A",)))
    with pytest.raises(TypeError, match="`ssm` must be a LinearGaussianSSM"):
        fit_em(np.zeros((9, 2)), "lds")


# Starts and the last stretch


def lds(seed, steps, sequences, n=2, p=3):
    """A slowly turning system of two states, and sequences drawn from it."""
    rng = np.random.default_rng(seed)
    A = 0.95 * np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    ssm = LinearGaussianSSM(
        np.zeros(n),
        np.eye(n),
        A,
        0.5 * np.eye(n),
        rng.normal(size=(p, n)),
        0.4 * np.eye(p),
        d=np.array([1.0, -2.0, 5.0]),
    )
    keys = jax.random.split(jax.random.key(seed), sequences)
    return ssm, [np.asarray(pssm.simulate(k, ssm, steps)[1]) for k in keys]


def markov(ssm, lags=4):
    """Covariances of the observations at lags from 1 on, `C A^k Sigma C'`: the same for every basis of the state."""
    A, C = np.asarray(ssm.A), np.asarray(ssm.C)
    n = len(A)
    stationary = np.linalg.solve(np.eye(n * n) - np.kron(A, A), np.asarray(ssm.Q).ravel()).reshape(n, n)
    return np.stack([C @ np.linalg.matrix_power(A, k) @ stationary @ C.T for k in range(1, lags + 1)])


def test_parameters_come_back_from_a_number_of_states(x64):
    truth, ys = lds(0, 400, 4)
    result = fit_em(ys, 2, num_iters=200)
    angles = [np.sort_complex(np.linalg.eigvals(np.asarray(s.A))) for s in (result.ssm, truth)]
    np.testing.assert_allclose(*angles, atol=0.03)
    np.testing.assert_allclose(markov(result.ssm), markov(truth), atol=0.15 * np.abs(markov(truth)).max())
    np.testing.assert_allclose(result.ssm.d, truth.d, atol=0.15)
    assert result.log_likelihoods[-1] > sum(float(pssm.log_likelihood(truth, y)) for y in ys)


def test_a_start_is_found_with_holes_inputs_and_little_data(x64):
    truth, ys = lds(1, 30, 3)
    rng = np.random.default_rng(0)
    us = [rng.normal(size=(30, 2)) for _ in ys]
    result = fit_em([oracles.with_holes(rng, y) for y in ys], 3, u=us, num_iters=5, tol=0.0)
    assert result.ssm.B.shape == (3, 2)
    assert np.isfinite(result.log_likelihoods).all()
    short = fit_em(rng.normal(size=(9, 2)), 2, num_iters=3)
    assert np.isfinite(short.log_likelihoods).all()


def test_restarts_are_not_worse(x64):
    ssm, ys, _ = problem(lengths=(20, 20))
    one = fit_em(ys, ssm, num_iters=40, tol=0.0)
    many = fit_em(ys, ssm, num_iters=40, tol=0.0, restarts=3)
    assert many.log_likelihoods[-1] >= one.log_likelihoods[-1] - 1e-6


def test_a_restart_that_falls_leaves_the_others(x64, monkeypatch):
    ssm, ys, _ = problem(lengths=(20, 20))
    wild = ssm.replace(A=1e200 * ssm.A)
    with pytest.raises(LikelihoodFellError):
        fit_em(ys, wild)
    monkeypatch.setattr("pssm.learning.em.perturbed", lambda *_: wild)
    found = fit_em(ys, ssm, num_iters=40, tol=0.0, restarts=2)
    alone = fit_em(ys, fit_em(ys, ssm, num_iters=8, tol=0.0).ssm, num_iters=40, tol=0.0)
    np.testing.assert_allclose(found.log_likelihoods, alone.log_likelihoods, rtol=1e-12)


@pytest.mark.filterwarnings("error")
def test_a_sensor_without_any_value_is_no_harm(x64):
    _, ys = lds(0, 60, 2)
    with_empty = [np.column_stack([y, np.full(len(y), np.nan)]) for y in ys]
    result = fit_em(with_empty, 2, num_iters=5, tol=0.0)
    assert np.isfinite(result.log_likelihoods).all()
    assert np.isfinite(result.ssm.R).all()
    assert np.isfinite(result.ssm.C).all()


@pytest.mark.parametrize(
    "options", [{}, {"diagonal": ("R",), "isotropic": ("Q",)}, {"fixed": ("m0", "P0", "C")}], ids=str
)
def test_polishing_reaches_the_maximum_that_em_creeps_to(options, x64):
    _, ys = lds(2, 60, 2)
    ssm = fit_em(ys, 2, num_iters=2).ssm
    result = fit_em(ys, ssm, num_iters=20, polish_steps=300, **options)
    assert result.reason == "polished"
    patient = fit_em(ys, ssm, num_iters=1500, tol=1e-13, **options)
    assert result.log_likelihoods[-1] > patient.log_likelihoods[-1] - 1e-3
    total = sum(float(pssm.log_likelihood(result.ssm, y)) for y in ys)
    assert result.log_likelihoods[-1] == pytest.approx(total, abs=1e-6)
    for name in options.get("fixed", ()):
        np.testing.assert_array_equal(getattr(result.ssm, name), getattr(ssm, name))
    R = np.asarray(result.ssm.R)
    assert ("R" in options.get("diagonal", ())) == (not (R - np.diag(np.diag(R))).any())
