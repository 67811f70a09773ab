"""`predict` and `update`: one step at a time they are the filter and the dense joint Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM
from pssm.fields import TIME_VARYING

STEPS = 7
KINDS = {
    "constant": {},
    "everything varies": {"timed": TIME_VARYING, "m": 2, "offsets": True},
    "singular noise and known start": {"width": 1, "edit": ("chol_P0", 0.0)},
    "exact observation": {"edit": ("chol_R", np.diag([0.0, 1.0]))},
}


def build(kind, dtype=np.float64):
    options = dict(KINDS[kind])
    name, factor = options.pop("edit", ("m0", 1.0))
    rng = np.random.default_rng(6)
    q = oracles.random_model(rng, steps=STEPS, **options)
    q[name] = factor * q[name]
    ssm = LinearGaussianSSM(**{k: v if k == "time_varying" else v.astype(dtype) for k, v in q.items()})
    y = oracles.with_holes(rng, rng.normal(size=(STEPS, 2))).astype(dtype)
    return ssm, y, rng.normal(size=(STEPS, 2)).astype(dtype) if "m" in options else None


@jax.jit
def by_steps(ssm, y, u):
    """The filter as a user writes it: a scan, with the model of each step."""

    def step(state, t):
        now, own = ssm.at_time(t), None if u is None else u[t]
        ahead = pssm.predict(now, *state, own)
        mean, chol = (jnp.where(t == 0, a, b) for a, b in ((ssm.m0, ahead.mean), (start, ahead.chol)))
        new = pssm.update(now, mean, chol, y[t], own)
        return (new.mean, new.chol), (new, mean, chol)

    start = pssm.linalg.triangularise(ssm.chol_P0)
    return jax.lax.scan(step, (ssm.m0, start), jnp.arange(STEPS))[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_they_are_the_filter(kind, dtype):
    with jax.enable_x64(dtype == np.float64):
        ssm, y, u = build(kind, dtype)
        new, mean, chol = by_steps(ssm, y, u)
        exact = oracles.states(ssm, y, u)
        tolerance = 1e-9 if dtype == np.float64 else 2e-4
        for found, (right_mean, right_cov) in (
            ((new.mean, new.cov), exact["filtered"]),
            ((mean, chol @ jnp.swapaxes(chol, 1, 2)), exact["predicted"]),
        ):
            scale = max(1.0, np.abs(right_cov).max())
            np.testing.assert_allclose(found[0], right_mean, atol=tolerance * scale)
            np.testing.assert_allclose(found[1], right_cov, atol=tolerance * scale)
        loose = 10 * tolerance
        right = oracles.log_likelihoods(ssm, y, u)
        np.testing.assert_allclose(new.log_likelihood, right, atol=loose, rtol=loose)
        assert new.log_likelihood[STEPS // 2] == 0
        filtered = pssm.kalman_filter(ssm, y, u)
        np.testing.assert_allclose(new.log_likelihood, filtered.log_likelihoods, atol=loose, rtol=loose)
        np.testing.assert_allclose(new.chol, filtered.chol, atol=loose)
        assert new.mean.dtype == dtype


def test_batches_are_their_elements(x64):
    """Of models, of beliefs and of observations, broadcast against each other."""
    rng = np.random.default_rng(0)
    ssm = LinearGaussianSSM(**oracles.random_model(rng, m=1, offsets=True))
    models = ssm.replace(A=rng.normal(size=(4, 1, 3, 3)), C=rng.normal(size=(5, 2, 3)))
    mean, chol, y, u = (rng.normal(size=shape) for shape in ((5, 3), (4, 1, 3, 2), (4, 5, 2), (1,)))
    y[2, 3] = np.nan
    ahead, new = pssm.predict(models, mean, chol, u), pssm.update(models, mean, chol, y, u)
    assert ahead.cov.shape == new.cov.shape == (4, 5, 3, 3)
    assert new.log_likelihood.shape == (4, 5)
    for i, j in ((0, 0), (2, 3), (3, 4)):
        one = ssm.replace(A=models.A[i, 0], C=models.C[j])
        for many, single in (
            (ahead, pssm.predict(one, mean[j], chol[i, 0], u)),
            (new, pssm.update(one, mean[j], chol[i, 0], y[i, j], u)),
        ):
            for a, b in zip(many, single, strict=True):
                np.testing.assert_allclose(a[i, j], b, atol=1e-12)


def test_a_factor_of_any_width_and_its_gradient(x64):
    """Only the product matters; the slope is that of the marginal likelihood by hand."""
    ssm = LinearGaussianSSM(**oracles.random_model(np.random.default_rng(1)))
    chol = np.random.default_rng(2).normal(size=(3, 6))
    y = np.array([0.4, np.nan])
    triangle = np.linalg.cholesky(chol @ chol.T)
    wide, square = (pssm.update(ssm, ssm.m0, factor, y) for factor in (chol, triangle))
    for a, b in zip(wide, square, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    slope = jax.grad(lambda mean: pssm.update(ssm, mean, chol, y).log_likelihood)(ssm.m0)
    c = ssm.C[0]
    variance = c @ chol @ chol.T @ c + ssm.R[0, 0]
    np.testing.assert_allclose(slope, c * (y[0] - c @ ssm.m0) / variance, rtol=1e-10)


def test_errors_name_what_does_not_fit():
    timed, y, u = build("everything varies", np.float32)
    ssm, mean, chol = timed.at_time(2), np.zeros(3), np.eye(3)
    for call, message in (
        (lambda: pssm.predict(timed, mean, chol, u[0]), "`ssm` must be the model of one step.*at_time"),
        (lambda: pssm.predict(ssm, mean, chol), "`u` is required, of shape \\(2,\\)"),
        (lambda: pssm.predict(ssm, mean[:2], chol, u[0]), "`mean` must have shape \\(3,\\)"),
        (lambda: pssm.predict(ssm, mean, chol[:2], u[0]), "`chol` must have shape \\(3, columns\\)"),
        (lambda: pssm.predict(ssm, mean, np.full((3, 3), np.inf), u[0]), "`chol` must be finite"),
        (lambda: pssm.update(ssm, mean, chol, y, u[0, :1]), "`u` must have shape \\(2,\\)"),
        (lambda: pssm.update(ssm, mean, chol, y[0, :1], u[0]), "`y` must have shape \\(2,\\)"),
        (lambda: pssm.update(build("constant")[0], mean, chol, y[0], u[0]), "`u` is given, but"),
        (lambda: timed.at_time(STEPS), "`t` must be from 0 to 6; got 7"),
        (lambda: timed.at_time(-1), "`t` must be from 0 to 6; got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
