"""A function of a Gaussian variable as an affine one with noise: by derivatives, or by points spread over it.

Everything is written for `z = mean + chol x` with `x ~ N(0, 1)`, so that no covariance is ever inverted. A rule gives
two matrices with the same columns: `basis` with `basis basis' = 1` stands for `x`, and `spread` for what the function
makes of it, so that `Cov(f(z)) = spread spread'` and `Cov(f(z), x) = spread basis'`. For derivatives the basis is the
identity; for points `x_i` with weights `w_i` the columns are `sqrt(w_i) x_i` and `sqrt(w_i) (f(z_i) - mean of f)`. What
of `spread` the basis does not explain is the error of linearisation, and enters as noise (statistical regression).

Source:
    Särkkä & Svensson 2023, chapters 7-9; statistical linear regression: Lefebvre, Bruyninckx & De Schutter 2002.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_choice
from pssm._types import Array
from pssm.linalg.small import matmul, matvec

NAMES = ("ekf", "ukf", "cubature", "gauss_hermite")


class Linearization(NamedTuple):
    """A function about a Gaussian; see the module's head.

    Attributes:
        mean: `E[f(z)]`, `(out,)`.
        spread: `(out, columns)`.
        basis: `(state, columns)`.
    """

    mean: Array
    spread: Array
    basis: Array

    @property
    def slope(self) -> Array:
        """Derivative by `x`, `(out, state)`."""
        return matmul(self.spread, self.basis.T)

    @property
    def rest(self) -> Array:
        """Factor of the error's covariance, `(out, columns)`; without columns where there is none by definition."""
        if self.basis.shape[0] == self.basis.shape[1]:
            return self.spread[:, :0]
        return self.spread - matmul(self.slope, self.basis)


class Linearize(Protocol):
    """A rule: a function, and mean and factor of the Gaussian; also the average of something else over it."""

    def __call__(self, function: Callable[[Array], Array], mean: Array, chol: Array) -> Linearization:
        """The function about `N(mean, chol chol')`."""
        ...


def jacobian(function: Callable[[Array], Array], mean: Array, chol: Array) -> Linearization:
    """First-order Taylor series: the extended Kalman filter."""
    start = jnp.zeros(chol.shape[1], mean.dtype)
    spread = jax.jacfwd(lambda x: function(mean + matvec(chol, x)))(start)
    return Linearization(function(mean), spread, jnp.eye(len(mean), dtype=mean.dtype))


class SigmaPoints:
    """A rule of points `(points, state)` with positive weights that sum to one, given the size of the state."""

    def __init__(self, points: Callable[[int], tuple[np.ndarray, np.ndarray]]):
        self.points = points

    def __call__(self, function: Callable[[Array], Array], mean: Array, chol: Array) -> Linearization:
        """Statistical linear regression over the points."""
        values, weights, points = self.evaluate(function, mean, chol)
        average = jnp.sum(weights[:, None] * values, axis=0)
        root = jnp.sqrt(weights)[:, None]
        return Linearization(average, (root * (values - average)).T, (root * points).T)

    def evaluate(self, function: Callable[[Array], Array], mean: Array, chol: Array) -> tuple[Array, Array, Array]:
        """Values at the points, weights and points."""
        points, weights = (jnp.asarray(x, mean.dtype) for x in self.points(chol.shape[1]))
        return jax.vmap(lambda x: function(mean + matvec(chol, x)))(points), weights, points


def unscented_points(
    n: int, *, alpha: float = math.sqrt(3.0), beta: float = 2.0, kappa: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """`2 n + 1` points; these parameters give the centre one weight for means and covariances, and a positive one."""
    lam = alpha**2 * (n + kappa) - n
    if lam < 0 or not math.isclose(alpha**2, 1 + beta):
        raise ValueError("`alpha`, `beta`, `kappa` must give one positive weight to the centre: alpha^2 = 1 + beta.")
    points = math.sqrt(n + lam) * np.concatenate([np.zeros((1, n)), np.eye(n), -np.eye(n)])
    weights = np.full(2 * n + 1, 0.5 / (n + lam))
    weights[0] = lam / (n + lam)
    return points, weights


def cubature_points(n: int) -> tuple[np.ndarray, np.ndarray]:
    """`2 n` points of equal weight, exact to the third degree (Arasaratnam & Haykin 2009)."""
    return math.sqrt(n) * np.concatenate([np.eye(n), -np.eye(n)]), np.full(2 * n, 0.5 / n)


def hermite_points(n: int, order: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """The product rule of `order^n` points, exact to degree `2 order - 1`; for few states."""
    roots, weights = np.polynomial.hermite_e.hermegauss(order)
    weights = weights / weights.sum()
    points = np.array(list(product(roots, repeat=n)))
    return points, np.array([math.prod(w) for w in product(weights, repeat=n)])


def gauss_hermite(order: int = 5) -> SigmaPoints:
    """The rule of `hermite_points`, for the argument `linearize`."""
    return SigmaPoints(lambda n: hermite_points(n, order))


def rule(linearize: str | Linearize) -> Linearize:
    """The rule of a name; a callable is one already."""
    if callable(linearize):
        return linearize
    check_choice("linearize", linearize, NAMES)
    return {
        "ekf": jacobian,
        "ukf": SigmaPoints(unscented_points),
        "cubature": SigmaPoints(cubature_points),
        "gauss_hermite": gauss_hermite(),
    }[linearize]
