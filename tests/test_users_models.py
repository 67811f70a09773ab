"""Models of users' own, whatever their names and axes: known before the first step, and no later step costs the fit."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.svi import SVIRunResult
from users_models import CASES, MASK, S, T, counts, flat_counts, level, panel, run_of, walk

import pssm
from pssm.diagnostics import leave_future_out, load_tree, save_tree, to_datatree
from pssm.diagnostics.groups import sites_of
from pssm.distributions import LinearGaussianMarginal
from pssm.guides.plates import WholePlates
from pssm.infer import SVIFit, fit_nuts, fit_svi
from pssm.inspection.axes import find_axes
from pssm.study import compare as comparison
from pssm.study import methods as study_methods
from pssm.study.forecasts import resume_study

pytestmark = [
    pytest.mark.filterwarnings("ignore:SVI has not converged"),
    pytest.mark.filterwarnings("ignore:.*transitions diverged"),
]
QUICK = {
    "num_warmup": 12,
    "num_samples": 8,
    "num_chains": 1,
    "svi_steps": 12,
    "horizon": 2,
    "leave_future_out": False,
    "progress": False,
}
DAYS = pd.date_range("2024-01-01", periods=T)
DO_NOT_APPLY = {
    ("a part of a plate", "nuts"),
    ("a part of a plate", "svi:mvn"),
    ("a plate in a scan", "svi:normal"),
}
each_case = pytest.mark.parametrize("name", CASES)


def at_start(model, args, kwargs, guide=None):
    """The result of SVI before its first step, with the prior as the guide: a tree needs only draws."""
    prior = handlers.block(model, hide_fn=lambda site: site.get("is_observed", False))
    svi = SVI(model, guide or prior, numpyro.optim.Adam(0.01), Trace_ELBO())
    state = svi.init(jax.random.key(0), *args, **kwargs)
    return SVIFit.of(svi, SVIRunResult(svi.get_params(state), state, np.zeros(20)), *args, **kwargs)


# Names and axes


@each_case
def test_the_axes_are_found_and_not_from_sizes(name):
    case = CASES[name]
    args, kwargs = run_of(case)
    axes = find_axes(case.model, args, kwargs, series=np.ndim(args[0]) in (1, 2), dims=case.options.get("dims"))
    assert axes.time == case.time
    assert axes.steps == T
    assert {n: axes.names[n] for n in case.axes} == case.axes


@functools.cache
def tree_of(name):
    case = CASES[name]
    return to_datatree(at_start(case.model, *run_of(case)), num_samples=2, time=DAYS, dims=case.options.get("dims"))


@each_case
def test_its_tree_has_these_axes_in_memory_and_in_a_file(name, tmp_path):
    case, tree = CASES[name], tree_of(name)
    loaded = load_tree(save_tree(tree, tmp_path / "fit.nc"))
    assert loaded.identical(tree)
    assert tree.attrs["time_axis"] == case.time
    found = {}
    for group in ("posterior", "observed_data"):
        for variable, x in tree[group].data_vars.items():
            site = x.attrs.get("site", variable)
            found[site] = tuple(d for d in x.dims if d not in ("chain", "draw"))
            if case.time in x.dims:
                np.testing.assert_array_equal(x[case.time], DAYS)
    assert {n: found[n] for n in case.axes if n in found} == {n: a for n, a in case.axes.items() if n in found}
    assert set(found) >= set(case.axes)
    for variable, x in tree["log_likelihood"].data_vars.items():
        assert np.isfinite(x).all(), variable


@each_case
def test_the_log_likelihoods_sum_to_the_density_of_the_data(name):
    """At each draw: the sum of all entries of the group is the log density of the observed sites."""
    case = CASES[name]
    args, kwargs = run_of(case)
    tree = tree_of(name)
    draw = {n: jnp.asarray(x[0, 1]) for n, x in sites_of(tree["posterior"]).items()}
    with WholePlates():
        trace = handlers.trace(handlers.seed(handlers.substitute(case.model, draw), 0)).get_trace(*args, **kwargs)
    for site, scores in sites_of(tree["log_likelihood"]).items():
        expected = float(jnp.sum(trace[site]["fn"].log_prob(trace[site]["value"])))
        assert scores[0, 1].sum() == pytest.approx(expected, rel=1e-4), site


# The study


@each_case
def test_a_study_of_it_finishes_with_every_method_and_can_be_read_again(name, tmp_path):
    case = CASES[name]
    time = DAYS if case.time == "time" else None
    study = pssm.compare(case.model, case.y, case.methods, time=time, out=tmp_path / "out", **case.options, **QUICK)
    page = study.report(tmp_path / "out").read_text(encoding="utf-8")
    for method, result in study.results.items():
        if result.status == "skipped":
            assert (name, method) in DO_NOT_APPLY, result.note
            continue
        assert result.status == "done", result.note
        tree = load_tree(tmp_path / "out" / f"{method.replace(':', '-')}.nc")
        assert {"posterior", "observed_data", "log_likelihood"} <= set(tree.children), result.note
        observed = {str(x.attrs.get("site", n)): x.dims for n, x in tree["observed_data"].data_vars.items()}
        assert observed == {n: a for n, a in case.axes.items() if n in observed}
        assert method in page
    assert study.y.shape[0] == len(study.time) == T
    assert study.settings["data_sha256"]


def test_a_panel_keeps_its_draws_whatever_becomes_of_its_states():
    """20 series and 40 steps, the case of the report: labels of the steps fit, and each step that fails is named."""
    study = pssm.compare(panel, counts(4, T, 1), ["svi:normal"], time=np.arange(T), column=list("abcd"), **QUICK)
    result = study.results["svi:normal"]
    assert result.status == "done"
    assert result.tree["observed_data"]["region"].values.tolist() == list("abcd")
    groups = set(result.tree.children)
    for group in ("smoothed_states", "forecast"):
        assert group in groups or f"No {group.replace('_', ' ')}" in result.note


# What fails later costs no more than itself


def local(flow):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("flow", LinearGaussianMarginal(level(scale), len(flow)), obs=flow)


def broken(*args, **kwargs):
    raise LookupError("broken on purpose")


LATER = {
    "states": ("pssm.diagnostics.tree.smoothed_states", "No smoothed states", {"forecast", "log_likelihood"}),
    "forecast": ("pssm.diagnostics.tree.forecast_draws", "No forecast", {"smoothed_states", "log_likelihood"}),
    "log-likelihood": (
        "pssm.diagnostics.tree.pointwise_likelihoods",
        "No log likelihood",
        {"smoothed_states", "forecast"},
    ),
    "coverage": ("pssm.study.methods.one_step_probabilities", "No coverage", {"smoothed_states", "forecast"}),
    "k-hat": ("pssm.study.methods.elbo_and_khat", "No ELBO and k-hat", {"smoothed_states", "forecast"}),
    "leave-future-out": ("pssm.diagnostics.leave_future_out", "No leave-future-out", {"smoothed_states", "forecast"}),
    "evidence": ("pssm.study.compare.log_evidence", "", {"smoothed_states", "forecast"}),
    "the table of parameters": ("arviz.summary", "", {"smoothed_states", "forecast"}),
    "saving": ("pssm.study.compare.save_tree", "No saved results", {"smoothed_states", "forecast"}),
    "the whole tree": ("pssm.study.methods.build_tree", "No labelled results", set()),
}


@pytest.mark.parametrize("case", LATER)
def test_a_later_step_that_fails_is_named_and_leaves_the_rest(case, tmp_path, monkeypatch):
    target, words, groups = LATER[case]
    module, _, name = target.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, broken, raising=False)
    options = {**QUICK, "leave_future_out": case == "leave-future-out"}
    study = pssm.compare(local, counts(T, 1), ["nuts", "svi:normal"], out=tmp_path / "out", **options)
    for method, result in study.results.items():
        assert result.status == "done"
        assert result.fit is not None
        assert words in result.note or (case == "k-hat" and method == "nuts"), result.note
        assert groups <= (set() if result.tree is None else set(result.tree.children))
    page = study.report(tmp_path / "report").read_text(encoding="utf-8")
    assert ("could not be saved: LookupError" in page) == (case == "saving")
    assert len(study.table) == 2


def test_a_method_that_raises_anything_leaves_the_others(monkeypatch):
    run = study_methods._run_fit

    def some(name, *args, **kwargs):
        return broken() if name == "svi:mvn" else run(name, *args, **kwargs)

    monkeypatch.setattr(study_methods, "_run_fit", some)
    study = pssm.compare(local, counts(T, 1), ["svi:mvn", "svi:normal"], **QUICK)
    assert [r.status for r in study.results.values()] == ["failed", "done"]
    assert "LookupError" in study.results["svi:mvn"].note


def test_an_interrupted_study_of_a_dict_goes_on(tmp_path, monkeypatch):
    case, run = CASES["a dict"], comparison.run_method

    def some(name, *args, **kwargs):
        if name == "svi:normal":
            raise KeyboardInterrupt
        return run(name, *args, **kwargs)

    monkeypatch.setattr(comparison, "run_method", some)
    methods = ["svi:mvn", "svi:normal"]
    first = pssm.compare(case.model, case.y, methods, time=DAYS, out=tmp_path / "out", **case.options, **QUICK)
    assert [r.status for r in first.results.values()] == ["done", "interrupted"]
    monkeypatch.undo()
    study = resume_study(tmp_path / "out", model=case.model, progress=False)
    assert [r.status for r in study.results.values()] == ["done", "done"]
    assert study.settings["data_sha256"] == first.settings["data_sha256"]
    np.testing.assert_array_equal(study.time, DAYS)
    for result in study.results.values():
        assert result.tree["observed_data"]["yearly"].dims == ("yearly_time",)


# Errors before the first step


def unnamed(cube):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    pssm.observe("cube", dist.Normal(mean, 1.0).expand(cube.shape), cube)


def silent(y):
    numpyro.sample("mean", dist.Normal(0.0, 1.0))


def transposed(y):
    z = numpyro.sample("path", walk(len(y)))
    numpyro.sample("flow", dist.Normal(z, 1.0), obs=y)


def unnamed_arguments(y, *rest):
    flat_counts(y)


def plain(y):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    numpyro.sample("flow", dist.Normal(mean, 1.0), obs=y)


BEFORE = {
    "no time axis": (unnamed, counts(S, T, 2), {}, r"`dims`.*'cube'.*\(3, 12, 2\).*`dims=\{'cube': "),
    "no observed site": (silent, counts(T), {}, "no site is observed"),
    "a broadcast": (
        transposed,
        counts(T, missing=False),
        {},
        r"`flow`.*\(12,\).*\(12, 1\).*each entry counts 12 times",
    ),
    "NaN in a plain distribution": (plain, counts(T), {}, "`flow` has 1 NaN.*pssm.observe"),
    "time labels": (flat_counts, counts(T), {"time": np.arange(T - 1)}, "`time` must have 12 labels; got 11"),
    "future labels": (local, counts(T, 1), {"future_time": [1]}, "`future_time` must have 2 labels; got 1"),
    "future labels of a sampled path": (
        flat_counts,
        counts(T),
        {"future_time": [1]},
        "`future_time` must have 2 labels",
    ),
    "names of columns": (panel, counts(S, T, 1), {"column": ["a", "b"]}, "`column` must be 3 different names"),
    "names of axes": (flat_counts, counts(T), {"dims": {"arrivals": ("a", "b")}}, "`dims` for 'arrivals' must have 1"),
    "names of no site": (flat_counts, counts(T), {"dims": {"arivals": ("a",)}}, "`dims` names 'arivals'"),
    "arguments without names": (unnamed_arguments, counts(T), {"args": (1,)}, "`args`: .* wrap it in one that names"),
    "too many arguments": (flat_counts, counts(T), {"args": (1, 2)}, "`args` does not fit"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_what_cannot_work_ends_before_the_first_step(case, tmp_path, monkeypatch):
    model, y, options, words = BEFORE[case]
    monkeypatch.setattr(comparison, "run_method", broken)
    error = TypeError if "args" in options else ValueError
    with pytest.raises(error, match=words):
        pssm.compare(model, y, ["nuts", "svi:normal"], out=tmp_path / "out", **options, **QUICK)
    assert not (tmp_path / "out").exists()


def test_a_time_axis_that_is_named_is_taken():
    dims = {"cube": ("region", "time", "kind")}
    study = pssm.compare(unnamed, counts(T, T, 2), ["svi:normal"], dims=dims, **QUICK)
    assert study.results["svi:normal"].tree["observed_data"]["cube"].dims == dims["cube"]
    assert study.y.shape == (T, 2 * T)
    np.testing.assert_array_equal(study.y[3, :2], counts(T, T, 2)[0, 3])


# Leave-future-out


def test_leave_future_out_cuts_the_time_axis_of_a_panel():
    """One parameter per panel, known exactly: normal data, normal prior, regions one after the other."""
    y = np.random.default_rng(1).normal(2.0, 1.0, (S, T))
    y[1, 4] = np.nan

    def means(flow):
        mean = numpyro.sample("mean", dist.Normal(0.0, 3.0))
        with numpyro.plate("region", flow.shape[0], dim=-2), numpyro.plate("time", flow.shape[1], dim=-1):
            pssm.observe("flow", dist.Normal(mean, 1.0), flow)

    fit = fit_nuts(means, jnp.asarray(y), num_warmup=300, num_samples=1500, num_chains=2, progress_bar=False)
    found = leave_future_out(fit, min_observations=T // 2)
    expected = 0.0
    for t in range(T // 2, T):
        past, now = y[:, :t][~np.isnan(y[:, :t])], y[:, t]
        precision = 1 / 9 + past.size
        expected += jax.scipy.stats.multivariate_normal.logpdf(
            now, np.full(S, past.sum() / precision), np.eye(S) + 1 / precision
        )
    assert found.elpd == pytest.approx(float(expected), abs=0.15)


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        (plain, (counts(T, missing=False),), "NaN in 'flow' must mean missing"),
        (CASES["two sites, two arguments"].model, (counts(T, 1), counts(T, 2)), "run along time too"),
        (CASES["a dict"].model, (CASES["a dict"].y,), "must be the data, an array"),
    ],
    ids=["no missing entries", "two sites", "a dict"],
)
def test_leave_future_out_says_what_it_cannot_cut(model, args, words):
    args = jax.tree.map(jnp.asarray, args)
    with pytest.raises(ValueError, match=words):
        leave_future_out(at_start(model, args, {}, AutoNormal(model)))


# Trees


def test_a_mask_counts_in_the_log_likelihood():
    case = CASES["a mask"]
    args, kwargs = run_of(case)
    scores = to_datatree(at_start(case.model, args, kwargs), num_samples=3)["log_likelihood"]["flow"]
    np.testing.assert_array_equal(scores["time"], np.flatnonzero(MASK))
    assert (scores < 0).all()


def test_a_site_called_base_is_kept_unless_it_drives_a_path():
    def wages(y):
        base = numpyro.sample("wage_base", dist.Normal(0.0, 1.0))
        pssm.observe("wage", dist.Normal(base, 1.0).expand((len(y),)), y)

    assert "wage_base" in to_datatree(at_start(wages, (jnp.ones(T),), {}), num_samples=3)["posterior"]


def test_fitted_parameters_of_a_model_are_those_of_its_log_likelihood():
    def learned(y):
        scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
        numpyro.sample("mean", dist.Normal(0.0, 1.0))
        pssm.observe("flow", dist.Normal(0.0, scale).expand((len(y),)), y)

    y = 20 + jnp.arange(float(T))
    fit = fit_svi(learned, y, guide="normal", num_steps=300, learning_rate=0.1, progress_bar=False)
    assert fit.params["scale"] > 3
    scores = to_datatree(fit, num_samples=2, time=np.arange(T))["log_likelihood"]["flow"].values[0, 0]
    np.testing.assert_allclose(scores, dist.Normal(0.0, fit.params["scale"]).log_prob(y), rtol=1e-5)


@pytest.mark.parametrize(
    "labels",
    [
        [pd.Timestamp(day) for day in DAYS],
        DAYS.tz_localize("Europe/Berlin"),
        pd.period_range("2024-01", periods=T, freq="M"),
        [f"step {i}" for i in range(T)],
        list(DAYS.date),
    ],
    ids=["timestamps", "a time zone", "periods", "texts", "dates"],
)
def test_labels_of_any_kind_can_be_saved(labels, tmp_path):
    tree = to_datatree(at_start(flat_counts, (jnp.asarray(counts(T)),), {}), num_samples=2, time=labels)
    loaded = load_tree(save_tree(tree, tmp_path / "fit.nc"))
    np.testing.assert_array_equal(loaded["observed_data"]["time"], tree["observed_data"]["time"])
    assert len(set(loaded["observed_data"]["time"].values.tolist())) == T


def test_time_labels_need_a_time_axis():
    fit = at_start(unnamed, (jnp.asarray(counts(S, T, 2)),), {})
    with pytest.raises(ValueError, match=r"`time` has labels, but which axis of the observed site 'cube'"):
        to_datatree(fit, num_samples=2, time=np.arange(T))
    assert to_datatree(fit, num_samples=2)["observed_data"]["cube"].dims == ("cube_dim_0", "cube_dim_1", "cube_dim_2")
