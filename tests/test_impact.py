"""Effects of interventions: CausalImpact's example, a dense Gaussian, any units and zero, placebos, refusals."""

from functools import partial

import jax
import numpy as np
import pandas as pd
import pytest

from pssm import models
from pssm.diagnostics import impact
from pssm.diagnostics.impact import _paths, controlled_level

AFTER = np.arange(100) >= 70
quick = partial(impact, method="ml", options={"num_starts": 2})


def vignette(seed):
    """`y = 1.2 x + N(0, 1)`, x an autoregression around 100, plus 10 in the last 30 of 100 steps."""
    rng = np.random.default_rng(seed)
    x = np.zeros(100)
    for t in range(1, 100):
        x[t] = 0.999 * x[t - 1] + rng.normal()
    return 1.2 * (x + 100) + rng.normal(size=100) + 10 * AFTER, x + 100


def test_the_example_of_causal_impact():
    y, x = vignette(1)
    found = impact(y, x, 70, options={"num_warmup": 300, "num_samples": 500})
    average = found.effects.loc["average"]
    assert average.effect_low < 10 < average.effect_high
    assert average.effect_high - average.effect_low < 3
    assert average.p < 0.01
    assert found.effects.effect["cumulative"] == pytest.approx(30 * average.effect)
    fake = found.placebo.loc["average"]
    assert fake.effect_low < 0 < fake.effect_high
    beta = found.coefficients.loc["control 0"]
    assert abs(beta["mean"] - 1.2) < 3 * beta["sd"]
    after = found.table[found.table.period == "post"]
    assert ((after.effect_low < 10) & (10 < after.effect_high)).mean() > 0.8
    assert after.cumulative.iloc[-1] == pytest.approx(found.effects.effect["cumulative"])
    text = found.summary()
    assert "From 70 on, over 30 steps" in text
    assert "no effect, as it should be" in text
    assert len(found.plot(title="vignette").axes) == 3


def test_paths_against_a_dense_gaussian():
    y, x = vignette(2)
    y[[5, 20]] = np.nan
    known = np.flatnonzero(~np.isnan(y) & ~AFTER)
    z, u = (y - np.nanmean(y)) / np.nanstd(y), ((x - x.mean()) / x.std())[:, None]
    z[AFTER] = np.nan
    p = {"sigma_level": 0.04, "sigma_obs": 0.3, "beta": np.array([0.9])}
    draws = {n: np.broadcast_to(v, (8000, *np.shape(v))) for n, v in p.items()}
    keys = jax.random.split(jax.random.key(0), 8000)
    found = jax.jit(lambda *row: _paths(controlled_level, *row))(draws, z, {"u": u}, keys)
    paths, mean, variance = (np.asarray(part, float) for part in found)
    t = np.arange(100)
    cov = 1 + 0.04**2 * np.minimum(t[:, None], t) + 0.3**2 * np.eye(100)
    prior, ahead = 0.9 * u[:, 0], np.flatnonzero(AFTER)
    gain = cov[np.ix_(ahead, known)] @ np.linalg.inv(cov[np.ix_(known, known)])
    expected = prior[ahead] + gain @ (z[known] - prior[known])
    rest = cov[np.ix_(ahead, ahead)] - gain @ cov[np.ix_(known, ahead)]
    sd = np.sqrt(np.diag(rest))
    np.testing.assert_allclose(paths[:, 70:].mean(0), expected, atol=5 * sd.max() / 8000**0.5)
    np.testing.assert_allclose(np.cov(paths[:, 70:].T), rest, atol=6 * sd.max() ** 2 / 8000**0.5)
    np.testing.assert_allclose(mean[0, 70:], expected, rtol=1e-3)
    np.testing.assert_allclose(variance[0, 70:], sd**2, rtol=1e-3)


def test_missing_steps_and_the_table():
    y, x = vignette(2)
    y[[5, 20, 75]] = np.nan
    found = quick(y, x, 70, placebo=False)
    after = found.table[found.table.period == "post"]
    assert np.isnan(after.effect[75])
    assert found.effects.effect["average"] == pytest.approx(after.effect.mean(), rel=1e-6)
    assert found.effects.effect["cumulative"] == pytest.approx(after.effect.sum(), rel=1e-6)
    np.testing.assert_allclose(after.effect + after.predicted, after.observed)


@pytest.mark.parametrize(("factor", "offset", "shift"), [(1e-6, 0.0, 1e4), (1e9, -3e5, 1e9)])
def test_units_and_the_place_of_zero(factor, offset, shift):
    y, x = vignette(3)
    one, other = quick(y, x, 70), quick(factor * y + offset, x + shift, 70)
    for part in ("effects", "placebo"):
        a, b = getattr(one, part), getattr(other, part)
        for name in ("effect", "effect_low", "effect_high"):
            np.testing.assert_allclose(b[name] / factor, a[name], rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(other.coefficients["mean"] / factor, one.coefficients["mean"], rtol=1e-4)


def test_dates_names_and_several_controls():
    rng = np.random.default_rng(4)
    days = pd.date_range("2024-03-01", periods=100, freq="D")
    x = pd.DataFrame(rng.normal(size=(100, 2)) + [280.0, 2024.0], index=days, columns=["kelvin", "year"])
    y = pd.Series(3 * x.kelvin - 2 * x.year + 0.2 * rng.normal(size=100) + 1.0 * AFTER, index=days)
    found = quick(y, x, "2024-05-10")
    assert found.start == np.datetime64("2024-05-10")
    assert list(found.coefficients.index) == ["kelvin", "year"]
    np.testing.assert_allclose(found.coefficients["mean"], [3, -2], atol=0.15)
    assert found.effects.effect["average"] == pytest.approx(1.0, abs=0.3)
    assert "From 2024-05-10 on" in found.summary()


@pytest.mark.parametrize(
    ("index", "start", "first"),
    [
        (pd.period_range("2016-01", periods=100, freq="M"), "2021-11", "2021-11-01"),
        (pd.date_range("2024-03-30", periods=100, freq="h", tz="Europe/Berlin"), "2024-04-01 21:00", "2024-04-01T21"),
        ([d.date() for d in pd.date_range("2020-01-01", periods=100)], "2020-03-11", "2020-03-11"),
        (np.arange(1900, 2000), 1970, 1970),
    ],
)
def test_kinds_of_labels(index, start, first):
    y, x = vignette(8)
    found = quick(y, x, start, time=index, placebo=False, num_draws=50)
    assert found.start == (np.datetime64(first) if isinstance(first, str) else first)
    assert found.table.period.eq("post").sum() == 30


def test_no_controls_and_another_model():
    rng = np.random.default_rng(5)
    season = np.tile([0.0, 2.0, 1.0, 0.0, -1.0, -4.0, 2.0], 15)[:100]
    y = 50 + season + 0.3 * rng.normal(size=100) - 2.0 * AFTER
    plain = quick(y, None, 70)
    seasonal = quick(y, None, 70, model=partial(models.seasonal, period=7))
    width = [f.table.query("period == 'post'").eval("effect_high - effect_low").iloc[0] for f in (plain, seasonal)]
    assert width[1] < 0.5 * width[0]
    e = seasonal.effects.loc["average"]
    assert e.effect_low < -2 < e.effect_high
    assert seasonal.coefficients is None
    assert "Controls would make it safer" in plain.summary()


def test_a_placebo_finds_a_control_that_left():
    """A jump before the start that no control explains."""
    y, x = vignette(6)
    y += 8.0 * ((np.arange(100) >= 45) & ~AFTER)
    fake = quick(y, x, 70).placebo.loc["average"]
    assert not fake.effect_low <= 0 <= fake.effect_high
    assert "Do not trust the model" in quick(y, x, 70).summary()


def test_no_effect_is_no_effect():
    y, x = vignette(7)
    found = quick(y - 10 * AFTER, x, 70)
    e = found.effects.loc["average"]
    assert e.effect_low < 0 < e.effect_high
    assert "chance can explain it" in found.summary()
    short = quick(y, x, 40)
    assert short.placebo is None
    assert "No placebo check" in short.summary()


Y, X = vignette(0)
DATED = pd.Series(Y, pd.date_range("2020", periods=100))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quick(Y, X), "`start` is required"),
        (lambda: quick(Y, X, 100), "`start` must have data from it on"),
        (lambda: quick(Y, X, 3), "`start` must have at least 5 observations before it"),
        (lambda: quick(Y, X[:90], 70), r"`controls` must have shape \(100, control\)"),
        (lambda: quick(Y, np.where(AFTER, np.nan, X), 70), "`controls` must be finite"),
        (lambda: quick(np.stack([Y, Y], 1), X, 70), "`y` must be one series"),
        (lambda: quick(Y, X, 70, level=1.5), "`level`"),
        (lambda: quick(Y, X, 70, time=np.arange(3)), "`time` must have 100 labels"),
        (lambda: quick(Y, X, "x"), "`start` must be comparable"),
        (lambda: quick(Y, X, 70, time=np.arange(100)[::-1]), "`time` must increase"),
        (lambda: quick(pd.Series(Y, pd.date_range("2020", periods=100)), X, "soon"), "`start` must be a date"),
        (
            lambda: quick(DATED, pd.DataFrame({"x": X}, DATED.index + pd.Timedelta(days=1)), "2020-03-11"),
            "`controls` and",
        ),
        (lambda: impact(Y, X, 70, method="guess"), "`methods` must be one of"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
