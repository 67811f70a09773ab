"""The groups of a fit's DataTree: names that a file can hold, labels of every axis, pointwise log-likelihoods."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pandas as pd
import xarray as xr

from pssm._types import ArrayLike
from pssm.distributions import GaussianFilterMarginal, LinearGaussianMarginal, WithMissing
from pssm.fitting.results import flatten_draws, trace_with
from pssm.inspection.axes import Axes, innermost
from pssm.partly_observed import log_prob_observed

LEAD = ("chain", "draw")
BY_STEPS = (LinearGaussianMarginal, GaussianFilterMarginal)  # what has `log_prob_steps`


def label_array(name: str, labels: ArrayLike | Iterable[Any]) -> np.ndarray:
    """Labels of an axis as an array that a netCDF file can hold: numbers, texts or dates without a time zone."""
    if isinstance(labels, pd.PeriodIndex):
        labels = labels.to_timestamp()
    if isinstance(labels, pd.DatetimeIndex) and labels.tz is not None:
        labels = labels.tz_convert("UTC").tz_localize(None)
    found = np.asarray(labels if np.ndim(labels) else [labels])
    if found.ndim != 1:
        raise ValueError(f"`{name}` must be a list of labels, one for each step or entry; got shape {found.shape}.")
    if found.dtype.kind != "O":
        return found
    if all(hasattr(x, "isoformat") for x in found):  # dates of Python or pandas
        return np.asarray(pd.to_datetime(list(found), utc=True).tz_localize(None))
    return np.array([str(x) for x in found])


class Namer:
    """Names of variables and labels of axes for the groups of one tree.

    A file has no variable whose name holds "/" (scopes, `random_module`) or is that of an axis: "/" becomes ".", and a
    name that is taken gets "_" at its end. The attribute `site` of such a variable is the site's own name.

    Args:
        axes: the axes of the model.
        labels: labels of axes, by axis.
    """

    def __init__(self, axes: Axes, labels: dict[str, np.ndarray]):
        self.dims = {n: tuple(a.replace("/", ".") for a in names) for n, names in axes.names.items()}
        self.labels = {n.replace("/", "."): x for n, x in labels.items()}
        taken = {*LEAD, *(a for names in self.dims.values() for a in names)}
        self.variables: dict[str, str] = {}
        for site in axes.names:
            name = site.replace("/", ".")
            while name in taken:
                name += "_"
            taken.add(name)
            self.variables[site] = name

    def dataset(
        self,
        arrays: dict[str, np.ndarray],
        lead: tuple[str, ...] = (),
        *,
        dims: dict[str, tuple[str, ...]] | None = None,
        labels: dict[str, np.ndarray] | None = None,
    ) -> xr.Dataset:
        """Arrays with every axis named and labelled; by the sites' axes, or by `dims`."""
        dims = {n: self.dims[n][: np.ndim(x) - len(lead)] for n, x in arrays.items()} if dims is None else dims
        known = {**self.labels, **(labels or {})}
        data, sizes = {}, {}
        for site, x in arrays.items():
            name = self.variables.get(site, site)
            data[name] = ((*lead, *dims[site]), x, {} if name == site else {"site": site})
            sizes.update(zip(data[name][0], np.shape(x), strict=True))
        for axis, label in known.items():
            if axis in sizes and len(label) != sizes[axis]:
                argument = "`time`" if axis == "time" else f"`coords` for {axis!r}"
                raise ValueError(f"{argument} must have {sizes[axis]} labels; got {len(label)}.")
        return xr.Dataset(data, coords={n: known.get(n, np.arange(size)) for n, size in sizes.items()})


def sites_of(group: Any) -> dict[str, np.ndarray]:
    """The arrays of a group by the names that their sites have in the model."""
    return {str(x.attrs.get("site", n)): x.values for n, x in group.data_vars.items()}


def entry_log_probs(fn: dist.Distribution, value: jax.Array) -> jax.Array:
    """Log densities of the entries of a site, with the axes of the value but those of a joint event; masks are kept."""
    if isinstance(fn, WithMissing):
        return entry_log_probs(fn.base, value)
    if isinstance(fn, dist.Independent):
        return entry_log_probs(fn.base_dist, value)
    if isinstance(fn, dist.ExpandedDistribution):
        each = entry_log_probs(fn.base_dist, value)
        return jnp.broadcast_to(each, jnp.shape(value)[: jnp.ndim(value) - innermost(fn).event_dim])
    if isinstance(fn, dist.MaskedDistribution):
        each = entry_log_probs(fn.base_dist, value)
        mask = jnp.asarray(fn._mask)
        behind = each.ndim - (jnp.ndim(value) - fn.event_dim)  # entries of an event share the mask of their batch
        return jnp.where(mask.reshape(*mask.shape, *(1,) * behind), each, 0.0)
    return log_prob_observed(fn, value)


def pointwise(site: dict[str, Any], dims: tuple[str, ...], time: str | None) -> jax.Array:
    """Log-likelihood of a site with the axes of `pointwise_dims`: one entry for each time step where it has time."""
    fn, value = site["fn"], site["value"]
    inner = innermost(fn)
    if isinstance(inner, BY_STEPS):
        steps = inner.log_prob_steps(value)
        mask = _mask_of(fn)
        return steps if mask is None else jnp.where(mask[..., None], steps, 0.0)
    kept = pointwise_dims(site, dims, time)
    if time not in kept:
        return fn.log_prob(value)
    each = entry_log_probs(fn, value)
    return each.sum(tuple(k for k in range(each.ndim) if dims[k] not in kept))


def pointwise_dims(site: dict[str, Any], dims: tuple[str, ...], time: str | None) -> tuple[str, ...]:
    """The axes of the log-likelihood of a site: its batch axes and time; the rest of an event is summed."""
    inner = innermost(site["fn"])
    if isinstance(inner, BY_STEPS):
        return dims[:-1]
    batch = len(dims) - len(site["fn"].event_shape)
    return tuple(a for k, a in enumerate(dims[: len(dims) - inner.event_dim]) if k < batch or a == time)


def _mask_of(fn: Any) -> jax.Array | None:
    """The mask around a distribution."""
    mask = None
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | WithMissing | dist.Independent):
        if isinstance(fn, dist.MaskedDistribution):
            own = jnp.asarray(fn._mask)
            mask = own if mask is None else mask & own
        fn = fn.base if isinstance(fn, WithMissing) else fn.base_dist
    return mask


def pointwise_likelihoods(
    model: Callable[..., Any],
    names: Iterable[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axes: Axes,
) -> Callable[[dict[str, Any]], dict[str, np.ndarray]]:
    """A function of posterior draws `(chain, draw, ...)`: the log-likelihoods of these sites, compiled once."""

    def one(sample: dict[str, jax.Array]) -> dict[str, jax.Array]:
        trace = trace_with(model, sample, *args, **kwargs)
        return {name: pointwise(trace[name], axes.names[name], axes.time) for name in names}

    compiled = jax.jit(lambda s: jax.lax.map(one, s, batch_size=200))

    def of_draws(draws: dict[str, Any]) -> dict[str, np.ndarray]:
        if not draws:  # learned parameters alone: one draw of nothing
            return {n: np.asarray(x)[None, None] for n, x in jax.jit(one)({}).items()}
        chains, count = next(iter(draws.values())).shape[:2]
        flat = compiled(flatten_draws(draws))
        return {n: np.asarray(x).reshape(chains, count, *x.shape[1:]) for n, x in flat.items()}

    return of_draws


def steps_seen(axes: Axes) -> np.ndarray | None:
    """At which time steps something was observed; None where no observed site has the time axis."""
    found = []
    for name in axes.data:
        if axes.time in axes.names[name]:
            value = np.asarray(axes.trace[name]["value"], dtype=float)
            rows = np.moveaxis(value, axes.names[name].index(axes.time), 0)
            found.append(~np.isnan(rows.reshape(len(rows), -1)).all(1))
    return np.any(found, axis=0) if found else None
