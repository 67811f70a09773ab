"""From an approximate posterior to the exact one, by weights."""

from pathlib import Path
from typing import Any

import numpy as np
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC

from pssm._types import KeyLike
from pssm.fitting.corrected import CorrectedEngine, CorrectedFit, Source
from pssm.fitting.fit import begin
from pssm.fitting.nodes import NodesFit
from pssm.fitting.results import record_of
from pssm.inspection.axes import trace_model


def corrected(
    fit: Any,
    *,
    num_paths: int = 16,
    num_particles: int = 64,
    key: KeyLike = 0,
    checkpoint: str | Path | None = None,
    progress_bar: bool = True,
) -> CorrectedFit:
    """Corrects draws that were made with the paths integrated out approximately: exact up to Monte Carlo error.

        w_i = p^(y | theta_i) / p~(y | theta_i),    E p^ = p

    `p~` is the approximation that the sampler saw, `p^` an unbiased estimate: the mean over pairs of paths of the
    chain with opposite noise, or, where the log weight of one path has a standard deviation above 1.5, a particle
    filter that the chain steers. Each draw gets one of its paths, by their weights. The draws are then resampled, in
    their order, to equal weights. Where k-hat of the weights is above 0.7, or less than 0.3 of the draws are
    effective, a warning says so, and the result is not called exact.

    Args:
        fit: of `fit_nuts(path_marginal(model), ...)` or any other NumPyro `MCMC` of a `path_marginal`, or of `nodes`.
        num_paths: paths of the chain a draw, an even number.
        num_particles: of the particle filter.
        key: random key, or a whole number; the same key gives the same draws, the default too.
        checkpoint: a new folder for the weights and paths; `pssm.infer.resume` goes on from it.
        progress_bar: show a progress bar, and the quality of the weights in words.

    Returns:
        A `CorrectedFit`: a fit like any other, with `.exact`, `.khat`, `.ess`, `.efficiency`, `.log_weight_sd`,
        `.shifts`; for `nodes` also the exact `.log_evidence`.

    Raises:
        TypeError: the fit is of a model whose paths are not integrated out approximately.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist, pssm
        >>> from pssm.distributions import StatePath
        >>> def model(y=None, num_steps=5):
        ...     sd = numpyro.sample("sd", dist.HalfNormal(1.0))
        ...     one = jnp.eye(1)
        ...     z = numpyro.sample("z", StatePath(jnp.zeros(1), one, 0.9 * one, sd * one, num_steps))
        ...     pssm.observe("y", dist.Poisson(jnp.exp(z)).to_event(2), obs=y)
        >>> fit = pssm.infer.nodes(model, jnp.array([[0.0], [1.0], [3.0], [2.0], [0.0]]), num_nodes=128,
        ...                        progress_bar=False)
        >>> exact = corrected(fit, progress_bar=False)
        >>> exact.exact, exact.draws()["z"].shape
        (True, (1, 1000, 5, 1))

    Source:
        Vihola, Helske & Franks 2020, "Importance sampling type estimators based on approximate marginal MCMC".
    """
    model, source = _source(fit)
    record = record_of(fit)
    engine = CorrectedEngine(
        model, record.args, record.kwargs, source, num_paths=num_paths, num_particles=num_particles
    )
    return begin(engine, key, checkpoint, progress_bar, record.labels)


def _source(fit: Any) -> tuple[Any, Source]:
    """The model with its paths integrated out, and its draws."""
    if isinstance(fit, NodesFit) and fit.approximate:
        found = Source(fit.nodes, fit.run.log_ratios, 0, fit.engine.num_samples, fit.ess, fit.method)
        return fit.engine.model, found
    model = fit.sampler.model if isinstance(fit, MCMC) else None
    if not isinstance(fit, MCMC) or not hasattr(model, "posterior"):
        raise TypeError(
            "`fit` must be of a model whose paths are integrated out approximately, such as "
            f"`fit_nuts(path_marginal(model), ...)` or `nodes(model, ...)`; got {record_of(fit).method}."
        )
    trace = trace_model(model, {}, fit._args, fit._kwargs)
    draws = fit.get_samples(group_by_chain=True)
    latent = {n: np.asarray(draws[n]) for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    if not latent:
        raise ValueError("`fit` has no parameters: there is nothing to correct. Draw its paths by `sample_states`.")
    chains, count = np.shape(next(iter(latent.values())))[:2]
    least = min(float(np.min(effective_sample_size(np.asarray(x, np.float64)))) for x in latent.values())
    values = {n: x.reshape(-1, *x.shape[2:]) for n, x in latent.items()}
    diverging = int(np.sum(fit.get_extra_fields().get("diverging", 0)))
    base, total = np.zeros((1, chains * count)), chains * count
    return model, Source(values, base, chains, total, least, record_of(fit).method, diverging)
