"""Models in another precision than the session's, without a trace left in the arrays that they hold."""

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def with_own_arrays(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model, with views in place of NumPy's arrays that it closes over, keeps in a `partial`, or has as globals.

    JAX (0.12) may keep the 64-bit form of an array that a program traced under `jax.enable_x64` has captured, and take
    it for the array itself afterwards, where 64-bit arithmetic is off again. What it keeps of a view does not matter.

    Args:
        model: a function, or a `functools.partial` of one; anything else comes back as it is.

    Returns:
        A function of the same signature.

    Example:
        >>> x = np.ones(3)
        >>> model = functools.partial(lambda y, x: x, x=x)
        >>> with_own_arrays(model)(0) is x, bool((with_own_arrays(model)(0) == x).all())
        (False, True)
    """
    if isinstance(model, functools.partial):
        args, keywords = jax.tree.map(_view, (model.args, model.keywords))
        return functools.partial(with_own_arrays(model.func), *args, **keywords)
    if not isinstance(model, types.FunctionType):
        return model
    names = {n: _view(x) for n, x in model.__globals__.items() if isinstance(x, np.ndarray)}
    cells = model.__closure__ or ()
    found = [_held(cell) for cell in cells]
    if not names and all(new is old for new, old in found):
        return model
    closure = tuple(cell if new is old else types.CellType(new) for cell, (new, old) in zip(cells, found, strict=True))
    room = {**model.__globals__, **names} if names else model.__globals__
    copy = types.FunctionType(model.__code__, room, model.__name__, model.__defaults__, closure or None)
    copy.__kwdefaults__ = model.__kwdefaults__
    return functools.update_wrapper(copy, model)


def _held(cell: Any) -> tuple[Any, Any]:
    """What a cell of a closure is to hold, and what it holds."""
    try:
        old = cell.cell_contents
    except ValueError:  # not set yet
        return None, None
    if isinstance(old, types.FunctionType | functools.partial):
        return with_own_arrays(old), old
    if isinstance(old, np.ndarray | dict | list | tuple):
        leaves = jax.tree.leaves(old)
        return (jax.tree.map(_view, old), old) if any(isinstance(x, np.ndarray) for x in leaves) else (old, old)
    return old, old


def _view(x: Any) -> Any:
    return x.view() if isinstance(x, np.ndarray) else x
