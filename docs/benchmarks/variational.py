"""Variational potentials for fixed parameters, without training, beside the mode's: bounds, states, seconds.

    python docs/benchmarks/variational.py [--out FILE.json]

Float64. Evidence of scalar states from a grid, that of Van der Pol from weights of 100 000 paths of the variational
chain.
"gap" is evidence less bound in nats, "means" the root mean square error of the states' means in posterior standard
deviations, "sds" the median ratio of the standard deviations, "khat" the tail of the importance weights of 4000 paths.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from arviz_stats.base import array_stats

from pssm.distributions import LowRankChain, StatePath
from pssm.modes import mode_potentials, variational_fit

jax.config.update("jax_enable_x64", True)


def walk(steps, a, q, rng):
    """A simulated autoregression from zero."""
    z = np.zeros(steps)
    for t in range(steps):
        z[t] = (a * z[t - 1] if t else 0.0) + q * rng.normal()
    return z


def scalar_cases():
    """Name, `(P0 sd, a, q)`, emission of a state, data, reach of the grid, most steps."""
    rng = np.random.default_rng(0)
    z = walk(500, 0.97, 0.2, rng)
    y = rng.normal(size=500) * np.exp(z / 2)
    yield "stochastic volatility, T=500", (0.8, 0.97, 0.2), lambda z: dist.Normal(0.0, jnp.exp(z / 2)), y, 5, 8
    z = walk(200, 1.0, 0.3, rng)
    y = z + rng.standard_t(3, size=200)
    yield "Student-t (3) level, T=200", (2.0, 1.0, 0.3), lambda z: dist.StudentT(3.0, z, 1.0), y, 14, 8
    z = walk(200, 0.95, 0.3, rng)
    y = rng.poisson(0.2 * np.exp(z)) * 1.0
    yield "Poisson, mean .2, T=200", (0.96, 0.95, 0.3), lambda z: dist.Poisson(0.2 * jnp.exp(z)), y, 7, 8
    z = walk(500, 0.98, 0.15, rng)
    y = rng.binomial(50, 1 / (1 + np.exp(3 - z))) * 1.0
    yield "binomial (50), T=500", (0.75, 0.98, 0.15), lambda z: dist.Binomial(50, logits=z - 3), y, 5, 8
    z = walk(150, 0.95, 0.6, rng)
    y = z**3 / 5 + rng.normal(size=150)
    yield "cubic, y = z^3 / 5 + e, T=150", (1.5, 0.95, 0.6), lambda z: dist.Normal(z**3 / 5, 1.0), y, 10, 40
    y = z**2 / 4 + 0.5 * rng.normal(size=150)
    yield "two modes, y = z^2 / 4 + e, T=150", (1.5, 0.95, 0.6), lambda z: dist.Normal(z**2 / 4, 0.5), y, 12, 40


def grid_posterior(arguments, emission, y, reach):
    """Evidence, means and standard deviations by sums over a grid."""
    P0, a, q = arguments
    grid = np.linspace(-reach, reach, 1501)
    width = grid[1] - grid[0]

    def normal(x, sd):
        return np.exp(-0.5 * (x / sd) ** 2) / (sd * np.sqrt(2 * np.pi))

    table = np.asarray(jax.vmap(lambda g: emission(jnp.full(len(y), g)).log_prob(y))(jnp.asarray(grid))).T
    kernel, total, filtered = normal(grid[:, None] - a * grid, q) * width, 0.0, []
    for t, row in enumerate(table):
        density = normal(grid, P0) if t == 0 else kernel @ filtered[-1]
        density = density * np.exp(row - row.max())
        total += np.log(density.sum() * width) + row.max()
        filtered.append(density / (density.sum() * width))
    after, mean, sd = np.ones(len(grid)), np.zeros(len(y)), np.zeros(len(y))
    for t in reversed(range(len(y))):
        weights = filtered[t] * after
        weights /= weights.sum()
        mean[t] = weights @ grid
        sd[t] = np.sqrt(weights @ (grid - mean[t]) ** 2)
        after = kernel.T @ (after * np.exp(table[t] - table[t].max()))
        after /= after.max()
    return total, mean, sd


def weights_of(prior, log_lik, potential, key, count):
    """Log importance weights of the chain's paths."""
    chain = LowRankChain.from_potential(prior, potential)
    z = chain.sample(key, (count,))
    return log_lik(z) - chain.log_ratio(z)


def row_of(name, prior, log_lik, num_iters, truth):
    """A row of the table; `truth` is evidence, means and sds, or None."""

    @jax.jit
    def fit(zero):  # an argument, so that nothing is computed while compiling
        return variational_fit(prior, lambda z: log_lik(z + zero), num_iters=num_iters)

    found = jax.block_until_ready(fit(0.0))
    begun = time.perf_counter()
    jax.block_until_ready(fit(0.0))
    seconds = time.perf_counter() - begun

    @jax.jit
    def more(potential):
        mode = mode_potentials(prior, log_lik, rank=prior.n_state)
        z, kl = LowRankChain.from_potential(prior, mode).sample_with_kl(jax.random.key(1), (2000,))
        return jnp.mean(log_lik(z) - kl), weights_of(prior, log_lik, potential, jax.random.key(2), 4000)

    at_mode, weights = more(found.potential)
    if truth is None:
        many = jax.jit(lambda k: weights_of(prior, log_lik, found.potential, k, 2000))
        every = np.concatenate([np.asarray(many(k)) for k in jax.random.split(jax.random.key(3), 50)])
        truth = np.logaddexp.reduce(every) - np.log(len(every)), None, None
        found = found._replace(bound=every.mean())  # the fit's own is that of fewer paths
    evidence, mean, sd = truth
    khat = float(array_stats.psislw(-np.asarray(weights, np.float64))[1])  # takes minus the log ratio
    row = {"model": name, "evidence": float(evidence), "gap": float(evidence - found.bound.sum())}
    row |= {"gap at the mode": float(evidence - at_mode), "slack": float(found.slack.sum()), "khat": khat}
    row |= {"seconds": seconds, "most steps": num_iters}
    if mean is not None:
        own = np.sqrt(np.asarray(found.cov[:, 0, 0]))
        row["means"] = float(np.sqrt(np.mean(((np.asarray(found.mean[:, 0]) - mean) / sd) ** 2)))
        row["sds"] = float(np.median(own / sd))
    return row


def van_der_pol(q):
    """An oscillator that drives ten Poisson channels."""

    def step(z, u):
        x, v = z
        return jnp.stack([x + 0.1 * v, v + 0.1 * (1.5 * (1 - x**2) * v - x)])

    rng = np.random.default_rng(1)
    C, d = jnp.asarray(0.5 * rng.normal(size=(10, 2))), -0.5
    prior = StatePath(jnp.array([1.0, 0.0]), 0.3 * jnp.eye(2), step, np.sqrt(q) * np.eye(2), 200)
    y = dist.Poisson(jnp.exp(prior.sample(jax.random.key(5)) @ C.T + d)).sample(jax.random.key(6))
    return prior, lambda z: dist.Poisson(jnp.exp(z @ C.T + d)).log_prob(y).sum((-2, -1))


def measure():
    """Rows of the table."""
    for name, arguments, emission, y, reach, most in scalar_cases():
        P0, a, q = arguments
        prior = StatePath(jnp.zeros(1), P0 * jnp.eye(1), a * jnp.eye(1), q * jnp.eye(1), len(y))
        y = jnp.asarray(y)

        def log_lik(z, emission=emission, y=y):
            return emission(z[..., 0]).log_prob(y).sum(-1)

        yield row_of(name, prior, log_lik, most, grid_posterior(arguments, emission, y, reach))
    for q in (1e-2, 1e-3):
        yield row_of(f"Van der Pol, Poisson, q={q:g}, T=200", *van_der_pol(q), 8, None)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default=Path(__file__).with_suffix(".json"))
    rows = []
    for row in measure():
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(row)
    Path(parser.parse_args().out).write_text(json.dumps(rows, indent=1) + "\n")
