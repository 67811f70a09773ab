"""Observed sites whose NaN entries are missing, for any NumPyro distribution; moments of what is observed."""

import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import i0e, i1e
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.distributions.util import validate_sample

from pssm._checks import as_float, check_finite, is_traced
from pssm._types import Array, ArrayLike, Key
from pssm.linalg import solve_lower, triangularise

LOG_2PI = 1.8378770664093453


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

    Independent entries (scalar distributions, with `.to_event` or without) are masked one by one. A
    `MultivariateNormal` is marginalised exactly over its observed coordinates. Any other joint event (`Dirichlet`,
    `Multinomial`, ...) is scored only where it is complete. A distribution that understands NaN itself, such as
    `LinearGaussianMarginal`, gets the value unchanged. Draws are complete: they are draws from `base`.

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
        return self.base.sample(key, sample_shape)

    @validate_sample
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


def _understands_missing(d: dist.Distribution) -> bool:
    return getattr(d, "understands_missing", False)


def log_prob_observed(d: dist.Distribution, value: Array) -> Array:
    """`d.log_prob` over the observed entries, by the kind of `d`."""
    if isinstance(d, WithMissing) or _understands_missing(d):
        return d.log_prob(value)
    if isinstance(d, dist.Independent):
        each = log_prob_observed(d.base_dist, value)
        return each.sum(tuple(range(-d.reinterpreted_batch_ndims, 0)))
    if isinstance(d, dist.ExpandedDistribution):
        each = log_prob_observed(d.base_dist, value)
        sample_and_batch = jnp.shape(value)[: jnp.ndim(value) - d.event_dim]
        return jnp.broadcast_to(each, jnp.broadcast_shapes(sample_and_batch, d.batch_shape))
    if isinstance(d, dist.MaskedDistribution):
        return jnp.where(d._mask, log_prob_observed(d.base_dist, value), 0.0)
    if isinstance(d, dist.MultivariateNormal):
        return _marginal_normal(d, value)
    value = jnp.broadcast_to(value, jnp.broadcast_shapes(jnp.shape(value), d.batch_shape + d.event_shape))
    missing = jnp.isnan(value)
    if d.event_dim:
        missing = jnp.broadcast_to(missing.any(tuple(range(-d.event_dim, 0)), keepdims=True), missing.shape)
    filled = jnp.where(missing, _harmless(d, value), value)
    if d.support.is_discrete:
        filled = filled.astype(jnp.result_type(int))
    each = d.log_prob(filled)
    if d.event_dim:
        missing = missing[(..., *(0,) * d.event_dim)]
    return jnp.where(missing, 0.0, each)


def _harmless(d: dist.Distribution, value: Array) -> Array:
    """Values inside the support, near the middle, at which density and gradient are finite."""
    feasible = jnp.asarray(d.support.feasible_like(value), value.dtype)
    if d.support is constraints.real or d.support is constraints.real_vector:
        try:
            mean = jnp.broadcast_to(jax.lax.stop_gradient(d.mean), value.shape)
        except NotImplementedError:
            return feasible
        return jnp.where(jnp.isfinite(mean), mean, feasible).astype(value.dtype)
    return feasible


def _marginal_normal(d: dist.MultivariateNormal, value: Array) -> Array:
    """The exact normal density of the observed coordinates: rows of the factor that are missing are dropped."""
    shape = jnp.broadcast_shapes(value.shape, d.batch_shape + d.event_shape)
    size = shape[-1]
    residual = jnp.broadcast_to(value - d.loc, shape).reshape(-1, size)
    missing = jnp.broadcast_to(jnp.isnan(value), shape).reshape(-1, size)  # not of `residual`: under `vmap` over `loc`
    factors = jnp.broadcast_to(d.scale_tril, shape + (size,)).reshape(-1, size, size)  # one factor then does for all

    def one(r: Array, missing: Array, factor: Array) -> Array:
        seen = ~missing
        chol = triangularise(jnp.where(seen[:, None], factor, 0.0))
        whitened = solve_lower(chol, jnp.where(seen, r, 0.0))
        terms = LOG_2PI + 2 * jnp.log(jnp.where(seen, jnp.diagonal(chol), 1.0)) + whitened**2
        return -0.5 * jnp.sum(jnp.where(seen, terms, 0.0))

    return jax.vmap(one)(residual, missing, factors).reshape(shape[:-1])


def observe(name: str, distribution: dist.Distribution, obs: ArrayLike | None = None) -> Array:
    """`numpyro.sample(name, distribution, obs=obs)` in which NaN entries of `obs` are missing.

    Args:
        name: the site's name.
        distribution: any NumPyro distribution; its shape, batch and event, is that of `obs`.
        obs: observed values, NaN where missing; None draws from the distribution (prediction).

    Returns:
        The observed values, or the draw.

    Raises:
        ValueError: an infinite value, or an event of a joint distribution of which only some entries are missing and
            whose marginal is not known. (Values are checked outside of `jit` only.)

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
    check_finite("obs", values, allow_nan=True)
    _check_partial_events(distribution, values)
    return numpyro.sample(name, WithMissing(distribution), obs=values)


def _check_partial_events(d: dist.Distribution, values: Array) -> None:
    while isinstance(d, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        d = d.base_dist
    if is_traced(values) or not d.event_dim or _understands_missing(d) or isinstance(d, dist.MultivariateNormal):
        return
    missing = np.isnan(np.asarray(values))
    axes = tuple(range(-d.event_dim, 0))
    if np.any(missing.any(axes) & ~missing.all(axes)):
        raise ValueError(
            f"`obs` has an event with some entries missing, and the marginal of {type(d).__name__} is not known. "
            "Make the whole event NaN, or use independent entries or a MultivariateNormal."
        )


class EmissionMoments(NamedTuple):
    """Mean and noise of the observation given the state.

    Attributes:
        mean: `E[s(y) | z]`, `(statistic,)`; `s` is the identity, the indicators of all but the last category, or the
            cosine and the sine of an angle.
        factor: factor of `Cov(s(y) | z)`, `(statistic, noise)`, or `(statistic,)` for a diagonal one.
    """

    mean: Array
    factor: Array


def base_of(d: dist.Distribution) -> dist.Distribution:
    """The distribution inside of `to_event`, `expand` and masks."""
    while isinstance(d, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        d = d.base_dist
    return getattr(d, "base", d)  # WithMissing


def statistic_of(d: dist.Distribution, y: Array) -> Array:
    """`s(y)` of one observation or of a series `(..., obs)`; NaN where it is missing."""
    base = base_of(d)
    if isinstance(base, dist.VonMises):
        return jnp.stack([jnp.cos(y), jnp.sin(y)], axis=-1).reshape(*y.shape[:-1], -1)
    if not isinstance(base, dist.CategoricalProbs | dist.CategoricalLogits):
        return y
    kinds = jnp.arange(jnp.shape(base.probs)[-1] - 1)
    found = jnp.where(jnp.isnan(y)[..., None], jnp.nan, y[..., None] == kinds)
    return found.reshape(*y.shape[:-1], -1).astype(y.dtype)


def moments_of(d: dist.Distribution) -> EmissionMoments:
    """Mean and noise of the statistic.

    Raises:
        ValueError: they are not known.
    """
    base, shape = base_of(d), d.batch_shape + d.event_shape
    if isinstance(base, dist.CategoricalProbs | dist.CategoricalLogits):
        return _category_moments(jnp.atleast_2d(base.probs))
    if isinstance(base, dist.MultivariateNormal):
        return EmissionMoments(base.loc, base.scale_tril)
    if isinstance(base, dist.VonMises):
        loc, concentration = (jnp.broadcast_to(x, shape).reshape(-1) for x in (base.loc, base.concentration))
        return _angle_moments(loc, concentration)
    if base.event_dim:
        raise _no_moments(base, "are not known as a mean and a factor")
    if "ircular" in type(base.support).__name__:
        raise _no_moments(base, "on the circle are not known; the VonMises distribution's are")
    try:
        mean, variance = (jnp.broadcast_to(x, shape).reshape(-1) for x in (base.mean, base.variance))
    except NotImplementedError:
        raise _no_moments(base, "are not known") from None
    some = variance > 0  # a probability that rounds to one has none, and its root no derivative
    factor = jnp.where(some, jnp.sqrt(jnp.where(some, variance, 1.0)), 0.0)
    return EmissionMoments(mean, jnp.where(jnp.isfinite(mean) & jnp.isfinite(variance), factor, jnp.nan))


def check_moments(d: dist.Distribution) -> None:
    """Refuses a distribution without mean and variance; where they are traced they are NaN, and the result is."""
    found, base = moments_of(d), base_of(d)
    parameters = [jnp.asarray(getattr(base, name)) for name in base.arg_constraints if hasattr(base, name)]
    if any(is_traced(x) for x in (*found, *parameters)) or not all(bool(jnp.isfinite(x).all()) for x in parameters):
        return  # parameters that overflow are no fault of the family
    if not all(bool(jnp.isfinite(x).all()) for x in found):
        raise _no_moments(base, "are not finite")


def _no_moments(base: dist.Distribution, why: str) -> ValueError:
    return ValueError(
        f"`emission`: the moments of {type(base).__name__} {why}. Methods that go by moments cannot take it: use "
        "`laplace_path`, a guide, or a particle filter with the bootstrap or the guided proposal."
    )


def _category_moments(probs: Array) -> EmissionMoments:
    """Indicators of all but the last category, `(variables, categories)` probabilities.

    `Cov = diag(p) - p p' = F F'` with the columns `sqrt(p_k) (e_k - p)` of all categories, the last one too.
    """
    count, kinds = probs.shape
    p = probs[:, :-1]
    columns = jnp.eye(kinds - 1, kinds, dtype=p.dtype) - p[:, :, None]
    return EmissionMoments(p.reshape(-1), _block_diagonal(columns * jnp.sqrt(probs)[:, None]))


def _angle_moments(loc: Array, concentration: Array) -> EmissionMoments:
    """Cosine and sine of angles with von Mises distributions: smooth in the location, so that no residual is wrapped.

    With `A = I_1 / I_0` of the concentration `k` the mean is `A (cos loc, sin loc)`. The variance across this direction
    is `A / k`, along it `1 - A / k - A^2`. The Fisher information about `loc` is that of the angle, `A k`.

    Source:
        Mardia & Jupp 2000, section 3.5.4.
    """
    k = concentration
    A = i1e(k) / i0e(k)
    large = k > 50.0  # where the difference would cancel
    inverse = 1.0 / jnp.where(large, k, 1.0)
    along = jnp.where(large, 0.5 * inverse**2 * (1.0 + 0.5 * inverse), 1.0 - A / k - A**2)
    outward = jnp.stack([jnp.cos(loc), jnp.sin(loc)], axis=-1)
    across = jnp.stack([-jnp.sin(loc), jnp.cos(loc)], axis=-1)
    blocks = jnp.stack([jnp.sqrt(along)[:, None] * outward, jnp.sqrt(A / k)[:, None] * across], axis=-1)
    return EmissionMoments((A[:, None] * outward).reshape(-1), _block_diagonal(blocks))


def _block_diagonal(blocks: Array) -> Array:
    """`(count, rows, columns)` as one matrix."""
    count, rows, columns = blocks.shape
    spread = jnp.eye(count, dtype=blocks.dtype)[:, None, :, None] * blocks[:, :, None]
    return spread.reshape(count * rows, count * columns)
