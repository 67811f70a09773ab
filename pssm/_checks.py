"""One style for every error: the argument in backticks, what was expected, what came, and the next step.

Shapes and dtypes are static, so looking at them costs nothing under `jit`. Values are looked at only when they are
there (outside of `jit`, `vmap` and `grad`): a traced array passes.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from decimal import Decimal
from difflib import get_close_matches
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pssm._types import ArrayLike


def is_traced(x: object) -> bool:
    """True where the values of `x` cannot be looked at: inside `jit`, `vmap`, `grad` or `scan`."""
    return isinstance(x, Tracer)


def unmasked(x: Any, name: str = "y") -> Any:
    """A masked array of NumPy, or a frame, a series or an array of pandas, as a plain array; anything else as it is.

    Entries that are masked or missing (None, `pd.NA`) are NaN, which makes whole numbers floats.

    Raises:
        TypeError: a frame or a series holds something else than numbers.
    """
    if isinstance(x, np.ma.MaskedArray):
        return np.ma.filled(x.astype(np.result_type(x.dtype, np.float32)), np.nan)
    return _of_pandas(x, name) if is_pandas(x) else x


def is_pandas(x: Any) -> bool:
    """Whether `x` is a frame, a series or an array of pandas, which takes a second to import: only if it is there."""
    pd: Any = sys.modules.get("pandas")
    if pd is None or not hasattr(pd, "api"):
        return False
    return isinstance(x, pd.DataFrame | pd.Series | pd.Index | pd.api.extensions.ExtensionArray)


def _of_pandas(x: Any, name: str) -> np.ndarray:
    pd: Any = sys.modules["pandas"]
    if isinstance(x, pd.DataFrame):
        if not x.shape[1]:
            raise TypeError(f"`{name}` is a frame without a column; give it one of numbers.")
        return np.stack([_of_pandas(x.iloc[:, j].rename(x.columns[j]), name) for j in range(x.shape[1])], axis=1)
    x = pd.Series(x)
    if x.dtype == object:  # numbers beside None, or beside `pd.NA`
        known = x.dropna()
        if all(isinstance(v, int | float | np.number | Decimal) and not isinstance(v, bool) for v in known):
            values = np.full(len(x), np.nan)
            values[x.notna().to_numpy()] = [float(v) for v in known]
            return values
    elif pd.api.types.is_numeric_dtype(x.dtype) and not pd.api.types.is_complex_dtype(x.dtype):
        if not x.isna().any():
            plain = x.to_numpy()
            return plain if plain.dtype != object else x.to_numpy(dtype=float)
        kind = np.float32 if str(x.dtype).lower() == "float32" else np.float64
        return x.to_numpy(dtype=kind, na_value=np.nan)
    where = f"its column {x.name!r}" if x.name is not None else "it"
    example = x.dropna().iloc[0] if x.notna().any() else None
    raise TypeError(
        f"`{name}` must be numbers; {where} has dtype {x.dtype}, such as {str(example)[:40]!r}. Leave the column out, "
        "make it numbers (`pd.to_numeric`), or make dates the index of the frame."
    )


def unmasked_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A model's arguments without masked arrays and frames of pandas, which JAX does not take."""
    if any(isinstance(x, np.ma.MaskedArray) or is_pandas(x) for x in jax.tree.leaves((args, kwargs))):
        args = jax.tree.map(unmasked, args)
        kwargs = {name: jax.tree.map(lambda x, name=name: unmasked(x, name), value) for name, value in kwargs.items()}
    return args, kwargs


def as_float(name: str, x: ArrayLike) -> jax.Array:
    """`x` as a floating-point JAX array, or a `TypeError` that names the argument.

    Integers and lists are welcome, and masked arrays and frames of pandas, whose missing entries become NaN.
    """
    try:
        array = jnp.asarray(unmasked(x, name))
    except (TypeError, ValueError) as error:
        if is_pandas(x):  # whose message names the column
            raise
        raise TypeError(f"`{name}` must be an array of numbers; got {type(x).__name__}: {error}") from None
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"`{name}` must be real; got dtype {array.dtype}. Pass its real part.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jnp.result_type(float))
    return array


def check_finite(name: str, x: jax.Array, *, allow_nan: bool = False) -> None:
    """Refuses infinite values, and NaN unless it stands for a missing entry. Traced values pass."""
    if is_traced(x):
        return
    values = np.asarray(x)
    if allow_nan and np.isinf(values).any():
        where = tuple(int(i) for i in np.argwhere(np.isinf(values))[0])
        raise ValueError(f"`{name}` has an infinite value at index {where}. Mark a missing entry with NaN instead.")
    if not allow_nan and not np.isfinite(values).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(f"`{name}` must be finite; got {values[where]} at index {where}.")


def check_shape(name: str, x: jax.Array, expected: tuple[int, ...], meaning: str) -> None:
    """Compares the trailing axes of `x` with `expected`; `meaning` says in words what the axes are."""
    if x.shape[x.ndim - len(expected) :] != expected or x.ndim < len(expected):
        raise ValueError(f"`{name}` must have shape {expected} ({meaning}); got {x.shape}.")


def check_choice(name: str, value: str, choices: tuple[str, ...] | list[str]) -> None:
    """Refuses a value that is not among `choices`, and says which one may have been meant."""
    if value in choices:
        return
    close = get_close_matches(str(value), [str(c) for c in choices], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"`{name}` must be one of {', '.join(repr(c) for c in choices)}; got {value!r}.{hint}")


def also_called(**names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A function whose arguments have second names: `@also_called(n_state="num_states")`.

    Raises:
        TypeError: (from the function) both names are given.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)
        places = list(signature.parameters)

        @functools.wraps(function)
        def renamed(*args: Any, **kwargs: Any) -> Any:
            for alias in names.keys() & kwargs.keys():
                name = names[alias]
                if kwargs[alias] is None:  # its default, which a call with all arguments bound has
                    del kwargs[alias]
                    continue
                if name in kwargs or len(args) > places.index(name):
                    raise TypeError(f"`{alias}` and `{name}` are two names for one argument; give one of them.")
                kwargs[name] = kwargs.pop(alias)
            return function(*args, **kwargs)

        rest = list(signature.parameters.values())
        place = next((i for i, p in enumerate(rest) if p.kind is inspect.Parameter.VAR_KEYWORD), len(rest))
        added = [inspect.Parameter(alias, inspect.Parameter.KEYWORD_ONLY, default=None) for alias in names]
        renamed.__dict__["__signature__"] = signature.replace(parameters=[*rest[:place], *added, *rest[place:]])
        return renamed

    return decorate


def check_count(name: str, value: int, *, least: int = 1) -> int:
    """A whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"`{name}` must be a whole number; got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}; got {value}.")
    return int(value)


def check_series(y: ArrayLike, n_obs: int, name: str = "y") -> jax.Array:
    """A series of shape `(..., time, n_obs)` as floats; `(time,)` is taken as one column where `n_obs` is 1.

    NaN entries are missing. Raises `ValueError` for another shape, for no time steps, and for infinite values; warns
    where the values are 64-bit but would lose their variation in the 32-bit arithmetic that is switched on.
    """
    series = as_float(name, y)
    _warn_lost_precision(name, y)
    if series.ndim == 1 and n_obs == 1:
        series = series[:, None]
    if series.ndim < 2 or series.shape[-1] != n_obs:
        hint = ""
        if series.ndim == 2 and series.shape[0] == n_obs:
            hint = f" Its first axis has length {n_obs}: transpose it."
        elif series.ndim == 1:
            hint = " A one-dimensional series is accepted only where the model has one observed variable."
        raise ValueError(f"`{name}` must have shape (time, {n_obs}); got {series.shape}.{hint}")
    if series.shape[-2] == 0:
        raise ValueError(f"`{name}` must have at least one time step; got shape {series.shape}.")
    check_finite(name, series, allow_nan=True)
    return series


def _warn_lost_precision(name: str, y: ArrayLike) -> None:
    """Says so when converting float64 data to float32 rounds away part of the variation in the data."""
    lost = _lost(y)
    if lost is not None:
        warnings.warn(
            f"`{name}` is 64-bit data whose typical step ({lost[1]:.3g}) is close to what 32-bit numbers of "
            f"its size can tell apart ({lost[0]:.3g}). Subtract an offset, or switch on 64-bit arithmetic with "
            'jax.config.update("jax_enable_x64", True).',
            stacklevel=4,
        )


def is_rounded(values: ArrayLike) -> bool:
    """Whether 64-bit data `(time,)` or `(..., time, obs)` lose part of their variation in the 32 bits that JAX uses."""
    return _lost(values) is not None


def _lost(y: ArrayLike) -> tuple[float, float] | None:
    """Rounding and typical step of the first column whose steps the rounding to 32 bits reaches; None for no such."""
    if isinstance(y, jax.Array) or is_traced(y) or jnp.result_type(float) == jnp.float64:
        return None
    values = np.asarray(unmasked(y))
    if values.dtype != np.float64 or values.size < 2:
        return None
    values = values[:, None] if values.ndim == 1 else values
    with np.errstate(invalid="ignore", over="ignore"):
        rounding = np.abs(values.astype(np.float32).astype(np.float64) - values)
        steps = np.abs(np.diff(values, axis=-2))
    for column in range(values.shape[-1]):
        moved, error = steps[..., column], rounding[..., column]
        moved, error = moved[np.isfinite(moved) & (moved > 0)], error[np.isfinite(error)]
        if moved.size and error.size and error.max() > 1e-3 * np.median(moved):
            return float(error.max()), float(np.median(moved))
    return None


def check_sample_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tuple of whole numbers, none negative."""
    if not isinstance(shape, tuple | list):
        raise TypeError(f"`sample_shape` must be a tuple of whole numbers, such as (10,); got {shape!r}.")
    return tuple(check_count("sample_shape", size, least=0) for size in shape)
