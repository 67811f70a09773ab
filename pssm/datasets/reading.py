"""A table of cells to a `Series`: its columns, its time, its regressors, and what a reader should know of them."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pssm.datasets.time_columns as times
from pssm.datasets.cells import Table, check_column, read_cells
from pssm.datasets.numbers import Marks, looks_numeric, missing_cells, sentinels, to_numbers
from pssm.datasets.series import Series
from pssm.times.grid import grid_of, uneven
from pssm.times.labels import as_labels

Names = str | Sequence[str] | None


def read(
    path: Path,
    column: Names,
    time: Names,
    inputs: Names,
    marks: Marks,
    *,
    dayfirst: bool | None,
    timezone: str | None,
    separator: str | None,
    sheet: Any,
) -> Series:
    """See `pssm.datasets.read_table`."""
    table = read_cells(path, separator=separator, decimal=marks.decimal, sheet=sheet)
    loud: list[str] = []
    wanted, time_columns, regressors = (
        _names(table, name, given) for name, given in (("column", column), ("time", time), ("inputs", inputs))
    )
    regressors = regressors or []
    if wanted is not None and not wanted:
        raise ValueError(f"`column` must name one or more different columns; got {column!r}.")
    if time_columns is None:
        time_columns = times.find_time(table, [*(wanted or []), *regressors])
    named = [name for name in table.cells if times.calendar_name(name) and name not in [*(wanted or []), *regressors]]
    if not time_columns and time is None and named and len(table.cells) > 1:
        loud.append(
            f"`time`: {named[0]!r} does not increase from row to row in {str(table.path)!r}, so the rows are numbered. "
            "Name the columns that make the time together: `time=` (`--time year --time month`)."
        )
    columns = [_only_numeric(table, [*time_columns, *regressors])] if wanted is None else wanted
    for name in regressors:
        if name in columns:
            raise ValueError(f"`inputs` and `column` both name {name!r}; a series is no regressor of its own.")
    labels = times.read_time(table, time_columns, dayfirst, marks)
    labels = times.localised(labels, timezone, time_columns, table)
    table, labels, words = times.in_order(table, time_columns, labels) if time_columns else (table, labels, "")
    loud += [words] if words else []
    found = [to_numbers(table, name, marks) for name in columns]
    y = np.stack([values for values, _ in found], axis=1)
    units = [unit or table.units.get(name, "") for name, (_, unit) in zip(columns, found, strict=True)]
    for name in columns:
        loud += _odd(table, name, y[:, columns.index(name)])
    u = u_future = future_time = None
    if regressors:
        u, y, labels, u_future, future_time = _with_inputs(table, regressors, marks, y, labels)
        for name, values in zip(regressors, u.T, strict=True):
            loud += _odd(table, name, values, "inputs")
    grid = grid_of(as_labels("time", labels)) if time_columns else None
    if time_columns and (spacing := uneven(as_labels("time", labels))):
        name = time_columns[-1]
        loud.append(f"`time`: column {name!r} of {str(table.path)!r} {spacing}.{times.clock_hint(labels, grid)}")
    loud = list(dict.fromkeys([*table.loud, *loud]))
    notes = list(dict.fromkeys([*table.notes, *loud]))
    for text in loud:
        warnings.warn(text, stacklevel=3)  # at the line that called `read_table`
    what = f"{', '.join(columns)} of {table.path.name}"
    return Series(
        table.path.stem,
        y,
        labels,
        tuple(columns),
        "; ".join(dict.fromkeys(filter(None, units))),
        what,
        None if grid is None else grid.period,
        str(table.path),
        tuple(notes),
        tuple(regressors),
        u,
        u_future,
        future_time,
    )


def _names(table: Table, argument: str, given: Names) -> list[str] | None:
    names = [given] if isinstance(given, str) else None if given is None else list(given)
    for name in names or []:
        check_column(table, argument, name)
    if names is not None and len(set(names)) < len(names):
        raise ValueError(f"`{argument}` must name one or more different columns; got {given!r}.")
    return names


def _only_numeric(table: Table, taken: list[str]) -> str:
    others = [name for name in table.cells if name not in taken]
    data = [name for name in others if not (times.calendar_name(name) or times.row_numbers(table, name))] or others
    numeric = data if len(data) == 1 else [name for name in data if looks_numeric(table.cells[name])]
    if len(numeric) == 1:
        return numeric[0]
    found = f"{len(numeric)} numeric columns" if numeric else "no numeric column"
    shown = ", ".join(map(repr, numeric or table.cells))
    raise ValueError(f"`column` is needed: {str(table.path)!r} has {found} besides the time. Choose from {shown}.")


def _odd(table: Table, name: str, values: np.ndarray, argument: str = "column") -> list[str]:
    """Words on values that may mean that there is none."""
    found = []
    for value, count in sentinels(values):
        row = int(np.flatnonzero(values == value)[0])
        rest = values[np.isfinite(values) & (values != value)]
        often = "once" if count == 1 else f"{count} times"
        found.append(
            f"`{argument}`: {value:g} stands {often} in column {name!r} of {str(table.path)!r}, first in row {row + 1} "
            f"(line {table.lines[row]}), far outside of the rest ({rest.min():g} to {rest.max():g}). If it means a "
            f"missing value, pass `missing={value:g}` (`--missing {value:g}`)."
        )
    return found


def _with_inputs(table: Table, names: list[str], marks: Marks, y: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
    """Regressors of the series, and of the rows behind its last value, which are the future."""
    u = np.stack([to_numbers(table, name, marks, "inputs")[0] for name in names], axis=1)
    steps = int(np.flatnonzero(~np.isnan(y).all(axis=1))[-1]) + 1
    whole = ~np.isnan(u).any(axis=1)
    behind = whole[steps:]
    ahead = steps + (len(behind) if behind.all() else int(np.argmin(behind)))
    for row in np.flatnonzero(~whole[:steps]):
        name = names[int(np.argmax(np.isnan(u[row])))]
        raise ValueError(
            f"`inputs` must have a value in every row up to the last of the series; {table.where(name, int(row))} has "
            "none. Fill it, or leave the regressor out."
        )
    if missing_cells(table.cells[names[0]], marks.missing)[ahead:].any():
        table.notes.append(f"`inputs`: rows from {ahead + 1} on have no complete regressors and were left out.")
    return u[:steps], y[:steps], labels[:steps], u[steps:ahead], labels[steps:ahead]
