"""Data over several devices, and over several processes: trials are shared out, parameters are whole on each device."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pssm._types import Array


def shard(data: Any, *, devices: Sequence[Any] | None = None) -> Any:
    """Shares out arrays over devices along their first axis, the trials; hand the result to `fit_svi` in their place.

    The fit is then computed where the data are, and gradients are summed over the devices; up to rounding the result
    is that of one device. With several processes (see `pssm.study.distributed`) each one calls this with the same
    data and keeps only its own share on its devices.

    Args:
        data: an array, or a pytree of arrays, `(trial, ...)`.
        devices: which; all of all processes by default. Their number must divide the number of trials.

    Returns:
        The same pytree of JAX arrays that are spread over the devices.

    Raises:
        ValueError: the trials cannot be shared out evenly.

    Example:
        >>> import numpy as np
        >>> shard(np.zeros((4, 20, 3))).shape
        (4, 20, 3)
    """
    chosen = jax.devices() if devices is None else list(devices)
    sharding = NamedSharding(Mesh(np.array(chosen), ("trials",)), PartitionSpec("trials"))

    def one(x: Any) -> Array:
        x = np.asarray(x)
        if x.ndim == 0 or x.shape[0] % len(chosen):
            raise ValueError(
                f"`data`: the first axis must be shared out over {len(chosen)} devices evenly; got shape {x.shape}. "
                "Add trials of NaN, or choose fewer devices with `devices`."
            )
        x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, data)


def is_spread(x: Any) -> bool:
    """Whether an array lies on more than one device, in parts."""
    return isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding) and x.sharding.num_devices > 1


def everywhere(x: Array) -> NamedSharding:
    """The layout of an array that is whole on each of the devices of `x`."""
    if not isinstance(x.sharding, NamedSharding):
        raise TypeError(f"`x` must be spread by `shard`; got {type(x.sharding).__name__}.")
    return NamedSharding(x.sharding.mesh, PartitionSpec())


def partition(tree: Any) -> tuple[list[Array], Callable[[list[Array]], Any]]:
    """The spread arrays of a pytree, and what puts such a list back in their places."""
    leaves, treedef = jax.tree.flatten(tree)
    where = [i for i, x in enumerate(leaves) if is_spread(x)]

    def rebuild(spread: list[Array]) -> Any:
        found = dict(zip(where, spread, strict=True))
        return treedef.unflatten([found.get(i, x) for i, x in enumerate(leaves)])

    return [leaves[i] for i in where], rebuild


def is_here(x: Any) -> bool:
    """Whether this process can read all of an array: not one that is spread over the devices of several."""
    return not is_spread(x) or x.is_fully_addressable or x.is_fully_replicated


def local_copy(tree: Any) -> Any:
    """The pytree with every spread array whole and on the host; all processes must call it."""

    def one(x: Any) -> Any:
        if not is_spread(x):
            return x
        if is_here(x):
            return np.asarray(x)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(one, tree)
