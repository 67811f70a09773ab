"""An ELBO that uses what a path posterior knows of its own KL divergence."""

from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions.kl import kl_divergence
from numpyro.distributions.util import scale_and_mask
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer.elbo import ELBO
from numpyro.util import check_model_guide_match

from pssm._types import Array, Key
from pssm.distributions.unwrap import site_log_prob, unwrap
from pssm.objectives.draws import mutable, over_draws


class TraceConditionalKL_ELBO(ELBO):
    """The ELBO with the path's KL divergence in closed form step by step, given the sampled path.

    For a `LowRankChain` or `ConditionedPath` site it takes `-sum_t KL(q(z_t | z_{t-1}) || p(z_t | z_{t-1}))` along the
    draw in place of `log p(z) - log q(z)`: the same expectation, so the same lower bound on the log evidence, and
    gradients of lower variance (the value itself is noisier near the exact posterior, where `log p - log q` is
    constant). So it does for any distribution with a method `kl_given(z, prior)`. For a `LowRankMomentMatched` site it
    averages the likelihood over the site's own particles; that objective is a surrogate, not a bound. Other sites are
    treated as in NumPyro's `TraceMeanField_ELBO`.

    Args:
        num_particles: independent draws from the guide, averaged.
        vectorize_particles: as in NumPyro: True for `vmap`, False for one after the other.

    Example:
        >>> TraceConditionalKL_ELBO(num_particles=4).num_particles
        4
    """

    def loss_with_mutable_state(
        self, rng_key: Key, param_map: dict[str, Any], model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Minus the ELBO and the state of NumPyro's `mutable` sites."""

        def particle(key: Key) -> tuple[Array, dict[str, Any] | None]:
            model_key, guide_key = jax.random.split(key)
            guide_trace = trace(substitute(seed(guide, guide_key), data=param_map)).get_trace(*args, **kwargs)
            params = {**param_map, **mutable(guide_trace)}

            def model_at(values: dict[str, Any]) -> dict[str, Any]:
                fixed = {n: {**s, "value": values.get(n, s["value"])} for n, s in guide_trace.items()}
                replayed = replay(seed(model, model_key), fixed)
                return trace(substitute(replayed, data=params)).get_trace(*args, **kwargs)

            matched = {
                name: jnp.moveaxis(unwrap(site["fn"])[0].particles, -3, 0)
                for name, site in guide_trace.items()
                if site["type"] == "sample" and hasattr(unwrap(site["fn"])[0], "particles")
            }
            model_trace = model_at({})
            check_model_guide_match(model_trace, guide_trace)
            if matched:
                value = jax.vmap(lambda values: _elbo(model_at(values), guide_trace))(matched).mean()
            else:
                value = _elbo(model_trace, guide_trace)
            return value, {**mutable(guide_trace), **mutable(model_trace)} or None

        return over_draws(self, rng_key, particle)


def _elbo(model_trace: dict[str, Any], guide_trace: dict[str, Any]) -> Array:
    """One draw's ELBO."""
    total = jnp.zeros(())
    before: set[str] = set()
    guide_order = [n for n, s in guide_trace.items() if s["type"] == "sample"]
    for name, site in model_trace.items():
        if site["type"] != "sample":
            continue
        if site["is_observed"]:
            total = total + site_log_prob(site)
            continue
        own = guide_trace[name]
        total = total - _kl(site, own, in_order=before <= set(guide_order[: guide_order.index(name)]))
        before.add(name)
    for name, site in guide_trace.items():
        if site["type"] == "sample" and name not in model_trace:  # auxiliary
            total = total - site_log_prob(site)
    return total


def _kl(site: dict[str, Any], own: dict[str, Any], *, in_order: bool) -> Array:
    """KL of a latent site: given the path's draw, in closed form, or the draw's own log ratio."""
    (q, mask), (p, _) = unwrap(own["fn"]), unwrap(site["fn"])
    try:
        if hasattr(q, "kl_given"):
            draw, value = own["infer"].get("draw", (None, None))
            if draw is not own["value"]:  # there was none, or the site's value has been replaced
                value = q.kl_given(own["value"], None if own["infer"].get("prior_from_model") else p)
            value = value if mask is None else jnp.where(mask, value, 0.0)
            return jnp.sum(scale_and_mask(value, own["scale"]))
        if in_order:
            return jnp.sum(scale_and_mask(kl_divergence(own["fn"], site["fn"]), own["scale"]))
    except NotImplementedError:
        pass
    return site_log_prob(own) - site_log_prob(site)
