"""The low-rank guide: time of an ELBO with its gradient as the state grows, and memory at a large size.

    python docs/benchmarks/low_rank.py

20 steps, 8 trials, 25 draws each, rank 8, 100 Poisson channels, gated-recurrent dynamics of 64 hidden units,
float32. Prints two tables in Markdown. Columns: the chain (for small states also with a general noise matrix,
whose cost is cubic), the moment-matched recursion, and the floor: the transition, the readout and the random numbers
alone, which every method needs. `exponent` is that of the chain's time between two rows. The last column is the time of
the method's authors' PyTorch code at the same sizes, measured once on one core of another machine of this kind.
"""

import functools
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from pssm.distributions import LowRankChain, LowRankMomentMatched, StatePath
from pssm.linalg import Diagonal
from pssm.linalg.random import standard_normal

STEPS, TRIALS, DRAWS, RANK, CHANNELS, HIDDEN = 20, 8, 25, 8, 100, 64
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048)
DENSE_UP_TO = 128
AUTHORS = {16: 50, 64: 105, 128: 167, 256: 315, 512: 627, 1024: 1316}  # milliseconds


def gated(w, z, u):
    """A gated recurrent map of the state."""
    h = z @ w["into"]
    reset, keep, fresh = jnp.split(h @ w["gates"], 3, axis=-1)
    keep = jax.nn.sigmoid(keep)
    return ((1 - keep) * jnp.tanh(jax.nn.sigmoid(reset) * fresh) + keep * h) @ w["out"]


def problem(n: int, steps: int = STEPS, trials: int = TRIALS):
    rng = np.random.default_rng(0)

    def weights(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    w = {"into": weights(n, HIDDEN), "gates": weights(HIDDEN, 3 * HIDDEN), "out": weights(HIDDEN, n)}
    parameters = {
        "w": w,
        "C": weights(n, CHANNELS),
        "k": jnp.zeros((trials, steps, n)),
        "K": 0.1 * weights(trials, steps, n, RANK),
        "diag": jnp.ones((trials, steps, n)),
    }
    return parameters, jnp.asarray(rng.poisson(1.0, (trials, steps, CHANNELS)), jnp.float32)


def prior(p, n: int, steps: int, dense: bool = False) -> StatePath:
    noise = 0.3 * jnp.ones(n)
    chol_Q = jnp.tril(jnp.full((n, n), 1e-3)) + jnp.diag(noise) if dense else Diagonal(noise)
    return StatePath(jnp.zeros(n), Diagonal(jnp.ones(n)), jax.tree_util.Partial(gated, p["w"]), chol_Q, steps)


def readout(p, z, y):
    rate = z @ p["C"]
    return (y * rate - jnp.exp(rate)).sum((-1, -2))


def chain(n, y, dense, p, key):
    q = LowRankChain(prior(p, n, y.shape[1], dense), p["k"], p["K"], diag=p["diag"])
    z, kl = q.sample_with_kl(key, (DRAWS,))
    return (readout(p, z, y) - kl).mean(0).sum()


def matched(n, y, p, key):
    q = LowRankMomentMatched(prior(p, n, y.shape[1]), p["k"], p["K"], key, DRAWS)
    return readout(p, jnp.moveaxis(q.particles, -3, 0), y).mean(0).sum() - q.kl.sum()


def floor(n, y, p, key):
    trials, steps = y.shape[:2]
    noise = standard_normal(key, (steps, trials * DRAWS, n), jnp.float32)

    def step(z, e):
        z = gated(p["w"], z, None) + 0.3 * e
        return z, z

    path = jax.lax.scan(step, jnp.zeros((trials * DRAWS, n)), noise)[1]
    return readout(p, path.reshape(steps, DRAWS, trials, n).transpose(1, 2, 0, 3), y).mean(0).sum()


def timed(objective, parameters) -> tuple[float, float]:
    """Compile seconds and the median milliseconds of ten runs."""
    run = jax.jit(jax.value_and_grad(objective))
    start = time.perf_counter()
    jax.block_until_ready(run(parameters, jax.random.key(0)))
    compiling = time.perf_counter() - start
    each = []
    for i in range(10):
        start = time.perf_counter()
        jax.block_until_ready(run(parameters, jax.random.key(i)))
        each.append(time.perf_counter() - start)
    return compiling, 1e3 * statistics.median(each)


def table() -> None:
    print("| n | chain ms | exponent | compile s | floor ms | general Q ms | moment-matched ms | authors ms | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    before = None
    for n in SIZES:
        parameters, y = problem(n)
        compiling, own = timed(functools.partial(chain, n, y, False), parameters)
        least = timed(functools.partial(floor, n, y), parameters)[1]
        other = timed(functools.partial(matched, n, y), parameters)[1]
        dense = f"{timed(functools.partial(chain, n, y, True), parameters)[1]:.0f}" if n <= DENSE_UP_TO else "-"
        exponent = "-" if before is None else f"{np.log(own / before[1]) / np.log(n / before[0]):.2f}"
        ratio = (f"{AUTHORS[n]} | {AUTHORS[n] / own:.1f}") if n in AUTHORS else "- | -"
        print(f"| {n} | {own:.1f} | {exponent} | {compiling:.1f} | {least:.1f} | {dense} | {other:.1f} | {ratio} |")
        sys.stdout.flush()
        before = n, own


def memory() -> None:
    """Peak memory of the process after an ELBO with its gradient at 2048 states and 200 steps, one trial."""
    import resource

    parameters, y = problem(2048, 200, 1)
    compiling, each = timed(functools.partial(chain, 2048, y, False), parameters)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"2048 states, 200 steps, one trial of 25 draws: {each:.0f} ms, peak memory {peak:.1f} GiB in all")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        memory() if sys.argv[1] == "memory" else table()
    else:
        everyone = sorted(os.sched_getaffinity(0))
        for cores in (everyone[:1], everyone):
            print(f"\n{len(cores)} core{'s' * (len(cores) > 1)}\n", flush=True)
            os.sched_setaffinity(0, cores)
            subprocess.run([sys.executable, __file__, "table"], check=True)
        print(flush=True)
        subprocess.run([sys.executable, __file__, "memory"], check=True)
