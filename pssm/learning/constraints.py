"""Linear constraints on the parameters of EM: coefficients and covariances `vec(X) = f + G a`, with `a` free.

Coefficients of a regression (`[A B b]`, `[C D d]`, `m0`) come by generalised least squares, weighed by the inverse of
the old noise. A covariance comes by a step of Fisher scoring, shortened until the expected log-likelihood does not fall
and the least eigenvalue is allowed; where the matrices of the space are closed under squaring (diagonal, blocks, equal
variances) one step is the exact maximiser. Either way the likelihood cannot fall.

Source:
    Holmes 2013; covariances: Anderson 1973, "Asymptotically efficient estimation of covariance matrices with linear
    structure".
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np

from pssm._checks import as_float, check_choice
from pssm._types import Array, ArrayLike
from pssm.learning.moments import Regression, stack
from pssm.linalg import unless
from pssm.ssm import LinearGaussianSSM

COVARIANCES = ("P0", "Q", "R")
SIDES = {"transition": ("A", "B", "b"), "emission": ("C", "D", "d")}
NOISE_OF = {"transition": "Q", "emission": "R"}
HALVINGS = 40  # of a step of scoring


class Space(NamedTuple):
    """`vec(X) = offset + basis a`, columns of `X` one below the other, `a` free.

    `live` are orthonormal directions in which the noise is not zero, `(variable, live)`: for coefficients those of the
    noise that weighs them, for a covariance its own.
    """

    offset: Array
    basis: Array
    live: Array


class Spaces(NamedTuple):
    """The spaces of an M-step; None where a part has no constraint.

    Attributes:
        transition: of `[A B b]` together, `emission` of `[C D d]`.
        P0: of a covariance; `Q` and `R` likewise.
        first: directions in which `m0` moves to the maximum of the likelihood, `(state, free)`; None where it is the
            mean of the smoothed first states, or held.
    """

    transition: Space | None = None
    emission: Space | None = None
    P0: Space | None = None
    Q: Space | None = None
    R: Space | None = None
    first: Array | None = None

    @property
    def constrained(self) -> bool:
        """Whether a parameter has a constraint, `m0` aside."""
        return any(space is not None for space in self[:-1])


Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def checked_pairs(constraint: Any, ssm: LinearGaussianSSM, fixed: frozenset[str], tied: tuple[str, ...]) -> Pairs:
    """The argument `constraint` as a pair `(f, G)` for each name, in 64 bits and in the user's units.

    Args:
        constraint: a mapping from names; a pair alone is that of `A`. A value is a pair, or an array of the parameter's
            shape in which NaN is free.
        ssm: a model with the shapes.
        fixed: names that are held.
        tied: covariances that `diagonal`, `isotropic` or `tied` name.
    """
    if constraint is None:
        return {}
    given = constraint if isinstance(constraint, Mapping) else {"A": constraint}
    found: Pairs = {}
    for name, value in given.items():
        check_choice("constraint", name, ("m0", *SIDES["transition"], *SIDES["emission"], *COVARIANCES))
        x = getattr(ssm, name)
        if x is None:
            raise ValueError(f"`constraint` has {name!r}, which the start `ssm` does not have.")
        if name in fixed or name in tied:
            other = "`fixed`" if name in fixed else "`diagonal`, `isotropic` or `tied`"
            raise ValueError(f"`constraint` and {other} both have {name!r}; leave it out of one of them.")
        where = "constraint" if not isinstance(constraint, Mapping) else f"constraint[{name!r}]"
        f, G = _pair(where, value, x.shape, name in COVARIANCES)
        if name in COVARIANCES:
            for column in (f, *G.T):
                matrix = column.reshape(x.shape)
                if not np.allclose(matrix, matrix.T):
                    raise ValueError(f"`{where}` must describe symmetric matrices; got {matrix.tolist()}.")
        found[name] = f, G
    return found


def _pair(where: str, value: Any, shape: tuple[int, ...], symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """`(f, G)` of a pair, or of an array with NaN at the free entries."""
    size = int(np.prod(shape))
    if isinstance(value, tuple):
        if len(value) != 2:
            raise ValueError(f"`{where}` must be (f, G), or an array in which NaN is free; got {len(value)} parts.")
        f, G = (np.asarray(as_float(f"{where}[{i}]", part), np.float64) for i, part in enumerate(value))
        if f.shape != (size,) or G.ndim != 2 or G.shape[0] != size:
            raise ValueError(
                f"`{where}` must be (f, G) of shapes ({size},) and ({size}, free), or an array of shape {shape} in "
                f"which NaN is free; got {f.shape} and {G.shape}."
            )
        return f, G
    x = np.asarray(as_float(where, value), np.float64)
    if x.shape != shape:
        raise ValueError(f"`{where}` must have shape {shape}, NaN where it is free; got {x.shape}.")
    free = np.isnan(x)
    if symmetric and not np.array_equal(free, free.T):
        raise ValueError(f"`{where}` must be free (NaN) at (i, j) where it is free at (j, i).")
    held = np.where(free, 0.0, x).reshape(-1, order="F")
    columns = []
    for index in np.argwhere(free):
        if not symmetric or index[0] >= index[1]:
            one = np.zeros(shape)
            one[tuple(index)] = 1.0
            one = np.maximum(one, one.T) if symmetric else one
            columns.append(one.reshape(-1, order="F"))
    return held, np.stack(columns, axis=1) if columns else np.zeros((size, 0))


def only_diagonal(pair: tuple[np.ndarray, np.ndarray], size: int) -> bool:
    """Whether all matrices of the space of a covariance are diagonal."""
    off = ~np.eye(size, dtype=bool).reshape(-1)
    return not pair[0][off].any() and not pair[1][off].any()


def make_spaces(ssm: LinearGaussianSSM, pairs: Pairs, fixed: frozenset[str]) -> tuple[LinearGaussianSSM, Spaces]:
    """The start, projected on its constraints, and the spaces; all in the units of EM."""
    dtype = ssm.dtype
    fields: dict[str, np.ndarray] = {}
    bases: dict[str, np.ndarray] = {}
    for name, (f, G) in pairs.items():
        norm = np.sqrt((G**2).sum(0))
        bases[name] = G / np.where(norm > 0, norm, 1.0)
        x = np.asarray(getattr(ssm, name), np.float64)
        free = np.linalg.lstsq(bases[name], x.reshape(-1, order="F") - f)[0]
        fields[name] = (f + bases[name] @ free).reshape(x.shape, order="F")
    found: dict[str, Any] = {}
    for name in COVARIANCES:
        if name in pairs:
            cov = fields.pop(name)
            live, fields[f"chol_{name}"] = _live(name, cov, bases[name])
            found[name] = _as(dtype, Space(pairs[name][0], bases[name], live))
    ssm = ssm.replace(**{name: jnp.asarray(x, dtype) for name, x in fields.items()}) if fields else ssm
    for side, names in SIDES.items():
        if any(name in pairs for name in names):
            found[side] = _as(dtype, _side(ssm, side, bases, fixed))
    if "m0" not in fixed and not ssm.diffuse:
        start = np.linalg.eigvalsh(np.asarray(ssm.P0, np.float64))
        certain = start[0] <= len(start) * float(jnp.finfo(dtype).eps) * start[-1]
        if certain or "m0" in pairs:
            found["first"] = jnp.asarray(bases.get("m0", np.eye(ssm.n_state)), dtype)
    return ssm, Spaces(**found)


def _as(dtype: Any, space: Space) -> Space:
    return Space(*(jnp.asarray(x, dtype) for x in space))


def _range(cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal directions in which a covariance is positive, and those in which it is zero."""
    values, vectors = np.linalg.eigh(cov)
    positive = values > len(values) * 4e-16 * max(values[-1], 0.0)
    return vectors[:, positive], vectors[:, ~positive]


def _live(name: str, cov: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The range of a covariance at the start, in which all of its space must lie, and a factor of it."""
    live, none = _range(cov)
    n = len(cov)
    scale = np.abs(cov).max(initial=0.0)
    if np.linalg.eigvalsh(cov)[0] < -1e-8 * scale:
        raise ValueError(f"`constraint[{name!r}]`: the start, brought onto it, is no covariance: {cov.tolist()}.")
    for column in basis.T:
        if np.abs(none.T @ column.reshape(n, n)).max(initial=0.0) > 1e-8:
            raise ValueError(
                f"`constraint[{name!r}]` frees noise in a direction where the start has none, and EM cannot leave "
                f"zero: start with a positive variance there, or hold those entries at zero. The start is "
                f"{cov.tolist()}."
            )
    inner = live.T @ cov @ live
    factor = live @ np.linalg.cholesky(0.5 * (inner + inner.T)) if live.size else live
    return live, np.pad(factor, ((0, 0), (0, n - factor.shape[1])))


def _side(ssm: LinearGaussianSSM, side: str, bases: dict[str, np.ndarray], fixed: frozenset[str]) -> Space:
    """The space of all coefficients of a regression; those of its noise-free rows stay at the start."""
    first, by_input, constant = SIDES[side]
    offset = np.asarray(stack(getattr(ssm, first), getattr(ssm, by_input), getattr(ssm, constant)), np.float64)
    blocks = []
    for name in SIDES[side]:
        x = getattr(ssm, name)
        if x is not None:
            size = int(np.prod(x.shape))
            blocks.append(bases.get(name, np.zeros((size, 0)) if name in fixed else np.eye(size)))
    basis = np.asarray(jsl.block_diag(*blocks), np.float64)
    live, none = _range(np.asarray(getattr(ssm, NOISE_OF[side]), np.float64))
    if none.shape[1]:
        moves = np.kron(np.eye(offset.shape[1]), none.T) @ basis
        values, right = np.linalg.svd(moves, full_matrices=True)[1:]
        rank = int((values > 1e-10).sum())
        basis = basis @ right[rank:].T
        basis = np.where(np.abs(basis) > 1e-14, basis, 0.0)  # what is held stays bit by bit
    return Space(offset.reshape(-1, order="F"), basis, live)


def on_spaces(ssm: LinearGaussianSSM, spaces: Spaces) -> dict[str, Array | None]:
    """Coefficients of another start, projected on the spaces."""
    fields: dict[str, Array | None] = {}
    for side, names in SIDES.items():
        space = getattr(spaces, side)
        if space is not None:
            fields |= unstack(ssm, coefficients(space, free_part(space, _stacked(ssm, side)), ssm, side), names)
    return fields


def _stacked(ssm: LinearGaussianSSM, side: str) -> Array:
    first, by_input, constant = SIDES[side]
    return stack(getattr(ssm, first), getattr(ssm, by_input), getattr(ssm, constant))


def free_part(space: Space, x: Array) -> Array:
    """The `a` of coefficients or of a covariance, by least squares."""
    return jnp.linalg.lstsq(space.basis, x.T.reshape(-1) - space.offset)[0]


def coefficients(space: Space, a: Array, ssm: LinearGaussianSSM, side: str) -> Array:
    """The stacked coefficients of `a`."""
    rows = ssm.n_state if side == "transition" else ssm.n_obs
    return (space.offset + space.basis @ a).reshape(-1, rows).T


def covariance(space: Space, a: Array) -> Array:
    """The covariance of `a`."""
    n = space.live.shape[0]
    return (space.offset + space.basis @ a).reshape(n, n)


def unstack(ssm: LinearGaussianSSM, x: Array, names: tuple[str, ...]) -> dict[str, Array | None]:
    """The parts of stacked coefficients by name."""
    found: dict[str, Array | None] = {}
    start = 0
    for name in names:
        part = getattr(ssm, name)
        if part is None:
            found[name] = None
        elif part.ndim == 1:
            found[name] = x[:, start]
        else:
            found[name] = x[:, start : start + part.shape[1]]
            start += part.shape[1]
    return found


# The M-step


def fit_coefficients(space: Space, r: Regression, cov: Array, ssm: LinearGaussianSSM, side: str) -> Array:
    """Generalised least squares, weighed by the inverse of the old noise `cov` in its live directions.

    The noise comes after it, with these coefficients: each of the two raises the expected log-likelihood given the
    other.
    """
    rows = cov.shape[0]
    weight = space.live @ jnp.linalg.solve(space.live.T @ cov @ space.live, space.live.T)
    offset = space.offset.reshape(-1, rows).T
    if r.right.ndim == 3:  # each observed variable separately, `cov` diagonal
        by_row = space.basis.reshape(-1, rows, space.basis.shape[1])  # (column, row, free)
        pressed = jnp.einsum("i,ikl,lig->kig", jnp.diagonal(weight), r.right, by_row)
        inner = jnp.einsum("kif,kig->fg", by_row, pressed)
        wanted = jnp.diagonal(weight)[:, None] * (r.cross - jnp.einsum("ik,ikl->il", offset, r.right))
    else:
        # vec(weight X right) = (right kron weight) vec(X), the columns of X one below the other.
        inner = space.basis.T @ jnp.kron(r.right, weight) @ space.basis
        wanted = weight @ (r.cross - offset @ r.right)
    a = solve_least(inner, (space.basis.T @ wanted.T.reshape(-1))[None])[0]
    return coefficients(space, a, ssm, side)


def fit_covariance(space: Space, W: Array, count: Array, old: Array, least: Array) -> Array:
    """A square factor of the covariance in `space` after a step of scoring from `old`; `W / count` is the free one."""
    live = space.live
    n, r = live.shape

    def inside(x: Array) -> Array:
        return live.T @ x.reshape(*x.shape[:-1], n, n) @ live

    F, G = inside(space.offset), inside(space.basis.T)  # (r, r) and (free, r, r)
    S, now = live.T @ (W / count) @ live, live.T @ old @ live
    precision = jnp.linalg.inv(now)
    turned = precision @ G @ precision
    inner = jnp.einsum("kij,lij->kl", turned, G)
    a = solve_least(inner, jnp.einsum("kij,ij->k", turned, S - F)[None])[0]
    step = F + jnp.einsum("k,kij->ij", a, G) - now

    def worth(cov: Array) -> Array:
        """Twice the mean expected log density; -inf where the covariance is not allowed."""
        values, vectors = jnp.linalg.eigh(cov)
        allowed = (values[0] > 0) & (values[0] >= jnp.minimum(least, start_least))
        safe = jnp.where(allowed, values, 1.0)
        quadratic = jnp.sum((vectors.T @ S @ vectors).diagonal() / safe)
        return jnp.where(allowed, -jnp.sum(jnp.log(safe)) - quadratic, -jnp.inf)

    start_least = jnp.linalg.eigvalsh(now)[0]
    before = worth(now)

    def shorter(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return state[0] + 1, 0.5 * state[1]

    def too_long(state: tuple[Array, Array]) -> Array:
        return (state[0] < HALVINGS) & ~(worth(now + state[1] * step) >= before)

    tried, size = jax.lax.while_loop(too_long, shorter, (jnp.zeros((), int), jnp.ones((), old.dtype)))
    cov = jnp.where(tried < HALVINGS, now + size * step, now)
    return jnp.pad(live @ jnp.linalg.cholesky(cov), ((0, 0), (0, n - r)))


def solve_least(right: Array, cross: Array) -> Array:
    """`cross right^{-1}`; where `right` is singular, the smallest coefficients of all that fit best."""
    if not right.shape[-1]:
        return cross
    scale = jnp.sqrt(jnp.diagonal(right))
    scale = jnp.where(scale > 0, scale, 1.0)
    scaled, wanted = right / scale / scale[:, None], (cross / scale).T
    factor = jnp.linalg.cholesky(scaled)
    rounding = 10 * len(scale) * jnp.finfo(right.dtype).eps
    good = jnp.min(jnp.diagonal(factor)) > jnp.sqrt(rounding)  # false for NaN

    def singular() -> Array:
        values, vectors = jnp.linalg.eigh(scaled)
        live = values > rounding * values[-1]
        inverse = jnp.where(live, 1.0 / jnp.where(live, values, 1.0), 0.0)
        return (vectors * inverse) @ (vectors.T @ wanted)

    return unless(good, jsl.cho_solve((factor, True), wanted), singular).T / scale


def held_entries(x: ArrayLike, pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """`x` with the entries that the constraint `pair` of the user's units does not free as they were given."""
    x = np.asarray(x, np.float64)
    free = np.abs(pair[1]).max(axis=1, initial=0.0) > 0
    return np.where(free.reshape(x.shape, order="F"), x, pair[0].reshape(x.shape, order="F"))
