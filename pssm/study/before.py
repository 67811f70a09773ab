"""Before the first step of a study: the model runs once, and names, axes, labels and files are tried out."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from pssm import models
from pssm._checks import check_choice, is_rounded
from pssm._types import ArrayLike
from pssm.diagnostics.tree import no_time_axis, rehearse
from pssm.inspection.axes import Axes
from pssm.inspection.check import ModelCheck, check_model
from pssm.models.registry import describe
from pssm.study.method_names import POINTS
from pssm.study.methods import model_of_method
from pssm.times.frames import inputs_of_steps, steps_ahead
from pssm.times.grid import labels_after, uneven
from pssm.times.labels import (
    FrameLabels,
    as_labels,
    check_increasing,
    check_same_index,
    column_names,
    frame_labels,
)

Dims = Mapping[str, Sequence[str]]


class Task(NamedTuple):
    """A model and its data, ready to be fitted.

    Attributes:
        model: the model, with its options.
        y: its first argument.
        series: the values of its first observed site, `(time, obs)`, all other axes side by side.
        columns: the names of those.
        check: what `check_model` found.
        labels: `time`, `future_time`, `coords` and `dims` for the trees of results.
        dims: names of axes, as they were asked for.
        notes: words on the labels of time.
    """

    model: Callable[..., Any]
    y: Any
    series: np.ndarray
    columns: tuple[str, ...]
    check: ModelCheck
    labels: dict[str, Any]
    dims: dict[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()


def prepare(
    model: Callable[..., Any],
    y: Any,
    methods: Iterable[str],
    *,
    time: ArrayLike | None,
    future_time: ArrayLike | None,
    horizon: int,
    column: str | Sequence[str],
    dims: Dims | None,
) -> Task:
    """Runs the model once, names its axes, and saves and loads an empty tree of each of its forms.

    Raises:
        ValueError: the model observes nothing or has nothing to infer, its data do not fit its distributions, the time
            axis is not known, or labels do not fit.
    """
    values = jax.tree.map(_as_array, y)
    leaves = [x for x in jax.tree.leaves(values) if isinstance(x, jax.Array | np.ndarray)]
    if not any(x.size and not bool(jnp.isnan(x).all()) for x in leaves):
        raise ValueError(f"`y` has no observed value (shape {', '.join(str(x.shape) for x in leaves)}).")
    asked = {name: tuple(axes) if not isinstance(axes, str) else axes for name, axes in (dims or {}).items()}
    check = check_model(model, values, dims=asked)
    unknown = [name for name in asked if name not in check.axes.names]
    if unknown:
        raise ValueError(f"`dims` names {unknown[0]!r}, which is no site. The sites: {sorted(check.axes.names)}.")
    if check.problems:
        raise ValueError("`model` cannot be fitted to `y`: " + " ".join(check.problems))
    if check.time is None:
        raise ValueError(f"`dims`: {no_time_axis(check.axes)}")
    series, columns, coords = series_of(check.axes, column)
    has_states = not (check.methods["exact marginal"] and check.methods["svi:chain"])  # integrated out, or a path
    horizon = horizon if has_states else 0
    given, ahead, notes = time_axis(time, future_time, len(series), horizon)
    labels = {"time": given, "future_time": ahead, "coords": coords, "dims": dict(check.axes.names)}
    forms = {"nuts:states": "sampled", **dict.fromkeys(("nuts", "svi:mvn", "svi:normal", *POINTS), "whole")}
    one_of_each = {forms.get(m, "path"): m for m in methods if not check.methods.get(m, "")}
    for method in one_of_each.values():
        form = model_of_method(method, model, values)
        if form is not None:
            rehearse(
                form,
                (values,),
                {},
                dims=labels["dims"],
                time=labels["time"],
                coords=coords,
                horizon=horizon,
                future_time=labels["future_time"],
            )
    return Task(model, values, series, columns, check, labels, asked, notes)


def time_axis(time: Any, future_time: Any, steps: int, horizon: int) -> tuple[Any, Any, tuple[str, ...]]:
    """Labels of the steps and of those after them, and words on labels that are uneven or cannot be continued.

    Raises:
        ValueError: there are not as many labels as steps, a label is missing, or they do not increase.
    """
    ahead = None if future_time is None else as_labels("future_time", future_time)
    if time is None:
        return np.arange(steps), ahead, ()
    given = as_labels("time", time)
    if len(given) != steps:
        raise ValueError(f"`time` must have {steps} labels; got {len(given)}.")
    check_increasing("time", given)
    notes = [f"`time` {words}." for words in [uneven(given)] if words]
    if horizon and ahead is None:
        try:
            ahead = labels_after(given, horizon)
        except ValueError as error:
            notes.append(f"{error} Until then the steps of the forecast are numbered 1, 2, ...")
            warnings.warn(notes[-1], stacklevel=4)
    return given, ahead, tuple(notes)


def inputs_ahead(u: Any, u_future: Any, horizon: int) -> tuple[int, Any, tuple[str, ...]]:
    """Steps of the forecast and the inputs of these, and words where there is none because its inputs are absent.

    Raises:
        ValueError: there are inputs for fewer steps than asked, or for a model without.
    """
    if u_future is None:
        if u is None or not horizon:
            return horizon, None, ()
        words = "There is no forecast: the inputs of its steps are absent. Pass them as `u_future`."
        warnings.warn(words, stacklevel=4)
        return 0, None, (words,)
    if u is None:
        raise ValueError("`u_future` is given without `u`, the inputs of the series.")
    ahead = np.asarray(u_future, float)
    if len(ahead) < horizon:
        raise ValueError(
            f"`u_future` must have a row for each of the {horizon} steps of the forecast; got {len(ahead)}."
        )
    return horizon, ahead[:horizon], ()


def split_inputs(model: Any, y: Any, options: dict[str, Any], u_future: Any) -> tuple[dict[str, Any], Any]:
    """Inputs in a frame that goes on behind the data: the rows of the data, and those of the forecast.

    The names of its columns become the option `u_names` of a model that has it.

    Raises:
        ValueError: a frame among the options has other rows than the data.
    """
    u = options.get("u")
    frames = pd.DataFrame | pd.Series
    if u_future is None and isinstance(y, frames) and isinstance(u, frames) and len(u) > len(y):
        if u.index[: len(y)].equals(y.index):
            options, u_future = {**options, "u": u.iloc[: len(y)]}, u.iloc[len(y) :]
    for name, x in options.items():
        check_same_index(y, name, x)
    function = getattr(models, model, None) if isinstance(model, str) else model
    if callable(function) and "u_names" in inspect.signature(function).parameters and column_names(u) is not None:
        options = {"u_names": column_names(u), **options}
    return options, u_future


def inputs_by_label(u_future: Any, y: Any, u: Any, horizon: int, time: Any, future_time: Any) -> Any:
    """The inputs of the forecast from a frame: its rows by the labels of the steps, its columns by the names of `u`.

    Raises:
        ValueError: an input or a step is not in the frame.
    """
    if not horizon or not isinstance(u_future, pd.DataFrame | pd.Series):
        return u_future
    if future_time is not None:
        steps = as_labels("future_time", future_time)[:horizon]
    else:
        steps = steps_ahead(FrameLabels(None if time is None else as_labels("time", time), None), horizon)
    return inputs_of_steps("u_future", u_future, steps, horizon, column_names(u), np.shape(y)[0] if np.ndim(y) else 0)


def of_frame(y: Any, time: Any, column: str | Sequence[str]) -> tuple[Any, str | Sequence[str]]:
    """Labels of time and names of series that a frame of pandas brings along, where none were given."""
    found = frame_labels(y)
    if found is None:
        return time, column
    time = found.time if time is None else time
    return time, found.columns if column == "y" and found.columns is not None else column


def as_model(
    model: str | Callable[..., Any], y: Any, args: Sequence[Any], options: dict[str, Any]
) -> tuple[Callable[..., Any], str]:
    """The model with its options and further positional arguments, and its name."""
    if isinstance(model, str):
        check_choice("model", model, models.NAMES)
        model = getattr(models, model)
    elif not callable(model):
        raise TypeError(f"`model` must be a NumPyro model or a name in pssm.models; got {type(model).__name__}.")
    registered, bound, _ = describe(model)
    if registered is not None:  # the same, given by name or with options bound to it
        model, options = getattr(models, registered), {**bound, **options}
    name = registered or getattr(model, "__name__", None) or getattr(getattr(model, "func", None), "__name__", "model")
    if args:
        options = {**_by_name(model, y, args), **options}
    return (partial(model, **options) if options or registered else model), name


def _by_name(model: Callable[..., Any], y: Any, args: Sequence[Any]) -> dict[str, Any]:
    """The positional arguments after the data by their names, which leaves the data alone in front."""
    signature = inspect.signature(model)
    try:
        bound = signature.bind_partial(y, *args).arguments
    except TypeError as error:
        raise TypeError(f"`args` does not fit the model: {error}.") from None
    names = list(bound)[1:]
    if any(signature.parameters[n].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD for n in names):
        raise TypeError(
            "`args`: the model takes its positional arguments without names; wrap it in one that names them."
        )
    return {name: bound[name] for name in names}


def first_argument(model: Callable[..., Any], y: Any) -> Any:
    """The data as the model takes them: one series as `(time, 1)` for pssm's own models, as they are for others."""
    if isinstance(y, Mapping):
        return dict(y)
    data = np.asarray(y, dtype=float)
    return data[:, None] if data.ndim == 1 and describe(model)[0] is not None else data


def series_names(column: str | Sequence[str], count: int) -> tuple[str, ...]:
    """A name for each of `count` series; one name for several is numbered."""
    if isinstance(column, str):
        return (column,) if count == 1 else tuple(f"{column} {i + 1}" for i in range(count))
    names = tuple(str(name) for name in column)
    if len(names) != count or len(set(names)) < count:
        raise ValueError(f"`column` must be {count} different names, one for each column of `y`; got {names}.")
    return names


def as_series(values: Any, dims: tuple[str, ...], time: str) -> np.ndarray:
    """Values of a site as `(time, obs)`: all axes but time side by side."""
    x = np.asarray(values, dtype=float)
    return np.moveaxis(x, dims.index(time), 0).reshape(x.shape[dims.index(time)], -1)


def series_of(axes: Axes, column: str | Sequence[str]) -> tuple[np.ndarray, tuple[str, ...], dict[str, list[str]]]:
    """The first observed site as `(time, obs)`, the names of its columns, and labels of the axis they stand on."""
    name = next(n for n in axes.data if axes.time in axes.names[n])
    dims, value = axes.names[name], axes.trace[name]["value"]
    series = as_series(value, dims, str(axes.time))
    others = [a for a in dims if a != axes.time]
    own = [a for a in others if a in ("series", f"{name}_series")]
    if len(others) == 1 and (own or not isinstance(column, str)):
        names = series_names(column, series.shape[1])
        return series, names, {others[0]: list(names)}
    if len(others) == 2 and own and not isinstance(column, str):
        plate = next(a for a in others if a not in own[-1:])
        size = np.shape(value)[dims.index(plate)]
        if series.shape[1] == size:  # one variable in each of several series
            return series, series_names(column, size), {plate: list(series_names(column, size))}
    return series, series_names(column, series.shape[1]), {}


def _as_array(x: Any) -> Any:
    """Numbers as a JAX array, or in 64 bits where 32 cannot hold them; what is no number (a text, None) as it is."""
    found = np.asarray(x)
    if is_rounded(found):
        return found
    return jnp.asarray(found) if found.dtype.kind in "fiub" else x
