"""What a true bound and the published surrogate make of the parameters of a linear-Gaussian model.

    python docs/benchmarks/parameter_learning.py [--figure docs/images/parameter_learning.png]

20 trials of 60 steps, 2 states, 3 channels: `A` is a rotation times `a`, `Q = q I`, `R = r I`. `q`, `r` and `a` are
fitted by the exact marginal likelihood, by the chain bound (potentials trained, or recomputed at the mode) and by the
published moment-matched objective. Prints a table in Markdown, then the objective beside the exact log evidence along
the training.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.distributions import constraints
from numpyro.infer import SVI
from numpyro.infer.svi import SVIRunResult
from scipy.optimize import minimize

import pssm
from pssm.distributions import StatePath, observe
from pssm.guides import AutoStateSpace
from pssm.infer import SVIFit, TraceConditionalKL_ELBO, elbo

jax.config.update("jax_enable_x64", True)

TRIALS, STEPS, STATES, CHANNELS = 20, 60, 2, 3
CASES = {"q = 0.1, r = 1": (0.1, 1.0, 0.97), "q = r = 0.1": (0.1, 0.1, 0.97)}
START = (0.3, 0.5, 0.8)
ANGLE = 0.3
ROTATION = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
C = np.random.default_rng(3).normal(size=(CHANNELS, STATES))
METHODS = {  # label: guide options, steps of Adam, first step size
    "chain, trained potentials": ({"family": "chain"}, 2000, 0.02),
    "chain, potentials at the mode": ({"family": "chain", "potentials": "mode"}, 600, 0.02),
    "moment-matched surrogate": ({"family": "moment_matched", "num_samples": 25}, 1500, 0.03),
}


def ssm_of(q: Any, r: Any, a: Any) -> pssm.LinearGaussianSSM:
    """The model with these parameters."""
    eye, channels = jnp.eye(STATES), jnp.eye(CHANNELS)
    return pssm.LinearGaussianSSM(
        jnp.zeros(STATES), eye, a * ROTATION, jnp.sqrt(q) * eye, jnp.asarray(C), jnp.sqrt(r) * channels
    )


def model(y: jax.Array) -> None:
    """The same as a NumPyro model; the parameters are optimised, not sampled."""
    q = numpyro.param("q", START[0], constraint=constraints.positive)
    r = numpyro.param("r", START[1], constraint=constraints.positive)
    a = jnp.asarray(numpyro.param("a", START[2]))
    ssm = ssm_of(q, r, a)
    with numpyro.plate("trials", TRIALS):
        z = numpyro.sample("z", StatePath.from_ssm(ssm, STEPS))
        observe("y", dist.Normal(z @ C.T, jnp.sqrt(r)).to_event(2), y)


def exact(q: Any, r: Any, a: Any, y: jax.Array) -> jax.Array:
    """Exact log evidence of all trials."""
    return jax.vmap(lambda rows: pssm.log_likelihood(ssm_of(q, r, a), rows))(y).sum()


def maximum_likelihood(y: jax.Array) -> np.ndarray:
    """`(q, r, a)` at the maximum of the exact log evidence."""

    @jax.jit
    def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(lambda v: -exact(jnp.exp(v[0]), jnp.exp(v[1]), v[2], y))(x)

    def call(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = loss(x)
        return float(value), np.asarray(slope)

    start = np.array([np.log(START[0]), np.log(START[1]), START[2]])
    x = minimize(call, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-13, "gtol": 1e-7}).x
    return np.array([np.exp(x[0]), np.exp(x[1]), x[2]])


def train(y: jax.Array, options: dict[str, Any], num_steps: int, rate: float) -> dict[str, np.ndarray]:
    """Adam with a cosine schedule; `(q, r, a)` and the objective at every step. The fit is the last tenth's mean."""
    guide = AutoStateSpace(model, rank=STATES, **options)
    particles = 1 if guide.family == "moment_matched" else 4
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps, alpha=0.01))
    svi = SVI(model, guide, optimizer, TraceConditionalKL_ELBO(particles))
    state = svi.init(jax.random.key(0), y)

    def step(state: Any, _: None) -> tuple[Any, tuple]:
        now = svi.get_params(state)
        state, loss = svi.update(state, y)
        return state, (now["q"], now["r"], now["a"], -loss)

    run: Callable = jax.jit(lambda s: jax.lax.scan(step, s, None, length=num_steps))
    compiled = run.lower(state).compile()
    start = time.perf_counter()
    state, (q, r, a, objective) = jax.block_until_ready(compiled(state))
    seconds = time.perf_counter() - start
    path, last = np.stack([q, r, a], axis=1), num_steps // 10
    if guide.family == "moment_matched":
        final, error = float(np.mean(objective[-last:])), float(np.std(objective[-last:]) / np.sqrt(last))
    else:
        final, error = elbo(
            SVIFit.of(svi, SVIRunResult(svi.get_params(state), state, -objective), y), num_particles=200
        )
    return {
        "path": path,
        "fit": path[-last:].mean(0),
        "objective": np.asarray(objective),
        "final": final,
        "error": error,
        "seconds": seconds,
        "kind": guide.objective.split(":")[0].split(" on")[0],
    }


def study(truth: tuple[float, float, float], seed: int) -> dict[str, Any]:
    """Data, the maximum-likelihood fit and the trained ones."""
    keys = jax.random.split(jax.random.key(seed), TRIALS)
    y = jax.vmap(lambda k: pssm.simulate(k, ssm_of(*truth), STEPS)[1])(keys)
    best = maximum_likelihood(y)
    evidence = jax.jit(lambda p: exact(p[0], p[1], p[2], y))
    found: dict[str, Any] = {"truth": np.array(truth), "mle": best, "mle_evidence": float(evidence(best)), "fits": {}}
    found["true_evidence"] = float(evidence(np.array(truth)))
    for label, (options, num_steps, rate) in METHODS.items():
        fit = train(y, options, num_steps, rate)
        print(label, fit["fit"], fit["seconds"], file=sys.stderr, flush=True)
        fit["evidence"] = float(evidence(fit["fit"]))
        every = max(num_steps // 200, 1)
        fit["every"] = every
        fit["evidence_path"] = np.array([float(evidence(p)) for p in fit["path"][::every]])
        found["fits"][label] = fit
    return found


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Rows in Markdown."""
    lines = [
        "| data | method | q | r | spectral radius a | exact log evidence there | objective at the end | run s |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def row(case: str, label: str, p: np.ndarray, evidence: float, objective: str, seconds: str) -> str:
        return f"| {case} | {label} | {p[0]:.4f} | {p[1]:.4f} | {p[2]:.4f} | {evidence:.1f} | {objective} | {seconds} |"

    for case, s in found.items():
        lines.append(row(case, "(truth)", s["truth"], s["true_evidence"], "", ""))
        lines.append(row(case, "exact marginal likelihood", s["mle"], s["mle_evidence"], "", ""))
        for label, f in s["fits"].items():
            objective = f"{f['final']:.1f} ± {f['error']:.1f} ({f['kind']})"
            lines.append(row(case, label, f["fit"], f["evidence"], objective, f"{f['seconds']:.1f}"))
    return lines


def figure(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Fitted q and spectral radius by method, and the surrogate beside the exact log evidence along the training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    case, s = next(iter(found.items()))
    colours = dict(zip(METHODS, ("#1b6ca8", "#4aa564", "#c8452f"), strict=True))
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.4), width_ratios=(1, 1, 1.5), layout="constrained")
    for ax, i, name in ((axes[0], 0, "q (transition variance)"), (axes[1], 2, "a (spectral radius)")):
        for label, f in s["fits"].items():
            steps = np.arange(len(f["path"])) / len(f["path"])
            window = len(steps) // 50
            smooth = np.convolve(f["path"][:, i], np.ones(window) / window, mode="valid")
            ax.plot(steps[: len(smooth)], smooth, color=colours[label], label=label)
        ax.axhline(s["mle"][i], color="black", linestyle="--", linewidth=1, label="maximum likelihood")
        ax.axhline(s["truth"][i], color="black", linestyle=":", linewidth=1, label="truth")
        ax.set(title=name, xlabel="part of the training")
    axes[0].set_yscale("log")
    axes[0].set_yticks([0.03, 0.1, 0.3], ["0.03", "0.1", "0.3"])
    axes[0].minorticks_off()
    axes[1].set_ylim(0.94, 1.005)
    top = s["mle_evidence"]
    for label in ("chain, trained potentials", "moment-matched surrogate"):
        f = s["fits"][label]
        window = len(f["objective"]) // 50
        smooth = np.convolve(f["objective"], np.ones(window) / window, mode="valid")
        at = np.arange(len(f["objective"])) / len(f["objective"])
        axes[2].plot(at[window // 2 : window // 2 + len(smooth)], smooth - top, color=colours[label])
        axes[2].plot(at[:: f["every"]], f["evidence_path"] - top, color=colours[label], linestyle="--")
    axes[2].axhline(0.0, color="black", linewidth=0.8)
    axes[2].set(title="nats above the best log evidence", xlabel="part of the training")
    axes[2].set_ylim(-350, None)
    lines = [plt.Line2D([], [], color="grey", linestyle=style) for style in ("-", "--")]
    axes[2].legend(lines, ["objective", "exact log evidence\nat the same parameters"], loc="lower right", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    path.parent.mkdir(exist_ok=True)
    fig.savefig(path, dpi=110)
    print(f"\n{path} ({path.stat().st_size // 1000} kB), data {case}")


def main() -> None:
    """Prints the table, then draws the figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    versions = f"jax {jax.__version__}, numpyro {numpyro.__version__}, pssm {pssm.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {versions}, float64, seed {args.seed}\n", flush=True)
    found = {case: study(truth, args.seed) for case, truth in CASES.items()}
    print("\n".join(table(found)))
    if args.figure:
        figure(found, args.figure)


if __name__ == "__main__":
    main()
