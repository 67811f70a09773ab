"""How far a bound is below the log evidence."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.svi import SVIRunResult

from pssm._keys import as_key
from pssm._types import Key, KeyLike
from pssm.diagnostics.bound import log_evidence
from pssm.distributions import StatePath
from pssm.distributions.unwrap import unwrap
from pssm.fitting.draws import trace_with
from pssm.fitting.labels import check_density, with_all_data
from pssm.fitting.results import SVIFit, elbo, posterior_draws
from pssm.guides import AutoStateSpace
from pssm.guides.paths import POINT
from pssm.infer.importance import importance_bound, log_weights
from pssm.infer.task import marginal_site
from pssm.modes.mode import DENSE

EXACT, ESTIMATE, AT_LEAST = "exact", "estimate", "at least"


class BoundGap(NamedTuple):
    """Log evidence and bound of a fit, in nats.

    Attributes:
        gap: `evidence - bound`; negative for a surrogate that exceeds the evidence.
        bound: the ELBO, or a surrogate's objective.
        evidence: `log p(y)`, or the value used in its place.
        standard_error: of `gap`.
        kind: "exact" (linear-Gaussian: the evidence is known), "estimate" (importance sampling over a few parameters),
            or "at least" (the evidence is unknown; a tighter bound is used, so the gap is larger).
    """

    gap: float
    bound: float
    evidence: float
    standard_error: float
    kind: str

    def __float__(self) -> float:
        return self.gap


def bound_gap(fit: SVIFit, *, key: KeyLike = 0, num_particles: int = 4000) -> BoundGap:
    """The gap between a fit's bound and the log evidence: the exact one where it exists, else the best available.

    The evidence is exact where only the states are latent and the model is linear-Gaussian: draws from the full-rank
    chain at the mode then have equal weights, and this is the test for it. With a `LinearGaussianMarginal` and a few
    parameters it is estimated by importance sampling (`log_evidence`).

    Args:
        fit: from `fit_svi`.
        key: random key, or a whole number. Calls with equal keys, also the default, give equal draws.
        num_particles: draws for the bound and for the evidence.

    Returns:
        A `BoundGap`.

    Raises:
        ValueError: there is no bound, since the guide has a point mass (`AutoDelta`), or a surrogate's model has an
            evidence that is unknown; or a model takes a random part of its data and cannot run on all.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from pssm.distributions import StatePath, observe
        >>> from pssm.infer import fit_svi
        >>> def model(y):
        ...     z = numpyro.sample("z", StatePath(jnp.zeros(1), jnp.eye(1), 0.9 * jnp.eye(1), 0.5 * jnp.eye(1), len(y)))
        ...     observe("y", dist.Normal(z, 1.0).to_event(2), y)
        >>> fit = fit_svi(model, jnp.ones((20, 1)), guide="chain", rank=1, num_steps=100, progress_bar=False)
        >>> found = bound_gap(fit, num_particles=500)
        >>> found.kind, abs(found.gap) < 0.1
        ('exact', True)
    """
    if fit.objective == POINT:
        check_density(fit)
    bound_key, evidence_key = jax.random.split(as_key(key))
    bound, error = (
        _objective(fit, bound_key, num_particles)
        if fit.surrogate
        else elbo(fit, key=bound_key, num_particles=num_particles)
    )
    evidence, evidence_error, kind = _evidence(fit, evidence_key, num_particles)
    return BoundGap(evidence - bound, bound, evidence, float(np.hypot(error, evidence_error)), kind)


def _objective(fit: SVIFit, key: Key, num_particles: int) -> tuple[float, float]:
    """Mean and standard error of minus the loss at the fitted parameters, for a guide that has particles itself."""
    guide, model = with_all_data(fit)
    count = max(num_particles // 25, 10)

    def one(k: Any) -> Any:
        return -jnp.asarray(fit.svi.loss.loss(k, fit.params, model, guide, *fit.args, **fit.kwargs))

    values = np.asarray(jax.jit(lambda ks: jax.lax.map(one, ks))(jax.random.split(key, count)))
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(count))


def _evidence(fit: SVIFit, key: Key, num_particles: int) -> tuple[float, float, str]:
    model = handlers.substitute(with_all_data(fit, "the evidence")[1], data=fit.params)
    trace = trace_with(model, {}, *fit.args, **fit.kwargs)
    latent = {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    paths = [s for s in latent.values() if isinstance(unwrap(s["fn"])[0], StatePath)]
    if latent and len(paths) == len(latent):
        weights = _full_rank_weights(fit, model, key)
        scale = max(1.0, float(np.abs(weights).max()))
        if np.ptp(weights) < (1e-8 if weights.dtype == np.float64 else 3e-5) * scale:
            return float(weights.mean()), 0.0, EXACT
    if latent and marginal_site(trace) is not None:
        draws = posterior_draws(fit, num_samples=4000, key=key)
        found = log_evidence(model, draws, *fit.args, key=key, num_particles=num_particles, **fit.kwargs)
        if found.khat < 0.7:
            return found.log_evidence, found.standard_error, ESTIMATE
    if fit.surrogate:
        raise ValueError(
            "`fit` has a surrogate objective and a model whose evidence is unknown: there is nothing to compare. "
            'Fit the same model with family="chain" and compare with its `importance_bound`.'
        )
    best = importance_bound(fit, key=key, num_particles=5 * num_particles)
    return best.value, best.standard_error, AT_LEAST


def _full_rank_weights(fit: SVIFit, model: Any, key: Key) -> np.ndarray:
    """`log p(y, z) - log q(z)` of a few draws from the chain at the mode, with full rank (up to `DENSE`)."""
    import optax  # takes a fifth of a second

    svi = SVI(model, AutoStateSpace(model, rank=DENSE, potentials="mode", mode_iters=1), optax.sgd(0.0), Trace_ELBO())
    state = svi.init(key, *fit.args, **fit.kwargs)
    start = SVIRunResult(svi.get_params(state), state, np.zeros(10))
    return log_weights(SVIFit.of(svi, start, *fit.args, **fit.kwargs), key=key, num_particles=20)
