"""The fields of a linear-Gaussian model: their names, their axes, and what has to hold of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import as_float, check_choice, check_finite, check_shape, is_traced
from pssm._types import Array, ArrayLike

# Each field with its axes when it is constant in time; `noise` is the free width of chol_Q.
FIELDS: dict[str, tuple[str, ...]] = {
    "m0": ("state",),
    "chol_P0": ("state", "state"),
    "A": ("state", "state"),
    "chol_Q": ("state", "noise"),
    "C": ("obs", "state"),
    "chol_R": ("obs", "obs"),
    "b": ("state",),
    "d": ("obs",),
    "B": ("state", "input"),
    "D": ("obs", "input"),
}
TIME_VARYING = ("A", "chol_Q", "C", "chol_R", "b", "d", "B", "D")
TRANSITION = ("A", "chol_Q", "b", "B")


def checked(
    given: dict[str, Any], time_varying: tuple[str, ...], diffuse: ArrayLike | None
) -> tuple[dict[str, Array | None], tuple[str, ...], tuple[bool, ...]]:
    """The fields as arrays of one floating-point type, and the two settings; the model's `Raises` are raised here."""
    for name in ("m0", "chol_P0", "A", "chol_Q", "C", "chol_R"):
        if given[name] is None:
            raise TypeError(f"`{name}` is required; got None.")
    arrays = {name: None if x is None else as_float(name, x) for name, x in given.items()}
    present = {name: x for name, x in arrays.items() if x is not None}
    dtype = jnp.result_type(*present.values())
    time_varying = _check_names(time_varying, present)
    for source in ("A", "C", "chol_Q"):  # the sizes are read off these three
        if present[source].ndim < 2 + (source in time_varying):
            raise ValueError(
                f"`{source}` must have axes ({', '.join(FIELDS[source])}); got shape {present[source].shape}."
            )
    if present["A"].shape[-1] != present["A"].shape[-2]:
        raise ValueError(f"`A` must be square (state, state); got shape {present['A'].shape}.")
    sizes = {name: present[source].shape[axis] for name, source, axis in _SIZES if _has_axes(present, source, axis)}
    mask, present["chol_P0"] = split_diffuse(diffuse, given["chol_P0"], present["chol_P0"], sizes["state"])
    for name, x in present.items():
        axes = FIELDS[name]
        expected = tuple(sizes.get(axis, -1) for axis in axes)
        if x.ndim < len(axes) + (name in time_varying):
            timed = "time, " if name in time_varying else ""
            raise ValueError(f"`{name}` must have axes ({timed}{', '.join(axes)}); got shape {x.shape}.")
        check_shape(name, x, expected, ", ".join(axes))
        check_finite(name, x)
    _check_lengths(present, time_varying)
    return {name: None if x is None else present[name].astype(dtype) for name, x in arrays.items()}, time_varying, mask


def split_diffuse(
    mask: ArrayLike | None, given: ArrayLike, start: Array, n_state: int, *, covariance: bool = False
) -> tuple[tuple[bool, ...], Array]:
    """Which states have a diffuse start, `()` for none, and the rest of the start's spread.

    Args:
        mask: which do, `(state,)`; besides, those with an infinite entry on the diagonal of `given`.
        given: the start as it came: its numbers are there inside of `jit` too, unless they are computed there.
        start: the same as an array: a factor of `P0`, or `P0` itself, `(..., state, state)`. What it says of diffuse
            states is dropped.
        n_state: size of the state.
        covariance: whether `start` is `P0` itself.
    """
    found = np.zeros(n_state, bool)
    if mask is not None and np.size(mask):
        if is_traced(mask):
            raise TypeError("`diffuse` must be known before tracing: it says which states, not how much.")
        named = np.asarray(mask)
        if named.dtype != bool or named.shape not in ((), (n_state,)):
            raise ValueError(
                f"`diffuse` must be a boolean mask of shape ({n_state},), one entry for each state; "
                f"got {named.dtype} of shape {named.shape}."
            )
        found = found | named
    if start.ndim < 2 or start.shape[-2:] != (n_state, n_state):
        return (), start  # refused later
    if not any(is_traced(x) for x in jax.tree.leaves(given)):
        numbers = np.asarray(given, float)
        infinite = np.isposinf(np.diagonal(numbers, axis1=-2, axis2=-1)).reshape(-1, n_state)
        if np.isinf(numbers[..., ~np.eye(n_state, dtype=bool)]).any():
            return (), start  # refused later: only a variance may be infinite
        if (infinite != infinite[:1]).any():
            raise ValueError("`P0` must have its infinite entries in the same places for all models of a batch.")
        found = found | infinite[0]
    if not found.any():
        return (), start
    dropped = found[:, None] | (found & covariance)
    return tuple(found.tolist()), jnp.where(dropped, 0.0, start)


# Which argument fixes each size: the first one present.
_SIZES = (("state", "A", -1), ("obs", "C", -2), ("noise", "chol_Q", -1), ("input", "D", -1), ("input", "B", -1))


def _has_axes(present: dict[str, jax.Array], name: str, axis: int) -> bool:
    return name in present and present[name].ndim >= -axis


def _check_names(time_varying: tuple[str, ...], present: dict[str, jax.Array]) -> tuple[str, ...]:
    if not isinstance(time_varying, tuple | list):
        raise TypeError(f"`time_varying` must be a tuple of names; got {time_varying!r}. Write (name,).")
    for name in time_varying:
        check_choice("time_varying", name, TIME_VARYING)
        if name not in present:
            raise ValueError(f"`time_varying` names {name!r}, but `{name}` is not given.")
    return tuple(name for name in TIME_VARYING if name in time_varying)


def _check_lengths(present: dict[str, jax.Array], time_varying: tuple[str, ...]) -> None:
    lengths = {name: present[name].shape[-1 - len(FIELDS[name])] for name in time_varying}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"`{name}` {length}" for name, length in lengths.items())
        raise ValueError(f"Time-varying arrays must have one length; got {found} steps.")
