"""Seasonal patterns: full ones, several at once, and the command line's way of naming them."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from numpyro import handlers

from pssm import kalman_filter, models
from pssm.cli import main
from pssm.models.patterns import Pattern, patterns


@pytest.mark.parametrize(
    ("seasonal", "harmonics", "found"),
    [
        (None, None, []),
        (4, None, [Pattern(4, None)]),
        (12, None, [Pattern(12, (1, 2, 3))]),
        (12, 6, [Pattern(12, (1, 2, 3, 4, 5, 6))]),
        (2, 1, [Pattern(2, (1,))]),
        (6.5, 3, [Pattern(6.5, (1, 2, 3))]),
        ([24], 2, [Pattern(24, (1, 2))]),
        ((168, 24), (8, 2), [Pattern(24, (1, 2), "_24"), Pattern(168, (1, 2, 3, 4, 5, 6, 8), "_168")]),
        ((7, 365.25), (None, 2), [Pattern(7, None, "_7"), Pattern(365.25, (1, 2), "_365.25")]),
        # the third and the sixth wave of 12 months are those of a period of 4
        ((4, 12), (2, 6), [Pattern(4, (1, 2), "_4"), Pattern(12, (1, 2, 4, 5), "_12")]),
    ],
)
def test_which_waves(seasonal, harmonics, found):
    assert patterns(seasonal, harmonics, uneven=False) == found


@pytest.mark.parametrize(
    ("seasonal", "harmonics", "words"),
    [
        (None, 2, "`harmonics` is given without `seasonal`"),
        (1.5, None, "at least 2 time steps; got 1.5"),
        (12, 7, "at most half the period"),
        (12, 0, "`harmonics` must be at least 1"),
        ((24, 24), None, "different periods"),
        ((24, 168), (1, 2, 3), "a value for each of 2 periods; got 3"),
        ((6, 18), (3, 0), "`harmonics` must be at least 1"),
    ],
)
def test_refusals(seasonal, harmonics, words):
    with pytest.raises((ValueError, TypeError), match=words):
        patterns(seasonal, harmonics, uneven=False)


def system(model, values, y, **options):
    """The model's system at some values, and its log-likelihood."""
    seeded = handlers.seed(handlers.substitute(model, values), 0)
    fn = handlers.trace(seeded).get_trace(y, location=0.0, scale=1.0, **options)["y"]["fn"]
    return fn.ssm, fn.log_prob(y)


@pytest.mark.parametrize(
    ("seasonal", "form", "harmonics", "found"),
    [
        (12, "dummy", None, [Pattern(12, None)]),
        (4, "trigonometric", None, [Pattern(4, (1, 2))]),
        (7, "trigonometric", None, [Pattern(7, (1, 2, 3))]),
        (12, "trigonometric", 2, [Pattern(12, (1, 2))]),
        (365.25, "trigonometric", None, [Pattern(365.25, (1, 2, 3))]),
        ((7, 12), ("trigonometric", "dummy"), None, [Pattern(7, (1, 2, 3), "_7"), Pattern(12, None, "_12")]),
    ],
)
def test_forms_of_patterns(seasonal, form, harmonics, found):
    assert patterns(seasonal, harmonics, form, uneven=False) == found


@pytest.mark.parametrize(
    ("seasonal", "form", "harmonics", "uneven", "words"),
    [
        (None, "dummy", None, False, "`pattern` is given without `seasonal`"),
        (12, "wave", None, False, "`pattern` must be"),
        (6.5, "dummy", None, False, "a whole period, not 6.5"),
        (12, "dummy", 3, False, "`harmonics` are of waves"),
        (12, "dummy", None, True, "does not go with `t`"),
        ((7, 12), ("dummy",), None, False, "a value for each of 2 periods; got 1"),
    ],
)
def test_forms_that_are_refused(seasonal, form, harmonics, uneven, words):
    with pytest.raises(ValueError, match=words):
        patterns(seasonal, harmonics, form, uneven=uneven)


@pytest.mark.parametrize("form", ["dummy", "trigonometric"])
def test_both_forms_are_those_of_statsmodels(form, x64):
    import statsmodels.api as sm

    y = np.random.default_rng(1).normal(size=60).cumsum()
    y[20:23] = np.nan
    values = {"sigma_level": 0.2, "sigma_seasonal": 0.1, "sigma_obs": 0.3}
    ssm, found = system(models.seasonal, values, y[:, None], period=12, pattern=form)
    kind = {"seasonal": 12} if form == "dummy" else {"freq_seasonal": [{"period": 12, "harmonics": 6}]}
    truth = sm.tsa.UnobservedComponents(y, "llevel", **kind)
    truth.ssm.loglikelihood_burn = 0
    size = truth.k_states
    truth.ssm.initialize_known(np.zeros(size), np.diag([100.0] + [1.0] * (size - 1)))
    truth.update(np.array([0.3**2, 0.2**2, 0.1**2]))
    assert (ssm.n_state, size) == (12, 12 if form == "dummy" else 13)  # its wave of half the period has a phase, unseen
    np.testing.assert_allclose(found, truth.ssm.loglike(), rtol=1e-9)


def test_a_full_pattern_has_every_shape(x64):
    rng = np.random.default_rng(0)
    shape = rng.normal(size=12)
    y = np.tile(shape - shape.mean(), 20)[:, None]
    values = {"sigma_level": 1e-6, "sigma_seasonal": 1e-6, "sigma_obs": 0.1}
    ssm, _ = system(models.seasonal, values, y, period=12, harmonics=6)
    assert ssm.n_state == 12
    assert np.linalg.matrix_rank(np.stack([ssm.C[0] @ np.linalg.matrix_power(ssm.A, k) for k in range(24)])) == 12
    late = kalman_filter(ssm, y)
    errors = y[120:, 0] - np.asarray(ssm.signal(late.predicted_mean))[120:, 0]
    assert np.abs(errors).max() < 0.02  # five waves miss the alternating one


def test_two_patterns_are_those_of_statsmodels(x64):
    import statsmodels.api as sm

    rng = np.random.default_rng(1)
    t = np.arange(200)
    y = np.sin(2 * np.pi * t / 8) + np.cos(2 * np.pi * t / 30.5) + 0.3 * rng.normal(size=200)
    y[40:45] = np.nan
    values = {"sigma_level": 0.2, "sigma_seasonal_8": 0.1, "sigma_seasonal_30.5": 0.05, "sigma_obs": 0.3}
    ssm, found = system(
        lambda y, **kw: models.structural(y, seasonal=(8, 30.5), harmonics=(4, 2), **kw), values, y[:, None]
    )
    assert ssm.n_state == 1 + 7 + 4
    periods = [{"period": 8, "harmonics": 4}, {"period": 30.5, "harmonics": 2}]
    truth = sm.tsa.UnobservedComponents(y, "llevel", freq_seasonal=periods)
    truth.ssm.loglikelihood_burn = 0
    truth.ssm.initialize_known(np.zeros(13), np.diag([100.0] + [1.0] * 12))
    variances = dict(zip(("sigma2.irregular", "sigma2.level"), (0.3**2, 0.2**2), strict=True))
    order = [variances.get(name, 0.1**2 if "8(4)" in name else 0.05**2) for name in truth.param_names]
    truth.update(np.array(order))
    np.testing.assert_allclose(found, truth.ssm.loglike(), rtol=1e-9)


def test_two_patterns_in_32_bits():
    rng = np.random.default_rng(1)
    y = (np.sin(np.arange(60) / 2) + 0.3 * rng.normal(size=60))[:, None]
    values = {"sigma_level": 0.2, "sigma_seasonal_4": 0.1, "sigma_seasonal_9": 0.05, "sigma_obs": 0.3}

    def model(y, **kw):
        return models.structural(y, seasonal=(4, 9), harmonics=(2, 1), **kw)

    found = system(model, values, y)[1]
    with jax.enable_x64(True):
        exact = system(model, values, y)[1]
    np.testing.assert_allclose(found, exact, rtol=1e-5)


def test_states_are_named():
    trace = handlers.trace(
        handlers.seed(lambda: models.structural(num_steps=30, trend=True, seasonal=(4, 9), harmonics=(2, 1)), 0)
    ).get_trace()
    assert trace["y"]["infer"]["state_names"] == (
        "level",
        "slope",
        "seasonal_4_1",
        "seasonal_4_phase_1",
        "seasonal_4_2",
        "seasonal_9_1",
        "seasonal_9_phase_1",
    )
    assert {"sigma_seasonal_4", "sigma_seasonal_9"} <= set(trace)


def test_uneven_times_take_no_alternating_wave():
    y, t = jnp.arange(6.0) ** 2, jnp.array([0.0, 0.5, 1.7, 3.0, 4.0, 6.0])
    with pytest.raises(ValueError, match="below half the period"):
        handlers.seed(models.seasonal, 0)(y, t=t, period=4, harmonics=2)
    handlers.seed(models.seasonal, jax.random.key(0))(y, t=t, period=(4, 2.5), harmonics=1)


def test_from_the_command_line(tmp_path):
    hours = np.arange(24 * 7 * 3)
    rng = np.random.default_rng(2)
    y = 10 + np.sin(2 * np.pi * hours / 24) + np.cos(2 * np.pi * hours / 168) + 0.1 * rng.normal(size=len(hours))
    time = pd.date_range("2024-01-01", periods=len(hours), freq="h")
    pd.DataFrame({"time": time, "mw": y}).to_csv(tmp_path / "load.csv", index=False)
    out = tmp_path / "out"
    call = ["fit", str(tmp_path / "load.csv"), "--model", "structural", "--period", "24,168", "--harmonics", "1"]
    assert main([*call, "--starts", "1", "--out", str(out), "--quiet"]) == 0
    found = pd.read_csv(out / "parameters.csv").parameter.to_list()
    assert {"sigma_seasonal_24", "sigma_seasonal_168"} <= set(found)
    forecast = pd.read_csv(out / "forecast.csv")
    assert len(forecast) == 48
    ahead = len(hours) + np.arange(48)
    truth = 10 + np.sin(2 * np.pi * ahead / 24) + np.cos(2 * np.pi * ahead / 168)
    assert np.abs(forecast["mean"] - truth).max() < 0.3
