"""Trains and measures every experiment by every method; `make experiments` runs all of it and writes the page.

    python docs/experiments/run.py [--out results/experiments] [--experiments lds,pendulum] [--methods chain,dkf]
                                   [--data ../shared/data] [--seed 0] [--quick] [--force]

Each pair of experiment and method gives one file `EXPERIMENT.METHOD.json`, written when it is done; what is there is
not run again (`--force`: it is), so a run that was stopped goes on where it was. Data that are not in this repository
are read from `--data`; their experiments are left out, with a message, where they are absent.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from measure import DRAWS, Measures
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from systems import EXPERIMENTS, OWN, QUICK, Absent, Experiment, Size, exact_model_of, learned_parts, model_of

from pssm import nets
from pssm.guides import AmortizedStateSpace, DeepKalmanGuide
from pssm.infer import TraceConditionalKL_ELBO

METHODS = ("truth", "exact", "chain", "diagonal", "deep_kalman", "moment_matched", "moment_matched_causal")
MIXERS = ("chain_lstm", "chain_s5", "chain_attention")
MIXED = ("van_der_pol_poisson",)  # where the mixers are compared
# Widths at which the encoders have about as many weights as with a GRU of width 64.
WIDTHS = {"lstm": 58, "s5": 80, "attention": 52}
CHUNK = 50


def methods_of(name: str, e: Experiment) -> tuple[str, ...]:
    """The methods that go with an experiment."""
    without = {"truth"} if e.truth is None else set()
    without |= set() if name == "lds" else {"exact"}
    return (*(m for m in METHODS if m not in without), *(MIXERS if name in MIXED else ()))


def guide_of(method: str, e: Experiment, model: Callable[..., None], train: np.ndarray, size: Size, seed: int) -> Any:
    """The guide of a method; all have a perceptron on each step and a recurrent unit over them, of the same width."""
    n, p, width = e.n_state, train.shape[-1], size.width
    one, two, three, four = jax.random.split(jax.random.key(1000 * seed), 4)
    if method in ("chain", "diagonal", *MIXERS):
        mixer = method.partition("_")[2] or "gru"
        own = width if mixer == "gru" else max(4, 4 * round(WIDTHS[mixer] * width / 256))
        rank = 0 if method == "diagonal" else e.rank
        encoder = nets.sequence_encoder(p, n, rank, mixer=mixer, size=own, data=train, key=one)
        return AmortizedStateSpace(model, encoder=encoder, rank=rank, family="diagonal" if rank == 0 else "chain")
    front = nets.StepMLP(p, width, hidden=width, data=train, key=one)
    if method == "deep_kalman":
        encoder = nets.RecurrentFeatures(front, nets.GRU(width, width, key=two))
        return DeepKalmanGuide(model, encoder=encoder, combiner=nets.Combiner(n, width, key=three))
    local = nets.LocalEncoder(front, nets.PotentialHead(width, n, n, diagonal=False, key=two))
    head = nets.PotentialHead(width, n, n, diagonal=False, key=three)
    encoder = nets.SmoothingEncoder(local, nets.BackwardEncoder(nets.GRU(local.head.size, width, key=four), head))
    causal = method == "moment_matched_causal"
    rank = n if causal else 2 * n
    options = {"family": "moment_matched", "causal": causal, "num_samples": size.draws}
    return AmortizedStateSpace(model, encoder=encoder, rank=rank, **options)


def train(svi: SVI, y: jax.Array, new: jax.Array, size: Size, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters after training, and how it went; steps that are not finite are not taken, but counted.

    Minibatches are drawn here and not by a plate: there each path of the ELBO would have another one, and the encoder
    as many to read.
    """
    state = jax.jit(lambda y: svi.init(jax.random.key(1000 * seed + 1), y))(y[: size.batch])

    chunk = min(CHUNK, size.updates)

    def advance(state: Any, rows: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        return jax.lax.scan(lambda state, own: svi.stable_update(state, y[own]), state, rows)

    rng, rows = np.random.default_rng(5), []
    for _ in range(-(-size.updates // chunk)):
        rows.append(jnp.asarray(np.stack([rng.choice(len(y), size.batch, replace=False) for _ in range(chunk)])))
    begun = time.perf_counter()
    compiled = jax.jit(advance).lower(state, rows[0], y).compile()
    ready = time.perf_counter()
    losses = []
    for own in rows:
        state, found = compiled(state, own, y)
        losses.append(np.asarray(found))
    done = time.perf_counter()
    each = jnp.arange(4 * chunk * size.batch).reshape(4, chunk, size.batch) % len(new)  # all about equally often
    new = y.at[: len(new)].set(new)  # of the shape that the program takes
    scores = np.concatenate([np.asarray(compiled(state, own, new)[1]) for own in each]) / size.batch
    finite = np.isfinite(np.concatenate(losses))
    about = {
        "compile_seconds": ready - begun,
        "train_seconds": done - ready,
        "steps_not_finite": int((~finite).sum()),
        "bound": -float(scores.mean()),
        "losses": [float(np.mean(x)) / size.batch for x in losses],
    }
    return svi.get_params(state), about


def optimizer(size: Size) -> Any:
    schedule = optax.cosine_decay_schedule(size.rate, size.updates)
    return optax.chain(optax.clip_by_global_norm(300.0 * size.batch), optax.adam(schedule))


def count(params: dict[str, Any], part: str) -> int:
    """Numbers in the parameters whose names have `part` in them."""
    return sum(x.size for name, tree in params.items() if part in name for x in jax.tree.leaves(tree))


def run(name: str, method: str, e: Experiment, measures: Measures, size: Size, seed: int) -> dict[str, Any]:
    """One experiment by one method."""
    y = jnp.asarray(e.y)
    held = min(size.held, len(y) // 4)
    y, new = y[:-held], y[-held:]
    result: dict[str, Any] = {"experiment": name, "method": method, "title": e.title, "known": e.known}
    if method == "truth":
        parts, draw = e.truth, measures.draw_truth()
    elif method == "exact":
        svi = SVI(exact_model_of(e), lambda *args: None, optimizer(size), Trace_ELBO())
        params, about = train(svi, y, new, size, seed)
        parts = learned_parts(e, params)
        draw = measures.draw_exact(parts)
        result |= about | {"bound_kind": "exact"}
    else:
        model = model_of(e)
        guide = guide_of(method, e, model, np.asarray(y), size, seed)
        paths = 1 if method.startswith("moment_matched") else size.draws
        loss = TraceConditionalKL_ELBO(paths)
        svi = SVI(model, guide, optimizer(size), loss)
        params, about = train(svi, y, new, size, seed)
        parts = learned_parts(e, params)
        kind = "surrogate" if paths == 1 else "lower bound"
        result |= about | {"bound_kind": kind}
        result["encoder_weights"] = count(params, "encoder") + count(params, "combiner")
        draw = draws_of(guide, params)
    begun = time.perf_counter()
    result |= measures(draw, parts, y, new)
    result["measure_seconds"] = time.perf_counter() - begun
    return result


def draws_of(guide: Any, params: dict[str, Any]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The guide's posterior, compiled once for every shape of the data."""

    def one(key: jax.Array, params: dict[str, Any], y: jax.Array) -> jax.Array:
        with handlers.block(), handlers.seed(rng_seed=key), handlers.substitute(data=params):
            return guide(y)["z"]

    many = jax.jit(lambda keys, p, y: jax.lax.map(lambda key: one(key, p, y), keys, batch_size=8))
    return lambda key, y: many(jax.random.split(key, DRAWS), params, y)


def main() -> None:
    """Runs what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/experiments"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--experiments", default=",".join(EXPERIMENTS))
    parser.add_argument("--methods", default=",".join((*METHODS, *MIXERS)))
    parser.add_argument("--seed", type=int, default=0, help="of networks and draws; data and minibatches stay")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--force", action="store_true", help="run again what is there")
    args = parser.parse_args()
    chosen, methods = args.experiments.split(","), args.methods.split(",")
    for option, given, known in (("experiments", chosen, EXPERIMENTS), ("methods", methods, (*METHODS, *MIXERS))):
        if wrong := set(given) - set(known):
            parser.error(f"--{option}: {', '.join(sorted(wrong))} is none of {', '.join(known)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        size = QUICK if args.quick else Size()._replace(**OWN.get(name, {}))
        try:
            e = EXPERIMENTS[name](size, args.data)
        except Absent as absent:
            print(f"{name}: left out, {absent} (--data)", flush=True)
            continue
        measures = Measures(e, size)
        for method in methods_of(name, e):
            path = args.out / f"{name}.{method}.json"
            if method not in methods:
                continue
            if path.exists() and not args.force:
                print(f"{name}, {method}: there already", flush=True)
                continue
            begun = time.perf_counter()
            found = run(name, method, e, measures, size, args.seed)
            found |= {"seconds": time.perf_counter() - begun, "size": size._asdict(), "machine": machine()}
            whole = path.with_suffix(".part")
            whole.write_text(json.dumps(found, indent=1))
            whole.replace(path)
            keys = ("bound", "evidence", "state_r2", "radius", "q", "steps_not_finite")
            line = {k: np.round(found[k], 4).tolist() for k in keys if k in found}
            print(f"{name}, {method}: {found['seconds']:.0f} s, {line}", flush=True)
        jax.clear_caches()


def machine() -> dict[str, Any]:
    """Versions, cores, the load at the end, and whether compiled programs may have come from a cache."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpyro": numpyro.__version__,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "compilation_cache": "JAX_COMPILATION_CACHE_DIR" in os.environ,
    }


if __name__ == "__main__":
    main()
