"""One model, several inference methods, one table that says which to trust."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from pssm._checks import check_choice, unmasked_arguments
from pssm._types import ArrayLike
from pssm.diagnostics import log_evidence, save_tree
from pssm.diagnostics.groups import sites_of
from pssm.storage.files import write_whole
from pssm.study.before import (
    Dims,
    Task,
    as_model,
    first_argument,
    inputs_ahead,
    inputs_by_label,
    of_frame,
    prepare,
    split_inputs,
)
from pssm.study.method_names import (
    APPROXIMATE,
    CHAINS,
    DEFAULT_METHODS,
    METHODS,
    OBJECTIVES,
    PATH_METHODS,
    POINTS,
    Settings,
)
from pssm.study.methods import MethodResult, run_method
from pssm.study.provenance import settings_of
from pssm.study.saved import Plan, StudyFolder, tree_path
from pssm.study.verdict import judge, parameter_rows
from pssm.times.labels import label_array


@dataclass
class Study:
    """The outcome of `compare`.

    Attributes:
        name: what was studied.
        model_name: the model's name.
        y: data `(time, obs)`, NaN where missing; of a panel, all series side by side.
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
        """Writes `table.csv`, `parameters.csv`, `summary.json` and one netCDF file per method into a folder.

        A netCDF file that cannot be written is named in `warnings`, and costs no other file.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        for result in self.results.values():
            try:
                save_result(result, folder)
            except Exception as error:  # the tables, the report and the other results are written all the same
                self.warnings.append(f"{result.name}: its results could not be saved: {type(error).__name__}: {error}")
        write_whole(folder / "table.csv", self.table.to_csv(index=False))
        write_whole(folder / "parameters.csv", self.parameters.to_csv(index=False))
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
        write_whole(folder / "summary.json", json.dumps(summary, indent=2))
        return folder

    def report(self, path: str | Path) -> Path:
        """Saves the study into a folder with plots and a self-contained `report.html`; returns that file's path."""
        from pssm.study.report import write_report

        return write_report(self, self.save(path))


def compare(
    model: str | Callable[..., Any],
    y: ArrayLike | Mapping[str, Any],
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
    u_future: ArrayLike | None = None,
    name: str = "",
    column: str | Sequence[str] = "y",
    args: Sequence[Any] = (),
    dims: Dims | None = None,
    out: str | Path | None = None,
    finished: dict[str, MethodResult] | None = None,
    progress: bool = True,
    **model_options: Any,
) -> Study:
    """Runs several inference methods on one model and the same data, and says which to trust.

    Before anything is sampled the model is run once, its axes are named, and a tree with these names is saved and
    loaded: what does not fit ends the study there. Later, a step that fails (a forecast, a figure) is named in the note
    of its method and costs no more than itself.

    Args:
        model: a NumPyro model whose first argument is the data, or the name of one in `pssm.models`.
        y: the model's first argument: a series `(time,)` or `(time, obs)`, a panel such as `(region, time, obs)`, or a
            dict of arrays; NaN where missing. A panel's axes are named by the model's plates, or by `dims`. A frame or
            a series of pandas brings `time` (its index) and `column` (its names) along.
        methods: among "nuts" (the model as it is: for pssm's linear models the states are integrated out),
            "nuts:states" (NUTS over the path), "nuts:transport" (the same through a fitted chain's map),
            "nuts:laplace", "nuts:variational" and "nuts:importance" (NUTS over the parameters, the path integrated out
            approximately, then corrected to exact), "nodes:variational" (the same by weighted nodes, up to four
            parameters), "svi:mvn",
            "svi:normal", and over the path "svi:chain", "svi:diagonal" (bounds) and "svi:moment_matched" (a surrogate);
            "ml" (maximum likelihood) and "map" (the mode of the posterior) give one point, and no uncertainty of the
            parameters but standard errors. The first exact one is the reference.
        seed: fixes every random choice.
        num_warmup: NUTS adaptation steps per chain.
        num_samples: NUTS draws per chain.
        num_chains: NUTS chains.
        svi_steps: optimisation steps of SVI.
        horizon: forecast steps, 0 for none.
        budget: seconds that each method may be expected to take; draws and steps are cut to it, and a method that
            cannot be cut enough is skipped. None for no limit.
        leave_future_out: estimate the expected log density of one-step forecasts (refits each method a few times).
        time: labels of the time steps, as in `to_datatree`.
        future_time: labels of the forecast steps; by default those of `time` go on, by the calendar.
        u_future: inputs of the forecast steps `(horizon, input)`, for a model with inputs `u`; by default the rows of a
            frame `u` behind those of a frame `y`. Rows of a frame are found by the labels of the steps, its columns by
            the names of `u`. Without inputs there is no forecast.
        name: what is studied, for the report.
        column: the series' name, or those of several.
        args: the model's further positional arguments.
        dims: names of the axes of sites, `{"counts": ("region", "time")}`, where the model does not say which is time.
        out: a folder in which each method's result is saved as soon as it is there; `pssm resume` goes on from it.
        finished: results of an earlier run by method, taken as they are.
        progress: show progress.
        model_options: keyword arguments of the model.

    Returns:
        A `Study`. A method that fails is in it with its error; Ctrl-C ends the running method and keeps what is done.

    Raises:
        ValueError: an unknown model or method, data that do not fit the model, labels that do not fit its axes, or a
            time axis that cannot be known: all before anything is run.

    Example:
        >>> from pssm import datasets
        >>> study = compare("local_level", datasets.load("nile").y, ["svi:mvn"], svi_steps=500, progress=False,
        ...                 leave_future_out=False)
        >>> list(study.results)
        ['svi:mvn']
    """
    time, column = of_frame(y, time, column)
    model_options, u_future = split_inputs(model, y, model_options, u_future)
    u_future = inputs_by_label(u_future, y, model_options.get("u"), horizon, time, future_time)
    (y, *args, u_future), model_options = unmasked_arguments((y, *args, u_future), model_options)
    function, model_name = as_model(model, y, args, model_options)
    methods = tuple(dict.fromkeys(methods))
    if not methods:
        raise ValueError(f"`methods` is empty; choose among {', '.join(METHODS)}.")
    for method in methods:
        check_choice("methods", method, METHODS)
    horizon, u_future, said = inputs_ahead(model_options.get("u"), u_future, horizon)
    settings = Settings(seed, num_warmup, num_samples, num_chains, svi_steps, horizon, budget, progress)
    task = prepare(
        function,
        first_argument(function, y),
        methods,
        time=time,
        future_time=future_time,
        horizon=horizon,
        column=column,
        dims=dims,
    )
    labels = {**task.labels, "u_future": u_future}
    say = _speaker(progress)
    say(f"{task.check}\n")
    fresh = finished is None
    finished = {m: r for m, r in (finished or {}).items() if m in methods}
    plan = Plan(
        function,
        jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, task.y),
        methods,
        settings,
        leave_future_out,
        labels["time"],
        labels["future_time"],
        name or model_name,
        (column,) if isinstance(column, str) else tuple(column),
        finished,
        task.dims,
        u_future,
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
            if why := task.check.methods.get(method, ""):
                result = MethodResult(method, "skipped", why, OBJECTIVES[method])
            else:
                result = run_method(method, function, task.y, settings, labels, reached)
            if leave_future_out and result.status == "done":
                _add_elpd(result, function, labels["dims"], settings)
        except KeyboardInterrupt:
            interrupted = True
            result = MethodResult(method, "interrupted", "stopped from the keyboard", OBJECTIVES[method])
        except Exception as error:  # one method must not cost the others
            result = MethodResult(method, "failed", f"{type(error).__name__}: {error}", OBJECTIVES[method])
        results[method] = result
        if folder is not None:
            result.attempt("saved results", lambda r=result: _keep(r, folder))
    done = [m for m in methods if results[m].status == "done" and results[m].tree is not None]
    exact = [m for m in done if results[m].diagnostics.get("exact", 1.0) and m in (*CHAINS, *APPROXIMATE)]
    reference = min(exact, key=lambda m: m not in CHAINS, default="")
    notes: list[str] = [*said, *task.check.warnings, *task.notes]
    evidence = _evidence(function, task, results, reference, seed)
    try:
        parameters = parameter_rows({m: results[m] for m in done}, reference)
    except Exception as error:  # the draws are there, whatever becomes of their table
        notes.append(f"No table of parameters: {type(error).__name__}: {error}")
        parameters = parameter_rows({}, reference)
    table = judge(results, reference, parameters, evidence)
    return Study(
        name,
        model_name,
        task.series,
        label_array("time", labels["time"]),
        ", ".join(task.columns),
        results,
        reference,
        table,
        parameters,
        settings_of(settings, task.y, model_name, model_options),
        notes + _warnings(results, reference),
        interrupted,
    )


def _keep(result: MethodResult, folder: StudyFolder) -> None:
    """Saves a method's results, and notes that it is finished."""
    save_result(result, folder.out)
    if result.status != "interrupted":
        folder.add(result)


def save_result(result: MethodResult, folder: Path) -> None:
    """Writes a method's tree as netCDF, named after the method with colons as dashes."""
    if result.tree is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save_tree(result.tree, tree_path(folder, result.name))


def _add_elpd(
    result: MethodResult, model: Callable[..., Any], dims: dict[str, tuple[str, ...]], settings: Settings
) -> None:
    """Leave-future-out cross-validation, where refits are affordable and steps are scored one by one."""
    from pssm.diagnostics import leave_future_out as lfo

    groups = set() if result.tree is None else set(result.tree.children)
    if result.name in POINTS:
        return  # no draws to weigh: `pssm.diagnostics.backtest` refits points
    if result.fit is None or not groups & {"forecast", "smoothed_states"} or result.name in PATH_METHODS:
        return
    if settings.budget is not None and 3 * result.seconds_run > settings.budget:
        result.add_note("No leave-future-out: refits would not fit into the budget.")
        return
    score = result.attempt("leave-future-out", lambda: lfo(result.fit, key=settings.seed + 2, dims=dims))
    if score is not None:
        result.diagnostics |= {"elpd_lfo": float(score.elpd), "elpd_lfo_se": float(score.se)}


def _evidence(
    model: Callable[..., Any], task: Task, results: dict[str, MethodResult], reference: str, seed: int
) -> tuple[float, str]:
    """The log evidence by importance sampling around the reference's draws, where its weights can be trusted."""
    numbers = results[reference].diagnostics if reference else {}
    if np.isfinite(numbers.get("log_evidence", np.nan)):
        return numbers["log_evidence"], f"weighted nodes, corrected, standard error {numbers['standard_error']:.2g}"
    tree = results[reference].tree if reference else None
    if tree is None or reference in PATH_METHODS:
        return float("nan"), ""
    draws = {n: x for n, x in sites_of(tree["posterior"]).items() if n in task.check.of_kind("latent")}
    if sum(int(np.prod(x.shape[2:])) for x in draws.values()) > 30:
        return float("nan"), "not estimated: too many parameters"
    if "ImproperUniform" in {site.distribution for site in task.check.sites}:
        return float("nan"), "not defined: a prior is improper"
    try:
        estimate = log_evidence(model, draws, task.y, key=seed + 3, num_particles=4000)
    except Exception as error:  # the draws are there, whatever becomes of this number
        return float("nan"), f"not estimated: {type(error).__name__}: {error}"
    if estimate.khat > 0.7 or not np.isfinite(estimate.log_evidence):
        return float("nan"), f"not estimated: importance weights too uneven (k-hat {estimate.khat:.2f})"
    return estimate.log_evidence, f"importance sampling, standard error {estimate.standard_error:.2g}"


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
