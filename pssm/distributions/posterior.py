"""The states of a linear-Gaussian model given its observations, as a distribution over whole paths."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from pssm._checks import as_float, check_finite, check_shape
from pssm._types import Array, ArrayLike, Key
from pssm.distributions.state_path import StatePath
from pssm.events import of_events
from pssm.filters import kalman_smoother, log_likelihood, sample_states
from pssm.linalg import triangularise
from pssm.linalg.random import standard_normal
from pssm.linalg.small import along_time
from pssm.partly_observed import log_prob_observed
from pssm.results import SmootherResult
from pssm.ssm import LinearGaussianSSM, check_inputs, check_model, check_num_steps


class LinearGaussianPosterior(dist.Distribution):
    """`p(z_{1:T} | y_{1:T}, u_{1:T})` of a linear-Gaussian model, exact, event shape `(time, state)`.

    As a guide of the states it makes an ELBO tight, with a single draw, where the model is this one; where the model is
    linearised along a path it is the extended smoother's joint posterior. The density is that of the chain, by Bayes'
    rule `p(z) p(y | z) / p(y)`, and not a product of marginals. Draws and density are differentiable in everything.

    Args:
        ssm: the model; its noise is regular, or paths have no density.
        y: observations `(..., time, obs)`, NaN where missing.
        u: inputs `(..., time, input)`, where the model has `B` or `D`.

    Raises:
        ValueError, TypeError: a shape does not fit; the message names the argument.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> one = jnp.eye(1)
        >>> ssm = LinearGaussianSSM(jnp.zeros(1), one, 0.9 * one, 0.5 * one, one, one)
        >>> q = LinearGaussianPosterior(ssm, jnp.array([[0.3], [jnp.nan], [1.2]]))
        >>> z = q.sample(jax.random.key(0), (10,))
        >>> q.log_prob(z).shape, q.mean.shape
        ((10,), (3, 1))
    """

    pytree_data_fields = ("ssm", "y", "u")
    support = constraints.independent(constraints.real, 2)  # pyright: ignore[reportAssignmentType]
    reparametrized_params: list[str] = []  # equal to arg_constraints, which has none: draws are differentiable

    def __init__(
        self,
        ssm: LinearGaussianSSM,
        y: ArrayLike,
        u: ArrayLike | None = None,
        *,
        validate_args: bool | None = None,
    ):
        check_model(ssm)
        y = as_float("y", y)
        if y.ndim < 2:
            raise ValueError(f"`y` must have shape (time, obs); got {y.shape}.")
        steps = y.shape[-2]
        check_shape("y", y, (steps, ssm.n_obs), "time, obs")
        check_finite("y", y, allow_nan=True)
        check_num_steps(ssm, steps, "`y`")
        self.ssm, self.u = ssm, check_inputs(ssm, u, steps)
        batch = jnp.broadcast_shapes(ssm.batch_shape, y.shape[:-2], () if self.u is None else self.u.shape[:-2])
        self.y = jnp.broadcast_to(y, (*batch, *y.shape[-2:]))
        super().__init__(batch, (steps, ssm.n_state), validate_args=validate_args)

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Paths of shape `sample_shape + batch_shape + (time, state)`."""
        return sample_states(key, self.ssm, self.y, self.u, sample_shape=sample_shape)

    @of_events
    def log_prob(self, value: Array) -> Array:
        """Exact log density of paths `(..., time, state)`."""
        steps = self.event_shape[0]
        prior = StatePath.from_ssm(self.ssm, steps, self.u).log_prob(value)
        noise = dist.MultivariateNormal(self.ssm.signal(value, self.u), scale_tril=_noise(self.ssm))
        batch = jnp.broadcast_shapes(value.shape[:-2], self.batch_shape)
        y = jnp.broadcast_to(self.y, (*batch, *self.y.shape[-2:]))
        given = log_prob_observed(noise, y).sum(-1)
        return prior + given - log_likelihood(self.ssm, self.y, self.u)

    def moments(self) -> SmootherResult:
        """Smoothed means and covariances."""
        return kalman_smoother(self.ssm, self.y, self.u)

    @property
    def mean(self) -> Array:
        """The smoothed mean, `batch_shape + (time, state)`."""
        return self.moments().mean

    @property
    def variance(self) -> Array:
        """The smoothed variances, `batch_shape + (time, state)`."""
        return jnp.diagonal(self.moments().cov, axis1=-2, axis2=-1)


class ImputedSeries(dist.Distribution):
    """A series that is known up to noise where it was seen, and follows from a linear-Gaussian model elsewhere.

        q(a) = prod_{t seen} N(a_t; location_t, scale_t^2)  p(a_unseen | a_seen),  event shape (time, size)

    The conditional is exact for the model that `system` makes of the seen part; it has a density by two likelihoods.

    Args:
        location: `(..., time, size)`.
        scale: standard deviations, of the same shape.
        seen: which steps were seen, `(..., time)`.
        system: a function from a series with NaN at unseen steps to a `LinearGaussianSSM` of its batch shape.
        u: inputs of that model, `(..., time, input)`.
    """

    pytree_data_fields = ("location", "scale", "seen", "system", "u")
    support = constraints.independent(constraints.real, 2)  # pyright: ignore[reportAssignmentType]
    reparametrized_params: list[str] = []  # as above

    def __init__(
        self,
        location: ArrayLike,
        scale: ArrayLike,
        seen: Array,
        system: Callable[[Array], LinearGaussianSSM],
        u: Array | None = None,
        *,
        validate_args: bool | None = None,
    ):
        self.location, self.scale = as_float("location", location), as_float("scale", scale)
        check_shape("scale", self.scale, self.location.shape, "as `location`")
        check_shape("seen", seen, self.location.shape[:-1], "as `location` without the last axis")
        self.seen, self.system, self.u = seen, system, u
        super().__init__(self.location.shape[:-2], self.location.shape[-2:], validate_args=validate_args)

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Series of shape `sample_shape + batch_shape + (time, size)`."""
        own, states, noise = jax.random.split(key, 3)
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        known = self.location + self.scale * standard_normal(own, shape, self.location.dtype)
        series = self.seen_part(known)
        ssm = self.system(series)
        path = sample_states(states, ssm, series, self.u)
        e = standard_normal(noise, (*shape[:-1], ssm.chol_R.shape[-1]), self.location.dtype)
        free = ssm.signal(path, self.u) + along_time(ssm.chol_R, e, "chol_R" in ssm.time_varying)
        return jnp.where(self.seen[..., None], known, free)

    @of_events
    def log_prob(self, value: Array) -> Array:
        """Exact log density of series `(..., time, size)`."""
        each = dist.Normal(self.location, self.scale).log_prob(value)
        known = jnp.where(self.seen[..., None], each, 0.0).sum((-2, -1))
        series = self.seen_part(value)
        ssm = self.system(series)
        return known + log_likelihood(ssm, value, self.u) - log_likelihood(ssm, series, self.u)

    def seen_part(self, value: Array) -> Array:
        """A series with NaN where it was not seen."""
        return jnp.where(self.seen[..., None], value, jnp.nan)


def _noise(ssm: LinearGaussianSSM) -> Array:
    """The factor of `R` as a triangle, with a time axis in front."""
    batch = ssm.chol_R.shape[:-2]
    flat = jax.vmap(triangularise)(ssm.chol_R.reshape(-1, *ssm.chol_R.shape[-2:]))
    factor = flat.reshape(*batch, *flat.shape[-2:])
    return factor if "chol_R" in ssm.time_varying else factor[..., None, :, :]
