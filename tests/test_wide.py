"""Many sensors and few states: what is computed from the collapsed series is what the whole series gives."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM
from pssm.filters import covariance
from pssm.filters.collapse import can_collapse, is_wide

STEPS, SENSORS = 9, 14


def build(kind="plain", dtype=np.float64):
    """A model of 3 states and 14 sensors with gaps: single ones, whole steps, and steps with two readings only."""
    rng = np.random.default_rng(5)
    timed = ("A", "b", "C", "chol_R", "d", "D") if kind == "everything varies in time" else ()
    q = oracles.random_model(rng, n=3, p=SENSORS, m=2, steps=STEPS, timed=timed, offsets=True)
    noise = rng.uniform(0.5, 2.0, (STEPS, SENSORS) if timed else SENSORS) * rng.choice([-1, 1], SENSORS)
    q["chol_R"] = noise[..., None] * np.eye(SENSORS)
    if kind == "a column of zeros":  # a state that no sensor sees
        q["C"][..., 1] = 0.0
    y, u = rng.normal(size=(STEPS, SENSORS)), rng.normal(size=(STEPS, 2))
    if kind != "nothing missing":
        y[rng.random(y.shape) < 0.2] = np.nan
        y[[0, 4]], y[5, 2:] = np.nan, np.nan
    if kind == "no inputs":
        q["B"] = q["D"] = q["d"] = u = None
    ssm = LinearGaussianSSM(
        **{k: v if k == "time_varying" or v is None else np.asarray(v, dtype) for k, v in q.items()}
    )
    return ssm, y.astype(dtype), None if u is None else u.astype(dtype)


KINDS = ("plain", "nothing missing", "no inputs", "a column of zeros", "everything varies in time")
by_score = jax.jit(jax.value_and_grad(pssm.log_likelihood, (0, 1)))
# Derivatives by this method are those of every operation of the whole step.
by_operations = jax.jit(jax.value_and_grad(lambda *a: pssm.log_likelihood(*a, method="square_root"), (0, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_and_likelihood(kind, x64):
    ssm, y, u = build(kind)
    assert is_wide(ssm)
    assert can_collapse(ssm, jnp.asarray(y), u)
    filtered, smoothed = pssm.kalman_filter(ssm, y, u), pssm.kalman_smoother(ssm, y, u)
    np.testing.assert_allclose(filtered.log_likelihoods, oracles.log_likelihoods(ssm, y, u), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(pssm.log_likelihood(ssm, y, u), oracles.log_likelihood(ssm, y, u), rtol=1e-11)
    exact = oracles.states(ssm, y, u)
    for found, right in (
        ((filtered.mean, filtered.cov), exact["filtered"]),
        ((filtered.predicted_mean, filtered.predicted_cov), exact["predicted"]),
        ((smoothed.mean, smoothed.cov), exact["smoothed"]),
        ((smoothed.cross_cov,), (exact["cross_cov"],)),
    ):
        for own, dense in zip(found, right, strict=True):
            np.testing.assert_allclose(own, dense, atol=1e-10)
    draws = pssm.sample_states(jax.random.key(0), ssm, y, u, sample_shape=(4000,))
    mean, cov = exact["smoothed"]
    sd = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
    np.testing.assert_allclose((draws.mean(0) - mean) / sd, 0.0, atol=0.07)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient(kind, x64):
    """By every number of the model, the noise's off-diagonal ones too, and by the data."""
    ssm, y, u = build(kind)
    (value, gradient), (same, exact) = by_score(ssm, y, u), by_operations(ssm, y, u)
    np.testing.assert_allclose(value, same, rtol=1e-12)
    for found, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-9, atol=1e-9 * np.abs(right).max())


def test_the_collapsed_series_is_what_is_computed(x64, monkeypatch):
    """Poisoned, the recursion of the whole step has no part in the values nor in the gradient."""
    ssm, y, u = build()
    every_step, sizes = covariance.every_step, []

    def poisoned(ssm, observed):
        sizes.append(ssm.n_obs)
        rows = every_step(ssm, observed)
        return jax.tree.map(lambda x: x * jnp.nan, rows) if ssm.n_obs == SENSORS else rows

    for place in ("passes", "score_back"):
        monkeypatch.setattr(f"pssm.filters.{place}.every_step", poisoned)
    jax.clear_caches()
    value, gradient = jax.value_and_grad(lambda ssm: pssm.log_likelihood(ssm, y, u))(ssm)
    smoothed = pssm.kalman_smoother(ssm, y, u)
    jax.clear_caches()
    assert set(sizes) == {SENSORS, ssm.n_state + 1}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradient, smoothed)))


def test_second_derivatives(x64):
    """Those of the whole step, by numbers of `C`, `chol_R` and `A` at once."""
    ssm, y, u = build()
    rng = np.random.default_rng(1)
    way = {name: jnp.asarray(rng.normal(size=getattr(ssm, name).shape)) for name in ("A", "C", "chol_R")}

    def along(x, method):
        moved = {name: getattr(ssm, name) + x * way[name] for name in way}
        return pssm.log_likelihood(ssm.replace(**moved), y, u, method=method)

    curvature = [jax.jit(jax.grad(jax.grad(lambda x, m=m: along(x, m))))(0.0) for m in ("sequential", "square_root")]
    assert curvature[0] == pytest.approx(float(curvature[1]), rel=1e-9)


@pytest.mark.parametrize("kind", ["correlated", "exact", "tiny"])
def test_where_it_cannot_be_collapsed(kind, x64):
    ssm, y, u = build("nothing missing")
    noise = np.array(ssm.chol_R)
    if kind == "correlated":
        noise[3, 1] = 0.4
    if kind == "exact":
        noise[2, 2] = 0.0
    if kind == "tiny":
        noise *= 1e-9
    ssm = ssm.replace(chol_R=noise)
    assert not can_collapse(ssm, jnp.asarray(y), u)
    if kind != "tiny":
        assert pssm.log_likelihood(ssm, y, u) == pytest.approx(oracles.log_likelihood(ssm, y, u), rel=1e-10)
    (_, gradient), (_, exact) = by_score(ssm, y, u), by_operations(ssm, y, u)
    np.testing.assert_allclose(gradient[0].C, exact[0].C, rtol=1e-6, atol=1e-7 * np.abs(exact[0].C).max())


def test_float32():
    ssm, y, u = build(dtype=np.float32)
    value, gradient = by_score(ssm, y, u)
    smoothed = pssm.kalman_smoother(ssm, y, u)
    with jax.enable_x64(True):
        exact, right = by_operations(*build())
    mean, cov = oracles.states(*build())["smoothed"]
    sd = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
    np.testing.assert_allclose((smoothed.mean - mean) / sd, 0.0, atol=1e-3)
    np.testing.assert_allclose(
        smoothed.cov / (sd[:, :, None] * sd[:, None]), cov / (sd[:, :, None] * sd[:, None]), atol=1e-4
    )
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    for found, g in zip(jax.tree.leaves(gradient), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(found, g, rtol=1e-4, atol=1e-5 * np.abs(g).max())


def test_batches(x64):
    """Models side by side, of which one cannot be collapsed, and series that share a model."""
    ssm, y, u = build()
    correlated = np.array(ssm.chol_R)
    correlated[3, 1] = 0.4
    both = ssm.replace(chol_R=np.stack([ssm.chol_R, correlated]))
    each = [oracles.log_likelihood(ssm.replace(chol_R=x), y, u) for x in both.chol_R]
    np.testing.assert_allclose(pssm.log_likelihood(both, y, u), each, rtol=1e-10)
    many = np.stack([y, np.roll(y, 1, axis=0)])
    each = [oracles.log_likelihood(ssm, x, u) for x in many]
    np.testing.assert_allclose(pssm.log_likelihood(ssm, many, u), each, rtol=1e-10)
    gradient = jax.vmap(jax.grad(pssm.log_likelihood), (None, 0, None))(ssm, many, u)
    np.testing.assert_allclose(gradient.C[1], by_operations(ssm, many[1], u)[1][0].C, rtol=1e-9, atol=1e-9)
