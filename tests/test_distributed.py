"""One fit over two devices, and over two processes: the same numbers as on one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pssm.infer import shard
from pssm.study.distributed import join, launch

FIT = """
import json, sys
import jax
from pssm.study.distributed import join

several = join()
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
from pssm.infer import fit_svi, posterior_draws, shard
from pssm.devices import is_spread


def model(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("trials", y.shape[0]):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("y", dist.Normal(z[:, None], 1.0).to_event(1), obs=y)


y = np.random.default_rng(0).normal(1.0, 1.0, (4, 3))
held_out = y + 0.1
if "shared" in sys.argv:
    assert len(jax.devices()) == 2
    y, held_out = shard((y, held_out))
    assert is_spread(y) and {s.data.shape for s in y.addressable_shards} == {(2, 3)}
fit = fit_svi(model, y, guide="normal", num_steps=60, progress_bar=False, validation=(held_out,), validate_every=20)
draws = posterior_draws(fit, num_samples=10)
found = {n: np.asarray(x).tolist() for n, x in fit.params.items()}
found |= {"losses": fit.losses.tolist(), "validation": fit.validation.tolist(), "z": draws["z"].tolist()}
if jax.process_index() == 0:
    print("FOUND" + json.dumps(found))
"""
CPU = {"JAX_PLATFORMS": "cpu"}


def found(text):
    return json.loads(text.split("FOUND", 1)[1])


@pytest.fixture(scope="module")
def alone():
    run = [sys.executable, "-W", "ignore", "-c", FIT]
    return found(subprocess.run(run, env=os.environ | CPU, capture_output=True, text=True, check=True).stdout)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_allclose(b[name], x, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.slow
def test_two_devices_give_the_fit_of_one(alone):
    env = os.environ | CPU | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", FIT, "shared"], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert_equal(alone, found(run.stdout))


@pytest.mark.slow
def test_two_processes_give_the_fit_of_one(alone, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    texts = launch([sys.executable, "-W", "ignore", "-c", FIT, "shared"], 2, timeout=300)
    assert "FOUND" not in texts[1]
    assert_equal(alone, found(texts[0]))


def test_a_process_that_fails_ends_the_others():
    program = "import os, sys, time\nif os.environ['PSSM_PROCESS'] == '1': sys.exit('broken')\ntime.sleep(60)"
    with pytest.raises(RuntimeError, match=r"process 1 of 2 failed:\nbroken"):
        launch([sys.executable, "-c", program], 2)


def test_processes_that_take_too_long_are_ended():
    with pytest.raises(TimeoutError, match="within 0.2 seconds"):
        launch([sys.executable, "-c", "import time; time.sleep(60)"], 2, timeout=0.2)


def test_a_program_by_itself_joins_nothing():
    assert join() is False


def test_trials_that_cannot_be_shared_out():
    import jax

    with pytest.raises(ValueError, match="`data`: the first axis"):
        shard(np.zeros((3, 2)), devices=[jax.devices()[0]] * 2)
    assert shard({"y": np.zeros((3, 2))})["y"].shape == (3, 2)
