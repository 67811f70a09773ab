"""Laplace's approximation over a whole path: its mode, a Gaussian about it, and an estimate of the evidence."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pssm._checks import check_count
from pssm._types import Array, ArrayLike
from pssm.distributions import StatePath
from pssm.linalg import triangularise
from pssm.linalg.low_rank import Factor, as_factor, as_matrix
from pssm.linalg.small import matmul
from pssm.modes.damped import is_maximum
from pssm.modes.mode import gauss_newton, through_noise
from pssm.modes.path import check_start, linear_mode, mode_path
from pssm.modes.search import End, insist, judge
from pssm.modes.starts import further_starts
from pssm.nonlinear import NonlinearSSM, check_nonlinear
from pssm.results import SmootherResult
from pssm.ssm import LinearGaussianSSM


def laplace_path(
    model: NonlinearSSM | LinearGaussianSSM,
    y: ArrayLike,
    u: ArrayLike | None = None,
    *,
    num_iters: int = 50,
    start: ArrayLike | None = None,
) -> SmootherResult:
    """The path of highest posterior density and the Gaussian with its curvature there (Gauss-Newton).

    Each step costs `O(time state^3)`; every step climbs, so that a bad start is slow and not wrong. The search is over
    when the step is short in units of the posterior's standard deviations.

    Args:
        model: any model; a linear-Gaussian one gives its exact posterior.
        y: observations `(time, obs)`, NaN where missing.
        u: inputs `(time, input)`.
        num_iters: most Gauss-Newton steps; a linear-Gaussian model needs no search.
        start: a path `(time, state)` near the mode that is wanted, where there may be several; None for the path that
            the model takes without noise, and where that leads to no mode, or to one that seems to be a lower one, for
            paths of few particles. No start is certain to lead to the highest of several.

    Returns:
        A `SmootherResult`: the mode as `mean`, factors of the covariances, and as `log_likelihood` Laplace's estimate
        of the evidence, exact for a linear-Gaussian model and otherwise neither a bound nor unbiased. An emission that
        is not log-concave at the mode counts as flat there; of the transition only first derivatives are used. Under
        `jit` NaN where the search has not converged.

    Raises:
        ValueError: a shape does not fit, or (outside of `jit`) the search has not converged.

    Example:
        >>> import numpyro.distributions as dist
        >>> model = NonlinearSSM(jnp.zeros(1), jnp.eye(1), lambda z, u: 0.9 * z, 0.3 * jnp.eye(1),
        ...                      lambda z: dist.Poisson(jnp.exp(z)).to_event(1))
        >>> laplace_path(model, [1.0, 0.0, 3.0]).mean.shape
        (3, 1)

    Source:
        Bell 1994; Durbin & Koopman 1997; Rue, Martino & Chopin 2009, section 3.
    """
    check_count("num_iters", num_iters)
    is_linear = isinstance(model, LinearGaussianSSM)
    model = check_nonlinear(model)
    series, inputs = model.check_series(y, u)
    given = None if start is None else check_start(start, len(series), model.n_state).astype(model.m0.dtype)
    factors = as_factor("chol_P0", model.chol_P0), as_factor("chol_Q", model.chol_Q)
    found, end = _laplace(model, *factors, series, inputs, given, num_iters=num_iters, is_linear=is_linear)
    return jax.tree.map(lambda x: insist(x, end, num_iters), found)


@partial(jax.jit, static_argnames=("num_iters", "is_linear"))
def _laplace(
    model: NonlinearSSM,
    chol_P0: Factor,
    chol_Q: Factor,
    y: Array,
    u: Array | None,
    start: Array | None,
    *,
    num_iters: int,
    is_linear: bool,
) -> tuple[SmootherResult, End]:
    """What `laplace_path` returns, and where its search has ended."""
    prior = StatePath(model.m0, chol_P0, model.transition, chol_Q, len(y), u, time_varying=model.time_varying)

    def log_lik(path: Array) -> Array:
        return jnp.sum(jax.vmap(model.log_prob)(y, path, u))

    if is_linear:
        path = linear_mode(prior, log_lik, start)
    else:
        others = further_starts(model, y, u) if start is None else None
        close = 1e-12 if y.dtype == jnp.float64 else 1e-6
        options: dict[str, Any] = {"start": start, "others": others, "num_iters": num_iters, "tolerance": close}
        path = mode_path(prior, log_lik, rank=model.n_state, strict=False, **options)
    step = gauss_newton(prior, log_lik, path)
    found = _about_mode(prior, path + step.move, step.J, log_lik(path + step.move) + step.quadratic)
    if is_linear:
        return found, End(jnp.ones((), bool), jnp.zeros((), y.dtype))
    end = judge(prior, log_lik, path, step.move)
    return found, end._replace(is_mode=end.is_mode & is_maximum(prior, log_lik, path, step.slope))


def _about_mode(prior: StatePath, path: Array, J: Array, log_joint: Array) -> SmootherResult:
    """Moments of the Gaussian whose backward messages have the curvatures `J`, and the evidence.

    `log_joint` is that of the data and of the noise that drives the path, without the normaliser of the latter. It is
    not a difference of two densities of paths: those need the residuals of rounded states, which a small or singular
    noise blows up.

    Given the state before it, `z_t` has the covariance `V = (Q^{-1} + J)^{-1} = F (1 + F' J F)^{-1} F'` and depends on
    it through `(1 + Q J)^{-1} A`.
    """
    a, _ = prior.arrays()
    timed: dict[str, Any] = prior.timed(a)

    def given(factor: Any, J: Array) -> tuple[Array, Array, Array]:
        F = as_matrix(factor)
        reduce, _, inverse = through_noise(F, J)
        return matmul(F, inverse.T), reduce.T, jnp.sum(jnp.log(jnp.diagonal(inverse)))

    def linearise(x: Array, t: dict[str, Any]) -> Array:
        return jax.jacfwd(lambda s: prior.step({**a, **t}, s))(x)

    def step(chol: Array, xs: tuple) -> tuple[Array, tuple]:
        J, A, t = xs
        spread, keep, logdet = given({**a, **t}["chol_Q"], J)
        moved = matmul(keep, matmul(A, chol))
        new = triangularise(jnp.concatenate([spread, moved], axis=1))
        return new, (new, matmul(moved, chol.T), logdet)

    spread, _, first_logdet = given(a["chol_P0"], J[0])
    first = triangularise(spread)
    A = jax.vmap(linearise)(path[:-1], timed)
    _, (chol, cross_cov, logdets) = jax.lax.scan(step, first, (J[1:], A, timed))
    evidence = log_joint + first_logdet + jnp.sum(logdets)
    return SmootherResult(path, jnp.concatenate([first[None], chol]), cross_cov, evidence)
