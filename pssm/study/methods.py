"""The inference methods that a study runs side by side: one function each, from model and data to a labelled result."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpyro
import xarray as xr
from numpyro.infer import MCMC
from numpyro.infer.autoguide import AutoMultivariateNormal
from numpyro.infer.util import initialize_model

from pssm.diagnostics.bound import elbo_and_khat
from pssm.diagnostics.tree import build_tree
from pssm.fitting.point import LIKELIHOOD, MODE
from pssm.fitting.results import record_of
from pssm.guides import AutoStateSpace
from pssm.guides.paths import BOUND, FAMILIES, SURROGATE
from pssm.infer import (
    PointFit,
    SVIFit,
    fit_map,
    fit_ml,
    fit_nuts,
    fit_svi,
    load,
    one_step_probabilities,
    posterior_draws,
    resume,
    transport_reparam,
)
from pssm.infer.task import marginal_site
from pssm.inspection.axes import trace_model
from pssm.inspection.check import NO_PATH
from pssm.inspection.forms import path_model, sampled_model
from pssm.storage.folder import MANIFEST, FitFolder

PATH_GUIDES = {f"svi:{family}": f"AutoStateSpace ({family.replace('_', '-')})" for family in FAMILIES}
GUIDE_NAMES = {"svi:mvn": "AutoMultivariateNormal", "svi:normal": "AutoNormal"} | PATH_GUIDES
POINTS = ("ml", "map")  # one point, without uncertainty of the parameters
METHODS = ("nuts", "nuts:states", "nuts:transport", *GUIDE_NAMES, *POINTS)
PATH_METHODS = ("nuts:states", "nuts:transport", *PATH_GUIDES)  # the path is among their unknowns
DEFAULT_METHODS = ("nuts", "nuts:states", "svi:mvn", "svi:normal")
OBJECTIVES = (
    {"nuts": "exact posterior (Markov chain), states integrated out where the model allows"}
    | {"nuts:states": "exact posterior (Markov chain), states sampled in non-centred form"}
    | {"nuts:transport": "exact posterior (Markov chain), states sampled through the map of a fitted chain"}
    | dict.fromkeys(GUIDE_NAMES, BOUND)
    | {"svi:moment_matched": SURROGATE}
    | {"ml": LIKELIHOOD, "map": MODE}
)
KNOWN = "Its forecast and its states take the parameters as known."


@dataclass(frozen=True)
class Settings:
    """How much work each method may do.

    Attributes:
        seed: one whole number fixes every random choice.
        num_warmup: NUTS adaptation steps per chain.
        num_samples: NUTS draws per chain.
        num_chains: NUTS chains.
        svi_steps: optimisation steps.
        horizon: forecast steps, 0 for none.
        budget: seconds a method may be expected to take before its draws or steps are cut; None for no limit.
        progress: show progress bars.
    """

    seed: int = 0
    num_warmup: int = 1000
    num_samples: int = 1000
    num_chains: int = 4
    svi_steps: int = 5000
    horizon: int = 10
    budget: float | None = None
    progress: bool = True


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
    fit: MCMC | SVIFit | PointFit | None = None

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
    settings, result.note, possible = within_budget(name, fitted_model, y, settings, **kwargs)
    if not possible:
        result.status = "skipped"
        return result
    start, clock = time.perf_counter(), CompileClock()
    try:
        with clock:
            fit = _fit(name, fitted_model, y, settings, checkpoint, **kwargs)
    except ValueError as error:
        if name not in POINTS or not str(error).startswith("`model`"):
            raise
        result.status, result.note = "skipped", str(error)  # the model has no such maximum
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
    elif isinstance(fit, PointFit):
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
) -> MCMC | SVIFit | PointFit:
    """The fit; Ctrl-C, which the fits survive with what they have, ends the method."""
    fit = _run_fit(name, model, y, settings, checkpoint, **kwargs)
    if record_of(fit).ended == "interrupted":
        raise KeyboardInterrupt
    return fit


def _run_fit(
    name: str, model: Callable[..., Any], y: Any, settings: Settings, checkpoint: Path | None, **kwargs: Any
) -> MCMC | SVIFit | PointFit:
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # they are in the note
            return (fit_ml if name == "ml" else fit_map)(model, y, **common)
    if guide is not None:
        return fit_svi(model, y, guide=guide, num_steps=settings.svi_steps, **common)
    return fit_nuts(
        model,
        y,
        num_warmup=settings.num_warmup,
        num_samples=settings.num_samples,
        num_chains=settings.num_chains,
        target_accept_prob=0.9,
        **common,
    )


def within_budget(
    name: str, model: Callable[..., Any], y: Any, settings: Settings, **kwargs: Any
) -> tuple[Settings, str, bool]:
    """Settings cut so that the method is expected to stay within the budget: `(settings, what was cut, possible)`.

    The expectation is the measured time of one gradient times a typical number of gradients. With the path among
    NUTS's unknowns that number grows with its length, up to NUTS's limit (1023 for each draw), but not where the path
    is sampled through a fitted chain. A point estimate takes a few climbs and is never cut.
    """
    if settings.budget is None or name in POINTS:
        return settings, "", True
    info = initialize_model(jax.random.key(0), model, model_args=(y,), model_kwargs=kwargs)
    gradient = jax.jit(jax.value_and_grad(info.potential_fn))
    z = info.param_info.z
    jax.block_until_ready(gradient(z))
    start = time.perf_counter()
    for _ in range(3):
        jax.block_until_ready(gradient(z))
    each = (time.perf_counter() - start) / 3
    if name in GUIDE_NAMES:
        cost = settings.svi_steps * 8 * each
        if cost <= settings.budget:
            return settings, "", True
        steps = int(settings.svi_steps * settings.budget / cost)
        if steps < 500:
            return settings, f"expected to take {cost / 60:.0f} minutes; raise the budget", False
        return (
            replace(settings, svi_steps=steps),
            f"Steps cut from {settings.svi_steps} to {steps} by the budget.",
            True,
        )
    unknowns = sum(int(np.size(x)) for x in z.values())
    leapfrogs = {"nuts:states": min(max(unknowns, 100), 1023), "nuts:transport": 30}.get(name, 12)
    per_iteration = leapfrogs * each * settings.num_chains
    total = settings.num_warmup + settings.num_samples
    if total * per_iteration <= settings.budget:
        return settings, "", True
    chains = min(settings.num_chains, 2)
    share = settings.budget / (leapfrogs * each * chains)
    if share < 300:
        return settings, f"expected to take {total * per_iteration / 60:.0f} minutes; raise the budget", False
    warmup = int(min(settings.num_warmup, share / 2))
    samples = int(min(settings.num_samples, share - warmup))
    note = (
        f"Cut by the budget from {settings.num_chains} x ({settings.num_warmup} + {settings.num_samples}) "
        f"to {chains} x ({warmup} + {samples}) warm-up steps and draws."
    )
    return replace(settings, num_chains=chains, num_warmup=warmup, num_samples=samples), note, True


class CompileClock:
    """Adds up the seconds that XLA compiles while the block runs, from JAX's own event stream."""

    _running: list["CompileClock"] = []
    _listening = False

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> "CompileClock":
        if not CompileClock._listening:
            jax.monitoring.register_event_duration_secs_listener(CompileClock._hear)
            CompileClock._listening = True
        CompileClock._running.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        CompileClock._running.remove(self)

    @staticmethod
    def _hear(event: str, seconds: float, **_: Any) -> None:
        if event.endswith(("backend_compile_duration", "jaxpr_to_mlir_module_duration", "jaxpr_trace_duration")):
            for clock in CompileClock._running:
                clock.seconds += seconds
