"""The arguments of a model without their future: which of them are its data, and which of their axes is time."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from pssm._types import Array, ArrayLike
from pssm.guides.plates import WholePlates
from pssm.inspection.axes import Axes, find_axes, takes_missing, trace_model

NOT_DATA = (ArithmeticError, LookupError, TypeError, ValueError)  # of a model that takes an argument for an index, ...
UNKNOWN = "so the future of the data cannot be hidden"


class TimedArguments(NamedTuple):
    """A model's arguments, whose data can be cut in time.

    Attributes:
        leaves: the arguments, flat.
        treedef: their structure, of `(args, kwargs)`.
        axes: the time axis of the leaves that are data, by their position.
        steps: the number of time steps.
    """

    leaves: list[Any]
    treedef: Any
    axes: dict[int, int]
    steps: int

    def past(self, origin: ArrayLike) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` with the data missing (NaN) from step `origin` on."""
        return jax.tree.unflatten(self.treedef, _cut(self.leaves, self.axes, origin))


def timed_arguments(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dims: Mapping[str, tuple[str, ...]] | None = None,
) -> TimedArguments:
    """Finds the data among a model's arguments, and their time axis, by trying it out.

    An array is data along one of its axes if a change of its entries at one step changes the observed values at this
    step and no other. The result is tried out too: with the arrays NaN from the middle on, nothing that is observed is
    left of the second half, and all of the first.

    Args:
        model: a NumPyro model, its learned parameters substituted.
        args: its positional arguments.
        kwargs: its keyword arguments.
        dims: names of the axes of sites, where the model does not say which is time.

    Raises:
        ValueError: the time axis of an observed site is not known, its missing entries are not NaN, or its values do
            not come from the arguments.
    """
    axes = find_axes(model, args, kwargs, dims=dims)
    if not axes.data:
        raise ValueError(f"`fit`: its model observes nothing, {UNKNOWN}.")
    for name in axes.data:
        if name not in axes.times or axes.times[name] != axes.time:
            raise ValueError(
                f"`fit`: the observed site {name!r} of shape {np.shape(axes.trace[name]['value'])} has no axis that is "
                f"known to be the time of {axes.data[0]!r}, {UNKNOWN}. Name its axes with `dims`, if it has one."
            )
        if not takes_missing(axes.trace[name]["fn"]):
            raise ValueError(
                f"`fit`: NaN in {name!r} must mean missing, {UNKNOWN} otherwise; write `pssm.observe` in place of "
                "`numpyro.sample`."
            )
    leaves, treedef = jax.tree.flatten((args, dict(kwargs)), is_leaf=_is_row)
    data = _Data(model, axes, treedef)
    before = {n: _as_numbers(axes.trace[n]["value"]) for n in axes.data}
    steps, found = int(axes.steps or 0), {}
    hidden = before
    for position, leaf in enumerate(leaves):
        axis = data.time_axis(leaves, position) if _is_array(leaf) and steps in np.shape(leaf) else None
        without = None if axis is None else data.values(_cut(leaves, {**found, position: axis}, 0))
        if axis is not None and without is not None and any(_missing(without[n]) > _missing(hidden[n]) for n in before):
            found[position], hidden = axis, without
    kept = steps // 2
    cut = data.values(_cut(leaves, found, kept))
    for name in axes.data:
        old, new = data.rows(name, before[name]), None if cut is None else data.rows(name, cut[name])
        if new is None or not np.isnan(new[kept:]).all() or not np.array_equal(new[:kept], old[:kept], equal_nan=True):
            raise ValueError(
                f"`fit`: the values of {name!r} do not come step by step from arrays among the model's arguments, "
                f"{UNKNOWN}. Give the data to the model as an argument that it observes as it is."
            )
    return TimedArguments(leaves, treedef, found, steps)


class _Data(NamedTuple):
    """The observed values of a model as a function of its arguments."""

    model: Callable[..., Any]
    axes: Axes
    treedef: Any

    def run(self, leaves: list[Any]) -> dict[str, Array]:
        """The observed values."""
        sites = self.axes.trace.items()
        latent = {n: s["value"] for n, s in sites if s["type"] == "sample" and not s["is_observed"]}
        args, kwargs = jax.tree.unflatten(self.treedef, leaves)
        with WholePlates(), numpyro.validation_enabled(False):
            trace = trace_model(self.model, latent, args, kwargs)
        return {n: jnp.asarray(trace[n]["value"]) for n in self.axes.data}

    def values(self, leaves: list[Any]) -> dict[str, np.ndarray] | None:
        """The observed values as numbers; None where the model does not run with these arguments."""
        try:
            found = {n: _as_numbers(x) for n, x in self.run(leaves).items()}
        except NOT_DATA:
            return None
        return found if all(x.shape == np.shape(self.axes.trace[n]["value"]) for n, x in found.items()) else None

    def rows(self, name: str, values: np.ndarray) -> np.ndarray:
        """The values of a site, time in front."""
        return np.moveaxis(values, self.axes.names[name].index(self.axes.times[name]), 0)

    def time_axis(self, leaves: list[Any], position: int) -> int | None:
        """The axis of an array along which its entries are those of the observed steps; None where it is no data."""
        steps, x = int(self.axes.steps or 0), np.asarray(leaves[position])
        compiled = jax.jit(lambda leaf: self.run([*leaves[:position], leaf, *leaves[position + 1 :]]))

        def rows(leaf: np.ndarray) -> list[np.ndarray]:
            return [self.rows(n, _as_numbers(value)) for n, value in compiled(leaf).items()]

        def follows(axis: int) -> bool:
            for step in {0, steps // 2, steps - 1}:
                place = (np.arange(steps) == step).reshape([-1 if k == axis else 1 for k in range(x.ndim)])
                moved = [_moved(a, b) for a, b in zip(before, rows(np.where(place, _other(x), x)), strict=True)]
                if not any(moved) or any(m not in ([], [step]) for m in moved):
                    return False
            return True

        try:
            before = rows(x)
            return next((axis for axis in range(x.ndim) if x.shape[axis] == steps and follows(axis)), None)
        except NOT_DATA:
            return None


def _cut(leaves: list[Any], axes: dict[int, int], origin: ArrayLike) -> list[Any]:
    """The leaves, NaN from a step on along these axes."""

    def one(x: Any, axis: int) -> Array:
        y = jnp.asarray(x, jnp.result_type(float) if np.asarray(x).dtype.kind != "f" else None)
        seen = (jnp.arange(y.shape[axis]) < origin).reshape([-1 if k == axis else 1 for k in range(y.ndim)])
        return jnp.where(seen, y, jnp.nan)

    return [one(x, axes[i]) if i in axes else x for i, x in enumerate(leaves)]


def _is_row(x: Any) -> bool:
    """Whether these are data in a plain list."""
    return isinstance(x, list) and bool(x) and all(isinstance(entry, int | float) for entry in x)


def _is_array(x: Any) -> bool:
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return not is_key and not isinstance(x, str) and np.ndim(x) > 0 and np.asarray(x).dtype.kind in "fiub"


def _as_numbers(x: Any) -> np.ndarray:
    """In the precision that JAX has them."""
    return np.asarray(jnp.asarray(x), float)


def _other(x: np.ndarray) -> np.ndarray:
    """Other numbers of the same kind, above zero where the old ones are."""
    if x.dtype.kind == "b":
        return ~x
    return np.where(np.isnan(x), 1.0, 1.5 * x + 1).astype(x.dtype) if x.dtype.kind == "f" else x + 1


def _moved(before: np.ndarray, after: np.ndarray) -> list[int]:
    """The rows that differ."""
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    return np.flatnonzero(~same.reshape(len(same), -1).all(1)).tolist()


def _missing(x: np.ndarray) -> int:
    return int(np.isnan(x).sum())
