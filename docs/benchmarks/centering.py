"""NUTS on a path in its centred, non-centred and partly centred form: leapfrogs, and effective draws per leapfrog.

    python docs/benchmarks/centering.py

Two series with an unknown scale of the noise: a level that the data determine, and stochastic volatility, about which
each observation says little. The weights of the rule come from `pssm.infer.centering`, at the geometric mean of the
scale in a run of the non-centred form. Single precision, one chain.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS

import pssm
from pssm.distributions import NonCenteredPath, PartiallyCenteredPath, StatePath

STEPS, WARMUP, DRAWS = 200, 500, 1000
ONE = jnp.eye(1)


def level(y=None):
    """Observations that are ten times as exact as the steps of the level."""
    s = numpyro.sample("s", dist.LogNormal(0.0, 1.0))
    z = numpyro.sample("z", StatePath(jnp.zeros(1), ONE, ONE, s * ONE, STEPS))
    pssm.observe("y", dist.Normal(z, 0.1).to_event(2), obs=y)


def volatility(y=None):
    """Log variances that move slowly."""
    s = numpyro.sample("s", dist.LogNormal(-1.5, 1.0))
    z = numpyro.sample("z", StatePath(jnp.zeros(1), ONE, 0.97 * ONE, s * ONE, STEPS))
    pssm.observe("y", dist.Normal(0.0, jnp.exp(z / 2)).to_event(2), obs=y)


def run(model, y):
    """Mean leapfrogs of a draw, effective draws of `log s` for 1000 leapfrogs, divergences, seconds."""
    began = time.perf_counter()
    mcmc = MCMC(NUTS(model), num_warmup=WARMUP, num_samples=DRAWS, progress_bar=False)
    mcmc.run(jax.random.key(1), y, extra_fields=("num_steps", "diverging"))
    extra = mcmc.get_extra_fields()
    s = np.log(np.asarray(mcmc.get_samples()["s"]))
    steps = float(np.mean(extra["num_steps"]))
    effective = float(effective_sample_size(s[None])) / (steps * DRAWS) * 1000
    seconds = time.perf_counter() - began
    return mcmc, (steps, effective, int(np.sum(extra["diverging"])), float(s.mean()), float(s.std()), seconds)


def main():
    """Prints the table."""
    print("| model | form | leapfrogs a draw | effective draws of log s for 1000 leapfrogs | divergences |")
    for model, truth in ((level, 1.0), (volatility, 0.25)):
        made = numpyro.handlers.condition(model, data={"s": jnp.asarray(truth)})
        y = numpyro.handlers.trace(numpyro.handlers.seed(made, 0)).get_trace()["y"]["value"]
        plain = numpyro.handlers.reparam(model, config={"z": NonCenteredPath()})
        first, found = run(plain, y)
        scale = jnp.exp(jnp.mean(jnp.log(first.get_samples()["s"])))
        weights = pssm.infer.centering(model, y, values={"s": scale})["z"]
        forms = {
            "rule": numpyro.handlers.reparam(model, config={"z": PartiallyCenteredPath(weights)}),
            "0.5": numpyro.handlers.reparam(model, config={"z": PartiallyCenteredPath(0.5)}),
            "centred": model,
        }
        print(model.__name__, "non-centred", found, "weights", float(weights.min()), float(weights.mean()), flush=True)
        for name, form in forms.items():
            print(model.__name__, name, run(form, y)[1], flush=True)


if __name__ == "__main__":
    main()
