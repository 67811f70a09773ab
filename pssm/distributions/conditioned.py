"""A path whose conditionals a network makes from what it has read: the structured posterior of deep Kalman filters."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from pssm._checks import as_float
from pssm._types import Array, ArrayLike, Key
from pssm.batch import map_batch
from pssm.distributions.state_path import LOG_2PI, StatePath
from pssm.events import of_events
from pssm.linalg import Diagonal, solve_lower, triangularise
from pssm.linalg.low_rank import Factor
from pssm.linalg.random import standard_normal
from pssm.nonlinear import join_callable, split_callable


class ConditionedPath(dist.Distribution):
    """`q(z_{1:T}) = prod_t N(z_t; m_t, diag s_t^2)`, `(m_t, s_t) = conditional(z_{t-1}, h_t)`.

    Event shape `(time, state)`.

    Beside the chain (`LowRankChain`): the conditionals know nothing of the path's prior, and their scales may depend on
    the state; their covariances are diagonal. Draws are trajectories, and `log_prob` is exact.

    Args:
        conditional: a function `(z (state,), h (feature,)) -> (mean (state,), sd (state,))`, `sd` positive; a plain
            function or an Equinox module, whose arrays may be learned.
        h: features of every step, `(..., time, feature)`.
        start: what stands for `z_0`, `(state,)`.

    Raises:
        ValueError: a shape does not fit; the message names the argument.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> q = ConditionedPath(lambda z, h: (0.5 * z + h, 0.1 + 0 * z), jnp.ones((7, 5, 2)), jnp.zeros(2))
        >>> z = q.sample(jax.random.key(0), (10,))
        >>> z.shape, q.log_prob(z).shape
        ((10, 7, 5, 2), (10, 7))

    Source:
        Krishnan, Shalit & Sontag 2017, section 4.
    """

    pytree_data_fields = ("h", "start", "_dynamic")
    pytree_aux_fields = ("_static",)
    support = constraints.independent(constraints.real, 2)  # pyright: ignore[reportAssignmentType]
    reparametrized_params: list[str] = []  # equal to arg_constraints, which has none: draws are differentiable

    def __init__(
        self,
        conditional: Callable[[Array, Array], tuple[Array, Array]],
        h: ArrayLike,
        start: ArrayLike,
        *,
        validate_args: bool | None = None,
    ):
        self.h, self.start = as_float("h", h), as_float("start", start)
        if self.start.ndim != 1:
            raise ValueError(f"`start` must have shape (state,); got {self.start.shape}.")
        if self.h.ndim < 2:
            raise ValueError(f"`h` must have shape (..., time, feature); got {self.h.shape}.")
        found = jax.eval_shape(conditional, self.start, jax.ShapeDtypeStruct(self.h.shape[-1:], self.h.dtype))
        shapes = tuple(x.shape for x in jax.tree.leaves(found))
        if shapes != (self.start.shape,) * 2:
            raise ValueError(
                f"`conditional` must return (mean, sd), both of shape {self.start.shape}; got shapes {shapes}."
            )
        self._dynamic, self._static = split_callable(conditional)
        event = (self.h.shape[-2], self.start.shape[0])
        super().__init__(self.h.shape[:-2], event, validate_args=validate_args)

    @property
    def conditional(self) -> Any:
        """The function as given."""
        return join_callable(self._dynamic, self._static)

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Trajectories of shape `sample_shape + batch_shape + (time, state)`."""
        batch = (*sample_shape, *self.batch_shape)
        return self.path_from_noise(standard_normal(key, (*batch, math.prod(self.event_shape)), self.start.dtype))

    def path_from_noise(self, noise: Array) -> Array:
        """The path driven by standard normal `noise (..., time * state)`: one to one."""
        noise = noise.reshape(*noise.shape[:-1], *self.event_shape)
        batch = jnp.broadcast_shapes(noise.shape[:-2], self.batch_shape)
        conditional = self.conditional

        def one(a: dict[str, Array]) -> Array:
            def step(z: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
                h, e = xs
                mean, sd = conditional(z, h)
                z = mean + sd * e
                return z, z

            return jax.lax.scan(step, self.start, (a["h"], a["noise"]))[1]

        return map_batch(one, batch, {"h": self.h, "noise": noise}, {"h": 2, "noise": 2})

    @of_events
    def log_prob(self, value: Array) -> Array:
        """Exact log density of paths `(..., time, state)`; no scan."""

        def one(a: dict[str, Array]) -> Array:
            mean, sd = self._conditionals(a)
            return -0.5 * jnp.sum(LOG_2PI + 2 * jnp.log(sd) + ((a["z"] - mean) / sd) ** 2)

        batch = jnp.broadcast_shapes(value.shape[:-2], self.batch_shape)
        return map_batch(one, batch, {"h": self.h, "z": value}, {"h": 2, "z": 2})

    def log_ratio(self, value: Array, prior: dist.Distribution) -> Array:
        """`log q(z) - log p(z)` of paths `(..., time, state)`."""
        return self.log_prob(value) - prior.log_prob(value)

    def kl_given(self, value: Array, prior: dist.Distribution | None) -> Array:
        """`sum_t KL(q(z_t | z_{t-1}) || p(z_t | z_{t-1}))` along paths `(..., time, state)`, for regular noise of `p`.

        Its expectation under `q` is `KL(q || prior)`.
        """
        if not isinstance(prior, StatePath):
            raise NotImplementedError(f"no divergence in closed form from a {type(prior).__name__}")

        def one(a: dict[str, Any]) -> Array:
            mean, sd = self._conditionals(a)
            total = gaussian_kl(a["chol_P0"], mean[0] - a["m0"], sd[0])
            if prior.num_steps == 1:
                return total
            timed, apart = prior.timed(a), mean[1:] - prior.means(a, a["z"])
            timed_noise = "chol_Q" in timed
            later = jax.vmap(gaussian_kl, in_axes=(0 if timed_noise else None, 0, 0))
            return total + later(timed["chol_Q"] if timed_noise else a["chol_Q"], apart, sd[1:]).sum()

        arrays, cores = prior.arrays()
        batch = jnp.broadcast_shapes(value.shape[:-2], self.batch_shape, prior.batch_shape)
        return map_batch(one, batch, {**arrays, "h": self.h, "z": value}, {**cores, "h": 2, "z": 2})

    def _conditionals(self, a: dict[str, Array]) -> tuple[Array, Array]:
        """Means and scales along an unbatched path, `(time, state)` each."""
        before = jnp.concatenate([self.start[None], a["z"][:-1]])
        return jax.vmap(self.conditional)(before, a["h"])


def gaussian_kl(factor: Factor, apart: Array, sd: Array) -> Array:
    """`KL(N(apart, diag sd^2) || N(0, F F'))`, `F` regular."""
    if isinstance(factor, Diagonal):
        white, spread, pivots = apart / factor.scale, sd / factor.scale, jnp.abs(factor.scale)
    else:
        chol = triangularise(factor)
        found = solve_lower(chol, jnp.concatenate([apart[:, None], jnp.diag(sd)], axis=1))
        white, spread, pivots = found[:, 0], found[:, 1:], jnp.diagonal(chol)
    logs = jnp.sum(jnp.log(pivots) - jnp.log(sd))
    return logs + 0.5 * (jnp.sum(white**2) + jnp.sum(spread**2) - apart.size)
