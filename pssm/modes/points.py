"""Points and weights for expectations under a Gaussian, and the expected expansion of a log-likelihood by them."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._types import Array
from pssm.linalg.square_root import solve_lower
from pssm.modes.coupled import group_shape, hessian_times

PRODUCT = {1: 5, 2: 5, 3: 3}  # Gauss-Hermite points a dimension; more dimensions get 2n points of degree 3
FINE = {1: 21, 2: 9, 3: 5}  # for the value of a bound that is reported
DRAWS = 64  # fixed antithetic draws, where series share a term of the likelihood
CURVED = 16  # states up to this size get second derivatives; larger ones their Hessians from gradients (Stein)


class Rule(NamedTuple):
    """`E g(x)` is about `sum_i weights_i g(points_i)` for a standard normal `x`.

    Attributes:
        points: `(count, state)`, or with axes of batch and time in between, `(count, *batch, time, state)`.
        weights: `(count,)`.
    """

    points: Array
    weights: Array


def product_rule(n: int, each: int) -> Rule:
    """The product rule of Gauss and Hermite, exact for degrees up to `2 each - 1` of every coordinate."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(each)
    points = np.array(list(itertools.product(nodes, repeat=n)))
    return Rule(points, np.prod(np.array(list(itertools.product(weights / weights.sum(), repeat=n))), axis=1))


def rule_for(n: int, points: int | None = None, *, fine: bool = False) -> Rule:
    """The rule for `n` dimensions: `points` a dimension, by default few, or `2n` cubature points beyond three."""
    each = points or (FINE if fine else PRODUCT).get(n)
    if each is not None:
        return product_rule(n, each)
    return Rule(np.sqrt(n) * np.concatenate([np.eye(n), -np.eye(n)]), np.full(2 * n, 0.5 / n))


def drawn_rule(shape: tuple[int, ...], count: int = DRAWS) -> Rule:
    """Fixed antithetic draws for paths of this shape, each number by itself."""
    half = np.random.default_rng(0).standard_normal((count // 2, *shape))
    return Rule(np.concatenate([half, -half]), np.full(2 * (count // 2), 1.0 / (2 * (count // 2))))


class Expansion(NamedTuple):
    """The expected quadratic expansion of a log-likelihood under Gaussian marginals.

    Attributes:
        value: `E log h`, of the shape of `log_lik`'s groups.
        gradient: `E grad log h`, `(*batch, time, state)`.
        curvature: `-E grad^2 log h`, `(*batch, time, state, state)`, of any sign.
    """

    value: Array
    gradient: Array
    curvature: Array


def expected_value(log_lik: Callable[[Array], Array], mean: Array, root: Array, rule: Rule) -> Array:
    """`E log h` for marginals `N(mean, root root')`, of the shape of `log_lik`'s groups."""
    groups = group_shape(log_lik, mean)

    def at(xi: Array) -> Array:
        return jnp.reshape(log_lik(mean + _spread(root, xi)), groups).astype(mean.dtype)

    values = jax.lax.map(at, jnp.asarray(rule.points, mean.dtype), batch_size=32)
    return jnp.tensordot(jnp.asarray(rule.weights, mean.dtype), values, 1)


def expand(log_lik: Callable[[Array], Array], mean: Array, root: Array, rule: Rule) -> Expansion:
    """The expansion for marginals `N(mean, root root')`.

    Where the second derivative is zero or not finite at all points, as for a density with a kink, the curvature is
    that of Stein's identity, `E grad^2 g = E[grad g x'] root^{-1}`, which needs the gradient alone.
    """
    n, groups = mean.shape[-1], group_shape(log_lik, mean)
    curved = n <= CURVED

    def at(x: tuple[Array, Array]) -> tuple[Array, ...]:
        xi, weight = x
        z = mean + _spread(root, xi)
        value = jnp.reshape(log_lik(z), groups).astype(mean.dtype)
        gradient, times = hessian_times(log_lik, z)
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
        stein = gradient[..., :, None] * jnp.broadcast_to(xi, mean.shape)[..., None, :]
        if not curved:
            return weight * value, weight * gradient, weight * stein
        hessian = jnp.moveaxis(jax.vmap(times)(jnp.eye(n, dtype=mean.dtype)), 0, -1)
        return weight * value, weight * gradient, weight * stein, weight * hessian

    xs = jnp.asarray(rule.points, mean.dtype), jnp.asarray(rule.weights, mean.dtype)
    value, gradient, stein, *hessian = (x.sum(0) for x in jax.lax.map(at, xs, batch_size=32))
    flat = root.reshape(-1, n, n)
    by_stein = jax.vmap(lambda r, s: solve_lower(r, s.T, transpose=True))(flat, stein.reshape(-1, n, n))
    found = by_stein.reshape(stein.shape)
    if curved:
        absent = jnp.all((hessian[0] == 0) | ~jnp.isfinite(hessian[0]), axis=(-2, -1), keepdims=True)
        found = jnp.where(absent, found, jnp.where(jnp.isfinite(hessian[0]), hessian[0], 0.0))
    return Expansion(value, gradient, -0.5 * (found + jnp.swapaxes(found, -1, -2)))


def _spread(root: Array, xi: Array) -> Array:
    return jnp.sum(root * xi[..., None, :], axis=-1)
