"""States and forecasts of every kind of fit of one linear-Gaussian model, against the exact ones."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.handlers import reparam, substitute
from numpyro.infer import MCMC, NUTS, SVI

import pssm
from pssm import LinearGaussianSSM, infer, models, nets
from pssm.diagnostics import to_datatree
from pssm.distributions import LinearGaussianMarginal, NonCenteredPath, StatePath, observe
from pssm.guides import AmortizedStateSpace, AutoStateSpace, DeepKalmanGuide

pytestmark = pytest.mark.filterwarnings("ignore:SVI has not converged", "ignore:.*transitions diverged")
STEPS, AHEAD = 12, 4
RNG = np.random.default_rng(0)
A, B, C = np.array([[0.9, 0.3], [0.0, 0.7]]), np.array([[0.5], [-1.0]]), np.array([[1.0, 0.5]])
Q, R = np.diag([0.5, 0.3]), 0.4
U = RNG.normal(size=(STEPS + AHEAD, 1)).astype(np.float32)
SSM = LinearGaussianSSM(np.zeros(2), np.eye(2), A, Q, C, R * np.eye(1), B=B)
Y = np.array(pssm.simulate(jax.random.key(1), SSM, STEPS, U[:STEPS])[1])
Y[[3, 7]] = np.nan


def sampled(y, u):
    """The path is a site; `unused` stands for parameters."""
    numpyro.sample("unused", dist.Normal(0.0, 1.0))
    path = StatePath(jnp.zeros(2), jnp.eye(2), jnp.asarray(A), jnp.asarray(Q), len(y), u, B=jnp.asarray(B))
    z = numpyro.sample("z", path)
    observe("flow", dist.Normal(z @ C.T, R).to_event(2), y)


def function(y, u):
    """The same with a function as transition, and the observation's mean a parameter that is learned: zero."""
    shift = numpyro.param("shift", jnp.zeros(()))
    path = StatePath(jnp.zeros(2), jnp.eye(2), lambda z, u: A @ z + B @ u, jnp.asarray(Q), len(y), u)
    z = numpyro.sample("z", path)
    observe("flow", dist.Normal(z @ C.T + 0.0 * shift, R).to_event(2), y)


def marginal(y, u):
    numpyro.sample("unused", dist.Normal(0.0, 1.0))
    numpyro.sample("flow", LinearGaussianMarginal(SSM, len(y), u), obs=y)


NUTS_OPTIONS = {"num_warmup": 200, "num_samples": 600, "num_chains": 2, "progress_bar": False}


def nuts(model):
    return infer.fit_nuts(model, Y, u=U[:STEPS], **NUTS_OPTIONS)


def svi(model, guide, steps=10):
    """A guide that is exact at its start, trained as good as not at all."""
    return infer.fit_svi(model, Y, u=U[:STEPS], guide=guide, num_steps=steps, learning_rate=1e-6, progress_bar=False)


def own_svi():
    run = SVI(sampled, AutoStateSpace(sampled, rank=2), optax.sgd(0.0), infer.TraceConditionalKL_ELBO())
    result = run.run(jax.random.key(0), 1, Y, u=U[:STEPS], progress_bar=False)
    return infer.SVIFit.of(run, result, Y, u=U[:STEPS])


def transported():
    fit = svi(sampled, AutoStateSpace(sampled, rank=2))
    return nuts(infer.transport_reparam(substitute(sampled, data=fit.params), fit.svi.guide))


def plain_numpyro():
    mcmc = MCMC(NUTS(marginal), num_warmup=20, num_samples=100, progress_bar=False)
    mcmc.run(jax.random.key(0), Y, u=U[:STEPS])
    return mcmc


FITS = {
    "NUTS, states integrated out": lambda: nuts(marginal),
    "NumPyro's own MCMC": plain_numpyro,
    "MCLMC, states integrated out": lambda: infer.fit_mclmc(
        two_unknowns, Y, u=U[:STEPS], num_warmup=200, num_samples=50, num_chains=2, progress_bar=False),
    "NUTS over the path's noise": lambda: nuts(reparam(sampled, config={"z": NonCenteredPath()})),
    "NUTS through a guide's map": transported,
    "SVI, free potentials": lambda: svi(sampled, AutoStateSpace(sampled, rank=2)),
    "SVI, potentials at the mode": lambda: svi(function, AutoStateSpace(function, rank=2, potentials="mode")),
    "NumPyro's own SVI": own_svi,
    "SVI, refined encoder": lambda: svi(sampled, refined()),
}  # fmt: skip


def two_unknowns(y, u):
    numpyro.sample("other", dist.Normal(0.0, 1.0))
    marginal(y, u)


def refined():
    encoder = nets.sequence_encoder(n_obs=1, n_state=2, rank=2, size=4, n_input=1, key=jax.random.key(0))
    return AmortizedStateSpace(sampled, encoder=encoder, rank=2, refine=3)


@functools.cache
def fitted(name):
    return FITS[name]()


every_fit = pytest.mark.parametrize("name", list(FITS))


def close(found, mean, sd, count):
    """Within five standard errors of `count` effective draws, or equal where nothing is drawn."""
    assert found[0].shape == mean.shape
    np.testing.assert_array_less(np.abs(found[0] - mean), 5 * sd / np.sqrt(count) + 1e-3)
    np.testing.assert_allclose(found[1], sd, rtol=5 / np.sqrt(2 * count) + 1e-3)


@every_fit
def test_smoothed_states_and_signal(name):
    exact = pssm.kalman_smoother(SSM, Y, U[:STEPS])
    cov = np.asarray(exact.cov)
    found = infer.smoothed_states(fitted(name))
    close(found.state, exact.mean, np.sqrt(np.diagonal(cov, axis1=1, axis2=2)), 100)
    close(found.signal, exact.mean @ C.T, np.sqrt(C @ cov @ C.T)[:, :, 0], 100)
    paths = infer.sample_states(fitted(name), most=200)
    assert paths.shape[1:] == (STEPS, 2)
    close((paths.mean(0), paths.std(0)), exact.mean, np.sqrt(np.diagonal(cov, axis1=1, axis2=2)), 50)


@every_fit
def test_forecast(name):
    exact = pssm.forecast(SSM, Y, AHEAD, U[:STEPS], U[STEPS:])
    sd = np.sqrt(np.diagonal(exact.cov, axis1=1, axis2=2))
    found = infer.forecast(fitted(name), AHEAD, u_future=U[STEPS:])
    close(found, np.asarray(exact.mean), sd, 100)
    assert found.draws.shape[1:] == (AHEAD, 1)
    close((found.draws.mean(0), found.draws.std(0)), np.asarray(exact.mean), sd, 50)
    assert (np.diff(found.quantiles, axis=0) > 0).all()


@every_fit
def test_a_tree_has_both(name):
    tree = to_datatree(fitted(name), states=True, forecast=AHEAD, u_future=U[STEPS:])
    assert dict(tree["smoothed_states"].sizes) == {"time": STEPS, "state": 2, "series": 1}
    assert dict(tree["forecast"].sizes) == {"horizon": AHEAD, "series": 1}
    found = infer.forecast(fitted(name), AHEAD, u_future=U[STEPS:])
    np.testing.assert_allclose(tree["forecast"]["mean"].values, found.mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["NUTS, states integrated out", "SVI, free potentials", "SVI, potentials at the mode"])
def test_forecast_from_an_earlier_origin_knows_the_past_alone(name):
    known = 8
    exact = pssm.forecast(SSM, Y[:known], AHEAD, U[:known], U[known : known + AHEAD])
    found = infer.forecast(fitted(name), AHEAD, origin=known, u_future=U[STEPS:])
    close(found, np.asarray(exact.mean), np.sqrt(np.diagonal(exact.cov, axis1=1, axis2=2)), 100)


def test_an_earlier_origin_of_sampled_states_is_refused():
    with pytest.raises(ValueError, match="`origin`: the drawn states know the whole series"):
        infer.forecast(fitted("NUTS over the path's noise"), AHEAD, origin=8, u_future=U[STEPS:])


def test_learned_parameters_alone():
    """Maximum likelihood by SVI: nothing is drawn, and the forecast is that of the fitted system."""

    def model(y, u):
        scale = numpyro.param("scale", 3.0)
        numpyro.sample("flow", LinearGaussianMarginal(SSM.replace(chol_R=scale * jnp.eye(1)), len(y), u), obs=y)

    options = {"guide": lambda y, u: None, "num_steps": 10, "learning_rate": 0.1, "progress_bar": False}
    fit = infer.fit_svi(model, Y, u=U[:STEPS], **options)
    assert fit.params["scale"] < 2.9
    exact = pssm.forecast(SSM.replace(chol_R=fit.params["scale"] * jnp.eye(1)), Y, AHEAD, U[:STEPS], U[STEPS:])
    found = infer.forecast(fit, AHEAD, u_future=U[STEPS:])
    close(found, np.asarray(exact.mean), np.sqrt(np.diagonal(exact.cov, axis1=1, axis2=2)), 1e8)
    tree = to_datatree(fit, states=True, forecast=AHEAD, u_future=U[STEPS:])
    np.testing.assert_allclose(tree["forecast"]["mean"], exact.mean, rtol=1e-4, atol=1e-4)


def test_models_of_pssm_with_sampled_states_forecast_exactly():
    """Given the parameters the states are integrated out, whatever the chain did with them."""
    y = pssm.datasets.load("nile").y[:20]
    fit = infer.fit_nuts(models.local_level, y, states="sampled", **{**NUTS_OPTIONS, "num_samples": 20})
    found = infer.forecast(fit, 3)
    draws = {n: x for n, x in infer.posterior_draws(fit).items() if n.startswith("sigma")}
    np.testing.assert_allclose(found.mean, infer.forecast(models.local_level, draws, 3, y).mean, rtol=1e-5)


def panel(y, batch_size=None):
    with numpyro.plate("trials", len(y), subsample_size=batch_size) as index:
        path = StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), 0.5 * jnp.eye(1), y.shape[1])
        z = numpyro.sample("z", path)
        observe("counts", dist.Poisson(jnp.exp(0.3 * z)).to_event(2), y[index])


@pytest.mark.parametrize("trials", [3, 6], ids=["more steps", "as many trials as steps"])
def test_panel(trials):
    y = jnp.asarray(RNG.poisson(1.0, (trials, 6, 1)).astype(float))
    fit = infer.fit_svi(panel, y, guide="chain", rank=1, num_steps=10, progress_bar=False)
    assert infer.smoothed_states(fit).state.mean.shape == (trials, 6, 1)
    found = infer.forecast(fit, 2)
    assert found.mean.shape == (trials, 2, 1)
    assert (found.draws == np.round(found.draws)).all(), "counts"
    later = infer.forecast(fit, 40, key=1).mean[:, -1]  # forgotten: E exp(0.3 z) of the stationary states
    np.testing.assert_allclose(later, np.exp(0.3**2 * 0.25 / (1 - 0.81) / 2), rtol=0.1)


def test_a_network_as_posterior_and_as_transition():
    """Learned parameters are at their fitted values, not at their start."""

    def model(y):
        net = pssm.register.register("net", eqx.nn.Linear(1, 1, key=jax.random.key(0)))
        path = StatePath(jnp.zeros(1), jnp.eye(1), lambda z, u: net(z), 0.5 * jnp.eye(1), len(y))
        z = numpyro.sample("z", path)
        observe("y", dist.Normal(z, 0.1).to_event(2), y)

    one, two = jax.random.split(jax.random.key(1))
    encoder = nets.RecurrentFeatures(nets.StepMLP(1, 4, hidden=4, key=one), nets.GRU(4, 4, key=two))
    guide = DeepKalmanGuide(model, encoder=encoder, combiner=nets.Combiner(1, 4, key=one))
    fit = infer.fit_svi(model, 3 + 0 * Y, guide=guide, num_steps=10, progress_bar=False)
    name = next(n for n in fit.params if n.startswith("net"))
    fit = infer.SVIFit.of(fit.svi, fit, 3 + 0 * Y)
    start = infer.forecast(fit, 1).mean
    moved = fit._replace(params={**fit.params, name: jax.tree.map(lambda x: x + 5.0, fit.params[name])})
    moved = infer.SVIFit.of(fit.svi, moved._replace(state=_with_params(fit, moved.params)), 3 + 0 * Y)
    assert np.abs(infer.forecast(moved, 1).mean - start).min() > 2


def _with_params(fit, params):
    return fit.state._replace(optim_state=fit.svi.optim.init(params))


def test_frames():
    """Codes integrated out: future frames come from the guide's codes of a longer series."""
    one, two = jax.random.split(jax.random.key(0))
    guide = pssm.guides.AmortizedFrames(
        models.kalman_vae, encoder=nets.FrameEncoder(nets.StepMLP(9, 8, hidden=8, key=one), 2, key=two))  # fmt: skip
    frames = jnp.zeros((4, 5, 9))
    fit = infer.fit_svi(models.kalman_vae, frames, guide=guide, num_steps=10, progress_bar=False)
    assert infer.forecast(fit, 3, most=20).mean.shape == (4, 3, 9)
    assert infer.smoothed_states(fit, most=20).state.mean.shape[:2] == (4, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "`horizon` must be at least 1"),
        ((2,), {}, "`u_future` is required"),
        ((2,), {"u_future": U[:2], "origin": 0}, "`origin` must be from 1 to 12"),
        ((2,), {"u_future": U[:2], "site": "other"}, "`site` must be one of \\['flow'\\]"),
    ],
)
def test_refusals_name_the_argument(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        infer.forecast(fitted("SVI, free potentials"), *arguments, **options)


def test_a_model_without_states_is_named():
    def model(y):
        numpyro.sample("y", dist.Normal(numpyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=y)

    fit = infer.fit_svi(model, np.zeros(3), guide="normal", num_steps=10, progress_bar=False)
    with pytest.raises(ValueError, match="neither a `LinearGaussianMarginal` nor a `StatePath`"):
        infer.smoothed_states(fit)
    with pytest.raises(TypeError, match="`fit` must come from"):
        infer.smoothed_states({"mu": 1.0})
