"""Many sensors and few states, complete and with gaps: pssm beside other libraries.

    python docs/benchmarks/wide.py [--quick] [--out FILE]

A tenth of the entries is missing at random in the second and fourth group; the libraries that cannot have that are left
out there. Everything else is as in `filter.py`.
"""

import os
import warnings

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from filter import (
    BASE,
    IN_JAX,
    IN_NUMPY,
    PEERS,
    REFERENCE,
    RUNS,
    InNumPy,
    Table,
    options,
    print_machine,
    print_rows,
    problem,
    reference,
    rows_in_jax,
    rows_in_numpy,
    with_pssm,
)

CASES = ((4, 50, 1000), (5, 200, 300))
WITH_GAPS = ("pssm", REFERENCE, "cuthbert")


def main() -> None:
    """Prints the table."""
    args = options(__doc__).parse_args()
    runs = 1 if args.quick else RUNS
    table = Table(args.out)
    print_machine(table, PEERS)
    table.line(table.HEAD)
    in_numpy: InNumPy = {name: make for name, make in IN_NUMPY.items() if name.startswith("statsmodels")}
    for n, p, full in CASES:
        steps = 20 if args.quick else full
        for gaps in (False, True):
            q, y = problem(n, p, steps)
            if gaps:
                y[np.random.default_rng(0).uniform(size=y.shape) < 0.1] = np.nan
            names = WITH_GAPS if gaps else [name for name in IN_JAX if name != "dynamax, parallel"]
            right = {}
            for x64 in (True, False):
                jax.config.update("jax_enable_x64", x64)
                kind = f"{'float64' if x64 else 'float32'}{', gaps' if gaps else ''}"
                if x64:
                    right = {steps: reference(with_pssm("sequential"), q, y)}
                rows = rows_in_jax(table, f"{p} {kind}", {name: IN_JAX[name] for name in names}, q, y, runs)
                if x64:
                    rows += rows_in_numpy(table, f"{p} {kind}", in_numpy, q, y, runs)
                base = next((row for row in rows if row.label == BASE), None)
                print_rows(table, f"{n}, {p}, {steps} | {kind}", rows, base, right)
                jax.clear_caches()
    table.line("")
    table.print_notes()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # peers' deprecation warnings
    main()
