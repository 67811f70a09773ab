"""Leave-future-out cross-validation of time-series fits, by ArviZ's `lfo_cv`."""

import warnings
from typing import Any

import arviz as az
import jax
import numpy as np
import xarray as xr
from numpyro.infer import MCMC, NUTS

from pssm._checks import check_count
from pssm._types import Key
from pssm.diagnostics.tree import to_datatree
from pssm.infer.fit import GUIDES, SVIFit, as_key, fit_svi, model_of


class _Refit(az.SamplingWrapper):
    """Refits with the future set to missing: shapes stay, so one compiled program serves every refit."""

    def __init__(self, fit: MCMC | SVIFit, tree: xr.DataTree, key: Key | int):
        model, args, self.kwargs = model_of(fit)
        super().__init__(model=model, idata_orig=tree)
        self.data, self.rest = np.array(args[0], dtype=float), args[1:]
        self.fit, self.key, self.fits, self.tree = fit, key, 0, tree
        self.seen = tree["log_likelihood"]["time"].values  # positions of the steps with data
        if isinstance(fit, MCMC):
            kernel = fit.sampler
            self.mcmc = MCMC(
                NUTS(
                    kernel.model,
                    target_accept_prob=kernel._target_accept_prob,
                    dense_mass=kernel._dense_mass,
                    max_tree_depth=kernel._max_tree_depth,
                    init_strategy=kernel._init_strategy,
                ),
                num_warmup=fit.num_warmup,
                num_samples=fit.num_samples,
                num_chains=fit.num_chains,
                chain_method=fit.chain_method,
                progress_bar=False,
                jit_model_args=True,
            )

    def sel_observations(self, idx: np.ndarray) -> tuple[Any, Any]:
        kept = self.data.copy()
        kept[self.seen[np.asarray(idx)]] = np.nan
        return kept, np.asarray(idx)

    def sample(self, modified_observed_data: np.ndarray) -> Any:
        self.fits += 1
        key = jax.random.fold_in(as_key(self.key), self.fits)
        if isinstance(self.fit, MCMC):
            self.mcmc.run(key, modified_observed_data, *self.rest, **self.kwargs)
            return self.mcmc
        return fit_svi(
            self.model,
            modified_observed_data,
            *self.rest,
            guide=next(name for name, kind in GUIDES.items() if type(self.fit.svi.guide) is kind),
            key=key,
            num_steps=len(self.fit.losses),
            optimizer=self.fit.svi.optim,
            loss=self.fit.svi.loss,
            progress_bar=False,
            **self.kwargs,
        )

    def get_inference_data(self, fitted_model: Any) -> xr.DataTree:
        # Score the whole series, the future too, under the parameters fitted to the past.
        return _rescored(fitted_model, (self.data, *self.rest))

    def log_likelihood__i(self, excluded_obs: Any, idata__i: xr.DataTree) -> xr.DataArray:
        return idata__i["log_likelihood"]["y"].isel(time=np.asarray(excluded_obs))


def _rescored(fit: MCMC | SVIFit, args: tuple[Any, ...]) -> xr.DataTree:
    """The fit's draws with the log-likelihood of the full data."""
    from pssm.diagnostics import tree as trees

    draws = trees.posterior_draws(fit)
    model, _, kwargs = model_of(fit)
    trace = trees.trace_with(model, {n: x[0, 0] for n, x in draws.items()}, *args, **kwargs)
    observed = {n: s for n, s in trace.items() if s["type"] == "sample" and s["is_observed"]}
    named = trees._site_dims(trace, draws)
    labels = trees._labels(observed, None, {})
    posterior = trees._dataset(draws, named, labels, lead=("chain", "draw"), drop=("_base",))
    likelihood = trees._log_likelihood(model, draws, observed, named, labels, args, kwargs)
    return xr.DataTree.from_dict({"/posterior": posterior, "/log_likelihood": likelihood})


def leave_future_out(
    fit: MCMC | SVIFit, *, min_observations: int | None = None, horizon: int = 1, key: Key | int = 0
) -> Any:
    """Expected log predictive density of the next `horizon` observations, each predicted from its past alone.

    ArviZ's `lfo_cv`: the posterior of the past is reached by importance weights from an earlier fit, and refitted
    where those fail. The first positional argument of the model must be the data, `(time,)` or `(time, 1)`, with NaN
    for missing: steps without data are not counted, neither in the past nor ahead.

    Args:
        fit: from `fit_nuts` or `fit_svi` (with the guides "normal" and "mvn"), states integrated out.
        min_observations: size of the first past; half of the series by default.
        horizon: how many observations ahead.
        key: random key, or a whole number, for the refits.

    Returns:
        ArviZ's `ELPDData` with `elpd`, `se`, `n_refits` and pointwise values.

    Raises:
        ValueError: `min_observations` leaves nothing to predict, or the guide is another.

    Source:
        Buerkner, Gabry & Vehtari 2020.
    """
    check_count("horizon", horizon)
    if isinstance(fit, SVIFit) and type(fit.svi.guide) not in GUIDES.values():
        raise ValueError(f"`fit` must have a guide among {list(GUIDES)}; got {type(fit.svi.guide).__name__}.")
    tree = to_datatree(fit)
    length = tree["log_likelihood"].sizes["time"]
    least = length // 2 if min_observations is None else min_observations
    if not 1 <= least < length - horizon + 1:
        raise ValueError(f"`min_observations` must be between 1 and {length - horizon}; got {least}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return az.lfo_cv(
            tree, _Refit(fit, tree, key), min_observations=least, forecast_horizon=horizon, pointwise=True, var_name="y"
        )
