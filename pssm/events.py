"""The events of distributions: values of another shape are refused, not broadcast; numbers of trials may be floats."""

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.util import validate_sample

from pssm._checks import is_traced
from pssm._types import Array, Key

COUNTED = (
    dist.BinomialLogits,
    dist.BinomialProbs,
    dist.BetaBinomial,
    dist.DirichletMultinomial,
    dist.MultinomialLogits,
    dist.MultinomialProbs,
)


def check_event(d: Any, value: Any) -> None:
    """Raises a `ValueError` where `value` does not end in the event shape of `d`."""
    shape = jnp.shape(value)
    if shape[max(len(shape) - d.event_dim, 0) :] != d.event_shape:
        words = f"{type(d).__name__} has the event shape {d.event_shape}"
        raise ValueError(f"`value` must have shape (..., {', '.join(map(str, d.event_shape))}): {words}; got {shape}.")


def of_events(log_prob: Callable[[Any, Array], Array]) -> Callable[[Any, Array], Array]:
    """A method `log_prob` that refuses values of another event shape, with NumPyro's check of the support."""
    validated = validate_sample(log_prob)

    @wraps(log_prob)
    def checked(self: Any, value: Array) -> Array:
        check_event(self, value)
        return validated(self, value)

    return checked


def draw(d: Any, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
    """`d.sample(key, sample_shape)`, where numbers of trials may be floats, as all inputs of a model are.

    NumPyro's samplers of binomials and multinomials need integers; their densities do not. Wrappers (`to_event`,
    `expand`, `mask`, zero inflation, ...) are looked into.

    Raises:
        ValueError: a number of trials is not whole, and not traced.

    Example:
        >>> draw(dist.Binomial(jnp.array([3.0, 5.0]), 1.0).to_event(1), jax.random.key(0)).tolist()
        [3, 5]
    """

    def is_counted(x: Any) -> bool:
        return isinstance(x, COUNTED)

    return jax.tree.map(lambda x: _whole(x) if is_counted(x) else x, d, is_leaf=is_counted).sample(key, sample_shape)


def _whole(d: Any) -> Any:
    """The distribution with integers as its `total_count`."""
    count = d.total_count
    if not jnp.issubdtype(jnp.result_type(count), jnp.floating):
        return d
    if not is_traced(count):
        values = np.asarray(count)
        wrong = values[~(values == np.round(values))]
        if wrong.size:
            raise ValueError(f"`total_count` of {type(d).__name__} must be whole numbers; got {wrong.flat[0]}.")
    other = copy.copy(d)
    other.total_count = jnp.round(count).astype(int)
    return other
