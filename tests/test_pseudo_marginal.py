"""Particle marginal Metropolis-Hastings beside a grid over the parameter, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, init_to_value

import pssm
from pssm.distributions import StatePath, observe
from pssm.infer import PseudoMarginal

ONE = jnp.eye(1)


def data(steps=20):
    rng = np.random.default_rng(0)
    y = (np.cumsum(0.6 * rng.normal(size=steps)) + 0.5 * rng.normal(size=steps))[:, None]
    y[3] = np.nan
    return y


def level(y):
    """A whole model, path and observations too: the kernel leaves them out."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.deterministic("variance", scale**2)
    z = numpyro.sample("z", StatePath(jnp.zeros(1), ONE, ONE, scale * ONE, len(y)))
    numpyro.deterministic("last", z[-1])
    observe("y", dist.Normal(z, 0.5).to_event(2), y)


def build(sites):
    noise = jnp.sqrt(sites["variance"]) * ONE
    return pssm.LinearGaussianSSM(jnp.zeros(1), ONE, ONE, noise, ONE, 0.5 * ONE)


def test_a_short_run_keeps_its_estimates_and_leaves_the_path_out():
    y = data()
    kernel = PseudoMarginal(level, build, y, num_particles=30, target_accept_prob=0.4)
    mcmc = MCMC(kernel, num_warmup=40, num_samples=60, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.run(jax.random.key(0), y, extra_fields=("log_likelihood", "accept_prob", "scale"))
    draws, extra = mcmc.get_samples(group_by_chain=True), mcmc.get_extra_fields(group_by_chain=True)
    assert set(draws) == {"scale", "variance", "last"}
    assert draws["scale"].shape == (2, 60)
    assert np.isnan(draws["last"]).all()  # the path is not there
    np.testing.assert_allclose(draws["variance"], draws["scale"] ** 2, rtol=1e-5)
    stayed = np.diff(draws["scale"], axis=1) == 0
    assert 0 < stayed.sum() < stayed.size
    np.testing.assert_array_equal(stayed, np.diff(extra["log_likelihood"], axis=1) == 0)  # kept, not estimated again
    assert np.ptp(extra["scale"], axis=1).max() == 0  # no adaptation after warm-up
    assert np.isfinite(extra["log_likelihood"]).all()


def test_guided_on_a_linear_model_the_estimate_is_exact(x64):
    y = data(8)
    kernel = PseudoMarginal(level, build, y, num_particles=3, proposal="guided")
    found = jax.jit(kernel.log_likelihood)(jax.random.key(0), {"variance": jnp.asarray(0.3)})
    want = pssm.log_likelihood(build({"variance": 0.3}), y)
    assert float(found) == pytest.approx(float(want), abs=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["bootstrap", "guided"])
def test_against_a_grid(proposal):
    y = data()
    grid = np.linspace(0.01, 3, 300)
    value = jax.jit(jax.vmap(lambda s: pssm.log_likelihood(build({"variance": s**2}), y)))(jnp.asarray(grid))
    log_density = np.asarray(value) - 0.5 * grid**2
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    mean = weights @ grid
    sd = np.sqrt(weights @ (grid - mean) ** 2)
    kernel = PseudoMarginal(level, build, y, num_particles=30 if proposal == "bootstrap" else 3, proposal=proposal)
    mcmc = MCMC(kernel, num_warmup=500, num_samples=10_000, progress_bar=False)
    mcmc.run(jax.random.key(1), y)
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["scale"])
    size = float(numpyro.diagnostics.effective_sample_size(draws))
    assert size > 300
    assert draws.mean() == pytest.approx(mean, abs=4.5 * sd / np.sqrt(size))
    assert draws.std() == pytest.approx(sd, rel=4.5 / np.sqrt(size))


def run(kernel, *args):
    MCMC(kernel, num_warmup=1, num_samples=1, progress_bar=False).run(jax.random.key(0), *args)


def test_bad_arguments_are_named():
    y = data(4)
    with pytest.raises(ValueError, match="`proposal` must be one of"):
        PseudoMarginal(level, build, y, num_particles=3, proposal="best")
    with pytest.raises(ValueError, match="`target_accept_prob` must be between"):
        PseudoMarginal(level, build, y, num_particles=3, target_accept_prob=1.0)
    with pytest.raises(ValueError, match="`left_out` must name the path 'z'"):
        run(PseudoMarginal(level, build, y, num_particles=3, left_out=()), y)
    with pytest.raises(ValueError, match="'kind' is discrete"):
        run(PseudoMarginal(lambda: numpyro.sample("kind", dist.Bernoulli(0.5)), build, y, num_particles=3))


def test_an_impossible_start_is_an_error():
    def emission(z):
        return dist.Uniform(-1.0 + 0 * z, 1.0).to_event(1)

    def wrong(sites):
        return pssm.NonlinearSSM(jnp.zeros(1), ONE, lambda z, u: z, sites["scale"] * ONE, emission)

    start = init_to_value(values={"scale": 1.0})
    kernel = PseudoMarginal(level, wrong, [[5.0]], num_particles=3, init_strategy=start)
    with pytest.raises(ValueError, match="likelihood at the first parameters is zero"):
        run(kernel, np.array([[5.0]]))
