"""What the gradient's noise costs a guide: three ELBOs of the same value, with and without a decaying step.

    python docs/benchmarks/landing.py [--out FILE.json]

Float64, 1500 steps of Adam from the start at the mode, four draws a step. "bound" is the ELBO of 500 draws at the start
and after the last step, "noise" the standard deviation of the gradient there (by the unconstrained parameters),
"seconds" the whole run with compiling.
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
import optax
from jax.flatten_util import ravel_pytree
from numpyro.infer import SVI, Trace_ELBO

import pssm
from pssm.distributions import StatePath
from pssm.guides import AutoStateSpace
from pssm.infer import StickingTheLanding_ELBO, TraceConditionalKL_ELBO

jax.config.update("jax_enable_x64", True)
STEPS, DRAWS = 1500, 4
LOSSES = TraceConditionalKL_ELBO, Trace_ELBO, StickingTheLanding_ELBO


def linear():
    """Four rotating states, three sensors; and the exact evidence."""
    rng = np.random.default_rng(0)
    A, C = 0.9 * np.linalg.qr(rng.normal(size=(4, 4)))[0], rng.normal(size=(3, 4))
    ssm = pssm.LinearGaussianSSM(np.zeros(4), np.eye(4), A, 0.5 * np.eye(4), C, 0.4 * np.eye(3))
    y = pssm.simulate(jax.random.key(1), ssm, 200)[1]

    def model(y):
        z = numpyro.sample("z", StatePath.from_ssm(ssm, len(y)))
        pssm.observe("y", dist.Normal(z @ ssm.C.T, 0.4).to_event(2), y)

    return model, y, float(pssm.log_likelihood(ssm, y))


def volatility():
    """Stochastic volatility with known parameters."""

    def model(y=None):
        z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.95 * jnp.eye(1), 0.3 * jnp.eye(1), 250))
        return pssm.observe("y", dist.Normal(0.0, jnp.exp(z / 2)).to_event(2), y)

    return model, numpyro.handlers.seed(model, 0)(), None


def oscillator():
    """Van der Pol's oscillator, read by eight Poisson channels."""
    C = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)) * 0.5)

    def drift(z, u):
        return z + 0.1 * jnp.stack([z[1], 1.5 * (1 - z[0] ** 2) * z[1] - z[0]])

    def model(y=None):
        z = numpyro.sample("z", StatePath(jnp.array([1.0, 0.0]), jnp.eye(2), drift, 0.1 * jnp.eye(2), 200))
        return pssm.observe("y", dist.Poisson(jnp.exp(z @ C)).to_event(2), y)

    return model, numpyro.handlers.seed(model, 0)().astype(float), None


def run(model, y, rank, loss, decays):
    """One row."""
    guide = AutoStateSpace(model, rank=rank)
    svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(1e-2, STEPS, 0.01) if decays else 1e-2), loss)
    bound = jax.jit(lambda p: -Trace_ELBO(500).loss(jax.random.key(9), p, model, guide, y))
    start = svi.get_params(svi.init(jax.random.key(0), y))
    begun = time.perf_counter()
    ended = svi.run(jax.random.key(0), STEPS, y, progress_bar=False)
    seconds, params = time.perf_counter() - begun, ended.params
    free = svi.optim.get_params(ended.state.optim_state)
    gradient = jax.vmap(jax.grad(lambda p, k: loss.loss(k, svi.constrain_fn(p), model, guide, y)), (None, 0))
    found = jax.vmap(lambda g: ravel_pytree(g)[0])(jax.jit(gradient)(free, jax.random.split(jax.random.key(1), 50)))
    noise = float(jnp.sqrt(jnp.var(found, axis=0).sum()))
    return {"start": float(bound(start)), "bound": float(bound(params)), "noise": noise, "seconds": seconds}


def main():
    """Prints a line for each run, and writes all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    out = parser.parse_args().out
    cases = {"linear, rank 4": (linear, 4), "linear, rank 1": (linear, 1)}
    cases |= {"stochastic volatility": (volatility, 1), "Van der Pol, Poisson": (oscillator, 2)}
    rows = []
    for name, (make, rank) in cases.items():
        model, y, exact = make()
        for decays in (True, False):
            for loss in LOSSES:
                row = {"model": name, "exact": exact, "step": "cosine" if decays else "constant", "loss": loss.__name__}
                rows.append(row | run(model, y, rank, loss(DRAWS), decays))
                print({k: round(x, 4) if isinstance(x, float) else x for k, x in rows[-1].items()}, flush=True)
                out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
