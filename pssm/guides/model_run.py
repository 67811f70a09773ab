"""A model run inside a guide: its path priors, its likelihood as a function of the paths, its data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro import handlers

from pssm._checks import check_choice
from pssm._types import Array
from pssm.distributions import StatePath


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

    def path_prior(self, path: str, values: dict[str, Array]) -> StatePath:
        """The prior of a path at the given values."""
        return unwrap(self.trace(values)[path]["fn"])[0]

    def data(
        self, path: str, values: dict[str, Array], sites: str | tuple[str, ...] | Callable[..., Array] | None = None
    ) -> tuple[Array, tuple[int, ...]]:
        """What is observed of a path, `(*batch, time, ...)`, and the batch shape.

        Args:
            path: name of the path's site.
            values: values of the sites and parameters.
            sites: the observed site or sites, or a function of the model's arguments that returns the data of all
                trials; by default all observed sites of the right shape. Several are put side by side.
        """
        trace = self.trace(values)
        batch, steps = trace[path]["fn"].batch_shape, trace[path]["fn"].event_shape[0]
        lead = (*batch, steps)
        if callable(sites):
            y = jnp.asarray(sites(*self.args, **self.kwargs), float)
            for frame in trace[path]["cond_indep_stack"]:
                axis = len(batch) + frame.dim
                if y.shape[axis] != batch[axis]:
                    y = jnp.take(y, self.indices[frame.name], axis=axis)
            found = {"data": y}
        else:
            names = (sites,) if isinstance(sites, str) else sites
            observed = {n: s["value"] for n, s in trace.items() if s["type"] == "sample" and s["is_observed"]}
            for name in names or ():
                check_choice("data", name, tuple(observed))
            found = {n: jnp.asarray(x, float) for n, x in observed.items() if n in names} if names else {}
            if not names:
                found = {n: jnp.asarray(x, float) for n, x in observed.items() if jnp.shape(x)[: len(lead)] == lead}
        for name, x in found.items():
            if x.shape[: len(lead)] != lead:
                raise ValueError(f"`data`: `{name}` must have shape {lead} (batch, time, ...) in front; got {x.shape}.")
        if not found:
            raise ValueError(
                f"`data`: the model observes no site of shape {lead} (batch, time, ...) to encode for `{path}`; "
                "call it with data, or say with `data` what to encode."
            )
        if len(found) == 1:
            (y,) = found.values()
            return (y[..., None] if y.ndim == len(lead) else y), batch
        return jnp.concatenate([x.reshape(*lead, -1) for x in found.values()], axis=-1), batch

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
