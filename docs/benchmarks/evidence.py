"""Errors of approximate evidences and means on scalar models that are not Gaussian, beside a fine grid.

    python docs/benchmarks/evidence.py [--steps 100]

The state is an autoregression (0.9, noise 0.3, start 0.7); observations are drawn from the model, and one is missing.
The table has the error of the log evidence in nats, and in brackets the root mean square error of the smoothed means in
posterior standard deviations (means that are modes are compared with means). Double precision.
"""

import argparse
import math
import os
from functools import partial

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import pssm
from pssm.guides import guided_proposal, laplace_path

GRID = np.linspace(-5.0, 6.0, 1500)
MODELS = {
    "Poisson, exp(z)": lambda z: dist.Poisson(jnp.exp(z)).to_event(1),
    "Poisson, exp(z - 2), few": lambda z: dist.Poisson(jnp.exp(z - 2)).to_event(1),
    "Bernoulli, logit 2 z": lambda z: dist.Bernoulli(logits=2 * z).to_event(1),
    "binomial of 20, logit z - 1": lambda z: dist.Binomial(20, logits=z - 1).to_event(1),
    "negative binomial, exp(z)": lambda z: dist.NegativeBinomial2(jnp.exp(z), 2.0).to_event(1),
    "Student t of 3 degrees about z": lambda z: dist.StudentT(3.0, z, 0.5).to_event(1),
    "normal of sd exp(z / 2)": lambda z: dist.Normal(0.0, jnp.exp(z / 2)).to_event(1),
}
SMOOTHERS = {
    "EKF": {"linearize": "ekf"},
    "UKF": {"linearize": "ukf"},
    "Gauss-Hermite": {"linearize": "gauss_hermite"},
    "Gauss-Hermite, 4 times": {"linearize": "gauss_hermite", "num_iters": 4},
}


def exact(model: pssm.NonlinearSSM, y: jax.Array) -> tuple[float, np.ndarray, np.ndarray]:
    """Log evidence, and means and standard deviations of the smoothed states, by forward and backward sums."""

    def normal(x: np.ndarray, mean: np.ndarray, sd: float) -> np.ndarray:
        return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))

    weight = GRID[1] - GRID[0]
    kernel = normal(GRID[:, None], 0.9 * GRID + 0.1, 0.3) * weight
    emitted = np.asarray(jax.vmap(lambda y: jax.vmap(lambda z: model.log_prob(y, z[None]))(jnp.asarray(GRID)))(y))
    total, forward, now = 0.0, [], normal(GRID, 0.3, 0.7) * weight
    for t, row in enumerate(np.exp(emitted)):
        now = (kernel @ now if t else now) * row
        total += math.log(now.sum())
        now = now / now.sum()
        forward.append(now)
    back, means, sds = np.ones_like(GRID), [], []
    for t in reversed(range(len(y))):
        both = forward[t] * back
        both /= both.sum()
        means.append(both @ GRID)
        sds.append(math.sqrt(both @ (GRID - means[-1]) ** 2))
        back = kernel.T @ (back * np.exp(emitted[t]))
        back /= back.max()
    return total, np.array(means[::-1]), np.array(sds[::-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    names = [*SMOOTHERS, "Laplace over the path", "guided particles, 200"]
    print(f"| emission | log evidence | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for name, emission in MODELS.items():
        model = pssm.NonlinearSSM([0.3], [[0.7]], lambda z, u: 0.9 * z + 0.1, [[0.3]], emission)
        y = model.simulate(jax.random.key(2), options.steps)[1].at[7].set(jnp.nan)
        evidence, means, sds = exact(model, y)
        cells = []
        for make in [*(partial(pssm.gaussian_smoother, **kwargs) for kwargs in SMOOTHERS.values()), laplace_path]:
            found = jax.jit(partial(make, model))(y)
            error = np.sqrt(np.mean(((np.asarray(found.mean[:, 0]) - means) / sds) ** 2))
            cells.append(f"{float(found.log_likelihood) - evidence:+.2f} ({error:.2f})")
        proposal = guided_proposal(model, y)
        run = partial(pssm.particle_filter, model=model, y=y, num_particles=200, proposal=proposal)
        values = jax.jit(jax.vmap(lambda key, run=run: run(key).log_likelihood))(
            jax.random.split(jax.random.key(0), 20)
        )
        cells.append(f"{float(values.mean()) - evidence:+.2f} (sd {float(values.std()):.2f})")
        print(f"| {name} | {evidence:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    main()
