"""Forecasts and trees of models with moving coefficients and interventions: future inputs, names, files."""

from functools import partial

import jax
import numpy as np
import pandas as pd
import pytest
from numpyro import handlers

from pssm import compare, infer, models
from pssm.cli import main
from pssm.diagnostics import to_datatree

STEPS, AHEAD = 24, 4
RNG = np.random.default_rng(0)
TIME = pd.date_range("2020-01-31", periods=STEPS + AHEAD, freq="ME")
U = pd.DataFrame(RNG.normal(size=(STEPS + AHEAD, 2)), index=TIME, columns=["price", "heat"])
Y = pd.Series(np.cumsum(RNG.normal(size=STEPS)) + 2 * U.price.to_numpy()[:STEPS], index=TIME[:STEPS], name="sales")
Y.iloc[5] = np.nan
TABLE = {"law": ("step", 12), "bend": ("slope", 20), "tax": ("step", STEPS + 1)}
VALUES = {"sigma_level": 0.5, "sigma_obs": 0.7, "sigma_beta": np.array([0.3]), "beta": np.array([1.5])}
VALUES |= {"effect": np.array([2.0, -0.5, 7.0]), "mean": 0.3}
CASES = {
    "partly moving": {"moving": "heat"},
    "moving": {"moving": True},
    "fixed": {},
    "interventions": {"interventions": TABLE},
    "all": {"moving": "heat", "interventions": TABLE, "trend": True, "damped": True, "seasonal": 4, "pattern": "dummy"},
    "constant": {"moving": "price", "interventions": TABLE, "level": False},
}


def draws_of(model, y, **options):
    """One draw of the parameters as draws: the values above, as far as the model has them."""
    trace = handlers.trace(handlers.seed(model, 0)).get_trace(y, **options)
    sites = {n: s["value"] for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    return {n: np.broadcast_to(VALUES.get(n, x), np.shape(x)).astype(float)[None, None] for n, x in sites.items()}


@pytest.mark.parametrize(("name", "frames"), [*((name, True) for name in CASES), ("all", False)])
def test_a_forecast_is_the_filter_over_missing_rows(name, frames, x64):
    """The posterior of the rows behind the data, from a model of the whole length whose last rows are missing."""
    u = U if frames else U.to_numpy()
    given = CASES[name] if frames else {**CASES[name], "moving": 1}
    model = partial(models.structural, **given)
    known, future = u[:STEPS], u[STEPS:]
    draws = draws_of(partial(model, u=known), Y)
    found = infer.forecast(partial(model, u=known), draws, AHEAD, Y, u_future=future)
    longer = np.append(Y.to_numpy(), np.full(AHEAD, np.nan))
    substituted = handlers.substitute(partial(model, u=u), {n: x[0, 0] for n, x in draws.items()})
    fn = handlers.trace(handlers.seed(substituted, 0)).get_trace(longer)["y"]["fn"]
    smoothed = fn.smooth(longer[:, None])
    signal = fn.ssm.signal(smoothed.mean, fn.u)
    C = np.broadcast_to(fn.ssm.with_time_axis("C"), (STEPS + AHEAD, 1, fn.ssm.n_state))
    variance = np.einsum("toi,tij,toj->to", C, smoothed.cov, C) + 0.7**2
    np.testing.assert_allclose(found.mean, signal[STEPS:], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found.sd, np.sqrt(variance[STEPS:]), rtol=1e-8)


def test_an_intervention_of_the_future_enters_there(x64):
    model = partial(models.structural, interventions=TABLE)
    found = infer.forecast(model, draws_of(model, Y), AHEAD, Y)
    without = {n: TABLE[n] for n in ("law", "bend")}
    other = partial(models.structural, interventions=without)
    draws = draws_of(model, Y)
    expected = infer.forecast(other, {**draws, "effect": draws["effect"][..., :2]}, AHEAD, Y)
    np.testing.assert_allclose(found.mean[:, 0] - expected.mean[:, 0], [0.0, 7.0, 7.0, 7.0], atol=1e-9)


def test_columns_of_the_future_are_found_by_name(x64):
    model = partial(models.structural, u=U[:STEPS], moving=True)
    draws = draws_of(model, Y)
    straight, turned = (
        infer.forecast(model, draws, AHEAD, Y, u_future=U[STEPS:][list(names)])
        for names in (("price", "heat"), ("heat", "price"))
    )
    np.testing.assert_array_equal(turned.mean, straight.mean)


def test_wrong_inputs_of_the_future_are_named(x64):
    model = partial(models.structural, u=U[:STEPS], moving=True)
    draws = draws_of(model, Y)
    with pytest.raises(ValueError, match="u_future"):
        infer.forecast(model, draws, AHEAD, Y)
    with pytest.raises(ValueError, match="`u_future` must have the columns"):
        infer.forecast(model, draws, AHEAD, Y, u_future=U[STEPS:][["heat"]])
    with pytest.raises(ValueError, match="`u_future` must have a row for each of"):
        infer.forecast(model, draws, AHEAD, Y, u_future=U[STEPS + 1 :])


@pytest.mark.filterwarnings("ignore:SVI has not converged", "ignore:not converged to one maximum")
def test_names_reach_the_tree_and_come_back_from_files(tmp_path):
    model = partial(models.structural, interventions=TABLE)
    fit = infer.fit_svi(model, Y, u=U[:STEPS], guide="normal", num_steps=20, progress_bar=False)
    infer.save(fit, tmp_path / "fit")
    for each in (fit, infer.load(tmp_path / "fit")):
        posterior = to_datatree(each)["posterior"]
        assert posterior["beta"].dims[2:] == ("input",)
        assert posterior["input"].values.tolist() == ["price", "heat"]
        assert posterior["intervention"].values.tolist() == ["law", "bend", "tax"]
    moving = partial(models.structural, u=U[:STEPS], moving="heat")
    fit = infer.fit_map(moving, Y, num_starts=1, progress_bar=False)
    tree = to_datatree(fit, states=True, forecast=AHEAD, u_future=U[STEPS:])
    assert tree["posterior"]["moving_input"].values.tolist() == ["heat"]
    assert tree["posterior"]["input"].values.tolist() == ["price"]
    assert tree["smoothed_states"]["state"].values.tolist() == ["level", "beta_heat"]
    assert (tree["forecast"]["horizon"].values == TIME[STEPS:].to_numpy()).all()


def test_gradients_and_batches_of_models(x64):
    """`vmap` over parameters, and a finite gradient at a variance of zero."""

    def log_likelihood(sigma):
        model = handlers.substitute(partial(models.structural, u=U[:STEPS], moving=True), {"sigma_beta": sigma})
        trace = handlers.trace(handlers.seed(handlers.substitute(model, {"sigma_level": 0.5, "sigma_obs": 0.7}), 0))
        site = trace.get_trace(Y)["y"]
        return site["fn"].log_prob(site["value"])

    sigmas = np.array([[0.1, 0.2], [0.0, 0.3], [0.0, 0.0]])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(log_likelihood)))(sigmas)
    assert np.isfinite(slopes).all()
    np.testing.assert_allclose(values[1], log_likelihood(sigmas[1]), rtol=1e-10)
    step = 1e-6
    change = (log_likelihood(sigmas[0] + [step, 0]) - log_likelihood(sigmas[0] - [step, 0])) / (2 * step)
    np.testing.assert_allclose(slopes[0, 0], change, rtol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_compare_keeps_the_names():
    options = {"u": U, "moving": "heat", "interventions": {"law": ("step", 12)}, "horizon": AHEAD}
    study = compare("structural", Y, ["svi:mvn"], svi_steps=20, leave_future_out=False, progress=False, **options)
    tree = study.results["svi:mvn"].tree
    assert tree["posterior"]["input"].values.tolist() == ["price"]
    assert tree["posterior"]["intervention"].values.tolist() == ["law"]
    assert tree["smoothed_states"]["state"].values.tolist() == ["level", "beta_heat"]
    assert tree["forecast"].sizes["horizon"] == AHEAD


def test_from_the_command_line(tmp_path, capsys):
    """A step of known size in a file with dates, a regressor that goes on, and what does not go together."""
    rng = np.random.default_rng(1)
    sales = 10 + 4.0 * (TIME[:STEPS] >= "2021-01-31") + 2 * U.price[:STEPS] + 0.05 * rng.normal(size=STEPS)
    frame = pd.DataFrame({"month": TIME, "sales": sales.reindex(TIME).to_numpy(), "price": U.price.to_numpy()})
    frame.to_csv(tmp_path / "sales.csv", index=False)
    call = ["fit", str(tmp_path / "sales.csv"), "--column", "sales", "--inputs", "price", "--quiet", "--starts", "1"]
    structural = [*call, "--model", "structural", "--period", "4", "--pattern", "dummy", "--damped"]
    out = tmp_path / "out"
    assert main([*structural, "--moving", "price", "--intervention", "law=step,2021-01-31", "--out", str(out)]) == 0
    found = pd.read_csv(out / "parameters.csv").set_index("parameter").estimate
    assert abs(found["effect[0]"] - 4) < 0.2
    assert {"sigma_beta[0]", "trend_damping"} <= set(found.index)
    forecast = pd.read_csv(out / "forecast.csv")["mean"]
    assert np.abs(forecast - (14 + 2 * U.price[STEPS:].to_numpy())).max() < 0.5
    refused = {
        ("--model", "local_level", "--damped"): "`--damped` does not go with `--model local_level`",
        ("--model", "structural", "--moving", "heat"): "`moving` must name columns",
        ("--model", "structural", "--intervention", "law"): "NAME=KIND,TIME",
        ("--model", "structural", "--intervention", "law=step,1999-01-31"): "lies outside of `time`",
    }
    for options, words in refused.items():
        assert main([*call, *options, "--out", str(tmp_path / "other")]) == 2
        assert words in capsys.readouterr().err
