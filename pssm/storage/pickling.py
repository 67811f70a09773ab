"""Pickles of guides and fits, which hold what a plain pickle cannot: functions of JAX, optimisers, prototypes.

This is for sending a fit to another process. The files of `save` hold no pickles.
"""

import copy
import io
import pickle
import sys
from types import BuiltinFunctionType, FunctionType
from typing import Any


class _Pickler(pickle.Pickler):
    """Compiled functions of a module (`jax.nn.silu`) go by name, like plain ones."""

    def reducer_override(self, obj: Any) -> Any:
        if callable(obj) and not isinstance(obj, type | FunctionType | BuiltinFunctionType):
            module, name = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
            if isinstance(name, str) and getattr(sys.modules.get(str(module)), name, None) is obj:
                return _by_name, (module, name)
        return NotImplemented


def _by_name(module: str, name: str) -> Any:
    __import__(module)
    return getattr(sys.modules[module], name)


def dumps(x: Any) -> bytes:
    """The pickle of an object, for `pickle.loads`."""
    file = io.BytesIO()
    _Pickler(file).dump(x)
    return file.getvalue()


def can_pickle(x: Any) -> bool:
    """Whether there is a pickle of it."""
    try:
        dumps(x)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def restored(kind: type, data: bytes) -> Any:
    """An object of a class with the state that `reduced` wrote."""
    found = kind.__new__(kind)
    found.__setstate__(pickle.loads(data))
    return found


def reduced(x: Any, state: Any) -> tuple[Any, tuple[type, bytes]]:
    """What `__reduce__` of an object with a `__setstate__` returns."""
    return restored, (type(x), dumps(state))


class Copied:
    """An object with a pickle of its own, whose copies need none."""

    def __copy__(self) -> Any:
        return self._with(self, vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        values = copy.deepcopy(tuple(self), memo) if isinstance(self, tuple) else self
        found = memo[id(self)] = self._with(values, {})
        vars(found).update({name: copy.deepcopy(x, memo) for name, x in vars(self).items()})
        return found

    def _with(self, values: Any, state: dict[str, Any]) -> Any:
        kind: Any = type(self)
        found = tuple.__new__(kind, values) if issubclass(kind, tuple) else object.__new__(kind)
        vars(found).update(state)
        return found


class NotKept:
    """Stands for what no pickle can hold; says so where it is used.

    Args:
        name: of the argument.
        value: what an optimiser's state had for parameters.
    """

    def __init__(self, name: str, value: Any = None):
        self.name, self.value = name, value

    def get_params(self, state: Any) -> Any:
        """An optimiser's parameters, those it was pickled with."""
        return self.value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses."""
        raise ValueError(f"`{self.name}` cannot be pickled, and was left out of the fit's pickle; make a new `SVI`.")

    init = update = eval_and_update = eval_and_stable_update = __call__
