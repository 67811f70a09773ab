"""What EM recovers of a simulated linear dynamical system: pssm and dynamax from one start, against the truth.

    python docs/benchmarks/recovery.py [--quick] [--out FILE]

A fit is known only up to a change of the states' basis, so what is compared does not depend on it: the eigenvalues of
`A`; the stationary covariances of the observations, `C A^k S C'` for lags 0 to 5 (with `R` at lag 0), relative to the
truth; the log density of sequences that were not fitted, per step, as its distance to that under the truth. Both run
the same number of iterations of exact EM in float64 on `A`, `Q`, `C` and `R`, so they should agree. The first state's
moments are held: with several sequences dynamax 1.0.3 updates its covariance as `(sum x x' - (sum x)(sum x)') / N`,
where the second term lacks a division by N, and all parameters soon are NaN.
"""

import os
import warnings
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from filter import Table, options, print_machine
from scipy.linalg import solve_discrete_lyapunov
from scipy.optimize import linear_sum_assignment

import pssm
from pssm.learning.start import subspace_start

CASES = [(2, 4, 20, 100), (4, 8, 40, 100)]  # states, observed variables, sequences, steps
SEEDS = (0, 1, 2)
HELD_OUT = 100  # sequences
ITERATIONS = 200
LAGS = 6


def system(seed: int, n: int, p: int) -> pssm.LinearGaussianSSM:
    """A stable system that oscillates: pairs of eigenvalues of modulus 0.7 to 0.95, started from its steady state."""
    rng = np.random.default_rng(seed)
    blocks = np.zeros((n, n))
    for i in range(0, n, 2):
        size, angle = rng.uniform(0.7, 0.95), rng.uniform(0.2, 2.5)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        blocks[i : i + 2, i : i + 2] = size * turn
    basis = rng.normal(size=(n, n)) + 2 * np.eye(n)
    A = basis @ blocks @ np.linalg.inv(basis)
    Q = 0.5 * np.eye(n)
    C = rng.normal(size=(p, n)) / np.sqrt(n)
    P0 = solve_discrete_lyapunov(A, Q)
    return pssm.LinearGaussianSSM.from_covariances(np.zeros(n), P0, A, Q, C, np.diag(rng.uniform(0.3, 1.0, p)))


def with_pssm(start: pssm.LinearGaussianSSM, y: np.ndarray, num_iters: int) -> pssm.LinearGaussianSSM:
    """The model that `fit_em` finds."""
    return pssm.fit_em(y, start, num_iters=num_iters, tol=0.0).ssm


def with_dynamax(start: pssm.LinearGaussianSSM, y: np.ndarray, num_iters: int) -> pssm.LinearGaussianSSM:
    """The model that dynamax's E- and M-steps find."""
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM

    model = LinearGaussianSSM(start.n_state, start.n_obs, has_dynamics_bias=False, has_emissions_bias=False)
    params, props = model.initialize(
        jax.random.PRNGKey(0),
        initial_mean=start.m0,
        initial_covariance=start.P0,
        dynamics_weights=start.A,
        dynamics_covariance=start.Q,
        emission_weights=start.C,
        emission_covariance=start.R,
    )
    series = jnp.asarray(y)

    @jax.jit
    def run(params: Any) -> Any:
        def step(params: Any, _: None) -> Any:
            stats, _ = jax.vmap(lambda x: model.e_step(params, x))(series)
            new, _ = model.m_step(params, props, stats, model.initialize_m_step_state(params, props))
            return new._replace(initial=params.initial), None

        return jax.lax.scan(step, params, length=num_iters)[0]

    found = run(params)
    state, seen = found.dynamics, found.emissions
    Q, R = (np.asarray(0.5 * (x + x.T)) for x in (state.cov, seen.cov))
    return pssm.LinearGaussianSSM.from_covariances(start.m0, start.P0, state.weights, Q, seen.weights, R)


def eigenvalues_apart(a: pssm.LinearGaussianSSM, b: pssm.LinearGaussianSSM) -> float:
    """The largest distance between eigenvalues of `A`, paired so that the sum of distances is least."""
    gaps = np.abs(np.linalg.eigvals(np.asarray(a.A))[:, None] - np.linalg.eigvals(np.asarray(b.A))[None])
    return float(gaps[linear_sum_assignment(gaps)].max())


def autocovariances(ssm: pssm.LinearGaussianSSM) -> np.ndarray:
    """`Cov(y_{t+k}, y_t)` in the steady state, `(lag, obs, obs)`."""
    A, C = np.asarray(ssm.A), np.asarray(ssm.C)
    S = solve_discrete_lyapunov(A, np.asarray(ssm.Q))
    found = [C @ np.linalg.matrix_power(A, k) @ S @ C.T for k in range(LAGS)]
    found[0] = found[0] + np.asarray(ssm.R)
    return np.array(found)


def row(ssm: pssm.LinearGaussianSSM, truth: pssm.LinearGaussianSSM, held_out: np.ndarray) -> tuple[float, ...]:
    """The three distances of a fit to the truth."""
    lags, true_lags = autocovariances(ssm), autocovariances(truth)
    steps = held_out.shape[0] * held_out.shape[1]
    lost = float(jnp.sum(pssm.log_likelihood(truth, held_out) - pssm.log_likelihood(ssm, held_out))) / steps
    return eigenvalues_apart(ssm, truth), np.linalg.norm(lags - true_lags) / np.linalg.norm(true_lags), lost


FITS: dict[str, Any] = {"pssm": with_pssm, "dynamax": with_dynamax}


def main() -> None:
    """Prints the table."""
    args = options(__doc__).parse_args()
    table = Table(args.out)
    print_machine(table, ("dynamax",))
    table.line("| n, p, sequences, T | seed | model | eigenvalues | autocovariances | held-out loss per step |")
    table.line("|---|---|---|---|---|---|")
    jax.config.update("jax_enable_x64", True)
    for n, p, sequences, steps in CASES:
        for seed in SEEDS:
            truth = system(seed, n, p)
            count = 4 if args.quick else sequences
            keys = jax.random.split(jax.random.key(seed), count + HELD_OUT)
            y = np.asarray(jax.vmap(lambda key, m=truth: pssm.simulate(key, m, steps)[1])(keys))  # noqa: B023
            y, held_out = y[:count], y[count:]
            start = subspace_start(list(y), n, offsets=False)
            found = {"start": start}
            for name, fit in FITS.items():
                with table.attempt(name, f"{n}, {p}, seed {seed}"):
                    found[name] = fit(start, y, 2 if args.quick else ITERATIONS)
            for name in ("start", *FITS):
                if name in found:
                    eigen, lags, lost = row(found[name], truth, held_out)
                    where = f"{n}, {p}, {count}, {steps} | {seed} | {name}"
                    table.line(f"| {where} | {eigen:.4f} | {100 * lags:.2f} % | {lost:.5f} |")
    table.line("")
    table.print_notes()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # peers' deprecation warnings
    main()
