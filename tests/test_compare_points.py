"""Maximum likelihood and posterior modes beside other methods of a study; inputs of the forecast from frames."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest

import pssm
from pssm import infer, models
from pssm.distributions import StatePath, observe
from pssm.study.forecasts import forecast_saved, resume_study
from pssm.study.methods import KNOWN, MethodResult
from pssm.study.verdict import judge, parameter_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*transitions diverged", "ignore:SVI has not converged")
MONTHS = pd.date_range("2018-01-01", periods=40, freq="MS")
RNG = np.random.default_rng(0)
U = pd.DataFrame({"price": RNG.normal(size=40), "rain": RNG.normal(size=40)}, index=MONTHS)
Y = pd.Series(10 + np.cumsum(0.5 * RNG.normal(size=36)) + U.price.to_numpy()[:36], index=MONTHS[:36], name="sales")
OPTIONS = {"horizon": 3, "progress": False, "leave_future_out": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study") / "out"


@pytest.fixture(scope="module")
def study(folder):
    chains = {"num_warmup": 150, "num_samples": 150, "num_chains": 1}
    ahead = U.iloc[36:][["rain", "price"]].iloc[::-1]
    return pssm.compare(
        "local_level", Y, ["nuts", "ml", "map"], u=U.iloc[:36], u_future=ahead, out=folder, **chains, **OPTIONS
    )


def test_points_stand_beside_the_reference(study):
    table = study.table.set_index("method")
    assert (table.status == "done").all()
    assert table.objective["ml"] == "log-likelihood at its maximum: one point, no posterior"
    assert table.log_likelihood["ml"] >= table.log_likelihood["map"]
    assert np.isnan(table.log_likelihood["nuts"])
    assert table.loc[["ml", "map"], ["elbo", "khat", "ess_min", "rhat_max"]].isna().all(axis=None)
    assert (table.loc[["ml", "map"], "level"] == "check").all()
    assert table.verdict["ml"].startswith("Check its intervals: one point (maximum likelihood")
    assert KNOWN in study.results["map"].note
    assert study.best in ("nuts", "")
    assert study.reference == "nuts"


def test_numbers_are_those_of_the_fit(study):
    fit = infer.fit_ml(models.local_level, Y, u=U.iloc[:36], progress_bar=False)
    table = study.table.set_index("method")
    np.testing.assert_allclose(
        table.loc["ml", ["log_likelihood", "aic", "bic"]].astype(float),
        [fit.log_likelihood, fit.aic, fit.bic],
        rtol=1e-6,
    )
    own = study.parameters[study.parameters.method == "ml"].set_index("parameter")
    assert own.loc["sigma_obs", "mean"] == pytest.approx(float(fit.params["sigma_obs"]), rel=1e-4)
    assert own.loc["sigma_obs", "sd"] == pytest.approx(float(fit.errors["sigma_obs"]), rel=1e-3)
    np.testing.assert_allclose(own.loc[["beta[0]", "beta[1]"], "sd"], fit.errors["beta"], rtol=1e-3)
    assert own[["ess_bulk", "r_hat"]].isna().all(axis=None)
    found = infer.forecast(fit, 3, u_future=U.iloc[36:])
    np.testing.assert_allclose(study.results["ml"].tree["forecast"]["mean"], found.mean, rtol=1e-4)


def test_inputs_of_the_forecast_by_label_and_name(study):
    """The frame had its rows and its columns in another order."""
    plain = pssm.compare("local_level", Y, ["ml"], u=U.iloc[:36], u_future=U.to_numpy()[36:], **OPTIONS)
    for tree in (study.results["ml"].tree, plain.results["ml"].tree):
        assert tree["forecast"]["horizon"].values[0] == np.datetime64("2021-01-01")
    np.testing.assert_allclose(
        study.results["ml"].tree["forecast"]["mean"], plain.results["ml"].tree["forecast"]["mean"], rtol=1e-6
    )
    for frame, words in (
        (U.iloc[37:], "`u_future` must have a row for each of 3 steps.*2021-01-01 is not"),
        (U.iloc[36:].rename(columns={"rain": "hail"}), r"`u_future` must have the columns \['price', 'rain'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            pssm.compare("local_level", Y, ["ml"], u=U.iloc[:36], u_future=frame, **OPTIONS)


def test_saved_studies_with_points(study, folder):
    report = study.report(folder).read_text()
    assert "maximum likelihood" in report
    assert "could not be drawn" not in report
    table, _, method = forecast_saved(folder, 3, method="map")
    assert method == "map"
    np.testing.assert_allclose(table["mean"], study.results["map"].tree["forecast"]["mean"].values.ravel(), rtol=1e-4)
    with pytest.raises(ValueError, match="nothing is left to do"):
        resume_study(folder, progress=False)


def test_a_model_without_a_maximum_is_skipped_with_the_reason():
    def path(y):
        z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), jnp.eye(1), jnp.eye(1), len(y)))
        observe("y", dist.Normal(z, 1.0).to_event(2), y)

    study = pssm.compare(path, np.zeros((8, 1)), ["ml"], **OPTIONS)
    assert study.results["ml"].status == "skipped"
    assert "nothing to estimate" in study.results["ml"].note


def test_a_maximum_that_was_not_reached_is_not_to_be_used():
    result = MethodResult("ml", seconds_run=1.0, diagnostics={"converged": 0.0})
    table = judge({"ml": result}, "", parameter_rows({}, ""), (float("nan"), ""))
    assert table.level[0] == "bad"
    assert table.verdict[0].startswith("Do not use: maximum likelihood was not reached")
