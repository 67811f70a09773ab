"""The chain posterior: a path prior times one potential per step, normalised step by step."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

from pssm._checks import is_traced
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.batch import map_batch
from pssm.distributions.state_path import StatePath
from pssm.events import of_events
from pssm.linalg.low_rank import (
    Diagonal,
    Factor,
    Update,
    condition,
    gaussian_entropy,
    kl,
    log_ratio,
    map_gain,
    not_definite,
    posterior_covariance,
    posterior_map,
    posterior_mean,
    posterior_sample,
    posterior_transition,
    posterior_variance,
)
from pssm.linalg.potential import Potential, as_potential
from pssm.linalg.random import standard_normal
from pssm.linalg.small import SMALL, matmul


class LowRankChain(dist.Distribution):
    """`q(z_{1:T}) = prod_t p(z_t | z_{t-1}) psi_t(z_t) / Z_t(z_{t-1})`, event shape `(time, state)`.

        psi_t(z) = exp(k_t'x + (K_t b_t)'x - x'(diag(diag_t) + K_t K_t' + precision_t)x / 2),    x = z - center_t

    Each conditional `q(z_t | z_{t-1})` is Gaussian with a covariance that does not depend on `z_{t-1}`; the marginals
    are free. Draws are whole trajectories, `log_prob` is exact, and so is the expected log ratio to the prior given a
    path (`kl_given`). With `psi_t(z) = p(y_{t:T} | z)`, the backward message, the chain is the exact posterior; for a
    linear-Gaussian model that message has this form, with rank `state`. A `diag` beside a small rank is much sharper
    than the rank alone.

    `LowRankChain.from_potential(prior, potential)` takes the same as one `Potential`.

    Cost of a draw or a density: `O(time (state rank + rank^2))` and one transition per step, where the prior's noise
    is a `Diagonal`; with a general `chol_Q`, `O(time state^2 (state + rank))`.

    Args:
        prior: the path prior, linear or not.
        k: slopes, `(..., time, state)`; None for zero.
        K: factors, `(..., time, state, rank)`; rank 0 is allowed.
        diag: diagonal precisions, `(..., time, state)`; None for none (the published family). Negative ones are right
            as long as the noise bounds them: `Q_t^{-1} + diag(diag_t)` must be positive definite.
        center: points that the potentials are written around, `(..., time, state)`; None for zero. A centre near the
            posterior's mean keeps float32 free of cancellation.
        b: slopes along the columns of `K`, `(..., time, rank)`; None for zero. `K b` in place of `k` is the tied form.
        precision: symmetric matrices `(..., time, state, state)` of any sign, for small states; None for zero. As for
            `diag`, `Q_t^{-1} + diag(min(diag_t, 0)) + precision_t` must be positive definite.

    Raises:
        ValueError, TypeError: a shape does not fit the prior, or (outside of `jit`; else NaN) a step has no positive
            definite conditional covariance. The message names the argument.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> prior = StatePath(jnp.zeros(2), jnp.eye(2), lambda z, u: jnp.tanh(z), 0.1 * jnp.eye(2), num_steps=5)
        >>> q = LowRankChain(prior, jnp.zeros((5, 2)), jnp.ones((5, 2, 1)), diag=jnp.ones((5, 2)))
        >>> z = q.sample(jax.random.key(0), (10,))
        >>> q.log_prob(z).shape, q.kl_given(z).shape, q.entropy().shape
        ((10,), (10,), ())
    """

    pytree_data_fields = ("prior", "potential")
    support = constraints.independent(constraints.real, 2)  # pyright: ignore[reportAssignmentType]
    reparametrized_params: list[str] = []  # equal to arg_constraints, which has none: draws are differentiable

    prior: StatePath
    potential: Potential

    def __init__(
        self,
        prior: StatePath,
        k: ArrayLike | None,
        K: ArrayLike,
        *,
        diag: ArrayLike | None = None,
        center: ArrayLike | None = None,
        b: ArrayLike | None = None,
        precision: ArrayLike | None = None,
        validate_args: bool | None = None,
    ):
        if not isinstance(prior, StatePath):
            raise TypeError(f"`prior` must be a StatePath; got {type(prior).__name__}.")
        self.prior = prior
        given = Potential(K, diag, b, center, k, precision=precision)
        self.potential = as_potential(given, prior.num_steps, prior.n_state, prior.m0.dtype)
        batch = jnp.broadcast_shapes(prior.batch_shape, self.potential.batch_shape)
        super().__init__(batch, prior.event_shape, validate_args=validate_args)
        self._check_signs()

    @classmethod
    def from_potential(cls, prior: StatePath, potential: Potential, **options: Any) -> "LowRankChain":
        """The chain of a prior and a `Potential`, in the units of the state."""
        p = potential.psi()
        parts = {"diag": p.diagonal, "center": p.center, "b": p.factor_slope, "precision": p.precision}
        return cls(prior, p.slope, p.factor, **parts, **options)

    K = property(lambda self: self.potential.factor)
    diag = property(lambda self: self.potential.diagonal)
    center = property(lambda self: self.potential.center)
    b = property(lambda self: self.potential.factor_slope)

    @property
    def k(self) -> Array:
        """Slopes, `(..., time, state)`."""
        p = self.potential
        return jnp.zeros(p.factor.shape[:-1], p.factor.dtype) if p.slope is None else p.slope

    @property
    def rank(self) -> int:
        """Columns of `K`."""
        return self.K.shape[-1]

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """Trajectories of shape `sample_shape + batch_shape + (time, state)`."""
        return self.sample_with_kl(key, sample_shape)[0]

    def sample_with_kl(self, key: KeyLike, sample_shape: tuple[int, ...] = ()) -> tuple[Array, Array]:
        """`sample` and `kl_given` of the same draws; the transition is evaluated once."""
        key = as_key(key)
        noise_key, pull_key = jax.random.split(key)
        num = math.prod(sample_shape)
        steps, factors = self.prior.num_steps, (self.prior.chol_P0, self.prior.chol_Q)
        shape = (*self.batch_shape, steps, num)
        noise = standard_normal(noise_key, (*shape, max(f.shape[-1] for f in factors)), self.K.dtype)
        pulls = standard_normal(pull_key, (*shape, max(self._columns(f) for f in factors)), self.K.dtype)

        def one(a: dict[str, Any]) -> tuple[Array, Array]:
            first, later = self._updates(a)
            e, w = a["noise"], a["pulls"]

            def draw(update: Update, factor: Factor, mu: Array, e: Array, w: Array) -> Array:
                return posterior_sample(update, factor, mu, e[: factor.shape[-1]], w[: update.columns])

            z1 = jax.vmap(lambda e, w: draw(first, a["chol_P0"], a["m0"], e, w))(e[0], w[0])
            start_kl = kl(first, a["chol_P0"], a["m0"])

            def step(z: Array, xs: tuple) -> tuple[Array, tuple[Array, Array]]:
                update, timed, e, w = xs
                now = {**a, **timed}
                mu = jax.vmap(lambda x: self.prior.step(now, x))(z)
                z = jax.vmap(lambda m, e, w: draw(update, now["chol_Q"], m, e, w))(mu, e, w)
                return z, (z, jax.vmap(lambda m: kl(update, now["chol_Q"], m))(mu))

            if self.prior.n_state > SMALL:  # large states: hold one path in memory, not the transition's insides
                step = jax.checkpoint(step)
            _, (path, kls) = jax.lax.scan(step, z1, (later, self.prior.timed(a), e[1:], w[1:]), length=steps - 1)
            return jnp.concatenate([z1[:, None], jnp.moveaxis(path, 0, 1)], axis=1), start_kl + kls.sum(0)

        paths, kls = self._map(one, {"noise": noise, "pulls": pulls}, 3)
        own = len(self.batch_shape)
        paths, kls = jnp.moveaxis(paths, own, 0), jnp.moveaxis(kls, own, 0)
        batch = (*sample_shape, *self.batch_shape)
        return paths.reshape(*batch, *self.event_shape), kls.reshape(batch)

    def path_from_noise(self, noise: Array) -> Array:
        """The path driven by standard normal `noise (..., prior.noise_size)`: one to one where `Q` is regular.

        `sample` takes more numbers than a path has entries; this takes exactly as many, so a sampler can work on them.
        """
        batch = jnp.broadcast_shapes(noise.shape[:-1], self.batch_shape)
        n, steps = self.prior.n_state, self.prior.num_steps

        def one(a: dict[str, Any]) -> Array:
            first, later = self._updates(a)
            e = a["noise"]
            start = posterior_map(first, map_gain(first), a["chol_P0"], a["m0"], e[:n])

            def step(z: Array, xs: tuple) -> tuple[Array, Array]:
                update, lift, timed, e = xs
                now = {**a, **timed}
                z = posterior_map(update, lift, now["chol_Q"], self.prior.step(now, z), e)
                return z, z

            xs = later, jax.vmap(map_gain)(later), self.prior.timed(a), e[n:].reshape(steps - 1, -1)
            _, path = jax.lax.scan(step, start, xs, length=steps - 1)
            return jnp.concatenate([start[None], path])

        return self._map(one, {"noise": noise}, 1, batch).reshape(*batch, *self.event_shape)

    def _columns(self, factor: Factor) -> int:
        """Columns of the update's `K`: a general factor takes the diagonal in as `state` further ones."""
        extra = 0 if self.diag is None or isinstance(factor, Diagonal) else self.prior.n_state
        return self.rank + extra

    @of_events
    def log_prob(self, value: Array) -> Array:
        """Exact log density of paths `(..., time, state)`; no scan."""
        return self.prior.log_prob(value) + self.log_ratio(value)

    def log_ratio(self, value: Array, prior: dist.Distribution | None = None) -> Array:
        """`log q(z) - log p(z)` of paths `(..., time, state)`, without cancellation for the chain's own prior."""
        own = self._over_steps(log_ratio, value, use_value=True)
        return own if prior is None else own + self.prior.log_prob(value) - prior.log_prob(value)

    def kl_given(self, value: Array, prior: dist.Distribution | None = None) -> Array:
        """`sum_t KL(q(z_t | z_{t-1}) || p(z_t | z_{t-1}))` along paths `(..., time, state)`.

        Its expectation under the chain is `KL(q || prior)`. For another `prior` than the chain's own, the log ratio of
        the two at the path is added: the same expectation.
        """
        own = self._over_steps(kl, value, use_value=False)
        return own if prior is None else own + self.prior.log_prob(value) - prior.log_prob(value)

    def entropy(self) -> Array:
        """Entropy, exact. Directions without noise, of a singular `chol_P0` or `chol_Q`, are left out."""

        def one(a: dict[str, Any]) -> Array:
            first, later = self._updates(a)
            total = gaussian_entropy(a["chol_P0"]) - first.half_logdet - later.half_logdet.sum()
            timed = self.prior.timed(a)
            if "chol_Q" in timed:
                return total + jax.vmap(gaussian_entropy)(timed["chol_Q"]).sum()
            return total + (self.prior.num_steps - 1) * gaussian_entropy(a["chol_Q"])

        return self._map(one)

    @property
    def mean(self) -> Array:
        """Mean path `(..., time, state)`, exact; for a linear transition only (else `moments`)."""
        return self._linear_moments()[0]

    @property
    def variance(self) -> Array:
        """Marginal variances `(..., time, state)`, exact; for a linear transition only (else `moments`)."""
        return jnp.diagonal(self.covariance(), axis1=-2, axis2=-1)

    def covariance(self) -> Array:
        """Marginal covariances `(..., time, state, state)`, exact; for a linear transition and small states."""
        return self._linear_moments()[1]

    def conditional_mean(self, value: Array) -> Array:
        """`E[z_t | z_{t-1}]` along paths `(..., time, state)`; the first row is the mean of `z_1`."""

        def mean(update: Update, factor: Factor, mu: Array) -> Array:
            return posterior_mean(update, mu)

        return self._over_steps(mean, value, use_value=False, total=False)

    def central_path(self) -> Array:
        """The path without noise, `z_t = E[z_t | z_{t-1}]`, `(..., time, state)`: the mean, if `f` is linear."""

        def one(a: dict[str, Any]) -> Array:
            first, later = self._updates(a)
            start = posterior_mean(first, a["m0"])

            def step(z: Array, xs: tuple) -> tuple[Array, Array]:
                update, timed = xs
                z = posterior_mean(update, self.prior.step({**a, **timed}, z))
                return z, z

            xs = later, self.prior.timed(a)
            path = jax.lax.scan(step, start, xs, length=self.prior.num_steps - 1)[1]
            return jnp.concatenate([start[None], path])

        return self._map(one)

    def moments(self, key: KeyLike, num_samples: int = 1000) -> tuple[Array, Array]:
        """Mean and variance of every state by Monte Carlo, `(..., time, state)` each.

        Conditional means are averaged and conditional variances added (Rao-Blackwell).
        """
        key = as_key(key)
        means = self.conditional_mean(self.sample(key, (num_samples,)))
        return means.mean(0), means.var(0) + self.conditional_variance()

    def conditional_variance(self) -> Array:
        """Variances of `z_t` given `z_{t-1}`, `(..., time, state)`: the diagonal of `V_t`."""

        def one(a: dict[str, Any]) -> Array:
            first, later = self._updates(a)
            timed = self.prior.timed(a)
            axes = 0, 0 if "chol_Q" in timed else None
            rest = jax.vmap(posterior_variance, in_axes=axes)(later, timed.get("chol_Q", a["chol_Q"]))
            return jnp.concatenate([posterior_variance(first, a["chol_P0"])[None], rest])

        return self._map(one)

    # -----------------------------------------------------------------------------------------------------------------

    def _check_signs(self) -> None:
        """An error where a negative part leaves a step without a positive definite conditional covariance."""
        p = self.potential
        signed = {"diag": p.diagonal, "precision": p.precision}
        given = {name: x for name, x in signed.items() if x is not None}
        if not given or any(is_traced(x) for x in jax.tree.leaves((p, self.prior))):
            return
        if p.precision is None and np.asarray(p.diagonal).min(initial=0.0) >= 0:
            return
        if not all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(p)):
            return  # no question of signs; the results are NaN

        prior = self.prior
        bad = not_definite(prior.chol_P0, prior.chol_Q, "chol_Q" in prior.time_varying, p)
        if bad.any():
            step = int(np.argwhere(bad)[0][-1])
            names = " and ".join(f"`{name}`" for name in given)
            raise ValueError(
                f"{names} must leave every conditional covariance positive definite: the precision of the noise plus "
                f"what is negative there must be above zero. It is not at step {step} (counted from 0). Raise the "
                "negative curvature of that step towards zero."
            )

    def _map(self, fn: Any, values: dict[str, Array] | None = None, core: int = 0, batch: tuple | None = None) -> Any:
        arrays, cores = self.prior.arrays()
        arrays, cores = {**arrays, "psi": self.potential}, {**cores, "psi": self.potential.cores}
        values = values or {}
        batch = self.batch_shape if batch is None else batch
        return map_batch(fn, batch, {**arrays, **values}, {**cores, **dict.fromkeys(values, core)})

    def _updates(self, a: dict[str, Any]) -> tuple[Update, Update]:
        """The updates of the first step and, stacked, of the later ones: all at once, before any scan."""
        first = condition(a["chol_P0"], jax.tree.map(lambda x: x[0], a["psi"]))
        rest = jax.tree.map(lambda x: x[1:], a["psi"])
        timed = "chol_Q" in self.prior.time_varying
        factor = jax.tree.map(lambda x: x[1:], a["chol_Q"]) if timed else a["chol_Q"]
        return first, jax.vmap(condition, in_axes=(0 if timed else None, 0))(factor, rest)

    def _over_steps(self, fn: Any, value: Array, *, use_value: bool, total: bool = True) -> Array:
        """`fn(update, factor, mu_t[, z_t])` for every step of paths `(..., time, state)`; the sum if `total`."""
        own = len(self.batch_shape)
        extra = jnp.broadcast_shapes(value.shape[:-2], self.batch_shape)
        extra = extra[: len(extra) - own]
        num = math.prod(extra)
        flat = jnp.broadcast_to(value, (*extra, *self.batch_shape, *self.event_shape))
        flat = jnp.moveaxis(flat.reshape(num, *self.batch_shape, *self.event_shape), 0, own)

        def one(a: dict[str, Any]) -> Array:
            first, later = self._updates(a)
            timed = self.prior.timed(a)

            def path(z: Array) -> Array:
                start = fn(first, a["chol_P0"], a["m0"], *([z[0]] if use_value else []))
                means = self.prior.means(a, z)
                factor = timed.get("chol_Q", a["chol_Q"])
                axes = (0, 0 if "chol_Q" in timed else None, 0, *([0] if use_value else []))
                rest = jax.vmap(fn, in_axes=axes)(later, factor, means, *([z[1:]] if use_value else []))
                return start + rest.sum(0) if total else jnp.concatenate([start[None], rest])

            return jax.vmap(path)(a["z"])

        out = self._map(one, {"z": flat}, 3)
        out = jnp.moveaxis(out, own, 0)
        return out.reshape(*extra, *out.shape[1:])

    def _linear_moments(self) -> tuple[Array, Array]:
        if not self.prior.is_linear:
            raise NotImplementedError("Exact moments need a linear transition; use `moments(key, num_samples)`.")

        def one(a: dict[str, Any]) -> tuple[Array, Array]:
            first, later = self._updates(a)
            start = posterior_mean(first, a["m0"]), posterior_covariance(first, a["chol_P0"])

            def step(carry: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
                mean, cov = carry
                update, timed = xs
                now = {**a, **timed}
                moved = posterior_transition(update, now["transition"])
                mean = posterior_mean(update, self.prior.step(now, mean))
                carry = mean, matmul(matmul(moved, cov), moved.T) + posterior_covariance(update, now["chol_Q"])
                return carry, carry

            _, (mean, cov) = jax.lax.scan(step, start, (later, self.prior.timed(a)), length=self.prior.num_steps - 1)
            return jnp.concatenate([start[0][None], mean]), jnp.concatenate([start[1][None], cov])

        return self._map(one)
