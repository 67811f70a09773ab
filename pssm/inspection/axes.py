"""The axes of a model's sites, found out from one trace: plates, state paths, scans, series; never from sizes alone."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow.scan import scan_wrapper
from numpyro.primitives import Messenger

from pssm.distributions import (
    ConditionedPath,
    GaussianFilterMarginal,
    HistoryMarginal,
    ImputedSeries,
    LinearGaussianMarginal,
    LinearGaussianPosterior,
    LowRankChain,
    LowRankMomentMatched,
    StatePath,
    WithMissing,
)
from pssm.guides.plates import WholePlates
from pssm.inspection.named import TIME, Kind, name_axes, plate_names, settle_time, state_axes

# Distributions whose event is (time, ...), declared so by their kind.
PATHS = (StatePath, ConditionedPath, LinearGaussianPosterior, LowRankChain, LowRankMomentMatched)
SERIES = (LinearGaussianMarginal, HistoryMarginal, GaussianFilterMarginal, ImputedSeries)
NUMPYRO_PATHS = (dist.EulerMaruyama, dist.GaussianRandomWalk, dist.GaussianStateSpace)


class Axes(NamedTuple):
    """The axes of a model.

    Attributes:
        trace: the model's trace, plates whole.
        names: the axes of every sampled and deterministic site; an axis that is not known is `<site>_dim_<position>`.
        data: the observed sites, that which holds the first argument of the model in front.
        time: the name of the time axis of the data, or None where it is not known.
        states: the name of the axis of the states, by the site that has them: a path, or a series whose states are
            integrated out.
        times: the name of the time axis of each site that has one; another than `time` where it has other steps.
    """

    trace: dict[str, Any]
    names: dict[str, tuple[str, ...]]
    data: tuple[str, ...]
    time: str | None
    states: dict[str, str]
    times: dict[str, str]

    @property
    def steps(self) -> int | None:
        """The number of time steps, where the time axis is known."""
        for name in (*self.data, *self.names):
            if self.time in self.names[name]:
                return np.shape(self.trace[name]["value"])[self.names[name].index(self.time)]
        return None


class _Scans(Messenger):
    """Notes which sites stand in a NumPyro `scan`."""

    def __init__(self) -> None:
        super().__init__(None)
        self.names: set[str] = set()

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "control_flow" and msg["fn"] is scan_wrapper:
            self.names |= set(msg["value"][1][0].trace)


def takes_missing(fn: Any) -> bool:
    """Whether NaN entries of a site's value are missing entries: `observe`, or a distribution that says so."""
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        fn = fn.base_dist
    return isinstance(fn, WithMissing) or getattr(fn, "understands_missing", False)


def core(fn: Any) -> Any:
    """The distribution inside expansions, masks and `WithMissing`; `Independent` stays."""
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | WithMissing):
        fn = fn.base if isinstance(fn, WithMissing) else fn.base_dist
    return fn


def innermost(fn: Any) -> Any:
    """The distribution inside all wrappers, `Independent` too."""
    fn = core(fn)
    return innermost(fn.base_dist) if isinstance(fn, dist.Independent) else fn


def find_axes(
    model: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    values: Mapping[str, Any] | None = None,
    dims: Mapping[str, tuple[str, ...]] | None = None,
    series: bool = False,
) -> Axes:
    """The sites of a model and the names of their axes.

    An axis has the name of its plate. Time is: the first axis of what stands in a `scan`; the axis of a `StatePath`
    and of the distributions of whole series; the axis before the last of an observed event of two or more axes
    (`.to_event(2)`), by the library's rule; the plate "time", unless the sites in it have another time; and each axis
    along which a site follows a path step by step: a change of one step of the path changes that entry alone.

    Every path has its own axis of states and every observed site its own axis of series. The first is called "state" or
    "series", a further one `<site>_state` or `<site>_series`; so does time of another length. A plate keeps its name,
    but "chain", "draw" and "horizon", and a "time" that is not that of the data, get "_" at their end.

    Args:
        model: a NumPyro model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        values: values of latent sites.
        dims: names of the axes of sites, which are taken as they are, but for a "time" of other steps than the data's;
            names of other sites are passed over. The axis that is known to be time may have any name.
        series: the first argument of the model is known to be a series `(time,)` or `(time, obs)`: a site that holds
            it has these axes, where the model itself does not say otherwise.

    Returns:
        An `Axes`.

    Raises:
        ValueError: `dims` does not fit the sites.
    """
    kwargs = dict(kwargs or {})
    scans = _Scans()
    with WholePlates(), scans:
        trace = trace_model(model, dict(values or {}), args, kwargs)
    sites = {n: s for n, s in trace.items() if s["type"] in ("sample", "deterministic") and not is_factor(s)}
    last = _dims_of_sites(sites)
    found = {n: _declared(n, s, trace, n in scans.names, last.get(n, ())) for n, s in sites.items()}
    shapes = {n: np.shape(s["value"]) for n, s in sites.items()}
    paths = [n for n, axes in found.items() if ("state", n) in axes]
    _follow_paths(model, args, kwargs, trace, found)
    settle_time(found, shapes)
    data = _data_sites(sites, args)
    for name in sites:
        if f"{name}_observed" in sites and None in found[name]:  # NumPyro's `obs_mask`
            found[name] = list(found[f"{name}_observed"])
        if _is_event_series(sites[name]) and TIME not in found[name]:
            found[name][-2:] = [a or b for a, b in zip(found[name][-2:], (TIME, ("series", name)), strict=True)]
        if name in data and TIME in found[name] and found[name].count(None) == 1 and _kinds(found[name])["series"] == 0:
            found[name][found[name].index(None)] = ("series", name)
    if series and data and args and holds(sites[data[0]]["value"], args[0]):
        _as_series(found[data[0]], data[0])
    given = _checked(dims or {}, shapes)
    plates = plate_names(n for n, s in trace.items() if s["type"] == "plate")
    of_time = {"time", *(f"{n}_time" for n in sites)}
    for name, own in given.items():
        known = [None if a == TIME and of_time & {*own} else a for a in found[name]]
        kinds = [TIME if a in of_time else ("plate", plates[a]) if a in plates else ("named", a) for a in own]
        found[name] = [k if k == TIME else a or k for a, k in zip(known, kinds, strict=True)]
    columns = next((("series", n) for n in data if ("series", n) in found[n]), ("named", "series"))
    for name, axes in found.items():  # sites with an entry for each series, as their model says
        found[name] = [columns if axis == ("named", "series") else axis for axis in axes]
    time: Kind | None = TIME if any(TIME in found[n] for n in data) else None
    if time is None and series and data and len(found[data[0]]) == 1 and found[data[0]][0] is not None:
        time = found[data[0]][0]  # the plate over the steps of the one series
    if time is None and any(TIME in axes for axes in found.values()) and not data:
        time = TIME
    names = name_axes(found, shapes, given, first=data)
    times = {n: names[n][found[n].index(time)] for n in sites if time is not None and time in found[n]}
    integrated = [n for n, s in sites.items() if s["type"] == "sample" and isinstance(innermost(s["fn"]), SERIES)]
    return Axes(
        trace,
        {n: names[n] for n in sites},
        data,
        next((times[n] for n in (*data, *sites) if n in times), None),
        state_axes(names, paths, integrated),
        times,
    )


def is_factor(site: dict[str, Any]) -> bool:
    """Whether a site is `numpyro.factor`, which observes nothing."""
    return site["type"] == "sample" and isinstance(innermost(site["fn"]), dist.Unit)


def trace_model(
    model: Callable[..., Any], values: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A trace with these values; a site that cannot be drawn gets a value of its support."""

    def start(site: dict[str, Any]) -> Any:
        improper = site["type"] == "sample" and isinstance(core(site["fn"]), dist.ImproperUniform)
        return core(site["fn"]).support.feasible_like(jnp.zeros(site["fn"].shape())) if improper else None

    values = {name: jnp.asarray(x) for name, x in values.items()}  # a scan takes no NumPy arrays
    started = handlers.substitute(handlers.substitute(model, substitute_fn=start), data=values)
    return handlers.trace(handlers.seed(started, jax.random.key(0))).get_trace(*args, **kwargs)


def _dims_of_sites(sites: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Names of the last axes of sites, which a model gives in the `infer={"dims": {site: names}}` of a sample site."""
    found = {}
    for name, site in sites.items():
        scope = name.rpartition("/")[0]
        for other, axes in (site.get("infer") or {}).get("dims", {}).items():
            found[f"{scope}/{other}" if scope else other] = tuple(axes)
    return found


def is_path_noise(site: dict[str, Any] | None) -> bool:
    """Whether a site is the noise that drives a path, whose values are a deterministic site of their own."""
    return site is not None and bool((site.get("infer") or {}).get("path_noise"))


def _declared(
    name: str, site: dict[str, Any], trace: dict[str, Any], in_scan: bool, own: tuple[str, ...]
) -> list[Kind | None]:
    """What the kind of a site says of its axes; None for the others. `own` are the names of its last axes."""
    ndim = np.ndim(site["value"])
    axes: list[Kind | None] = [None] * ndim
    path: list[Kind | None] = [TIME, ("state", name)]
    frames = {f.dim: f for f in site.get("cond_indep_stack") or ()}
    event_dim = 0
    if site["type"] == "sample":
        event_dim = len(site["fn"].event_shape)
        inner = innermost(site["fn"])
        if isinstance(inner, PATHS):
            axes[-2:] = path
        elif isinstance(inner, SERIES):
            axes[-2:] = [TIME, ("series", name)]
        elif isinstance(inner, NUMPYRO_PATHS):
            axes[ndim - inner.event_dim :] = path[: inner.event_dim]
    else:
        event_dim = _event_of(np.shape(site["value"]), frames)
        if is_path_noise(trace.get(f"{name}_base")):
            axes[-2:] = path
    if own and ndim >= len(own) and not any(axes):
        axes[ndim - len(own) :] = [("named", a) for a in own]
        event_dim = max(event_dim, len(own))
    for dim, frame in frames.items():
        place = ndim - event_dim + dim
        if event_dim >= 0 and place >= 0 and axes[place] is None:
            axes[place] = ("plate", frame.name)
    if in_scan and ndim and axes[0] is None:
        axes[0] = TIME
    return axes


def _event_of(shape: tuple[int, ...], frames: dict[int, Any]) -> int:
    """How many axes of a deterministic value stand behind its plates; -1 where that is not certain."""
    fits = [
        k
        for k in range(len(shape) + 1)
        if all(len(shape) - k + d >= 0 and shape[len(shape) - k + d] == f.size for d, f in frames.items())
    ]
    return fits[0] if len(fits) == 1 else -1


def _is_event_series(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and site["is_observed"] and len(site["fn"].event_shape) >= 2


def holds(value: Any, data: Any) -> bool:
    """Whether a site's value is the data, up to an axis of length 1 at the end."""
    if isinstance(data, Mapping) or not np.ndim(data):
        return False
    a, b = np.asarray(value), np.asarray(data)
    if a.size != b.size or a.shape not in (b.shape, (*b.shape, 1)) and (*a.shape, 1) != b.shape:
        return False
    return np.array_equal(a.ravel().astype(float), b.ravel().astype(a.dtype).astype(float), equal_nan=True)


def _data_sites(sites: dict[str, Any], args: tuple[Any, ...]) -> tuple[str, ...]:
    observed = [n for n, s in sites.items() if s["type"] == "sample" and s["is_observed"]]
    first = [n for n in observed if args and holds(sites[n]["value"], args[0])]
    return (*first[:1], *(n for n in observed if n not in first[:1]))


def _as_series(axes: list[Kind | None], name: str) -> None:
    """Names the axes of a series `(time,)` or `(time, obs)` that have none."""
    if TIME in axes or len(axes) > 2 or axes[0] is not None:
        return
    axes[0] = TIME
    if len(axes) == 2 and axes[1] is None:
        axes[1] = ("series", name)


def _kinds(axes: list[Kind | None]) -> Counter[str]:
    return Counter(axis[0] for axis in axes if axis is not None)


def _checked(dims: Mapping[str, tuple[str, ...]], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    sizes: dict[str, int] = {}
    for name, axes in dims.items():
        if name not in shapes:
            continue
        shape = shapes[name]
        if isinstance(axes, str) or len(axes) != len(shape) or len(set(axes)) < len(axes):
            raise ValueError(
                f"`dims` for {name!r} must have {len(shape)} names; got {axes!r}, and the shape is {shape}. One name "
                "for each axis, no two alike."
            )
        for axis, size in zip(axes, shape, strict=True):
            if axis != "time" and sizes.setdefault(axis, size) != size:
                raise ValueError(
                    f"`dims` for {name!r} calls an axis of {size} entries {axis!r}, which has {sizes[axis]} entries at "
                    "another site; give it a name of its own."
                )
    return {name: tuple(axes) for name, axes in dims.items() if name in shapes}


# Which axes follow a path


def _follow_paths(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    trace: dict[str, Any],
    found: dict[str, list[Kind | None]],
) -> None:
    """Names the axes along which sites follow a sampled path: a change of one step moves that entry and no other."""
    paths = [
        n for n, axes in found.items() if trace[n]["type"] == "sample" and not trace[n]["is_observed"] and TIME in axes
    ]
    targets = [n for n, axes in found.items() if None in axes and n not in paths]
    latent = {n: s["value"] for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    noise = {n: trace[n]["fn"].sample(jax.random.key(1)) for n in targets if trace[n]["type"] == "sample"}
    for path in paths if targets else ():
        value, axis = jnp.asarray(latent[path], float), found[path].index(TIME)
        length = value.shape[axis]
        wanted = [n for n in targets if TIME not in found[n] and length in np.shape(trace[n]["value"])]
        if length < 3 or not wanted:
            continue

        def entries(x: jax.Array, path: str = path, wanted: list[str] = wanted) -> dict[str, jax.Array]:
            with WholePlates():
                run = trace_model(model, {**latent, path: x}, args, kwargs)
            return {
                n: _entry_scores(run[n]["fn"], noise[n]) if n in noise else jnp.asarray(run[n]["value"], float)
                for n in wanted
            }

        moved = []
        for step in (length // 3, length - 1 - length // 4):
            place = (jnp.arange(length) == step).reshape([-1 if i == axis else 1 for i in range(value.ndim)])
            tangent = jnp.where(place, 1.0 + jax.random.uniform(jax.random.key(step), value.shape, value.dtype), 0.0)
            try:
                moved.append((step, jax.jvp(entries, (value,), (tangent,))[1]))
            except (NotImplementedError, TypeError, ValueError):  # a site that cannot be differentiated stays unknown
                break
        for name in wanted if len(moved) == 2 else ():
            _name_followed(found[name], [(step, np.asarray(change[name])) for step, change in moved])


def _name_followed(axes: list[Kind | None], moved: list[tuple[int, np.ndarray]]) -> None:
    def follows(k: int) -> bool:
        for step, change in moved:
            where = np.flatnonzero((change != 0).any(tuple(i for i in range(change.ndim) if i != k)))
            if where.tolist() != [step]:
                return False
        return True

    along = [k for k, axis in enumerate(axes[: moved[0][1].ndim]) if axis is None and follows(k)]
    if len(along) == 1:
        axes[along[0]] = TIME


def _entry_scores(fn: Any, value: Any) -> jax.Array:
    """Log densities entry by entry, with the axes of the value (but those of a joint event)."""
    inner = innermost(fn)
    scores = inner.log_prob(value)
    return jnp.broadcast_to(scores, (*np.shape(value)[: np.ndim(value) - inner.event_dim],))
