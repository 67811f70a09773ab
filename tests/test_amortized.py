"""`AmortizedStateSpace`: exact with the exact encoder, minibatches, held-out trials, online, refined, guarded."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import oracles
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

import pssm
from pssm import nets
from pssm.distributions import LowRankMomentMatched, StatePath, observe
from pssm.guides import AmortizedStateSpace, AutoStateSpace
from pssm.infer import TraceConditionalKL_ELBO, fit_svi

T, TRIALS, NOISE = 6, 3, 0.7
RNG = np.random.default_rng(0)
A, B, C = 0.6 * RNG.normal(size=(2, 2)), RNG.normal(size=(2, 1)), RNG.normal(size=(3, 2))
SD = np.array([0.6, 0.4])
U = RNG.normal(size=(T, 1))
SSM = pssm.LinearGaussianSSM(np.zeros(2), np.eye(2), A, np.diag(SD), C, NOISE * np.eye(3), B=B)
Y = RNG.normal(size=(TRIALS, T, 3))
Y[0, 2], Y[0, 3, 1], Y[1, 0], Y[1, -1], Y[2, 4, :2] = (np.nan,) * 5


def trials(y, size=None):
    own = [jnp.asarray(x, jnp.result_type(float)) for x in (np.zeros(2), np.eye(2), A, np.diag(SD), U, B)]
    with numpyro.plate("trials", len(y), subsample_size=size) as index:
        z = numpyro.sample("z", StatePath(*own[:4], T, own[4], B=own[5]))
        observe("y", dist.Normal(z @ C.T, NOISE).to_event(2), jnp.asarray(y)[index])


def messages(y, u):
    """An encoder with nothing to learn: the exact backward messages, in information form."""
    seen = ~jnp.isnan(y)
    rows = jnp.asarray(C, y.dtype) * seen[:, :, None] / NOISE  # (time, obs, state)
    W = jnp.einsum("tpi,tpj->tij", rows, rows)
    g = jnp.einsum("tpi,tp->ti", rows, jnp.where(seen, y, 0.0) / NOISE)
    Q, offset = jnp.diag(jnp.asarray(SD, y.dtype) ** 2), u @ jnp.asarray(B, y.dtype).T

    def back(after, xs):
        J, h = after
        W, g, o = xs
        keep = jnp.linalg.inv(jnp.eye(2, dtype=y.dtype) + J @ Q)
        J, h = W + A.T @ keep @ J @ A, g + A.T @ keep @ (h - J @ o)
        return (J, h), (J, h)

    # What acts on the step into t + 1 stands with the message of t + 1.
    _, (J, h) = jax.lax.scan(back, (W[-1], g[-1]), (W[:-1], g[:-1], offset[1:]), reverse=True)
    J, h = jnp.concatenate([J, W[-1:]]), jnp.concatenate([h, g[-1:]])
    values, vectors = jnp.linalg.eigh(J)
    return h, vectors * jnp.sqrt(jnp.maximum(values, 0.0))[:, None, :], jnp.zeros_like(h)


def evidences():
    return np.array([oracles.log_likelihood(SSM, y, U) for y in Y])


def losses(guide, params, *args, loss=None, num=20, model=trials):
    loss = Trace_ELBO() if loss is None else loss
    one = jax.jit(lambda key: loss.loss(key, params, model, guide, *args))
    return -np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(1), num)))


def test_exact_messages_are_the_exact_posterior(x64):
    guide = AmortizedStateSpace(trials, encoder=messages, rank=2)
    np.testing.assert_allclose(losses(guide, {}, Y), evidences().sum(), rtol=1e-6)
    found = guide.sample_posterior(jax.random.key(2), {}, Y, sample_shape=(4000,))["z"]
    assert found.shape == (4000, TRIALS, T, 2)
    for i, y in enumerate(Y):
        mean, cov = oracles.states(SSM, y, U)["smoothed"]
        sd = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
        assert (np.abs(found[:, i].mean(0) - mean) < 5 * sd / np.sqrt(4000)).all()
        np.testing.assert_allclose(found[:, i].std(0), sd, rtol=0.06)


def test_a_minibatch_stands_for_all_trials_and_new_trials_need_no_training(x64):
    guide = AmortizedStateSpace(trials, encoder=messages, rank=2)
    own = evidences()
    found = losses(guide, {}, Y, 1, num=40)
    which = np.abs(found[:, None] - TRIALS * own).argmin(1)
    np.testing.assert_allclose(found, (TRIALS * own)[which], rtol=1e-6)
    assert set(which) == {0, 1, 2}
    np.testing.assert_allclose(losses(guide, {}, Y[:2]), own[:2].sum(), rtol=1e-6)  # another number of trials


def tiny(**options):
    return nets.sequence_encoder(3, 2, 1, size=8, n_input=1, data=Y, key=jax.random.key(0), **options)


def data(double):
    return Y if double else Y.astype(np.float32)


@functools.cache
def trained(double):
    """A guide with a small network after a few steps."""
    with jax.enable_x64(double):
        guide = AmortizedStateSpace(trials, encoder=tiny(), rank=1, masking=nets.hide_steps(0.2))
        svi = SVI(trials, guide, optax.adam(3e-2), TraceConditionalKL_ELBO(4))
        result = svi.run(jax.random.key(0), 150, data(double), 2, progress_bar=False)
        return guide, result


@pytest.mark.parametrize("double", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_on_minibatches_comes_near(double):
    guide, result = trained(double)
    with jax.enable_x64(double):
        assert np.isfinite(result.losses).all()
        found = losses(guide.replace(masking=None), result.params, data(double), num=200)
        assert evidences().sum() - 4 < found.mean() < evidences().sum()
        refined = losses(guide.replace(masking=None, refine=1), result.params, data(double))
        np.testing.assert_allclose(refined, evidences().sum(), atol=0.2)  # linear: one round is nearly exact
        leaves = jax.tree.leaves(result.params["z_auto_encoder$params"])
        assert all(x.dtype == jnp.result_type(float) for x in leaves)


def test_gradients_are_finite_with_missing_data():
    guide, result = trained(False)
    loss = TraceConditionalKL_ELBO()
    y = np.full_like(data(False), np.nan)
    y[0] = Y[0]
    slope = jax.grad(lambda p: loss.loss(jax.random.key(0), p, trials, guide, y))(result.params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
    nothing = losses(guide.replace(masking=None), result.params, y[1:])
    np.testing.assert_allclose(nothing, 0.0, atol=1e-4)  # trials without data: the prior


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["lstm", "s5", "attention"])
def test_other_mixers_are_trained(mixer):
    guide = AmortizedStateSpace(trials, encoder=tiny(mixer=mixer), rank=1)
    svi = SVI(trials, guide, optax.adam(1e-2), TraceConditionalKL_ELBO(2))
    result = svi.run(jax.random.key(0), 150, data(False), progress_bar=False)
    assert np.isfinite(result.losses).all()
    found = losses(guide, result.params, data(False), num=100).mean()
    assert evidences().sum() - 5 < found < evidences().sum()
    start = eqx.filter(tiny(mixer=mixer).mixer, nets.is_trainable)
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max() > 0, result.params["z_auto_encoder$params"].mixer, start)
    assert all(jax.tree.leaves(moved))


def test_fit_svi_takes_it_and_coordinated_dropout_goes_through_data():
    def model(scored, seen=None):
        trials(scored)

    guide = AmortizedStateSpace(model, encoder=tiny(), rank=1, data=lambda scored, seen=None: seen)
    seen, scored = nets.coordinated_dropout(jax.random.key(0), jnp.asarray(Y, jnp.float32), 0.3)
    with pytest.warns(UserWarning, match="not converged"):
        fit = fit_svi(model, scored, seen, guide=guide, num_steps=20, learning_rate=0.1, progress_bar=False)
    assert fit.losses[-1] < fit.losses[0]
    with pytest.raises(ValueError, match="`data`: `data` must have shape"):
        losses(AmortizedStateSpace(model, encoder=tiny(), rank=1, data=lambda *a: jnp.ones((2, 2))), {}, scored)


# --- causal ----------------------------------------------------------------------------------------------------------


def one_series(y):
    f = lambda z, u: jnp.tanh(jnp.asarray(A, z.dtype) @ z) + jnp.asarray(B, z.dtype) @ u  # noqa: E731
    z = numpyro.sample("z", StatePath(jnp.zeros(2), jnp.eye(2), f, jnp.diag(jnp.asarray(SD)), T, jnp.asarray(U)))
    observe("y", dist.Normal(z @ C.T, NOISE).to_event(2), y)


def test_online_chain_equals_the_batch_draws():
    guide = AmortizedStateSpace(one_series, encoder=tiny(causal=True), rank=1, causal=True, num_samples=5)
    y, key = jnp.asarray(Y[0], jnp.float32), jax.random.key(3)
    svi = SVI(one_series, guide, optax.adam(1e-3), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), y))
    run = guide.online(params, y)

    with handlers.seed(rng_seed=0), handlers.substitute(data=params), handlers.trace() as trace:
        guide(y)
    batch = trace["z"]["fn"].sample(key, (5,))
    noise_key, pull_key = jax.random.split(key)
    noise = jnp.concatenate([jax.random.normal(noise_key, (T, 5, 2)), jax.random.normal(pull_key, (T, 5, 1))], axis=-1)
    assert run.noise_size == 3
    state, u = None, jnp.asarray(U, jnp.float32)
    for t in range(T):
        state, belief = run.assimilate(state, y[t], u[t], noise[t])
        np.testing.assert_allclose(belief.particles, batch[:, t], atol=1e-5)
    # A row depends on the data up to it.
    changed = guide.sample_posterior(key, params, y.at[4].add(1.0))["z"]
    same = guide.sample_posterior(key, params, y)["z"]
    np.testing.assert_array_equal(changed[:4], same[:4])
    assert np.abs(changed[4] - same[4]).max() > 0
    state, belief = run.start(key, y[0], u[0])
    state, belief = run.step(state, y[1], u[1])
    assert np.isfinite(belief.variance).all()
    assert (belief.variance > 0).all()


class Exact(eqx.Module):
    """The likelihood of each step, exact: with it the moment-matched recursion is the Kalman filter."""

    causal = True

    def __call__(self, y, u=None):
        return jax.vmap(lambda y: self.step((), y)[1])(y)

    def start(self):
        return ()

    def step(self, state, y, u=None):
        seen = ~jnp.isnan(y)
        K = jnp.where(seen[:, None], jnp.asarray(C, y.dtype), 0.0).T / NOISE
        return state, nets.PseudoObservation(K, b=jnp.where(seen, y, 0.0) / NOISE, mask=seen.any())


def linear_series(y):
    own = [jnp.asarray(x, jnp.result_type(float)) for x in (np.zeros(2), np.eye(2), A, np.diag(SD), U, B)]
    z = numpyro.sample("z", StatePath(*own[:4], T, own[4], B=own[5]))
    observe("y", dist.Normal(z @ C.T, NOISE).to_event(2), y)


def test_online_moment_matched_is_the_batch_and_nearly_the_kalman_filter(x64):
    guide = AmortizedStateSpace(
        linear_series, encoder=Exact(), rank=3, family="moment_matched", causal=True, num_samples=500
    )
    y, key = jnp.asarray(Y[0]), jax.random.key(1)
    run = guide.online({}, y)
    q = LowRankMomentMatched(path_prior(y), **Exact()(y).arguments(), key=key, num_samples=500)
    noise = jax.random.normal(key, (T, 500, run.noise_size))
    state, beliefs = None, []
    for t in range(T):
        state, belief = run.assimilate(state, y[t], jnp.asarray(U[t]), noise[t])
        beliefs.append(belief)
    np.testing.assert_allclose([b.mean for b in beliefs], q.mean, atol=1e-9)
    np.testing.assert_allclose([b.variance for b in beliefs], q.variance, atol=1e-9)
    truth = oracles.states(SSM, Y[0], U)["filtered"]
    np.testing.assert_allclose(q.mean, truth[0], atol=0.15)
    np.testing.assert_allclose(q.variance, np.diagonal(truth[1], axis1=1, axis2=2), rtol=0.25)


def path_prior(y):
    return handlers.trace(handlers.seed(linear_series, 0)).get_trace(y)["z"]["fn"]


def test_what_is_not_causal_is_refused():
    with pytest.raises(ValueError, match="`causal` is True, but `encoder` sees the future"):
        AmortizedStateSpace(trials, encoder=tiny(), rank=1, causal=True)
    with pytest.raises(ValueError, match="`refine` uses all data"):
        AmortizedStateSpace(trials, encoder=tiny(causal=True), rank=1, causal=True, refine=1)
    with pytest.raises(ValueError, match="`causal=True` is needed"):
        AmortizedStateSpace(trials, encoder=tiny(), rank=1).online({}, Y)
    with pytest.raises(TypeError, match="`encoder` must be a function"):
        AmortizedStateSpace(trials, encoder=3, rank=1)
    with pytest.raises(ValueError, match="`replace` changes"):
        AmortizedStateSpace(trials, encoder=tiny(), rank=1).replace(rank=2)


def test_published_causal_form_filters_with_the_local_part():
    keys = jax.random.split(jax.random.key(0), 4)
    head = functools.partial(nets.PotentialHead, 8, 2, diagonal=False)
    local = nets.LocalEncoder(nets.StepMLP(3, 8, n_input=1, key=keys[0]), head(1, key=keys[1]))
    mixer = nets.GRU(local.head.size + 1, 8, key=keys[2])
    encoder = nets.SmoothingEncoder(local, nets.BackwardEncoder(mixer, head(2, key=keys[3])))
    guide = AmortizedStateSpace(
        linear_series, encoder=encoder, rank=3, family="moment_matched", causal=True, num_samples=20
    )
    y = jnp.asarray(Y[0], jnp.float32)
    assert guide.objective.startswith("surrogate")
    svi = SVI(linear_series, guide, optax.adam(1e-3), TraceConditionalKL_ELBO())
    params = svi.get_params(svi.init(jax.random.key(0), y))

    def posterior(y):
        with handlers.seed(rng_seed=0), handlers.substitute(data=params), handlers.trace() as trace:
            guide(y)
        return trace["z"]["fn"]

    one, other = posterior(y), posterior(y.at[5].add(1.0))
    assert np.isfinite(one.kl).all()
    assert np.abs(one.mean[:5] - other.mean[:5]).max() > 1e-6  # smoothed
    run = guide.online(params, y)
    state, belief = run.start(jax.random.key(0), y[0], jnp.asarray(U[0], jnp.float32))  # the local part alone
    assert np.isfinite(belief.mean).all()


# --- explosive dynamics ----------------------------------------------------------------------------------------------


def cubic(y):
    drift = numpyro.param("drift", 0.5)
    z = numpyro.sample("z", StatePath(jnp.zeros(1), 3 * jnp.eye(1), lambda z, u: z + drift * z**3, jnp.eye(1), 20))
    observe("y", dist.Poisson(jnp.exp(jnp.minimum(z, 20.0)), validate_args=False).to_event(2), y)


def test_an_explosive_drift_is_held_and_reported():
    encoder = nets.sequence_encoder(1, 1, 1, size=4, key=jax.random.key(0))
    y = jnp.ones((20, 1))
    guide = AmortizedStateSpace(cubic, encoder=encoder, rank=1, limit=50.0)
    svi = SVI(cubic, guide, optax.adam(1e-3), TraceConditionalKL_ELBO(8))
    params = svi.get_params(svi.init(jax.random.key(0), y))
    run = jax.value_and_grad(lambda p: svi.loss.loss(jax.random.key(1), p, cubic, guide, y))
    value, slope = jax.jit(run)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
    assert 0 < guide.exploded(jax.random.key(2), params, y) <= 1
    with pytest.raises(FloatingPointError, match="`limit`"):
        fit_svi(cubic, y, guide=guide.replace(limit=None), num_steps=10, progress_bar=False)


# --- refined ---------------------------------------------------------------------------------------------------------

READOUT = np.random.default_rng(3).normal(size=(10, 2)) / 2**0.5


def oscillators(y=None, size=None, count=60):
    """Van der Pol, counts of ten channels."""
    field = lambda z, u: jnp.stack([z[0] + 0.1 * z[1], z[1] + 0.1 * (1.5 * (1 - z[0] ** 2) * z[1] - z[0])])  # noqa: E731
    with numpyro.plate("trials", count if y is None else len(y), subsample_size=size) as index:
        prior = StatePath(jnp.array([1.0, 0.0]), 0.7 * jnp.eye(2), field, 0.1 * jnp.eye(2), 30)
        z = numpyro.sample("z", prior)
        rate = jnp.exp(jnp.minimum(z @ jnp.asarray(READOUT.T, z.dtype), 12.0))
        return observe("y", dist.Poisson(rate).to_event(2), None if y is None else y[index])


@pytest.mark.slow
def test_one_round_closes_half_of_what_the_encoder_leaves():
    y = jnp.asarray(handlers.seed(oscillators, 0)(), jnp.float32)
    train, held = y[:50], y[50:]
    encoder = nets.sequence_encoder(10, 2, 1, size=16, data=train, key=jax.random.key(0))
    guide = AmortizedStateSpace(oscillators, encoder=encoder, rank=1, limit=6.0)
    optimizer = optax.chain(optax.clip_by_global_norm(1e4), optax.adam(5e-3))
    svi = SVI(oscillators, guide, optimizer, TraceConditionalKL_ELBO(2))
    result = svi.run(jax.random.key(0), 400, train, 10, progress_bar=False)
    assert np.isfinite(result.losses).all()
    best = AutoStateSpace(oscillators, rank=2, potentials="mode")
    start = SVI(oscillators, best, optax.adam(1e-3), Trace_ELBO())
    params = start.get_params(start.init(jax.random.key(0), held))
    target = losses(best, params, held, num=50, model=oscillators).mean()
    plain = losses(guide, result.params, held, num=50, model=oscillators).mean()
    one, two = (
        losses(guide.replace(refine=i, refine_rank=2), result.params, held, num=50, model=oscillators).mean()
        for i in (1, 2)
    )
    assert plain < target
    assert target - one < 0.5 * (target - plain)
    assert target - two < 0.5 * (target - plain)
