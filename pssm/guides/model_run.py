"""A model run inside a guide: its structure, its path priors, its likelihood as a function of the paths, its data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.distributions import constraints

from pssm._checks import check_choice
from pssm._types import Array, Key
from pssm.distributions import StatePath
from pssm.distributions.unwrap import unwrap
from pssm.linalg.potential import Potential
from pssm.modes.mode import near_mode, potentials_at
from pssm.register import register


def structure(model: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The model's trace without values and distributions: kinds, shapes and plates of its sites. Nothing is computed.

    Of a plate `args` is kept: its size and that of a subsample. `is_path` marks the `StatePath` sites.
    """
    found = {}

    def run(key: Key) -> int:
        with handlers.block():
            trace = handlers.trace(handlers.seed(model, key)).get_trace(*args, **kwargs)
        for name, site in trace.items():
            kept = {part: site.get(part) for part in ("type", "name", "is_observed", "cond_indep_stack")}
            if site["type"] == "plate":
                kept["args"] = site["args"]
            if site["type"] == "sample":
                kept["shape"] = jnp.shape(site["value"])
                kept["is_path"] = isinstance(unwrap(site["fn"])[0], StatePath)
            found[name] = kept
        return 0

    jax.eval_shape(run, jax.random.key(0))
    return found


def plates_of(sites: dict[str, dict[str, Any]], names: list[str], given: Any = ()) -> dict[str, numpyro.plate]:
    """The plates that these sites of a `structure` stand in, new ones beside the `given`; to be entered by name."""
    given = [given] if isinstance(given, numpyro.plate) else given
    plates = {plate.name: plate for plate in given}
    frames = {frame.name: frame for name in names if name in sites for frame in sites[name]["cond_indep_stack"]}
    for name, frame in sorted(frames.items()):
        if name not in plates:
            plates[name] = numpyro.plate(name, sites[name]["args"][0], dim=frame.dim, subsample_size=frame.size)
    return plates


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

    def at_mode(self, rank: int, diagonal: bool, *, start: Array | None, num_iters: int) -> Potential:
        """Potentials at the mode of the path, for the current values."""
        options = {"rank": rank, "diagonal": diagonal}

        def parts(values: dict[str, Array]) -> tuple[StatePath, Callable[[Array], Array]]:
            return self.run.path_prior(self.name, values), self.run.log_lik(self.name, values)

        # The search itself has no gradient; the last step, at the mode, has the mode's.
        path = near_mode(*parts(jax.lax.stop_gradient(self.values)), start=start, num_iters=num_iters, **options)
        return potentials_at(*parts(self.values), jax.lax.stop_gradient(path), **options)
