"""Trials over two devices: the same numbers as on one, and the work is really shared."""

import os
import subprocess
import sys

SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pssm.distributions import LowRankChain, StatePath

assert len(jax.devices()) == 2
rng = np.random.default_rng(0)
trials, steps, n, rank = 4, 6, 3, 2
parts = {
    "k": rng.normal(size=(trials, steps, n)),
    "K": rng.normal(size=(trials, steps, n, rank)),
    "diag": rng.uniform(size=(trials, steps, n)),
}
parts = {name: np.float32(x) for name, x in parts.items()}
y = np.float32(rng.normal(size=(trials, steps, n)))


def objective(parts, scale, y):
    prior = StatePath(jnp.zeros(n), jnp.eye(n), lambda z, u: jnp.tanh(z), scale * jnp.eye(n), steps)
    z, kl = LowRankChain(prior, **parts).sample_with_kl(jax.random.key(0), (5,))
    return -0.5 * ((y - z) ** 2).sum((-1, -2)).mean(0) - kl.mean(0)


run = jax.jit(jax.value_and_grad(lambda *args: objective(*args).sum(), argnums=(0, 1)))
one = run(parts, 0.5, y)
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("trials",)), PartitionSpec("trials"))
shared = jax.device_put((parts, y), sharding)
two = run(shared[0], 0.5, shared[1])
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
each = jax.jit(objective)(shared[0], 0.5, shared[1])
assert each.sharding.is_equivalent_to(sharding, each.ndim), each.sharding
assert {s.data.shape for s in each.addressable_shards} == {(2,)}
assert two[1][0]["K"].sharding.is_equivalent_to(sharding, 4), two[1][0]["K"].sharding
"""


def test_trials_over_two_devices():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
