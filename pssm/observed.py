"""Observed sites whose NaN entries are missing, for any NumPyro distribution."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.primitives import _PYRO_STACK

from pssm._checks import as_float, check_finite, is_traced, unmasked
from pssm._types import Array, ArrayLike, Key
from pssm.events import draw, of_events
from pssm.partly_observed import log_prob_observed


class _OrMissing(constraints.Constraint):
    """The support of another distribution, with NaN allowed at any entry."""

    def __init__(self, base: constraints.Constraint):
        self.base = base

    @property
    def is_discrete(self) -> bool:
        return self.base.is_discrete

    @property
    def event_dim(self) -> int:
        return self.base.event_dim

    def __call__(self, x: Array) -> Array:
        missing = jnp.isnan(x)
        ok = self.base(jnp.where(missing, self.base.feasible_like(x), x))
        if not self.event_dim:
            return ok | missing
        return ok | missing.any(tuple(range(-self.event_dim, 0)))

    def feasible_like(self, prototype: Array) -> Array:
        return self.base.feasible_like(prototype)

    def tree_flatten(self):
        return (self.base,), (("base",), {})


class WithMissing(dist.Distribution):
    """`base`, in which NaN entries of a value are missing: they add nothing to the density, and no NaN to a gradient.

    Independent entries (scalar distributions, with `.to_event` or without) are masked one by one. Joint events whose
    marginals are known are marginalised exactly over their observed entries: multivariate normal, low-rank normal,
    Student-t and matrix normal, Gaussian random walks and state spaces, a `StatePath` with a matrix, mixtures of these,
    and all of them transformed entry by entry. Any other joint event (`Dirichlet`, `Multinomial`, ...) is scored where
    it is complete; one of which only a part is missing is an error, and under `jit` its log density is NaN. A
    distribution that understands NaN itself, such as `LinearGaussianMarginal`, gets the value unchanged. Between the
    whole numbers of a discrete distribution the density is 0. Draws are complete: they are draws from `base`.

    Args:
        base: any NumPyro distribution.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> d = WithMissing(dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        >>> print(f"{d.log_prob(jnp.array([0.0, jnp.nan, 0.0])):.4f}")
        -1.8379
    """

    pytree_data_fields = ("base",)
    reparametrized_params: list[str] = []

    def __init__(self, base: dist.Distribution, *, validate_args: bool | None = None):
        self.base = base
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The support of `base`, or NaN."""
        return _OrMissing(self.base.support)

    @property
    def mean(self) -> Array:
        """Mean of `base`."""
        return self.base.mean

    @property
    def variance(self) -> Array:
        """Variance of `base`."""
        return self.base.variance

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Complete draws from `base`."""
        return draw(self.base, key, sample_shape)

    @of_events
    def log_prob(self, value: Array) -> Array:
        """Log density of the entries that are there, `batch_shape`."""
        return log_prob_observed(self.base, value)


@promote_batch_shape.register
def _promote(d: WithMissing) -> WithMissing:
    """For NumPyro's `scan`, which stacks the distributions of a site along time."""
    stacked = copy.copy(d)
    stacked.base = promote_batch_shape(d.base)
    stacked._batch_shape = stacked.base.batch_shape
    return stacked


def observe(name: str, distribution: dist.Distribution, obs: ArrayLike | None = None) -> Array:
    """`numpyro.sample(name, distribution, obs=obs)` in which NaN entries of `obs` are missing.

    Args:
        name: the site's name.
        distribution: any NumPyro distribution. Its event shape is that of `obs`; its batch shape, plates included, and
            that of `obs` may lack axes of each other, but not both at once.
        obs: observed values, NaN (or the mask of a masked array) where missing; None draws from the distribution
            (prediction).

    Returns:
        The observed values, or the draw.

    Raises:
        ValueError: the shapes do not fit; an infinite value; a value between the whole numbers of a discrete
            distribution; or an event of a joint distribution of which only some entries are missing and whose marginal
            is not known. (Traced values are not looked at: the log density is then -inf or NaN.)

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(counts):
        ...     rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     observe("counts", dist.Poisson(rate * jnp.ones(3)).to_event(1), counts)
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace([1, float("nan"), 3])
        >>> trace["counts"]["value"].shape
        (3,)
    """
    if obs is None:
        return numpyro.sample(name, WithMissing(distribution))
    values = as_float("obs", obs)
    _check_shapes(name, distribution, values.shape)
    if isinstance(obs, np.ndarray) or not is_traced(values):  # JAX traces what it makes of an array inside of `jit`
        plain = np.asarray(unmasked(obs) if isinstance(obs, np.ndarray) else values)
        check_finite("obs", plain, allow_nan=True)
        _check_whole(distribution, plain)
        if distribution.event_dim and np.isnan(plain).any():
            jax.eval_shape(lambda: log_prob_observed(distribution, plain))  # refuses a part of an event, if it must
    return numpyro.sample(name, WithMissing(distribution), obs=values)


def _check_shapes(name: str, d: dist.Distribution, shape: tuple[int, ...]) -> None:
    """Refuses data that would be broadcast against the distribution in both directions: each value counted many times.

    The distribution may be wider than the data (enumerated discrete sites), or the data than the distribution.
    """
    batch, event = np.broadcast_shapes(d.batch_shape, _plate_shape()), d.event_shape
    own, lead = (*batch, *event), shape[: len(shape) - len(event)]
    fits = len(shape) >= len(event) and shape[len(lead) :] == event
    if fits:
        try:
            both = np.broadcast_shapes(batch, lead)
        except ValueError:
            fits = False
        else:
            fits = both in (batch, lead) or _enumerates()
    if not fits:
        hint = ""
        if shape == (*own, 1):
            hint = " Drop the last axis of `obs` (`obs[..., 0]`)."
        elif own == (*shape, 1):
            hint = " Add an axis to `obs` (`obs[..., None]`)."
        elif len(own) > 1 and shape == (*own[:-2], own[-1], own[-2]):
            hint = " Transpose `obs`."
        raise ValueError(
            f"`obs` of {name!r} must have shape {own}, that of its distribution (batch {batch}, event {event}); "
            f"got {shape}.{hint}"
        )


def _plate_shape() -> tuple[int, ...]:
    """The batch shape that the plates around this place ask for; those outside of a `block` do not reach it."""
    sizes: dict[int, int] = {}
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, handlers.block):
            break
        if isinstance(handler, numpyro.plate):
            sizes[-handler.dim] = handler.subsample_size
    return tuple(sizes.get(axis, 1) for axis in range(max(sizes, default=0), 0, -1))


def _enumerates() -> bool:
    """Whether discrete sites may be enumerated, along axes that data do not have."""
    return any(type(h).__module__.startswith("numpyro.contrib.funsor") for h in _PYRO_STACK)


def _check_whole(d: dist.Distribution, values: np.ndarray) -> None:
    if not d.support.is_discrete:
        return
    most = jnp.iinfo(jnp.result_type(int)).max
    wrong = np.argwhere((values != np.floor(values)) & ~np.isnan(values) | (np.abs(values) >= most))
    if len(wrong):
        where = tuple(int(i) for i in wrong[0])
        raise ValueError(
            f"`obs` must have whole numbers below {most}, as its distribution is discrete; "
            f"got {values[where]} at index {where}."
        )
