"""Point estimates: maximum likelihood, and the mode of the posterior, with exact or approximate marginals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pssm._types import KeyLike
from pssm.fitting.fit import begin, prepared_arguments
from pssm.fitting.ml import ModeEngine, PointEngine
from pssm.fitting.point import PointFit
from pssm.infer.path_marginal import path_marginal
from pssm.inspection.forms import has_path


def fit_ml(
    model: Callable[..., Any],
    *args: Any,
    num_starts: int = 8,
    approximation: str = "laplace",
    key: KeyLike = 0,
    checkpoint: str | Path | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> PointFit:
    """Maximum likelihood: the parameters under which the observed sites of a NumPyro model are most probable.

    `max log p(y | theta)` over all latent sites. The priors give the supports and the starts, and do not enter;
    `numpyro.factor` does. Parts of a model that are integrated out count as they are: the first state of pssm's models
    keeps its wide normal prior. The climb is L-BFGS in unconstrained coordinates, in 64-bit arithmetic whatever the
    session's, then Newton's steps until the slopes are at the level of rounding. A maximum at the boundary of a support
    (a variance that is zero) is found there, exactly, and named.

    `StatePath` sites are integrated out by `path_marginal`: then the likelihood, and with it AIC and BIC, is that of
    the approximation (exact where transition and observations are linear with normal noise), and the result says so.
    Its draws are paths given the parameters, `p(z | y, theta)`.

    Args:
        model: a NumPyro model with continuous parameters, or a `path_marginal` of one.
        args: the model's positional arguments, the data first.
        num_starts: climbs, from the median of the prior and from the best of its draws.
        approximation: of the paths, if there are any, as in `path_marginal`.
        key: random key, or a whole number; the same key gives the same fit.
        checkpoint: a new folder for the ends of the climbs; `pssm.infer.resume` goes on from it.
        progress_bar: show a progress bar, and the maximum in words.
        kwargs: the model's keyword arguments.

    Returns:
        A `PointFit`: `.params`, `.log_likelihood`, `.aic`, `.aicc`, `.bic`, `.errors`, `.covariance`, `.summary()`,
        `.profile(name)`.
        `to_datatree`, `forecast`, `smoothed_states`, `sample_states` and `save` take it like any other fit, as one
        draw: its forecasts do not know how uncertain the parameters are.

    Raises:
        ValueError: a site is discrete or has an entry for every step, a plate takes a part of its data, the model has
            `numpyro.param` sites, or more unknowns than observations.

    Example:
        >>> from pssm import datasets, models
        >>> fit = fit_ml(models.local_level, datasets.load("nile").y, progress_bar=False)
        >>> round(float(fit.params["sigma_obs"]) ** 2), round(float(fit.params["sigma_level"]) ** 2)
        (15099, 1469)

    Source:
        Durbin & Koopman 2012, chapter 7.
    """
    args, kwargs, labels = prepared_arguments("fit_ml", model, args, kwargs)
    model = _integrated(model, args, kwargs, approximation)
    return begin(PointEngine(model, args, kwargs, num_starts), key, checkpoint, progress_bar, labels)


def fit_map(
    model: Callable[..., Any],
    *args: Any,
    num_starts: int = 8,
    approximation: str = "laplace",
    key: KeyLike = 0,
    checkpoint: str | Path | None = None,
    progress_bar: bool = True,
    **kwargs: Any,
) -> PointFit:
    """The mode of the posterior: `max log p(y, theta)` over all latent sites of a NumPyro model.

    The density is that of the sites as the model writes them, without a Jacobian, so the mode depends on how a model is
    written: that of a standard deviation is not the root of that of its variance. Arguments, result and errors as in
    `fit_ml` (the same key gives the same fit); standard errors are those of Laplace's approximation.

    Example:
        >>> from pssm import datasets, models
        >>> fit = fit_map(models.local_level, datasets.load("nile").y, progress_bar=False)
        >>> bool(fit.log_joint < fit.log_likelihood)
        True
    """
    args, kwargs, labels = prepared_arguments("fit_map", model, args, kwargs)
    model = _integrated(model, args, kwargs, approximation)
    return begin(ModeEngine(model, args, kwargs, num_starts), key, checkpoint, progress_bar, labels)


def _integrated(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], approximation: str
) -> Callable[..., Any]:
    """The model, with its paths integrated out if it has any."""
    if hasattr(model, "posterior") or not has_path(model, args, kwargs):
        return model
    return path_marginal(model, approximation=approximation)
