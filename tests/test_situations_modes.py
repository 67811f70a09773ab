"""Modes where counts are large and starts far, angles, emissions without moments, functions and keys of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI, Trace_ELBO
from optax import adam
from scipy.special import betaln, expit, gammaln, i0e
from situations import Situation, cases, check

import pssm
from pssm import NonlinearSSM, nets
from pssm.distributions import StatePath
from pssm.filters import (
    conditional_smc,
    gaussian_filter,
    gaussian_smoother,
    particle_filter,
    particle_smoother,
    sample_states,
    simulate,
)
from pssm.guides import AutoStateSpace, guided_proposal, laplace_path
from pssm.learning import fit_em
from pssm.modes import mode_path
from pssm.ssm import LinearGaussianSSM

ONE = np.eye(1)
RNG = np.random.default_rng(0)


def model(emission, m0=0.0, sd0=5.0, sd=0.05, transition=lambda z, u: z):
    return NonlinearSSM([m0], sd0 * ONE, transition, sd * ONE, emission)


def poisson(z):
    return dist.Poisson(jnp.exp(z)).to_event(1)


def binomial(total):
    return lambda z: dist.Binomial(total, logits=z).to_event(1)


def negative_binomial(z):
    return dist.NegativeBinomial2(jnp.exp(z), 5.0).to_event(1)


def volatility(z):
    return dist.Normal(0.0, jnp.exp(z / 2)).to_event(1)


# Log density, first and second derivative by z.
def of_poisson(y, z):
    return y * z - np.exp(z) - gammaln(y + 1), y - np.exp(z), -np.exp(z)


def of_binomial(total):
    def parts(y, z):
        p = expit(z)
        choose = -np.log(total + 1) - betaln(total - y + 1, y + 1)
        return choose + y * z - total * np.logaddexp(0, z), y - total * p, -total * p * (1 - p)

    return parts


def of_negative_binomial(y, z):
    p = expit(z - np.log(5.0))
    choose = gammaln(y + 5) - gammaln(5) - gammaln(y + 1)
    return choose + y * np.log(p) + 5 * np.log1p(-p), y - (y + 5) * p, -(y + 5) * p * (1 - p)


def of_volatility(y, z):
    w = y**2 * np.exp(-z)
    return -0.5 * (np.log(2 * np.pi) + z + w), 0.5 * (w - 1), -0.5 * w


def dense(parts, y, m0=0.0, sd0=5.0, sd=0.05):
    """Mode, and Laplace's evidence, of a walk: Newton's method with a dense matrix, from near the mode."""

    def solve():
        steps = np.arange(len(y))
        cov = sd0**2 + sd**2 * np.minimum.outer(steps, steps)
        precision = np.linalg.inv(cov)
        z = np.full(len(y), m0)

        def joint(z):
            with np.errstate(over="ignore", invalid="ignore"):
                return np.sum(parts(y, z)[0]) - 0.5 * (z - m0) @ precision @ (z - m0)

        for _ in range(500):
            with np.errstate(over="ignore"):
                _, g, h = parts(y, z)
            gradient = g - precision @ (z - m0)
            move = np.linalg.solve(precision - np.diag(h), gradient)
            size = 1.0
            while not joint(z + size * move) >= joint(z) - 1e-9 * abs(joint(z)) and size > 1e-15:
                size /= 2
            z = z + size * move
            if gradient @ move < 1e-16:
                break
        value, _, h = parts(y, z)
        evidence = np.sum(value) - 0.5 * (z - m0) @ precision @ (z - m0)
        return z, evidence - 0.5 * np.linalg.slogdet(np.eye(len(y)) - cov * h)[1]

    return solve


def laplace(emission, parts, y, close=(1e-6, 2e-3), evidence=True, num_iters=50, **options):
    """The path and the evidence of `laplace_path`."""

    def run(y):
        found = laplace_path(model(emission, **options), y, num_iters=num_iters)
        return (found.mean[:, 0], found.log_likelihood) if evidence else found.mean[:, 0]

    exact = dense(parts, y, **options)
    return Situation(run, right=exact if evidence else lambda: exact()[0], args=(y.astype(float),), close=close)


def batch(y, total):
    """The modes of several series at once; with `total` the likelihood is one number."""
    walk = StatePath(jnp.zeros(1), 5.0 * jnp.eye(1), jnp.eye(1), 0.05 * jnp.eye(1), y.shape[-1])
    prior = StatePath(
        jnp.zeros((len(y), 1)), walk.chol_P0, walk.transition, walk.chol_Q, y.shape[-1]
    )  # the batch is the prior's

    def log_lik(z):
        terms = y * z[..., 0] - jnp.exp(z[..., 0])
        return jnp.sum(terms) if total else jnp.sum(terms, axis=-1)

    return mode_path(prior, log_lik, rank=1, num_iters=50)[..., 0]


def centre_of_a_guide(y):
    def counts(y):
        z = numpyro.sample("z", StatePath(jnp.zeros(1), 5.0 * jnp.eye(1), jnp.eye(1), 0.05 * jnp.eye(1), len(y)))
        pssm.observe("y", dist.Poisson(jnp.exp(z)).to_event(2), jnp.asarray(y)[:, None])

    svi = SVI(counts, AutoStateSpace(counts, rank=1), adam(1e-3), Trace_ELBO())
    return svi.get_params(svi.init(jax.random.key(0), y))["z_auto_center"][:, 0]


COUNTS = {rate: np.random.default_rng(0).poisson(rate, 40).astype(float) for rate in (10, 1e3, 3e4, 1e6)}
MIXED = np.random.default_rng(1).poisson(10.0 ** np.random.default_rng(2).uniform(0, 6, 40)).astype(float)
SERIES = np.stack([COUNTS[10], COUNTS[3e4], COUNTS[1e6]])
MODES = {
    "large counts, a known start": laplace(poisson, of_poisson, COUNTS[3e4], m0=10.0),
    "counts of 10, vague": laplace(poisson, of_poisson, COUNTS[10], sd0=10.0),
    "counts of 1e3, vague": laplace(poisson, of_poisson, COUNTS[1e3], sd0=10.0),
    "counts of 3e4, vague": laplace(poisson, of_poisson, COUNTS[3e4]),
    "counts of 1e6, vague": laplace(poisson, of_poisson, COUNTS[1e6], sd0=10.0, close=(1e-6, 5e-3)),
    "counts of all sizes": laplace(poisson, of_poisson, MIXED, sd=2.0, close=(1e-6, 3e-3)),
    "two thousand steps": laplace(
        poisson, of_poisson, np.random.default_rng(0).poisson(3e4, 2000).astype(float), evidence=False
    ),
    "a thousand trials": laplace(binomial(1000), of_binomial(1000), RNG.binomial(1000, 0.999, 40)),
    "a million trials": laplace(
        binomial(10**6), of_binomial(10**6), RNG.binomial(10**6, 1e-4, 40), evidence=False, sd0=10.0
    ),
    "negative binomial counts": laplace(
        negative_binomial, of_negative_binomial, RNG.negative_binomial(5, 5 / (5 + 3e4), 40)
    ),
    "volatility, tiny returns": laplace(volatility, of_volatility, 1e-3 * RNG.normal(size=40), sd=0.1),
    "volatility, huge returns": laplace(volatility, of_volatility, 1e3 * RNG.normal(size=40), sd=0.1),
    "series of a batch": Situation(
        lambda y: batch(y, False), lambda: np.stack([dense(of_poisson, y)()[0] for y in SERIES]), args=(SERIES,)
    ),
    "a batch with one likelihood": Situation(
        lambda y: batch(y, True),
        lambda: np.stack([dense(of_poisson, y)()[0] for y in SERIES]),
        args=(SERIES,),
        close=(1e-6, 1e-4),
    ),
    "a start far above": Situation(
        lambda y: laplace_path(model(poisson, m0=100.0, sd0=50.0), y).mean[:, 0],
        lambda: dense(of_poisson, COUNTS[3e4], 100.0, 50.0)()[0],
        args=(COUNTS[3e4],),
        close=(1e-6, 1e-4),
    ),
    "too few steps": Situation(
        lambda y: laplace_path(model(poisson), y, num_iters=2, start=np.zeros((40, 1))),
        refused="`num_iters`",
        jit="nan",
        args=(COUNTS[3e4],),
    ),
    "a density with kinks": Situation(
        lambda y: laplace_path(model(lambda z: dist.Laplace(z, 0.1).to_event(1)), y).log_likelihood,
        refused="`num_iters`.* kinks",
        jit="nan",
        args=(np.array([1.0, 1.3, 0.2, 0.5]),),
    ),
    "a guided proposal": Situation(
        lambda y: guided_proposal(model(poisson), y, num_rounds=0).center[:, 0],
        lambda: dense(of_poisson, COUNTS[3e4])()[0],
        args=(COUNTS[3e4],),
    ),
    "the start of a guide": Situation(
        centre_of_a_guide, lambda: dense(of_poisson, COUNTS[3e4])()[0], args=(COUNTS[3e4],), jit="eager"
    ),
    "an iterated smoother, vague": Situation(
        lambda y: gaussian_smoother(model(poisson), y, num_iters=5).log_likelihood,
        lambda: dense(of_poisson, COUNTS[3e4])()[1],
        args=(COUNTS[3e4],),
        close=(1e-5, 2e-3),
    ),
}


@pytest.mark.parametrize(("name", "precise", "jitted"), cases(MODES))
def test_the_mode_is_found_or_refused(name, precise, jitted):
    check(MODES[name], precise, jitted)


def angle(concentration=4.0):
    return lambda z: dist.VonMises(z, concentration).to_event(1)


def circle(m0, sd0, concentration, y):
    """Posterior mean, evidence and mode of one angle, on a grid."""
    grid = np.linspace(m0 - 10 * sd0, m0 + 10 * sd0, 400_001)
    prior = np.exp(-0.5 * ((grid - m0) / sd0) ** 2) / (sd0 * np.sqrt(2 * np.pi))
    weight = prior * np.exp(concentration * (np.cos(y - grid) - 1)) / (2 * np.pi * i0e(concentration))
    return (weight * grid).sum() / weight.sum(), np.log(weight.sum() * (grid[1] - grid[0])), grid[weight.argmax()]


def seen_angle(m0, sd0, concentration, what, close, y=-3.0, **options):
    """The mean or the evidence after one reading at the seam."""
    place = {"mean": 0, "evidence": 1, "mode": 2}[what]

    def run(y):
        found = gaussian_filter(model(angle(concentration), m0, sd0), y, **options)
        return found.log_likelihood if what == "evidence" else found.mean[0, 0]

    return Situation(run, circle(m0, sd0, concentration, y)[place], args=(np.array([[y]]),), close=(close, close))


def no_moments(emission, name, jit="same", size=1, **options):
    return Situation(
        lambda y: gaussian_filter(model(emission), y, **options).log_likelihood,
        refused=f"`emission`: the moments of {name}.* use `laplace_path`",
        args=(np.zeros((3, size)),),
        jit=jit,
    )


def mixture(z):
    parts = dist.VonMises(z[:, None] + jnp.array([0.0, 1.0]), 4.0)
    return dist.MixtureSameFamily(dist.Categorical(jnp.ones((1, 2)) / 2), parts).to_event(1)


def with_missing(y):
    two = lambda z: dist.VonMises(jnp.stack([z[0], -z[0]]), 4.0).to_event(1)  # noqa: E731
    return gaussian_filter(model(two, 3.1, 0.5), y, num_iters=6).mean[0, 0]


def estimate(y, **options):
    task = model(angle(50.0), 3.1, 0.5, sd=0.1)
    return particle_filter(jax.random.key(0), task, y, num_particles=20_000, **options).log_likelihood


MOMENTS = {
    "an angle at the seam, ekf": seen_angle(3.1, 1.0, 4.0, "mean", 0.01),
    "an angle at the seam, ekf, narrow": seen_angle(3.1, 0.5, 4.0, "mean", 0.01),
    "an angle at the seam, the mode": seen_angle(3.1, 1.0, 4.0, "mode", 1e-4, num_iters=8),
    "an angle, sharp": seen_angle(-3.1, 0.3, 500.0, "mean", 1e-3, y=3.0),
    "an angle, blunt": seen_angle(3.1, 0.3, 0.1, "mean", 1e-2),
    "an angle after three turns": seen_angle(3.1 + 6 * np.pi, 0.5, 4.0, "mean", 0.01),
    "an angle at the seam, ukf": seen_angle(3.1, 0.5, 4.0, "mean", 0.01, linearize="ukf", num_iters=5),
    "an angle at the seam, cubature": seen_angle(3.1, 0.5, 4.0, "mean", 0.01, linearize="cubature", num_iters=5),
    "an angle at the seam, hermite": seen_angle(3.1, 0.5, 4.0, "mean", 0.01, linearize="gauss_hermite", num_iters=5),
    "an angle's evidence": seen_angle(3.1, 0.5, 10.0, "evidence", 0.02, num_iters=4),
    "two angles, one missing": Situation(
        with_missing, circle(3.1, 0.5, 4.0, -3.0)[2], args=(np.array([[np.nan, 3.0]]),), close=(1e-4, 1e-4)
    ),
    "a smoothed angle": Situation(
        lambda y: gaussian_smoother(model(angle(), 3.1, 0.5, sd=0.0), y, num_iters=4).mean[:, 0],
        np.full(3, circle(3.1, 0.5, 4.0, -3.0)[2]),
        args=(np.array([[np.nan], [-3.0], [np.nan]]),),
        close=(1e-4, 1e-4), precisions=(True,),
    ),
    "particles moved by an angle": Situation(
        lambda y: estimate(y, proposal="ekf"), circle(3.1, 0.5, 50.0, -3.0)[1], args=(np.array([[-3.0]]),),
        close=(0.01, 0.01),
    ),
    "particles guided by an angle": Situation(
        lambda y: estimate(y, proposal="guided"), circle(3.1, 0.5, 50.0, -3.0)[1], args=(np.array([[-3.0]]),),
        close=(0.01, 0.01),
    ),
    "a skewed angle": no_moments(
        lambda z: dist.SineSkewed(dist.VonMises(z, 4.0).to_event(1), jnp.array([0.3])), "SineSkewed"
    ),
    "a direction": no_moments(
        lambda z: dist.ProjectedNormal(jnp.stack([jnp.cos(z[0]), jnp.sin(z[0])])), "ProjectedNormal", size=2
    ),
    "two dependent angles": no_moments(
        lambda z: dist.SineBivariateVonMises(z[0], z[0], 4.0, 4.0, 1.0), "SineBivariateVonMises", size=2
    ),
    "a mixture of angles": no_moments(mixture, "Mixture"),
    "cauchy": no_moments(lambda z: dist.Cauchy(z, 1.0).to_event(1), "Cauchy", "nan"),
    "cauchy, points": no_moments(lambda z: dist.Cauchy(z, 1.0).to_event(1), "Cauchy", "nan", linearize="ukf"),
    "student of two degrees": no_moments(lambda z: dist.StudentT(2.0, z, 1.0).to_event(1), "StudentT", "nan"),
    "student of half a degree": no_moments(lambda z: dist.StudentT(0.5, z, 1.0).to_event(1), "StudentT", "nan"),
    "levy": no_moments(lambda z: dist.Levy(z, 1.0).to_event(1), "Levy", "nan"),
    "a family that says nothing": no_moments(
        lambda z: dist.TransformedDistribution(dist.Normal(z, 1.0), dist.transforms.ExpTransform()).to_event(1),
        "TransformedDistribution",
    ),
    "cauchy, a proposal": Situation(
        lambda y: estimate_of(lambda z: dist.Cauchy(z, 1.0).to_event(1), y, "ekf"),
        refused="`emission`: the moments of Cauchy",
        args=(np.zeros((3, 1)),),
        jit="nan",
    ),
    "cauchy, bootstrap": Situation(
        lambda y: jnp.isfinite(estimate_of(lambda z: dist.Cauchy(z, 1.0).to_event(1), y, None)),
        True,
        args=(np.zeros((3, 1)),),
    ),
}  # fmt: skip


def estimate_of(emission, y, proposal):
    task = model(emission)
    return particle_filter(jax.random.key(0), task, y, num_particles=10, proposal=proposal).log_likelihood


@pytest.mark.parametrize(("name", "precise", "jitted"), cases(MOMENTS))
def test_moments_are_right_or_refused(name, precise, jitted):
    check(MOMENTS[name], precise, jitted)


Y = np.zeros((3, 2))


def two(transition=lambda z, u: z, emission=lambda z: dist.Normal(z, 1.0).to_event(1)):
    return NonlinearSSM(jnp.zeros(2), jnp.eye(2), transition, jnp.eye(2), emission)


def wrong(run, refused):
    return Situation(run, refused=refused, args=(Y,))


def walk_path(transition):
    return StatePath(jnp.zeros(2), jnp.eye(2), transition, jnp.eye(2), 3).log_prob(jnp.zeros((3, 2)))


def either(z):
    return dist.Normal(z[0], 1.0), dist.Poisson(jnp.exp(z[1]))


FUNCTIONS = {
    "a transition of z": wrong(lambda y: gaussian_filter(two(lambda z: z), y), r"`transition` .*\(z, u\); got one"),
    "a path's transition of z": wrong(lambda y: walk_path(lambda z: z), r"`transition` .*\(z, u\); got one of \(z\)"),
    "a transition of three": wrong(lambda y: walk_path(lambda z, u, t: z), r"`transition` .*\(z, u\); got one"),
    "an emission of nothing": wrong(
        lambda y: gaussian_filter(two(emission=lambda: dist.Normal(0.0, 1.0)), y), r"`emission` .*\(z\) or \(z, u\)"
    ),
    "a transition to a number": wrong(lambda y: gaussian_filter(two(lambda z, u: z[0]), y), r"`transition` .*\(2,\)"),
    "a transition to one state": wrong(lambda y: laplace_path(two(lambda z, u: z[:1]), y), r"`transition` .*\(1,\)"),
    "a transition to a pair": wrong(lambda y: laplace_path(two(lambda z, u: (z, z)), y), "`transition` .* a tuple"),
    "a path's transition to a row": wrong(lambda y: walk_path(lambda z, u: z[None]), r"`transition` .*\(1, 2\)"),
    "particles of a number": wrong(
        lambda y: particle_filter(0, two(lambda z, u: z[0]), y, num_particles=5), r"`transition` .*\(2,\)"
    ),
    "a simulated number": wrong(lambda y: simulate(0, two(lambda z, u: z[0]), 3), r"`transition` .*\(2,\)"),
    "a pair of emissions": wrong(
        lambda y: gaussian_filter(two(emission=either), y), "`emission` .* a?.*tuple.*observe"
    ),
    "a pair of emissions, mode": wrong(lambda y: laplace_path(two(emission=either), y), "`emission` .*tuple"),
    "emissions in a list": wrong(
        lambda y: gaussian_filter(two(emission=[dist.Normal(0.0, 1.0)] * 2), y), "`emission` must be a function .*list"
    ),
    "an array for an emission": wrong(
        lambda y: laplace_path(two(emission=lambda z: z), y), "`emission` .*distribution"
    ),
}


@pytest.mark.parametrize(("name", "precise", "jitted"), cases(FUNCTIONS))
def test_functions_are_refused(name, precise, jitted):
    check(FUNCTIONS[name], precise, jitted)


LINEAR = LinearGaussianSSM(jnp.zeros(2), jnp.eye(2), jnp.eye(2), jnp.eye(2), jnp.eye(2), jnp.eye(2))
FILTERED = particle_filter(0, LINEAR, Y, num_particles=5)
KEYED = {
    "particle_filter": lambda key: particle_filter(key, LINEAR, Y, num_particles=5).log_likelihood,
    "particle_smoother": lambda key: particle_smoother(key, LINEAR, FILTERED, num_paths=2),
    "conditional_smc": lambda key: conditional_smc(key, LINEAR, Y, Y, num_particles=5),
    "sample_states": lambda key: sample_states(key, LINEAR, Y),
    "simulate": lambda key: simulate(key, LINEAR, 3),
    "simulate, nonlinear": lambda key: two().simulate(key, 3),
    "continued": lambda key: StatePath.from_ssm(LINEAR, 4).continued(key, Y),
    "ResidualTransition": lambda key: nets.ResidualTransition(2, 4, key=key)(jnp.zeros(2), None),
    "sequence_encoder": lambda key: nets.sequence_encoder(2, 2, 1, size=4, key=key)(Y).K,
    "coordinated_dropout": lambda key: nets.coordinated_dropout(key, Y, 0.5)[0],
    "fit_em": lambda key: fit_em(np.arange(12.0).reshape(6, 2) ** 2, LINEAR, num_iters=1, restarts=1, key=key).ssm.Q,
}


def leaves(function, key):
    return [np.asarray(x) for x in jax.tree.leaves(function(key))]


@pytest.mark.parametrize("name", KEYED)
def test_keys_of_every_kind(name):
    expected = leaves(KEYED[name], jax.random.key(3))
    for key in (3, np.int64(3), jnp.asarray(3), jax.random.PRNGKey(3)):
        for a, b in zip(leaves(KEYED[name], key), expected, strict=True):
            np.testing.assert_array_equal(a, b)
    for bad in (0.5, "3", True, None, jax.random.split(jax.random.key(0), 2)):
        with pytest.raises(TypeError, match="`key` must be") as caught:
            KEYED[name](bad)
        assert "\n" not in str(caught.value)
