"""Nothing depends on units, nor on where the zero of data and regressors lies: posteriors, forecasts, EM."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import initialize_model
from scipy import stats

import pssm
from pssm import LinearGaussianSSM, fit_em, infer, models
from pssm.diagnostics import leave_future_out, to_datatree
from pssm.distributions import LinearGaussianMarginal
from pssm.distributions.in_units import FromOrigin, HalfNormal, InverseGamma, Normal
from pssm.learning.sensors import odd_sensors

STEPS = 24
RNG = np.random.default_rng(0)
Y = RNG.normal(size=STEPS).cumsum() + RNG.normal(size=STEPS)
Y[7] = np.nan
Y3 = np.column_stack([Y, Y + RNG.normal(size=STEPS), RNG.normal(size=STEPS)])
TOTALS = np.where((np.arange(STEPS)[:, None] % 3 == 2) | [False, True, True], Y3, np.nan)
U = np.column_stack([np.cos(np.arange(STEPS)), np.arange(STEPS)])
UNITS = np.array([1e6, 1.0, 1e-2])

WITH_U = {
    "local_level": (models.local_level, Y),
    "autoregression": (partial(models.autoregression, order=2), Y),
    "structural": (partial(models.structural, level=False, cycle=True, ar=1), Y),
    "lds": (partial(models.lds, num_states=2), Y3),
    "dynamic_factor": (partial(models.dynamic_factor, error_order=1), Y3),
    "multivariate": (partial(models.multivariate_structural, trend=True, cycle=True), Y3),
    "multivariate sums": (partial(models.multivariate_structural, aggregate={0: "sum"}, every=3, rank=1), TOTALS),
    "sarimax": (partial(models.sarimax, order=(1, 0, 1)), Y),
    "ets": (partial(models.ets, trend="add", initial="sampled"), Y),
    "var": (partial(models.var, order=2, stationary=True), Y3),
}
WITHOUT = {
    "local_linear_trend": (models.local_linear_trend, Y),
    "seasonal": (partial(models.seasonal, period=4), Y),
    "seasonal waves": (partial(models.seasonal, period=12.5, harmonics=2), Y),
    "uneven": (partial(models.structural, trend=True, matern=1.5, t=np.arange(STEPS) ** 1.1), Y),
}
SLOW = ("structural", "dynamic_factor", "multivariate", "multivariate sums", "seasonal", "seasonal waves", "uneven")


def potential(model, y, z=None, **options):
    """Minus the log joint density at a point of NumPyro's unconstrained space, and the point."""
    info = initialize_model(jax.random.key(0), model, model_args=(y,), model_kwargs=options)
    if z is None:
        rng = np.random.default_rng(1)
        sizes = sorted(info.param_info.z.items())
        z = {n: jnp.asarray(0.5 * rng.normal(size=np.shape(x)), x.dtype) for n, x in sizes}
    return float(jax.jit(info.potential_fn)(z)), z


def cases():
    for states in ("marginal", "sampled"):
        for name in (*WITH_U, *WITHOUT):
            slow = name in SLOW or states == "sampled"
            yield pytest.param(name, states, id=f"{name}-{states}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("name", "states"), list(cases()))
def test_the_density_has_no_units_in_the_samplers_space(name, states):
    """At the same point: equal, up to the Jacobian of the data's units. In float32, from 64-bit data."""
    model, y = (WITH_U | WITHOUT)[name]
    has_u, seen = name in WITH_U, np.isfinite(y).sum()
    options = {"states": states} | ({"u": U} if has_u else {})
    before, z = potential(model, y, **options)
    scales = [1e-9, 1e13] if y.ndim == 1 else [1e-9, 1e13, UNITS]
    for unit in scales:
        jacobian = seen * np.log(unit) if np.ndim(unit) == 0 else (np.isfinite(y).sum(0) * np.log(unit)).sum()
        assert potential(model, unit * y, z, **options)[0] - jacobian == pytest.approx(before, rel=2e-5)
    # From 1e7 a location has another name; the points are drawn in the order of the names, which stays.
    assert potential(model, y + 1e7, **options)[0] == pytest.approx(before, rel=2e-5)
    if has_u:
        for moved in (U + 2000.0, 1e5 * U - 3e7):
            assert potential(model, y, z, **(options | {"u": moved}))[0] == pytest.approx(before, rel=2e-5)


def test_volatility_has_no_units():
    returns = 0.01 * RNG.normal(size=STEPS)
    before, z = potential(models.stochastic_volatility, returns)
    after = potential(models.stochastic_volatility, 1e6 * returns, z)[0]
    assert after - STEPS * np.log(1e6) == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("precise", [False, True])
def test_chains_start_near_the_data_whatever_their_units(precise):
    with jax.enable_x64(precise):
        for unit in (1e-9, 1.0, 1e13):
            info = initialize_model(jax.random.key(0), models.local_level, model_args=(unit * Y,))
            start = {n: float(x) for n, x in info.postprocess_fn(info.param_info.z).items()}
            assert all(0.1 < x / (unit * np.nanstd(Y)) < 10 for x in start.values()), start


# ---------------------------------------------------------------------------------------- regressors and forecasts


def draws_of(model, y, **options):
    """Two draws of the parameters from the prior, as a chain."""
    traces = [handlers.trace(handlers.seed(model, k)).get_trace(y, **options) for k in (0, 1)]
    sites = [n for n, s in traces[0].items() if s["type"] == "sample" and not s["is_observed"]]
    return {n: jnp.stack([t[n]["value"] for t in traces])[None] for n in sites}


@pytest.mark.parametrize("name", ["local_level", "lds"])
def test_forecasts_do_not_see_where_the_zero_of_regressors_lies(name):
    """The model runs again with longer inputs: what they count from is that of the fit."""
    model, y = WITH_U[name]
    draws = draws_of(model, y, u=U)
    future = np.array([[0.3, 30.0], [0.1, 40.0], [-1.0, 50.0]])
    found = [infer.forecast(model, draws, 3, y, u=U + zero, u_future=future + zero, key=1) for zero in (0.0, 2000.0)]
    scale = np.abs(found[0].mean).max()
    np.testing.assert_allclose(found[1].mean, found[0].mean, atol=1e-4 * scale)
    np.testing.assert_allclose(found[1].draws, found[0].draws, atol=1e-4 * scale)
    early = [
        infer.forecast(model, draws, 3, y, u=U + zero, u_future=U[15:18] + zero, origin=15, key=1)
        for zero in (0.0, 2000.0)
    ]
    np.testing.assert_allclose(early[1].mean, early[0].mean, atol=1e-4 * np.abs(early[0].mean).max())
    states = [infer.smoothed_states(model, draws, y, u=U + zero) for zero in (0.0, 2000.0)]
    np.testing.assert_allclose(states[1].signal.mean, states[0].signal.mean, atol=1e-4 * scale)


def test_the_level_is_that_at_the_first_regressors(x64):
    """`y = level + beta (u - u_1)`: rows that are appended do not move it."""
    beta = {"beta": jnp.array([0.7, -0.2]), "sigma_level": jnp.asarray(0.5), "sigma_obs": jnp.asarray(1.0)}
    longer = np.concatenate([U, 100 + U[:5]])
    for u, y in ((U, Y), (longer, np.append(Y, np.full(5, np.nan)))):
        trace = handlers.trace(handlers.substitute(handlers.seed(models.local_level, 0), beta)).get_trace(y, u=u)
        fn = trace["y"]["fn"]
        np.testing.assert_allclose(fn.u_origin, U[0])
        np.testing.assert_allclose(fn.u, u - U[0])
        plain = LinearGaussianMarginal(fn.ssm.replace(D=None), len(y)).log_prob(
            (y - (u - U[0]) @ beta["beta"])[:, None]
        )
        assert float(fn.log_prob(trace["y"]["value"])) == pytest.approx(float(plain), abs=1e-9)


def test_lds_values_count_inputs_as_the_model_does(x64):
    """A system for inputs as they are, and the model's for those from their first row, score alike."""
    u = U[:, :1] + 300.0
    ssm = models.lds_start(Y3, 2, u=u, num_iters=3)
    assert ssm.b is not None
    with pytest.raises(ValueError, match="`u` is needed"):
        models.lds_values(ssm)
    values = models.lds_values(ssm, u)
    model = handlers.substitute(partial(models.lds, Y3, num_states=2, u=u), data=values)
    fn = handlers.trace(model).get_trace()["y"]["fn"]
    assert float(fn.log_prob(Y3)) == pytest.approx(float(pssm.log_likelihood(ssm, Y3, u)), abs=1e-5)


@pytest.mark.slow
def test_the_effect_of_a_calendar_year_is_found():
    """As published for no model: `beta` was 0.03 +- 0.05 for a true 0.80 when the level began at `y_1`."""
    rng = np.random.default_rng(3)
    year = np.arange(1960.0, 2020.0)
    kelvin = 280 + 5 * rng.normal(size=60)
    y = 0.8 * year - 2.0 * kelvin + rng.normal(size=60)
    fit = infer.fit_nuts(
        models.structural, y, u=np.column_stack([year, kelvin]), level=False, ar=1, num_warmup=400, num_samples=400,
        num_chains=2, progress_bar=False,
    )  # fmt: skip
    beta = np.asarray(fit.get_samples()["beta"])
    np.testing.assert_array_less(np.abs(beta.mean(0) - [0.8, -2.0]), 4 * beta.std(0))
    assert beta.std(0).max() < 0.1


# --------------------------------------------------------------------------------- offsets that 32 bits cannot hold

HEIGHT = 1e7
MILLIMETRES = 0.003 * Y


def test_what_counts_from_an_origin_keeps_its_digits():
    fn = FromOrigin(dist.Normal(0.0, 0.01), np.array(HEIGHT))
    value = HEIGHT + np.array([0.004, -0.01, np.nan])
    wanted = np.append(stats.norm.logpdf(value[:2] - HEIGHT, scale=0.01), 0.0)
    np.testing.assert_allclose(fn.log_prob(value), wanted, rtol=1e-5)
    one = jnp.eye(1)
    ssm = LinearGaussianSSM([0.0], one, one, 0.01 * one, one, 0.01 * one)
    marginal = LinearGaussianMarginal(ssm, STEPS, origin=np.array([HEIGHT]), state_origin=np.array([HEIGHT]))
    plain = LinearGaussianMarginal(ssm, STEPS).log_prob(MILLIMETRES[:, None])
    assert float(marginal.log_prob(HEIGHT + MILLIMETRES[:, None])) == pytest.approx(float(plain), rel=1e-5)
    assert float(marginal.forecast(HEIGHT + MILLIMETRES[:, None], 1).mean[0, 0]) == pytest.approx(HEIGHT, abs=2.0)
    assert float(marginal.smooth(HEIGHT + MILLIMETRES[:, None]).mean[0, 0]) == pytest.approx(HEIGHT, abs=2.0)
    assert float(marginal.sample(jax.random.key(0)).mean()) == pytest.approx(HEIGHT, abs=2.0)


@pytest.mark.parametrize("name", ["local_level", pytest.param("autoregression", marks=pytest.mark.slow)])
def test_heights_come_back_in_the_users_units(name):
    """States, forecast, `mean` and data of the tree, next to those of the data without the offset."""
    model, trees = WITH_U[name][0], []
    for zero in (0.0, HEIGHT):
        mcmc = MCMC(NUTS(model), num_warmup=50, num_samples=20, progress_bar=False)  # NumPyro's own keeps NumPy arrays
        mcmc.run(jax.random.key(0), MILLIMETRES + zero)
        trees.append(to_datatree(mcmc, states=True, forecast=2))
    near, far = trees
    assert not far["sample_stats"]["diverging"].values.any()
    spread = np.nanstd(MILLIMETRES)
    for group, names in (
        ("forecast", ("mean", "q05")),
        ("smoothed_states", ("signal_mean",)),
        ("observed_data", ("y",)),
    ):
        for n in names:
            apart = far[group][n].values.astype(float) - HEIGHT - near[group][n].values
            assert np.nanmax(np.abs(apart)) < spread, (group, n)
    assert 0.2 < float(far["posterior"]["sigma_" + ("obs" if name == "local_level" else "ar")].mean()) / spread < 5
    if name == "local_level":
        assert np.abs(far["smoothed_states"]["mean"].values - HEIGHT).max() < 10 * spread
    else:
        mean = far["posterior"]["mean"].values
        np.testing.assert_allclose(mean - far["posterior"]["mean_above"].values, HEIGHT + MILLIMETRES[0], atol=1e-6)
        assert np.abs(mean - HEIGHT).max() < 20 * spread


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # few draws and steps
def test_a_study_of_heights_is_that_of_their_differences():
    options = dict(num_warmup=200, num_samples=200, num_chains=2, svi_steps=500, horizon=2, progress=False)
    near, far = (
        pssm.compare("local_level", MILLIMETRES + zero, ["nuts", "svi:mvn"], **options) for zero in (0.0, HEIGHT)
    )
    for method, result in far.results.items():
        assert result.status == "done"
        assert "No " not in result.note, result.note
        other = near.results[method]
        apart = result.diagnostics["elpd_lfo"] - other.diagnostics["elpd_lfo"]
        assert abs(apart) < 1.0
        ahead = result.tree["forecast"]["mean"].values.astype(float) - HEIGHT
        np.testing.assert_allclose(ahead, other.tree["forecast"]["mean"].values, atol=np.nanstd(MILLIMETRES))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:1 of 200 transitions diverged")  # which draws do depends on the machine
def test_leaving_out_the_future_of_heights_scores_their_differences():
    scores = []
    for zero in (0.0, HEIGHT):
        fit = infer.fit_nuts(
            models.local_level, MILLIMETRES + zero, num_warmup=100, num_samples=100, num_chains=2, progress_bar=False
        )
        scores.append(leave_future_out(fit, min_observations=20).elpd)
    assert abs(scores[1] - scores[0]) < 1.0


def own(y):
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    pssm.observe("y", dist.Normal(0.0, sigma).expand([len(y)]).to_event(1), y)


def test_fits_say_what_they_cannot_hold_or_learn():
    few = dict(num_warmup=1, num_samples=1, num_chains=1, progress_bar=False)
    for words, run in (
        ("jax_enable_x64", lambda: infer.fit_nuts(own, HEIGHT + MILLIMETRES, **few)),
        ("jax_enable_x64", lambda: infer.fit_svi(own, HEIGHT + MILLIMETRES, num_steps=10, progress_bar=False)),
        ("no observed value", lambda: infer.fit_nuts(models.local_level, np.full(9, np.nan), **few)),
        ("", lambda: infer.fit_nuts(partial(models.local_level), HEIGHT + MILLIMETRES, **few)),
    ):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run()
        texts = [str(w.message) for w in said]
        assert not words or any(words in text for text in texts), texts
        assert words or not any("jax_enable_x64" in text for text in texts)


# ---------------------------------------------------------------------------------------------------- short, constant

THIRDS = np.full(STEPS, 0.1 + 0.2)
THIRDS[::2] = 0.3  # differs in the last bit
FLAT = {
    "constant": (np.full(STEPS, 7.0), "one constant value", 7.0),
    "constant, large": (np.full(STEPS, -3e12), "one constant value", 3e12),
    "zero": (np.zeros(STEPS), "one constant value", 1.0),
    "constant up to rounding": (THIRDS, "one constant value", 0.3),
    "float32 up to rounding": (np.float32(1) + np.float32([0, 1.2e-7] * 12), "one constant value", 1.0),
    "one value": (np.array([5.0]), "one observed value", 5.0),
    "all missing but one": (np.where(np.arange(STEPS) == 4, 2.0, np.nan), "one observed value", 2.0),
    "one column": (np.column_stack([Y, np.full(STEPS, 4.0)]), r"Columns \[1\] of `y` with one constant", 4.0),
}


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("precise", [False, True])
def test_series_without_spread_have_a_sensible_scale_and_a_word(name, precise):
    y, words, scale = FLAT[name]
    several = y.ndim == 2
    those = [partial(models.lds, num_states=1), models.dynamic_factor] if several else [
        models.local_level, models.autoregression, models.local_linear_trend,
    ]  # fmt: skip
    with jax.enable_x64(precise):
        for model in those:
            with pytest.warns(UserWarning, match=words):
                trace = handlers.trace(handlers.seed(model, 0)).get_trace(y)
            total = sum(float(jnp.sum(s["fn"].log_prob(s["value"]))) for s in trace.values() if s["type"] == "sample")
            assert np.isfinite(total)
            if not several:
                prior = trace["sigma_ar" if "sigma_ar" in trace else "sigma_level"]["fn"]
                assert float(prior.scale) == pytest.approx(scale, rel=1e-6)


SHORT = {
    "seasonal": partial(models.seasonal, period=7),
    "autoregression": partial(models.autoregression, order=5),
    "structural": partial(models.structural, trend=True, seasonal=12),
}


@pytest.mark.parametrize("name", SHORT)
def test_series_shorter_than_the_state_are_named_and_scored(name):
    y = np.array([1.0, 3.0, np.nan, 2.0])
    with pytest.warns(UserWarning, match="3 observed values, and the model . states"):
        trace = handlers.trace(handlers.seed(SHORT[name], 0)).get_trace(y)
    assert np.isfinite(trace["y"]["fn"].log_prob(trace["y"]["value"]))


def test_a_scale_that_is_given_needs_no_word():
    handlers.trace(handlers.seed(models.local_level, 0)).get_trace(np.full(9, 7.0), scale=2.0)


def test_series_too_short_for_a_transition_are_named():
    with pytest.raises(ValueError, match="at least 2 steps"):
        fit_em(np.ones((1, 1)), 1)


# ----------------------------------------------------------------------------------------------------- distributions


def test_priors_in_units_are_numpyros(x64):
    values = jnp.array([0.3, 2.0, 40.0])
    pairs = [
        (Normal(1.0, 3.0, centre=5.0, unit=0.1), dist.Normal(1.0, 3.0)),
        (HalfNormal(3.0, unit=7.0), dist.HalfNormal(3.0)),
        (InverseGamma(2.5, 3.0), dist.InverseGamma(2.5, 3.0)),
    ]
    for mine, theirs in pairs:
        np.testing.assert_allclose(mine.log_prob(values), theirs.log_prob(values), rtol=1e-12)
        key = jax.random.key(0)
        np.testing.assert_array_equal(mine.sample(key, (3,)), theirs.sample(key, (3,)))
        leaves, treedef = jax.tree.flatten(mine)
        again = jax.tree.unflatten(treedef, leaves)
        to = numpyro.distributions.biject_to(again.support)
        np.testing.assert_allclose(to._inverse(to(values)), values, rtol=1e-9)
        slope = jax.vmap(jax.grad(lambda x, to=to: to(x)))(values)
        np.testing.assert_allclose(to.log_abs_det_jacobian(values, to(values)), np.log(np.abs(slope)), rtol=1e-9)


def test_a_variance_of_1e26_has_a_density_in_32_bits():
    found = InverseGamma(jnp.asarray(2.0), 1e26).log_prob(jnp.asarray(2e26))
    assert float(found) == pytest.approx(stats.invgamma.logpdf(2e26, 2.0, scale=1e26), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------- EM


def system():
    turn = 0.9 * np.array([[0.95, -0.3], [0.3, 0.95]])
    C = np.array([[1.0, 0.0], [0.5, 1.0], [-0.5, 1.0]])
    return LinearGaussianSSM(
        np.zeros(2), np.eye(2), turn, 0.5 * np.eye(2), C, 0.4 * np.eye(3), d=np.array([1.0, -2.0, 5.0])
    )


def data():
    with jax.enable_x64(True):
        y = np.array(pssm.simulate(jax.random.key(0), system(), 80)[1])
    y[3, 1] = np.nan
    return y


def in_units(ssm, unit, zero=0.0):
    return ssm.replace(C=ssm.C * unit[:, None], chol_R=ssm.chol_R * unit[:, None], d=(ssm.d + zero) * unit)


@pytest.mark.filterwarnings("ignore:`y` needs 64 bits")
@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("start", ["given", "found"])
def test_em_does_not_see_units_nor_offsets(start, precise):
    with jax.enable_x64(precise):
        y, options = data(), dict(diagonal=("R",), num_iters=25, tol=0.0)
        first = 2 if start == "found" else system().replace(A=0.5 * np.eye(2))
        right = fit_em(y, first, **options)
        for unit, zero in ((UNITS, 0.0), (np.array([1e-9, 1e13, 1.0]), 0.0), (np.ones(3), 1e7)):
            moved = first if start == "found" else in_units(first, unit, zero)
            found = fit_em((y + zero) * unit, moved, **options)
            jacobian = (np.isfinite(y).sum(0) * np.log(unit)).sum()
            assert found.log_likelihoods[-1] + jacobian == pytest.approx(right.log_likelihoods[-1], abs=0.1)
            signal = np.asarray(found.ssm.C) / unit[:, None]
            np.testing.assert_allclose(signal, right.ssm.C, atol=(1e-6 if precise else 0.05))


def test_em_with_priors_and_inputs_in_other_units(x64):
    """The prior moves with the units of data and inputs; log-likelihood and log prior are the user's."""
    y, u, unit = data(), np.sin(np.arange(80.0))[:, None], UNITS
    rng = np.random.default_rng(2)
    part = pssm.learning.MatrixNormalInverseWishart
    mean = rng.normal(size=(3, 4))
    emission = part(mean, [1.0, 1.0, 0.5, 0.1], [0.5, 0.6, 0.7], 5.0)
    scaled = part(mean * unit[:, None], [1.0, 1.0, 0.5, 0.1], np.array([0.5, 0.6, 0.7]) * unit**2, 5.0)
    first = system().replace(B=np.ones((2, 1)), D=np.ones((3, 1)))
    other = in_units(first, unit).replace(D=first.D * unit[:, None])
    options = dict(u=u, num_iters=10, tol=0.0)
    right = fit_em(y, first, prior=pssm.learning.Prior(emission=emission), **options)
    found = fit_em(y * unit, other, prior=pssm.learning.Prior(emission=scaled), **options)
    np.testing.assert_allclose(np.diff(found.log_joint), np.diff(right.log_joint), atol=1e-7)
    total = float(pssm.log_likelihood(found.ssm, y * unit, u))
    assert found.log_likelihoods[-1] == pytest.approx(total, abs=1e-6)
    np.testing.assert_allclose(found.ssm.D, np.asarray(right.ssm.D) * unit[:, None], rtol=1e-6)


def test_em_keeps_what_is_held_bit_by_bit_and_ties_units(x64):
    y, unit = data(), np.array([3e5, 1.7, 1.0 / 3])
    first = in_units(system(), unit)
    held = fit_em(y * unit, first, num_iters=2, fixed=("m0", "P0", "C", "d", "R"), tol=0.0).ssm
    for name in ("C", "d", "chol_R", "m0"):
        np.testing.assert_array_equal(getattr(held, name), getattr(first, name))
    alike = fit_em(y * unit, first, num_iters=2, isotropic=("R",), tol=0.0).ssm
    np.testing.assert_allclose(np.diag(alike.R), alike.R[0, 0], rtol=1e-12)


def test_em_counts_inputs_from_their_mean(x64):
    """A regression on a calendar year, with free offsets: the same fit, and the same effect."""
    rng = np.random.default_rng(4)
    u = np.arange(60.0)[:, None]
    y = 0.3 * u + rng.normal(size=(60, 1))
    one = np.eye(1)
    first = LinearGaussianSSM([0.0], one, 0.5 * one, one, one, one, d=[0.0], D=one)
    right = fit_em(y, first, u=u, num_iters=20, tol=0.0)
    found = fit_em(y, first.replace(d=np.array([-2000.0])), u=u + 2000.0, num_iters=20, tol=0.0)
    np.testing.assert_allclose(found.log_likelihoods, right.log_likelihoods, atol=1e-6)
    np.testing.assert_allclose(found.ssm.D, right.ssm.D, rtol=1e-7)


def stuck():
    y = data()
    y[30:, 2] = y[30, 2]
    return y


ODD = {
    "constant": (lambda: np.column_stack([data(), np.full(80, 3.0)]), "sensor 3 is constant"),
    "copy": (lambda: np.column_stack([data(), 2 * data()[:, 0] + 1]), "sensor 3 is a copy of sensor 0"),
    "opposite": (lambda: np.column_stack([data(), 1 - data()[:, 2]]), "sensor 3 is a copy of sensor 2"),
    "stuck": (stuck, "sensor 2 is stuck: 50 equal values"),
}


@pytest.mark.parametrize("name", ODD)
def test_em_names_sensors_without_noise(name):
    make, words = ODD[name]
    with pytest.warns(UserWarning, match=words):
        result = fit_em(make(), 2, diagonal=("R",), num_iters=20)
    assert np.isfinite(result.log_likelihoods).all()
    assert odd_sensors(data()) == []


@pytest.mark.parametrize("precise", [False, True])
def test_a_noise_of_zero_does_not_fail_em(precise):
    """Two states, seen without noise by as many sensors: the maximum lies at `R = 0`."""
    rng = np.random.default_rng(0)
    z = np.zeros((60, 2))
    for t in range(1, 60):
        z[t] = 0.9 * np.array([[0.95, -0.3], [0.3, 0.95]]) @ z[t - 1] + 0.3 * rng.normal(size=2)
    with jax.enable_x64(precise):
        start = LinearGaussianSSM(np.zeros(2), np.eye(2), 0.5 * np.eye(2), np.eye(2), np.eye(2), 0.01 * np.eye(2))
        result = fit_em(z, start, fixed=("m0", "P0", "C"), num_iters=300, tol=1e-9)
        assert np.isfinite(result.log_likelihoods).all()
        assert result.reason in ("converged", "floor", "num_iters")


def test_em_says_that_it_ended_early_or_far_away():
    y = data()
    with pytest.warns(UserWarning, match="`num_iters`: EM ended after 5 iterations before it converged"):
        fit_em(y, 2, num_iters=5)
    far = system().replace(A=-0.9 * np.eye(2), C=100 * system().C, d=np.array([50.0, -50.0, 0.0]))
    with pytest.warns(UserWarning, match="nats below where a start from the data is"):
        fit_em(y, far, diagonal=("R",), num_iters=30)
