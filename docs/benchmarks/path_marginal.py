"""NUTS on parameters with the path integrated out, beside NUTS over non-centred paths: gradients, leapfrogs, seconds.

    python docs/benchmarks/path_marginal.py [--ess] [names ...]

Writes `path_marginal.json` beside itself: for each model and approximation the time of a gradient of the log density in
gradients of the non-centred joint density, both inside one compiled loop (float64, CPU); with `--ess` also the smallest
bulk effective size of the parameters per 1000 gradients and per second, and the leapfrogs of a draw.
"""

import argparse
import json
import time
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer.util import initialize_model

from pssm.distributions import NonCenteredPath, StatePath, observe
from pssm.infer import fit_nuts, path_marginal

jax.config.update("jax_enable_x64", True)

ONE = jnp.ones((1, 1))


def volatility(y=None, num_steps=500):
    """Stochastic volatility."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    phi = numpyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.5, 0.5))
    z = numpyro.sample(
        "z", StatePath(jnp.zeros(1), sigma / jnp.sqrt(1 - phi**2) * ONE, phi * ONE, sigma * ONE, num_steps)
    )
    observe("y", dist.Normal(0.0, jnp.exp((mu + z) / 2)).to_event(2), obs=y)


def binomial(y=None, num_steps=600):
    """Counts of 50 trials with an autoregressive logit."""
    mu = numpyro.sample("mu", dist.Normal(-3.0, 1.0))
    phi = numpyro.sample("phi", dist.Beta(20.0, 1.5))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.5, 0.5))
    z = numpyro.sample(
        "z", StatePath(jnp.zeros(1), sigma / jnp.sqrt(1 - phi**2) * ONE, phi * ONE, sigma * ONE, num_steps)
    )
    observe("y", dist.Binomial(50, logits=mu + z).to_event(2), obs=y)


def student(y=None, num_steps=200):
    """A random walk read with Student-t noise."""
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.5, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    z = numpyro.sample("z", StatePath(jnp.zeros(1), 2.0 * ONE, ONE, sigma * ONE, num_steps))
    observe("y", dist.StudentT(3.0, z, scale).to_event(2), obs=y)


def counts(y=None, num_steps=200):
    """Ten Poisson series driven by a rotation of two states."""
    decay = numpyro.sample("decay", dist.Beta(20.0, 1.5))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.5, 0.5))
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    C = jnp.asarray(np.random.default_rng(0).normal(size=(10, 2)))
    turn = jnp.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    z = numpyro.sample("z", StatePath(jnp.zeros(2), jnp.eye(2), decay * turn, sigma * jnp.eye(2), num_steps))
    observe("y", dist.Poisson(jnp.exp(level + z @ C.T)).to_event(2), obs=y)


MODELS = {
    "stochastic volatility, T=500": (volatility, {"mu": -0.5, "phi": 0.95, "sigma": 0.25}),
    "binomial AR(1), T=600": (binomial, {"mu": -3.0, "phi": 0.97, "sigma": 0.2}),
    "Student-t level, T=200": (student, {"sigma": 0.3, "scale": 0.7}),
    "Poisson LDS, n=2, p=10, T=200": (counts, {"decay": 0.97, "sigma": 0.2, "level": -0.5}),
}
KINDS = ("laplace", "variational", "importance")


def data_of(model, truth):
    """A simulated series."""
    held = handlers.substitute(model, data={n: jnp.asarray(x) for n, x in truth.items()})
    return np.asarray(handlers.trace(handlers.seed(held, jax.random.key(1))).get_trace()["y"]["value"])


def seconds_of_gradient(model, y, start, repeats=100):
    """Of one gradient inside a compiled loop that moves a little each time; and at the true parameters."""
    found = initialize_model(
        jax.random.key(0), model, init_strategy=numpyro.infer.init_to_value(values=start), model_args=(y,)
    )
    flat, unflatten = ravel_pytree(found.param_info.z)
    gradient = jax.grad(lambda x: found.potential_fn(unflatten(x)))

    @jax.jit
    def loop(x):
        return jax.lax.fori_loop(0, repeats, lambda _, x: x - 1e-6 * jnp.tanh(gradient(x)), x)

    loop(flat).block_until_ready()
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        loop(flat).block_until_ready()
        times.append(time.perf_counter() - begin)
    return min(times) / repeats


def efficiency(model, y, names, draws):
    """Of NUTS: smallest effective size per 1000 gradients and per second, leapfrogs of a draw, divergences."""
    options = {"num_chains": 1, "progress_bar": False, "dense_mass": False}
    fit_nuts(model, y, num_warmup=10, num_samples=10, **options)
    begin = time.perf_counter()
    fit = fit_nuts(model, y, num_warmup=300, num_samples=draws, **options)
    spent = time.perf_counter() - begin
    samples = fit.get_samples(group_by_chain=True)
    ess = min(float(az.ess(np.asarray(samples[n]))) for n in names)
    fields = fit.get_extra_fields()
    leapfrogs = float(np.mean(fields["num_steps"]))
    return {
        "ess": ess,
        "ess_per_1000_gradients": 1000 * ess / (leapfrogs * draws),
        "leapfrogs": leapfrogs,
        "seconds_with_warmup_and_compiling": spent,
        "divergences": int(np.sum(fields["diverging"])),
        "mean": {n: float(samples[n].mean()) for n in names},
        "sd": {n: float(samples[n].std()) for n in names},
    }


def main():
    """Runs the models whose names contain one of the words given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--ess", action="store_true")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--draws", type=int, default=500)
    asked = parser.parse_args()
    target = Path(__file__).with_suffix(".json")
    results = json.loads(target.read_text()) if target.exists() else {}
    for title, (model, truth) in MODELS.items():
        if asked.words and not any(word in title for word in asked.words):
            continue
        y, entry = data_of(model, truth), results.setdefault(title, {})
        start = {n: jnp.asarray(x) for n, x in truth.items()}
        plain = handlers.reparam(model, config={"z": NonCenteredPath()})
        forms = {"non-centred": plain}
        forms |= {kind: path_marginal(model, approximation=kind).prepare(y) for kind in asked.kinds.split(",")}
        for kind, form in forms.items():
            own = entry.setdefault(kind, {})
            own["gradient_seconds"] = seconds_of_gradient(form, y, start)
            own["gradient_ratio"] = own["gradient_seconds"] / entry["non-centred"]["gradient_seconds"]
            if asked.ess:
                own |= efficiency(form, y, list(truth), asked.draws)
            print(title, kind, json.dumps(own), flush=True)
            target.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
