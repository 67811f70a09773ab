"""`LinearGaussianMarginal`: density, draws and moments against the dense joint Gaussian, and as a NumPyro citizen."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from numpyro.infer import Predictive
from numpyro.infer import log_likelihood as numpyro_log_likelihood
from numpyro.infer.util import log_density
from scipy import stats

import pssm
from pssm import LinearGaussianSSM
from pssm.distributions import LinearGaussianMarginal, real_or_missing_matrix

NAN = np.nan
STEPS = 6


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def dense_joint(ssm, steps, u=None):
    """Mean and covariance of the stacked states and observations."""
    j = oracles.joint(ssm, steps, None if u is None else np.asarray(u))
    return j.mean, j.cov


def dense_log_prob(ssm, y, u=None):
    return oracles.log_likelihood(ssm, np.asarray(y), None if u is None else np.asarray(u))


def dense_posterior(ssm, y, u=None):
    """Mean and covariance of the stacked states given the observed entries of `y`."""
    j = oracles.joint(ssm, len(y), None if u is None else np.asarray(u))
    return oracles.condition(j, np.arange(len(y) * ssm.n_state), *oracles.seen(j, y, len(y)))


def make(kind="plain"):
    """A model, inputs and a series with missing entries, from a fixed seed."""
    rng = np.random.default_rng(8)
    n, p, m = 2, 2, 1
    timed = ("A", "C", "chol_Q", "chol_R", "b", "d") if kind == "time-varying" else ()

    def draw(name, *shape):
        return 0.7 * rng.normal(size=(*((STEPS,) if name in timed else ()), *shape))

    fields = {
        "m0": draw("m0", n),
        "chol_P0": draw("chol_P0", n, n),
        "A": draw("A", n, n),
        "chol_Q": draw("chol_Q", n, 1 if kind == "singular" else n),
        "C": draw("C", p, n),
        "chol_R": draw("chol_R", p, p),
    }
    if kind in ("inputs", "time-varying"):
        fields |= {"b": draw("b", n), "d": draw("d", p), "B": draw("B", n, m), "D": draw("D", p, m)}
    y = rng.normal(size=(STEPS, p))
    y[1, 0] = y[3] = NAN
    u = jnp.asarray(rng.normal(size=(STEPS, m))) if "B" in fields else None
    return LinearGaussianSSM(**fields, time_varying=timed), u, jnp.asarray(y)


KINDS = ("plain", "inputs", "time-varying", "singular")


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_is_that_of_the_dense_joint(kind):
    ssm, u, y = make(kind)
    marginal = LinearGaussianMarginal(ssm, STEPS, u)
    assert marginal.event_shape == (STEPS, 2)
    np.testing.assert_allclose(jax.jit(marginal.log_prob)(y), dense_log_prob(ssm, y, u), rtol=1e-10)
    complete = jnp.nan_to_num(y, nan=0.3)
    np.testing.assert_allclose(marginal.log_prob(complete), dense_log_prob(ssm, complete, u), rtol=1e-10)
    assert marginal.log_prob(jnp.full((STEPS, 2), NAN)) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_in_float32(kind):
    ssm, u, y = make(kind)
    with jax.enable_x64(False):
        small, inputs, series = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float32), (ssm, u, y))
        log_prob = LinearGaussianMarginal(small, STEPS, inputs).log_prob(series)
    assert log_prob.dtype == jnp.float32
    np.testing.assert_allclose(log_prob, dense_log_prob(ssm, y, u), rtol=2e-5, atol=2e-5)


def test_methods_equal_the_functions():
    ssm, u, y = make("inputs")
    marginal = LinearGaussianMarginal(ssm, STEPS, u)
    steps = marginal.log_prob_steps(y)
    assert steps.shape == (STEPS,)
    assert steps[3] == 0.0
    np.testing.assert_allclose(steps.sum(), marginal.log_prob(y), rtol=1e-12)
    for found, expected in zip(marginal.smooth(y), pssm.kalman_smoother(ssm, y, u), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    key = jax.random.key(0)
    paths = marginal.sample_states(key, y, (3,))
    assert paths.shape == (3, STEPS, 2)
    np.testing.assert_array_equal(paths, pssm.sample_states(key, ssm, y, u, sample_shape=(3,)))
    future = jnp.ones((4, 1))
    for found, expected in zip(marginal.forecast(y, 4, future), pssm.forecast(ssm, y, 4, u, future), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_smooth_is_the_dense_posterior():
    ssm, u, y = make("inputs")
    smoothed = LinearGaussianMarginal(ssm, STEPS, u).smooth(y)
    mean, cov = dense_posterior(ssm, y, u)
    np.testing.assert_allclose(np.ravel(smoothed.mean), mean, rtol=1e-9, atol=1e-10)
    for t in range(STEPS):
        np.testing.assert_allclose(smoothed.cov[t], cov[2 * t : 2 * t + 2, 2 * t : 2 * t + 2], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_moments(kind):
    ssm, u, _ = make(kind)
    marginal = LinearGaussianMarginal(ssm, STEPS, u)
    mean, cov = dense_joint(ssm, STEPS, u)
    np.testing.assert_allclose(np.ravel(marginal.mean), mean[-2 * STEPS :], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(np.ravel(marginal.variance), np.diag(cov)[-2 * STEPS :], rtol=1e-9)


def test_draws_have_the_dense_moments():
    ssm, u, _ = make("inputs")
    count = 20_000
    draws = LinearGaussianMarginal(ssm, STEPS, u).sample(jax.random.key(1), (count,))
    assert draws.shape == (count, STEPS, 2)
    mean, cov = (x[..., -2 * STEPS :] for x in dense_joint(ssm, STEPS, u))
    cov = cov[-2 * STEPS :]
    sd = np.sqrt(np.diag(cov))
    flat = np.reshape(draws, (count, -1))
    np.testing.assert_allclose((flat.mean(0) - mean) / sd, 0.0, atol=5 / count**0.5)
    np.testing.assert_allclose((np.cov(flat.T) - cov) / np.outer(sd, sd), 0.0, atol=8 / count**0.5)


# --- batches ----------------------------------------------------------------------------------------------------------


def batched_model():
    ssm, _, y = make()
    return ssm.replace(A=ssm.A * jnp.array([0.5, 1.0, -0.5])[:, None, None]), ssm, y


def test_batched_models():
    batched, ssm, y = batched_model()
    marginal = LinearGaussianMarginal(batched, STEPS)
    assert marginal.batch_shape == (3,)
    expected = [dense_log_prob(ssm.replace(A=A), y) for A in batched.A]
    np.testing.assert_allclose(marginal.log_prob(y), expected, rtol=1e-10)
    series = jnp.stack([y, 2 * y, y])
    several = [dense_log_prob(ssm.replace(A=A), each) for A, each in zip(batched.A, series, strict=True)]
    np.testing.assert_allclose(marginal.log_prob(series), several, rtol=1e-10)
    assert marginal.log_prob(jnp.zeros((4, 3, STEPS, 2))).shape == (4, 3)
    assert marginal.log_prob_steps(y).shape == (3, STEPS)
    assert marginal.sample(jax.random.key(0), (4, 5)).shape == (4, 5, 3, STEPS, 2)
    assert marginal.sample_states(jax.random.key(0), y, (4,)).shape == (4, 3, STEPS, 2)
    assert marginal.smooth(y).mean.shape == (3, STEPS, 2)
    assert marginal.forecast(y, 2).mean.shape == (3, 2, 2)
    assert marginal.mean.shape == marginal.variance.shape == (3, STEPS, 2)
    np.testing.assert_allclose(marginal.variance[1], LinearGaussianMarginal(ssm, STEPS).variance, rtol=1e-10)


def test_batched_time_varying_models_and_inputs():
    ssm, u, y = make("time-varying")
    batched = ssm.replace(C=jnp.stack([ssm.C, -ssm.C]))
    inputs = jnp.stack([u, 0 * u])
    marginal = LinearGaussianMarginal(batched, STEPS, inputs)
    assert marginal.batch_shape == (2,)
    expected = [dense_log_prob(ssm, y, u), dense_log_prob(ssm.replace(C=-ssm.C), y, 0 * u)]
    np.testing.assert_allclose(marginal.log_prob(y), expected, rtol=1e-10)
    np.testing.assert_allclose(
        marginal.variance[1], LinearGaussianMarginal(ssm.replace(C=-ssm.C), STEPS, 0 * u).variance, rtol=1e-10
    )


def test_draws_of_a_batch_are_independent_series():
    batched, _, _ = batched_model()
    draws = LinearGaussianMarginal(batched, STEPS).sample(jax.random.key(2), (2,))
    flat = np.reshape(draws, (6, -1))
    assert len(np.unique(flat.round(10), axis=0)) == 6


def test_expand_and_plate():
    ssm, _, y = make()
    marginal = LinearGaussianMarginal(ssm, STEPS)
    series = jnp.stack([y, 2 * y])
    expected = np.array([dense_log_prob(ssm, each) for each in series])
    expanded = marginal.expand([2])
    np.testing.assert_allclose(expanded.log_prob(series), expected, rtol=1e-10)
    draws = expanded.sample(jax.random.key(0))
    assert draws.shape == (2, STEPS, 2)
    assert not np.allclose(draws[0], draws[1])

    def model(data):
        with numpyro.plate("series", 2):
            numpyro.sample("y", LinearGaussianMarginal(ssm, STEPS), obs=data)

    np.testing.assert_allclose(log_density(model, (series,), {}, {})[0], expected.sum(), rtol=1e-10)


def test_vmap_over_distributions():
    batched, ssm, y = batched_model()
    marginals = jax.vmap(lambda A: LinearGaussianMarginal(ssm.replace(A=A), STEPS))(batched.A)
    log_probs = jax.vmap(lambda d: d.log_prob(y))(marginals)
    np.testing.assert_allclose(log_probs, LinearGaussianMarginal(batched, STEPS).log_prob(y), rtol=1e-12)


# --- NumPyro ----------------------------------------------------------------------------------------------------------


def test_pytree_round_trip_and_jit():
    ssm, u, y = make("inputs")
    marginal = LinearGaussianMarginal(ssm, STEPS, u)
    leaves, structure = jax.tree.flatten(marginal)
    again = jax.tree.unflatten(structure, leaves)
    assert again.num_steps == STEPS
    assert again.event_shape == marginal.event_shape
    through = jax.jit(lambda d: d)(marginal)
    for other in (again, through):
        np.testing.assert_allclose(other.log_prob(y), marginal.log_prob(y), rtol=1e-12)


def model(y=None, num_steps=STEPS):
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    ssm, u, _ = make("inputs")
    numpyro.sample("y", LinearGaussianMarginal(ssm.replace(chol_R=scale * ssm.chol_R), num_steps, u), obs=y)


def test_predictive_log_likelihood_and_condition():
    ssm, u, y = make("inputs")
    scales = jnp.array([0.5, 1.5])
    draws = Predictive(model, {"scale": scales})(jax.random.key(0))["y"]
    assert draws.shape == (2, STEPS, 2)
    assert np.isfinite(draws).all()
    expected = [dense_log_prob(ssm.replace(chol_R=s * ssm.chol_R), y, u) for s in scales]
    np.testing.assert_allclose(numpyro_log_likelihood(model, {"scale": scales}, y)["y"], expected, rtol=1e-10)
    conditioned = numpyro.handlers.condition(model, {"y": y})
    trace = numpyro.handlers.trace(numpyro.handlers.seed(conditioned, 0)).get_trace()
    assert trace["y"]["is_observed"]
    found = log_density(conditioned, (), {}, {"scale": scales[0]})[0]
    np.testing.assert_allclose(found, expected[0] + stats.halfnorm.logpdf(0.5), rtol=1e-10)


def test_validate_args_accepts_nan_and_refuses_inf():
    ssm, _, y = make()
    marginal = LinearGaussianMarginal(ssm, STEPS, validate_args=True)
    np.testing.assert_allclose(marginal.log_prob(y), dense_log_prob(ssm, y), rtol=1e-10)
    batch = jnp.stack([y, jnp.nan_to_num(y)])
    np.testing.assert_array_equal(real_or_missing_matrix(batch.at[1, 2, 0].set(-jnp.inf)), [True, False])
    np.testing.assert_array_equal(real_or_missing_matrix(batch), [True, True])
    assert jax.jit(marginal.log_prob)(y.at[0, 0].set(jnp.inf)) == -jnp.inf


def test_gradients_with_missing_entries():
    ssm, u, y = make("inputs")
    by_model, by_y = jax.jit(jax.grad(lambda s, x: LinearGaussianMarginal(s, STEPS, u).log_prob(x), (0, 1)))(ssm, y)
    for x in jax.tree.leaves(by_model):
        assert np.isfinite(x).all()
        assert np.abs(x).max() > 0
    np.testing.assert_array_equal(np.asarray(by_y)[np.isnan(y)], 0.0)
    assert np.isfinite(by_y).all()


def test_single_step():
    ssm, _, y = make()
    marginal = LinearGaussianMarginal(ssm, 1)
    np.testing.assert_allclose(marginal.log_prob(y[:1]), dense_log_prob(ssm, y[:1]), rtol=1e-10)
    assert marginal.smooth(y[:1]).cross_cov.shape == (0, 2, 2)
    assert marginal.sample(jax.random.key(0)).shape == (1, 2)


@pytest.mark.parametrize(
    ("error", "message", "build"),
    [
        (TypeError, "`ssm`", lambda s, u: LinearGaussianMarginal("nile", 3)),
        (ValueError, "`num_steps`", lambda s, u: LinearGaussianMarginal(s, 0, u)),
        (TypeError, "`num_steps`", lambda s, u: LinearGaussianMarginal(s, 2.5, u)),
        (ValueError, "`u`", lambda s, u: LinearGaussianMarginal(s, STEPS)),
        (ValueError, "`u`", lambda s, u: LinearGaussianMarginal(s, STEPS, u[:-1])),
        (ValueError, "`u`", lambda s, u: LinearGaussianMarginal(make()[0], STEPS, u)),
        (ValueError, "`num_steps`", lambda s, u: LinearGaussianMarginal(make("time-varying")[0], STEPS + 1, u)),
    ],
)
def test_errors_name_the_argument(error, message, build):
    ssm, u, _ = make("inputs")
    with pytest.raises(error, match=message):
        build(ssm, u)


def test_values_of_the_wrong_shape_are_refused():
    ssm, _, y = make()
    with pytest.raises(ValueError, match="shape"):
        LinearGaussianMarginal(ssm, STEPS).log_prob(y[:, :1].repeat(3, 1))
    with pytest.raises(ValueError, match="shape|broadcast"):
        LinearGaussianMarginal(ssm, STEPS).log_prob(y[:-1])
