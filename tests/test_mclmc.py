"""MCLMC, an engine of the common loop: the posterior that it estimates, its pieces, its files, its refusals."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pssm import infer
from pssm.diagnostics import to_datatree
from pssm.fitting.mclmc import MCLMCEngine

MEAN, SD = np.array([1.0, -2.0, 0.5]), np.array([0.5, 1.0, 2.0])
OPTIONS = {"num_warmup": 1000, "num_samples": 400, "num_chains": 2, "thinning": 5, "progress_bar": False}


def model(y=None):
    z = numpyro.sample("z", dist.Normal(jnp.asarray(MEAN), jnp.asarray(SD)).to_event(1))
    numpyro.deterministic("twice", 2 * z)


@pytest.fixture(scope="module")
def fit():
    return infer.fit_mclmc(model, **OPTIONS)


def test_moments_of_a_normal_posterior(fit):
    draws = fit.draws()
    assert draws["z"].shape == (2, 400, 3)
    np.testing.assert_array_equal(draws["twice"], 2 * draws["z"])
    flat = draws["z"].reshape(-1, 3)
    np.testing.assert_array_less(np.abs(flat.mean(0) - MEAN) / SD, 0.3)
    np.testing.assert_allclose(flat.std(0), SD, rtol=0.2)
    assert fit.objective.startswith("estimate")
    assert fit.warnings == ()


def test_it_is_a_fit_like_any_other(fit, tmp_path):
    tree = to_datatree(fit, log_likelihood=False)
    assert dict(tree["posterior"]["z"].sizes) == {"chain": 2, "draw": 400, "z_dim_0": 3}
    assert tree.attrs["method"] == "MCLMC"
    assert (tree["sample_stats"]["lp"] < 0).any()
    again = infer.load(infer.save(fit, tmp_path / "fit"), model)
    np.testing.assert_array_equal(again.draws()["z"], fit.draws()["z"])
    assert again.seed is not None


def test_pieces_and_a_break_change_nothing(fit, tmp_path, monkeypatch):
    advance = MCLMCEngine.advance

    def interrupted(self, run, count):
        if run.steps >= 50:
            raise KeyboardInterrupt
        return advance(self, run, count)

    monkeypatch.setattr(MCLMCEngine, "advance", interrupted)
    with pytest.warns(UserWarning, match="interrupted with 60 of 400 draws"):
        part = infer.fit_mclmc(model, checkpoint=tmp_path / "fit", **OPTIONS)
    assert part.draws()["z"].shape == (2, 60, 3)
    monkeypatch.undo()
    resumed = infer.resume(tmp_path / "fit", model, progress_bar=False)
    np.testing.assert_array_equal(resumed.draws()["z"], fit.draws()["z"])
    longer = infer.resume(part, num_samples=70, progress_bar=False)
    np.testing.assert_array_equal(longer.draws()["z"], fit.draws()["z"][:, :70])


def test_refusals():
    with pytest.raises(ValueError, match="more than 1 dimension"):
        infer.fit_mclmc(lambda: numpyro.sample("x", dist.Normal()), **OPTIONS)
    with pytest.raises(ValueError, match="`thinning` must be at least 1"):
        infer.fit_mclmc(model, **{**OPTIONS, "thinning": 0})
