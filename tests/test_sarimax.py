"""`sarimax`: statsmodels and a definition step by step; gaps, both precisions, both ways to deal with the states."""

from functools import partial

import jax
import jax.numpy as jnp
import linear_paths
import numpy as np
import pytest
import statsmodels.api as sm
from linear_paths import numbers, trace

from pssm import infer, models
from pssm.models.arma import Orders, arima, coefficients, differences, neighbours, partial_autocorrelations

STEPS = 70
RNG = np.random.default_rng(0)
Y = 5 + np.cumsum(RNG.normal(size=STEPS)) + np.tile([1.0, 2.0, -3.0, 0.0], 18)[:STEPS]
Y[[0, 3, 4, 50]] = np.nan
U = np.column_stack([np.cos(np.arange(STEPS)), np.arange(STEPS) / 10.0])
NONE = (0, 0, 0, 0)

CASES = [
    ((1, 0, 0), None, "c", None),
    ((2, 0, 1), None, "c", U),
    ((2, 0, 1), None, "n", U),
    ((1, 0, 1), (1, 0, 1, 12), "c", None),
    ((1, 1, 1), None, "n", None),
    ((0, 1, 1), (0, 1, 1, 4), "n", U),
    ((1, 1, 0), (1, 1, 0, 4), "c", None),
    ((0, 2, 2), None, "n", None),
]


def peer(order, seasonal, trend, y, u, v):
    """statsmodels' model, and its parameters from our sites: its trend is the recursion's intercept, ours the mean."""

    def of(name):
        return np.atleast_1d(v[name]) if name in v else np.zeros(0)

    far = np.zeros((seasonal or NONE)[3] * len(of("seasonal_phi")) + 1)
    far[0] = 1
    if len(of("seasonal_phi")):
        far[seasonal[3] :: seasonal[3]] = -of("seasonal_phi")
    polynomial = np.convolve(np.r_[1, -of("phi")], far)
    intercepts = []
    if trend == "c":
        intercepts = [float(v["mean"] if "mean" in v else v["drift"]) * polynomial.sum()]
    exog = None
    if u is not None:
        exog = u if trend == "n" and not order[1] and not (seasonal or NONE)[1] else u - u[0]
    model = sm.tsa.SARIMAX(
        y, exog=exog, order=order, seasonal_order=seasonal or NONE, trend=trend, use_exact_diffuse=True
    )
    params = [intercepts, of("beta"), of("phi"), of("theta"), of("seasonal_phi"), of("seasonal_theta")]
    return model, np.concatenate([*params, [v["sigma"] ** 2]])


def near(v):
    """Values of the sites at which the data are not absurd."""
    small = {n: 0.1 * x for n, x in v.items() if n in ("beta", "drift", "slope")}
    return {n: x for n, x in v.items() if "phi" not in n and "theta" not in n} | small | {"sigma": np.asarray(1.3)}


@pytest.mark.parametrize(
    ("order", "seasonal", "trend", "u", "precise"),
    [*((*case, True) for case in CASES), *((*CASES[i], False) for i in (1, 6))],
)
def test_the_likelihood_is_that_of_statsmodels(order, seasonal, trend, u, precise):
    with jax.enable_x64(precise):
        model = partial(models.sarimax, order=order, seasonal_order=seasonal, trend=trend, u=u)
        values = near(numbers(trace(model, Y)))
        found = trace(model, Y, values)
        mine = linear_paths.log_likelihood(found, Y[:, None])
        reference, params = peer(order, seasonal, trend, Y, u, numbers(found))
        lags = Orders(*order, *(seasonal or ())).lags
        expected = reference.loglike(params) + 0.5 * lags * np.log(2 * np.pi)
        assert mine == pytest.approx(expected, abs=1e-6 if precise else 2e-5 * abs(expected) + 2e-3)


def definition(order, seasonal, trend, v, u, steps):
    """The series from the lags before it, and from the noise of a long past: the recursions as they are written."""
    p, d, q = order
    P, D, Q, s = seasonal or NONE
    far = np.zeros(s * P + 1)
    far[0] = 1.0
    moving = np.zeros(s * Q + 1)
    moving[0] = 1.0
    if P:
        far[s::s] = -v["seasonal_phi"]
    if Q:
        moving[s::s] = v["seasonal_theta"]
    ar = np.convolve(np.r_[1, -v["phi"]] if p else [1.0], far)
    ma = np.convolve(np.r_[1, v["theta"]] if q else [1.0], moving)
    delta = -np.ones(1)
    for _ in range(d):
        delta = np.convolve(delta, [1.0, -1.0])
    for _ in range(D):
        delta = np.convolve(delta, np.r_[1.0, np.zeros(s - 1), -1.0])
    past, lags = 400, len(delta) - 1
    num_noise = past + steps

    def path(start, noise):
        e = v["sigma"] * noise
        w = np.zeros(num_noise)
        for t in range(num_noise):
            w[t] = sum(ma[j] * e[t - j] for j in range(len(ma)) if t >= j)
            w[t] -= sum(ar[j] * w[t - j] for j in range(1, len(ar)) if t >= j)
        x = np.concatenate([start[::-1], np.zeros(steps)])
        for t in range(steps):
            mean = 0.0 if trend == "n" else float(v["drift"] if lags else v["mean"]) + float(v.get("slope", 0.0)) * t
            x[lags + t] = sum(delta[j] * x[lags + t - j] for j in range(1, lags + 1)) + w[past + t] + mean
        return (x[lags:] + (0.0 if u is None else (u - u[0]) @ v["beta"]))[:, None]

    return path, lags, num_noise


@pytest.mark.parametrize(
    ("order", "seasonal", "trend", "u"),
    [((1, 0, 1), None, "ct", U), ((1, 1, 1), (0, 1, 1, 4), "c", U), ((1, 2, 1), None, "ct", None)],
)
def test_the_likelihood_is_that_of_the_definition(order, seasonal, trend, u, x64):
    y, u = Y[:24], None if u is None else u[:24]
    model = partial(models.sarimax, order=order, seasonal_order=seasonal, trend=trend, u=u)
    values = near(numbers(trace(model, y))) | {n: np.full(1, 0.4) for n in ("ar_partial", "ma_partial")}
    found = trace(model, y, values)
    path = definition(order, seasonal, trend, numbers(found), u, len(y))
    expected = linear_paths.evidence(*path, y[:, None])
    assert linear_paths.log_likelihood(found, y[:, None]) == pytest.approx(expected, rel=1e-9)


def test_differences():
    np.testing.assert_array_equal(differences(Orders(0, 1, 0)), [1])
    np.testing.assert_array_equal(differences(Orders(0, 2, 0)), [2, -1])
    np.testing.assert_array_equal(differences(Orders(0, 1, 0, 0, 1, 0, 4)), [1, 0, 0, 1, -1])


@pytest.mark.parametrize("precise", [True, False])
def test_the_stationary_covariance_near_the_unit_circle(precise):
    """Against the Yule-Walker equations in 64 bits, for a season of 12 whose roots have moduli of 0.99 and above."""
    phi = -np.polymul([1, -0.98], np.r_[1.0, np.zeros(11), -0.9])[1:]
    n = len(phi)
    # sum_j poly_j g_{|i - j|} = [i = 0], i = 0, ..., n
    equations, poly = np.zeros((n + 1, n + 1)), np.r_[1, -phi]
    for i in range(n + 1):
        for j in range(n + 1):
            equations[i, abs(i - j)] += poly[j]
    gamma = np.linalg.solve(equations, np.eye(n + 1)[0])[:n]
    expected = gamma[np.abs(np.arange(n)[:, None] - np.arange(n))]
    with jax.enable_x64(precise):
        near, none, far = jnp.asarray([0.98]), jnp.zeros(0), jnp.asarray([0.9])
        system = arima(Orders(1, 0, 0, 1, 0, 0, 12), near, none, far, none, jnp.ones(()))
        chol = np.asarray(system.chol_P0, float)
    np.testing.assert_allclose(chol @ chol.T, expected, rtol=1e-9 if precise else 2e-3)


def test_partial_autocorrelations_there_and_back(x64):
    partial_ = jnp.asarray(np.random.default_rng(1).uniform(-0.95, 0.95, 6))
    phi = coefficients(partial_)
    assert np.abs(np.roots(np.r_[1, -phi])).max() < 1
    np.testing.assert_allclose(partial_autocorrelations(phi), partial_, rtol=1e-10)
    chol = neighbours(phi, 2.0, partial_)
    gamma = chol @ chol.T
    assert gamma[0, 1] / gamma[0, 0] == pytest.approx(float(partial_[0]))
    np.testing.assert_allclose(np.diagonal(gamma, 3), gamma[0, 3], rtol=1e-9)


OPTIONS = {"location": 4.0, "scale": 2.0}


@pytest.mark.parametrize(
    ("order", "seasonal"), [pytest.param((1, 0, 1), None, marks=pytest.mark.slow), ((0, 1, 1), (1, 0, 0, 2))], ids=str
)
def test_states_that_are_sampled_have_the_same_density(order, seasonal, x64):
    """With the noise integrated out: that of the series with a proper start; and the mean path is the smoothed one."""
    y = Y[:9]
    model = partial(models.sarimax, order=order, seasonal_order=seasonal, **OPTIONS)
    values = near(numbers(trace(model, y)))
    found, path = linear_paths.integrated(model, y, values)
    exact = trace(model, None, values, num_steps=9)["y"]["fn"]
    assert found == pytest.approx(float(exact.log_prob(y[:, None])), abs=1e-8)
    np.testing.assert_allclose(path, exact.smooth(y[:, None]).mean, atol=1e-7)


@pytest.mark.parametrize(
    ("series", "order", "seasonal", "trend"),
    [
        ("infl", (1, 0, 1), None, "c"),
        pytest.param("realgdp", (1, 1, 0), None, "c", marks=pytest.mark.slow),
        pytest.param("co2", (0, 1, 1), (0, 1, 1, 12), "n", marks=pytest.mark.slow),
    ],
)
def test_maxima_are_those_of_statsmodels(series, order, seasonal, trend):
    if series == "co2":
        y = sm.datasets.co2.load_pandas().data.co2.resample("MS").mean().iloc[:120].to_numpy()
    else:
        y = sm.datasets.macrodata.load_pandas().data[series].to_numpy()
        y = np.log(y) if series == "realgdp" else y
    fit = infer.fit_ml(
        partial(models.sarimax, order=order, seasonal_order=seasonal, trend=trend), y, num_starts=2, progress_bar=False
    )
    reference = sm.tsa.SARIMAX(
        y, order=order, seasonal_order=seasonal or NONE, trend=trend, use_exact_diffuse=True
    ).fit(disp=0, maxiter=300)
    lags = Orders(*order, *(seasonal or ())).lags
    expected = reference.llf + 0.5 * lags * np.log(2 * np.pi)
    assert fit.log_likelihood > expected - 1e-3
    if series != "co2":  # where theirs stops below the maximum
        assert fit.log_likelihood == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": (1, 0)}, "`order` must be three whole numbers"),
        ({"order": (1, -1, 0)}, "`order: d` must be at least 0; got -1"),
        ({"seasonal_order": (1, 0, 0)}, "`seasonal_order` must be four"),
        ({"seasonal_order": (1, 0, 0, 1)}, "`seasonal_order: s` must be at least 2"),
        ({"trend": "t"}, "`trend` must be one of 'n', 'c', 'ct'"),
        ({"states": "both"}, "`states` must be one of"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        trace(models.sarimax, Y, **options)
