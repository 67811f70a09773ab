"""Equinox modules as NumPyro parameters, with parts that stay as they are."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
import numpyro


def is_trainable(leaf: Any) -> bool:
    """Whether a leaf of a module is trained by default: a JAX array of floats. NumPy arrays are constants."""
    return eqx.is_inexact_array(leaf) and not isinstance(leaf, np.ndarray)


def register(
    name: str,
    module: Any,
    *,
    trainable: Any = is_trainable,
    fixed: Callable[[Any], Any] | None = None,
) -> Any:
    """Makes the arrays of an Equinox module parameters of a NumPyro model or guide; to be called inside of it.

    The parameters are one site, `{name}$params`, as with NumPyro's `eqx_module`, which trains every array of floats,
    NumPy arrays among them. Here NumPy arrays are constants, and any other part can be held too. Held parts are no
    parameters, so weight decay does not move them either.

    Args:
        name: prefix of the site's name; the same name in model and guide means the same parameters.
        module: a module made outside of the model, or any pytree. Without arrays to train it is returned unchanged.
        trainable: the trained parts: a function of a leaf, or a pytree of booleans, as in `equinox.partition`.
        fixed: picks parts of the module that are held besides, as in `equinox.tree_at`: `lambda m: (m.A, m.C)`.

    Returns:
        The module with the current values of its parameters.

    Example:
        >>> import equinox as eqx, jax, numpyro
        >>> net = eqx.nn.Linear(3, 2, key=jax.random.key(0))
        >>> def model():
        ...     return register("net", net, fixed=lambda m: m.bias)
        >>> trace = numpyro.handlers.trace(model).get_trace()
        >>> [x.shape for x in jax.tree.leaves(trace["net$params"]["value"])]
        [(2, 3)]
    """
    if callable(trainable):
        spec = jax.tree.map(lambda leaf: bool(trainable(leaf)), module)
    else:
        spec = trainable
    if fixed is not None:
        spec = eqx.tree_at(fixed, spec, replace_fn=lambda part: jax.tree.map(lambda _: False, part))
    params, rest = eqx.partition(module, spec)
    if not jax.tree.leaves(params):
        return module
    return eqx.combine(numpyro.param(f"{name}$params", lambda _: params), rest)
