"""`check_model`: what a model is made of, what is odd about it, and which methods apply, before anything is run."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pssm.distributions import (
    GaussianFilterMarginal,
    HistoryMarginal,
    LinearGaussianMarginal,
    StatePath,
    WithMissing,
)
from pssm.guides.paths import FAMILIES
from pssm.inspection.axes import Axes, find_axes, innermost, is_factor, takes_missing, trace_model
from pssm.inspection.forms import path_model, sampled_model

NO_PATH = "the model has no sampled form (no `states` option, no StatePath)"
INTEGRATED = {
    LinearGaussianMarginal: "its states are integrated out exactly",
    HistoryMarginal: "its states are integrated out exactly, given the past of the series",
    GaussianFilterMarginal: "its states are integrated out by a Gaussian filter, which is an approximation",
}


@dataclass(frozen=True)
class Site:
    """One site of a model.

    Attributes:
        name: the site's name.
        kind: "latent", "observed", "deterministic", "factor", "parameter" or "plate".
        distribution: the name of the distribution, wrappers left out; "" where there is none.
        shape: the shape of its value; of a plate, its size; of a module, the number of its parameters.
        axes: names of the axes.
        missing: how many entries of an observed site are NaN.
    """

    name: str
    kind: str
    distribution: str = ""
    shape: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()
    missing: int = 0


@dataclass(frozen=True)
class ModelCheck:
    """What `check_model` found; `print` it.

    Attributes:
        name: the model's name.
        sites: the sites, in the order of the model.
        integrated_out: by observed site, how its states are integrated out.
        paths: the latent sites that are state paths.
        parameters: the sites of `numpyro.param` and of modules.
        missing: by observed site, how many entries are missing.
        time: the name of the time axis, None where it is not known.
        problems: what makes every fit fail, or its numbers wrong.
        warnings: what may be meant so, and is worth a look.
        methods: by method, why it does not apply; "" where it does.
        axes: the axes of the sites.
    """

    name: str
    sites: tuple[Site, ...]
    integrated_out: dict[str, str]
    paths: tuple[str, ...]
    parameters: tuple[str, ...]
    missing: dict[str, int]
    time: str | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    methods: dict[str, str]
    axes: Axes = field(repr=False)

    @property
    def applicable(self) -> tuple[str, ...]:
        """The methods that apply."""
        return tuple(name for name, reason in self.methods.items() if not reason)

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """The names of the sites of a kind."""
        return tuple(s.name for s in self.sites if s.kind == kind)

    def __str__(self) -> str:
        steps = "not known" if self.time is None else f"{self.time!r}, {self.axes.steps} steps"
        rows = [("site", "kind", "distribution", "shape", "axes", "missing")]
        for s in self.sites:
            shape = "x".join(map(str, s.shape)) or "scalar"
            rows.append((s.name, s.kind, s.distribution, shape, ", ".join(s.axes), str(s.missing) if s.missing else ""))
        lines = [f"Model {self.name}; time axis: {steps}", "", *_columns(rows), ""]
        lines += [f"{name}: {how}." for name, how in self.integrated_out.items()]
        lines += [f"State paths: {', '.join(self.paths)}."] if self.paths else []
        for title, found in (("Problems", self.problems), ("Worth a look", self.warnings)):
            lines += [f"{title}:", *(f"  - {text}" for text in found)] if found else []
        lines += [
            "Methods:",
            *_columns([(f"  {n}", f"no: {why}" if why else "yes") for n, why in self.methods.items()]),
        ]
        return "\n".join(lines)


def check_model(
    model: Callable[..., Any],
    *args: Any,
    dims: Mapping[str, tuple[str, ...]] | None = None,
    **kwargs: Any,
) -> ModelCheck:
    """Runs a model once, without inference, and says what it is made of, what is odd, and which methods apply.

    Args:
        model: a NumPyro model.
        args: its positional arguments, the data first.
        dims: names of the axes of sites, as in `pssm.diagnostics.to_datatree`.
        kwargs: its keyword arguments.

    Returns:
        A `ModelCheck`: `.sites`, `.integrated_out`, `.paths`, `.parameters`, `.missing`, `.time`, `.problems`,
        `.warnings`, `.methods`.

    Raises:
        Exception: what the model itself raises with these arguments.

    Example:
        >>> from pssm import datasets, models
        >>> found = check_model(models.local_level, datasets.load("nile").y)
        >>> found.integrated_out
        {'y': 'its states are integrated out exactly'}
        >>> found.methods["svi:mvn"], found.problems
        ('', ())
    """
    series = bool(args) and not isinstance(args[0], Mapping) and np.ndim(args[0]) in (1, 2)
    axes = find_axes(model, args, kwargs, dims=dims, series=series)
    trace = axes.trace
    sites = tuple(_site(name, s, axes) for name, s in trace.items() if s["type"] in _KINDS)
    latent = {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    problems, warnings = _odd_shapes(axes), []
    for name in axes.data:
        problems += _odd_values(name, trace[name])
        warnings += _odd_axes(name, trace[name], axes)
    if not axes.data:
        problems.append("no site is observed: give the model its data, and `obs=` to the site that has them.")
    if not latent:
        problems.append("no site is latent: there is nothing to infer.")
    for name, s in latent.items():
        if isinstance(innermost(s["fn"]), dist.ImproperUniform):
            warnings.append(
                f"`{name}` has an improper prior: no evidence, k-hat or prior draws; chains start between -2 and 2 in "
                "NumPyro's unconstrained space."
            )
    if axes.data and axes.time is None:
        warnings.append("the time axis is not known; name it with `dims`.")
    integrated = {}
    for name, s in trace.items():
        kind = type(innermost(s["fn"])) if s["type"] == "sample" else None
        if kind in INTEGRATED and s["is_observed"]:
            integrated[name] = INTEGRATED[kind]
    return ModelCheck(
        _name_of(model),
        sites,
        integrated,
        tuple(n for n, s in latent.items() if isinstance(innermost(s["fn"]), StatePath)),
        tuple(n for n, s in trace.items() if s["type"] == "param"),
        {n: _missing(trace[n]["value"]) for n in axes.data},
        axes.time,
        tuple(problems),
        tuple(warnings),
        _methods(model, args, kwargs, axes, latent, integrated),
        axes,
    )


# The sites

_KINDS = ("sample", "deterministic", "param", "plate")


def _site(name: str, s: dict[str, Any], axes: Axes) -> Site:
    value = s["value"]
    if s["type"] == "plate":
        return Site(name, "plate", shape=(s["args"][0],))
    if s["type"] == "param":
        leaves = jax.tree.leaves(value)
        shape = np.shape(value) if jax.tree.structure(value) == jax.tree.structure(0) else (sum(map(np.size, leaves)),)
        return Site(name, "parameter", shape=shape)
    if s["type"] == "deterministic":
        return Site(name, "deterministic", "", np.shape(value), axes.names[name])
    kind = type(innermost(s["fn"])).__name__
    if is_factor(s):
        return Site(name, "factor", "", np.shape(value)[:-1])
    if s["is_observed"]:
        return Site(name, "observed", kind, np.shape(value), axes.names[name], _missing(value))
    return Site(name, "latent", kind, np.shape(value), axes.names[name])


def _missing(value: Any) -> int:
    x = np.asarray(value)
    return int(np.isnan(x).sum()) if x.dtype.kind == "f" else 0


def _name_of(model: Any) -> str:
    while isinstance(model, partial):
        model = model.func
    return getattr(model, "__name__", type(model).__name__)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


# What is odd


def _odd_shapes(axes: Axes) -> list[str]:
    found = []
    for name in axes.data:
        fn, shape = axes.trace[name]["fn"], np.shape(axes.trace[name]["value"])
        own = (*fn.batch_shape, *fn.event_shape)
        for frame in axes.trace[name]["cond_indep_stack"]:
            place = len(shape) - len(fn.event_shape) + frame.dim
            if frame.size == 1 and 0 <= place and shape[place] > 1:
                found.append(f"`{name}`: the plate {frame.name!r} has size 1, but the data have {shape[place]} there.")
        try:
            joint = np.broadcast_shapes(shape, own)
        except ValueError:
            found.append(f"`{name}`: the data have shape {shape}, the distribution {own}; they do not fit.")
            continue
        if joint != shape and int(np.prod(joint)) > int(np.prod(shape)):
            found.append(
                f"`{name}`: data of shape {shape} are broadcast against a distribution of shape {own}, so that each "
                f"entry counts {int(np.prod(joint)) // max(int(np.prod(shape)), 1)} times. Give both the same shape."
            )
    return found


def _odd_values(name: str, s: dict[str, Any]) -> list[str]:
    fn, value = s["fn"], jnp.asarray(s["value"])
    own = (*fn.batch_shape, *fn.event_shape)
    try:
        np.broadcast_shapes(value.shape, own)
    except ValueError:
        return []  # `_odd_shapes` says so
    missing = _missing(value)
    with numpyro.validation_enabled(False):
        score = np.asarray(fn.log_prob(value))
    kind = type(innermost(fn)).__name__
    if missing and not takes_missing(fn) and not np.isfinite(score).all():
        return [
            f"`{name}` has {missing} NaN, which {kind} does not take as missing. Write "
            f'`pssm.observe("{name}", distribution, obs)` in place of `numpyro.sample`.'
        ]
    support = fn.base.support if isinstance(fn, WithMissing) else fn.support
    inside = np.asarray(True if support is None or missing else support(value))
    if not inside.all():
        return [
            f"`{name}` has {int(np.logical_not(inside).sum())} entries outside of the support of {kind} ({support})."
        ]
    return []


def _odd_axes(name: str, s: dict[str, Any], axes: Axes) -> list[str]:
    dims, shape = axes.names[name], np.shape(s["value"])
    size = dict(zip(dims, shape, strict=True))
    steps, series = size.get(axes.times.get(name, ""), 0), size.get("series", size.get(f"{name}_series", 0))
    if series > steps > 0:
        return [
            f"`{name}` has {series} series of {steps} steps: time is the axis before the last; transpose the "
            "data if that is not meant."
        ]
    return []


# Which methods apply


def _methods(model, args, kwargs, axes: Axes, latent: dict[str, Any], integrated: dict[str, str]) -> dict[str, str]:
    """By method, why it does not apply."""
    plain = trace_model(model, {}, args, kwargs)
    parts = [n for n, s in plain.items() if s["type"] == "plate" and np.shape(s["value"])[0] < s["args"][0]]
    local = [n for n in latent if any(f.name in parts for f in latent[n]["cond_indep_stack"])]
    discrete = [n for n, s in latent.items() if s["fn"].support.is_discrete]
    summed = all((latent[n].get("infer") or {}).get("enumerate") == "parallel" for n in discrete)
    common = "" if latent else "nothing is latent"
    if discrete and not summed:
        common = f"`{discrete[0]}` is discrete and not summed over: enumerate it, or integrate it out"
    chains = common
    if not common and discrete and importlib.util.find_spec("funsor") is None:
        chains = "enumeration needs funsor: pip install funsor"
    if not chains and parts:
        chains = f"NUTS needs all data at each step; the plate {parts[0]!r} takes a part"
    guides = common or ("discrete sites need TraceEnum_ELBO and a guide of your own" if discrete else "")
    path = sampled = ""
    if not chains or not guides:
        path = "" if path_model(model, *args, **kwargs) is not None else NO_PATH
        sampled = "" if sampled_model(model, *args, **kwargs) is not None else NO_PATH
    plates = {n for n, s in plain.items() if s["type"] == "plate"}
    inner = next((f.name for s in latent.values() for f in s["cond_indep_stack"] if f.name not in plates), None)
    if not guides and inner is not None:
        guides = f"NumPyro's automatic guides do not know the plate {inner!r}, which stands inside of a scan"
    mvn = f"AutoMultivariateNormal takes no part of a plate over the latent site `{local[0]}`" if local else ""
    exact = "" if "its states are integrated out exactly" in integrated.values() else "no LinearGaussianMarginal site"
    return {
        "exact marginal": exact,
        "nuts": chains,
        "nuts:states": chains or sampled,
        "nuts:transport": chains or path,
        "nuts:laplace": chains or path,
        "nuts:variational": chains or path,
        "nuts:importance": chains or path,
        "nodes:variational": chains or path,
        "svi:mvn": guides or mvn,
        "svi:normal": guides,
        **{f"svi:{family}": guides or path for family in FAMILIES},
    }
