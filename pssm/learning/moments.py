"""The E-step: expected moments of the states, as sums over all sequences and their own times.

Both equations are regressions on the state, the inputs and a constant (the last two where the model has them):

    z_t = [A B b] x_t + noise,   x_t = (z_{t-1}, u_t, 1),   t = 2..T
    y_t = [C D d] w_t + noise,   w_t = (z_t, u_t, 1),       t = 1..T

so the M-step needs the expected products of both sides. Missing entries come in one of two exact forms. "augmented"
treats them as hidden variables beside the states: any `R`, and every step counts. "observed" takes the sums of each
observed variable over the steps that have it: fewer hidden variables, so fewer iterations, but `R` must be diagonal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pssm._types import Array
from pssm.filters import kalman_smoother
from pssm.filters.smoother import smooth_complete
from pssm.linalg import orthogonalise, outer, solve_lower
from pssm.ssm import LinearGaussianSSM


class Regression(NamedTuple):
    """Expected products of the two sides of a regression `left = coefficients right + noise`, and their number.

    With the form "observed" of the emission every array but `cross` has the observed variables in front, and
    `left` is the diagonal of the products of `y`.
    """

    right: Array
    cross: Array
    left: Array
    count: Array


class Moments(NamedTuple):
    """The moments for the M-step.

    Attributes:
        transition: the first regression of the module's head.
        emission: the second.
        first_mean: `E[z_1]` of each sequence, `(sequence, state)`.
        first_cov: the mean over sequences of `Cov(z_1)`, `(state, state)`.
        log_likelihood: `log p(y)` of all sequences.
    """

    transition: Regression
    emission: Regression
    first_mean: Array
    first_cov: Array
    log_likelihood: Array


def expectations(ssm: LinearGaussianSSM, y: Array, u: Array | None, lengths: Array | None, form: str) -> Moments:
    """The moments of `y`, `(sequence, time, obs)`, in the form `form`; steps from `lengths` on do not count."""
    if (
        form == "complete" and lengths is None and not ssm.diffuse
    ):  # then all sequences have the same covariances: once is enough
        smoothed, share = smooth_complete(ssm, y, u), len(y)
        chol, cross_cov = smoothed.chol[None], smoothed.cross_cov[None]
    else:
        smoothed, share = kalman_smoother(ssm, y, u), 1
        chol, cross_cov = smoothed.chol, smoothed.cross_cov
    mean = smoothed.mean
    steps = jnp.arange(y.shape[1])
    valid = jnp.ones(y.shape[:2], bool) if lengths is None else steps < lengths[:, None]
    later = valid & (steps > 0)
    before = jnp.pad(later[:, 1:], ((0, 0), (0, 1)))

    def covariances(mask: Array) -> Array:
        seen = mask[: len(chol), :, None, None]
        columns = jnp.moveaxis(jnp.where(seen, chol, 0.0), 2, 0).reshape(mean.shape[-1], -1)
        return share * (columns @ columns.T)

    def summed(a: Array, b: Array) -> Array:
        return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])

    x = regressors(mean[:, :-1], None if ssm.B is None or u is None else u[:, 1:], ssm.b is not None, later[:, 1:])
    after = jnp.where(later[:, 1:, None], mean[:, 1:], 0.0)
    lag = share * jnp.sum(jnp.where(later[: len(chol), 1:, None, None], cross_cov, 0.0), axis=(0, 1))
    transition = Regression(
        _add(summed(x, x), covariances(before)),
        _add(summed(after, x), lag),
        summed(after, after) + covariances(later),
        jnp.sum(later).astype(y.dtype),
    )

    w = regressors(mean, None if ssm.D is None else u, ssm.d is not None, valid)
    observed = ~jnp.isnan(y) & valid[..., None]
    filled = jnp.where(observed, y, 0.0)
    if form == "observed":
        products = w[..., :, None] * w[..., None, :]
        n = mean.shape[-1]
        products = products.at[..., :n, :n].add(jnp.where(valid[..., None, None], outer(chol), 0.0))
        right = summed(observed.astype(y.dtype), products.reshape(*products.shape[:2], -1))
        emission = Regression(
            right.reshape(-1, *products.shape[2:]),
            summed(filled, w),
            jnp.sum(filled**2, axis=(0, 1)),
            jnp.sum(observed, axis=(0, 1)).astype(y.dtype),
        )
    else:
        cross, left = (summed(filled, w), summed(filled, filled))
        if form == "augmented":
            cross, left = _augmented(ssm, filled, observed, valid, mean, chol, w)
        emission = Regression(_add(summed(w, w), covariances(valid)), cross, left, jnp.sum(valid).astype(y.dtype))
    first_cov = jnp.mean(outer(chol[:, 0]), axis=0)
    return Moments(transition, emission, mean[:, 0], first_cov, jnp.sum(smoothed.log_likelihood))


def regressors(z: Array, u: Array | None, constant: bool, mask: Array) -> Array:
    """States, inputs and a constant side by side, zero where `mask` is false."""
    parts = [z, *([] if u is None else [u]), *([jnp.ones_like(z[..., :1])] if constant else [])]
    return jnp.where(mask[..., None], jnp.concatenate(parts, axis=-1), 0.0)


def _add(products: Array, cov: Array) -> Array:
    """Covariances belong to the states, which come first."""
    rows, cols = cov.shape
    return products.at[:rows, :cols].add(cov)


def _augmented(
    ssm: LinearGaussianSSM, filled: Array, observed: Array, valid: Array, mean: Array, chol: Array, w: Array
) -> tuple[Array, Array]:
    """`sum E[y w']` and `sum E[y y']` with missing entries as hidden variables.

    Given the state, `y = J y + (1 - J)(C z + D u + d + v)` with `v ~ N(0, R)`, and `J = R[:, o] R[o, o]^{-1}` on the
    observed columns: through `R` the observed entries inform about the others.
    """
    n, p = mean.shape[-1], filled.shape[-1]
    coefficients = stack(ssm.C, ssm.D, ssm.d)

    def one(filled: Array, observed: Array, chol: Array, w: Array) -> tuple[Array, Array, Array]:
        factor, turn = orthogonalise(jnp.where(observed[:, None], ssm.chol_R, 0.0))
        J = solve_lower(factor, turn @ ssm.chol_R.T, transpose=True).T
        guess = coefficients @ w
        y = jnp.where(observed, filled, guess + J @ jnp.where(observed, filled - guess, 0.0))
        rest = jnp.where(observed[:, None], 0.0, jnp.eye(p, dtype=w.dtype) - J)
        spread = rest @ jnp.concatenate([ssm.C @ chol, ssm.chol_R], axis=1)
        return y, spread[:, :n] @ chol.T, spread @ spread.T

    y, with_state, with_itself = jax.vmap(jax.vmap(one))(filled, observed, chol, w)
    y = jnp.where(valid[..., None], y, 0.0).reshape(-1, p)
    with_state, with_itself = (
        jnp.sum(jnp.where(valid[..., None, None], x, 0.0), axis=(0, 1)) for x in (with_state, with_itself)
    )
    return _add(y.T @ w.reshape(-1, w.shape[-1]), with_state), y.T @ y + with_itself


def stack(matrix: Array, by_input: Array | None, offset: Array | None) -> Array:
    """The coefficients of a regression, side by side."""
    return jnp.concatenate(
        [x for x in (matrix, by_input, None if offset is None else offset[:, None]) if x is not None], 1
    )
