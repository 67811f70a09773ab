"""Parameters of models with a path: how far approximate posteriors are off, before and after their correction.

    python docs/benchmarks/parameters_and_paths.py [--nodes 512] [system ...]

Writes `parameters_and_paths.json` beside this file. For each system, posteriors over the same weighted nodes are
compared: with the exact likelihood (for one state, a filter on a grid, 401 points; for two, 512 paths a node), with
the approximation, and with the approximation corrected by 16 paths a node. So the nodes themselves add no error.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp

import pssm
from pssm.distributions import StatePath
from pssm.fitting.weights import normalised
from pssm.infer import corrected, nodes
from pssm.linalg.low_rank import as_matrix

jax.config.update("jax_enable_x64", True)
OUT = Path(__file__).with_suffix(".json")
ONE = jnp.eye(1)


def ar_prior(mu, phi, sigma, steps):
    """A stationary first-order path about a mean."""
    start = (sigma / jnp.sqrt(1 - phi**2)) * ONE
    move = (1 - phi) * mu * jnp.ones(1)
    return StatePath(mu * jnp.ones(1), start, phi * ONE, sigma * ONE, steps, b=move)


def volatility(y=None, num_steps=500):
    """Stochastic volatility."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    phi = numpyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
    z = numpyro.sample("z", ar_prior(mu, phi, sigma, num_steps))
    pssm.observe("y", dist.Normal(0.0, jnp.exp(z / 2)).to_event(2), obs=y)


def binomial(y=None, num_steps=600):
    """Counts of 50 trials a step, as of neurons over repeated trials."""
    mu = numpyro.sample("mu", dist.Normal(-3.0, 1.0))
    phi = numpyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
    z = numpyro.sample("z", ar_prior(mu, phi, sigma, num_steps))
    pssm.observe("y", dist.Binomial(50, logits=z).to_event(2), obs=y)


def student(y=None, num_steps=200):
    """A random walk under Student-t noise, three degrees of freedom."""
    q = numpyro.sample("q", dist.HalfNormal(1.0))
    s = numpyro.sample("s", dist.HalfNormal(2.0))
    z = numpyro.sample("z", StatePath(jnp.zeros(1), 2.0 * ONE, ONE, q * ONE, num_steps))
    pssm.observe("y", dist.StudentT(3.0, z, s).to_event(2), obs=y)


LOADINGS = 0.6 * jax.random.normal(jax.random.key(5), (10, 2))


def poisson_lds(y=None, num_steps=200):
    """Two rotating states seen through ten Poisson counts."""
    rho = numpyro.sample("rho", dist.Beta(20.0, 1.5))
    angle = numpyro.sample("angle", dist.Normal(0.3, 0.2))
    q = numpyro.sample("q", dist.HalfNormal(0.5))
    c, s = jnp.cos(angle), jnp.sin(angle)
    A = rho * jnp.array([[c, -s], [s, c]])
    z = numpyro.sample("z", StatePath(jnp.zeros(2), jnp.eye(2), A, q * jnp.eye(2), num_steps))
    pssm.observe("y", dist.Poisson(jnp.exp(z @ LOADINGS.T - 0.5)).to_event(2), obs=y)


SYSTEMS = {
    "volatility": (volatility, {"mu": -0.5, "phi": 0.95, "sigma": 0.25}),
    "binomial": (binomial, {"mu": -3.0, "phi": 0.97, "sigma": 0.15}),
    "student": (student, {"q": 0.3, "s": 0.5}),
    "poisson_lds": (poisson_lds, {"rho": 0.97, "angle": 0.3, "q": 0.25}),
}


EMISSIONS = {  # of one state, for the exact likelihood: written a second time
    "volatility": lambda z, v: dist.Normal(0.0, jnp.exp(z / 2)),
    "binomial": lambda z, v: dist.Binomial(50, logits=z),
    "student": lambda z, v: dist.StudentT(3.0, z, v["s"]),
}


def grid_log_likelihood(name, y, values, size=401):
    """`log p(y | values)` of a model with one state and an affine transition, by a filter on a grid."""
    model = SYSTEMS[name][0]
    seeded = numpyro.handlers.seed(numpyro.handlers.substitute(model, data=values), jax.random.key(0))
    trace = numpyro.handlers.trace(seeded).get_trace(None)
    prior = trace["z"]["fn"]
    sd0, q = (jnp.abs(as_matrix(x)[0, 0]) for x in (prior.chol_P0, prior.chol_Q))
    m0 = prior.m0[0]
    a = prior.transition[0, 0]
    b = 0.0 if prior.b is None else prior.b[0]
    wide = jnp.maximum(sd0 * 4.5, 8.0 if name == "student" else 4.0)
    grid = m0 + jnp.linspace(-1.0, 1.0, size) * wide
    cell = grid[1] - grid[0]

    scores = jax.vmap(lambda z: EMISSIONS[name](z, values).log_prob(y[:, 0]), out_axes=1)(grid)
    # the transition is integrated over cells, so that a narrow one is not missed
    edges = jnp.concatenate([grid - cell / 2, grid[-1:] + cell / 2])
    cdf = jax.scipy.stats.norm.cdf((edges[None] - (a * grid + b)[:, None]) / q)
    move = jnp.diff(cdf, axis=1)
    p = jnp.diff(jax.scipy.stats.norm.cdf((edges - m0) / sd0))

    def step(p, s):
        top = s.max()
        w = p * jnp.exp(s - top)
        total = w.sum()
        return (w / total) @ move, jnp.log(total) + top

    return jax.lax.scan(step, p, scores)[1].sum()


def moments(values, log_weights):
    """Means and sds of the parameters by name."""
    w = normalised(log_weights)
    found = {}
    for name, x in values.items():
        mean = w @ x
        found[name] = (float(mean), float(np.sqrt(w @ (x - mean) ** 2)))
    return found


def against(exact, other):
    """Errors of the means in sds, and sd ratios."""
    return {
        n: {"error": round((m - exact[n][0]) / exact[n][1], 4), "sd_ratio": round(s / exact[n][1], 4)}
        for n, (m, s) in other.items()
    }


def measure(name, num_nodes):
    """One system: both approximations, before and after correction."""
    model, truth = SYSTEMS[name]
    key = jax.random.key(11)
    y = numpyro.infer.Predictive(numpyro.handlers.condition(model, truth), num_samples=1)(key)["y"][0]
    found = {"num_steps": len(y), "num_nodes": num_nodes, "truth": truth}
    for approximation in ("laplace", "variational"):
        begun = time.perf_counter()
        fit = nodes(model, y, approximation=approximation, num_nodes=num_nodes, progress_bar=False)
        taken = time.perf_counter() - begun
        begun = time.perf_counter()
        after = corrected(fit, progress_bar=False)
        correction = time.perf_counter() - begun
        marginal = fit.engine.model
        values = {n: jnp.asarray(x) for n, x in fit.nodes.items()}
        approximate = np.asarray(
            jax.jit(lambda v, m=marginal: jax.lax.map(lambda r: m.posterior(r, y).log_value, v, batch_size=32))(values)
        )
        base = fit.run.log_ratios.ravel()
        if name == "poisson_lds":
            long = corrected(fit, num_paths=512, key=3, progress_bar=False)
            exact_weights = long.log_weights.ravel()
            evidence = long.log_evidence
        else:
            grid = jax.jit(lambda v: jax.lax.map(lambda r: grid_log_likelihood(name, y, r), v, batch_size=8))(values)
            exact_weights = np.where(np.isfinite(base), base - approximate + np.asarray(grid), -np.inf)
            evidence = float(logsumexp(exact_weights) - np.log(len(base)))
        exact = moments(fit.nodes, exact_weights)
        found[approximation] = {
            "before": against(exact, moments(fit.nodes, base)),
            "after": against(exact, moments(fit.nodes, after.log_weights.ravel())),
            "log_evidence": {"exact": evidence, "before": fit.log_evidence, "after": after.log_evidence},
            "nodes_effective": round(fit.ess / num_nodes, 3),
            "share_of_weights": round(float(_share(after, base)), 3),
            "khat": round(after.khat, 3),
            "log_weight_sd": round(after.log_weight_sd, 3),
            "path_sd": round(after.path_sd, 3),
            "estimator": after.estimator,
            "seconds_nodes_with_compiling": round(taken, 1),
            "seconds_correction_with_compiling": round(correction, 1),
        }
        print(name, approximation, json.dumps(found[approximation], indent=1), flush=True)
    return found


def _share(after, base):
    """What the correction alone leaves of the effective number: ESS / N of draws from the approximate posterior."""
    before, weights = normalised(base), normalised(after.log_weights.ravel())
    kept = before > 0
    ratio = weights[kept] / before[kept]
    return 1 / np.sum(before[kept] * ratio**2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("systems", nargs="*", default=list(SYSTEMS), help=", ".join(SYSTEMS))
    parser.add_argument("--nodes", type=int, default=512, help="nodes of each system")
    given = parser.parse_args()
    known = json.loads(OUT.read_text()) if OUT.exists() else {}
    for system in given.systems:
        known[system] = measure(system, given.nodes)
        OUT.write_text(json.dumps(known, indent=1) + "\n")
