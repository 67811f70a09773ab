"""Functions that models are made of: transitions, noises and emissions of `(z, u)`, checked, and as pytrees."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Array

STATE_NOISE = (
    "`chol_Q` is a function of the state, and this method needs a constant noise. With a function work: `simulate`, "
    "`StatePath` (draws, `log_prob`, NUTS, `NonCenteredPath`), `particle_filter`, `particle_smoother`, "
    "`conditional_smc`, `particle_gibbs`, `PseudoMarginal`, `gaussian_filter`, `gaussian_smoother` and "
    "`GaussianFilterMarginal`."
)


class _Static(NamedTuple):
    """A callable without its arrays, for the comparison of two models: its structure, and its other leaves."""

    structure: Any
    others: tuple[tuple[int, Any], ...]


def split_callable(function: Any) -> tuple[tuple[Array, ...], _Static]:
    """Arrays of a callable pytree, and the rest; the rests of two equal callables are equal."""
    leaves, structure = jax.tree.flatten(function)
    if len(leaves) == 1 and leaves[0] is function:  # a plain function
        leaves, structure = jax.tree.flatten(jax.tree_util.Partial(function))
    others = tuple((i, x) for i, x in enumerate(leaves) if not isinstance(x, jax.Array | np.ndarray))
    places = dict(others)
    return tuple(jnp.asarray(x) for i, x in enumerate(leaves) if i not in places), _Static(structure, others)


def join_callable(arrays: tuple[Array, ...], static: _Static) -> Any:
    """The callable of which `split_callable` made these."""
    places, rest = dict(static.others), iter(arrays)
    count = len(arrays) + len(places)
    return jax.tree.unflatten(static.structure, [places[i] if i in places else next(rest) for i in range(count)])


def check_takes(name: str, function: Any, *counts: int) -> None:
    """Refuses what is no function of `(z, u)`, or of `z` where one argument is allowed."""
    wanted = " or ".join({1: "(z)", 2: "(z, u)"}[count] for count in counts)
    if not callable(function):
        raise TypeError(f"`{name}` must be a function of {wanted}; got {type(function).__name__}.")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin that does not say
        return
    for count in counts:
        try:
            signature.bind(*range(count))
        except TypeError:
            continue
        return
    raise TypeError(f"`{name}` must be a function of {wanted}; got one of {signature}. Without inputs `u` is None.")


def check_step(transition: Callable[..., Array], z: Array, u: Array | None) -> None:
    """Refuses a transition that does not return a state: another shape would broadcast without a word."""
    found = jax.eval_shape(transition, z, u)
    shape = getattr(found, "shape", None)
    if shape != z.shape:
        given = f"an array of shape {shape}" if shape is not None else f"a {type(found).__name__}"
        raise ValueError(f"`transition` must return the next state, an array of shape {z.shape}; got {given}.")


def check_noise(chol_Q: Callable[..., Array], z: Array, u: Array | None) -> int:
    """Refuses a noise function that does not return a factor; returns its number of columns."""
    found = jax.eval_shape(chol_Q, z, u)
    shape = getattr(found, "shape", ())
    if len(shape) != 2 or shape[0] != len(z):
        given = f"an array of shape {shape}" if hasattr(found, "shape") else f"a {type(found).__name__}"
        raise ValueError(f"`chol_Q` must return a factor of shape ({len(z)}, noise); got {given}.")
    return shape[1]


def takes_two(function: Callable[..., Any]) -> bool:
    """Whether a function needs a second argument."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters) >= 2
