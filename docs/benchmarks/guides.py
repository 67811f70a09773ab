"""The structured guides beside NumPyro's automatic ones, with long NUTS and a guided particle filter as the references.

    python docs/benchmarks/guides.py [poisson] [volatility]

Two models. Counts of 20 Poisson channels driven by a linear state of size 3, T = 200, parameters known. Stochastic
volatility, T = 500, three parameters learned with the states. For every guide: the ELBO, the importance bound, seconds
(start, compile, train), seconds of training until the objective stays within 1 nat of its final value, the error of
the states' means in posterior standard deviations (root mean square, against NUTS), the ratio of standard deviations
and k-hat. Prints tables in Markdown, and their progress on stderr.
"""

import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO, init_to_median
from numpyro.infer.autoguide import (
    AutoDAIS,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.infer.svi import SVIRunResult

import pssm
from pssm.diagnostics import khat
from pssm.distributions import NonCenteredPath, StatePath, observe
from pssm.guides import AutoStateSpace
from pssm.infer import SVIFit, TraceConditionalKL_ELBO, elbo, fit_nuts, importance_bound, posterior_draws

jax.config.update("jax_enable_x64", True)

Guide = Callable[[Callable[..., Any]], Any]


def state_space(rank: int, parameters: Any = AutoMultivariateNormal, **options: Any) -> Guide:
    """An AutoStateSpace with this rank."""
    return lambda model: AutoStateSpace(
        model, rank=rank, global_guide=lambda m, **kw: parameters(m, **kw, init_scale=0.1), **options
    )


def automatic(cls: Any, *, non_centred: bool = False, **options: Any) -> Guide:
    """A NumPyro guide with pssm's start."""
    own = {} if cls is AutoDAIS else {"init_scale": 0.1}

    def make(model: Callable[..., Any]) -> Any:
        return cls(model, init_loc_fn=init_to_median(num_samples=50), **own, **options)

    make.non_centred = non_centred  # pyright: ignore[reportFunctionMemberAccess]
    return make


# ---------------------------------------------------------------------------------------------------------------------


def poisson_model() -> tuple[Callable[..., Any], np.ndarray]:
    """20 Poisson channels, a state of size 3, 200 steps, no unknown parameters."""
    n, p, steps = 3, 20, 200
    rng = np.random.default_rng(0)
    A = 0.97 * np.linalg.qr(rng.normal(size=(n, n)))[0]
    C = rng.normal(size=(p, n)) / np.sqrt(n)

    def model(counts: Any = None) -> None:
        z = numpyro.sample("z", StatePath(jnp.zeros(n), jnp.eye(n), A, 0.3 * jnp.eye(n), steps))
        observe("counts", dist.Poisson(jnp.exp(z @ C.T - 1.0)).to_event(2), counts)

    return model, simulated(model, "counts", seed=1)


def volatility_model() -> tuple[Callable[..., Any], np.ndarray]:
    """Stochastic volatility: log variance `mu + z_t`, `z_t = phi z_{t-1} + sigma e_t`, 500 returns."""
    steps = 500

    def model(y: Any = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(-1.0, 1.0))
        phi = numpyro.sample("phi", dist.Beta(20.0, 1.5))
        sigma = numpyro.sample("sigma", dist.LogNormal(-1.5, 0.7))
        start = sigma / jnp.sqrt(1.0 - phi**2)
        one = jnp.eye(1)
        z = numpyro.sample("z", StatePath(jnp.zeros(1), start * one, phi * one, sigma * one, steps))
        observe("y", dist.Normal(0.0, jnp.exp(0.5 * (mu + z))).to_event(2), y)

    truth = {"mu": jnp.array(-1.0), "phi": jnp.array(0.97), "sigma": jnp.array(0.2)}
    return model, simulated(numpyro.handlers.substitute(model, data=truth), "y", seed=2)


def simulated(model: Callable[..., Any], name: str, seed: int) -> np.ndarray:
    """Data drawn from the model."""
    seeded = numpyro.handlers.seed(model, jax.random.key(seed))
    return np.asarray(numpyro.handlers.trace(seeded).get_trace()[name]["value"], dtype=float)


# ---------------------------------------------------------------------------------------------------------------------


def reference(model: Callable[..., Any], y: np.ndarray, non_centred: bool) -> dict[str, Any]:
    """Means and standard deviations of every latent site from NUTS, and the error of the means."""
    if non_centred:
        model = numpyro.handlers.reparam(model, config={"z": NonCenteredPath()})
    start = time.perf_counter()
    target = 0.95 if non_centred else 0.8
    options: dict[str, Any] = {"num_warmup": 1000, "num_samples": 2500, "num_chains": 2, "target_accept_prob": target}
    mcmc = fit_nuts(model, y, progress_bar=False, **options)
    seconds = time.perf_counter() - start
    draws = {n: x for n, x in posterior_draws(mcmc).items() if not n.endswith("_base")}
    found: dict[str, Any] = {"seconds": seconds}
    for name, x in draws.items():
        ess = az.ess(x.reshape(*x.shape[:2], -1).astype(float))
        ess = np.asarray(ess["x"] if hasattr(ess, "keys") else ess)
        found[name] = {"mean": x.mean((0, 1)), "sd": x.std((0, 1)), "ess": ess}
    return found


def against(reference: dict[str, Any], draws: dict[str, np.ndarray], names: list[str]) -> tuple[float, float]:
    """Root mean square error of the means in posterior sd, and the mean ratio of sd, over the named sites."""
    errors, ratios = [], []
    for name in names:
        x, truth = draws[name], reference[name]
        errors.append(np.ravel((x.mean((0, 1)) - truth["mean"]) / truth["sd"]))
        ratios.append(np.ravel(x.std((0, 1)) / truth["sd"]))
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2))), float(np.mean(np.concatenate(ratios)))


def train(
    model: Callable[..., Any], y: np.ndarray, make: Guide, num_steps: int, rate: float
) -> tuple[SVIFit, dict[str, float]]:
    """What `fit_svi` does, with the start, the compilation and the steps timed apart."""
    if getattr(make, "non_centred", False):
        model = numpyro.handlers.reparam(model, config={"z": NonCenteredPath()})
    guide = make(model)
    if not isinstance(guide, AutoStateSpace):
        loss: Any = Trace_ELBO(num_particles=8)
    else:
        loss = TraceConditionalKL_ELBO(1 if guide.family == "moment_matched" else 8)
    schedule = optax.cosine_decay_schedule(rate, num_steps, alpha=0.01)
    svi = SVI(model, guide, optax.chain(optax.clip_by_global_norm(100.0), optax.adam(schedule)), loss)
    start = time.perf_counter()
    state = jax.block_until_ready(svi.init(jax.random.key(0), y))
    began = time.perf_counter() - start
    start = time.perf_counter()
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: svi.update(s, y), s, None, length=num_steps))
    compiled = run.lower(state).compile()
    compiling = time.perf_counter() - start
    start = time.perf_counter()
    state, losses = jax.block_until_ready(compiled(state))
    seconds = time.perf_counter() - start
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"the loss is not finite from step {np.argmin(np.isfinite(losses))} on")
    fit = SVIFit.of(svi, SVIRunResult(svi.get_params(state), state, losses), y)
    times = {"start": began, "compile": compiling, "run": seconds, "near": arrival(np.asarray(losses)) * seconds}
    return fit, times


def arrival(losses: np.ndarray, window: int = 50) -> float:
    """Part of the run after which the mean loss of blocks of `window` stays within 1 nat (and noise) of the end's."""
    blocks = losses[: len(losses) // window * window].reshape(-1, window)
    final = losses[-len(losses) // 10 :]
    noise = 2 * blocks.std(axis=1) / np.sqrt(window)
    far = np.abs(blocks.mean(1) - final.mean()) > 1.0 + noise
    return float((np.flatnonzero(far).max() + 1) / len(blocks)) if far.any() else 0.0


HEAD = (
    "| guide | ELBO | importance bound (20 000 draws) | start, compile, train s | s to 1 nat | "
    "error of state means, sd | sd ratio | k-hat |"
)


def row(label: str, model: Any, y: np.ndarray, ref: dict[str, Any], spec: tuple, parameters: list[str]) -> str:
    """Fits one guide and describes it."""
    make, num_steps, rate = spec
    fit, times = train(model, y, make, num_steps, rate)
    if fit.surrogate:
        tail = -np.asarray(fit.losses)[-num_steps // 10 :]
        value = f"{tail.mean():.2f} (surrogate)"
        tight, shape, count = "–", "–", 500
    else:
        mean, error = elbo(fit, num_particles=4000)
        value = f"{mean:.2f} ± {error:.2f}"
        bound = importance_bound(fit, num_particles=20_000)
        tight, shape, count = f"{bound.value:.2f}", f"{khat(fit, num_particles=2000):.2f}", 4000
    draws = posterior_draws(fit, num_samples=count)
    error, ratio = against(ref, draws, ["z"])
    cells = [label, value, tight, f"{times['start']:.0f}, {times['compile']:.0f}, {times['run']:.0f}"]
    cells += [f"{times['near']:.1f}", f"{error:.3f}", f"{ratio:.3f}", shape]
    if parameters:
        error, ratio = against(ref, draws, parameters)
        cells += [f"{error:.2f}", f"{ratio:.2f}"]
    return "| " + " | ".join(cells) + " |"


def study(name: str, model: Any, y: np.ndarray, guides: dict[str, tuple], parameters: list[str], guided: tuple) -> None:
    """The table of one model."""
    began = time.perf_counter()
    ref = reference(model, y, non_centred=bool(parameters))
    z = ref["z"]
    print(f"\n## {name}\n")
    print(
        f"NUTS: 2 chains of 2500 draws after 1000, {ref['seconds']:.0f} s; smallest effective sample size of a state "
        f"{z['ess'].min():.0f}, so its means are known to {np.sqrt(np.mean(1 / z['ess'])):.3f} sd (rms)."
    )
    for parameter in parameters:
        p = ref[parameter]
        print(
            f"`{parameter}`: {p['mean']:.3f} ± {p['sd']:.3f} (effective sample size {np.ravel(p['ess'])[0]:.0f}).",
            flush=True,
        )
    label, options = guided
    fit, _ = train(model, y, *guides[label])
    bounds = [importance_bound(fit, key=key, **options) for key in range(1 if parameters else 5)]
    values = ", ".join(f"{b.value:.2f}" for b in bounds)
    error = f" ± {bounds[0].standard_error:.2f}" if parameters else ""
    print(f"\nEvidence: {values}{error}, {bounds[0].kind}, guide '{label}'.\n", flush=True)
    extra = " error of parameters' means, sd | sd ratio of parameters |" if parameters else ""
    print(HEAD + extra)
    print("|---" * (8 + 2 * bool(parameters)) + "|")
    for label, spec in guides.items():
        start = time.perf_counter()
        try:
            line = row(label, model, y, ref, spec, parameters)
        except Exception as error:  # noqa: BLE001  one guide that fails is a line of the table
            traceback.print_exc()
            line = f"| {label} | {type(error).__name__}: {str(error)[:100]} |"
        print(line, flush=True)
        print(f"{label}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s in all.", flush=True)


def poisson() -> None:
    """Counts, parameters known."""
    model, y = poisson_model()
    guides = {
        "chain, rank 3 (= n)": (state_space(3), 1500, 0.01),
        "chain, rank 3, at the mode": (state_space(3, potentials="mode"), 10, 0.01),
        "chain, diagonal + rank 2": (state_space(2), 1500, 0.01),
        "chain, diagonal + rank 1": (state_space(1), 1500, 0.01),
        "chain, rank 2 alone": (state_space(2, diagonal=False), 1500, 0.01),
        "chain, rank 1 alone": (state_space(1, diagonal=False), 1500, 0.01),
        "diagonal": (state_space(0, family="diagonal"), 1500, 0.01),
        "moment-matched, rank 3": (state_space(3, family="moment_matched"), 1000, 0.01),
        "AutoNormal": (automatic(AutoNormal), 4000, 0.02),
        "AutoMultivariateNormal": (automatic(AutoMultivariateNormal), 4000, 0.01),
        "AutoMultivariateNormal, non-centred": (automatic(AutoMultivariateNormal, non_centred=True), 2500, 0.01),
        "AutoLowRankMultivariateNormal, rank 10": (automatic(AutoLowRankMultivariateNormal, rank=10), 4000, 0.01),
        "AutoDAIS, K = 4": (automatic(AutoDAIS, K=4), 2000, 0.01),
    }
    options = {"resample_every": 10, "num_particles": 4000}
    study("Poisson counts (n = 3, p = 20, T = 200)", model, y, guides, [], ("chain, rank 3 (= n)", options))


def volatility() -> None:
    """Stochastic volatility, parameters learned."""
    model, y = volatility_model()
    guides = {
        "chain, parameters AutoMultivariateNormal": (state_space(1), 3000, 0.02),
        "chain, parameters AutoNormal": (state_space(1, AutoNormal), 3000, 0.02),
        "chain at the mode, parameters AutoMultivariateNormal": (state_space(1, potentials="mode"), 800, 0.01),
        "chain at the mode, parameters AutoNormal": (state_space(1, AutoNormal, potentials="mode"), 800, 0.01),
        "moment-matched, parameters AutoMultivariateNormal": (state_space(1, family="moment_matched"), 1500, 0.02),
        "AutoNormal": (automatic(AutoNormal), 4000, 0.02),
        "AutoMultivariateNormal, non-centred": (automatic(AutoMultivariateNormal, non_centred=True), 2500, 0.01),
        "AutoLowRankMultivariateNormal, rank 10": (automatic(AutoLowRankMultivariateNormal, rank=10), 4000, 0.01),
        "AutoDAIS, K = 4": (automatic(AutoDAIS, K=4), 2000, 0.01),
        "AutoNormal, non-centred": (automatic(AutoNormal, non_centred=True), 4000, 0.02),
        "AutoMultivariateNormal": (automatic(AutoMultivariateNormal), 4000, 0.01),
    }
    options = {"resample_every": 20, "num_particles": 200, "num_outer": 100}
    name = "chain, parameters AutoMultivariateNormal"
    study("Stochastic volatility (T = 500)", model, y, guides, ["mu", "phi", "sigma"], (name, options))


def main() -> None:
    """Prints the tables."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    versions = f"jax {jax.__version__}, numpyro {numpyro.__version__}, pssm {pssm.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}, float64", flush=True)
    chosen = sys.argv[1:] or ["poisson", "volatility"]
    for name in chosen:
        {"poisson": poisson, "volatility": volatility}[name]()


if __name__ == "__main__":
    main()
