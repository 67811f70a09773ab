"""The comparison of methods: what its numbers mean, its verdicts on made-up numbers, and models of a user's own."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest

import pssm
from pssm.distributions import StatePath, observe
from pssm.study import budget
from pssm.study import methods as study_methods
from pssm.study.compare import Study
from pssm.study.methods import CompileClock, MethodResult, Settings, within_budget
from pssm.study.verdict import _share, judge, parameter_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:SVI has not converged"),
    pytest.mark.filterwarnings("ignore:.*transitions diverged"),
]

METHODS = ["nuts", "nuts:states", "svi:mvn", "svi:normal"]
SHORT = {"num_warmup": 100, "num_samples": 100, "num_chains": 2, "leave_future_out": False, "progress": False}


@pytest.fixture(scope="module")
def nile():
    return pssm.datasets.load("nile").y[:50]


@pytest.fixture(scope="module")
def study(nile):
    return pssm.compare(
        "local_level", nile, METHODS, svi_steps=800, **(SHORT | {"num_warmup": 300, "num_samples": 300})
    )


@pytest.fixture(scope="module")
def rows(study):
    return study.table.set_index("method")


def random_level(y, spread=100.0):
    """A model of a user's own with a path as a site: nothing is integrated out."""
    sigma = numpyro.sample("sigma", dist.HalfNormal(spread))
    one = jnp.eye(1)
    z = numpyro.sample("z", StatePath(jnp.array([1000.0]), 300.0 * one, one, 30.0 * one, y.shape[0]))
    observe("y", dist.Normal(z, sigma).to_event(2), y)


def constant(y):
    """A model of a user's own without a state."""
    mu = numpyro.sample("mu", dist.Normal(1000.0, 300.0))
    numpyro.sample("y", dist.Normal(mu, 150.0).expand(y.shape).to_event(2), obs=y)


# The table of a real comparison


def test_one_row_for_each_method_in_the_order_asked(study):
    assert study.table["method"].tolist() == METHODS == list(study.results)
    assert (study.table["status"] == "done").all()
    assert study.reference == "nuts"
    levels = study.table.set_index("method")["level"]
    good = [m for m in METHODS if levels[m] == "good"]
    assert study.best in ([m for m in good if m.startswith("nuts")] or good or [""]), (
        "an exact method where one is good"
    )
    assert not study.interrupted


def test_the_elbo_is_below_the_log_evidence(study, rows):
    for method in METHODS[2:]:
        error = study.results[method].diagnostics["elbo_se"]
        assert rows.loc[method, "elbo"] <= rows.loc[method, "log_evidence"] + 4 * error + 0.02
        gap = rows.loc[method, "log_evidence"] - rows.loc[method, "elbo"]
        assert rows.loc[method, "bound_gap"] == pytest.approx(gap)
    assert rows.loc[METHODS[:2], ["elbo", "bound_gap", "khat"]].isna().all(axis=None)
    assert rows["log_evidence"].nunique() == 1
    assert "importance sampling" in rows["evidence_kind"].iloc[0]


def test_the_log_evidence_is_that_of_a_grid(nile, rows):
    """The two-parameter integral by brute force, on a fine grid over log sds."""
    y = jnp.asarray(nile)
    spread, first = jnp.std(y), y[0, 0]

    def log_joint(log_sigma):
        level, obs = jnp.exp(log_sigma)
        one = jnp.eye(1)
        model = pssm.LinearGaussianSSM(first[None], 10 * spread * one, one, level * one, one, obs * one)
        prior = dist.HalfNormal(spread)
        return pssm.log_likelihood(model, y) + prior.log_prob(level) + prior.log_prob(obs) + log_sigma.sum()

    level, obs = jnp.linspace(-2.0, 7.0, 200), jnp.linspace(3.5, 6.5, 100)
    grid = jnp.stack(jnp.meshgrid(level, obs, indexing="ij"), -1).reshape(-1, 2)
    values = jax.jit(lambda points: jax.lax.map(log_joint, points, batch_size=1000))(grid)
    cell = (level[1] - level[0]) * (obs[1] - obs[0])
    assert rows["log_evidence"].iloc[0] == pytest.approx(float(jax.nn.logsumexp(values) + jnp.log(cell)), abs=0.06)


def test_chain_numbers_are_for_chains_only(study, rows):
    chains, guides = rows.loc[METHODS[:2]], rows.loc[METHODS[2:]]
    assert (chains[["ess_min", "ess_per_second"]] > 0).all(axis=None)
    assert chains["rhat_max"].between(0.99, 1.5).all()
    assert guides[["ess_min", "ess_per_second", "rhat_max", "divergences"]].isna().all(axis=None)
    own = study.parameters.set_index("method")
    assert own.loc[METHODS[2:], ["ess_bulk", "ess_tail", "r_hat"]].isna().all(axis=None)
    assert own.loc[METHODS[:2], ["ess_bulk", "ess_tail", "r_hat"]].notna().all(axis=None)


def test_parameters_are_measured_against_the_reference(study, rows):
    table = study.parameters
    assert set(table["parameter"]) == {"sigma_level", "sigma_obs"}
    exact = table[table["method"] == "nuts"]
    assert exact["sd_ratio"].tolist() == [1.0, 1.0]
    assert exact["error_in_sds"].tolist() == [0.0, 0.0]
    draws = study.results["nuts"].tree["posterior"]["sigma_obs"].values
    row = exact.set_index("parameter").loc["sigma_obs"]
    assert row["mean"] == pytest.approx(draws.mean(), rel=1e-5)
    assert row["sd"] == pytest.approx(draws.std(ddof=1), rel=1e-2)
    other = table[(table["method"] == "svi:mvn") & (table["parameter"] == "sigma_obs")].iloc[0]
    assert other["sd_ratio"] == pytest.approx(other["sd"] / row["sd"])
    assert other["error_in_sds"] == pytest.approx((other["mean"] - row["mean"]) / row["sd"])
    assert np.isnan(rows.loc["nuts", "error_max_sds"])
    assert rows.loc["nuts:states", "error_max_sds"] < 0.6


def test_the_other_columns(study, rows):
    assert rows["coverage90"].between(0.6, 1.0).all()  # 49 forecasts of a model that fits
    assert (rows[["seconds_compile", "seconds_run"]] > 0).all(axis=None)
    assert rows["elpd_lfo"].isna().all()
    assert rows["level"].isin(["good", "check", "bad"]).all()
    for method, result in study.results.items():
        assert result.verdict == rows.loc[method, "verdict"]
        assert result.verdict.endswith(".")
    assert rows.loc["svi:normal", "verdict"].find("AutoNormal") >= 0
    assert set(study.results["nuts"].tree["forecast"].sizes.items()) >= {("horizon", 10)}
    assert study.settings["num_samples"] == 300
    assert study.settings["model_options"] == {}


# Verdicts on made-up numbers


def verdict(method, *, sd_ratio=1.0, error=0.0, khat=np.nan, r_hat=1.001, ess=2000.0, divergences=0.0, alone=False):
    """The judged result of `method` beside a reference that is fine."""
    columns = ["method", "parameter", "mean", "sd", "error_in_sds", "sd_ratio", "ess_bulk", "ess_tail", "r_hat"]
    exact = method.startswith("nuts")
    chain = (ess, ess + 1, r_hat) if exact else (np.nan,) * 3
    against = (np.nan, np.nan) if alone else (error, sd_ratio)
    level = (method, "sigma_level", 50.0, 10.0, *against, *chain)
    obs = (method, "sigma_obs", 120.0, 12.0, *((np.nan,) * 2 if alone else (0.01, 1.02)), *chain)
    reference = [("ref", p, 50.0, 10.0, 0.0, 1.0, 2000.0, 2000.0, 1.0) for p in ("sigma_level", "sigma_obs")]
    frame = pd.DataFrame([level, obs, *([] if alone else reference)], columns=columns)
    numbers = {"divergences": divergences} if exact else {"elbo": -10.5, "khat": khat}
    result = MethodResult(method, seconds_compile=1.0, seconds_run=2.0, diagnostics=numbers)
    table = judge({method: result}, "" if alone else "ref", frame, (-10.0, "made up"))
    return result, table.iloc[0]


def test_a_guide_that_is_too_narrow():
    result, row = verdict("svi:normal", sd_ratio=0.62, khat=0.4)
    assert result.verdict == "AutoNormal understates the sd of sigma_level by 38 %: do not use."
    assert result.level == row["level"] == "bad"
    assert row["bound_gap"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("numbers", "level", "words"),
    [
        ({"khat": 0.1, "sd_ratio": 0.97, "error": 0.05}, "good", ["agrees with the reference", "safe to use"]),
        ({"khat": 0.1, "sd_ratio": 0.82}, "check", ["understates the sd of sigma_level by 18 %"]),
        ({"khat": 0.1, "sd_ratio": 1.40}, "bad", ["overstates the sd of sigma_level by 40 %", "do not use"]),
        ({"khat": 0.1, "error": -0.8}, "bad", ["puts the mean of sigma_level 0.80 posterior sds off", "do not use"]),
        ({"khat": 0.6}, "check", ["k-hat 0.60"]),
        ({"khat": 0.75}, "bad", ["k-hat 0.75", "do not use"]),
        ({"khat": 0.9, "sd_ratio": 0.5}, "bad", ["by 50 %", "heavy-tailed", "k-hat 0.90"]),
        ({"khat": 0.2, "alone": True}, "good", ["passes its own check", "no exact method"]),
        ({"khat": 0.6, "alone": True}, "check", ["doubtful", "no exact method"]),
        ({"khat": 0.8, "alone": True}, "bad", ["doubtful", "no exact method"]),
    ],
)
def test_verdicts_on_guides(numbers, level, words):
    result, _ = verdict("svi:mvn", **numbers)
    assert result.level == level
    assert "AutoMultivariateNormal" in result.verdict
    for word in words:
        assert word in result.verdict


@pytest.mark.parametrize(
    ("numbers", "level", "words"),
    [
        ({}, "good", ["Trust it", "R-hat 1.001", "2000 effective draws"]),
        ({"r_hat": 1.05}, "check", ["R-hat of sigma_level is 1.050"]),
        ({"r_hat": np.nan}, "check", ["R-hat"]),
        ({"ess": 150.0}, "check", ["150 effective draws"]),
        ({"divergences": 7.0}, "check", ["7 divergent transitions"]),
    ],
)
def test_verdicts_on_chains(numbers, level, words):
    result, row = verdict("nuts:states", **numbers)
    assert result.level == level
    for word in words:
        assert word.lower() in result.verdict.lower()
    assert np.isnan(row["bound_gap"])


@pytest.mark.parametrize(("status", "level"), [("failed", "bad"), ("skipped", "check"), ("interrupted", "check")])
def test_verdicts_on_methods_without_a_result(status, level):
    result = MethodResult("svi:mvn", status, "the reason")
    columns = ["method", "parameter", "error_in_sds", "sd_ratio", "ess_bulk", "ess_tail", "r_hat"]
    judge({"svi:mvn": result}, "", pd.DataFrame(columns=columns), (np.nan, ""))
    assert (result.level, status in result.verdict, "the reason" in result.verdict) == (level, True, True)


def test_no_result_gives_an_empty_table_of_parameters():
    assert parameter_rows({}, "").empty


EXACT, DOUBTFUL = ("nuts", "good", 50.0, 9.0), ("nuts", "check", 50.0, 9.0)
GUIDE, FASTER = ("svi:mvn", "good", None, 5.0), ("svi:normal", "good", None, 4.0)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([EXACT, ("nuts:states", "good", 70.0, 9.0), GUIDE], "nuts:states"),
        ([DOUBTFUL, GUIDE, FASTER], "svi:normal"),
        ([DOUBTFUL, ("svi:mvn", "bad", None, 5.0)], ""),
    ],
    ids=["the exact one with most draws a second", "the fastest guide", "none"],
)
def test_the_method_to_use(rows, best):
    table = pd.DataFrame(rows, columns=["method", "level", "ess_per_second", "seconds_run"])
    study = Study("s", "m", np.zeros((1, 1)), np.arange(1), "y", {}, "", table, pd.DataFrame(), {})
    assert study.best == best


# The budget and the clock


@pytest.fixture
def a_gradient_takes(monkeypatch):
    """Makes the clock of the budget say that each gradient takes so many seconds."""

    def use(seconds):
        ticks = iter([0.0, 3 * seconds])
        monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))

    return use


def budgeted(name, nile, budget):
    return within_budget(name, constant, jnp.asarray(nile), Settings(budget=budget))


def test_steps_are_cut_to_the_budget(nile, a_gradient_takes):
    a_gradient_takes(0.1)  # 5000 steps of 8 gradients: 4000 s
    settings, note, possible = budgeted("svi:mvn", nile, 1000.0)
    assert possible
    assert settings.svi_steps == pytest.approx(1250, abs=1)
    assert "Steps cut from 5000" in note


def test_draws_are_cut_to_the_budget(nile, a_gradient_takes):
    a_gradient_takes(0.1)  # 2000 iterations of 12 gradients and 4 chains: 9600 s
    settings, note, possible = budgeted("nuts", nile, 1200.0)
    assert possible
    assert settings.num_chains == 2
    assert (settings.num_warmup, settings.num_samples) == pytest.approx((250, 250), abs=1)
    assert "Cut by the budget from 4 x (1000 + 1000)" in note


@pytest.mark.parametrize(("name", "minutes"), [("nuts", "160"), ("svi:normal", "67")])
def test_a_method_that_cannot_be_cut_enough_is_skipped(nile, a_gradient_takes, name, minutes):
    a_gradient_takes(0.1)
    settings, note, possible = budgeted(name, nile, 100.0)
    assert not possible
    assert settings == Settings(budget=100.0)
    assert f"{minutes} minutes" in note
    assert "budget" in note


@pytest.mark.parametrize(("length", "samples"), [(50, 1000), (2000, 244)])
def test_a_long_path_costs_nuts_more_gradients(a_gradient_takes, length, samples):
    a_gradient_takes(1e-3)  # 2000 iterations of 4 chains: 100 gradients each, or 1023 for a long path
    y = jnp.zeros((length, 1))
    settings, _, possible = within_budget("nuts:states", random_level, y, Settings(budget=1000.0))
    assert possible
    assert settings.num_samples == pytest.approx(samples, abs=1)


@pytest.mark.parametrize("name", ["nuts", "svi:normal"])
def test_what_fits_is_not_cut(nile, a_gradient_takes, name):
    a_gradient_takes(1e-6)
    assert budgeted(name, nile, 100.0) == (Settings(budget=100.0), "", True)
    assert budgeted(name, nile, None) == (Settings(), "", True)


def test_a_skipped_method_is_in_the_table(nile, monkeypatch):
    monkeypatch.setattr(study_methods, "within_budget", lambda name, model, y, s, **k: (s, "would take a year", False))
    study = pssm.compare(constant, nile, ["nuts"], budget=1.0, **SHORT)
    assert study.table.loc[0, ["status", "note"]].tolist() == ["skipped", "would take a year"]
    assert study.reference == study.best == ""
    assert "No exact method finished" in " ".join(study.warnings)


def test_the_clock_hears_compilation_inside_its_block_only():
    before = CompileClock()
    with CompileClock() as clock:
        jax.jit(lambda x: jnp.sin(x) * 1.2345)(jnp.arange(3.0)).block_until_ready()
    heard = clock.seconds
    assert heard > 0
    jax.jit(lambda x: jnp.cos(x) * 5.4321)(jnp.arange(3.0)).block_until_ready()
    assert clock.seconds == heard
    assert before.seconds == 0


def test_the_clock_stops_at_an_error():
    with pytest.raises(RuntimeError), CompileClock() as clock:
        raise RuntimeError
    assert clock not in CompileClock._running


# Models of a user's own, options, errors


def test_a_model_without_states(nile):
    study = pssm.compare(constant, nile, ["nuts", "nuts:states"], **SHORT)
    assert study.model_name == "constant"
    assert study.table["status"].tolist() == ["done", "skipped"]
    assert "no sampled form" in study.results["nuts:states"].note
    posterior = 1 / (1 / 300**2 + len(nile) / 150**2)
    row = study.parameters.iloc[0]
    assert row["mean"] == pytest.approx(posterior * (1000 / 300**2 + nile.sum() / 150**2), abs=0.5 * posterior**0.5)
    assert row["sd"] == pytest.approx(posterior**0.5, rel=0.3)
    assert "smoothed_states" not in study.results["nuts"].tree.children


@pytest.mark.parametrize("method", ["nuts:states", "nuts:transport"])
def test_a_model_with_a_path_of_its_own(nile, method):
    study = pssm.compare(random_level, nile[:20], [method], spread=150.0, svi_steps=200, **SHORT)
    result = study.results[method]
    assert result.status == "done"
    samples = result.fit.get_samples()
    assert samples["z_base"].shape == (200, 20)  # what NUTS moved: the noise that drives the path
    assert samples["z"].shape == (200, 20, 1)
    assert result.tree["posterior"]["z"].dims == ("chain", "draw", "time", "state")
    assert "z_base" not in result.tree["posterior"]
    assert study.settings["model_options"] == {"spread": 150.0}
    assert study.parameters["parameter"].tolist() == ["sigma"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table(nile):
    run = {"leave_future_out": False, "progress": False, "svi_steps": 100, "seed": 3, "horizon": 0}
    first, second = (pssm.compare("local_level", nile[:20], ["svi:normal"], scale=100.0, **run) for _ in range(2))
    untimed = [c for c in first.table if not c.startswith("seconds")]
    pd.testing.assert_frame_equal(first.table[untimed], second.table[untimed])
    pd.testing.assert_frame_equal(first.parameters, second.parameters)
    assert first.settings == second.settings
    assert first.settings["model_options"] == {"scale": 100.0}
    assert "forecast" not in first.results["svi:normal"].tree.children


@pytest.mark.parametrize(
    ("model", "methods", "error", "words"),
    [
        ("local_levle", ["nuts"], ValueError, r"`model`.*'local_levle'.*Did you mean 'local_level'"),
        ("local_level", ["nuts", "svi:mnv"], ValueError, r"`methods`.*'svi:mnv'"),
        ("local_level", [], ValueError, r"`methods` is empty"),
        (3, ["nuts"], TypeError, r"`model`.*int"),
    ],
)
def test_wrong_arguments_are_named(nile, model, methods, error, words):
    with pytest.raises(error, match=words):
        pssm.compare(model, nile, methods, **SHORT)


@pytest.mark.parametrize("y", [np.full(5, np.nan), np.zeros((0, 1))], ids=["all missing", "no rows"])
def test_data_without_a_value(y):
    with pytest.raises(ValueError, match="`y` has no observed value"):
        pssm.compare("local_level", y, ["nuts"], **SHORT)


def test_an_option_that_the_model_does_not_have(nile):
    with pytest.raises(TypeError, match="perid"):
        pssm.compare("local_level", nile, ["nuts"], perid=12, **SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svi:diagonal", pytest.param("svi:moment_matched", marks=pytest.mark.slow)])
def test_a_path_guide_runs_where_there_is_a_path(nile, method):
    run = {"svi_steps": 300, "leave_future_out": False, "progress": False}
    row = pssm.compare("local_level", nile[:20], [method], horizon=0, **run).table.loc[0]
    assert row["status"] == "done"
    is_bound = method == "svi:diagonal"
    assert ("lower bound" if is_bound else "surrogate") in row["objective"]
    assert np.isfinite(row["elbo"]) == np.isfinite(row["khat"]) == is_bound, "a surrogate is not shown as a bound"
    skipped = pssm.compare("autoregression", nile[:20], [method], order=2, **run)
    assert skipped.table.loc[0, "status"] == "skipped"


def test_an_absurd_share_is_no_number():
    assert [_share(x) for x in (0.53, 9.0, 4e19)] == ["53 %", "900 %", "more than 1000 %"]
