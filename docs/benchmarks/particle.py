"""Steps per second of a bootstrap particle filter: pssm beside cuthbert, in one run.

    python docs/benchmarks/particle.py [--particles 1000] [--steps 1000] [--runs 7]

Run it in an environment of its own (`results.md` says how). The model: a noisy nonlinear map of `n` states, all
observed with normal noise, `n` = 2 and 8; systematic resampling where the effective number falls below half, on both
sides; the log-likelihood, float32. Prints a Markdown table: seconds of the first call (compiling, mostly), and steps
per second (median of the runs) of later ones. cuthbert is a dash where it is not installed.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

import pssm
from pssm.guides import guided_proposal

SCALE = 0.3


def transition(z, u=None):
    return z + 0.2 * (jnp.sin(jnp.roll(z, 1)) - z)


def model_of(n: int) -> pssm.NonlinearSSM:
    eye = jnp.eye(n)
    return pssm.NonlinearSSM(jnp.zeros(n), eye, transition, SCALE * eye, lambda z: dist.Normal(z, 1.0).to_event(1))


def ours(n: int, y: jax.Array, particles: int, proposal: str | None) -> Callable:
    model = model_of(n)
    guide = guided_proposal(model, y) if proposal == "guided" else proposal

    def run(key, y):
        return pssm.particle_filter(key, model, y, num_particles=particles, proposal=guide).log_likelihood

    return jax.jit(run)


def cuthbert(n: int, y: jax.Array, particles: int) -> Callable:
    from cuthbert import filter as run_filter
    from cuthbert.smc import particle_filter
    from cuthbertlib.resampling import systematic
    from cuthbertlib.resampling.adaptive import ess_decorator

    def log_potential(before, z, y):
        return jnp.sum(jax.scipy.stats.norm.logpdf(y, z, 1.0))

    found = particle_filter.build_filter(
        lambda key: jax.random.normal(key, (n,)),
        lambda key, z, y: transition(z) + SCALE * jax.random.normal(key, (n,)),
        log_potential,
        particles,
        ess_decorator(systematic.resampling, 0.5),
    )

    def run(key, y):
        start = found.init_prepare(key=key)
        return run_filter(found, y, start, key=key).log_normalizing_constant[-1]

    return jax.jit(run)


def timed(run: Callable, y: jax.Array, runs: int) -> tuple[float, float, float]:
    """Seconds of the first call and of a later one, and the value."""
    begin = time.perf_counter()
    value = jax.block_until_ready(run(jax.random.key(0), y))
    first = time.perf_counter() - begin
    seconds = []
    for i in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready(run(jax.random.key(i), y))
        seconds.append(time.perf_counter() - begin)
    return first, statistics.median(seconds), float(value)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    N = options.particles
    print(f"{N} particles, {options.steps} steps, load {os.getloadavg()[0]:.1f} at the start\n")
    print("| states | filter | first call, s | steps per second | log-likelihood |")
    print("|---|---|---|---|---|")
    for n in (2, 8):
        y = model_of(n).simulate(jax.random.key(1), options.steps)[1]
        makers = {
            "cuthbert": partial(cuthbert, n, y, N),
            "pssm, bootstrap": partial(ours, n, y, N, None),
            'pssm, "ekf"': partial(ours, n, y, N, "ekf"),
            "pssm, guided": partial(ours, n, y, N, "guided"),
        }
        for name, make in makers.items():
            try:
                first, later, value = timed(make(), y, options.runs)
            except ImportError as error:
                print(f"| {n} | {name} | - | - ({error}) | - |")
                continue
            print(f"| {n} | {name} | {first:.2f} | {options.steps / later:,.0f} | {value:.1f} |", flush=True)


if __name__ == "__main__":
    main()
