"""The path integrated out about its mode: Laplace's value and an estimate by fixed draws, with derivatives.

The mode of a path is found by Newton steps. With the transition linearised along a path `z` (`A_t` its Jacobian, `o_t =
f(z_{t-1}) - z_t`) and sites `(g_t, W_t)` (gradient and minus the Hessian of the log-likelihood), the messages about the
path, `log p(y_{t:T} | z_t + x) = h_t'x - x'J_t x / 2`, go backward and the step forward as in `mode.py`. Here `W_t` is
signed, and holds the bend of the transition too: `- sum_i w_{t+1,i} f_i''(z_t)` with `w = Q^{-1} (z_t - f(z_{t-1}))`.
So the step is Newton's own, and the curvature of the log density is positive definite if and only if each
`M_t = 1 + F_t' J_t F_t` is (`Q = F F'`, which may be singular). Laplace's value is

    log h(z) - sum_t |F_t' w_t|^2 / 2 - sum_t log |M_t| / 2.

Derivatives do not go through the search. From the mode, held fixed, one more step is taken that is differentiated: it
moves nothing, and its derivative is that of the mode (the implicit function). What follows from the mode, such as the
determinant, is differentiated as it stands.

Source:
    Tierney & Kadane 1986; Skaug & Fournier 2006 (derivatives of Laplace's value). Weights of draws about the mode:
    Shephard & Pitt 1997; Durbin & Koopman 1997.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.distributions import StatePath
from pssm.linalg.low_rank import as_matrix
from pssm.linalg.potential import Potential
from pssm.linalg.small import matvec
from pssm.modes.mode import through_noise
from pssm.modes.newton import (
    LogLik,
    Messages,
    backward,
    bend,
    is_regular,
    linearise,
    map_paths,
    newton_step,
    quadratic,
    signed_sites,
    through_factors,
    whiteners_of,
)


class Mode(NamedTuple):
    """The end of a search, without derivatives.

    Attributes:
        path: `(*batch, time, state)`.
        slope: `w`, `(*batch, time, state)`.
        converged: whether the last step was too short to matter, `(*batch,)`.
        steps: Newton steps taken, `()`.
    """

    path: Array
    slope: Array
    converged: Array
    steps: Array


class Expansion(NamedTuple):
    """What is known about the mode, with derivatives.

    Attributes:
        path: the mode, `(*batch, time, state)`.
        slope: `w` there: slopes of the messages, `(*batch, time, state)`.
        J: curvatures of the messages, signed, `(*batch, time, state, state)`.
        h: slopes of the messages as the backward pass has them, `(*batch, time, state)`; `w` up to rounding.
        value: Laplace's, `(*batch,)`; minus infinity where the path is no maximum.
        is_mode: whether it is one, `(*batch,)`.
    """

    path: Array
    slope: Array
    J: Array
    h: Array
    value: Array
    is_mode: Array


def find_mode(prior: StatePath, log_lik: LogLik, start: Array, *, num_iters: int = 100) -> Mode:
    """The mode near a path, by Newton's steps; where one does not climb, by shorter ones with a curvature that must.

    Args:
        prior: the path prior.
        log_lik: as in `mode_potentials`, with the batch shape of the paths.
        start: a path, `(*batch, time, state)`.
        num_iters: most steps.
    """
    dtype = start.dtype
    eps = float(jnp.finfo(dtype).eps)
    short = 3e-3  # in standard deviations: this step is taken, then one more, and each squares what is left
    batch = start.shape[:-2]
    whiteners = whiteners_of(prior)

    def density(path: Array) -> Array:
        return log_lik(path) + quadratic(prior, whiteners, path)

    def wide(x: Array) -> Array:
        return x[..., None, None]

    def body(s: tuple) -> tuple:
        path, slope, value, size, newton, done, count = s
        gradient, W = signed_sites(log_lik, path)
        signed = W + bend(prior, path, slope) if not prior.is_linear else W
        used = jnp.where(wide(newton)[..., None], signed, _majorant(W))
        step = newton_step(prior, path, gradient, used)
        proper = step.proper & jnp.all(jnp.isfinite(step.move), axis=(-2, -1))
        move = jnp.where(wide(proper), step.move, 0.0)
        length = jnp.where(newton, 1.0, size)
        trial = path + wide(length) * move
        reached = density(trial)
        still = jnp.abs(move) <= 4 * eps * jnp.max(jnp.abs(path), axis=-2, keepdims=True)
        still |= move**2 <= short**2 * step.variance
        done_now = done | (proper & jnp.isfinite(value) & jnp.all(still, axis=(-2, -1)))
        slack = 100 * eps * (1.0 + jnp.abs(value))
        climbs = jnp.isfinite(reached) & ((reached >= value - slack) | ~jnp.isfinite(value))
        taken = proper & climbs & ~done
        path = jnp.where(wide(taken), trial, path)
        slope = jnp.where(wide(taken), slope + wide(length) * (step.slope - slope), slope)
        size = jnp.where(newton, size, jnp.where(taken, jnp.minimum(2.0 * size, 1.0), 0.25 * size))
        return path, slope, jnp.where(taken, reached, value), size, taken, done_now, count + 1

    def going(s: tuple) -> Array:
        return jnp.any(~s[5]) & (s[6] < num_iters)

    # Where some directions have no noise the start may break their equations: its density is zero, any step will do.
    first = jnp.where(is_regular(whiteners), density(start), -jnp.inf)
    ones = jnp.ones(batch, bool)
    state = start, jnp.zeros_like(start), first, jnp.full(batch, 0.5, dtype), ones, ~ones, jnp.zeros((), int)
    path, slope, _, _, _, done, count = jax.lax.while_loop(going, body, state)
    return Mode(path, slope, done, count)


def expand(prior: StatePath, log_lik: LogLik, mode: Mode) -> Expansion:
    """Laplace's value at a mode and the messages there, with derivatives by what is inside `prior` and `log_lik`."""
    still = jax.lax.stop_gradient
    z, w = still(mode.path), still(mode.slope)
    gradient, W = signed_sites(log_lik, z)
    W = still(W + bend(prior, z, w) if not prior.is_linear else W)
    step = newton_step(prior, z, gradient, W)
    path, slope = z + step.move, step.slope
    gradient, W = signed_sites(log_lik, path)
    W = W + bend(prior, path, slope) if not prior.is_linear else W

    def one(a: dict[str, Any]) -> tuple[Messages, Array]:
        A, offset = linearise(prior, a, a["z"])
        found = backward(prior, a, a["g"], a["W"], A, offset)
        noise = through_factors(prior, a, a["w"])
        return found, -0.5 * jnp.sum(noise**2) + jnp.sum(found.half)

    values = {"z": path, "g": gradient, "W": W, "w": slope}
    found, rest = map_paths(prior, one, values, {"z": 2, "g": 2, "W": 3, "w": 2})
    value = log_lik(path) + rest
    is_mode = mode.converged & step.proper & jnp.isfinite(value)
    return Expansion(path, slope, found.J, found.h, jnp.where(is_mode, value, -jnp.inf), is_mode)


def estimate(prior: StatePath, log_lik: LogLik, found: Expansion, noise: Array) -> Array:
    """`log (1/S) sum_s p(y, z_s) / q(z_s)` with paths `z_s` drawn about the mode by fixed normals, `(*batch,)`.

    The draws are those of the chain whose messages are the expansion's. With noise that is fixed it is a smooth
    function of all else; over the noise the estimate (not its logarithm) is unbiased.

    Args:
        prior: the path prior.
        log_lik: as in `find_mode`.
        found: of `expand`.
        noise: standard normals `(draws, *batch, noise_size)`, as in `StatePath.path_from_noise`.
    """

    def one(a: dict[str, Any]) -> tuple[Array, Array]:
        center, n = a["z"], prior.n_state

        def draw(now: dict[str, Any], J: Array, h: Array, mu: Array, e: Array) -> tuple[Array, Array]:
            factor = as_matrix(now)
            _, _, inverse = through_noise(factor, J)
            driven = matvec(inverse.T, matvec(inverse, matvec(factor.T, h - matvec(J, mu))) + e)
            ratio = 0.5 * (jnp.sum(e**2) - jnp.sum(driven**2)) + jnp.sum(jnp.log(jnp.diagonal(inverse)))
            return mu + matvec(factor, driven), ratio

        def path(e: Array) -> tuple[Array, Array]:
            x, first = draw(a["chol_P0"], a["J"][0], a["h"][0], a["m0"] - center[0], e[:n])

            def step(x: Array, xs: tuple) -> tuple[Array, tuple[Array, Array]]:
                J, h, before, here, e, timed = xs
                now = {**a, **timed}
                x, ratio = draw(now["chol_Q"], J, h, prior.step(now, before + x) - here, e)
                return x, (x, ratio)

            later = e[n:].reshape(prior.num_steps - 1, -1)
            xs = a["J"][1:], a["h"][1:], center[:-1], center[1:], later, prior.timed(a)
            _, (rest, ratios) = jax.lax.scan(step, x, xs, length=prior.num_steps - 1)
            return center + jnp.concatenate([x[None], rest]), first + jnp.sum(ratios)

        return jax.vmap(path)(a["noise"])

    batch = found.path.shape[:-2]
    noise = jnp.moveaxis(jnp.broadcast_to(noise, (len(noise), *batch, noise.shape[-1])), 0, -2)
    values = {"z": found.path, "J": found.J, "h": found.h, "noise": noise}
    paths, ratios = map_paths(prior, one, values, {"z": 2, "J": 3, "h": 2, "noise": 2})
    likelihoods = jax.vmap(log_lik)(jnp.moveaxis(paths, len(batch), 0))
    weights = likelihoods + jnp.moveaxis(ratios, len(batch), 0)
    value = jax.nn.logsumexp(weights, axis=0) - jnp.log(len(weights))
    return jnp.where(found.is_mode & jnp.isfinite(value), value, -jnp.inf)


def potential_of(path: Array, slope: Array, J: Array) -> Potential:
    """Messages about a path as potentials, signed, of full rank."""
    return Potential(jnp.zeros((*path.shape, 0), path.dtype), center=path, slope=slope, precision=J)


def _majorant(W: Array) -> Array:
    """A diagonal that is above a curvature and not negative: its steps climb."""
    return jnp.sum(jnp.abs(W), axis=-1)[..., None] * jnp.eye(W.shape[-1], dtype=W.dtype)
