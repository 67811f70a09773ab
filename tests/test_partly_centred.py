"""Paths between their centred and their non-centred form: exact densities, one posterior, and the rule of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

import pssm
from pssm.distributions import NonCenteredPath, PartiallyCenteredPath, StatePath
from pssm.distributions.partly_centred import PartlyCentredPath
from pssm.infer import centering
from pssm.linalg import Diagonal

STEPS = 5


def turn(z, u):
    return jnp.stack([0.8 * z[0] + 0.3 * jnp.sin(z[1]), -0.2 * z[0] + 0.6 * z[1]])


def paths():
    rng = np.random.default_rng(0)
    full = np.array([[0.5, 0.1, 0.2], [0.2, 0.4, -0.1]])  # more columns than rows, no triangle
    P0 = np.array([[0.9, 0.0], [0.3, 0.6]])
    return {
        "nonlinear": StatePath(np.ones(2), P0, turn, full, STEPS),
        "diagonal": StatePath(np.ones(2), np.eye(2), turn, Diagonal(jnp.array([0.3, 2.0])), STEPS),
        "state_noise": StatePath(np.ones(2), P0, turn, lambda z, u: (1 + z[0] ** 2) * jnp.asarray(full), STEPS),
        "timed": StatePath(
            np.ones(2), P0, 0.7 * np.eye(2), rng.normal(size=(STEPS, 2, 2)), STEPS, time_varying=("chol_Q",)
        ),
    }


@pytest.mark.parametrize("name", ["nonlinear", "diagonal", "state_noise", "timed"])
def test_the_density_is_that_of_the_path_by_change_of_variables(name, x64):
    path = paths()[name]
    rng = np.random.default_rng(1)
    for c in (rng.uniform(size=(STEPS, 2)), 0.3, 0.0, 1.0):
        d = PartlyCentredPath(path, c)
        x = jnp.asarray(rng.normal(size=(STEPS, 2)))
        z = d.path_of(x)
        slope = jax.jacobian(d.path_of)(x).reshape(2 * STEPS, 2 * STEPS)
        want = path.log_prob(z) + np.linalg.slogdet(slope)[1]
        assert float(d.log_prob(x)) == pytest.approx(float(want), abs=1e-9)
        np.testing.assert_allclose(d.base_of(z), x, atol=1e-9)
    np.testing.assert_allclose(z, x, atol=1e-12)  # the last weight is 1
    noise = PartlyCentredPath(path, 0.0)
    assert float(noise.log_prob(x)) == pytest.approx(float(dist.Normal(0.0, 1.0).log_prob(x).sum()), abs=1e-9)


def test_draws_are_draws_of_the_path():
    path = paths()["nonlinear"]
    d = PartlyCentredPath(path, jnp.array([0.2, 0.8]))
    z = jax.jit(lambda k: d.path_of(d.sample(k, (4000,))))(jax.random.key(0))
    other = path.sample(jax.random.key(1), (4000,))
    assert z.shape == (4000, STEPS, 2)
    np.testing.assert_allclose(z.mean(0), other.mean(0), atol=0.08)
    np.testing.assert_allclose(z.std(0), other.std(0), rtol=0.08)


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_noise_free_directions_stay_non_centred(wide):
    with jax.enable_x64(wide):
        A, Q = jnp.array([[1.1, -0.4], [1.0, 0.0]]), jnp.array([[0.7], [0.0]])
        path = StatePath(jnp.zeros(2), jnp.diag(jnp.array([1.0, 0.0])), A, Q, STEPS)
        d = PartlyCentredPath(path, 1.0)
        x = d.sample(jax.random.key(0))
        z = d.path_of(x)
        np.testing.assert_allclose(z[1:, 1], z[:-1, 0], atol=1e-6)
        np.testing.assert_allclose(z[:, 0], x[:, 0], atol=1e-6)
        want = dist.Normal(0.0, 1.0).log_prob(x[0, 0]) + dist.Normal(0.0, 1.0).log_prob(x[:, 1]).sum()
        want += dist.Normal((z[:-1] @ A.T)[:, 0], 0.7).log_prob(z[1:, 0]).sum()
        assert float(d.log_prob(x)) == pytest.approx(float(want), abs=1e-10 if wide else 1e-4)

        def density(scale, x):
            path = StatePath(jnp.zeros(2), jnp.eye(2), A, scale * jnp.eye(2)[:, :1], STEPS)
            d = PartlyCentredPath(path, 0.5)
            return d.log_prob(x) + jnp.sum(d.path_of(x))

        assert all(np.isfinite(g).all() for g in jax.grad(density, (0, 1))(0.7, x))


def test_batches(x64):
    rng = np.random.default_rng(0)
    m0, c = rng.normal(size=(3, 2)), rng.uniform(size=(3, STEPS, 2))
    d = PartlyCentredPath(StatePath(m0, np.eye(2), turn, 0.4 * np.eye(2), STEPS), c)
    x = d.sample(jax.random.key(0), (4,))
    assert x.shape == (4, 3, STEPS, 2)
    single = [PartlyCentredPath(StatePath(m0[i], np.eye(2), turn, 0.4 * np.eye(2), STEPS), c[i]) for i in range(3)]
    for i, one in enumerate(single):
        np.testing.assert_allclose(d.log_prob(x)[:, i], one.log_prob(x[:, i]), atol=1e-10)
        np.testing.assert_allclose(d.path_of(x)[:, i], one.path_of(x[:, i]), atol=1e-10)
    mapped = jax.vmap(
        lambda m, c, x: PartlyCentredPath(StatePath(m, np.eye(2), turn, 0.4 * np.eye(2), STEPS), c).log_prob(x)
    )
    np.testing.assert_allclose(mapped(m0, c, x[0]), d.log_prob(x[0]), atol=1e-10)


def level(y=None, num_steps=12, unit=1.0):
    steps = num_steps if y is None else len(y)
    one = jnp.eye(1)
    s = numpyro.sample("s", dist.LogNormal(jnp.log(0.5), 0.5))
    prior = StatePath(jnp.zeros(1), unit * one, one, unit * s * one, steps).in_units(0.0, unit)
    z = numpyro.sample("z", prior)
    pssm.observe("y", dist.Normal(z, 0.3 * unit).to_event(2), obs=y)


def series(unit=1.0):
    y = np.array(np.cumsum(np.random.default_rng(0).normal(size=12)) * 0.7)[:, None]
    y[5] = np.nan
    return unit * y


def partly(c):
    return numpyro.handlers.reparam(level, config={"z": PartiallyCenteredPath(c)})


def run(model, y, draws=1500, **kwargs):
    mcmc = MCMC(NUTS(model), num_warmup=400, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), y, extra_fields=("num_steps",), **kwargs)
    return mcmc


def test_every_weight_has_the_posterior_of_the_exact_marginal():
    y, grid = series(), np.exp(np.linspace(-3, 2, 300))
    one = jnp.eye(1)

    def exact(s):
        ssm = pssm.LinearGaussianSSM(jnp.zeros(1), one, one, s * one, one, 0.3 * one)
        return pssm.log_likelihood(ssm, y), pssm.kalman_smoother(ssm, y).mean[:, 0]

    value, means = jax.jit(jax.vmap(exact))(grid)
    log_weights = np.asarray(value) - 0.5 * ((np.log(grid) - np.log(0.5)) / 0.5) ** 2
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    mean = weights @ np.log(grid)
    sd = np.sqrt(weights @ (np.log(grid) - mean) ** 2)
    for c in (0.0, 0.5, 1.0):
        draws = run(partly(c), y).get_samples()
        assert np.log(draws["s"]).mean() == pytest.approx(mean, abs=0.2 * sd)
        assert np.log(draws["s"]).std() == pytest.approx(sd, rel=0.15)
        np.testing.assert_allclose(draws["z"][..., 0].mean(0), weights @ np.asarray(means), atol=0.08)


def test_units_do_not_matter_to_the_sampler():
    """Starts are drawn in the sampler's own coordinates, which move with the units of the data."""

    def start(unit):
        model = numpyro.handlers.reparam(lambda y: level(y, unit=unit), config={"z": PartiallyCenteredPath(0.5)})
        found = numpyro.infer.util.initialize_model(jax.random.key(0), model, model_args=(series(unit),))
        return found.param_info.z, found.potential_fn(found.param_info.z)

    (one, low), (two, high) = start(1.0), start(1024.0)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-5, atol=1e-5)
    assert float(high - low) == pytest.approx(11 * np.log(1024.0), rel=1e-3)  # of 11 values that are seen


def test_the_rule():
    y = series()
    found = centering(level, y, values={"s": 0.6})["z"]
    q = np.r_[1.0, 11 * [0.36]]
    want = q / (q + 0.09)
    want[5] = 0.0
    np.testing.assert_allclose(found[:, 0], want, rtol=1e-4)
    median = centering(level, y)["z"]  # 0.5 is the median of the prior, up to draws
    assert 0.4 < float(median[1, 0]) < 0.9

    def several(y):
        one = jnp.eye(2)
        with numpyro.plate("series", 2):
            z = numpyro.sample("z", StatePath(jnp.zeros(2), one, 0.9 * one, jnp.diag(jnp.array([0.5, 0.0])), 4))
            pssm.observe("y", dist.Poisson(jnp.exp(z)).to_event(2), obs=y)

    weights = np.asarray(centering(several, np.ones((2, 4, 2)))["z"])
    assert weights.shape == (2, 4, 2)
    assert (weights[:, 1:, 1] == 0).all(), "no noise"
    assert ((weights[..., 0] > 0.05) & (weights[..., 0] < 0.95)).all()
    with pytest.raises(ValueError, match="`model` must have a `StatePath` site"):
        centering(lambda: numpyro.sample("x", dist.Normal()))


def test_a_fit_forecasts():
    mcmc = run(partly(0.7), series(), draws=50)
    assert mcmc.get_samples()["z"].shape == (50, 12, 1)
    found = pssm.infer.forecast(mcmc, 3)
    assert found.draws.shape[-2:] == (3, 1)
    assert np.isfinite(np.asarray(found.draws)).all()


def test_bad_weights_are_named():
    with pytest.raises(ValueError, match=r"`centered` must lie in \[0, 1\]"):
        PartiallyCenteredPath(1.5)
    with numpyro.handlers.seed(rng_seed=0):
        with pytest.raises(ValueError, match="`centered` must be a number or broadcast"):
            partly(np.ones(3))()
        wrong = numpyro.handlers.reparam(
            lambda: numpyro.sample("z", dist.Normal(jnp.zeros((3, 1)), 1.0).to_event(2)),
            config={"z": PartiallyCenteredPath(0.5)},
        )
        with pytest.raises(TypeError, match="`z` must be a StatePath"):
            wrong()
        observed = numpyro.handlers.reparam(
            numpyro.handlers.condition(level, data={"z": jnp.zeros((12, 1))}), config={"z": PartiallyCenteredPath(0.5)}
        )
        with pytest.raises(ValueError, match="`z` is observed"):
            observed()


def leapfrogs(model, y, **kwargs):
    return float(np.mean(run(model, y, draws=600, **kwargs).get_extra_fields()["num_steps"]))


@pytest.mark.slow
def test_the_rule_saves_leapfrogs_where_data_are_strong():
    y = series()
    rule = leapfrogs(partly(centering(level, y, values={"s": 0.7})["z"]), y)
    noise = leapfrogs(numpyro.handlers.reparam(level, config={"z": NonCenteredPath()}), y)
    assert rule < 0.7 * noise
