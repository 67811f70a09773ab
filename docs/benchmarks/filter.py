"""Log-likelihood and its gradient: pssm beside dynamax and statsmodels, in one run.

    uv pip install -e . --group peers && python docs/benchmarks/filter.py   # in an environment of its own

Prints a table in Markdown: microseconds per time step (median of 7, after compiling), compile seconds, and the ratio to
dynamax's sequential filter. A peer that is not installed is left out. Errors are against pssm in float64.
"""

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import pssm

CASES = [(1, 1, 10_000), (2, 1, 10_000), (4, 2, 10_000), (8, 4, 2_000), (16, 16, 500), (64, 32, 50)]


def problem(n: int, p: int, steps: int) -> dict[str, np.ndarray]:
    """A stable random model and data drawn from it."""
    rng = np.random.default_rng(n)
    A = rng.normal(size=(n, n))
    A *= 0.95 / np.abs(np.linalg.eigvals(A)).max()
    C = rng.normal(size=(p, n))
    z, y = np.zeros(n), np.empty((steps, p))
    for t in range(steps):
        z = A @ z + 0.3 * rng.normal(size=n)
        y[t] = C @ z + 0.5 * rng.normal(size=p)
    return {"m0": np.zeros(n), "P0": np.eye(n), "A": A, "Q": 0.09 * np.eye(n), "C": C, "R": 0.25 * np.eye(p), "y": y}


def timed(fn, *args) -> tuple[float, float, float]:
    """Compile seconds, median run seconds, value."""
    start = time.perf_counter()
    first = jax.block_until_ready(fn(*args))
    compiling = time.perf_counter() - start
    runs = []
    for _ in range(7):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        runs.append(time.perf_counter() - start)
    return compiling, statistics.median(runs), float(jax.tree.leaves(first)[0])


def with_pssm(q: dict[str, np.ndarray]):
    """pssm's default method: value, and value with gradient with respect to the transition matrix."""
    eye = np.eye(len(q["m0"]))

    def value(A, y):
        ssm = pssm.LinearGaussianSSM(q["m0"], eye, A, 0.3 * eye, q["C"], 0.5 * np.eye(q["C"].shape[0]))
        return pssm.log_likelihood(ssm, y)

    return value


def with_dynamax(q: dict[str, np.ndarray]):
    """dynamax's sequential Kalman filter."""
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM, lgssm_filter

    n, p = q["C"].shape[1], q["C"].shape[0]
    model = LinearGaussianSSM(n, p)

    def value(A, y):
        params, _ = model.initialize(
            jax.random.PRNGKey(0),
            initial_mean=jnp.asarray(q["m0"], y.dtype),
            initial_covariance=jnp.asarray(q["P0"], y.dtype),
            dynamics_weights=A,
            dynamics_covariance=jnp.asarray(q["Q"], y.dtype),
            emission_weights=jnp.asarray(q["C"], y.dtype),
            emission_covariance=jnp.asarray(q["R"], y.dtype),
        )
        return lgssm_filter(params, y).marginal_loglik

    return value


def with_statsmodels(q: dict[str, np.ndarray]) -> tuple[float, float]:
    """statsmodels' Cython filter, univariate treatment, likelihood only: seconds and value (float64)."""
    from statsmodels.tsa.statespace.kalman_filter import MEMORY_CONSERVE, KalmanFilter

    p, n = q["C"].shape
    kf = KalmanFilter(k_endog=p, k_states=n)
    kf["design"], kf["transition"], kf["selection"] = q["C"], q["A"], np.eye(n)
    kf["state_cov"], kf["obs_cov"] = q["Q"], q["R"]
    kf.initialize_known(q["m0"], q["P0"])
    kf.bind(q["y"])
    kf.filter_univariate = True
    kf.set_conserve_memory(MEMORY_CONSERVE)
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        value = kf.loglike()
        runs.append(time.perf_counter() - start)
    return statistics.median(runs), float(value)


def main() -> None:
    """Prints the table."""
    have = {name: importlib.util.find_spec(name) is not None for name in ("dynamax", "statsmodels")}
    versions = {"jax": jax.__version__, "numpy": np.__version__, "pssm": pssm.__version__}
    versions |= {name: importlib.metadata.version(name) for name, here in have.items() if here}
    print(f"{platform.machine()}, {os.cpu_count()} cores; {', '.join(' '.join(v) for v in versions.items())}\n")
    print("| n, p, T | type | library | value us/step | gradient us/step | compile s | x dynamax | error |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        n, p, steps = case
        q = problem(*case)
        exact = None
        for x64 in (True, False):
            jax.config.update("jax_enable_x64", x64)
            dtype = "float64" if x64 else "float32"
            A, y = jnp.asarray(q["A"]), jnp.asarray(q["y"])
            rows = {}
            for name, make in (("dynamax", with_dynamax), ("pssm", with_pssm)):
                if name == "dynamax" and not have["dynamax"]:
                    continue
                value = make(q)
                rows[name] = timed(jax.jit(value), A, y), timed(jax.jit(jax.value_and_grad(value)), A, y)
            exact = rows["pssm"][0][2] if exact is None else exact
            base = rows.get("dynamax")
            for name, (v, g) in rows.items():
                ratio = f"{base[0][1] / v[1]:.1f} / {base[1][1] / g[1]:.1f}" if base else ""
                print(
                    f"| {n}, {p}, {steps} | {dtype} | {name} | {v[1] / steps * 1e6:.2f} | {g[1] / steps * 1e6:.2f} | "
                    f"{v[0]:.1f} / {g[0]:.1f} | {ratio} | {abs(v[2] / exact - 1):.0e} |",
                    flush=True,
                )
            if x64 and have["statsmodels"]:
                seconds, value = with_statsmodels(q)
                ratio = f"{base[0][1] / seconds:.1f} / -" if base else ""
                print(
                    f"| {n}, {p}, {steps} | float64 | statsmodels | {seconds / steps * 1e6:.2f} | - | - | {ratio} | "
                    f"{abs(value / exact - 1):.0e} |"
                )


if __name__ == "__main__":
    main()
