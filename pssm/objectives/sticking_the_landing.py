"""An ELBO whose gradient has no noise where the guide is exact: the score of `log q` is left out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions.util import scale_and_mask
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer.elbo import ELBO
from numpyro.util import check_model_guide_match

from pssm._types import Array, Key
from pssm.distributions.unwrap import site_log_prob, unwrap
from pssm.objectives.draws import mutable, over_draws


class StickingTheLanding_ELBO(ELBO):
    """The ELBO, `E_q[log p(y, x) - log q(x; phi)]`, with `log q` at parameters that are held fixed in the gradient.

    With a draw `x = g(e, phi)` the derivative of `log q(x; phi)` by `phi` at fixed `x`, the score, has expectation
    zero: without it the gradient is unbiased still, and the closer the guide is to the posterior the less noise it has;
    none where `q` is the posterior. A fit that begins at an exact guide stays there, and one that ends near the optimum
    needs no decay of its step size. The value is that of `Trace_ELBO`. Far from the optimum, and with families that are
    not near the posterior, the noise may be larger than that of `TraceConditionalKL_ELBO`.

    The guide runs twice, the second time with fixed parameters and the first run's draws. All of its continuous sites
    must be reparametrised, as NumPyro's guides and those of `pssm.guides` are, but for the moment-matched family, which
    has no density.

    Args:
        num_particles: independent draws from the guide, averaged.
        vectorize_particles: as in NumPyro: True for `vmap`, False for one after the other.

    Example:
        >>> StickingTheLanding_ELBO(num_particles=4).num_particles
        4

    Source:
        Roeder, Wu & Duvenaud 2017, "Sticking the landing".
    """

    def loss_with_mutable_state(
        self, rng_key: Key, param_map: dict[str, Any], model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Minus the ELBO, and the state of NumPyro's `mutable` sites."""

        def particle(key: Key) -> tuple[Array, dict[str, Any] | None]:
            model_key, guide_key = jax.random.split(key)
            seeded = seed(guide, guide_key)
            drawn = trace(substitute(seeded, data=param_map)).get_trace(*args, **kwargs)
            state = mutable(drawn)
            params = {**param_map, **state}
            replayed = replay(seed(model, model_key), drawn)
            joint = trace(substitute(replayed, data=params)).get_trace(*args, **kwargs)
            check_model_guide_match(joint, drawn)
            fixed = jax.lax.stop_gradient(param_map)
            again = trace(substitute(replay(seed(guide, guide_key), drawn), data=fixed)).get_trace(*args, **kwargs)
            return _log_ratio(joint, drawn, again), {**state, **mutable(joint)} or None

        return over_draws(self, rng_key, particle)


def _own_log_prob(site: dict[str, Any]) -> Array:
    """`log q` of a site of the guide.

    A point mass passes on a value that follows from other draws, or a parameter: its density is that of the transform,
    whatever rounding has done to the value.
    """
    fn = unwrap(site["fn"])[0]
    if not isinstance(fn, dist.Delta):
        return site_log_prob(site)
    return jnp.sum(scale_and_mask(fn.log_density, site["scale"]))


def _log_ratio(joint: dict[str, Any], drawn: dict[str, Any], again: dict[str, Any]) -> Array:
    """`log p - log q` of one draw, where `again` has `q` with fixed parameters."""
    total = jnp.zeros(())
    learned = any(s["type"] == "param" for s in joint.values())
    for name, site in joint.items():
        if site["type"] != "sample":
            continue
        own = None if site["is_observed"] else again[name]
        q, mask = (None, None) if own is None else unwrap(own["fn"])
        if own is None or not hasattr(q, "log_ratio"):
            total = total + site_log_prob(site) - (0.0 if own is None else _own_log_prob(own))
            continue
        # The path's prior is in both densities. It cancels but for the model's own parameters, which `q` has fixed.
        same = drawn[name]["infer"].get("prior_from_model") and not learned
        ratio = q.log_ratio(drawn[name]["value"], None if same else unwrap(site["fn"])[0])
        ratio = ratio if mask is None else jnp.where(mask, ratio, 0.0)
        total = total - jnp.sum(scale_and_mask(ratio, own["scale"]))
    for name, own in again.items():
        if own["type"] == "sample" and name not in joint:
            total = total - _own_log_prob(own)
    return total
