"""Filter, smoother, forecast and sampling against the dense joint Gaussian, on models of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM, datasets

NILE = dict(A=[[1.0]], Q=[[1469.1]], C=[[1.0]], R=[[15099.0]])
STEPS = 7
TIMED = ("A", "chol_Q", "C", "chol_R", "b", "d", "B", "D")
# name: (kwargs of random_model, edits of the arrays)
KINDS = {
    "plain": dict(),
    "inputs": dict(m=2, offsets=True),
    "time-varying": dict(m=2, offsets=True, timed=TIMED),
    "singular Q": dict(n=4, p=1, width=1),
    "more observations than states": dict(n=2, p=5),
    "one state": dict(n=1, p=1),
    "larger than the unrolled kernels": dict(n=8, p=6, timed=("A",)),
    "known start": dict(n=3, p=2, edit={"chol_P0": 0.0}),
    "deterministic states": dict(n=3, p=2, edit={"chol_Q": 0.0}),
}


def build(kind, seed, dtype=np.float64):
    options = dict(KINDS[kind])
    edit = options.pop("edit", {})
    rng = np.random.default_rng(seed)
    q = oracles.random_model(rng, steps=STEPS, **options)
    q |= {name: factor * q[name] for name, factor in edit.items()}
    ssm = LinearGaussianSSM(**{k: v if k == "time_varying" else v.astype(dtype) for k, v in q.items()})
    u = rng.normal(size=(STEPS, options["m"])).astype(dtype) if "m" in options else None
    y = oracles.with_holes(rng, 2 * rng.normal(size=(STEPS, ssm.n_obs))).astype(dtype)
    return ssm, y, u


def everything(ssm, y, u):
    f, s = pssm.kalman_filter(ssm, y, u), pssm.kalman_smoother(ssm, y, u)
    return {
        "log_likelihoods": f.log_likelihoods,
        "filtered": (f.mean, f.cov),
        "predicted": (f.predicted_mean, f.predicted_cov),
        "smoothed": (s.mean, s.cov),
        "cross_cov": s.cross_cov,
        "log_likelihood": (f.log_likelihood, pssm.log_likelihood(ssm, y, u), s.log_likelihood),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_equals_dense_joint_gaussian(kind, x64):
    """23 random models of each of 9 kinds, one compiled program per kind; 1e-10."""
    cases = [build(kind, seed) for seed in range(23)]
    tolerance = 1e-9 if kind == "deterministic states" else 1e-10  # there the oracle itself is ill-conditioned
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *cases)
    found = jax.jit(jax.vmap(everything, in_axes=(0, 0, 0 if cases[0][2] is not None else None)))(*stacked)
    for i, (ssm, y, u) in enumerate(cases):
        own = jax.tree.map(lambda x, i=i: np.asarray(x[i]), found)
        expected = oracles.states(ssm, y, u)
        for name in ("filtered", "predicted", "smoothed"):
            for a, b in zip(own[name], expected[name], strict=True):
                np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()), err_msg=f"{name}, case {i}")
        np.testing.assert_allclose(own["cross_cov"], expected["cross_cov"], atol=tolerance, err_msg=f"case {i}")
        lls = oracles.log_likelihoods(ssm, y, u)
        np.testing.assert_allclose(own["log_likelihoods"], lls, atol=1e-10 * max(1, np.abs(lls).max()))
        for value in own["log_likelihood"]:
            np.testing.assert_allclose(value, lls.sum(), rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind):
    """The same quantities in single precision, to 1e-4 of their scale."""
    ssm, y, u = build(kind, 3, np.float32)
    found = jax.jit(everything)(ssm, y, u)
    expected = oracles.states(ssm, y, u)
    for name in ("filtered", "predicted", "smoothed"):
        for a, b in zip(found[name], expected[name], strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4 * max(1, np.abs(b).max()))
    np.testing.assert_allclose(found["log_likelihood"][1], oracles.log_likelihood(ssm, y, u), rtol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "inputs", "singular Q", "larger than the unrolled kernels"])
@pytest.mark.parametrize("method", ["sequential", "square_root"])
def test_gradient_equals_finite_differences_of_the_oracle(kind, method, x64):
    ssm, y, u = build(kind, 1)
    gradient = jax.jit(jax.grad(lambda s: pssm.log_likelihood(s, y, u, method=method)))(ssm)
    rng = np.random.default_rng(0)
    for name in ("m0", "chol_P0", "A", "chol_Q", "C", "chol_R", "b", "B", "d", "D"):
        x = getattr(ssm, name)
        if x is None:
            continue
        direction, h = rng.normal(size=x.shape), 1e-5
        up, down = (oracles.log_likelihood(ssm.replace(**{name: x + s * h * direction}), y, u) for s in (1, -1))
        np.testing.assert_allclose(np.vdot(getattr(gradient, name), direction), (up - down) / (2 * h), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_autoregression_exact_observation_known_start_missing(dtype):
    """AR(3), companion form, R = 0, P0 = 0: finite values and gradients, equal to the dense oracle."""
    with jax.enable_x64(dtype == np.float64):
        phi = [0.5, -0.3, 0.2]
        q = dict(
            m0=np.array([0.3, -0.2, 0.1]),
            chol_P0=np.zeros((3, 3)),
            A=np.array([phi, [1, 0, 0], [0, 1, 0]]),
            chol_Q=np.array([[0.7], [0], [0]]),
            C=np.array([[1.0, 0, 0]]),
            chol_R=np.zeros((1, 1)),
        )
        y = np.random.default_rng(0).normal(size=(40, 1))
        y[0] = 0.3  # what is known already: no density, and no harm
        y[[4, 5, 11, 12, 13, 30]] = np.nan
        ssm = LinearGaussianSSM(**{k: v.astype(dtype) for k, v in q.items()})
        y = y.astype(dtype)
        value, gradient = jax.value_and_grad(pssm.log_likelihood)(ssm, y)
        tolerance = 1e-10 if dtype == np.float64 else 1e-5
        np.testing.assert_allclose(value, oracles.log_likelihood(ssm, y), rtol=tolerance)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
        np.testing.assert_allclose(gradient.chol_Q[0, 0], _slope(ssm, y), rtol=1e-6 if dtype == np.float64 else 1e-3)
        found, expected = pssm.kalman_smoother(ssm, y), oracles.states(ssm, y)["smoothed"]
        np.testing.assert_allclose(found.mean, expected[0], atol=1e-9 if dtype == np.float64 else 1e-4)
        np.testing.assert_allclose(found.cov, expected[1], atol=1e-9 if dtype == np.float64 else 1e-4)


def _slope(ssm, y, h=1e-5):
    ssm = ssm.astype(np.float64) if jax.config.jax_enable_x64 else ssm
    q, _ = oracles.parameters(ssm)
    values = []
    for sign in (1, -1):
        moved = q["chol_Q"] + sign * h * np.array([[1.0], [0], [0]])

        class Moved:
            time_varying = ()

        for name in oracles.ARRAYS:
            setattr(Moved, name, moved if name == "chol_Q" else q[name])
        values.append(oracles.log_likelihood(Moved, y))
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize(("P0", "expected"), [(1e7, -641.5856), (1e6, -640.9898)])
@pytest.mark.parametrize("wide", [False, True])
def test_nile(P0, expected, wide):
    """Published with statsmodels' conventions: local level, variances 15099 and 1469.1."""
    with jax.enable_x64(wide):
        ssm = LinearGaussianSSM.from_covariances([0.0], [[P0]], **NILE)
        found = pssm.log_likelihood(ssm, datasets.load("nile").y)
        np.testing.assert_allclose(found, expected, atol=5e-5 if wide else 2e-3)


def test_matches_statsmodels(x64):
    """An implementation by other people: values on data with gaps."""
    kalman = pytest.importorskip("statsmodels.tsa.statespace.kalman_filter")
    ssm, y, _ = build("plain", 11)
    kf = kalman.KalmanFilter(k_endog=2, k_states=3)
    kf["design"], kf["transition"], kf["selection"] = np.asarray(ssm.C), np.asarray(ssm.A), np.eye(3)
    kf["state_cov"], kf["obs_cov"] = np.asarray(ssm.Q), np.asarray(ssm.R)
    kf.initialize_known(np.asarray(ssm.m0), np.asarray(ssm.P0))
    kf.bind(np.ascontiguousarray(y))
    np.testing.assert_allclose(pssm.log_likelihood(ssm, y), kf.loglike(), rtol=1e-9)


def test_missing_entries_are_not_counted(x64):
    """The constant log(2 pi) counts observed entries only; a series with nothing in it has likelihood one."""
    ssm, y, _ = build("plain", 2)
    nothing = np.full_like(y, np.nan)
    assert float(pssm.log_likelihood(ssm, nothing)) == 0.0
    one = nothing.copy()
    one[0, 0] = 0.4
    first = ssm.C[0] @ ssm.P0 @ ssm.C[0] + ssm.R[0, 0]
    expected = -0.5 * (np.log(2 * np.pi * first) + (0.4 - ssm.C[0] @ ssm.m0) ** 2 / first)
    np.testing.assert_allclose(pssm.log_likelihood(ssm, one), expected, rtol=1e-12)


def test_first_entry_of_transition_arrays_is_unused(x64):
    ssm, y, u = build("time-varying", 4)
    changed = ssm.replace(**{k: getattr(ssm, k).at[0].set(17.0) for k in ("A", "chol_Q", "b", "B")})
    assert float(pssm.log_likelihood(ssm, y, u)) == float(pssm.log_likelihood(changed, y, u))
    gradient = jax.grad(pssm.log_likelihood)(ssm, y, u)
    assert all(not getattr(gradient, k)[0].any() for k in ("A", "chol_Q", "b", "B"))


@pytest.mark.parametrize("c", [1e-9, 1e-6, 1e6, 1e9])
@pytest.mark.parametrize("wide", [False, True])
def test_change_of_units(c, wide):
    """Measuring everything in units of 1/c shifts the log-likelihood by exactly -(observed entries) log c."""
    with jax.enable_x64(wide):
        ssm, y, _ = build("plain", 5, np.float64 if wide else np.float32)
        scaled = ssm.replace(m0=c * ssm.m0, chol_P0=c * ssm.chol_P0, chol_Q=c * ssm.chol_Q, chol_R=c * ssm.chol_R)
        shift = pssm.log_likelihood(scaled, (c * y).astype(y.dtype)) - pssm.log_likelihood(ssm, y)
        np.testing.assert_allclose(shift, -np.isfinite(y).sum() * np.log(c), rtol=1e-12 if wide else 2e-6)


def test_forecast(x64):
    """Against the joint of past and future; the first row is a full transition away."""
    ssm, y, _ = build("plain", 6)
    for a, b in zip(pssm.forecast(ssm, y, 4), oracles.forecast(ssm, y, 4), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)
    last = pssm.kalman_filter(ssm, y).cov[-1]
    expected = ssm.A @ last @ ssm.A.T + ssm.Q
    np.testing.assert_allclose(pssm.forecast(ssm, y, 1).state_cov[0], expected, rtol=1e-12)


def test_forecast_with_inputs_and_time_variation(x64):
    ssm, y, u = build("time-varying", 7)
    past = 4
    found = pssm.forecast(ssm, y[:past], STEPS - past, u[:past], u[past:])
    for a, b in zip(found, oracles.forecast(ssm, y[:past], STEPS - past, u), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)


def test_simulate_has_the_joint_moments(x64, key):
    ssm, _, u = build("inputs", 8)
    z, y = jax.jit(jax.vmap(lambda k: pssm.simulate(k, ssm, STEPS, u)))(jax.random.split(key, 20_000))
    j = oracles.joint(ssm, STEPS, u)
    draws = np.concatenate([z.reshape(len(z), -1), y.reshape(len(y), -1)], axis=1)
    sd = np.sqrt(np.diag(j.cov))
    np.testing.assert_allclose((draws.mean(0) - j.mean) / sd, 0, atol=5 / np.sqrt(len(draws)))
    np.testing.assert_allclose((np.cov(draws.T) - j.cov) / np.outer(sd, sd), 0, atol=7 / np.sqrt(len(draws)))


@pytest.mark.parametrize("kind", ["plain", "singular Q"])
def test_sampled_paths_have_the_smoothed_moments(kind, x64, key):
    ssm, y, u = build(kind, 9)
    paths = np.asarray(pssm.sample_states(key, ssm, y, u, sample_shape=(20_000,)))
    j = oracles.joint(ssm, STEPS, u)
    all_z = np.concatenate([j.z(t) for t in range(STEPS)])
    mean, cov = oracles.condition(j, all_z, *oracles.seen(j, y, STEPS))
    flat = paths.reshape(len(paths), -1)
    sd = np.sqrt(np.maximum(np.diag(cov), 1e-12))
    np.testing.assert_allclose((flat.mean(0) - mean) / sd, 0, atol=5 / np.sqrt(len(flat)))
    np.testing.assert_allclose((np.cov(flat.T) - cov) / np.outer(sd, sd), 0, atol=7 / np.sqrt(len(flat)))


def test_most_likely_states_maximise_the_joint_density(x64):
    ssm, y, _ = build("plain", 10)
    np.testing.assert_allclose(pssm.most_likely_states(ssm, y), oracles.states(ssm, y)["smoothed"][0], atol=1e-10)


def test_batches(x64):
    """Leading axes of the model, the data or both are a batch; every function gives what one-by-one gives."""
    ssm, y, _ = build("plain", 12)
    many = ssm.replace(A=jnp.stack([ssm.A, 0.5 * ssm.A]))
    ys = jnp.stack([y, 2 * y, 3 * y])[:, None]
    found = pssm.log_likelihood(many, ys)
    assert found.shape == (3, 2)
    expected = [[pssm.log_likelihood(ssm.replace(A=a), row[0]) for a in many.A] for row in ys]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert pssm.kalman_smoother(many, ys).mean.shape == (3, 2, STEPS, 3)
    assert pssm.sample_states(jax.random.key(0), many, ys, sample_shape=(5,)).shape == (5, 3, 2, STEPS, 3)
    assert pssm.forecast(many, ys, 4).cov.shape == (3, 2, 4, 2, 2)
    assert pssm.simulate(jax.random.key(0), many, 6)[1].shape == (2, 6, 2)


@pytest.mark.parametrize("steps", [1, 2])
def test_short_series(steps, x64):
    ssm, y, _ = build("plain", 13)
    y = y[:steps]
    np.testing.assert_allclose(pssm.log_likelihood(ssm, y), oracles.log_likelihood(ssm, y), rtol=1e-11)
    assert pssm.kalman_smoother(ssm, y).cross_cov.shape == (steps - 1, 3, 3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(pssm.log_likelihood)(ssm, y)))


def test_lists_and_integers_are_welcome():
    ssm = LinearGaussianSSM([0], [[3]], [[1]], [[1]], [[1]], [[2]])
    found = pssm.log_likelihood(ssm, [1, 2, float("nan"), 4])
    np.testing.assert_allclose(found, oracles.log_likelihood(ssm, [[1], [2], [np.nan], [4]]), rtol=1e-5)
    assert pssm.log_likelihood(ssm, np.array([1, 2, 3])).dtype == jnp.float32


def _equations(jaxpr):
    """Equations of a program, those of its inner programs included."""
    total = 0
    for eqn in jaxpr.eqns:
        total += 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += _equations(inner)
    return total


FUNCTIONS = {
    "log_likelihood": pssm.log_likelihood,
    "gradient": jax.grad(pssm.log_likelihood),
    "filter": pssm.kalman_filter,
    "smoother": pssm.kalman_smoother,
    "sample": lambda ssm, y: pssm.sample_states(jax.random.key(0), ssm, y),
    "forecast": lambda ssm, y: pssm.forecast(ssm, y, 5),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_program_does_not_grow_with_the_series(name):
    ssm = LinearGaussianSSM(**oracles.random_model(np.random.default_rng(0)))
    sizes = [_equations(jax.make_jaxpr(FUNCTIONS[name])(ssm, np.zeros((steps, 2))).jaxpr) for steps in (600, 1200)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("R", "u", "Q", "x0", "value"),
    [
        (28351.5675, 0.0, 0.0, 919.35, -654.5157),
        (22213.595, -2.692106, 0.0, 1054.935, -642.31591),
        (15065.6121, 0.0, 1425.0030, 1111.6338, -637.7631),
        (15585.278, -3.248793, 1088.987, 1124.044, -637.302692),
    ],
)
def test_marss(R, u, Q, x0, value, x64):
    """The Nile in MARSS's manual: the state is fixed at time 0, and one transition stands before the first reading."""
    model = LinearGaussianSSM.from_covariances([x0 + u], [[Q]], [[1.0]], [[Q]], [[1.0]], [[R]], b=[u])
    np.testing.assert_allclose(pssm.log_likelihood(model, datasets.load("nile").y), value, atol=1e-4)
