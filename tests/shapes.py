"""Checks the shapes in signatures whenever a test calls the package, by jaxtyping and beartype.

`conftest.py` installs the hook before anything of `pssm` is imported. From then on every function and method whose
annotations hold a shape, `Float[Array, "*batch time state"]`, alone or inside a tuple, an optional or the fields of a
named tuple, is checked at every call: sizes of one name must agree. Plain types are left to pyright and to the
functions' own errors, which name the argument. jaxtyping's own hook would wrap all functions, nested ones at every
call: a quarter more time for the tests, and warnings that name the wrapper's line in place of the caller's.
"""

import ast
import inspect
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

import numpy as np
from beartype import beartype
from beartype.vale import Is
from jaxtyping import AbstractArray, jaxtyped

# Modules and functions whose signatures are not checked, each with its reason. Keep it short.
LEFT_OUT: dict[str, str] = {
    "pssm.filters.smoother.smooth_complete": "all series of a batch share one covariance in what it returns",
}


WRAPPER = inspect.getsourcefile(jaxtyped)
_warn = warnings.warn


def install() -> None:
    """Has every module of the package checked that is imported from now on."""
    if any(name.partition(".")[0] == "pssm" for name in sys.modules):
        raise ImportError("`pssm` is imported already: its shapes would not be checked.")
    sys.meta_path.insert(0, _Finder())
    warnings.warn = _warn_of_the_caller


def _warn_of_the_caller(message, category=None, stacklevel=1, source=None, **options):
    """`warnings.warn` whose `stacklevel` does not count the wrapper's frames."""
    frame, left, level = sys._getframe(1), stacklevel, 0
    while frame is not None and left > 0:
        level += 1
        left -= frame.f_code.co_filename != WRAPPER
        frame = frame.f_back
    _warn(message, category, level + 1, source, **options)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] != "pssm" or fullname in LEFT_OUT:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def get_code(self, fullname):
        """From the source and never from the cache, in which the undecorated code belongs."""
        tree = ast.parse(self.get_data(self.path))
        for node in _functions(tree):
            # Innermost: `jax.jit` and `property` wrap what is checked.
            node.decorator_list.append(ast.parse("__import__('shapes').checked", mode="eval").body)
        return compile(ast.fix_missing_locations(tree), self.path, "exec", dont_inherit=True)


def _functions(tree):
    """Functions of a module and methods of its classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node)


def checked(function):
    """The function, with its arguments and its result checked where an annotation holds a shape."""
    if f"{function.__module__}.{function.__qualname__}" in LEFT_OUT:
        return function
    private = function.__name__.startswith("_") and not function.__name__.startswith("__")
    hints = [hint for hint in function.__annotations__.values() if _has_shape(hint, named_tuples=not private)]
    return jaxtyped(function, typechecker=_shapes_alone) if hints else function


def _shapes_alone(function):
    """beartype over the annotations of `function` that hold a shape."""
    function.__annotations__ = {
        name: _of_any_kind(hint) for name, hint in function.__annotations__.items() if _has_shape(hint)
    }
    return beartype(function)


def _fields(hint) -> dict:
    """The annotations of a named tuple that are arrays with a shape, or such an array or None."""
    if not (inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields")):
        return {}
    alone = {name: field for name, field in hint.__annotations__.items() if _has_shape(field, named_tuples=False)}
    return {name: field for name, field in alone.items() if all(map(inspect.isclass, get_args(field) or [field]))}


def _has_shape(hint, named_tuples=True) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return bool(hint.dim_str)  # a key or any other scalar has none
    # Not inside `Callable[...]`, whose calls are checked where the function is.
    parts = get_args(hint) if get_origin(hint) in (tuple, list, Union, UnionType) else ()
    return bool(named_tuples and _fields(hint)) or any(_has_shape(part, named_tuples) for part in parts)


def _of_any_kind(hint):
    """NumPy arrays are as welcome as JAX's; a named tuple is looked at field by field, beartype stops at its class."""
    fields = {name: _of_any_kind(field) for name, field in _fields(hint).items()}
    if fields:
        return Annotated[hint, Is[lambda found: all(_fits(getattr(found, name), fields[name]) for name in fields)]]
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return hint.dtype[hint.array_type | np.ndarray, hint.dim_str]
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_of_any_kind(part) for part in get_args(hint))]  # noqa: UP007 (made of parts)
    if get_origin(hint) is tuple:
        return tuple[tuple(_of_any_kind(part) for part in get_args(hint))]
    return hint


def _fits(value, hint) -> bool:
    """`isinstance`, which for a union would look at the class alone."""
    return any(isinstance(value, part) for part in get_args(hint) or (hint,))
