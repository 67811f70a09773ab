"""Batches of models and series: `vmap` over all leading axes."""

import math
from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pssm._types import Array
from pssm.ssm import FIELDS, LinearGaussianSSM, rebuild


def over_batches(fn: Callable[..., Any], ssm: LinearGaussianSSM, *arrays: tuple[Array | None, int]) -> Any:
    """Calls `fn(ssm, *arrays)` once for every element of the batch, by `vmap`.

    Args:
        fn: takes an unbatched model and unbatched arrays (or None).
        ssm: a model, with batch axes or without.
        arrays: pairs of an array (or None) and its number of core axes; axes in front of those are batch axes.

    Arguments without batch axes are passed once, not copied.
    """
    shapes = [ssm.batch_shape, *(x.shape[: x.ndim - core] for x, core in arrays if x is not None)]
    batch = jnp.broadcast_shapes(*shapes)
    plain = [x for x, _ in arrays]
    if not batch:
        return fn(ssm, *plain)

    def flatten(x: Array, own: int) -> Array:
        return jnp.broadcast_to(x, batch + x.shape[own:]).reshape((math.prod(batch), *x.shape[own:]))

    fields, field_axes = {}, {}
    for name in FIELDS:
        x = getattr(ssm, name)
        own = len(ssm.batch_dims(name)) if x is not None else 0
        fields[name] = flatten(x, own) if own else x
        field_axes[name] = 0 if own else None
    flat = [x if x is None or x.ndim == core else flatten(x, x.ndim - core) for x, core in arrays]
    axes = [None if x is None or x.ndim == core else 0 for x, core in arrays]
    model, model_axes = (rebuild(x, ssm.time_varying, ssm.diffuse) for x in (fields, field_axes))
    results = jax.vmap(fn, in_axes=(model_axes, *axes))(model, *flat)
    return jax.tree.map(lambda x: x.reshape(batch + x.shape[1:]), results)


@overload
def side_by_side(x: Array) -> Array: ...
@overload
def side_by_side(x: None) -> None: ...
def side_by_side(x: Array | None) -> Array | None:
    """`(..., time, size)` as `(time, size, series)`, or `(time, size)`, for a loop over time with all series in a step.

    The series come last because processors work on neighbouring numbers together.
    """
    if x is None or x.ndim == 2:
        return x
    return jnp.moveaxis(x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]), 0, -1)


def apart(x: Array, batch: tuple[int, ...]) -> Array:
    """`(time, size, series)` as `(*batch, time, size)`."""
    return jnp.moveaxis(x, -1, 0).reshape(*batch, *x.shape[:-1]) if batch else x


def for_each(batch: tuple[int, ...], tree: Any) -> Any:
    """The shared arrays, repeated for each series."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (*batch, *x.shape)), tree)


def map_batch(fn: Callable[..., Any], batch: tuple[int, ...], xs: dict[str, Any], cores: dict[str, Any]) -> Any:
    """Calls `fn(one)` for every element of `batch`, `one` holding the unbatched arrays of `xs`, by `vmap`.

    Args:
        fn: takes the dictionary; its results get the batch axes in front.
        batch: the batch shape that all arrays broadcast to.
        xs: arrays (or pytrees of arrays, or None) by name. Arrays without batch axes are shared, not copied.
        cores: number of core axes of each; of a pytree one number, or a pytree of numbers.
    """
    if not batch:
        return jax.jit(fn)(xs)

    def flatten(leaf: Array, core: int) -> Array:
        if leaf.ndim <= core:
            return leaf
        trailing = leaf.shape[leaf.ndim - core :]
        return jnp.broadcast_to(leaf, batch + trailing).reshape(math.prod(batch), *trailing)

    each = {
        name: jax.tree.map(lambda _, core=cores[name]: core, x) if isinstance(cores[name], int) else cores[name]
        for name, x in xs.items()
    }
    axes = jax.tree.map(lambda leaf, core: 0 if leaf.ndim > core else None, xs, each)
    flat = jax.tree.map(flatten, xs, each)
    out = jax.jit(jax.vmap(fn, in_axes=(axes,)))(flat)
    return jax.tree.map(lambda x: x.reshape(batch + x.shape[1:]), out)


@custom_vmap
def in_all_of_a_batch(flag: Array) -> Array:
    """The flag; under `vmap`, whether it holds for every element."""
    return flag


@in_all_of_a_batch.def_vmap
def _in_all_of_a_batch_rule(axis_size: int, in_batched: list, flag: Array) -> tuple[Array, bool]:
    return in_all_of_a_batch(jnp.all(flag, axis=0) if in_batched[0] else flag), False
