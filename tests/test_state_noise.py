"""Noise of the transition that depends on the state: against loops, quadrature on a grid, and constant noise."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from scipy.stats import multivariate_normal, norm

import pssm
from pssm.distributions import GaussianFilterMarginal, NonCenteredPath, StatePath

ONE = np.eye(1)
Y = np.array([0.4, 1.3, np.nan, -0.7, 0.2, 0.9])[:, None]
U = np.linspace(0.5, 1.5, 6)[:, None]


def shape(z, u):
    """A full factor of two columns that varies with the state and the input."""
    return jnp.array([[0.5, 0.0], [0.2, 0.4]]) * (1 + 0.3 * jnp.abs(z[0])) * (1.0 if u is None else u[0])


def turn(z, u):
    return jnp.array([[0.8, 0.2], [-0.1, 0.7]]) @ z + (0.0 if u is None else 0.1 * u[0])


def scalar(emission=lambda z: dist.Normal(z, 0.5).to_event(1), noise=lambda z, u: 0.3 * jnp.sqrt(1 + z**2)[:, None]):
    return pssm.NonlinearSSM(0.2 * jnp.ones(1), 0.7 * ONE, lambda z, u: 0.9 * z, noise, emission)


def by_grid(y, half=8.0, points=1601):
    """Evidence and smoothed means and variances of `scalar()` by sums over a grid."""
    x = np.linspace(-half, half, points)
    K = norm.pdf(x[:, None], 0.9 * x, 0.3 * np.sqrt(1 + x**2)) * (x[1] - x[0])  # (to, from)
    likelihood = [np.ones(points) if np.isnan(v) else norm.pdf(v, x, 0.5) for v in y[:, 0]]
    forward, total = norm.pdf(x, 0.2, 0.7) * (x[1] - x[0]), 0.0
    alphas = []
    for t, p in enumerate(likelihood):
        forward = (K @ forward if t else forward) * p
        total += np.log(forward.sum())
        forward = forward / forward.sum()
        alphas.append(forward)
    backward, moments = np.ones(points), []
    for t in reversed(range(len(y))):
        weights = alphas[t] * backward
        weights = weights / weights.sum()
        mean = weights @ x
        moments.append((mean, weights @ (x - mean) ** 2))
        backward = K.T @ (likelihood[t] * backward)
        backward = backward / backward.max()
    means, variances = np.array(moments[::-1]).T
    return total, means, variances


@pytest.mark.parametrize("inputs", [None, U], ids=["plain", "inputs"])
def test_density_and_draws_of_a_path(inputs, x64):
    path = StatePath(jnp.ones(2), 0.6 * jnp.eye(2), turn, shape, 6, inputs)
    z = np.asarray(path.sample(jax.random.key(0)))
    total = multivariate_normal.logpdf(z[0], np.ones(2), 0.36 * np.eye(2))
    for t in range(1, 6):
        u = None if inputs is None else jnp.asarray(inputs[t])
        L = np.asarray(shape(jnp.asarray(z[t - 1]), u))
        total += multivariate_normal.logpdf(z[t], np.asarray(turn(jnp.asarray(z[t - 1]), u)), L @ L.T)
    assert float(jax.jit(path.log_prob)(z)) == pytest.approx(total, abs=1e-9)
    noise = jax.random.normal(jax.random.key(1), (path.noise_size,))
    made = np.asarray(path.path_from_noise(noise))
    here = 1.0 + 0.6 * noise[:2]
    for t in range(1, 6):
        np.testing.assert_allclose(made[t - 1], here, atol=1e-10)
        u = None if inputs is None else jnp.asarray(inputs[t])
        here = turn(here, u) + shape(here, u) @ noise[2 * t : 2 * t + 2]
    leaves, structure = jax.tree.flatten(path)
    again = jax.tree.unflatten(structure, leaves)
    assert again.has_state_noise
    np.testing.assert_allclose(again.log_prob(z), total, atol=1e-9)
    batch = StatePath(jnp.ones((3, 2)), 0.6 * jnp.eye(2), turn, shape, 6, inputs)
    np.testing.assert_allclose(batch.log_prob(z), 3 * [total], atol=1e-9)
    np.testing.assert_array_equal(path.continued(jax.random.key(2), z[:4])[:4], z[:4])
    slope = jax.grad(path.log_prob)(jnp.asarray(z))
    assert np.isfinite(slope).all()


def test_a_matrix_with_a_noise_that_takes_inputs(x64):
    path = StatePath(jnp.zeros(1), ONE, 0.5 * ONE, lambda z, u: u[:, None] * (1 + z[0] ** 2), 4, U[:4])
    z = np.asarray(path.sample(jax.random.key(0)))
    sds = U[1:4, 0] * (1 + z[:-1, 0] ** 2)
    want = norm.logpdf(z[0, 0]) + norm.logpdf(z[1:, 0], 0.5 * z[:-1, 0], sds).sum()
    assert float(path.log_prob(z)) == pytest.approx(want, abs=1e-9)


def test_draws_of_the_model_are_those_of_its_path():
    model = scalar()
    z, y = jax.vmap(lambda k: model.simulate(k, 5))(jax.random.split(jax.random.key(0), 4000))
    path = StatePath.from_ssm(model, 5).sample(jax.random.key(1), (4000,))
    np.testing.assert_allclose(z.std(0), path.std(0), rtol=0.1)
    assert y.shape == (4000, 5, 1)


@pytest.mark.parametrize("proposal", ["bootstrap", "ekf", "ukf"])
def test_particles_against_a_grid(proposal):
    total, means, variances = by_grid(Y)
    keys = jax.random.split(jax.random.key(0), 20)

    @jax.jit
    def run(key):
        one, two = jax.random.split(key)
        found = pssm.particle_filter(one, scalar(), Y, num_particles=300, proposal=proposal)
        return found.log_likelihood, pssm.particle_smoother(two, scalar(), found, num_paths=100)

    values, paths = jax.lax.map(run, keys)
    estimates = np.exp(np.asarray(values) - total)
    assert estimates.mean() == pytest.approx(1.0, abs=5 * estimates.std() / np.sqrt(20) + 1e-3)
    paths = np.asarray(paths)[..., 0]
    error = paths.mean(1).std(0) / np.sqrt(20)
    assert (np.abs(paths.mean((0, 1)) - means) < 5 * error).all()
    np.testing.assert_allclose(paths.var((0, 1)), variances, rtol=0.15)


@pytest.mark.parametrize("noise", ["regular", "singular"])
def test_conditional_smc_against_a_grid(noise):
    """The second noise has a column too few for its rows: two states, of which the second copies the first."""
    _, means, variances = by_grid(Y)
    model = scalar()
    if noise == "singular":
        model = pssm.NonlinearSSM(
            jnp.array([0.2, 0.0]),
            jnp.diag(jnp.array([0.7, 0.0])),
            lambda z, u: jnp.stack([0.9 * z[0], z[0]]),
            lambda z, u: jnp.stack([0.3 * jnp.sqrt(1 + z[0] ** 2), 0.0])[:, None],
            lambda z: dist.Normal(z[:1], 0.5).to_event(1),
        )

    def sweeps(key):
        start, *keys = jax.random.split(key, 13)
        path = model.simulate(start, 6)[0]

        def move(path, key):
            path = pssm.conditional_smc(key, model, Y, path, num_particles=20)
            return path, path

        return jax.lax.scan(move, path, jnp.stack(keys))[1][4:]

    paths = np.asarray(jax.jit(jax.vmap(sweeps))(jax.random.split(jax.random.key(0), 300)))[..., 0]
    error = paths.mean(1).std(0) / np.sqrt(300)
    assert (np.abs(paths.mean((0, 1)) - means) < 5 * error).all()
    np.testing.assert_allclose(paths.var((0, 1)), variances, rtol=0.1)


@pytest.mark.parametrize("rule", ["ekf", "ukf", "gauss_hermite"])
def test_a_constant_function_is_a_constant(rule, x64):
    held = scalar(noise=0.4 * ONE)
    given = scalar(noise=lambda z, u: 0.4 * ONE)
    for function in (pssm.gaussian_filter, pssm.gaussian_smoother):
        one, two = (function(m, Y, linearize=rule) for m in (held, given))
        np.testing.assert_allclose(one.mean, two.mean, atol=1e-10)
        np.testing.assert_allclose(one.cov, two.cov, atol=1e-10)
        assert float(one.log_likelihood) == pytest.approx(float(two.log_likelihood), abs=1e-10)


def test_the_filter_takes_the_expected_covariance(x64):
    """One step without data: `0.81 P + E[Q]`, with `Q(z) = 0.09 (1 + z^2)`; the EKF takes the noise at the mean."""
    y = np.full((2, 1), np.nan)
    for rule in ("ukf", "gauss_hermite"):
        found = pssm.gaussian_filter(scalar(), y, linearize=rule)
        want = 0.81 * 0.49 + 0.09 * (1 + 0.49 + 0.04)
        assert float(found.predicted_cov[1, 0, 0]) == pytest.approx(want, abs=1e-10)
    found = pssm.gaussian_filter(scalar(), y, linearize="ekf")
    assert float(found.predicted_cov[1, 0, 0]) == pytest.approx(0.81 * 0.49 + 0.09 * 1.04, abs=1e-10)
    total = by_grid(Y)[0]
    for rule, nats in (("ekf", 0.2), ("ukf", 0.1)):
        marginal = GaussianFilterMarginal(scalar(), 6, linearize=rule)
        assert float(marginal.log_prob(jnp.asarray(Y))) == pytest.approx(total, abs=nats)


@pytest.mark.parametrize("centred", [True, False])
def test_nuts_against_a_grid(centred):
    def model(y=None):
        z = numpyro.sample("z", StatePath.from_ssm(scalar(), 6))
        pssm.observe("y", dist.Normal(z, 0.5).to_event(2), obs=y)

    _, means, variances = by_grid(Y)
    run = model if centred else numpyro.handlers.reparam(model, config={"z": NonCenteredPath()})
    mcmc = MCMC(NUTS(run), num_warmup=300, num_samples=1500, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    z = np.asarray(mcmc.get_samples()["z"])[..., 0]
    np.testing.assert_allclose(z.mean(0), means, atol=0.12)
    np.testing.assert_allclose(z.std(0), np.sqrt(variances), rtol=0.15)


def test_a_forecast_goes_on_with_the_noise_of_its_state():
    def model(y=None, num_steps=None):
        z = numpyro.sample("z", StatePath.from_ssm(scalar(), len(y) if y is not None else num_steps))
        pssm.observe("y", dist.Normal(z, 0.5).to_event(2), obs=y)

    mcmc = MCMC(NUTS(model), num_warmup=100, num_samples=200, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    found = pssm.infer.forecast(mcmc, 2)
    assert np.isfinite(np.asarray(found.draws)).all()


def test_methods_that_need_a_constant_noise_say_so():
    model = scalar(lambda z: dist.Poisson(jnp.exp(z)).to_event(1))
    y = np.array([1.0, 0.0, 2.0])[:, None]
    words = "`chol_Q` is a function of the state, and this method needs a constant noise. With a function work: `simul"
    prior, k = StatePath.from_ssm(model, 3), jnp.zeros((3, 1))

    def poisson(y):
        z = numpyro.sample("z", prior)
        pssm.observe("y", dist.Poisson(jnp.exp(z)).to_event(2), obs=y)

    for run in (
        lambda: pssm.guides.laplace_path(model, y),
        lambda: pssm.guides.guided_proposal(model, y),
        lambda: pssm.particle_filter(jax.random.key(0), model, y, num_particles=5, proposal="guided"),
        lambda: scalar().to_linear(jnp.zeros(1)),
        lambda: pssm.distributions.LowRankChain(prior, k, k[..., None]).sample(jax.random.key(0)),
        lambda: pssm.guides.AutoStateSpace(poisson, rank=1, potentials="mode")(y),
    ):
        with pytest.raises(ValueError, match=words), numpyro.handlers.seed(rng_seed=0):
            run()
    methods = pssm.infer.check_model(poisson, y).methods
    assert "function of the state" in methods["svi:chain"]
    assert "function of the state" in methods["nuts:transport"]
    assert not methods["nuts:states"]


def test_bad_noise_functions_are_named():
    for noise, error, words in (
        (lambda z: z, TypeError, "`chol_Q` must be a function of"),
        (lambda z, u: z, ValueError, r"`chol_Q` must return a factor of shape \(1, noise\)"),
    ):
        with pytest.raises(error, match=words):
            StatePath(jnp.zeros(1), ONE, ONE, noise, 3)
        with pytest.raises(error, match=words):
            scalar(noise=noise).simulate(jax.random.key(0), 3)
    with pytest.raises(ValueError, match="drop it from `time_varying`"):
        StatePath(jnp.zeros(1), ONE, ONE, lambda z, u: ONE, 3, time_varying=("chol_Q",))
