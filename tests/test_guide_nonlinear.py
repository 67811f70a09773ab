"""The guide on nonlinear and non-Gaussian models with fixed parameters, against a grid filter and a particle filter."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from numpyro.infer import SVI, Trace_ELBO
from scipy import stats

from pssm.distributions import StatePath, observe
from pssm.guides import AutoStateSpace
from pssm.infer import SVIFit, TraceConditionalKL_ELBO, importance_bound, log_weights

THALAMUS = Path(__file__).parents[2] / "shared" / "data" / "particles_pkg" / "thaldata.csv"
SCALAR = {  # persistence, sd of the noise, readout as a function of the state
    "volatility": (0.95, 0.3, lambda z: dist.Normal(0.0, jnp.exp(z / 2))),
    "counts": (0.95, 0.3, lambda z: dist.Poisson(jnp.exp(1.0 + z))),
    "thalamus": (0.99, 0.2, lambda z: dist.Binomial(50, logits=z - 4.0)),
}
LOG_DENSITY = {
    "volatility": lambda y, z: stats.norm.logpdf(y, scale=np.exp(z / 2)),
    "counts": lambda y, z: stats.poisson.logpmf(y, np.exp(1.0 + z)),
    "thalamus": lambda y, z: stats.binom.logpmf(y, 50, 1 / (1 + np.exp(4.0 - z))),
}


def scalar_model(y, name):
    rho, sigma, readout = SCALAR[name]
    start = sigma / np.sqrt(1 - rho**2)
    z = numpyro.sample("z", StatePath(jnp.zeros(1), start * jnp.eye(1), rho * jnp.eye(1), sigma * jnp.eye(1), len(y)))
    observe("y", readout(z).to_event(2), y)


@cache
def scalar_case(name):
    """Data, evidence, smoothed means and standard deviations."""
    rho, sigma, _ = SCALAR[name]
    rng = np.random.default_rng(0)
    steps = {"volatility": 250, "counts": 150, "thalamus": 500}[name]
    z = np.zeros(steps)
    z[0] = rng.normal() * sigma / np.sqrt(1 - rho**2)
    for t in range(1, steps):
        z[t] = rho * z[t - 1] + sigma * rng.normal()
    if name == "thalamus":
        y = np.loadtxt(THALAMUS, delimiter=",").ravel()[:steps]
    else:
        y = np.exp(z / 2) * rng.normal(size=steps) if name == "volatility" else rng.poisson(np.exp(1 + z)).astype(float)
    grid = np.linspace(-8, 8, 801)
    first = stats.norm.logpdf(grid, scale=sigma / np.sqrt(1 - rho**2))
    kernel = stats.norm.logpdf(grid[:, None], rho * grid, sigma)
    return y[:, None], *oracles.grid_posterior(grid, first, kernel, LOG_DENSITY[name](y[:, None], grid))


def fit(model, num_steps, *args, **options):
    """`num_steps` steps of Adam, or the start (ten steps of no length)."""
    guide = AutoStateSpace(model, **options)
    rate = 1e-9 if num_steps == 10 else optax.cosine_decay_schedule(1e-2, num_steps)
    loss = Trace_ELBO() if num_steps == 10 else TraceConditionalKL_ELBO(10)
    svi = SVI(model, guide, optax.adam(rate), loss)
    return SVIFit.of(svi, svi.run(jax.random.key(0), num_steps, *args, progress_bar=False), *args)


@pytest.mark.parametrize(
    "name", ["volatility", *(pytest.param(name, marks=pytest.mark.slow) for name in ("counts", "thalamus"))]
)
def test_scalar_models_against_the_grid(name):
    if name == "thalamus" and not THALAMUS.exists():
        pytest.skip("the thalamus counts are not here")
    y, evidence, mean, sd = scalar_case(name)
    model = partial(scalar_model, name=name)
    start = fit(model, 10, y, rank=1)
    found = importance_bound(start, num_particles=20_000)
    assert evidence - 1 < found.log_weights.mean() < evidence + 0.05
    assert found.value == pytest.approx(evidence, abs=0.05)

    trained = fit(model, 1500, y, rank=1)
    weights = log_weights(trained, num_particles=4000)
    assert evidence - 0.3 < weights.mean() < evidence + 4 * weights.std() / np.sqrt(4000)
    draws = trained.svi.guide.sample_posterior(jax.random.key(1), trained.params, y, sample_shape=(8000,))["z"][..., 0]
    assert np.sqrt(np.mean(((draws.mean(0) - mean) / sd) ** 2)) < 0.08
    assert 0.95 < np.mean(np.asarray(draws.std(0)) / sd) < 1.05


def van_der_pol(z, u):
    first, second = z
    return jnp.stack([first + 0.05 * second, second + 0.05 * (1.5 * (1 - first**2) * second - first)])


START, START_SD, VDP_STEPS = jnp.array([1.5, 0.0]), 0.25, 80
LOADINGS = np.random.default_rng(3).normal(size=(20, 2)) / np.sqrt(2)


def vdp_readout(z, kind):
    projected = z @ LOADINGS.T
    return dist.Normal(projected, jnp.sqrt(0.1)) if kind == "Gaussian" else dist.Poisson(jnp.exp(projected))


def vdp_model(y, q, kind):
    prior = StatePath(START, START_SD * jnp.eye(2), van_der_pol, jnp.sqrt(q) * jnp.eye(2), VDP_STEPS)
    observe("y", vdp_readout(numpyro.sample("z", prior), kind).to_event(2), y)


@partial(jax.jit, static_argnames=("kind", "num_particles"))
def bootstrap_evidence(key, y, q, kind, num_particles=50_000):
    """Bootstrap particle filter, systematic resampling at every step; shares only the model's definition."""

    def step(carry, row):
        z, key = carry
        key, move, pick = jax.random.split(key, 3)
        weights = vdp_readout(z, kind).log_prob(row).sum(-1)
        total = jax.nn.logsumexp(weights) - jnp.log(num_particles)
        positions = (jnp.arange(num_particles) + jax.random.uniform(pick)) / num_particles
        cumulative = jnp.cumsum(jax.nn.softmax(weights))
        chosen = jnp.clip(jnp.searchsorted(cumulative, positions), 0, num_particles - 1)
        z = jax.vmap(van_der_pol, (0, None))(z[chosen], None)
        return (z + jnp.sqrt(q) * jax.random.normal(move, z.shape), key), total

    start = START + START_SD * jax.random.normal(jax.random.fold_in(key, 1), (num_particles, 2))
    return jax.lax.scan(step, (start, key), y)[1].sum()


@jax.jit
def simulate_vdp(key, q):
    prior = StatePath(START, START_SD * jnp.eye(2), van_der_pol, jnp.sqrt(q) * jnp.eye(2), VDP_STEPS)
    return prior.sample(key)


@pytest.mark.slow
@pytest.mark.parametrize("q", [1e-3, 1e-2])
@pytest.mark.parametrize("kind", ["Gaussian", "Poisson"])
def test_van_der_pol_against_a_particle_filter(kind, q, key):
    y = vdp_readout(simulate_vdp(key, q), kind).sample(jax.random.key(1))
    runs = [float(bootstrap_evidence(k, y, q, kind)) for k in jax.random.split(jax.random.key(2), 4)]
    evidence = np.logaddexp.reduce(runs) - np.log(4)
    start = fit(partial(vdp_model, kind=kind), 10, y, q, rank=2)
    found = importance_bound(start, num_particles=20_000)
    assert evidence - 1 < found.log_weights.mean() < evidence + 0.15
    assert found.value == pytest.approx(evidence, abs=0.15)
