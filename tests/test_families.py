"""`sarimax`, `ets` and `var` at work: options of the command line, forecasts, units, plain 32-bit arithmetic."""

import argparse
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from numpyro.infer import Predictive
from numpyro.infer.util import initialize_model

from pssm import infer, models
from pssm.cli import main
from pssm.study.model_arguments import add_model, model_options

RNG = np.random.default_rng(0)
Y = 5 + np.cumsum(RNG.normal(size=(30, 2)), axis=0)
Y[[0, 7, 8]] = np.nan
Y[12, 1] = np.nan
U = np.column_stack([np.cos(np.arange(30)), np.arange(30)])
# A model, and how many values its diffuse start takes.
DIFFUSE = {
    "sarimax": (partial(models.sarimax, order=(1, 1, 1), seasonal_order=(0, 1, 0, 4)), Y[:, :1], 5),
    "ets": (partial(models.ets, trend="add", seasonal="add", period=4), Y[:, :1], 5),
    "var": (partial(models.var, order=2, trend="ct"), Y, 4),
}


def options_of(*words, period=None):
    parser = argparse.ArgumentParser()
    add_model(parser)
    return model_options(parser.parse_args(words), SimpleNamespace(period=period))


@pytest.mark.parametrize(
    ("words", "period", "found"),
    [
        ("--model sarimax --order 1,1,1", 12, {"order": (1, 1, 1)}),
        (
            "--model sarimax --order 0,1,1 --seasonal-order 0,1,1,4",
            12,
            {"order": (0, 1, 1), "seasonal_order": (0, 1, 1, 4)},
        ),
        ("--model sarimax --seasonal-order 0,1,1", 12, {"seasonal_order": (0, 1, 1, 12)}),
        (
            "--model sarimax --seasonal-order 0,1,1 --period 7 --trend c",
            12,
            {"seasonal_order": (0, 1, 1, 7), "trend": "c"},
        ),
        ("--model ets", None, {"trend": "add"}),
        ("--model ets --damped", 12, {"trend": "add", "damped": True, "seasonal": "add", "period": 12}),
        ("--model ets --trend none", 52.18, {}),
        ("--model var --order 2 --ma-order 1 --trend ct", 12, {"order": 2, "ma_order": 1, "trend": "ct"}),
        ("--model structural --order 2", None, {"trend": True, "ar": 2}),
    ],
)
def test_options_of_the_command_line(words, period, found):
    assert options_of(*words.split(), period=period) == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model sarimax --period 12", "`--period` of `--model sarimax` needs `--seasonal-order P,D,Q`"),
        ("--model sarimax --seasonal-order 0,1,1", "needs `--period`, or the season as a fourth number"),
        ("--model sarimax --seasonal-order 0,1,1 --period 5.5", "must be a whole number of time steps"),
        ("--model ets --period 5.5", "must be a whole number of time steps"),
        ("--model ets --seasonal-order 0,1,1,4", "`--seasonal-order` does not go with `--model ets`"),
        ("--model local_level --damped", "`--damped` does not go with `--model local_level`"),
    ],
)
def test_refusals_of_the_command_line(words, message):
    with pytest.raises(ValueError, match=message):
        options_of(*words.split())


def test_orders_that_do_not_fit_are_named(tmp_path, capsys):
    call = ["fit", "nile", "--out", str(tmp_path / "out"), "--quiet", "--model"]
    assert main([*call, "sarimax", "--order", "2"]) == 2
    assert "`order` must be three whole numbers (p, d, q); got 2" in capsys.readouterr().err
    assert main([*call, "autoregression", "--order", "1,1,1"]) == 2
    assert "`order` must be a whole number" in capsys.readouterr().err


def test_a_report_from_the_command_line(tmp_path):
    time = pd.date_range("2020-01-01", periods=30, freq="MS")
    pd.DataFrame({"month": time, "sales": Y[:, 0]}).to_csv(tmp_path / "sales.csv", index=False)
    out = tmp_path / "out"
    call = ["fit", str(tmp_path / "sales.csv"), "--model", "sarimax", "--order", "0,1,1", "--starts", "1", "--quiet"]
    assert main([*call, "--horizon", "3", "--out", str(out)]) == 0
    assert {"theta[0]", "sigma"} <= set(pd.read_csv(out / "parameters.csv").parameter)
    assert len(pd.read_csv(out / "forecast.csv")) == 3


def potential(model, y, z=None, **options):
    """Minus the log joint density at a point of NumPyro's unconstrained space, and the point."""
    info = initialize_model(jax.random.key(0), model, model_args=(y,), model_kwargs=options)
    if z is None:
        rng = np.random.default_rng(1)
        z = {n: jnp.asarray(0.5 * rng.normal(size=np.shape(x)), x.dtype) for n, x in sorted(info.param_info.z.items())}
    return float(jax.jit(info.potential_fn)(z)), z


@pytest.mark.parametrize("name", DIFFUSE)
def test_diffuse_starts_know_no_units(name):
    """In float32, from 64-bit data: equal up to the units of the values that do not fix the start."""
    model, y, flat = DIFFUSE[name]
    before, z = potential(model, y, u=U)
    counted = np.isfinite(y).sum() - flat
    for unit in (1e-9, 1e13):
        after = potential(model, unit * y, z, u=U)[0] - counted * np.log(unit)
        assert after == pytest.approx(before, rel=5e-5)
    assert potential(model, y + 1e7, z, u=U)[0] == pytest.approx(before, rel=5e-5)
    assert potential(model, y, z, u=1e5 * U - 3e7)[0] == pytest.approx(before, rel=5e-5)


@pytest.mark.parametrize("name", DIFFUSE)
def test_in_32_bits_values_are_those_of_64(name):
    model, y, _ = DIFFUSE[name]
    found, z = potential(model, y)
    with jax.enable_x64(True):
        exact = potential(model, y, {n: jnp.asarray(np.asarray(x), jnp.float64) for n, x in z.items()})[0]
    assert found == pytest.approx(exact, rel=2e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:not converged to one maximum")  # thirty values and one start
@pytest.mark.parametrize("name", DIFFUSE)
def test_a_fit_forecasts_and_generates(name):
    model, y, _ = DIFFUSE[name]
    fit = infer.fit_map(model, y, num_starts=1, progress_bar=False)
    ahead = infer.forecast(fit, 6)
    assert ahead.mean.shape[-2:] == (6, y.shape[1])
    assert np.isfinite(np.asarray(ahead.mean)).all()
    size = {"num_obs": 2} if name == "var" else {}
    drawn = Predictive(model, num_samples=3)(jax.random.key(0), num_steps=12, **size)["y"]
    assert drawn.shape == (3, 12, y.shape[1])
    assert np.isfinite(drawn).all()
