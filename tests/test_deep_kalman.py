"""`DeepKalmanGuide` and `ConditionedPath`: the dense Gaussian, the exact posterior, new trials, training."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from numpyro.infer import SVI, Trace_ELBO
from scipy.stats import multivariate_normal

import pssm
from pssm import nets
from pssm.distributions import ConditionedPath, StatePath, observe
from pssm.guides import DeepKalmanGuide
from pssm.infer import TraceConditionalKL_ELBO
from pssm.linalg import Diagonal

T, TRIALS, A, Q, R = 5, 4, 0.8, 0.5, 0.7  # standard deviations
RNG = np.random.default_rng(0)
Y = RNG.normal(size=(TRIALS, T, 1))
Y[0, 2], Y[1, 0] = np.nan, np.nan
SSM = pssm.LinearGaussianSSM(np.zeros(1), np.eye(1), [[A]], [[Q]], np.eye(1), [[R]])
W, V = RNG.normal(size=(2, 2)) * 0.5, RNG.normal(size=(2, 3)) * 0.5
SD, START = np.array([0.3, 0.8]), np.array([0.4, -0.6])


def linear(z, h):
    """`N(W z + V h, SD^2)`."""
    W_, V_, sd = (jnp.asarray(x, z.dtype) for x in (W, V, SD))
    return W_ @ z + V_ @ h, sd


def dense(h):
    """Mean and covariance of the linear path, from its definition as a map of independent normals."""
    mean, weights, means, maps = START, np.zeros((2, 2 * T)), [], []
    for t in range(T):
        mean, weights = W @ mean + V @ h[t], W @ weights
        weights[:, 2 * t : 2 * t + 2] = np.diag(SD)
        means.append(mean)
        maps.append(weights.copy())
    M = np.concatenate(maps)
    return np.concatenate(means), M @ M.T


@pytest.mark.parametrize("double", [False, True])
def test_density_and_draws_are_those_of_the_dense_gaussian(double):
    with jax.enable_x64(double):
        real = jnp.result_type(float)
        h = RNG.normal(size=(3, T, 3))
        q = ConditionedPath(linear, jnp.asarray(h, real), jnp.asarray(START, real))
        assert q.batch_shape == (3,)
        assert q.event_shape == (T, 2)
        z = q.sample(jax.random.key(0), (4000,))
        found = q.log_prob(z)
        assert found.dtype == real
        for i in range(3):
            mean, cov = dense(h[i])
            flat = np.asarray(z[:, i], float).reshape(4000, -1)
            expected = multivariate_normal(mean, cov).logpdf(flat)
            np.testing.assert_allclose(found[:, i], expected, atol=1e-8 if double else 2e-3)
            assert (np.abs(flat.mean(0) - mean) < 5 * np.sqrt(np.diag(cov) / 4000)).all()
            np.testing.assert_allclose(np.cov(flat.T), cov, atol=0.1)


@pytest.mark.parametrize("kind", ["diagonal", "dense", "timed"])
def test_kl_along_draws_averages_to_the_kl(kind, x64):
    """Against `E log q - log p` in closed form of the two dense Gaussians, and step by step for one path."""
    factor = {"diagonal": Diagonal(jnp.array([0.5, 0.9])), "dense": jnp.array([[0.5, 0.0], [0.4, 0.9]])}.get(kind)
    timed = ()
    if factor is None:
        factor, timed = jnp.asarray(RNG.normal(size=(T, 2, 2)) + 2 * np.eye(2)), ("chol_Q",)
    prior = StatePath(jnp.zeros(2), jnp.eye(2), 0.5 * jnp.eye(2), factor, T, time_varying=timed)
    h = RNG.normal(size=(T, 3))
    q = ConditionedPath(linear, jnp.asarray(h), jnp.asarray(START))
    z = q.sample(jax.random.key(1), (20_000,))
    along = np.asarray(q.kl_given(z, prior))
    assert (along > 0).all()
    sampled = np.asarray(q.log_prob(z) - prior.log_prob(z))
    error = np.sqrt((along.var() + sampled.var()) / len(z))
    assert abs(along.mean() - sampled.mean()) < 4 * error
    # One step from a known state, by the formula for two normals.
    one = ConditionedPath(linear, jnp.asarray(h[:1]), jnp.asarray(START))
    first = StatePath(jnp.array([0.3, 0.1]), jnp.array([[1.0, 0.0], [0.7, 0.4]]), jnp.eye(2), jnp.eye(2), 1)
    cov = np.array([[1.0, 0.7], [0.7, 0.65]])
    apart = W @ START + V @ h[0] - np.array([0.3, 0.1])
    inverse = np.linalg.inv(cov)
    ratio = np.log(np.linalg.det(cov)) - 2 * np.log(SD).sum()
    exact = 0.5 * (np.trace(inverse @ np.diag(SD**2)) + apart @ inverse @ apart - 2 + ratio)
    np.testing.assert_allclose(one.kl_given(one.sample(jax.random.key(0)), first), exact)


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="`start` must have shape"):
        ConditionedPath(linear, jnp.zeros((T, 3)), jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match="`h` must have shape"):
        ConditionedPath(linear, jnp.zeros(3), jnp.zeros(2))
    with pytest.raises(ValueError, match="`conditional` must return"):
        ConditionedPath(lambda z, h: (z, 1.0), jnp.zeros((T, 3)), jnp.zeros(2))
    with pytest.raises(TypeError, match="`combiner` must be a function"):
        DeepKalmanGuide(trials, encoder=kalman_numbers, combiner=3)


# --- the guide ------------------------------------------------------------------------------------------------------


def trials(y, size=None):
    one = jnp.ones((1, 1), jnp.result_type(float))
    with numpyro.plate("trials", len(y), subsample_size=size) as index:
        z = numpyro.sample("z", StatePath(jnp.zeros(1), one, A * one, Q * one, y.shape[1]))
        observe("y", dist.Normal(z, R).to_event(2), jnp.asarray(y)[index])


def kalman_numbers(y, u):
    """Slope, offset and standard deviation of the exact `z_t | z_{t-1}, y`, by the backward messages of one state."""

    def back(after, y):
        J, g = after  # of the message from the next step on, brought to this state
        seen = ~jnp.isnan(y[0])
        J = J + jnp.where(seen, R**-2, 0.0)
        g = g + jnp.where(seen, jnp.where(seen, y[0], 0.0) / R**2, 0.0)
        shrink = 1 + J * Q**2
        return (A**2 * J / shrink, A * g / shrink), (J, g)

    zero = jnp.zeros((), y.dtype)
    J, g = jax.lax.scan(back, (zero, zero), y, reverse=True)[1]
    noise = jnp.full(y.shape[0], Q**2, y.dtype).at[0].set(1.0)
    slope = jnp.full(y.shape[0], A, y.dtype).at[0].set(0.0)
    variance = 1 / (1 / noise + J)
    return jnp.stack([variance / noise * slope, variance * g, jnp.sqrt(variance)], axis=-1)


def follow(z, h):
    return h[:1] * z + h[1:2], h[2:]


def evidences():
    return np.array([oracles.log_likelihood(SSM, y) for y in Y])


def losses(guide, params, y, *args, loss=None, num=20):
    loss = Trace_ELBO() if loss is None else loss
    run = jax.jit(lambda keys: jax.lax.map(lambda k: loss.loss(k, params, trials, guide, y, *args), keys))
    return -np.asarray(run(jax.random.split(jax.random.key(1), num)))


@pytest.mark.parametrize("double", [False, True])
def test_exact_conditionals_are_the_exact_posterior(double):
    with jax.enable_x64(double):
        y = jnp.asarray(Y, jnp.result_type(float))
        guide = DeepKalmanGuide(trials, encoder=kalman_numbers, combiner=follow)
        assert guide.objective.startswith("lower bound")
        own = evidences()
        np.testing.assert_allclose(losses(guide, {}, y), own.sum(), rtol=1e-7 if double else 1e-5)
        analytic = losses(guide, {}, y, loss=TraceConditionalKL_ELBO(), num=400)
        assert abs(analytic.mean() - own.sum()) < 4 * analytic.std() / 20
        assert analytic.std() > 0
        found = losses(guide, {}, y, 1, num=40)  # a minibatch of one stands for all
        which = np.abs(found[:, None] - TRIALS * own).argmin(1)
        np.testing.assert_allclose(found, (TRIALS * own)[which], rtol=1e-5)
        assert len(set(which)) > 1
        np.testing.assert_allclose(losses(guide, {}, y[:2]), own[:2].sum(), rtol=1e-5)  # another number of trials


def test_draws_are_the_smoothers(x64):
    guide = DeepKalmanGuide(trials, encoder=kalman_numbers, combiner=follow)
    found = guide.sample_posterior(jax.random.key(2), {}, jnp.asarray(Y), sample_shape=(4000,))["z"]
    assert found.shape == (4000, TRIALS, T, 1)
    for i, y in enumerate(Y):
        mean, cov = oracles.states(SSM, y)["smoothed"]
        sd = np.sqrt(cov[:, 0])
        assert (np.abs(found[:, i].mean(0) - mean) < 5 * sd / np.sqrt(4000)).all()
        np.testing.assert_allclose(found[:, i].std(0), sd, rtol=0.06)


@pytest.mark.slow
def test_training_on_minibatches_comes_near_and_stays_a_bound():
    one, two, three = jax.random.split(jax.random.key(0), 3)
    encoder = nets.RecurrentFeatures(nets.StepMLP(1, 8, hidden=8, data=Y, key=one), nets.GRU(8, 8, key=two))
    guide = DeepKalmanGuide(trials, encoder=encoder, combiner=nets.Combiner(1, 8, key=three))
    y = jnp.asarray(Y, jnp.float32)
    svi = SVI(trials, guide, optax.adam(2e-2), TraceConditionalKL_ELBO(4))
    result = svi.run(jax.random.key(0), 300, y, 2, progress_bar=False)
    assert np.isfinite(result.losses).all()
    found = losses(guide, result.params, y, num=200).mean()
    assert evidences().sum() - 1.5 < found < evidences().sum()
    start = eqx.filter(guide.posterior.combiner, nets.is_trainable)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max() > 0, result.params["z_auto_combiner$params"], start)
    assert all(jax.tree.leaves(moved))
    new = guide.sample_posterior(jax.random.key(0), result.params, jnp.zeros((2, T, 1)), sample_shape=(3,))["z"]
    assert new.shape == (3, 2, T, 1)


def test_the_combiner_is_the_formula():
    """`c = (tanh(W z + b) + h) / 2`, mean `W_m c`, variance `softplus(W_s c)`; features run backward."""
    combine = nets.Combiner(2, 5, key=jax.random.key(1))
    z, h = jnp.array([0.3, -2.0]), jnp.linspace(-1.0, 1.0, 5)
    mean, sd = combine(z, h)
    c = 0.5 * (np.tanh(combine.pull.weight @ z + combine.pull.bias) + h)
    np.testing.assert_allclose(mean, combine.mean.weight @ c + combine.mean.bias, rtol=1e-5)
    np.testing.assert_allclose(sd**2, np.log1p(np.exp(combine.variance.weight @ c + combine.variance.bias)), rtol=1e-5)
    one, two = jax.random.split(jax.random.key(2))
    front, mixer = nets.StepMLP(1, 4, hidden=4, key=one), nets.GRU(4, 5, key=two)
    y = jnp.asarray(RNG.normal(size=(T, 1)), jnp.float32)
    for reverse, kept in ((True, slice(3, None)), (False, slice(None, 3))):
        features = nets.RecurrentFeatures(front, mixer, reverse)
        changed = y.at[2 if reverse else 3].add(1.0)
        np.testing.assert_array_equal(features(changed)[kept], features(y)[kept])
        assert np.abs(features(changed) - features(y)).max() > 1e-3
    gone = features(y.at[1].set(jnp.nan))
    assert np.isfinite(gone).all()


def test_features_of_another_length_are_named():
    guide = DeepKalmanGuide(trials, encoder=lambda y, u: jnp.zeros((2, 3)), combiner=follow)
    with pytest.raises(ValueError, match="`encoder` must give features of shape"):
        losses(guide, {}, jnp.asarray(Y, jnp.float32))
