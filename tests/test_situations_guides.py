"""Guides in situations that users meet: plates of any layout, minibatches, point masses, no data, padding, pickles."""

import copy
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import Predictive, RenyiELBO, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
from scipy.stats import multivariate_normal
from situations import Situation, cases, check

from pssm import nets
from pssm.diagnostics import bound_gap, khat, to_datatree
from pssm.distributions import StatePath, observe
from pssm.fitting.results import record_of
from pssm.guides import (
    AmortizedFrames,
    AmortizedStateSpace,
    AutoScanStateSpace,
    AutoStateSpace,
    DeepKalmanGuide,
)
from pssm.guides.model_run import ModelRun
from pssm.guides.paths import BOUND, POINT
from pssm.infer import (
    elbo,
    fit_nuts,
    fit_svi,
    forecast,
    importance_bound,
    posterior_draws,
    transport_reparam,
)
from pssm.models import extended_kalman_vae

KEY = jax.random.key(0)
N, T = 3, 5
rng = np.random.default_rng(0)
STEP, START, DECAY, NOISE = 0.5, 1.0, 0.9, 0.8
MIX = rng.normal(size=(N, N))
Y = rng.normal(size=(N, T, 1))
ALL = rng.normal(size=(2, 3, 4, T))  # (group, series, sensor, time)


def path(steps=T):
    one = jnp.eye(1)
    return StatePath(jnp.zeros(1), START * one, DECAY * one, STEP * one, steps)


def noise(mean):
    return dist.Normal(mean, NOISE).to_event(2)


# A dense Gaussian of independent series, each with the covariance of `path`


def covariance(steps=T):
    lag = np.subtract.outer(np.arange(steps), np.arange(steps))
    A = np.where(lag >= 0, DECAY ** np.maximum(lag, 0), 0.0)
    return A @ np.diag([START**2] + [STEP**2] * (steps - 1)) @ A.T


def evidence(C, y, series):
    """Of `y = C z + noise`, `z` the paths of all series one after the other."""
    K = np.kron(np.eye(series), covariance())
    return multivariate_normal(np.zeros(len(y)), C @ K @ C.T + NOISE**2 * np.eye(len(y))).logpdf(y)


def posterior_mean(C, y, series):
    K = np.kron(np.eye(series), covariance())
    return np.linalg.solve(np.linalg.inv(K) + C.T @ C / NOISE**2, C.T @ y / NOISE**2).reshape(series, T, 1)


def continued(mean, steps):
    return np.append(mean, mean[-1] * DECAY ** np.arange(1, steps + 1)[:, None], axis=0)


def best_bound(C, y, series):
    """The best ELBO of a posterior with a factor for each series."""
    precision = np.linalg.inv(np.kron(np.eye(series), covariance())) + C.T @ C / NOISE**2
    blocks = [precision[i * T : (i + 1) * T, i * T : (i + 1) * T] for i in range(series)]
    lost = sum(np.linalg.slogdet(b)[1] for b in blocks) - np.linalg.slogdet(precision)[1]
    return evidence(C, y, series) - 0.5 * lost


def each(y):
    """The evidence of series that are observed by themselves: `y` (series, sensor, time)."""
    sensors = y.shape[1]
    C = np.kron(np.ones((sensors, 1)), np.eye(T))
    return sum(evidence(C, s.ravel(), 1) for s in y)


def mixed(weights):
    """`C` of sums over series at each step."""
    return np.kron(weights, np.eye(T))


# Models


def indexed(y):
    with numpyro.plate("series", N):
        z = numpyro.sample("z", path())
        numpyro.deterministic("first", z[:, 0, 0])
        observe("y", noise(z), y)


def inner_sensors(y):
    with numpyro.plate("series", N, dim=-2):
        z = numpyro.sample("z", path())
        with numpyro.plate("sensors", 4, dim=-1):
            observe("y", noise(jnp.broadcast_to(z, (N, 4, T, 1))), y)


def outer_sensors(y):
    with numpyro.plate("series", N, dim=-1):
        z = numpyro.sample("z", path())
        with numpyro.plate("sensors", 4, dim=-2):
            observe("y", noise(jnp.broadcast_to(z, (4, N, T, 1))), y)


def nested(y):
    with numpyro.plate("groups", 2, dim=-3), numpyro.plate("series", 3, dim=-2):
        z = numpyro.sample("z", path())
        with numpyro.plate("sensors", 4, dim=-1):
            observe("y", noise(jnp.broadcast_to(z, (2, 3, 4, T, 1))), y)


def plate_of_time(y):
    with numpyro.plate("series", N, dim=-2):
        z = numpyro.sample("z", path())
        with numpyro.plate("time", T, dim=-1):
            numpyro.sample("y", dist.Normal(z[:, 0, :, 0], NOISE), obs=y)


def time_before(y):
    with numpyro.plate("series", N, dim=-1):
        z = numpyro.sample("z", path())
        with numpyro.plate("time", T, dim=-2):
            numpyro.sample("y", dist.Normal(z[..., 0].T, NOISE), obs=y)


def without_plate(y):
    with numpyro.plate("series", N):
        z = numpyro.sample("z", path())
    observe("y", noise(z), y)


def summed(y):
    with numpyro.plate("series", N):
        z = numpyro.sample("z", path())
    observe("y", noise(z.sum(0)), y)


def factored(y):
    with numpyro.plate("series", N):
        z = numpyro.sample("z", path())
    numpyro.factor("y", noise(z.sum(0)).log_prob(y))


def other_plate(y):
    """As many sensors as series, in a plate of their own at the same dim."""
    with numpyro.plate("series", N, dim=-1):
        z = numpyro.sample("z", path())
    with numpyro.plate("sensors", N, dim=-1):
        observe("y", noise(jnp.einsum("kn,ntp->ktp", MIX, z)), y)


def own_and_summed(y, total):
    numpyro.sample("level", dist.Normal(0.0, 1.0))  # no function of the path, and in no plate
    with numpyro.plate("series", N):
        z = numpyro.sample("z", path())
        observe("y", noise(z), y)
    observe("total", noise(z.sum(0)), total)


def summed_by_group(y):
    with numpyro.plate("groups", 2, dim=-1):
        with numpyro.plate("series", 3, dim=-2):
            z = numpyro.sample("z", path())
        observe("y", noise(z.sum(0)), y)


def panel(y, batch_size=None):
    with numpyro.plate("series", len(y), subsample_size=batch_size) as index:
        z = numpyro.sample("z", path(y.shape[1]))
        observe("y", noise(z), y[index])


def with_scale(y=None):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    z = numpyro.sample("z", path())
    observe("y", dist.Normal(z, scale).to_event(2), y)


def one_series(y=None, steps=T):
    z = numpyro.sample("z", path(steps if y is None else len(y)))
    observe("y", noise(z), y)


def given_batch(y):
    """The data are a minibatch already."""
    with numpyro.plate("series", 12, subsample_size=len(y)):
        z = numpyro.sample("z", path())
        observe("y", noise(z), y)


def level_of_batch(y):
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    with numpyro.plate("series", 12, subsample_size=len(y)):
        numpyro.sample("y", dist.Normal(level, 1.0), obs=y)


def walk(y=None):
    def step(z, y_t):
        z = numpyro.sample("z", dist.Normal(0.9 * z, 0.5))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y_t)
        return z, None

    scan(step, 0.0, y, length=T)


# What is run


def bound(model, guide=AutoStateSpace, particles=1, **options):
    """The ELBO at a guide's start: of an exact one, any draw's value is the evidence."""

    def run(*args):
        args = tuple(jnp.asarray(x) for x in args)
        made = guide(model, rank=1, **options)
        trace = handlers.trace(handlers.seed(made, KEY)).get_trace(*args)
        params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
        return -Trace_ELBO(particles).loss(KEY, params, model, made, *args)

    return run


def center(model, **options):
    """The mean of the path at a guide's start."""

    def run(*args):
        made = AutoStateSpace(model, rank=1, **options)
        trace = handlers.trace(handlers.seed(made, KEY)).get_trace(*(jnp.asarray(x) for x in args))
        return made_chain(trace["z"]["fn"]).central_path()

    return run


def made_chain(fn):
    while not hasattr(fn, "central_path"):
        fn = fn.base_dist
    return fn


def encoded(model):
    """The data that an encoder gets."""

    def run(y):
        return ModelRun(model, (jnp.asarray(y),), {}, {}).data("z", {})[0]

    return run


WORDS = [BOUND, f"{BOUND}, estimated on minibatches", POINT]


def fitted(model, *args, guide=None, steps=10, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide = AutoStateSpace(model, rank=1) if guide is None else guide(model) if callable(guide) else guide
        args = tuple(jnp.asarray(x) for x in args)
        return fit_svi(model, *args, guide=guide, num_steps=steps, learning_rate=1e-9, progress_bar=False, **options)


def network_guide(kind, model):
    one, two, three = jax.random.split(KEY, 3)
    if kind == "amortised":
        return AmortizedStateSpace(
            model, encoder=nets.sequence_encoder(1, 1, 1, size=4, key=one), rank=1, masking=nets.hide_steps(0.1)
        )
    encoder = nets.RecurrentFeatures(nets.StepMLP(1, 4, hidden=4, key=one), nets.GRU(4, 4, key=two))
    return DeepKalmanGuide(model, encoder=encoder, combiner=nets.Combiner(1, 4, key=three))


def at_mode(model, **options):
    return AutoStateSpace(model, rank=1, potentials="mode", **options)


def without_data(call, model=one_series, guide=at_mode):
    """What a call gives that has no data, after a fit that had."""

    def run():
        fit = fitted(model, Y[0] + 4.2, guide=guide)
        return call(model, fit.svi.guide, fit.params)

    return run


def predictive(model, guide, params):
    return Predictive(model, guide=guide, params=params, num_samples=5)(KEY)["y"]


def later_guide(model, guide, params):
    """A guide of the same kind that has not been run yet."""
    return Predictive(model, guide=at_mode(model), params=params, num_samples=5)(KEY)["y"]


def on_delta(call, guide=AutoDelta, model=with_scale):
    return lambda: call(fitted(model, Y[0], guide=guide))


def delta_by_hand(model):
    def guide(y=None):
        numpyro.sample("scale", dist.Delta(numpyro.param("scale_at", jnp.asarray(1.0))))
        numpyro.sample("z", dist.Normal(numpyro.param("z_at", jnp.zeros((T, 1))), 1.0).to_event(2))

    return guide


def label(model, guide=None, *args, **options):
    return lambda: WORDS.index(fitted(model, *args, guide=guide, **options).objective)


def same_draws(make):
    """The largest difference of draws before and after a pickle."""

    def run():
        fit = make()
        back = pickle.loads(pickle.dumps(fit))
        a, b = (record_of(f).draws(5) for f in (fit, back))
        return max(np.abs(a[name] - b[name]).max() for name in a)

    return run


def copied_draws(fit):
    """The largest difference between draws of copies; the model is one that no pickle can hold."""
    record = record_of(fit)
    found = [each.draws(5)["z"] for each in (record, copy.copy(record), copy.deepcopy(record))]
    guides = [fit.svi.guide, copy.copy(fit.svi.guide), copy.deepcopy(fit.svi.guide)]
    draws = [np.asarray(g.sample_posterior(KEY, copy.copy(fit).params, *fit.args)["z"]) for g in guides]
    return max(np.ptp(found, axis=0).max(), np.ptp(draws, axis=0).max())


def same_guide_draws(guide, model=one_series, y=Y[0]):
    def run():
        fit = fitted(model, y, guide=guide)
        back = pickle.loads(pickle.dumps(fit.svi.guide))
        a, b = (g.sample_posterior(KEY, fit.params, jnp.asarray(y), sample_shape=(3,)) for g in (fit.svi.guide, back))
        return max(float(jnp.abs(a[name] - b[name]).max()) for name in a)

    return run


def padded_ratio(kind, padding, data=None, lengths=None):
    """`log q - log p` of given paths, with rows of padding."""

    def run(y):
        y = jnp.asarray(y)
        rows = jnp.full((N, padding, 1), jnp.nan if data is None else data, y.dtype)
        padded = jnp.concatenate([y, rows], axis=1)
        guide = network_guide(kind, panel)
        if lengths is not None:
            guide = guide.with_posterior(type(guide.posterior)(**{**vars(guide.posterior), "lengths": lengths}))
        trace = handlers.trace(handlers.seed(guide.evaluated(), KEY)).get_trace(padded)
        q = trace["z"]["fn"]
        while hasattr(q, "base_dist"):
            q = q.base_dist
        z = jnp.concatenate([jnp.cos(jnp.arange(T, dtype=y.dtype)), jnp.sin(jnp.arange(padding, dtype=y.dtype))])
        z = jnp.broadcast_to(z[:, None], (N, T + padding, 1))
        given = q.kl_given(z) if kind == "deep" else jnp.zeros(N, y.dtype)
        return jnp.stack([q.log_ratio(z), given]), q.log_prob(z) - path(T + padding).log_prob(z)

    return run


def unpadded(kind):
    return lambda: padded_ratio(kind, 0)(Y)  # in the same precision: the networks' weights depend on it


SUM = mixed(np.ones((1, N)))
GROUPS = rng.normal(size=(2, T, 1))

DOUBLE = (True,)
EAGER = {"jit": "eager", "precisions": DOUBLE}
FREE = (1e-5, 1e-4)  # stored potentials have a floor, and so a small error

TABLE = {
    # Plates: exact where each series is observed by itself
    "a path is indexed in its plate": Situation(
        bound(indexed), lambda: each(Y.transpose(0, 2, 1)), close=FREE, args=(Y,)
    ),
    "indexed, at the mode": Situation(
        bound(indexed, potentials="mode"), lambda: each(Y.transpose(0, 2, 1)), close=FREE, precisions=DOUBLE, args=(Y,)
    ),
    "sensors inside of the series": Situation(
        bound(inner_sensors), lambda: each(ALL[0]), close=FREE, args=(ALL[0][..., None],)
    ),
    "sensors outside of the series": Situation(
        bound(outer_sensors),
        lambda: each(ALL[0]),
        close=FREE,
        precisions=DOUBLE,
        args=(ALL[0].swapaxes(0, 1)[..., None],),
    ),
    "nested plates": Situation(
        bound(nested), lambda: each(ALL.reshape(6, 4, T)), close=FREE, precisions=DOUBLE, args=(ALL[..., None],)
    ),
    "a plate over time": Situation(
        bound(plate_of_time), lambda: each(Y.transpose(0, 2, 1)), close=FREE, precisions=DOUBLE, args=(Y[..., 0],)
    ),
    "a plate over time before the series'": Situation(
        bound(time_before, potentials="mode"),
        lambda: each(Y.transpose(0, 2, 1)),
        close=FREE,
        precisions=DOUBLE,
        args=(Y[..., 0].T,),
    ),
    "observed without a plate": Situation(
        bound(without_plate), lambda: each(Y.transpose(0, 2, 1)), close=FREE, precisions=DOUBLE, args=(Y,)
    ),
    # Series that share a term: the mean is that of the joint posterior
    "a sum over the series": Situation(
        center(summed), lambda: posterior_mean(SUM, Y[0].ravel(), N), args=(Y[0],), close=(1e-6, 1e-3)
    ),
    "a sum over the series, at the mode": Situation(
        center(summed, potentials="mode"),
        lambda: posterior_mean(SUM, Y[0].ravel(), N),
        precisions=DOUBLE,
        args=(Y[0],),
        close=(1e-6, 1e-3),
    ),
    "a sum over the series as a factor": Situation(
        center(factored),
        lambda: posterior_mean(SUM, Y[0].ravel(), N),
        precisions=DOUBLE,
        args=(Y[0],),
        close=(1e-6, 1e-3),
    ),
    "a plate of as many sensors": Situation(
        center(other_plate),
        lambda: posterior_mean(mixed(MIX), Y.ravel(), N),
        precisions=DOUBLE,
        args=(Y,),
        close=(1e-4, 1e-2),
    ),
    "observed by themselves and as a sum": Situation(
        center(own_and_summed),
        lambda: posterior_mean(np.vstack([np.eye(N * T), SUM]), np.append(Y, Y[1] - 1), N),
        precisions=DOUBLE,
        args=(Y, Y[1] - 1),
        close=(1e-6, 1e-3),
    ),
    "sums over one of two plates": Situation(
        center(summed_by_group),
        lambda: np.stack([posterior_mean(SUM, y.ravel(), 3) for y in GROUPS], axis=1),
        precisions=DOUBLE,
        args=(GROUPS,),
        close=(1e-6, 1e-3),
    ),
    "the bound of a sum is the best of its kind": Situation(
        bound(summed, particles=4000),
        lambda: best_bound(SUM, Y[0].ravel(), N),
        precisions=DOUBLE,
        args=(Y[0],),
        close=(2e-3, 2e-3),
    ),
    "an encoder reads sensors inside of the series": Situation(
        encoded(inner_sensors), ALL[0].swapaxes(1, 2)[:, None, :, :, None], args=(ALL[0][..., None],)
    ),
    "an encoder reads a plate over time": Situation(encoded(time_before), Y, args=(Y[..., 0].T,)),
    # Calls without data
    "prediction without data": Situation(without_data(predictive), refused="^`args`.*does not observe `y`", **EAGER),
    "prediction without data by a new guide": Situation(
        without_data(later_guide), refused="^`args`.*observes nothing", **EAGER
    ),
    "draws without data": Situation(
        without_data(lambda m, g, p: g.sample_posterior(KEY, p, None)), refused="^`args`.*does not observe `y`", **EAGER
    ),
    "medians without data": Situation(
        without_data(lambda m, g, p: g.median(p, steps=T)), refused="^`args`.*does not observe `y`", **EAGER
    ),
    "a transported model without data": Situation(
        without_data(lambda m, g, p: handlers.seed(transport_reparam(m, g, params=p), 0)()),
        refused="^`args`.*does not observe `y`",
        **EAGER,
    ),
    "a scan without data": Situation(
        without_data(
            lambda m, g, p: Predictive(m, guide=g, params=p, num_samples=2)(KEY),
            lambda y=None: walk(None if y is None else y[:, 0]),
            lambda model: AutoScanStateSpace(model, site="z", rank=1, potentials="mode"),
        ),
        refused="^`args`.*does not observe `y`",
        **EAGER,
    ),
    "a network without data": Situation(
        without_data(predictive, guide=lambda model: network_guide("amortised", model)),
        refused="^`args`.*does not observe `y`",
        **EAGER,
    ),
    "a deep Kalman guide without data": Situation(
        without_data(predictive, guide=lambda model: network_guide("deep", model)),
        refused="^`args`.*does not observe `y`",
        **EAGER,
    ),
    "frames without data": Situation(
        lambda: handlers.seed(
            AmortizedFrames(extended_kalman_vae, encoder=nets.FrameEncoder(nets.StepMLP(9, 4, key=KEY), 2, key=KEY)),
            0,
        )(num_steps=4, num_obs=9),
        refused="^`args`.*observes nothing",
        **EAGER,
    ),
    "stored potentials need no data": Situation(
        without_data(
            lambda m, g, p: Predictive(m, guide=g, params=p, num_samples=4000)(KEY)["y"].mean(0),
            guide=lambda model: AutoStateSpace(model, rank=1),
        ),
        lambda: posterior_mean(np.eye(T), Y[0].ravel() + 4.2, 1)[0],
        close=(0.06, 0.06),
        **EAGER,
    ),
    "other data with rows to forecast": Situation(
        lambda: (
            fitted(one_series, Y[0], guide=at_mode)
            .svi.guide.sample_posterior(
                KEY, {}, jnp.append(jnp.asarray(Y[1]), jnp.full((3, 1), jnp.nan), axis=0), sample_shape=(20_000,)
            )["z"]
            .mean(0)
        ),
        lambda: np.append(
            m := posterior_mean(np.eye(T), Y[1].ravel(), 1)[0], m[-1] * DECAY ** np.arange(1, 4)[:, None], axis=0
        ),
        close=(0.03, 0.03),
        **EAGER,
    ),
    # A point is no posterior
    "the ELBO of a point": Situation(on_delta(elbo), refused="^`fit`.*`scale`, `z` one value", **EAGER),
    "k-hat of a point": Situation(on_delta(khat), refused="^`fit`.*one value", **EAGER),
    "importance weights of a point": Situation(on_delta(importance_bound), refused="^`fit`.*one value", **EAGER),
    "the gap of a point": Situation(on_delta(bound_gap), refused="^`fit`.*one value", **EAGER),
    "a chain beside a point": Situation(
        on_delta(elbo, lambda model: AutoStateSpace(model, rank=1, global_guide=AutoDelta)),
        refused="^`fit`.*`scale` one value",
        **EAGER,
    ),
    "a user's own point": Situation(
        on_delta(elbo, lambda model: delta_by_hand(model)), refused="^`fit`.*`scale` one value", **EAGER
    ),
    "Laplace's approximation": Situation(
        on_delta(elbo, AutoLaplaceApproximation), refused="^`fit`.*AutoLaplaceApproximation.*one value", **EAGER
    ),
    "a point in words": Situation(label(with_scale, AutoDelta, Y[0]), 2, **EAGER),
    "a chain beside a point in words": Situation(
        label(with_scale, lambda m: AutoStateSpace(m, rank=1, global_guide=AutoDelta), Y[0]),
        2,
        **EAGER,
    ),
    "a guide of random sites in words": Situation(label(with_scale, AutoNormal, Y[0]), 0, **EAGER),
    "Renyi's upper bound in words": Situation(
        lambda: fitted(with_scale, Y[0], guide=AutoNormal, loss=RenyiELBO(alpha=-1.0)).is_bound, False, **EAGER
    ),
    # Minibatches
    "minibatches in words": Situation(label(panel, None, Y, batch_size=2), 1, **EAGER),
    "importance weights of a fit on minibatches": Situation(
        lambda: importance_bound(fitted(panel, Y, batch_size=2), num_particles=50).value,
        lambda: each(Y.transpose(0, 2, 1)),
        **EAGER,
    ),
    "the ELBO of a fit on minibatches": Situation(
        lambda: elbo(fitted(panel, Y, batch_size=2), num_particles=50)[0],
        lambda: each(Y.transpose(0, 2, 1)),
        **EAGER,
    ),
    "k-hat of a fit on minibatches": Situation(lambda: khat(fitted(panel, Y, batch_size=2)), 0.0, **EAGER),
    "the gap of a fit on minibatches": Situation(
        lambda: bound_gap(fitted(panel, Y, batch_size=2), num_particles=50).gap, 0.0, close=FREE, **EAGER
    ),
    "draws of all series": Situation(
        lambda: posterior_draws(fitted(panel, Y, batch_size=2))["z"].mean((0, 1)),
        lambda: posterior_mean(np.eye(N * T), Y.ravel(), N),
        close=(0.06, 0.06),
        **EAGER,
    ),
    "draws of all series by NumPyro's guide": Situation(
        lambda: np.asarray(posterior_draws(fitted(panel, Y, guide=AutoNormal, batch_size=2), num_samples=7)["z"].shape),
        np.asarray((1, 7, N, T, 1)),
        **EAGER,
    ),
    "a tree of all series": Situation(
        lambda: np.asarray(
            to_datatree(fitted(panel, Y, batch_size=2), states=True, forecast=2, num_samples=7)["forecast"][
                "mean"
            ].shape
        ),
        np.asarray((N, 2, 1)),
        **EAGER,
    ),
    "a forecast of all series": Situation(
        lambda: np.asarray(forecast(fitted(panel, Y, batch_size=2), 2, most=5).mean.shape),
        np.asarray((N, 2, 1)),
        **EAGER,
    ),
    "weights where the data are a minibatch": Situation(
        lambda: khat(fitted(given_batch, Y)), refused="^`fit`: importance weights must have all data.*`series`", **EAGER
    ),
    "draws where the data are a minibatch": Situation(
        lambda: posterior_draws(fitted(given_batch, Y)), refused="^`fit`: draws.*must have all data.*`series`", **EAGER
    ),
    "draws that no minibatch touches": Situation(
        lambda: np.asarray(
            posterior_draws(fitted(level_of_batch, Y[0, :, 0], guide=AutoNormal), num_samples=7)["level"].shape
        ),
        np.asarray((1, 7)),
        **EAGER,
    ),
    # Other processes
    "a pickled fit": Situation(same_draws(lambda: fitted(one_series, Y[0])), 0.0, **EAGER),
    "a pickled record": Situation(same_draws(lambda: record_of(fitted(one_series, Y[0], guide=at_mode))), 0.0, **EAGER),
    "a pickled fit by NumPyro's guide": Situation(
        same_draws(lambda: fitted(with_scale, Y[0], guide="mvn")), 0.0, **EAGER
    ),
    "a pickled fit on minibatches": Situation(same_draws(lambda: fitted(panel, Y, batch_size=2)), 0.0, **EAGER),
    "a pickled chain": Situation(
        same_draws(
            lambda: fit_nuts(
                one_series, jnp.asarray(Y[0]), num_warmup=5, num_samples=5, num_chains=1, chunk=5, progress_bar=False
            )
        ),
        0.0,
        **EAGER,
    ),
    "copies of fits and guides": Situation(lambda: copied_draws(fitted(lambda y: one_series(y), Y[0])), 0.0, **EAGER),
    "a pickled guide": Situation(same_guide_draws(at_mode), 0.0, **EAGER),
    "a pickled guide with other sites": Situation(same_guide_draws(at_mode, with_scale), 0.0, **EAGER),
    "a pickled guide with networks": Situation(
        same_guide_draws(lambda model: network_guide("amortised", model)), 0.0, **EAGER
    ),
    "a pickled deep Kalman guide": Situation(
        same_guide_draws(lambda model: network_guide("deep", model)), 0.0, **EAGER
    ),
    "a pickled guide of a scan": Situation(
        same_guide_draws(lambda model: AutoScanStateSpace(model, site="z", rank=1), walk, Y[0, :, 0]), 0.0, **EAGER
    ),
    # Padding
    "a deep Kalman guide of padded series": Situation(
        padded_ratio("deep", 7), unpadded("deep"), args=(Y,), close=(1e-10, 1e-5)
    ),
    "padding that is not NaN": Situation(
        padded_ratio("deep", 7, data=3.0, lengths=lambda y: jnp.full(len(y), T)),
        unpadded("deep"),
        precisions=DOUBLE,
        args=(Y,),
        close=(1e-10, 1e-5),
    ),
    "an encoder of padded series": Situation(
        padded_ratio("amortised", 7), unpadded("amortised"), args=(Y,), close=(1e-10, 1e-5)
    ),
}


@pytest.mark.parametrize(("name", "precise", "jitted"), cases(TABLE))
def test_right_or_refused(name, precise, jitted):
    check(TABLE[name], precise, jitted)
