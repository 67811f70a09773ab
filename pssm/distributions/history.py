"""A linear-Gaussian model whose matrices follow from what was observed before, states integrated out exactly."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from pssm._checks import check_count
from pssm._types import Array, ArrayLike, Key
from pssm.batch import map_batch
from pssm.distributions.posterior import LinearGaussianPosterior
from pssm.events import of_events
from pssm.filters import log_likelihood
from pssm.filters.step import emission_mean, predict_one, transition_mean, update_factor, update_mean
from pssm.linalg import triangularise
from pssm.linalg.random import standard_normal
from pssm.linalg.small import matvec
from pssm.ssm import LinearGaussianSSM, check_inputs

MIXED = ("A", "C", "b", "d", "B", "D")


class HistoryMarginal(dist.Distribution):
    """`p(a_{1:T})` of a linear-Gaussian model whose matrices depend on the past of the series; event `(time, size)`.

        z_t = A_t z_{t-1} + B_t u_t + w_t,   a_t = C_t z_t + v_t,   A_t = sum_k w_tk A_k  (so for B, C, b, d)

    with weights `w_t` that are a function of `a_{1:t-1}`. Given a series all matrices are known, and its density is
    exactly the product of the Kalman filter's predictions.

    Args:
        bases: the systems that are mixed, as one model of batch shape `(base,)`; `m0` and the noises are shared,
            without a batch axis.
        weights: a function from a series `(time, size)` to weights `(time, base)`, with `before`, `start()` and
            `step(state, a_{t-1}) -> (state, w_t)` for the same one at a time; see `nets.HistoryWeights`.
        num_steps: length of the series.
        u: inputs `(..., time, input)`, where the bases have `B` or `D`.

    Raises:
        ValueError: the bases are not of one batch axis, or vary in time.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from pssm import nets
        >>> eye = jnp.eye(2)
        >>> bases = LinearGaussianSSM(jnp.zeros(2), eye, jnp.stack([eye, 0.5 * eye]), eye, eye, eye)
        >>> prior = HistoryMarginal(bases, nets.HistoryWeights(2, 2, 8, key=jax.random.key(0)), num_steps=10)
        >>> a = prior.sample(jax.random.key(1), (5,))
        >>> prior.log_prob(a).shape, prior.states(a).sample(jax.random.key(2)).shape
        ((5,), (5, 10, 2))

    Source:
        Fraccaro, Kamronn, Paquet & Winther 2017; there with one sample in place of the sum over states.
    """

    pytree_data_fields = ("bases", "u", "_dynamic")
    pytree_aux_fields = ("num_steps", "_static")
    support = constraints.independent(constraints.real, 2)  # pyright: ignore[reportAssignmentType]
    reparametrized_params: list[str] = []  # equal to arg_constraints, which has none: draws are differentiable

    def __init__(
        self,
        bases: LinearGaussianSSM,
        weights: Any,
        num_steps: int,
        u: ArrayLike | None = None,
        *,
        validate_args: bool | None = None,
    ):
        shared = [x for name in ("m0", "chol_P0", "chol_Q", "chol_R") for x in bases.batch_dims(name)]
        if len(bases.batch_shape) != 1 or bases.time_varying or shared:
            raise ValueError(
                "`bases` must have batch shape (base,), its `m0` and noises none, and no time-varying arrays; got "
                f"{bases!r}."
            )
        self.bases, self.num_steps = bases, check_count("num_steps", num_steps)
        self.u = check_inputs(bases, u, num_steps)
        self._dynamic, self._static = eqx.partition(weights, eqx.is_array)
        batch = () if self.u is None else self.u.shape[:-2]
        super().__init__(batch, (num_steps, bases.n_obs), validate_args=validate_args)

    @property
    def weights(self) -> Any:
        """The weights' function as given."""
        return eqx.combine(self._dynamic, self._static)

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Series of shape `sample_shape + batch_shape + (time, size)`."""
        batch = (*sample_shape, *self.batch_shape)
        n, p = self.bases.n_state, self.bases.n_obs
        width = n + self.bases.chol_Q.shape[-1] + p
        noise = standard_normal(key, (*batch, self.num_steps, width), self.bases.dtype)
        xs, cores = {"noise": noise, "u": self.u}, {"noise": 2, "u": 2}
        return map_batch(self._draw, batch, xs, cores)

    @of_events
    def log_prob(self, value: Array) -> Array:
        """Exact log density of complete series `(..., time, size)`."""
        return log_likelihood(self.system(value, gaps=False), value, self.u)

    def states(self, value: Array) -> LinearGaussianPosterior:
        """The states given a series; where entries are missing (NaN), the weights see their predictions."""
        return LinearGaussianPosterior(self.system(value), value, self.u)

    def system(self, value: Array, *, gaps: bool = True) -> LinearGaussianSSM:
        """The time-varying model of a series `(..., time, size)`.

        Args:
            value: the series.
            gaps: whether it may have NaN for missing entries; the filter's predictions then stand in for them.
        """
        batch = value.shape[:-2]
        of_one = self._weights_with_gaps if gaps else lambda a: self.weights(a["a"])
        w = map_batch(of_one, batch, {"a": value, "u": self.u}, {"a": 2, "u": 2})
        mixed = self._mix(w)
        return self.bases.replace(**mixed, time_varying=tuple(mixed))

    def _mix(self, w: Array) -> dict[str, Array]:
        """The fields that differ between the bases, mixed by weights `(..., base)`."""
        found = {name: getattr(self.bases, name) for name in MIXED}
        differ = {name: x for name, x in found.items() if x is not None and self.bases.batch_dims(name)}
        return {name: jnp.tensordot(w, x, 1) for name, x in differ.items()}

    def _draw(self, x: dict[str, Any]) -> Array:
        bases, weights, u = self.bases, self.weights, x["u"]
        n, p = bases.n_state, bases.n_obs

        def step(carry: tuple, xs: tuple) -> tuple[tuple, Array]:
            state, before, z = carry
            first, e, u = xs
            state, w = weights.step(state, before)
            now = bases.at(self._mix(w))
            moved = transition_mean(now, z, u) + matvec(bases.chol_Q, e[n:-p])
            z = jnp.where(first, bases.m0 + matvec(bases.chol_P0, e[:n]), moved)
            a = emission_mean(now, z, u) + matvec(bases.chol_R, e[-p:])
            return (state, a, z), a

        first = jnp.arange(self.num_steps) == 0
        return jax.lax.scan(step, self._start(bases.m0), (first, x["noise"], u))[1]

    def _weights_with_gaps(self, x: dict[str, Any]) -> Array:
        """The weights of a series with gaps: the Kalman filter, in which predictions stand in for what is missing."""
        bases, weights = self.bases, self.weights

        def step(carry: tuple, xs: tuple) -> tuple[tuple, Array]:
            state, before, (mean, chol) = carry
            first, a, u = xs
            state, w = weights.step(state, before)
            now = bases.at(self._mix(w))
            predicted = predict_one(now, mean, chol, u)
            mean, chol = jnp.where(first, bases.m0, predicted.mean), jnp.where(first, start, predicted.chol)
            observed = ~jnp.isnan(a)
            filled = jnp.where(observed, a, emission_mean(now, mean, u))
            new = update_factor(now, chol, observed)
            mean, _ = update_mean(now, new.gain, new.root, mean, filled, observed, u)
            return (state, filled, (mean, new.new_chol)), w

        start = triangularise(bases.chol_P0)
        first = jnp.arange(self.num_steps) == 0
        return jax.lax.scan(step, self._start((bases.m0, start)), (first, x["a"], x["u"]))[1]

    def _start(self, belief: Any) -> tuple[Any, Array, Any]:
        dtype = self.bases.dtype
        state = jax.tree.map(lambda s: s.astype(dtype) if eqx.is_inexact_array(s) else s, self.weights.start())
        return state, self.weights.before.astype(dtype), belief
