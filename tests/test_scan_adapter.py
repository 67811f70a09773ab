"""User models with a per-step `scan`: the path model is the same model, and the guide is exact where it can be."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.util import log_density

import pssm
from pssm.distributions import observe
from pssm.guides import AutoScanStateSpace, AutoStateSpace, scan_path
from pssm.infer import SVIFit, TraceConditionalKL_ELBO, importance_bound, log_weights

T = 15
SSM = pssm.LinearGaussianSSM([0.0], [[0.5]], [[0.9]], [[0.5]], [[1.0]], [[0.7]], b=[0.1])
A = 0.9 * np.linalg.qr(np.random.default_rng(0).normal(size=(2, 2)))[0]


def scalar(y):
    def step(z, y_t):
        z = numpyro.sample("z", dist.Normal(0.9 * z + 0.1, 0.5))
        observe("y", dist.Normal(z, 0.7), y_t)
        return z, None

    scan(step, -0.1 / 0.9, y)  # the first state has mean 0


def vector(y):
    """A start that is sampled, a counter and inputs in the carry, and a learned parameter."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
    z0 = numpyro.sample("z_0", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    def step(carry, xs):
        u_t, y_t = xs
        mean = A @ carry["state"] + 0.1 * jnp.cos(carry["count"]) + u_t
        z = numpyro.sample("z", dist.Normal(mean, scale * (1.0 + 0.1 * carry["count"])).to_event(1))
        numpyro.deterministic("norm", jnp.sum(z**2))
        observe("y", dist.Normal(z, 0.7).to_event(1), y_t)
        return {"count": carry["count"] + 1, "state": z}, z

    _, z = scan(step, {"count": 0, "state": z0}, (jnp.linspace(0, 1, T), y))
    numpyro.deterministic("last", z[-1])


@pytest.fixture
def y(x64):
    y = np.random.default_rng(1).normal(size=(T, 2))
    y[3], y[5, 1] = np.nan, np.nan
    return y


def fitted(model, guide, y, learning_rate, num_steps):
    svi = SVI(model, guide, optax.adam(learning_rate), Trace_ELBO())
    return SVIFit.of(svi, svi.run(jax.random.key(0), num_steps, y, progress_bar=False), y)


@pytest.mark.parametrize(("model", "is_scalar"), [(scalar, True), (vector, False)])
def test_path_model_has_the_density_and_the_draws_of_the_scan(model, is_scalar, y, key):
    data = y[:, 0] if is_scalar else y
    path_model = scan_path(model, "z")
    drawn = handlers.trace(handlers.seed(path_model, key)).get_trace(data)
    values = {n: s["value"] for n, s in drawn.items() if s["type"] == "sample" and not s["is_observed"]}
    own = {**values, "z": values["z"][:, 0] if is_scalar else values["z"]}
    found = jax.jit(lambda v: log_density(path_model, (data,), {}, v)[0])(values)
    expected = jax.jit(lambda v: log_density(model, (data,), {}, v)[0])(own)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    if not is_scalar:
        np.testing.assert_allclose(drawn["last"]["value"], values["z"][-1])
        assert drawn["norm"]["value"].shape == (T,)
    slope = jax.jit(jax.grad(lambda v: log_density(path_model, (data,), {}, v)[0]))(values)
    assert all(np.isfinite(x).all() for x in slope.values())


def test_guide_of_a_scan_is_exact_on_a_linear_model(y):
    data = y[:, 0]
    evidence = float(pssm.log_likelihood(SSM, data[:, None]))
    for model, guide in (
        (scalar, AutoScanStateSpace(scalar, site="z", rank=1)),
        (scan_path(scalar, "z"), AutoStateSpace(scan_path(scalar, "z"), rank=1)),
    ):
        fit = fitted(model, guide, data, 1e-9, 10)
        np.testing.assert_allclose(log_weights(fit, num_particles=5), evidence, atol=1e-5)
    found = importance_bound(fit, num_particles=50, resample_every=5)
    assert found.value == pytest.approx(evidence, abs=1e-5)


def test_draws_have_the_model_sites_shapes_and_the_smoothed_moments(y, key):
    data = y[:, 0]
    guide = AutoScanStateSpace(scalar, site="z", rank=1)
    svi = SVI(scalar, guide, optax.adam(1e-9), TraceConditionalKL_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), data))
    draws = guide.sample_posterior(key, params, data, sample_shape=(4000,))
    smoothed = pssm.kalman_smoother(SSM, data[:, None])
    sd = np.sqrt(smoothed.cov[:, 0, 0])
    assert draws["z"].shape == (4000, T)
    assert (np.abs(draws["z"].mean(0) - smoothed.mean[:, 0]) / sd).max() < 5 / np.sqrt(4000)
    np.testing.assert_allclose(draws["z"].std(0), sd, rtol=0.06)
    predicted = Predictive(scalar, {"z": draws["z"][:10]})(key, np.full(T, np.nan))
    assert predicted["y"].shape == (10, T)


@pytest.mark.slow
def test_other_latent_sites_are_learned_beside_the_path(y):
    path_model = scan_path(vector, "z")
    fit = fitted(vector, AutoScanStateSpace(vector, site="z", rank=2), y, 0.02, 300)
    other = fitted(path_model, AutoStateSpace(path_model, rank=2), y, 0.02, 300)
    bounds = [importance_bound(f, num_particles=2000).value for f in (fit, other)]
    assert bounds[0] == pytest.approx(bounds[1], abs=0.1)


def no_carry(y):
    scan(lambda c, y_t: (c, numpyro.sample("z", dist.Normal(c, 1.0))), 0.0, y)


def scale_of_state(y):
    def step(z, y_t):
        z = numpyro.sample("z", dist.Normal(z, jnp.exp(z)))
        return z, None

    scan(step, 0.0, y)


def memory(y):
    def step(carry, y_t):
        z = numpyro.sample("z", dist.Normal(0.5 * carry[0] + 0.2 * carry[1], 1.0))
        return (z, carry[0]), None

    scan(step, (0.0, 0.0), y)


def student(y):
    def step(z, y_t):
        z = numpyro.sample("z", dist.StudentT(4.0, z, 1.0))
        return z, None

    scan(step, 0.0, y)


@pytest.mark.parametrize(
    ("model", "site", "match"),
    [
        (scalar, "x", "no scan"),
        (no_carry, "z", "in the carry"),
        (scale_of_state, "z", "scale .* depends on the state"),
        (memory, "z", "leaf of the carry .* depends"),
        (student, "z", "StudentT"),
    ],
)
def test_bodies_that_are_no_path_prior_are_named(model, site, match):
    for run in (lambda m: m(jnp.ones(4)), lambda m: jax.jit(m)(jnp.ones(4))):
        with pytest.raises(ValueError, match=f"`site`.*{match}"), handlers.seed(rng_seed=0):
            run(scan_path(model, site))
