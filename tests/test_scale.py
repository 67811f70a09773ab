"""The size of a program does not grow with the length of the series: nothing is unrolled over time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer.util import log_density

from pssm import LinearGaussianSSM, models
from pssm.distributions import LinearGaussianMarginal, StatePath

SHORT, LONG = 600, 1200  # a series of at most 512 steps has a smaller program: room for all of its gains
MODELS = {"local_level": models.local_level, "structural": partial(models.structural, trend=True, seasonal=12)}


def count_equations(jaxpr) -> int:
    """Equations of a jaxpr and of all the jaxprs inside it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(part, "jaxpr", part), "eqns"):
                    total += count_equations(part)
    return total


def series(length):
    y = 1000 + 100 * np.random.default_rng(0).normal(size=(length, 1)).cumsum(0)
    y[length // 2] = np.nan
    return jnp.asarray(y, jnp.float32)


def two_states(noise=2):
    trend = jnp.array([[1.0, 1.0], [0.0, 1.0]])
    return LinearGaussianSSM(jnp.zeros(2), jnp.eye(2), trend, jnp.eye(2)[:, :noise], jnp.ones((1, 2)), jnp.eye(1))


def test_the_count_sees_inside_a_loop():
    def loop(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) + 1, None), x, None, length=7)[0]

    def unrolled(x, times):
        for _ in range(times):
            x = jnp.sin(x) + 1
        return x

    assert count_equations(jax.make_jaxpr(loop)(1.0)) == 3  # the scan, and two equations in it
    sizes = [count_equations(jax.make_jaxpr(partial(unrolled, times=t))(1.0)) for t in (SHORT, LONG)]
    assert sizes == [2 * SHORT, 2 * LONG]


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_log_joint(model, gradient):
    def size(length):
        y = series(length)
        trace = handlers.trace(handlers.seed(model, 0)).get_trace(y)
        latent = {n: s["value"] for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
        flat, unravel = ravel_pytree(latent)

        def log_joint(x):
            return log_density(model, (y,), {}, unravel(x))[0]

        return count_equations(jax.make_jaxpr(jax.grad(log_joint) if gradient else log_joint)(flat))

    assert size(SHORT) == size(LONG) > 20


@pytest.mark.parametrize("noise", [1, 2], ids=["singular", "regular"])
def test_gradient_of_a_path_density(noise):
    def size(length):
        def log_prob(ssm, z):
            return StatePath.from_ssm(ssm, length).log_prob(z)

        gradient = jax.grad(log_prob, argnums=(0, 1))
        return count_equations(jax.make_jaxpr(gradient)(two_states(noise), jnp.zeros((length, 2))))

    assert size(SHORT) == size(LONG) > 20


def test_gradient_of_a_marginal_density():
    def size(length):
        def log_prob(ssm, y):
            return LinearGaussianMarginal(ssm, length).log_prob(y)

        gradient = jax.grad(log_prob, argnums=(0, 1))
        return count_equations(jax.make_jaxpr(gradient)(two_states(), series(length)))

    assert size(SHORT) == size(LONG) > 20
