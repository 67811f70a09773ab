"""Names for the kinds of array that public signatures take and return."""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Shaped

# Anything `jnp.asarray` accepts: a JAX or NumPy array, a number, a (nested) list of numbers.
ArrayLike = Any
# A key of either kind: `jax.random.key(0)` or the older raw `jax.random.PRNGKey(0)`.
Key = PRNGKeyArray | jax.Array
# A key of either kind or a whole number; `as_key` makes a key of it, and refuses the rest.
KeyLike = Any

StateVector = Float[Array, "*batch state"]
StateFactor = Float[Array, "*batch state state"]
StatePathArray = Float[Array, "*batch time state"]
Series = Float[Array, "*batch time obs"]
Mask = Bool[Array, "*batch time obs"]
Scalar = Float[Array, "*batch"]

__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "Float",
    "Key",
    "KeyLike",
    "Mask",
    "Scalar",
    "Series",
    "Shaped",
    "StateFactor",
    "StatePathArray",
    "StateVector",
]
