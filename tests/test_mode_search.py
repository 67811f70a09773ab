"""The search for the mode of a path: never below its start, a mode or a word, and the higher one of several modes."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.optimize import minimize

from pssm import NonlinearSSM, particle_filter
from pssm.distributions import StatePath
from pssm.modes import guided_proposal, laplace_path, mode_path
from pssm.modes.damped import damped_climb

STEP = np.array([[1.0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]])


def normal(mean, sd):
    return lambda z: dist.Normal(mean(z), sd).to_event(1)


def track(emission, chol_P0=None, noise=(0.05, 0.05, 0.02, 0.02)):
    start = jnp.diag(jnp.array([2.0, 2.0, 0.1, 0.1])) if chol_P0 is None else chol_P0
    return NonlinearSSM(
        jnp.array([20.0, 20.0, -0.1, 0.05]), start, lambda z, u: STEP @ z, jnp.diag(jnp.array(noise)), emission
    )


def angle(z):
    return jnp.arctan2(z[1], z[0])


def lorenz(z, u):
    return z + 0.02 * jnp.stack([10 * (z[1] - z[0]), z[0] * (28 - z[2]) - z[1], z[0] * z[1] - 8 / 3 * z[2]])


def van_der_pol(z, u):
    return z + 0.1 * jnp.stack([z[1], 1.5 * (1 - z[0] ** 2) * z[1] - z[0]])


def gordon(z, u):
    return 0.5 * z + 25 * z / (1 + z**2) + u


def volatility(z):
    return dist.Normal(0.0, jnp.exp(z / 2)).to_event(1)


def binomial(z):
    return dist.Binomial(1000, logits=z).to_event(1)


def square(z):
    return z**2


def cube(z):
    return z**3 / 5


def cases():
    """Model, steps, and whether readings are hit by outliers; made anew, in the precision of the moment."""
    ONE = jnp.eye(1)
    return {
        "squared": (
            NonlinearSSM([1.0], ONE, lambda z, u: 0.95 * z, 0.3 * ONE, normal(square, 0.1)),
            100,
            False,
        ),
        "growth": (NonlinearSSM([0.0], 2 * ONE, gordon, 3 * ONE, normal(lambda z: z**2 / 20, 1.0)), 50, False),
        "cubic": (
            NonlinearSSM([0.0], ONE, lambda z, u: 0.9 * z, 0.5 * ONE, normal(cube, 0.3)),
            100,
            False,
        ),
        "sine": (NonlinearSSM([0.0], ONE, lambda z, u: z, 0.3 * ONE, normal(jnp.sin, 0.2)), 100, False),
        "volatility": (
            NonlinearSSM([0.0], ONE, lambda z, u: 0.97 * z, 0.2 * ONE, volatility),
            200,
            False,
        ),
        "binomial": (
            NonlinearSSM([0.0], 10 * ONE, lambda z, u: z, 0.5 * ONE, binomial),
            100,
            False,
        ),
        "bearings": (track(normal(lambda z: angle(z)[None], 0.01), noise=(0.02, 0.02, 0.005, 0.005)), 60, False),
        "range and bearing": (
            track(normal(lambda z: jnp.stack([jnp.hypot(z[0], z[1]), angle(z)]), jnp.array([0.3, 0.03]))),
            120,
            False,
        ),
        "outliers": (track(lambda z: dist.StudentT(3.0, z[:2], 0.3).to_event(1)), 120, True),
        "outliers, wide": (track(lambda z: dist.StudentT(2.0, z[:2], 0.3).to_event(1), 1000 * jnp.eye(4)), 120, True),
        "oscillator": (
            NonlinearSSM(
                [1.0, 0.0],
                jnp.eye(2),
                van_der_pol,
                0.1 * jnp.eye(2),
                lambda z: dist.Poisson(jnp.exp(z @ jnp.array([[1.0, 0.2, -0.4], [0.3, -0.5, 0.1]]))).to_event(1),
            ),
            150,
            False,
        ),
        "lorenz": (
            NonlinearSSM([1.0, 1.0, 25.0], 2 * jnp.eye(3), lorenz, 0.2 * jnp.eye(3), normal(lambda z: z[:1], 0.5)),
            200,
            False,
        ),
    }


NAMES = (
    "squared",
    "growth",
    "cubic",
    "sine",
    "volatility",
    "binomial",
    "bearings",
    "range and bearing",
    "outliers",
    "outliers, wide",
    "oscillator",
    "lorenz",
)
QUICK = ("squared", "growth", "cubic", "outliers")


def problem(name, seed):
    """Model, data, inputs and the path that made them."""
    model, steps, outliers = cases()[name]
    u = 8 * jnp.cos(1.2 * jnp.arange(steps))[:, None] if name == "growth" else None
    path_key, data_key = jax.random.split(jax.random.key(seed))
    path = StatePath.from_ssm(model, steps, u).sample(path_key)
    y = jax.vmap(lambda z, k: model.emission(z).sample(k))(path, jax.random.split(data_key, steps))
    y = np.array(y, float)
    if outliers:
        rng = np.random.default_rng(seed)
        hit = rng.random(steps) < 1 / 12
        y[hit] += 20 * 0.3 * rng.normal(size=(hit.sum(), y.shape[1]))
    return model, jnp.asarray(y), u, path


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES])
def test_no_search_ends_below_its_start_or_below_a_mode_unsaid(name, x64):
    model, y, u, _ = problem(name, 0)
    prior = StatePath.from_ssm(model, len(y), u)

    def joint(path, y):
        def term(y, z):
            return model.emission(z).log_prob(y)

        return prior.log_prob(path) + jnp.sum(jax.vmap(term)(y, path))

    @jax.jit
    def run(y, truth):
        still = prior.path_from_noise(jnp.zeros(prior.noise_size))
        found, near = laplace_path(model, y, u), laplace_path(model, y, u, start=truth)
        alone = mode_path(
            prior, lambda z: joint(z, y) - prior.log_prob(z), rank=model.n_state, start=still, strict=False
        )
        ends = [joint(z, y) for z in (still, alone, found.mean, near.mean)]
        slope = jax.grad(joint)(found.mean, y) * jnp.sqrt(jnp.diagonal(found.cov, axis1=-2, axis2=-1))
        return *ends, jnp.abs(slope).max(), found.log_likelihood

    said, lower = 0, 0
    for seed in range(6):
        _, y, _, truth = problem(name, seed)
        still, alone, end, near, slope, value = (float(x) for x in run(y, truth))
        assert alone >= still - 1e-9 * abs(still)
        if np.isnan(end):
            assert np.isnan(value)  # that there is no mode is said
            said += 1
            continue
        assert end >= still
        assert slope < 1e-3  # for a posterior standard deviation of each number
        lower += end < near - 1.0
    assert said <= (2 if name in ("range and bearing", "bearings", "growth") else 0)
    assert lower <= (4 if name == "growth" else 1)


def test_where_data_are_flat_at_the_start_another_one_is_taken(x64):
    """The path without noise is a mode, as the cube has no slope and no curvature there; a far lower one."""
    model, y, _, truth = problem("cubic", 0)
    still = np.zeros_like(truth)
    stays, found, near = (laplace_path(model, y, start=s) for s in (still, None, truth))
    np.testing.assert_allclose(stays.mean, 0.0, atol=1e-8)
    assert found.log_likelihood > stays.log_likelihood + 100
    assert abs(found.log_likelihood - near.log_likelihood) < 5


def test_curvature_of_any_sign_gives_newtons_own_steps(x64):
    """Far outliers of a Student-t reading have negative curvature; against a quasi-Newton search of SciPy's."""
    rng = np.random.default_rng(4)
    y = np.cumsum(rng.normal(size=30) * 0.3) + 0.2 * rng.standard_t(2, size=30)
    y[[5, 17]] += 8.0
    prior = StatePath(jnp.zeros(1), jnp.eye(1), jnp.eye(1), 0.3 * jnp.eye(1), 30)

    def log_lik(z):
        return dist.StudentT(3.0, z[:, 0], 0.2).log_prob(jnp.asarray(y)).sum()

    start = jnp.zeros((30, 1))
    found = {n: damped_climb(prior, log_lik, start, num_iters=n, tolerance=1e-20) for n in (12, 40)}
    joint = jax.jit(jax.value_and_grad(lambda z: -(prior.log_prob(z[:, None]) + log_lik(z[:, None]))))
    peer = minimize(lambda z: tuple(map(np.asarray, joint(jnp.asarray(z)))), found[12][:, 0], jac=True, tol=1e-12)
    np.testing.assert_allclose(found[40][:, 0], peer.x, atol=1e-5)
    np.testing.assert_allclose(found[12], found[40], atol=1e-9)  # a dozen steps, for the last ones square what is left
    assert float(jnp.abs(joint(found[40][:, 0])[1]).max()) < 1e-9


def test_where_there_is_no_mode_the_length_of_the_next_step_is_said(x64):
    """A density with kinks has its maximum on some of them, where no step of Newton's is short."""
    one = jnp.eye(1)
    model = NonlinearSSM(jnp.zeros(1), one, lambda z, u: z, one, lambda z: dist.Laplace(z, 0.3).to_event(1))
    y = np.random.default_rng(0).normal(size=(40, 1)).cumsum(0)
    with pytest.raises(ValueError, match="standard deviations|no step climbs"):
        laplace_path(model, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guided_proposal(model, y, num_rounds=0)
    assert any("has not converged" in str(w.message) for w in caught)
    assert np.isnan(jax.jit(lambda y: laplace_path(model, y).log_likelihood)(y))


def test_a_guided_estimate_whose_particles_collapse_says_so(x64):
    model, y, _, _ = problem("cubic", 0)
    wrong = guided_proposal(model, -y, num_rounds=0)
    with pytest.warns(UserWarning, match="are effective at step"):
        particle_filter(jax.random.key(0), model, y, num_particles=200, proposal=wrong)
