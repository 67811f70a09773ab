"""`multivariate_structural`: dense covariances written out, models of one series, mixed frequencies, its maximum."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import oracles
import pandas as pd
import pytest
from numpyro import handlers
from scipy import optimize
from scipy.stats import multivariate_normal

import pssm
from pssm import LinearGaussianSSM, infer, models
from pssm.diagnostics import to_datatree
from pssm.models.multivariate import correlation_factor

STEPS = 14
RNG = np.random.default_rng(2)
Y = RNG.normal(size=(STEPS, 3)).cumsum(0) + RNG.normal(size=(STEPS, 3)) + [5.0, 0.0, -3.0]
Y[3, 1] = Y[7] = np.nan
ABOUT = dict(location=np.array([5.0, 0.5, -2.0]), scale=np.array([1.0, 2.0, 0.7]))
PATTERN = models.multivariate_structural


def traced(model, values=None, *args, seed=0, **kwargs):
    """A model's trace at given values; others are drawn."""
    return handlers.trace(handlers.seed(handlers.substitute(model, values or {}), seed)).get_trace(*args, **kwargs)


def unit(A, C, noise, steps=STEPS):
    """Covariances `(time, time)` of one series by a noise of variance one, and by each first state."""
    k = len(A)
    Q = np.linalg.cholesky(noise + 1e-300 * np.eye(k)) if noise.any() else np.zeros((k, k))
    system = LinearGaussianSSM(np.zeros(k), np.zeros((k, k)), A, Q, C, np.zeros((1, 1)))
    moved = oracles.observed_moments(system, steps)[1]
    powers = np.stack([(C @ np.linalg.matrix_power(A, t))[0] for t in range(steps)])
    return moved, [np.outer(p, p) for p in powers.T]


@pytest.mark.parametrize("rank", [None, 1, {"level": 0, "slope": 2, "seasonal": 1}], ids=["full", "one", "each"])
def test_likelihood_is_that_of_the_covariances_written_out(rank, x64):
    """Sums of `(covariance over time) x (covariance over series)`, one for each noise and each first state."""
    model = partial(PATTERN, trend=True, seasonal=4, rank=rank, noise="correlated", **ABOUT)
    trace = traced(model, None, Y)
    v = {n: np.asarray(s["value"]) for n, s in trace.items()}

    def over_series(name):
        if f"loadings_{name}" in v:
            return v[f"loadings_{name}"] @ v[f"loadings_{name}"].T
        if f"sigma_{name}" not in v:
            return np.zeros((3, 3))
        s = v[f"sigma_{name}"]
        return s[:, None] * v[f"corr_{name}"] * s

    s2 = np.diag(ABOUT["scale"] ** 2)
    trend, first = np.array([[1.0, 1.0], [0.0, 1.0]]), np.array([[1.0, 0.0]])
    by_level, starts = unit(trend, first, np.diag([1.0, 0.0]))
    by_slope, _ = unit(trend, first, np.diag([0.0, 1.0]))
    season = np.array([[-1.0, -1, -1], [1, 0, 0], [0, 1, 0]])
    by_season, season_starts = unit(season, np.eye(3)[:1], np.diag([1.0, 0, 0]))
    cov = (
        np.kron(by_level, over_series("level"))
        + np.kron(by_slope, over_series("slope"))
        + np.kron(by_season, over_series("seasonal"))
        + np.kron(np.eye(STEPS), over_series("obs"))
        + np.kron(100 * starts[0] + starts[1] + sum(season_starts), s2)
    )
    mean, seen = np.tile(ABOUT["location"], STEPS), ~np.isnan(Y.ravel())
    wanted = multivariate_normal(mean[seen], cov[np.ix_(seen, seen)]).logpdf(Y.ravel()[seen])
    assert float(trace["y"]["fn"].log_prob(Y)) == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        dict(trend=True, seasonal=4, cycle=(3.0, 9.0), u=np.cos(np.arange(STEPS))[:, None]),
        dict(level=False, seasonal=6.5, harmonics=2, cycle=True),
    ],
    ids=["trend", "stationary"],
)
def test_without_correlations_it_is_the_model_of_each_series(options, x64):
    one = {"cycle_period": jnp.asarray(4.5), "cycle_damping": jnp.asarray(0.8)}
    p = Y.shape[1]
    values = {**one, **{f"partial_{n}": jnp.zeros(3) for n in ("level", "slope", "seasonal", "cycle")}}
    trace = traced(partial(PATTERN, **options, **ABOUT), values, Y)
    total = 0.0
    for i in range(p):
        own = {n: s["value"][i] for n, s in trace.items() if n.startswith(("sigma_", "mean"))}
        own |= {"beta": trace["D"]["value"][i]} if "u" in options else {}
        about = {n: float(x[i]) for n, x in ABOUT.items()}
        alone = traced(partial(models.structural, **options, **about), one | own, Y[:, i])
        total += float(alone["y"]["fn"].log_prob(Y[:, i, None]))
    assert float(trace["y"]["fn"].log_prob(Y)) == pytest.approx(total, abs=1e-8)


def test_sampled_states_are_the_same_model(x64):
    """`log p(y) = log p(y | z) + log p(z) - log p(z | y)`, over the noise that drives the path."""
    model = partial(PATTERN, Y[:4, :2], noise="correlated")
    marginal = traced(model)
    values = {n: s["value"] for n, s in marginal.items() if s["type"] == "sample" and n != "y"}
    sampled = traced(partial(model, states="sampled"), values, seed=1)
    z, ssm = sampled["z"]["value"], marginal["y"]["fn"].ssm
    assert sampled["z_base"]["infer"]["state_names"] == ("level[0]", "level[1]")
    posterior = oracles.path_posterior(ssm, Y[:4, :2], slice(0, 2)).logpdf(z.ravel())
    prior = pssm.distributions.StatePath.from_ssm(ssm, 4).log_prob(z)
    found = float(sampled["y"]["fn"].log_prob(Y[:4, :2]) + prior - posterior)
    assert found == pytest.approx(float(marginal["y"]["fn"].log_prob(Y[:4, :2])), abs=1e-7)


@pytest.mark.parametrize("states", ["marginal", "sampled"])
def test_sequences_are_scored_one_by_one(states, x64):
    """Two sequences of one model, with totals; the second begins elsewhere."""
    y = np.stack([Y[:6], 2 * Y[6:12] + 1])
    model = partial(PATTERN, rank=1, aggregate={0: "sum"}, every=3, states=states, **ABOUT)
    trace = traced(model, None, y)
    values = {n: s["value"] for n, s in trace.items() if s["type"] == "sample" and n not in ("y", "sequences")}
    found = trace["y"]["fn"].log_prob(y)
    assert found.shape == (2,)
    for i in range(2):
        own = values | ({"z_base": values["z_base"][i]} if states == "sampled" else {})
        alone = float(traced(model, own, y[i])["y"]["fn"].log_prob(y[i]))
        assert float(found[i]) == pytest.approx(alone, abs=1e-8)


@pytest.mark.parametrize("p", [2, 4])
def test_correlations_are_those_of_numpyros_lkj(p, x64):
    """The density of the partial correlations is that of the factor, up to the Jacobian between them."""
    prior = traced(partial(PATTERN, num_steps=3, num_obs=p))["partial_level"]
    rows = np.tril_indices(p, -1)

    def entries(r):
        return correlation_factor(r, p)[rows]

    K = correlation_factor(prior["value"], p)
    np.testing.assert_allclose(jnp.diagonal(K @ K.T), 1.0, atol=1e-12)
    jacobian = jnp.linalg.slogdet(jax.jacfwd(entries)(prior["value"]))[1]
    wanted = dist.LKJCholesky(p, 1.0).log_prob(K) + jacobian
    assert float(prior["fn"].log_prob(prior["value"])) == pytest.approx(float(wanted), abs=1e-10)


# ------------------------------------------------------------------------------------------------- mixed frequencies


def mixed(steps=24, seed=0):
    """Quarterly totals of a monthly series, a monthly one that moves with it, and figures at the end of half-years."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=steps).cumsum()
    monthly = 10 + np.column_stack([common, 0.5 * common, -common]) + 0.3 * rng.normal(size=(steps, 3))
    y = np.full((steps, 3), np.nan)
    y[2::3, 0] = monthly[:, 0].reshape(-1, 3).sum(1)
    y[:, 1] = monthly[:, 1]
    y[5::6, 2] = monthly[5::6, 2]
    return pd.DataFrame(y, columns=["gdp", "sales", "stock"])


QUARTERLY = dict(aggregate={"gdp": "sum", "stock": "last"}, every=3, names=("gdp", "sales", "stock"))


def test_months_add_up_to_their_quarters(x64):
    """A total without noise is met exactly by the smoothed months; its forecast is the sum of theirs."""
    frame = mixed()
    model = partial(PATTERN, rank=1, aggregate={"gdp": "sum", "stock": "last"}, every=3)
    values = {"sigma_obs": jnp.array([0.0, 0.3, 0.3])}
    trace = traced(model, values, frame)
    names = trace["y"]["infer"]["state_names"]
    assert names == ("level[gdp]", "level[sales]", "level[stock]", "before[gdp]")
    smoothed = trace["y"]["fn"].smooth(frame.to_numpy()).mean
    np.testing.assert_allclose(smoothed[:, 0].reshape(-1, 3).sum(1), frame["gdp"][2::3], atol=1e-8)
    values = {n: s["value"][None, None] for n, s in trace.items() if s["type"] == "sample" and n != "y"}
    values["sigma_obs"] = values["sigma_obs"].at[..., 0].set(0.0)
    ahead = infer.forecast(partial(PATTERN, rank=1, **QUARTERLY), values, 3, frame.to_numpy())
    months = infer.forecast(partial(PATTERN, rank=1, **QUARTERLY), values, 1, frame.to_numpy())
    assert ahead.mean[2, 0] == pytest.approx(3 * months.mean[0, 0], abs=1e-8), "a walk's months are alike"


def test_periods_of_unequal_length(x64):
    """Months of weeks by labels: they add up, their scale is that of a typical month, and labels reach a forecast."""
    labels = ["a"] * 4 + ["b"] * 5 + ["c"] * 4 + ["d"] * 2
    y = np.full((12, 2), np.nan)
    y[[3, 8], 0], y[:, 1] = [40.0, 52.0], np.linspace(9, 11, 12)
    model = partial(PATTERN, aggregate={"0": "sum"}, every=labels)
    trace = traced(model, {"sigma_obs": jnp.array([0.0, 0.4])}, y)
    fn = trace["y"]["fn"]
    weeks = np.asarray(fn.smooth(y).mean[:, 0])
    np.testing.assert_allclose([weeks[:4].sum(), weeks[4:9].sum()], [40, 52], atol=1e-8)
    assert float(fn.ssm.m0[0]) == pytest.approx(10.0), "the first month has four weeks, like a typical one"
    draws = {n: s["value"][None, None] for n, s in trace.items() if s["type"] == "sample" and n != "y"}
    ahead = infer.forecast(model, draws, 3, y).mean[:, 0]
    np.testing.assert_allclose(ahead, [weeks[9:].sum() + weeks[-1], weeks[-1], 2 * weeks[-1]], rtol=1e-10)
    with pytest.raises(ValueError, match="a label for each of 16 steps"):
        infer.forecast(model, draws, 4, y)


def test_the_scales_of_a_total_are_those_of_its_months(x64):
    frame = mixed()
    trace = traced(partial(PATTERN, rank=1, **QUARTERLY), None, frame.to_numpy())
    m0 = trace["y"]["fn"].ssm.m0
    np.testing.assert_allclose(m0[:2], [frame["gdp"][2] / 3, frame["sales"][0]], rtol=1e-12)
    assert float(trace["sigma_obs"]["fn"].base_dist.scale[0]) == pytest.approx(np.nanstd(frame["gdp"]))


@pytest.mark.parametrize(("within", "close"), [(False, 1e-3), (True, 1.0)], ids=["whole", "within a period"])
def test_far_from_zero_in_single_precision(within, close):
    """Totals and months that 32 bits cannot hold count from an origin; a part of a total is rounded."""
    model = partial(PATTERN, scale=np.ones(3), **QUARTERLY)
    values = {"sigma_obs": jnp.array([0.5, 0.4, 0.3]), "sigma_level": 0.5 * jnp.ones(3)}
    far = mixed().to_numpy() + [3e7, 1e7, 2e7]
    if within:
        far[4, 0] = 2 / 3 * far[5, 0]  # of the year to date
    found = {}
    for wide in (False, True):
        with jax.enable_x64(wide):
            trace = traced(model, values | {"partial_level": jnp.zeros(3)}, far)
            found[wide] = float(trace["y"]["fn"].log_prob(far)), trace["y"]["fn"].smooth(far).mean
    assert found[False][0] == pytest.approx(found[True][0], abs=close)
    np.testing.assert_allclose(found[False][1][:, :3], found[True][1][:, :3], rtol=2e-7)


# ------------------------------------------------------------------------------------------------ results and maxima


def test_maximum_likelihood_is_the_maximum():
    """Two levels with correlated noise: no optimiser of its own dense likelihood finds more."""
    data = mixed(42)[["sales"]].assign(other=lambda d: 2 * d["sales"] + np.random.default_rng(1).normal(size=42))
    y = data.to_numpy()
    fit = infer.fit_ml(PATTERN, data, progress_bar=False)
    model, steps = partial(PATTERN, y), len(y)
    first, spread = y[0], y.std(0)

    def minus(theta):
        L = np.array([[theta[0], 0], [theta[1], theta[2]]])
        walk = np.minimum.outer(np.arange(steps), np.arange(steps))
        cov = np.kron(walk, L @ L.T) + np.kron(np.eye(steps), np.diag(theta[3:] ** 2))
        cov += np.kron(np.ones((steps, steps)), np.diag(100 * spread**2))
        return -multivariate_normal(np.tile(first, steps), cov, allow_singular=True).logpdf(y.ravel())

    starts = [np.array([s, r, 0.3, 0.3, 1.0]) for s, r in ((0.5, 1.0), (1.0, 0.1))]
    best = min(optimize.minimize(minus, start, method="Nelder-Mead", options={"maxiter": 4000}).fun for start in starts)
    assert fit.log_likelihood >= -best - 1e-3
    values = {n: jnp.asarray(x) for n, x in fit.params.items()}
    with jax.enable_x64(True):
        assert float(traced(model, values)["y"]["fn"].log_prob(y)) == pytest.approx(fit.log_likelihood, abs=1e-6)


@pytest.mark.filterwarnings("ignore:not converged")  # so few figures have no one mode; names are what matters
def test_names_are_coordinates():
    frame = mixed()
    fit = infer.fit_map(partial(PATTERN, rank=1, **QUARTERLY), frame, num_starts=1, progress_bar=False)
    tree = to_datatree(fit, states=True, forecast=2)
    assert list(tree["smoothed_states"]["state"].values) == [
        "level[gdp]",
        "level[sales]",
        "level[stock]",
        "before[gdp]",
    ]
    assert list(tree["posterior"]["sigma_obs"].coords["series"].values) == ["gdp", "sales", "stock"]


TWO = np.arange(12.0).reshape(6, 2) ** 1.1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(level=False), "needs a component"),
        (dict(rank=3), "`rank` must be at most 2"),
        (dict(rank=0), "`rank` must be at least 1"),
        (dict(rank={"walk": 1}), "`rank` must be one of 'level'"),
        (dict(noise="full"), "`noise` must be one of"),
        (dict(cycle=(1.0, 5.0)), "`cycle` must be bounds"),
        (dict(names=("a",)), "`names` must have a different name for each of 2"),
        (dict(every=3), "`every` is given without `aggregate`"),
        (dict(aggregate={"a": "sum"}, every=3), "`aggregate` must name series among 0, 1; got 'a'"),
        (dict(aggregate={0: "sum"}), "`every` is required"),
        (dict(aggregate={0: "sum"}, every=np.arange(3)), "a label for each of 6 steps"),
        (dict(states="both"), "`states` must be one of"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_named(options, words):
    with handlers.seed(rng_seed=0), pytest.raises(ValueError, match=words):
        PATTERN(TWO, **options)
