"""The gradient without the score of `log q`: the same expectation, and no noise where the guide is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

import pssm
from pssm import nets
from pssm.distributions import StatePath, observe
from pssm.guides import AmortizedStateSpace, AutoStateSpace
from pssm.infer import StickingTheLanding_ELBO, TraceConditionalKL_ELBO, WeightedKL, fit_svi

STEPS = 12
Y = np.random.default_rng(0).normal(size=(STEPS, 2))
Y[3, 0] = np.nan
COUNTS = np.random.default_rng(1).poisson(2.0, (4, STEPS, 1)).astype(float)


def linear(y):
    y = jnp.asarray(y)
    A = jnp.array([[0.9, 0.2], [-0.1, 0.7]], y.dtype)
    path = StatePath(jnp.zeros(2, y.dtype), jnp.eye(2, dtype=y.dtype), A, 0.5 * jnp.eye(2, dtype=y.dtype), len(y))
    z = numpyro.sample("z", path)
    observe("y", dist.Normal(z, 0.4).to_event(2), y)


def uncertain(y):
    """A scale and a level, whose guide is never exact; the level of the noise is learned."""
    s = numpyro.sample("s", dist.LogNormal(-1.0, 0.5))
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    noise = numpyro.param("noise", 0.7, constraint=dist.constraints.positive)
    z = numpyro.sample("z", StatePath(mu[None], jnp.eye(1), lambda z, u: mu + 0.9 * (z - mu), s * jnp.eye(1), len(y)))
    observe("y", dist.StudentT(5.0, z, noise).to_event(2), y)


def trials(y, size=None):
    with numpyro.plate("trials", 4, subsample_size=size) as i:
        z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), 0.3 * jnp.eye(1), STEPS))
        observe("y", dist.Poisson(jnp.exp(z)).to_event(2), jnp.asarray(y)[i])


def chain(**options):
    return lambda model: AutoStateSpace(model, **{"rank": 1, **options})


def amortized(model):
    return AmortizedStateSpace(
        model, encoder=nets.sequence_encoder(1, 1, 1, size=4, data=COUNTS, key=jax.random.key(0)), rank=1
    )


CASES = {
    "free": (uncertain, Y[:, :1], chain(), {}),
    "mode": (uncertain, Y[:, :1], chain(potentials="mode", global_guide=AutoMultivariateNormal), {}),
    "low rank": (uncertain, Y[:, :1], chain(global_guide=AutoLowRankMultivariateNormal), {}),
    "point": (uncertain, Y[:, :1], chain(global_guide=AutoDelta), {}),
    "plate": (trials, COUNTS, chain(), {}),
    "subsample": (trials, COUNTS, chain(), {"size": 2}),
    "amortized": (trials, COUNTS, amortized, {"size": 2}),
    "numpyro": (linear, Y, AutoNormal, {}),
}


def gradients(loss, model, guide, params, y, kwargs, num):
    def one(key):
        return jax.value_and_grad(lambda p: loss.loss(key, p, model, guide, y, **kwargs))(params)

    return jax.jit(lambda ks: jax.lax.map(one, ks, batch_size=100))(jax.random.split(jax.random.key(1), num))


@pytest.mark.parametrize("case", CASES)
def test_value_is_that_of_the_elbo_and_the_gradient_has_its_expectation(case, x64):
    model, y, make, kwargs = CASES[case]
    guide = make(model)
    svi = SVI(model, guide, optax.sgd(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), y, **kwargs))
    params = jax.tree.map(lambda x: x * (1 + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)), params)
    values, plain = gradients(Trace_ELBO(), model, guide, params, y, kwargs, 2000)
    same, ours = gradients(StickingTheLanding_ELBO(), model, guide, params, y, kwargs, 2000)
    np.testing.assert_allclose(same, values, rtol=1e-9)
    plain, ours = (
        np.stack([ravel_pytree(jax.tree.map(lambda x, i=i: x[i], g))[0] for i in range(2000)]) for g in (plain, ours)
    )
    error = np.sqrt((plain - ours).var(axis=0) / 2000) + 1e-9
    assert (np.abs((plain - ours).mean(axis=0)) < 5 * error).all()
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_no_noise_where_the_guide_is_exact(dtype):
    with jax.enable_x64(dtype is np.float64):
        y = Y.astype(dtype)
        guide = AutoStateSpace(linear, rank=2)
        svi = SVI(linear, guide, optax.sgd(0.1), Trace_ELBO())
        params = svi.optim.get_params(svi.init(jax.random.key(0), y).optim_state)  # unconstrained

        @jax.jit
        def largest(params):
            def one(loss, key):
                found = jax.grad(lambda p: loss.loss(key, svi.constrain_fn(p), linear, guide, y))(params)
                return jnp.abs(ravel_pytree(found)[0]).max()

            keys = jax.random.split(jax.random.key(1), 50)
            losses = StickingTheLanding_ELBO(), TraceConditionalKL_ELBO()
            return [jax.vmap(lambda k, loss=loss: one(loss, k))(keys).max() for loss in losses]

        ours, conditional = largest(params)
        assert ours < (1e-12 if dtype is np.float64 else 1e-4)
        assert conditional > 0.5


def test_a_fit_that_begins_at_the_exact_posterior_ends_there(x64):
    """Adam takes long steps along the smallest slopes, so it leaves and comes back as its step size falls."""
    key = jax.random.key(0)
    n = 4
    A = 0.9 * np.linalg.qr(np.random.default_rng(2).normal(size=(n, n)))[0]
    C = np.random.default_rng(3).normal(size=(3, n))
    ssm = pssm.LinearGaussianSSM(np.zeros(n), np.eye(n), A, 0.5 * np.eye(n), C, 0.4 * np.eye(3))
    y = pssm.simulate(key, ssm, 60)[1]

    def model(y):
        z = numpyro.sample("z", StatePath.from_ssm(ssm, len(y)))
        observe("y", dist.Normal(z @ ssm.C.T, 0.4).to_event(2), y)

    fit = fit_svi(model, y, guide="chain", rank=n, num_steps=1500, progress_bar=False)
    exact = float(pssm.log_likelihood(ssm, y))
    np.testing.assert_allclose(-np.asarray(fit.losses)[-200:], exact, atol=1e-3)


def test_the_weight_of_the_kl_divergence(x64):
    guide = AutoStateSpace(linear, rank=1)
    svi = SVI(linear, guide, optax.sgd(0.1), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), Y))
    key = jax.random.key(3)
    found = [
        WeightedKL(loss, 0.3).loss(key, params, linear, guide, Y)
        for loss in (Trace_ELBO(5), StickingTheLanding_ELBO(5))
    ]
    np.testing.assert_allclose(*found, rtol=1e-9)
