"""Fits as ArviZ DataTrees with every dimension and coordinate named, and their files."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import xarray as xr

from pssm._types import ArrayLike, KeyLike
from pssm._version import __version__
from pssm.diagnostics.groups import (
    LEAD,
    Namer,
    observed_points,
    pointwise,
    pointwise_likelihoods,
)
from pssm.diagnostics.tree_files import load_tree, save_tree
from pssm.fitting.results import Fit, FitRecord, posterior_draws, record_of
from pssm.guides.plates import WholePlates
from pssm.infer.predict import QUANTILES, smoothed_states
from pssm.infer.predict import forecast as forecast_draws
from pssm.infer.task import marginal_site, states_of
from pssm.inspection.axes import Axes, find_axes, is_path_noise
from pssm.storage.folder import data_digest
from pssm.times.grid import future_labels
from pssm.times.labels import label_array

Attempt = Callable[[str, Callable[[], xr.Dataset]], xr.Dataset | None]


def to_datatree(
    fit: Fit,
    *,
    model: Callable[..., Any] | None = None,
    time: ArrayLike | None = None,
    dims: dict[str, tuple[str, ...]] | None = None,
    coords: dict[str, ArrayLike] | None = None,
    log_likelihood: bool = True,
    states: bool = False,
    forecast: int = 0,
    future_time: ArrayLike | None = None,
    u_future: ArrayLike | None = None,
    num_samples: int = 4000,
    key: KeyLike = 0,
) -> xr.DataTree:
    """A fit as an ArviZ DataTree; no axis is ever guessed or left unnamed.

    Groups: `posterior` (chain, draw, ...), `sample_stats` (NUTS), `log_likelihood` with one entry for each time step
    at which something was observed (`log p(y_t | y_{1:t-1}, parameters)` where the states are integrated out),
    `observed_data`, and on demand `smoothed_states` and `forecast` of every site with states. Where single entries
    were not observed, as in a panel with ragged ends, the scores of the others stand on an axis `<site>_point`. Draws
    of an SVI fit are one chain, so that every ArviZ function takes the tree. The name of the time axis is in the
    attribute `time_axis`. A site whose name no file can hold is renamed ("/" becomes ".", the name of an axis gets
    "_"); its own name is in its attribute `site`.

    Args:
        fit: from `fit_nuts`, `fit_svi`, or NumPyro's `MCMC` after `run`.
        model: the model that scores, smooths and forecasts the draws; by default the one that was fitted. One with its
            states integrated out makes scores, states and forecast of sampled states exact given the parameters.
        time: labels of the time steps: dates (`DatetimeIndex`, `PeriodIndex`, datetime64, `datetime.date`), numbers or
            texts; by default the index of the frame that was fitted, or 0, 1, ... A period is labelled by its start, a
            time with a zone in UTC.
        dims: names of the axes of sites, `{"counts": ("region", "time")}`, over those that are worked out from
            plates, paths, scans and series. The name "time" makes an axis that of time.
        coords: labels of axes, by axis name. Those of the states of a site are taken from its
            `infer={"state_names": (...)}`, as pssm's models have it.
        log_likelihood: add the pointwise log-likelihood.
        states: add smoothed states and signal, as `pssm.infer.smoothed_states` has them.
        forecast: number of steps of the forecast to add, as of `pssm.infer.forecast`; 0 for none.
        future_time: labels of the forecast steps; by default those of `time` go on, by the calendar. Where these are
            not equally spaced, the steps are numbered 1, 2, ..., with a warning.
        u_future: inputs of the forecast steps.
        num_samples: number of draws from an SVI fit.
        key: random key, or a whole number; the default too is the same in each call, and gives the same draws.

    Returns:
        An `xarray.DataTree`.

    Raises:
        ValueError: labels of the wrong length, a time axis that is not known, or states asked of a model without.
        TypeError: `fit` is not a fit.

    Example:
        >>> from pssm import datasets, models
        >>> from pssm.infer import fit_nuts
        >>> y = datasets.load("nile").y
        >>> mcmc = fit_nuts(models.local_level, y, num_warmup=100, num_samples=50, num_chains=2, progress_bar=False)
        >>> dict(to_datatree(mcmc)["log_likelihood"].sizes)
        {'chain': 2, 'draw': 50, 'time': 100}
    """
    built = build_tree(
        fit,
        lambda what, make: make(),
        model=model,
        time=time,
        dims=dims,
        coords=coords,
        log_likelihood=log_likelihood,
        states=states,
        forecast=forecast,
        future_time=future_time,
        u_future=u_future,
        num_samples=num_samples,
        key=key,
    )
    check_coords(built, coords)
    return built


def build_tree(
    fit: Fit,
    attempt: Attempt,
    *,
    model: Callable[..., Any] | None = None,
    time: ArrayLike | None = None,
    dims: dict[str, tuple[str, ...]] | None = None,
    coords: dict[str, ArrayLike] | None = None,
    log_likelihood: bool = True,
    states: bool = False,
    forecast: int = 0,
    future_time: ArrayLike | None = None,
    u_future: ArrayLike | None = None,
    num_samples: int = 4000,
    key: KeyLike = 0,
) -> xr.DataTree:
    """`to_datatree`, with each group after the draws made through `attempt(name, make)`, which may return None."""
    record = record_of(fit)
    args, kwargs, scorer = record.args, record.kwargs, record.model if model is None else model
    fitted = record.model
    if record.params:  # a model's own parameters have the values that were fitted
        fitted, scorer = (numpyro.handlers.substitute(m, data=record.params) for m in (fitted, scorer))
    if record.labels is not None and time is None:
        time = record.labels.time
    if forecast and future_time is None and time is not None:
        future_time = future_labels(time, forecast)
    with WholePlates():
        draws = posterior_draws(fit, num_samples=num_samples, key=key)
        axes = _axes_of(fitted, scorer, args, kwargs, draws, dims, series=time is not None)
        names = Namer(axes, {**_columns(axes, record.labels), **_labels(axes, time, coords)})
        own = {n: x for n, x in draws.items() if not is_path_noise(axes.trace.get(n))}
        own |= _in_64_bits(draws, axes)
        tree = {"posterior": names.dataset(own, LEAD)}
        if record.stats:
            tree["sample_stats"] = names.dataset(stats := _stats(record.stats), LEAD, dims=dict.fromkeys(stats, ()))
        run = _Run(scorer, args, kwargs, draws, axes, names, fit if model is None else None)
        if axes.data:
            tree["observed_data"] = names.dataset({n: np.asarray(axes.trace[n]["value"]) for n in axes.data})
        wanted = {
            "log_likelihood": (bool(axes.data) and log_likelihood, run.log_likelihood),
            "smoothed_states": (states, run.states),
            "forecast": (forecast, lambda: run.forecast(forecast, future_time, u_future, key)),
        }
        for group, (asked, make) in wanted.items():
            made = attempt(group, make) if asked else None
            if made is not None:
                tree[group] = made
    built = xr.DataTree.from_dict({f"/{group}": data for group, data in tree.items()})
    built.attrs.update(_provenance(record, axes))
    return built


def rehearse(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    dims: dict[str, tuple[str, ...]] | None = None,
    time: ArrayLike | None = None,
    coords: dict[str, ArrayLike] | None = None,
    horizon: int = 0,
    future_time: ArrayLike | None = None,
) -> xr.DataTree:
    """The tree that a fit of this model will have, with one draw of zeros, saved and loaded: all that can fail, fails.

    Raises:
        ValueError: names, axes or labels do not fit.
    """
    axes = find_axes(model, args, kwargs, dims=dims, series=time is not None)
    names = Namer(axes, _labels(axes, time, coords))
    unknown = {n: s["value"] for n, s in axes.trace.items() if n in axes.names and n not in axes.data}
    tree = {"posterior": names.dataset({n: np.zeros((1, 1, *np.shape(x))) for n, x in unknown.items()}, LEAD)}
    if axes.data:
        tree["observed_data"] = names.dataset({n: np.asarray(axes.trace[n]["value"]) for n in axes.data})
        shapes = {
            n: jax.eval_shape(lambda n=n: pointwise(axes.trace[n], axes.names[n], axes.times.get(n))).shape
            for n in axes.data
        }
        scores = observed_points({n: np.zeros((1, 1, *shape)) for n, shape in shapes.items()}, axes, names)
        tree |= {} if scores is None else {"log_likelihood": scores}
    if horizon:
        steps = {"horizon": _future(horizon, future_time)}
        tree["forecast"] = names.dataset({"mean": np.zeros(horizon)}, dims={"mean": ("horizon",)}, labels=steps)
    built = xr.DataTree.from_dict({f"/{group}": data for group, data in tree.items()})
    check_coords(built, coords)
    with tempfile.TemporaryDirectory() as folder:
        load_tree(save_tree(built, Path(folder) / "rehearsal.nc"))
    return built


def check_coords(tree: xr.DataTree, coords: dict[str, ArrayLike] | None) -> None:
    """Refuses labels of an axis that no group has."""
    axes = sorted({str(name) for group in tree.children.values() for name in group.dims} - {*LEAD})
    for name in coords or {}:
        if name not in axes:
            raise ValueError(f"`coords` has labels for {name!r}, which is no axis of this fit. Its axes: {axes}.")


# ---------------------------------------------------------------------------------------------------------------------


def _axes_of(fitted, scorer, args, kwargs, draws, dims, *, series: bool) -> Axes:
    """The axes of the sites of both models, and of draws that are no sites."""
    first = {name: x[0, 0] for name, x in draws.items()}
    axes = find_axes(fitted, args, kwargs, values=first, dims=dims, series=series)
    if scorer is not fitted:
        other = find_axes(scorer, args, kwargs, values=first, dims=dims, series=series)
        axes = other._replace(
            names={**axes.names, **other.names},
            trace={**axes.trace, **other.trace},
            states={**axes.states, **other.states},
            times={**axes.times, **other.times},
        )
    for name, x in draws.items():
        axes.names.setdefault(name, tuple(f"{name}_dim_{i}" for i in range(x.ndim - 2)))
    for name in dims or {}:
        if name not in axes.names:
            raise ValueError(f"`dims` names {name!r}, which is no site of this fit. Its sites: {sorted(axes.names)}.")
    return axes


def _labels(axes: Axes, time: ArrayLike | None, coords: dict[str, ArrayLike] | None) -> dict[str, np.ndarray]:
    """Labels of axes: names of states and of series that a model gives its sites, those of `coords`, and of time."""
    labels = {}
    for name, site in axes.trace.items():
        holder = name.removesuffix("_base") if is_path_noise(site) else name
        if "state_names" in (site.get("infer") or {}) and axes.states.get(holder) not in (None, *labels):
            labels[axes.states[holder]] = np.asarray(site["infer"]["state_names"])
        for axis, own in ((site.get("infer") or {}).get("coords") or {}).items():
            labels.setdefault(axis, np.asarray(own))
    labels |= {name: label_array(f"coords[{name!r}]", x) for name, x in (coords or {}).items()}
    if time is not None:
        if axes.time is None:
            raise ValueError(f"`time` has labels, but {no_time_axis(axes)}")
        labels[axes.time] = label_array("time", time)
        if axes.steps is not None and len(labels[axes.time]) != axes.steps:
            raise ValueError(f"`time` must have {axes.steps} labels; got {len(labels[axes.time])}.")
    return labels


def _columns(axes: Axes, labels: Any) -> dict[str, np.ndarray]:
    """The names of a frame's columns as labels of the axis of the series in the data."""
    if labels is None or labels.columns is None or not axes.data:
        return {}
    site = axes.data[0]
    sizes = dict(zip(axes.names[site], np.shape(axes.trace[site]["value"]), strict=True))
    fitting = (a for a in ("series", f"{site}_series") if sizes.get(a) == len(labels.columns))
    return {axis: np.asarray(labels.columns) for axis in list(fitting)[:1]}


def no_time_axis(axes: Axes) -> str:
    """Says that the time axis of the data is not known, and what to do."""
    if not axes.data:
        return "the model observes nothing: give it data."
    name = axes.data[0]
    shape, known = np.shape(axes.trace[name]["value"]), axes.names[name]
    shown = ", ".join("?" if a.startswith(f"{name}_dim_") else a for a in known)
    example = tuple("time" if i == len(known) - 1 else f"axis{i}" for i in range(len(known)))
    return (
        f"which axis of the observed site {name!r} is time cannot be known from the model: its shape is {shape}, its "
        f'axes are ({shown}). Name them, as in `dims={{{name!r}: {example}}}`, or call the plate over time "time".'
    )


def _in_64_bits(draws: dict[str, np.ndarray], axes: Axes) -> dict[str, np.ndarray]:
    """Draws that are counted from an origin, with the origin: 32 bits do not hold the sum."""
    found = {}
    for name, site in axes.trace.items():
        infer = site.get("infer") or {}
        if "above" in infer and name in draws:
            public, origin = infer["above"]
            found[public] = np.asarray(draws[name], np.float64) + origin.reshape(np.shape(draws[name])[2:])
        if "origin" in infer and (z := name.removesuffix("_base")) in draws:
            found[z] = np.asarray(draws[z], np.float64) + infer["origin"]
    return found


def _stats(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rename = {"potential_energy": "lp", "num_steps": "n_steps", "accept_prob": "acceptance_rate"}
    stats = {rename.get(n, n): np.asarray(x) for n, x in found.items()}
    return {n: -x if n == "lp" else x for n, x in stats.items()}


def _future(horizon: int, future_time: ArrayLike | None) -> np.ndarray:
    steps = np.arange(1, horizon + 1) if future_time is None else label_array("future_time", future_time)
    if len(steps) != horizon:
        raise ValueError(f"`future_time` must have {horizon} labels; got {len(steps)}.")
    return steps


class _Run(NamedTuple):
    """What the groups after the draws are made from."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    draws: dict[str, Any]
    axes: Axes
    names: Namer
    fit: Any = None  # whose states are meant; None where another model scores the draws

    def log_likelihood(self) -> xr.Dataset | None:
        """Pointwise log-likelihoods of what was observed."""
        axes = self.axes
        scores = pointwise_likelihoods(self.model, axes.data, self.args, self.kwargs, axes)(self.draws)
        return observed_points(scores, axes, self.names)

    def states(self) -> xr.Dataset:
        """Smoothed states of every path and series that has some, and the signal of every observed site with states."""
        data, dims = {}, {}
        sites, holders = self._with_states()
        for of, end in (*holders.items(), *sites.items()):
            if self.fit is None:
                found = smoothed_states(self.model, self.draws, *self.args, site=of, **self.kwargs)
            else:
                found = smoothed_states(self.fit, site=of)
            if of in holders and (end := holders[of]) is not None:
                state = self.names.axes.get(self.axes.states.get(of, "state"), "state")
                data |= {f"mean{end}": found.state.mean, f"sd{end}": found.state.sd}
                dims |= dict.fromkeys((f"mean{end}", f"sd{end}"), (*self.names.dims[of][:-1], state))
            if of in sites and (end := sites[of]) is not None:
                data |= {f"signal_mean{end}": found.signal.mean, f"signal_sd{end}": found.signal.sd}
                dims |= dict.fromkeys((f"signal_mean{end}", f"signal_sd{end}"), self.names.dims[of])
        return self.names.dataset(data, dims=dims)

    def forecast(self, horizon: int, future_time: Any, u_future: Any, key: Any) -> xr.Dataset:
        """Moments and quantiles of the steps after the data, of each observed site with states."""
        labels = {"horizon": _future(horizon, future_time)}
        data, dims = {}, {}
        for site, end in self._with_states()[0].items():
            options = {"u_future": u_future, "key": key, "site": site}
            if self.fit is None:
                f = forecast_draws(self.model, self.draws, horizon, *self.args, **options, **self.kwargs)
            else:
                f = forecast_draws(self.fit, horizon, **options)
            found = {"mean": f.mean, "sd": f.sd}
            found |= {f"q{round(100 * q):02d}": x for q, x in zip(QUANTILES, f.quantiles, strict=True)}
            data |= {f"{name}{end}": x for name, x in found.items()}
            dims |= dict.fromkeys((f"{name}{end}" for name in found), self._ahead(site))
        return self.names.dataset(data, dims=dims, labels=labels)

    def _with_states(self) -> tuple[dict[str, str], dict[str, str]]:
        """The observed sites with states, and the sites that have these: with the endings of their names in a group."""
        found = (
            states_of(self.model, self.draws, *self.args, **self.kwargs) if self.fit is None else states_of(self.fit)
        )
        sites, holders = (list(dict.fromkeys(x)) for x in zip(*found, strict=True)) if found else ([], [])
        sites.sort(key=self.axes.data.index)
        return tuple(
            {n: f"_{self.names.variables[n]}" if len(names) > 1 else "" for n in names} for names in (sites, holders)
        )

    def _ahead(self, site: str) -> tuple[str, ...]:
        """The axes of a site's forecast: the horizon in the place of time."""
        own = self.axes.names[site]
        time = self.axes.times.get(site, own[-2])
        return tuple("horizon" if a == time else x for a, x in zip(own, self.names.dims[site], strict=True))


def _provenance(record: FitRecord, axes: Axes) -> dict[str, str | int]:
    time = {} if axes.time is None else {"time_axis": axes.time.replace("/", ".")}
    return {
        "schema_version": 1,
        "inference_library": "numpyro",
        "numpyro_version": numpyro.__version__,
        "jax_version": jax.__version__,
        "backend": jax.default_backend(),
        "dtype": str(jnp.result_type(float)),
        "method": record.method,
        "objective": record.objective,
        "pssm_version": __version__,
        "data_sha256": data_digest({n: axes.trace[n]["value"] for n in axes.data}),
        **time,
    }


__all__ = ["build_tree", "data_digest", "load_tree", "marginal_site", "rehearse", "save_tree", "to_datatree"]
