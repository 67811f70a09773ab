"""The exact filter of two checkouts, side by side: is a change slower?

    python docs/benchmarks/pair.py OLD NEW [--rounds 2] [--out FILE.json]

OLD and NEW are folders with a `pssm` in them (`git worktree add ../old COMMIT`). The two take turns, each time in a new
process; of all runs the least time counts, which other work on the machine disturbs least. Prints microseconds a step,
seconds of compiling (processor time), and the geometric means of the ratios.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

# Sizes of state and observation, steps, and whether one entry of ten is missing.
CASES = [
    (1, 1, 20_000, False),
    (2, 1, 10_000, False),
    (4, 2, 5_000, False),
    (8, 4, 3_000, False),
    (16, 8, 1_000, False),
    (4, 2, 3_000, True),
    (16, 8, 500, True),
]


def measure() -> dict[str, tuple[float, float]]:
    """Microseconds a step and seconds of compiling, by case."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import pssm

    jax.config.update("jax_enable_x64", True)
    found = {}
    for n, p, steps, gaps in CASES:
        rng = np.random.default_rng(0)
        A, C = 0.9 * np.linalg.qr(rng.normal(size=(n, n)))[0], rng.normal(size=(p, n))
        y = rng.normal(size=(steps, p))
        y[rng.random(y.shape) < 0.1 * gaps] = np.nan
        for dtype in ("float32", "float64"):
            eye = np.eye(n)
            arrays = (jnp.asarray(x, dtype) for x in (np.zeros(n), eye, A, 0.3 * eye, C, 0.5 * np.eye(p)))
            ssm, series = pssm.LinearGaussianSSM(*arrays), jnp.asarray(y, dtype)
            for name, function in (
                ("value", pssm.log_likelihood),
                ("gradient", jax.value_and_grad(pssm.log_likelihood)),
                ("smoother", lambda s, y: pssm.kalman_smoother(s, y)[:2]),
            ):
                begun = time.process_time()
                compiled = jax.jit(function).lower(ssm, series).compile()
                seconds = time.process_time() - begun
                key = f"{n}, {p}{', gaps' if gaps else ''} {dtype} {name}"
                found[key] = best(jax, compiled, ssm, series) / steps * 1e6, seconds
    return found


def best(jax, function, *args) -> float:
    """The least seconds of many calls, within two seconds."""
    least, end = math.inf, time.perf_counter() + 2.0
    while time.perf_counter() < end:
        begun = time.perf_counter()
        jax.block_until_ready(function(*args))
        least = min(least, time.perf_counter() - begun)
    return least


def run(folder: Path) -> dict[str, list[float]]:
    """`measure` with the package of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(folder.resolve()), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, __file__, "--child"], env=environment, cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="OLD and NEW")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        print(json.dumps(measure()))
        return
    if len(a.folders) != 2:
        parser.print_usage()  # `make bench` has no two checkouts
        return
    runs = [[run(folder) for folder in a.folders] for _ in range(a.rounds)]
    rows = {key: [[min(r[i][key][k] for r in runs) for i in (0, 1)] for k in (0, 1)] for key in runs[0][0]}
    print("| case | us a step, old | new | ratio | s of compiling, old | new | ratio |\n|---|---|---|---|---|---|---|")
    for key, ((old, new), (before, after)) in rows.items():
        print(
            f"| {key} | {old:.3f} | {new:.3f} | {new / old:.2f} | {before:.2f} | {after:.2f} | {after / before:.2f} |"
        )
    for k, what in enumerate(("time", "compiling")):
        logs = [math.log(row[k][1] / row[k][0]) for row in rows.values()]
        print(f"geometric mean of the ratios, {what}: {math.exp(sum(logs) / len(logs)):.3f}")
    if a.out:
        a.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
