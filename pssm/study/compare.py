"""One model, several inference methods, one table that says which to trust."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pandas as pd

from pssm import models
from pssm._checks import check_choice
from pssm._types import ArrayLike
from pssm._version import __version__
from pssm.diagnostics import log_evidence, save_tree
from pssm.diagnostics.tree import data_digest
from pssm.fitting.model_record import describe
from pssm.fitting.results import trace_with
from pssm.study.methods import DEFAULT_METHODS, METHODS, OBJECTIVES, PATH_METHODS, MethodResult, Settings, run_method
from pssm.study.saved import Plan, StudyFolder, tree_path
from pssm.study.verdict import judge, parameter_rows


@dataclass
class Study:
    """The outcome of `compare`.

    Attributes:
        name: what was studied.
        model_name: the model's name.
        y: data `(time, obs)`, NaN where missing.
        time: labels of the time steps.
        column: the series' name, or those of several in a row.
        results: a `MethodResult` for each method, in the order asked for.
        reference: the method the others are measured against, "" if none finished.
        table: one row per method.
        parameters: one row per method and parameter: mean, sd, error against the reference in its sds, sd ratio.
        settings: what is needed to run it again.
        warnings: what the reader should know.
        interrupted: whether it was stopped before the end.
    """

    name: str
    model_name: str
    y: np.ndarray
    time: np.ndarray
    column: str
    results: dict[str, MethodResult]
    reference: str
    table: pd.DataFrame
    parameters: pd.DataFrame
    settings: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def best(self) -> str:
        """The method to use: among those judged good, the exact one with the most effective draws a second.

        Where no exact method is good, the fastest good one; "" where none is.
        """
        good = self.table.loc[self.table["level"] == "good"]
        exact = good.dropna(subset=["ess_per_second"])
        if len(exact):
            return str(exact.loc[exact["ess_per_second"].idxmax(), "method"])
        return str(good.loc[good["seconds_run"].idxmin(), "method"]) if len(good) else ""

    def save(self, path: str | Path) -> Path:
        """Writes `table.csv`, `parameters.csv`, `summary.json` and one netCDF file per method into a folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "table.csv", self.table.to_csv(index=False))
        _write(folder / "parameters.csv", self.parameters.to_csv(index=False))
        summary = {
            "schema_version": 1,
            "name": self.name,
            "model": self.model_name,
            "reference": self.reference,
            "best": self.best,
            "interrupted": self.interrupted,
            "methods": _plain(self.table.to_dict("records")),
            "parameters": _plain(self.parameters.to_dict("records")),
            "settings": _plain(self.settings),
            "warnings": self.warnings,
        }
        _write(folder / "summary.json", json.dumps(summary, indent=2))
        for result in self.results.values():
            save_result(result, folder)
        return folder

    def report(self, path: str | Path) -> Path:
        """Saves the study into a folder with plots and a self-contained `report.html`; returns that file's path."""
        from pssm.study.report import write_report

        return write_report(self, self.save(path))


def compare(
    model: str | Callable[..., Any],
    y: ArrayLike,
    methods: Iterable[str] = DEFAULT_METHODS,
    *,
    seed: int = 0,
    num_warmup: int = 1000,
    num_samples: int = 1000,
    num_chains: int = 4,
    svi_steps: int = 5000,
    horizon: int = 10,
    budget: float | None = None,
    leave_future_out: bool = True,
    time: ArrayLike | None = None,
    future_time: ArrayLike | None = None,
    name: str = "",
    column: str | Sequence[str] = "y",
    out: str | Path | None = None,
    finished: dict[str, MethodResult] | None = None,
    progress: bool = True,
    **model_options: Any,
) -> Study:
    """Runs several inference methods on one model and the same data, and says which to trust.

    Args:
        model: a NumPyro model whose first argument is the data, or the name of one in `pssm.models`.
        y: data `(time,)` or `(time, obs)`, NaN where missing.
        methods: among "nuts" (the model as it is: for pssm's linear models the states are integrated out),
            "nuts:states" (NUTS over the path), "nuts:transport" (the same through a fitted chain's map), "svi:mvn",
            "svi:normal", and over the path "svi:chain", "svi:diagonal" (bounds) and "svi:moment_matched" (a surrogate).
            The first exact one is the reference.
        seed: fixes every random choice.
        num_warmup: NUTS adaptation steps per chain.
        num_samples: NUTS draws per chain.
        num_chains: NUTS chains.
        svi_steps: optimisation steps of SVI.
        horizon: forecast steps, 0 for none.
        budget: seconds that each method may be expected to take; draws and steps are cut to it, and a method that
            cannot be cut enough is skipped. None for no limit.
        leave_future_out: estimate the expected log density of one-step forecasts (refits each method a few times).
        time: labels of the time steps.
        future_time: labels of the forecast steps.
        name: what is studied, for the report.
        column: the series' name, or those of several.
        out: a folder in which each method's result is saved as soon as it is there; `pssm resume` goes on from it.
        finished: results of an earlier run by method, taken as they are.
        progress: show progress.
        model_options: keyword arguments of the model.

    Returns:
        A `Study`. A method that fails is in it with its error; Ctrl-C ends the running method and keeps what is done.

    Raises:
        ValueError: an unknown model or method, or data that do not fit the model.

    Example:
        >>> from pssm import datasets
        >>> study = compare("local_level", datasets.load("nile").y, ["svi:mvn"], svi_steps=500, progress=False,
        ...                 leave_future_out=False)
        >>> list(study.results)
        ['svi:mvn']
    """
    function, model_name = _model(model, model_options)
    methods = tuple(dict.fromkeys(methods))
    if not methods:
        raise ValueError(f"`methods` is empty; choose among {', '.join(METHODS)}.")
    for method in methods:
        check_choice("methods", method, METHODS)
    data = np.asarray(y, dtype=float)
    data = data[:, None] if data.ndim == 1 else data
    if data.size == 0 or np.isnan(data).all():
        raise ValueError(f"`y` has no observed value (shape {data.shape}).")
    names = series_names(column, data.shape[1])
    settings = Settings(seed, num_warmup, num_samples, num_chains, svi_steps, horizon, budget, progress)
    labels = {
        "time": np.arange(len(data)) if time is None else np.asarray(time),
        "future_time": future_time,
        "coords": {"series": list(names)},
    }
    values = jnp.asarray(data)
    trace_with(function, {}, values)  # options that do not fit fail here, before anything is run or written
    say = _speaker(progress)
    fresh = finished is None
    finished = {m: r for m, r in (finished or {}).items() if m in methods}
    own_name = name or model_name
    plan = Plan(
        function, data, methods, settings, leave_future_out, labels["time"], future_time, own_name, names, finished
    )
    folder = None if out is None else StudyFolder(out, plan)

    results: dict[str, MethodResult] = {}
    interrupted = False
    for position, method in enumerate(methods, 1):
        if method in finished:
            results[method] = finished[method]
            continue
        if interrupted:
            results[method] = MethodResult(method, "skipped", "the study was interrupted before", OBJECTIVES[method])
            continue
        say(f"[{position}/{len(methods)}] {method}")
        reached = None if folder is None else folder.checkpoint(method, fresh=fresh)
        try:
            result = run_method(method, function, values, settings, labels, reached)
            if leave_future_out and result.status == "done":
                _add_elpd(result, function, data, settings)
        except KeyboardInterrupt:
            interrupted = True
            result = MethodResult(method, "interrupted", "stopped from the keyboard", OBJECTIVES[method])
        except (FloatingPointError, RuntimeError, ValueError, np.linalg.LinAlgError) as error:
            result = MethodResult(method, "failed", f"{type(error).__name__}: {error}", OBJECTIVES[method])
        results[method] = result
        if folder is not None:
            save_result(result, folder.out)
            if result.status != "interrupted":
                folder.add(result)
    done = [m for m in methods if results[m].status == "done"]
    reference = next((m for m in done if m.startswith("nuts")), "")
    evidence = _evidence(function, values, results, reference, seed)
    parameters = parameter_rows({m: results[m] for m in done}, reference)
    table = judge(results, reference, parameters, evidence)
    return Study(
        name,
        model_name,
        data,
        np.asarray(labels["time"]),
        ", ".join(names),
        results,
        reference,
        table,
        parameters,
        _settings(settings, data, model_name, model_options),
        _warnings(results, reference),
        interrupted,
    )


def series_names(column: str | Sequence[str], count: int) -> tuple[str, ...]:
    """A name for each of `count` series; one name for several is numbered."""
    if isinstance(column, str):
        return (column,) if count == 1 else tuple(f"{column} {i + 1}" for i in range(count))
    names = tuple(str(name) for name in column)
    if len(names) != count or len(set(names)) < count:
        raise ValueError(f"`column` must be {count} different names, one for each column of `y`; got {names}.")
    return names


def save_result(result: MethodResult, folder: Path) -> None:
    """Writes a method's tree as netCDF, named after the method with colons as dashes."""
    if result.tree is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save_tree(result.tree, tree_path(folder, result.name))


def _model(model: str | Callable[..., Any], options: dict[str, Any]) -> tuple[Callable[..., Any], str]:
    if isinstance(model, str):
        check_choice("model", model, models.NAMES)
        return partial(getattr(models, model), **options), model
    registered, bound, _ = describe(model) if callable(model) else (None, {}, "")
    if registered is not None and bound:  # as when it is given by name
        return partial(getattr(models, registered), **{**bound, **options}), registered
    if not callable(model):
        raise TypeError(f"`model` must be a NumPyro model or a name in pssm.models; got {type(model).__name__}.")
    name = getattr(model, "__name__", None) or getattr(getattr(model, "func", None), "__name__", "model")
    return (partial(model, **options) if options else model), name


def _add_elpd(result: MethodResult, model: Callable[..., Any], data: np.ndarray, settings: Settings) -> None:
    """Leave-future-out cross-validation, where refits are affordable and steps are scored one by one."""
    from pssm.diagnostics import leave_future_out as lfo

    if (
        result.fit is None
        or result.tree is None
        or "forecast" not in result.tree
        and "smoothed_states" not in result.tree
    ):
        return
    if result.name in PATH_METHODS:
        return
    if settings.budget is not None and 3 * result.seconds_run > settings.budget:
        result.note = f"{result.note} No leave-future-out: refits would not fit into the budget.".strip()
        return
    score = lfo(result.fit, key=settings.seed + 2)
    result.diagnostics |= {"elpd_lfo": float(score.elpd), "elpd_lfo_se": float(score.se)}


def _evidence(model, values, results: dict[str, MethodResult], reference: str, seed: int) -> tuple[float, str]:
    """The log evidence by importance sampling around the reference's draws, where its weights can be trusted."""
    tree = results[reference].tree if reference else None
    if tree is None or reference in PATH_METHODS:
        return float("nan"), ""
    draws = {str(n): x.values for n, x in tree["posterior"].data_vars.items()}
    if sum(int(np.prod(x.shape[2:])) for x in draws.values()) > 30:
        return float("nan"), "not estimated: too many parameters"
    estimate = log_evidence(model, draws, values, key=seed + 3, num_particles=4000)
    if estimate.khat > 0.7 or not np.isfinite(estimate.log_evidence):
        return float("nan"), f"not estimated: importance weights too uneven (k-hat {estimate.khat:.2f})"
    return estimate.log_evidence, f"importance sampling, standard error {estimate.standard_error:.2g}"


def _settings(settings: Settings, data: np.ndarray, model_name: str, options: dict[str, Any]) -> dict[str, Any]:
    import arviz

    return {
        "model": model_name,
        "model_options": {
            k: v if isinstance(v, int | float | str | bool | None | tuple) else str(v) for k, v in options.items()
        },
        "seed": settings.seed,
        "num_warmup": settings.num_warmup,
        "num_samples": settings.num_samples,
        "num_chains": settings.num_chains,
        "svi_steps": settings.svi_steps,
        "horizon": settings.horizon,
        "budget_seconds": settings.budget,
        "data_sha256": data_digest({"y": data}),
        "pssm": __version__,
        "numpyro": numpyro.__version__,
        "jax": jax.__version__,
        "arviz": arviz.__version__,
        "python": platform.python_version(),
        "backend": jax.default_backend(),
        "dtype": str(jnp.result_type(float)),
        "processors": os.cpu_count(),
    }


def _warnings(results: dict[str, MethodResult], reference: str) -> list[str]:
    found = [f"{r.name}: {r.note}" for r in results.values() if r.note]
    if not reference:
        found.append("No exact method finished: the approximate ones have nothing to be measured against.")
    return found


def _speaker(progress: bool) -> Callable[[str], None]:
    return (lambda text: print(text, file=sys.stderr, flush=True)) if progress else (lambda text: None)


def _plain(value: Any) -> Any:
    """JSON without NaN, which is not JSON."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def _write(path: Path, text: str) -> None:
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(text, encoding="utf-8")
    os.replace(partial_path, path)
