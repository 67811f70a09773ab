"""Potentials for large states: the same mode as with matrices, nearly as sharp, and no n x n array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

import pssm
from pssm.distributions import LowRankChain, StatePath
from pssm.linalg import Diagonal
from pssm.modes import mode, path
from pssm.modes.matrix_free import gauss_newton_matrix_free

N, CHANNELS, STEPS = 65, 12, 6  # above mode.DENSE


def problem(n, seed=0):
    """A random linear model in the guide's terms, and its log evidence."""
    rng = np.random.default_rng(seed)
    A = 0.95 * np.linalg.qr(rng.normal(size=(n, n)))[0]
    C = rng.normal(size=(CHANNELS, n)) / np.sqrt(n)
    q = np.sqrt(rng.uniform(0.05, 0.2, n))
    ssm = pssm.LinearGaussianSSM(np.zeros(n), np.eye(n), A, np.diag(q), C, np.eye(CHANNELS))
    _, y = pssm.simulate(jax.random.key(seed), ssm, STEPS)
    prior = StatePath(np.zeros(n), Diagonal(jnp.ones(n)), A, Diagonal(jnp.asarray(q)), STEPS)
    return ssm, y, prior, lambda z: -0.5 * jnp.sum((y - z @ C.T) ** 2 + jnp.log(2 * jnp.pi), axis=(-1, -2))


def potentials(prior, log_lik, rank, num_iters=30):
    return jax.jit(lambda: path.mode_potentials(prior, log_lik, rank=rank, num_iters=num_iters))()


def bound(prior, log_lik, found, key):
    q = LowRankChain(prior, found.k, found.K, diag=found.diag, center=found.center)

    @jax.jit
    def weights(key):
        z = q.sample(key, (500,))
        return log_lik(z) - q.log_ratio(z)

    return float(weights(key).mean())


def test_mode_is_the_smoothed_mean_and_potentials_are_nearly_as_sharp(x64, key, monkeypatch):
    ssm, y, prior, log_lik = problem(N)
    evidence = float(pssm.log_likelihood(ssm, y))
    found = potentials(prior, log_lik, 4, 40)
    assert found.K.shape == (STEPS, N, 4)
    smoothed = pssm.kalman_smoother(ssm, y)
    sd = np.sqrt(np.diagonal(smoothed.cov, axis1=1, axis2=2))
    assert np.abs((found.center - smoothed.mean) / sd).max() < 1e-3
    monkeypatch.setattr(mode, "DENSE", N)
    dense = potentials(prior, log_lik, 4, 1)
    gap, dense_gap = (evidence - bound(prior, log_lik, x, key) for x in (found, dense))
    assert 0 < gap < 1.2 * dense_gap + 0.3
    np.testing.assert_allclose(found.scale, dense.scale, rtol=0.15)


def test_messages_that_are_of_this_form_are_exact(x64, key):
    """A diagonal transition and one channel a state: the messages are diagonal."""
    rng = np.random.default_rng(1)
    a, noise = rng.uniform(0.5, 1, N), rng.uniform(0.2, 1, N)
    y = rng.normal(size=(STEPS, N))
    ssm = pssm.LinearGaussianSSM(np.zeros(N), np.eye(N), np.diag(a), np.diag(noise), np.eye(N), np.eye(N))
    prior = StatePath(np.zeros(N), Diagonal(jnp.ones(N)), lambda z, u: a * z, Diagonal(jnp.asarray(noise)), STEPS)

    def log_lik(z):
        return -0.5 * jnp.sum((y - z) ** 2 + jnp.log(2 * jnp.pi), axis=(-1, -2))

    found = potentials(prior, log_lik, 0)
    evidence = float(pssm.log_likelihood(ssm, y))
    assert bound(prior, log_lik, found, key) == pytest.approx(evidence, abs=1e-6)


@pytest.mark.parametrize("diagonal", [True, False])
def test_move_is_zero_at_the_mode_and_climbs_elsewhere(x64, key, diagonal):
    ssm, y, prior, log_lik = problem(8)
    sd = mode.noise_scale(prior)

    @jax.jit
    def move(z):
        return gauss_newton_matrix_free(prior, log_lik, z, sd=sd, rank=1, diagonal=diagonal).move

    smoothed = pssm.kalman_smoother(ssm, y).mean
    np.testing.assert_allclose(move(smoothed), 0.0, atol=1e-9)
    slope = jax.jit(jax.grad(lambda z: prior.log_prob(z) + log_lik(z)))
    for z in prior.sample(key, (5,)):
        assert jnp.vdot(slope(z), move(z)) > 0


def test_no_matrix_of_the_state_in_float32():
    """Nonlinear, with missing channels: finite, and no array has two axes of the state."""
    n = 300

    def wave(z, u):
        return z + 0.1 * jnp.sin(jnp.roll(z, 1))

    prior = StatePath(jnp.zeros(n), Diagonal(jnp.ones(n)), wave, Diagonal(0.3 * jnp.ones(n)), 4)
    y = np.random.default_rng(0).poisson(1.0, (4, n)).astype(np.float32)
    seen = np.arange(n) % 3 > 0

    def log_lik(z):
        return jnp.sum(jnp.where(seen, y * z - jnp.exp(z), 0.0), axis=(-1, -2))

    def run():
        return path.mode_potentials(prior, log_lik, rank=2, num_iters=5)

    shapes = set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            shapes.update(v.aval.shape for v in (*eqn.invars, *eqn.outvars) if not isinstance(v, Literal))
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(run)().jaxpr)
    assert len(shapes) > 50
    assert not [s for s in shapes if sum(size == n for size in s) > 1]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.jit(run)()))
