"""Mean and noise of an observation given the state, by the kind of its distribution: for methods that go by moments."""

from typing import NamedTuple

import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import i0e, i1e

from pssm._checks import is_traced
from pssm._types import Array


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
