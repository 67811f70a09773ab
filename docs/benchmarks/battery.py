"""Models on which filters break: how many each library gets right.

    python docs/benchmarks/battery.py [--only NAMES] [--out FILE]

The cases are those of `tests/nasty.py` (tiny and correlated noise, vague starts, singular matrices, missing entries,
odd units), the truth is its 110-digit arithmetic on the inputs as rounded to the type. Three questions for each case:
is the log-likelihood right (relative error 1e-4), its gradient along random directions of `A`, `chol_Q` and `chol_R`
(1e-3; not asked where an entry has no density, and none of directions that the rounding of the inputs alone moves by
that much), and the smoother (means within 1e-3 standard deviations and variances within 0.2 %, none below zero)?
TFP is not asked for gradients: its factors are lower triangles by definition.
Libraries get only cases that they have arguments for: `b`, `B`, `d`, `D` and time variation are pssm's alone here.
"""

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from filter import (
    IN_NUMPY,
    LEARNED,
    Library,
    Table,
    options,
    print_machine,
    with_cuthbert,
    with_dynamax,
    with_dynestyx,
    with_pssm,
    with_tfp,
)

import pssm

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import nasty

IN_JAX = {
    "pssm": with_pssm,
    "dynamax": with_dynamax,
    "dynamax, parallel": partial(with_dynamax, parallel=True),
    "cuthbert": with_cuthbert,
    "dynestyx": with_dynestyx,
    "TFP": with_tfp,
}
PLAIN = {"m0", "chol_P0", "A", "chol_Q", "C", "chol_R"}
BLURRED = 3e-4  # a derivative that rounding of the inputs may move by so much is not asked for


def slopes(case: Any, dtype: Any) -> dict[str, tuple[np.ndarray, float, float]]:
    """For each array that is learned a random direction, the slope along it, and how far rounding moves it."""
    rng, found = np.random.default_rng(0), {}
    unit = 0.5 * np.finfo(dtype).eps
    moved = {k: v * (1 + unit) if k in ("C", "chol_R") else v for k, v in case["params"].items()}
    for name in LEARNED:
        direction = rng.choice([-1.0, 1.0], size=np.shape(case["params"][name]))
        slope = nasty.slope(case, name, direction)
        found[name] = direction, slope, abs(nasty.slope(case | {"params": moved}, name, direction) - slope)
    return found


def gradient_is_right(expected: dict[str, tuple], gradient: dict[str, np.ndarray]) -> bool:
    """Along one random direction for each of the arrays that are learned."""
    for name, (direction, slope, blur) in expected.items():
        if not np.isfinite(gradient[name]).all():
            return False
        size = max(np.linalg.norm(gradient[name]), abs(slope))
        if abs(np.vdot(gradient[name], direction) - slope) > 1e-3 * size and blur <= BLURRED * abs(slope):
            return False
    return True


def smoother_is_right(expected: dict[str, Any], mean: np.ndarray, cov: np.ndarray) -> bool:
    """Means in posterior standard deviations, variances as shares; a variance of zero must be one."""
    variance = np.einsum("tii->ti", expected["smoothed_cov"])
    found = np.einsum("tii->ti", np.asarray(cov, float))
    sd = np.sqrt(np.maximum(variance, 0))
    scale = np.maximum(sd, 1e-5 * (1e-3 + np.abs(expected["smoothed_mean"])))
    close = np.abs(mean - expected["smoothed_mean"]) <= 1e-3 * scale + 1e-6 * np.abs(expected["smoothed_mean"])
    return bool(close.all() and (found >= 0).all() and (np.abs(found - variance) <= 2e-3 * variance + 1e-12).all())


def ask(
    library: Library, case: Any, expected: dict[str, Any], along: dict[str, tuple], ask_gradient: bool = True
) -> list[bool | None]:
    """Value, gradient, smoother: right, wrong, or None where it is not asked."""
    q = {k: jnp.asarray(x) for k, x in case["params"].items() if k != "time_varying"}
    y = jnp.asarray(case["y"])
    learned = {k: q[k] for k in LEARNED}
    program = jax.jit(jax.value_and_grad(lambda learned: library.value(q | learned, y)))
    answers: list[bool | None] = [False, False, False]
    try:
        value, gradient = program(learned)
        truth = expected["log_likelihood"]
        answers[0] = bool(abs(float(value) - truth) <= 1e-4 * max(1.0, abs(truth)))
        answers[1] = gradient_is_right(along, {k: np.asarray(x, float) for k, x in gradient.items()})
    except Exception:  # a peer that refuses is not right
        pass
    if expected["dead"] or not ask_gradient:
        answers[1] = None
    try:
        mean, cov = jax.jit(library.smooth)(q, y)
        answers[2] = smoother_is_right(expected, np.asarray(mean, float), cov)
    except Exception:
        pass
    return answers


def pssm_with_everything(case: Any) -> Library:
    """pssm, with what only some cases have."""
    extra: dict[str, Any] = {}
    if "time_varying" in case["params"]:
        extra["time_varying"] = case["params"]["time_varying"]
    u = case["u"]

    def smooth(q: Any, y: Any) -> Any:
        result = pssm.kalman_smoother(pssm.LinearGaussianSSM(**q, **extra), y, u)
        return result.mean, result.cov

    return Library(lambda q, y: pssm.log_likelihood(pssm.LinearGaussianSSM(**q, **extra), y, u), smooth)


def ask_in_numpy(name: str, case: Any, expected: dict[str, Any]) -> list[bool | None]:
    """The same of a library in float64 that has no gradient."""
    answers: list[bool | None] = [False, None, False]
    q = {k: np.asarray(x, float) for k, x in case["params"].items()}
    try:
        library = IN_NUMPY[name](q, np.asarray(case["y"], float))
        truth = expected["log_likelihood"]
        answers[0] = bool(abs(float(library.value()) - truth) <= 1e-4 * max(1.0, abs(truth)))
        mean, cov = library.smooth()
        answers[2] = smoother_is_right(expected, np.asarray(mean, float), cov)
    except Exception:
        pass
    return answers


def main() -> None:
    """Prints the table, and below it the cases that each library gets wrong."""
    parser = options(__doc__)
    parser.add_argument("--only", help="cases, separated by commas (default: all)")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(nasty.CASES)[:: 8 if args.quick else 1]
    table = Table(args.out)
    print_machine(table, ("dynamax", "cuthbert", "dynestyx", "tfp-nightly", "statsmodels"))
    table.line("| type | library | log-likelihood | gradient | smoother |\n|---|---|---|---|---|")
    wrong: list[str] = []
    for dtype in (np.float32, np.float64):
        jax.config.update("jax_enable_x64", dtype == np.float64)
        found: dict[str, dict[str, list[bool | None]]] = {}
        for name in names:
            case, expected = nasty.truth(name, dtype)
            along = slopes(case, dtype)
            plain = set(case["params"]) <= PLAIN and case["u"] is None
            for label, make in IN_JAX.items():
                with table.attempt(label, f"{name} {dtype.__name__}"):
                    if label == "pssm":
                        found.setdefault(label, {})[name] = ask(pssm_with_everything(case), case, expected, along)
                    elif plain:
                        found.setdefault(label, {})[name] = ask(make(), case, expected, along, label != "TFP")
            if dtype == np.float64 and plain:
                for label in ("statsmodels, conventional", "statsmodels, univariate"):
                    found.setdefault(label, {})[name] = ask_in_numpy(label, case, expected)
            jax.clear_caches()
        for label, answers in found.items():
            cells = []
            for i, what in enumerate(("log-likelihood", "gradient", "smoother")):
                asked = {name: a[i] for name, a in answers.items() if a[i] is not None}
                cells.append(f"{sum(map(bool, asked.values()))} / {len(asked)}" if asked else "-")
                bad = [name for name, right in asked.items() if not right]
                if bad:
                    wrong.append(f"- {label}, {dtype.__name__}, {what}: {', '.join(bad)}")
            table.line(f"| {dtype.__name__} | {label} | {' | '.join(cells)} |")
    table.line("\nNot right:\n\n" + "\n".join(wrong) + "\n")
    table.print_notes()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
