"""Paths from particles where the noise is singular: against the exact smoother."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, HMCGibbs

import pssm
from pssm.distributions import StatePath
from pssm.infer import particle_gibbs

STEPS = 12
SYSTEMS = {
    "autoregression": ([[1.1, -0.4], [1.0, 0.0]], [[0.7], [0.0]], [[1.0, 0.0]]),  # in companion form
    "trend": ([[1.0, 1.0], [0.0, 0.9]], [[0.0], [0.4]], [[1.0, 0.0]]),  # the level has no noise of its own
    "square": ([[1.1, -0.4], [1.0, 0.0]], [[0.7, 0.0], [0.0, 0.0]], [[1.0, 0.0]]),
}


def system(name):
    A, chol_Q, C = SYSTEMS[name]
    return pssm.LinearGaussianSSM([0.3, 0.1], 0.8 * np.eye(2), A, chol_Q, C, [[0.6]])


def data(name):
    y = np.array(pssm.simulate(jax.random.key(1), system(name), STEPS)[1])
    y[5] = np.nan
    return y


@pytest.mark.parametrize("with_y", [False, True])
@pytest.mark.parametrize("name", ["autoregression", "trend"])
def test_smoothed_means_of_singular_systems(name, with_y):
    ssm, y = system(name), data(name)
    exact = pssm.kalman_smoother(ssm, y)
    sd = np.sqrt(np.diagonal(np.asarray(exact.cov), axis1=1, axis2=2))
    keys = jax.random.split(jax.random.key(0), 30)
    count = 150 if with_y else 600

    @jax.jit
    def draws(key):
        one, two = jax.random.split(key)
        found = pssm.particle_filter(one, ssm, y, num_particles=count)
        return pssm.particle_smoother(two, ssm, found, num_paths=50, y=y if with_y else None)

    paths = np.asarray(jax.lax.map(draws, keys))
    means = paths.mean(1)
    error = means.std(0, ddof=1) / np.sqrt(len(keys))
    apart = np.abs(means.mean(0) - np.asarray(exact.mean))
    assert (apart < 5 * error + 0.03 * sd).all()
    assert error.max() < 0.15 * sd.max()
    np.testing.assert_allclose(paths.std((0, 1)), sd, rtol=0.15 if with_y else 0.25)
    if name == "autoregression":  # on the set that the noise can reach
        np.testing.assert_allclose(paths[..., 1:, 1], paths[..., :-1, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "proposal"),
    [
        ("autoregression", "bootstrap"),
        ("autoregression", "guided"),
        ("trend", "bootstrap"),
        ("trend", "ekf"),
        pytest.param("square", "bootstrap", marks=pytest.mark.slow),
        pytest.param("square", "ekf", marks=pytest.mark.slow),
        pytest.param("square", "guided", marks=pytest.mark.slow),
    ],
)
def test_conditional_smc_keeps_the_posterior_of_singular_systems(name, proposal):
    ssm, y = system(name), data(name)
    exact = pssm.kalman_smoother(ssm, y)
    sd = np.sqrt(np.diagonal(np.asarray(exact.cov), axis1=1, axis2=2))
    if proposal == "guided":
        proposal = pssm.guides.guided_proposal(pssm.NonlinearSSM.from_linear(ssm), y)

    @jax.jit
    def sweeps(keys, path):
        def move(path, key):
            path = pssm.conditional_smc(key, ssm, y, path, num_particles=12, proposal=proposal)
            return path, path

        return jax.lax.scan(move, path, keys)[1]

    # Each chain starts at an exact draw, so that all of its states are exact draws.
    chains = 400
    starts = pssm.sample_states(jax.random.key(2), ssm, y, sample_shape=(chains,))
    keys = jax.vmap(lambda k: jax.random.split(k, 6))(jax.random.split(jax.random.key(3), chains))
    paths = np.asarray(jax.jit(jax.vmap(sweeps))(keys, starts))
    means = paths.mean(1)
    error = means.std(0, ddof=1) / np.sqrt(chains)
    assert (np.abs(means.mean(0) - np.asarray(exact.mean)) < 5 * error).all()
    np.testing.assert_allclose(paths.std((0, 1)), sd, rtol=0.1)
    assert (np.abs(paths[:, -1] - np.asarray(starts)).mean(0) > 0.1 * sd).all(), "paths move, at all times"


def test_traced_factors_choose_the_way():
    """Inside of a sampler a square factor may be singular or not."""
    y = data("square")

    @jax.jit
    def move(chol_Q, path):
        ssm = system("square").replace(chol_Q=chol_Q)
        return pssm.conditional_smc(jax.random.key(0), ssm, y, path, num_particles=10)

    for name in ("square", "regular"):
        ssm = system("square") if name == "square" else system("square").replace(chol_Q=0.5 * jnp.eye(2))
        path = pssm.simulate(jax.random.key(4), ssm, STEPS)[0]
        eager = pssm.conditional_smc(jax.random.key(0), ssm, y, path, num_particles=10)
        np.testing.assert_allclose(move(ssm.chol_Q, path), eager, atol=1e-5)


def test_a_reference_off_the_reachable_set_is_refused():
    ssm, y = system("autoregression"), data("autoregression")
    path = jnp.asarray(np.random.default_rng(0).normal(size=(STEPS, 2)))
    with pytest.raises(ValueError, match="`reference` is not a path that the noise can make"):
        pssm.conditional_smc(jax.random.key(0), ssm, y, path, num_particles=5)
    assert np.isnan(jax.jit(lambda p: pssm.conditional_smc(jax.random.key(0), ssm, y, p, num_particles=5))(path)).all()


def test_particle_gibbs_over_a_companion_form():
    y = data("autoregression")
    A, _, C = (jnp.asarray(x) for x in SYSTEMS["autoregression"])

    def factor(scale):
        return scale * jnp.array([[1.0], [0.0]])

    def model(y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        z = numpyro.sample("z", StatePath(jnp.zeros(2), jnp.eye(2), A, factor(scale), len(y)))
        pssm.observe("y", dist.Normal(z @ C.T, 0.6).to_event(2), y)

    def build(sites):
        return pssm.LinearGaussianSSM(jnp.zeros(2), jnp.eye(2), A, factor(sites["scale"]), C, 0.6 * jnp.eye(1))

    kernel = HMCGibbs(NUTS(model), particle_gibbs(build, y, num_particles=10), gibbs_sites=["z"])
    mcmc = MCMC(kernel, num_warmup=20, num_samples=30, progress_bar=False)
    mcmc.run(jax.random.key(0), y)
    draws = mcmc.get_samples()
    assert np.isfinite(draws["scale"]).all()
    assert draws["scale"].std() > 0
    np.testing.assert_allclose(draws["z"][:, 1:, 1], draws["z"][:, :-1, 0], atol=1e-4)
