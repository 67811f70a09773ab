"""`AutoStateSpace(potentials="variational")`: its objective, its gradient, NUTS through its map."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

from pssm.distributions import StatePath, observe
from pssm.guides import AutoStateSpace
from pssm.infer import elbo, fit_svi, refine, transport_reparam
from pssm.modes import variational_fit

T = 30


def volatility(y=None):
    log_q = numpyro.sample("log_q", dist.Normal(-1.5, 0.5))
    q = jnp.exp(log_q)[..., None, None]
    z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.95 * jnp.eye(1), q, T))
    observe("y", dist.Normal(0.0, jnp.exp(z / 2)).to_event(2), y)


def data():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(T, 1)) * np.exp(np.sin(np.arange(T) / 4))[:, None])


def bound(log_q, y):
    prior = StatePath(jnp.zeros(1), jnp.eye(1), 0.95 * jnp.eye(1), jnp.exp(log_q) * jnp.eye(1), T)
    fit = variational_fit(prior, lambda z: dist.Normal(0.0, jnp.exp(z / 2)).log_prob(y).sum((-2, -1)), num_iters=20)
    return fit.bound


def test_the_objective_and_its_gradient_are_those_of_the_bound(x64):
    y = data()
    guide = AutoStateSpace(volatility, rank=1, potentials="variational", global_guide=AutoDelta)
    svi = SVI(volatility, guide, optax.adam(1e-2), Trace_ELBO(num_particles=4000))
    state = svi.init(jax.random.key(0), y)
    params = svi.get_params(state)
    assert {name for name in params if name.startswith("z")} == {"z_auto_center", "z_auto_scale"}

    @jax.jit
    def both(log_q, key):
        def loss(log_q):
            given = {**params, "log_q_auto_loc": log_q}
            return -Trace_ELBO(num_particles=4000).loss(key, given, volatility, guide, y)

        def right(log_q):
            return bound(log_q, y) + dist.Normal(-1.5, 0.5).log_prob(log_q)

        return jax.value_and_grad(loss)(log_q), (right(log_q), (right(log_q + 1e-4) - right(log_q - 1e-4)) / 2e-4)

    for log_q in (-1.5, -1.0):  # the moments that are stored are those of the first
        (value, slope), (right, difference) = both(jnp.asarray(log_q), jax.random.key(1))
        assert abs(value - right) < 0.05
        assert abs(slope - difference) < 0.15


def test_nuts_through_the_map_of_variational_potentials(x64):
    y = data()
    guide = AutoStateSpace(volatility, rank=1, potentials="variational")
    fit = SVI(volatility, guide, optax.adam(1e-2), Trace_ELBO()).run(jax.random.key(0), 50, y, progress_bar=False)
    fitted = handlers.substitute(volatility, data=fit.params)
    mcmc = MCMC(NUTS(transport_reparam(fitted, guide)), num_warmup=150, num_samples=300, progress_bar=False)
    mcmc.run(jax.random.key(1), y, extra_fields=("num_steps", "diverging"))
    extra = mcmc.get_extra_fields()
    assert extra["diverging"].sum() == 0
    assert extra["num_steps"].mean() < 12
    assert np.isfinite(mcmc.get_samples()["log_q"]).all()


@pytest.mark.filterwarnings("ignore:SVI has not converged")
def test_refined_potentials_are_no_worse(x64):
    """From a few noisy steps with a far too large learning rate, back to the bound."""
    y = data()

    def model(y):
        z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.95 * jnp.eye(1), jnp.exp(-1.5) * jnp.eye(1), T))
        observe("y", dist.Normal(0.0, jnp.exp(z / 2)).to_event(2), y)

    guide = AutoStateSpace(model, rank=1)
    fit = fit_svi(model, y, guide=guide, num_steps=30, learning_rate=0.3, progress_bar=False)
    before = elbo(fit, num_particles=500)[0]
    better = refine(fit)
    after = elbo(better, num_particles=500)[0]
    assert after > before + 0.1
    assert abs(after - bound(-1.5, y)) < 0.1
    assert guide.sample_posterior(jax.random.key(0), better.params, y, sample_shape=(2,))["z"].shape == (2, T, 1)
    other = AutoStateSpace(model, rank=1, potentials="mode")
    with pytest.raises(TypeError, match="`fit` must have an AutoStateSpace"):
        refine(fit_svi(model, y, guide=other, num_steps=10, progress_bar=False))
