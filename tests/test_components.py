"""Components of the structural models: damping, moving coefficients, interventions, and noise that is not normal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats
from numpyro import handlers
from numpyro.infer.util import initialize_model, log_density

from pssm import datasets, infer, models

STEPS = 24
RNG = np.random.default_rng(0)
Y = RNG.normal(size=STEPS).cumsum() + RNG.normal(size=STEPS)
Y[[7, 8]] = np.nan
U = np.column_stack([np.cos(np.arange(STEPS)), np.arange(STEPS) / 4.0])
LAW = {
    "law": ("step", 9),
    "strike": ("pulse", 4),
    "jam": ("pulse", 12, 14),
    "bend": ("slope", 15),
    "phase": ("ramp", 5, 8),
}


def trace_of(model, y=Y, values=None, **options):
    """The model's trace at some values."""
    seeded = handlers.seed(handlers.substitute(model, values or {}), 3)
    return handlers.trace(seeded).get_trace(y, **options)


def latent(trace):
    return {n: s["value"] for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}


def dense(covariance, mean, y):
    """Log density of what was observed, by SciPy."""
    seen = ~np.isnan(y)
    return scipy.stats.multivariate_normal.logpdf(y[seen], mean[seen], covariance[np.ix_(seen, seen)])


# ------------------------------------------------------------------------------------------------------- damped trends


def damped_covariance(level, slope, phi, obs, times):
    """Of a damped trend that starts at (0, 0), in closed form, by the definition in steps of one."""
    n = len(times)
    weight = np.zeros((n, 2 * n))  # of the noises of level and slope
    for t in range(1, n):
        weight[t:, t] = level
        for k in range(t + 1, n):
            weight[k, n + t] = slope * (1 - phi ** (k - t)) / (1 - phi)
    return weight @ weight.T + obs**2 * np.eye(n)


def test_damped_trend_is_the_dense_one(x64):
    values = {"sigma_level": 0.4, "sigma_slope": 0.3, "trend_damping": 0.8, "sigma_obs": 0.5}
    fn = trace_of(partial(models.structural, trend=True, damped=True, location=0.0, scale=1.0), values=values)["y"][
        "fn"
    ]
    # the start: level N(0, 10^2), slope N(0, 1)
    rise = (1 - 0.8 ** np.arange(STEPS)) / (1 - 0.8)
    covariance = damped_covariance(0.4, 0.3, 0.8, 0.5, np.arange(STEPS)) + 100.0 + np.outer(rise, rise)
    np.testing.assert_allclose(fn.log_prob(Y[:, None]), dense(covariance, np.zeros(STEPS), Y), rtol=1e-10)


def damped_moments(times, level, slope, phi, start):
    """Mean map and covariance of the level in continuous time, by quadrature of its stochastic integral."""
    k = -np.log(phi)
    q = slope**2 * 2 * k / (1 - phi**2)
    response = lambda s: (1 - np.exp(-k * s)) / (1 - phi) if s > 0 else 0.0  # noqa: E731
    n, t0 = len(times), times[0]
    cov = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1):
            a, b = times[i] - t0, times[j] - t0
            part = scipy.integrate.quad(lambda s, a=a, b=b: response(a - s) * response(b - s), 0, b)[0] if b else 0.0
            cov[i, j] = cov[j, i] = q * part + level**2 * b
    rise = np.array([response(t - t0) for t in times])
    return cov + start[0] ** 2 + start[1] ** 2 * np.outer(rise, rise)


@pytest.mark.parametrize("double", [True, False])
def test_damped_trend_at_uneven_times(double):
    t = np.array([0.0, 0.5, 0.5, 2.0, 2.2, 6.0, 9.5, 10.0])
    y = np.array([0.3, 0.1, np.nan, 1.0, 0.7, 2.0, 1.5, 1.9])
    values = {"sigma_level": 0.4, "sigma_slope": 0.3, "trend_damping": 0.8, "sigma_obs": 0.5}
    with jax.enable_x64(double):
        model = partial(models.structural, trend=True, damped=True, t=t, location=0.0, scale=1.0)
        found = trace_of(model, y, values)["y"]["fn"].log_prob(jnp.asarray(y)[:, None])
    covariance = damped_moments(t, 0.4, 0.3, 0.8, (10.0, 1.0)) + 0.25 * np.eye(len(t))
    np.testing.assert_allclose(found, dense(covariance, np.zeros(len(t)), y), rtol=1e-8 if double else 1e-5)


def test_damped_trend_in_steps_of_one_moves_as_without_times(x64):
    values = {"sigma_level": 0.4, "sigma_slope": 0.3, "trend_damping": 0.8, "sigma_obs": 0.5}
    model = partial(models.structural, trend=True, damped=True)
    timed = trace_of(partial(model, t=np.arange(STEPS)), values=values)["y"]["fn"].ssm
    plain = trace_of(model, values=values)["y"]["fn"].ssm
    np.testing.assert_allclose(timed.A[1:], np.broadcast_to(plain.A, (STEPS - 1, 2, 2)), rtol=1e-12, atol=1e-12)
    noise = np.asarray(timed.chol_Q[1] @ timed.chol_Q[1].T)
    np.testing.assert_allclose(noise[1, 1], 0.3**2, rtol=1e-10)


def test_a_damped_trend_levels_off(x64):
    ramp = np.arange(30.0)
    values = {"sigma_level": 0.01, "sigma_slope": 0.05, "trend_damping": 0.9, "sigma_obs": 0.05}
    fn = trace_of(partial(models.structural, trend=True, damped=True), ramp, values)["y"]["fn"]
    ahead = np.asarray(fn.forecast(ramp[:, None], 200).mean)[:, 0]
    slope = float(fn.smooth(ramp[:, None]).mean[-1, 1])
    np.testing.assert_allclose(ahead[-1] - 29, slope / 0.1, rtol=0.05)
    assert ahead[-1] - ahead[-2] < 1e-6
    with pytest.raises(ValueError, match="`damped` is of a trend"):
        trace_of(partial(models.structural, damped=True))


# -------------------------------------------------------------------------------------------------- moving coefficients


def moving_covariance(walks, x, start, level, obs):
    """Of a local level with coefficients that walk: `sum_k x_k x_k' o (start_k^2 + walk_k^2 min(s, t))`."""
    time = np.minimum.outer(np.arange(len(x)), np.arange(len(x)))
    total = start[0] ** 2 + level**2 * time + obs**2 * np.eye(len(x))
    for k, walk in enumerate(walks):
        total = total + np.outer(x[:, k], x[:, k]) * (start[1 + k] ** 2 + walk**2 * time)
    return total


@pytest.mark.parametrize("double", [True, False])
def test_moving_coefficients_are_the_dense_ones(double):
    values = {"sigma_level": 0.4, "sigma_obs": 0.5, "sigma_beta": np.array([0.2, 0.1])}
    model = partial(models.structural, u=U, moving=True, location=0.0, scale=1.0)
    with jax.enable_x64(double):
        trace = trace_of(model, values=values)
        found = trace["y"]["fn"].log_prob(jnp.asarray(Y)[:, None])
    seen = ~np.isnan(Y)
    spread = 2.5 / U[seen].std(0)
    covariance = moving_covariance([0.2, 0.1], U - U[0], [10.0, *spread], 0.4, 0.5)
    np.testing.assert_allclose(found, dense(covariance, np.zeros(STEPS), Y), rtol=1e-9 if double else 1e-4)
    assert trace["y"]["infer"]["state_names"] == ("level", "beta_0", "beta_1")


def test_moving_coefficients_are_those_of_statsmodels(x64):
    """A random walk of each coefficient from zero: its own system, with the emission of the regressors."""
    import statsmodels.api as sm

    values = {"sigma_level": 0.4, "sigma_obs": 0.5, "sigma_beta": np.array([0.2, 0.1])}
    model = partial(models.structural, u=U, moving=True, u_origin=0.0, location=0.0, scale=1.0)
    fn = trace_of(model, values=values)["y"]["fn"]
    peer = sm.tsa.statespace.MLEModel(Y, k_states=3)
    peer.ssm["design"] = np.column_stack([np.ones(STEPS), U]).T[None]
    peer.ssm["transition"], peer.ssm["selection"] = np.eye(3), np.eye(3)
    peer.ssm["state_cov"], peer.ssm["obs_cov"] = np.diag([0.16, 0.04, 0.01]), np.array([[0.25]])
    peer.ssm.initialize_known(np.zeros(3), np.asarray(fn.ssm.P0))
    np.testing.assert_allclose(fn.log_prob(Y[:, None]), peer.ssm.loglike(), rtol=1e-9)


def test_columns_by_name_and_number(x64):
    frame = pd.DataFrame(U, columns=["price", "heat"])
    by_name = trace_of(partial(models.structural, u=frame, moving="heat"))
    by_number = trace_of(partial(models.structural, u=U, moving=1))
    assert by_name["y"]["infer"]["state_names"] == ("level", "beta_heat")
    assert by_name["beta"]["infer"]["coords"] == {"input": ["price"]}
    assert by_number["beta"]["infer"]["coords"] == {"input": [0]}
    for name in ("y", "beta", "sigma_beta"):
        np.testing.assert_allclose(by_name[name]["fn"].log_prob(by_name[name]["value"]),
                                   by_number[name]["fn"].log_prob(by_number[name]["value"]))  # fmt: skip
    for moving, words in (("cold", "must name columns"), (2, "0 to 1"), (["x", 1], "must name columns")):
        with pytest.raises(ValueError, match=words):
            trace_of(partial(models.structural, u=frame, moving=moving))
    with pytest.raises(ValueError, match="has no names"):
        trace_of(partial(models.structural, u=U, moving="heat"))
    with pytest.raises(ValueError, match="`moving` is given without `u`"):
        trace_of(partial(models.structural, moving=True))
    named = trace_of(partial(models.structural, u=U, u_names=["price", "heat"], moving="heat"))
    assert named["y"]["infer"]["state_names"] == ("level", "beta_heat")
    with pytest.raises(ValueError, match="`u_names` must have 2 different names"):
        trace_of(partial(models.structural, u=U, u_names=["price", "price"]))


def test_where_regressors_count_from(x64):
    """With fixed coefficients another origin is another level; `u_origin=0` is a regression on `u` itself."""
    values = {"sigma_level": 0.4, "sigma_obs": 0.5, "beta": jnp.array([0.3, -0.2])}
    far = U + np.array([3.0, 7.0])
    fn = trace_of(partial(models.structural, u=far, u_origin=0.0, location=0.0, scale=1.0), values=values)["y"]["fn"]
    plain = trace_of(partial(models.structural, location=0.0, scale=1.0), values=values)["y"]["fn"]
    expected = plain.log_prob((Y - far @ np.array([0.3, -0.2]))[:, None])
    np.testing.assert_allclose(fn.log_prob(Y[:, None]), expected, rtol=1e-10)
    with pytest.raises(ValueError, match="`u_origin` must be one number, or one for each of 2"):
        trace_of(partial(models.structural, u=U, u_origin=[1.0, 2.0, 3.0]))


# -------------------------------------------------------------------------------------------------------- interventions


def test_interventions_have_their_shapes(x64):
    fn = trace_of(partial(models.structural, interventions=LAW), values={"effect": jnp.eye(5)[0]})["y"]["fn"]
    t = np.arange(STEPS)
    expected = {
        "law": t >= 9,
        "strike": t == 4,
        "jam": (t >= 12) & (t <= 14),
        "bend": np.maximum(t - 15, 0),
        "phase": np.clip((t - 5) / 3, 0, 1),
    }
    np.testing.assert_allclose(fn.ssm.d[:, 0], expected["law"])
    for k, name in enumerate(LAW):
        d = trace_of(partial(models.structural, interventions=LAW), values={"effect": jnp.eye(5)[k]})["y"]["fn"].ssm.d
        np.testing.assert_allclose(d[:, 0], expected[name], err_msg=name)


def test_interventions_with_uneven_times(x64):
    t = np.array([0.0, 0.5, 2.0, 2.2, 6.0, 9.5])
    table = {"law": ("step", 2.1), "bend": ("slope", 2.0), "phase": ("ramp", 1.0, 4.0)}
    model = partial(models.structural, t=t, interventions=table)
    fn = trace_of(model, Y[:6], {"effect": jnp.array([10.0, 1.0, 100.0])})["y"]["fn"]
    expected = 10.0 * (t >= 2.1) + np.maximum(t - 2, 0) + 100 * np.clip((t - 1) / 3, 0, 1)
    np.testing.assert_allclose(fn.ssm.d[:, 0], expected)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (("jump", 3), "must be .*step"),
        (("step",), "a step has 1 times"),
        (("pulse", 1, 2, 3), "a pulse has 1 or 2 times"),
        (("step", "1999-01-01"), "pssm.datasets.interventions"),
        (("step", 0), "the same at every step"),
        (("ramp", 3, 3), "two different times"),
        (("ramp", 5, 3), "first before the second"),
        (("pulse", 3.5), "there is no step at"),
        (("step", np.inf), "finite times"),
        ("step", "must be .*step"),
    ],
)
def test_interventions_that_are_refused(spec, words):
    with pytest.raises(ValueError, match=words):
        trace_of(partial(models.structural, interventions={"law": spec}))


# ----------------------------------------------------------------------------------------------- units, and the zero


def test_under_jit(x64):
    """Data, regressors and times that are traced: the same density."""
    values = {"sigma_level": 0.4, "sigma_slope": 0.1, "trend_damping": 0.8, "sigma_obs": 0.5, "sigma_beta": np.ones(1)}
    values |= {"beta": np.ones(1), "effect": np.ones(5), "noise_base": np.linspace(-1, 1, STEPS), "nu_obs": 4.0}
    model = partial(
        models.structural, trend=True, damped=True, moving=[0], interventions=LAW, noise="student_t", scale=1.0
    )

    def density(y, u, t):
        return log_density(model, (y,), {"u": u, "t": t}, {n: jnp.asarray(x) for n, x in values.items()})[0]

    t = np.arange(float(STEPS))
    np.testing.assert_allclose(jax.jit(density)(Y, U, t), density(Y, U, t), rtol=1e-10)


OPTIONS = {
    "damped": {"trend": True, "damped": True},
    "moving": {"u": U, "moving": True},
    "partly moving": {"u": U, "moving": [0], "seasonal": 4, "pattern": "trigonometric"},
    "interventions": {"trend": True, "interventions": LAW},
    "student_t": {"noise": "student_t"},
    "stochastic_volatility": {"noise": "stochastic_volatility", "seasonal": 3},
    "constant": {"level": False, "cycle": True, "interventions": LAW},
}


def potential(model, y, z=None):
    """Minus the log joint density at a point of NumPyro's unconstrained space, and the point."""
    info = initialize_model(jax.random.key(0), model, model_args=(y,))
    if z is None:
        rng = np.random.default_rng(1)
        z = {n: jnp.asarray(0.5 * rng.normal(size=np.shape(x)), x.dtype) for n, x in sorted(info.param_info.z.items())}
    return float(jax.jit(info.potential_fn)(z)), z


def test_no_units_at_once():
    before, z = potential(partial(models.structural, **OPTIONS["partly moving"]), Y)
    model = partial(models.structural, **{**OPTIONS["partly moving"], "u": 1e5 * U - 3e7})
    found = potential(model, 1e13 * Y, z)[0] - np.isfinite(Y).sum() * np.log(1e13)
    assert found == pytest.approx(before, rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("states", ["marginal", "sampled"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_density_has_no_units_in_the_samplers_space(name, states):
    options = {**OPTIONS[name], "states": states}
    before, z = potential(partial(models.structural, **options), Y)
    for unit in (1e-9, 1e13):
        found = potential(partial(models.structural, **options), unit * Y, z)[0]
        assert found - np.isfinite(Y).sum() * np.log(unit) == pytest.approx(before, rel=2e-5)
    assert potential(partial(models.structural, **options), Y + 1e7)[0] == pytest.approx(before, rel=2e-5)
    if "u" in options:
        for moved in (U + 2000.0, 1e5 * U - 3e7):
            model = partial(models.structural, **{**options, "u": moved})
            assert potential(model, Y, z)[0] == pytest.approx(before, rel=2e-5)


@pytest.mark.parametrize(
    ("model", "spec", "sites", "params"),
    [
        (models.local_level, dict(level="llevel"), {"sigma_level": 38.0, "sigma_obs": 123.0}, [123.0, 38.0]),
        (
            models.local_linear_trend,
            dict(level="lltrend"),
            {"sigma_level": 30.0, "sigma_slope": 3.0, "sigma_obs": 120.0},
            [120.0, 30.0, 3.0],
        ),
        (
            partial(models.structural, trend=True, seasonal=4, ar=1),
            dict(level="lltrend", seasonal=4, autoregressive=1),
            {"sigma_level": 30.0, "sigma_slope": 3.0, "sigma_seasonal": 9.0, "sigma_ar": 50.0, "sigma_obs": 90.0},
            [90.0, 30.0, 3.0, 9.0, 50.0, 0.4],
        ),
    ],
)
def test_a_diffuse_start_is_statsmodels(model, spec, sites, params, x64):
    """Its exact diffuse likelihood has `-log(2 pi) / 2` for each diffuse state besides; autoregressions are proper."""
    from statsmodels.tsa.api import UnobservedComponents

    y = np.array(datasets.load("nile").y, float)
    y[[0, 7, 50]] = np.nan
    peer = UnobservedComponents(y, **spec, use_exact_diffuse=True)
    sds = np.array(params)
    free = peer.k_states - ("autoregressive" in spec)
    want = peer.loglike(np.concatenate([sds[:5] ** 2, sds[5:]])) + free * np.log(2 * np.pi) / 2
    sites = sites | ({"ar_partial": np.array([0.4])} if "autoregressive" in spec else {})
    fn = handlers.substitute(partial(model, initial="diffuse"), data=sites)
    site = handlers.trace(handlers.seed(fn, 0)).get_trace(y)["y"]
    assert sum(site["fn"].ssm.diffuse) == free
    np.testing.assert_allclose(site["fn"].log_prob(y), want, rtol=1e-8)


def test_what_goes_with_a_diffuse_start(x64):
    y = np.array(datasets.load("nile").y, float)
    fit = infer.fit_ml(partial(models.local_level, initial="diffuse"), y, num_starts=2, progress_bar=False)
    np.testing.assert_allclose(fit.log_likelihood, -632.5456, atol=1e-3)
    assert np.isfinite(infer.forecast(fit, 3).sd).all()
    trace = handlers.trace(handlers.seed(models.local_level, 0)).get_trace(num_steps=5, initial="diffuse")
    assert trace["y"]["fn"].ssm.diffuse == ()
    with pytest.raises(ValueError, match="no prior for a path"):
        handlers.trace(handlers.seed(models.local_level, 0)).get_trace(y, states="sampled", initial="diffuse")


# Drivers killed or seriously injured in Great Britain by month, 1969 to 1984 (UK Department of Transport; in R it is
# `Seatbelts`): Harvey & Durbin 1986.
DRIVERS = np.fromstring(
    """
    1687 1508 1507 1385 1632 1511 1559 1630 1579 1653 2152 2148 1752 1765 1717 1558 1575 1520 1805 1800 1719 2008
    2242 2478 2030 1655 1693 1623 1805 1746 1795 1926 1619 1992 2233 2192 2080 1768 1835 1569 1976 1853 1965 1689
    1778 1976 2397 2654 2097 1963 1677 1941 2003 1813 2012 1912 2084 2080 2118 2150 1608 1503 1548 1382 1731 1798
    1779 1887 2004 2077 2092 2051 1577 1356 1652 1382 1519 1421 1442 1543 1656 1561 1905 2199 1473 1655 1407 1395
    1530 1309 1526 1327 1627 1748 1958 2274 1648 1401 1411 1403 1394 1520 1528 1643 1515 1685 2000 2215 1956 1462
    1563 1459 1446 1622 1657 1638 1643 1683 2050 2262 1813 1445 1762 1461 1556 1431 1427 1554 1645 1653 2016 2207
    1665 1361 1506 1360 1453 1522 1460 1552 1548 1827 1737 1941 1474 1458 1542 1404 1522 1385 1641 1510 1681 1938
    1868 1726 1456 1445 1456 1365 1487 1558 1488 1684 1594 1850 1998 2079 1494 1057 1218 1168 1236 1076 1174 1139
    1427 1487 1483 1513 1357 1165 1282 1110 1297 1185 1222 1284 1444 1575 1737 1763
    """,
    sep=" ",
)


@pytest.mark.parametrize(
    ("model", "value"),
    [(models.local_level, 0.6451960), (models.local_linear_trend, 0.6247935)],
    ids=["level", "slope"],
)
def test_commandeur_and_koopman(model, value, x64):
    """Log-likelihoods for each month, of the logarithms with diffuse starts: Commandeur & Koopman 2007."""
    fit = infer.fit_ml(partial(model, initial="diffuse"), np.log(DRIVERS), num_starts=2, progress_bar=False)
    np.testing.assert_allclose(fit.log_likelihood / 192, value, atol=1e-6)
    if model is models.local_level:
        sds = fit.params["sigma_obs"], fit.params["sigma_level"]
        np.testing.assert_allclose(np.square(sds), [0.00222163, 0.0118659], rtol=1e-4)
