"""Batches of models and series: `vmap` over whatever leading axes there are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.ssm import FIELDS, LinearGaussianSSM, rebuild


def over_batches(fn: Callable[..., Any], ssm: LinearGaussianSSM, *arrays: tuple[Array | None, int]) -> Any:
    """Calls `fn(ssm, *arrays)` once for every element of the batch, by `vmap`.

    Args:
        fn: takes an unbatched model and unbatched arrays (or None).
        ssm: a model, with batch axes or without.
        arrays: pairs of an array (or None) and its number of core axes; axes in front of those are batch axes.

    What has no batch axes is passed on once, not copied.
    """
    shapes = [ssm.batch_shape, *(x.shape[: x.ndim - core] for x, core in arrays if x is not None)]
    batch = jnp.broadcast_shapes(*shapes)
    plain = [x for x, _ in arrays]
    if not batch:
        return fn(ssm, *plain)

    def flatten(x: Array, own: int) -> Array:
        return jnp.broadcast_to(x, batch + x.shape[own:]).reshape((-1,) + x.shape[own:])

    fields, field_axes = {}, {}
    for name in FIELDS:
        x = getattr(ssm, name)
        own = len(ssm.batch_dims(name)) if x is not None else 0
        fields[name] = flatten(x, own) if own else x
        field_axes[name] = 0 if own else None
    flat = [x if x is None or x.ndim == core else flatten(x, x.ndim - core) for x, core in arrays]
    axes = [None if x is None or x.ndim == core else 0 for x, core in arrays]
    model, model_axes = rebuild(fields, ssm.time_varying), rebuild(field_axes, ssm.time_varying)
    results = jax.vmap(fn, in_axes=(model_axes, *axes))(model, *flat)
    return jax.tree.map(lambda x: x.reshape(batch + x.shape[1:]), results)
