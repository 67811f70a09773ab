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
from pssm.callables import join_callable, split_callable
from pssm.distributions.state_path import LOG_2PI, StatePath
from pssm.events import of_events
from pssm.linalg import Diagonal, solve_lower, triangularise
from pssm.linalg.low_rank import Factor
from pssm.linalg.random import standard_normal


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
        prior: a `StatePath` that the steps follow which are not `seen`: after the last observation it is exact.
        seen: steps that follow the conditionals, `(..., time)`; with `prior`.

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

    pytree_data_fields = ("h", "start", "_dynamic", "prior", "seen")
    pytree_aux_fields = ("_static",)
    support = constraints.independent(constraints.real, 2)  # pyright: ignore[reportAssignmentType]
    reparametrized_params: list[str] = []  # equal to arg_constraints, which has none: draws are differentiable

    def __init__(
        self,
        conditional: Callable[[Array, Array], tuple[Array, Array]],
        h: ArrayLike,
        start: ArrayLike,
        *,
        prior: StatePath | None = None,
        seen: ArrayLike | None = None,
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
        if (prior is None) != (seen is None):
            raise ValueError("`prior` and `seen` go together: the steps that are not `seen` follow `prior`.")
        if prior is not None and prior.event_shape != (self.h.shape[-2], self.start.shape[0]):
            raise ValueError(
                f"`prior` must be of paths {(self.h.shape[-2], self.start.shape[0])}; got {prior.event_shape}."
            )
        self.prior, self.seen = prior, None if seen is None else jnp.asarray(seen, bool)
        self._dynamic, self._static = split_callable(conditional)
        event = (self.h.shape[-2], self.start.shape[0])
        batch = self.h.shape[:-2]
        if prior is not None and self.seen is not None:
            batch = jnp.broadcast_shapes(batch, self.seen.shape[:-1], prior.batch_shape)
        super().__init__(batch, event, validate_args=validate_args)

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

        def one(a: dict[str, Any]) -> Array:
            def own(z: Array, h: Array, e: Array) -> Array:
                mean, sd = conditional(z, h)
                return mean + sd * e

            if self.prior is None:

                def step(z: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
                    z = own(z, *xs)
                    return z, z

                return jax.lax.scan(step, self.start, (a["h"], a["noise"]))[1]

            prior, rows = self.prior, {"h": a["h"], "e": a["noise"], "seen": a["seen"]}
            first = {name: x[0] for name, x in rows.items()}
            z = own(self.start, first["h"], first["e"])
            z = jnp.where(first["seen"], z, a["m0"] + times(square(a["chol_P0"]), first["e"]))

            def either(z: Array, xs: tuple[dict[str, Array], dict[str, Any]]) -> tuple[Array, Array]:
                row, timed = xs
                now = {**a, **timed}
                # What is not taken is evaluated at zero: no NaN of it may reach a gradient.
                ahead = prior.step(now, jnp.where(row["seen"], 0.0, z)) + times(square(now["chol_Q"]), row["e"])
                z = jnp.where(row["seen"], own(jnp.where(row["seen"], z, 0.0), row["h"], row["e"]), ahead)
                return z, z

            later = {name: x[1:] for name, x in rows.items()}
            return jnp.concatenate([z[None], jax.lax.scan(either, z, (later, prior.timed(a)))[1]])

        return self._map(one, batch, {"noise": noise}, {"noise": 2})

    @of_events
    def log_prob(self, value: Array) -> Array:
        """Exact log density of paths `(..., time, state)`; no scan."""

        def one(a: dict[str, Any]) -> Array:
            own = self._own_densities(a)
            return own.sum() if self.prior is None else jnp.where(a["seen"], own, self._prior_densities(a)).sum()

        return self._map(one, jnp.broadcast_shapes(value.shape[:-2], self.batch_shape), {"z": value}, {"z": 2})

    def log_ratio(self, value: Array, prior: dist.Distribution | None = None) -> Array:
        """`log q(z) - log p(z)` of paths `(..., time, state)`; `p` is by default this one's own `prior`."""
        if prior is not None or self.prior is None:
            if prior is None:
                raise ValueError("`prior` must be given: this distribution was made without one.")
            return self.log_prob(value) - prior.log_prob(value)

        def one(a: dict[str, Any]) -> Array:
            return jnp.where(a["seen"], self._own_densities(a) - self._prior_densities(a), 0.0).sum()

        return self._map(one, jnp.broadcast_shapes(value.shape[:-2], self.batch_shape), {"z": value}, {"z": 2})

    def kl_given(self, value: Array, prior: dist.Distribution | None = None) -> Array:
        """`sum_t KL(q(z_t | z_{t-1}) || p(z_t | z_{t-1}))` along paths `(..., time, state)`, for regular noise of `p`.

        Its expectation under `q` is `KL(q || prior)`. By default `p` is the `prior` that this was made with.
        """
        if self.prior is not None and prior is not None:
            raise NotImplementedError("no divergence in closed form: steps without data follow another prior")
        p = self.prior if prior is None else prior
        if not isinstance(p, StatePath):
            raise NotImplementedError(f"no divergence in closed form from a {type(p).__name__}")

        def one(a: dict[str, Any]) -> Array:
            mean, sd = self._conditionals(a)
            found = gaussian_kl(a["chol_P0"], mean[0] - a["m0"], sd[0])[None]
            if p.num_steps > 1:
                timed, apart = p.timed(a), mean[1:] - p.means(a, a["z"])
                timed_noise = "chol_Q" in timed
                later = jax.vmap(gaussian_kl, in_axes=(0 if timed_noise else None, 0, 0))
                rest = later(timed["chol_Q"] if timed_noise else a["chol_Q"], apart, sd[1:])
                found = jnp.concatenate([found, rest])
            return found.sum() if self.prior is None else jnp.where(a["seen"], found, 0.0).sum()

        arrays, cores = p.arrays()
        batch = jnp.broadcast_shapes(value.shape[:-2], self.batch_shape, p.batch_shape)
        return self._map(one, batch, {**arrays, "z": value}, {**cores, "z": 2})

    def _map(
        self, one: Callable[..., Array], batch: tuple[int, ...], xs: dict[str, Any], cores: dict[str, Any]
    ) -> Array:
        """`one` for each series, with this distribution's arrays and those of its prior."""
        arrays, own = ({}, {}) if self.prior is None else self.prior.arrays()
        seen = {} if self.seen is None else {"seen": self.seen}
        return map_batch(one, batch, {**arrays, "h": self.h, **seen, **xs}, {**own, "h": 2, "seen": 1, **cores})

    def _conditionals(self, a: dict[str, Array]) -> tuple[Array, Array]:
        """Means and scales along an unbatched path, `(time, state)` each."""
        before = jnp.concatenate([self.start[None], a["z"][:-1]])
        return jax.vmap(self.conditional)(before, a["h"])

    def _own_densities(self, a: dict[str, Any]) -> Array:
        """The log density of each step by the conditionals."""
        mean, sd = self._conditionals(a)
        return -0.5 * jnp.sum(LOG_2PI + 2 * jnp.log(sd) + ((a["z"] - mean) / sd) ** 2, axis=-1)

    def _prior_densities(self, a: dict[str, Any]) -> Array:
        """The log density of each step by the prior."""
        prior: Any = self.prior

        def density(factor: Factor, apart: Array) -> Array:
            white, pivots = whitened(square(factor), apart)
            return -0.5 * jnp.sum(LOG_2PI + white**2) - jnp.sum(jnp.log(pivots))

        found = density(a["chol_P0"], a["z"][0] - a["m0"])[None]
        if prior.num_steps == 1:
            return found
        timed, apart = prior.timed(a), a["z"][1:] - prior.means(a, a["z"])
        timed_noise = "chol_Q" in timed
        later = jax.vmap(density, in_axes=(0 if timed_noise else None, 0))
        return jnp.concatenate([found, later(timed["chol_Q"] if timed_noise else a["chol_Q"], apart)])


def square(factor: Factor) -> Factor:
    """A factor of the same covariance with as many columns as rows."""
    return factor if isinstance(factor, Diagonal) else triangularise(factor)


def times(factor: Factor, e: Array) -> Array:
    """A square factor times a vector."""
    return factor.scale * e if isinstance(factor, Diagonal) else factor @ e


def whitened(factor: Factor, x: Array) -> tuple[Array, Array]:
    """`L^{-1} x` of a square factor, and the absolute pivots of `L`."""
    if isinstance(factor, Diagonal):
        return x / factor.scale, jnp.abs(factor.scale)
    return solve_lower(factor, x[:, None])[:, 0], jnp.abs(jnp.diagonal(factor))


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
