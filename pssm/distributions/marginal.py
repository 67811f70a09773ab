"""The distribution of the observations of a linear-Gaussian model, states integrated out exactly."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.distributions.in_units import from_origin
from pssm.distributions.state_path import StatePath
from pssm.events import of_events
from pssm.filters import (
    forecast,
    kalman_smoother,
    log_likelihood,
    log_likelihoods,
    sample_states,
    simulate,
)
from pssm.linalg import outer
from pssm.linalg.low_rank import as_matrix
from pssm.partly_observed import log_prob_observed
from pssm.results import ForecastResult, SmootherResult
from pssm.ssm import LinearGaussianSSM, check_inputs, check_num_steps


class _RealOrMissingMatrix(constraints._SingletonConstraint):
    """Finite numbers, or NaN for missing, with event shape `(time, obs)`."""

    event_dim = 2

    def __call__(self, x: Array) -> Array:
        return ~jnp.isinf(x).any((-1, -2))

    def feasible_like(self, prototype: Array) -> Array:
        return jnp.zeros_like(prototype)


real_or_missing_matrix = _RealOrMissingMatrix()


class LinearGaussianMarginal(dist.Distribution):
    """`p(y_{1:T} | u_{1:T}) = int p(z_{1:T}, y_{1:T} | u_{1:T}) dz`, event shape `(time, obs)`; exact.

    NaN entries of a value are missing. Batch axes of `ssm` and `u` are batch axes of the distribution.

    Args:
        ssm: the model. Time-varying arrays cover `num_steps` steps, or more: those that follow are for `forecast`.
        num_steps: number of time steps, at least 1.
        u: inputs `(..., time, input)`, where the model has `B` or `D`.
        origin: numbers `(obs,)` from which the series is counted: `ssm` is the model of `y - origin`. Of a NumPy array
            of 64 bits it is subtracted in 64 bits, so that 32 bits hold what is left of heights near 1e7.
        u_origin: numbers `(input,)` from which inputs are counted, those of the future too.
        state_origin: what `origin` is of the states, `(state,)`: added to smoothed and sampled states.

    Raises:
        ValueError: `num_steps`, `u` or the length of time-varying arrays do not fit.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from pssm import LinearGaussianSSM
        >>> def nile(y=None, num_steps=None):
        ...     one = jnp.eye(1)
        ...     s_level = numpyro.sample("s_level", dist.HalfNormal(100.0))
        ...     s_obs = numpyro.sample("s_obs", dist.HalfNormal(200.0))
        ...     ssm = LinearGaussianSSM(jnp.zeros(1), 1e3 * one, one, s_level * one, one, s_obs * one)
        ...     numpyro.sample("y", LinearGaussianMarginal(ssm, num_steps), obs=y)
        >>> numpyro.handlers.trace(numpyro.handlers.seed(nile, 0)).get_trace(num_steps=5)["y"]["value"].shape
        (5, 1)
    """

    pytree_data_fields = ("whole_ssm", "u", "origin", "u_origin", "state_origin")
    pytree_aux_fields = ("num_steps",)
    support = real_or_missing_matrix  # pyright: ignore[reportAssignmentType]
    reparametrized_params: list[str] = []  # equal to arg_constraints, which has none: draws are differentiable
    understands_missing = True

    def __init__(
        self,
        ssm: LinearGaussianSSM,
        num_steps: int,
        u: ArrayLike | None = None,
        *,
        origin: ArrayLike | None = None,
        u_origin: ArrayLike | None = None,
        state_origin: ArrayLike | None = None,
        validate_args: bool | None = None,
    ):
        if not isinstance(ssm, LinearGaussianSSM):
            raise TypeError(f"`ssm` must be a LinearGaussianSSM; got {type(ssm).__name__}.")
        self.num_steps = check_count("num_steps", num_steps)
        check_num_steps(ssm, num_steps, "`num_steps`", or_more=True)
        self.whole_ssm = ssm
        self.origin, self.u_origin, self.state_origin = origin, u_origin, state_origin
        self.u = check_inputs(ssm, None if u is None else from_origin(u, u_origin), num_steps)
        batch = jnp.broadcast_shapes(ssm.batch_shape, () if self.u is None else self.u.shape[:-2])
        super().__init__(batch, (num_steps, ssm.n_obs), validate_args=validate_args)

    @property
    def ssm(self) -> LinearGaussianSSM:
        """The model of the `num_steps` steps; `whole_ssm` is the one that was given."""
        longer = self.whole_ssm.num_steps not in (None, self.num_steps)
        return self.whole_ssm.steps(0, self.num_steps) if longer else self.whole_ssm

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Series of shape `sample_shape + batch_shape + (time, obs)`."""
        count = 1
        for size in sample_shape:
            count *= size
        keys = jax.random.split(key, count)
        y = jax.vmap(lambda k: simulate(k, self.ssm, self.num_steps, self.u)[1])(keys)
        return _above(y.reshape(*sample_shape, *self.batch_shape, *self.event_shape), self.origin)

    @of_events
    def log_prob(self, value: Array) -> Array:
        """`log p(y_{1:T})` over the observed entries, exact, `sample_shape + batch_shape`."""
        return log_likelihood(self.ssm, self.differences(value), self.u)

    def log_prob_steps(self, value: Array) -> Array:
        """`log p(y_t | y_{1:t-1})` for each step, `(..., time)`; 0 where nothing is observed."""
        return log_likelihoods(self.ssm, self.differences(value), self.u)

    def smooth(self, value: Array) -> SmootherResult:
        """The posterior of the states given a series."""
        found = kalman_smoother(self.ssm, self.differences(value), self.u)
        return found if self.state_origin is None else found._replace(mean=_above(found.mean, self.state_origin))

    def sample_states(self, key: KeyLike, value: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Paths from the posterior of the states given a series, `sample_shape + (..., time, state)`."""
        key = as_key(key)
        path = sample_states(key, self.ssm, self.differences(value), self.u, sample_shape=sample_shape)
        return _above(path, self.state_origin)

    def forecast(
        self,
        value: Array,
        num_steps: int,
        u_future: ArrayLike | None = None,
        *,
        y_future: ArrayLike | None = None,
    ) -> ForecastResult:
        """Moments of the `num_steps` steps after a series; given the known (not NaN) entries of `y_future`, if any."""
        ahead = None if u_future is None else from_origin(u_future, self.u_origin)
        known = None if y_future is None else from_origin(y_future, self.origin)
        found = forecast(self.whole_ssm, self.differences(value), num_steps, self.u, ahead, y_future=known)
        mean, state_mean = _above(found.mean, self.origin), _above(found.state_mean, self.state_origin)
        return found._replace(mean=mean, state_mean=state_mean)

    def differences(self, value: ArrayLike) -> Array:
        """A series counted from `origin`, with all batch axes."""
        found = from_origin(value, self.origin)
        return jnp.broadcast_to(found, jnp.broadcast_shapes(jnp.shape(found), self.batch_shape + self.event_shape))

    @property
    def mean(self) -> Array:
        """`E[y]`, `batch_shape + (time, obs)`."""
        return self._moments()[0]

    @property
    def variance(self) -> Array:
        """`Var(y)`, entry by entry, `batch_shape + (time, obs)`."""
        return jnp.diagonal(self._moments()[1], axis1=-2, axis2=-1)

    def _moments(self) -> tuple[Array, Array]:
        """Prior moments: the predictions of a filter that sees nothing."""
        nothing = jnp.full((*self.batch_shape, *self.event_shape), jnp.nan, self.ssm.dtype)
        prior = kalman_smoother(self.ssm, nothing, self.u)
        C, R = self.ssm.with_time_axis("C"), outer(self.ssm.with_time_axis("chol_R"))
        return _above(self.ssm.signal(prior.mean, self.u), self.origin), outer(C @ prior.chol) + R


def _above(x: Array, origin: ArrayLike | None) -> Array:
    """`origin + x`, rounded to the precision of JAX."""
    return x if origin is None else x + jnp.asarray(origin, x.dtype)


@log_prob_observed.register
def _(d: dist.GaussianStateSpace, value: Array) -> Array:
    """A path of NumPyro's with gaps: the series of a model that reads its states without noise."""
    A, L = jnp.asarray(d.transition_matrix), jnp.asarray(d.scale_tril)
    return _path_with_gaps(LinearGaussianSSM(d.initial_value @ A.T, L, A, L, *_exactly(A)), d, value)


@log_prob_observed.register
def _(d: StatePath, value: Array) -> Array:
    """A path with gaps, where the transition is linear."""
    if not d.is_linear:
        return log_prob_observed.dispatch(object)(d, value)
    timed = tuple({"transition": "A"}.get(name, name) for name in d.time_varying)
    factors = as_matrix(d.chol_P0), as_matrix(d.chol_Q)
    ssm = LinearGaussianSSM(
        d.m0, factors[0], d.transition, factors[1], *_exactly(d.m0), b=d.b, B=d.B, time_varying=timed
    )
    return _path_with_gaps(ssm, d, value, d.u)


def _exactly(like: Array) -> tuple[Array, Array]:
    """`C` and `chol_R` of readings of the whole state without noise."""
    n = like.shape[-1]
    return jnp.eye(n, dtype=like.dtype), jnp.zeros((n, n), like.dtype)


def _path_with_gaps(ssm: LinearGaussianSSM, d: dist.Distribution, value: Array, u: Array | None = None) -> Array:
    return LinearGaussianMarginal(ssm, d.event_shape[0], u).log_prob(value)
