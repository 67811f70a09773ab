"""The steps of a forecast: how far it goes, and the model's arguments for a series that goes on."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger

from pssm._checks import is_pandas
from pssm._types import Array
from pssm.inspection.axes import holds


class Horizon(NamedTuple):
    """A forecast of `num_steps` steps from the first `known` observations, with the user's inputs `u_future`.

    `args` and `kwargs` are the model's for all these steps or more, the data missing (NaN) from `known` on; or, where
    these could not be told, its own, and `why` says so. `y_future` are values of these steps that are known, NaN where
    they are not; None where none is.
    """

    known: int
    num_steps: int
    u_future: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    y_future: Any = None
    why: str = ""

    def rows(self, x: Array, axis: int) -> Array:
        """The rows of the forecast along an axis of an array over all steps."""
        return jax.lax.slice_in_dim(x, self.known, self.known + self.num_steps, axis=axis)


def _bound(source: Any) -> inspect.BoundArguments:
    function: Any = source.model
    while isinstance(function, Messenger):
        function = function.fn
    return inspect.signature(function).bind(*source.args, **source.kwargs)


def inputs_of(source: Any) -> Any:
    """The model's inputs `u`, wherever they come from: an argument, or what `functools.partial` holds; or None."""
    bound = _bound(source)
    bound.apply_defaults()
    return bound.arguments.get("u")


def longer_arguments(
    source: Any, known: int, num_steps: int, u_future: Any, given: tuple[tuple[Any, ...], dict[str, Any]] | None
) -> Horizon:
    """The model's arguments for a series that goes on: data missing from `known` on, inputs with their future.

    Raises:
        ValueError: the data or inputs cannot be told.
    """
    if given is not None:
        args, kwargs = given
        return Horizon(known, num_steps, u_future, tuple(args), dict(kwargs))
    stop = max(source.num_steps, known + num_steps)
    more, lead = stop - source.num_steps, source.batch

    def axis_of(given: Any) -> int | None:
        return next((axis for axis, x in source.along.values() if holds(x, given)), None)

    def data(given: Any) -> Any:
        y = np.asarray(given)
        axis = axis_of(given)
        if axis is None and held and source.num_steps not in y.shape:
            return given
        if axis is None and not held:
            axis = len(lead) if y.shape[: len(lead) + 1] == (*lead, source.num_steps) else 0
        if axis is None or y.ndim <= axis or y.shape[axis] != source.num_steps:
            why = "is not observed" if axis is None else f"has no axis of the {source.num_steps} steps of the path"
            raise ValueError(
                f"`future` is needed: an array of shape {y.shape} in the model's arguments {why}. Give "
                "`future=(args, kwargs)`, the model's arguments with the steps of the forecast, their data NaN."
            )
        y = y if y.dtype.kind == "f" else y.astype(float)
        y = np.concatenate([y, np.full((*y.shape[:axis], more, *y.shape[axis + 1 :]), np.nan, y.dtype)], axis)
        y[(slice(None),) * axis + (slice(known, None),)] = np.nan
        return jnp.asarray(y) if isinstance(given, jax.Array) else y

    bound = _bound(source)
    first = next((n for n, x in bound.arguments.items() if x is not None), "y")
    bound.apply_defaults()  # with what `functools.partial` holds
    call = bound.arguments
    held = [n for n, x in call.items() if n != "u" and any(axis_of(leaf) is not None for leaf in jax.tree.leaves(x))]
    for name in held or [first]:
        call[name] = jax.tree.map(data, call.get(name))
    if call.get("num_steps") is not None:
        call["num_steps"] = stop
    if call.get("u") is not None and (more or u_future is not None):
        if u_future is None:
            raise ValueError(f"`u_future` is required, the inputs of the {num_steps} steps of the forecast.")
        call["u"] = inputs_with_future(call["u"], u_future, known, num_steps)
    return Horizon(known, num_steps, u_future, bound.args, bound.kwargs)


def inputs_with_future(u: Any, u_future: Any, known: int, num_steps: int) -> Any:
    """Inputs of which the `num_steps` rows behind the first `known` are those of the future; a frame stays one.

    Raises:
        ValueError: there are other columns or rows in the future.
    """
    frames = is_pandas(u) and is_pandas(u_future) and hasattr(u, "columns") and hasattr(u_future, "columns")
    if frames and list(u.columns) != list(u_future.columns):
        raise ValueError(f"`u_future` must have the columns of `u`, {list(u.columns)}; got {list(u_future.columns)}.")
    now, after = np.asarray(u), np.asarray(u_future)
    axis = max(now.ndim - 2, 0)
    after = after.reshape(*after.shape, *(1,) * (now.ndim - after.ndim))
    if after.shape[axis] != num_steps or after.shape[axis + 1 :] != now.shape[axis + 1 :]:
        expected = (num_steps, *now.shape[axis + 1 :])
        raise ValueError(f"`u_future` must have shape {expected} (time, input); got {np.shape(u_future)}.")
    begin, end = (np.take(now, range(*ends), axis) for ends in ((0, known), (known + num_steps, now.shape[axis])))
    whole = np.concatenate([begin, after, end], axis)
    return type(u)(whole, columns=u.columns) if is_pandas(u) and hasattr(u, "columns") else whole
