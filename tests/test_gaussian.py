"""Gaussian filters: exact on linear models, textbook recursions on others, and the mode at convergence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from numpyro.infer.util import log_density
from scipy import stats

import pssm
from pssm import LinearGaussianSSM, NonlinearSSM, gaussian_filter, gaussian_smoother
from pssm.distributions import GaussianFilterMarginal, StatePath
from pssm.filters.linearize import cubature_points, gauss_hermite, hermite_points, unscented_points
from pssm.guides import guided_proposal, laplace_path

RULES = ("ekf", "ukf", "cubature", "gauss_hermite")
DT = 0.05


def pendulum(R=0.3):
    """Angle and velocity; the sine of the angle is seen."""

    def transition(z, u):
        return jnp.stack([z[0] + DT * z[1], z[1] - 9.8 * DT * jnp.sin(z[0])])

    q = np.linalg.cholesky([[DT**3 / 3, DT**2 / 2], [DT**2 / 2, DT]])
    emission = lambda z: dist.Normal(jnp.sin(z[:1]), R).to_event(1)  # noqa: E731
    return NonlinearSSM([1.5, 0.0], 0.3 * np.eye(2), transition, q, emission)


def swings(steps=60):
    z, y = pendulum().simulate(jax.random.key(4), steps)
    return z, y.at[jnp.array([5, 6, 40])].set(jnp.nan)


def textbook(y, points=None):
    """EKF or sigma-point filter of the pendulum with full covariances, in NumPy."""
    q = np.asarray(pendulum().chol_Q)
    Q, R = q @ q.T, np.array([[0.09]])
    f = lambda z: np.array([z[0] + DT * z[1], z[1] - 9.8 * DT * np.sin(z[0])])  # noqa: E731
    h = lambda z: np.sin(z[:1])  # noqa: E731
    F = lambda z: np.array([[1.0, DT], [-9.8 * DT * np.cos(z[0]), 1.0]])  # noqa: E731
    H = lambda z: np.array([[np.cos(z[0]), 0.0]])  # noqa: E731

    def moments(g, jac, m, P):
        if points is None:
            J = jac(m)
            return g(m), J @ P @ J.T, P @ J.T
        x, w = points
        z = m + x @ np.linalg.cholesky(P).T
        values = np.array([g(row) for row in z])
        mean = w @ values
        apart = values - mean
        return mean, (w[:, None] * apart).T @ apart, (w[:, None] * (z - m)).T @ apart

    m, P = np.array([1.5, 0.0]), 0.09 * np.eye(2)
    total, means, covs = 0.0, [], []
    for t in range(len(y)):
        if t:
            m, P, _ = moments(f, F, m, P)
            P = P + Q
        if not np.isnan(y[t]).any():
            mean, S, cross = moments(h, H, m, P)
            S = S + R
            e = y[t] - mean
            total += -0.5 * (np.log(2 * np.pi * S[0, 0]) + e[0] ** 2 / S[0, 0])
            K = cross / S
            m, P = m + K @ e, P - K @ S @ K.T
        means.append(m)
        covs.append(P)
    return total, np.array(means), np.array(covs)


@pytest.mark.parametrize(
    ("linearize", "iters"), [("ekf", 1), ("ekf", 3), ("ukf", 2), ("cubature", 1), ("gauss_hermite", 2)]
)
def test_on_a_linear_model_they_are_kalmans(linearize, iters, x64):
    rng = np.random.default_rng(0)
    ssm = LinearGaussianSSM(**oracles.random_model(rng, n=2, p=2, m=1, offsets=True))
    y, u = oracles.with_holes(rng, rng.normal(size=(9, 2))), rng.normal(size=(9, 1))
    options = dict(linearize=linearize, num_iters=iters)
    found = jax.jit(lambda: gaussian_filter(ssm, y, u, **options))()
    exact = pssm.kalman_filter(ssm, y, u)
    for name in ("log_likelihoods", "mean", "cov", "predicted_mean", "predicted_cov"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), atol=1e-10, err_msg=name)
    smoothed, exact = jax.jit(lambda: gaussian_smoother(ssm, y, u, **options))(), pssm.kalman_smoother(ssm, y, u)
    for name in ("log_likelihood", "mean", "cov", "cross_cov"):
        np.testing.assert_allclose(getattr(smoothed, name), getattr(exact, name), atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    ("linearize", "points"),
    [
        ("ekf", None),
        ("ukf", unscented_points(2)),
        ("cubature", cubature_points(2)),
        (gauss_hermite(3), hermite_points(2, 3)),
    ],
    ids=["ekf", "ukf", "cubature", "gauss_hermite"],
)
def test_on_the_pendulum_they_are_the_textbooks(linearize, points, x64):
    _, y = swings()
    total, means, covs = textbook(np.asarray(y), points)
    found = jax.jit(partial(gaussian_filter, pendulum(), linearize=linearize))(y)
    assert float(found.log_likelihood) == pytest.approx(total, abs=1e-9)
    np.testing.assert_allclose(found.mean, means, atol=1e-9)
    np.testing.assert_allclose(found.cov, covs, atol=1e-9)


@pytest.mark.parametrize("linearize", ["ekf", "ukf"])
def test_single_precision_is_close_to_the_textbook(linearize):
    with jax.enable_x64(True):
        y = np.asarray(swings()[1])
    total, means, covs = textbook(y, None if linearize == "ekf" else unscented_points(2))
    found = jax.jit(partial(gaussian_filter, pendulum(), linearize=linearize))(jnp.asarray(y, jnp.float32))
    assert found.mean.dtype == jnp.float32
    assert float(found.log_likelihood) == pytest.approx(total, abs=2e-3)
    np.testing.assert_allclose(found.mean, means, atol=2e-4)
    np.testing.assert_allclose(found.cov, covs, atol=2e-4)


def test_laplace_in_single_precision_is_that_in_double():
    counts = np.array([[1, 0, 2], [0, 1, 1], [np.nan, 2, 0], [3, 0, 1], [2, np.nan, 1]])
    found = []
    for wide in (False, True):
        with jax.enable_x64(wide):
            path = jax.jit(partial(laplace_path, spikes()))(jnp.asarray(counts, float))
            found.append([np.asarray(x) for x in (path.mean, path.cov, path.cross_cov, path.log_likelihood)])
    assert found[0][0].dtype == np.float32
    for narrow, wide in zip(*found, strict=True):
        np.testing.assert_allclose(narrow, wide, atol=5e-4)


@pytest.mark.parametrize("points", [unscented_points(3), cubature_points(3), hermite_points(3, 3)], ids=str)
def test_points_have_the_moments_of_a_normal(points):
    x, w = points
    assert w.min() > 0
    np.testing.assert_allclose(w.sum(), 1.0)
    np.testing.assert_allclose(w @ x, 0.0, atol=1e-12)
    np.testing.assert_allclose((w[:, None] * x).T @ x, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.einsum("i,ij,ik,il->jkl", w, x, x, x), 0.0, atol=1e-12)


def test_parameters_of_the_points_are_checked():
    with pytest.raises(ValueError, match="one positive weight"):
        unscented_points(2, alpha=1e-3)


def spikes():
    """Two states, three Poisson counts, one way of looking at them bent."""
    C = jnp.array([[1.0, 0.2], [0.3, -0.8], [0.5, 0.5]])

    def transition(z, u):
        return jnp.stack([0.9 * z[0] + 0.2 * jnp.tanh(z[1]), 0.8 * z[1] - 0.2 * jnp.sin(z[0])])

    return NonlinearSSM(
        jnp.zeros(2), jnp.eye(2), transition, 0.4 * jnp.eye(2), lambda z: dist.Poisson(jnp.exp(C @ z)).to_event(1)
    )


def test_iterated_smoothing_is_gauss_newton_and_ends_at_the_mode(x64):
    model = spikes()
    _, y = model.simulate(jax.random.key(1), 25)
    y = y.at[3].set(jnp.nan).at[10, 1].set(jnp.nan)
    smoothed = jax.jit(partial(gaussian_smoother, model, num_iters=40))(y)

    def joint(path):
        prior = StatePath.from_ssm(model, 25).log_prob(path)
        return prior + jnp.sum(jax.vmap(model.log_prob)(y, path))

    np.testing.assert_allclose(jax.jit(jax.grad(joint))(smoothed.mean), 0.0, atol=1e-7)
    laplace = jax.jit(partial(laplace_path, model))(y)
    for name in ("mean", "cov", "cross_cov", "log_likelihood"):
        np.testing.assert_allclose(getattr(laplace, name), getattr(smoothed, name), atol=1e-6, err_msg=name)


def test_laplace_of_a_linear_model_is_its_posterior(x64):
    rng = np.random.default_rng(2)
    q = oracles.random_model(rng, n=3, p=2, m=1, offsets=True, width=2)
    q["chol_P0"] = np.diag([1.0, 0.5, 2.0])
    ssm = LinearGaussianSSM(**q)
    y, u = oracles.with_holes(rng, rng.normal(size=(8, 2))), rng.normal(size=(8, 1))
    found, exact = jax.jit(lambda: laplace_path(ssm, y, u))(), pssm.kalman_smoother(ssm, y, u)
    for name in ("log_likelihood", "mean", "cov", "cross_cov"):
        np.testing.assert_allclose(getattr(found, name), getattr(exact, name), atol=1e-8, err_msg=name)


def test_a_start_chooses_among_modes(x64):
    """Only the square is seen: two modes, mirrored, and a saddle between them, which a search does not leave."""
    one = jnp.eye(1)
    square = pssm.NonlinearSSM(
        jnp.zeros(1), one, lambda z, u: 0.9 * z, 0.3 * one, lambda z: dist.Normal(z**2, 0.1).to_event(1)
    )
    y, ones = np.full(12, 1.0), np.ones((12, 1))
    above, below = (laplace_path(square, y, start=sign * ones) for sign in (1, -1))
    np.testing.assert_allclose(above.mean, 1.0, atol=0.1)
    np.testing.assert_allclose(below.mean, -above.mean, atol=1e-9)
    np.testing.assert_allclose(below.log_likelihood, above.log_likelihood, atol=1e-9)
    with pytest.raises(ValueError, match="saddle"):
        laplace_path(square, y, start=0 * ones)
    np.testing.assert_allclose(laplace_path(square, y).log_likelihood, above.log_likelihood, atol=1e-9)
    np.testing.assert_allclose(laplace_path(square, y).log_likelihood, above.log_likelihood, atol=1e-9)
    guided = guided_proposal(square, y, start=ones, num_rounds=0)
    np.testing.assert_allclose(guided.center, above.mean, atol=1e-5)
    for method in (laplace_path, guided_proposal):
        with pytest.raises(ValueError, match=r"`start` must have shape \(12, 1\)"):
            method(square, y, start=np.ones(12))
        with pytest.raises(ValueError, match="`start` must be finite"):
            method(square, y, start=np.nan * ones)


def logistic(x):
    return 1 / (1 + np.exp(-x))


CASES = {
    "poisson": (lambda z: dist.Poisson(jnp.exp(z)).to_event(1), lambda y, z: stats.poisson.logpmf(y, np.exp(z))),
    "bernoulli": (
        lambda z: dist.Bernoulli(logits=2 * z).to_event(1),
        lambda y, z: stats.bernoulli.logpmf(y, logistic(2 * z)),
    ),
    "binomial": (
        lambda z: dist.Binomial(20, logits=z - 1).to_event(1),
        lambda y, z: stats.binom.logpmf(y, 20, logistic(z - 1)),
    ),
    "categorical": (
        lambda z: dist.Categorical(logits=jnp.stack([z[0], -z[0], jnp.zeros(())])),
        lambda y, z: np.stack([z, -z, 0 * z])[int(y)] - np.log(np.exp(z) + np.exp(-z) + 1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_scalar_models_beside_a_fine_grid(name, x64):
    """Means within a fraction of a posterior sd and evidence within a nat: they are approximations, and good ones."""
    emission, log_density_at = CASES[name]
    model = NonlinearSSM([0.3], [[0.7]], lambda z, u: 0.9 * z + 0.1, [[0.3]], emission)
    _, y = model.simulate(jax.random.key(2), 40)
    y = y.at[7].set(jnp.nan)
    grid = np.linspace(-5, 6, 1500)
    first = stats.norm.logpdf(grid, 0.3, 0.7)
    kernel = stats.norm.logpdf(grid[:, None], 0.9 * grid + 0.1, 0.3)
    emitted = np.stack([0 * grid if np.isnan(v) else log_density_at(v, grid) for v in np.asarray(y[:, 0])])
    evidence, mean, sd = oracles.grid_posterior(grid, first, kernel, emitted)
    for method, apart in (
        (partial(gaussian_smoother, model, num_iters=8), 0.3),  # a mode, compared with means
        (partial(laplace_path, model), 0.3),
        (partial(gaussian_smoother, model, linearize="gauss_hermite", num_iters=3), 0.15),
    ):
        found = jax.jit(method)(y)
        error = (found.mean[:, 0] - mean) / sd
        assert np.sqrt(np.mean(error**2)) < apart
        assert abs(found.log_likelihood - evidence) < 1.0
    filtered = jax.jit(partial(gaussian_filter, model, num_iters=4))(y)
    assert abs(filtered.log_likelihood - evidence) < 1.0


def test_a_marginal_for_numpyro_scores_and_draws(x64):
    def model(y=None):
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        numpyro.sample("y", GaussianFilterMarginal(pendulum(sigma), 60, method="ukf"), obs=y)

    _, y = swings()

    def score(sigma):
        return log_density(model, (y,), {}, {"sigma": sigma})[0]

    value, slope = jax.jit(jax.value_and_grad(score))(0.3)
    step = 1e-5
    numeric = (jax.jit(score)(0.3 + step) - jax.jit(score)(0.3 - step)) / (2 * step)
    assert float(slope) == pytest.approx(float(numeric), rel=1e-5)
    want = gaussian_filter(pendulum(0.3), y, linearize="ukf").log_likelihood + dist.HalfNormal(1.0).log_prob(0.3)
    assert float(value) == pytest.approx(float(want), abs=1e-9)
    d = GaussianFilterMarginal(pendulum(), 60)
    assert d.sample(jax.random.key(0), (3,)).shape == (3, 60, 1)
    assert d.log_prob(jnp.stack([y, y])).shape == (2,)


def test_known_start_exact_observations_and_single_precision():
    model = NonlinearSSM(
        [1.0, 0.0],
        np.zeros((2, 2)),
        pendulum().transition,
        [[0.0], [0.1]],
        lambda z: dist.MultivariateNormal(z[:1], scale_tril=jnp.zeros((1, 1))),
    )
    y = jnp.array([1.0, 1.0, 0.97, jnp.nan, 0.9])[:, None]

    @jax.jit
    def run(m0):
        start = NonlinearSSM(m0, model.chol_P0, model.transition, model.chol_Q, model.emission)
        found = gaussian_filter(start, y, linearize="ukf")
        return found.log_likelihood, found.mean

    assert np.isfinite(run(model.m0)[0])
    np.testing.assert_allclose(run(model.m0)[1][2, 0], 0.97, atol=1e-6)
    assert np.isfinite(jax.grad(lambda m: run(m)[0])(model.m0)).all()


def test_the_program_does_not_grow_with_the_series():
    sizes = [
        len(str(jax.make_jaxpr(partial(gaussian_smoother, spikes(), num_iters=3))(jnp.ones((steps, 3)))))
        for steps in (600, 1200)
    ]
    assert sizes[1] < 1.02 * sizes[0]


def test_models_pass_through_jit_and_vmap(x64):
    models = [
        NonlinearSSM([0.0], [[1.0]], jax.tree_util.Partial(decay, jnp.asarray(a)), [[0.3]], normal) for a in (0.5, 0.9)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *models)
    y = jnp.array([[0.3], [0.2]])
    both = jax.jit(jax.vmap(lambda m: gaussian_filter(m, y).log_likelihood))(stacked)
    each = [gaussian_filter(m, y).log_likelihood for m in models]
    np.testing.assert_allclose(both, each, atol=1e-12)


def decay(a, z, u):
    return a * z


def normal(z):
    return dist.Normal(z, 0.5).to_event(1)


def test_inputs_reach_both_equations(x64):
    model = NonlinearSSM(
        [0.0], [[1.0]], lambda z, u: 0.9 * z + u, [[0.3]], lambda z, u: dist.Normal(z + 2 * u, 0.5).to_event(1)
    )
    one = np.eye(1)
    ssm = LinearGaussianSSM([0.0], one, 0.9 * one, 0.3 * one, one, 0.5 * one, B=one, D=2 * one)
    rng = np.random.default_rng(0)
    y, u = rng.normal(size=(7, 1)), rng.normal(size=7)
    want = pssm.kalman_filter(ssm, y, u).log_likelihood
    assert float(gaussian_filter(model, y, u).log_likelihood) == pytest.approx(float(want), abs=1e-10)
    z, _ = model.simulate(jax.random.key(0), 7, u[:, None])
    assert z.shape == (7, 1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: NonlinearSSM([0.0], [[1.0]], 3.0, [[1.0]], normal), TypeError, "`transition` must be a function"),
        (lambda: NonlinearSSM([0.0], np.eye(2), abs, [[1.0]], normal), ValueError, "`chol_P0`"),
        (lambda: NonlinearSSM([0.0], [[1.0]], abs, np.eye(2), normal), ValueError, "`chol_Q` must have shape"),
        (
            lambda: NonlinearSSM(np.zeros((2, 1)), [[1.0]], abs, [[1.0]], normal),
            ValueError,
            "`m0` must have shape",
        ),
        (lambda: gaussian_filter(pendulum(), np.ones((4, 2))), ValueError, r"`y` must have shape \(time, 1\)"),
        (lambda: gaussian_filter(pendulum(), np.ones((4, 1)), np.ones((3, 1))), ValueError, "`u` must have shape"),
        (lambda: gaussian_filter(pendulum(), np.ones(4), linearize="best"), ValueError, "`linearize` must be one of"),
        (lambda: gaussian_filter(pendulum(), np.ones(4), num_iters=0), ValueError, "`num_iters` must be at least 1"),
        (lambda: spikes().to_linear(np.zeros(2)), ValueError, "`to_linear` needs a normal emission"),
        (lambda: pendulum().to_linear(np.zeros((4, 3))), ValueError, "`about` must have shape"),
        (lambda: pendulum().to_linear(np.zeros((4, 2)), np.zeros((3, 1))), ValueError, "`u` must have shape"),
        (lambda: gaussian_filter("model", np.ones(4)), TypeError, "`model` must be a NonlinearSSM"),
    ],
)
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_linear_models_survive_the_way_there_and_back(x64):
    rng = np.random.default_rng(5)
    ssm = LinearGaussianSSM(**oracles.random_model(rng, n=2, p=2, m=1, offsets=True))
    y, u = oracles.with_holes(rng, rng.normal(size=(7, 2))), rng.normal(size=(7, 1))
    model = NonlinearSSM.from_linear(ssm)
    want = pssm.log_likelihood(ssm, y, u)
    about_one = model.to_linear(rng.normal(size=2), rng.normal(size=1))
    for name in ("A", "B", "b", "C", "D", "d", "R", "Q", "P0"):
        np.testing.assert_allclose(getattr(about_one, name), getattr(ssm, name), atol=1e-12, err_msg=name)
    about_path = model.to_linear(rng.normal(size=(7, 2)), u)
    assert float(pssm.log_likelihood(about_path, y)) == pytest.approx(float(want), abs=1e-10)


def test_linearised_about_the_mode_the_smoother_stays_there(x64):
    _, y = swings(20)
    path = jax.jit(partial(gaussian_smoother, pendulum(), num_iters=30))(y).mean
    again = pssm.kalman_smoother(pendulum().to_linear(path), y)
    np.testing.assert_allclose(again.mean, path, atol=1e-8)


def one_state(emission, m0=0.0, chol_P0=1.0, chol_Q=0.3):
    return NonlinearSSM([m0], [[chol_P0]], lambda z, u: 0.9 * z, [[chol_Q]], emission)


COUNTS = CASES["poisson"][0]


@pytest.mark.parametrize("linearize", ["ekf", "ukf"])
def test_extreme_counts_are_survived(linearize):
    """Steps are halved where a count is far from what was expected; later steps know no more of it."""
    y = jnp.array([0.0, 2.0, 1e5, jnp.nan, 1e6, 0.0, 0.0])[:, None]

    @jax.jit
    def run(sigma):
        found = gaussian_filter(one_state(COUNTS, chol_Q=sigma), y, linearize=linearize, num_iters=4)
        return found.log_likelihood, found

    (value, found), slope = jax.value_and_grad(run, has_aux=True)(0.3)
    assert np.isfinite(value)
    assert np.isfinite(slope)
    assert 3.0 < float(found.mean[2, 0]) < 13.0  # log 1e5 = 11.5
    assert np.isfinite(found.cov).all()
    smoothed = jax.jit(partial(gaussian_smoother, one_state(COUNTS), linearize=linearize))(y)
    assert np.isfinite(smoothed.mean).all()


@pytest.mark.parametrize("y", [[3.0], [jnp.nan]], ids=["seen", "missing"])
@pytest.mark.parametrize(("chol_P0", "chol_Q"), [(1.0, 0.3), (0.0, 0.0), (1e3, 0.0)])
def test_one_step_no_noise_and_wide_starts(y, chol_P0, chol_Q):
    model = one_state(COUNTS, chol_P0=chol_P0, chol_Q=chol_Q)
    for method in (gaussian_filter, gaussian_smoother, laplace_path):
        found = method(model, y)
        assert np.isfinite(found.log_likelihood), method
        assert np.isfinite(found.mean).all(), method


def test_a_start_that_overflows_is_an_error():
    with pytest.raises(ValueError, match="left the finite numbers at step 0"):
        gaussian_filter(one_state(COUNTS, m0=1e4), [1.0, 2.0])
    with pytest.raises(ValueError, match="left the finite numbers at step 1"):
        gaussian_filter(NonlinearSSM([2.0], [[1.0]], lambda z, u: jnp.exp(50 * z**2), [[1.0]], normal), [2.0, 1.0])
