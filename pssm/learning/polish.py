"""The last steps by a quasi-Newton method: EM is slow near the maximum, L-BFGS on the exact gradient is not."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from pssm._types import Array
from pssm.filters import log_likelihood
from pssm.learning.constraints import COVARIANCES, SIDES, Spaces, coefficients, covariance, free_part, unstack
from pssm.learning.maximise import Structure
from pssm.learning.priors import Prior, log_prior
from pssm.ssm import LinearGaussianSSM

FLAT, FLAT32 = 1e-4, 1e-2  # nats for each value of the data and unit of a parameter: a slope below it is that of a top


class Polished(NamedTuple):
    """The model, its log-likelihood and log prior, whether it differs from the start, and whether no slope is left."""

    ssm: LinearGaussianSSM
    log_likelihood: float
    log_prior: float
    moved: bool
    flat: bool


def polish(
    ssm: LinearGaussianSSM,
    y: Array,
    u: Array | None,
    structure: Structure,
    spaces: Spaces,
    prior: Prior,
    num_steps: int,
) -> Polished:
    """At most `num_steps` steps of L-BFGS from `ssm` within its structure and its linear constraints.

    Covariances are free triangular factors within the range of the start's: noise-free directions stay so.
    """
    from scipy.optimize import minimize  # slow to import, rarely needed

    free, model = _parameters(ssm, structure, spaces)
    start, unravel = ravel_pytree(free)
    count = y.size

    def values(x: Array) -> tuple[Array, Array]:
        return jnp.sum(log_likelihood(model(unravel(x)), y, u)), log_prior(model(unravel(x)), prior)

    @jax.jit
    def loss(x: Array) -> tuple[Array, Array]:
        return jax.value_and_grad(lambda x: -sum(values(x)) / count)(x)

    lowest = [np.inf]

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = loss(jnp.asarray(x, start.dtype))
        if not np.isfinite(value) or not np.isfinite(gradient).all():
            # A step too far. The line search interpolates: a huge number would shorten the step to nothing.
            return min(lowest[0] + 1.0, 1e30), np.zeros_like(x)
        lowest[0] = min(lowest[0], float(value))
        return float(value), np.asarray(gradient, float)

    found = minimize(evaluate, np.asarray(start, float), jac=True, method="L-BFGS-B", options={"maxiter": num_steps})
    best = jnp.asarray(found.x, start.dtype)
    value, density = jax.jit(values)(best)
    slope = np.abs(np.asarray(loss(best)[1], float)).max(initial=0.0)
    flat = bool(slope <= (FLAT if start.dtype == jnp.float64 else FLAT32))
    return Polished(model(unravel(best)), float(value), float(density), not np.array_equal(best, start), flat)


def _parameters(
    ssm: LinearGaussianSSM, structure: Structure, spaces: Spaces
) -> tuple[dict[str, Array], Callable[[dict[str, Array]], LinearGaussianSSM]]:
    """Unconstrained parameters, and the model that they make."""
    free: dict[str, Array] = {}
    bases: dict[str, Array] = {}
    if "m0" not in structure.fixed:
        free["m0"] = ssm.m0 if spaces.first is None else jnp.zeros(spaces.first.shape[1], ssm.dtype)
    for side, names in SIDES.items():
        space = getattr(spaces, side)
        if space is not None:
            parts = [x if x.ndim == 2 else x[:, None] for x in (getattr(ssm, name) for name in names) if x is not None]
            free[side] = free_part(space, jnp.concatenate(parts, axis=1))
            continue
        for name in names:
            x = getattr(ssm, name)
            if x is not None and name not in structure.fixed:
                free[name] = x
    for name in COVARIANCES:
        groups, space, cov = structure.groups(name), getattr(spaces, name), getattr(ssm, name)
        if name in structure.fixed:
            continue
        if space is not None:
            free[name] = free_part(space, cov)
        elif groups is not None:
            first = np.asarray([groups.index(g) for g in range(max(groups) + 1)])
            variances = np.diagonal(np.asarray(cov))[first]
            bases[name] = jnp.asarray(np.eye(len(first))[:, variances > 0], cov.dtype)  # a variance of zero stays
            free[name] = 0.5 * jnp.log(jnp.asarray(variances[variances > 0], cov.dtype))
        else:
            values, vectors = jnp.linalg.eigh(cov)
            live = np.asarray(values > 1e-12 * values[-1])
            bases[name] = vectors[:, live]
            free[name] = jnp.linalg.cholesky(jnp.diag(values[live]))

    def model(p: dict[str, Array]) -> LinearGaussianSSM:
        fields: dict[str, Array | None] = {n: x for n, x in p.items() if n not in (*COVARIANCES, *SIDES, "m0")}
        if "m0" in p:
            fields["m0"] = p["m0"] if spaces.first is None else ssm.m0 + spaces.first @ p["m0"]
        for side, names in SIDES.items():
            if side in p:
                fields |= unstack(ssm, coefficients(getattr(spaces, side), p[side], ssm, side), names)
        for name in COVARIANCES:
            groups, space = structure.groups(name), getattr(spaces, name)
            if name not in p:
                continue
            if space is not None:  # NaN where it is no covariance: a step too far
                factor = space.live @ jnp.linalg.cholesky(space.live.T @ covariance(space, p[name]) @ space.live)
                fields[f"chol_{name}"] = jnp.pad(factor, ((0, 0), (0, len(factor) - factor.shape[1])))
            elif groups is not None:
                fields[f"chol_{name}"] = jnp.diag((bases[name] @ jnp.exp(p[name]))[jnp.asarray(groups)])
            else:
                fields[f"chol_{name}"] = bases[name] @ jnp.tril(p[name])
        return ssm.replace(**fields)

    return free, model
