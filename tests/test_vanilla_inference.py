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

# Every name that `pssm.models` exports stands here; what takes longest to compile is slow.
MODELS = {
    "local_level": models.local_level,
    "local_linear_trend": models.local_linear_trend,
    "seasonal": partial(models.seasonal, period=4),
    "autoregression": partial(models.autoregression, order=2),
    "structural": partial(models.structural, ar=1, u=U),
    "lds": partial(models.lds, num_states=1),
    "dynamic_factor": partial(models.dynamic_factor, factor_order=2, error_order=1),
    "multivariate_structural": models.multivariate_structural,
    "panel": models.panel,
}
NONLINEAR = {
    "stochastic_volatility": models.stochastic_volatility,
    "poisson_lds": partial(models.poisson_lds, num_states=1),
    "pendulum": models.pendulum,
    "lorenz63": models.lorenz63,
    "van_der_pol": models.van_der_pol,
    "ring_attractor": partial(models.ring_attractor, u=U),
    "neural_ssm": partial(models.neural_ssm, num_states=1, hidden=4),
    "deep_markov": partial(models.deep_markov, num_states=1, hidden=4),
}
# Codes of frames, which have no other way than to be sampled; the networks stay as they start.
AUTOENCODERS = {
    "kalman_vae": partial(models.kalman_vae, num_states=1, num_codes=1, num_bases=2, hidden=4),
    "extended_kalman_vae": partial(models.extended_kalman_vae, num_states=2, num_codes=1, num_bases=2, hidden=4),
}
VARIANTS = {
    "seasonal harmonics": partial(models.seasonal, period=12.5, harmonics=2),
    "local_level inputs": partial(models.local_level, u=U),
    "autoregression inputs": partial(models.autoregression, order=1, u=U),
    "structural everything": partial(models.structural, trend=True, seasonal=4, cycle=True, ar=2, u=U),
    "structural stationary": partial(models.structural, level=False, cycle=(3.0, 12.0)),
    "lds inputs": partial(models.lds, num_states=2, u=U),
    "multivariate everything": partial(
        models.multivariate_structural, trend=True, seasonal=4, cycle=True, rank=1, noise="correlated", u=U
    ),
    "panel everything": partial(models.panel, trend=True, seasonal=4, ar=1, u=U, varying=True),
    "multivariate mixed": partial(models.multivariate_structural, aggregate={0: "sum"}, every=3, u=U),
    "neural_ssm random": partial(models.neural_ssm, num_states=1, hidden=4, weights="random", emission="poisson"),
}
OBSERVED = {"lds": 2, "lds inputs": 3, "dynamic_factor": 2, "poisson_lds": 3, "lorenz63": 3, "van_der_pol": 2}
OBSERVED |= {"multivariate_structural": 2, "multivariate everything": 2, "multivariate mixed": 2, "panel": 4}
OBSERVED["panel everything"] = 4
OBSERVED |= {"ring_attractor": 5, "neural_ssm": 2, "deep_markov": 2, "kalman_vae": 3, "extended_kalman_vae": 3}
COUNTS = ("poisson_lds", "ring_attractor", "neural_ssm random")
QUICK = ("stochastic_volatility", "poisson_lds", "neural_ssm")


def cases():
    """A model by its name, and how its states are dealt with."""
    everything = MODELS | NONLINEAR | VARIANTS
    for name, model in everything.items():
        slow = name in VARIANTS or (name in NONLINEAR and name not in QUICK)
        for states in ("ekf" if name in NONLINEAR or "neural" in name else "marginal", "sampled"):
            marks = pytest.mark.slow if slow or (name in ("poisson_lds", "neural_ssm") and states == "ekf") else ()
            yield pytest.param(partial(model, states=states), data(name), id=f"{name}-{states}", marks=marks)
    for name, model in AUTOENCODERS.items():
        yield pytest.param(model, data(name), id=name, marks=pytest.mark.slow)


def data(name):
    rng = np.random.default_rng(0)
    size = OBSERVED.get(name, 1)
    if name in COUNTS:
        y = rng.poisson(2.0, (STEPS, size)).astype(float)
    else:
        y = np.cumsum(rng.normal(size=(STEPS, size)), axis=0) + rng.normal(size=(STEPS, size))
        y = y + np.tile([2.0, 0.0, -2.0, 0.5], STEPS)[:STEPS, None]
    y[[3, 4, 17]] = np.nan
    if name.startswith("panel"):
        y = y.T  # (series, time)
        y[1, 20:] = np.nan
    return jnp.asarray(y, jnp.float32)


def assert_finite(tree):
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        assert np.isfinite(x).all(), jax.tree_util.keystr(path)


def test_every_exported_model_is_in_the_table():
    assert set(MODELS) | set(NONLINEAR) | set(AUTOENCODERS) == set(models.NAMES)


@pytest.mark.parametrize(("model", "y"), list(cases()))
def test_nuts(model, y):
    kernel = NUTS(model, max_tree_depth=4)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=20, progress_bar=False)
    mcmc.run(jax.random.key(0), y, extra_fields=("potential_energy",))
    assert_finite(mcmc.get_samples())
    assert_finite(mcmc.get_extra_fields())


@pytest.mark.parametrize(("model", "y"), list(cases()))
def test_svi(model, y):
    svi = SVI(model, AutoNormal(model), optim.Adam(0.01), Trace_ELBO())
    result = svi.run(jax.random.key(0), 20, y, progress_bar=False)
    assert_finite(result.params)
    assert_finite(result.losses)
