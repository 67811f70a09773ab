"""Saved fits: equal when loaded, equal draws when resumed, what a manifest records, what needs to be given again."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import MCMC, NUTS

from pssm import datasets, models
from pssm.fitting import loop
from pssm.fitting.mcmc import NutsEngine
from pssm.fitting.svi import SVIEngine
from pssm.infer import SavedFitError, fit_nuts, fit_svi, load, posterior_draws, resume, save

pytestmark = pytest.mark.filterwarnings("ignore:SVI has not converged", "ignore:.*transitions diverged")
Y = np.array([0.5, 1.5, np.nan, 2.0])
NUTS_OPTIONS = {"num_warmup": 30, "num_samples": 20, "num_chains": 2, "progress_bar": False, "key": 3}
SVI_OPTIONS = {"guide": "normal", "num_steps": 60, "progress_bar": False, "key": 3}


def model(y, scale=1.0):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.deterministic("twice", 2 * mu)
    numpyro.sample("y", dist.Normal(mu, scale).expand([len(y)]).mask(~jnp.isnan(y)).to_event(1), obs=jnp.nan_to_num(y))


def manifest_of(path):
    return json.loads((path / "manifest.json").read_text())


class Stop:
    """Stands for a kill: ends the writing after some checkpoints, by an error that nothing catches."""

    def __init__(self, writer, after):
        self.call, self.left = writer.__call__, after

    def __call__(self, own, *args):
        self.call(own, *args)
        self.left -= 1
        if self.left == 0:
            raise MemoryError("killed")


def killed(monkeypatch, writer, after, run):
    """Runs with a kill after so many checkpoints."""
    stop = Stop(writer, after)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "__call__", lambda own, *args: stop(own, *args))
        with pytest.raises(MemoryError):
            run()


def assert_same_draws(a, b):
    for one, other in ((a.get_samples(group_by_chain=True), b.get_samples(group_by_chain=True)),
                       (a.get_extra_fields(True), b.get_extra_fields(True))):  # fmt: skip
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def whole():
    """The run that nothing interrupts."""
    return fit_nuts(model, Y, chunk=7, **NUTS_OPTIONS)


def test_pieces_give_numpyros_own_draws(whole):
    own = fit_nuts(model, Y, **NUTS_OPTIONS)
    assert whole.get_samples(group_by_chain=True)["mu"].shape == (2, 20)
    np.testing.assert_allclose(whole.get_samples()["mu"], own.get_samples()["mu"], rtol=1e-5)
    np.testing.assert_allclose(whole.get_samples()["twice"], own.get_samples()["twice"], rtol=1e-5)
    assert set(whole.get_extra_fields()) == set(own.get_extra_fields())


@pytest.mark.parametrize("after", [2, pytest.param(6, marks=pytest.mark.slow)], ids=["in the warm-up", "in the draws"])
def test_resumed_draws_are_those_of_an_unbroken_run(monkeypatch, tmp_path, whole, after):
    killed(monkeypatch, loop.Saver, after, lambda: fit_nuts(
        model, Y, chunk=7, checkpoint=tmp_path / "fit", **NUTS_OPTIONS))  # fmt: skip
    assert manifest_of(tmp_path / "fit")["complete"] is False
    found = resume(tmp_path / "fit", model, progress_bar=False)
    assert_same_draws(found, whole)
    assert_same_draws(load(tmp_path / "fit", model), whole)
    assert manifest_of(tmp_path / "fit")["complete"] is True


@pytest.mark.slow
def test_more_draws_from_memory_and_from_a_folder(tmp_path, whole):
    longer = fit_nuts(model, Y, chunk=7, **{**NUTS_OPTIONS, "num_samples": 33})
    assert_same_draws(resume(whole, num_samples=33, progress_bar=False), longer)
    save(whole, tmp_path / "fit")
    assert_same_draws(resume(tmp_path / "fit", model, num_samples=33, progress_bar=False), longer)
    with pytest.raises(ValueError, match="`num_samples` must be more than the 33 draws"):
        resume(tmp_path / "fit", model, progress_bar=False)


@pytest.mark.slow
def test_a_run_of_numpyros_own_is_saved_and_goes_on(tmp_path):
    mcmc = MCMC(NUTS(model), num_warmup=30, num_samples=20, progress_bar=False)
    mcmc.run(jax.random.key(0), Y, scale=2.0)
    found = load(save(mcmc, tmp_path / "fit"), model)
    np.testing.assert_array_equal(found.get_samples()["mu"], mcmc.get_samples()["mu"])
    assert found._kwargs == {"scale": 2.0}
    assert resume(found, num_samples=25, progress_bar=False).get_samples()["mu"].shape == (25,)


def test_chains_one_after_the_other(tmp_path, whole):
    options = {**NUTS_OPTIONS, "chain_method": "sequential"}
    mcmc = fit_nuts(model, Y, chunk=50, checkpoint=tmp_path / "fit", **options)
    np.testing.assert_allclose(mcmc.get_samples()["mu"], whole.get_samples()["mu"], rtol=1e-4)
    assert_same_draws(load(tmp_path / "fit", model), mcmc)


def test_ctrl_c_returns_the_draws_there_are(monkeypatch):
    advance = NutsEngine.advance

    def interrupted(self, run, count):
        if run.steps >= 37:
            raise KeyboardInterrupt
        return advance(self, run, count)

    monkeypatch.setattr(NutsEngine, "advance", interrupted)
    with pytest.warns(UserWarning, match="interrupted with 12 of 20 draws"):
        mcmc = fit_nuts(model, Y, chunk=7, **NUTS_OPTIONS)
    assert mcmc.get_samples(group_by_chain=True)["mu"].shape == (2, 12)
    assert mcmc.ended == "interrupted"


# SVI


@pytest.fixture(scope="module")
def svi():
    return fit_svi(model, Y, **SVI_OPTIONS)


def test_svi_comes_back_as_it_was(tmp_path, svi):
    found = load(save(svi, tmp_path / "fit"), model)
    np.testing.assert_array_equal(found.losses, svi.losses)
    for name, value in svi.params.items():
        np.testing.assert_array_equal(found.params[name], value)
    assert (found.message, found.converged, found.ended) == (svi.message, svi.converged, svi.ended)
    for name, x in posterior_draws(svi, num_samples=5).items():
        np.testing.assert_array_equal(posterior_draws(found, num_samples=5)[name], x)


def test_resumed_svi_takes_the_same_steps(monkeypatch, tmp_path, svi):
    monkeypatch.setattr(SVIEngine, "save_every", 0.0)
    monkeypatch.setattr("pssm.fitting.svi.LONGEST", 20)
    killed(monkeypatch, loop.Saver, 2, lambda: fit_svi(model, Y, checkpoint=tmp_path / "fit", **SVI_OPTIONS))
    assert 0 < load(tmp_path / "fit", model).run.step < 60
    found = resume(tmp_path / "fit", model, progress_bar=False)
    np.testing.assert_array_equal(found.losses, svi.losses)
    np.testing.assert_array_equal(found.params["mu_auto_loc"], svi.params["mu_auto_loc"])
    with pytest.raises(ValueError, match="`num_steps` must be more than the 60 steps"):
        resume(tmp_path / "fit", model, progress_bar=False)
    more = resume(tmp_path / "fit", model, num_steps=70, progress_bar=False)
    np.testing.assert_array_equal(more.losses, resume(svi, num_steps=70, progress_bar=False).losses)
    assert more.losses.shape == (70,)


def test_what_a_file_cannot_hold_is_given_again(tmp_path):
    options = {**SVI_OPTIONS, "learning_rate": optax.constant_schedule(0.01), "validation": (Y,), "validate_every": 20}
    fit = fit_svi(model, Y, **options)
    save(fit, tmp_path / "fit")
    with pytest.raises(ValueError, match="`learning_rate` must be given again"):
        load(tmp_path / "fit", model)
    found = load(tmp_path / "fit", model, learning_rate=options["learning_rate"])
    np.testing.assert_array_equal(found.validation, fit.validation)
    assert found.run.best_step == fit.run.best_step
    with pytest.raises(ValueError, match="`model` is needed.*'model'"):
        load(tmp_path / "fit")


# Manifest and refusals


@pytest.fixture(scope="module")
def nile(tmp_path_factory):
    """A fit of a registered model with an option."""
    y = jnp.asarray(datasets.load("nile").y[:12])
    fit = fit_svi(partial(models.local_level, location=900.0), y, scale=100.0, **{**SVI_OPTIONS, "num_steps": 12})
    return save(fit, tmp_path_factory.mktemp("nile") / "fit"), fit


def test_registered_model_needs_nothing_but_the_folder(nile):
    found = load(nile[0])
    assert found.kwargs == {"scale": 100.0}
    assert isinstance(found.args[0], jax.Array)
    np.testing.assert_array_equal(found.losses, nile[1].losses)


def test_manifest_says_where_the_fit_comes_from(nile):
    m = manifest_of(nile[0])
    assert m["schema_version"] == 1
    assert m["model"] == {"name": "local_level", "options": {"dict": {"location": 900.0}}, "function": "local_level"}
    assert len(m["data_sha256"]) == 64
    p = m["provenance"]
    assert p["versions"]["numpyro"] == numpyro.__version__
    assert (p["backend"], p["x64"], p["seed"]) == ("cpu", False, [0, 3])
    assert p["wall_seconds"] > 0
    for record_ in (r for groups in m["files"].values() for g in groups for r in g):
        assert (nile[0] / record_["file"]).stat().st_size == record_["bytes"]
    assert not list(nile[0].glob("*.partial"))
    assert all(p.suffix in (".json", ".npz") for p in nile[0].iterdir())


def test_other_data_are_refused(nile):
    with pytest.raises(ValueError, match="`args` are not those of the saved fit"):
        load(nile[0], args=(np.zeros((12, 1)),), kwargs={"scale": 100.0})
    same = np.asarray(nile[1].args[0])
    assert load(nile[0], args=(same,), kwargs={"scale": 100.0}).kwargs == {"scale": 100.0}


def test_other_model_is_refused(nile):
    def other(y, scale):
        numpyro.sample("mu", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1))

    with pytest.raises(SavedFitError, match="does not fit this model"):
        load(nile[0], other)


def test_other_precision_is_refused(nile, x64):
    with pytest.raises(ValueError, match="jax_enable_x64=False"):
        load(nile[0])


def test_what_is_there_is_not_overwritten(tmp_path, svi):
    save(svi, tmp_path / "fit")
    with pytest.raises(FileExistsError, match="`path`.*force=True"):
        save(svi, tmp_path / "fit")
    with pytest.raises(FileExistsError, match="nothing was changed"):
        fit_svi(model, Y, checkpoint=tmp_path / "fit", **SVI_OPTIONS)
    before = set(tmp_path.joinpath("fit").iterdir())
    save(svi, tmp_path / "fit", force=True)
    assert len(set(tmp_path.joinpath("fit").iterdir())) == len(before)
    load(tmp_path / "fit", model)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="Choose another"):
        save(svi, tmp_path / "other", force=True)


SCRIPT = """
import os, signal, sys
import numpy as np
from pssm import datasets, models
from pssm.fitting import loop
from pssm.infer import fit_nuts, resume

mode, path, after = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = dict(num_warmup=40, num_samples=40, num_chains=2, progress_bar=False, chunk=8)
y = datasets.load("nile").y[:20]
if mode == "killed":
    write = loop.Saver.__call__
    def count(self, run, ended=""):
        global after
        write(self, run, ended)
        after -= 1
        if after == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    loop.Saver.__call__ = count
    fit_nuts(models.local_level, y, checkpoint=path, **options)
fit = fit_nuts(models.local_level, y, **options) if mode == "whole" else resume(path, progress_bar=False)
np.savez(path + "-" + mode, **fit.get_samples(group_by_chain=True))
"""


@pytest.mark.slow
def test_sigkill_and_a_fresh_process(tmp_path):
    def run(mode, after=0):
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, mode, str(tmp_path / "fit"), str(after)]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)

    assert run("killed", after=7).returncode == -9
    assert manifest_of(tmp_path / "fit")["progress"]["iterations"] == 56
    for mode in ("resumed", "whole"):
        done = run(mode)
        assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "fit-whole.npz") as whole, np.load(tmp_path / "fit-resumed.npz") as resumed:
        assert whole["sigma_obs"].shape == (2, 40)
        for name in whole:
            np.testing.assert_array_equal(whole[name], resumed[name])


LONG = {"num_warmup": 500, "num_samples": 3000, "num_chains": 2, "chunk": 10, "progress_bar": False, "key": 5}
CHILD = """
import json, sys
from pathlib import Path
from pssm import datasets, models
from pssm.infer import fit_nuts, resume

folder = Path(sys.argv[1])
if (folder / "manifest.json").exists():
    resume(folder, progress_bar=False)
else:
    fit_nuts(models.local_level, datasets.load("nile").y, checkpoint=folder, **json.loads(sys.argv[2]))
"""


@pytest.mark.slow
def test_killed_at_twenty_random_times(tmp_path):
    """SIGKILL, a new process each time: what is in the folder can always be read, and the draws are the same."""
    folder, rng = tmp_path / "fit", np.random.default_rng(0)

    def iterations():
        there = (folder / "manifest.json").exists()
        return manifest_of(folder)["progress"]["iterations"] if there else 0

    reached = 0
    for _ in range(20):
        child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", CHILD, folder, json.dumps(LONG)])
        while child.poll() is None and iterations() == reached:  # it starts, and compiles
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        child.kill()
        assert child.wait() == -signal.SIGKILL, "it was still running"
        assert iterations() > reached
        reached = iterations()
        if reached <= LONG["num_warmup"]:
            with pytest.raises(ValueError, match="still in its warm-up"):
                load(folder)
            continue
        assert len(load(folder).get_samples()["sigma_obs"]) == 2 * (reached - LONG["num_warmup"])
    whole = fit_nuts(models.local_level, datasets.load("nile").y, **LONG)
    assert_same_draws(resume(folder, progress_bar=False), whole)
