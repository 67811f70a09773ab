"""`simulation_based_calibration`: right methods pass, wrong ones are found and named."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pssm.diagnostics import simulation_based_calibration
from pssm.distributions import StatePath, observe

N = 3


def mean_of_normals(y=None):
    mu = numpyro.sample("mu", dist.Normal(jnp.array([0.0, 2.0]), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(mu, 1.0).expand([N, 2]).to_event(2), obs=y)


def exact(shift=0.0, scale=1.0):
    """The posterior of `mean_of_normals`, or a wrong one."""

    @jax.jit
    def sampler(key, y):
        mean = (jnp.array([0.0, 2.0]) + y.sum(0)) / (N + 1)
        return {"mu": mean + shift + scale * (N + 1) ** -0.5 * jax.random.normal(key, (99, 2))}

    return sampler


def walk(y=None):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
    z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), 0.5 * jnp.eye(1), 5))
    observe("y", dist.Normal(z, scale).to_event(2), y)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [({}, "no sign"), ({"shift": 0.3}, "too high"), ({"shift": -0.3}, "too low")]
    + [({"scale": 0.6}, "too narrow"), ({"scale": 1.8}, "too wide")],
)
def test_what_is_wrong_is_named(wrong, word):
    found = simulation_based_calibration(mean_of_normals, exact(**wrong), num_simulations=200)
    assert word in found.verdict
    assert found.ranks["mu"].shape == (200, 2)
    assert (found.smallest[1] < 0.05) == bool(wrong)


@pytest.mark.slow
def test_p_values_of_a_right_method_are_not_small_too_often():
    small = [
        simulation_based_calibration(mean_of_normals, exact(), num_simulations=50, key=k).p_values["mu"].values < 0.05
        for k in range(20)
    ]
    assert np.mean(small) < 0.15


def test_ranks_can_be_plotted():
    found = simulation_based_calibration(mean_of_normals, exact(), num_simulations=20)
    tree = found.to_datatree()
    assert dict(tree["prior_sbc"].sizes) == {"chain": 1, "draw": 20, "mu_dim_0": 2}
    values = np.asarray(tree["prior_sbc"]["mu"])
    assert ((values > 0) & (values < 1)).all()


def test_a_guide_and_nuts_run_and_report_progress():
    seen = []
    for method in ("nuts", "svi:normal"):
        options = {"num_simulations": 3, "num_draws": 9, "num_warmup": 50, "thin": 1, "num_steps": 50}
        found = simulation_based_calibration(
            mean_of_normals, method, **options, progress=lambda *done: seen.append(done)
        )
        assert method in found.verdict
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nuts", "svi:chain"])
def test_methods_are_calibrated_on_a_state_space_model(method):
    found = simulation_based_calibration(walk, method, num_simulations=100, sites=("scale", "z"), num_steps=1500)
    assert found.smallest[1] > 0.01, found.verdict


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gibbs"}, "`method`"),
        ({"sites": ("sigma",)}, "`sites`"),
        ({"data_site": "x"}, "`data_site` 'x' is not a site"),
        ({"num_simulations": 0}, "`num_simulations`"),
        ({"method": lambda key, y: {"mu": jnp.zeros((5, 2))}}, "must give draws of shape"),
        ({"method": lambda key, y: {}}, "no draws of site 'mu'"),
        ({"method": lambda key, y: {"mu": jnp.full((99, 2), jnp.nan)}}, "that are NaN"),
    ],
)
def test_wrong_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        simulation_based_calibration(mean_of_normals, **{"method": exact(), "num_simulations": 2, **options})
