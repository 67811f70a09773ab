"""Sums and means over periods: the dense Gaussian of the steps, summed, is what the cumulator must give."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from scipy.stats import multivariate_normal

import pssm
from pssm import LinearGaussianSSM
from pssm.aggregation import places_in_periods

STEPS = 8


def system(seed=0, timed=(), inputs=False, offsets=True):
    """Two states, three series, the first two without noise where `R` says so."""
    rng = np.random.default_rng(seed)
    q = oracles.random_model(rng, n=2, p=3, m=1 if inputs else 0, offsets=offsets)
    q["chol_R"] = np.diag([0.0, 0.4, 0.3])
    q["time_varying"] = timed
    for name in timed:
        q[name] = q[name] + 0.2 * rng.normal(size=(STEPS, *np.shape(q[name])))
    return LinearGaussianSSM(**q)


def dense(ssm, how, every, start, u=None):
    """Mean and covariance `(time * obs)` of the figures, from those of the signals: sums by a matrix."""
    quiet = ssm.replace(chol_R=np.zeros((3, 3)))
    j = oracles.joint(quiet, STEPS, u)
    rows = np.concatenate([j.y(t) for t in range(STEPS)])
    S = np.zeros((STEPS * 3, STEPS * 3))
    for t in range(STEPS):
        for i in range(3):
            first = t
            if how.get(i) in ("sum", "mean"):
                while first > 0 and (start + first) % every != 0:
                    first -= 1
            weight = 1 / (t - first + 1) if how.get(i) == "mean" else 1.0
            for s in range(first, t + 1):
                S[3 * t + i, 3 * s + i] = weight
    R = np.kron(np.eye(STEPS), np.asarray(ssm.R))
    states = j.cov[: STEPS * 2, rows] @ S.T
    return j.mean, S @ j.mean[rows], S @ j.cov[np.ix_(rows, rows)] @ S.T + R, states, S


@pytest.mark.parametrize(
    ("timed", "inputs", "start"),
    [((), False, 0), ((), True, 2), (("C", "d", "A"), True, 1), (("chol_Q", "b", "D"), True, 0)],
    ids=["constant", "inputs", "timed", "noise"],
)
def test_likelihood_and_states_are_those_of_the_summed_gaussian(timed, inputs, start, x64):
    how = {0: "sum", 1: "mean", 2: "last"}
    rng = np.random.default_rng(1)
    ssm = system(0, timed, inputs)
    u = rng.normal(size=(STEPS, 1)) if inputs else None
    both = pssm.aggregate(ssm, STEPS, how, 3, start=start, u=u)
    assert both.n_state == 4
    prior, mean, cov, states, _ = dense(ssm, how, 3, start, u)
    y = rng.multivariate_normal(mean, cov).reshape(STEPS, 3)
    y[1, 0] = y[4, 1] = y[[0, 3], 2] = np.nan
    seen = ~np.isnan(y.ravel())
    wanted = multivariate_normal(mean[seen], cov[np.ix_(seen, seen)], allow_singular=True).logpdf(y.ravel()[seen])
    assert float(pssm.log_likelihood(both, y, u)) == pytest.approx(wanted, abs=1e-8)
    gain = np.linalg.solve(cov[np.ix_(seen, seen)], states[:, seen].T).T
    smoothed = pssm.kalman_smoother(both, y, u)
    wanted = prior[: STEPS * 2] + gain @ (y.ravel()[seen] - mean[seen])
    np.testing.assert_allclose(smoothed.mean[:, :2].ravel(), wanted, atol=1e-8)
    # The figures of the smoothed signal are the observed ones where there is no noise.
    signal = ssm.signal(smoothed.mean[:, :2], u)
    for t in np.flatnonzero(~np.isnan(y[:, 0])):
        first = max([0, *(s for s in range(t + 1) if (start + s) % 3 == 0)])
        assert float(signal[first : t + 1, 0].sum()) == pytest.approx(y[t, 0], abs=1e-8)


def test_labels_and_columns_of_their_own(x64):
    """Months of weeks: periods of unequal length; one column by quarters, another by labels."""
    ssm = system(3)
    labels = np.array(["jan"] * 2 + ["feb"] * 4 + ["mar"] * 3)
    both = pssm.aggregate(ssm, STEPS, ["sum", "sum", None], {0: 2, 1: labels})
    y = np.full((STEPS, 3), np.nan)
    y[1::2, 0], y[[1, 5], 1], y[:, 2] = 3.0, [1.0, 4.0], 0.5
    smoothed = pssm.kalman_smoother(both, y)
    signal = np.asarray(ssm.signal(smoothed.mean[:, :2]))
    np.testing.assert_allclose(signal[:, 0].reshape(4, 2).sum(1), 3.0, atol=1e-8)
    cumulated = np.asarray(smoothed.mean[:, 3] + signal[:, 1] - ssm.d[1])  # the steps before, and this one
    months = [signal[a:b, 1].sum() for a, b in ((0, 2), (2, 6), (6, 8))]
    np.testing.assert_allclose(cumulated[[1, 5, 7]], months, atol=1e-8)
    np.testing.assert_array_equal(places_in_periods(labels, STEPS), [0, 1, 0, 1, 2, 3, 0, 1])
    np.testing.assert_array_equal(places_in_periods(3, 5, 2), [0, 0, 1, 2, 0])


def test_forecast_of_the_next_total(x64):
    """The total of a period that is half there: what is known of it, and what is not."""
    how, ssm = {0: "sum"}, system(4)
    both = pssm.aggregate(ssm, STEPS, how, 4)
    _, mean, cov, _, _ = dense(ssm, how, 4, 0)
    y = np.random.default_rng(0).normal(size=(6, 3))
    y[[0, 1, 2, 4, 5], 0] = np.nan
    past = np.flatnonzero(np.append(~np.isnan(y.ravel()), np.zeros(6, bool)))
    gain = np.linalg.solve(cov[np.ix_(past, past)], cov[past, 21])
    found = pssm.forecast(both, y, 2)
    assert float(found.mean[1, 0]) == pytest.approx(mean[21] + gain @ (y.ravel()[past] - mean[past]), abs=1e-8)
    assert float(found.cov[1, 0, 0]) == pytest.approx(cov[21, 21] - gain @ cov[past, 21], abs=1e-8)


def test_batches_jit_gradients_and_single_precision():
    base = system(5)
    u = None

    def score(scale, y):
        ssm = base.replace(chol_Q=scale * base.chol_Q)
        return pssm.log_likelihood(pssm.aggregate(ssm, STEPS, {0: "sum"}, 3, u=u), y)

    y = np.random.default_rng(0).normal(size=(STEPS, 3))
    y[[0, 1, 3, 4, 6, 7], 0] = np.nan
    found = {}
    for wide in (False, True):
        with jax.enable_x64(wide):
            base = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.result_type(float)), base)
            found[wide] = jax.jit(jax.value_and_grad(score))(jnp.asarray(1.3), jnp.asarray(y))
            many = jax.vmap(score, (0, None))(jnp.array([0.7, 1.3]), jnp.asarray(y))
            batch = base.replace(chol_Q=jnp.array([0.7, 1.3])[:, None, None] * base.chol_Q, m0=jnp.stack([base.m0] * 2))
            side = pssm.log_likelihood(pssm.aggregate(batch, STEPS, {0: "sum"}, 3), jnp.asarray(y))
            tight = dict(rtol=1e-10) if wide else dict(rtol=2e-5)
            np.testing.assert_allclose(many, side, **tight)
            np.testing.assert_allclose(many[1], found[wide][0], **tight)
    np.testing.assert_allclose(found[False], found[True], rtol=2e-4)
    with jax.enable_x64(True):
        h = 1e-6
        slope = (score(1.3 + h, jnp.asarray(y)) - score(1.3 - h, jnp.asarray(y))) / (2 * h)
        assert float(found[True][1]) == pytest.approx(float(slope), rel=1e-6)


ONE = np.eye(3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(how={3: "sum"}), "`how` must name columns from 0 to 2; got 3"),
        (dict(how={0: "total"}), "`how` must be one of 'sum'"),
        (dict(how=["sum"]), "one entry for each of 3 columns"),
        (dict(every=0), "`every` must be at least 1"),
        (dict(every=np.arange(3)), "`every` must have a label for each of 8 steps"),
        (dict(every={1: 3}), "`every` must have an entry for column 0"),
        (dict(start=3), "`start` must be from 0 to 2"),
        (dict(every=np.arange(9), start=1), "`start` goes with a number of steps"),
        (dict(inputs=True), "`u` is needed"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_does_not_fit_is_named(change, words):
    options = dict(how={0: "sum"}, every=3, start=0, inputs=False) | change
    ssm = system(inputs=options.pop("inputs"))
    with pytest.raises(ValueError, match=words):
        pssm.aggregate(ssm, STEPS, options.pop("how"), options.pop("every"), **options)


def test_nothing_to_sum_is_the_same_model():
    ssm = system()
    assert pssm.aggregate(ssm, STEPS, {0: "last"}, 3) is ssm


def test_diffuse_starts(x64):
    """A quarterly total alone, of a monthly trend with a diffuse start."""
    A = np.array([[1.0, 1.0], [0.0, 1.0]])
    trend = LinearGaussianSSM(
        np.zeros(2), np.zeros((2, 2)), A, np.diag([0.5, 0.1]), np.eye(1, 2), np.eye(1), diffuse=[True, True]
    )
    y = np.full((24, 1), np.nan)
    y[2::3, 0] = 3 * np.random.default_rng(0).normal(size=8).cumsum()
    total = pssm.aggregate(trend, 24, {0: "sum"}, 3)
    assert total.diffuse == (True, True, False)
    wide = trend.replace(chol_P0=1e6 * np.eye(2), diffuse=None)
    limit = pssm.log_likelihood(pssm.aggregate(wide, 24, {0: "sum"}, 3), y) + np.log(2 * np.pi * 1e12)
    np.testing.assert_allclose(pssm.log_likelihood(total, y), limit, atol=1e-4)
    np.testing.assert_allclose(pssm.log_likelihood(total, y), oracles.diffuse(total, y)[0], rtol=1e-9)
