"""The published low-rank filtering posterior: Gaussian marginals, moment-matched from particle to particle."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import constraints

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.batch import map_batch
from pssm.distributions.state_path import StatePath
from pssm.linalg.low_rank import Diagonal, Factor, apply_factor, apply_transpose, as_matrix
from pssm.linalg.potential import Potential, as_potential
from pssm.linalg.random import standard_normal
from pssm.linalg.small import SMALL, cholesky, invert_lower, matmul, matvec
from pssm.linalg.square_root import outer, solve_lower, triangularise


class Moments(NamedTuple):
    """`N(mean, F F' + spread spread' - cut cut')` at every step, and what made it.

    Attributes:
        particles: draws from it, `(..., num_samples, time, state)`; independent from step to step.
        mean: `(..., time, state)`.
        spread: the transition's particles, centred, over the root of their number, `(..., time, state, num_samples)`.
        cut: what the potentials take away, `(..., time, state, rank)`.
        kl: `KL(N(mean, .) || prediction)` at every step, `(..., time)`.
    """

    particles: Array
    mean: Array
    spread: Array
    cut: Array
    kl: Array


class LowRankMomentMatched(dist.Distribution):
    """The published filtering recursion: `pi_t = N(m_t, P_t)`, event shape `(time, state)`.

    The transition's image of `num_samples` draws from `pi_{t-1}` gives a Gaussian prediction, diagonal noise plus a
    matrix of rank `num_samples`, which the potential `exp(k_t'x + (K_t b_t)'x - |K_t'x|^2 / 2)`, `x = z - center_t`,
    updates in `rank x rank` algebra. With a backward potential besides (causal form) the recursion filters with
    `(k, K)` alone, and each step's marginal takes in the backward potential without passing it on.

    It is here for comparison. Its ELBO, `sum_t E log p(y_t | z_t) - KL(pi_t || prediction_t)`, is a surrogate: with
    exact smoothing marginals it exceeds the log evidence, and fits that maximise it shrink the transition noise.
    `LowRankChain` costs less and gives a bound.

    Draws: `sample` takes one particle of every step. The steps of a draw are independent given the moments: it is no
    trajectory, and there is no joint density (`log_prob` raises). Use `TraceConditionalKL_ELBO` or
    `TraceMeanField_ELBO`.

    Args:
        prior: the path prior.
        k: slopes, `(..., time, state)`.
        K: factors, `(..., time, state, rank)`.
        key: random key of the particles.
        num_samples: number of particles, at least 2.
        center: points that the potentials are written around, `(..., time, state)`.
        b: slopes along the columns of `K`, `(..., time, rank)`.
        backward: the backward potentials, `(k, K)` or a `Potential`, for the causal form; around the same centres
            unless it has its own.

    Raises:
        ValueError, TypeError: a shape does not fit; the message names the argument.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> prior = StatePath(jnp.zeros(2), jnp.eye(2), lambda z, u: jnp.tanh(z), 0.1 * jnp.eye(2), num_steps=5)
        >>> q = LowRankMomentMatched(prior, jnp.zeros((5, 2)), jnp.ones((5, 2, 1)), jax.random.key(0), 25)
        >>> q.mean.shape, q.kl.shape, q.covariance().shape
        ((5, 2), (5,), (5, 2, 2))

    Source:
        Dowling, Zhao & Park 2024, "Large-scale variational Gaussian state-space models"; the KL divergences here stay
        in `rank x rank` matrices and do not divide by the transition noise.
    """

    pytree_data_fields = ("prior", "moments")
    pytree_aux_fields = ("num_samples",)
    support = constraints.independent(constraints.real, 2)  # pyright: ignore[reportAssignmentType]
    reparametrized_params: list[str] = []  # equal to arg_constraints, which has none: draws are differentiable

    def __init__(
        self,
        prior: StatePath,
        k: ArrayLike | None,
        K: ArrayLike,
        key: KeyLike,
        num_samples: int,
        *,
        center: ArrayLike | None = None,
        b: ArrayLike | None = None,
        backward: tuple[ArrayLike, ArrayLike] | Potential | None = None,
        validate_args: bool | None = None,
    ):
        key = as_key(key)
        if not isinstance(prior, StatePath):
            raise TypeError(f"`prior` must be a StatePath; got {type(prior).__name__}.")
        self.prior, self.num_samples = prior, check_count("num_samples", num_samples, least=2)
        shape = prior.num_steps, prior.n_state, prior.m0.dtype
        psi = as_potential(Potential(K, None, b, center, k), *shape)
        back = None if backward is None else _check_backward(backward, *shape)
        batch = jnp.broadcast_shapes(prior.batch_shape, psi.batch_shape, () if back is None else back.batch_shape)
        arrays, cores = prior.arrays()
        sizes = max(prior.chol_P0.shape[-1], prior.chol_Q.shape[-1]), psi.rank, 0 if back is None else back.rank
        noise = standard_normal(key, (*batch, prior.num_steps, num_samples, num_samples + sum(sizes)), prior.m0.dtype)
        arrays, cores = {**arrays, "psi": psi, "noise": noise}, {**cores, "psi": psi.cores, "noise": 3}
        if back is not None:
            arrays, cores = {**arrays, "back": back}, {**cores, "back": back.cores}
        self.moments: Moments = map_batch(self._filter, batch, arrays, cores)
        super().__init__(batch, prior.event_shape, validate_args=validate_args)

    @classmethod
    def from_potential(
        cls, prior: StatePath, potential: Potential, key: Key, num_samples: int, **options: Any
    ) -> "LowRankMomentMatched":
        """The posterior of a prior and a `Potential` without a diagonal; `options` such as `backward`."""
        p = potential.psi()
        if p.diagonal is not None:
            raise ValueError("`potential` must have no `diagonal`: the published recursion knows none.")
        if p.precision is not None:
            raise ValueError("`potential` must have no `precision`: the published recursion knows a factor alone.")
        return cls(prior, p.slope, p.factor, key, num_samples, center=p.center, b=p.factor_slope, **options)

    def _filter(self, a: dict[str, Any]) -> Moments:
        prior = self.prior
        psi = a["psi"], a.get("back")
        still = jnp.zeros((prior.n_state, self.num_samples), a["m0"].dtype)

        def step(particles: tuple[Array, Array] | None, xs: tuple) -> tuple[tuple[Array, Array], Moments]:
            (p, back), noise, t = xs
            now = {**a, **t}
            factor = now["chol_P0"] if particles is None else now["chol_Q"]

            mean, spread = (a["m0"], still) if particles is None else predict(prior, now, particles[0])
            z, first = assimilate(factor, mean, spread, p, noise)
            if back is None:
                return (z, z), Moments(z, first.mean, spread, first.cut, first.kl)
            width = factor.shape[-1] + p.rank
            center = p.center if back.center is None else back.center
            around = Potential(back.factor, None, back.factor_slope, center, back.slope)
            second = _update(factor, spread, first.cut, first.mean, around)
            rest = noise[:, width : width + back.rank]
            smoothed = _draws(second, first.mean, z - first.mean, back.factor, rest)
            cut = jnp.concatenate([first.cut, second.cut], axis=1)
            target_mean, target_spread = (mean, spread) if particles is None else predict(prior, now, particles[1])
            logdet = first.logdet + second.logdet
            kl = _gaussian_kl(factor, spread, cut, logdet, second.mean, target_mean, target_spread)
            return (z, smoothed), Moments(smoothed, second.mean, spread, cut, kl)

        first, start = step(None, (jax.tree.map(lambda x: x[0], psi), a["noise"][0], {}))
        body = jax.checkpoint(step) if prior.n_state > SMALL else step
        xs = jax.tree.map(lambda x: x[1:], psi), a["noise"][1:], prior.timed(a)
        _, rest = jax.lax.scan(body, first, xs, length=prior.num_steps - 1)
        found = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), start, rest)
        return found._replace(particles=jnp.moveaxis(found.particles, 0, 1))

    @property
    def mean(self) -> Array:
        """Means `m_t`, `(..., time, state)`."""
        return self.moments.mean

    @property
    def particles(self) -> Array:
        """`(..., num_samples, time, state)`."""
        return self.moments.particles

    @property
    def kl(self) -> Array:
        """`KL(pi_t || prediction_t)`, `(..., time)`."""
        return self.moments.kl

    @property
    def variance(self) -> Array:
        """Marginal variances, `(..., time, state)`."""
        m = self.moments
        noise = self._noise(lambda f: f.scale**2 if isinstance(f, Diagonal) else jnp.sum(f**2, -1), 1)
        return noise + jnp.sum(m.spread**2, -1) - jnp.sum(m.cut**2, -1)

    def covariance(self) -> Array:
        """Marginal covariances `P_t`, `(..., time, state, state)`; for small states."""
        m = self.moments
        noise = self._noise(lambda f: outer(as_matrix(f)), 2)
        return noise + outer(m.spread) - outer(m.cut)

    def _noise(self, of: Callable[[Factor], Array], core: int) -> Array:
        """A function of the factors `chol_P0, chol_Q, chol_Q, ...`, along a time axis in front of `core` axes."""
        first, later = of(self.prior.chol_P0), of(self.prior.chol_Q)
        if "chol_Q" in self.prior.time_varying:
            later = jax.lax.slice_in_dim(later, 1, None, axis=later.ndim - core - 1)
        else:
            later = jnp.expand_dims(later, -core - 1)
        steps = self.prior.num_steps
        first = jnp.broadcast_to(jnp.expand_dims(first, -core - 1), (*self.batch_shape, 1, *first.shape[-core:]))
        later = jnp.broadcast_to(later, (*self.batch_shape, steps - 1, *later.shape[-core:]))
        return jnp.concatenate([first, later], axis=-core - 1)

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Array:
        """`sample_shape + batch_shape + (time, state)`: particles, picked at random."""
        chosen = jax.random.randint(key, sample_shape, 0, self.num_samples)
        particles = jnp.moveaxis(self.moments.particles, -3, 0)
        return particles[chosen]

    def kl_given(self, value: Array, prior: dist.Distribution | None = None) -> Array:
        """The surrogate's term, for a path whose shape alone counts: the sum over steps of `kl`, made with `prior`."""
        if not isinstance(prior, StatePath | None):
            raise TypeError(f"A LowRankMomentMatched guide needs a StatePath in the model; got {type(prior).__name__}.")
        return jnp.broadcast_to(self.kl.sum(-1), jnp.broadcast_shapes(value.shape[:-2], self.batch_shape))

    def log_prob(self, value: Array) -> Array:
        """Raises `NotImplementedError`: the recursion defines marginals, not a joint density."""
        raise NotImplementedError(
            "LowRankMomentMatched has no joint density. Use TraceConditionalKL_ELBO or TraceMeanField_ELBO, or "
            'family="chain" for a true bound.'
        )


def predict(prior: StatePath, now: dict[str, Any], particles: Array) -> tuple[Array, Array]:
    """Mean of the transition's image of `(num_samples, state)` draws, and its spread `(state, num_samples)`."""
    image = jax.vmap(lambda x: prior.step(now, x))(particles)
    mean = image.mean(0)
    return mean, (image - mean).T / jnp.sqrt(jnp.asarray(len(particles), mean.dtype))


def assimilate(factor: Factor, mean: Array, spread: Array, p: Potential, noise: Array) -> tuple[Array, "Updated"]:
    """Draws from `N(mean, F F' + spread spread')` times a potential, and that Gaussian.

    Args:
        factor: `F`.
        mean: `(state,)`.
        spread: `(state, num_samples)`.
        p: a potential without a diagonal.
        noise: standard normal, `(num_samples, noise + rank + ... + num_samples)`.
    """
    width = factor.shape[-1]
    centred = _prior_draws(factor, spread, noise[:, :width], noise[:, -spread.shape[1] :])
    found = _update(factor, spread, None, mean, p)
    return _draws(found, mean, centred, p.factor, noise[:, width : width + p.rank]), found


def _check_backward(backward: Any, *shape: Any) -> Potential:
    """The backward potentials, their shapes checked."""
    if not isinstance(backward, Potential):
        if not isinstance(backward, tuple | list) or len(backward) != 2:
            raise TypeError(f"`backward` must be a pair (k, K) or a Potential; got {type(backward).__name__}.")
        backward = Potential(backward[1], slope=backward[0])
    try:
        return as_potential(backward, *shape)
    except ValueError as error:
        raise ValueError(f"`backward`: {error}") from error


class Updated(NamedTuple):
    """A Gaussian that has taken in a potential: mean, `cut`, gain, divergence from before, and `log |P'| - log |P|`."""

    mean: Array
    cut: Array
    gain: Array
    kl: Array
    logdet: Array


def _update(factor: Factor, spread: Array, cut: Array | None, mean: Array, p: Potential) -> Updated:
    """`N(mean, P)`, `P = F F' + spread spread' - cut cut'`, times a potential; `logdet` is `log |P'| - log |P|`."""
    K = p.factor
    by_noise, by_spread = apply_transpose(factor, K), matmul(spread.T, K)
    loaded = _apply_columns(factor, by_noise) + matmul(spread, by_spread)  # P K
    gram = matmul(by_noise.T, by_noise) + matmul(by_spread.T, by_spread)
    if cut is not None:
        by_cut = matmul(cut.T, K)
        loaded, gram = loaded - matmul(cut, by_cut), gram - matmul(by_cut.T, by_cut)
    root = cholesky(jnp.eye(p.rank, dtype=K.dtype) + gram)
    inverse = invert_lower(root)
    # P k, then the tied part; the slope of the update is w with step = P w.
    k = jnp.zeros_like(mean) if p.slope is None else p.slope
    moved = _apply_covariance(factor, spread, cut, k)
    pull = -matvec(K.T, mean + moved if p.center is None else mean + moved - p.center)
    pull = pull if p.factor_slope is None else p.factor_slope + pull
    a = matvec(inverse.T, matvec(inverse, pull))
    step = moved + matvec(loaded, a)
    log_root = jnp.sum(jnp.log(jnp.diagonal(root)))
    kl = log_root + 0.5 * (jnp.sum(inverse**2) - p.rank + jnp.vdot(step, k + matvec(K, a)))
    cut = matmul(loaded, inverse.T)
    return Updated(mean + step, cut, matmul(cut, inverse), kl, -2 * log_root)


def _apply_columns(factor: Factor, x: Array) -> Array:
    return jax.vmap(lambda column: apply_factor(factor, column), in_axes=1, out_axes=1)(x)


def _apply_covariance(factor: Factor, spread: Array, cut: Array | None, x: Array) -> Array:
    found = apply_factor(factor, apply_transpose(factor, x[:, None])[:, 0]) + matvec(spread, matvec(spread.T, x))
    return found if cut is None else found - matvec(cut, matvec(cut.T, x))


def _prior_draws(factor: Factor, spread: Array, noise: Array, weights: Array) -> Array:
    """Centred draws from the prediction, `(num_samples, state)`."""
    return jax.vmap(lambda e, w: apply_factor(factor, e) + matvec(spread, w))(noise, weights)


def _draws(updated: Updated, mean: Array, centred: Array, K: Array, noise: Array) -> Array:
    """Matheron: draws from the prediction become draws from the update, exactly."""
    rest = matmul(centred, K) + noise
    return updated.mean + centred - matmul(updated.gain, rest.T).T


def _gaussian_kl(
    factor: Factor, spread: Array, cut: Array, logdet: Array, mean: Array, target_mean: Array, target_spread: Array
) -> Array:
    """`KL(N(mean, P) || N(target_mean, Q + M M'))`, `P = Q + spread spread' - cut cut'`.

    `logdet` is `log |P| - log |Q + spread spread'|`. The matrices are num_samples x num_samples, which needs a regular
    `Q`, or state x state where that is no larger: there a singular `Q` is made up for by the particles.
    """
    if spread.shape[0] <= spread.shape[1]:
        return _small_gaussian_kl(factor, spread, cut, logdet, mean - target_mean, target_spread)
    chol = None if isinstance(factor, Diagonal) else triangularise(factor)

    def whiten(x: Array) -> Array:
        return x / factor.scale[:, None] if isinstance(factor, Diagonal) else solve_lower(chol, x)

    n, eye = spread.shape[0], jnp.eye(spread.shape[1], dtype=spread.dtype)
    own, other = whiten(spread), whiten(target_spread)
    root = cholesky(eye + matmul(other.T, other))
    own_root = cholesky(eye + matmul(own.T, own))

    def inverse_square(x: Array) -> Array:
        """`sum x'(Q + M M')^{-1} x` over the columns of `Q^{1/2} x`."""
        return jnp.sum(x**2) - jnp.sum(solve_lower(root, matmul(other.T, x)) ** 2)

    trace = n - jnp.sum(solve_lower(root, other.T) ** 2) + inverse_square(own) - inverse_square(whiten(cut))
    difference = whiten((mean - target_mean)[:, None])
    logdets = 2 * jnp.sum(jnp.log(jnp.diagonal(root))) - 2 * jnp.sum(jnp.log(jnp.diagonal(own_root))) - logdet
    return 0.5 * (trace - n + inverse_square(difference) + logdets)


def _small_gaussian_kl(
    factor: Factor, spread: Array, cut: Array, logdet: Array, apart: Array, target_spread: Array
) -> Array:
    """`_gaussian_kl` with state x state factors; directions that neither Gaussian has are left out."""
    matrix = as_matrix(factor)
    own = triangularise(jnp.concatenate([matrix, spread], axis=1))
    target = triangularise(jnp.concatenate([matrix, target_spread], axis=1))

    def size(x: Array) -> Array:
        return jnp.sum(solve_lower(target, x) ** 2)

    def half_logdet(root: Array) -> Array:
        pivots = jnp.diagonal(root)
        return jnp.sum(jnp.log(jnp.where(pivots > 0, pivots, 1.0)))

    trace = size(own) - size(cut) - jnp.sum(jnp.diagonal(target) > 0)
    return 0.5 * (trace + size(apart[:, None]) - logdet) + half_logdet(target) - half_logdet(own)
