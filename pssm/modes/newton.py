"""Newton's step for a path with signed curvature, in loops without a library call for small states.

With the transition linearised along a path `z` (`A_t` its Jacobian, `o_t = f(z_{t-1}) - z_t`) and sites `(g_t, W_t)`
(gradient and minus the Hessian of the log-likelihood), the messages about the path, `log p(y_{t:T} | z_t + x) =
h_t'x - x'J_t x / 2`, go backward and the step forward as in `mode.py`. Here `W_t` may be negative: the curvature of the
whole is positive definite if and only if each `M_t = 1 + F_t' J_t F_t` is (`Q = F F'`, which may be singular).
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
from pssm.linalg.small import TINY, cholesky, invert_lower, matmul, matvec
from pssm.linalg.square_root import solve_lower
from pssm.modes.mode import through_noise

LogLik = Callable[[Array], Array]


class Messages(NamedTuple):
    """Of all steps of one path: `J`, `h`, `G = (1 + J Q)^{-1}`, `V = (Q^{-1} + J)^{-1}`, and `-log |M| / 2`."""

    J: Array
    h: Array
    reduce: Array
    V: Array
    half: Array


class Step(NamedTuple):
    """From paths: the step, the slopes `w` at its end, the messages, and the covariances there (if asked for)."""

    move: Array
    slope: Array
    messages: Messages
    cov: Array | None

    @property
    def variance(self) -> Array:
        """Conditional variances `(..., time, state)`."""
        return jnp.diagonal(self.messages.V, axis1=-2, axis2=-1)

    @property
    def proper(self) -> Array:
        """Whether the curvature is positive definite."""
        return jnp.all(jnp.isfinite(self.variance), axis=(-2, -1))  # of a Cholesky factor


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


def map_paths(
    prior: StatePath, one: Callable[[dict[str, Any]], Any], values: dict[str, Any], own: dict[str, int]
) -> Any:
    """`one` for each of the paths `values["z"]`, with the prior's arrays; `own` are the core axes of the values."""
    arrays, cores = prior.arrays()
    batch = values["z"].shape[:-2]
    return map_batch(one, batch, {**arrays, **values}, {**cores, **own})


def linearise(prior: StatePath, a: dict[str, Any], z: Array) -> tuple[Array, Array]:
    """`A_t` and `o_t` of the steps into `t = 2..T` along one path."""

    def at(x: Array, t: dict[str, Any]) -> tuple[Array, Array]:
        now = {**a, **t}
        if prior.is_linear:
            return prior.step(now, x), now["transition"]
        return prior.step(now, x), jax.jacfwd(lambda s: prior.step(now, s))(x)

    means, A = jax.vmap(at)(z[:-1], prior.timed(a))
    return A, means - z[1:]


def backward(prior: StatePath, a: dict[str, Any], g: Array, W: Array, A: Array, offset: Array) -> Messages:
    """The messages about one path.

    The loop has only the recursion; what follows from `J` at each step is computed for all steps at once.
    """

    def back(message: tuple[Array, Array], xs: tuple) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        J, h = message
        g, W, A, o, t = xs
        factor = as_matrix({**a, **t}["chol_Q"])
        loaded = matmul(J, factor)
        spread = matmul(loaded, inverse(matmul(factor.T, loaded)))
        reduce = jnp.eye(J.shape[0], dtype=J.dtype) - matmul(spread, factor.T)
        if J.shape == factor.shape == (1, 1):
            J_before = matmul(reduce, J)
        else:  # nothing cancels
            J_before = matmul(matmul(reduce, J), reduce.T) + matmul(spread, spread.T)
        h_before = matvec(reduce, h - matvec(J, o))
        before = W + matmul(A.T, matmul(J_before, A)), g + matvec(A.T, h_before)
        return before, message

    timed = prior.timed(a)
    first, (J, h) = jax.lax.scan(back, (W[-1], g[-1]), (g[:-1], W[:-1], A, offset, timed), reverse=True)
    start = given(a["chol_P0"], first[0])
    if "chol_Q" in timed:
        later = jax.vmap(given)(timed["chol_Q"], J)
    else:
        later = jax.vmap(given, (None, 0))(a["chol_Q"], J)
    J, h, *rest = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), (*first, *start), (J, h, *later))
    return Messages(J, h, *rest)


def given(factor: Any, J: Array) -> tuple[Array, Array, Array]:
    """`G`, `V` and `-log |M| / 2` of a step, NaN where `M` is not positive definite."""
    rows = as_matrix(factor)
    reduce, _, inverse = through_noise(rows, J)
    root = matmul(rows, inverse.T)
    return reduce, matmul(root, root.T), jnp.sum(jnp.log(jnp.diagonal(inverse)))


def inverse(inner: Array) -> Array:
    """`(1 + inner)^{-1}`, by pivots without square roots where it is small."""
    size = inner.shape[0]
    matrix = jnp.eye(size, dtype=inner.dtype) + (inner if size == 1 else 0.5 * (inner + inner.T))
    if size > TINY:
        lower = invert_lower(cholesky(matrix))
        return matmul(lower.T, lower)
    rows = jnp.eye(size, dtype=inner.dtype)  # becomes the inverse of the unit lower triangle
    reciprocals = []
    for j in range(size):
        reciprocals.append(1.0 / matrix[j, j])
        below = jnp.where(jnp.arange(size) > j, matrix[:, j] * reciprocals[-1], 0.0)
        matrix = matrix - below[:, None] * matrix[j][None, :]
        rows = rows - below[:, None] * rows[j][None, :]
    return matmul(rows.T, jnp.stack(reciprocals)[:, None] * rows)


def newton_step(prior: StatePath, path: Array, gradient: Array, W: Array, *, covariances: bool = False) -> Step:
    """The step from paths `(*batch, time, state)`."""

    def one(a: dict[str, Any]) -> Step:
        A, offset = linearise(prior, a, a["z"])
        found = backward(prior, a, a["g"], a["W"], A, offset)
        V, keep = found.V[1:], jax.vmap(lambda G, A: matmul(G.T, A))(found.reduce[1:], A)
        added = jax.vmap(lambda V, G, h, o: matvec(V, h) + matvec(G.T, o))(V, found.reduce[1:], found.h[1:], offset)
        mu = a["m0"] - a["z"][0]
        start = matvec(found.V[0], found.h[0]) + matvec(found.reduce[0].T, mu)

        def forward(x: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
            x = xs[0] + matvec(xs[1], x)
            return x, x

        def widen(cov: Array, xs: tuple[Array, Array]) -> tuple[Array, Array]:
            cov = xs[0] + matmul(matmul(xs[1], cov), xs[1].T)
            return cov, cov

        move = jnp.concatenate([start[None], jax.lax.scan(forward, start, (added, keep))[1]])
        means = jnp.concatenate([mu[None], offset + jax.vmap(matvec)(A, move[:-1])])
        slope = jax.vmap(lambda G, h, J, mu: matvec(G, h - matvec(J, mu)))(found.reduce, found.h, found.J, means)
        cov = None
        if covariances:
            cov = jnp.concatenate([found.V[:1], jax.lax.scan(widen, found.V[0], (V, keep))[1]])
        return Step(move, slope, found, cov)

    return map_paths(prior, one, {"z": path, "g": gradient, "W": W}, {"z": 2, "g": 2, "W": 3})


def bend(prior: StatePath, path: Array, slope: Array) -> Array:
    """`- sum_i w_{t+1,i} f_i''(z_t)` along paths, `(*batch, time, state, state)`; zero at the last step."""

    def one(a: dict[str, Any]) -> Array:
        def at(x: Array, w: Array, t: dict[str, Any]) -> Array:
            return -jax.jacfwd(jax.grad(lambda s: jnp.sum(w * prior.step({**a, **t}, s))))(x)

        later = jax.vmap(at)(a["z"][:-1], a["w"][1:], prior.timed(a))
        later = jnp.where(jnp.isfinite(later), later, 0.0)
        return jnp.concatenate([later, jnp.zeros((1, *later.shape[1:]), later.dtype)])

    return map_paths(prior, one, {"z": path, "w": slope}, {"z": 2, "w": 2})


def through_factors(prior: StatePath, a: dict[str, Any], w: Array) -> Array:
    """`F_t' w_t` of all steps, flat."""

    def one(factor: Any, w: Array) -> Array:
        return matvec(as_matrix(factor).T, w)

    timed = prior.timed(a)
    if "chol_Q" in timed:
        later = jax.vmap(one)(timed["chol_Q"], w[1:])
    else:
        later = jax.vmap(one, (None, 0))(a["chol_Q"], w[1:])
    return jnp.concatenate([one(a["chol_P0"], w[0]), later.ravel()])


def whiteners_of(prior: StatePath) -> dict[str, Any]:
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


def is_regular(whiteners: dict[str, Any]) -> Array:
    """Whether there is noise in all directions, of all steps and series."""
    matrices = [x.scale if isinstance(x, Diagonal) else jnp.diagonal(x, axis1=-2, axis2=-1) for x in whiteners.values()]
    return jnp.all(jnp.stack([jnp.all(x > 0) for x in matrices]))


def quadratic(prior: StatePath, whiteners: dict[str, Any], path: Array) -> Array:
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
    return map_paths(prior, one, values, {"z": 2, "white_P0": cores["chol_P0"], "white_Q": cores["chol_Q"]})
