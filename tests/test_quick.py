"""The smallest exact case of what is tested at length among the slow tests alone: one state, a few steps."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

import pssm
from pssm import nets
from pssm.diagnostics import bound_gap
from pssm.distributions import StatePath, observe
from pssm.guides import AmortizedStateSpace, AutoStateSpace
from pssm.infer import SVIFit, TraceConditionalKL_ELBO, causal_draws, importance_bound
from pssm.linalg import Diagonal
from pssm.modes.matrix_free import gauss_newton_matrix_free

T, A, Q, C, R = 3, 0.8, 0.5, 1.3, 0.7
SSM = pssm.LinearGaussianSSM([0.4], [[1.0]], [[A]], [[Q]], [[C]], [[R]])
Y = np.array([[0.9], [np.nan], [-0.6]])
EXACT = pssm.kalman_smoother(SSM, Y)


def linear(y):
    z = numpyro.sample("z", StatePath([0.4], np.eye(1), A * np.eye(1), Q * np.eye(1), T))
    observe("y", dist.Normal(C * z, R).to_event(2), y)


@pytest.fixture(scope="module")
def fit():
    svi = SVI(linear, AutoStateSpace(linear, rank=1), optax.adam(1e-9), Trace_ELBO())
    return SVIFit.of(svi, svi.run(jax.random.key(0), 10, jnp.asarray(Y, jnp.float32), progress_bar=False), Y)


def close_in_mean(paths, exact, slack=0.0):
    """Means and spreads of draws `(draw, time, state)`."""
    sd = np.sqrt(np.asarray(exact.cov)[:, 0])
    assert (np.abs(paths.mean(0) - exact.mean) / sd).max() < 5 / np.sqrt(len(paths)) + slack
    np.testing.assert_allclose(paths.std(0), sd, rtol=0.1 + slack)


def test_the_bound_of_an_exact_chain_has_no_gap(fit):
    found = bound_gap(fit, num_particles=100)
    assert found.kind == "exact"
    assert found.evidence == pytest.approx(float(pssm.log_likelihood(SSM, Y)), abs=1e-4)
    assert found.gap == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("loss", [Trace_ELBO, RenyiELBO, TraceConditionalKL_ELBO])
def test_every_objective_gives_the_evidence(fit, loss):
    found = loss(num_particles=2000 if loss is TraceConditionalKL_ELBO else 2).loss(
        jax.random.key(1), fit.params, linear, fit.svi.guide, jnp.asarray(Y, jnp.float32)
    )
    # The divergence apart from the draw's likelihood, of which each draw has its own: 2000 draws, five standard errors.
    tolerance = 0.1 if loss is TraceConditionalKL_ELBO else 1e-4
    assert -found == pytest.approx(float(pssm.log_likelihood(SSM, Y)), abs=tolerance)


def test_importance_weights_are_equal(fit):
    found = importance_bound(fit, num_particles=5)
    assert found.value == pytest.approx(float(pssm.log_likelihood(SSM, Y)), abs=1e-4)


def test_states_given_the_past_are_the_filters(fit):
    found = causal_draws(fit, [1], num_samples=2000)["z"][0]
    close_in_mean(found, pssm.kalman_smoother(SSM, np.where(np.arange(T)[:, None] < 1, Y, np.nan)))


def test_a_path_at_the_mode_does_not_move(x64):
    """Nor does compressing the messages to a diagonal and one column change that."""
    A3 = np.array([[0.8, 0.1, 0.0], [-0.2, 0.7, 0.3], [0.0, -0.3, 0.9]])
    emission = np.array([[1.0, 0.5, -0.3]])
    ssm = pssm.LinearGaussianSSM(np.zeros(3), np.eye(3), A3, 0.5 * np.eye(3), emission, np.eye(1))
    y = np.array([[1.0], [-0.5]])
    prior = StatePath(np.zeros(3), Diagonal(jnp.ones(3)), A3, Diagonal(jnp.full(3, 0.5)), 2)

    @jax.jit
    def move(z):
        def log_lik(z):
            return -0.5 * jnp.sum((y - z @ emission.T) ** 2, axis=(-1, -2))

        return gauss_newton_matrix_free(prior, log_lik, z, sd=jnp.full((2, 3), 0.5), rank=1, diagonal=True).move

    mode = pssm.kalman_smoother(ssm, y).mean
    np.testing.assert_allclose(move(mode), 0.0, atol=1e-9)
    assert np.abs(move(mode + 1.0)).max() > 0.1


def test_paths_of_particles_are_the_smoothers():
    found = pssm.particle_filter(jax.random.key(0), SSM, Y, num_particles=4000)
    close_in_mean(pssm.particle_smoother(jax.random.key(1), SSM, found, num_paths=2000), EXACT, slack=0.05)


def test_a_sweep_of_conditional_smc_keeps_the_posterior():
    exact = pssm.sample_states(jax.random.key(3), SSM, Y, sample_shape=(2000,))
    keys = jax.random.split(jax.random.key(4), len(exact))

    @jax.jit
    def sweep(keys, paths):
        return jax.vmap(lambda key, z: pssm.conditional_smc(key, SSM, Y, z, num_particles=5))(keys, paths)

    after = sweep(keys, exact)
    assert np.mean(np.asarray(after == exact).all((-1, -2))) < 0.7
    close_in_mean(after, EXACT)


def test_a_causal_guide_online_is_the_batch():
    encoder = nets.sequence_encoder(1, 1, 1, size=4, mixer="gru", causal=True, key=jax.random.key(0))
    guide = AmortizedStateSpace(linear, encoder=encoder, rank=1, causal=True, num_samples=5)
    y, key = jnp.asarray(Y, jnp.float32), jax.random.key(3)
    svi = SVI(linear, guide, optax.adam(1e-3), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), y))
    with handlers.seed(rng_seed=0), handlers.substitute(data=params), handlers.trace() as trace:
        guide(y)
    batch = trace["z"]["fn"].sample(key, (5,))
    one, two = jax.random.split(key)
    noise = jnp.concatenate([jax.random.normal(k, (T, 5, 1)) for k in (one, two)], axis=-1)
    run, state = guide.online(params, y), None
    for t in range(T):
        state, belief = run.assimilate(state, y[t], None, noise[t])
        np.testing.assert_allclose(belief.particles, batch[:, t], atol=1e-5)


def test_the_polished_fit_is_at_the_top(x64):
    y = np.array(pssm.simulate(jax.random.key(0), SSM, 60)[1])
    start = SSM.astype(jnp.float64)
    result = pssm.fit_em(y, start, fixed=("m0", "P0", "C"), num_iters=5, polish_steps=100)
    assert result.reason == "polished"

    def slopes(ssm):
        """Of the log-likelihood by `A` and the roots of `Q` and `R`."""
        slope = jax.grad(lambda v: pssm.log_likelihood(ssm.replace(A=v[0], chol_Q=v[1], chol_R=v[2]), y))
        return np.array(slope((ssm.A, ssm.chol_Q, ssm.chol_R))).ravel()

    assert np.abs(slopes(start)).max() > 1.0
    np.testing.assert_allclose(slopes(result.ssm), 0.0, atol=0.05)
