"""Every model of `pssm.models` is fitted by NumPyro's own MCMC and SVI, with nothing but jax and numpyro around it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.optim as optim
import pytest
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from pssm import models

STEPS = 30
U = np.cos(np.arange(STEPS))[:, None]

# Every name that `pssm.models` exports stands here; `slow` are variants that take longest to compile.
MODELS = {
    "local_level": models.local_level,
    "local_linear_trend": models.local_linear_trend,
    "seasonal": partial(models.seasonal, period=4),
    "autoregression": partial(models.autoregression, order=2),
    "structural": partial(models.structural, ar=1, u=U),
    "lds": partial(models.lds, num_states=1),
    "dynamic_factor": partial(models.dynamic_factor, factor_order=2, error_order=1),
    "stochastic_volatility": models.stochastic_volatility,
    "poisson_lds": partial(models.poisson_lds, num_states=1),
    "pendulum": models.pendulum,
    "lorenz63": models.lorenz63,
    "van_der_pol": models.van_der_pol,
    "ring_attractor": models.ring_attractor,
}
SLOW = {
    "seasonal harmonics": partial(models.seasonal, period=12.5, harmonics=2),
    "local_level inputs": partial(models.local_level, u=U),
    "autoregression inputs": partial(models.autoregression, order=1, u=U),
    "structural everything": partial(models.structural, trend=True, seasonal=4, cycle=True, ar=2, u=U),
    "structural stationary": partial(models.structural, level=False, cycle=(3.0, 12.0)),
}
CASES = [pytest.param(f, id=name) for name, f in MODELS.items()]
CASES += [pytest.param(f, id=name, marks=pytest.mark.slow) for name, f in SLOW.items()]


def data():
    rng = np.random.default_rng(0)
    y = np.cumsum(rng.normal(size=STEPS)) + np.tile([2.0, 0.0, -2.0, 0.5], STEPS)[:STEPS] + rng.normal(size=STEPS)
    y[[3, 4, 17]] = np.nan
    return jnp.asarray(y, jnp.float32)


def assert_finite(tree):
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(x).all(), jax.tree_util.keystr(path)


def test_every_exported_model_is_in_the_table():
    assert set(MODELS) == set(models.NAMES)


@pytest.mark.parametrize("states", ["marginal", "sampled"])
@pytest.mark.parametrize("model", CASES)
def test_nuts(model, states):
    kernel = NUTS(model, max_tree_depth=4)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=20, progress_bar=False)
    mcmc.run(jax.random.key(0), data(), states=states, extra_fields=("potential_energy",))
    assert_finite(mcmc.get_samples())
    assert_finite(mcmc.get_extra_fields())


@pytest.mark.parametrize("states", ["marginal", "sampled"])
@pytest.mark.parametrize("model", CASES)
def test_svi(model, states):
    svi = SVI(model, AutoNormal(model), optim.Adam(0.01), Trace_ELBO())
    result = svi.run(jax.random.key(0), 20, data(), states=states, progress_bar=False)
    assert_finite(result.params)
    assert_finite(result.losses)
