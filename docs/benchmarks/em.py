"""EM for a linear dynamical system: iterations per second of pssm, dynamax and pykalman, in one run.

    python docs/benchmarks/em.py [--quick] [--out FILE]

All start at the same model and fit `A`, `Q`, `C` and `R`, with `m0` and `P0` held where the library can. Time is wall
time per iteration after compiling: of a run of pssm's `fit_em`, its loop in Python included; of dynamax's own loop,
compiled as one program; of pykalman's `em`. The log-likelihood is pssm's, of the model after as many iterations.
"""

import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from filter import Arrays, Table, options, print_machine, problem, square

import pssm

CASES = [(4, 2, 1_000, None), (10, 20, 500, None), (10, 20, 200, 20)]
ITERATIONS = {"pssm": 50, "dynamax": 50, "pykalman": 2}


def with_pssm(q: Arrays, y: np.ndarray, num_iters: int) -> tuple[float, Any]:
    """Seconds per iteration, and the model's matrices."""
    ssm = pssm.LinearGaussianSSM(**{k: jnp.asarray(x, y.dtype) for k, x in q.items()})
    run = partial(pssm.fit_em, y, ssm, num_iters=num_iters, tol=-1.0)
    pssm.fit_em(y, ssm, num_iters=1)
    start = time.perf_counter()
    found = run().ssm
    return (time.perf_counter() - start) / num_iters, (found.A, found.Q, found.C, found.R)


def with_dynamax(q: Arrays, y: np.ndarray, num_iters: int) -> tuple[float, Any]:
    """The same for dynamax."""
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM

    n, p = q["A"].shape[0], q["C"].shape[0]
    model = LinearGaussianSSM(n, p, has_dynamics_bias=False, has_emissions_bias=False)
    given = {k: jnp.asarray(x, y.dtype) for k, x in q.items()}
    params, props = model.initialize(
        jax.random.PRNGKey(0),
        initial_mean=given["m0"],
        initial_covariance=square(given["chol_P0"]),
        dynamics_weights=given["A"],
        dynamics_covariance=square(given["chol_Q"]),
        emission_weights=given["C"],
        emission_covariance=square(given["chol_R"]),
    )
    params = jax.tree.map(lambda x: x.astype(y.dtype), params)
    series = jnp.asarray(y if y.ndim == 3 else y[None])

    @jax.jit
    def run(params: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            params, state = carry
            stats, log_liks = jax.vmap(lambda x: model.e_step(params, x))(series)
            return model.m_step(params, props, stats, state), log_liks.sum()

        return jax.lax.scan(step, (params, model.initialize_m_step_state(params, props)), length=num_iters)

    jax.block_until_ready(run(params))
    start = time.perf_counter()
    (found, _), _ = jax.block_until_ready(run(params))
    took = (time.perf_counter() - start) / num_iters
    return took, (found.dynamics.weights, found.dynamics.cov, found.emissions.weights, found.emissions.cov)


def with_pykalman(q: Arrays, y: np.ndarray, num_iters: int) -> tuple[float, Any]:
    """The same for pykalman, which takes one series."""
    from pykalman import KalmanFilter

    if y.ndim == 3:
        raise ValueError("one series only")
    names = ["transition_matrices", "transition_covariance", "observation_matrices", "observation_covariance"]
    model = KalmanFilter(
        transition_matrices=q["A"],
        transition_covariance=square(q["chol_Q"]),
        observation_matrices=q["C"],
        observation_covariance=square(q["chol_R"]),
        initial_state_mean=q["m0"],
        initial_state_covariance=square(q["chol_P0"]),
        em_vars=names,
    )
    start = time.perf_counter()
    model.em(y, n_iter=num_iters)
    return (time.perf_counter() - start) / num_iters, tuple(getattr(model, name) for name in names)


def log_likelihood(q: Arrays, y: np.ndarray, A: np.ndarray, Q: np.ndarray, C: np.ndarray, R: np.ndarray) -> float:
    """pssm's, in float64; NaN where the matrices are no model."""
    if not all(np.isfinite(x).all() for x in (A, Q, C, R)):
        return float("nan")
    with jax.enable_x64(True):
        symmetric = [0.5 * (x + x.T) for x in (Q, R)]
        start = np.asarray(q["m0"]), square(np.asarray(q["chol_P0"]))
        ssm = pssm.LinearGaussianSSM.from_covariances(*start, A, symmetric[0], C, symmetric[1])
        return float(jnp.sum(pssm.log_likelihood(ssm, y)))


LIBRARIES: dict[str, Callable[[Arrays, np.ndarray, int], tuple[float, Any]]] = {
    "dynamax": with_dynamax,
    "pssm": with_pssm,
    "pykalman": with_pykalman,
}


def main() -> None:
    """Prints the table."""
    args = options(__doc__).parse_args()
    table = Table(args.out)
    print_machine(table, ("dynamax", "pykalman"))
    table.line("| n, p, T, sequences | type | library | ms per iteration | iterations per s | x dynamax | log-lik. |")
    table.line("|---|---|---|---|---|---|---|")
    for n, p, steps, sequences in CASES:
        q, y = problem(n, p, min(steps, 20) if args.quick else steps, sequences)
        q["A"] = 0.5 * q["A"]  # a start away from the truth
        for x64 in (True, False):
            jax.config.update("jax_enable_x64", x64)
            kind = "float64" if x64 else "float32"
            data, base = y.astype(kind), None
            for name, run in LIBRARIES.items():
                if name == "pykalman" and not x64:
                    continue
                where = f"{n}, {p}, {steps}, {sequences or 1} | {kind} | {name}"
                with table.attempt(name, f"{n}, {p}, {steps} {kind}"):
                    count = 2 if args.quick else ITERATIONS[name]
                    took, (A, Q, C, R) = run(q, data, count)
                    base = took if name == "dynamax" else base
                    value = log_likelihood(q, y, *(np.asarray(x, float) for x in (A, Q, C, R)))
                    ratio = "-" if base is None else f"{base / took:.2f}"
                    note = f" after {count}" if count != ITERATIONS["pssm"] else ""
                    table.line(f"| {where} | {took * 1e3:.2f} | {1 / took:.0f} | {ratio} | {value:.2f}{note} |")
            jax.clear_caches()
    table.line("")
    table.print_notes()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # peers' deprecation warnings
    main()
