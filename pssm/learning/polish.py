"""The last steps by a quasi-Newton method: EM is slow near the maximum, L-BFGS on the exact gradient is not."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from pssm._types import Array
from pssm.filters import log_likelihood
from pssm.learning.maximise import Constraint, Structure
from pssm.learning.priors import Prior, log_prior
from pssm.ssm import LinearGaussianSSM


def polish(
    ssm: LinearGaussianSSM,
    y: Array,
    u: Array | None,
    structure: Structure,
    constraint: Constraint | None,
    prior: Prior,
    num_steps: int,
) -> tuple[LinearGaussianSSM, float, float]:
    """At most `num_steps` steps of L-BFGS from `ssm` within its structure; the model, its log-likelihood and log prior.

    Covariances are free triangular factors within the range of the start's: noise-free directions stay so.
    """
    from scipy.optimize import minimize  # slow to import, rarely needed

    free, model = _parameters(ssm, structure, constraint)
    start, unravel = ravel_pytree(free)
    count = y.size

    def values(x: Array) -> tuple[Array, Array]:
        return jnp.sum(log_likelihood(model(unravel(x)), y, u)), log_prior(model(unravel(x)), prior)

    @jax.jit
    def loss(x: Array) -> tuple[Array, Array]:
        return jax.value_and_grad(lambda x: -sum(values(x)) / count)(x)

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = loss(jnp.asarray(x, start.dtype))
        if not np.isfinite(value) or not np.isfinite(gradient).all():
            return 1e30, np.zeros_like(x)  # a step too far: the line search then shortens it
        return float(value), np.asarray(gradient, float)

    found = minimize(evaluate, np.asarray(start, float), jac=True, method="L-BFGS-B", options={"maxiter": num_steps})
    best = jnp.asarray(found.x, start.dtype)
    value, density = jax.jit(values)(best)
    return model(unravel(best)), float(value), float(density)


def _parameters(
    ssm: LinearGaussianSSM, structure: Structure, constraint: Constraint | None
) -> tuple[dict[str, Array], Callable[[dict[str, Array]], LinearGaussianSSM]]:
    """Unconstrained parameters, and the model that they make."""
    free: dict[str, Array] = {}
    bases: dict[str, Array] = {}
    for name in ("m0", "A", "B", "b", "C", "D", "d"):
        x = getattr(ssm, name)
        if x is not None and name not in structure.fixed:
            free[name] = x
    if constraint is not None and "A" in free:
        free["A"] = jnp.linalg.lstsq(constraint.basis, ssm.A.T.reshape(-1) - constraint.offset)[0]
    for name in ("P0", "Q", "R"):
        groups = structure.groups(name)
        if name in structure.fixed:
            continue
        cov = getattr(ssm, name)
        if groups is not None:
            first = jnp.asarray([groups.index(g) for g in range(max(groups) + 1)])
            free[name] = 0.5 * jnp.log(jnp.diagonal(cov)[first])
            continue
        values, vectors = jnp.linalg.eigh(cov)
        live = np.asarray(values > 1e-12 * values[-1])
        bases[name] = vectors[:, live]
        free[name] = jnp.linalg.cholesky(jnp.diag(values[live]))

    def model(p: dict[str, Array]) -> LinearGaussianSSM:
        fields: dict[str, Array] = {name: x for name, x in p.items() if name not in ("P0", "Q", "R")}
        if constraint is not None and "A" in p:
            fields["A"] = (constraint.offset + constraint.basis @ p["A"]).reshape(ssm.A.shape).T
        for name in ("P0", "Q", "R"):
            groups = structure.groups(name)
            if name in p and groups is not None:
                fields[f"chol_{name}"] = jnp.diag(jnp.exp(p[name])[jnp.asarray(groups)])
            elif name in p:
                fields[f"chol_{name}"] = bases[name] @ jnp.tril(p[name])
        return ssm.replace(**fields)

    return free, model
