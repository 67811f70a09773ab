"""`LowRankMomentMatched`: the published recursion against dense algebra, and what its objective is and is not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import oracles
import pytest
from numpyro.distributions.kl import kl_divergence
from test_chain import make_model

from pssm.distributions import LowRankMomentMatched, StatePath, moment_matched
from pssm.linalg import Diagonal

STEPS, MANY = 6, 400
FORMS = ("plain", "tied", "causal")


@pytest.fixture(autouse=True)
def _double_precision():
    with jax.enable_x64(True):
        yield


def draw_parts(rng, form, steps=STEPS, n=3, rank=2, lead=()):
    parts = {"k": rng.normal(size=(*lead, steps, n)), "K": rng.normal(size=(*lead, steps, n, rank))}
    if form != "plain":
        parts["center"] = rng.normal(size=(*lead, steps, n))
    if form == "tied":
        parts["b"] = rng.normal(size=(*lead, steps, rank))
    if form == "causal":
        parts["backward"] = rng.normal(size=(*lead, steps, n)), rng.normal(size=(*lead, steps, n, 1))
    return parts


@partial(jax.jit, static_argnames="num_samples")
def report(prior, parts, key, num_samples=MANY):
    q = LowRankMomentMatched(
        prior, parts["k"], parts["K"], key, num_samples, **{n: parts[n] for n in set(parts) - {"k", "K"}}
    )
    return {"particles": q.particles, "mean": q.mean, "cov": q.covariance(), "variance": q.variance, "kl": q.kl}


def as_numpy(found):
    return {name: np.asarray(x) for name, x in found.items()}


def image(ssm, u, t, z):
    """`f(z_{t-1}, u_t)` of every row of `z`, and the noise factor of the step; `t = 0`: the first state's."""
    q, timed = oracles.parameters(ssm)
    if t == 0:
        return np.broadcast_to(q["m0"], z.shape), q["chol_P0"]
    A, F, b = (q[n][t] if n in timed else q[n] for n in ("A", "chol_Q", "b"))
    mean = z @ A.T + b
    return (mean if q["B"] is None else mean + (q["B"][t] if "B" in timed else q["B"]) @ u[t]), F


def dense_step(ssm, u, t, before, own):
    """Prediction from the particles of the step before (mean and a factor), and the update of it by the oracle."""
    moved, F = image(ssm, u, t, before)
    mean = moved.mean(0)
    root = np.concatenate([F, (moved - mean).T / np.sqrt(len(moved))], axis=1)
    return mean, root, oracles.conditioned(mean, root, own["K"], own["k"], None, own.get("center"), own.get("b"))


def close(found, expected, **kw):
    np.testing.assert_allclose(found, expected, **{"rtol": 1e-9, "atol": 1e-9} | kw)


KINDS = ["diagonal", "general", "timed", "companion", "companion-diagonal", "known start"]


QUICK = [("general", "tied"), ("timed", "plain"), ("companion", "plain")]
REST = [(kind, "plain") for kind in KINDS if (kind, "plain") not in QUICK] + [("timed", "tied")]


@pytest.mark.parametrize(("kind", "form"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in REST])
def test_every_step_is_the_dense_one(kind, form, key):
    ssm, _, u = make_model(kind)
    parts = draw_parts(np.random.default_rng(1), form)
    found = as_numpy(report(StatePath.from_ssm(ssm, STEPS, u), parts, key))
    for t in range(STEPS):
        own = {n: x[t] for n, x in parts.items()}
        _, _, (mean, cov, kl, _) = dense_step(ssm, u, t, found["particles"][:, t - 1], own)
        close(found["mean"][t], mean)
        close(found["cov"][t], cov)
        close(found["variance"][t], np.diag(cov))
        close(found["kl"][t], kl)


@pytest.mark.parametrize(("kind", "num_samples"), [("diagonal", 2), ("general", 2), ("timed", MANY)])
def test_every_causal_step_is_the_dense_one(kind, num_samples, key):
    """Two particles for three states: other algebra inside."""
    ssm, _, u = make_model(kind)
    prior = StatePath.from_ssm(ssm, STEPS, u)
    parts = draw_parts(np.random.default_rng(1), "causal")
    k, K = parts["backward"]
    found = as_numpy(report(prior, parts, key, num_samples))
    filtered = as_numpy(report(prior, parts | {"backward": (0 * k, 0 * K)}, key, num_samples))  # the same draws
    for t in range(STEPS):
        own = {n: parts[n][t] for n in ("k", "K", "center")}
        start, root, (mean, cov, kl, _) = dense_step(ssm, u, t, filtered["particles"][:, t - 1], own)
        close(filtered["mean"][t], mean)
        close(filtered["cov"][t], cov)
        # Both potentials at once give the smoothed marginal.
        both = {"k": own["k"] + k[t], "K": np.concatenate([own["K"], K[t]], axis=1), "center": own["center"]}
        _, _, (mean, cov, _, _) = dense_step(ssm, u, t, filtered["particles"][:, t - 1], both)
        close(found["mean"][t], mean)
        close(found["cov"][t], cov)
        target, target_root, _ = dense_step(ssm, u, t, found["particles"][:, t - 1], own)
        close(found["kl"][t], oracles.gaussian_kl(mean, cov, target, target_root @ target_root.T), rtol=1e-8)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("general", "causal"),
        *(pytest.param(k, f, marks=pytest.mark.slow) for k, f in [("general", "tied"), ("companion", "plain")]),
    ],
)
def test_particles_are_draws_from_the_marginals(kind, form, key):
    ssm, _, _ = make_model(kind)
    found = as_numpy(report(StatePath.from_ssm(ssm, STEPS), draw_parts(np.random.default_rng(1), form), key, 1000))
    for t in range(STEPS):
        rest = found["particles"][:, t] - found["mean"][t]
        sd = np.sqrt(np.diag(found["cov"][t]))
        live = sd > 1e-9
        correlation = found["cov"][t][np.ix_(live, live)] / np.outer(sd[live], sd[live])
        scaled = rest[:, live] / sd[live]
        assert np.abs(rest[:, ~live]).max(initial=0) < 1e-9
        assert np.abs(scaled.mean(0)).max() < 5 / np.sqrt(1000)
        assert np.abs(scaled.T @ scaled / 1000 - correlation).max() < 7 / np.sqrt(1000)
        after = found["particles"][:, t - 1] - found["particles"][:, t - 1].mean(0)
        assert np.abs(scaled.T @ after / 1000 / after.std(0).clip(1e-9)).max() < 6 / np.sqrt(1000)  # drawn anew


def messages(ssm, y, u):
    """Filtering potentials (each step's own observation), and the backward ones, about zero."""
    backward = oracles.backward_messages(ssm, y, u)
    local = [
        oracles.backward_messages(at_step(ssm, t), y[t : t + 1], None if u is None else u[t : t + 1])
        for t in range(len(y))
    ]
    return tuple(np.concatenate(x) for x in zip(*local, strict=True)), backward


def at_step(ssm, t):
    """The model with its arrays cut to one step: its message is that of the observation alone."""
    timed = {n: getattr(ssm, n)[t : t + 1] for n in ssm.time_varying}
    return (
        ssm
        if not timed
        else type(ssm)(**{n: timed.get(n, getattr(ssm, n)) for n in oracles.ARRAYS}, time_varying=ssm.time_varying)
    )


def objective(ssm, y, u, found):
    """`sum_t E log p(y_t | z_t) - kl_t`, the expectation in closed form; no inputs in the emission but by `D`."""
    q, timed = oracles.parameters(ssm)
    total = -found["kl"].sum(-1)
    for t in range(len(y)):
        C, R, d = (q[n][t] if n in timed else q[n] for n in ("C", "chol_R", "d"))
        d = d if q["D"] is None else d + q["D"] @ u[t]
        o = ~np.isnan(y[t])
        precision = np.linalg.inv((R @ R.T)[np.ix_(o, o)])
        rest = (y[t] - found["mean"][..., t, :] @ C.T - d)[..., o]
        spread = (C @ found["cov"][..., t, :, :] @ C.T)[..., o, :][..., o]
        total -= 0.5 * (np.einsum("...i,ij,...j", rest, precision, rest) + np.einsum("ij,...ji", precision, spread))
        total -= 0.5 * (o.sum() * np.log(2 * np.pi) - np.linalg.slogdet(precision)[1])
    return total


@partial(jax.jit, static_argnames="num_samples")
def over_keys(prior, parts, keys, num_samples):
    return jax.lax.map(lambda key: report(prior, parts, key, num_samples), keys)


@pytest.mark.parametrize("kind", ["timed", "companion"])
def test_objective_at_filtering_and_smoothing_messages(kind):
    """The evidence at the filtering messages; above it, so no bound, at the smoothing ones."""
    ssm, y, u = make_model(kind)
    prior = StatePath.from_ssm(ssm, STEPS, u)
    evidence = oracles.log_likelihood(ssm, y, u)
    filtering, backward = messages(ssm, y, u)
    keys = jax.random.split(jax.random.key(0), 30)
    values = {}
    for name, (h, J) in {"filter": filtering, "smoother": backward}.items():
        found = over_keys(prior, {"k": h, "K": oracles.root(J)}, keys, MANY)
        values[name] = objective(ssm, y, u, as_numpy(found))
    error = {name: x.std() / np.sqrt(len(x)) for name, x in values.items()}
    assert abs(values["filter"].mean() - evidence) < 4 * error["filter"] + 3 / MANY
    assert values["smoother"].mean() - evidence > max(0.05, 5 * error["smoother"])


@pytest.mark.parametrize("kind", ["timed", "companion"])
def test_causal_form_smooths_exactly(kind):
    ssm, y, u = make_model(kind)
    prior = StatePath.from_ssm(ssm, STEPS, u)
    (h, J), (h_all, J_all) = messages(ssm, y, u)
    parts = {"k": h, "K": oracles.root(J), "backward": (h_all - h, oracles.root(J_all - J))}
    found = as_numpy(over_keys(prior, parts, jax.random.split(jax.random.key(0), 30), MANY))
    mean, cov = oracles.states(ssm, y, u)["smoothed"]
    scale = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
    for name, expected, unit in (("mean", mean, scale), ("cov", cov, scale[:, :, None] * scale[:, None, :])):
        error = found[name].std(0) / np.sqrt(30)
        assert (np.abs(found[name].mean(0) - expected) < 5 * error + 4 * unit / MANY + 1e-9).all(), name
    assert np.isfinite(found["kl"]).all()
    assert (found["kl"] > -1e-6).all()
    assert objective(ssm, y, u, found).mean() > oracles.log_likelihood(ssm, y, u)


@pytest.mark.parametrize("form", ["plain", "tied"])
def test_a_missing_step_keeps_the_prediction(form, key):
    ssm, _, _ = make_model("general")
    parts = draw_parts(np.random.default_rng(2), form)
    parts = jax.tree.map(lambda x: np.where(np.arange(STEPS).reshape(-1, *[1] * (x.ndim - 1)) == 3, 0.0, x), parts)
    found = as_numpy(report(StatePath.from_ssm(ssm, STEPS), parts, key))
    moved, F = image(ssm, None, 3, found["particles"][:, 2])
    close(found["mean"][3], moved.mean(0))
    close(found["cov"][3], F @ F.T + np.cov(moved.T, bias=True))
    close(found["kl"][3], 0.0)


def test_a_diagonal_and_its_matrix_are_one(key):
    ssm, _, _ = make_model("diagonal")
    scales = np.diag(ssm.chol_P0), np.diag(ssm.chol_Q)
    for form in ("tied", "causal"):
        parts = draw_parts(np.random.default_rng(3), form)

        def prior(first, later):
            return StatePath(ssm.m0, first, ssm.A, later, STEPS, b=ssm.b)

        known = report(prior(*(Diagonal(jnp.asarray(s)) for s in scales)), parts, key)
        general = jax.jit(lambda *f: report.__wrapped__(prior(*f), parts, key))(*(np.diag(s) for s in scales))  # noqa: B023
        for name, value in known.items():
            np.testing.assert_allclose(general[name], value, rtol=1e-9, atol=1e-10, err_msg=name)


def test_a_turned_factor_has_the_same_distribution():
    """A general factor with the covariance of a diagonal one: other draws, the same moments."""
    ssm, _, _ = make_model("diagonal")
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    parts = draw_parts(np.random.default_rng(3), "tied")
    keys = jax.random.split(jax.random.key(0), 30)
    found = []
    for first, later in ((ssm.chol_P0, ssm.chol_Q), (ssm.chol_P0 @ turn, ssm.chol_Q @ turn)):
        prior = StatePath(ssm.m0, first, ssm.A, later, STEPS, b=ssm.b)
        found.append(as_numpy(over_keys(prior, parts, keys, MANY)))
    for name in ("mean", "cov", "kl"):
        one, other = (f[name] for f in found)
        error = np.sqrt((one.var(0) + other.var(0)) / 30)
        assert (np.abs(one.mean(0) - other.mean(0)) < 5 * error + 1e-9).all(), name


def wave(z, u):
    return jnp.sin(2 * z[::-1])


def nonlinear_path(scale=0.5, dtype=float):
    eye = np.eye(2, dtype=dtype)
    return StatePath(np.ones(2, dtype), eye, wave, np.asarray(scale, dtype)[..., None, None] * eye, STEPS)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_is_its_elements(form, key):
    """Batches of potentials and of priors; every element has draws of its own, so it is held to its own particles."""
    scales = np.array([0.4, 0.5, 0.6])
    parts = draw_parts(np.random.default_rng(1), form, n=2, lead=(2, 1))
    found = as_numpy(report(nonlinear_path(scales), parts, key))
    assert found["particles"].shape == (2, 3, MANY, STEPS, 2)
    assert found["kl"].shape == (2, 3, STEPS)
    assert found["variance"].shape == found["mean"].shape == (2, 3, STEPS, 2)
    for index in np.ndindex(2, 3):
        own = jax.tree.map(lambda x, i=index: x[i[0], 0], parts)
        for t in range(STEPS):
            before = found["particles"][index][:, t - 1]
            moved = np.sin(2 * before[:, ::-1]) if t else np.ones((MANY, 2))
            scale = scales[index[1]] if t else 1.0
            if form == "causal":  # its filter's particles are not shown
                assert np.abs(found["mean"][index][t] - found["particles"][index][:, t].mean(0)).max() < 0.3
                continue
            root = np.concatenate([scale * np.eye(2), (moved - moved.mean(0)).T / np.sqrt(MANY)], axis=1)
            step = {n: x[t] for n, x in own.items()}
            mean, cov, kl, _ = oracles.conditioned(
                moved.mean(0), root, step["K"], step["k"], None, step.get("center"), step.get("b")
            )
            close(found["mean"][index][t], mean)
            close(found["cov"][index][t], cov)
            close(found["kl"][index][t], kl)


def test_backward_potentials_alone_may_have_the_batch(key):
    parts = draw_parts(np.random.default_rng(1), "plain", n=2)
    k, K = draw_parts(np.random.default_rng(2), "causal", n=2, lead=(3,))["backward"]
    q = LowRankMomentMatched(nonlinear_path(), **parts, key=key, num_samples=10, backward=(k, K[0]))
    assert q.batch_shape == (3,)
    assert q.mean.shape == (3, STEPS, 2)
    assert q.sample(key, (4,)).shape == (4, 3, STEPS, 2)


def test_a_site_in_a_plate_and_its_kl(key):
    parts = draw_parts(np.random.default_rng(1), "plain", n=2, lead=(3,))
    prior = nonlinear_path()
    q = LowRankMomentMatched(prior, **parts, key=key, num_samples=10)
    np.testing.assert_allclose(kl_divergence(q, prior), q.kl.sum(-1))
    with numpyro.handlers.seed(rng_seed=0), numpyro.plate("series", 3):
        z = numpyro.sample("z", q)
    assert z.shape == (3, STEPS, 2)
    particles = np.asarray(q.particles)
    for series, path in enumerate(np.asarray(z)):
        assert (particles[series] == path).all((-1, -2)).any()
    leaves, tree = jax.tree.flatten(q)
    np.testing.assert_array_equal(jax.tree.unflatten(tree, leaves).mean, q.mean)


def test_there_is_no_density(key):
    q = LowRankMomentMatched(
        nonlinear_path(), **draw_parts(np.random.default_rng(1), "plain", n=2), key=key, num_samples=5
    )
    with pytest.raises(NotImplementedError, match="no joint density"):
        q.log_prob(q.sample(key))


@pytest.mark.parametrize("form", FORMS)
def test_float32_agrees_with_float64(form, key):
    parts = draw_parts(np.random.default_rng(4), form, n=2)
    exact = report(nonlinear_path(), parts, key)
    noise = moment_matched.standard_normal  # the same numbers in both precisions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moment_matched, "standard_normal", lambda *args: noise(*args[:2], float).astype(args[2]))
        single = jax.tree.map(np.float32, parts)
        found = jax.jit(report.__wrapped__, static_argnums=3)(nonlinear_path(dtype=np.float32), single, key, MANY)
    for name, value in exact.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4, err_msg=name)


@jax.jit
@jax.value_and_grad
def scalar(point, key):
    prior = StatePath(point["m0"], point["chol_P0"], lambda z, u: jnp.sin(point["A"] @ z), point["chol_Q"], STEPS)
    found = report.__wrapped__(prior, point["parts"], key, 5)
    return sum(jnp.sum(jnp.cos(found[name])) for name in found)


@pytest.mark.parametrize(
    ("kind", "form"), [("companion", "causal"), pytest.param("general", "tied", marks=pytest.mark.slow)]
)
def test_gradients_are_finite_differences(form, kind, key):
    rng = np.random.default_rng(0)
    ssm, _, _ = make_model(kind)
    point = {n: np.asarray(getattr(ssm, n)) for n in ("m0", "chol_P0", "A", "chol_Q")}
    point["parts"] = draw_parts(rng, form)
    _, slope = scalar(point, key)
    for leaf, gradient in enumerate(jax.tree.leaves(slope)):
        assert np.isfinite(gradient).all()
        direction = rng.normal(size=gradient.shape)

        def moved(h, leaf=leaf, direction=direction):
            leaves, tree = jax.tree.flatten(point)
            leaves[leaf] = leaves[leaf] + h * direction
            return float(scalar(jax.tree.unflatten(tree, leaves), key)[0])

        expected = (moved(1e-5) - moved(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-5, atol=1e-6, err_msg=str(leaf))


ZEROS = np.zeros((STEPS, 2)), np.zeros((STEPS, 2, 1))
BAD = {
    "prior": (TypeError, {"prior": dist.Normal()}),
    "K": (ValueError, {"K": np.zeros((STEPS, 3, 1))}),
    "k": (ValueError, {"k": np.zeros((STEPS, 3))}),
    "b": (ValueError, {"b": np.zeros((STEPS, 2))}),
    "center": (ValueError, {"center": np.zeros((STEPS + 1, 2))}),
    "num_samples": (ValueError, {"num_samples": 1}),
    "num_samples of another kind": (TypeError, {"num_samples": 2.5}),
    "backward": (TypeError, {"backward": ZEROS[0]}),
    "backward k": (ValueError, {"backward": (np.zeros((STEPS, 3)), ZEROS[1])}),
    "backward K": (ValueError, {"backward": (ZEROS[0], np.zeros((STEPS, 2)))}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, key):
    error, change = BAD[name]
    given = {"prior": nonlinear_path(), "k": ZEROS[0], "K": ZEROS[1], "key": key, "num_samples": 5} | change
    with pytest.raises(error, match=f"`{name.split()[0]}`"):
        LowRankMomentMatched(**given)
