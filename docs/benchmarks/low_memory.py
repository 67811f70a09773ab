"""The gradient of the log-likelihood in less memory: `method="low_memory"` beside `method="sequential"`.

    python docs/benchmarks/low_memory.py [--quick] [--out FILE]

Value and gradient with respect to `A`, `chol_Q` and `chol_R` in float64: the bytes that XLA sets aside for what the
program keeps between its start and its end, and the median time of 7 runs after compiling.
"""

import os
import warnings
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from filter import LEARNED, RUNS, Table, median_time, options, print_machine, problem, with_pssm

CASES = [(2, 1, 100_000), (4, 2, 100_000), (16, 16, 10_000), (16, 4, 100_000)]


def measure(method: str, q: Any, y: Any, runs: int) -> tuple[float, float]:
    """Megabytes and seconds."""
    value = with_pssm(method).value
    learned = {name: q[name] for name in LEARNED}
    program = jax.jit(jax.value_and_grad(lambda learned, q, y: value({**q, **learned}, y)))
    program = program.lower(learned, q, y).compile()
    return program.memory_analysis().temp_size_in_bytes / 1e6, median_time(lambda: program(learned, q, y), runs)[0]


def main() -> None:
    """Prints the table."""
    args = options(__doc__).parse_args()
    jax.config.update("jax_enable_x64", True)
    table = Table(args.out)
    print_machine(table, ())
    table.line("| n, p, T | sequential: MB | s | low_memory: MB | s | times as long |\n|---|---|---|---|---|---|")
    for n, p, full in CASES:
        q, y = problem(n, p, steps := full // 1000 if args.quick else full)
        (most, short), (least, long) = (
            measure(m, q, y, 1 if args.quick else RUNS) for m in ("sequential", "low_memory")
        )
        table.line(f"| {n}, {p}, {steps} | {most:.0f} | {short:.3f} | {least:.1f} | {long:.3f} | {long / short:.1f} |")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
