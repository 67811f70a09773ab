"""Bounds on the log evidence from a fitted guide: importance sampling, and a particle filter steered by the guide."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.distributions.util import scale_and_mask

from pssm._checks import check_count
from pssm._keys import as_key
from pssm._types import Array, Key, KeyLike
from pssm.distributions import LowRankChain
from pssm.distributions.unwrap import site_log_prob, unwrap
from pssm.fitting.labels import check_density, with_all_data
from pssm.fitting.results import SVIFit
from pssm.guides.guided_filter import guided_filter
from pssm.guides.model_run import ModelRun


class EvidenceBound(NamedTuple):
    """A lower bound on the log evidence, in expectation; tight where the weights are even.

    Attributes:
        value: `log (1/S) sum_s w_s`.
        standard_error: of `value`, from the spread of the weights; nan where there is one weight only (one filter).
        ess: effective number of draws (of a particle filter: the smallest at any block's end).
        kind: what the number is, in words.
        log_weights: `(S,)`.
    """

    value: float
    standard_error: float
    ess: float
    kind: str
    log_weights: np.ndarray

    def __float__(self) -> float:
        return self.value


def log_weights(fit: SVIFit, *, key: KeyLike = 0, num_particles: int = 1000, batch_size: int = 500) -> np.ndarray:
    """`log p(y, z) - log q(z)` of draws from the guide, `(num_particles,)`; the same draws for the same `key`."""
    guide, model = _weighed(fit)

    def one(k: Array) -> Array:
        guide_key, model_key = jax.random.split(k)
        guide_trace = _trace(guide, guide_key, fit, None)
        model_trace = _trace(model, model_key, fit, guide_trace)
        return _weight(model_trace, guide_trace)

    keys = jax.random.split(as_key(key), num_particles)
    return np.asarray(jax.jit(lambda ks: jax.lax.map(one, ks, batch_size=min(batch_size, num_particles)))(keys))


def _weighed(fit: SVIFit) -> tuple[Any, Any]:
    """Guide and model with densities, of all data: the weight of a part of them estimates no evidence."""
    check_density(fit)
    return with_all_data(fit, "importance weights")


def _trace(fn: Any, key: Array, fit: SVIFit, replayed: dict[str, Any] | None) -> dict[str, Any]:
    fn = handlers.substitute(handlers.seed(fn, key), data=fit.params)
    if replayed is not None:
        fn = handlers.replay(fn, replayed)
    return handlers.trace(fn).get_trace(*fit.args, **fit.kwargs)


def _weight(model_trace: dict[str, Any], guide_trace: dict[str, Any], skip: str | None = None) -> Array:
    """`log p - log q` of a replayed draw. A chain's own log ratio takes the place of a difference of large numbers."""
    total = jnp.zeros(())
    for name, site in model_trace.items():
        if site["type"] != "sample" or name == skip:
            continue
        own = guide_trace.get(name)
        q, mask = (None, None) if own is None or site["is_observed"] else unwrap(own["fn"])
        if hasattr(q, "log_ratio") and own is not None and own["infer"].get("prior_from_model"):
            ratio = q.log_ratio(own["value"])
            ratio = ratio if mask is None else jnp.where(mask, ratio, 0.0)
            total = total - jnp.sum(scale_and_mask(ratio, own["scale"]))
            continue
        total = total + site_log_prob(site)
        if own is not None and not site["is_observed"]:
            total = total - site_log_prob(own)
    for name, own in guide_trace.items():
        if own["type"] == "sample" and name not in model_trace and name != skip:
            total = total - site_log_prob(own)
    return total


def importance_bound(
    fit: SVIFit,
    *,
    key: KeyLike = 0,
    num_particles: int = 20_000,
    resample_every: int | None = None,
    num_outer: int = 20,
) -> EvidenceBound:
    """A tighter lower bound on `log p(y)` than the ELBO, from the same guide.

    Without `resample_every`: importance sampling with the guide as the proposal (the IWAE bound with `num_particles`
    draws). It fails for long series, where a whole path's weight varies too much. With `resample_every = m`: a particle
    filter whose proposal and look-ahead are the chain's potentials, resampled after every `m` steps where the effective
    number of particles has fallen below half. Both estimates of `p(y)` are unbiased, so their logarithms are lower
    bounds in expectation.

    Args:
        fit: from `fit_svi` (or `SVIFit.of` for a run of your own).
        key: random key, or a whole number; the default too is the same in each call, and gives the same draws.
        num_particles: draws, or particles.
        resample_every: block length of the particle filter, for a guide with one unbatched `LowRankChain` site.
        num_outer: with `resample_every`, how many draws of the other latent sites, a particle filter for each. Where
            there are none, the particles are divided among so many filters, if each gets 100 or more.

    Returns:
        An `EvidenceBound`.

    Raises:
        ValueError: `resample_every` with a guide that has no unbatched `LowRankChain` site; a guide without a density
            (a point mass such as `AutoDelta`, or moment-matched); a model that takes a random part of its data and
            cannot run on all.
        FloatingPointError: no draw has a finite weight.

    Source:
        Burda, Grosse & Salakhutdinov 2016; twisted particle filters: Guarniero, Johansen & Lee 2017.
    """
    check_count("num_particles", num_particles, least=2)
    if resample_every is None:
        weights = log_weights(fit, key=key, num_particles=num_particles)
        return _summary(weights, f"lower bound (importance sampling, {num_particles} draws)")
    check_count("resample_every", resample_every)
    return _particle_bound(fit, as_key(key), num_particles, resample_every, check_count("num_outer", num_outer))


def _summary(weights: np.ndarray, kind: str, ess: float | None = None) -> EvidenceBound:
    weights = np.asarray(weights, dtype=np.float64)
    top = weights[np.isfinite(weights)].max(initial=-np.inf)
    if not np.isfinite(top):
        raise FloatingPointError("no draw from the guide has a finite weight: the guide misses the posterior.")
    ratio = np.where(np.isfinite(weights), np.exp(weights - top), 0.0)
    mean = ratio.mean()
    error = ratio.std(ddof=1) / np.sqrt(ratio.size) / mean if ratio.size > 1 else float("nan")
    ess = float(ratio.sum() ** 2 / (ratio**2).sum()) if ess is None else ess
    return EvidenceBound(float(top + np.log(mean)), float(error), ess, kind, weights)


def _particle_bound(fit: SVIFit, key: Key, num_particles: int, block: int, num_outer: int) -> EvidenceBound:
    guide, model = _weighed(fit)

    def run(outer_key: Array) -> tuple[Array, Array]:
        guide_key, model_key, filter_key = jax.random.split(outer_key, 3)
        guide_trace = _trace(guide, guide_key, fit, None)
        name, chain = _chain_site(guide_trace)
        model_trace = _trace(model, model_key, fit, guide_trace)
        values = {n: s["value"] for n, s in model_trace.items() if s["type"] in ("sample", "param") and n != name}
        log_lik = ModelRun(model, fit.args, fit.kwargs, {}).log_lik(name, {**values, name: guide_trace[name]["value"]})
        # log_lik holds every other site of the model, so the outer weight needs only what the guide drew them with.
        drawn = sum(
            (site_log_prob(s) for n, s in guide_trace.items() if s["type"] == "sample" and n != name), jnp.zeros(())
        )
        value, ess = guided_filter(filter_key, chain, log_lik, num_particles, block)
        return value - drawn, ess

    first = _trace(guide, key, fit, None)
    alone = sum(s["type"] == "sample" for s in first.values()) == 1
    _chain_site(first)
    if alone:  # several smaller filters in place of one: their spread is the standard error
        num_outer = num_outer if num_particles >= 100 * num_outer else 1
        num_particles //= num_outer
    keys = jax.random.split(key, num_outer)
    values, ess = jax.jit(lambda ks: jax.lax.map(run, ks))(keys)
    kind = f"lower bound ({num_outer} guided particle filters, {num_particles} particles each, blocks of {block}"
    kind += ")" if alone else ", a draw of the other sites for each)"
    return _summary(np.asarray(values), kind, float(np.min(ess)))


def _chain_site(guide_trace: dict[str, Any]) -> tuple[str, LowRankChain]:
    found = []
    for name, site in guide_trace.items():
        if site["type"] == "sample" and isinstance(unwrap(site["fn"])[0], LowRankChain):
            found.append((name, unwrap(site["fn"])[0]))
    if len(found) != 1 or found[0][1].batch_shape:
        raise ValueError("`resample_every` needs a guide with exactly one LowRankChain site, without batch axes.")
    return found[0]
