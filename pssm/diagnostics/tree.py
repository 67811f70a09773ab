"""Fits as ArviZ DataTrees with every dimension and coordinate named, and their files."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from numpyro.infer import MCMC

from pssm._types import ArrayLike, Key
from pssm._version import __version__
from pssm.distributions import LinearGaussianMarginal, StatePath, WithMissing
from pssm.fitting.results import SVIFit, flatten_draws, model_of, posterior_draws, trace_with
from pssm.infer.predict import QUANTILES, marginal_site, smoothed_states
from pssm.infer.predict import forecast as forecast_draws
from pssm.observed import log_prob_observed
from pssm.storage.folder import data_digest

# Names of the axes of the vector sites in pssm's own models.
SITE_DIMS = {"phi": ("lag",), "ar_partial": ("lag",), "beta": ("input",), "z": ("time", "state")}


def to_datatree(
    fit: MCMC | SVIFit,
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
    key: Key | int = 0,
) -> xr.DataTree:
    """A fit as an ArviZ DataTree; no axis is ever guessed or left unnamed.

    Groups: `posterior` (chain, draw, ...), `sample_stats` (NUTS), `log_likelihood` with one entry for each time step
    at which something was observed (`log p(y_t | y_{1:t-1}, parameters)` where the states are integrated out),
    `observed_data`, and on demand `smoothed_states` and `forecast`. Draws of an SVI fit are one chain, so that every
    ArviZ function takes the tree.

    Args:
        fit: from `fit_nuts`, `fit_svi`, or NumPyro's `MCMC` after `run`.
        model: the model that scores, smooths and forecasts; by default the one that was fitted. Give the model with
            its states integrated out where the fit sampled them.
        time: labels of the time steps; 0, 1, ... by default.
        dims: names of the axes of sites, over those worked out from plates, paths and series.
        coords: labels of axes, by axis name. Those of `state` are taken from a site with
            `infer={"state_names": (...)}`, as pssm's models have it.
        log_likelihood: add the pointwise log-likelihood.
        states: add smoothed states and signal (models with a `LinearGaussianMarginal`).
        forecast: number of steps of the forecast to add, 0 for none.
        future_time: labels of the forecast steps.
        u_future: inputs of the forecast steps.
        num_samples: number of draws from an SVI fit.
        key: random key, or a whole number.

    Returns:
        An `xarray.DataTree`.

    Raises:
        ValueError: labels of the wrong length, or states asked of a model that has none integrated out.
        TypeError: `fit` is not a fit.

    Example:
        >>> from pssm import datasets, models
        >>> from pssm.infer import fit_nuts
        >>> y = datasets.load("nile").y
        >>> mcmc = fit_nuts(models.local_level, y, num_warmup=100, num_samples=50, num_chains=2, progress_bar=False)
        >>> dict(to_datatree(mcmc)["log_likelihood"].sizes)
        {'chain': 2, 'draw': 50, 'time': 100}
    """
    fitted, args, kwargs = model_of(fit)
    draws = posterior_draws(fit, num_samples=num_samples, key=key)
    first = {name: x[0, 0] for name, x in draws.items()}
    fitted_trace = trace_with(fitted, first, *args, **kwargs)
    model = fitted if model is None else model
    trace = fitted_trace if model is fitted else trace_with(model, first, *args, **kwargs)
    named = {**_site_dims(fitted_trace, draws), **_site_dims(trace, {})}
    named |= _checked_dims(dims or {}, named)
    observed = {n: s for n, s in trace.items() if s["type"] == "sample" and s["is_observed"]}
    labels = _labels(observed, time, {**_state_names(fitted_trace), **_state_names(trace), **(coords or {})})
    tree = {"posterior": _dataset(draws, named, labels, lead=("chain", "draw"), drop=("_base",))}
    if isinstance(fit, MCMC):
        extra = fit.get_extra_fields(group_by_chain=True)
        rename = {"potential_energy": "lp", "num_steps": "n_steps", "accept_prob": "acceptance_rate"}
        stats = {rename.get(n, n): np.asarray(x) for n, x in extra.items()}
        if "lp" in stats:
            stats["lp"] = -stats["lp"]
        tree["sample_stats"] = _dataset(stats, {n: () for n in stats}, {}, lead=("chain", "draw"))
    if observed:
        data = {n: np.asarray(s["value"]) for n, s in observed.items()}
        tree["observed_data"] = _dataset(data, named, labels, lead=())
        if log_likelihood:
            tree["log_likelihood"] = _log_likelihood(model, draws, observed, named, labels, args, kwargs)
    if states:
        tree["smoothed_states"] = _state_group(model, draws, args, kwargs, labels)
    if forecast:
        tree["forecast"] = _forecast_group(model, draws, args, kwargs, forecast, future_time, u_future, key, labels)
    axes = sorted({str(name) for data in tree.values() for name in data.dims} - {"chain", "draw"})
    for name in coords or {}:
        if name not in axes:
            raise ValueError(f"`coords` has labels for {name!r}, which is no axis of this fit. Its axes: {axes}.")
    built = xr.DataTree.from_dict({f"/{group}": data for group, data in tree.items()})
    built.attrs.update(_provenance(fit, observed))
    return built


def save_tree(tree: xr.DataTree, path: str | Path) -> Path:
    """Writes a tree to netCDF (h5netcdf), whole or not at all: a temporary file is moved into place.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    tree.to_netcdf(partial, engine="h5netcdf")
    os.replace(partial, path)
    return path


def load_tree(path: str | Path) -> xr.DataTree:
    """Reads a tree written by `save_tree` into memory; equal to what was saved.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        return tree.load()


# ---------------------------------------------------------------------------------------------------------------------


def _core(fn: dist.Distribution) -> dist.Distribution:
    """The distribution inside expansions, masks and `WithMissing`; `Independent` stays."""
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | WithMissing):
        fn = fn.base if isinstance(fn, WithMissing) else fn.base_dist
    return fn


def _is_series(site: dict[str, Any]) -> bool:
    return site["type"] == "sample" and site["is_observed"] and len(site["fn"].event_shape) == 2


def _site_dims(trace: dict[str, Any], draws: dict[str, np.ndarray]) -> dict[str, tuple[str, ...]]:
    """Axis names for every site: plates by their names, paths and series as (time, ...), the rest by the site."""
    named: dict[str, tuple[str, ...]] = {}
    for name, site in trace.items():
        if site["type"] not in ("sample", "deterministic"):
            continue
        ndim = np.ndim(site["value"])
        event: tuple[str, ...] = ()
        plates = {}
        if site["type"] == "sample":
            plates = {f.dim: f.name for f in site["cond_indep_stack"]}
            fn = _core(site["fn"])
            if isinstance(fn, StatePath):
                event = ("time", "state")
            elif _is_series(site):
                event = ("time", "series")
        if not event and len(SITE_DIMS.get(name, ())) <= ndim:
            event = SITE_DIMS.get(name, ())
        missing = ndim - len(event)
        event_dim = len(site["fn"].event_shape) if site["type"] == "sample" else len(event)
        lead = []
        for axis in range(missing):
            dim = axis - (ndim - event_dim)  # negative, counted from the last batch axis
            lead.append(plates.get(dim, f"{name}_dim_{axis}"))
        named[name] = (*lead, *event)
    for name, x in draws.items():
        named.setdefault(name, tuple(f"{name}_dim_{i}" for i in range(x.ndim - 2)))
    return named


def _checked_dims(dims: dict[str, tuple[str, ...]], named: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    for name, axes in dims.items():
        if name not in named:
            raise ValueError(f"`dims` names {name!r}, which is no site of this fit. Its sites: {sorted(named)}.")
        if len(axes) != len(named[name]):
            raise ValueError(f"`dims` for {name!r} must have {len(named[name])} names; got {tuple(axes)}.")
    return {name: tuple(axes) for name, axes in dims.items()}


def _state_names(trace: dict[str, Any]) -> dict[str, ArrayLike]:
    """The labels of the states that a model gives one of its sites."""
    for site in trace.values():
        if "state_names" in (site.get("infer") or {}):
            return {"state": np.asarray(site["infer"]["state_names"])}
    return {}


def _labels(observed: dict[str, Any], time: ArrayLike | None, coords: dict[str, ArrayLike]) -> dict[str, np.ndarray]:
    labels = {name: np.asarray(x) for name, x in coords.items()}
    if time is not None:
        labels["time"] = np.asarray(time)
    for site in observed.values():
        if _is_series(site):
            length = np.shape(site["value"])[-2]
            labels.setdefault("time", np.arange(length))
            if len(labels["time"]) != length:
                raise ValueError(f"`time` must have {length} labels; got {len(labels['time'])}.")
    return labels


def _dataset(
    arrays: dict[str, np.ndarray],
    named: dict[str, tuple[str, ...]],
    labels: dict[str, np.ndarray],
    *,
    lead: tuple[str, ...],
    drop: tuple[str, ...] = (),
) -> xr.Dataset:
    variables = {n: x for n, x in arrays.items() if not any(n.endswith(end) for end in drop)}
    data = {n: ((*lead, *named[n]), x) for n, x in variables.items()}
    sizes: dict[str, int] = {}
    for dims, x in data.values():
        sizes.update(zip(dims, np.shape(x), strict=True))
    for name, label in labels.items():
        if name in sizes and len(label) != sizes[name]:
            raise ValueError(f"`coords` for {name!r} must have {sizes[name]} labels; got {len(label)}.")
    axes = {n: labels.get(n, np.arange(size)) for n, size in sizes.items()}
    return xr.Dataset(data, coords=axes)


def _pointwise(site: dict[str, Any]) -> jax.Array:
    """Log-likelihood of a site, one entry for each time step where it is a series."""
    fn, value = _core(site["fn"]), site["value"]
    if isinstance(fn, LinearGaussianMarginal):
        return fn.log_prob_steps(value)
    if isinstance(fn, dist.Independent) and fn.reinterpreted_batch_ndims == 2:
        return log_prob_observed(fn.base_dist, value).sum(-1)
    if isinstance(fn, dist.Independent) and fn.reinterpreted_batch_ndims == 1 and fn.base_dist.event_dim == 1:
        return log_prob_observed(fn.base_dist, value)
    return site["fn"].log_prob(value)


def pointwise_likelihoods(
    model: Callable[..., Any], names: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[dict[str, Any]], dict[str, np.ndarray]]:
    """A function of posterior draws `(chain, draw, ...)`: the log-likelihoods of these sites, compiled once."""

    def one(sample: dict[str, jax.Array]) -> dict[str, jax.Array]:
        trace = trace_with(model, sample, *args, **kwargs)
        return {name: _pointwise(trace[name]) for name in names}

    compiled = jax.jit(lambda s: jax.lax.map(one, s, batch_size=200))

    def of_draws(draws: dict[str, Any]) -> dict[str, np.ndarray]:
        chains, count = next(iter(draws.values())).shape[:2]
        flat = compiled(flatten_draws(draws))
        return {n: np.asarray(x).reshape(chains, count, *x.shape[1:]) for n, x in flat.items()}

    return of_draws


def _log_likelihood(model, draws, observed, named, labels, args, kwargs) -> xr.Dataset:
    arrays = pointwise_likelihoods(model, observed, args, kwargs)(draws)
    dims = {n: named[n][: x.ndim - 2] for n, x in arrays.items()}
    group = _dataset(arrays, dims, labels, lead=("chain", "draw"))
    series = [np.asarray(s["value"]) for s in observed.values() if _is_series(s)]
    if not series:
        return group
    # A step without data scores 0 for every draw, which `az.loo` refuses and counts as a data point.
    seen = np.any([~np.isnan(np.moveaxis(x, -2, 0)).reshape(x.shape[-2], -1).all(1) for x in series], axis=0)
    return group.isel(time=seen) if seen.any() else group


def _state_group(model, draws, args, kwargs, labels) -> xr.Dataset:
    moments = smoothed_states(model, draws, *args, **kwargs)
    data = {
        "mean": moments.state.mean,
        "sd": moments.state.sd,
        "signal_mean": moments.signal.mean,
        "signal_sd": moments.signal.sd,
    }
    dims = {n: ("time", "series" if n.startswith("signal") else "state") for n in data}
    return _dataset(data, dims, labels, lead=())


def _forecast_group(model, draws, args, kwargs, horizon, future_time, u_future, key, labels) -> xr.Dataset:
    f = forecast_draws(model, draws, horizon, *args, u_future=u_future, key=key, **kwargs)
    steps = np.arange(1, horizon + 1) if future_time is None else np.asarray(future_time)
    if len(steps) != horizon:
        raise ValueError(f"`future_time` must have {horizon} labels; got {len(steps)}.")
    names = [f"q{round(100 * q):02d}" for q in QUANTILES]
    data = {"mean": f.mean, "sd": f.sd, **dict(zip(names, f.quantiles, strict=True))}
    return _dataset(data, dict.fromkeys(data, ("horizon", "series")), {**labels, "horizon": steps}, lead=())


def _provenance(fit: MCMC | SVIFit, observed: dict[str, Any]) -> dict[str, str | int]:
    return {
        "schema_version": 1,
        "inference_library": "numpyro",
        "numpyro_version": numpyro.__version__,
        "jax_version": jax.__version__,
        "backend": jax.default_backend(),
        "dtype": str(jnp.result_type(float)),
        "method": "NUTS" if isinstance(fit, MCMC) else f"SVI ({type(fit.svi.guide).__name__})",
        "pssm_version": __version__,
        "data_sha256": data_digest({n: s["value"] for n, s in observed.items()}),
    }


__all__ = ["data_digest", "load_tree", "marginal_site", "save_tree", "to_datatree"]
