"""A model run inside a guide: its path priors, its likelihood as a function of the paths, its data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers

from pssm._types import Array


class ModelRun:
    """A model with its arguments, run inside a guide without leaving anything in the guide's trace."""

    def __init__(self, model: Callable[..., Any], args: tuple, kwargs: dict[str, Any], indices: dict[str, Array]):
        self.model, self.args, self.kwargs, self.indices = model, args, kwargs, indices

    def with_indices(self, indices: dict[str, Array]) -> "ModelRun":
        """The same with other subsample indices in some plates."""
        return ModelRun(self.model, self.args, self.kwargs, {**self.indices, **indices})

    def expose_params(self, values: dict[str, Array]) -> dict[str, Array]:
        """Runs the model with its `param` sites in the open, as the guide's own; returns their values."""
        hidden = handlers.block(self._prepared(values), hide_fn=lambda site: site["type"] not in ("param", "mutable"))
        trace = handlers.trace(hidden).get_trace(*self.args, **self.kwargs)
        return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}

    def trace(self, values: dict[str, Array]) -> dict[str, Any]:
        """The model's trace with the given sites and parameters set."""
        with handlers.block():
            return handlers.trace(self._prepared(values)).get_trace(*self.args, **self.kwargs)

    def log_lik(self, path: str, values: dict[str, Array]) -> Callable[[Array], Array]:
        """Log density of everything but the path itself, as a function of it; of the path's batch shape.

        Weights that the path shares (a plate's scale) are divided out.
        """
        own = self.trace(values)[path]
        batch, own_scale = own["fn"].batch_shape, own["scale"]

        def log_lik(z: Array) -> Array:
            total = jnp.zeros((), z.dtype)
            for name, site in self.trace({**values, path: z}).items():
                if site["type"] != "sample" or name == path:
                    continue
                term = site["fn"].log_prob(site["value"])
                scale = 1.0 if site["scale"] is None else site["scale"]
                term = term * (scale / (1.0 if own_scale is None else own_scale))
                if term.ndim >= len(batch) and term.shape[term.ndim - len(batch) :] == batch:
                    term = term.sum(tuple(range(term.ndim - len(batch))))
                elif site["is_observed"]:
                    term = term.sum()
                else:
                    continue  # a site outside the path's plate: no function of the path
                total = total + term
            return total

        return log_lik

    def _prepared(self, values: dict[str, Array]) -> Callable[..., Any]:
        plates = {name: {"type": "plate", "value": x} for name, x in self.indices.items()}
        model = handlers.substitute(handlers.replay(self.model, plates), data=values)
        return handlers.seed(model, jax.random.key(0))


def unwrap(fn: dist.Distribution) -> tuple[Any, Array | bool | None]:
    """The distribution inside batches and masks, and its mask."""
    mask = None
    while isinstance(fn, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask if mask is None else jnp.logical_and(mask, fn._mask)
        fn = fn.base_dist
    return fn, mask
