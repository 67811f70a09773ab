"""A fit in 64-bit arithmetic leaves the arrays of a model alone: the session's arithmetic goes on as before."""

import functools

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pssm import diagnostics, infer, models
from pssm.fitting.own_arrays import with_own_arrays

RNG = np.random.default_rng(0)
GLOBAL = RNG.normal(size=(80, 1))


def by_global(y):
    b = numpyro.sample("b", dist.Normal(0.0, 10.0))
    mean = b * (jnp.asarray(GLOBAL) - jnp.asarray(GLOBAL)[0])
    numpyro.sample("y", dist.Normal(mean, 1.0).to_event(2), obs=y)


def by_closure(x, data):
    def inner(b):
        return b * (jnp.asarray(x) - jnp.asarray(x)[0])

    def model(y=None, *, scale=1.0):
        b = numpyro.sample("b", dist.Normal(0.0, 10.0))
        numpyro.sample("y", dist.Normal(inner(b), scale).to_event(2), obs=data["y"])

    return model


@pytest.mark.parametrize("how", ["partial", "closure", "global", "no argument"])
def test_arrays_of_a_model_keep_their_type(how):
    x = GLOBAL if how == "global" else RNG.normal(size=(80, 1))
    y = 3 * (x - x[0]) + 0.1 * RNG.normal(size=(80, 1))
    model, args = {
        "partial": (functools.partial(models.local_level, u=x), (y,)),
        "closure": (by_closure(x, {"y": y}), (y,)),
        "global": (by_global, (y,)),
        "no argument": (by_closure(x, {"y": y}), ()),
    }[how]
    plain = str(jnp.asarray(np.array(x)).dtype)
    fit = infer.fit_ml(model, *args, num_starts=1, progress_bar=False)
    slope = fit.params["beta"][0] if how == "partial" else fit.params["b"]
    assert slope == pytest.approx(3.0, abs=0.05)
    for array in (x, y):
        assert str(jnp.asarray(array).dtype) == plain
        jnp.sin(array).block_until_ready()
    if how == "partial":
        assert infer.smoothed_states(fit).state.mean.dtype == plain
        assert infer.forecast(fit, 2, u_future=np.zeros((2, 1))).mean.shape == (2, 1)


def test_a_backtest_and_an_impact_leave_them_alone():
    x = RNG.normal(size=(80, 1))
    y = 3 * x[:, 0] + 0.1 * RNG.normal(size=80)
    plain = str(jnp.asarray(np.array(x)).dtype)
    model = functools.partial(models.local_level, u=x)
    diagnostics.backtest(model, y, origins=2, progress_bar=False, options={"num_starts": 1})
    diagnostics.impact(y, None, 60, model=model, method="ml", placebo=False, num_draws=20, options={"num_starts": 1})
    for array in (x, y):
        assert str(jnp.asarray(array).dtype) == plain


def test_a_copy_is_the_same_function():
    model = by_closure(GLOBAL, {"y": GLOBAL})
    copy = with_own_arrays(model)
    assert copy is not model
    assert copy.__name__ == "model"
    assert copy.__kwdefaults__ == {"scale": 1.0}
    assert with_own_arrays(copy.__wrapped__).__code__ is model.__code__

    def plain(y):
        return y

    assert plain(with_own_arrays(len)) is len
