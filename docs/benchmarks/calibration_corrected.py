"""Simulation-based calibration of "nuts:laplace", corrected: 200 short series from the prior of each of two models.

    python docs/benchmarks/calibration_corrected.py [system ...]

Writes `calibration_corrected.json` beside this file. One compiled program serves all series: NUTS over the parameters
with the path integrated out by Laplace's approximation, weights by 16 paths a draw, resampling, a path for each draw.
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.infer import NUTS

import pssm
from pssm.diagnostics import simulation_based_calibration
from pssm.distributions import StatePath
from pssm.fitting.path_draws import by_paths
from pssm.infer import path_marginal

jax.config.update("jax_enable_x64", True)
OUT = Path(__file__).with_suffix(".json")
ONE = jnp.eye(1)
STEPS, WARMUP, DRAWS, THIN = 25, 200, 49, 8


def volatility(y=None):
    """Stochastic volatility of a short series."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
    z = numpyro.sample("z", StatePath(jnp.zeros(1), ONE, 0.9 * ONE, sigma * ONE, STEPS))
    pssm.observe("y", dist.Normal(0.0, jnp.exp((mu + z) / 2)).to_event(2), obs=y)


def poisson(y=None):
    """Counts of a short series."""
    c = numpyro.sample("c", dist.Normal(0.5, 0.5))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 0.5))
    z = numpyro.sample("z", StatePath(jnp.zeros(1), ONE, 0.8 * ONE, sigma * ONE, STEPS))
    pssm.observe("y", dist.Poisson(jnp.exp(c + z)).to_event(2), obs=y)


SYSTEMS = {"volatility": volatility, "poisson": poisson}


def sampler_of(model, shares):
    """`(key, y) -> draws` of the corrected chain; the effective shares of the weights are noted."""
    marginal = path_marginal(model, approximation="laplace")
    kernel = NUTS(marginal, dense_mass=True, target_accept_prob=0.9)

    @jax.jit
    def run(key, y):
        chain_key, weigh_key, pick_key = jax.random.split(key, 3)
        state = kernel.init(chain_key, WARMUP, None, (y,), {})
        state = jax.lax.fori_loop(0, WARMUP, lambda i, s: kernel.sample(s, (y,), {}), state)

        def keep(state, _):
            state = jax.lax.fori_loop(0, THIN, lambda i, s: kernel.sample(s, (y,), {}), state)
            return state, kernel.postprocess_fn((y,), {})(state.z)

        _, draws = jax.lax.scan(keep, state, length=DRAWS)

        def weigh(row):
            values, key = row
            found = marginal.posterior(values, y)
            value, _, paths = by_paths(key, found.chains["z"], found.series["z"].log_lik, 16, 1)
            return value - found.series["z"].log_value, paths[0]

        rows = draws, jax.random.split(weigh_key, DRAWS)
        weights, paths = jax.lax.map(weigh, rows, batch_size=DRAWS)
        weights = jnp.exp(weights - logsumexp(weights))
        positions = (jnp.arange(DRAWS) + jax.random.uniform(pick_key)) / DRAWS
        chosen = jnp.clip(jnp.searchsorted(jnp.cumsum(weights), positions), 0, DRAWS - 1)
        return {n: x[chosen] for n, x in {**draws, "z": paths}.items()}, 1 / jnp.sum(weights**2) / DRAWS

    def sampler(key, y):
        draws, share = run(key, y)
        shares.append(float(share))
        return draws

    return sampler


def measure(name, count=200):
    """P-values of uniform ranks, by parameter, and of the path at all steps."""
    shares, begun = [], time.perf_counter()
    found = simulation_based_calibration(
        SYSTEMS[name], sampler_of(SYSTEMS[name], shares), num_simulations=count, num_draws=DRAWS, key=7
    )
    values = {str(n): np.ravel(x.values) for n, x in found.p_values.items()}
    return {
        "num_simulations": count,
        "num_draws": DRAWS,
        "num_steps": STEPS,
        "verdict": found.verdict,
        "p_values": {n: round(float(x[0]), 4) for n, x in values.items() if x.size == 1},
        "path": {"smallest_p": round(float(values["z"].min()), 4), "steps_under_0.05": int((values["z"] < 0.05).sum())},
        "effective_share": {"median": round(float(np.median(shares)), 3), "least": round(min(shares), 3)},
        "seconds": round(time.perf_counter() - begun),
    }


if __name__ == "__main__":
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    for system in sys.argv[1:] or SYSTEMS:
        known[system] = measure(system)
        print(system, json.dumps(known[system], indent=1), flush=True)
        OUT.write_text(json.dumps(known, indent=1) + "\n")
