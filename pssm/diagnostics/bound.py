"""The quality of a variational fit, measured by importance sampling."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.infer.util import initialize_model, unconstrain_fn

from pssm._keys import as_key
from pssm._types import KeyLike
from pssm.fitting.results import SVIFit
from pssm.fitting.weights import pareto_shape
from pssm.infer.importance import log_weights


def khat(fit: SVIFit, *, key: KeyLike = 0, num_particles: int = 4000) -> float:
    """Pareto shape of the importance ratios `p(theta, y) / q(theta)` of a guide.

    Below 0.5 the guide is close to the posterior, below 0.7 importance weights can still correct it, above 0.7 they
    cannot, and above 1 the guide misses part of the posterior.

    Args:
        fit: from `fit_svi`.
        key: random key, or a whole number. Calls with equal keys, also the default, give equal draws.
        num_particles: number of draws from the guide.

    Returns:
        The estimate of k. It is 0 where the largest weights are equal up to rounding, as those of an exact guide are:
        they have no tail to fit, and finite moments of every order (k <= 0). It is infinite where a weight is NaN.

    Raises:
        ValueError: as in `importance_bound`: there are no weights.

    Source:
        Yao, Vehtari, Simpson & Gelman 2018; Vehtari, Simpson, Gelman, Yao & Gabry 2024, algorithm 1.
    """
    return pareto_shape(log_weights(fit, key=key, num_particles=num_particles))


def elbo_and_khat(fit: SVIFit, *, key: KeyLike = 0, num_particles: int = 4000) -> tuple[float, float, float]:
    """The ELBO, its standard error, and `khat`, from the same draws: the ELBO is the mean of the log weights."""
    found = log_weights(fit, key=key, num_particles=num_particles).astype(np.float64)
    return float(found.mean()), float(found.std(ddof=1) / np.sqrt(num_particles)), pareto_shape(found)


class Evidence(NamedTuple):
    """An estimate of `log p(y)`: value, standard error, and the Pareto shape of its weights (trust it below 0.7)."""

    log_evidence: float
    standard_error: float
    khat: float


def log_evidence(
    model: Callable[..., Any],
    draws: dict[str, Any],
    *args: Any,
    key: KeyLike = 0,
    num_particles: int = 8000,
    **kwargs: Any,
) -> Evidence:
    """`log p(y)` of a model with few parameters, by importance sampling around its posterior draws.

    The proposal is a multivariate Student t (5 degrees of freedom) with the mean and covariance of the draws in
    NumPyro's unconstrained space. With the states integrated out only a few parameters remain, and the error of the
    estimate is some thousandths of a nat; see its standard error.

    Args:
        model: a NumPyro model.
        draws: posterior draws with leading axes `(chain, draw)`.
        args: the model's positional arguments.
        key: random key, or a whole number. Calls with equal keys, also the default, give equal draws.
        num_particles: number of importance draws.
        kwargs: the model's keyword arguments.

    Returns:
        An `Evidence`.
    """
    info = initialize_model(jax.random.key(0), model, model_args=args, model_kwargs=kwargs, dynamic_args=False)
    latent = {n for n, s in info.model_trace.items() if s["type"] == "sample" and not s["is_observed"]}
    flat, unravel = ravel_pytree(info.param_info.z)
    samples = {n: jnp.asarray(x).reshape(-1, *x.shape[2:]) for n, x in draws.items() if n in latent}

    def to_flat(sample: dict[str, jax.Array]) -> jax.Array:
        z = unconstrain_fn(model, args, kwargs, sample)
        return ravel_pytree({n: z[n] for n in info.param_info.z})[0]

    points = np.asarray(jax.jit(jax.vmap(to_flat))(samples), dtype=np.float64)
    size, freedom = flat.shape[0], 5.0
    centre, root = points.mean(0), np.linalg.cholesky(np.cov(points.T).reshape(size, size))
    root = root * np.sqrt((freedom - 2) / freedom)
    normal_key, chi_key = jax.random.split(as_key(key))
    normal = np.asarray(jax.random.normal(normal_key, (num_particles, size)), dtype=np.float64)
    chi = np.asarray(2 * jax.random.gamma(chi_key, freedom / 2, (num_particles,)), dtype=np.float64)
    standard = normal * np.sqrt(freedom / chi)[:, None]
    proposed = centre + standard @ root.T
    gammaln = jax.scipy.special.gammaln
    constant = float(gammaln((freedom + size) / 2) - gammaln(freedom / 2)) - 0.5 * size * np.log(freedom * np.pi)
    log_q = constant - np.log(np.diag(root)).sum() - 0.5 * (freedom + size) * np.log1p((standard**2).sum(1) / freedom)
    potential = jax.jit(lambda zs: jax.lax.map(lambda z: info.potential_fn(unravel(z)), zs, batch_size=200))
    log_ratios = -np.asarray(potential(jnp.asarray(proposed, flat.dtype)), dtype=np.float64) - log_q
    top = log_ratios.max()
    weights = np.exp(log_ratios - top)
    error = weights.std(ddof=1) / np.sqrt(num_particles) / weights.mean()
    return Evidence(float(top + np.log(weights.mean())), float(error), pareto_shape(log_ratios))
