"""`check_model` on tables of good and bad models: sites, what is integrated out, odd shapes, methods that apply."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from users_models import CASES, MASK, S, T, counts, run_of, walk

import pssm
from pssm import models, observe
from pssm.infer import check_model
from pssm.study.method_names import APPROXIMATE

FULL = counts(T, missing=False)
PATH_METHODS = ("nuts:states", "nuts:transport", "svi:chain", "svi:diagonal", "svi:moment_matched")
WITHOUT_NUTS = "NUTS needs all data at each step; the plate 'region' takes a part"


# Good models


@pytest.mark.parametrize("name", CASES)
def test_models_of_users_have_no_problem(name):
    case = CASES[name]
    args, kwargs = run_of(case)
    found = check_model(case.model, *args, dims=case.options.get("dims"), **kwargs)
    assert found.problems == ()
    assert found.time == case.time
    axes = {site.name: site.axes for site in found.sites}
    assert {n: axes[n] for n in case.axes} == case.axes
    assert set(found.of_kind("observed")) == set(found.missing)
    assert sum(found.missing.values()) == sum(int(np.isnan(x).sum()) for x in jax.tree.leaves(args))
    assert bool(found.integrated_out) == case.exact == (not found.methods["exact marginal"])
    text = str(found)
    for site in found.sites:
        assert site.name in text
    for method, reason in found.methods.items():
        assert method in text
        assert reason in text


def test_what_there_is_in_a_model():
    def model(y):
        with numpyro.plate("region", 2):
            offset = numpyro.sample("offset", dist.Normal(0.0, 1.0))
        slope = numpyro.param("slope", jnp.ones(3))
        z = numpyro.sample("path", walk(T))
        numpyro.deterministic("twice", 2 * z)
        numpyro.factor("bonus", -slope.sum())
        observe("flow", dist.Normal(z[:, 0] + offset.sum(), 1.0).to_event(1), y)

    found = check_model(model, jnp.asarray(counts(T)))
    kinds = {site.name: site.kind for site in found.sites}
    assert kinds == {
        "region": "plate",
        "offset": "latent",
        "slope": "parameter",
        "path": "latent",
        "twice": "deterministic",
        "bonus": "factor",
        "flow": "observed",
    }
    sites = {site.name: site for site in found.sites}
    assert (sites["path"].distribution, sites["path"].shape) == ("StatePath", (T, 1))
    assert (sites["flow"].distribution, sites["flow"].missing) == ("Normal", 1)
    assert sites["twice"].axes == ("time", "twice_dim_1")
    assert sites["region"].shape == (2,)
    assert found.paths == ("path",)
    assert found.parameters == ("slope",)


@pytest.mark.parametrize(
    ("model", "y", "how"),
    [
        (models.local_level, FULL, "integrated out exactly"),
        (models.pendulum, None, "by a Gaussian filter"),
        (models.kalman_vae, np.ones((4, 2), "float32"), "exactly, given the past"),
    ],
    ids=["exact", "a filter", "history"],
)
def test_how_states_are_integrated_out(model, y, how):
    options = {}
    if model is models.pendulum:
        y, options = np.zeros((5, 1), "float32"), {"states": "ekf"}
    found = check_model(model, jnp.asarray(y), **options)
    assert any(how in text for text in found.integrated_out.values()) or model is models.kalman_vae
    assert found.problems == ()


# Which methods apply


def improper(y):
    level = numpyro.sample("level", dist.ImproperUniform(dist.constraints.real, (), ()))
    observe("flow", dist.Normal(level, 1.0), y)


def discrete(y):
    which = numpyro.sample("which", dist.Bernoulli(0.5))
    observe("flow", dist.Normal(1.0 * which, 1.0), y)


def enumerated(y):
    which = numpyro.sample("which", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    observe("flow", dist.Normal(1.0 * which, 1.0), y)


def fixed(y):
    numpyro.sample("flow", dist.Normal(0.0, 1.0), obs=y)


METHODS = {
    "a linear model": (models.local_level, FULL, {}),
    "a singular linear model": (
        lambda y, states="marginal": models.autoregression(y, order=2, states=states),
        FULL,
        {m: "no sampled form" for m in PATH_METHODS if m != "nuts:states"},
    ),
    "a path": (CASES["counts (time,)"].model, counts(T), {"exact marginal": "no LinearGaussianMarginal"}),
    "no path": (
        CASES["no state"].model,
        FULL,
        {"exact marginal": "no LinearGaussianMarginal"} | dict.fromkeys(PATH_METHODS, "no sampled form"),
    ),
    "a minibatch": (
        CASES["a part of a plate"].model,
        counts(4, T, 1),
        {
            "exact marginal": "no LinearGaussianMarginal",
            "nuts": WITHOUT_NUTS,
            "nuts:states": WITHOUT_NUTS,
            "nuts:transport": WITHOUT_NUTS,
            "svi:mvn": "no part of a plate over the latent site",
        },
    ),
    "a plate in a scan": (
        CASES["a plate in a scan"].model,
        counts(T, S),
        {"exact marginal": "no L", "svi:mvn": "plate 'region'", "svi:normal": "plate 'region'"}
        | dict.fromkeys(PATH_METHODS, ""),
    ),
    "an improper prior": (
        improper,
        FULL,
        {"exact marginal": "no L"} | dict.fromkeys(PATH_METHODS, "no sampled form"),
    ),
    "a discrete site": (
        discrete,
        FULL,
        {"exact marginal": "no L"}
        | dict.fromkeys(("nuts", "svi:mvn", "svi:normal", *PATH_METHODS), "`which` is discrete and not summed over"),
    ),
    "an enumerated site": (
        enumerated,
        FULL,
        {"exact marginal": "no L"}
        | dict.fromkeys(("nuts", "nuts:states", "nuts:transport"), "funsor")
        | dict.fromkeys(("svi:mvn", "svi:normal", "svi:chain", "svi:diagonal", "svi:moment_matched"), "TraceEnum_ELBO"),
    ),
}


@pytest.mark.parametrize("case", METHODS)
def test_which_methods_apply_and_why_others_do_not(case, monkeypatch):
    model, y, reasons = METHODS[case]
    if case == "an enumerated site":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = check_model(model, jnp.asarray(y))
    if "nuts:transport" in reasons:  # the path as a site, like it
        reasons = reasons | dict.fromkeys(APPROXIMATE, reasons["nuts:transport"])
    for method, reason in found.methods.items():
        expected = reasons.get(method, "")
        assert bool(reason) == (method in reasons), (method, reason)
        assert expected in reason
    assert set(found.applicable) == set(found.methods) - set(reasons)


def test_a_study_skips_what_does_not_apply_with_the_same_reason():
    case = CASES["a part of a plate"]
    options = {"svi_steps": 12, "horizon": 0, "leave_future_out": False, "progress": False}
    with pytest.warns(UserWarning, match="SVI has not converged"):
        study = pssm.compare(case.model, case.y, ["nuts", "svi:normal"], **options)
    assert study.results["nuts"].status == "skipped"
    assert study.results["nuts"].note == WITHOUT_NUTS
    assert study.results["svi:normal"].status == "done"


# Bad models


def plain(y, shape=None, name="flow"):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample(name, dist.Normal(jnp.zeros(np.shape(y) if shape is None else shape), scale), obs=y)


def one_plate(y):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("region", 1):
        numpyro.sample("flow", dist.Normal(0.0, scale), obs=y)


def masked(y, mask):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.handlers.mask(mask=mask):
        numpyro.sample("flow", dist.Normal(0.0, scale).expand((T,)), obs=y)


def poisson(y):
    rate = numpyro.sample("rate", dist.Gamma(1.0, 1.0))
    observe("flow", dist.Poisson(rate), y)


def nothing_observed(y):
    numpyro.sample("scale", dist.HalfNormal(1.0))


BAD = {
    "data broadcast": (plain, (FULL[:, None], (T,)), ["`flow`: data of shape (12, 1)", "(12,)", "counts 12 times"]),
    "shapes that do not fit": (plain, (FULL, (T + 1,)), ["shape (12,)", "(13,)", "do not fit"]),
    "NaN in a plain distribution": (plain, (counts(T),), ["`flow` has 1 NaN", "Normal", 'pssm.observe("flow"']),
    "NaN where the mask lets it through": (masked, (counts(T), np.ones(T, bool)), ["`flow` has 1 NaN"]),
    "a plate of size 1": (one_plate, (FULL,), ["the plate 'region' has size 1", "12"]),
    "outside of the support": (poisson, (FULL - 3.0,), ["outside of the support of Poisson"]),
    "nothing observed": (nothing_observed, (FULL,), ["no site is observed"]),
    "nothing latent": (fixed, (FULL,), ["no site is latent"]),
}


@pytest.mark.parametrize("case", BAD)
def test_problems_are_named(case):
    model, args, words = BAD[case]
    found = check_model(model, *jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, args))
    assert len(found.problems) == 1
    for word in words:
        assert word in found.problems[0]
    assert f"Problems:\n  - {found.problems[0]}" in str(found)


def test_nan_behind_a_mask_is_no_problem():
    y = FULL.copy()
    y[~MASK] = np.nan
    found = check_model(masked, jnp.asarray(y), jnp.asarray(MASK))
    assert found.problems == ()
    assert found.missing == {"flow": int((~MASK).sum())}


ODD = {
    "transposed": (models.dynamic_factor, np.random.default_rng(0).normal(size=(3, 12)), "12 series of 3 steps"),
    "improper": (improper, FULL, "`level` has an improper prior"),
    "no time": (lambda y: plain(y.reshape(2, 3, 2)), FULL, "the time axis is not known"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_worth_a_look(case):
    model, y, words = ODD[case]
    found = check_model(model, jnp.asarray(y))
    assert found.problems == ()
    assert any(words in text for text in found.warnings)
    assert words in str(found)


def test_what_the_model_raises_comes_through():
    with pytest.raises(ValueError, match="`y` must be one series"):
        check_model(models.local_level, jnp.ones((2, 3, 1)))
