"""Gaussian filters and smoothers of nonlinear models: extended, unscented, cubature, iterated.

Each step makes the functions affine about the Gaussian at hand (`linearize.py`) and does what the Kalman filter does,
on square roots. The update is written for `z = mean + chol x`, `x ~ N(0, 1)`: one triangularisation

    | R   spread |       | S^{1/2}  0 |
    | 0   basis  |  ->   |  K       L |          x | y ~ N(K S^{-1/2} (y - mean of y), L L')

so that nothing is inverted, and known states and exact observations are no special case. Emissions that are not
normal enter by their conditional mean and covariance (a step of Fisher scoring), their evidence by Laplace's formula.

The smoother collects the affine models along the way and gives them to the exact smoother. More iterations linearise
about the smoothed path: iterated posterior linearisation, which for derivatives is Gauss-Newton.

Source:
    Särkkä & Svensson 2023, chapters 7-14; iterated: Bell 1994; García-Fernández, Svensson & Särkkä 2017; conditional
    moments: Tronarp, García-Fernández & Särkkä 2018.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._checks import check_count, is_traced
from pssm._types import Array, ArrayLike
from pssm.emission_moments import check_moments
from pssm.filters.linearize import Linearization, Linearize, SigmaPoints, jacobian, rule
from pssm.filters.score import log_likelihood
from pssm.filters.smoother import kalman_smoother
from pssm.filters.step import LOG_2PI
from pssm.linalg import solve_lower, triangularise
from pssm.linalg.small import matmul, matvec
from pssm.linalg.square_root import triangularise_once
from pssm.nonlinear import NonlinearSSM, check_nonlinear
from pssm.results import FilterResult, SmootherResult
from pssm.ssm import LinearGaussianSSM

HALVINGS = 40
FIRST_PASS = 5  # iterations of the filter that a smoother begins with


def gaussian_filter(
    model: NonlinearSSM | LinearGaussianSSM,
    y: ArrayLike,
    u: ArrayLike | None = None,
    *,
    linearize: str | Linearize = "ekf",
    num_iters: int = 1,
) -> FilterResult:
    """Approximate filtering by Gaussians, and an approximate log-likelihood.

    Args:
        model: the model; a linear-Gaussian one for comparison (the result is then exact).
        y: observations `(time, obs)`, or `(time,)` for one variable; NaN entries are missing.
        u: inputs `(time, input)`, which `transition` and `emission` get row by row.
        linearize: "ekf" (derivatives), "ukf" (unscented points), "cubature", "gauss_hermite" (five points in each
            direction), `pssm.filters.linearize.gauss_hermite(order)`, or any function `(f, mean, chol) ->
            Linearization`.
        num_iters: how often an observation is linearised: the second time about the posterior that the first gave, and
            so on. Each observation is counted once.

    Returns:
        A `FilterResult`. Its likelihood is approximate, unless the model is linear and Gaussian: of normal emissions
        it is that of the affine models, of others it is Laplace's.

    Raises:
        ValueError: a shape does not fit, `linearize` is unknown, the emission has no mean and variance, or (outside of
            `jit`) the result is not finite.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> model = NonlinearSSM(jnp.zeros(1), jnp.eye(1), lambda z, u: jnp.sin(z), 0.1 * jnp.eye(1),
        ...                      lambda z: dist.Normal(z**2, 0.1).to_event(1))
        >>> gaussian_filter(model, [0.1, 0.2, float("nan"), 0.1], linearize="ukf").mean.shape
        (4, 1)
    """
    return _filter(*_prepared(model, y, u, linearize, num_iters))[0]


def gaussian_smoother(
    model: NonlinearSSM | LinearGaussianSSM,
    y: ArrayLike,
    u: ArrayLike | None = None,
    *,
    linearize: str | Linearize = "ekf",
    num_iters: int = 1,
) -> SmootherResult:
    """Approximate smoothing by Gaussians. Arguments as in `gaussian_filter`.

    With one iteration the affine models are those of the filter. Each further one linearises the whole path about the
    smoothed one; "ekf" then converges to the path of highest posterior density, where the log-likelihood is Laplace's.
    """
    model, series, inputs, linearizer, count = _prepared(model, y, u, linearize, num_iters)
    # A filter that iterates too is near the mode at once: one step may leave a path from which the others diverge.
    filtered, affine = _filter(model, series, inputs, linearizer, FIRST_PASS if count > 1 else 1)
    statistics = model.statistic(series, None if inputs is None else inputs[0])

    def again(_: int, smoothed: SmootherResult) -> SmootherResult:
        return kalman_smoother(_affine_path(model, inputs, linearizer, smoothed), statistics)

    first = kalman_smoother(affine, statistics)
    smoothed = jax.lax.fori_loop(1, count, again, first) if count > 1 else first
    if model.is_gaussian(None if inputs is None else inputs[0]):
        return smoothed
    if count == 1:
        return smoothed._replace(log_likelihood=filtered.log_likelihood)
    final = _affine_path(model, inputs, linearizer, smoothed)
    return smoothed._replace(log_likelihood=_laplace(model, final, series, statistics, inputs, smoothed.mean))


def _check_result(found: FilterResult) -> None:
    """Refuses a result that is not finite; a traced one has NaN or -inf in its likelihood."""
    if is_traced(found.log_likelihoods) or bool(jnp.isfinite(found.log_likelihood)):
        return
    step = int(jnp.argmin(jnp.isfinite(found.log_likelihoods)))
    raise ValueError(
        f"The filter left the finite numbers at step {step}: `transition` or `emission` overflows at the filtered "
        "state, or the observation is impossible. Check `m0`, units and scales, or use `laplace_path`."
    )


def _prepared(
    model: NonlinearSSM | LinearGaussianSSM, y: ArrayLike, u: ArrayLike | None, linearize: str | Linearize, count: int
) -> tuple[NonlinearSSM, Array, Array | None, Linearize, int]:
    check_count("num_iters", count)
    model = check_nonlinear(model)
    series, inputs = model.check_series(y, u)
    check_moments(model.emission(model.m0, None if inputs is None else inputs[0]))
    return model, series, inputs, rule(linearize), count


class _Emission(NamedTuple):
    """The observation as an affine function of `x` with noise."""

    affine: Linearization
    noise: Array


class _Steps(NamedTuple):
    """Affine transition out of a step and emission at it, in the coordinates of the state."""

    A: Array
    b: Array
    chol_Q: Array
    C: Array
    d: Array
    chol_R: Array


def _filter(
    model: NonlinearSSM, y: Array, u: Array | None, linearize: Linearize, num_iters: int
) -> tuple[FilterResult, LinearGaussianSSM]:
    gaussian = model.is_gaussian(None if u is None else u[0])
    statistics = model.statistic(y, None if u is None else u[0])
    follows, after = _into_next(u, len(y))

    def step(predicted: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], tuple]:
        y, s, u, u_next, t_next = xs
        mean, chol = predicted
        update = condition_on(model, mean, chol, s, u, linearize, num_iters, None if gaussian else y)
        value = update.log_likelihood if gaussian else _evidence(model, y, u, update)
        f = linearize(lambda z: model.transition(z, u_next), update.mean, update.chol)
        own_noise = _noise(model, update.mean, update.chol, t_next, u_next, linearize)
        new = f.mean, triangularise_once(jnp.concatenate([f.spread, own_noise], axis=1))
        A, C = _in_state(f.slope, update.chol), _in_state(update.emission.affine.slope, chol)
        steps = _affine_step(A, f, own_noise, update.mean, C, update.emission, mean)
        return new, (value, update.mean, update.chol, mean, chol, steps)

    start = model.m0, triangularise(model.chol_P0)
    _, out = jax.lax.scan(step, start, (y, statistics, u, follows, after))
    values, steps = out[0], out[-1]
    result = FilterResult(jnp.sum(values), *out[:-1])
    _check_result(result)
    return result, _time_varying(model, steps)


def _into_next(u: Array | None, steps: int) -> tuple[Array | None, Array]:
    """Input and number of the step that follows each one; after the last, any."""
    after = jnp.minimum(jnp.arange(1, steps + 1), steps - 1)
    return None if u is None else u[after], after


def _noise(model: NonlinearSSM, mean: Array, chol: Array, t: Array, u: Array | None, linearize: Linearize) -> Array:
    """A factor of the transition's noise; one that depends on the state is averaged over the points, if there are."""
    if model.noise_function is None or not isinstance(linearize, SigmaPoints):
        return model.noise(t, mean, u)
    factors, weights, _ = linearize.evaluate(lambda z: model.noise(t, z, u), mean, chol)
    columns = jnp.sqrt(weights)[:, None, None] * factors
    return triangularise(jnp.moveaxis(columns, 0, 1).reshape(len(mean), -1))


def _affine_step(
    A: Array, f: Linearization, chol_Q: Array, from_mean: Array, C: Array, emission: _Emission, seen_mean: Array
) -> _Steps:
    """Slopes, and offsets such that the functions have their means at these points; what they miss is noise."""
    return _Steps(
        A,
        f.mean - matvec(A, from_mean),
        jnp.concatenate([f.rest, chol_Q], axis=1),
        C,
        emission.affine.mean - matvec(C, seen_mean),
        triangularise(jnp.concatenate([emission.noise, emission.affine.rest], axis=1)),
    )


def _time_varying(model: NonlinearSSM, steps: _Steps) -> LinearGaussianSSM:
    """The affine model of a whole path; a transition's entry stands at the time that it leads to."""

    def into(x: Array) -> Array:
        return jnp.concatenate([x[:1], x[:-1]])

    timed = {"A": into(steps.A), "b": into(steps.b), "chol_Q": into(steps.chol_Q)}
    timed |= {"C": steps.C, "d": steps.d, "chol_R": steps.chol_R}
    return LinearGaussianSSM(model.m0, triangularise(model.chol_P0), **timed, time_varying=tuple(timed))


class Posterior(NamedTuple):
    """The posterior of one observation.

    Attributes:
        mean: `(state,)`.
        chol: `(state, state)`.
        x: mean of `x`, `(state,)`.
        chol_x: its factor, `(state, state)`.
        emission: about the prior, as it was used.
        log_likelihood: log density of the observation under the affine model.
    """

    mean: Array
    chol: Array
    x: Array
    chol_x: Array
    emission: _Emission
    log_likelihood: Array


def condition_on(
    model: NonlinearSSM,
    mean: Array,
    chol: Array,
    s: Array,
    u: Array | None,
    linearize: Linearize,
    num_iters: int,
    y: Array | None = None,
) -> Posterior:
    """`N(mean, chol chol')` given one observation `s` (the statistic), NaN where missing.

    With the observation itself, `y`, a step is halved until the posterior density is no less than where it started: an
    emission that is not normal may be far from what its moments promise (a count of 10 000 where one was expected).
    """
    seen = ~jnp.isnan(s)
    filled = jnp.where(seen, s, 0.0)

    def with_emission(emission: _Emission, x_before: Array) -> Posterior:
        affine, noise = emission
        rows = jnp.concatenate([noise, affine.spread], axis=1)
        rows = jnp.where(seen[:, None], rows, 0.0)
        below = jnp.concatenate([jnp.zeros((len(mean), noise.shape[1]), mean.dtype), affine.basis], axis=1)
        factor = triangularise_once(jnp.concatenate([rows, below]))
        p = len(s)
        root, gain, chol_x = factor[:p, :p], factor[p:, :p], factor[p:, p:]
        white = solve_lower(root, jnp.where(seen, filled - affine.mean, 0.0))
        # Pivots that are NaN count as zero below: without this an emission without moments would tell nothing.
        moments = jnp.where(seen[:, None], jnp.concatenate([affine.mean[:, None], noise], axis=1), 0.0)
        x = jnp.where(jnp.all(jnp.isfinite(moments)), matvec(gain, white), jnp.nan)
        if y is not None:
            x = x_before + _share(lambda x: _log_joint(model, y, mean, chol, u, x), x_before, x) * (x - x_before)
        return Posterior(mean + matvec(chol, x), matmul(chol, chol_x), x, chol_x, emission, _log_normal(root, white))

    update = with_emission(_emission(model, mean, chol, u, linearize), jnp.zeros_like(mean))
    for _ in range(num_iters - 1):
        update = with_emission(_again(model, mean, chol, u, linearize, update), update.x)
    return update


def _log_joint(model: NonlinearSSM, y: Array, mean: Array, chol: Array, u: Array | None, x: Array) -> Array:
    return model.log_prob(y, mean + matvec(chol, x), u) - 0.5 * jnp.sum(x**2)


def _share(log_joint: Callable[[Array], Array], start: Array, end: Array) -> Array:
    """The share of a step that is taken: 1, or the largest of 1/2, 1/4, ... that does not go down."""
    least = log_joint(start)
    least = jnp.where(jnp.isfinite(least), least - 1e-3 * jnp.abs(least), -jnp.inf)

    def bad(count: Array) -> Array:
        value = log_joint(start + 0.5**count * (end - start))
        return ~(jnp.isfinite(value) & (value >= least))

    # The carry is a whole number and a flag, which have no derivatives: the loop is no obstacle to gradients.
    count, _ = jax.lax.while_loop(
        lambda state: state[1] & (state[0] < HALVINGS),
        lambda state: (state[0] + 1, bad(state[0] + 1)),
        (jnp.zeros((), int), bad(jnp.zeros((), int))),
    )
    return jax.lax.stop_gradient(jnp.where(count < HALVINGS, 0.5**count, 0.0).astype(start.dtype))


def _log_normal(root: Array, white: Array) -> Array:
    """Log density of a normal variable with the factor `root`, whitened; what has no variance does not count."""
    pivots = jnp.diagonal(root)
    live = pivots > 0
    return -0.5 * jnp.sum(jnp.where(live, LOG_2PI + 2 * jnp.log(jnp.where(live, pivots, 1.0)) + white**2, 0.0))


def _emission(model: NonlinearSSM, mean: Array, chol: Array, u: Array | None, linearize: Linearize) -> _Emission:
    """The emission about `N(mean, chol chol')`; its noise is averaged over the points where there are some."""
    affine = linearize(lambda z: model.moments(z, u).mean, mean, chol)
    if not isinstance(linearize, SigmaPoints):
        return _Emission(affine, _matrix(model.moments(mean, u).factor))
    factors, weights, _ = linearize.evaluate(lambda z: model.moments(z, u).factor, mean, chol)
    if factors.ndim == 2:
        return _Emission(affine, _matrix(jnp.sqrt(jnp.sum(weights[:, None] * factors**2, axis=0))))
    columns = jnp.sqrt(weights)[:, None, None] * factors
    return _Emission(affine, triangularise(jnp.moveaxis(columns, 0, 1).reshape(factors.shape[1], -1)))


def _again(
    model: NonlinearSSM, mean: Array, chol: Array, u: Array | None, linearize: Linearize, update: Posterior
) -> _Emission:
    """The emission about the posterior, as an affine function of the prior's `x`."""
    if linearize is jacobian:  # the direction of the derivatives may be the prior's, which is never too narrow
        affine, noise = _emission(model, update.mean, chol, u, linearize)
        return _Emission(affine._replace(mean=affine.mean - matvec(affine.spread, update.x)), noise)
    affine, noise = _emission(model, update.mean, update.chol, u, linearize)
    slope = _in_state(affine.slope, update.chol_x)
    spread = jnp.concatenate([slope, affine.rest], axis=1)
    n = len(mean)
    basis = jnp.eye(n, spread.shape[1], dtype=mean.dtype)
    return _Emission(Linearization(affine.mean - matvec(slope, update.x), spread, basis), noise)


def _in_state(slope: Array, chol: Array) -> Array:
    """The derivative by `z` from that by `x`, zero in directions that have no spread."""
    return solve_lower(chol, slope.T, transpose=True).T


def _matrix(factor: Array) -> Array:
    return factor if factor.ndim == 2 else jnp.where(jnp.eye(len(factor), dtype=bool), factor, 0.0)


def _evidence(model: NonlinearSSM, y: Array, u: Array | None, update: Posterior) -> Array:
    """`log p(y | z) + log N(x; 0, 1) - log N(x; posterior)` at the posterior mean: Laplace's formula."""
    pivots = jnp.diagonal(update.chol_x)
    logdet = jnp.sum(jnp.log(jnp.where(pivots > 0, pivots, 1.0)))
    return model.log_prob(y, update.mean, u) - 0.5 * jnp.sum(update.x**2) + logdet


def _affine_path(
    model: NonlinearSSM, u: Array | None, linearize: Linearize, smoothed: SmootherResult
) -> LinearGaussianSSM:
    """The model made affine about the smoothed moments of every step."""
    follows, after = _into_next(u, len(smoothed.mean))

    def one(mean: Array, chol: Array, u: Array | None, u_next: Array | None, t_next: Array) -> _Steps:
        f = linearize(lambda z: model.transition(z, u_next), mean, chol)
        emission = _emission(model, mean, chol, u, linearize)
        if linearize is jacobian:  # straight, so that directions without spread have a slope too
            A = jax.jacfwd(lambda z: model.transition(z, u_next))(mean)
            C = jax.jacfwd(lambda z: model.moments(z, u).mean)(mean)
        else:
            A, C = _in_state(f.slope, chol), _in_state(emission.affine.slope, chol)
        own_noise = _noise(model, mean, chol, t_next, u_next, linearize)
        return _affine_step(A, f, own_noise, mean, C, emission, mean)

    return _time_varying(model, jax.vmap(one)(smoothed.mean, smoothed.chol, u, follows, after))


def _laplace(
    model: NonlinearSSM, affine: LinearGaussianSSM, y: Array, statistics: Array, u: Array | None, path: Array
) -> Array:
    """The affine model's likelihood, with the true density of the observations given the path in place of its own."""
    own = jax.vmap(model.log_prob)(y, path, u)
    seen = ~jnp.isnan(statistics)

    def normal(s: Array, seen: Array, C: Array, d: Array, chol_R: Array, z: Array) -> Array:
        root = triangularise(jnp.where(seen[:, None], chol_R, 0.0))
        return _log_normal(root, solve_lower(root, jnp.where(seen, s - d - matvec(C, z), 0.0)))

    filled = jnp.where(seen, statistics, 0.0)
    theirs = jax.vmap(normal)(filled, seen, affine.C, affine.d, affine.chol_R, path)
    return log_likelihood(affine, statistics) + jnp.sum(own - theirs)
