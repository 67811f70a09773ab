"""Exact diffuse starts beside wide ones, and beside statsmodels' exact diffuse filter.

    python docs/benchmarks/diffuse.py [--out FILE.json]

1000 steps in float64: a level and slope, and a level with eleven seasonal states. Microseconds of a whole call, least
of seven; "gap" is a series whose second reading comes so late that every step is taken with open directions. Seconds of
compiling are processor time.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

import pssm

STEPS = 1000


def least(function, *args):
    """Microseconds."""
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begun)
    return min(times) * 1e6


def systems():
    """Transition, emission and factor of the noise, by name."""
    season = np.zeros((12, 12))
    season[0, 0], season[1, 1:], season[2:, 1:-1] = 1.0, -1.0, np.eye(10)
    reads, noise = np.zeros((1, 12)), np.zeros((12, 2))
    reads[0, :2], noise[0, 0], noise[1, 1] = 1.0, 0.5, 0.2
    return {
        "trend": (np.array([[1.0, 1.0], [0.0, 1.0]]), np.eye(1, 2), np.diag([0.5, 0.1])),
        "level and season": (season, reads, noise),
    }


def measure():
    """Rows of the table."""
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    rows = []
    for name, (A, C, noise) in systems().items():
        n = len(A)
        y = np.random.default_rng(0).normal(size=(STEPS, 1)).cumsum(0)
        late = y.copy()
        late[1 : n + 12] = np.nan
        wide = pssm.LinearGaussianSSM(np.zeros(n), 100 * np.eye(n), A, noise, C, np.eye(1))
        diffuse = wide.replace(diffuse=np.ones(n, bool))
        peer = KalmanSmoother(k_endog=1, k_states=n, k_posdef=noise.shape[1])
        peer["design"], peer["transition"], peer["selection"] = C, A, noise
        peer["state_cov"], peer["obs_cov"] = np.eye(noise.shape[1]), np.eye(1)
        peer.bind(y.copy())
        peer.initialize_diffuse()
        for what, function in (
            ("value", pssm.log_likelihood),
            ("gradient", jax.value_and_grad(pssm.log_likelihood)),
            ("smoother", lambda ssm, y: pssm.kalman_smoother(ssm, y)[:2]),
        ):
            function, row = jax.jit(function), {"model": name, "what": what}
            for label, model in (("wide", wide), ("diffuse", diffuse)):
                begun = time.process_time()
                function.lower(model, y).compile()
                row[f"{label}, compile s"] = time.process_time() - begun
                row[label] = least(function, model, y)
            row["diffuse, gap"] = least(function, diffuse, late)
            calls = {"value": lambda peer=peer: peer.loglike(), "smoother": lambda peer=peer: peer.smooth()}
            row["statsmodels"] = least(calls[what]) if what in calls else None
            rows.append(row)
            print(row, flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("diffuse.json"))
    out = parser.parse_args().out
    jax.config.update("jax_enable_x64", True)
    rows = measure()
    out.write_text(json.dumps(rows, indent=1) + "\n")
    print("| model | what | wide | diffuse | diffuse, gap | statsmodels | compile s, wide | diffuse |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        peer = "-" if row["statsmodels"] is None else f"{row['statsmodels']:.0f}"
        times = f"{row['wide']:.0f} | {row['diffuse']:.0f} | {row['diffuse, gap']:.0f} | {peer}"
        print(
            f"| {row['model']} | {row['what']} | {times} | {row['wide, compile s']:.1f} "
            f"| {row['diffuse, compile s']:.1f} |"
        )


if __name__ == "__main__":
    main()
