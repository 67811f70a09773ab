"""Values that have another event shape than their distribution are refused, not broadcast."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax.numpy as jnp
from numpyro.distributions.util import validate_sample

from pssm._types import Array


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
