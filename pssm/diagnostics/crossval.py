"""Leave-future-out cross-validation of time-series fits, by ArviZ's `lfo_cv`."""

import warnings
from collections.abc import Callable
from typing import Any

import arviz as az
import jax
import numpy as np
import xarray as xr
from numpyro.infer import MCMC

from pssm._checks import check_count, is_rounded
from pssm._keys import as_key
from pssm._types import Key, KeyLike
from pssm.diagnostics.groups import pointwise_dims, pointwise_likelihoods
from pssm.fitting.mcmc import NutsEngine
from pssm.fitting.results import SVIFit, model_of, posterior_draws
from pssm.fitting.start import GUIDES, initial_state
from pssm.inspection.axes import Axes, find_axes, holds, takes_missing
from pssm.models.scales import counts_from_origin, series

NUM_DRAWS = 4000  # of a guide
LOST = (
    'Subtract a constant from the data, or switch on 64-bit arithmetic with jax.config.update("jax_enable_x64", True).'
)


class _Refit(az.SamplingWrapper):
    """Refits with the future set to missing: shapes stay, so one compiled program serves every refit."""

    def __init__(self, fit: MCMC | SVIFit, key: KeyLike, dims: dict[str, tuple[str, ...]] | None = None):
        model, args, self.kwargs = model_of(fit)
        args, renamed = _near_zero(model, args, self.kwargs)
        axes = find_axes(model, args, self.kwargs, dims=dims, series=True)
        self.site, self.axis = _cut_along(axes, args)
        self.data, self.rest = np.array(args[0], dtype=float), args[1:]
        self.key, self.fits = key, 0
        rows = np.moveaxis(self.data, self.axis, 0)
        self.seen = np.flatnonzero(~np.isnan(rows.reshape(len(rows), -1)).all(1))  # steps with data
        self.time = pointwise_dims(axes.trace[self.site], axes.names[self.site], axes.time).index(axes.time)
        # Scores are those of the whole series, the future too, under the parameters fitted to the past.
        self.score = pointwise_likelihoods(model, (self.site,), args, self.kwargs, axes)
        self.refit = _same_svi(fit) if isinstance(fit, SVIFit) else _same_nuts(fit, self.rest, self.kwargs)
        draws = posterior_draws(fit, num_samples=NUM_DRAWS)
        above = [n for n in draws if renamed and n.endswith("_above")]
        if above and isinstance(fit, SVIFit):
            raise ValueError(f"`fit`: its guide has {above[0]!r}, which no refit has. {LOST}")
        draws |= {n.removesuffix("_above"): draws.pop(n) for n in above}
        super().__init__(model=model, idata_orig=self.get_inference_data(draws))

    def sel_observations(self, idx: np.ndarray) -> tuple[Any, Any]:
        kept = self.data.copy()
        np.moveaxis(kept, self.axis, 0)[self.seen[np.asarray(idx)]] = np.nan
        return kept, np.asarray(idx)

    def sample(self, modified_observed_data: np.ndarray) -> dict[str, Any]:
        self.fits += 1
        return self.refit(jax.random.fold_in(as_key(self.key), self.fits), modified_observed_data)

    def get_inference_data(self, fitted_model: dict[str, Any]) -> xr.DataTree:
        lead = ("chain", "draw")
        site = np.moveaxis(
            self.score(fitted_model)[self.site], 2 + self.time, 2
        )  # what is left of a step stands behind
        y = site.reshape(*site.shape[:3], -1).sum(-1)[:, :, self.seen]
        scores = xr.Dataset({"y": ((*lead, "time"), y)}, {"time": self.seen})
        posterior = {n: ((*lead, *(f"{n}_{i}" for i in range(x.ndim - 2))), x) for n, x in fitted_model.items()}
        return xr.DataTree.from_dict({"/posterior": xr.Dataset(posterior), "/log_likelihood": scores})

    def log_likelihood__i(self, excluded_obs: Any, idata__i: xr.DataTree) -> xr.DataArray:
        return idata__i["log_likelihood"]["y"].isel(time=np.asarray(excluded_obs))


def _near_zero(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], bool]:
    """The arguments with data that 32 bits hold: refits get them as 32-bit numbers. Whether something was subtracted.

    Models of pssm do not depend on where the zero of their data lies, unless they are given a `location`.
    """
    if not args or not is_rounded(args[0]):
        return args, False
    if not counts_from_origin(model, kwargs):
        raise ValueError(f"`fit`: refits have their data in 32 bits, which cannot hold this series. {LOST}")
    y = np.asarray(args[0], np.float64)
    origin = series(y, 1 if y.ndim == 1 else y.shape[-1]).origin
    return (y - (0.0 if origin is None else origin), *args[1:]), True


def _cut_along(axes: Axes, args: tuple[Any, ...]) -> tuple[str, int]:
    """The observed site that holds the first argument of the model, and the time axis of that argument."""
    site = axes.data[0] if axes.data else ""
    if not args or not site or not holds(axes.trace[site]["value"], args[0]):
        raise ValueError("`fit`: the first argument of its model must be the data, an array that one site observes.")
    if axes.time not in axes.names[site] or axes.names[site].index(axes.time) >= np.ndim(args[0]):
        raise ValueError(
            f"`fit`: the time axis of {site!r} is not known; its axes are {axes.names[site]}. Give `dims`."
        )
    others = [n for n in axes.data[1:] if n in axes.times]
    if others:
        raise ValueError(f"`fit`: the sites {others} run along time too, and their future would be known.")
    if not takes_missing(axes.trace[site]["fn"]):
        raise ValueError(
            f"`fit`: NaN in {site!r} must mean missing; write `pssm.observe` in place of `numpyro.sample`."
        )
    return site, axes.names[site].index(axes.time)


def _same_nuts(fit: MCMC, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Key, Any], dict[str, jax.Array]]:
    """`(key, data)` to posterior draws; the data are an argument of the compiled program, which serves every refit."""
    engine = NutsEngine.of(fit)[0]
    engine.init_strategy = fit.sampler._init_strategy  # pyright: ignore[reportAttributeAccessIssue]
    mcmc = engine.mcmc(progress_bar=False, jit_model_args=True)

    def refit(key: Key, data: Any) -> dict[str, jax.Array]:
        mcmc.run(key, data, *rest, **kwargs)
        return mcmc.get_samples(group_by_chain=True)

    return refit


def _same_svi(fit: SVIFit) -> Callable[[Key, Any], dict[str, jax.Array]]:
    """`(key, data)` to posterior draws: as many steps as the fit had, on other data.

    They begin at the guide's start, not at the end of the fit, which depends on the future.
    """
    svi, rest = fit.svi, fit.args[1:]
    start = initial_state(svi, jax.random.key(0), fit.args, fit.kwargs)

    @jax.jit
    def refit(key: Key, data: jax.Array) -> dict[str, jax.Array]:
        run_key, draw_key = jax.random.split(key)

        def step(state: Any, _: None) -> tuple[Any, None]:
            return svi.stable_update(state, data, *rest, **fit.kwargs)[0], None

        state = jax.lax.scan(step, start._replace(rng_key=run_key), length=len(fit.losses))[0]
        draws = svi.guide.sample_posterior(draw_key, svi.get_params(state), sample_shape=(NUM_DRAWS,))
        return {name: x[None] for name, x in draws.items()}

    return refit


def leave_future_out(
    fit: MCMC | SVIFit,
    *,
    min_observations: int | None = None,
    horizon: int = 1,
    key: KeyLike = 0,
    dims: dict[str, tuple[str, ...]] | None = None,
) -> Any:
    """Expected log predictive density of the next `horizon` observations, each predicted from its past alone.

    ArviZ's `lfo_cv`: importance weights correct an earlier fit to the posterior given the past, and the model is
    refitted where the weights are too uneven. The first positional argument of the model must be the data of one
    observed site of any name, with NaN for missing: steps without data are not counted, neither in the past nor ahead.
    Several series of one step are scored together.

    Args:
        fit: from `fit_nuts` or `fit_svi` (with the guides "normal" and "mvn"), states integrated out.
        min_observations: size of the first past; half of the series by default.
        horizon: number of observations ahead.
        key: random key, or a whole number, for the refits. Calls with equal keys, also the
            default, give equal draws.
        dims: names of the axes of sites, as in `to_datatree`, where the model does not say which axis is time.

    Returns:
        ArviZ's `ELPDData` with `elpd`, `se`, `n_refits` and pointwise values.

    Raises:
        ValueError: `min_observations` leaves no observation to predict, the guide is of another kind,
            or the data cannot be cut in time.

    Source:
        Buerkner, Gabry & Vehtari 2020.
    """
    check_count("horizon", horizon)
    if isinstance(fit, SVIFit) and type(fit.svi.guide) not in GUIDES.values():
        raise ValueError(f"`fit` must have a guide among {list(GUIDES)}; got {type(fit.svi.guide).__name__}.")
    refit = _Refit(fit, key, dims)
    length = len(refit.seen)
    least = length // 2 if min_observations is None else min_observations
    if not 1 <= least < length - horizon + 1:
        raise ValueError(f"`min_observations` must be between 1 and {length - horizon}; got {least}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return az.lfo_cv(
            refit.idata_orig, refit, min_observations=least, forecast_horizon=horizon, pointwise=True, var_name="y"
        )
