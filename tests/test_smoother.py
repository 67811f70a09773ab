"""Filtered, predicted and smoothed moments on the nasty cases, and what smoothing must obey by definition."""

import jax
import jax.numpy as jnp
import nasty
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM

# Rounding the inputs to float32 moves the exact means themselves by 0.24 and 0.0013 of a posterior sd.
BELOW_INPUT_PRECISION = {"tiny_r_1e12_wide": 0.5, "tiny_r_1e8_wide": 5e-3}


@jax.jit
def both(ssm, y, u):
    f, s = pssm.kalman_filter(ssm, y, u), pssm.kalman_smoother(ssm, y, u)
    return {
        "predicted": (f.predicted_mean, f.predicted_cov),
        "filtered": (f.mean, f.cov),
        "smoothed": (s.mean, s.cov),
        "cross_cov": s.cross_cov,
        "log_likelihoods": f.log_likelihoods,
        "log_likelihood": s.log_likelihood,
    }


def model(name, dtype=np.float64):
    case, _ = nasty.truth(name, dtype)
    return case, LinearGaussianSSM(**case["params"])


filter_only = jax.jit(pssm.kalman_filter)


def sd_of(cov):
    return np.sqrt(np.maximum(np.diagonal(cov, axis1=-2, axis2=-1), 0.0))


@pytest.mark.parametrize("name", nasty.CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moments(name, dtype):
    """Means to 1e-3 of a posterior sd in float32 (or what float32 can hold), no negative variance; 1e-7 in float64."""
    with jax.enable_x64(dtype == np.float64):
        case, ssm = model(name, dtype)
        found = jax.tree.map(lambda x: np.asarray(x, float), both(ssm, case["y"], case["u"]))
        _, exact = nasty.truth(name, dtype)
        rel, eps = (1e-3, 100 * np.finfo(dtype).eps) if dtype == np.float32 else (1e-7, 1e4 * np.finfo(dtype).eps)
        share = BELOW_INPUT_PRECISION.get(name, rel) if dtype == np.float32 else rel
        kinds = {"predicted": "predicted_", "filtered": "", "smoothed": "smoothed_"}
        wrong = {}
        for kind, prefix in kinds.items():
            (mean, cov), m, P = found[kind], exact[prefix + "mean"], exact[prefix + "cov"]
            sd = sd_of(P)
            scale = eps * np.maximum(np.abs(m), sd_of(exact["predicted_cov"])).max(0)  # rounding of the state itself
            error = np.abs(mean - m) / (share * sd + scale)
            if error.max() > 1:
                wrong[kind + " mean"] = error.max()
            room = rel * sd + scale
            error = np.abs(cov - P) / (2 * sd[:, :, None] * room[:, None, :] + room[:, :, None] * room[:, None, :])
            error = np.maximum(error, np.swapaxes(error, 1, 2)) / 2
            if error.max() > 1:
                wrong[kind + " cov"] = error.max()
            assert np.linalg.eigvalsh(cov / (1e-300 + np.abs(cov).max())).min() >= -1e-6
            assert (np.diagonal(cov, axis1=1, axis2=2) >= 0).all()
        sd = sd_of(exact["smoothed_cov"]) + scale / rel
        error = np.abs(found["cross_cov"] - exact["cross_cov"]) / (rel * sd[1:, :, None] * sd[:-1, None, :])
        if error.max(initial=0) > 1:
            wrong["cross_cov"] = error.max()
        assert not wrong


@pytest.mark.parametrize("name", [n for n in nasty.CASES if n not in ("tiny_r_1e12_wide", "many_sensors")])
def test_log_likelihood_of_every_step(name, x64):
    case, ssm = model(name)
    found, (_, exact) = both(ssm, case["y"], case["u"]), nasty.truth(name, np.float64)
    scale = np.abs(exact["log_likelihoods"]).max(initial=1)
    np.testing.assert_allclose(found["log_likelihoods"], exact["log_likelihoods"], atol=1e-8 * scale)
    np.testing.assert_allclose(found["log_likelihood"], exact["log_likelihood"], rtol=1e-9)
    nothing = np.isnan(case["y"]).all(axis=1)
    assert (np.asarray(found["log_likelihoods"])[nothing] == 0).all()


@pytest.mark.parametrize(
    "name", ["ordinary", "missing_rows_and_entries", "inputs_offsets_gaps", "everything_varies_in_time"]
)
def test_the_two_oracles_agree(name):
    """Dense joint Gaussian and 110-digit recursion share no formula; where both are accurate they are equal."""

    class Model:
        time_varying = ()

    case = nasty.CASES[name]()
    for k in nasty.NAMES:
        setattr(Model, k, case["params"].get(k))
    Model.time_varying = case["params"].get("time_varying", ())
    exact, dense = nasty.exact(case), oracles.states(Model, case["y"], case["u"])
    np.testing.assert_allclose(
        oracles.log_likelihoods(Model, case["y"], case["u"]), exact["log_likelihoods"], atol=1e-12
    )
    for kind, prefix in {"predicted": "predicted_", "filtered": "", "smoothed": "smoothed_"}.items():
        np.testing.assert_allclose(dense[kind][0], exact[prefix + "mean"], atol=1e-11)
        np.testing.assert_allclose(dense[kind][1], exact[prefix + "cov"], atol=1e-11)
    np.testing.assert_allclose(dense["cross_cov"], exact["cross_cov"], atol=1e-11)


def test_cross_covariance_has_the_later_state_in_its_rows(x64):
    """Without data, Cov(z_2, z_1) = A P0: not symmetric, so a transpose shows."""
    A = np.array([[0.5, 0.4], [0.0, 0.3]])
    P0 = np.array([[2.0, 0.5], [0.5, 1.0]])
    ssm = LinearGaussianSSM.from_covariances(np.zeros(2), P0, A, np.eye(2), np.eye(2), np.eye(2))
    np.testing.assert_allclose(pssm.kalman_smoother(ssm, np.full((2, 2), np.nan)).cross_cov[0], A @ P0, atol=1e-14)


@pytest.mark.parametrize("name", ["missing_correlated_noise", "companion_ar3_exact_known_start_gap", "known_entries"])
def test_only_the_product_of_a_factor_matters(name, x64):
    """Signs, rotations and idle columns of `chol_P0`, `chol_Q`, `chol_R` change nothing."""
    case, ssm = model(name)
    rng = np.random.default_rng(0)

    def turned(x):
        q = np.linalg.qr(rng.normal(size=(x.shape[1], x.shape[1])))[0]
        return -x @ q

    other = ssm.replace(
        chol_P0=turned(ssm.chol_P0),
        chol_R=turned(ssm.chol_R),
        chol_Q=turned(np.concatenate([ssm.chol_Q, 0 * ssm.chol_Q], axis=1)),
    )
    one, two = both(ssm, case["y"], None), both(other, case["y"], None)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10 * max(1.0, np.abs(a).max()))


def test_last_smoothed_state_is_the_filtered_one(x64):
    case, ssm = model("missing_rows_and_entries")
    found = both(ssm, case["y"], None)
    for a, b in zip(found["smoothed"], found["filtered"], strict=True):
        np.testing.assert_allclose(a[-1], b[-1], rtol=1e-12, atol=1e-15)


def test_prediction_at_the_first_step_is_the_prior(x64):
    """`z_1 ~ N(m0, P0)` emits `y_1`: no transition, offset or input stands before it."""
    case, ssm = model("everything_varies_in_time")
    mean, cov = both(ssm, case["y"], case["u"])["predicted"]
    np.testing.assert_allclose(mean[0], ssm.m0, atol=0)
    np.testing.assert_allclose(cov[0], ssm.P0, atol=1e-14)


@pytest.mark.parametrize("field", ["A", "chol_Q", "b", "B", "C", "chol_R", "d", "D"])
def test_entry_t_of_a_time_varying_array_acts_at_time_t(field, x64):
    """Changing entry `t` moves the prediction of the state (or of `y`) from `t` on and nothing before; entry 0 of a
    transition array moves nothing at all.
    """
    case, ssm = model("everything_varies_in_time")
    before = filter_only(ssm, case["y"], case["u"])
    for t in (0, 2):
        changed = ssm.replace(**{field: getattr(ssm, field).at[t].add(0.3)})
        after = filter_only(changed, case["y"], case["u"])
        moved = np.abs(np.asarray(after.log_likelihoods - before.log_likelihoods)) > 0
        if t == 0 and field in ("A", "chol_Q", "b", "B"):
            assert not moved.any()
        else:
            assert not moved[:t].any()
            assert moved[t]


def test_most_likely_path_is_a_stationary_point_of_the_joint_density(x64):
    """d/dz log p(z, y) = 0, with the joint density written out from the model's definition."""
    case, ssm = model("inputs_offsets_gaps")
    u, y = case["u"], case["y"]
    ssm = ssm.replace(chol_Q=np.tril(np.random.default_rng(0).normal(size=(3, 3))) + 2 * np.eye(3))

    def log_joint(z):
        def quadratic(e, chol):
            return -0.5 * e @ jnp.linalg.solve(chol @ chol.T, e)

        total = quadratic(z[0] - ssm.m0, ssm.chol_P0)
        for t in range(len(y)):
            if t:
                total += quadratic(z[t] - ssm.A @ z[t - 1] - ssm.b - ssm.B @ u[t], ssm.chol_Q)
            o = np.flatnonzero(~np.isnan(y[t]))
            if len(o):
                e = y[t][o] - (ssm.C @ z[t] + ssm.d + ssm.D @ u[t])[o]
                total += quadratic(e, ssm.chol_R[o])
        return total

    path = pssm.most_likely_states(ssm, y, u)
    slope = jax.jit(jax.grad(log_joint))
    assert np.abs(slope(path)).max() < 1e-8
    assert np.abs(slope(pssm.kalman_filter(ssm, y, u).mean)).max() > 1e-2  # the filtered means are not it


def test_time_reversal_of_a_reversible_model(x64):
    """A stationary scalar chain read backwards is the same model: the smoother must be symmetric in time."""
    a, q, r = 0.8, 0.5, 0.3
    ssm = LinearGaussianSSM.from_covariances([0.0], [[q / (1 - a**2)]], [[a]], [[q]], [[1.0]], [[r]])
    y = np.random.default_rng(1).normal(size=30)
    y[[3, 4, 17]] = np.nan
    smooth = jax.jit(pssm.kalman_smoother)
    ahead, back = smooth(ssm, y[:, None]), smooth(ssm, y[::-1, None])
    np.testing.assert_allclose(ahead.mean, back.mean[::-1], atol=1e-13)
    np.testing.assert_allclose(ahead.cov, back.cov[::-1], atol=1e-13)
    np.testing.assert_allclose(ahead.log_likelihood, back.log_likelihood, rtol=1e-13)


def test_a_missing_row_is_a_longer_step(x64):
    """Dropping a row that is all NaN and using `A A`, `A Q A' + Q` for the step across it is the same model."""
    case, ssm = model("ordinary")
    y = case["y"].copy()
    y[7] = np.nan
    steps = len(y) - 1
    A = np.tile(ssm.A, (steps, 1, 1))
    Q = np.tile(ssm.Q, (steps, 1, 1))
    A[7], Q[7] = ssm.A @ ssm.A, ssm.A @ ssm.Q @ ssm.A.T + ssm.Q
    short = LinearGaussianSSM.from_covariances(ssm.m0, ssm.P0, A, Q, ssm.C, ssm.R, time_varying=("A", "Q"))
    smooth = jax.jit(pssm.kalman_smoother)
    whole, dropped = smooth(ssm, y), smooth(short, np.delete(y, 7, axis=0))
    np.testing.assert_allclose(whole.log_likelihood, dropped.log_likelihood, rtol=1e-13)
    np.testing.assert_allclose(np.delete(whole.mean, 7, axis=0), dropped.mean, atol=1e-13)


def test_order_of_the_observed_variables_does_not_matter(x64):
    case, ssm = model("missing_correlated_noise")
    order = np.array([2, 0, 3, 1])
    other = ssm.replace(C=ssm.C[order], chol_R=ssm.chol_R[order])
    one, two = both(ssm, case["y"], None), both(other, case["y"][:, order], None)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11 * max(1.0, np.abs(a).max()))


@pytest.mark.parametrize("share", ["data", "nothing"])
def test_vmap_is_a_loop(share, x64):
    case, ssm = model("missing_rows_and_entries")
    many = jax.tree.map(lambda x: jnp.stack([x, 0.9 * x, 1.1 * x]), ssm)
    ys = jnp.stack([case["y"], 2 * case["y"], -case["y"]])
    models, axis = many, 0
    data, data_axis = (case["y"], None) if share == "data" else (ys, 0)
    found = jax.jit(jax.vmap(lambda s, y: both(s, y, None), in_axes=(axis, data_axis)))(models, data)
    for i in range(3):
        own = jax.tree.map(lambda x, i=i: x[i], many)
        expected = both(own, case["y"] if share == "data" else ys[i], None)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-12 * max(1.0, np.abs(b).max()))


def test_integers_lists_and_a_flat_series_are_the_same_data():
    ssm = LinearGaussianSSM([0.0], [[3.0]], [[1.0]], [[1.0]], [[1.0]], [[2.0]])
    whole = pssm.kalman_smoother(ssm, np.array([[1.0], [2.0], [4.0]], np.float32))
    for y in ([1, 2, 4], [[1], [2], [4]], np.array([1, 2, 4]), np.array([1, 2, 4], np.int8), (1.0, 2.0, 4.0)):
        for a, b in zip(whole, pssm.kalman_smoother(ssm, y), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", ["auto", "parallel"])
@pytest.mark.parametrize("tiny", [0.0, 1e-17, -3e-16, 1e-15, 1e-12, 1e-8])
def test_noise_of_the_size_of_rounding_beside_a_companion(tiny, method, x64):
    """What EM makes of an autoregression: structure that holds up to the last digit."""
    y = np.random.default_rng(0).normal(size=(20, 1))
    for eps in (0.0, 1.3e-15):
        A, chol_Q = [[1.338, -0.5214], [1.0 + eps, -eps]], [[0.0, -0.82], [0.0, tiny]]
        ssm = pssm.LinearGaussianSSM(np.zeros(2), np.eye(2), A, chol_Q, [[1.0, 0.0]], [[0.45]])
        result, exact = pssm.kalman_smoother(ssm, y, method=method), oracles.states(ssm, y)
        np.testing.assert_allclose(result.mean, exact["smoothed"][0], atol=1e-12)
        np.testing.assert_allclose(result.cov, exact["smoothed"][1], atol=1e-12)
        np.testing.assert_allclose(result.cross_cov, exact["cross_cov"], atol=1e-12)
