"""`LowRankChain`: exact where the messages are exact, a bound everywhere else, and a well-behaved distribution."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from numpyro import handlers
from numpyro.distributions.kl import kl_divergence
from test_scale import count_equations

from pssm import LinearGaussianSSM
from pssm.distributions import LowRankChain, StatePath
from pssm.linalg import Diagonal

STEPS = 6
PARTS = ("K", "k", "diag", "center", "b")


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def make_model(kind, seed=0, steps=STEPS):
    """A random model, data with holes, and inputs."""
    rng = np.random.default_rng(seed)
    timed = {"timed": ("A", "chol_Q", "b", "B"), "timed-C": ("C", "chol_R", "d")}.get(kind, ())
    inputs = 2 if kind == "timed" else 0
    q = oracles.random_model(rng, 3, 2, inputs, steps, timed, offsets=True)
    q["chol_R"] = 0.5 * np.eye(2) + 0.2 * np.tril(q["chol_R"])  # no nearly exact sensor: 1e-8 needs none
    if kind == "diagonal":
        q["chol_P0"], q["chol_Q"] = np.diag(rng.uniform(0.5, 2, 3)), np.diag(rng.uniform(0.3, 1, 3))
    if kind in ("companion", "companion-diagonal"):  # an autoregression: one noise, three lags
        q["A"] = np.vstack([rng.normal(size=3) / 3, np.eye(3)[:2]])
        q["chol_Q"] = 0.7 * (np.eye(3)[:, :1] if kind == "companion" else np.diag([1.0, 0.0, 0.0]))
        q["b"][1:] = 0.0
    if kind == "known start":
        q["chol_P0"] = np.zeros((3, 3))
    u = rng.normal(size=(steps, inputs)) if inputs else None
    return LinearGaussianSSM(**q), oracles.with_holes(rng, 2 * rng.normal(size=(steps, 2))), u


def draw_potentials(rng, steps=STEPS, n=3, rank=2, lead=()):
    return {
        "K": rng.normal(size=(*lead, steps, n, rank)),
        "k": rng.normal(size=(*lead, steps, n)),
        "diag": rng.uniform(0, 2, (*lead, steps, n)),
        "center": rng.normal(size=(*lead, steps, n)),
        "b": rng.normal(size=(*lead, steps, rank)),
    }


def emission_log_lik(ssm, y, u, z):
    """`log p(y | z)` of paths `(many, time, state)`, by NumPy; no inputs in the emission."""
    q, timed = oracles.parameters(ssm)
    total = np.zeros(len(z))
    for t in range(len(y)):
        C, R, d = (q[n][t] if n in timed else q[n] for n in ("C", "chol_R", "d"))
        d = d if q["D"] is None else d + q["D"] @ u[t]
        o = ~np.isnan(y[t])
        cov = (R @ R.T)[np.ix_(o, o)]
        r = (y[t] - z[:, t] @ C.T - d)[:, o]
        total -= 0.5 * ((r * np.linalg.solve(cov, r.T).T).sum(1) + np.linalg.slogdet(2 * np.pi * cov)[1])
    return total


@jax.jit
def report(q, key):
    z = q.sample(key, (50,))
    return z, q.log_prob(z), q.prior.log_prob(z), q.mean, q.covariance(), q.variance, q.entropy()


EXACT = ["diagonal", "general", "timed", "timed-C", "companion", "known start"]


@pytest.mark.parametrize("kind", EXACT)
def test_backward_messages_make_the_posterior(kind, key):
    ssm, y, u = make_model(kind)
    h, J = oracles.backward_messages(ssm, y, u)
    q = LowRankChain(StatePath.from_ssm(ssm, STEPS, u), h, oracles.root(J))
    z, log_q, log_p, mean, cov, variance, entropy = map(np.asarray, report(q, key))
    evidence = emission_log_lik(ssm, y, u, z) + log_p - log_q
    np.testing.assert_allclose(evidence, oracles.log_likelihood(ssm, y, u), rtol=1e-8)
    expected_mean, expected_cov = oracles.states(ssm, y, u)["smoothed"]
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(cov, expected_cov, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(variance, np.diagonal(expected_cov, axis1=1, axis2=2), rtol=1e-8, atol=1e-9)
    if kind in ("diagonal", "general", "timed", "timed-C"):
        j = oracles.joint(ssm, STEPS, u)
        path = oracles.condition(j, np.arange(3 * STEPS), *oracles.seen(j, y, STEPS))[1]
        np.testing.assert_allclose(entropy, 0.5 * np.linalg.slogdet(2 * np.pi * np.e * path)[1], rtol=1e-8)
    if kind == "known start":
        np.testing.assert_allclose(z[:, 0], np.broadcast_to(ssm.m0, (50, 3)))


@pytest.fixture
def chains():
    """A chain with every part, of a model with a diagonal and of one with a general noise, with oracle input."""
    found = {}
    for kind in ("diagonal", "general"):
        ssm, _, _ = make_model(kind)
        parts = draw_potentials(np.random.default_rng(5))
        dense = [parts[n] for n in PARTS]
        found[kind] = LowRankChain(StatePath.from_ssm(ssm, STEPS), **parts), ssm, dense
    return found


@jax.jit
def spread_of_draws(q, key):
    z, kls = q.sample_with_kl(key, (4000,))
    return z, kls, q.kl_given(z), q.log_prob(z)


@pytest.mark.parametrize("kind", ["diagonal", "general"])
def test_draws_moments_kl_and_entropy_are_those_of_the_dense_chain(kind, chains, key):
    q, ssm, parts = chains[kind]
    mean, cov = oracles.chain_joint(ssm, parts)
    np.testing.assert_allclose(np.ravel(q.mean), mean, rtol=1e-9, atol=1e-10)
    j = oracles.joint(ssm, STEPS)
    prior = j.mean[: 3 * STEPS], j.cov[: 3 * STEPS, : 3 * STEPS]
    exact = oracles.gaussian_kl(mean, cov, *prior)
    np.testing.assert_allclose(kl_divergence(q, q.prior), exact, rtol=1e-9)
    np.testing.assert_allclose(q.entropy(), 0.5 * np.linalg.slogdet(2 * np.pi * np.e * cov)[1], rtol=1e-9)
    z, kls, again, log_q = map(np.asarray, spread_of_draws(q, key))
    np.testing.assert_allclose(kls, again, rtol=1e-10)
    flat = z.reshape(len(z), -1)
    np.testing.assert_allclose(log_q, dist.MultivariateNormal(mean, cov).log_prob(flat), rtol=1e-8)
    whitened = np.linalg.solve(np.linalg.cholesky(cov), (flat - mean).T)
    assert np.abs(whitened.mean(1)).max() < 5 / np.sqrt(len(z))
    assert np.abs(whitened @ whitened.T / len(z) - np.eye(len(cov))).max() < 6 / np.sqrt(len(z))
    assert abs(kls.mean() - exact) < 5 * kls.std() / np.sqrt(len(z))


@pytest.mark.parametrize("kind", ["companion", "companion-diagonal"])
def test_entropy_of_a_singular_chain_is_that_of_the_states_with_noise(kind):
    ssm, _, _ = make_model(kind)
    parts = draw_potentials(np.random.default_rng(5))
    _, cov = oracles.chain_joint(ssm, [parts[n] for n in PARTS])
    live = [0, 1, 2, *range(3, 3 * STEPS, 3)]  # the first state, then the newest lag
    expected = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * cov[np.ix_(live, live)])[1]
    found = jax.jit(LowRankChain.entropy)(LowRankChain(StatePath.from_ssm(ssm, STEPS), **parts))
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@jax.jit
def everything(scale, parts, z, key):
    """Of a chain whose noise differs from step to step; a `Diagonal`, or matrices."""
    eye = np.eye(3)
    q = LowRankChain(StatePath(np.ones(3), eye, 0.8 * eye[::-1], scale, STEPS, time_varying=("chol_Q",)), **parts)
    return q.log_prob(z), q.kl_given(z), q.entropy(), q.mean, q.variance, q.conditional_variance(), q.sample(key)


def test_noise_that_changes_as_diagonals_and_as_matrices(key):
    rng = np.random.default_rng(8)
    scale, parts, z = rng.uniform(0.3, 1.0, (STEPS, 3)), draw_potentials(rng), rng.normal(size=(STEPS, 3))
    known = everything(Diagonal(jnp.asarray(scale)), parts, z, key)
    general = everything(scale[..., None] * np.eye(3), parts, z, key)
    for found, expected in zip(known[:-1], general[:-1], strict=True):  # their draws use other noise
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.isfinite(known[-1]).all()


def test_sampled_moments_are_the_exact_ones(chains, key):
    q = chains["diagonal"][0]
    mean, variance = jax.jit(lambda q: q.moments(key, 4000))(q)
    exact = np.asarray(q.variance)
    assert (np.abs(mean - q.mean) < 5 * np.sqrt(exact / 4000)).all()
    np.testing.assert_allclose(variance, exact, rtol=0.1)
    np.testing.assert_allclose(variance[0], q.conditional_variance()[0], rtol=1e-12)  # nothing sampled before it


@jax.jit
@jax.value_and_grad
def known_start(point, key):
    prior = StatePath(point["m0"], np.zeros((3, 3)), point["A"], point["chol_Q"], STEPS)
    q = LowRankChain(prior, **point["parts"])
    z, kls = q.sample_with_kl(key)
    return jnp.sum(jnp.cos(z)) + kls + q.log_ratio(z) + q.entropy()


def test_gradients_with_a_known_start_are_finite_differences(key):
    ssm, _, _ = make_model("general")
    rng = np.random.default_rng(6)
    point = {n: np.asarray(getattr(ssm, n)) for n in ("m0", "A", "chol_Q")} | {"parts": draw_potentials(rng)}
    leaves, tree = jax.tree.flatten(point)
    for leaf, slope in enumerate(jax.tree.leaves(known_start(point, key)[1])):
        assert np.isfinite(slope).all()
        direction = rng.normal(size=slope.shape)
        moved = [[x + h * direction if i == leaf else x for i, x in enumerate(leaves)] for h in (1e-5, -1e-5)]
        up, down = (known_start(jax.tree.unflatten(tree, m), key)[0] for m in moved)
        np.testing.assert_allclose(
            np.sum(slope * direction), (up - down) / 2e-5, rtol=1e-6, atol=1e-6, err_msg=f"{leaf}"
        )


@pytest.mark.parametrize("kind", ["diagonal", "general"])
def test_closed_form_kl_to_another_prior_is_the_dense_one(kind, chains):
    q, ssm, parts = chains[kind]
    for other, _, _ in (make_model(kind, seed=9), make_model("general", seed=10)):
        p = StatePath.from_ssm(other, STEPS)
        size = 3 * STEPS
        own, target = oracles.joint(ssm, STEPS), oracles.joint(other, STEPS)
        target = target.mean[:size], target.cov[:size, :size]
        expected = oracles.gaussian_kl(*oracles.chain_joint(ssm, parts), *target)
        np.testing.assert_allclose(kl_divergence(q, p), expected, rtol=1e-9)
        expected = oracles.gaussian_kl(own.mean[:size], own.cov[:size, :size], *target)
        np.testing.assert_allclose(kl_divergence(q.prior, p), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["timed", "companion"])
def test_kl_of_a_path_with_itself_is_zero(kind):
    ssm, _, u = make_model(kind)
    path = StatePath.from_ssm(ssm, STEPS, u)
    zero = LowRankChain(path, np.zeros((STEPS, 3)), np.zeros((STEPS, 3, 1)))
    assert abs(kl_divergence(path, path)) < 1e-9
    assert abs(kl_divergence(zero, path)) < 1e-9


@partial(jax.jit, static_argnames="steps")
@partial(jax.vmap, in_axes=(0, 0, 0, None))
def bound(model, parts, y, steps):
    """`E log p(y | z) - KL`, both in closed form."""
    prior = StatePath(model["m0"], model["chol_P0"], model["A"], model["chol_Q"], steps)
    q = LowRankChain(prior, **parts)
    R = model["chol_R"] @ model["chol_R"].T
    C = model["C"]
    rest = y - q.mean @ C.T
    squares = jnp.einsum("ti,tj->tij", rest, rest) + C @ q.covariance() @ C.T
    expected = -0.5 * (jnp.einsum("ij,tji->", jnp.linalg.inv(R), squares))
    expected -= 0.5 * steps * jnp.linalg.slogdet(2 * jnp.pi * R)[1]
    return expected - kl_divergence(q, prior)


@pytest.mark.parametrize(("n", "steps"), [(1, 2), (3, 8)])
def test_the_bound_is_never_above_the_evidence(n, steps):
    many = 200
    rng = np.random.default_rng(n)
    models = [oracles.random_model(rng, n, 2) for _ in range(many)]
    y = 2 * rng.normal(size=(many, steps, 2))
    ssms = [LinearGaussianSSM(**q) for q in models]
    evidence = np.array([oracles.log_likelihood(s, x) for s, x in zip(ssms, y, strict=True)])
    stacked = {k: np.stack([q[k] for q in models]) for k in ("m0", "chol_P0", "A", "chol_Q", "C", "chol_R")}
    found = bound(stacked, draw_potentials(rng, steps, n, n, (many,)), y, steps)
    assert np.isfinite(found).all()
    assert (found < evidence).all()
    messages = [oracles.backward_messages(s, x) for s, x in zip(ssms, y, strict=True)]
    h, J = (np.stack(x) for x in zip(*messages, strict=True))
    zeros = {"diag": np.zeros_like(h), "center": np.zeros_like(h), "b": np.zeros((many, steps, n))}
    np.testing.assert_allclose(bound(stacked, {"k": h, "K": oracles.root(J), **zeros}, y, steps), evidence, rtol=1e-7)
    near = bound(stacked, {"k": 0.8 * h, "K": oracles.root(0.8 * J), **zeros}, y, steps)
    assert (near < evidence + 1e-9).all()


@jax.jit
def densities(q, z):
    return q.log_prob(z), q.kl_given(z)


def rearranged(parts):
    """The same potentials written around zero, without `b`."""
    K, k, diag, center, b = (parts[n] for n in PARTS)
    along = b + np.einsum("tir,ti->tr", K, center)
    slope = k + diag * center + np.einsum("tir,tr->ti", K, along)
    return {"K": K, "k": slope, "diag": diag}


@pytest.mark.parametrize("kind", ["diagonal", "general", "companion"])
def test_equivalent_forms_of_a_potential_are_one_chain(kind, key):
    ssm, _, _ = make_model(kind)
    prior = StatePath.from_ssm(ssm, STEPS)
    parts = draw_potentials(np.random.default_rng(2))
    z = prior.sample(key, (4,))
    expected = densities(LowRankChain(prior, **parts), z)
    as_columns = np.concatenate([np.sqrt(parts["diag"])[..., None] * np.eye(3), parts["K"]], axis=-1)
    columns = {**parts, "K": as_columns, "b": np.pad(parts["b"], [(0, 0), (3, 0)])}
    del columns["diag"]
    for other in (rearranged(parts), columns):
        for found, value in zip(densities(LowRankChain(prior, **other), z), expected, strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-9)


def test_a_potential_of_zero_leaves_the_prior(key):
    path = nonlinear_path()
    q = LowRankChain(path, np.zeros((STEPS, 2)), np.zeros((STEPS, 2, 1)), diag=np.zeros((STEPS, 2)))
    z = path.sample(key, (5,))
    log_q, kls = densities(q, z)
    np.testing.assert_allclose(log_q, path.log_prob(z), rtol=1e-12)
    np.testing.assert_allclose(kls, 0, atol=1e-12)


def wave(z, u):
    return jnp.sin(2 * z[::-1])


def nonlinear_path(scale=0.5, steps=STEPS, dtype=float):
    """Two states; `scale` may have a batch shape."""
    eye = np.eye(2, dtype=dtype)
    return StatePath(np.ones(2, dtype), eye, wave, np.asarray(scale, dtype)[..., None, None] * eye, steps)


def test_a_missing_step_keeps_the_transition(key):
    parts = draw_potentials(np.random.default_rng(3), n=2)
    for name in ("K", "k", "diag", "b"):
        parts[name][2] = 0.0
    q = LowRankChain(nonlinear_path(), **parts)
    z = q.sample(key)
    np.testing.assert_allclose(q.conditional_mean(z)[2], jnp.sin(2 * z[1][::-1]), rtol=1e-12)
    np.testing.assert_allclose(q.conditional_variance()[2], 0.25, rtol=1e-12)


def test_log_prob_of_a_nonlinear_chain_integrates_to_one():
    path = StatePath(jnp.ones(1), 0.8 * jnp.eye(1), lambda z, u: z + jnp.sin(3 * z), 0.5 * jnp.eye(1), 2)
    parts = draw_potentials(np.random.default_rng(0), 2, 1, 1)
    grid = np.linspace(-8, 8, 401)
    z = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1)[..., None]
    q = LowRankChain(path, **parts)
    density = np.exp(densities(q, z)[0])
    np.testing.assert_allclose(density.sum() * (grid[1] - grid[0]) ** 2, 1.0, rtol=1e-9)
    plain = np.exp(path.log_prob(z)) * np.exp(rebuilt_log_psi(parts, z))  # q is p psi over a function of z_1
    ratio = density / plain
    np.testing.assert_allclose(ratio[200, 150:250], ratio[200, 200], rtol=1e-9)


def rebuilt_log_psi(parts, z):
    x = z - parts["center"]
    along = np.einsum("tir,...ti->...tr", parts["K"], x)
    terms = (parts["k"] * x - 0.5 * parts["diag"] * x**2).sum(-1) + (along * parts["b"] - 0.5 * along**2).sum(-1)
    return terms.sum(-1)


@pytest.mark.parametrize(("scales", "lead"), [(0.5, (3,)), ((0.4, 0.5, 0.6), ()), ((0.4, 0.5, 0.6), (2, 1))], ids=str)
def test_a_batch_is_its_elements(scales, lead, key):
    parts = draw_potentials(np.random.default_rng(1), n=2, lead=lead)
    q = LowRankChain(nonlinear_path(scales), **parts)
    batch = np.broadcast_shapes(np.shape(scales), lead)
    assert q.batch_shape == batch
    z = q.sample(key, (4,))
    assert z.shape == (4, *batch, STEPS, 2)
    assert q.sample(key, ()).shape == (*batch, STEPS, 2)
    found = densities(q, z)
    assert found[0].shape == found[1].shape == (4, *batch)
    assert q.entropy().shape == batch
    for index in np.ndindex(batch):
        own = {n: np.broadcast_to(x, (*batch, *x.shape[len(lead) :]))[index] for n, x in parts.items()}
        one = LowRankChain(nonlinear_path(np.broadcast_to(scales, batch)[index]), **own)
        for value, expected in zip(found, densities(one, z[:, *index]), strict=True):
            np.testing.assert_allclose(value[:, *index], expected, rtol=1e-10)


def test_vmap_and_plates_and_masks(key):
    parts = draw_potentials(np.random.default_rng(1), n=2, lead=(3,))
    q = LowRankChain(nonlinear_path(), **parts)
    z = q.sample(key)
    over = jax.vmap(lambda p, x: LowRankChain(nonlinear_path(), **p).log_prob(x))(parts, z)
    np.testing.assert_allclose(over, q.log_prob(z), rtol=1e-12)
    mask = np.array([True, False, True])

    def model():
        with numpyro.plate("series", 3), handlers.mask(mask=mask):
            numpyro.sample("z", q)

    site = handlers.trace(handlers.substitute(handlers.seed(model, 0), {"z": z})).get_trace()["z"]
    np.testing.assert_allclose(site["fn"].log_prob(site["value"]), np.where(mask, q.log_prob(z), 0.0), rtol=1e-12)


def test_float32_agrees_with_float64(key):
    steps = 60
    parts = draw_potentials(np.random.default_rng(4), steps, 2)
    parts["K"] *= 30
    parts["b"] *= 30
    exact = LowRankChain(nonlinear_path(steps=steps), **parts)
    single = LowRankChain(nonlinear_path(steps=steps, dtype=np.float32), **{n: np.float32(x) for n, x in parts.items()})
    z = exact.sample(key, (3,))
    for found, expected in zip(densities(single, jnp.float32(z)), densities(exact, z), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_program_size_does_not_depend_on_the_length():
    def everything(parts, steps):
        q = LowRankChain(nonlinear_path(steps=steps), **parts)
        z = q.sample(jax.random.key(0))
        return q.log_prob(z) + q.kl_given(z) + q.entropy()

    def size(steps):
        parts = draw_potentials(np.random.default_rng(0), steps, 2)
        return count_equations(jax.make_jaxpr(jax.grad(partial(everything, steps=steps)))(parts))

    assert size(50) == size(500)


BAD = {
    "prior": (TypeError, {"prior": dist.Normal()}),
    "K": (ValueError, {"K": np.zeros((STEPS, 3, 1))}),
    "k": (ValueError, {"k": np.zeros((STEPS, 3))}),
    "diag": (ValueError, {"diag": np.zeros(2)}),
    "center": (ValueError, {"center": np.zeros((STEPS + 1, 2))}),
    "b": (ValueError, {"b": np.zeros((STEPS, 2))}),
}


@pytest.mark.parametrize("name", [*BAD, "negative diag"])
def test_bad_input_is_named(name):
    error, change = BAD.get(name, (ValueError, {"diag": -np.ones((STEPS, 2))}))
    given = {"prior": nonlinear_path(), "k": np.zeros((STEPS, 2)), "K": np.zeros((STEPS, 2, 1))} | change
    with pytest.raises(error, match=f"`{name.split()[-1]}`"):
        LowRankChain(**given)
