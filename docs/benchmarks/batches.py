"""100 series under one shared model: pssm's batch axes beside other libraries mapped over the series.

    python docs/benchmarks/batches.py [--quick] [--out FILE]

Times the log-likelihood of all series together, its value and gradient with respect to `A`, `chol_Q` and `chol_R`
jointly, and the smoother. The model has no batch axes, `y` has one. Microseconds are for one time step of one series;
everything else is as in `filter.py`.
"""

import os
import warnings
from functools import partial
from typing import Any

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
    Arrays,
    InNumPy,
    Library,
    Prepared,
    Table,
    options,
    print_machine,
    print_rows,
    problem,
    reference,
    rows_in_jax,
    rows_in_numpy,
)

SERIES, STEPS, N, P = 100, 200, 4, 2
OWN_BATCHES = ("pssm", REFERENCE, "TFP")


def batched(name: str) -> Library:
    """A library of `filter.py` for many series: with its own batch axes where it has such, else mapped by JAX."""
    one = IN_JAX[name]()
    many = one if name in OWN_BATCHES else Library(*(jax.vmap(fn, (None, 0)) for fn in one))
    return Library(lambda q, y: many.value(q, y).sum(), many.smooth)


def one_by_one(name: str, q: Arrays, y: np.ndarray) -> Prepared:
    """A loop in Python over the series."""
    each = [IN_NUMPY[name](q, series) for series in y]

    def smooth() -> tuple[Any, ...]:
        return tuple(np.stack(moments) for moments in zip(*(one.smooth() for one in each), strict=True))

    return Prepared(lambda: sum(one.value() for one in each), smooth)


def main() -> None:
    """Prints the table."""
    args = options(__doc__).parse_args()
    runs, steps, count = (1, 10, 3) if args.quick else (RUNS, STEPS, SERIES)
    table = Table(args.out)
    print_machine(table, PEERS)
    table.line(f"{count} series, shared model.\n\n{table.HEAD}")
    q, y = problem(N, P, steps, count)
    names = [name for name in IN_JAX if name != "dynamax, parallel"]
    in_jax = {name: partial(batched, name) for name in names}
    loops = [name for name in IN_NUMPY if name.startswith("statsmodels")]
    in_numpy: InNumPy = {name: partial(one_by_one, name) for name in loops} | {"simdkalman": IN_NUMPY["simdkalman"]}
    right: dict[int, list[Any]] = {}
    for x64 in (True, False):
        jax.config.update("jax_enable_x64", x64)
        where = kind = "float64" if x64 else "float32"
        if x64:
            right = {count * steps: reference(batched(REFERENCE), q, y)}
        rows = rows_in_jax(table, where, in_jax, q, y, runs)
        if x64:
            rows += rows_in_numpy(table, where, in_numpy, q, y, runs)
        base = next((row for row in rows if row.label == BASE), None)
        print_rows(table, f"{N}, {P}, {steps} | {kind}", rows, base, right)
    table.line("")
    table.print_notes()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # peers' deprecation warnings
    main()
