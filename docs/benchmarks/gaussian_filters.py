"""Extended and unscented Kalman filters: pssm beside dynamax, in one run; speed, and agreement.

    python docs/benchmarks/gaussian_filters.py [--rounds 15] [--types float32,float64]

Run it in an environment of its own (`results.md` says how). What is timed: log-likelihood, filtered means and filtered
covariances of a pendulum (2 states, its place seen) and of the Lorenz-96 system (8 states, 4 seen). The two libraries
take turns, so that what else the machine does hits both: the table has the shortest run of each and the median of the
ratios of neighbours. Compilation is apart. The second table has the largest differences of the results on the pendulum,
Lorenz-63 and a target tracked by range and bearing, in float64; points and weights are the same. For these dynamax does
without the 1e-9 that it adds to the diagonal of innovation covariances: that alone changes a likelihood by 1e-6.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import pssm
from pssm.models import lorenz63_system, pendulum_system
from pssm.nonlinear_sde import runge_kutta


class Case(NamedTuple):
    """A system with normal noise, as functions and factors."""

    transition: Callable
    emission: Callable
    m0: np.ndarray
    chol_P0: np.ndarray
    chol_Q: np.ndarray
    chol_R: np.ndarray


def pendulum() -> Case:
    system = pendulum_system()
    return Case(
        lambda z: system.transition(z, None),
        lambda z: jnp.sin(z[:1]),
        *[np.asarray(x, float) for x in (system.m0, system.chol_P0, system.chol_Q)],
        0.1 * np.eye(1),
    )


def lorenz63() -> Case:
    system = lorenz63_system()
    return Case(
        lambda z: system.transition(z, None),
        lambda z: z,
        *[np.asarray(x, float) for x in (system.m0, system.chol_P0, system.chol_Q)],
        np.eye(3),
    )


def lorenz96(n: int = 8) -> Case:
    def field(z):
        return (jnp.roll(z, -1) - jnp.roll(z, 2)) * jnp.roll(z, 1) - z + 8.0

    eye = np.eye(n)
    start = 8.0 + np.sin(np.arange(n))
    return Case(lambda z: runge_kutta(field, z, 0.02), lambda z: z[::2], start, eye, 0.1 * eye, np.eye(n // 2))


def tracking() -> Case:
    """Place and velocity in the plane; distance and direction are seen from the origin."""
    step, size = 0.5, 0.05
    A = np.eye(4) + step * np.eye(4, k=2)
    block = np.linalg.cholesky([[step**3 / 3, step**2 / 2], [step**2 / 2, step]])
    chol_Q = size * np.kron(block, np.eye(2))

    def emission(z):
        return jnp.stack([jnp.sqrt(z[0] ** 2 + z[1] ** 2), jnp.arctan2(z[1], z[0])])

    return Case(
        lambda z: jnp.asarray(A, z.dtype) @ z,
        emission,
        np.array([30.0, 30.0, 0.1, -0.1]),
        np.eye(4),
        chol_Q,
        np.diag([0.5, 0.02]),
    )


def simulate(case: Case, steps: int) -> np.ndarray:
    """Observations of a random path, in NumPy but for the two functions."""
    rng = np.random.default_rng(0)
    move, see = jax.jit(case.transition), jax.jit(jax.vmap(case.emission))
    z = case.m0 + 0.1 * case.chol_P0 @ rng.normal(size=len(case.m0))
    path = []
    for t in range(steps):
        if t:
            z = np.asarray(move(z)) + case.chol_Q @ rng.normal(size=case.chol_Q.shape[1])
        path.append(z)
    seen = np.asarray(see(np.array(path)))
    return seen + rng.normal(size=seen.shape) @ case.chol_R.T


Run = Callable[[Any], tuple[Any, Any, Any]]


def ours(case: Case, rule: str, dtype: Any) -> Run:
    arrays = [jnp.asarray(x, dtype) for x in case[2:]]
    m0, chol_P0, chol_Q, chol_R = arrays
    if np.count_nonzero(case.chol_R - np.diag(np.diagonal(case.chol_R))) == 0:
        noise = jnp.diagonal(chol_R)
        emission = lambda z: dist.Normal(case.emission(z), noise).to_event(1)  # noqa: E731
    else:
        emission = lambda z: dist.MultivariateNormal(case.emission(z), scale_tril=chol_R)  # noqa: E731
    model = pssm.NonlinearSSM(m0, chol_P0, lambda z, u: case.transition(z), chol_Q, emission)

    def run(y):
        found = pssm.gaussian_filter(model, y, linearize=rule)
        return found.log_likelihood, found.mean, found.cov

    return jax.jit(run)


def dynamax(case: Case, rule: str, dtype: Any) -> Run:
    from dynamax.nonlinear_gaussian_ssm import (
        ParamsNLGSSM,
        UKFHyperParams,
        extended_kalman_filter,
        unscented_kalman_filter,
    )

    m0, *factors = [jnp.asarray(x, dtype) for x in case[2:]]
    P0, Q, R = (f @ f.T for f in factors)
    params = ParamsNLGSSM(m0, P0, case.transition, Q, case.emission, R)
    fields = ["filtered_means", "filtered_covariances"]

    def run(y):
        if rule == "ekf":
            found = extended_kalman_filter(params, y, output_fields=fields)
        else:
            found = unscented_kalman_filter(params, y, UKFHyperParams(), output_fields=fields)
        return found.marginal_loglik, found.filtered_means, found.filtered_covariances

    return jax.jit(run)


def first_call(run: Run, y: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run(y))
    return time.perf_counter() - begin


def timed(run: Run, y: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(run(y))
    return time.perf_counter() - begin


def speed(case: Case, rule: str, dtype: Any, steps: int, rounds: int) -> list[str]:
    y = jnp.asarray(simulate(case, steps), dtype)
    runs = [make(case, rule, dtype) for make in (dynamax, ours)]
    compiling = [first_call(run, y) for run in runs]
    seconds = [[timed(run, y) for run in runs] for _ in range(rounds)]
    best = [min(column) for column in zip(*seconds, strict=True)]
    ratio = statistics.median(theirs / own for theirs, own in seconds)
    return [
        f"{compiling[0]:.1f}",
        f"{compiling[1]:.1f}",
        f"{best[0] / steps * 1e9:,.0f}",
        f"{best[1] / steps * 1e9:,.0f}",
        f"{best[0] / best[1]:.1f}",
        f"{ratio:.1f}",
    ]


def apart(case: Case, rule: str, steps: int = 200) -> list[str]:
    from dynamax.nonlinear_gaussian_ssm import inference_ekf, inference_ukf

    solve = partial(inference_ekf.psd_solve, diagonal_boost=0.0)
    inference_ekf.psd_solve = inference_ukf.psd_solve = solve
    y = jnp.asarray(simulate(case, steps))
    found = [make(case, rule, jnp.float64)(y) for make in (dynamax, ours)]
    return [f"{np.abs(np.asarray(one) - np.asarray(other)).max():.1e}" for one, other in zip(*found, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--types", default="float64,float32")
    options = parser.parse_args()
    print(f"Load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the start.\n")
    print(
        "| states | filter | type | dynamax compile s | pssm compile s | dynamax ns/step | pssm ns/step | best / best "
        "| median ratio |\n|---|---|---|---|---|---|---|---|---|"
    )
    for case, steps in ((pendulum(), 10_000), (lorenz96(), 3_000)):
        for rule in ("ekf", "ukf"):
            for name in options.types.split(","):
                with jax.enable_x64(name == "float64"):
                    cells = speed(case, rule, jnp.dtype(name), steps, options.rounds)
                print(f"| {len(case.m0)} | {rule} | {name} | {' | '.join(cells)} |", flush=True)
    print("\n| system | filter | log-likelihood | means | covariances |\n|---|---|---|---|---|")
    systems = {"pendulum": pendulum, "Lorenz-63": lorenz63, "range and bearing": tracking}
    with jax.enable_x64(True):
        for name, make in systems.items():
            for rule in ("ekf", "ukf"):
                print(f"| {name} | {rule} | {' | '.join(partial(apart, make())(rule))} |", flush=True)


if __name__ == "__main__":
    main()
