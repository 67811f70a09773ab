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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.batch import map_batch
from pssm.distributions import StatePath
from pssm.linalg import triangularise
from pssm.linalg.low_rank import Diagonal, as_matrix
from pssm.linalg.potential import Potential
from pssm.linalg.small import TINY, matmul, matvec
from pssm.linalg.square_root import solve_lower
from pssm.modes.mode import through_noise

LogLik = Callable[[Array], Array]


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


class _Messages(NamedTuple):
    """Of all steps of one path: `J`, `h`, `G = (1 + J Q)^{-1}`, a root of `(Q^{-1} + J)^{-1}`, and `-log |M| / 2`."""

    J: Array
    h: Array
    reduce: Array
    root: Array
    half: Array


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
    short = eps**0.35  # in standard deviations: the step that is taken in the end squares what is left
    batch = start.shape[:-2]
    whiteners = _whiteners(prior)

    def density(path: Array) -> Array:
        return log_lik(path) + _quadratic(prior, whiteners, path)

    def wide(x: Array) -> Array:
        return x[..., None, None]

    def body(s: tuple) -> tuple:
        path, slope, value, size, newton, done, count = s
        gradient, W = signed_sites(log_lik, path)
        signed = W + _bend(prior, path, slope) if not prior.is_linear else W
        used = jnp.where(wide(newton)[..., None], signed, _majorant(W))
        move, new_slope, variance, proper = _newton_step(prior, path, gradient, used)
        proper &= jnp.all(jnp.isfinite(move), axis=(-2, -1))
        move = jnp.where(wide(proper), move, 0.0)
        length = jnp.where(newton, 1.0, size)
        trial = path + wide(length) * move
        reached = density(trial)
        still = jnp.abs(move) <= 4 * eps * jnp.max(jnp.abs(path), axis=-2, keepdims=True)
        still |= move**2 <= short**2 * variance
        done_now = done | (proper & jnp.isfinite(value) & jnp.all(still, axis=(-2, -1)))
        slack = 100 * eps * (1.0 + jnp.abs(value))
        climbs = jnp.isfinite(reached) & ((reached >= value - slack) | ~jnp.isfinite(value))
        taken = proper & climbs & ~done_now
        path = jnp.where(wide(taken), trial, path)
        slope = jnp.where(wide(taken), slope + wide(length) * (new_slope - slope), slope)
        size = jnp.where(newton, size, jnp.where(taken, jnp.minimum(2.0 * size, 1.0), 0.25 * size))
        return path, slope, jnp.where(taken, reached, value), size, taken, done_now, count + 1

    def going(s: tuple) -> Array:
        return jnp.any(~s[5]) & (s[6] < num_iters)

    # Where some directions have no noise the start may break their equations: its density is zero, any step will do.
    first = jnp.where(_is_regular(whiteners), density(start), -jnp.inf)
    ones = jnp.ones(batch, bool)
    state = start, jnp.zeros_like(start), first, jnp.full(batch, 0.5, dtype), ones, ~ones, jnp.zeros((), int)
    path, slope, _, _, _, done, count = jax.lax.while_loop(going, body, state)
    return Mode(path, slope, done, count)


def expand(prior: StatePath, log_lik: LogLik, mode: Mode) -> Expansion:
    """Laplace's value at a mode and the messages there, with derivatives by what is inside `prior` and `log_lik`."""
    still = jax.lax.stop_gradient
    z, w = still(mode.path), still(mode.slope)
    gradient, W = signed_sites(log_lik, z)
    W = still(W + _bend(prior, z, w) if not prior.is_linear else W)
    move, slope, _, proper = _newton_step(prior, z, gradient, W)
    path = z + move
    gradient, W = signed_sites(log_lik, path)
    W = W + _bend(prior, path, slope) if not prior.is_linear else W

    def one(a: dict[str, Any]) -> tuple[_Messages, Array]:
        A, offset = _linearise(prior, a, a["z"])
        found = _backward(prior, a, a["g"], a["W"], A, offset)
        noise = _through_factors(prior, a, a["w"])
        return found, -0.5 * jnp.sum(noise**2) + jnp.sum(found.half)

    values = {"z": path, "g": gradient, "W": W, "w": slope}
    found, rest = _map(prior, one, values, {"z": 2, "g": 2, "W": 3, "w": 2})
    value = log_lik(path) + rest
    is_mode = mode.converged & proper & jnp.isfinite(value)
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
    paths, ratios = _map(prior, one, values, {"z": 2, "J": 3, "h": 2, "noise": 2})
    likelihoods = jax.vmap(log_lik)(jnp.moveaxis(paths, len(batch), 0))
    weights = likelihoods + jnp.moveaxis(ratios, len(batch), 0)
    value = jax.nn.logsumexp(weights, axis=0) - jnp.log(len(weights))
    return jnp.where(found.is_mode & jnp.isfinite(value), value, -jnp.inf)


def potential_of(found: Expansion) -> Potential:
    """The messages as potentials of full rank about the mode; negative curvature counts as none."""
    values, vectors = jnp.linalg.eigh(found.J)
    factor = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[..., None, :]
    return Potential(factor, center=found.path, slope=found.slope)


def signed_sites(log_lik: LogLik, path: Array) -> tuple[Array, Array]:
    """Gradient and minus the Hessian of the log-likelihood at every step, the latter signed.

    Each state enters its own summand only, so one product with a unit vector at every step gives one column of all
    blocks. Entries that are not finite count as zero.
    """
    n = path.shape[-1]

    def slope(z: Array) -> Array:
        return jax.grad(lambda z: jnp.sum(log_lik(z)))(z)

    def column(unit: Array) -> Array:
        return jax.jvp(slope, (path,), (jnp.broadcast_to(unit, path.shape),))[1]

    eye = jnp.eye(n, dtype=path.dtype)
    columns = jnp.stack([column(x) for x in eye]) if n <= TINY else jax.lax.map(column, eye)
    hessian = jnp.moveaxis(columns, 0, -1)
    hessian = 0.5 * (hessian + jnp.swapaxes(hessian, -1, -2)) if n > 1 else hessian
    gradient = slope(path)
    return jnp.where(jnp.isfinite(gradient), gradient, 0.0), -jnp.where(jnp.isfinite(hessian), hessian, 0.0)


def _majorant(W: Array) -> Array:
    """A diagonal that is above a curvature and not negative: its steps climb."""
    return jnp.sum(jnp.abs(W), axis=-1)[..., None] * jnp.eye(W.shape[-1], dtype=W.dtype)


def _map(prior: StatePath, one: Callable[[dict[str, Any]], Any], values: dict[str, Any], own: dict[str, int]) -> Any:
    arrays, cores = prior.arrays()
    batch = values["z"].shape[:-2]
    return map_batch(one, batch, {**arrays, **values}, {**cores, **own})


def _linearise(prior: StatePath, a: dict[str, Any], z: Array) -> tuple[Array, Array]:
    """`A_t` and `o_t` of the steps into `t = 2..T` along one path."""

    def at(x: Array, t: dict[str, Any]) -> tuple[Array, Array]:
        now = {**a, **t}
        if prior.is_linear:
            return prior.step(now, x), now["transition"]
        return prior.step(now, x), jax.jacfwd(lambda s: prior.step(now, s))(x)

    means, A = jax.vmap(at)(z[:-1], prior.timed(a))
    return A, means - z[1:]


def _backward(prior: StatePath, a: dict[str, Any], g: Array, W: Array, A: Array, offset: Array) -> _Messages:
    """The messages about one path."""

    def noise(factor: Any, J: Array) -> tuple[Array, Array, Array, Array]:
        rows = as_matrix(factor)
        reduce, spread, inverse = through_noise(rows, J)
        return reduce, spread, matmul(rows, inverse.T), jnp.sum(jnp.log(jnp.diagonal(inverse)))

    def back(message: tuple[Array, Array], xs: tuple) -> tuple[tuple, _Messages]:
        J, h = message
        g, W, A, o, t = xs
        reduce, spread, root, half = noise({**a, **t}["chol_Q"], J)
        h_before = matvec(reduce, h - matvec(J, o))
        J_before = matmul(matmul(reduce, J), reduce.T) + matmul(spread, spread.T)
        return (W + matmul(A.T, matmul(J_before, A)), g + matvec(A.T, h_before)), _Messages(J, h, reduce, root, half)

    first, later = jax.lax.scan(back, (W[-1], g[-1]), (g[:-1], W[:-1], A, offset, prior.timed(a)), reverse=True)
    reduce, _, root, half = noise(a["chol_P0"], first[0])
    start = _Messages(*first, reduce, root, half)
    if root.shape[-1] != later.root.shape[-1]:  # noise of fewer columns than the first state has
        columns = max(root.shape[-1], later.root.shape[-1])
        start, later = (
            m._replace(root=jnp.pad(m.root, [(0, 0)] * (m.root.ndim - 1) + [(0, columns - m.root.shape[-1])]))
            for m in (start, later)
        )
    return jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), start, later)


def _newton_step(prior: StatePath, path: Array, gradient: Array, W: Array) -> tuple[Array, Array, Array, Array]:
    """From paths: the step, the slopes `w` at its end, conditional variances, and whether the curvature is definite."""

    def one(a: dict[str, Any]) -> tuple[Array, Array, Array, Array]:
        A, offset = _linearise(prior, a, a["z"])
        found = _backward(prior, a, a["g"], a["W"], A, offset)

        def absorb(m: _Messages, mu: Array) -> tuple[Array, Array]:
            pull = m.h - matvec(m.J, mu)
            return mu + matvec(m.root, matvec(m.root.T, pull)), matvec(m.reduce, pull)

        def forward(x: Array, xs: tuple) -> tuple[Array, tuple[Array, Array]]:
            m, A, o = xs
            new = absorb(m, o + matvec(A, x))
            return new[0], new

        first = absorb(jax.tree.map(lambda x: x[0], found), a["m0"] - a["z"][0])
        _, rest = jax.lax.scan(forward, first[0], (jax.tree.map(lambda x: x[1:], found), A, offset))
        move, slope = (jnp.concatenate([x[None], y]) for x, y in zip(first, rest, strict=True))
        return move, slope, jnp.sum(found.root**2, axis=-1), jnp.all(jnp.isfinite(found.half))

    return _map(prior, one, {"z": path, "g": gradient, "W": W}, {"z": 2, "g": 2, "W": 3})


def _bend(prior: StatePath, path: Array, slope: Array) -> Array:
    """`- sum_i w_{t+1,i} f_i''(z_t)` along paths, `(*batch, time, state, state)`; zero at the last step."""

    def one(a: dict[str, Any]) -> Array:
        def at(x: Array, w: Array, t: dict[str, Any]) -> Array:
            return -jax.jacfwd(jax.grad(lambda s: jnp.sum(w * prior.step({**a, **t}, s))))(x)

        later = jax.vmap(at)(a["z"][:-1], a["w"][1:], prior.timed(a))
        later = jnp.where(jnp.isfinite(later), later, 0.0)
        return jnp.concatenate([later, jnp.zeros((1, *later.shape[1:]), later.dtype)])

    return _map(prior, one, {"z": path, "w": slope}, {"z": 2, "w": 2})


def _through_factors(prior: StatePath, a: dict[str, Any], w: Array) -> Array:
    """`F_t' w_t` of all steps, flat."""

    def one(factor: Any, w: Array) -> Array:
        return matvec(as_matrix(factor).T, w)

    timed = prior.timed(a)
    if "chol_Q" in timed:
        later = jax.vmap(one)(timed["chol_Q"], w[1:])
    else:
        later = jax.vmap(one, (None, 0))(a["chol_Q"], w[1:])
    return jnp.concatenate([one(a["chol_P0"], w[0]), later.ravel()])


def _whiteners(prior: StatePath) -> dict[str, Any]:
    """Inverses of the noise's factors, zero in directions without noise."""

    def invert(factor: Array) -> Array:
        return solve_lower(triangularise(factor), jnp.eye(factor.shape[-2], dtype=factor.dtype))

    def of(factor: Any) -> Any:
        if isinstance(factor, Diagonal):
            sd = jnp.abs(factor.scale)
            return Diagonal(jnp.where(sd > 0, 1 / jnp.where(sd > 0, sd, 1.0), 0.0))
        flat = factor.reshape(-1, *factor.shape[-2:])
        found = jax.vmap(invert)(flat)
        return found.reshape(*factor.shape[:-2], *found.shape[1:])

    return {"chol_P0": of(prior.chol_P0), "chol_Q": of(prior.chol_Q)}


def _is_regular(whiteners: dict[str, Any]) -> Array:
    """Whether there is noise in all directions, of all steps and series."""
    matrices = [x.scale if isinstance(x, Diagonal) else jnp.diagonal(x, axis1=-2, axis2=-1) for x in whiteners.values()]
    return jnp.all(jnp.stack([jnp.all(x > 0) for x in matrices]))


def _quadratic(prior: StatePath, whiteners: dict[str, Any], path: Array) -> Array:
    """`- sum_t |e_t|^2 / 2` of the noise that drives paths, `(*batch,)`."""
    _, cores = prior.arrays()

    def one(a: dict[str, Any]) -> Array:
        z, inverse = a["z"], {"chol_P0": a["white_P0"], "chol_Q": a["white_Q"]}
        means = prior.means(a, z) if prior.num_steps > 1 else z[1:]
        first, later = z[0] - a["m0"], z[1:] - means

        def white(matrix: Any, r: Array) -> Array:
            return matrix.scale * r if isinstance(matrix, Diagonal) else matvec(matrix, r)

        if "chol_Q" in prior.time_varying:
            later = jax.vmap(white)(jax.tree.map(lambda x: x[1:], inverse["chol_Q"]), later)
        else:
            later = jax.vmap(white, (None, 0))(inverse["chol_Q"], later)
        return -0.5 * (jnp.sum(white(inverse["chol_P0"], first) ** 2) + jnp.sum(later**2))

    values = {"z": path, "white_P0": whiteners["chol_P0"], "white_Q": whiteners["chol_Q"]}
    return _map(prior, one, values, {"z": 2, "white_P0": cores["chol_P0"], "white_Q": cores["chol_Q"]})
