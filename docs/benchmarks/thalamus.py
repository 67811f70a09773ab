"""Spike counts of the thalamus, a binomial autoregression: the posterior of its parameters by six methods.

    python docs/benchmarks/thalamus.py [--steps 500] [--data ../shared/data/particles_pkg/thaldata.csv]

The data (of 50 trials, how many had a spike in each millisecond; Temereanca, Brown & Simons 2008, in the package
`particles`) are not in this repository; without the file the program says so and ends.

    y_t ~ Binomial(50, 1 / (1 + exp(-z_t))),   z_t = mu + rho (z_{t-1} - mu) + sigma w_t
    mu ~ N(-3, 1),   rho ~ Beta(10, 1),   sigma ~ HalfNormal(0.5),   z_1 ~ N(mu, 1)

The table has posterior means and standard deviations of `mu`, logit(`rho`) and log(`sigma`), their distance from NUTS
over the states in its posterior standard deviations, the smallest effective sample size of the three, and seconds. All
chains start at the medians of the prior: the likelihood of the EKF has other modes, far from all of the mass.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.handlers import reparam
from numpyro.infer import MCMC, NUTS, HMCGibbs, init_to_median
from numpyro.infer.autoguide import AutoMultivariateNormal

import pssm
from pssm.distributions import GaussianFilterMarginal, NonCenteredPath, StatePath
from pssm.guides import AutoStateSpace
from pssm.infer import PseudoMarginal, fit_svi, particle_gibbs, posterior_draws

NAMES = ("mu", "rho", "sigma")
ONE = jnp.eye(1)


def parameters() -> dict[str, jax.Array]:
    return {
        "mu": numpyro.sample("mu", dist.Normal(-3.0, 1.0)),
        "rho": numpyro.sample("rho", dist.Beta(10.0, 1.0)),
        "sigma": numpyro.sample("sigma", dist.HalfNormal(0.5)),
    }


def build(p: dict[str, jax.Array]) -> pssm.NonlinearSSM:
    mu, rho = p["mu"], p["rho"]
    emission = lambda z: dist.Binomial(50, logits=z).to_event(1)  # noqa: E731
    return pssm.NonlinearSSM(mu * jnp.ones(1), ONE, lambda z, u: mu + rho * (z - mu), p["sigma"] * ONE, emission)


def states(y: jax.Array) -> None:
    z = numpyro.sample("z", StatePath.from_ssm(build(parameters()), len(y)))
    numpyro.sample("y", dist.Binomial(50, logits=z).to_event(2), obs=y)


def filtered(y: jax.Array, method: str) -> None:
    numpyro.sample("y", GaussianFilterMarginal(build(parameters()), len(y), method=method), obs=y)


Draws = dict[str, np.ndarray]


def run(kernel, key: jax.Array, y: jax.Array, *args, warmup: int, samples: int) -> Draws:
    mcmc = MCMC(
        kernel, num_warmup=warmup, num_samples=samples, num_chains=2, chain_method="sequential", progress_bar=False
    )
    mcmc.run(key, y, *args)
    return {name: np.asarray(mcmc.get_samples(group_by_chain=True)[name]) for name in NAMES}


def methods(y: jax.Array, scale: float) -> dict[str, Callable[[jax.Array], Draws]]:
    def count(n: int) -> int:
        return max(int(n * scale), 10)

    short = {"warmup": count(300), "samples": count(500)}
    long = {"warmup": count(1000), "samples": count(4000)}

    def svi(key: jax.Array) -> Draws:
        guide = AutoStateSpace(states, rank=1, potentials="mode", global_guide=AutoMultivariateNormal)
        fit = fit_svi(states, y, guide=guide, key=0, num_steps=count(1500), progress_bar=False)
        return {name: np.asarray(x) for name, x in posterior_draws(fit, num_samples=1000).items() if name in NAMES}

    noise = reparam(states, config={"z": NonCenteredPath()})
    marginal = PseudoMarginal(states, build, y, num_particles=400)
    gibbs = HMCGibbs(
        NUTS(states, init_strategy=init_to_median), particle_gibbs(build, y, num_particles=50), gibbs_sites=["z"]
    )
    return {
        "NUTS, states as noise": lambda key: run(NUTS(noise, init_strategy=init_to_median), key, y, **short),
        "NUTS, EKF marginal": lambda key: run(NUTS(filtered, init_strategy=init_to_median), key, y, "ekf", **short),
        "NUTS, UKF marginal": lambda key: run(NUTS(filtered, init_strategy=init_to_median), key, y, "ukf", **short),
        "SVI, chain guide": svi,
        "pseudo-marginal, 400 particles": lambda key: run(marginal, key, y, **long),
        "particle Gibbs, 50 particles": lambda key: run(gibbs, key, y, warmup=count(300), samples=count(1000)),
    }


def unbounded(draws: Draws) -> np.ndarray:
    """`mu`, logit `rho`, log `sigma`: `(3, chains, draws)`."""
    rho = draws["rho"].astype(float)
    found = np.stack([draws["mu"], np.log(rho / (1 - rho)), np.log(draws["sigma"])])
    return found.reshape(3, -1, found.shape[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of draws")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/particles_pkg/thaldata.csv"))
    options = parser.parse_args()
    if not options.data.exists():
        raise SystemExit(f"{options.data} is not there; give its place with --data.")
    y = jnp.asarray(np.loadtxt(options.data, delimiter=",").reshape(-1)[: options.steps, None], float)
    print(f"{len(y)} steps, {float(y.sum()):.0f} spikes, load {os.getloadavg()[0]:.1f} at the start\n")
    print("| method | mu | logit rho | log sigma | apart, in sds | sd ratios | least ESS | seconds |\n|" + "---|" * 8)
    truth = None
    for name, method in methods(y, options.scale).items():
        begin = time.perf_counter()
        draws = unbounded(method(jax.random.key(0)))
        seconds = time.perf_counter() - begin
        mean, sd = draws.mean((1, 2)), draws.std((1, 2))
        truth = (mean, sd) if truth is None else truth
        apart = " ".join(f"{x:+.2f}" for x in (mean - truth[0]) / truth[1])
        ratios = " ".join(f"{x:.2f}" for x in sd / truth[1])
        size = "-" if name.startswith("SVI") else f"{min(effective_sample_size(x) for x in draws):.0f}"
        cells = [f"{m:.2f} ({s:.2f})" for m, s in zip(mean, sd, strict=True)]
        print(f"| {name} | {' | '.join(cells)} | {apart} | {ratios} | {size} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    numpyro.set_host_device_count(1)
    main()
