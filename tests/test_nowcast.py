"""`nowcast`: every value that is missing, beside the dense Gaussian conditional, and its draws."""

import jax.numpy as jnp
import numpy as np
import numpyro
import oracles
import pytest

from pssm import LinearGaussianSSM, infer, models
from pssm.distributions import LinearGaussianMarginal

STEPS = 6


def case(seed, R):
    """A model whose parameters are known but for one that does nothing, and data with gaps and a ragged end."""
    rng = np.random.default_rng(seed)
    q = oracles.random_model(rng, n=2, p=3, offsets=True)
    q["chol_R"] = R(rng)
    ssm = LinearGaussianSSM(**q)

    def model(y=None):
        numpyro.sample("nothing", numpyro.distributions.Normal())
        numpyro.sample("y", LinearGaussianMarginal(ssm, STEPS if y is None else len(y)), obs=y)

    y = rng.normal(size=(STEPS, 3))
    y[1, 0] = y[4:, 1] = y[5, 2] = np.nan
    return ssm, model, y


@pytest.mark.parametrize(
    "R",
    [
        lambda rng: rng.normal(size=(3, 3)),
        lambda rng: np.diag([0.5, 0.0, 0.3]),
        lambda rng: np.outer([1.0, 2.0, -1.0], [1.0, 0.0, 0.0]),
    ],
    ids=["correlated", "one exact", "one noise for all"],
)
def test_values_are_those_of_the_dense_gaussian(R, x64):
    ssm, model, y = case(0, R)
    horizon = 2
    found = infer.nowcast(model, {"nothing": jnp.zeros((1, 1))}, y, horizon=horizon, most=4000)
    longer = np.concatenate([y, np.full((horizon, 3), np.nan)])
    mean, cov = oracles.observed_moments(ssm, STEPS + horizon)
    seen = ~np.isnan(longer.ravel())
    gain = cov[np.ix_(~seen, seen)] @ np.linalg.pinv(cov[np.ix_(seen, seen)], rcond=1e-12, hermitian=True)
    wanted = longer.ravel().copy()
    wanted[~seen] = mean[~seen] + gain @ (wanted[seen] - mean[seen])
    left = cov[np.ix_(~seen, ~seen)] - gain @ cov[np.ix_(seen, ~seen)]
    np.testing.assert_allclose(found.mean.ravel(), wanted, atol=1e-8)
    np.testing.assert_allclose(found.sd.ravel()[~seen], np.sqrt(np.diag(left).clip(0)), atol=1e-7)
    assert (found.sd.ravel()[seen] == 0).all()
    draws = found.draws.reshape(len(found.draws), -1)
    assert len(draws) == 4000
    np.testing.assert_array_equal(draws[:, seen], np.tile(longer.ravel()[seen], (4000, 1)))
    size = np.sqrt(np.outer(np.diag(left), np.diag(left)).clip(1e-12))
    assert (np.abs(np.cov(draws[:, ~seen].T) - left) / size).max() < 0.12, "joint draws"
    np.testing.assert_allclose(found.quantiles[2].ravel(), wanted, atol=1e-8)
    assert found.last.tolist() == [5, 3, 4]
    own = found.after_last(2)
    np.testing.assert_array_equal(own.mean[:, 1], found.mean[4:6, 1])
    np.testing.assert_array_equal(own.draws[..., 0], found.draws[:, 6:8, 0])


def test_what_does_not_fit_is_named(x64):
    y = np.arange(8.0)
    point = {"sigma_level": jnp.ones((1, 1)), "sigma_obs": jnp.ones((1, 1))}
    found = infer.nowcast(models.local_level, point, y, horizon=1)
    with pytest.raises(ValueError, match="`num_steps` must be at most 1; give `nowcast` 2 steps more"):
        found.after_last(3)
    with pytest.raises(ValueError, match="`horizon` must be at least 0"):
        infer.nowcast(models.local_level, point, y, horizon=-1)
    u = np.arange(8.0)[:, None]
    with pytest.raises(ValueError, match="`u_future` is required"):
        infer.nowcast(models.local_level, point | {"beta": jnp.ones((1, 1, 1))}, y, horizon=1, u=u)
