"""`WeightedKL`: an ELBO whose KL divergence has a weight, for annealing."""

from collections.abc import Callable
from typing import Any

from numpyro.infer import ELBO
from numpyro.primitives import Messenger


class _ScaleLatent(Messenger):
    """Scales the log densities of the latent sites, and of no others."""

    def __init__(self, fn: Callable[..., Any], weight: Any):
        self.weight = weight
        super().__init__(fn)

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["is_observed"]:
            msg["scale"] = self.weight if msg.get("scale") is None else msg["scale"] * self.weight


class WeightedKL(ELBO):
    """Another ELBO with its KL divergence times a weight: expected log-likelihood minus `weight * KL`.

    The log densities of all latent sites, in the model and in the guide, are scaled; observed sites and factors are
    not. With a weight other than 1 it is no bound on the log evidence.

    Args:
        loss: the ELBO, not one that enumerates.
        weight: a number, traced or not.

    Example:
        >>> from numpyro.infer import Trace_ELBO
        >>> WeightedKL(Trace_ELBO(num_particles=8), 0.1).num_particles
        8

    Source:
        Bowman et al. 2016 (annealing); Higgins et al. 2017 (a constant weight).
    """

    def __init__(self, loss: ELBO, weight: Any):
        super().__init__(loss.num_particles, loss.vectorize_particles)
        self.inner, self.weight = loss, weight

    def loss_with_mutable_state(self, rng_key, param_map, model, guide, *args, **kwargs):
        """Minus the weighted objective and the state of `mutable` sites."""
        model, guide = _ScaleLatent(model, self.weight), _ScaleLatent(guide, self.weight)
        return self.inner.loss_with_mutable_state(rng_key, param_map, model, guide, *args, **kwargs)

    def loss(self, rng_key, param_map, model, guide, *args, **kwargs):
        """Minus the weighted objective."""
        model, guide = _ScaleLatent(model, self.weight), _ScaleLatent(guide, self.weight)
        return self.inner.loss(rng_key, param_map, model, guide, *args, **kwargs)
