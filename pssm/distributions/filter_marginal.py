"""The distribution of observations under a Gaussian filter: approximate, for nonlinear and non-Gaussian models."""

import math

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from pssm._checks import also_called, as_float, check_count
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.distributions.marginal import real_or_missing_matrix
from pssm.distributions.state_path import StatePath
from pssm.events import draw, of_events
from pssm.filters import gaussian_filter, gaussian_smoother
from pssm.filters.linearize import Linearize, rule
from pssm.linalg.random import standard_normal
from pssm.nonlinear import NonlinearSSM, check_nonlinear
from pssm.results import FilterResult, SmootherResult


class GaussianFilterMarginal(dist.Distribution):
    """`p(y_{1:T})` with the states integrated out APPROXIMATELY, by a Gaussian filter; event shape `(time, obs)`.

    For NUTS and SVI over the parameters of a nonlinear model, without its path. `log_prob` is the filter's likelihood
    (Laplace's step by step where the emission is not normal): neither exact nor a bound, and it need not integrate to
    one. Check it: against `particle_filter` at the posterior mean, or with the path sampled.

    Args:
        model: the model.
        num_steps: number of time steps.
        u: inputs `(time, input)`.
        linearize: "ekf", "ukf", "cubature", "gauss_hermite" or a rule of one's own, as in `gaussian_filter`. `method`
            is the older name.
        num_iters: iterations of each update.

    Example:
        >>> import jax.numpy as jnp, numpyro
        >>> def counts(y=None, num_steps=None):
        ...     sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        ...     model = NonlinearSSM(jnp.zeros(1), jnp.eye(1), lambda z, u: 0.9 * z, sigma * jnp.eye(1),
        ...                          lambda z: dist.Poisson(jnp.exp(z)).to_event(1))
        ...     numpyro.sample("y", GaussianFilterMarginal(model, num_steps), obs=y)
        >>> numpyro.handlers.trace(numpyro.handlers.seed(counts, 0)).get_trace(num_steps=5)["y"]["value"].shape
        (5, 1)
    """

    pytree_data_fields = ("model", "u")
    pytree_aux_fields = ("num_steps", "method", "num_iters")
    support = real_or_missing_matrix  # pyright: ignore[reportAssignmentType]
    reparametrized_params: list[str] = []
    understands_missing = True

    @also_called(method="linearize")
    def __init__(
        self,
        model: NonlinearSSM,
        num_steps: int,
        u: ArrayLike | None = None,
        *,
        linearize: str | Linearize = "ekf",
        num_iters: int = 1,
        validate_args: bool | None = None,
    ):
        self.model = check_nonlinear(model)
        self.num_steps, self.num_iters = check_count("num_steps", num_steps), check_count("num_iters", num_iters)
        rule(linearize)
        self.method = linearize
        self.u = None if u is None else as_float("u", u)
        if self.u is not None and self.u.ndim == 1:
            self.u = self.u[:, None]
        size = self.model.emission_size(None if self.u is None else self.u[0])
        super().__init__((), (self.num_steps, size), validate_args=validate_args)

    @property
    def linearize(self) -> str | Linearize:
        """The rule."""
        return self.method

    @of_events
    def log_prob(self, value: Array) -> Array:
        """The filter's log-likelihood."""
        return self.log_prob_steps(value).sum(-1)

    def log_prob_steps(self, value: ArrayLike) -> Array:
        """`log p(y_t | y_{1:t-1})` by the filter, `(..., time)`."""
        y = as_float("value", value)
        run = jnp.vectorize(lambda y: self.filter(y).log_likelihoods, signature="(t,p)->(t)")
        return run(y)

    def filter(self, y: ArrayLike) -> FilterResult:
        """Filtered states."""
        return gaussian_filter(self.model, y, self.u, linearize=self.method, num_iters=self.num_iters)

    def smooth(self, y: ArrayLike) -> SmootherResult:
        """Smoothed states."""
        return gaussian_smoother(self.model, y, self.u, linearize=self.method, num_iters=self.num_iters)

    def signal(self, z: Array) -> Array:
        """Means of the observations of a path `(time, state)`, `(time, obs)`."""
        return jax.vmap(lambda z, u: jnp.atleast_1d(self.model.emission(z, u).mean))(z, self.u)

    def future(self, key: KeyLike, y: ArrayLike, num_steps: int) -> tuple[Array, Array, Array]:
        """The next steps after the first observations of the series, from a draw of the filtered state on.

        Args:
            key: random key.
            y: the first observations, `(known, obs)`; the distribution itself covers `known + num_steps` or more.
            num_steps: number of steps.

        Returns:
            Mean and variance of the observations given a drawn path of the states, and a draw, `(num_steps, obs)` each.
        """
        key = as_key(key)
        first, later, last = jax.random.split(key, 3)
        known, rows = as_float("y", y), slice(len(y), len(y) + num_steps)
        gap = jnp.full((self.num_steps - len(known), known.shape[-1]), jnp.nan, known.dtype)
        found = self.filter(jnp.concatenate([known, gap]))
        mean, chol = found.mean[len(known) - 1], found.chol[len(known) - 1]
        z = mean + chol @ standard_normal(first, mean.shape, mean.dtype)
        prior = StatePath.from_ssm(self.model, self.num_steps, self.u)
        path = prior.continued(later, jnp.broadcast_to(z, (len(known), *z.shape)))[rows]

        def emit(key: Key, z: Array, u: Array | None) -> tuple[Array, Array, Array]:
            e = self.model.emission(z, u)
            return jnp.atleast_1d(e.mean), jnp.atleast_1d(e.variance), jnp.atleast_1d(draw(e, key))

        return jax.vmap(emit)(jax.random.split(last, num_steps), path, None if self.u is None else self.u[rows])

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws from the model itself."""
        if not sample_shape:
            return self.model.simulate(key, self.num_steps, self.u)[1]
        keys = jax.random.split(key, math.prod(sample_shape))
        draw = jax.vmap(lambda k: self.model.simulate(k, self.num_steps, self.u)[1])
        return draw(keys).reshape(*sample_shape, *self.event_shape)
