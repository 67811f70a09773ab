"""A model run inside a guide: its structure, its path priors, its likelihood as a function of the paths, its data."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.extend.core import Literal
from numpyro import handlers
from numpyro.distributions import constraints

from pssm._checks import check_choice
from pssm._types import Array, Key
from pssm.distributions import StatePath
from pssm.distributions.unwrap import unwrap
from pssm.guides.plates import Whole, apart, are_whole
from pssm.linalg.potential import Potential
from pssm.modes.mode import potentials_at
from pssm.modes.path import mode_path
from pssm.register import register


class ModelRun:
    """A model with its arguments, run inside a guide without leaving anything in the guide's trace."""

    def __init__(self, model: Callable[..., Any], args: tuple, kwargs: dict[str, Any], indices: dict[str, Array]):
        self.model, self.args, self.kwargs, self.indices = model, args, kwargs, indices

    def with_indices(self, indices: dict[str, Array]) -> "ModelRun":
        """The same with other subsample indices in some plates."""
        return ModelRun(self.model, self.args, self.kwargs, {**self.indices, **indices})

    def expose_params(self, values: dict[str, Array]) -> dict[str, Array]:
        """Runs the model with its `param` sites in the open, as the guide's own; returns their values."""
        run = Whole(self._prepared(values)) if are_whole() else self._prepared(values)
        hidden = handlers.block(run, hide_fn=lambda site: site["type"] not in ("param", "mutable"))
        trace = handlers.trace(hidden).get_trace(*self.args, **self.kwargs)
        return {name: site["value"] for name, site in trace.items() if site["type"] == "param"}

    def trace(self, values: dict[str, Array]) -> dict[str, Any]:
        """The model's trace with the given sites and parameters set."""
        with apart():
            return handlers.trace(self._prepared(values)).get_trace(*self.args, **self.kwargs)

    def path_prior(self, path: str, values: dict[str, Array]) -> StatePath:
        """The prior of a path at the given values."""
        return unwrap(self.trace(values)[path]["fn"])[0]

    def data(
        self, path: str, values: dict[str, Array], sites: str | tuple[str, ...] | Callable[..., Array] | None = None
    ) -> tuple[Array, tuple[int, ...]]:
        """What is observed of a path, `(*batch, time, ...)`, and the batch shape; NaN where a site is masked.

        Args:
            path: name of the path's site.
            values: values of the sites and parameters.
            sites: the observed site or sites, or a function of the model's arguments that returns the data of all
                trials; by default all observed sites that have the path's plates and an axis of time. Several are put
                side by side.
        """
        trace = self.trace(values)
        own = trace[path]
        batch, steps = own["fn"].batch_shape, own["fn"].event_shape[0]
        lead = (*batch, steps)
        if callable(sites):
            y = jnp.asarray(sites(*self.args, **self.kwargs), float)
            for frame in own["cond_indep_stack"]:
                axis = len(batch) + frame.dim
                if y.shape[axis] != batch[axis]:
                    y = jnp.take(y, self.indices[frame.name], axis=axis)
            found: dict[str, Any] = {"data": y}
        else:
            names = (sites,) if isinstance(sites, str) else sites
            observed = {n: s for n, s in trace.items() if s["type"] == "sample" and s["is_observed"]}
            for name in names or ():
                check_choice("data", name, tuple(observed))
            found = {n: _in_series(s, own) for n, s in observed.items() if names is None or n in names}
            if names is None:
                found = {n: x for n, x in found.items() if x is not None}
        for name, x in found.items():
            if x is None or x.shape[: len(lead)] != lead:
                shape = jnp.shape(trace[name]["value"]) if x is None else x.shape
                raise ValueError(f"`data`: `{name}` must have shape {lead} (batch, time, ...) in front; got {shape}.")
        if not found:
            raise ValueError(
                f"`data`: the model observes no site of shape {lead} (batch, time, ...) to encode for `{path}`; "
                "call it with data, or say with `data` what to encode."
            )
        if len(found) == 1:
            (y,) = found.values()
            return (y[..., None] if y.ndim == len(lead) else y), batch
        return jnp.concatenate([x.reshape(*lead, -1) for x in found.values()], axis=-1), batch

    def log_lik(
        self, path: str, values: dict[str, Array], sites: tuple[str, ...] | None = None
    ) -> Callable[[Array], Array]:
        """Log density of everything but the path itself, as a function of it; where `sites` are named, theirs alone.

        Its shape is the path's batch shape: each term is credited to the series that it belongs to, by its plates. A
        term that several series share (a sum over them, observed outside of their plate) cannot be: the axes of the
        batch that it joins have length 1. Weights that the path shares (a plate's scale) are divided out. Sites that
        nobody has drawn or observed integrate to one.
        """
        own = self.trace(values)[path]
        batch, own_scale = own["fn"].batch_shape, own["scale"]
        kept: dict[str, tuple[bool, ...]] = {}  # of each term, which of the path's batch axes it has

        def terms(z: Array) -> dict[str, Array]:
            found = {}
            for name, site in self.trace({**values, path: z}).items():
                if site["type"] != "sample" or name == path or not (site["is_observed"] or name in values):
                    continue
                if sites is not None and name not in sites:
                    continue
                term = site["fn"].log_prob(site["value"])
                scale = 1.0 if site["scale"] is None else site["scale"]
                found[name] = jnp.asarray(term * (scale / (1.0 if own_scale is None else own_scale)))
                kept[name] = _shared_axes(jnp.shape(term), site, own)
            return found

        shape, others = batch, []  # the shape of the whole; terms that are no function of the path
        if math.prod(batch) > 1:
            jax.eval_shape(terms, own["value"])
            joint = [name for name, axes in kept.items() if not all(axes)]
            depends = depends_on(lambda z: [terms(z)[name] for name in joint], own["value"]) if joint else []
            others = [name for name, found in zip(joint, depends, strict=True) if not found]
            for name in set(joint) - set(others):
                shape = tuple(size if has else 1 for size, has in zip(shape, kept[name], strict=True))
        summed = tuple(axis for axis, size in enumerate(shape) if size == 1)

        def log_lik(z: Array) -> Array:
            total = jnp.zeros(shape, z.dtype)
            for name, term in terms(z).items():
                if name not in others:
                    term = term.reshape((1,) * (len(batch) - term.ndim) + term.shape)
                    term = term.sum(tuple(range(term.ndim - len(batch))))
                    total = total + term.sum(summed, keepdims=True)
            return total

        return log_lik

    def _prepared(self, values: dict[str, Array]) -> Callable[..., Any]:
        plates = {name: {"type": "plate", "value": x} for name, x in self.indices.items()}
        model = handlers.substitute(handlers.replay(self.model, plates), data=values)
        return handlers.seed(model, jax.random.key(0))


class PathSite(NamedTuple):
    """A path's site in a run of a guide: what a posterior may use to make the path's distribution.

    Attributes:
        name: of the site.
        prefix: of the guide's parameters.
        run: the model at the guide's arguments.
        values: of the model's parameters and of the latent sites that come before.
        prior: the path's prior at these values.
        shape: of the path, `(*batch, time, state)`.
        plates: for each plate its name, dim, size and full size.
    """

    name: str
    prefix: str
    run: ModelRun
    values: dict[str, Array]
    prior: StatePath
    shape: tuple[int, ...]
    plates: tuple[tuple[str, int, int, int], ...] = ()

    def param(self, part: str, init: Callable[[Key], Array], constraint: Any = constraints.real) -> Array:
        """A parameter of the path, `{site}_{prefix}_{part}`, with axes of time, state and, for "K", rank."""
        value = jnp.asarray(numpyro.param(f"{self.name}_{self.prefix}_{part}", init, constraint=constraint))
        for plate, dim, size, full in self.plates:  # as NumPyro does it, but without its check of the size
            axis = dim - (3 if part == "K" else 2)
            if size != full and value.ndim >= -axis and value.shape[axis] == full:
                value = jnp.take(value, self.run.indices[plate], axis=axis)
        return value

    def network(self, part: str, given: Any, trainable: Any) -> Any:
        """A network of the path, with its parameters; `given` may be a dict by path."""
        own = given[self.name] if isinstance(given, dict) else given
        return register(f"{self.name}_{self.prefix}_{part}", own, trainable=trainable)

    def data(self, sites: Any) -> tuple[dict[str, Any], dict[str, int], tuple[int, ...]]:
        """For `map_batch`: the data `y` and, where there are some, the inputs `u`; their core axes; the batch shape."""
        y, batch = self.run.data(self.name, self.values, sites)
        cores = {"y": y.ndim - len(batch), "u": 2}
        return ({"y": y} if self.prior.u is None else {"y": y, "u": self.prior.u}), cores, batch

    def lengths(self, given: Callable[..., Any]) -> Array:
        """The numbers of steps `(*batch,)` that a function of the model's arguments gives for all trials."""
        count = jnp.asarray(given(*self.run.args, **self.run.kwargs), int)
        for plate, dim, size, full in self.plates:
            if size != full and count.ndim >= -dim and count.shape[dim] == full:
                count = jnp.take(count, self.run.indices[plate], axis=dim)
        batch = self.shape[:-2]
        if count.shape not in ((), batch):
            raise ValueError(f"`lengths` must give a number for each series, of shape {batch}; got {count.shape}.")
        return jnp.broadcast_to(count, batch)

    def at_mode(self, rank: int, diagonal: bool, *, start: Array | None, num_iters: int) -> Potential:
        """Potentials at the mode of the path, for the current values."""
        options = {"rank": rank, "diagonal": diagonal}

        def parts(values: dict[str, Array]) -> tuple[StatePath, Callable[[Array], Array]]:
            return self.run.path_prior(self.name, values), self.run.log_lik(self.name, values)

        still = jax.lax.stop_gradient(self.values)
        prior, log_lik = parts(still)
        if start is None:  # in the plates' shape, which the model relies on
            noise = jnp.zeros((*prior.batch_shape, prior.noise_size), prior.m0.dtype)
            start = jnp.broadcast_to(prior.path_from_noise(noise), self.shape)
        # The search itself has no gradient; the last step, at the mode, has the mode's.
        path = mode_path(prior, log_lik, start=start, num_iters=num_iters, strict=False, **options)
        return potentials_at(*parts(self.values), jax.lax.stop_gradient(path), **options)


def depends_on(fn: Callable[[Array], list[Any]], x: Array) -> list[bool]:
    """Which arrays of the result are computed from `x`: by the program, so under `jit` too.

    An equation with an inner program counts as a whole.
    """
    jaxpr = jax.make_jaxpr(fn)(x).jaxpr
    reached = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(v in reached for v in eqn.invars if not isinstance(v, Literal)):
            reached.update(eqn.outvars)
    return [not isinstance(v, Literal) and v in reached for v in jaxpr.outvars]


def _shared_axes(shape: tuple[int, ...], site: dict[str, Any], own: dict[str, Any]) -> tuple[bool, ...]:
    """For each batch axis of a path, whether a site's term of this shape has an entry for each of its series.

    An axis of the same length does not do where it is another plate's.
    """
    batch = own["fn"].batch_shape
    frames, own_frames = ({f.dim: f.name for f in s["cond_indep_stack"]} for s in (site, own))

    def has(dim: int, size: int) -> bool:
        other = dim in frames and dim in own_frames and frames[dim] != own_frames[dim]
        return size == 1 or (not other and -dim <= len(shape) and shape[dim] == size)

    return tuple(has(axis - len(batch), size) for axis, size in enumerate(batch))


def _in_series(site: dict[str, Any], own: dict[str, Any]) -> Array | None:
    """An observed site's value as `(*batch, time, ...)` of a path; None where it has no such axes.

    Plates that the path is not in are features, but for one over time where the event has no axis of time.
    """
    fn, batch, steps = site["fn"], own["fn"].batch_shape, own["fn"].event_shape[0]
    y = _hide_masked(fn, jnp.asarray(site["value"], float))
    if not all(_shared_axes(fn.batch_shape, site, own)):  # by its shape, where it has no plates that say otherwise
        return y if y.shape[: len(batch) + 1] == (*batch, steps) and not site["cond_indep_stack"] else None
    y = jnp.broadcast_to(y, fn.batch_shape + fn.event_shape)
    count = max(len(fn.batch_shape), len(batch))
    y = y.reshape((1,) * (count - len(fn.batch_shape)) + y.shape)
    own_axes = [axis + count - len(batch) for axis, size in enumerate(batch) if size > 1]
    rest = [axis for axis in range(y.ndim) if axis not in own_axes]
    events = [axis for axis in rest if axis >= count]
    times = [axis for axis in events[:1] if y.shape[axis] == steps] or [a for a in rest if y.shape[a] == steps][:1]
    if not times:
        return None
    after = [axis for axis in rest if axis != times[0] and (axis >= count or y.shape[axis] > 1)]
    dropped = [axis for axis in rest if axis != times[0] and axis not in after]
    y = jnp.transpose(y, (*own_axes, times[0], *after, *dropped))
    return y.reshape((*batch, steps, *(y.shape[len(own_axes) + 1 + i] for i in range(len(after)))))


def _hide_masked(fn: Any, y: Array) -> Array:
    """The value with NaN where a mask around its distribution says that there is nothing."""
    while isinstance(fn, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            mask = jnp.asarray(fn._mask)
            y = jnp.where(mask.reshape(mask.shape + (1,) * fn.event_dim), y, jnp.nan)
        fn = fn.base_dist
    return y
