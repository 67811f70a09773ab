"""Conjugate priors for EM: matrix-normal coefficients and inverse-Wishart covariances.

Under such a prior the M-step keeps its form: the prior acts as observations made before the data, so its products are
added to the expected ones. With `k` regressors and a noise covariance `S` of size `l`,

    p(X, S) ~ |S|^(-(degrees + l + 1 + k) / 2) exp(-tr(S^-1 (scale + (X - mean) precision (X - mean)')) / 2)

is the density of `X | S ~ MatrixNormal(mean, S, precision^-1)` and `S ~ InverseWishart(degrees, scale)`, in the entries
of `X` and of `S` themselves: EM finds a mode in these coordinates, not in logarithms of variances.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pssm._checks import as_float
from pssm._types import Array, ArrayLike
from pssm.learning.moments import Moments, Regression, stack
from pssm.ssm import LinearGaussianSSM

NAMES = {"initial": ("m0", None, None), "transition": ("A", "B", "b"), "emission": ("C", "D", "d")}
NOISE = {"initial": "P0", "transition": "Q", "emission": "R"}


class MatrixNormalInverseWishart(NamedTuple):
    """A prior of coefficients `X` `(left, right)` and of the covariance `S` `(left, left)` of their noise.

    `X | S ~ MatrixNormal(mean, S, precision^-1)`, `S ~ InverseWishart(degrees, scale)`. Where `S` is diagonal the
    density is that on diagonal matrices: each variance has `InverseGamma((degrees + left - 1) / 2, scale_ii / 2)`.

    Attributes:
        mean: `(left, right)`; a vector where there is one regressor.
        precision: of the columns, positive semi-definite, `(right, right)`; a vector for a diagonal one.
        scale: positive definite, `(left, left)`; a vector for a diagonal one.
        degrees: degrees of freedom; any number from `-left - 1 - right` on (a sum of prior and data must be positive).
    """

    mean: ArrayLike
    precision: ArrayLike
    scale: ArrayLike
    degrees: float


class Prior(NamedTuple):
    """The argument `prior` of `fit_em`; None for a part without a prior.

    Attributes:
        initial: of `m0` (one regressor, the constant 1) and `P0`.
        transition: of `[A B b]` side by side, as far as the model has them, and `Q`.
        emission: of `[C D d]` and `R`.
    """

    initial: MatrixNormalInverseWishart | None = None
    transition: MatrixNormalInverseWishart | None = None
    emission: MatrixNormalInverseWishart | None = None


def checked(prior: Prior | None, ssm: LinearGaussianSSM) -> Prior:
    """The prior with full matrices of the model's type, or an error that names the part that does not fit."""
    found = {}
    for name, part in (prior or Prior())._asdict().items():
        if part is None:
            found[name] = None
            continue
        X, cov = _coefficients(ssm, name), getattr(ssm, NOISE[name])
        where = f"prior.{name}"
        mean = as_float(f"{where}.mean", part.mean)
        mean = mean[:, None] if mean.ndim == 1 else mean
        if mean.shape != X.shape:
            raise ValueError(f"`{where}.mean` must have shape {X.shape}; got {mean.shape}.")
        square = {"precision": X.shape[1], "scale": X.shape[0]}
        matrices = {}
        for key, size in square.items():
            x = as_float(f"{where}.{key}", getattr(part, key))
            x = jnp.diag(x) if x.ndim == 1 else x
            if x.shape != (size, size):
                raise ValueError(f"`{where}.{key}` must have shape ({size}, {size}) or ({size},); got {x.shape}.")
            least = np.linalg.eigvalsh(np.asarray(x)).min()
            if not least >= -1e-6 * np.abs(x).max() or (key == "scale" and not least > 0):
                kind = "definite" if key == "scale" else "semi-definite"
                raise ValueError(f"`{where}.{key}` must be positive {kind}; its least eigenvalue is {least:.3g}.")
            matrices[key] = x.astype(ssm.dtype)
        if np.linalg.eigvalsh(np.asarray(cov)).min() <= 0:
            raise ValueError(f"`{where}` has no density where `{NOISE[name]}` is singular; start elsewhere.")
        degrees = jnp.asarray(part.degrees, ssm.dtype)
        found[name] = MatrixNormalInverseWishart(mean.astype(ssm.dtype), degrees=degrees, **matrices)
    return Prior(**found)


def with_prior(moments: Moments, prior: Prior) -> Moments:
    """The moments with those of the prior's transition and emission added."""
    fields = {}
    for name in ("transition", "emission"):
        part = getattr(prior, name)
        if part is not None:
            fields[name] = _added(getattr(moments, name), part)
    return moments._replace(**fields)


def _added(r: Regression, prior: MatrixNormalInverseWishart) -> Regression:
    cross = prior.mean @ prior.precision
    left = prior.scale + cross @ prior.mean.T
    count = r.count + strength(prior)
    if r.right.ndim == 3:  # each observed variable separately
        return Regression(r.right + prior.precision, r.cross + cross, r.left + jnp.diagonal(left), count)
    return Regression(r.right + prior.precision, r.cross + cross, r.left + left, count)


def strength(prior: MatrixNormalInverseWishart) -> Array:
    """Exponent of the determinant, twice: the number of noise vectors that the prior counts for."""
    left, right = prior.mean.shape
    return prior.degrees + left + 1 + right


def log_prior(ssm: LinearGaussianSSM, prior: Prior) -> Array:
    """Log density of the parameters, up to a constant."""
    total = jnp.zeros((), ssm.dtype)
    for name, part in prior._asdict().items():
        if part is None:
            continue
        cov = getattr(ssm, NOISE[name])
        apart = _coefficients(ssm, name) - part.mean
        inner = part.scale + apart @ part.precision @ apart.T
        logdet = jnp.linalg.slogdet(cov)[1]
        total = total - 0.5 * (strength(part) * logdet + jnp.trace(jnp.linalg.solve(cov, inner)))
    return total


def _coefficients(ssm: LinearGaussianSSM, name: str) -> Array:
    first, by_input, constant = NAMES[name]
    x = getattr(ssm, first)
    if constant is None:
        return x[:, None]
    return stack(x, getattr(ssm, by_input), getattr(ssm, constant))
