"""The groups of a fit's DataTree: names that a file can hold, labels of every axis, pointwise log-likelihoods."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import xarray as xr

from pssm.distributions import GaussianFilterMarginal, LinearGaussianMarginal, WithMissing
from pssm.fitting.draws import flatten_draws, trace_with
from pssm.inspection.axes import Axes, innermost
from pssm.partly_observed import log_prob_observed

LEAD = ("chain", "draw")
BY_STEPS = (LinearGaussianMarginal, GaussianFilterMarginal)  # what has `log_prob_steps`


class Namer:
    """Names of variables and labels of axes for the groups of one tree.

    A file has no variable whose name holds "/" (scopes, `random_module`) or is that of an axis: "/" becomes ".", and a
    name that is taken gets "_" at its end. The attribute `site` of such a variable is the site's own name.

    Args:
        axes: the axes of the model.
        labels: labels of axes, by axis.
    """

    def __init__(self, axes: Axes, labels: dict[str, np.ndarray]):
        every = dict.fromkeys([a for names in axes.names.values() for a in names] + list(axes.states.values()))
        self.axes = _without_slashes(every, set())
        self.dims = {n: tuple(self.axes[a] for a in names) for n, names in axes.names.items()}
        self.labels = {self.axes.get(n, n): x for n, x in labels.items()}
        self.variables = _without_slashes(axes.names, {*LEAD, *self.axes.values()})

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


def _without_slashes(names: Iterable[str], taken: set[str]) -> dict[str, str]:
    """Other names without "/", no two alike and none of those taken."""
    found = {}
    for name in names:
        new = name.replace("/", ".")
        while new in taken:
            new += "_"
        taken.add(new)
        found[name] = new
    return found


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
        for mask, _ in _masks(fn):
            steps = jnp.where(jnp.asarray(mask)[..., None], steps, 0.0)
        return steps
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


def _masks(fn: Any) -> Iterator[tuple[Any, int]]:
    """The masks around and inside a distribution, and how many axes of an event stand behind each."""
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | WithMissing | dist.Independent):
        if isinstance(fn, dist.MaskedDistribution):
            yield fn._mask, fn.event_dim
        fn = fn.base if isinstance(fn, WithMissing) else fn.base_dist


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
        return {name: pointwise(trace[name], axes.names[name], axes.times.get(name)) for name in names}

    compiled = jax.jit(lambda s: jax.lax.map(one, s, batch_size=200))

    def of_draws(draws: dict[str, Any]) -> dict[str, np.ndarray]:
        if not draws:  # learned parameters alone: one draw of nothing
            return {n: np.asarray(x)[None, None] for n, x in jax.jit(one)({}).items()}
        chains, count = next(iter(draws.values())).shape[:2]
        flat = compiled(flatten_draws(draws))
        return {n: np.asarray(x).reshape(chains, count, *x.shape[1:]) for n, x in flat.items()}

    return of_draws


def points_seen(site: dict[str, Any], dims: tuple[str, ...], time: str | None) -> np.ndarray:
    """Where something was observed, neither NaN nor masked, with the axes of `pointwise_dims`."""
    value = np.asarray(site["value"])
    there = ~np.isnan(value) if value.dtype.kind == "f" else np.ones(value.shape, bool)
    for mask, events in _masks(site["fn"]):
        there = there & np.asarray(mask).reshape(*np.shape(mask), *(1,) * events)
    kept = pointwise_dims(site, dims, time)
    return there.any(tuple(k for k, a in enumerate(dims) if a not in kept))


def observed_points(arrays: dict[str, np.ndarray], axes: Axes, names: Namer) -> xr.Dataset | None:
    """Log-likelihoods at what was observed: an entry that was not scores 0 in every draw, and is no data point.

    Where whole steps, series or members of a plate were not observed they are left out of their axis. Where single
    entries were not, the others stand one behind the other on an axis `<site>_point`, with the labels of their axes as
    coordinates. Sites of which nothing was observed are left out. None where there is no other.
    """
    rows_of: dict[str, list[int]] = {}  # the labels that are left of an axis, by those of the first site that has it
    whole: dict[str, Any] = {}
    single: dict[str, Any] = {}
    for site, x in ((n, arrays[n]) for n in axes.data if n in arrays):
        dims, trace = axes.names[site], axes.trace[site]
        seen = points_seen(trace, dims, axes.times.get(site))
        if not seen.any():
            continue
        rows = [np.flatnonzero(seen.any(tuple(i for i in range(seen.ndim) if i != k))) for k in range(seen.ndim)]
        own = [names.axes[a] for a in pointwise_dims(trace, dims, axes.times.get(site))]
        labels = [np.asarray(names.labels.get(a, range(n))) for a, n in zip(own, seen.shape, strict=True)]
        if seen[np.ix_(*rows)].all():
            x = x[(..., *np.ix_(*rows))]
            same = [rows_of.setdefault(a, r.tolist()) == r.tolist() for a, r in zip(own, rows, strict=True)]
            placed = [a if s else f"{names.variables[site]}_{a}" for a, s in zip(own, same, strict=True)]
            whole[site] = x, placed, [label[r] for label, r in zip(labels, rows, strict=True)]
        else:
            where = np.nonzero(seen)
            single[site] = x[..., seen], own, [label[w] for label, w in zip(labels, where, strict=True)]
    data: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for site, (x, placed, labels) in whole.items():
        data[site] = (*LEAD, *placed), x
        coords |= dict(zip(placed, labels, strict=True))
    for site, (x, own, labels) in single.items():
        point = f"{names.variables[site]}_point"
        data[site] = (*LEAD, point), x
        coords[point] = np.arange(x.shape[-1])
        for axis, label in zip(own, labels, strict=True):
            coords[axis if axis not in coords else f"{names.variables[site]}_{axis}"] = (point, label)
    if not data:
        return None
    coords |= {a: np.arange(n) for a, n in zip(LEAD, next(iter(arrays.values())).shape, strict=False)}
    renamed = {names.variables[n]: (*x, {} if names.variables[n] == n else {"site": n}) for n, x in data.items()}
    return xr.Dataset(renamed, coords=coords)
