"""Fits as DataTrees: every axis named and labelled, values those of the exact functions, files that lose nothing."""

from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.svi import SVIRunResult
from scipy import stats

from pssm import LinearGaussianSSM, datasets, log_likelihoods, models, observe
from pssm.diagnostics import load_tree, save_tree, to_datatree
from pssm.diagnostics.tree import data_digest
from pssm.distributions import LinearGaussianMarginal
from pssm.infer import SVIFit, fit_nuts, posterior_draws, smoothed_states
from pssm.infer import forecast as forecast_draws

pytestmark = pytest.mark.filterwarnings("ignore:.*transitions diverged")
STEPS, HORIZON = 40, 3
NILE = datasets.load("nile")
Y, YEARS = NILE.y[:STEPS].copy(), np.arange(1871, 1871 + STEPS)
Y[[7, 20, 21]] = np.nan
QUIET = {"progress_bar": False}
LABELS = {"time": YEARS, "future_time": YEARS[-1] + 1 + np.arange(HORIZON), "coords": {"series": ["flow"]}}
STATE_MODELS = {
    "regular noise": (models.local_linear_trend, ["level", "slope"]),
    "singular noise": (partial(models.structural, seasonal=3), ["level", "seasonal", "seasonal_lag1"]),
    "autoregression": (partial(models.autoregression, order=2), ["ar", "ar_lag1"]),
}


def at_start(model, *args, guide=None, **kwargs):
    """The result of SVI before its first step, by default with the prior as the guide: a tree needs only draws."""
    prior = handlers.block(model, hide_fn=lambda site: site.get("is_observed", False))
    svi = SVI(model, prior if guide is None else guide(model), numpyro.optim.Adam(0.01), Trace_ELBO())
    state = svi.init(jax.random.key(0), *args, **kwargs)
    return SVIFit.of(svi, SVIRunResult(svi.get_params(state), state, np.zeros(20)), *args, **kwargs)


@pytest.fixture(scope="module")
def nuts():
    settings = {"num_warmup": 100, "num_samples": 60, "num_chains": 2, "max_tree_depth": 6}
    return fit_nuts(models.local_linear_trend, Y, **settings, **QUIET)


@pytest.fixture(scope="module")
def svi():
    u = np.arange(2.0 * STEPS).reshape(-1, 2)
    return at_start(partial(models.structural, ar=2), Y, guide=AutoMultivariateNormal, u=u)


@pytest.fixture(scope="module")
def tree(nuts):
    return to_datatree(nuts, states=True, forecast=HORIZON, **LABELS)


def axes(group):
    return {name: x.dims for name, x in group.data_vars.items()}


def trails(y):
    """Two groups of three series of four steps, Poisson, with a vector for each group."""
    with numpyro.plate("group", 2):
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    with numpyro.plate("trial", len(y)):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        observe("y", dist.Poisson(rate[:, None, None] * jnp.ones((4, 3))).to_event(2), y)
    numpyro.deterministic("first", weights[0])


def test_groups_and_axes_of_a_nuts_fit(tree):
    assert set(tree.children) == {
        "posterior",
        "sample_stats",
        "observed_data",
        "log_likelihood",
        "smoothed_states",
        "forecast",
    }
    assert axes(tree["posterior"]) == dict.fromkeys(("sigma_level", "sigma_slope", "sigma_obs"), ("chain", "draw"))
    assert axes(tree["observed_data"]) == {"y": ("time", "series")}
    assert axes(tree["log_likelihood"]) == {"y": ("chain", "draw", "time")}
    assert axes(tree["smoothed_states"]) == {
        "mean": ("time", "state"),
        "sd": ("time", "state"),
        "signal_mean": ("time", "series"),
        "signal_sd": ("time", "series"),
    }
    quantiles = ("q05", "q25", "q50", "q75", "q95")
    assert axes(tree["forecast"]) == dict.fromkeys(("mean", "sd", *quantiles), ("horizon", "series"))
    assert {"diverging", "energy", "lp", "n_steps", "acceptance_rate"} == set(tree["sample_stats"].data_vars)
    assert set(axes(tree["sample_stats"]).values()) == {("chain", "draw")}


def test_every_axis_has_labels(tree):
    expected = {
        "chain": [0, 1],
        "draw": np.arange(60),
        "time": YEARS,
        "series": ["flow"],
        "state": ["level", "slope"],
        "horizon": LABELS["future_time"],
    }
    for name, group in tree.children.items():
        assert set(group.dims) == set(group.coords), name
        for axis in group.dims:
            seen = ~np.isnan(Y[:, 0]) if (name, axis) == ("log_likelihood", "time") else ...
            np.testing.assert_array_equal(group[axis], np.asarray(expected[axis])[seen])


def test_groups_and_axes_of_an_svi_fit(svi):
    tree = to_datatree(svi, num_samples=20, states=True)
    assert set(tree.children) == {"posterior", "observed_data", "log_likelihood", "smoothed_states"}
    assert dict(tree["posterior"].sizes) == {"chain": 1, "draw": 20, "lag": 2, "input": 2}
    assert axes(tree["posterior"])["phi"] == axes(tree["posterior"])["ar_partial"] == ("chain", "draw", "lag")
    assert axes(tree["posterior"])["beta"] == ("chain", "draw", "input")
    np.testing.assert_array_equal(tree["observed_data"]["time"], np.arange(STEPS))
    assert tree["smoothed_states"]["state"].values.tolist() == ["level", "ar", "ar_lag1"]


def test_values_are_those_of_the_fit(nuts, tree):
    draws = posterior_draws(nuts)
    for name, x in draws.items():
        np.testing.assert_array_equal(tree["posterior"][name], x)
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)
    extra = nuts.get_extra_fields(group_by_chain=True)
    np.testing.assert_array_equal(tree["sample_stats"]["lp"], -extra["potential_energy"])
    states = smoothed_states(models.local_linear_trend, draws, Y)
    np.testing.assert_allclose(tree["smoothed_states"]["mean"], states.state.mean, rtol=1e-5)
    np.testing.assert_allclose(tree["smoothed_states"]["signal_sd"], states.signal.sd, rtol=1e-5)
    future = forecast_draws(models.local_linear_trend, draws, HORIZON, Y)
    np.testing.assert_allclose(tree["forecast"]["mean"], future.mean, rtol=1e-5)
    np.testing.assert_allclose(tree["forecast"]["q95"], future.quantiles[4], rtol=1e-5)


def test_log_likelihood_is_that_of_each_step_given_its_past(nuts, tree):
    draw = {n: x[1, 17] for n, x in posterior_draws(nuts).items()}
    trace = handlers.trace(handlers.seed(handlers.substitute(models.local_linear_trend, draw), 0)).get_trace(Y)
    exact = log_likelihoods(trace["y"]["fn"].ssm, Y)
    seen = ~np.isnan(Y[:, 0])
    np.testing.assert_allclose(tree["log_likelihood"]["y"][1, 17], exact[seen], rtol=1e-5)
    np.testing.assert_array_equal(tree["log_likelihood"]["time"], YEARS[seen])


def test_plates_name_their_axes_and_series_theirs():
    y = np.random.default_rng(0).poisson(3.0, (5, 4, 3)).astype(float)
    y[1, 2, 0] = np.nan
    fit = at_start(trails, y)
    tree = to_datatree(fit, num_samples=10, dims={"first": ("part",)}, coords={"part": list("abc"), "trial": range(5)})
    assert axes(tree["posterior"]) == {
        "weights": ("chain", "draw", "group", "weights_dim_1"),
        "rate": ("chain", "draw", "trial"),
        "first": ("chain", "draw", "part"),
    }
    assert axes(tree["observed_data"]) == {"y": ("trial", "time", "series")}
    likelihood = tree["log_likelihood"]["y"]
    assert likelihood.dims == ("chain", "draw", "trial", "time")
    rate = tree["posterior"]["rate"].values[..., None, None]
    np.testing.assert_allclose(likelihood, np.nansum(stats.poisson.logpmf(y, rate), -1), rtol=1e-4)
    assert tree["posterior"]["part"].values.tolist() == list("abc")


@pytest.mark.parametrize("case", ["singular noise", "autoregression"])
def test_sampled_states_carry_the_names_of_their_components(case):
    model, names = STATE_MODELS[case]
    fit = at_start(model, Y, states="sampled")
    group = to_datatree(fit, num_samples=5, log_likelihood=False)["posterior"]
    assert group["state"].values.tolist() == names
    assert group["z"].dims == ("chain", "draw", "time", "state")
    assert not any(name.endswith("_base") for name in group.data_vars)


@pytest.mark.parametrize("case", STATE_MODELS)
def test_models_that_integrate_their_states_out_name_them(case):
    model, names = STATE_MODELS[case]
    site = handlers.trace(handlers.seed(model, 0)).get_trace(Y)["y"]
    assert list(site["infer"]["state_names"]) == names
    assert site["fn"].ssm.n_state == len(names)


def test_states_of_sampled_paths_come_from_the_model_that_integrates_them_out():
    fit = at_start(partial(models.local_linear_trend, states="sampled"), Y)
    tree = to_datatree(fit, model=models.local_linear_trend, states=True, num_samples=5)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "time", "state")
    assert tree["posterior"]["state"].values.tolist() == ["level", "slope"]
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "time")
    assert dict(tree["smoothed_states"].sizes) == {"time": STEPS, "state": 2, "series": 1}


def test_states_without_names_are_numbered_and_given_names_win(svi):
    def plain(y):
        sigma = numpyro.sample("sigma", dist.HalfNormal(100.0))
        eye = jnp.eye(2)
        ssm = LinearGaussianSSM(jnp.zeros(2), 1e3 * eye, eye, sigma * eye, jnp.ones((1, 2)), 100 * jnp.eye(1))
        numpyro.sample("y", LinearGaussianMarginal(ssm, len(y)), obs=y)

    fit = at_start(plain, Y)
    options = {"states": True, "num_samples": 5, "log_likelihood": False}
    assert to_datatree(fit, **options)["smoothed_states"]["state"].values.tolist() == [0, 1]
    named = to_datatree(svi, coords={"state": list("uvw")}, **options)
    assert named["smoothed_states"]["state"].values.tolist() == list("uvw")


WRONG = {
    "time": ({"time": YEARS[:-1]}, f"`time` must have {STEPS} labels; got {STEPS - 1}"),
    "future_time": ({"forecast": 3, "future_time": YEARS[:2]}, "`future_time` must have 3 labels; got 2"),
    "series": ({"coords": {"series": ["a", "b"]}}, "`coords` for 'series' must have 1 labels; got 2"),
    "state": ({"states": True, "coords": {"state": ["a"]}}, "`coords` for 'state' must have 2 labels; got 1"),
    "no such axis": ({"coords": {"seris": ["a"]}}, "`coords`.*'seris'.*'series', 'time'"),
    "no such site": ({"dims": {"beta": ("input",)}}, "`dims`.*'beta'.*'sigma_level'"),
    "names for a scalar": ({"dims": {"sigma_obs": ("a",)}}, "`dims` for 'sigma_obs' must have 0 names; got"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_labels_name_the_argument(nuts, case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        to_datatree(nuts, **{"log_likelihood": False, **options})


def test_what_is_not_a_fit_or_has_no_exact_states_is_named(nuts):
    with pytest.raises(TypeError, match="`fit`.*got dict"):
        to_datatree({})
    sampled = partial(models.local_linear_trend, states="sampled")
    with pytest.raises(ValueError, match="`model` has no `LinearGaussianMarginal`"):
        to_datatree(nuts, model=sampled, states=True, log_likelihood=False)


def test_file_holds_the_identical_tree(tree, tmp_path):
    path = save_tree(tree, tmp_path / "fit.nc")
    loaded = load_tree(path)
    assert loaded.identical(tree)
    assert {n: x.dtype for n, x in loaded["posterior"].data_vars.items()} == {
        n: x.dtype for n, x in tree["posterior"].data_vars.items()
    }
    assert np.isnan(loaded["observed_data"]["y"].sel(time=1878)).all()
    assert [p.name for p in tmp_path.iterdir()] == ["fit.nc"]
    path.unlink()  # nothing holds the file open
    assert float(loaded["observed_data"]["y"][0, 0]) == Y[0, 0]


def test_dates_survive_the_file(nuts, tmp_path):
    days = np.arange("2001-01-01", STEPS, dtype="datetime64[D]").astype("datetime64[ns]")
    tree = to_datatree(nuts, time=days, log_likelihood=False)
    assert load_tree(save_tree(tree, tmp_path / "a.nc")).identical(tree)


def test_failed_save_leaves_the_old_file_alone(tree, tmp_path, monkeypatch):
    path = save_tree(tree, tmp_path / "fit.nc")
    before = path.read_bytes()

    def broken(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(type(tree), "to_netcdf", broken)
    with pytest.raises(OSError, match="disk full"):
        save_tree(tree, path)
    assert path.read_bytes() == before


def test_absent_files_and_folders_are_errors(tree, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tree(tmp_path / "none.nc")
    with pytest.raises(OSError, match="none"):
        save_tree(tree, tmp_path / "none" / "a.nc")


def test_origin_is_recorded(tree, svi):
    assert tree.attrs["method"] == "NUTS"
    assert to_datatree(svi, num_samples=5, log_likelihood=False).attrs["method"] == "SVI (AutoMultivariateNormal)"
    assert {"schema_version", "numpyro_version", "jax_version", "backend", "dtype", "data_sha256"} <= set(tree.attrs)
    assert tree.attrs["data_sha256"] == data_digest({"y": Y.astype("float32")[:, :1]})


def test_digest_tells_data_apart():
    base = data_digest({"y": Y})
    other_bit, other_name = Y.copy(), {"x": Y}
    other_bit[0] += 1e-9
    different = [{"y": other_bit}, other_name, {"y": Y.astype("float32")}, {"y": Y.reshape(2, -1)}]
    assert len({base, *(data_digest(d) for d in different)}) == 5
    assert data_digest({"y": Y.copy()}) == base


def test_arviz_takes_the_trees(tree, svi):
    summary = az.summary(tree)
    assert list(summary.index) == ["sigma_level", "sigma_obs", "sigma_slope"]
    assert float(summary.loc["sigma_obs", "mean"]) == pytest.approx(
        float(tree["posterior"]["sigma_obs"].mean()), rel=0.01
    )
    assert "phi[0]" in az.summary(to_datatree(svi, num_samples=50, log_likelihood=False)).index


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
def test_loo_counts_the_observed_steps(tree):
    found = az.loo(tree, pointwise=True)
    assert found.n_data_points == STEPS - 3
    assert found.elpd_i.dims == ("time",)
    np.testing.assert_array_equal(found.elpd_i["time"], YEARS[~np.isnan(Y[:, 0])])
    assert found.elpd == pytest.approx(float(tree["log_likelihood"]["y"].mean(("chain", "draw")).sum()), abs=5)
