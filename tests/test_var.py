"""`var`: statsmodels and a definition step by step; gaps, both precisions, both ways to deal with the states."""

from functools import partial

import jax
import jax.numpy as jnp
import linear_paths
import numpy as np
import pytest
import statsmodels.api as sm
from linear_paths import numbers, trace
from scipy.stats import multivariate_normal

from pssm import infer, models

MACRO = sm.datasets.macrodata.load_pandas().data
GROWTH = 100 * np.diff(np.log(MACRO[["realgdp", "realcons", "realinv"]].to_numpy()), axis=0)
GAPS = GROWTH[:40].copy()
GAPS[0, 0], GAPS[5, 1], GAPS[9], GAPS[30, 1:] = np.nan, np.nan, np.nan, np.nan
U = np.column_stack([np.cos(np.arange(40)), np.arange(40) / 10.0])


def latent(found):
    return {n: np.asarray(s["value"], float) for n, s in found.items() if s["type"] == "sample" and n != "y"}


@pytest.mark.filterwarnings("ignore:Estimation of VARMA")
@pytest.mark.parametrize(
    ("order", "ma_order", "trend", "k", "precise"),
    [(1, 0, "n", 1, True), (3, 0, "c", 3, True), (3, 0, "c", 3, False), (2, 1, "c", 2, True), (1, 2, "n", 2, True)],
)
def test_the_stationary_likelihood_is_that_of_statsmodels(order, ma_order, trend, k, precise):
    y = GAPS[:, :k]
    with jax.enable_x64(precise):
        options = dict(order=order, ma_order=ma_order, trend=trend, stationary=True)
        values = {n: 0.3 * x for n, x in latent(trace(models.var, y, **options)).items() if "partial" in n}
        found = trace(models.var, y, values | {"sigma": np.full(k, 1.5)}, **options)
        v, mine = numbers(found), linear_paths.log_likelihood(found, y)
    A, chol = v["coefficients"], np.linalg.cholesky(v["innovation_cov"])
    params = [] if trend == "n" else [(np.eye(k) - A.sum(0)) @ v["mean"]]
    params += [
        np.concatenate([*x], axis=1).ravel() for x in (A, v.get("ma_coefficients", np.zeros((0, k, k)))) if len(x)
    ]
    params += [chol[np.tril_indices(k)]]
    if k == 1:  # its VARMAX wants two series
        assert trend == "n"
        model = sm.tsa.SARIMAX(y[:, 0], order=(order, 0, ma_order))
        params[-1] = params[-1] ** 2
    else:
        model = sm.tsa.VARMAX(y, order=(order, ma_order), trend=trend)
    expected = model.loglike(np.concatenate(params), transformed=True)
    assert mine == pytest.approx(expected, abs=1e-6 + 1e-8 * abs(expected) if precise else 2e-5 * abs(expected) + 1e-3)


def definition(v, location, trend, u, steps):
    """The recursion as it is written, from free first values, `(order, obs)`."""
    A, chol = v["coefficients"], np.linalg.cholesky(v["innovation_cov"])
    p, k = A.shape[:2]

    def path(start, noise):
        e = noise.reshape(-1, k) @ chol.T
        y = e.copy()  # of the first rows too, which are free
        y[:p] += start.reshape(p, k)
        for t in range(p, steps):
            mean = v["drift"] + (v["slope"] * t if trend == "ct" else 0.0)
            mean = mean + (0.0 if u is None else v["B"] @ (u[t] - u[0]))
            y[t] = location + mean + sum(A[j] @ (y[t - 1 - j] - location) for j in range(p)) + e[t]
        return y

    return path, p * k, steps * k


@pytest.mark.parametrize(("order", "trend", "u"), [(1, "c", None), (2, "c", U), (3, "ct", None)])
def test_the_likelihood_is_that_of_the_definition_given_the_first_rows(order, trend, u, x64):
    """With gaps among the first rows and later ones, in single series and in all."""
    steps = 14
    y = GAPS[:steps, :2] + np.array([7.0, -2.0])
    u = None if u is None else u[:steps]
    options = dict(order=order, trend=trend, u=u, location=[7.5, -1.0], scale=[1.0, 2.0])
    found = trace(models.var, y, {"sigma": np.array([1.0, 1.5])}, **options)
    path = definition(numbers(found), np.array([7.5, -1.0]), trend, u, steps)
    expected = linear_paths.evidence(*path, y)
    assert linear_paths.log_likelihood(found, y) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("stationary", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_maxima_are_those_of_statsmodels(stationary):
    y = GROWTH[:, :2]
    fit = infer.fit_ml(partial(models.var, order=2, stationary=stationary), y, num_starts=2, progress_bar=False)
    if stationary:
        expected = sm.tsa.VARMAX(y, order=(2, 0), trend="c").fit(disp=0, maxiter=300).llf
    else:
        errors = np.asarray(sm.tsa.VAR(y).fit(2, trend="c").resid)
        expected = multivariate_normal(np.zeros(2), errors.T @ errors / len(errors)).logpdf(errors).sum()
    assert fit.log_likelihood == pytest.approx(expected, abs=1e-3)


def test_the_prior_is_litterman_s(x64):
    y = np.cumsum(GROWTH * np.array([1.0, 1e3, 1e-3]), axis=0)
    options = dict(order=3, tightness=0.3, cross=0.4, decay=2.0)
    prior = trace(models.var, y, **options)["coefficients"]["fn"].base_dist
    size = np.sqrt(np.mean(np.diff(y, axis=0) ** 2, axis=0))
    for j in range(3):
        for i in range(3):
            for k in range(3):
                own = i == k
                sd = 0.3 / (j + 1) ** 2 * (1.0 if own else 0.4) * size[i] / size[k]
                assert float(prior.scale[j, i, k]) == pytest.approx(sd)
                assert float(prior.loc[j, i, k]) == float(own and j == 0)
    sampled = trace(models.var, y, order=2, tightness=None, cross=None)
    v = numbers(sampled)
    width = np.asarray(sampled["coefficients"]["fn"].base_dist.scale)
    assert width[1, 0, 0] == pytest.approx(v["tightness"] / 2)
    assert width[0, 0, 1] == pytest.approx(v["tightness"] * v["cross"] * size[0] / size[1])


@pytest.mark.parametrize("options", [{}, {"stationary": True, "ma_order": 1}, {"trend": "ct", "u": U[:7]}], ids=str)
def test_states_that_are_sampled_have_the_same_density(options, x64):
    y = GAPS[:7, :2]
    model = partial(models.var, location=[0.5, 1.0], scale=[1.0, 2.0], **options)
    values = latent(trace(model, y))
    found, path = linear_paths.integrated(model, y, values)
    exact = trace(model, None, values, num_steps=7, num_obs=2)["y"]["fn"]
    assert found == pytest.approx(float(exact.log_prob(y)), abs=1e-7)
    np.testing.assert_allclose(path, exact.smooth(jnp.asarray(y)).mean, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": 0}, "`order` must be at least 1"),
        ({"ma_order": -1}, "`ma_order` must be at least 0"),
        ({"trend": "t"}, "`trend` must be one of 'n', 'c', 'ct'"),
        ({"tightness": -0.1}, "`tightness` must not be negative"),
        ({"num_obs": 5}, "`num_obs` is 5, but `y` has 3"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words):
        trace(models.var, GAPS, **options)
    with pytest.raises(ValueError, match="`y` must be one group of series"):
        trace(models.var, np.stack([GAPS, GAPS]))
