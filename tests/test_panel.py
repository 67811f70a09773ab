"""`panel`: the models of one series with common parameters, what short series borrow, nowcasts, and long tables."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pandas as pd
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from scipy.stats import multivariate_normal

from pssm import datasets, infer, models
from pssm.diagnostics import to_datatree

N, STEPS = 4, 9
RNG = np.random.default_rng(0)
Y = RNG.normal(size=(N, STEPS)).cumsum(1) + 3 * RNG.normal(size=(N, 1))
Y[1, 6:] = Y[2, 3] = np.nan
Y[3] = np.nan  # a series without data
U = np.stack([np.cos(np.arange(STEPS)) + i for i in range(N)])[..., None]


def traced(model, values=None, *args, seed=0, **kwargs):
    """A model's trace at given values; others are drawn."""
    return handlers.trace(handlers.seed(handlers.substitute(model, values or {}), seed)).get_trace(*args, **kwargs)


@pytest.mark.parametrize("pooling", ["partial", "complete", "none"])
def test_each_series_has_the_density_of_its_own_model(pooling, x64):
    """With first states that are like those of `structural`: equal, series by series."""
    options = dict(trend=True, seasonal=4, ar=2)
    sd = 3.0  # of first levels; `structural` has a tenth of it as its scale
    values = {"level_sd": sd, "slope_sd": sd / 10, "seasonal_sd": sd / 10, "slope_mean": 0.0, "level_mean": 1.5}
    values |= {"seasonal_mean": np.zeros(3)}
    values = {n: jnp.asarray(x) for n, x in values.items()}
    trace = traced(partial(models.panel, pooling=pooling, **options), values, Y, u=U)
    found = trace["y"]["fn"].log_prob(Y[..., None])
    v = {n: np.asarray(s["value"]) for n, s in trace.items()}

    def own(name, i):
        return v[name] if pooling == "complete" else v[f"{name}_each"][i]

    def partials(i):
        if pooling == "none":
            return v["ar_partial_each"][i]
        apart = 0.0 if pooling == "complete" else v["tau_ar_partial"] * v["apart_ar_partial"][i]
        return np.tanh(np.arctanh(v["ar_partial"]) + apart)

    for i in range(N):
        names = ("sigma_level", "sigma_slope", "sigma_seasonal", "sigma_ar", "sigma_obs")
        at = {name: jnp.asarray(own(name, i)) for name in names} | {"ar_partial": jnp.asarray(partials(i))}
        one = partial(models.structural, location=1.5, scale=sd / 10, num_steps=STEPS, **options)
        ssm = traced(one, at)["y"]["fn"].ssm
        seen = ~np.isnan(Y[i])
        alone = Y[i] - (U[i] - U[:, 0].mean(0)) @ v["beta"]
        mean, cov = oracles.observed_moments(ssm, STEPS)
        wanted = multivariate_normal(mean[seen], cov[np.ix_(seen, seen)]).logpdf(alone[seen]) if seen.any() else 0.0
        assert float(found[i]) == pytest.approx(wanted, abs=1e-8)


def test_effects_that_vary_are_integrated_out(x64):
    """One covariance more for each series: `beta_sd^2 u u'`."""
    u = np.concatenate([U, RNG.normal(size=U.shape)], -1)
    plain = traced(partial(models.panel, level=False), None, Y, u=u)
    values = {n: s["value"] for n, s in plain.items() if s["type"] == "sample" and n != "y"}
    trace = traced(partial(models.panel, level=False, varying=(False, True)), values, Y, u=u)
    assert trace["y"]["infer"]["state_names"] == ("level", "beta_1")
    sd, x = float(trace["beta_sd"]["value"][0]), u[..., 1] - u[:, 0, 1].mean()
    for i in range(3):
        seen = ~np.isnan(Y[i])
        mean = float(values["level_mean"]) + (u[i] - u[:, 0].mean(0)) @ np.asarray(values["beta"])
        obs = float(trace["sigma_obs_each"]["value"][i])
        cov = float(values["level_sd"]) ** 2 + sd**2 * np.outer(x[i], x[i]) + obs**2 * np.eye(STEPS)
        wanted = multivariate_normal(mean[seen], cov[np.ix_(seen, seen)]).logpdf(Y[i][seen])
        assert float(trace["y"]["fn"].log_prob(Y[..., None])[i]) == pytest.approx(wanted, abs=1e-8)


def test_sampled_states_are_the_same_model(x64):
    """`log p(y) = log p(y | z) + log p(z) - log p(z | y)`."""
    y = Y[:2, :4]
    model = partial(models.panel, y)
    marginal = traced(model)
    values = {n: s["value"] for n, s in marginal.items() if s["type"] == "sample" and n not in ("y", "series")}
    sampled = traced(partial(model, states="sampled"), values, seed=1)
    z, fn = sampled["z"]["value"], marginal["y"]["fn"]
    assert z.shape == (2, 4, 1)
    for i in range(2):
        ssm = jax.tree.map(lambda x, i=i: x[i] if x.ndim == 3 else x, fn.ssm)
        posterior = oracles.path_posterior(ssm, y[i, :, None], slice(0, 1)).logpdf(z[i].ravel())
        mean, cov = oracles.joint(ssm, 4).mean[:4], oracles.joint(ssm, 4).cov[:4, :4]
        given = float(sampled["y"]["fn"].log_prob(y[..., None])[i])
        found = given + multivariate_normal(mean, cov).logpdf(z[i].ravel()) - posterior
        assert found == pytest.approx(float(fn.log_prob(y[..., None])[i]), abs=1e-7)


@pytest.fixture(scope="module")
def fitted():
    """Twenty series, one of them without data; few draws."""
    rng = np.random.default_rng(1)
    y = 2.0 + 0.5 * rng.normal(size=(20, 1)) + 0.3 * rng.normal(size=(20, 12)).cumsum(1) + rng.normal(size=(20, 12))
    y[0] = np.nan
    y[1, 5:] = np.nan
    names = tuple(f"shop {i}" for i in range(20))
    model = partial(models.panel, names=names)
    mcmc = MCMC(NUTS(model), num_warmup=150, num_samples=150, progress_bar=False)
    mcmc.run(jax.random.key(0), jnp.asarray(y, jnp.float32))
    return y, mcmc, model


def test_a_series_without_data_is_one_of_the_population(fitted):
    y, mcmc, model = fitted
    draws = mcmc.get_samples()
    logs = np.log(draws["sigma_obs_each"])
    population = np.log(draws["sigma_obs"])
    assert logs[:, 0].mean() == pytest.approx(population.mean(), abs=0.15)
    assert logs[:, 0].var() > logs[:, 5:].var(0).mean(), "the data of the others say more"
    found = infer.forecast(mcmc, 3)
    assert found.mean.shape == (20, 3, 1)
    level = float(draws["level_mean"].mean())
    assert found.mean[0, 0, 0] == pytest.approx(level, abs=0.5)
    assert found.sd[0, 0, 0] > found.sd[5:, 0, 0].max()


def test_forecasts_start_at_each_series_own_end(fitted):
    """What is forecast of a series that ended early is what it would be if the others ended there, too."""
    y, mcmc, model = fitted
    point = {n: x.mean(0)[None, None] for n, x in mcmc.get_samples().items() if not n.endswith("_each")}
    about = dict(location=2.0, scale=1.0)
    one = partial(model, **about)
    found = infer.nowcast(one, point, y, horizon=2)
    assert found.last[:, 0].tolist() == [-1, 4, *[11] * 18]
    own = found.after_last(2)
    early = infer.forecast(one, point, 2, y[:, :5])
    np.testing.assert_allclose(own.mean[1], early.mean[1], rtol=2e-5)
    np.testing.assert_allclose(own.sd[1], early.sd[1], rtol=2e-5)
    late = infer.forecast(one, point, 2, y)
    np.testing.assert_allclose(own.mean[2:], late.mean[2:], rtol=2e-5)
    np.testing.assert_allclose(own.sd[2:], late.sd[2:], rtol=2e-5)
    with pytest.raises(ValueError, match="give `nowcast` 1 steps more"):
        found.after_last(3)


def test_names_are_coordinates(fitted):
    y, mcmc, _ = fitted
    tree = to_datatree(mcmc, states=True, forecast=2)
    assert tree["posterior"]["sigma_obs_each"].dims[-1] == "series"
    assert tree["smoothed_states"]["series"].values[2] == "shop 2"
    assert list(tree["forecast"]["mean"].dims[:2]) == ["series", "horizon"]


def test_maximum_likelihood_of_one_set_of_parameters():
    """Beside a dense likelihood and a general optimiser."""
    from scipy import optimize

    rng = np.random.default_rng(3)
    y = 2.0 * rng.normal(size=(8, 1)) + 0.5 * rng.normal(size=(8, 10)).cumsum(1) + rng.normal(size=(8, 10))
    y[3, 6:] = np.nan
    fit = infer.fit_ml(partial(models.panel, pooling="complete"), y, num_starts=3, progress_bar=False)

    def minus(theta):
        walk = np.minimum.outer(np.arange(10), np.arange(10))
        cov = theta[1] ** 2 + theta[2] ** 2 * walk + theta[3] ** 2 * np.eye(10)
        total = 0.0
        for row in y:
            seen = ~np.isnan(row)
            total -= multivariate_normal(np.full(seen.sum(), theta[0]), cov[np.ix_(seen, seen)]).logpdf(row[seen])
        return total

    best = optimize.minimize(minus, [0.0, 2.0, 0.5, 1.0], method="Nelder-Mead", options={"maxiter": 2000})
    assert fit.log_likelihood == pytest.approx(-best.fun, abs=1e-3)
    assert fit.log_likelihood >= -best.fun - 1e-6


# ------------------------------------------------------------------------------------------------------------- tables


def test_a_long_table_becomes_one_array():
    months = pd.date_range("2020-01-31", periods=6, freq="ME")
    rows = [("a", t, i, 10.0 + i) for i, t in enumerate(months[:3])] + [("b", months[5], 7.0, 1.0)]
    frame = pd.DataFrame(rows, columns=["shop", "date", "sales", "price"]).sample(frac=1, random_state=0)
    options = dict(series="shop", time="date", value="sales", inputs=["price"])
    found = datasets.stack_series(frame, **options)
    order = list(found.names)
    a, b = order.index("a"), order.index("b")
    assert list(found.time) == list(months), "two months without a row of any series are there"
    np.testing.assert_array_equal(found.y[a], [0, 1, 2, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(found.y[b], [*[np.nan] * 5, 7])
    assert found.u is not None
    np.testing.assert_array_equal(found.u[a, :, 0], [10, 11, 12, 12, 12, 12])
    np.testing.assert_array_equal(found.u[b, :, 0], np.ones(6))
    end = datasets.stack_series(frame, align="end", **options)
    np.testing.assert_array_equal(end.y[a, -3:], [0, 1, 2])
    np.testing.assert_array_equal(np.asarray(end.u)[a, -3:, 0], [10, 11, 12])
    start = datasets.stack_series(frame, align="start", **options)
    assert start.y[b, 0] == 7.0
    with pytest.raises(ValueError, match="two rows of series"):
        datasets.stack_series(pd.concat([frame, frame[:1]]), **options)
    with pytest.raises(ValueError, match="`value`: no column 'y'"):
        datasets.stack_series(frame, series="shop", time="date")
    with pytest.raises(ValueError, match="not evenly spaced"):
        datasets.stack_series(frame.assign(date=["x", "y", "z", "w"]), **options)
    periods = frame.assign(date=pd.PeriodIndex(frame["date"], freq="M"))
    np.testing.assert_array_equal(datasets.stack_series(periods, **options).y, found.y)


def test_lists_and_dicts_are_padded():
    found = datasets.stack_series({"x": [1.0, 2.0], "y": [3.0]}, align="end")
    np.testing.assert_array_equal(found.y, [[1, 2], [np.nan, 3]])
    assert found.names == ("x", "y")
    with pytest.raises(ValueError, match='`align="time"` needs the times'):
        datasets.stack_series([[1.0]], align="time")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: models.panel(num_series=3), "`num_series` and `num_steps` are required"),
        (lambda: models.panel([[1.0, 2.0], [3.0]]), "`pssm.datasets.stack_series` makes one"),
        (lambda: models.panel(np.ones(4)), r"`y` must have shape \(series, time\)"),
        (lambda: models.panel(Y, num_series=3), "`num_series` is 3, but `y` has 4"),
        (lambda: models.panel(Y, pooling="some"), "`pooling` must be one of"),
        (lambda: models.panel(Y, u=U, varying=(True, False)), "`varying` must be one answer, or one for each of 1"),
        (lambda: models.panel(Y, names=("a",)), "`names` must have a different name for each of 4"),
        (lambda: models.panel(Y, u=U[:, :3]), r"`u` must have shape \(4, 9, input\)"),
    ],
)
def test_what_does_not_fit_is_named(call, words):
    with handlers.seed(rng_seed=0), pytest.raises(ValueError, match=words):
        call()
