"""Priors whose unconstrained coordinates have no units, and observations counted from an origin.

NumPyro starts its chains within (-2, 2) of an unconstrained space, and its step sizes adapt from there. A scale of 1e13
is far away in it, and a scale of 1e-9 is not seen. The distributions here are NumPyro's own, with the same densities;
their supports map the unconstrained numbers through a centre and a unit: `centre + unit x`, or `unit exp(x)`. Values,
draws and the names of sites stay in the user's units.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform, biject_to
from numpyro.distributions.util import validate_sample

from pssm._checks import is_traced, unmasked
from pssm._types import Array, ArrayLike, Key
from pssm.partly_observed import log_prob_observed


class _RealInUnits(constraints.Constraint):
    """Real numbers, reached as `centre + unit x`."""

    def __init__(self, centre: ArrayLike, unit: ArrayLike):
        self.centre, self.unit = centre, unit

    def __call__(self, x: Array) -> Array:
        return constraints.real(x)

    def feasible_like(self, prototype: Array) -> Array:
        return jnp.broadcast_to(self.centre, jnp.shape(prototype))

    def tree_flatten(self) -> Any:
        return (self.centre, self.unit), (("centre", "unit"), {})


class _PositiveInUnits(constraints._GreaterThan):
    """Positive numbers, reached as `unit exp(x)`."""

    def __init__(self, unit: ArrayLike):
        # An array, not a number: NumPyro then computes a site's value with the arguments of the call at hand, and not
        # with the unit of the first call (compiled programs that serve several data sets).
        super().__init__(np.zeros(()))
        self.unit = unit

    def feasible_like(self, prototype: Array) -> Array:
        return jnp.broadcast_to(self.unit, jnp.shape(prototype))

    def tree_flatten(self) -> Any:
        return (self.unit,), (("unit",), {"lower_bound": np.zeros(())})


real_in_units = _RealInUnits


@biject_to.register(_RealInUnits)
def _to_real(constraint: _RealInUnits) -> AffineTransform:
    return AffineTransform(constraint.centre, constraint.unit)


@biject_to.register(_PositiveInUnits)
def _to_positive(constraint: _PositiveInUnits) -> ComposeTransform:
    return ComposeTransform([ExpTransform(), AffineTransform(0.0, constraint.unit, domain=constraints.positive)])


class Normal(dist.Normal):
    """NumPyro's `Normal`; its unconstrained coordinate is `(value - centre) / unit`, by default `loc` and `scale`."""

    pytree_data_fields = ("centre", "unit")

    def __init__(
        self,
        loc: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
        *,
        centre: ArrayLike | None = None,
        unit: ArrayLike | None = None,
        validate_args: bool | None = None,
    ):
        self.centre, self.unit = loc if centre is None else centre, scale if unit is None else unit
        super().__init__(loc, scale, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The real numbers, in units."""
        return _RealInUnits(self.centre, self.unit)


class HalfNormal(dist.HalfNormal):
    """NumPyro's `HalfNormal`; its unconstrained coordinate is `log(value / unit)`, `unit` by default `scale`."""

    pytree_data_fields = ("unit",)

    def __init__(self, scale: ArrayLike = 1.0, *, unit: ArrayLike | None = None, validate_args: bool | None = None):
        self.unit = scale if unit is None else unit
        super().__init__(scale, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The positive numbers, in units."""
        return _PositiveInUnits(self.unit)


class InverseGamma(dist.InverseGamma):
    """NumPyro's `InverseGamma`; its unconstrained coordinate is `log(value / unit)`, `unit` by default `rate`."""

    pytree_data_fields = ("unit",)

    def __init__(
        self,
        concentration: ArrayLike,
        rate: ArrayLike = 1.0,
        *,
        unit: ArrayLike | None = None,
        validate_args: bool | None = None,
    ):
        self.unit = rate if unit is None else unit
        super().__init__(concentration, rate, validate_args=validate_args)

    @validate_sample
    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:
        """Log density; without the square of the value, which 32 bits cannot hold for a variance of 1e26."""
        power = (self.concentration + 1) * jnp.log(value)
        return self.concentration * jnp.log(self.rate) - gammaln(self.concentration) - power - self.rate / value

    @property
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The positive numbers, in units."""
        return _PositiveInUnits(self.unit)


# ------------------------------------------------------------------------------------------------------ from an origin


def from_origin(x: ArrayLike, origin: ArrayLike | None) -> Any:
    """`x - origin` as a JAX array: subtracted in 64 bits where both are there as numbers, and only then rounded."""
    if origin is None:
        return x
    if is_traced(x) or is_traced(origin):
        return jnp.asarray(x) - jnp.asarray(origin)
    return jnp.asarray(np.asarray(unmasked(x), np.float64) - np.asarray(origin, np.float64), jnp.result_type(float))


class FromOrigin(dist.Distribution):
    """`origin + X` with `X` from `base`, entry by entry; NaN entries of a value are missing.

    A value that is a NumPy array of 64 bits keeps its small differences from a large origin, which 32 bits cannot hold.

    Args:
        base: the distribution of the differences.
        origin: numbers that broadcast against `base`; a NumPy array of 64 bits.
    """

    pytree_data_fields = ("base", "origin")
    reparametrized_params: list[str] = []
    understands_missing = True

    def __init__(self, base: dist.Distribution, origin: ArrayLike, *, validate_args: bool | None = None):
        self.base, self.origin = base, origin
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """That of `base`."""
        return self.base.support

    @property
    def mean(self) -> Array:
        """Mean, rounded to the precision of JAX."""
        return self.base.mean + jnp.asarray(self.origin)

    @property
    def variance(self) -> Array:
        """Variance of `base`."""
        return self.base.variance

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws, rounded to the precision of JAX."""
        return self.base.sample(key, sample_shape) + jnp.asarray(self.origin)

    def log_prob(self, value: ArrayLike) -> Array:
        """Log density of the entries that are there."""
        return log_prob_observed(self.base, from_origin(value, self.origin))


def counted(fn: Any) -> Any:
    """The distribution of a site without the origin that its values are counted from."""
    if isinstance(fn, dist.Independent):
        inner = counted(fn.base_dist)
        return fn if inner is fn.base_dist else dist.Independent(inner, fn.reinterpreted_batch_ndims)
    return fn.base if isinstance(fn, FromOrigin) else fn
