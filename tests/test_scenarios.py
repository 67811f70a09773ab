"""Forecasts given values of the future that are known, against the dense joint; frames that go on behind the data."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pandas as pd
import pytest

import pssm
from pssm import LinearGaussianSSM, infer, models
from pssm.diagnostics import backtest, impact, to_datatree
from pssm.distributions import LinearGaussianMarginal, StatePath, observe
from pssm.filters.ahead import draw_future
from pssm.infer.mixtures import mixture_quantiles
from pssm.times.frames import rows_beside

PAST, AHEAD = 7, 4
forecast = jax.jit(pssm.forecast, static_argnums=2)
CASES = {
    "offsets and inputs": {"m": 2, "offsets": True},
    "singular transition": {"n": 4, "width": 1},
    "everything varies": {"m": 1, "offsets": True, "steps": PAST + AHEAD,
                          "timed": ("A", "chol_Q", "C", "chol_R", "b", "d", "B", "D")},
}  # fmt: skip


def case(name, dtype=float):
    """A model, its past with holes, its inputs, and a future of which some entries are known."""
    rng = np.random.default_rng(3)
    params = oracles.random_model(rng, **{"p": 3, **CASES[name]})
    ssm = LinearGaussianSSM(**{k: x if k == "time_varying" else np.asarray(x, dtype) for k, x in params.items()})
    m = CASES[name].get("m", 0)
    u = rng.normal(size=(PAST + AHEAD, m)).astype(dtype) if m else None
    y = oracles.with_holes(rng, rng.normal(size=(PAST, 3))).astype(dtype)
    known = rng.normal(size=(AHEAD, 3)).astype(dtype)
    known[0], known[1, 0], known[3, 1:] = np.nan, np.nan, np.nan
    return ssm, y, u, known


def truth(ssm, y, u, known):
    j = oracles.joint(ssm, PAST + AHEAD, u)
    given = oracles.seen(j, np.concatenate([y, known]), PAST + AHEAD)
    steps = range(PAST, PAST + AHEAD)
    obs = [oracles.condition(j, j.y(t), *given) for t in steps]
    state = [oracles.condition(j, j.z(t), *given) for t in steps]
    return tuple(np.stack(x) for x in (*zip(*obs, strict=True), *zip(*state, strict=True)))


def split(u):
    return (None, None) if u is None else (u[:PAST], u[PAST:])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_known_values_condition_all_others(name, dtype):
    """The noise of a step's entries is correlated: the known ones say something of it too."""
    with jax.enable_x64(dtype == np.float64):
        ssm, y, u, known = case(name, dtype)
        found = forecast(ssm, y, AHEAD, *split(u), y_future=known)
        for a, b in zip(found, truth(ssm, y, u, known), strict=True):
            np.testing.assert_allclose(a, b, atol=(1e-9 if dtype == np.float64 else 3e-5) * max(1.0, np.abs(b).max()))
        seen = ~np.isnan(known)
        np.testing.assert_array_equal(np.asarray(found.mean)[seen], known[seen])
        assert not np.asarray(found.cov)[seen].any()


def test_nothing_known_is_the_plain_forecast(x64):
    ssm, y, u, known = case("offsets and inputs")
    given = forecast(ssm, y, AHEAD, *split(u), y_future=np.full_like(known, np.nan))
    for a, b in zip(given, forecast(ssm, y, AHEAD, *split(u)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_exact_observations(x64):
    """A vector autoregression read without noise: the second series given the first."""
    A, L = np.array([[0.5, 0.2], [-0.3, 0.6]]), np.linalg.cholesky([[1.0, 0.7], [0.7, 1.0]])
    ssm = LinearGaussianSSM(np.zeros(2), np.eye(2), A, L, np.eye(2), np.zeros((2, 2)))
    y = np.array([[0.3, -0.2], [1.0, 0.4]])
    found = pssm.forecast(ssm, y, 1, y_future=[[2.0, np.nan]])
    mean = A @ y[-1]
    np.testing.assert_allclose(found.mean[0], [2.0, mean[1] + 0.7 * (2.0 - mean[0])], rtol=1e-12)
    np.testing.assert_allclose(found.cov[0], [[0, 0], [0, 1 - 0.49]], atol=1e-12)


def test_batches_gradients_and_draws(x64):
    ssm, y, u, known = case("offsets and inputs")
    past, ahead = split(u)
    both = np.stack([known, np.full_like(known, np.nan)])
    found = forecast(ssm, y, AHEAD, past, ahead, y_future=both)
    np.testing.assert_allclose(found.mean[0], forecast(ssm, y, AHEAD, past, ahead, y_future=known).mean, atol=1e-10)
    each = jax.vmap(lambda k: pssm.forecast(ssm, y, AHEAD, past, ahead, y_future=k).mean)(both)
    np.testing.assert_allclose(each, found.mean, atol=1e-10)

    slope = jax.grad(lambda k: forecast(ssm, y, AHEAD, past, ahead, y_future=k).mean[0, 0])(jnp.asarray(known))
    assert np.isfinite(slope).all()
    assert not np.asarray(slope)[np.isnan(known)].any()
    step = np.zeros_like(known)
    step[2, 1] = 1.0  # the mean is linear in what is known
    moved = forecast(ssm, y, AHEAD, past, ahead, y_future=known + step).mean[0, 0]
    np.testing.assert_allclose(slope[2, 1], moved - found.mean[0, 0, 0], atol=1e-9)

    keys = jax.random.split(jax.random.key(0), 4000)
    paths = jax.jit(jax.vmap(lambda k: draw_future(k, ssm, y, AHEAD, past, ahead, known)))(keys)
    sd = np.sqrt(np.diagonal(found.cov[0], axis1=1, axis2=2))
    assert (np.abs(paths.mean(0) - found.mean[0]) <= 5 * sd / 4000**0.5 + 1e-12).all()
    np.testing.assert_allclose(paths.std(0), sd, rtol=0.08, atol=1e-9)
    assert draw_future(keys[0], ssm, y, AHEAD, past, ahead, both).shape == (2, AHEAD, 3)


def test_a_value_that_cannot_be_is_refused():
    still = LinearGaussianSSM([1.0], [[0.0]], [[1.0]], [[0.0]], [[1.0]], [[0.0]])
    assert pssm.forecast(still, [1.0, 1.0], 1, y_future=[1.0]).mean[0, 0] == 1
    with pytest.raises(ValueError, match="contradict"):
        pssm.forecast(still, [1.0, 1.0], 1, y_future=[2.0])
    with pytest.raises(ValueError, match="`y_future` must have a row for each of the 2 steps"):
        pssm.forecast(still, [1.0, 1.0], 2, y_future=[1.0])
    with pytest.raises(ValueError, match=r"`y_future` must have shape \(time, 1\)"):
        pssm.forecast(still, [1.0, 1.0], 2, y_future=np.ones((2, 2)))


# --------------------------------------------------------------------------------------------------- of every fit

RNG = np.random.default_rng(0)
MONTHS = pd.date_range("2020-01-31", periods=40, freq="ME")
U = pd.DataFrame({"price": RNG.normal(size=36), "rain": RNG.normal(size=36)}, index=MONTHS[:36])
LEVEL = np.cumsum(RNG.normal(size=(36, 1)), axis=0)
TWO = pd.DataFrame(LEVEL + 0.5 * RNG.normal(size=(36, 2)), index=MONTHS[:36], columns=["shops", "online"])
ONE = pd.Series(LEVEL[:, 0] + 2 * U.price.to_numpy() - U.rain.to_numpy(), index=U.index, name="sales")


def common_level(y, u=None):
    """Two readings of one level, whose errors are correlated."""
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    noise = jnp.array([[1.0, 0.0], [0.6, 0.8]])
    ssm = LinearGaussianSSM(jnp.zeros(1), 3 * jnp.eye(1), jnp.eye(1), sigma * jnp.eye(1), jnp.ones((2, 1)), noise)
    numpyro.sample("y", LinearGaussianMarginal(ssm, len(y)), obs=y)


@pytest.fixture(scope="module")
def fit():
    return infer.fit_ml(common_level, TWO, num_starts=1, progress_bar=False)


@pytest.fixture(scope="module")
def regression():
    return infer.fit_ml(models.local_level, ONE, u=U, num_starts=1, progress_bar=False)


def test_a_scenario_of_a_fit(fit):
    """From a frame with one series and two of the four months; everything else follows."""
    frame = pd.DataFrame({"online": [4.0, 5.0]}, index=MONTHS[[38, 36]])
    known = np.full((4, 2), np.nan)
    known[2, 1], known[0, 1] = 4.0, 5.0
    trace = numpyro.handlers.trace(numpyro.handlers.seed(numpyro.handlers.substitute(common_level, fit.params), 0))
    d = trace.get_trace(TWO.to_numpy())["y"]["fn"]
    exact = d.forecast(TWO.to_numpy(), 4, y_future=known)
    found = infer.forecast(fit, 4, y_future=frame)
    np.testing.assert_allclose(found.mean, exact.mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.sd, np.sqrt(np.diagonal(exact.cov, axis1=1, axis2=2)), rtol=1e-4, atol=1e-4)
    for rows in (found.mean[None], found.draws, found.quantiles):
        np.testing.assert_array_equal(rows[:, [2, 0], 1], np.broadcast_to([4.0, 5.0], (len(rows), 2)))
    np.testing.assert_allclose(found.draws.mean(0), found.mean, atol=5 * found.sd.max() / 400**0.5)
    np.testing.assert_array_equal(infer.forecast(fit, 4, y_future=known).mean, found.mean)
    high = infer.forecast(fit, 4, y_future=frame + 3.0)  # two scenarios
    assert (high.mean[:, 0] > found.mean[:, 0]).all()
    np.testing.assert_allclose(high.sd, found.sd, rtol=1e-5)


def test_a_scenario_of_posterior_draws():
    draws = {"sigma": np.array([[0.5, 1.0, 1.5]])}
    known = np.array([[np.nan, 2.0]])
    found = infer.forecast(common_level, draws, 1, TWO.to_numpy(), y_future=known)
    each = []
    for sigma in draws["sigma"][0]:
        model = numpyro.handlers.substitute(common_level, {"sigma": sigma})
        trace = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace(TWO.to_numpy())
        exact = trace["y"]["fn"].forecast(TWO.to_numpy(), 1, y_future=known)
        each.append((exact.mean[0, 0], exact.cov[0, 0, 0]))
    mean, variance = np.array(each).T
    np.testing.assert_allclose(found.mean[0], [mean.mean(), 2.0], rtol=1e-4)
    np.testing.assert_allclose(found.sd[0], [np.sqrt(variance.mean() + mean.var()), 0.0], rtol=1e-4)


def test_data_far_from_zero_in_32_bits():
    """Heights near 1e7 that differ by centimetres: known values come back to the last digit."""
    y = 1e7 + 0.01 * np.cumsum(np.random.default_rng(2).normal(size=30))
    fit = infer.fit_ml(models.local_level, y, num_starts=1, progress_bar=False)
    value = y[-1] + 0.05
    found = infer.forecast(fit, 2, y_future=[np.nan, value])
    assert found.mean[1, 0] == value
    assert y[-1] < found.mean[0, 0] < value
    assert 0 < found.sd[0, 0] < 0.05


def test_states_that_are_sampled_are_refused():
    def path(y):
        z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), jnp.eye(1), jnp.eye(1), len(y)))
        observe("y", dist.Poisson(jnp.exp(0.1 * z)).to_event(2), y)

    counts = np.ones((6, 1))
    fit = infer.fit_nuts(path, counts, num_warmup=5, num_samples=5, num_chains=1, progress_bar=False)
    with pytest.raises(ValueError, match="`y_future` needs a model whose states are integrated out exactly"):
        infer.forecast(fit, 2, y_future=[[1.0], [np.nan]])


def test_regressors_by_date_and_name(regression):
    """Columns in another order, rows in another order and more of them than are needed."""
    ahead = pd.DataFrame({"rain": [0.0, 1.0, 2.0, 3.0], "price": [5.0, 6.0, 7.0, 8.0]}, index=MONTHS[36:])
    plain = infer.forecast(regression, 3, u_future=ahead[["price", "rain"]].to_numpy()[:3])
    mixed = ahead.iloc[[3, 1, 0, 2]].assign(other=9.0)
    np.testing.assert_array_equal(infer.forecast(regression, 3, u_future=mixed).mean, plain.mean)
    tree = to_datatree(regression, forecast=3, u_future=mixed, log_likelihood=False)
    np.testing.assert_allclose(tree["forecast"]["mean"], plain.mean, rtol=1e-6)
    assert tree["forecast"]["horizon"].values[0] == MONTHS[36].to_datetime64()
    early = infer.forecast(regression, 2, origin=30, u_future=U)  # the steps after the 30th, by their dates
    np.testing.assert_array_equal(early.mean, infer.forecast(regression, 2, origin=30, u_future=U.iloc[30:32]).mean)
    counted = ahead.reset_index(drop=True)
    np.testing.assert_array_equal(infer.forecast(regression, 3, u_future=counted).mean, plain.mean)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.rename(columns={"rain": "rian"}), r"must have the columns \['price', 'rain'\].*\['rain'\] is not"),
        (lambda x: x.iloc[[0, 2]], "a row for each of 3 steps, from 2023-01-31 to 2023-03-31; 2023-02-28 is not"),
        (lambda x: x.set_axis(x.index - pd.offsets.MonthBegin(), axis=0), "`u_future`.*are not in its index"),
        (lambda x: x.iloc[:2].reset_index(drop=True), "`u_future` must have a row for each of 3 steps; got 2"),
        (lambda x: x.iloc[[0, 0, 1, 2]], "`u_future` has two rows for 2023-01-31"),
        (lambda x: x.price, r"`u_future` must have the columns"),
    ],
)  # fmt: skip
def test_other_rows_and_columns_are_named(regression, change, words):
    ahead = pd.DataFrame({"price": [5.0, 6.0, 7.0, 8.0], "rain": [0.0, 1.0, 2.0, 3.0]}, index=MONTHS[36:])
    with pytest.raises(ValueError, match=words):
        infer.forecast(regression, 3, u_future=change(ahead))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (pd.DataFrame({"onlin": [1.0]}, index=MONTHS[36:37]), r"`y_future` has columns \['onlin'\] that are no series"),
        (pd.DataFrame({"online": [1.0]}, index=MONTHS[:1]), "`y_future` has a row for 2020-01-31, which is none of"),
        (pd.DataFrame([[1.0]], index=MONTHS[36:37]), "`y_future` must have 2 columns, or names"),
    ],
)
def test_scenarios_of_something_else_are_refused(fit, frame, words):
    with pytest.raises(ValueError, match=words):
        infer.forecast(fit, 4, y_future=frame)


def test_names_of_inputs_outlive_the_fit(regression, tmp_path):
    found = infer.load(infer.save(regression, tmp_path / "fit"))
    assert infer.record_of(found).labels.inputs == ("price", "rain")
    ahead = pd.DataFrame({"rain": [0.0], "price": [5.0]}, index=MONTHS[36:37])
    np.testing.assert_array_equal(
        infer.forecast(found, 1, u_future=ahead).mean, infer.forecast(regression, 1, u_future=ahead).mean
    )


def test_parameters_of_a_point_fit(regression):
    """Laplace's draws add the spread of the parameters; the rest is as before."""
    ahead = np.array([[10.0, -10.0]])
    fixed = infer.forecast(regression, 1, u_future=ahead)
    spread = infer.forecast(regression, 1, u_future=ahead, parameters="laplace", most=800)
    beta = regression.covariance.loc[["beta[0]", "beta[1]"], ["beta[0]", "beta[1]"]].to_numpy()
    away = ahead[0] - U.to_numpy()[-1]  # about: the level at the end was learned with the same coefficients
    assert spread.sd[0, 0] ** 2 - fixed.sd[0, 0] ** 2 == pytest.approx(away @ beta @ away, rel=0.4)
    assert abs(spread.mean[0, 0] - fixed.mean[0, 0]) < 5 * spread.sd[0, 0] / 800**0.5
    with pytest.raises(ValueError, match="`parameters` must be one of"):
        infer.forecast(regression, 1, u_future=ahead, parameters="free")
    with pytest.raises(ValueError, match="`parameters` goes with a fit at one point"):
        infer.forecast(common_level, {"sigma": np.ones((1, 2))}, 1, TWO.to_numpy(), parameters="fixed")


def test_quantiles_of_a_mixture():
    """The distribution function at the quantiles is the level; a component without spread is a jump."""
    from scipy import stats

    mean, sd = np.array([[0.0, 1.0], [3.0, 1.0], [-1.0, 1.0]]), np.array([[1.0, 0.0], [0.5, 0.0], [2.0, 0.0]])
    levels = (0.05, 0.5, 0.9)
    found = mixture_quantiles(mean, sd**2, levels)
    np.testing.assert_allclose(stats.norm.cdf(found[:, [0]], mean[:, 0], sd[:, 0]).mean(1), levels, atol=1e-10)
    np.testing.assert_allclose(found[:, 1], 1.0, atol=1e-12)
    np.testing.assert_allclose(mixture_quantiles(mean[:1], sd[:1] ** 2, levels)[:, 0], stats.norm.ppf(levels))


def test_rows_beside_the_data_are_found_by_label():
    """Regressors of a backtest and controls of an impact: more rows, in another order, or of other dates."""
    assert rows_beside(ONE, "u", U.iloc[::-1]).equals(U)
    longer = pd.concat([U, pd.DataFrame({"price": [1.0], "rain": [2.0]}, index=MONTHS[36:37])])
    assert rows_beside(ONE, "u", longer).equals(U)
    assert rows_beside(ONE.to_numpy(), "u", longer) is longer
    counted = U.reset_index(drop=True)
    assert rows_beside(ONE, "u", counted) is counted
    for other in (U.iloc[1:], U.set_axis(U.index + pd.Timedelta(days=1), axis=0)):
        with pytest.raises(ValueError, match="`u` and the data have different indices"):
            rows_beside(ONE, "u", other)

    options = {"horizon": 2, "origins": [30], "refit": False, "progress_bar": False}
    plain = backtest(models.local_level, ONE, u=U, **options)
    mixed = backtest(models.local_level, ONE, u=longer.iloc[::-1], **options)
    np.testing.assert_array_equal(plain.table["mean"], mixed.table["mean"])
    found = [impact(ONE, x, "2022-06-30", method="ml", placebo=False) for x in (U, longer.iloc[::-1])]
    np.testing.assert_array_equal(found[0].effects.effect, found[1].effects.effect)
