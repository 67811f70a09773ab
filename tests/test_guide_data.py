"""`AutoStateSpace` on data as they come: missing, with inputs, in trials, subsampled, masked; under every objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pssm
from pssm.distributions import StatePath, observe
from pssm.guides import AutoStateSpace
from pssm.infer import TraceConditionalKL_ELBO

T, TRIALS, NOISE = 6, 3, 0.7
RNG = np.random.default_rng(0)
A = 0.5 * RNG.normal(size=(T, 2, 2))
B, C = RNG.normal(size=(2, 1)), RNG.normal(size=(3, 2))
FACTOR = np.array([[0.6, 0.0], [0.3, 0.4]])
U = RNG.normal(size=(T, 1))
SSM = pssm.LinearGaussianSSM(np.zeros(2), np.eye(2), A, FACTOR, C, NOISE * np.eye(3), B=B, time_varying=("A",))
Y = RNG.normal(size=(TRIALS, T, 3))
Y[0, 2], Y[0, 3, 1], Y[1, 0], Y[1, -1], Y[2, 4, :2] = (np.nan,) * 5
MASK = np.array([True, False, True])


def prior():
    own = [jnp.asarray(x, jnp.result_type(float)) for x in (np.zeros(2), np.eye(2), A, FACTOR, U, B)]
    return StatePath(*own[:4], T, own[4], B=own[5], time_varying=("transition",))


def evidences():
    return np.array([oracles.log_likelihood(SSM, y, U) for y in Y])


def one(y=None):
    z = numpyro.sample("z", prior())
    observe("y", dist.Normal(z @ C.T, NOISE).to_event(2), y)


def trials(y, size=TRIALS, mask=None):
    with (
        numpyro.plate("trials", TRIALS, subsample_size=size) as index,
        handlers.mask(mask=True if mask is None else mask),
    ):
        z = numpyro.sample("z", prior())
        observe("y", dist.Normal(z @ C.T, NOISE).to_event(2), jnp.asarray(y)[index])


def with_scale(y):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
    z = numpyro.sample("z", prior())
    observe("y", dist.Normal(z @ C.T, scale).to_event(2), y)


def started(model, *args, loss=None, **options):
    """The guide, and its parameters at the start."""
    guide = AutoStateSpace(model, **({"rank": 2} | options))
    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO() if loss is None else loss)
    state = svi.init(jax.random.key(0), *args)
    return guide, svi.get_params(state)


@functools.cache
def started_on_one():
    """The guide of one trial, found once (in float64)."""
    return started(one, Y[0])


def losses(loss, model, guide, params, *args, num=20):
    one = jax.jit(lambda key: loss.loss(key, params, model, guide, *args))
    return -np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(1), num)))


@pytest.mark.parametrize("potentials", ["free", "mode"])
def test_holes_inputs_and_changing_dynamics_are_exact(potentials, x64):
    guide, params = started(trials, Y, potentials=potentials)
    found = losses(Trace_ELBO(), trials, guide, params, Y)
    np.testing.assert_allclose(found, evidences().sum(), rtol=1e-6)


@pytest.mark.parametrize("potentials", ["free", "mode"])
def test_a_minibatch_stands_for_all_trials(potentials, x64):
    """One trial at a time: the loss is one of three values, and their mean is the full loss."""
    guide, params = started(trials, Y, 1, potentials=potentials)
    found = losses(Trace_ELBO(), trials, guide, params, Y, 1, num=40)
    expected = TRIALS * evidences()
    which = np.abs(found[:, None] - expected).argmin(1)
    np.testing.assert_allclose(found, expected[which], rtol=1e-6)
    assert set(which) == {0, 1, 2}
    if potentials == "free":
        assert params["z_auto_K"].shape == (TRIALS, T, 2, 2)


@pytest.mark.slow
def test_two_of_three_trials_at_a_time(x64):
    guide, params = started(trials, Y, 2)
    found = losses(Trace_ELBO(), trials, guide, params, Y, 2, num=40)
    own = evidences()
    pairs = 1.5 * np.array([own[0] + own[1], own[0] + own[2], own[1] + own[2]])
    which = np.abs(found[:, None] - pairs).argmin(1)
    np.testing.assert_allclose(found, pairs[which], rtol=1e-6)
    assert set(which) == {0, 1, 2}


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceConditionalKL_ELBO()], ids=["trace", "conditional"])
def test_masked_trials_do_not_count(loss, x64):
    guide, params = started(trials, Y, TRIALS, MASK)
    found = losses(loss, trials, guide, params, Y, TRIALS, MASK, num=2000)
    error = found.std() / np.sqrt(len(found))
    assert abs(found.mean() - evidences()[MASK].sum()) < 4 * error + 1e-4
    if isinstance(loss, Trace_ELBO):
        assert found.std() < 1e-4


def test_diagonal_family_is_a_bound(x64):
    guide, params = started(one, Y[0], family="diagonal", rank=2)
    assert not any(name.endswith("_K") and x.size for name, x in params.items())
    found = losses(Trace_ELBO(), one, guide, params, Y[0], num=4000)
    evidence = evidences()[0]
    assert evidence - 2 < found.mean() < evidence
    assert np.log(np.mean(np.exp(found - evidence))) == pytest.approx(0.0, abs=0.1)


def enumerated():
    pytest.importorskip("funsor")
    from numpyro.infer import TraceEnum_ELBO

    return TraceEnum_ELBO()


OBJECTIVES = {
    "trace": Trace_ELBO,
    "mean field": TraceMeanField_ELBO,
    "graph": TraceGraph_ELBO,
    "renyi": lambda: RenyiELBO(alpha=0.5, num_particles=3),
    "enum": enumerated,
    "conditional": TraceConditionalKL_ELBO,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_gives_the_evidence(name, x64):
    loss = OBJECTIVES[name]()
    guide, params = started_on_one()
    found = losses(loss, one, guide, params, Y[0], num=2000 if name in ("mean field", "conditional") else 10)
    evidence = evidences()[0]
    if name in ("mean field", "conditional"):  # the divergence apart from the draw's likelihood
        assert abs(found.mean() - evidence) < 4 * found.std() / np.sqrt(len(found))
    else:
        np.testing.assert_allclose(found, evidence, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "double"),
    [({}, False), ({"potentials": "mode"}, False), ({"potentials": "mode"}, True), ({"family": "diagonal"}, False)],
    ids=str,
)
def test_gradients_are_finite(options, double):
    with jax.enable_x64(double):
        guide, params = started(with_scale, Y[0], rank=1, **({} if "rank" in options else options))
        loss = TraceConditionalKL_ELBO()
        value, slope = jax.jit(jax.value_and_grad(lambda p: loss.loss(jax.random.key(0), p, with_scale, guide, Y[0])))(
            params
        )
        assert np.isfinite(value)
        for name, x in slope.items():
            assert np.isfinite(x).all(), name
        trained = {n for n, x in slope.items() if np.abs(x).max(initial=0) > 0}
        assert "scale_auto_loc" in trained
        assert ("z_auto_k" in trained) == (options.get("potentials") != "mode")
        assert not trained & {"z_auto_center", "z_auto_scale"}


def test_draws_medians_and_quantiles(x64):
    guide, params = started_on_one()
    mean, cov = oracles.states(SSM, Y[0], U)["smoothed"]
    sd = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
    draws = np.asarray(guide.sample_posterior(jax.random.key(2), params, Y[0], sample_shape=(50, 100))["z"])
    assert draws.shape == (50, 100, T, 2)
    assert (np.abs(draws.mean((0, 1)) - mean) < 5 * sd / np.sqrt(5000)).all()
    np.testing.assert_allclose(draws.std((0, 1)), sd, rtol=0.06)
    assert np.abs((guide.median(params, Y[0])["z"] - mean) / sd).max() < 0.1
    with pytest.raises(ValueError, match="a guide keeps no data"):
        guide.median(params)
    low, high = guide.quantiles(params, [0.1, 0.9], Y[0])["z"]
    np.testing.assert_allclose((high - mean) / sd, 1.2816, atol=0.15)
    np.testing.assert_allclose((low - mean) / sd, -1.2816, atol=0.15)
    single = guide.sample_posterior(jax.random.key(2), params, Y[0])
    assert single["z"].shape == (T, 2)


def test_predictive_runs_guide_and_model(x64):
    guide, params = started_on_one()
    paths = Predictive(guide, params=params, num_samples=4000)(jax.random.key(3), Y[0])["z"]
    mean, cov = oracles.states(SSM, Y[0], U)["smoothed"]
    sd = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
    assert (np.abs(paths.mean(0) - mean) < 5 * sd / np.sqrt(4000)).all()
    made = Predictive(one, posterior_samples={"z": paths}, num_samples=4000)(jax.random.key(4))["y"]
    assert made.shape == (4000, T, 3)
    np.testing.assert_allclose(made.mean(0), mean @ C.T, atol=0.15)
    both = Predictive(one, guide=lambda: guide(Y[0]), params=params, num_samples=7)(jax.random.key(5))
    assert both["y"].shape == (7, T, 3)


def test_every_site_of_the_model_comes_back(x64):
    guide, params = started(with_scale, Y[0], potentials="mode")
    found = guide.sample_posterior(jax.random.key(2), params, Y[0], sample_shape=(5,))
    assert found["scale"].shape == (5,)
    assert found["z"].shape == (5, T, 2)
    assert {n: x.shape for n, x in guide.median(params, Y[0]).items()} == {"scale": (), "z": (T, 2)}
