"""Missing data: NaN becomes a boolean mask and a harmless filled value, never a sentinel."""

import jax.numpy as jnp

from pssm._types import Array, Bool, Float


def split_missing(y: Float[Array, "*shape"], fill: float = 0.0) -> tuple[Float[Array, "*shape"], Bool[Array, "*shape"]]:
    """Splits `y` into values without NaN and the mask of observed entries.

    The NaN is replaced before anything is computed from it: a `where` after the computation would give a right value
    and a NaN gradient.

    Args:
        y: any shape; NaN means missing.
        fill: value at the missing entries.

    Returns:
        `(filled, observed)`, both of the shape of `y`.

    Example:
        >>> import jax.numpy as jnp
        >>> filled, observed = split_missing(jnp.array([1.0, jnp.nan]))
        >>> print(filled, observed)
        [1. 0.] [ True False]
    """
    observed = ~jnp.isnan(y)
    return jnp.where(observed, y, fill), observed
