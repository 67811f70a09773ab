"""Checks the shapes in signatures whenever a test calls the package: jaxtyping's import hook with beartype.

`conftest.py` installs the hook before anything of `pssm` is imported, so every function of the package is checked in
every test. What is checked are the annotations that hold a shape, `Float[Array, "*batch time state"]`, alone or inside
a tuple, an optional or a named tuple; sizes of one name must agree within a call. Plain types are left to pyright and
to the functions' own errors, which name the argument.
"""

import inspect
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

import numpy as np
from beartype import beartype
from beartype.vale import Is
from jaxtyping import AbstractArray, install_import_hook

# Modules whose annotations are not checked yet, with the reason. No other module may be left out.
LEFT_OUT: dict[str, str] = {}


def install() -> None:
    """Has every module of the package checked that is imported from now on."""
    install_import_hook("pssm", "shapes.check_shapes")


def check_shapes(function):
    """A `typechecker` for jaxtyping: beartype over the annotations of `function` that hold a shape."""
    if function.__module__ in LEFT_OUT:
        return function
    with_shapes = {name: _checked(hint) for name, hint in function.__annotations__.items() if _has_shape(hint)}
    if not with_shapes:
        return function
    function.__annotations__ = with_shapes
    return beartype(function)


def _fields(hint) -> dict:
    """The annotations of a named tuple that hold a shape."""
    if not (inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields")):
        return {}
    return {name: field for name, field in hint.__annotations__.items() if _has_shape(field)}


def _has_shape(hint) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return bool(_fields(hint)) or any(_has_shape(part) for part in get_args(hint))


def _checked(hint):
    """A named tuple is checked field by field (beartype alone looks at its class); NumPy arrays are welcome."""
    fields = {name: _checked(field) for name, field in _fields(hint).items()}
    if fields:
        return Annotated[hint, Is[lambda found: all(_fits(getattr(found, name), fields[name]) for name in fields)]]
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return hint.dtype[hint.array_type | np.ndarray, hint.dim_str]
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_checked(part) for part in get_args(hint))]  # noqa: UP007: made of parts
    if get_origin(hint) is tuple:
        return tuple[tuple(_checked(part) for part in get_args(hint))]
    return hint


def _fits(value, hint) -> bool:
    """`isinstance`, which for a union would look at the class alone."""
    return any(isinstance(value, part) for part in get_args(hint) or (hint,))
