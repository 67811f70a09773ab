"""The M-step: the parameters that make the expected complete data most likely, with some of them held or tied.

For `left = coefficients right + noise` the coefficients are `cross right^{-1}`, and the noise covariance is the mean of

    W = left - coefficients cross' - cross coefficients' + coefficients right coefficients'

always in this full form: it stays right where coefficients are held, tied or penalised. A covariance is cut off below
at an eigenvalue (a variance) that the start obeys; that is the exact maximiser under this constraint, so the
likelihood cannot fall.

Source:
    Shumway & Stoffer 1982; Ghahramani & Hinton 1996; linear constraints: Holmes 2013.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl

from pssm._types import Array
from pssm.learning.moments import Moments, Regression, stack
from pssm.learning.priors import MatrixNormalInverseWishart, Prior, strength, with_prior
from pssm.linalg import unless
from pssm.ssm import LinearGaussianSSM, rebuild

PARTS = ("m0", "P0", "A", "B", "b", "Q", "C", "D", "d", "R")


class Structure(NamedTuple):
    """Constraints on the M-step; hashable, so that each structure has one compiled program.

    Attributes:
        fixed: names among `PARTS` that stay as they are.
        ties: pairs of a covariance's name and, for each variable, the number of its group: a diagonal covariance with
            one variance for each group.
    """

    fixed: frozenset[str]
    ties: tuple[tuple[str, tuple[int, ...]], ...]

    def groups(self, name: str) -> tuple[int, ...] | None:
        """Groups of the variables of a diagonal covariance; None for a full one."""
        return dict(self.ties).get(name)


class Limits(NamedTuple):
    """Least eigenvalues (variances) of `P0`, `Q` and `R`."""

    P0: Array
    Q: Array
    R: Array


class Constraint(NamedTuple):
    """`vec(A) = offset + basis a`, columns of `A` one below the other, `a` free."""

    offset: Array
    basis: Array


def maximise(
    ssm: LinearGaussianSSM,
    moments: Moments,
    structure: Structure,
    limits: Limits,
    constraint: Constraint | None,
    prior: Prior,
) -> LinearGaussianSSM:
    """The model after one M-step."""
    moments = with_prior(moments, prior)
    old = stack(ssm.A, ssm.B, ssm.b)
    if constraint is None or "A" in structure.fixed:
        transition = _fit(old, ("A", "B", "b"), ssm, moments.transition, structure)
    else:
        transition = _constrained(ssm, moments.transition, old, structure, constraint)
    emission = _fit(stack(ssm.C, ssm.D, ssm.d), ("C", "D", "d"), ssm, moments.emission, structure)
    fields = {
        "m0": ssm.m0,
        "chol_P0": ssm.chol_P0,
        "chol_Q": ssm.chol_Q,
        "chol_R": ssm.chol_R,
        **_unstack(ssm, transition, ("A", "B", "b")),
        **_unstack(ssm, emission, ("C", "D", "d")),
    }
    m0, W, count = _first_state(ssm, moments, structure, prior.initial)
    if "m0" not in structure.fixed:
        fields["m0"] = m0
    if "P0" not in structure.fixed:
        fields["chol_P0"] = _factor(W, count, structure.groups("P0"), limits.P0)
    if "Q" not in structure.fixed:
        fields["chol_Q"] = _noise(moments.transition, transition, structure.groups("Q"), limits.Q, ssm.chol_Q)
    if "R" not in structure.fixed:
        fields["chol_R"] = _noise(moments.emission, emission, structure.groups("R"), limits.R, ssm.chol_R)
    return rebuild(fields, (), ssm.diffuse)


def _first_state(
    ssm: LinearGaussianSSM, moments: Moments, structure: Structure, prior: MatrixNormalInverseWishart | None
) -> tuple[Array, Array, Array]:
    """Mean of the first state, the summed products of the deviations from it, and their number."""
    count = jnp.asarray(len(moments.first_mean), ssm.dtype)
    total, weight = jnp.sum(moments.first_mean, axis=0), count
    if prior is not None:
        total, weight = total + prior.precision[0, 0] * prior.mean[:, 0], weight + prior.precision[0, 0]
    m0 = ssm.m0 if "m0" in structure.fixed else total / weight
    apart = moments.first_mean - m0
    W = count * moments.first_cov + apart.T @ apart
    if prior is not None:
        apart = m0 - prior.mean[:, 0]
        W = W + prior.scale + prior.precision[0, 0] * jnp.outer(apart, apart)
        count = count + strength(prior)
    return m0, W, count


def _fit(old: Array, names: tuple[str, ...], ssm: LinearGaussianSSM, r: Regression, structure: Structure) -> Array:
    """The coefficients, those of the names in `structure.fixed` held."""
    held = _columns(ssm, names, structure.fixed)
    if all(held):
        return old
    free = jnp.asarray([i for i, is_held in enumerate(held) if not is_held])
    kept = jnp.asarray([i for i, is_held in enumerate(held) if is_held], int)

    def solve(right: Array, cross: Array, old: Array) -> Array:
        cross = cross[..., free] - old[..., kept] @ right[kept][:, free]
        return old.at[..., free].set(_solve(right[free][:, free], cross))

    if r.right.ndim == 2:
        return solve(r.right, r.cross, old)
    rows = jax.vmap(lambda right, cross, old: solve(right, cross[None], old[None])[0])(r.right, r.cross, old)
    return jnp.where(r.count[:, None] > 0, rows, old)


def _columns(ssm: LinearGaussianSSM, names: tuple[str, ...], fixed: frozenset[str]) -> list[bool]:
    """For each column of the stacked coefficients, whether it is held."""
    held: list[bool] = []
    for name in names:
        x = getattr(ssm, name)
        if x is not None:
            held += [name in fixed] * (x.shape[-1] if name in ("A", "B", "C", "D") else 1)
    return held


def _unstack(ssm: LinearGaussianSSM, coefficients: Array, names: tuple[str, ...]) -> dict[str, Array | None]:
    found: dict[str, Array | None] = {}
    start = 0
    for name in names:
        x = getattr(ssm, name)
        if x is None:
            found[name] = None
        elif x.ndim == 1:
            found[name] = coefficients[:, start]
        else:
            found[name] = coefficients[:, start : start + x.shape[1]]
            start += x.shape[1]
    return found


def _solve(right: Array, cross: Array) -> Array:
    """`cross right^{-1}`; where `right` is singular, the smallest coefficients of all that fit best."""
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


def _constrained(
    ssm: LinearGaussianSSM, r: Regression, old: Array, structure: Structure, constraint: Constraint
) -> Array:
    """Coefficients with `vec(A)` in its affine space: generalised least squares, weighed by the inverse of the old `Q`.

    `Q` comes after it, with these coefficients: each of the two raises the expected log-likelihood given the other.
    """
    n, columns = old.shape
    free = [i for i, held in enumerate(_columns(ssm, ("A", "B", "b"), structure.fixed)) if i >= n and not held]
    eye = jnp.eye(n * columns, dtype=old.dtype)
    others = jnp.concatenate([eye[:, n * i : n * i + n] for i in free], axis=1) if free else eye[:, :0]
    basis = jnp.concatenate([jnp.pad(constraint.basis, ((0, n * (columns - n)), (0, 0))), others], axis=1)
    held = old.at[:, jnp.asarray(free, int)].set(0.0) if free else old
    offset = jnp.concatenate([constraint.offset, held.T.reshape(-1)[n * n :]])
    weight = jnp.linalg.inv(ssm.Q)
    # vec(weight X right) = (right kron weight) vec(X), the columns of X one below the other.
    inner = basis.T @ jnp.kron(r.right, weight) @ basis
    wanted = r.cross - offset.reshape(columns, n).T @ r.right
    found = jnp.linalg.solve(inner, basis.T @ (weight @ wanted).T.reshape(-1))
    return (offset + basis @ found).reshape(columns, n).T


def _noise(r: Regression, coefficients: Array, groups: tuple[int, ...] | None, least: Array, old: Array) -> Array:
    """The factor of the noise's covariance."""
    if r.right.ndim == 3 and groups is not None:  # each observed variable separately
        fitted = jnp.einsum("pk,pkl,pl->p", coefficients, r.right, coefficients)
        W = r.left - 2 * jnp.sum(coefficients * r.cross, axis=1) + fitted
        return _diagonal_factor(W, r.count, groups, least, old)
    both = coefficients @ r.cross.T
    W = r.left - both - both.T + coefficients @ r.right @ coefficients.T
    return _factor(W, r.count, groups, least)


def _factor(W: Array, count: Array, groups: tuple[int, ...] | None, least: Array) -> Array:
    """A factor of `W / count`, full or diagonal, with no eigenvalue below `least`."""
    if groups is not None:
        return _diagonal_factor(jnp.diagonal(W), jnp.broadcast_to(count, len(W)), groups, least, W)
    cov = W / count
    values, vectors = jnp.linalg.eigh(0.5 * (cov + cov.T))
    return vectors * jnp.sqrt(jnp.maximum(values, least))


def _diagonal_factor(W: Array, counts: Array, groups: tuple[int, ...], least: Array, old: Array) -> Array:
    """One variance for each group; that of the factor `old` where a group has never been observed."""
    index = jnp.asarray(groups)
    total = jax.ops.segment_sum(counts, index, max(groups) + 1)[index]
    variance = jax.ops.segment_sum(W, index, max(groups) + 1)[index] / jnp.where(total > 0, total, 1.0)
    variance = jnp.where(total > 0, jnp.maximum(variance, least), jnp.sum(old**2, axis=1))
    return jnp.diag(jnp.sqrt(variance))
