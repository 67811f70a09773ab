"""Components of a series: they add up, and are those of statsmodels and of the dense joint."""

import functools

import jax
import numpy as np
import numpyro
import oracles
import pandas as pd
import pytest
from statsmodels.tsa.statespace.structural import UnobservedComponents

from pssm import LinearGaussianSSM, infer, models
from pssm._checks import unmasked_arguments
from pssm.diagnostics import decompose
from pssm.diagnostics.components import by_name
from pssm.times.labels import labels_beside

MONTHS = pd.date_range("2015-01-31", periods=60, freq="ME")
RNG = np.random.default_rng(4)
PROMOTION = pd.DataFrame({"price": RNG.normal(size=60), "week": RNG.normal(size=60)}, index=MONTHS)
SEASON = np.tile([3.0, -1.0, -2.0, 0.0], 15)
SALES = pd.Series(
    50 + np.cumsum(0.3 * RNG.normal(size=60)) + SEASON + PROMOTION @ np.array([2.0, -1.0]) + 0.4 * RNG.normal(size=60),
    index=MONTHS,
    name="sales",
)
SALES.iloc[[7, 30]] = np.nan


def with_everything(y=None, **options):
    models.structural(y, trend=True, seasonal=4, cycle=(6.0, 20.0), ar=1, **options)


class Known:
    """Draws of parameters that are given, `(1, draw, ...)`."""

    def __init__(self, values):
        self.values = values

    def __call__(self, num_samples, key, args, kwargs):
        return self.values


def given(model, values, *args, **kwargs):
    """A fit whose posterior is one point."""
    sample = Known({n: np.asarray(x, np.float32)[None, None] for n, x in values.items()})
    labels = labels_beside(args[0], kwargs.get("u"))
    args, kwargs = unmasked_arguments(args, kwargs)
    return infer.FitRecord("given", model, args, kwargs, sample, "none", labels=labels)


@functools.cache
def fitted():
    values = {"sigma_level": 0.3, "sigma_slope": 0.02, "sigma_seasonal": 0.1, "cycle_period": 9.0, "cycle_damping": 0.9}
    values |= {"sigma_cycle": 0.2, "ar_partial": [0.5], "sigma_ar": 0.2, "sigma_obs": 0.4, "beta": [2.0, -1.0]}
    return given(with_everything, values, SALES, u=PROMOTION)


def adds_up(found, atol):
    data = found.data
    own = [n for n in found.components if n != "irregular"]
    np.testing.assert_allclose(data["mean"].sel(component=own).sum("component"), data["signal_mean"], atol=atol)
    seen = ~np.isnan(data["observed"].values)
    np.testing.assert_allclose(data["mean"].sum("component").values[seen], data["observed"].values[seen], atol=atol)
    assert np.isnan(data["mean"].sel(component="irregular").values[~seen]).all()
    if "draws" in data:
        total = data["draws"].sum("component").values
        np.testing.assert_allclose(
            total[:, seen], np.broadcast_to(data["observed"].values[seen], total[:, seen].shape), atol=atol
        )


@pytest.mark.parametrize("filtered", [False, True])
def test_contributions_add_up(filtered):
    """To the signal, to the data, and in each joint draw; everything has its name."""
    found = decompose(fitted(), filtered=filtered)
    assert found.components == ("level", "seasonal", "cycle", "ar", "regression", "irregular")
    adds_up(found, 1e-4)
    data = found.data
    assert data["time"].values[0] == MONTHS[0].to_datetime64()
    assert data["series"].values.tolist() == ["sales"]
    assert data["input"].values.tolist() == ["price", "week"]
    np.testing.assert_allclose(data["input_mean"].sum("input"), data["mean"].sel(component="regression"), atol=1e-5)
    assert ("draws" in data) is not filtered
    assert len(found.table) == 60 * 6
    assert len(found.plot(title="Sales").axes) == 8  # the slope has a panel too


def test_moments_are_those_of_the_draws():
    data = decompose(fitted(), draws=400).data
    rest, spread = data["draws"].mean("draw") - data["mean"], data["sd"].values
    seen = ~np.isnan(data["observed"].values)[:, 0]
    assert (np.abs(rest.values[:, seen]) <= 5 * spread[:, seen] / 20 + 1e-4).all()
    np.testing.assert_allclose(data["draws"].std("draw").values[:, seen], spread[:, seen], rtol=0.25, atol=1e-3)
    inside = (data["draws"] > data["low"]) & (data["draws"] < data["high"])
    assert abs(float(inside.isel(component=[0, 1, 2, 3]).mean()) - 0.9) < 0.02


def test_smoothed_and_filtered_components_are_those_of_the_dense_joint(x64):
    """Time-varying C, offsets and inputs, two series with correlated noise, groups of one's own."""
    rng = np.random.default_rng(2)
    params = oracles.random_model(rng, n=4, m=1, steps=6, timed=("A", "C", "d", "D"), offsets=True)
    ssm, u = LinearGaussianSSM(**params), rng.normal(size=(6, 1))
    y = oracles.with_holes(rng, rng.normal(size=(6, 2)))
    truth = oracles.states(ssm, y, u)
    groups = {"one": ["b", 2], "two": "a"}
    for filtered, key in ((False, "smoothed"), (True, "filtered")):
        found = decompose(ssm, y, u, components=groups, filtered=filtered, state_names=("a", "b", "c", "d"), draws=3)
        assert found.components == ("one", "two", "other", "constant", "regression", "irregular")
        adds_up(found, 1e-9)
        mean, cov = truth[key]
        for name, states in (("one", [1, 2]), ("two", [0]), ("other", [3])):
            C = params["C"][:, :, states]
            part = found.data.sel(component=name)
            np.testing.assert_allclose(part["mean"], np.einsum("tpn,tn->tp", C, mean[:, states]), atol=1e-9)
            own = C @ cov[:, states][:, :, states] @ C.transpose(0, 2, 1)
            np.testing.assert_allclose(part["sd"], np.sqrt(np.diagonal(own, axis1=1, axis2=2)), atol=1e-9)
        np.testing.assert_allclose(
            found.data["mean"].sel(component="regression"), (params["D"] @ u[:, :, None])[..., 0]
        )
        np.testing.assert_allclose(found.data["mean"].sel(component="constant"), params["d"])
        np.testing.assert_allclose(found.data["state_mean"].T, mean, atol=1e-9)


def test_they_are_those_of_statsmodels(x64):
    y = SALES.to_numpy()
    peer = UnobservedComponents(y, "lltrend", seasonal=4)
    peer.ssm.initialize_known(np.zeros(5), 1e4 * np.eye(5))
    variances = [0.16, 0.09, 1e-3, 1e-2]
    truth = peer.smooth(variances)
    A = np.zeros((5, 5))
    A[:2, :2], A[2, 2:], A[3, 2], A[4, 3] = [[1, 1], [0, 1]], -1, 1, 1
    Q = np.diag([0.09, 1e-3, 1e-2, 0, 0])
    C = np.array([[1.0, 0, 1, 0, 0]])
    ssm = LinearGaussianSSM.from_covariances(np.zeros(5), 1e4 * np.eye(5), A, Q, C, [[0.16]])
    names = ("level", "slope", "seasonal", "seasonal_lag1", "seasonal_lag2")
    for filtered, key in ((False, "smoothed"), (True, "filtered")):
        found = decompose(ssm, y, state_names=names, filtered=filtered)
        assert found.components == ("level", "seasonal", "irregular")
        for name, part in (("level", truth.level), ("seasonal", truth.seasonal)):
            np.testing.assert_allclose(found.data["mean"].sel(component=name)[:, 0], part[key], atol=1e-6)
            sd = np.sqrt(part[f"{key}_cov"])
            np.testing.assert_allclose(found.data["sd"].sel(component=name)[:, 0], sd, rtol=1e-6, atol=1e-6)
        slope = found.data["state_mean"].sel(state="slope")
        np.testing.assert_allclose(slope, truth.trend[key], atol=1e-6)


def test_draws_of_the_parameters_widen_the_bands():
    """A posterior of many draws: the regression, certain given its coefficients, has their spread."""
    fit = infer.fit_map(models.local_level, SALES, u=PROMOTION, num_starts=1, progress_bar=False)
    fixed, spread = decompose(fit), decompose(fit, parameters="laplace", most=60)
    sd = {n: x.data["sd"].sel(component="regression").values for n, x in (("fixed", fixed), ("laplace", spread))}
    assert (sd["fixed"] == 0).all()
    beta = fit.covariance.loc[["beta[0]", "beta[1]"], ["beta[0]", "beta[1]"]].to_numpy()
    u = PROMOTION.to_numpy() - PROMOTION.to_numpy()[0]
    np.testing.assert_allclose(sd["laplace"][:, 0], np.sqrt(np.einsum("ti,ij,tj->t", u, beta, u)), rtol=0.5, atol=1e-6)
    adds_up(spread, 1e-3)
    assert spread.data.sizes["draw"] == 60


def test_a_posterior_without_regressors():
    """Draws of a chain, more of them than of the components that are kept."""
    values = {"sigma_level": np.linspace(0.2, 0.6, 70)[None], "sigma_obs": np.linspace(0.3, 0.5, 70)[None]}
    fit = infer.FitRecord("given", models.local_level, (SALES.to_numpy(),), {}, Known(values), "none")
    found = decompose(fit, draws=50)
    assert found.components == ("level", "irregular")
    assert found.data.sizes["draw"] == 50
    adds_up(found, 1e-4)


def test_far_from_zero_in_32_bits():
    """Heights near 1e7: the level has the height, and the sum is the data to a micrometre."""
    y = 1e7 + 0.01 * np.random.default_rng(0).normal(size=40).cumsum()
    found = decompose(given(models.local_level, {"sigma_level": 0.01, "sigma_obs": 0.002}, y))
    adds_up(found, 1e-6)
    assert abs(found.data["mean"].sel(component="level").values - 1e7).max() < 1
    values = {"mean_above": 0.01, "ar_partial": [0.9], "sigma_ar": 0.01}
    found = decompose(given(models.autoregression, values, y))
    assert found.components == ("ar", "constant", "irregular")
    adds_up(found, 1e-6)
    assert abs(found.data["mean"].sel(component="constant").values - 1e7).max() < 1


@pytest.mark.parametrize(
    "options",
    [
        {"trend": True, "seasonal": (4, 12), "harmonics": (None, 3)},
        {"level": True, "seasonal": 12, "harmonics": 6, "matern": 1.5},
        {"level": True, "seasonal": (2, 7), "harmonics": 1},
        {"level": False, "ar": 3, "cycle": True},
        {"trend": True, "seasonal": 5},
    ],
    ids=str,
)
def test_names_of_the_ready_models(options):
    """Every state of a ready model is in the component that it was asked for as."""
    trace = numpyro.handlers.trace(numpyro.handlers.seed(models.structural, 0)).get_trace(num_steps=30, **options)
    names = trace["y"]["infer"]["state_names"]
    expected = ["level"] if options.get("level", True) else []
    seasons = options.get("seasonal")
    if seasons is not None:
        expected += [f"seasonal_{p}" for p in seasons] if isinstance(seasons, tuple) else ["seasonal"]
    expected += [n for n in ("cycle", "ar", "matern") if options.get(n)]
    groups = by_name(names)
    assert list(groups) == expected
    assert sorted(i for group in groups.values() for i in group) == list(range(len(names)))


def test_states_of_several_series_are_one_component(x64):
    """`level[gdp]` and `level[prices]` contribute to a series each."""
    names = ("level[gdp]", "level[prices]", "slope[gdp]", "slope[prices]", "seasonal_4_1[gdp]", "seasonal_4_1[prices]")
    assert by_name(names) == {"level": [0, 1, 2, 3], "seasonal_4": [4, 5]}
    rng = np.random.default_rng(0)
    A, C = np.kron([[1.0, 1.0], [0.0, 1.0]], np.eye(2)), np.kron([[1.0, 0.0]], np.eye(2))
    ssm = LinearGaussianSSM(np.zeros(4), np.eye(4), A, 0.3 * np.eye(4), C, 0.5 * np.eye(2))
    y = rng.normal(size=(12, 2))
    found = decompose(ssm, y, state_names=names[:4], names=("gdp", "prices"))
    assert found.components == ("level", "irregular")
    adds_up(found, 1e-9)
    labels = [ax.get_ylabel() for ax in found.plot(series="prices").axes]
    assert labels == ["prices", "level", "irregular", "slope[prices]"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"components": {"a": "levle"}}, "`components` must be one of.*Did you mean 'level'"),
        ({"components": {"a": 99}}, "`components` must have numbers of states from 0 to"),
        ({"components": {"a": "level", "b": [0]}}, "`components` has the state 'level' in 'a' and in 'b'"),
        ({"state_names": ("a",)}, "`state_names` must have"),
        ({"level": 2}, "`level` must lie between 0 and 1"),
        ({"u": np.ones(3)}, "a fit has its own data"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        decompose(fitted(), **options)
    with pytest.raises(ValueError, match="`series` must be one of"):
        decompose(fitted(), filtered=True).plot(series="other")


def test_series_in_a_plate_are_refused():
    ssm = LinearGaussianSSM([0.0], [[1.0]], [[1.0]], [[1.0]], [[1.0]], [[1.0]])
    with pytest.raises(ValueError, match="one path of states"):
        decompose(ssm, jax.numpy.zeros((2, 5, 1)))
