"""NUTS on the parameters of small state-space models: smallest bulk ESS per second, with states integrated out or not.

    python docs/benchmarks/ess.py [--quick] [--out FILE]

Three models with the same priors for every library: a local level on the Nile series, a local linear trend and an
AR(1) with noise on simulated series of 500 steps. The likelihood is pssm's `LinearGaussianMarginal`, dynamax's filter
in `numpyro.factor`, dynestyx's exact filter under its own handler, or none: non-centred states are sampled too. NUTS of
NumPyro in float64, 4 chains one after the other, 500 steps of warm-up and 500 draws. Seconds are those of warm-up and
draws, without initialising and compiling. ESS and R-hat are the worst over the parameters; sampled states do not count.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from filter import Arrays, Table, options, print_machine, square
from numpyro.infer import NUTS
from numpyro.infer.util import constrain_fn

import pssm
from pssm.distributions import LinearGaussianMarginal

CHAINS, WARMUP, DRAWS, STEPS = 4, 500, 500, 500

# Models: priors of the parameters, and the arrays they make --------------------------------------------------------


def local_level() -> Arrays:
    """A random walk seen with noise, in units of the series' standard deviation."""
    s_level = numpyro.sample("s_level", dist.HalfNormal(1.0))
    s_obs = numpyro.sample("s_obs", dist.HalfNormal(1.0))
    one = jnp.eye(1)
    return arrays(jnp.zeros(1), 3.0 * one, one, s_level * one, one, s_obs * one)


def linear_trend() -> Arrays:
    """A level with a slope, both random walks, seen with noise."""
    s_level = numpyro.sample("s_level", dist.HalfNormal(1.0))
    s_slope = numpyro.sample("s_slope", dist.HalfNormal(0.2))
    s_obs = numpyro.sample("s_obs", dist.HalfNormal(2.0))
    A, C = jnp.array([[1.0, 1.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0]])
    return arrays(jnp.zeros(2), jnp.eye(2), A, jnp.diag(jnp.stack([s_level, s_slope])), C, s_obs * jnp.eye(1))


def noisy_ar1() -> Arrays:
    """A stationary AR(1) seen with noise."""
    phi = numpyro.sample("phi", dist.Uniform(-1.0, 1.0))
    s_state = numpyro.sample("s_state", dist.HalfNormal(1.0))
    s_obs = numpyro.sample("s_obs", dist.HalfNormal(1.0))
    one = jnp.eye(1)
    return arrays(jnp.zeros(1), s_state / jnp.sqrt(1 - phi**2) * one, phi * one, s_state * one, one, s_obs * one)


def arrays(m0: Any, chol_P0: Any, A: Any, chol_Q: Any, C: Any, chol_R: Any) -> Arrays:
    """The arrays by name."""
    return {"m0": m0, "chol_P0": chol_P0, "A": A, "chol_Q": chol_Q, "C": C, "chol_R": chol_R}


def simulated(model: Callable[[], Arrays], steps: int, **parameters: float) -> np.ndarray:
    """A series from a model with these parameters."""
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.substitute(data=parameters):
        ssm = pssm.LinearGaussianSSM(**model())
    return np.asarray(pssm.simulate(jax.random.key(1), ssm, steps)[1])


def problems(steps: int) -> dict[str, tuple[Callable[[], Arrays], np.ndarray]]:
    """Names, models and series."""
    nile = pssm.datasets.load("nile").y[:steps]
    trend = simulated(linear_trend, steps, s_level=0.5, s_slope=0.05, s_obs=1.0)
    ar1 = simulated(noisy_ar1, steps, phi=0.9, s_state=0.5, s_obs=0.5)
    return {
        f"local level, Nile, T = {len(nile)}": (local_level, (nile - nile.mean()) / nile.std()),
        f"local linear trend, T = {steps}": (linear_trend, trend),
        f"AR(1) with noise, T = {steps}": (noisy_ar1, ar1),
    }


# Likelihoods ------------------------------------------------------------------------------------------------------


def with_pssm(q: Arrays, y: Any) -> None:
    """pssm's distribution of the series."""
    numpyro.sample("y", LinearGaussianMarginal(pssm.LinearGaussianSSM(**q), len(y)), obs=y)


def with_dynamax(q: Arrays, y: Any) -> None:
    """dynamax's sequential filter."""
    from dynamax.linear_gaussian_ssm.inference import lgssm_filter, make_lgssm_params

    cov = {name: square(q[f"chol_{name}"]) for name in ("P0", "Q", "R")}
    params = make_lgssm_params(q["m0"], cov["P0"], q["A"], cov["Q"], q["C"], cov["R"])
    numpyro.factor("y", lgssm_filter(params, y).marginal_loglik)


def with_dynestyx(q: Arrays, y: Any) -> None:
    """dynestyx's exact filter under its handler, with nothing recorded."""
    import dynestyx as dsx
    from dynestyx.inference.configs.filter import KFConfig

    cov = {name: square(q[f"chol_{name}"]) for name in ("P0", "Q", "R")}
    model = dsx.LTI_discrete(q["A"], cov["Q"], q["C"], cov["R"], initial_mean=q["m0"], initial_cov=cov["P0"])
    quiet = {f"record_filtered_states_{what}": False for what in ("mean", "cov", "cov_diag", "chol_cov")}
    quiet |= {f"record_predicted_observations_{what}": False for what in ("mean", "cov")}
    with dsx.Filter(filter_config=KFConfig(**quiet)):
        dsx.sample("y", model, obs_times=jnp.arange(float(len(y))), obs_values=y)


def with_states(q: Arrays, y: Any) -> None:
    """Non-centred states, sampled with the parameters. The series has one variable."""
    noise = numpyro.sample("noise", dist.Normal().expand((len(y), len(q["m0"]))).to_event(2))

    def step(z: Any, e: Any) -> tuple[Any, Any]:
        z = q["A"] @ z + q["chol_Q"] @ e
        return z, z

    first = q["m0"] + q["chol_P0"] @ noise[0]
    _, rest = jax.lax.scan(step, first, noise[1:])
    z = jnp.concatenate([first[None], rest])
    numpyro.sample("y", dist.Normal(z @ q["C"].T, q["chol_R"][0, 0]).to_event(2), obs=y)


LIKELIHOODS = {
    "pssm": with_pssm,
    "dynamax": with_dynamax,
    "dynestyx": with_dynestyx,
    "states sampled": with_states,
}

# Sampling --------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What a timed run of NUTS gave. Seconds and leapfrog steps include the warm-up, not initialising and compiling."""

    compiling: float
    seconds: float
    leapfrogs: int
    ess: float
    rhat: float
    means: dict[str, float]


def nuts(prior: Callable[[], Arrays], likelihood: Callable[[Arrays, Any], None], y: Any, size: tuple[int, ...]) -> Run:
    """Runs the chains one after the other, as one compiled program each.

    `MCMC.run` would initialise every chain anew, which traces and compiles the model each time: seconds, beside which
    the sampling of a fast likelihood cannot be seen.
    """
    chains, warmup, draws = size
    names = list(numpyro.handlers.trace(numpyro.handlers.seed(prior, 0)).get_trace())
    kernel = NUTS(lambda series: likelihood(prior(), series))
    starts = [kernel.init(jax.random.key(seed), warmup, None, (y,), {}) for seed in range(chains)]

    def chain(state: Any, series: Any) -> tuple[Any, dict[str, Any]]:
        def step(state: Any, _: None) -> tuple[Any, tuple[Any, dict[str, Any]]]:
            state = kernel.sample(state, (series,), {})
            return state, (state.num_steps, {name: state.z[name] for name in names})

        _, (leapfrogs, z) = jax.lax.scan(step, state, length=warmup + draws)
        return leapfrogs.sum(), {name: x[warmup:] for name, x in z.items()}

    start = time.perf_counter()
    program = jax.jit(chain).lower(starts[0], y).compile()
    compiling = time.perf_counter() - start
    start = time.perf_counter()
    results = [jax.block_until_ready(program(state, y)) for state in starts]
    seconds = time.perf_counter() - start
    z = {name: jnp.stack([draws[name] for _, draws in results]) for name in names}
    samples = jax.vmap(jax.vmap(lambda one: constrain_fn(prior, (), {}, one)))(z)
    ess = min(float(az.ess(np.asarray(x), method="bulk")) for x in samples.values())
    rhat = max(float(az.rhat(np.asarray(x))) for x in samples.values())
    means = {name: float(x.mean()) for name, x in samples.items()}
    return Run(compiling, seconds, sum(int(steps) for steps, _ in results), ess, rhat, means)


def main() -> None:
    """Prints the table."""
    args = options(__doc__).parse_args()
    size, steps = ((2, 50, 50), 20) if args.quick else ((CHAINS, WARMUP, DRAWS), STEPS)
    jax.config.update("jax_enable_x64", True)
    table = Table(args.out)
    print_machine(table, ("numpyro", "arviz", "dynamax", "dynestyx"))
    columns = ["model", "likelihood", "ESS/s", "seconds", "us/leapfrog step", "ESS min", "R-hat max", "compile s"]
    table.line(f"| {' | '.join(columns)} | ratio pssm / this |\n|{'---|' * (len(columns) + 1)}")
    for name, (prior, series) in problems(steps).items():
        runs: dict[str, Run] = {}
        for label, likelihood in LIKELIHOODS.items():
            with table.attempt(label, name):
                run = runs[label] = nuts(prior, likelihood, jnp.asarray(series), size)
                rate = run.ess / run.seconds
                ratio = f"{runs['pssm'].ess / runs['pssm'].seconds / rate:.1f}" if "pssm" in runs else "-"
                table.line(
                    f"| {name} | {label} | {rate:.0f} | {run.seconds:.2f} | {run.seconds / run.leapfrogs * 1e6:.1f} | "
                    f"{run.ess:.0f} | {run.rhat:.3f} | {run.compiling:.1f} | {ratio} |"
                )
                print({parameter: round(mean, 3) for parameter, mean in run.means.items()}, file=sys.stderr)
            jax.clear_caches()
    table.line("")
    table.print_notes()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # peers' deprecation warnings
    main()
