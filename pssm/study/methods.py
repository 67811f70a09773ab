"""The inference methods that a study runs side by side: one function each, from model and data to a labelled result."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpyro
import xarray as xr
from numpyro.infer import MCMC
from numpyro.infer.autoguide import AutoMultivariateNormal

from pssm.diagnostics.bound import elbo_and_khat
from pssm.diagnostics.tree import build_tree
from pssm.fitting.results import record_of
from pssm.guides import AutoStateSpace
from pssm.infer import (
    CorrectedFit,
    PointFit,
    SVIFit,
    corrected,
    fit_map,
    fit_ml,
    fit_nuts,
    fit_svi,
    load,
    nodes,
    one_step_probabilities,
    path_marginal,
    posterior_draws,
    resume,
    transport_reparam,
)
from pssm.infer.task import marginal_site
from pssm.inspection.axes import trace_model
from pssm.inspection.check import NO_PATH
from pssm.inspection.forms import has_path, path_model, sampled_model
from pssm.storage.folder import MANIFEST, FitFolder
from pssm.study.budget import within_budget
from pssm.study.clock import CompileClock
from pssm.study.method_names import APPROXIMATE, GUIDE_NAMES, KNOWN, OBJECTIVES, PATH_METHODS, POINTS, Settings


@dataclass
class MethodResult:
    """One method's outcome.

    Attributes:
        name: the method.
        status: "done", "skipped", "failed" or "interrupted".
        note: why, or what was cut.
        objective: what the method computes, in words: exact, a bound, an estimate.
        tree: posterior, log-likelihood, smoothed states, forecast.
        losses: SVI losses.
        seconds_compile: time XLA spent compiling.
        seconds_run: the rest of the fit's time.
        verdict: one sentence.
        level: "good", "check" or "bad".
        diagnostics: numbers by name.
        fit: the NumPyro result itself.
    """

    name: str
    status: str = "done"
    note: str = ""
    objective: str = ""
    tree: xr.DataTree | None = None
    losses: np.ndarray | None = None
    seconds_compile: float = float("nan")
    seconds_run: float = float("nan")
    verdict: str = ""
    level: str = "check"
    diagnostics: dict[str, float] = field(default_factory=dict)
    fit: MCMC | SVIFit | PointFit | CorrectedFit | None = None

    def add_note(self, text: str) -> None:
        """Adds a sentence to the note."""
        self.note = f"{self.note} {text}".strip()

    def attempt(self, what: str, make: Callable[[], Any]) -> Any:
        """What `make()` returns; where it fails, None, and the note says that there is no `what`, and why."""
        try:
            return make()
        except Exception as error:  # hours of sampling must not be lost to what comes after them
            self.add_note(f"No {what.replace('_', ' ')}: {type(error).__name__}: {error}")
            return None


def run_method(
    name: str,
    model: Callable[..., Any],
    y: Any,
    settings: Settings,
    labels: dict[str, Any],
    checkpoint: Path | None = None,
    **kwargs: Any,
) -> MethodResult:
    """Runs one method; a method that cannot run on this model is "skipped", with the reason.

    What follows the fit (the groups of its tree, its diagnostics) is tried step by step: a step that fails is named in
    the note, and the result keeps the fit and the rest.

    Args:
        name: one of `METHODS`.
        model: a NumPyro model whose first argument is the data.
        y: data, the model's first argument.
        settings: how much work to do.
        labels: `time`, `future_time`, `coords`, `dims` and `u_future` for the result's axes.
        checkpoint: a folder for what a run has reached; it goes on from there if there is something.
        kwargs: the model's keyword arguments.

    Returns:
        A `MethodResult` without its verdict, which needs the reference method.

    Raises:
        Exception: as the fit raises it.
    """
    result = MethodResult(name, objective=OBJECTIVES[name])
    fitted_model = model_of_method(name, model, y, **kwargs)
    if fitted_model is None:
        result.status, result.note = "skipped", NO_PATH
        return result
    if name in APPROXIMATE or (name in POINTS and has_path(model, (y,), kwargs)):
        fitted_model = path_marginal(fitted_model, approximation=APPROXIMATE.get(name, "laplace"))
    settings, result.note, possible = within_budget(name, fitted_model, y, settings, **kwargs)
    if not possible:
        result.status = "skipped"
        return result
    start, clock = time.perf_counter(), CompileClock()
    try:
        with clock:
            fit = _fit(name, fitted_model, y, settings, checkpoint, **kwargs)
    except ValueError as error:
        if name not in (*POINTS, *APPROXIMATE) or not str(error).startswith(("`model`", "`approximation`")):
            raise
        result.status, result.note = "skipped", str(error)  # the model has no such maximum, or approximation
        return result
    result.fit = fit
    result.seconds_compile = min(clock.seconds, time.perf_counter() - start)
    result.seconds_run = time.perf_counter() - start - result.seconds_compile
    if isinstance(fit, SVIFit):
        result.losses = np.asarray(fit.losses)
        result.objective = fit.objective
        if fit.is_bound:
            found = result.attempt("ELBO and k-hat", lambda: elbo_and_khat(fit, key=settings.seed + 1))
            result.diagnostics |= dict(zip(("elbo", "elbo_se", "khat"), found or (), strict=False))
        else:
            ended = -result.losses[-len(result.losses) // 10 :].mean()
            result.add_note(f"Its objective ended at {ended:.2f}: no bound.")
        if not fit.converged:
            result.add_note(f"Not converged: {fit.message}")
    elif isinstance(fit, CorrectedFit):
        names = ("exact", "khat", "efficiency", "effective_draws", "log_weight_sd", "path_sd", "log_evidence")
        result.diagnostics |= {n: float(getattr(fit, n)) for n in (*names, "standard_error", "divergences")}
        result.objective = fit.objective
        result.add_note(f"Corrected {fit.message}")
        result.add_note(" ".join(fit.warnings))
    elif isinstance(fit, PointFit):
        result.objective = fit.objective
        names = ("log_likelihood", "log_joint", "aic", "bic", "converged")
        result.diagnostics |= {n: float(getattr(fit, n)) for n in names}
        result.add_note(" ".join([KNOWN, *(text[:1].upper() + text[1:] for text in fit.warnings)]))
        if fit.at_boundary:
            result.add_note(f"At the boundary of their support: {', '.join(fit.at_boundary)}.")
    else:
        result.diagnostics["divergences"] = float(np.sum(fit.get_extra_fields()["diverging"]))
    exact = marginal_site(trace_model(model, {}, (y,), kwargs)) is not None
    has_states = exact or path_model(model, y, **kwargs) is not None
    result.tree = result.attempt(
        "labelled results",
        lambda: build_tree(
            fit,
            result.attempt,
            model=model if exact else None,
            time=labels.get("time"),
            coords=labels.get("coords"),
            dims=labels.get("dims"),
            states=has_states,
            forecast=settings.horizon if has_states else 0,
            future_time=labels.get("future_time"),
            u_future=labels.get("u_future"),
            key=settings.seed,
        ),
    )
    if isinstance(fit, PointFit) and result.tree is not None:
        result.attempt("standard errors", lambda: _add_errors(result.tree, fit))
    if exact:
        coverage = result.attempt("coverage of the forecasts", lambda: _coverage(fit, model, y, kwargs))
        result.diagnostics["coverage90"] = float("nan") if coverage is None else coverage
    return result


def _add_errors(tree: Any, fit: PointFit) -> None:
    """The group `standard_errors` beside the one draw of a point estimate."""
    posterior = tree["posterior"].to_dataset().isel(chain=0, draw=0, drop=True)
    sites = {n: str(x.attrs.get("site", n)) for n, x in posterior.data_vars.items()}
    errors = {
        n: x.copy(data=np.reshape(fit.errors[sites[n]], x.shape))
        for n, x in posterior.items()
        if sites[n] in fit.errors
    }
    tree["standard_errors"] = xr.DataTree(xr.Dataset(errors))


def _coverage(fit: Any, model: Callable[..., Any], y: Any, kwargs: dict[str, Any]) -> float:
    """How often the central 90 % of one-step forecasts held what came, after as many steps as there are states."""
    exact: Any = marginal_site(trace_model(model, {}, (y,), kwargs))
    draws = posterior_draws(fit, num_samples=400)
    p = np.asarray(one_step_probabilities(model, draws, y, site=exact[0], **kwargs))
    p = np.moveaxis(p, -2, 0).reshape(p.shape[-2], -1)
    first = exact[1].ssm.n_state
    seen = np.flatnonzero(~np.isnan(p).all(1))[first:]
    inside = (p[seen] > 0.05) & (p[seen] < 0.95)
    return float(inside[~np.isnan(p[seen])].mean()) if seen.size else float("nan")


def model_of_method(name: str, model: Callable[..., Any], y: Any, **kwargs: Any) -> Callable[..., Any] | None:
    """The form of the model that a method fits: as it is, or with its path sampled; None where it has no such form."""
    if name not in PATH_METHODS:
        return model
    return (sampled_model if name == "nuts:states" else path_model)(model, y, **kwargs)


def _fit(
    name: str, model: Callable[..., Any], y: Any, settings: Settings, checkpoint: Path | None, **kwargs: Any
) -> MCMC | SVIFit | PointFit | CorrectedFit:
    """The fit; Ctrl-C, which the fits survive with what they have, ends the method."""
    with warnings.catch_warnings():
        if name in (*POINTS, *APPROXIMATE):
            warnings.simplefilter("ignore", UserWarning)  # they are in the note
        fit = _run_fit(name, model, y, settings, checkpoint, **kwargs)
        if record_of(fit).ended != "interrupted" and name in APPROXIMATE:
            fit = corrected(fit, key=settings.seed, progress_bar=settings.progress)
    if record_of(fit).ended == "interrupted":
        raise KeyboardInterrupt
    return fit


def _run_fit(
    name: str, model: Callable[..., Any], y: Any, settings: Settings, checkpoint: Path | None, **kwargs: Any
) -> MCMC | SVIFit | PointFit | CorrectedFit:
    guide: Any = name.removeprefix("svi:") if name in GUIDE_NAMES else None
    given = {}
    if name == "svi:chain":  # the potentials follow the parameters, so the parameters' spread is not understated
        guide = AutoStateSpace(model, rank=4, potentials="mode", global_guide=AutoMultivariateNormal)
        given = {"guide": guide}
    if name == "nuts:transport":
        steps = min(1000, settings.svi_steps)  # a map need not have converged
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="SVI has not converged")
            fitted = fit_svi(model, y, guide="chain", key=settings.seed, num_steps=steps, progress_bar=False, **kwargs)
        model = transport_reparam(numpyro.handlers.substitute(model, data=fitted.params), fitted.svi.guide)
    if checkpoint is not None and (checkpoint / MANIFEST).is_file():
        complete = FitFolder.open(checkpoint).manifest.get("complete") is True
        options = {"args": (y,), "kwargs": kwargs, **given}
        if complete:
            return load(checkpoint, model, **options)
        return resume(checkpoint, model, progress_bar=settings.progress, **options)
    common = {"checkpoint": checkpoint, "key": settings.seed, "progress_bar": settings.progress, **kwargs}
    if name in POINTS:
        return (fit_ml if name == "ml" else fit_map)(model, y, **common)
    if name.startswith("nodes"):
        return nodes(model, y, num_samples=settings.num_samples, **common)
    if guide is not None:
        return fit_svi(model, y, guide=guide, num_steps=settings.svi_steps, **common)
    return fit_nuts(
        model,
        y,
        num_warmup=settings.num_warmup,
        num_samples=settings.num_samples,
        num_chains=settings.num_chains,
        target_accept_prob=0.9,
        dense_mass=name in APPROXIMATE,  # the parameters alone
        **common,
    )
