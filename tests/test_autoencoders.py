"""The Kalman autoencoders and `AmortizedFrames`: one draw's ELBO against dense Gaussians, gaps, linearisations."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import optax
import oracles
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO

from pssm import LinearGaussianSSM, NonlinearSSM, gaussian_filter, gaussian_smoother, kalman_filter, nets
from pssm.distributions import HistoryMarginal, ImputedSeries, LinearGaussianPosterior, StatePath
from pssm.filters.along import along_filter
from pssm.guides import AmortizedFrames
from pssm.linalg import Diagonal
from pssm.models import deep_markov, extended_kalman_vae, kalman_vae

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
STEPS, SIZE, STATES, SIGMA = 6, 2, 3, 0.5
A = 0.4 * RNG.normal(size=(STATES, STATES))
FRAMES = RNG.normal(size=(2, STEPS, SIZE))
FRAMES[0, 2], FRAMES[1, 0], FRAMES[1, 5] = np.nan, np.nan, np.nan

precision = pytest.mark.parametrize("precise", [False, True], ids=["float32", "float64"])


class Linear(eqx.Module):
    """Linear dynamics with the methods of a locally linear transition."""

    A: jax.Array

    def affine(self, z, u=None):
        return self.A, jnp.zeros_like(z)

    def __call__(self, z, u=None):
        return self.A @ z


def encoder(y):
    return 0.3 * jnp.where(jnp.isnan(y), 0.0, y) + 0.1, 0.2 * jnp.ones(SIZE, y.dtype)


def normal(x, mean, sd):
    return -0.5 * ((x - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)


def one_draw(model, guide, frames):
    """The codes of a guide's draw, and the ELBO of that draw."""
    key = jax.random.key(3)

    def run(frames):
        codes = handlers.trace(handlers.seed(guide, jax.random.split(key)[1])).get_trace(frames)["a"]["value"]
        return codes, -Trace_ELBO().loss(key, {}, model, guide, frames)

    return jax.tree.map(np.asarray, jax.jit(run)(frames))


def exact_bound(ssm, codes, frames):
    """`log p(a_seen) + log p(y | a_seen) - log q(a_seen | y)`: states and codes of missing frames integrated out."""
    total = 0.0
    for a, y in zip(codes.astype(float), frames, strict=True):
        seen = ~np.isnan(y)
        own = np.where(seen, normal(np.nan_to_num(y), a, SIGMA) - normal(a, 0.3 * np.nan_to_num(y) + 0.1, 0.2), 0.0)
        total += oracles.log_likelihood(ssm, np.where(seen, a, np.nan)) + own.sum()
    return total


@precision
def test_with_linear_dynamics_one_draw_of_the_extended_kalman_vae_is_exact(precise):
    with jax.enable_x64(precise):
        frames = jnp.asarray(FRAMES, float)
        model = partial(
            extended_kalman_vae,
            num_states=STATES,
            transition=Linear(jnp.asarray(A, float)),
            decoder=lambda a: a,
            sigma_obs=SIGMA,
        )
        codes, value = one_draw(model, AmortizedFrames(model, encoder=encoder), frames)
        eye = 0.1 * np.eye(STATES)
        ssm = LinearGaussianSSM(jnp.zeros(STATES), jnp.eye(STATES), A, eye, jnp.eye(SIZE, STATES), eye[:SIZE, :SIZE])
        expected = exact_bound(ssm, codes, FRAMES)
    assert abs(value - expected) < (1e-8 if precise else 1e-2), (value, expected)


@precision
def test_with_equal_bases_one_draw_of_the_kalman_vae_is_exact(precise):
    with jax.enable_x64(precise):
        frames = jnp.asarray(FRAMES, float)
        model = partial(kalman_vae, num_states=STATES, num_bases=1, decoder=lambda a: a, sigma_obs=SIGMA)
        trace = handlers.trace(handlers.seed(model, 0)).get_trace(frames)
        bases = trace["bases$params"]["value"]
        ssm = LinearGaussianSSM(
            jnp.zeros(STATES),
            4.5 * jnp.eye(STATES),
            bases.A[0],
            0.28 * jnp.eye(STATES),
            bases.C[0],
            0.17 * jnp.eye(SIZE),
        )
        codes, value = one_draw(model, AmortizedFrames(model, encoder=encoder), frames)
        expected = exact_bound(ssm, codes, FRAMES)
    assert abs(value - expected) < (1e-8 if precise else 1e-2), (value, expected)


def mixture(num_steps=STEPS, u=None, scale=3.0):
    """A `HistoryMarginal` whose weights move a lot."""
    keys = jax.random.split(jax.random.key(5), 4)
    weights = nets.HistoryWeights(SIZE, 2, 4, key=keys[0])
    weights = eqx.tree_at(lambda w: w.linear.weight, weights, replace_fn=lambda x: scale * x / 0.3)
    matrices = [0.5 * jax.random.normal(k, (2, *s)) for k, s in zip(keys[1:], [(3, 3), (SIZE, 3), (3, 1)], strict=True)]
    eye = jnp.eye(3)
    bases = LinearGaussianSSM(
        jnp.ones(3),
        eye,
        matrices[0],
        0.3 * eye,
        matrices[1],
        0.2 * eye[:SIZE, :SIZE],
        B=None if u is None else matrices[2],
    )
    return HistoryMarginal(bases, weights, num_steps, u)


def test_density_of_a_history_marginal_is_the_product_of_dense_predictions(x64):
    u = jnp.asarray(RNG.normal(size=(STEPS, 1)))
    prior = mixture(u=u)
    a = RNG.normal(size=(STEPS, SIZE))
    total = 0.0
    for t in range(STEPS):  # each prediction with the weights that the codes before it give, one at a time
        state, before, w = prior.weights.start(), prior.weights.before, []
        for s in range(t + 1):
            state, now = prior.weights.step(state, before)
            w.append(now)
            before = jnp.asarray(a[s])
        mixed = {n: jnp.stack([jnp.tensordot(x, getattr(prior.bases, n), 1) for x in w]) for n in ("A", "B", "C")}
        ssm = prior.bases.replace(**mixed, time_varying=("A", "B", "C"))
        total += oracles.log_likelihoods(ssm, a[: t + 1], np.asarray(u))[t]
    assert float(jax.jit(prior.log_prob)(jnp.asarray(a))) == pytest.approx(total, abs=1e-9)
    without, with_gaps = (prior.system(jnp.asarray(a), gaps=gaps) for gaps in (False, True))
    np.testing.assert_allclose(without.A, with_gaps.A, rtol=1e-12)
    assert np.ptp(np.asarray(without.A), axis=0).max() > 0.1


def test_draws_of_a_history_marginal_have_the_predictions_errors():
    """Whitened by the filter of the model that their own past makes, draws are standard normal."""
    prior = mixture(u=jnp.ones((STEPS, 1)))

    @jax.jit
    def whitened(key):
        a = prior.sample(key, (2000,))
        ssm = prior.system(a, gaps=False)
        found = kalman_filter(ssm, a, prior.u)
        mean = jnp.einsum("...ij,...j->...i", ssm.C, found.predicted_mean)
        cov = ssm.C @ found.predicted_cov @ jnp.swapaxes(ssm.C, -1, -2) + ssm.R
        return jnp.linalg.solve(jnp.linalg.cholesky(cov), (a - mean)[..., None])[..., 0]

    e = np.asarray(whitened(KEY))
    np.testing.assert_allclose(e.mean(0), 0.0, atol=0.1)
    np.testing.assert_allclose(
        np.einsum("bti,btj->tij", e, e) / 2000, np.broadcast_to(np.eye(SIZE), (STEPS, 2, 2)), atol=0.12
    )


def test_weights_of_a_gap_come_from_the_filters_prediction(x64):
    prior = mixture()
    a = RNG.normal(size=(STEPS, SIZE))
    a[2] = np.nan
    found = prior.system(jnp.asarray(a))
    before = prior.system(jnp.asarray(np.nan_to_num(a))).steps(0, 3)  # weights up to step 2 do not know a_2
    j = oracles.joint(before, 3)
    mean, _ = oracles.condition(j, j.y(2), *oracles.seen(j, a[:3], 2))
    filled = a.copy()
    filled[2] = mean
    np.testing.assert_allclose(found.C, prior.system(jnp.asarray(filled), gaps=False).C, atol=1e-10)


def random_ssm(rng):
    eye = np.eye(3)
    timed = {"A": 0.5 * rng.normal(size=(STEPS, 3, 3)), "C": rng.normal(size=(STEPS, 2, 3))}
    fixed = {"chol_Q": np.tril(rng.normal(size=(3, 3))) + eye, "chol_R": np.tril(rng.normal(size=(2, 2))) + np.eye(2)}
    ssm = LinearGaussianSSM(
        rng.normal(size=3),
        eye,
        **timed,
        **fixed,
        B=rng.normal(size=(3, 1)),
        D=rng.normal(size=(2, 1)),
        d=rng.normal(size=2),
        time_varying=("A", "C"),
    )
    y, u = rng.normal(size=(STEPS, 2)), rng.normal(size=(STEPS, 1))
    y[1], y[3, 0] = np.nan, np.nan
    return ssm, y, u


def log_normal(x, mean, cov):
    white = np.linalg.solve(np.linalg.cholesky(cov), x - mean)
    return -0.5 * (white @ white + np.linalg.slogdet(2 * np.pi * cov)[1])


@precision
def test_posterior_of_the_states_is_the_dense_conditional(precise):
    with jax.enable_x64(precise):
        ssm, y, u = random_ssm(np.random.default_rng(1))
        q = LinearGaussianPosterior(ssm, y, u)
        z = q.sample(KEY, (4000,))
        density, average = np.asarray(jax.jit(q.log_prob)(z[:3])), np.asarray(q.mean)
        slope = jax.jit(jax.grad(lambda y: LinearGaussianPosterior(ssm, y, u).log_prob(z[0])))(jnp.asarray(y, float))
    z, j = np.asarray(z, float), oracles.joint(ssm, STEPS, u)
    every = np.arange(STEPS * 3)
    mean, cov = oracles.condition(j, every, *oracles.seen(j, y, STEPS))
    for x, value in zip(z[:3], density, strict=True):
        assert value == pytest.approx(log_normal(x.ravel(), mean, cov), abs=1e-9 if precise else 2e-4)
    np.testing.assert_allclose(z.reshape(4000, -1).mean(0), mean, atol=0.1)
    np.testing.assert_allclose(np.cov(z.reshape(4000, -1).T), cov, atol=0.15)
    np.testing.assert_allclose(average.ravel(), mean, atol=1e-4)
    assert np.isfinite(np.where(np.isnan(y), 0.0, slope)).all()


def test_imputed_series_is_the_dense_conditional(x64):
    ssm, y, u = random_ssm(np.random.default_rng(2))
    seen = np.array([True, True, False, True, False, True])
    location, scale = RNG.normal(size=(STEPS, 2)), 0.5 + RNG.random((STEPS, 2))
    q = ImputedSeries(location, scale, jnp.asarray(seen), lambda a: ssm, jnp.asarray(u))
    draws = q.sample(KEY, (4000,))
    a = np.asarray(draws[0])
    j = oracles.joint(ssm, STEPS, u)
    rest = np.concatenate([j.y(t) for t in range(STEPS) if not seen[t]])
    mean, cov = oracles.condition(j, rest, *oracles.seen(j, np.where(seen[:, None], a, np.nan), STEPS))
    expected = normal(a, location, scale)[seen].sum() + log_normal(a[~seen].ravel(), mean, cov)
    assert float(q.log_prob(draws[0])) == pytest.approx(expected, abs=1e-9)
    known = np.concatenate([j.y(t) for t in range(STEPS) if seen[t]])
    at_mean, _ = oracles.condition(j, rest, known, location[seen].ravel())
    np.testing.assert_allclose(np.asarray(draws)[:, ~seen].reshape(4000, -1).mean(0), at_mean, atol=0.15)


def curved(z, u):
    return jnp.stack([z[0] + 0.2 * z[1], z[1] - 0.4 * jnp.sin(z[0]) + u[0], 0.5 * z[2]])


def test_the_model_along_the_filter_is_that_of_the_extended_smoother(x64):
    a, u = RNG.normal(size=(STEPS, SIZE)), jnp.asarray(0.1 * RNG.normal(size=(STEPS, 1)))
    a[3] = np.nan
    path = StatePath(jnp.zeros(3), Diagonal(jnp.ones(3)), curved, Diagonal(0.1 * jnp.ones(3)), STEPS, u)
    ssm = along_filter(path, 0.2 * jnp.ones(SIZE), jnp.asarray(a), linearization="jacobian")
    model = NonlinearSSM(
        jnp.zeros(3), jnp.eye(3), curved, 0.1 * jnp.eye(3), lambda z: dist.Normal(z[:SIZE], 0.2).to_event(1)
    )
    expected = gaussian_smoother(model, a, u)
    found = LinearGaussianPosterior(ssm, a).moments()
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-9)
    np.testing.assert_allclose(found.cov, expected.cov, atol=1e-9)


def test_the_filter_along_a_series_knows_noise_that_varies(x64):
    """Singular, and different at every step; with a first state that is known."""
    a, u = RNG.normal(size=(STEPS, SIZE)), jnp.asarray(0.1 * RNG.normal(size=(STEPS, 1)))
    a[3, 0] = np.nan
    noise = jnp.asarray(RNG.normal(size=(STEPS, 3, 2)))
    start = jnp.diag(jnp.array([0.0, 1.0, 2.0]))
    path = StatePath(jnp.zeros(3), start, curved, noise, STEPS, u, time_varying=("chol_Q",))
    ssm = along_filter(path, 0.2 * jnp.ones(SIZE), jnp.asarray(a), linearization="jacobian")
    model = NonlinearSSM(
        jnp.zeros(3), start, curved, noise, lambda z: dist.Normal(z[:SIZE], 0.2).to_event(1), time_varying=("chol_Q",)
    )
    expected = gaussian_filter(model, a, u)
    found = kalman_filter(ssm, a)
    assert float(found.log_likelihood) == pytest.approx(float(expected.log_likelihood), rel=1e-9)
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-9)
    np.testing.assert_allclose(found.cov, expected.cov, atol=1e-9)


def test_local_matrices_are_those_at_the_filtered_means():
    f = nets.LocallyLinearTransition(3, 4, 8, n_input=1, key=KEY)
    f = eqx.tree_at(lambda m: (m.A, m.B), f, replace_fn=lambda x: x + 0.5 * jax.random.normal(KEY, x.shape))
    u = jnp.ones((STEPS, 1))
    a = jnp.asarray(RNG.normal(size=(2, STEPS, SIZE)), jnp.float32)
    path = StatePath(jnp.zeros(3), Diagonal(jnp.ones(3)), f, Diagonal(0.1 * jnp.ones(3)), STEPS, u)
    ssm = jax.jit(lambda a: along_filter(path, 1e-3 * jnp.ones(SIZE), a))(a)
    means = jax.jit(lambda a: kalman_filter(ssm, a).mean)(a)
    np.testing.assert_allclose(means[..., :SIZE], a, atol=1e-3)
    F, b = jax.vmap(jax.vmap(f.affine))(means[:, :-1], jnp.broadcast_to(u[1:], (2, STEPS - 1, 1)))
    np.testing.assert_allclose(ssm.A[:, 1:], F, atol=1e-4)
    np.testing.assert_allclose(ssm.b[:, 1:], b, atol=1e-4)
    moved = jax.vmap(jax.vmap(f))(means[:, :-1], jnp.broadcast_to(u[1:], (2, STEPS - 1, 1)))
    np.testing.assert_allclose(jnp.einsum("btij,btj->bti", F, means[:, :-1]) + b, moved, atol=1e-5)


def steps_of(model, guide, frames, count=2, **options):
    """The SVI and its state after some steps, from two compiled programs."""
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    state = jax.jit(lambda key: svi.init(key, frames, **options))(KEY)
    step = jax.jit(lambda state: svi.update(state, frames, **options))
    for _ in range(count):
        state, loss = step(state)
    for x in jax.tree.leaves((svi.get_params(state), loss)):
        assert np.isfinite(x).all()
    return svi.get_params(state)


def network():
    return nets.FrameEncoder(nets.StepMLP(SIZE, 8, hidden=8, key=KEY), SIZE, key=KEY)


@pytest.mark.parametrize("model", [extended_kalman_vae, kalman_vae])
def test_no_nan_reaches_a_gradient(model):
    model = partial(model, num_states=STATES, num_bases=2, hidden=4)
    before = network()
    params = steps_of(model, AmortizedFrames(model, encoder=before), jnp.asarray(FRAMES, jnp.float32))
    assert np.abs(params["auto_encoder$params"].head.weight - before.head.weight).min() > 1e-3


def test_a_learned_first_state_and_minibatches():
    frames = jnp.asarray(np.tile(np.nan_to_num(FRAMES), (3, 1, 1)), jnp.float32).at[1, 2, 0].set(jnp.nan)
    u = jnp.ones((STEPS, 1))
    model = partial(extended_kalman_vae, num_states=STATES, num_bases=2, hidden=4, start="hierarchical", u=u)
    guide = AmortizedFrames(model, encoder=network(), linearization="jacobian", gaps=False)
    params = steps_of(model, guide, frames, batch_size=2)
    assert {"auto_start_mean", "auto_start_scale", "auto_zeta$params", "start$params"} <= set(params)
    draws = Predictive(guide, params=params, num_samples=3)(KEY, frames)
    assert draws["zeta"].shape == (3, 6, STATES)
    made = Predictive(model, params=params, num_samples=2)(KEY, num_steps=STEPS, num_obs=SIZE, num_trials=4)
    assert made["y"].shape == (2, 4, STEPS, SIZE)


def test_what_does_not_fit_is_named():
    def run(model, **options):
        handlers.trace(handlers.seed(AmortizedFrames(model, **{"encoder": encoder, **options}), 0)).get_trace(
            jnp.asarray(FRAMES)
        )

    with pytest.raises(ValueError, match="`model` must have the latent sites `a`"):
        run(deep_markov)
    with pytest.raises(TypeError, match='`linearization` must be "jacobian"'):
        run(partial(extended_kalman_vae, transition=lambda z, u: 0.9 * z))
    with pytest.raises(ValueError, match="`encoder` must give a location of shape"):
        run(extended_kalman_vae, encoder=lambda y: (y[:1], y[:1]))
    with pytest.raises(ValueError, match="`linearization` must be one of"):
        run(extended_kalman_vae, linearization="ekf")
    for options, match in (
        ({"num_states": 1}, "`num_states` must be at least `num_codes`"),
        ({"start": "vhp"}, "`start` must be one of"),
        ({"emission": "gamma"}, "`emission` must be one of"),
    ):
        with pytest.raises(ValueError, match=match):
            extended_kalman_vae(FRAMES, **options)
    with pytest.raises(ValueError, match="`bases` must have batch shape"):
        HistoryMarginal(random_ssm(RNG)[0], None, STEPS)
