"""Filter and smoother in parallel over time: the same results as one step after the other."""

import jax
import numpy as np
import oracles
import pytest

import pssm
from pssm import LinearGaussianSSM

STEPS = 5  # not a power of two
KINDS = {
    "everything varies": dict(n=3, p=2, m=2, offsets=True, timed=("A", "chol_Q", "C", "chol_R", "b", "d", "B", "D")),
    "singular noise": dict(n=4, p=1, width=1),
    "known start, exact observation": dict(n=2, p=3, edit={"chol_P0": 0.0, "chol_R": np.array([[0.0], [1.0], [1.0]])}),
    "very wide start": dict(n=3, p=2, edit={"chol_P0": 1e4}),
}


def build(kind, dtype):
    options = dict(KINDS[kind])
    edit = options.pop("edit", {})
    rng = np.random.default_rng(2)
    q = oracles.random_model(rng, steps=STEPS, **options)
    q |= {name: factor * q[name] for name, factor in edit.items()}
    ssm = LinearGaussianSSM(**{k: v if k == "time_varying" else v.astype(dtype) for k, v in q.items()})
    y = oracles.with_holes(rng, 2 * rng.normal(size=(STEPS, ssm.n_obs))).astype(dtype)
    return ssm, y, rng.normal(size=(STEPS, 2)).astype(dtype) if "m" in options else None


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, np.float64) for kind in KINDS] + [(kind, np.float32) for kind in ("singular noise", "very wide start")],
)
def test_filter_and_smoother(kind, dtype):
    """Covariances and means relative to the wider of filtered and smoothed standard deviations."""
    with jax.enable_x64(dtype == np.float64):
        ssm, y, u = build(kind, dtype)
        tolerance = 2e-4 if dtype == np.float32 else 1e-9
        one, all_at_once = (pssm.kalman_filter(ssm, y, u, method=m) for m in ("sequential", "parallel"))
        np.testing.assert_allclose(all_at_once.log_likelihoods, one.log_likelihoods, rtol=tolerance, atol=tolerance)
        smooth, smooth_at_once = (pssm.kalman_smoother(ssm, y, u, method=m) for m in ("sequential", "parallel"))
        scale = np.sqrt(np.diagonal(one.cov, axis1=1, axis2=2)) + np.abs(one.mean).max() * 1e-3
        for a, b in ((all_at_once.mean, one.mean), (smooth_at_once.mean, smooth.mean)):
            np.testing.assert_allclose(a / scale, b / scale, atol=10 * tolerance)
        product = scale[:, :, None] * scale[:, None, :]
        for a, b in ((all_at_once.cov, one.cov), (smooth_at_once.cov, smooth.cov)):
            np.testing.assert_allclose(a / product, b / product, atol=tolerance)
        cross = scale[1:, :, None] * scale[:-1, None, :]
        np.testing.assert_allclose(smooth_at_once.cross_cov / cross, smooth.cross_cov / cross, atol=tolerance)


def test_gradient_and_batches(x64):
    ssm, y, u = build("everything varies", np.float64)
    series, inputs = np.stack([y, y[::-1]]), np.stack([u, u])

    def total(method):
        function = jax.jit(jax.grad(lambda s: pssm.log_likelihood(s, series, inputs, method=method).sum()))
        return jax.tree.leaves(function(ssm))

    for a, b in zip(total("parallel"), total("sequential"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9 * np.abs(b).max())
