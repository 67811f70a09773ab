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

from pssm._types import Array
from pssm.learning.constraints import SIDES, Spaces, fit_coefficients, fit_covariance, solve_least, unstack
from pssm.learning.moments import Moments, Regression, stack
from pssm.learning.priors import MatrixNormalInverseWishart, Prior, strength, with_prior
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


def maximise(
    ssm: LinearGaussianSSM,
    moments: Moments,
    structure: Structure,
    limits: Limits,
    spaces: Spaces,
    prior: Prior,
) -> LinearGaussianSSM:
    """The model after one M-step; `m0` is held where `spaces.first` says that it comes from the likelihood itself."""
    moments = with_prior(moments, prior)
    if spaces.transition is None:
        transition = _fit(stack(ssm.A, ssm.B, ssm.b), SIDES["transition"], ssm, moments.transition, structure)
    else:
        transition = fit_coefficients(spaces.transition, moments.transition, ssm.Q, ssm, "transition")
    if spaces.emission is None:
        emission = _fit(stack(ssm.C, ssm.D, ssm.d), SIDES["emission"], ssm, moments.emission, structure)
    else:
        emission = fit_coefficients(spaces.emission, moments.emission, ssm.R, ssm, "emission")
    fields = {
        "m0": ssm.m0,
        "chol_P0": ssm.chol_P0,
        "chol_Q": ssm.chol_Q,
        "chol_R": ssm.chol_R,
        **unstack(ssm, transition, SIDES["transition"]),
        **unstack(ssm, emission, SIDES["emission"]),
    }
    m0, W, count = _first_state(ssm, moments, "m0" in structure.fixed or spaces.first is not None, prior.initial)
    fields["m0"] = m0
    if spaces.P0 is not None:
        fields["chol_P0"] = fit_covariance(spaces.P0, W, count, ssm.P0, limits.P0)
    elif "P0" not in structure.fixed:
        fields["chol_P0"] = _factor(W, count, structure.groups("P0"), limits.P0)
    for name, r, found, space in (
        ("Q", moments.transition, transition, spaces.Q),
        ("R", moments.emission, emission, spaces.R),
    ):
        chol, least = getattr(ssm, f"chol_{name}"), getattr(limits, name)
        if space is not None:
            W = _left_over(r, found)
            fields[f"chol_{name}"] = fit_covariance(space, W, r.count, getattr(ssm, name), least)
        elif name not in structure.fixed:
            fields[f"chol_{name}"] = _noise(r, found, structure.groups(name), least, chol)
    return rebuild(fields, (), ssm.diffuse)


def _first_state(
    ssm: LinearGaussianSSM, moments: Moments, held: bool, prior: MatrixNormalInverseWishart | None
) -> tuple[Array, Array, Array]:
    """Mean of the first state, the summed products of the deviations from it, and their number."""
    count = jnp.asarray(len(moments.first_mean), ssm.dtype)
    total, weight = jnp.sum(moments.first_mean, axis=0), count
    if prior is not None:
        total, weight = total + prior.precision[0, 0] * prior.mean[:, 0], weight + prior.precision[0, 0]
    m0 = ssm.m0 if held else total / weight
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
        return old.at[..., free].set(solve_least(right[free][:, free], cross))

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


def _noise(r: Regression, coefficients: Array, groups: tuple[int, ...] | None, least: Array, old: Array) -> Array:
    """The factor of the noise's covariance."""
    if r.right.ndim == 3 and groups is not None:  # each observed variable separately
        fitted = jnp.einsum("pk,pkl,pl->p", coefficients, r.right, coefficients)
        W = r.left - 2 * jnp.sum(coefficients * r.cross, axis=1) + fitted
        return _diagonal_factor(W, r.count, groups, least, old)
    return _factor(_left_over(r, coefficients), r.count, groups, least)


def _left_over(r: Regression, coefficients: Array) -> Array:
    """Summed products of the residuals."""
    both = coefficients @ r.cross.T
    return r.left - both - both.T + coefficients @ r.right @ coefficients.T


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
