"""EM with linear constraints and with a first state that is certain: against dense formulas and direct maximisation."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy.optimize import minimize

import pssm
from pssm import LinearGaussianSSM, fit_em

NAN = np.nan
ALL = ("m0", "P0", "A", "B", "b", "Q", "C", "D", "d", "R")


def but(*names):
    return tuple(name for name in ALL if name not in names)


def problem(seed=0, lengths=(7, 4, 9), p=2, m=0, holes=True):
    rng = np.random.default_rng(seed)
    ssm = LinearGaussianSSM(**oracles.random_model(rng, n=2, p=p, m=m, offsets=True))
    ys = [2.0 + 1.5 * rng.normal(size=(length, p)) for length in lengths]
    us = [rng.normal(size=(length, m)) for length in lengths] if m else None
    return ssm, [oracles.with_holes(rng, y) if holes else y for y in ys], us


def gls(ssm, ys, basis, us=None):
    """The maximiser `m0 + basis a` of the dense likelihood, and the information about `a`."""
    total, slope = 0.0, 0.0
    for i, y in enumerate(ys):
        u = None if us is None else us[i]
        base = oracles.joint(ssm, len(y), u)
        index, values = oracles.seen(base, y, len(y))
        moved = []
        for column in basis.T:
            other = oracles.joint(ssm.replace(m0=ssm.m0 + column), len(y), u)
            moved.append((other.mean - base.mean)[index])
        X = np.stack(moved, axis=1)
        weight = np.linalg.inv(base.cov[np.ix_(index, index)])
        total = total + X.T @ weight @ X
        slope = slope + X.T @ weight @ (values - base.mean[index])
    return np.asarray(ssm.m0) + basis @ np.linalg.solve(total, slope)


@pytest.mark.parametrize(
    "P0", [np.zeros((2, 2)), np.array([[1.0, 2.0], [2.0, 4.0]]), np.diag([0.0, 3.0])], ids=["zero", "line", "axis"]
)
@pytest.mark.parametrize("m", [0, 1])
def test_a_certain_start_is_the_generalised_least_squares_estimate(P0, m, x64):
    ssm, ys, us = problem(m=m)
    ssm = LinearGaussianSSM.from_covariances(ssm.m0, P0, ssm.A, ssm.Q, ssm.C, ssm.R, b=ssm.b, d=ssm.d, B=ssm.B, D=ssm.D)
    found = fit_em(ys, ssm, u=us, num_iters=1, fixed=but("m0")).ssm
    np.testing.assert_allclose(found.m0, gls(ssm, ys, np.eye(2), us), atol=1e-8)
    line = (np.array([1.0, -1.0]), np.array([[1.0], [0.5]]))
    there = ssm.replace(m0=jnp.array(line[0]))
    held = fit_em(ys, ssm, u=us, num_iters=1, fixed=but("m0"), constraint={"m0": line}).ssm
    np.testing.assert_allclose(held.m0, gls(there, ys, line[1], us), atol=1e-8)


def test_a_certain_start_and_all_else_reach_the_maximum_of_a_direct_search(x64):
    """MARSS's default: the first state is a parameter. Dense likelihood, L-BFGS with numerical slopes."""
    rng = np.random.default_rng(6)
    y = (20.0 + np.cumsum(rng.normal(size=25)) + 2.0 * rng.normal(size=25))[:, None]
    y[[4, 11]] = NAN
    one = np.eye(1)

    def model(x):
        return LinearGaussianSSM(x[:1], 0 * one, one, np.exp(x[1]) * one, one, np.exp(x[2]) * one)

    best = minimize(lambda x: -oracles.log_likelihood(model(x), y), [20.0, 0.0, 0.0], method="L-BFGS-B")
    start = model(np.zeros(3))
    result = fit_em(y, start, fixed=("P0", "A", "C"), num_iters=5000, tol=1e-12)
    assert result.reason == "converged"
    assert result.log_likelihoods[-1] == pytest.approx(-best.fun, abs=1e-5)
    np.testing.assert_allclose(result.ssm.m0, best.x[:1], atol=1e-3)
    assert np.diff(result.log_likelihoods).min() > -1e-9
    assert result.log_likelihoods[-1] > result.log_likelihoods[0] + 100
    far = fit_em(1e6 * y, start.replace(chol_R=1e6 * one, chol_Q=1e6 * one), fixed=("P0", "A", "C"), num_iters=50).ssm
    near = fit_em(y, start, fixed=("P0", "A", "C"), num_iters=50).ssm
    np.testing.assert_allclose(far.m0, 1e6 * near.m0, rtol=1e-9)


def test_a_certain_start_that_the_data_do_not_see_stays(x64):
    ssm, ys, _ = problem(lengths=(9,))
    blind = ssm.replace(C=ssm.C.at[:, 1].set(0.0), A=jnp.diag(jnp.diagonal(ssm.A)), chol_P0=0 * ssm.chol_P0)
    found = fit_em(ys, blind, num_iters=2, fixed=but("m0")).ssm
    assert found.m0[1] == blind.m0[1]
    assert abs(found.m0[0] - blind.m0[0]) > 1e-3


def test_a_certain_start_in_float32():
    ssm, ys, _ = problem()
    ssm = ssm.replace(chol_P0=0 * ssm.chol_P0).astype(np.float32)
    found = fit_em(ys, ssm, num_iters=5, tol=0.0, fixed=("P0",))
    assert np.isfinite(found.log_likelihoods).all()
    one = fit_em(ys, ssm, num_iters=1, fixed=but("m0")).ssm
    with jax.enable_x64(True):
        wide = LinearGaussianSSM(**oracles.parameters(ssm)[0])
        np.testing.assert_allclose(one.m0, gls(wide, ys, np.eye(2)), atol=1e-3)


@pytest.mark.parametrize("name", ["C", "D", "d", "B", "b", "Q", "R", "m0", "P0"])
def test_a_space_of_everything_is_no_constraint(name, x64):
    ssm, ys, us = problem(m=2)
    one = fit_em(ys, ssm, u=us, num_iters=1, fixed=()).ssm
    free = np.full(np.shape(getattr(ssm, name)), NAN)
    other = fit_em(ys, ssm, u=us, num_iters=1, fixed=(), constraint={name: free}).ssm
    for part in ALL if name != "m0" else but("m0", "P0"):  # m0 alone comes by the likelihood itself, as it may
        np.testing.assert_allclose(getattr(other, part), getattr(one, part), atol=1e-8, err_msg=part)


def test_diagonal_blocks_and_equal_variances_in_one_step(x64):
    ssm, ys, _ = problem(p=4, holes=False, lengths=(12, 15))
    ssm = ssm.replace(chol_R=0.9 * np.eye(4))
    free = np.asarray(fit_em(ys, ssm, num_iters=1).ssm.R)
    eye, ones = np.eye(4), np.ones((4, 4))
    equal = fit_em(
        ys, ssm, num_iters=1, constraint={"R": (np.zeros(16), np.stack([eye, ones - eye], -1).reshape(16, 2))}
    )
    off = (free.sum() - np.trace(free)) / 12
    np.testing.assert_allclose(equal.ssm.R, np.trace(free) / 4 * eye + off * (ones - eye), atol=1e-8)
    blocks = np.kron(np.eye(2), np.ones((2, 2)))
    found = fit_em(ys, ssm, num_iters=1, constraint={"R": np.where(blocks > 0, NAN, 0.0)}).ssm.R
    np.testing.assert_allclose(found, free * blocks, atol=1e-8)
    tied = fit_em(ys, ssm, num_iters=1, tied={"R": [0, 0, 1, 1]}).ssm.R
    sums = np.stack([np.diag([1.0, 1, 0, 0]), np.diag([0.0, 0, 1, 1])], -1).reshape(16, 2)
    np.testing.assert_allclose(
        fit_em(ys, ssm, num_iters=1, constraint={"R": (np.zeros(16), sums)}).ssm.R, tied, atol=1e-8
    )


HELD = {
    "A": [[NAN, 0.2], [0.0, NAN]],
    "b": [0.3, NAN],
    "Q": [[NAN, 0.1], [0.1, NAN]],
    "C": [[1.0, 0.0], [NAN, 1.0]],
    "d": [NAN, 0.7],
    "R": [[0.45, NAN], [NAN, NAN]],
}


@pytest.mark.parametrize("holes", [False, True], ids=["complete", "holes"])
def test_held_entries_stay_and_the_rest_reaches_a_maximum(holes, x64):
    eye = np.eye(2)
    A, C = [[0.7, 0.2], [0.0, -0.5]], [[1.0, 0.0], [0.5, 1.0]]
    ssm = LinearGaussianSSM(np.zeros(2), eye, A, eye, C, eye, b=[0.3, 0.0], d=[0.0, 0.7])
    rng = np.random.default_rng(0)
    ys = [np.array(pssm.simulate(key, ssm, 60)[1]) for key in jax.random.split(jax.random.key(0), 2)]
    ys = [oracles.with_holes(rng, y, 0.1) if holes else y for y in ys]
    result = fit_em(ys, ssm, num_iters=30, tol=0.0, constraint=HELD, polish_steps=300)
    assert result.reason == "polished"
    assert np.diff(result.log_likelihoods).min() > -1e-9
    for name, x in HELD.items():
        found, free = np.asarray(getattr(result.ssm, name)), np.isnan(x)
        close = dict(rtol=1e-13, atol=1e-13) if name in ("Q", "R") else dict(rtol=0, atol=0)
        np.testing.assert_allclose(found[~free], np.asarray(x)[~free], err_msg=name, **close)
        assert np.abs(found[free] - np.asarray(getattr(ssm, name))[free]).min() > 1e-6, name

    def value(parts):
        fields = oracles.parameters(result.ssm)[0] | {name: parts[name] for name in ("A", "b", "C", "d")}
        fields |= {"chol_Q": jnp.linalg.cholesky(parts["Q"]), "chol_R": jnp.linalg.cholesky(parts["R"])}
        model = LinearGaussianSSM(**fields)
        return sum(pssm.log_likelihood(model, y) for y in ys)

    slopes = jax.jit(jax.grad(value))({name: getattr(result.ssm, name) for name in HELD})
    for name, x in HELD.items():
        slope = np.asarray(slopes[name] + slopes[name].T if name in ("Q", "R") else slopes[name])
        assert np.abs(slope[np.isnan(x)]).max() < 2e-2, name


def test_constraints_do_not_depend_on_units(x64):
    ssm, ys, _ = problem(lengths=(30, 25))
    scale, shift = np.array([1e4, 1e-3]), np.array([1e6, 3.0])
    other = ssm.replace(C=scale[:, None] * ssm.C, chol_R=scale[:, None] * ssm.chol_R, d=scale * ssm.d + shift)
    constraint = {"C": np.array([[1.0, NAN], [NAN, 1.0]]), "R": np.array([[NAN, 0.1], [0.1, NAN]]), "d": [0.5, NAN]}
    turned = {
        "C": scale[:, None] * constraint["C"],
        "R": np.outer(scale, scale) * constraint["R"],
        "d": scale * np.asarray(constraint["d"]) + shift,
    }
    one = fit_em(ys, ssm, num_iters=10, tol=0.0, constraint=constraint)
    two = fit_em([scale * y + shift for y in ys], other, num_iters=10, tol=0.0, constraint=turned)
    np.testing.assert_allclose(two.ssm.C, scale[:, None] * one.ssm.C, rtol=1e-6)
    np.testing.assert_allclose(two.ssm.R, np.outer(scale, scale) * one.ssm.R, rtol=1e-6)
    np.testing.assert_allclose(two.ssm.A, one.ssm.A, atol=1e-6)


def test_noise_free_rows_stay_under_a_constraint(x64):
    """An autoregression of order two with its first coefficient held: the second row is structure."""
    y = np.zeros(200)
    rng = np.random.default_rng(0)
    for t in range(2, 200):
        y[t] = 1.2 * y[t - 1] - 0.5 * y[t - 2] + rng.normal()
    ssm = LinearGaussianSSM(np.zeros(2), np.eye(2), [[1.2, 0.1], [1.0, 0.0]], [[1.0], [0.0]], [[1.0, 0.0]], [[0.5]])
    held = {"A": [[1.2, NAN], [NAN, NAN]], "Q": [[NAN, 0.0], [0.0, 0.0]]}
    result = fit_em(y, ssm, num_iters=100, fixed=("m0", "P0", "C"), constraint=held, polish_steps=50)
    np.testing.assert_array_equal(result.ssm.A[1], [1.0, 0.0])
    assert result.ssm.A[0, 0] == 1.2
    assert float(result.ssm.A[0, 1]) == pytest.approx(-0.5, abs=0.1)
    np.testing.assert_array_equal(np.asarray(result.ssm.Q) == 0, [[False, True], [True, True]])
    with pytest.raises(ValueError, match="frees noise in a direction where the start has none"):
        fit_em(y, ssm, constraint={"Q": np.full((2, 2), NAN)})


def test_one_series_has_a_diagonal_noise(x64):
    rng = np.random.default_rng(0)
    one = np.eye(1)
    ssm = LinearGaussianSSM([0.0], one, one, one, one, one)
    y = rng.normal(size=30)
    y[[3, 9]] = NAN
    plain = fit_em(y, ssm, num_iters=3, tol=0.0)
    said = fit_em(y, ssm, num_iters=3, tol=0.0, diagonal=("Q", "R"), missing="observed")
    np.testing.assert_array_equal(plain.log_likelihoods, said.log_likelihoods)
    assert np.isfinite(fit_em(y[:2], ssm, num_iters=1).log_likelihoods).all(), "no full matrix, not too few data"


def test_polishing_moves_beside_a_noise_of_zero_and_says_when_it_cannot_move(x64, monkeypatch):
    ssm, ys, _ = problem(lengths=(30, 25))
    exact = ssm.replace(chol_R=np.diag([1.0, 0.0]))
    result = fit_em(ys, exact, num_iters=2, diagonal=("R",), polish_steps=50)
    assert result.reason == "polished"
    assert result.ssm.R[1, 1] < 1e-12

    def unmoved(evaluate, start, **_):
        return type("Result", (), {"x": start})

    monkeypatch.setattr("scipy.optimize.minimize", unmoved)
    with pytest.warns(UserWarning, match="took no step"):
        result = fit_em(ys, ssm, num_iters=500, tol=0.1, polish_steps=50)
    assert result.reason == "stuck"


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ({"chol_Q": np.eye(2)}, "`constraint` must be one of"),
        ({"B": np.eye(2)}, "has 'B', which the start `ssm` does not have"),
        ({"m0": [NAN, 1.0]}, "`constraint` and `fixed` both have 'm0'"),
        ({"C": np.zeros((3, 2))}, r"`constraint\['C'\]` must have shape \(2, 2\)"),
        ({"d": (np.zeros(2), np.zeros((3, 1)))}, r"must be \(f, G\) of shapes \(2,\)"),
        ({"Q": [[1.0, NAN], [0.0, 1.0]]}, r"free \(NAN|NaN\) at \(i, j\)"),
        ({"Q": [[1.0, 0.2], [0.0, 1.0]]}, "symmetric"),
        ({"Q": [[1.0, 2.0], [2.0, 1.0]]}, "is no covariance"),
    ],
    ids=str,
)
def test_bad_constraints_are_named(constraint, words):
    ssm, ys, _ = problem()
    with warnings.catch_warnings(), pytest.raises(ValueError, match=words):
        fit_em(ys, ssm, constraint=constraint)


def test_restarts_and_a_number_of_states_keep_the_constraint(x64):
    ssm, ys, _ = problem(lengths=(20, 15))
    held = {"C": [[1.0, NAN], [0.0, 1.0]], "A": [[NAN, 0.0], [0.0, NAN]]}
    for start, options in ((ssm, dict(restarts=1)), (2, {})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few iterations
            result = fit_em(ys, start, num_iters=5, constraint=held, **options)
        assert np.diff(result.log_likelihoods).min() > -1e-9
        for name, x in held.items():
            found, free = np.asarray(getattr(result.ssm, name)), np.isnan(x)
            np.testing.assert_array_equal(found[~free], np.asarray(x)[~free])
