"""Log densities of values whose NaN entries are missing, by the kind of distribution.

Where the marginal of the observed entries is known it is exact. Where it is not, a joint event of which only a part is
missing is an error; under `jit`, where the values cannot be looked at, its log density is NaN.
"""

from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln, logsumexp
from numpyro.distributions import constraints, transforms

from pssm._checks import is_traced
from pssm._types import Array
from pssm.linalg import solve_lower, triangularise

LOG_2PI = 1.8378770664093453


@singledispatch
def log_prob_observed(d: Any, value: Array) -> Array:
    """`d.log_prob` over the entries of `value` that are not NaN, `sample_shape + batch_shape`.

    A new kind of distribution is registered with `@log_prob_observed.register`, as for the kinds below.

    Raises:
        ValueError: an event with some entries missing, whose marginal is not known.
    """
    if getattr(d, "understands_missing", False):
        return d.log_prob(value)
    if d.event_dim:
        _check_whole_events(d, value)
    value, missing = _broadcast(d, value)
    if d.event_dim:
        partly = missing.any(_event_axes(d)) & ~missing.all(_event_axes(d))
        missing = jnp.broadcast_to(missing.any(_event_axes(d), keepdims=True), missing.shape)
    filled = jnp.where(missing, _harmless(d, value), value)
    whole = jnp.ones((), bool)
    if d.support.is_discrete:
        whole = (filled == jnp.floor(filled)) & (jnp.abs(filled) < jnp.iinfo(jnp.result_type(int)).max)
        filled = filled.astype(jnp.result_type(int))
        whole = whole.all(_event_axes(d)) if d.event_dim else whole
    each = jnp.where(whole, d.log_prob(filled), -jnp.inf)
    if not d.event_dim:
        return jnp.where(missing, 0.0, each)
    return jnp.where(partly, jnp.nan, jnp.where(missing[(..., *(0,) * d.event_dim)], 0.0, each))


@log_prob_observed.register
def _(d: dist.Independent, value: Array) -> Array:
    each = log_prob_observed(d.base_dist, value)
    return each.sum(tuple(range(-d.reinterpreted_batch_ndims, 0)))


@log_prob_observed.register
def _(d: dist.ExpandedDistribution, value: Array) -> Array:
    each = log_prob_observed(d.base_dist, value)
    sample_and_batch = jnp.shape(value)[: jnp.ndim(value) - d.event_dim]
    return jnp.broadcast_to(each, jnp.broadcast_shapes(sample_and_batch, d.batch_shape))


@log_prob_observed.register
def _(d: dist.MaskedDistribution, value: Array) -> Array:
    return jnp.where(d._mask, log_prob_observed(d.base_dist, value), 0.0)


@log_prob_observed.register
def _(d: dist.MultivariateNormal, value: Array) -> Array:
    return _normal(d.loc, d.scale_tril, *_broadcast(d, value))


@log_prob_observed.register
def _(d: dist.MultivariateStudentT, value: Array) -> Array:
    def of_whitened(square: Array, logdet: Array, count: Array, df: Array) -> Array:
        constant = gammaln((df + count) / 2) - gammaln(df / 2) - 0.5 * count * jnp.log(df * jnp.pi)
        return constant - logdet - 0.5 * (df + count) * jnp.log1p(square / df)

    return _elliptical(d.loc, d.scale_tril, *_broadcast(d, value), of_whitened, d.df)


@log_prob_observed.register
def _(d: dist.MatrixNormal, value: Array) -> Array:
    value, missing = _broadcast(d, value)
    rows, columns = d.scale_tril_row, d.scale_tril_column
    factor = jnp.einsum("...ij,...kl->...ikjl", rows, columns)
    size = d.event_shape[0] * d.event_shape[1]
    loc, value, missing = (x.reshape(*x.shape[:-2], size) for x in (jnp.asarray(d.loc), value, missing))
    return _normal(loc, factor.reshape(*factor.shape[:-4], size, size), value, missing)


@log_prob_observed.register
def _(d: dist.LowRankMultivariateNormal, value: Array) -> Array:
    # A missing coordinate counts as one of its own, standard normal and at its mean.
    value, missing = _broadcast(d, value)
    factor = jnp.where(missing[..., None], 0.0, d.cov_factor)
    own = dist.LowRankMultivariateNormal(jnp.zeros(d.event_shape), factor, jnp.where(missing, 1.0, d.cov_diag))
    return own.log_prob(_residual(d.loc, value, missing)) + 0.5 * LOG_2PI * missing.sum(-1)


@log_prob_observed.register
def _(d: dist.GaussianRandomWalk, value: Array) -> Array:
    # The walk from one observed step to the next has the variance of all steps between them.
    value, missing = _broadcast(d, value)
    steps = jnp.arange(value.shape[-1])
    last = jax.lax.cummax(jnp.where(missing, -1, steps), axis=value.ndim - 1)
    before = jnp.concatenate([jnp.full((*last.shape[:-1], 1), -1), last[..., :-1]], axis=-1)
    filled = jnp.where(missing, 0.0, value)
    start = jnp.where(before < 0, 0.0, jnp.take_along_axis(filled, jnp.maximum(before, 0), -1))
    scale = jnp.asarray(d.scale)[..., None] * jnp.sqrt(jnp.where(missing, 1, steps - before))
    return jnp.where(missing, 0.0, dist.Normal(start, scale).log_prob(filled)).sum(-1)


@log_prob_observed.register(dist.MixtureSameFamily)
@log_prob_observed.register(dist.MixtureGeneral)
def _(d: Any, value: Array) -> Array:
    weights = jax.nn.log_softmax(d.mixing_distribution.logits)
    if isinstance(d, dist.MixtureSameFamily):
        each = log_prob_observed(d.component_distribution, jnp.expand_dims(value, -1 - d.event_dim))
    else:
        each = jnp.stack([log_prob_observed(c, value) for c in d.component_distributions], -1)
    mixed = logsumexp(weights + each, axis=-1)
    missing = _broadcast(d, value)[1]
    missing = missing.all(_event_axes(d)) if d.event_dim else missing
    return jnp.where(missing, 0.0, mixed)  # exactly, though the weights may not add up to one to the last digit


@log_prob_observed.register
def _(d: dist.TransformedDistribution, value: Array) -> Array:
    parts = _parts(d.transforms)
    if not d.event_dim or not all(p.domain.event_dim == p.codomain.event_dim == 0 for p in parts):
        return log_prob_observed.dispatch(object)(d, value)
    # Entry by entry: a missing entry of the value is one of the base.
    value, missing = _broadcast(d, value)
    harmless = d.base_dist.support.feasible_like(value)
    for part in parts:
        harmless = part(harmless)
    y, change = jnp.where(missing, harmless, value), jnp.zeros(())
    for part in reversed(parts):
        x = part._inverse(y)
        change = change + jnp.where(missing, 0.0, part.log_abs_det_jacobian(x, y))
        y = x
    base = log_prob_observed(d.base_dist, jnp.where(missing, jnp.nan, y))
    base = base.sum(tuple(range(d.base_dist.event_dim - d.event_dim, 0)))
    return base - change.sum(_event_axes(d))


def _parts(found: Any) -> list[Any]:
    """Transforms without compositions, and without the wrapper that counts axes as those of an event."""
    parts = []
    for transform in found:
        if isinstance(transform, transforms.ComposeTransform):
            parts += _parts(transform.parts)
        elif isinstance(transform, transforms.IndependentTransform):
            parts += _parts([transform.base_transform])
        else:
            parts.append(transform)
    return parts


def _event_axes(d: Any) -> tuple[int, ...]:
    return tuple(range(-d.event_dim, 0))


def _broadcast(d: Any, value: Array) -> tuple[Array, Array]:
    """The value with all batch axes, and which of its entries are missing."""
    value = jnp.broadcast_to(value, jnp.broadcast_shapes(jnp.shape(value), d.batch_shape + d.event_shape))
    return value, jnp.isnan(value)


def _check_whole_events(d: Any, value: Array) -> None:
    """Refuses an event that has some but not all entries missing, where its values can be looked at."""
    if is_traced(value):
        return
    missing = np.isnan(np.asarray(value))
    if np.any(missing.any(_event_axes(d)) & ~missing.all(_event_axes(d))):
        raise ValueError(
            f"`obs` has an event with some entries missing, and the marginal of {type(d).__name__} is not known. "
            "Make the whole event NaN, or use independent entries or a MultivariateNormal."
        )


def _harmless(d: Any, value: Array) -> Array:
    """Values inside the support, near the middle, at which density and gradient are finite."""
    feasible = jnp.asarray(d.support.feasible_like(value), value.dtype)
    if d.support is constraints.real or d.support is constraints.real_vector:
        try:
            mean = jnp.broadcast_to(jax.lax.stop_gradient(d.mean), value.shape)
        except NotImplementedError:
            return feasible
        return jnp.where(jnp.isfinite(mean), mean, feasible).astype(value.dtype)
    return feasible


def _residual(loc: Array, value: Array, missing: Array) -> Array:
    return jnp.where(missing, 0.0, value - loc)


def _normal(loc: Array, factor: Array, value: Array, missing: Array) -> Array:
    def of_whitened(square: Array, logdet: Array, count: Array, _: Array) -> Array:
        return -0.5 * (count * LOG_2PI + square) - logdet

    return _elliptical(loc, factor, value, missing, of_whitened, jnp.zeros(()))


def _elliptical(loc: Array, factor: Array, value: Array, missing: Array, density: Any, parameter: Array) -> Array:
    """Density of the observed coordinates, exact: rows of the factor that are missing are dropped.

    `density(square, logdet, count, parameter)` gets the squared length of the whitened residual, the log determinant of
    its factor and the number of observed coordinates.
    """
    shape, size = value.shape, value.shape[-1]
    residual = _residual(loc, value, missing).reshape(-1, size)
    factors = jnp.broadcast_to(factor, (*shape, size)).reshape(-1, size, size)
    parameters = jnp.broadcast_to(parameter, shape[:-1]).reshape(-1)

    def one(r: Array, missing: Array, factor: Array, parameter: Array) -> Array:
        seen = ~missing
        chol = triangularise(jnp.where(seen[:, None], factor, 0.0))
        whitened = solve_lower(chol, r)
        logs = jnp.log(jnp.where(seen, jnp.diagonal(chol), 1.0))
        square = jnp.sum(jnp.where(seen, whitened**2, 0.0))
        return density(square, jnp.sum(logs), seen.sum(), parameter)

    # Not of the residual: under `vmap` over `loc` one mask, and so one factor, does for all.
    return jax.vmap(one)(residual, missing.reshape(-1, size), factors, parameters).reshape(shape[:-1])
