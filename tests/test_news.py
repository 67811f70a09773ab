"""News: the change of a forecast, by each value that changed, against statsmodels and the dense joint."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pandas as pd
import pytest
from statsmodels.tsa.statespace.dynamic_factor import DynamicFactor
from statsmodels.tsa.statespace.varmax import VARMAX

from pssm import LinearGaussianSSM, datasets, infer, models
from pssm.diagnostics import decompose, news, predictions
from pssm.distributions import LinearGaussianMarginal

QUARTERS = pd.period_range("1990Q1", periods=48, freq="Q")
GROWTH = pd.DataFrame(
    100 * np.diff(np.log(datasets.load("macrodata", ["realgdp", "realcons", "realinv"]).y), axis=0)[100:148],
    index=QUARTERS,
    columns=["gdp", "consumption", "investment"],
)
GROWTH = (GROWTH - GROWTH.mean()) / GROWTH.std()


def vintages():
    """The last quarter comes in one series after the other; two values are revised."""
    old, new = GROWTH.iloc[:46].copy(), GROWTH.copy()
    old.iloc[45, 0] = np.nan
    old.iloc[44, 1] += 0.3
    old.iloc[45, 2] -= 0.5
    new.iloc[47, :2] = np.nan
    return old, new


def system(peer, params):
    """A model of statsmodels as ours."""
    peer.update(params)
    ssm = peer.ssm
    mean, infinite, cov = ssm.initialization(model=ssm)
    assert not infinite.any()
    T, R, Q, Z, H = (np.asarray(ssm[n]) for n in ("transition", "selection", "state_cov", "design", "obs_cov"))
    d, c = (np.ravel(ssm[n]) for n in ("obs_intercept", "state_intercept"))
    return LinearGaussianSSM.from_covariances(mean, cov, T, R @ Q @ R.T, Z, H, b=c, d=d)


PEERS = {
    "dynamic factor": lambda y: DynamicFactor(y, k_factors=1, factor_order=2),
    "vector autoregression": lambda y: VARMAX(y, order=(1, 0), trend="n"),
}


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.filterwarnings("ignore")
def test_they_are_those_of_statsmodels(name, x64):
    old, new = vintages()
    peer = PEERS[name](old)
    params = peer.start_params
    before = peer.smooth(params)
    truth = before.news(new, start="2002Q1", periods=1, comparison_type="updated")
    ssm = system(peer, params)
    targets = [("2002Q1", n) for n in GROWTH.columns]
    found = news(ssm, old, new, targets)
    summary = found.summary.set_index("target_series")
    for name in GROWTH.columns:
        row = truth.total_impacts[name].iloc[0]
        np.testing.assert_allclose(summary.change[name], row, atol=1e-6)
        np.testing.assert_allclose(summary.revision[name], truth.revision_impacts[name].iloc[0], atol=1e-6)
        np.testing.assert_allclose(summary.release[name], truth.update_impacts[name].iloc[0], atol=1e-6)
        np.testing.assert_allclose(summary.before[name], truth.prev_impacted_forecasts[name].iloc[0], atol=1e-6)
    details = truth.details_by_update.reset_index()
    released = found.table[found.table.kind == "release"]
    assert len(released) == 15
    impacts = details.impact.abs().sum()  # statsmodels leaves out what weighs nothing
    np.testing.assert_allclose(released.impact.abs().sum(), impacts, atol=1e-6)
    for _, row in details.iterrows():
        own = released[
            (released.time == row["update date"].to_timestamp().to_datetime64())
            & (released.series == row["updated variable"])
            & (released.target_series == row["impacted variable"])
        ].iloc[0]
        for ours, theirs in (("expected", "forecast (prev)"), ("observed", "observed"), ("news", "news"),
                             ("weight", "weight"), ("impact", "impact")):  # fmt: skip
            np.testing.assert_allclose(own[ours], row[theirs], atol=1e-6)


def by_hand(ssm, u, y, target):
    """`E[y_target | y]` from the dense joint."""
    j = oracles.joint(ssm, len(y), u)
    index, values = oracles.seen(j, y, len(y))
    return oracles.condition(j, j.y(target[0])[[target[1]]], index, values)[0][0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_impacts_add_up_to_the_change(dtype):
    """Releases, revisions and withdrawals at once; inputs, time variation, correlated noise; targets old and new."""
    with jax.enable_x64(dtype == np.float64):
        rng = np.random.default_rng(0)
        timed = ("A", "C", "chol_Q", "chol_R")
        ssm = LinearGaussianSSM(**oracles.random_model(rng, m=1, steps=9, timed=timed, offsets=True))
        u, new = rng.normal(size=(9, 1)), rng.normal(size=(7, 2))
        old = new[:6].copy()
        old[5, 0], old[3, 1] = np.nan, np.nan
        old[2, 0] += 1.0
        new[1, 1], new[6, 1] = np.nan, np.nan
        targets = [(8, 0), (6, 1), (1, 1), (5, 0)]
        found = news(ssm, old, new, targets, u=u)
        stages = np.full((4, 9, 2), np.nan)
        stages[0, :6], stages[3, :7] = old, new
        stages[1] = np.where(np.isnan(stages[3]), np.nan, stages[0])
        stages[2] = np.where(np.isnan(stages[1]), np.nan, stages[3])
        tolerance = 1e-8 if dtype == np.float64 else 1e-4
        for k, target in enumerate(targets):
            levels = [by_hand(ssm, u, y, target) for y in stages]
            row = found.summary.iloc[k]
            np.testing.assert_allclose([row.before, row.after], [levels[0], levels[3]], atol=tolerance)
            np.testing.assert_allclose(
                row[["withdrawal", "revision", "release"]].astype(float), np.diff(levels), atol=tolerance
            )
            own = found.table.iloc[k * len(found.table) // 4 : (k + 1) * len(found.table) // 4]
            assert (own.target_series == f"series {target[1]}").all()
            sums = own.groupby("kind").impact.sum()
            for kind in ("withdrawal", "revision", "release"):
                np.testing.assert_allclose(sums[kind], row[kind], atol=tolerance)
            np.testing.assert_allclose(own.impact, own.weight * own.news, rtol=1e-6)
        assert found.table[:5].kind.tolist() == ["withdrawal", "revision", "release", "release", "release"]
        kept = found.table[found.table.target_time == 5]
        assert kept.loc[kept.kind == "release"].set_index("time").weight[5] == pytest.approx(1.0)  # the value itself


def test_a_diffuse_start(x64):
    """The limit of a wide one, in the whole of the analysis: news, components and predictions."""
    noise = np.array([[1.0, 0.0], [0.6, 0.8]])
    parts = np.eye(1), np.eye(1), np.ones((2, 1)), noise
    exact = LinearGaussianSSM([0.0], 0 * np.eye(1), *parts, diffuse=[True])
    wide = LinearGaussianSSM([0.0], 1e5 * np.eye(1), *parts)
    old = np.array([[np.nan, np.nan], [10.0, 12.0], [np.nan, 11.0], [9.0, np.nan]])
    new = np.array([[8.0, np.nan], [10.0, 12.0], [11.5, 11.0], [9.5, 13.0]])
    a, b = (news(ssm, old, new, [(5, 0), (0, 1)]) for ssm in (exact, wide))
    np.testing.assert_allclose(a.table.impact, b.table.impact, atol=1e-6)
    np.testing.assert_allclose(a.summary.before, b.summary.before, atol=1e-6)
    np.testing.assert_allclose(a.table.groupby(["target_time"]).impact.sum()[5], a.summary.change[0], atol=1e-8)
    a, b = (decompose(ssm, new, draws=2).data for ssm in (exact, wide))
    np.testing.assert_allclose(a["mean"], b["mean"], atol=1e-6)
    a, b = (predictions(ssm, new, horizon=2) for ssm in (exact, wide))
    np.testing.assert_allclose(a.mean[2:], b.mean[2:], atol=1e-6)
    np.testing.assert_allclose(a.sd[2:], b.sd[2:], atol=1e-6)


def common(y):
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    load = jnp.array([[1.0], [0.8], [0.6]])
    ssm = LinearGaussianSSM(jnp.zeros(1), jnp.eye(1), 0.7 * jnp.eye(1), sigma * jnp.eye(1), load, 0.5 * jnp.eye(3))
    numpyro.sample("y", LinearGaussianMarginal(ssm, len(y)), obs=y)


@functools.cache
def fitted():
    return infer.fit_ml(common, vintages()[0], num_starts=1, progress_bar=False)


def test_of_a_fit_with_frames():
    """The fit's own data are the old ones; columns come in another order, the target is beyond all data."""
    _, new = vintages()
    found = news(fitted(), None, new[["investment", "gdp", "consumption"]], ("2002Q2", "gdp"))
    assert found.summary.target_time[0] == np.datetime64("2002-04-01")
    np.testing.assert_allclose(found.table.impact.sum(), found.summary.change[0], atol=1e-5)
    same = news(fitted(), vintages()[0], new, (49, "gdp"))
    np.testing.assert_allclose(found.table.impact, same.table.impact, atol=1e-6)
    before = infer.forecast(fitted(), 4).mean[3, 0]
    np.testing.assert_allclose(found.summary.before[0], before, rtol=1e-4)
    figure = found.plot(title="News", most=3)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][0] == "all others"
    assert (found.table.kind == "revision").sum() == 2  # data that 32 bits have rounded are not revised
    plain = news(fitted(), None, new.to_numpy(), ("2002Q2", "gdp"))
    np.testing.assert_allclose(plain.table.impact, found.table.impact, atol=1e-6)
    assert plain.table.series.tolist() == found.table.series.tolist()


def test_draws_of_the_parameters_are_averaged():
    old, new = (x.to_numpy() for x in vintages())
    one, two = (news(point(s), old, new, (47, 0)) for s in (0.4, 0.9))
    both = news(point(0.4, 0.9), old, new, (47, 0))
    np.testing.assert_allclose(both.table.impact, (one.table.impact + two.table.impact) / 2, atol=1e-5)
    np.testing.assert_allclose(both.table.impact_sd, np.abs(one.table.impact - two.table.impact) / 2, atol=1e-5)
    np.testing.assert_allclose(both.table.impact.sum(), both.summary.change[0], atol=1e-5)


def point(*sigma):
    class Known:
        def __call__(self, num_samples, key, args, kwargs):
            return {"sigma": np.array([sigma])}

    return infer.FitRecord("known", common, (vintages()[0].to_numpy(),), {}, Known(), "none")


def test_ready_models_keep_their_units_and_inputs():
    """A level far from zero, regressors of the future, in 32 bits."""
    rng = np.random.default_rng(1)
    u = rng.normal(size=(32, 1))
    y = 1e6 + np.cumsum(rng.normal(size=30)) + 2 * u[:30, 0]
    fit = infer.fit_map(models.local_level, y[:28], u=u[:28], num_starts=1, progress_bar=False)
    found = news(fit, None, y, 31, u_future=u[28:])
    assert found.table.time.tolist() == [28, 29]
    np.testing.assert_allclose(found.table.impact.sum(), found.summary.change[0], atol=1e-4)
    ahead = infer.forecast(fit, 4, u_future=u[28:])
    np.testing.assert_allclose(found.summary.before[0], ahead.mean[3, 0], atol=0.2)
    np.testing.assert_allclose(found.table.expected[0], ahead.mean[0, 0], atol=0.2)
    with pytest.raises(ValueError, match="`u_future` is required"):
        news(fit, None, y, 31)


OLD, NEW = vintages()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((OLD, NEW.iloc[1:], ("2002Q1", "gdp")), "must go on from the same first step"),
        ((OLD, NEW.rename(columns={"gdp": "gpd"}), ("2002Q1", "gdp")), "`y_new` must have the columns"),
        ((OLD, NEW.iloc[:40], ("2002Q1", "gdp")), "`y_new` must have the 46 steps of `y_old` or more"),
        ((OLD, NEW, ("2002Q1", "gpd")), "`target` must name one of the series"),
        ((OLD, NEW, ("soon", "gdp")), "`target` must be a step from 1990"),
        ((OLD, NEW, ("2002Q1", 7)), "`target` must have the number of a series"),
        ((OLD, NEW, []), r"`target` must be \(time, series\)"),
        ((OLD, NEW.to_numpy()[:, :2], (47, 0)), r"`y_new` must have shape \(time, 3\)"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        news(fitted(), *arguments)
    with pytest.raises(ValueError, match="`y_old` is required"):
        news(LinearGaussianSSM([0.0], [[1.0]], [[1.0]], [[1.0]], [[1.0]], [[1.0]]), None, [1.0], 0)
