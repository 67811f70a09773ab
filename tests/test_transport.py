"""`transport_reparam`: the same posterior in other coordinates, and nearly standard normal ones."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.util import log_density, potential_energy

import pssm
from pssm.distributions import StatePath, observe
from pssm.guides import AutoStateSpace
from pssm.infer import fit_svi, transport_reparam

STEPS = 8
A, C = jnp.array([[0.9, 0.2], [-0.1, 0.8]]), jnp.array([[1.0, 0.5]])


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def linear(y):
    """Noise of the observations drawn before the path, that of the transition known."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    z = numpyro.sample("z", StatePath(jnp.zeros(2), jnp.eye(2), A, 0.4 * jnp.eye(2), STEPS))
    observe("y", dist.Normal(z @ C.T, scale).to_event(2), y)


def bent(y):
    """Counts, a singular-looking start, and a site whose distribution depends on the path."""
    scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.3))
    start, noise = jnp.array([1.0, -1.0]), jnp.array([[0.5, 0.0], [0.3, 0.4]])
    path = StatePath(start, 0.3 * jnp.eye(2), lambda z, u: z + 0.1 * jnp.sin(z), scale * noise, STEPS)
    z = jnp.asarray(numpyro.sample("z", path))
    size = numpyro.sample("size", dist.Normal(z.mean(), 1.0))
    observe("y", dist.Poisson(jnp.exp(0.5 * z[:, :1] + 0.1 * size)).to_event(2), y)


def data():
    y = np.random.default_rng(0).poisson(1.5, (STEPS, 1)).astype(float)
    y[3] = np.nan
    return jnp.asarray(y)


def fitted(model, potentials, rank=2, num_steps=10, **options):
    guide = AutoStateSpace(model, rank=rank, potentials=potentials, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few steps have not converged
        fit = fit_svi(model, data(), guide=guide, num_steps=num_steps, loss=Trace_ELBO(), progress_bar=False)
    return transport_reparam(handlers.substitute(model, data=fit.params), guide)


def draws(model, key):
    """Values of the sites that are sampled, from the prior."""
    trace = handlers.trace(handlers.seed(model, key)).get_trace(data())
    return {n: s["value"] for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}


def test_an_exact_guide_makes_the_path_standard_normal():
    easy = fitted(linear, "mode")
    values = draws(easy, jax.random.key(1))
    e = jax.random.normal(jax.random.key(2), (3, *values["z_base"].shape))
    at = jax.jit(lambda e, scale: log_density(easy, (data(),), {}, {"scale": scale, "z_base": e})[0])
    unconstrained = jax.jit(lambda values: potential_energy(easy, (data(),), {}, values))
    for scale in (0.7, 1.3):
        ssm = pssm.LinearGaussianSSM(jnp.zeros(2), jnp.eye(2), A, 0.4 * jnp.eye(2), C, scale * jnp.eye(1))
        exact = float(pssm.log_likelihood(ssm, data()) + dist.LogNormal(0.0, 0.5).log_prob(scale))
        rest = [float(at(x, scale) - dist.Normal(0, 1).log_prob(x).sum()) for x in e]
        np.testing.assert_allclose(rest, exact, atol=1e-9)
        free = float(unconstrained({"scale": jnp.log(scale), "z_base": e[0]}))  # as NUTS has it: with the Jacobian
        assert free == pytest.approx(-float(at(e[0], scale)) - np.log(scale), abs=1e-9)


@pytest.mark.parametrize("potentials", [pytest.param("free", marks=pytest.mark.slow), "mode"])
def test_the_density_is_the_models_own_in_other_coordinates(potentials):
    easy = fitted(bent, potentials, rank=1)

    def path(values):
        trace = handlers.trace(handlers.seed(handlers.substitute(easy, data=values), 0)).get_trace(data())
        return trace["z"]["value"]

    @jax.jit
    def both(values):
        jacobian = jax.jacfwd(lambda e: path({**values, "z_base": e}).reshape(-1))(values["z_base"])
        own = {"z": path(values), **{n: x for n, x in values.items() if n != "z_base"}}
        return (
            log_density(easy, (data(),), {}, values)[0],
            log_density(bent, (data(),), {}, own)[0] + jnp.linalg.slogdet(jacobian)[1],
        )

    for seed in range(2):
        found, expected = both(draws(easy, jax.random.key(seed)))
        assert float(found) == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("potentials", ["free", "mode"])
def test_nuts_finds_the_exact_posterior(potentials):
    easy = fitted(linear, potentials, num_steps=200)
    mcmc = MCMC(NUTS(easy), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(jax.random.key(0), data())
    plain = MCMC(NUTS(linear), num_warmup=300, num_samples=2000, progress_bar=False)
    plain.run(jax.random.key(1), data())
    for name in ("z", "scale"):
        a, b = mcmc.get_samples()[name], plain.get_samples()[name]
        np.testing.assert_allclose(a.mean(0), b.mean(0), atol=0.15 * float(b.std(0).max()))
        np.testing.assert_allclose(a.std(0), b.std(0), rtol=0.15)


def test_batches_in_plates():
    def trials(y):
        with numpyro.plate("trials", 3):
            z = numpyro.sample("z", StatePath(jnp.zeros(2), jnp.eye(2), A, 0.4 * jnp.eye(2), STEPS))
            observe("y", dist.Normal(z @ C.T, 0.5).to_event(2), y)

    y = jnp.stack([data(), 2 - data(), data() / 2])
    guide = AutoStateSpace(trials, rank=2)
    fit = fit_svi(trials, y, guide=guide, optimizer=optax.sgd(0.0), num_steps=10, progress_bar=False)
    easy = transport_reparam(trials, guide, params=fit.params)
    e = jax.random.normal(jax.random.key(2), (2, 3, 2 + 2 * (STEPS - 1)))
    ssm = pssm.LinearGaussianSSM(jnp.zeros(2), jnp.eye(2), A, 0.4 * jnp.eye(2), C, 0.5 * jnp.eye(1))
    exact = float(pssm.log_likelihood(ssm, y).sum())
    at = jax.jit(lambda x: log_density(easy, (y,), {}, {"z_base": x})[0])
    for x in e:
        found = at(x)
        assert float(found - dist.Normal(0, 1).log_prob(x).sum()) == pytest.approx(
            exact, abs=1e-4
        )  # diagonals start at 1e-6


def test_wrong_guides_are_named():
    with pytest.raises(TypeError, match="`guide` must be an AutoStateSpace"):
        transport_reparam(linear, numpyro.infer.autoguide.AutoNormal(linear))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="moment_matched"):
        transport_reparam(linear, AutoStateSpace(linear, rank=1, family="moment_matched"))
    with pytest.raises(ValueError, match="has not been run"):
        transport_reparam(linear, AutoStateSpace(linear, rank=1))
    guide = AutoStateSpace(linear, rank=1)
    SVI(linear, guide, optax.sgd(0.0), Trace_ELBO()).init(jax.random.key(0), data())
    with pytest.raises(ValueError, match="z_auto_center"):
        transport_reparam(linear, guide)
