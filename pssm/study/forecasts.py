"""`pssm forecast` and `pssm resume`: what can be done with a saved study, or a saved fit, later."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pssm import plots
from pssm._checks import check_choice
from pssm.diagnostics.groups import sites_of
from pssm.fitting.results import model_of
from pssm.infer import forecast, load, posterior_draws
from pssm.infer.predict import QUANTILES
from pssm.inspection.axes import find_axes
from pssm.storage.files import whole_file
from pssm.study.before import series_of
from pssm.study.compare import Study, compare
from pssm.study.saved import is_study, load_plan
from pssm.times.grid import future_labels
from pssm.times.labels import label_array

NAMES = [f"q{round(100 * q):02d}" for q in QUANTILES]


def forecast_saved(
    path: str | Path, horizon: int | None = None, *, method: str | None = None, seed: int = 0
) -> tuple[pd.DataFrame, xr.DataTree, str]:
    """A forecast from a saved study or a saved fit of a model of `pssm.models`, without running any inference.

    Args:
        path: folder of the results of `pssm.compare`, or of `pssm.infer.save`.
        horizon: steps; by default as the study's, or a tenth of the series.
        method: which of a study's methods (see `best_method`); by default the first that is done.
        seed: of the random draws.

    Returns:
        A table with one row for each step and series (mean, sd, quantiles), a tree with data and forecast for
        `pssm.plots.plot_states`, and the method's name.

    Raises:
        FileNotFoundError: there is neither a study nor a fit.
        ValueError: the method has no result, the model needs inputs, or its states cannot be integrated out.
    """
    if is_study(path):
        plan = load_plan(path)
        finished = {n: r for n, r in plan.finished.items() if r.status == "done" and r.tree is not None}
        done = [n for n in plan.methods if n in finished]
        if not done:
            raise ValueError(f"`path` {path}: no method of this study is finished; see `pssm resume`.")
        method = done[0] if method is None else method
        check_choice("method", method, done)
        tree: Any = plan.finished[method].tree
        draws: dict[str, Any] = sites_of(tree["posterior"])
        model, data, time, kwargs, column, dims = plan.model, plan.y, plan.time, {}, plan.column, plan.dims
        horizon, ahead = horizon or plan.settings.horizon, plan.u_future
        if ahead is not None and len(ahead) < horizon:
            raise ValueError(
                f"`horizon` must be at most {len(ahead)}, the steps whose inputs are known; got {horizon}."
            )
    else:
        fit = load(path)
        model, args, kwargs = model_of(fit)
        if not args or np.ndim(args[0]) not in (1, 2):
            raise ValueError(f"`path` {path}: the first argument of its model is no series.")
        data, time, column, dims = np.asarray(args[0], float).reshape(len(args[0]), -1), None, "y", None
        ahead = None
        draws, method = posterior_draws(fit, num_samples=1000), "NUTS" if hasattr(fit, "sampler") else "SVI"
    y, columns, _ = series_of(find_axes(model, (data,), kwargs, dims=dims, series=True), column)
    series = list(columns)
    time = np.arange(len(y)) if time is None else time
    horizon = horizon or max(10, len(y) // 10)
    found = forecast(
        model, draws, horizon, data, u_future=None if ahead is None else ahead[:horizon], key=seed, **kwargs
    )
    future = label_array("time", future_labels(time, horizon))
    time = label_array("time", time)
    moments = {"mean": found.mean, "sd": found.sd, **dict(zip(NAMES, found.quantiles, strict=True))}
    rows = {n: np.moveaxis(np.asarray(x), -2, 0).reshape(horizon, -1) for n, x in moments.items()}
    group = xr.Dataset({n: (("horizon", "series"), x) for n, x in rows.items()}, {"horizon": future, "series": series})
    past = xr.Dataset({"y": (("time", "series"), y)}, {"time": time, "series": series})
    table = group.to_dataframe().reset_index().rename(columns={"horizon": "time"})
    return table, xr.DataTree.from_dict({"/observed_data": past, "/forecast": group}), method


def best_method(path: str | Path) -> str | None:
    """The method that a finished study recommends, if it still has its result; None where there is none."""
    if not is_study(path) or not (Path(path) / "summary.json").is_file():
        return None
    try:
        best = json.loads((Path(path) / "summary.json").read_text(encoding="utf-8")).get("best")
    except (ValueError, AttributeError, RecursionError):
        return None
    return best if isinstance(best, str) and best else None


def write_forecast(table: pd.DataFrame, tree: xr.DataTree, title: str, out: str | Path) -> Path:
    """Writes `forecast.csv` and `forecast.png` into a folder, which is made if need be."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    figure = plots.plot_states(tree, title=title)
    for name, write in (
        ("forecast.csv", lambda path: table.to_csv(path, index=False)),
        ("forecast.png", lambda path: figure.savefig(path, format="png", dpi=120)),
    ):
        with whole_file(out / name) as partial:
            write(partial)
    return out


def resume_study(path: str | Path, *, model: Any = None, progress: bool = True) -> Study:
    """Runs the methods of a saved study that are not finished, and writes the whole report anew.

    Args:
        path: folder of the results of `pssm.compare(..., out=path)`.
        model: the model, if it is none of `pssm.models`.
        progress: show progress.

    Returns:
        The `Study`; what was finished is in it as it was, without running again.

    Raises:
        FileNotFoundError: there is no saved study.
        ValueError: nothing is left to do.
    """
    plan = load_plan(path, model)
    if all(n in plan.finished for n in plan.methods):
        raise ValueError(f"`path` {path}: all {len(plan.methods)} methods are finished; nothing is left to do.")
    settings = {**asdict(plan.settings), "progress": progress}
    return compare(
        plan.model,
        plan.y,
        plan.methods,
        **settings,
        leave_future_out=plan.leave_future_out,
        time=plan.time,
        future_time=plan.future_time,
        name=plan.name,
        column=plan.column,
        dims=plan.dims,
        u_future=plan.u_future,
        out=path,
        finished=plan.finished,
    )
