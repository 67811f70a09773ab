"""News: what new data changed in a forecast, by each released, revised or withdrawn value."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pssm._checks import check_series, is_pandas, unmasked
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.correlated import noise_as_state
from pssm.diagnostics.analysis_plots import plot_news
from pssm.diagnostics.predictions import labels_behind, place_of
from pssm.diagnostics.residuals import check_labels
from pssm.distributions.in_units import from_origin
from pssm.filters import kalman_smoother
from pssm.fitting.results import Fit
from pssm.infer.exact import whole_system
from pssm.infer.task import exact_task, steps_of
from pssm.ssm import LinearGaussianSSM, check_inputs, check_num_steps

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

KINDS = ("withdrawal", "revision", "release")
FARTHEST = 120  # steps behind the data among which the label of a target is looked for, at least


@dataclass(frozen=True, eq=False)
class News:
    """What new data changed in one or several forecasts.

    Attributes:
        table: a row for each target and each value that changed: `target_time`, `target_series`, `kind` ("release",
            "revision", "withdrawal"), `time`, `series`, `observed`, `expected` (before it was known; of a revision, the
            old value), `news` (their difference), `weight`, `impact` (weight times news) and `impact_sd`, over the
            draws of the parameters. The averages over several draws are those of each column.
        summary: a row for each target: `before`, `release`, `revision`, `withdrawal`, `change`, `after`.
    """

    table: "pd.DataFrame"
    summary: "pd.DataFrame" = field(repr=False)

    def plot(self, *, most: int = 12, title: str = "") -> "Figure":
        """The impacts of the `most` values that changed each target most."""
        return plot_news(self, most=most, title=title)


class _Changes(NamedTuple):
    """Old data without what was withdrawn, the same with revised values, new data; and the targets `(step, series)`."""

    old: np.ndarray
    kept: np.ndarray
    revised: np.ndarray
    new: np.ndarray
    targets: np.ndarray


class _Impacts(NamedTuple):
    """What one draw of the parameters says.

    `levels` are the expectations of the targets before, and after each stage, `(target, 4)`; `weights` those of all
    entries by kind, `(target, kind, time, obs)`; `expected` what was expected of each entry, `(kind, time, obs)`.
    """

    levels: Array
    weights: Array
    expected: Array


def news(
    fit: Fit | LinearGaussianSSM,
    y_old: ArrayLike | None,
    y_new: ArrayLike,
    target: Any,
    *,
    u: ArrayLike | None = None,
    u_future: ArrayLike | None = None,
    names: tuple[str, ...] | None = None,
    time: ArrayLike | None = None,
    site: str | None = None,
    most: int = 100,
    parameters: str | None = None,
    key: KeyLike = 0,
) -> News:
    """Splits the change of `E[y_target | data]` from old to new data among the values that changed, exactly.

    A released value has the impact `w (y - E[y | old data])`, a revised one `w (y_new - y_old)`, a withdrawn one
    `w (E[y | rest] - y)`. First what is withdrawn goes, then what is revised changes, then what is released comes; the
    weights `w` are the derivatives of the smoother of each stage, and the impacts add up to the change. The parameters
    stay those of the fit.

    Args:
        fit: a fit of a model that integrates its states out exactly; or a model.
        y_old: data before, `(time, obs)`, NaN where missing; None for the data of the fit. Steps that are not there yet
            may be left out at the end.
        y_new: data now, from the same first step on. Columns of frames are matched by name.
        target: the forecast, `(time, series)`: a label of time (or the number of a step) and a name (or number); or a
            list of several; of one series its time alone. It may lie behind the data.
        u: inputs of all steps up to the target, of a `LinearGaussianSSM`.
        u_future: inputs of the steps after those of the fit, as in `pssm.infer.forecast`.
        names: of the series; by default those of the frames.
        time: labels of the steps of `y_new`, likewise.
        site: the observed site, where there are several.
        most: number of draws of the parameters to use.
        parameters: of a fit at one point: "fixed" or "laplace", as in `pssm.infer.forecast`.
        key: random key, or a whole number, for the draws of a guide; the same key gives the same draws.

    Returns:
        A `News`: `.table`, `.summary`, `.plot()`.

    Raises:
        ValueError: the states are not integrated out exactly, shapes, names or labels of old and new data do not fit,
            or there is no such target.

    Example:
        >>> import numpy as np
        >>> model = LinearGaussianSSM([0.0], [[1.0]], [[0.9]], [[1.0]], [[1.0], [1.0]], 0.5 * np.eye(2))
        >>> old = [[0.0, 0.2], [1.0, np.nan]]
        >>> found = news(model, old, [[0.0, 0.2], [1.0, 3.0]], (2, 0), names=("sales", "survey"))
        >>> found.table[["kind", "time", "series", "observed"]].values.tolist()
        [['release', 1, 'survey', 3.0]]
        >>> bool(abs(found.table.impact.sum() - found.summary.change[0]) < 1e-6)
        True

    Source:
        Banbura & Modugno 2014, "Maximum likelihood estimation of factor models on datasets with arbitrary pattern of
        missing data".
    """
    labels: Any = None
    origin: Any = 0
    task: Any = None
    known, own = 0, False
    data = np.zeros(0)
    if isinstance(fit, LinearGaussianSSM):
        if y_old is None:
            raise ValueError("`y_old` is required: a `LinearGaussianSSM` has no data of its own.")
        width = fit.n_obs
    else:
        if u is not None:
            raise ValueError("`u` goes with a `LinearGaussianSSM`; inputs behind those of the fit are `u_future`.")
        task = exact_task(fit, most=most, key=key, site=site, parameters=parameters)
        labels, origin = task.labels, task.origins[1]
        trace = task.source.trace({n: x[0] for n, x in task.draws.items()})
        data = np.asarray(trace[task.source.site]["value"])
        if data.ndim != 2:
            raise ValueError(f"`fit` must have one path of states; its series stand in a plate of {data.shape[:-2]}.")
        known, width = data.shape
        own = y_old is None
        y_old = _frame_of(data.astype(float), labels) if own else y_old
    old, new, labels = _aligned(y_old, y_new, width, labels)
    if own:  # a fit in 32 bits has rounded its data, which is no revision
        same = new[: len(old)].astype(data.dtype) == old
        old = np.where(same, new[: len(old)], old)
    series, steps = check_labels(names, time, len(new), width, labels)
    targets, whole = _targets(target, series, steps, time, labels, known)
    length = len(whole)
    old, new = (np.concatenate([x, np.full((length - len(x), width), np.nan)]) for x in (old, new))
    kept = np.where(np.isnan(new), np.nan, old)
    changes = _Changes(old, kept, np.where(np.isnan(kept), np.nan, new), new, targets)
    if isinstance(fit, LinearGaussianSSM):
        check_num_steps(fit, length, "the data with the target", or_more=True)
        ssm = fit if fit.num_steps is None else fit.steps(0, length)
        inputs = check_inputs(ssm, u, length)
        found = jax.jit(lambda: _impacts(ssm, inputs, changes, None))()
        found = jax.tree.map(lambda x: np.asarray(x, float)[None], found)
    else:
        ahead = steps_of(task, known, length - known, u_future) if length > known else None

        def one(sample: dict[str, Array], k: Key) -> _Impacts:
            system = whole_system(task.source, sample, k, ahead)
            return _impacts(system.ssm, system.u, changes, system.origin)

        found = jax.tree.map(lambda x: np.asarray(x, float), task.map(one))
    return _tables(found, changes, np.broadcast_to(np.ravel(origin), (width,)), series, whole)


def _impacts(ssm: LinearGaussianSSM, u: Array | None, changes: _Changes, origin: Any) -> _Impacts:
    """Expectations of the targets and weights of all entries at each stage."""
    whole = noise_as_state(ssm)
    stages = [jnp.asarray(from_origin(x, origin), ssm.dtype) for x in changes[:4]]
    rows, columns = changes.targets.T

    def means(y: Array) -> Array:
        found = whole.signal(kalman_smoother(whole, y, u).mean, u)
        return jnp.where(jnp.isnan(y), found, y)

    def weighted(y: Array) -> tuple[Array, Array]:
        """All expectations, and the derivatives of the targets by what was observed."""
        found, back = jax.vjp(lambda x: means(x)[rows, columns], y)
        each = jax.vmap(lambda e: back(e)[0])(jnp.eye(len(rows), dtype=y.dtype))
        return means(y), jnp.where(jnp.isnan(y), 0.0, each)

    (old, of_old), (kept, _), (revised, of_revised), (new, of_new) = (weighted(y) for y in stages)
    levels = jnp.stack([x[rows, columns] for x in (old, kept, revised, new)], axis=1)
    return _Impacts(levels, jnp.stack([of_old, of_revised, of_new], axis=1), jnp.stack([kept, kept, revised]))


def _tables(found: _Impacts, changes: _Changes, origin: np.ndarray, series: Any, labels: np.ndarray) -> News:
    import pandas as pd

    old, kept, revised, new, targets = changes
    entries = (
        np.argwhere(~np.isnan(old) & np.isnan(kept)),
        np.argwhere(~np.isnan(kept) & (kept != revised)),
        np.argwhere(np.isnan(revised) & ~np.isnan(new)),
    )
    rows = []
    for i, (step, column) in enumerate(targets):
        for k, kind in enumerate(KINDS):
            for t, j in entries[k]:
                expected = found.expected[:, k, t, j] + origin[j]
                if kind == "revision":
                    expected = np.full(len(expected), old[t, j])
                value = old[t, j] if kind == "withdrawal" else new[t, j]
                surprise = expected - value if kind == "withdrawal" else value - expected
                weight = found.weights[:, i, k, t, j]
                impact = weight * surprise
                rows.append((labels[step], series[column], kind, labels[t], series[j], value, expected.mean(),
                             surprise.mean(), weight.mean(), impact.mean(), impact.std()))  # fmt: skip
    columns = ["target_time", "target_series", "kind", "time", "series", "observed", "expected", "news", "weight",
               "impact", "impact_sd"]  # fmt: skip
    levels = found.levels.mean(0)
    stages = np.diff(levels, axis=1)
    summary = pd.DataFrame(
        {
            "target_time": [labels[t] for t, _ in targets],
            "target_series": [series[j] for _, j in targets],
            "before": levels[:, 0] + origin[targets[:, 1]],
            **{kind: stages[:, k] for k, kind in reversed(list(enumerate(KINDS)))},
            "change": levels[:, 3] - levels[:, 0],
            "after": levels[:, 3] + origin[targets[:, 1]],
        }
    )
    return News(pd.DataFrame(rows, columns=columns), summary)


# ------------------------------------------------------------------------------------------- data, labels, targets


def _frame_of(data: np.ndarray, labels: Any) -> Any:
    """The data of a fit with the labels that they came with."""
    if labels is None or labels.time is None:
        return data
    import pandas as pd

    return pd.DataFrame(data, index=pd.Index(labels.time), columns=labels.columns)


def _aligned(y_old: Any, y_new: Any, width: int, labels: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """Old and new data as `(time, obs)` from the same first step on, and the labels of the new ones."""
    if is_pandas(y_new) or is_pandas(y_old):
        from pssm.times.labels import frame_labels, label_array, shown  # pandas, which is there already

        frames = [frame_labels(x) for x in (y_old, y_new)]
        names = (labels and labels.columns) or (frames[1] or frames[0]).columns
        y_old, y_new = (_by_name(n, x, names) for n, x in (("y_old", y_old), ("y_new", y_new)))
        times = [x.time for x in (*frames, labels) if x is not None and x.time is not None]
        times = [label_array("time", x) for x in times]
        for given in times[1:]:
            stop = min(len(given), len(times[0]))
            if not np.array_equal(given[:stop], times[0][:stop]):
                raise ValueError(
                    f"`y_old` and `y_new` must go on from the same first step, that of the fit: one begins with "
                    f"{shown(times[0][0])}, {shown(times[0][min(1, stop - 1)])}, another with {shown(given[0])}, "
                    f"{shown(given[min(1, stop - 1)])}. Give each the same rows (`frame.reindex`)."
                )
        labels = frames[1] if frames[1] is not None and frames[1].time is not None else labels
        labels = labels and labels._replace(columns=names)
    old, new = (_numbers(n, x, width) for n, x in (("y_old", y_old), ("y_new", y_new)))
    if len(old) > len(new):
        raise ValueError(
            f"`y_new` must have the {len(old)} steps of `y_old` or more, NaN where missing; got {len(new)}."
        )
    if labels is not None and labels.time is not None:
        labels = labels._replace(time=_of_length(labels.time, len(new)))
    return old, new, labels


def _of_length(time: Any, length: int) -> Any:
    """The first labels, or labels that go on over the steps that new data have."""
    from pssm.times.grid import labels_after  # pandas, which is there already

    if len(time) >= length:
        return time[:length]
    after = labels_after(time, length - len(time))
    return time.append(after) if hasattr(time, "append") else np.concatenate([time, after])


def _by_name(name: str, x: Any, names: Sequence[str] | None) -> Any:
    """A frame's columns in the order of the series."""
    import pandas as pd

    if names is None or not isinstance(x, pd.DataFrame):
        return x
    x = x.set_axis([str(n) for n in x.columns], axis=1)
    if sorted(x.columns) != sorted(names):
        raise ValueError(f"`{name}` must have the columns {list(names)}, in any order; got {list(x.columns)}.")
    return x[list(names)]


def _numbers(name: str, x: Any, width: int) -> np.ndarray:
    """Data in 64 bits, checked."""
    values = np.asarray(unmasked(x, name), float)
    values = values[:, None] if values.ndim == 1 and width == 1 else values
    check_series(jnp.asarray(values), width, name)
    if values.ndim != 2:
        raise ValueError(f"`{name}` must be one data set `(time, obs)`; got shape {values.shape}.")
    return values


def _targets(
    target: Any, series: tuple[str, ...], steps: np.ndarray, time: Any, labels: Any, known: int
) -> tuple[np.ndarray, np.ndarray]:
    """Step and series of each target, and labels of all steps that are needed."""
    pairs = list(target) if isinstance(target, list) else [target]
    pairs = [x if isinstance(x, tuple) else (x, 0) for x in pairs]
    if not pairs or any(len(x) != 2 for x in pairs):
        raise ValueError(f"`target` must be (time, series), or a list of such pairs; got {target!r}.")
    farthest = max(FARTHEST, len(steps), known - len(steps))
    try:
        whole = np.concatenate([steps, labels_behind(time, labels, steps, farthest, None)])
    except (TypeError, ValueError):
        whole = steps
    found = []
    for when, which in pairs:
        if isinstance(which, str):
            if which not in series:
                raise ValueError(f"`target` must name one of the series {list(series)}; got {which!r}.")
            which = series.index(which)
        if not 0 <= which < len(series):
            raise ValueError(f"`target` must have the number of a series from 0 to {len(series) - 1}; got {which}.")
        words = f"`target` must be a step from {whole[0]} to {whole[-1]}; got {when!r}."
        if isinstance(when, int | np.integer) and whole.dtype.kind not in "iuf":
            if not 0 <= when < len(whole):
                raise ValueError(words)
            found.append((int(when), int(which)))
        else:
            found.append((place_of(when, whole, words), int(which)))
    targets = np.array(found, int)
    return targets, whole[: max(len(steps), known, int(targets[:, 0].max()) + 1)]
