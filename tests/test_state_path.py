"""`StatePath`: the density of whole paths, linear and not, regular and singular, and the non-centred form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density
from scipy import stats

from pssm import LinearGaussianSSM
from pssm.distributions import NonCenteredPath, StatePath

STEPS = 5


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def parts(timed=(), noise=2, inputs=False, seed=2):
    """Arguments of a linear path of two states, in NumPy, from a fixed seed."""
    rng = np.random.default_rng(seed)

    def draw(name, *shape):
        return 0.7 * rng.normal(size=(*((STEPS,) if name in timed else ()), *shape))

    given = {
        "m0": draw("m0", 2),
        "chol_P0": draw("chol_P0", 2, 2),
        "transition": draw("transition", 2, 2),
        "chol_Q": draw("chol_Q", 2, noise),
    }
    if inputs:
        given |= {"b": draw("b", 2), "B": draw("B", 2, 3), "u": rng.normal(size=(STEPS, 3))}
    return given


def linear(timed=(), **settings):
    given = parts(timed, **settings)
    return StatePath(**given, num_steps=STEPS, time_varying=timed), given


def dense_path(given, timed=()):
    """Mean and covariance of the stacked path, from its definition."""

    def at(name, t):
        return given[name][t] if name in timed else given[name]

    q = given["chol_Q"].shape[-1]
    mean, loading = given["m0"], np.zeros((2, 2 + (STEPS - 1) * q))
    loading[:, :2] = given["chol_P0"]
    means, loadings = [mean], [loading]
    for t in range(1, STEPS):
        mean = at("transition", t) @ mean
        if "b" in given:
            mean = mean + at("b", t) + at("B", t) @ given["u"][t]
        loading = at("transition", t) @ loading
        loading[:, 2 + (t - 1) * q : 2 + t * q] += at("chol_Q", t)
        means.append(mean)
        loadings.append(loading)
    loading = np.concatenate(loadings)
    return np.concatenate(means), loading @ loading.T, loading


TIMED = {"none": (), "A": ("transition",), "all": ("transition", "chol_Q", "b", "B")}


@pytest.mark.parametrize("timed", TIMED)
def test_linear_path_is_the_dense_normal(timed):
    path, given = linear(TIMED[timed], inputs=timed != "none")
    mean, cov, loading = dense_path(given, TIMED[timed])
    z = np.random.default_rng(0).normal(size=(3, STEPS, 2))
    expected = stats.multivariate_normal.logpdf(z.reshape(3, -1), mean, cov)
    np.testing.assert_allclose(jax.jit(path.log_prob)(z), expected, rtol=1e-10)
    np.testing.assert_allclose(np.ravel(path.mean), mean, rtol=1e-10, atol=1e-12)
    noise = np.random.default_rng(1).normal(size=path.noise_size)
    np.testing.assert_allclose(np.ravel(path.path_from_noise(noise)), mean + loading @ noise, rtol=1e-10, atol=1e-12)


def test_entry_zero_of_transition_arrays_is_not_used():
    path, given = linear(TIMED["all"], inputs=True)
    for name in (*TIMED["all"], "u"):
        given[name] = given[name].copy()
        given[name][0] = 99.0
    other = StatePath(**given, num_steps=STEPS, time_varying=TIMED["all"])
    z = np.ones((STEPS, 2))
    np.testing.assert_array_equal(path.log_prob(z), other.log_prob(z))


def test_float32():
    path, given = linear(inputs=True)
    mean, cov, _ = dense_path(given)
    with jax.enable_x64(False):
        small = StatePath(**{k: v.astype(np.float32) for k, v in given.items()}, num_steps=STEPS)
        log_prob = small.log_prob(np.ones((STEPS, 2), np.float32))
    assert log_prob.dtype == jnp.float32
    np.testing.assert_allclose(log_prob, stats.multivariate_normal.logpdf(np.ones(2 * STEPS), mean, cov), rtol=1e-4)


def test_from_ssm():
    path, given = linear(("transition",), inputs=True)
    ssm = LinearGaussianSSM(
        given["m0"], given["chol_P0"], given["transition"], given["chol_Q"], np.eye(2), np.eye(2),
        b=given["b"], B=given["B"], d=np.ones(2), time_varying=("A",),
    )  # fmt: skip
    z = np.ones((STEPS, 2))
    np.testing.assert_allclose(StatePath.from_ssm(ssm, STEPS, given["u"]).log_prob(z), path.log_prob(z), rtol=1e-12)


def test_draws_have_the_moments_of_the_path():
    path, given = linear(inputs=True)
    mean, cov, _ = dense_path(given)
    count = 20_000
    draws = np.reshape(path.sample(jax.random.key(0), (count,)), (count, -1))
    sd = np.sqrt(np.diag(cov))
    np.testing.assert_allclose((draws.mean(0) - mean) / sd, 0.0, atol=5 / count**0.5)
    np.testing.assert_allclose((np.cov(draws.T) - cov) / np.outer(sd, sd), 0.0, atol=8 / count**0.5)


# --- nonlinear --------------------------------------------------------------------------------------------------------


def sum_of_normals(z, given, step):
    total = stats.multivariate_normal.logpdf(z[0], given["m0"], given["chol_P0"] @ given["chol_P0"].T)
    for t in range(1, STEPS):
        mean = np.asarray(step(z[t - 1], given["u"][t]))
        total += stats.multivariate_normal.logpdf(z[t], mean, given["chol_Q"] @ given["chol_Q"].T)
    return total


def test_nonlinear_transition():
    given = parts(inputs=True)
    del given["b"], given["B"]

    def step(z, u):
        return jnp.sin(z) + u[:2] * z[::-1]

    path = StatePath(**(given | {"transition": step}), num_steps=STEPS)
    z = np.random.default_rng(3).normal(size=(STEPS, 2))
    np.testing.assert_allclose(jax.jit(path.log_prob)(z), sum_of_normals(z, given, step), rtol=1e-10)
    quiet = StatePath(**(given | {"transition": step, "chol_Q": np.zeros((2, 1))}), num_steps=STEPS)
    draw = quiet.sample(jax.random.key(0))
    np.testing.assert_allclose(draw[2], step(draw[1], given["u"][2]), rtol=1e-12)
    with pytest.raises(NotImplementedError, match="mean"):
        _ = path.mean


def test_a_function_of_the_linear_step_is_the_linear_path():
    path, given = linear()
    step = jax.tree_util.Partial(lambda A, z, u: A @ z, jnp.asarray(given["transition"]))
    nonlinear = StatePath(**(given | {"transition": step}), num_steps=STEPS)
    z = np.ones((STEPS, 2))
    np.testing.assert_allclose(nonlinear.log_prob(z), path.log_prob(z), rtol=1e-12)
    np.testing.assert_allclose(nonlinear.sample(jax.random.key(0)), path.sample(jax.random.key(0)), rtol=1e-12)


class Network(eqx.Module):
    layers: eqx.nn.MLP

    def __call__(self, z, u):
        return z + self.layers(z)


def test_equinox_module_has_gradients():
    given = parts()
    network = Network(eqx.nn.MLP(2, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0)))
    z = np.random.default_rng(4).normal(size=(STEPS, 2))

    def log_prob(f):
        return StatePath(**(given | {"transition": f}), num_steps=STEPS).log_prob(z)

    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(log_prob))(network)
    np.testing.assert_allclose(value, sum_of_normals(z, given | {"u": np.zeros(STEPS)}, network), rtol=1e-8)
    last = gradient.layers.layers[-1].bias
    step = 1e-6

    def nudged(sign):
        return eqx.tree_at(lambda f: f.layers.layers[-1].bias, network, replace_fn=lambda x: x.at[0].add(sign * step))

    np.testing.assert_allclose(last[0], (log_prob(nudged(1)) - log_prob(nudged(-1))) / (2 * step), rtol=1e-5)
    path = StatePath(**(given | {"transition": network}), num_steps=STEPS)
    again = jax.jit(lambda d: d)(path)
    np.testing.assert_allclose(again.log_prob(z), value, rtol=1e-10)
    assert again.transition.layers.depth == 1


def test_pytree_round_trip_and_vmap():
    path, given = linear(inputs=True)
    z = np.ones((STEPS, 2))
    leaves, structure = jax.tree.flatten(path)
    np.testing.assert_array_equal(jax.tree.unflatten(structure, leaves).log_prob(z), path.log_prob(z))

    def scaled(s):
        return StatePath(**(given | {"chol_Q": s * given["chol_Q"]}), num_steps=STEPS)

    scales = jnp.array([0.5, 2.0])
    found = jax.vmap(lambda d: d.log_prob(z))(jax.vmap(scaled)(scales))
    np.testing.assert_allclose(found, [scaled(s).log_prob(z) for s in scales], rtol=1e-12)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batch_axes_and_plate():
    path, given = linear(inputs=True)
    batched = StatePath(**(given | {"m0": np.stack([given["m0"], 0 * given["m0"]])}), num_steps=STEPS)
    assert batched.batch_shape == (2,)
    assert batched.event_shape == (STEPS, 2)
    assert batched.sample(jax.random.key(0), (3,)).shape == (3, 2, STEPS, 2)
    z = np.random.default_rng(5).normal(size=(3, 2, STEPS, 2))
    log_prob = batched.log_prob(z)
    assert log_prob.shape == (3, 2)
    np.testing.assert_allclose(log_prob[:, 0], path.log_prob(z[:, 0]), rtol=1e-12)
    np.testing.assert_allclose(batched.mean[0], path.mean, rtol=1e-12)
    inputs = StatePath(**(given | {"u": np.stack([given["u"], 0 * given["u"]])}), num_steps=STEPS)
    np.testing.assert_allclose(inputs.log_prob(z)[:, 0], path.log_prob(z[:, 0]), rtol=1e-12)

    def model():
        with numpyro.plate("trials", 4):
            numpyro.sample("z", path)

    trace = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
    draws = trace["z"]["value"]
    assert draws.shape == (4, STEPS, 2)
    assert len(np.unique(np.asarray(draws[:, 0, 0]))) == 4
    np.testing.assert_allclose(log_density(model, (), {}, {"z": draws})[0], path.log_prob(draws).sum(), rtol=1e-12)


def test_batch_of_time_varying_arrays():
    path, given = linear(TIMED["all"], inputs=True)
    batched = StatePath(
        **(given | {"chol_Q": np.stack([given["chol_Q"], 2 * given["chol_Q"]])}),
        num_steps=STEPS,
        time_varying=TIMED["all"],
    )
    assert batched.batch_shape == (2,)
    z = np.ones((STEPS, 2))
    np.testing.assert_allclose(batched.log_prob(z)[0], path.log_prob(z), rtol=1e-12)


# --- singular noise and the non-centred form --------------------------------------------------------------------------


def test_companion_form_has_the_density_of_its_innovations():
    phi = np.array([0.6, -0.3])
    chol_P0 = np.array([[1.0, 0.0], [0.4, 0.9]])
    path = StatePath(np.zeros(2), chol_P0, np.stack([phi, [1.0, 0.0]]), np.array([[0.5], [0.0]]), STEPS)
    assert path.noise_size == 2 + STEPS - 1
    noise = np.random.default_rng(6).normal(size=path.noise_size)
    z = np.asarray(path.path_from_noise(noise))
    np.testing.assert_array_equal(z[1:, 1], z[:-1, 0])
    first = stats.multivariate_normal.logpdf(z[0], np.zeros(2), chol_P0 @ chol_P0.T)
    innovations = z[1:, 0] - z[:-1] @ phi
    np.testing.assert_allclose(path.log_prob(z), first + stats.norm.logpdf(innovations, 0, 0.5).sum(), rtol=1e-10)
    np.testing.assert_allclose(innovations, 0.5 * noise[2:], rtol=1e-10)
    gradient = jax.grad(
        lambda c: StatePath(np.zeros(2), c, np.stack([phi, [1.0, 0.0]]), path.chol_Q, STEPS).log_prob(z)
    )
    assert np.isfinite(gradient(jnp.asarray(chol_P0))).all()


def test_rank_one_noise_on_both_states():
    """Noise `(2, 1)'`: the first pivot carries the density of the first coordinate, the second is determined."""
    path = StatePath(np.zeros(2), np.eye(2), 0.5 * np.eye(2), np.array([[2.0], [1.0]]), STEPS)
    noise = np.random.default_rng(7).normal(size=path.noise_size)
    z = np.asarray(path.path_from_noise(noise))
    expected = stats.norm.logpdf(z[0]).sum() + stats.norm.logpdf(2 * noise[2:], 0, 2.0).sum()
    np.testing.assert_allclose(path.log_prob(z), expected, rtol=1e-10)


def test_known_start_and_single_step():
    path = StatePath(np.ones(2), np.zeros((2, 2)), np.eye(2), np.eye(2), 1)
    np.testing.assert_array_equal(path.sample(jax.random.key(0)), np.ones((1, 2)))
    assert path.log_prob(np.ones((1, 2))) == 0.0
    single = StatePath(np.zeros(2), np.eye(2), lambda z, u: z, np.eye(2), 1)
    np.testing.assert_allclose(single.log_prob(np.zeros((1, 2))), -np.log(2 * np.pi))


@pytest.mark.parametrize("plate", [False, True])
def test_non_centred_joint_is_the_centred_one_under_a_change_of_variables(plate):
    path, given = linear(inputs=True)

    def centred():
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        prior = StatePath(**(given | {"chol_Q": scale * given["chol_Q"]}), num_steps=STEPS)
        if plate:
            with numpyro.plate("trials", 2):
                z = numpyro.sample("z", prior)
        else:
            z = numpyro.sample("z", prior)
        numpyro.sample("y", dist.Normal(z, 0.3).to_event(2), obs=np.ones(jnp.shape(z)))

    non_centred = numpyro.handlers.reparam(centred, config={"z": NonCenteredPath()})
    scale = jnp.array(0.7)
    batch = (2,) if plate else ()
    noise = jnp.asarray(np.random.default_rng(8).normal(size=(*batch, path.noise_size)))
    prior = StatePath(**(given | {"chol_Q": scale * given["chol_Q"]}), num_steps=STEPS)
    z = prior.path_from_noise(noise)
    log_jacobian = np.linalg.slogdet(given["chol_P0"])[1] + (STEPS - 1) * np.linalg.slogdet(0.7 * given["chol_Q"])[1]
    found, trace = log_density(non_centred, (), {}, {"scale": scale, "z_base": noise})
    expected = log_density(centred, (), {}, {"scale": scale, "z": z})[0]
    np.testing.assert_allclose(found, expected + log_jacobian * (2 if plate else 1), rtol=1e-10)
    np.testing.assert_allclose(trace["z"]["value"], z, rtol=1e-12)
    assert trace["z"]["type"] == "deterministic"


def test_non_centred_refuses():
    path, _ = linear()

    def observed():
        numpyro.sample("z", path, obs=np.zeros((STEPS, 2)))

    def other():
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    for model, error, message in ((observed, ValueError, "`z` is observed"), (other, TypeError, "`z` must be")):
        with pytest.raises(error, match=message):
            numpyro.handlers.seed(numpyro.handlers.reparam(model, config={"z": NonCenteredPath()}), 0)()


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "`u`", {"u": np.zeros((STEPS - 1, 3))}),
        (ValueError, "`u`", {"u": None}),
        (ValueError, "`u`", {"b": None, "B": None}),
        (ValueError, "`B`", {"B": np.zeros((2, 2))}),
        (ValueError, "`b`", {"b": np.zeros(3)}),
        (ValueError, "`m0`", {"m0": 0.0}),
        (ValueError, "`chol_P0`", {"chol_P0": np.eye(3)}),
        (ValueError, "`transition`", {"transition": np.eye(3)}),
        (ValueError, "`chol_Q`", {"chol_Q": np.eye(3)}),
        (ValueError, "`chol_Q`", {"chol_Q": np.ones(2)}),
        (ValueError, "`num_steps`", {"num_steps": 0}),
        (ValueError, "`time_varying`", {"time_varying": ("A",)}),
        (TypeError, "`time_varying`", {"time_varying": "transition"}),
        (ValueError, "`transition`", {"time_varying": ("transition",)}),
        (ValueError, "`transition`", {"transition": lambda z, u: z}),
        (TypeError, "`m0`", {"m0": "zero"}),
    ],
)
def test_errors_name_the_argument(error, message, changes):
    given = parts(inputs=True) | {"num_steps": STEPS} | changes
    with pytest.raises(error, match=message):
        StatePath(**given)
