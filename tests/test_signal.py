"""What follows from a fit, for every field that may vary in time, with inputs, gaps and two series: the dense Gaussian.

The fit's parameter moves nothing, so that a mixture over its draws is the exact answer for one model.
"""

import functools

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from numpyro.infer import MCMC, NUTS
from scipy.stats import multivariate_normal

from pssm import LinearGaussianSSM, infer
from pssm.diagnostics import to_datatree
from pssm.distributions import LinearGaussianMarginal, LinearGaussianPosterior
from pssm.fields import TIME_VARYING

STEPS, AHEAD, COUNT = 6, 3, 400
DRAWS = {"s": np.zeros((1, COUNT))}
ROWS = [(name,) for name in TIME_VARYING] + [TIME_VARYING]
rows = pytest.mark.parametrize("timed", ROWS, ids=[*TIME_VARYING, "all at once"])


@functools.cache
def case(timed):
    """A model of all steps and its past, a series with gaps, and inputs."""
    rng = np.random.default_rng(4)
    q = oracles.random_model(rng, n=2, p=2, m=1, steps=STEPS + AHEAD, timed=timed, offsets=True)
    y, u = rng.normal(size=(STEPS, 2)), rng.normal(size=(STEPS + AHEAD, 1))
    y[1, 0] = y[3] = np.nan
    return LinearGaussianSSM(**q), y, u


def user_model(y, timed):
    """A user's model; its time-varying arrays cover the steps of a forecast too."""
    ssm, _, u = case(timed)
    numpyro.sample("s", dist.Normal(0.0, 1.0))
    numpyro.sample("y", LinearGaussianMarginal(ssm, STEPS, u[:STEPS]), obs=y)


@functools.cache
def dense(timed):
    """The joint of all steps, and the indices and values of what was seen."""
    ssm, y, u = case(timed)
    j = oracles.joint(ssm, STEPS + AHEAD, u)
    return j, *oracles.seen(j, np.concatenate([y, np.full((AHEAD, 2), np.nan)]), STEPS)


def signal_moments(timed):
    """Mean and standard deviation of `C z + d + D u` given the data, from the dense posterior of the states."""
    ssm, _, u = case(timed)
    j, index, values = dense(timed)
    q, _ = oracles.parameters(ssm)
    means, sds = [], []
    for t in range(STEPS):
        C, d, D = (q[name][t] if name in timed else q[name] for name in ("C", "d", "D"))
        mean, cov = oracles.condition(j, j.z(t), index, values)
        means.append(C @ mean + d + D @ u[t])
        sds.append(np.sqrt(np.diag(C @ cov @ C.T)))
    return np.stack(means), np.stack(sds)


def check(found, expected):
    """A mean and a standard deviation with each row's mean and covariance."""
    means, covs = zip(*expected, strict=True)
    np.testing.assert_allclose(found[0], np.stack(means), atol=1e-10)
    np.testing.assert_allclose(found[1], np.sqrt([np.diag(cov) for cov in covs]), atol=1e-8)


def expected_signals(timed):
    """Moments of `C z + d + D u` given the data, from the dense posterior of the states."""
    ssm, _, u = case(timed)
    j, *given = dense(timed)
    q, _ = oracles.parameters(ssm)
    for t in range(STEPS):
        C, d, D = (q[name][t] if name in timed else q[name] for name in ("C", "d", "D"))
        mean, cov = oracles.condition(j, j.z(t), *given)
        yield C @ mean + d + D @ u[t], C @ cov @ C.T


@pytest.fixture(scope="module")
def fit():
    """Draws of the parameter alone."""
    with jax.enable_x64(True):
        mcmc = MCMC(NUTS(lambda y, timed: numpyro.sample("s", dist.Normal(0.0, 1.0))), num_warmup=5, num_samples=3)
        mcmc.run(jax.random.key(0), case(("D",))[1], ())
    return mcmc


@rows
def test_tree_with_smoothed_states_and_forecast(timed, fit, x64):
    _, y, u = case(timed)
    j, *given = dense(timed)
    fit._args = y, timed
    tree = to_datatree(fit, model=user_model, states=True, forecast=AHEAD, u_future=u[STEPS:])
    found = tree["smoothed_states"]
    check((found["mean"], found["sd"]), [oracles.condition(j, j.z(t), *given) for t in range(STEPS)])
    check((found["signal_mean"], found["signal_sd"]), expected_signals(timed))
    found = tree["forecast"]
    check((found["mean"], found["sd"]), [oracles.condition(j, j.y(t), *given) for t in range(STEPS, STEPS + AHEAD)])
    pointwise = oracles.log_likelihoods(case(timed)[0].steps(0, STEPS), y, u)
    seen = ~np.isnan(y).all(1)
    np.testing.assert_allclose(tree["log_likelihood"]["y"][0, 0], pointwise[seen], atol=1e-10)


@rows
def test_one_step_probabilities_and_their_coverage(timed, x64):
    _, y, u = case(timed)
    j = dense(timed)[0]
    found = infer.one_step_probabilities(user_model, DRAWS, y, timed, most=2)
    expected = np.full_like(y, np.nan)
    for t in range(STEPS):
        mean, cov = oracles.condition(j, j.y(t), *oracles.seen(j, y, t))
        expected[t] = jax.scipy.stats.norm.cdf(y[t], mean, np.sqrt(np.diag(cov)))
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert np.mean(np.abs(found - 0.5) < 0.45) == np.mean(np.abs(expected - 0.5) < 0.45)


@rows
def test_sampled_states(timed, x64):
    j, *given = dense(timed)
    found = infer.sample_states(0, user_model, DRAWS, case(timed)[1], timed).reshape(COUNT, -1)
    mean, cov = oracles.condition(j, np.arange(2 * STEPS), *given)
    moments(found, mean, cov)


def moments(draws, mean, cov):
    """Mean and covariance of draws within five standard errors."""
    sd = np.sqrt(np.diag(cov))
    assert np.abs((draws.mean(0) - mean) / sd).max() < 5 / np.sqrt(len(draws))
    assert np.abs((np.cov(draws.T) - cov) / np.outer(sd, sd)).max() < 7 / np.sqrt(len(draws))


def test_draws_of_a_forecast(x64):
    """Whole future paths, inputs as one column too."""
    _, y, u = case(TIME_VARYING)
    j, *given = dense(TIME_VARYING)
    arguments = user_model, DRAWS, AHEAD, y, TIME_VARYING
    found = infer.forecast(*arguments, u_future=u[STEPS:, 0])
    index = np.concatenate([j.y(t) for t in range(STEPS, STEPS + AHEAD)])
    moments(found.draws.reshape(COUNT, -1), *oracles.condition(j, index, *given))
    with pytest.raises(ValueError, match="`u_future` must have shape"):
        infer.forecast(*arguments, u_future=u[STEPS + 1 :])


def test_a_forecast_may_be_shorter_than_the_arrays(x64):
    ssm, y, u = case(TIME_VARYING)
    marginal = LinearGaussianMarginal(ssm, STEPS, u[:STEPS])
    found = marginal.forecast(y, 1, u[STEPS : STEPS + 1])
    for a, b in zip(found, oracles.forecast(ssm, y, 1, u), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-10)
    np.testing.assert_allclose(marginal.mean, oracles.joint(ssm, STEPS, u).mean[2 * STEPS :].reshape(STEPS, 2))
    np.testing.assert_allclose(marginal.log_prob(y), oracles.log_likelihood(ssm.steps(0, STEPS), y, u), rtol=1e-10)
    with pytest.raises(ValueError, match="must have at least 10 time steps, as `num_steps` has; got 9"):
        LinearGaussianMarginal(ssm, 10, np.zeros((10, 1)))


@pytest.mark.parametrize("batched", ["nothing", "model", "path", "inputs", "everything"])
@rows
def test_signal_of_batches(timed, batched, x64):
    """Every combination of a time axis and batch axes, entry by entry."""
    rng = np.random.default_rng(1)
    q = oracles.random_model(rng, n=2, p=3, m=2, steps=4, timed=timed, offsets=True)
    ssm = LinearGaussianSSM(**q)
    lead = (5,) if batched in ("model", "everything") else ()
    if lead:
        ssm = ssm.replace(**{name: rng.normal(size=(5, *np.shape(q[name]))) for name in ("C", "d", "D")})
    z = rng.normal(size=(*((5,) if batched in ("path", "everything") else ()), 4, 2))
    u = rng.normal(size=(*((5,) if batched in ("inputs", "everything") else ()), 4, 2))
    found = ssm.signal(z, u)
    assert found.shape == (*(() if batched == "nothing" else (5,)), 4, 3)
    for i, row in enumerate(np.reshape(found, (-1, 4, 3))):
        for t in range(4):
            C, d, D = (np.asarray(getattr(ssm, name)) for name in ("C", "d", "D"))
            C, d, D = (x[i] if lead else x for x in (C, d, D))
            C, d, D = (x[t] if name in timed else x for name, x in (("C", C), ("d", d), ("D", D)))
            own_z, own_u = (x[i] if x.ndim == 3 else x for x in (z, u))
            np.testing.assert_allclose(row[t], C @ own_z[t] + d + D @ own_u[t], atol=1e-12)


def test_signal_names_what_does_not_fit():
    ssm = LinearGaussianSSM(**oracles.random_model(np.random.default_rng(0), m=1, steps=4, timed=("D",), offsets=True))
    z = np.zeros((4, 3))
    for arguments, message in (
        ((z,), "`u` is required, of shape \\(4, 1\\)"),
        ((z, np.zeros((3, 1))), "`u` must have shape \\(4, 1\\) \\(time, input\\); got \\(3, 1\\)"),
        ((z[:3], np.zeros((3, 1))), "must have 3 time steps, as `z` has; got 4"),
        ((z[0], np.zeros((4, 1))), "`z` must have shape"),
        ((z[:, :2], np.zeros((4, 1))), "`z` must have shape \\(4, 3\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            ssm.signal(*arguments)


@rows
def test_posterior_of_paths(timed, x64):
    """`log p(z | y)` by Bayes' rule, the emission in it."""
    ssm, y, u = case(timed)
    past, u = ssm.steps(0, STEPS), u[:STEPS]
    j, *given = dense(timed)
    z = np.random.default_rng(2).normal(size=(STEPS, 2))
    mean, cov = oracles.condition(j, np.arange(2 * STEPS), *given)
    expected = multivariate_normal(mean, cov).logpdf(z.ravel())
    np.testing.assert_allclose(jax.jit(LinearGaussianPosterior(past, y, u).log_prob)(z), expected, rtol=1e-8)
