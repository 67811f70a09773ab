"""Variational potentials: against Kalman, grids, dense Gaussians and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import oracles
import pytest

from pssm import LinearGaussianSSM, kalman_smoother, log_likelihood
from pssm.distributions import LowRankChain, StatePath
from pssm.modes import mode_potentials, variational_fit, variational_potentials

T = 40


def gaussian(y, C, sd):
    """The log-likelihood of `y = C z + noise` with gaps, of paths with any axes in front."""

    def log_lik(z):
        terms = dist.Normal(z @ C.T, sd).log_prob(jnp.where(jnp.isnan(y), 0.0, y))
        return jnp.where(jnp.isnan(y), 0.0, terms).sum((-2, -1))

    return log_lik


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_linear_gaussian_is_exact_after_one_step_from_anywhere(x64, dtype):
    """Two series in a batch, one noise column, gaps, inputs, a time-varying transition."""
    rng = np.random.default_rng(0)
    A = np.array([[1.0, 0.4], [0.0, 0.9]]) + 0.05 * rng.normal(size=(T, 2, 2))
    u, B, C = rng.normal(size=(T, 1)), np.array([[0.3], [0.1]]), np.array([[1.0, 0.0], [0.5, 1.0]])
    y = rng.normal(size=(2, T, 2)).cumsum(1)
    y[0, 5:9], y[1, 20, 1] = np.nan, np.nan
    arrays = [np.zeros(2), np.diag([1.0, 0.0]), A, np.array([[0.2], [0.5]]), C, 0.7 * np.eye(2)]

    def model(dtype):
        arrays_ = [jnp.asarray(x, dtype) for x in arrays]
        return LinearGaussianSSM(*arrays_, B=jnp.asarray(B, dtype), time_varying=("A",))

    def fit(y, u):
        prior = StatePath.from_ssm(model(dtype), T, u)
        log_lik = gaussian(y, jnp.asarray(C, dtype), 0.7)
        start = jnp.ones((2, T, 2), dtype), jnp.broadcast_to(jnp.eye(2, dtype=dtype), (2, T, 2, 2))
        one = variational_fit(prior, log_lik, start=start, num_iters=1)
        return one, variational_fit(prior, log_lik, start=start, num_iters=1, line_search=False)

    fits = jax.jit(fit)(jnp.asarray(y, dtype), jnp.asarray(u, dtype))
    exact = model(jnp.float64)
    tolerance = 1e-8 if dtype == jnp.float64 else 2e-3
    for i in range(2):
        evidence = log_likelihood(exact, jnp.asarray(y[i]), jnp.asarray(u))
        states = kalman_smoother(exact, jnp.asarray(y[i]), jnp.asarray(u))
        for found in fits:
            np.testing.assert_allclose(found.bound[i], evidence, atol=tolerance)
            np.testing.assert_allclose(found.mean[i], states.mean, atol=tolerance)
            np.testing.assert_allclose(found.cov[i], states.cov, atol=tolerance)


def walk(steps, a, q, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    z = np.zeros(steps)
    for t in range(steps):
        z[t] = (a * z[t - 1] if t else 0.0) + q * rng.normal()
    return z, rng


def scalar_case(name, steps):
    """Prior arguments `(P0 sd, a, q)`, the emission of a state, data and a grid."""
    if name == "volatility":
        z, rng = walk(steps, 0.97, 0.2, 1)
        return (0.8, 0.97, 0.2), lambda z: dist.Normal(0.0, jnp.exp(z / 2)), rng.normal(size=steps) * np.exp(z / 2), 5
    if name == "student":
        z, rng = walk(steps, 1.0, 0.3, 2)
        return (2.0, 1.0, 0.3), lambda z: dist.StudentT(3.0, z, 1.0), z + rng.standard_t(3, size=steps), 14
    if name == "poisson":
        z, rng = walk(steps, 0.95, 0.3, 3)
        return (0.96, 0.95, 0.3), lambda z: dist.Poisson(0.2 * jnp.exp(z)), rng.poisson(0.2 * np.exp(z)) * 1.0, 7
    if name == "binomial":
        z, rng = walk(steps, 0.98, 0.15, 4)
        p = 1 / (1 + np.exp(3 - z))
        return (0.75, 0.98, 0.15), lambda z: dist.Binomial(50, logits=z - 3), rng.binomial(50, p) * 1.0, 5
    if name == "laplace":
        z, rng = walk(steps, 0.9, 0.5, 5)
        return (1.0, 0.9, 0.5), lambda z: dist.Laplace(z, 0.7), z + rng.laplace(size=steps) * 0.7, 8
    raise KeyError(name)


def grid_truth(arguments, emission, y, reach, points=1001):
    P0, a, q = arguments
    grid = np.linspace(-reach, reach, points)

    def normal(x, sd):
        return -0.5 * (x / sd) ** 2 - np.log(sd * np.sqrt(2 * np.pi))

    table = np.asarray(jax.vmap(lambda g: emission(jnp.full(len(y), g)).log_prob(y))(jnp.asarray(grid))).T
    return oracles.grid_posterior(grid, normal(grid, P0), normal(grid[:, None] - a * grid, q), table)


def scalar_fit(arguments, emission, y, **options):
    P0, a, q = arguments
    prior = StatePath(jnp.zeros(1), P0 * jnp.eye(1), a * jnp.eye(1), q * jnp.eye(1), len(y))
    return variational_fit(prior, lambda z: emission(z[..., 0]).log_prob(y).sum(-1), **options)


def check_scalar(name, steps, gap, means, ratios):
    arguments, emission, y, reach = scalar_case(name, steps)
    found = jax.jit(lambda y: scalar_fit(arguments, emission, y))(jnp.asarray(y))
    evidence, mean, sd = grid_truth(arguments, emission, jnp.asarray(y), reach)
    assert -gap < found.bound - evidence < 0
    assert np.sqrt(np.mean(((found.mean[:, 0] - mean) / sd) ** 2)) < means
    assert abs(np.median(np.sqrt(found.cov[:, 0, 0]) / sd) - 1) < ratios
    return found


@pytest.mark.parametrize("name", ["volatility", "student"])
def test_short_series_are_as_close_as_a_gaussian_can_be(x64, name):
    found = check_scalar(name, 60, 0.05, 0.01, 0.025)
    assert found.slack < 1e-4


@pytest.mark.parametrize(
    ("name", "steps"), [("volatility", 500), ("student", 200), ("poisson", 200), ("binomial", 500)]
)
def test_full_series_in_eight_steps(x64, name, steps):
    """No training: the bound is within a quarter nat, means within .01 sd, sds within 2.5 %."""
    check_scalar(name, steps, 0.25, 0.01, 0.025)


def test_a_kink_has_its_curvature_from_the_gradient(x64):
    """The second derivative of a Laplace density is zero wherever it exists."""
    check_scalar("laplace", 60, 1.5, 0.15, 0.1)


def test_student_sites_are_negative_where_an_outlier_is(x64):
    arguments, emission, y, _ = scalar_case("student", 60)
    y[30] += 12.0
    found = jax.jit(lambda y: scalar_fit(arguments, emission, y))(jnp.asarray(y))
    chain = LowRankChain.from_potential(
        StatePath(jnp.zeros(1), 2.0 * jnp.eye(1), jnp.eye(1), 0.3 * jnp.eye(1), 60), found.potential
    )
    assert np.isfinite(chain.entropy())
    assert found.slack < 1e-4
    y[-1] += 12.0
    found = jax.jit(lambda y: scalar_fit(arguments, emission, y))(jnp.asarray(y))
    assert found.potential.diagonal[-1, 0] < 0


def test_derivatives_are_those_of_the_converged_bound(x64):
    """Also inside of `vmap`, and without a line search from stored moments."""
    _, emission, y, _ = scalar_case("volatility", T)
    y = jnp.asarray(y)

    def bound(theta, **options):
        return scalar_fit((0.8, jnp.tanh(theta[0]), jnp.exp(theta[1])), emission, y, **options)

    theta = jnp.array([2.0, -1.5])
    fit = jax.jit(lambda t: bound(t, num_iters=30, tolerance=1e-13))
    moments = fit(theta)[2:4]
    fixed = jax.jit(jax.value_and_grad(lambda t: bound(t, start=moments, num_iters=6, line_search=False).bound))
    slopes = jax.jit(jax.grad(lambda t: bound(t, num_iters=30, tolerance=1e-13).bound))(theta)
    step = 1e-4 * jnp.eye(2)
    differences = [(fit(theta + s).bound - fit(theta - s).bound) / 2e-4 for s in step]
    np.testing.assert_allclose(slopes, differences, rtol=1e-4)
    value, gradient = fixed(theta + 0.02)
    np.testing.assert_allclose(value, fit(theta + 0.02).bound, atol=1e-5)
    other = [(fit(theta + 0.02 + s).bound - fit(theta + 0.02 - s).bound) / 2e-4 for s in step]
    np.testing.assert_allclose(gradient, other, rtol=2e-3)
    many = jax.jit(jax.vmap(jax.grad(lambda t: bound(t, start=moments, num_iters=6, line_search=False).bound)))
    np.testing.assert_allclose(many(theta + jnp.array([[0.02], [0.0]]))[0], gradient, rtol=1e-8)


def oscillator(z, u):
    x, v = z
    return jnp.stack([x + 0.1 * v, v + 0.1 * (1.5 * (1 - jnp.tanh(x / 3) ** 2 * 9) * v - x)])


def test_a_nonlinear_transition_rises_above_the_mode(x64):
    """The bound is sampled, so a real one: below an estimate of the evidence by weights of the chain's draws."""
    rng = np.random.default_rng(0)
    C = jnp.asarray(rng.normal(size=(4, 2)))
    prior = StatePath(jnp.array([1.0, 0.0]), 0.3 * jnp.eye(2), oscillator, 0.1 * jnp.eye(2), 30)
    truth = prior.sample(jax.random.key(0))
    y = dist.Poisson(jnp.exp(0.4 * truth @ C.T)).sample(jax.random.key(1))

    def log_lik(z):
        return dist.Poisson(jnp.exp(0.4 * z @ C.T)).log_prob(y).sum((-2, -1))

    @jax.jit
    def run():
        found = variational_fit(prior, log_lik)
        at_mode = mode_potentials(prior, log_lik, rank=2)
        out = []
        for p in (found.potential, at_mode):
            z, kl = LowRankChain.from_potential(prior, p).sample_with_kl(jax.random.key(2), (2000,))
            weights = log_lik(z) - LowRankChain.from_potential(prior, p).log_ratio(z)
            out.append((jnp.mean(log_lik(z) - kl), jax.nn.logsumexp(weights) - jnp.log(2000.0)))
        return found, out

    found, ((own, evidence), (mode, _)) = run()
    assert 0 < abs(found.bound - own) < 5 * found.error
    assert mode - 0.02 < own < evidence < own + 0.2
    assert found.slack < 0.01


def test_series_that_share_a_term(x64):
    """A Gaussian sum over two series: the best product has the exact means, and each series' own block of curvature."""
    steps, rng = 12, np.random.default_rng(0)
    y = rng.normal(size=steps)
    prior = StatePath(jnp.zeros((2, 1)), jnp.eye(1), 0.8 * jnp.eye(1), 0.5 * jnp.eye(1), steps)

    def log_lik(z):
        return dist.Normal(z[..., 0].sum(-2, keepdims=True), 0.6).log_prob(y).sum(-1)

    found = jax.jit(lambda: variational_fit(prior, log_lik, num_iters=40, tolerance=1e-10))()
    eye = jnp.eye(2)
    joint = LinearGaussianSSM(jnp.zeros(2), eye, 0.8 * eye, 0.5 * eye, jnp.ones((1, 2)), 0.6 * jnp.eye(1))
    exact = kalman_smoother(joint, jnp.asarray(y)[:, None])
    np.testing.assert_allclose(found.mean[..., 0].T, exact.mean, atol=2e-3)
    assert found.bound.shape == (1,)
    assert found.bound[0] < log_likelihood(joint, jnp.asarray(y)[:, None])


def test_the_forms_of_a_guide_keep_the_means(x64):
    rng = np.random.default_rng(0)
    prior = StatePath(
        jnp.zeros(3), jnp.eye(3), 0.7 * jnp.eye(3), jnp.asarray(0.4 * np.tril(rng.normal(size=(3, 3)))), 8
    )
    y = rng.normal(size=(8, 3))
    log_lik = lambda z: dist.StudentT(3.0, z, 0.5).log_prob(y).sum((-2, -1))  # noqa: E731

    @jax.jit
    def run():
        fit = variational_fit(prior, log_lik)
        again = variational_fit(prior, log_lik, start=fit.potential, num_iters=3)
        forms = [
            variational_potentials(prior, log_lik, rank=r, diagonal=d) for r, d in ((3, True), (1, True), (3, False))
        ]
        return fit, again.bound, [LowRankChain.from_potential(prior, p).mean for p in forms]

    fit, again, means = run()
    assert again >= fit.bound - 1e-6
    for mean in means:
        np.testing.assert_allclose(mean, fit.mean, atol=2e-2)
    np.testing.assert_allclose(means[0], fit.mean, atol=1e-8)


def test_large_states_are_refused(x64):
    prior = StatePath(jnp.zeros(65), jnp.eye(65), jnp.eye(65), jnp.eye(65), 2)
    with pytest.raises(ValueError, match="`prior` must have at most 64 states"):
        variational_fit(prior, lambda z: -(z**2).sum((-2, -1)))
