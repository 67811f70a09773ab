"""The closed-form derivative of the log-likelihood against autodiff, a dense joint Gaussian and Fisher's identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from pssm import LinearGaussianSSM, kalman_smoother, log_likelihood

NAN = np.nan
STEPS = 5


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def dense_log_likelihood(ssm, y, u=None):
    """The joint Gaussian of all observed entries, built without a filter, in operations that JAX differentiates."""
    steps = y.shape[0]
    seen = ~np.isnan(np.asarray(y)).ravel()

    def field(name, t):
        x = getattr(ssm, name)
        return x[t] if name in ssm.time_varying else x

    def effect(offset, matrix, t):
        total = 0.0 if getattr(ssm, offset) is None else field(offset, t)
        return total if getattr(ssm, matrix) is None else total + field(matrix, t) @ u[t]

    # z = (means) + (loadings) e with e standard normal.
    width = ssm.n_state + (steps - 1) * ssm.chol_Q.shape[-1]
    mean, loading = ssm.m0, jnp.concatenate([ssm.chol_P0, jnp.zeros((ssm.n_state, width - ssm.n_state))], axis=1)
    means, loadings, noises = [], [], []
    for t in range(steps):
        if t:
            A, chol_Q = field("A", t), field("chol_Q", t)
            mean = A @ mean + effect("b", "B", t)
            start = ssm.n_state + (t - 1) * chol_Q.shape[-1]
            loading = (A @ loading).at[:, start : start + chol_Q.shape[-1]].add(chol_Q)
        means.append(field("C", t) @ mean + effect("d", "D", t))
        loadings.append(field("C", t) @ loading)
        noises.append(field("chol_R", t) @ field("chol_R", t).T)
    loading = jnp.concatenate(loadings)
    cov = loading @ loading.T + jax.scipy.linalg.block_diag(*noises)
    residual = jnp.where(seen, jnp.nan_to_num(jnp.ravel(y)), 0.0)[seen] - jnp.concatenate(means)[seen]
    cov = cov[np.ix_(seen, seen)]
    return -0.5 * (
        seen.sum() * np.log(2 * np.pi) + jnp.linalg.slogdet(cov)[1] + residual @ jnp.linalg.solve(cov, residual)
    )


def case(name):
    """A model, a series and inputs, in float64, from a fixed seed."""
    rng = np.random.default_rng(4)
    n, p, q, m, steps = 3, 2, 3, 2, STEPS
    if name == "one state":
        n, p, q = 1, 1, 1
    if name in ("singular Q", "autoregression"):
        q = 1
    if name == "more observations than states":
        n, p, q = 1, 3, 1
    timed = ("A", "chol_Q", "C", "chol_R", "b", "d", "B", "D") if name == "time-varying" else ()

    def draw(field, *shape):
        return rng.normal(size=(*((steps,) if field in timed else ()), *shape))

    fields = {
        "m0": draw("m0", n),
        "chol_P0": draw("chol_P0", n, n),
        "A": 0.5 * draw("A", n, n),
        "chol_Q": draw("chol_Q", n, q),
        "C": draw("C", p, n),
        "chol_R": draw("chol_R", p, p),
    }
    if name in ("inputs", "time-varying"):
        fields |= {"b": draw("b", n), "d": draw("d", p), "B": draw("B", n, m), "D": draw("D", p, m)}
    if name == "R = 0":
        fields["chol_R"] = np.zeros((p, p))
    if name == "singular R":
        fields["chol_R"] = np.array([[0.7, 0.0], [0.0, 0.0]])
    if name == "P0 = 0":
        fields["chol_P0"] = np.zeros((n, n))
    if name == "autoregression":
        p = 1
        fields["A"] = np.array([[0.5, -0.2, 0.1], [1, 0, 0], [0, 1, 0]])
        fields["chol_Q"] = np.array([[0.8], [0.0], [0.0]])
        fields |= {"C": np.array([[1.0, 0, 0]]), "chol_R": np.zeros((1, 1))}
    y = rng.normal(size=(steps, p))
    u = rng.normal(size=(steps, m)) if "B" in fields else None
    if name != "complete":
        y[1, 0] = y[3] = NAN
    ssm = LinearGaussianSSM(**fields, time_varying=timed)
    return ssm, jnp.asarray(y), None if u is None else jnp.asarray(u)


CASES = (
    "complete",
    "missing",
    "one state",
    "more observations than states",
    "inputs",
    "time-varying",
    "singular Q",
    "R = 0",
    "singular R",
    "P0 = 0",
    "autoregression",
)
value_and_score = jax.jit(jax.value_and_grad(log_likelihood))


def dense_value_and_score(ssm, y, u=None):
    return jax.jit(lambda s: jax.value_and_grad(dense_log_likelihood)(s, y, u))(ssm)


def assert_trees_close(found, expected, rtol, atol):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, x in jax.tree_util.tree_leaves_with_path(found):
        other = dict(jax.tree_util.tree_leaves_with_path(expected))[path]
        np.testing.assert_allclose(x, other, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", CASES)
def test_score_is_that_of_the_dense_joint(name):
    ssm, y, u = case(name)
    value, score = value_and_score(ssm, y, u)
    expected, expected_score = dense_value_and_score(ssm, y, u)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    assert_trees_close(score, expected_score, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["missing", "time-varying", "singular Q", "R = 0"])
def test_score_is_that_of_the_differentiated_recursion(name):
    ssm, y, u = case(name)
    recursion = jax.jit(jax.value_and_grad(lambda *args: log_likelihood(*args, method="square_root")))
    value, score = recursion(ssm, y, u)
    np.testing.assert_allclose(value, value_and_score(ssm, y, u)[0], rtol=1e-12)
    assert_trees_close(value_and_score(ssm, y, u)[1], score, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["missing", "time-varying", "R = 0"])
def test_the_gradient_that_keeps_little_is_the_same(name):
    """Five steps in pieces of three: the last piece is not full."""
    ssm, y, u = case(name)
    low = jax.jit(jax.value_and_grad(lambda *args: log_likelihood(*args, method="low_memory")))
    value, score = low(ssm, y, u)
    expected, expected_score = value_and_score(ssm, y, u)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert_trees_close(score, expected_score, rtol=1e-8, atol=1e-8)


def test_the_gradient_that_keeps_little_does_so():
    ssm = case("complete")[0]

    def kept(method):
        gradient = jax.jit(jax.grad(lambda s, y: log_likelihood(s, y, method=method)))
        return gradient.lower(ssm, jnp.zeros((40_000, 2))).compile().memory_analysis().temp_size_in_bytes

    assert kept("low_memory") < kept("sequential") / 20


@pytest.mark.parametrize("name", ["inputs", "singular Q", "R = 0"])
def test_score_against_finite_differences(name):
    """In one random direction through all parameters, differences of the dense value itself."""
    ssm, y, u = case(name)
    flat, unravel = ravel_pytree(ssm)
    direction = np.random.default_rng(0).normal(size=flat.shape)
    step = 1e-5
    plus, minus = (float(dense_log_likelihood(unravel(flat + sign * step * direction), y, u)) for sign in (1, -1))
    score = ravel_pytree(value_and_score(ssm, y, u)[1])[0]
    np.testing.assert_allclose(score @ direction, (plus - minus) / (2 * step), rtol=1e-6)


def test_derivatives_by_observations_and_inputs():
    ssm, y, u = case("inputs")
    found = jax.jit(jax.grad(log_likelihood, (1, 2)))(ssm, y, u)
    expected_u = jax.grad(lambda x: dense_log_likelihood(ssm, y, x))(u)
    np.testing.assert_allclose(found[1], expected_u, rtol=1e-9, atol=1e-10)
    complete = jnp.nan_to_num(y)
    expected_y = jax.grad(lambda x: log_likelihood(ssm, jnp.where(jnp.isnan(y), NAN, x), u, method="square_root"))(
        complete
    )
    np.testing.assert_allclose(found[0], expected_y, rtol=1e-9, atol=1e-10)
    np.testing.assert_array_equal(np.asarray(found[0])[np.isnan(y)], 0.0)


@pytest.mark.parametrize("name", ["one state", pytest.param("inputs", marks=pytest.mark.slow)])
def test_hessian(name):
    ssm, y, u = case(name)
    flat, unravel = ravel_pytree(ssm)

    def curvature(fn):
        return jax.jit(jax.hessian(lambda x: fn(unravel(x), y, u)))(flat)

    expected = curvature(dense_log_likelihood)
    np.testing.assert_allclose(curvature(log_likelihood), expected, rtol=1e-7, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["time-varying", "R = 0"])
def test_forward_mode_equals_reverse_mode(name):
    ssm, y, u = case(name)
    flat, unravel = ravel_pytree(ssm)
    forward = jax.jit(jax.jacfwd(lambda x: log_likelihood(unravel(x), y, u)))(flat)
    np.testing.assert_allclose(forward, ravel_pytree(value_and_score(ssm, y, u)[1])[0], rtol=1e-10, atol=1e-12)


def test_jvp_through_a_parameter():
    ssm, y, u = case("singular Q")

    def along(s):
        return log_likelihood(ssm.replace(chol_Q=s * ssm.chol_Q), y, u)

    value, slope = jax.jit(lambda s: jax.jvp(along, (s,), (1.0,)))(1.3)
    step = 1e-6
    dense = [float(dense_log_likelihood(ssm.replace(chol_Q=s * ssm.chol_Q), y, u)) for s in (1.3 + step, 1.3 - step)]
    np.testing.assert_allclose(slope, (dense[0] - dense[1]) / (2 * step), rtol=1e-6)
    np.testing.assert_allclose(value, np.mean(dense), rtol=1e-8)


def test_vmap_over_series_and_over_models():
    ssm, y, u = case("missing")
    series = jnp.stack([y, y[::-1], jnp.full_like(y, NAN)])
    over_series = jax.jit(jax.vmap(jax.grad(log_likelihood), (None, 0)))(ssm, series)
    scales = jnp.array([0.5, 1.0, 2.0])
    models = jax.vmap(lambda s: jax.tree.map(lambda x: s * x, ssm))(scales)
    over_models = jax.jit(jax.vmap(jax.grad(log_likelihood), (0, None)))(models, y)
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], over_series)
        assert_trees_close(one, value_and_score(ssm, series[i])[1], rtol=1e-9, atol=1e-10)
        model = jax.tree.map(lambda x, i=i: x[i], models)
        one = jax.tree.map(lambda x, i=i: x[i], over_models)
        assert_trees_close(one, value_and_score(model, y)[1], rtol=1e-9, atol=1e-10)
    assert all((np.asarray(x[2]) == 0).all() for x in jax.tree.leaves(over_series))


def test_batch_axes_of_one_field():
    """A batch of transitions and one of everything else: the shared fields' derivatives add up over the batch."""
    ssm, y, u = case("missing")
    several = ssm.A[None] * jnp.array([0.5, 1.0])[:, None, None]
    batched = jax.jit(jax.grad(lambda s: log_likelihood(s, y).sum()))(ssm.replace(A=several))
    each = [value_and_score(ssm.replace(A=A), y)[1] for A in several]
    np.testing.assert_allclose(batched.A, jnp.stack([s.A for s in each]), rtol=1e-10)
    np.testing.assert_allclose(batched.C, each[0].C + each[1].C, rtol=1e-10)


@pytest.mark.parametrize("name", ["inputs", "P0 = 0", "autoregression"])
def test_float32(name):
    ssm, y, u = case(name)
    expected = value_and_score(ssm, y, u)[1]
    with jax.enable_x64(False):
        small = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), (ssm, y, u))
        value, score = jax.value_and_grad(log_likelihood)(*small)
    assert value.dtype == jnp.float32
    for x, exact in zip(jax.tree.leaves(score), jax.tree.leaves(expected), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, exact, rtol=1e-3, atol=1e-4 * max(np.abs(exact).max(), 1))


def test_fishers_identity():
    """The score is the expected score of the complete data under the smoother: for m0, A, b, B, C, d and D."""
    ssm, y, u = case("inputs")
    y = jnp.where(jnp.isnan(y).any(1, keepdims=True), NAN, y)  # whole rows missing: the complete-data score is simple
    score = value_and_score(ssm, y, u)[1]
    mean, cov, cross = (np.asarray(x) for x in (lambda s: (s.mean, s.cov, s.cross_cov))(kalman_smoother(ssm, y, u)))
    second = cov + mean[:, :, None] * mean[:, None, :]
    lagged = cross + mean[1:, :, None] * mean[:-1, None, :]
    weight_q, weight_r = np.linalg.inv(ssm.Q), np.linalg.inv(ssm.R)

    shift = np.asarray(ssm.b) + np.asarray(u)[1:] @ np.asarray(ssm.B).T
    residual = mean[1:] - mean[:-1] @ np.asarray(ssm.A).T - shift
    by_a = lagged - np.asarray(ssm.A) @ second[:-1] - shift[:, :, None] * mean[:-1, None, :]
    np.testing.assert_allclose(score.A, weight_q @ by_a.sum(0), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(score.b, weight_q @ residual.sum(0), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(score.B, weight_q @ residual.T @ u[1:], rtol=1e-8, atol=1e-8)

    rows = np.flatnonzero(~np.isnan(y).any(1))
    seen_mean, seen_second, seen_u = mean[rows], second[rows], np.asarray(u)[rows]
    left = np.asarray(y)[rows] - np.asarray(ssm.d) - seen_u @ np.asarray(ssm.D).T
    by_c = left.T @ seen_mean - ssm.C @ seen_second.sum(0)
    errors = left - seen_mean @ ssm.C.T
    np.testing.assert_allclose(score.C, weight_r @ by_c, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(score.d, weight_r @ errors.sum(0), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(score.D, weight_r @ errors.T @ seen_u, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(score.m0, np.linalg.solve(ssm.P0, mean[0] - ssm.m0), rtol=1e-8, atol=1e-8)


def test_single_step():
    ssm, y, _ = case("missing")
    value, score = value_and_score(ssm, y[:1])
    expected, expected_score = dense_value_and_score(ssm, y[:1])
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    assert_trees_close(score, expected_score, rtol=1e-9, atol=1e-9)
