"""Log-likelihood, gradient and smoother of a linear-Gaussian model: pssm beside other libraries, in one run.

    python docs/benchmarks/filter.py [--cases 1,4] [--without NAMES] [--quick] [--out FILE]

Run it in an environment of its own (`results.md` says how). Times three things: the log-likelihood; its value and
gradient with respect to `A`, `chol_Q` and `chol_R` jointly; means and covariances of the smoother. Prints tables in
Markdown, and progress on stderr: microseconds per time step (median of 7 runs after compiling; fewer where they would
take longer than 20 s), seconds of compilation, the ratio of the time of dynamax's sequential filter to the row's, and
errors relative to pssm's `method="sequential"` in float64. A peer that is not installed or fails is a dash, and the
reason stands below the table.

The machine must be quiet: where other work holds a core, OpenBLAS' threads wait for each other, and every library in
JAX can be a hundred times slower from 64 states on. `OPENBLAS_NUM_THREADS=1` avoids that; the output says so if set.
"""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import pssm

CASES = [
    (1, 1, 100_000),
    (2, 1, 10_000),
    (4, 2, 10_000),
    (8, 4, 10_000),
    (16, 16, 1_000),
    (64, 32, 500),
    (128, 128, 100),
]
GAPS = (4, 2, 10_000)
RUNS, LEAST, BUDGET = 7, 0.5, 20.0  # repetitions, seconds of them, and those after which no further one is started
LOOP_STEPS = 1_000  # libraries that loop in Python are timed on this many steps at most

Arrays = dict[str, Any]
LEARNED = ("A", "chol_Q", "chol_R")
BASE, REFERENCE = "dynamax", "pssm, every step"


class Library(NamedTuple):
    """Log-likelihood and smoothed means and covariances, of a model (the arrays of `problem`) and a series."""

    value: Callable[[Arrays, Any], Any]
    smooth: Callable[[Arrays, Any], tuple[Any, Any]]


class Prepared(NamedTuple):
    """The same for a library in NumPy, with model and series already in its own objects."""

    value: Callable[[], float]
    smooth: Callable[[], tuple[np.ndarray, np.ndarray]]


InJax = dict[str, Callable[[], Library]]
InNumPy = dict[str, Callable[[Arrays, np.ndarray], Prepared]]


class Timing(NamedTuple):
    """One entry of a row: seconds of compilation, seconds of a run, and what came out."""

    compiling: float | None = None
    running: float | None = None
    result: Any = None


class Row(NamedTuple):
    """A library's line of a table. `entries`: value, gradient, smoother; `steps`: what they were timed on."""

    label: str
    entries: list[Timing]
    steps: int


def problem(n: int, p: int, steps: int, series: int | None = None) -> tuple[Arrays, np.ndarray]:
    """A stable random model and data drawn from it, `(steps, p)`, or `(series, steps, p)`."""
    rng = np.random.default_rng(n)
    A = rng.normal(size=(n, n))
    A *= 0.95 / np.abs(np.linalg.eigvals(A)).max()
    C = rng.normal(size=(p, n))
    batch = () if series is None else (series,)
    z, y = np.zeros((*batch, n)), np.empty((steps, *batch, p))
    for t in range(steps):
        z = z @ A.T + 0.3 * rng.normal(size=z.shape)
        y[t] = z @ C.T + 0.5 * rng.normal(size=(*batch, p))
    eye = np.eye(n)
    model = {"m0": np.zeros(n), "chol_P0": eye, "A": A, "chol_Q": 0.3 * eye, "C": C, "chol_R": 0.5 * np.eye(p)}
    return model, np.moveaxis(y, 0, -2)


def square(chol: Any) -> Any:
    """A covariance from its factor."""
    return chol @ chol.swapaxes(-1, -2)


# Libraries in JAX --------------------------------------------------------------------------------------------------


def with_pssm(method: str = "auto") -> Library:
    """pssm, by default or with every step computed."""

    def ssm(q: Arrays) -> pssm.LinearGaussianSSM:
        return pssm.LinearGaussianSSM(**q)

    def smooth(q: Arrays, y: Any) -> tuple[Any, Any]:
        result = pssm.kalman_smoother(ssm(q), y, method=method)
        return result.mean, result.cov

    return Library(lambda q, y: pssm.log_likelihood(ssm(q), y, method=method), smooth)


def with_dynamax(parallel: bool = False) -> Library:
    """dynamax's Kalman filter, by default the sequential one."""
    from dynamax.linear_gaussian_ssm import inference, parallel_inference

    source = parallel_inference if parallel else inference

    def params(q: Arrays) -> Any:
        cov = {name: square(q[f"chol_{name}"]) for name in ("P0", "Q", "R")}
        return inference.make_lgssm_params(q["m0"], cov["P0"], q["A"], cov["Q"], q["C"], cov["R"])

    def smooth(q: Arrays, y: Any) -> tuple[Any, Any]:
        result = source.lgssm_smoother(params(q), y)
        return result.smoothed_means, result.smoothed_covariances

    return Library(lambda q, y: source.lgssm_filter(params(q), y).marginal_loglik, smooth)


def with_cuthbert() -> Library:
    """cuthbert's square-root Kalman filter, run sequentially."""
    import cuthbert
    from cuthbert.gaussian import kalman

    def run(q: Arrays, y: Any) -> tuple[Any, Any]:
        # Its initial state comes before the first transition: so the first transition forgets it and draws z_1.
        def dynamics(inputs: tuple[Any, Any]) -> tuple[Any, Any, Any]:
            first = inputs[0]
            return jnp.where(first, 0.0, q["A"]), q["m0"] * first, jnp.where(first, q["chol_P0"], q["chol_Q"])

        def observation(inputs: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
            return q["C"], jnp.zeros_like(inputs[1]), q["chol_R"], inputs[1]

        inputs = (jnp.arange(len(y)) == 0, y)
        filter_ = kalman.build_filter(jnp.zeros_like(q["m0"]), jnp.eye(len(q["m0"])), dynamics, observation)
        return cuthbert.filter(filter_, inputs, filter_.init_prepare()), kalman.build_smoother(dynamics)

    def smooth(q: Arrays, y: Any) -> tuple[Any, Any]:
        states, smoother = run(q, y)
        result = cuthbert.smoother(smoother, states)
        return result.mean[1:], square(result.chol_cov[1:])

    return Library(lambda q, y: run(q, y)[0].log_normalizing_constant[-1], smooth)


def with_dynestyx() -> Library:
    """dynestyx's exact filter for linear-Gaussian models, called below its handlers.

    The handlers build one distribution object for every time step: too slow to trace for thousands of steps.
    """
    from dynestyx import LTI_discrete
    from dynestyx.inference.configs.filter import KFConfig
    from dynestyx.inference.configs.smoother import KFSmootherConfig
    from dynestyx.inference.integrations.cd_dynamax.discrete_filter import compute_cd_dynamax_discrete_filter
    from dynestyx.inference.integrations.cd_dynamax.discrete_smoother import compute_cd_dynamax_discrete_smoother

    def arguments(q: Arrays, y: Any, config: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
        cov = {name: square(q[f"chol_{name}"]) for name in ("P0", "Q", "R")}
        model = LTI_discrete(q["A"], cov["Q"], q["C"], cov["R"], initial_mean=q["m0"], initial_cov=cov["P0"])
        return (model, config), {"obs_times": jnp.arange(len(y), dtype=y.dtype), "obs_values": y}

    def value(q: Arrays, y: Any) -> Any:
        args, series = arguments(q, y, KFConfig())
        return compute_cd_dynamax_discrete_filter(*args, **series).marginal_loglik

    def smooth(q: Arrays, y: Any) -> tuple[Any, Any]:
        args, series = arguments(q, y, KFSmootherConfig())
        result = compute_cd_dynamax_discrete_smoother(*args, **series)
        return result.smoothed_means, result.smoothed_covariances

    return Library(value, smooth)


def with_tfp() -> Library:
    """TensorFlow Probability's distribution, on JAX."""
    from tensorflow_probability.substrates.jax import distributions as tfd

    def model(q: Arrays, y: Any) -> Any:
        def noise(loc: Any, chol: Any) -> Any:
            return tfd.MultivariateNormalTriL(loc, chol)

        return tfd.LinearGaussianStateSpaceModel(
            y.shape[-2],
            q["A"],
            noise(jnp.zeros_like(q["m0"]), q["chol_Q"]),
            q["C"],
            noise(jnp.zeros_like(y[..., 0, :]), q["chol_R"]),
            noise(q["m0"], q["chol_P0"]),
        )

    return Library(lambda q, y: model(q, y).log_prob(y), lambda q, y: model(q, y).posterior_marginals(y))


IN_JAX: InJax = {
    BASE: with_dynamax,
    "pssm": with_pssm,
    REFERENCE: partial(with_pssm, "sequential"),
    "dynamax, parallel": partial(with_dynamax, parallel=True),
    "cuthbert": with_cuthbert,
    "dynestyx": with_dynestyx,
    "TFP": with_tfp,
}

# Libraries in NumPy, float64 alone and without gradients ------------------------------------------------------------


def with_statsmodels(q: Arrays, y: np.ndarray, univariate: bool = False) -> Prepared:
    """statsmodels' Cython filter. Its other defaults stay: it stops updating covariances that no longer change."""
    from statsmodels.tsa.statespace import kalman_filter, kalman_smoother

    def bound() -> Any:
        p, n = q["C"].shape
        kf = kalman_smoother.KalmanSmoother(k_endog=p, k_states=n)
        kf["design"], kf["transition"], kf["selection"] = q["C"], q["A"], np.eye(n)
        kf["state_cov"], kf["obs_cov"] = square(q["chol_Q"]), square(q["chol_R"])
        kf.initialize_known(q["m0"], square(q["chol_P0"]))
        kf.bind(y.copy())
        kf.filter_univariate = univariate
        return kf

    filtering, smoothing = bound(), bound()
    filtering.set_conserve_memory(kalman_filter.MEMORY_CONSERVE)
    wanted = kalman_smoother.SMOOTHER_STATE | kalman_smoother.SMOOTHER_STATE_COV

    def smooth() -> tuple[np.ndarray, np.ndarray]:
        result = smoothing.smooth(smoother_output=wanted)
        return result.smoothed_state.T, np.moveaxis(result.smoothed_state_cov, -1, 0)

    return Prepared(filtering.loglike, smooth)


def with_pykalman(q: Arrays, y: np.ndarray) -> Prepared:
    """pykalman's standard filter."""
    from pykalman import KalmanFilter

    model = KalmanFilter(
        transition_matrices=q["A"],
        transition_covariance=square(q["chol_Q"]),
        observation_matrices=q["C"],
        observation_covariance=square(q["chol_R"]),
        initial_state_mean=q["m0"],
        initial_state_covariance=square(q["chol_P0"]),
    )
    return Prepared(lambda: model.loglikelihood(y), lambda: model.smooth(y))


def with_simdkalman(q: Arrays, y: np.ndarray) -> Prepared:
    """simdkalman, vectorised over series; `y` may have an axis of series in front."""
    from simdkalman import KalmanFilter

    model = KalmanFilter(q["A"], square(q["chol_Q"]), q["C"], square(q["chol_R"]))
    series, start = y if y.ndim == 3 else y[None], (q["m0"], square(q["chol_P0"]))
    left_out = 0.5 * y.size * np.log(2 * np.pi)  # its log-likelihood has no such constant

    def value() -> float:
        result = model.compute(series, 0, *start, smoothed=False, observations=False, log_likelihood=True)
        return result.log_likelihood.sum() - left_out

    def smooth() -> tuple[np.ndarray, np.ndarray]:
        states = model.smooth(series, *start, observations=False).states
        return (states.mean, states.cov) if y.ndim == 3 else (states.mean[0], states.cov[0])

    return Prepared(value, smooth)


IN_NUMPY: InNumPy = {
    "statsmodels, conventional": with_statsmodels,
    "statsmodels, univariate": partial(with_statsmodels, univariate=True),
    "pykalman": with_pykalman,
    "simdkalman": with_simdkalman,
}
LOOPS_IN_PYTHON = ("pykalman", "simdkalman")

# Timing -------------------------------------------------------------------------------------------------------------


def median_time(run: Callable[[], Any], runs: int) -> tuple[float, Any]:
    """Median seconds, and the last result. The first call is not counted where there is time for a second."""
    result, times, spent = None, [], 0.0
    while (len(times) <= runs or (runs > 1 and spent < LEAST)) and spent < BUDGET:
        start = time.perf_counter()
        result = jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
        spent += times[-1]
    return statistics.median(times[1:] or times), jax.tree.map(np.asarray, result)


def time_in_jax(fn: Callable[..., Any], *args: Any, runs: int) -> Timing:
    """Compiles, then runs. All arrays are arguments, so nothing is folded into the program as a constant."""
    start = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile()
    compiling = time.perf_counter() - start
    return Timing(compiling, *median_time(lambda: program(*args), runs))


def value_and_gradient(value: Callable[[Arrays, Any], Any]) -> Callable[[Arrays, Any], Any]:
    """Value, and gradient with respect to the learned arrays jointly."""

    def fn(q: Arrays, y: Any) -> Any:
        return jax.value_and_grad(lambda learned: value(q | learned, y))({name: q[name] for name in LEARNED})

    return fn


class Table:
    """Collects notes, and prints what it is given, to a file too."""

    HEAD = (
        "| n, p, T | type | library | value us/step | gradient us/step | smoother us/step | compile s | x dynamax | "
        "error |\n|---|---|---|---|---|---|---|---|---|"
    )

    def __init__(self, out: Path | None):
        self.out = out
        self.notes: dict[str, list[str]] = {}
        if out is not None:
            out.write_text("")

    def line(self, text: str = "") -> None:
        """Prints a line."""
        print(text, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(text + "\n")

    def note(self, text: str, where: str) -> None:
        """Keeps a remark for the end, with the places it holds for."""
        places = self.notes.setdefault(text, [])
        if where not in places:
            places.append(where)

    def print_notes(self) -> None:
        """The remarks, one line each."""
        for text, places in self.notes.items():
            self.line(f"- {text} ({'; '.join(places)})")

    @contextlib.contextmanager
    def attempt(self, what: str, where: str) -> Iterator[None]:
        """A peer that fails is worth a note, not the end of the run."""
        print(f"{where}: {what}", file=sys.stderr, flush=True)
        try:
            yield
        except ModuleNotFoundError as error:
            self.note(f"{what}: not installed ({error.name})", "left out")
        except Exception as error:
            first = (str(error).strip() or "no message").splitlines()[0][:200]
            self.note(f"{what} fails: {type(error).__name__}: {first}", where)


def rows_in_jax(table: Table, where: str, libraries: InJax, q: Arrays, y: np.ndarray, runs: int) -> list[Row]:
    """Times libraries in JAX, in the type that is switched on."""
    rows, model, series = [], jax.tree.map(jnp.asarray, q), jnp.asarray(y)
    for name, make in libraries.items():
        library = None
        with table.attempt(name, where):
            library = make()
        if library is None:
            continue
        jobs = {"value": library.value, "gradient": value_and_gradient(library.value), "smoother": library.smooth}
        entries = [Timing()] * len(jobs)
        for i, (what, fn) in enumerate(jobs.items()):
            with table.attempt(f"{name}, {what}", where):
                entries[i] = time_in_jax(fn, model, series, runs=runs)
        rows.append(Row(name, entries, y[..., 0].size))
    return rows


def rows_in_numpy(table: Table, where: str, libraries: InNumPy, q: Arrays, y: np.ndarray, runs: int) -> list[Row]:
    """Times libraries in NumPy: value and smoother."""
    rows = []
    for name, make in libraries.items():
        part = y[..., :LOOP_STEPS, :] if name in LOOPS_IN_PYTHON else y
        with table.attempt(name, where):
            library = make(q, part)
            value, smooth = (Timing(None, *median_time(fn, runs)) for fn in library)
            cut = f" (first {part.shape[-2]} steps)" if part.size < y.size else ""
            rows.append(Row(name + cut, [value, Timing(), smooth], part[..., 0].size))
    return rows


# Errors and printing ------------------------------------------------------------------------------------------------


def reference(library: Library, q: Arrays, y: np.ndarray) -> list[Any]:
    """Value, gradient and smoother of pssm with every step computed, in float64."""
    jobs = (library.value, value_and_gradient(library.value), library.smooth)
    return [jax.tree.map(np.asarray, jax.jit(fn)(q, y)) for fn in jobs]


def distance(found: Any, right: Any) -> float:
    """Relative error: the norm of the difference over the norm, the largest over all arrays."""
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True)
    errors = [np.linalg.norm(np.float64(a) - b) / np.linalg.norm(b) for a, b in leaves]
    return float(np.max(errors))


def error(i: int, entry: Timing, right: Any) -> float | None:
    """Error of the value, of the gradient (lower triangles of factors: some libraries read no more), or of moments."""
    if entry.result is None:
        return None
    if i == 1:
        found, wanted = ({k: g if k == "A" else np.tril(g) for k, g in r[1].items()} for r in (entry.result, right))
        return distance(found, wanted)
    return distance(entry.result, right)


def joined(values: list[float | None], form: str) -> str:
    """Numbers with slashes between them, and dashes for what is missing."""
    return " / ".join("-" if v is None else format(v, form) for v in values)


def print_rows(table: Table, head: str, rows: list[Row], base: Row | None, right: dict[int, list[Any]]) -> None:
    """The lines of one group of rows."""
    for row in rows:
        per_step = [None if e.running is None else e.running / row.steps * 1e6 for e in row.entries]
        compiling = joined([e.compiling for e in row.entries], ".1f")
        ratios: list[float | None] = [None] * len(row.entries)
        if base is not None:
            of_base = [None if e.running is None else e.running / base.steps * 1e6 for e in base.entries]
            ratios = [None if b is None or t is None else b / t for b, t in zip(of_base, per_step, strict=True)]
        errors = [error(i, e, right[row.steps][i]) for i, e in enumerate(row.entries)]
        times = " | ".join("-" if t is None else f"{t:.3f}" for t in per_step)
        table.line(
            f"| {head} | {row.label} | {times} | {compiling} | {joined(ratios, '.2f')} | {joined(errors, '.0e')} |"
        )


def print_machine(table: Table, packages: tuple[str, ...]) -> None:
    """Machine and versions."""
    versions = [f"Python {platform.python_version()}", f"pssm {pssm.__version__}"]
    for name in ("jax", "jaxlib", "numpy", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    threads = os.environ.get("OPENBLAS_NUM_THREADS")
    blas = f", OPENBLAS_NUM_THREADS={threads}" if threads else ""
    table.line(f"Machine: {os.cpu_count()} cores, {cpu}, {platform.system()}{load}{blas}.\n{', '.join(versions)}.\n")


def options(description: str | None) -> argparse.ArgumentParser:
    """The options all of these scripts share."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--out", type=Path, help="write the tables to this file too")
    return parser


PEERS = ("dynamax", "cuthbert", "dynestyx", "tfp-nightly", "statsmodels", "pykalman", "simdkalman")


def main() -> None:
    """Prints the tables."""
    parser = options(__doc__)
    parser.add_argument("--cases", help="state sizes, as in 1,4 (default: all)")
    parser.add_argument("--without", default="", help='libraries to leave out, as in "dynamax, parallel;pykalman"')
    args = parser.parse_args()
    in_jax, in_numpy = (
        {k: v for k, v in them.items() if k not in args.without.split(";")} for them in (IN_JAX, IN_NUMPY)
    )
    chosen = [int(n) for n in args.cases.split(",")] if args.cases else [case[0] for case in CASES]
    runs = 1 if args.quick else RUNS
    table = Table(args.out)
    print_machine(table, PEERS)
    table.line(table.HEAD)
    exact = with_pssm("sequential")
    for n, p, full in [case for case in CASES if case[0] in chosen]:
        steps = min(full, 20) if args.quick else full
        q, y = problem(n, p, steps)
        right: dict[int, list[Any]] = {}
        for x64 in (True, False):
            jax.config.update("jax_enable_x64", x64)
            kind = "float64" if x64 else "float32"
            where = f"{n}, {p}, {steps} {kind}"
            if x64:
                right = {length: reference(exact, q, y[:length]) for length in {steps, min(steps, LOOP_STEPS)}}
            rows = rows_in_jax(table, where, in_jax, q, y, runs)
            if x64:
                rows += rows_in_numpy(table, where, in_numpy, q, y, runs)
            base = next((row for row in rows if row.label == BASE), None)
            print_rows(table, f"{n}, {p}, {steps} | {kind}", rows, base, right)
            if x64 and base is not None and not (apart := error(0, base.entries[0], right[steps][0]) or 0) < 1e-6:
                table.note(f"{BASE} and pssm disagree in float64: relative error {apart:.0e}", where)
            jax.clear_caches()

    n, p, full = GAPS
    if n in chosen:
        table.line(f"\nWith gaps: a tenth of the entries missing at random, n = {n}, p = {p}.\n\n{table.HEAD}")
        steps = min(full, 20) if args.quick else full
        q, y = problem(n, p, steps)
        y[np.random.default_rng(0).uniform(size=y.shape) < 0.1] = np.nan
        jax.config.update("jax_enable_x64", True)
        right = {steps: reference(exact, q, y)}
        in_jax = {name: make for name, make in in_jax.items() if name in ("pssm", REFERENCE, "cuthbert")}
        in_numpy = {name: make for name, make in in_numpy.items() if name.startswith("statsmodels")}
        for x64 in (True, False):
            jax.config.update("jax_enable_x64", x64)
            kind = "float64" if x64 else "float32"
            where = f"gaps {kind}"
            rows = rows_in_jax(table, where, in_jax, q, y, runs)
            if x64:
                rows += rows_in_numpy(table, where, in_numpy, q, y, runs)
            print_rows(table, f"{n}, {p}, {steps} | {kind}", rows, None, right)
        table.note("dynamax and dynestyx's default back end give NaN for a missing entry", "with gaps")
        table.note("TFP (its mask), pykalman and simdkalman drop a whole time step for one missing entry", "with gaps")
    table.line("")
    table.print_notes()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # peers' deprecation warnings
    main()
