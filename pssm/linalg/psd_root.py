"""Square roots of covariances that are given as such, for users who think in variances."""

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_finite, is_traced
from pssm._types import Array, ArrayLike, Float


def factor_from_covariance(
    name: str,
    cov: Float[Array, "*batch size size"],
    *,
    relative_tolerance: float | None = None,
    unit: ArrayLike = 1.0,
) -> Float[Array, "*batch size size"]:
    """A square root of a symmetric positive semi-definite matrix, singular or not, with its derivative.

    The derivative by a variance that is zero is one-sided: what a function of `F F'` gains as the variance leaves zero.

    Args:
        name: the argument's name, for the error.
        cov: covariance `(..., size, size)`.
        relative_tolerance: eigenvalues down to minus this times the largest one count as zero; by default
            `100 * size * eps` of the dtype.
        unit: a variance that is large compared with the rounding of others; for derivatives where `cov` is all zero.

    Returns:
        `F` with `F F' = cov` (not triangular), shape `(..., size, size)`.

    Raises:
        ValueError: `cov` is not finite, not symmetric or has a negative eigenvalue. Under `jit` the factor is then NaN.
    """
    size = cov.shape[-1]
    if relative_tolerance is None:
        relative_tolerance = 100 * size * float(jnp.finfo(cov.dtype).eps)
    if not is_traced(cov):
        check_finite(name, cov)
        values = np.asarray(cov, dtype=np.float64)
        largest = np.abs(values).max(initial=0.0)
        skew = np.abs(values - np.swapaxes(values, -1, -2)).max(initial=0.0)
        if skew > relative_tolerance * largest:
            raise ValueError(
                f"`{name}` must be symmetric; it differs from its transpose by {skew:.3g}. "
                f"Pass ({name} + {name}.T) / 2 if that is rounding."
            )
        lowest = np.linalg.eigvalsh(values).min(initial=0.0)
        if lowest < -relative_tolerance * largest:
            raise ValueError(
                f"`{name}` must be a covariance (positive semi-definite); its smallest eigenvalue is {lowest:.3g}."
            )
        return _psd_root(cov, unit)
    root = _psd_root(cov, unit)
    product = root @ jnp.swapaxes(root, -1, -2)  # what was not symmetric or not positive is not in it
    apart, scale = (jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True) for x in (product - cov, cov))
    return jnp.where(apart > size * relative_tolerance * jnp.where(scale > 0, scale, unit), jnp.nan, root)


def factors_from_covariances(given: dict[str, Array], C: Array) -> dict[str, Array]:
    """`factor_from_covariance` of `P0`, `Q`, `R`; one that is all zero takes its unit from the others, through `C`."""
    largest = {name: jnp.max(jnp.abs(x), initial=0.0) for name, x in given.items()}
    gain = jnp.max(jnp.abs(C), initial=0.0) ** 2
    state = jnp.where(largest["Q"] > 0, largest["Q"], largest["P0"])
    by_emission = largest["R"] / jnp.where(gain > 0, gain, 1.0)
    unit = {"P0": jnp.where(state > 0, state, by_emission), "R": gain * state}
    unit["Q"] = unit["P0"]
    positive = {name: jax.lax.stop_gradient(jnp.where(x > 0, x, 1.0)) for name, x in unit.items()}
    return {name: factor_from_covariance(name, x, unit=positive[name]) for name, x in given.items()}


@jax.custom_jvp
def _psd_root(cov: jax.Array, unit: ArrayLike) -> jax.Array:
    """`V sqrt(max(lambda, 0)) V'`, the symmetric square root; diagonal matrices keep their exact diagonal root."""
    return _root(cov, jnp.zeros(cov.shape[:-2], cov.dtype))


def _root(cov: jax.Array, least: jax.Array) -> jax.Array:
    """The root, with eigenvalues raised to `least`, one for each matrix."""
    values, vectors = jnp.linalg.eigh(cov)
    least = least[..., None]
    root = (vectors * jnp.sqrt(jnp.maximum(values, least))[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)
    diagonal = jnp.diagonal(cov, axis1=-2, axis2=-1)
    eye = jnp.broadcast_to(jnp.eye(cov.shape[-1], dtype=cov.dtype), cov.shape)
    return jnp.where(_is_diagonal(cov), jnp.sqrt(jnp.maximum(diagonal, least))[..., None] * eye, root)


def _is_diagonal(cov: jax.Array) -> jax.Array:
    eye = jnp.broadcast_to(jnp.eye(cov.shape[-1], dtype=bool), cov.shape)
    return jnp.all((cov == 0) | eye, axis=(-1, -2), keepdims=True)


@_psd_root.defjvp
def _psd_root_jvp(primals: tuple, tangents: tuple) -> tuple:
    """With `F` the symmetric root, `dF F + F dF = dP`: divide by sums of the roots of the eigenvalues.

    At a zero eigenvalue the root has no derivative, though functions of `F F'` have one. So derivatives, and they
    alone, are taken at a root whose eigenvalues are `least` or more. `least` is below the rounding of other variances:
    the square of a rounding unit for diagonal matrices, where each entry of a derivative is right to its own rounding,
    and a rounding unit for others, whose eigenvalues are off by as much anyway.
    """
    (cov, unit), (d_cov, _) = primals, tangents
    eps = jnp.finfo(cov.dtype).eps
    largest = jnp.max(jnp.abs(cov), axis=(-2, -1))
    least = jnp.where(largest > 0, largest, unit) * jnp.where(_is_diagonal(cov)[..., 0, 0], eps**2, eps)
    root = _root(cov, least)
    values, vectors = jnp.linalg.eigh(cov)
    values = jnp.sqrt(jnp.maximum(values, least[..., None]))
    back = jnp.swapaxes(vectors, -1, -2)
    inner = back @ d_cov @ vectors / (values[..., :, None] + values[..., None, :])
    return root, vectors @ inner @ back
