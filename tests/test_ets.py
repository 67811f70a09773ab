"""`ets`: statsmodels and a definition step by step; gaps, both precisions, both ways to deal with the states."""

from functools import partial

import jax
import jax.numpy as jnp
import linear_paths
import numpy as np
import pytest
import statsmodels.api as sm
from linear_paths import numbers, trace
from statsmodels.tsa.exponential_smoothing.ets import ETSModel

from pssm import infer, models

STEPS = 48
RNG = np.random.default_rng(0)
WHOLE = 20 + np.cumsum(RNG.normal(size=STEPS)) + np.tile([1.0, 2.0, -3.0, 0.5], STEPS // 4)
GAPS = WHOLE.copy()
GAPS[[0, 2, 9, 10, 40]] = np.nan
KINDS = {
    "ANN": {},
    "AAN": {"trend": "add"},
    "AAdN": {"trend": "add", "damped": True},
    "ANA": {"seasonal": "add", "period": 4},
    "AAA": {"trend": "add", "seasonal": "add", "period": 4},
    "AAdA": {"trend": "add", "damped": True, "seasonal": "add", "period": 4},
    "ANA of two": {"seasonal": "add", "period": 2},
}


def peer(kind, y):
    """statsmodels' model."""
    o = KINDS[kind]
    return ETSModel(
        y,
        error="add",
        trend=o.get("trend"),
        damped_trend=o.get("damped", False),
        seasonal=o.get("seasonal"),
        seasonal_periods=o.get("period"),
    )


def parameters(v):
    """statsmodels' parameters from our sites."""
    names = ("smoothing_level", "smoothing_trend", "smoothing_seasonal", "damping_trend", "level_start", "slope_start")
    found = [float(v[n]) for n in names if n in v]
    if "seasonal_start" in v:
        found += [-v["seasonal_start"].sum(), *v["seasonal_start"][::-1]]
    return np.array(found)


def latent(found):
    return {n: np.asarray(s["value"], float) for n, s in found.items() if s["type"] == "sample" and n != "y"}


@pytest.mark.parametrize(("kind", "precise"), [*((kind, True) for kind in KINDS), ("AAdA", False)])
def test_the_likelihood_is_that_of_statsmodels(kind, precise):
    with jax.enable_x64(precise):
        model = partial(models.ets, initial="sampled", **KINDS[kind])
        found = trace(model, WHOLE)
        smooth = peer(kind, WHOLE).smooth(parameters(numbers(found)))
        # its likelihood has the best variance of the errors in it
        sigma = np.sqrt(np.mean(np.asarray(smooth.resid) ** 2))
        found = trace(model, WHOLE, latent(found) | {"sigma": sigma})
        mine = linear_paths.log_likelihood(found, WHOLE[:, None])
        assert mine == pytest.approx(smooth.llf, abs=1e-6 if precise else 5e-3)


def definition(v, m, steps):
    """Hyndman's recursions as they are written; the start is `(level, slope, effects of the first m steps)`."""
    alpha, beta, gamma = (float(v.get(f"smoothing_{n}", 0.0)) for n in ("level", "trend", "seasonal"))
    slope, phi = "smoothing_trend" in v, float(v.get("damping_trend", 1.0))

    def path(start, noise):
        level, b = start[0], start[1] if slope else 0.0
        effects = list(start[1 + slope :])
        effects = [*effects, -sum(effects)] if m else effects
        y = np.zeros(steps)
        for t in range(steps):
            e = v["sigma"] * noise[t]
            y[t] = level + phi * b + (effects[t] if m else 0.0) + e
            level, b = level + phi * b + alpha * e, phi * b + beta * e
            if m:
                effects.append(effects[t] + gamma * e)
        return y[:, None]

    return path, 1 + slope + max(m - 1, 0), steps


@pytest.mark.parametrize("kind", KINDS)
def test_gaps_and_a_diffuse_start_are_those_of_the_definition(kind, x64):
    """The error of a step that is missing is unknown, and moves the states nevertheless."""
    y, m = GAPS[:20], KINDS[kind].get("period", 0)
    found = trace(models.ets, y, {"sigma": 1.2}, **KINDS[kind])
    v = numbers(found)
    path, count, steps = definition(v, m, len(y))
    expected = linear_paths.evidence(path, count, steps, y[:, None])
    assert linear_paths.log_likelihood(found, y[:, None]) == pytest.approx(expected, abs=1e-8)
    # and with the start as parameters
    found = trace(models.ets, y, {"sigma": 1.2}, initial="sampled", **KINDS[kind])
    v = numbers(found)
    path, count, steps = definition(v, m, len(y))
    start = [v["level_start"], *([v["slope_start"]] if "slope_start" in v else []), *v.get("seasonal_start", [])]
    expected = linear_paths.evidence(lambda _, noise: path(start, noise), 0, steps, y[:, None])
    assert linear_paths.log_likelihood(found, y[:, None]) == pytest.approx(expected, abs=1e-8)


def test_without_trend_and_season_it_is_an_integrated_moving_average(x64):
    found = trace(models.ets, GAPS, {"sigma": 1.2})
    theta = numbers(found)["smoothing_level"] - 1
    other = trace(models.sarimax, GAPS, {"sigma": 1.2, "ma_partial": theta[None]}, order=(0, 1, 1))
    mine, theirs = (linear_paths.log_likelihood(x, GAPS[:, None]) for x in (found, other))
    assert mine == pytest.approx(theirs, abs=1e-8)


@pytest.mark.filterwarnings("ignore:the log-likelihood does not depend on smoothing_seasonal")  # the level takes all
@pytest.mark.parametrize("kind", ["ANN", "AAdN", "AAA"])
def test_maxima_are_those_of_statsmodels(kind):
    y = np.log(sm.datasets.macrodata.load_pandas().data.realinv.to_numpy())[:100] if kind == "AAdN" else WHOLE
    fit = infer.fit_ml(partial(models.ets, initial="sampled", **KINDS[kind]), y, num_starts=2, progress_bar=False)
    reference = peer(kind, y).fit(disp=False, maxiter=2000)
    assert fit.log_likelihood > reference.llf - 1e-3


@pytest.mark.parametrize("kind", [pytest.param("ANN", marks=pytest.mark.slow), "AAdA"])
def test_states_that_are_sampled_have_the_same_density(kind, x64):
    y = GAPS[:9]
    options = {"location": 20.0, "scale": 2.0, "u": np.cos(np.arange(9))}
    model = partial(models.ets, **KINDS[kind], **options)
    values = latent(trace(model, y))
    found, path = linear_paths.integrated(model, y, values)
    exact = trace(model, None, values, num_steps=9)["y"]["fn"]
    assert found == pytest.approx(float(exact.log_prob(y[:, None])), abs=1e-8)
    np.testing.assert_allclose(path, exact.smooth(y[:, None]).mean, atol=1e-7)


def test_the_seasonal_effects_sum_to_zero_and_forecasts_repeat_them(x64):
    y = 10 + np.tile([1.0, 2.0, -3.0, 0.0], 12) + 0.01 * RNG.normal(size=48)
    values = {"smoothing_level": 0.1, "smoothing_seasonal_share": 0.1, "sigma": 0.01}
    found = trace(models.ets, y, values, **KINDS["ANA"])["y"]["fn"]
    ahead = found.forecast(jnp.asarray(y[:, None]), 8).mean[:, 0]
    np.testing.assert_allclose(ahead, 10 + np.tile([1.0, 2.0, -3.0, 0.0], 2), atol=0.03)
    states = found.smooth(jnp.asarray(y[:, None])).mean
    np.testing.assert_allclose(states[:, 0], 10, atol=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"error": "mul"}, '`error="mul"` is not linear in the states; take `error="add"` for the logarithm'),
        ({"seasonal": "mul", "period": 4}, '`seasonal="mul"` is not linear'),
        ({"trend": "mul"}, '`trend="mul"` is not linear'),
        ({"trend": "additive"}, "`trend` must be one of 'add'"),
        ({"damped": True}, "`damped` is the slope's"),
        ({"seasonal": "add"}, "`period` go together"),
        ({"period": 4}, "`period` go together"),
        ({"seasonal": "add", "period": 1}, "`period` must be at least 2"),
        ({"initial": "estimated"}, "`initial` must be one of 'diffuse', 'sampled'"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        trace(models.ets, WHOLE, **options)
