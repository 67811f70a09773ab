"""Situations of observed sites: shapes, gaps in joint events, values that cannot be, masks, times, random keys."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Predictive
from numpyro.infer.util import log_density
from scipy import stats
from situations import Fresh, Situation, cases, check

import pssm
from pssm import LinearGaussianSSM, NonlinearSSM, observe, sde
from pssm.distributions import GaussianFilterMarginal, LinearGaussianMarginal, StatePath, WithMissing
from pssm.linalg import factor_from_covariance

NAN = np.nan
ONE = np.eye(1)


def score(family):
    """The log density of `observe` under `family()`, as a function of the data."""

    def run(y):
        return log_density(lambda: observe("y", family(), y), (), {}, {})[0]

    return run


def in_plates(family, *plates):
    """The same inside plates `(name, size, dim)`."""

    def run(y):
        def model():
            frames = [numpyro.plate(name, size, dim=dim) for name, size, dim in plates]
            for frame in frames:
                frame.__enter__()
            observe("y", family(), y)
            for frame in reversed(frames):
                frame.__exit__(None, None, None)

        return log_density(model, (), {}, {})[0]

    return run


def normal(*shape):
    return dist.Normal(jnp.zeros(shape), 1.0)


def logpdf(*values, sd=1.0):
    return sum(stats.norm.logpdf(np.asarray(v, float), 0, sd).sum() for v in values)


ROOT = np.array([[1.0, 0, 0], [0.5, 0.8, 0], [-0.3, 0.2, 1.2]])
COV = ROOT @ ROOT.T
LOC = np.array([0.2, -0.1, 0.4])
GAP = np.array([0.3, NAN, 0.9])
SEEN = np.array([True, False, True])


def part(density, value=GAP, seen=SEEN, loc=LOC, cov=COV, **options):
    return density(value[seen], loc[seen], cov[np.ix_(seen, seen)], **options)


def normal_part(*args, **options):
    return part(stats.multivariate_normal.logpdf, *args, **options)


WIDE = np.array([[1.0], [0.5], [-0.7]])
TURN = np.array([[0.8, -0.3], [0.2, 0.7]])
NOISE = np.array([[0.5, 0.0], [0.2, 0.4]])
PATH_GAPS = np.array([[0.3, NAN], [NAN, NAN], [NAN, 0.2], [0.5, 0.1]])
J = Fresh(ONE=ONE, ROOT=ROOT, LOC=LOC, WIDE=WIDE, TURN=TURN, NOISE=NOISE)


def base():
    return dist.MultivariateNormal(J.LOC, scale_tril=J.ROOT)


def walk_cov(steps, scale=0.7):
    return scale**2 * np.minimum.outer(np.arange(1, steps + 1), np.arange(1, steps + 1))


def path_moments(A, P0, Q, steps):
    """Covariance of a linear path from zero, flattened."""
    n = len(A)
    rows = np.zeros((steps, n, steps, n))
    for s in range(steps):
        cov = P0 if s == 0 else A @ cov @ A.T + Q  # noqa: F821
        ahead = cov
        for t in range(s, steps):
            rows[t, :, s], rows[s, :, t] = ahead, ahead.T
            ahead = A @ ahead
    return rows.reshape(steps * n, steps * n)


def path_part(P0):
    value = PATH_GAPS.ravel()
    seen = ~np.isnan(value)
    cov = path_moments(TURN, P0, NOISE @ NOISE.T, 4)
    return normal_part(value, seen, np.zeros(8), cov)


def mixture_part():
    each = [normal_part(), normal_part(loc=LOC + 1)]
    return np.logaddexp(np.log(0.3) + each[0], np.log(0.7) + each[1])


def mixture():
    parts = dist.MultivariateNormal(jnp.stack([J.LOC, J.LOC + 1]), scale_tril=J.ROOT)
    return dist.MixtureSameFamily(dist.Categorical(jnp.array([0.3, 0.7])), parts)


def marginal(steps=4):
    ssm = LinearGaussianSSM(jnp.zeros(1), J.ONE, 0.9 * J.ONE, 0.5 * J.ONE, J.ONE, 0.3 * J.ONE)
    return LinearGaussianMarginal(ssm, steps)


def dense_series(y, steps=4):
    cov = path_moments(0.9 * ONE, ONE, 0.25 * ONE, steps) + 0.09 * np.eye(steps)
    seen = ~np.isnan(y)
    return stats.multivariate_normal.logpdf(y[seen], np.zeros(seen.sum()), cov[np.ix_(seen, seen)])


SERIES = np.array([0.4, NAN, -0.2, 0.7])
LAST = np.arange(5.0)
MASKED = np.ma.masked_array(np.where(np.arange(5) == 1, -999, LAST), np.arange(5) == 1)
UNMASKED = np.where(np.arange(5) == 1, NAN, LAST)


def walk(steps=20):
    return StatePath(jnp.zeros(1), J.ONE, J.ONE, J.ONE, steps)


def matern(t, y):
    return pssm.log_likelihood(sde.matern(1.0, 1.0).at(t, J.ONE), y)


def matern_dense():
    t, y = np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0])
    gap = np.sqrt(3) * np.abs(t[:, None] - t)
    return stats.multivariate_normal.logpdf(y, np.zeros(3), (1 + gap) * np.exp(-gap) + np.eye(3))


def filtered():
    return GaussianFilterMarginal(
        NonlinearSSM(jnp.zeros(1), J.ONE, lambda z, u: 0.9 * z, J.ONE, lambda z: dist.Poisson(jnp.exp(z)).to_event(1)),
        5,
    )


def drawn_in_a_plate():
    def model():
        with numpyro.plate("series", 3):
            numpyro.sample("y", filtered())

    return Predictive(model, num_samples=2)(jax.random.PRNGKey(0))["y"].shape[1:3]


def moving_readings(y):
    """One-step probabilities of a model whose `D` differs from step to step."""
    D = jnp.arange(4.0)[:, None, None]
    u = jnp.ones((4, 1))

    def model(y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        ssm = LinearGaussianSSM(
            jnp.zeros(1), J.ONE, J.ONE, 1e-6 * J.ONE, J.ONE, scale * J.ONE, D=D, time_varying=("D",)
        )
        numpyro.sample("y", LinearGaussianMarginal(ssm, 4, u), obs=y)

    return pssm.infer.one_step_probabilities(model, {"scale": np.ones((1, 1))}, y)


def moving_probabilities():
    y, mean, var, found = np.array([0.5, 1.5, 2.5, 3.5]), 0.0, 1.0, []
    for t in range(4):
        found.append(stats.norm.cdf(y[t], mean + t, np.sqrt(var + 1)))
        gain = var / (var + 1)
        mean, var = mean + gain * (y[t] - t - mean), var * (1 - gain) + 1e-12
    return np.array(found)[:, None]


TABLE: dict[str, Situation] = {
    # Shapes: broadcast in one direction as in NumPyro, never in both.
    "column for a vector": Situation(score(lambda: normal(5)), refused="`obs` of 'y' .*Drop", args=(np.zeros((5, 1)),)),
    "vector for a column": Situation(score(lambda: normal(5, 1)), refused="`obs` of 'y' .*Add", args=(np.zeros(5),)),
    "vector for an event": Situation(
        score(lambda: normal(5, 1).to_event(2)), refused="`obs` of 'y' .*event \\(5, 1\\)", args=(np.zeros(5),)
    ),
    "event counted twice": Situation(
        score(lambda: normal(5, 2).to_event(2)), refused="`obs` of 'y'", args=(np.zeros((5, 1)),)
    ),
    "transposed": Situation(score(lambda: normal(5, 2)), refused="`obs` .*Transpose", args=(np.zeros((2, 5)),)),
    "too few steps": Situation(score(lambda: normal(5)), refused="`obs` of 'y'", args=(np.zeros(4),)),
    "a scalar distribution": Situation(score(lambda: dist.Normal(0.0, 1.0)), logpdf(LAST), args=(LAST,)),
    "one mean for all sensors": Situation(
        score(lambda: normal(5, 1)), logpdf(np.ones((5, 2))), args=(np.ones((5, 2)),)
    ),
    "wider than the data": Situation(score(lambda: normal(3, 5)), 3 * logpdf(LAST), args=(LAST,)),
    "in a plate": Situation(in_plates(lambda: normal(), ("t", 5, -1)), logpdf(LAST), args=(LAST,)),
    "in the wrong plate": Situation(
        in_plates(lambda: normal(), ("t", 5, -2)), refused=r"`obs` of 'y' must have shape \(5, 1\)", args=(LAST,)
    ),
    "in two plates": Situation(
        in_plates(lambda: normal(5), ("series", 2, -2), ("t", 5, -1)),
        logpdf(LAST, LAST),
        args=(np.stack([LAST, LAST]),),
    ),
    "plates the other way round": Situation(
        in_plates(lambda: normal(), ("series", 2, -1), ("t", 5, -2)),
        refused="`obs` .*Transpose",
        args=(np.ones((2, 5)),),
    ),
    "a path of other steps": Situation(
        lambda z: walk().log_prob(z), refused="`value` .*20, 1", args=(np.zeros((15, 1)),)
    ),
    "a path of other states": Situation(lambda z: walk().log_prob(z), refused="`value`", args=(np.zeros((20, 2)),)),
    "several paths": Situation(
        lambda z: walk(2).log_prob(z), np.full(3, 2 * stats.norm.logpdf(0)), args=(np.zeros((3, 2, 1)),)
    ),
    "a series of other steps": Situation(
        lambda y: marginal(5).log_prob(y), refused="`value`", args=(np.zeros((4, 1)),)
    ),
    "a flat series": Situation(lambda y: marginal().log_prob(y), refused="`value` .*4, 1", args=(SERIES,)),
    "a distribution of batches": Situation(
        lambda y: WithMissing(normal(3, 5)).log_prob(y), np.tile(stats.norm.logpdf(LAST), (3, 1)), args=(LAST,)
    ),
    "batches of joint events": Situation(
        lambda y: WithMissing(base().expand([2])).log_prob(y), lambda: np.full(2, normal_part()), args=(GAP,)
    ),
    # Joint events of which a part is missing.
    "normal": Situation(score(base), normal_part, args=(GAP,)),
    "low-rank normal": Situation(
        score(lambda: dist.LowRankMultivariateNormal(J.LOC, J.WIDE, jnp.array([0.5, 1.0, 2.0]))),
        lambda: normal_part(cov=WIDE @ WIDE.T + np.diag([0.5, 1.0, 2.0])),
        args=(GAP,),
    ),
    "Student-t": Situation(
        score(lambda: dist.MultivariateStudentT(4.0, J.LOC, J.ROOT)),
        lambda: part(stats.multivariate_t.logpdf, df=4.0),
        args=(GAP,),
    ),
    "matrix normal": Situation(
        score(lambda: dist.MatrixNormal(jnp.stack([J.LOC, -J.LOC]), J.NOISE, J.ROOT)),
        lambda: normal_part(
            np.concatenate([GAP, [NAN, 0.2, NAN]]),
            np.array([True, False, True, False, True, False]),
            np.concatenate([LOC, -LOC]),
            np.kron(NOISE @ NOISE.T, COV),
        ),
        args=(np.stack([GAP, [NAN, 0.2, NAN]]),),
    ),
    "random walk": Situation(
        score(lambda: dist.GaussianRandomWalk(0.7, 5)),
        lambda: normal_part(UNMASKED, ~np.isnan(UNMASKED), np.zeros(5), walk_cov(5)),
        args=(UNMASKED,),
    ),
    "random walk that begins with a gap": Situation(
        score(lambda: dist.GaussianRandomWalk(jnp.array([0.7, 0.7]), 3)),
        lambda: 2 * stats.norm.logpdf(0.4, 0, 0.7 * np.sqrt(2)),
        args=(np.array([[NAN, 0.4, NAN]] * 2),),
    ),
    "state space of NumPyro": Situation(
        score(lambda: dist.GaussianStateSpace(4, J.TURN, scale_tril=J.NOISE)),
        lambda: path_part(NOISE @ NOISE.T),
        args=(PATH_GAPS,),
    ),
    "observed path": Situation(
        score(lambda: StatePath(jnp.zeros(2), jnp.eye(2), J.TURN, J.NOISE, 4)),
        lambda: path_part(np.eye(2)),
        args=(PATH_GAPS,),
    ),
    "nonlinear path": Situation(
        score(lambda: StatePath(jnp.zeros(2), jnp.eye(2), lambda z, u: jnp.sin(z), J.NOISE, 4)),
        refused="`obs` .*StatePath",
        args=(PATH_GAPS,),
        jit="nan",
    ),
    "mixture of joint events": Situation(score(mixture), mixture_part, args=(GAP,)),
    "log-normal of a joint event": Situation(
        score(lambda: dist.TransformedDistribution(base(), dist.transforms.ExpTransform())),
        lambda: normal_part(np.log(GAP)) - np.log(GAP[SEEN]).sum(),
        args=(GAP,),
    ),
    "affine and exponential": Situation(
        score(
            lambda: dist.TransformedDistribution(
                base(),
                [dist.transforms.AffineTransform(1.0, jnp.array([2.0, 1.0, 3.0])), dist.transforms.ExpTransform()],
            )
        ),
        lambda: normal_part((np.log(GAP) - 1) / [2, 1, 3]) - np.log(GAP[SEEN] * [2, 3]).sum(),
        args=(GAP,),
    ),
    "transformed marginal": Situation(
        score(lambda: dist.TransformedDistribution(marginal(), dist.transforms.ExpTransform())),
        lambda: dense_series(SERIES) - np.nansum(SERIES),
        args=(np.exp(SERIES)[:, None],),
    ),
    "transformed by a matrix": Situation(
        score(lambda: dist.TransformedDistribution(base(), dist.transforms.LowerCholeskyAffine(J.LOC, J.ROOT))),
        refused="`obs` .*TransformedDistribution",
        args=(GAP,),
        jit="nan",
    ),
    "composition": Situation(
        score(lambda: dist.Dirichlet(jnp.ones(3))),
        refused="`obs` .*Dirichlet",
        args=(np.array([0.2, NAN, 0.3]),),
        jit="nan",
    ),
    "counts that add up": Situation(
        score(lambda: dist.Multinomial(6, jnp.ones(3) / 3)), refused="`obs`", args=(np.array([1, NAN, 3]),), jit="nan"
    ),
    "zero sum": Situation(score(lambda: dist.ZeroSumNormal(1.0, (3,))), refused="`obs`", args=(GAP,), jit="nan"),
    "whole event missing": Situation(
        score(lambda: dist.Dirichlet(jnp.ones((2, 3)))), np.log(2.0), args=(np.array([[NAN] * 3, [0.2, 0.3, 0.5]]),)
    ),
    # Values that cannot be.
    "between counts": Situation(
        score(lambda: dist.Poisson(2.0)), refused="`obs` .*whole", args=(np.array([1.0, 2.5]),), jit="nan"
    ),
    "infinite counts": Situation(
        score(lambda: dist.Poisson(2.0)), refused="`obs` .*infinite", args=(np.array([1, np.inf]),), jit="nan"
    ),
    "counts beyond integers": Situation(
        score(lambda: dist.Poisson(2.0)), refused="`obs` .*whole", args=(np.array([3e19]),), jit="nan"
    ),
    "infinite reals": Situation(
        score(lambda: normal(2)), refused="`obs` .*infinite", args=(np.array([1, np.inf]),), jit="nan"
    ),
    # Masks.
    "a mask": Situation(score(lambda: normal(5)), logpdf([0.0, 2, 3, 4]), args=(MASKED,), jit="eager"),
    "a mask on counts": Situation(
        score(lambda: dist.Poisson(2.0)),
        stats.poisson.logpmf([0, 2, 3, 4], 2.0).sum(),
        args=(MASKED.astype(int),),
        jit="eager",
    ),
    "a mask under a filter": Situation(
        lambda y: pssm.log_likelihood(marginal().ssm, y),
        lambda: dense_series(SERIES),
        args=(np.ma.masked_invalid(SERIES).filled(-999) * np.ma.masked_array(np.ones(4), np.isnan(SERIES)),),
        jit="eager",
    ),
    "a mask under scores": Situation(
        lambda y: pssm.diagnostics.scores(np.tile(LAST, (3, 1)), y).absolute_error.sum(),
        0.0,
        args=(MASKED,),
        jit="eager",
    ),
    # Times, covariances and steps whose values a trace does not show.
    "times in order": Situation(matern, matern_dense, args=(np.array([0.0, 1, 2]), np.array([1.0, 2, 3]))),
    "times that go back": Situation(
        matern, refused="`t` must not go back", args=(np.array([0.0, 2, 1]), np.array([1.0, 2, 3])), jit="nan"
    ),
    "not a covariance": Situation(
        lambda P: factor_from_covariance("P0", P),
        refused="`P0` .*covariance",
        args=(np.array([[1.0, 2], [2, 1]]),),
        jit="nan",
    ),
    "not symmetric": Situation(
        lambda P: factor_from_covariance("P0", P),
        refused="`P0` .*symmetric",
        args=(np.array([[2.0, 1], [0, 2]]),),
        jit="nan",
    ),
    "a covariance": Situation(
        lambda P: (lambda F: F @ F.T)(factor_from_covariance("P0", P)), COV, args=(COV,), close=(1e-12, 1e-5)
    ),
    "a step after the last": Situation(
        lambda t: (
            LinearGaussianSSM(jnp.zeros(1), J.ONE, jnp.ones((3, 1, 1)), J.ONE, J.ONE, J.ONE, time_varying=("A",))
            .at_time(t)
            .A
        ),
        refused="`t` must be from 0 to 2",
        args=(np.int32(3),),
        jit="nan",
    ),
    "a reading that moves": Situation(
        moving_readings, moving_probabilities, args=(np.array([[0.5], [1.5], [2.5], [3.5]]),), jit="eager"
    ),
    # Random keys of the older kind.
    "an old key": Situation(
        lambda key: jnp.asarray(filtered().sample(key, (3,)).shape),
        np.array([3, 5, 1]),
        args=(np.array([0, 0], np.uint32),),
    ),
    "an old key in a plate": Situation(lambda: np.asarray(drawn_in_a_plate()), np.array([3, 5]), jit="eager"),
}


@pytest.mark.parametrize(("name", "precise", "jitted"), cases(TABLE))
def test_right_or_refused(name: str, precise: bool, jitted: bool):
    check(TABLE[name], precise, jitted)


GRADIENTS: dict[str, Any] = {
    "low-rank normal": lambda p: dist.LowRankMultivariateNormal(p * J.LOC, J.WIDE * p, jnp.exp(p) * jnp.ones(3)),
    "Student-t": lambda p: dist.MultivariateStudentT(4.0 + p, p * J.LOC, jnp.exp(p) * J.ROOT),
    "random walk": lambda p: dist.GaussianRandomWalk(jnp.exp(p), 3),
    "log-normal": lambda p: dist.TransformedDistribution(
        dist.MultivariateNormal(p * J.LOC, scale_tril=jnp.exp(p) * J.ROOT), dist.transforms.ExpTransform()
    ),
    "mixture": lambda p: dist.MixtureSameFamily(
        dist.Categorical(logits=jnp.stack([p, -p])),
        dist.MultivariateNormal(jnp.stack([p * J.LOC, J.LOC]), scale_tril=J.ROOT),
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_have_no_nan(name: str, x64: None):
    """Beside a gap a gradient is that of differences."""

    def run(p):
        return score(lambda: GRADIENTS[name](p))(jnp.asarray(GAP))

    found, step = jax.jit(jax.grad(run))(0.3), 1e-6
    run = jax.jit(run)
    np.testing.assert_allclose(found, (run(0.3 + step) - run(0.3 - step)) / (2 * step), rtol=1e-6)


def test_enumerated_sites(x64: None):
    """A discrete site summed out by NumPyro, over data with a gap: the density of the mixture."""
    y = np.array([0.1, NAN, 2.2, 1.9])

    def model(y):
        with numpyro.plate("n", 4):
            z = numpyro.sample("z", dist.Categorical(jnp.array([0.4, 0.6])), infer={"enumerate": "parallel"})
            observe("y", dist.Normal(jnp.array([0.0, 2.0])[z], 0.3), y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of funsor's own
        from numpyro.contrib.funsor import config_enumerate, enum
        from numpyro.contrib.funsor import log_density as summed_out

        found = summed_out(enum(config_enumerate(model), -2), (y,), {}, {})[0]
    each = 0.4 * stats.norm.pdf(y, 0.0, 0.3) + 0.6 * stats.norm.pdf(y, 2.0, 0.3)
    np.testing.assert_allclose(found, np.nansum(np.log(each)), rtol=1e-10)
