"""A series as the sum of its components: level, seasons, cycle, regression and what is left, with their uncertainty."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from pssm._checks import check_count, check_series
from pssm._keys import as_key
from pssm._types import Array, ArrayLike, Key, KeyLike
from pssm.diagnostics.analysis_plots import plot_components
from pssm.diagnostics.components import as_asked, by_name, free_name
from pssm.diagnostics.residuals import check_labels
from pssm.filters import kalman_filter, kalman_smoother, sample_states
from pssm.fitting.results import Fit
from pssm.infer.exact import state_names_of
from pssm.infer.mixtures import mixture, mixture_quantiles
from pssm.infer.task import exact_task
from pssm.ssm import LinearGaussianSSM, check_inputs

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

CONSTANT, REGRESSION, IRREGULAR = "constant", "regression", "irregular"
Groups = dict[str, list[int]]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The components of a series.

    Attributes:
        data: an `xarray.Dataset`: `mean`, `sd`, `low`, `high` of each contribution `(component, time, series)`, `draws`
            `(draw, component, time, series)`, and beside them `observed`, `signal_mean`, `signal_sd` `(time, series)`,
            `state_mean`, `state_sd` `(state, time)` and, with regressors, the contribution of each, `input_mean`,
            `input_sd` `(input, time, series)`.
        level: of the intervals.
        filtered: whether each step knows the data up to it only.
    """

    data: xr.Dataset
    level: float
    filtered: bool

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components; `irregular`, what is left of the data, is the last."""
        return tuple(str(n) for n in self.data["component"].values)

    @property
    def table(self) -> "pd.DataFrame":
        """A row for each step, series and component: `mean`, `sd`, `low`, `high`."""
        columns = ["mean", "sd", "low", "high"]
        return self.data[columns].to_dataframe(dim_order=["time", "series", "component"])[columns].reset_index()

    def plot(self, *, series: str | None = None, title: str = "") -> "Figure":
        """Data and signal above, and a panel for each component with its interval, for one series (the first)."""
        return plot_components(self, series=series, title=title)


class _Part(NamedTuple):
    """What one draw of the parameters says of the contributions of groups of states, of the offset and of the inputs.

    `mean`, `variance` and `path`, a joint draw, are `(component, time, obs)`, the offset and all inputs being the last
    two; `seen` says which states reach the series.
    """

    mean: Array
    variance: Array
    path: Array
    signal: Array
    signal_variance: Array
    state: Array
    state_variance: Array
    inputs: Array | None
    seen: Array


def decompose(
    fit: Fit | LinearGaussianSSM,
    y: ArrayLike | None = None,
    u: ArrayLike | None = None,
    *,
    components: Mapping[str, Any] | None = None,
    filtered: bool = False,
    level: float = 0.9,
    state_names: tuple[str, ...] | None = None,
    names: tuple[str, ...] | None = None,
    time: ArrayLike | None = None,
    draws: int = 100,
    site: str | None = None,
    most: int = 200,
    parameters: str | None = None,
    key: KeyLike = 0,
) -> Decomposition:
    """The contribution of each component to the series, `C_t[:, S] z_t[S]` over its states `S`, exact for each draw.

    Contributions add up to the signal, and with `irregular`, the data minus the signal, to the data. Components are
    read off the names of the states, as pssm's models have them: `level` (with its slope), `seasonal` (of several
    patterns `seasonal_24`), `cycle`, `ar`, `matern`. Beside them stand `constant`, the offset `d_t` of the emission,
    and `regression`, `D_t u_t`: pssm's models count regressors from their first row. States that never reach the
    series are no component; they are in `state_mean`.

    Args:
        fit: a fit of a model that integrates its states out exactly; or a model, followed by its data.
        y: data `(time, obs)` of a `LinearGaussianSSM`, NaN where missing.
        u: its inputs `(time, input)`.
        components: the states of each component by name or number, `{"trend": ("level", "slope"), "week": [2, 3]}`;
            those that are left are `other`. By default as above.
        filtered: from the data up to each step; by default from all.
        level: of the intervals.
        state_names: of the states; by default those of the model.
        names: of the series; by default those of the frame that was fitted.
        time: labels of the steps, likewise.
        draws: joint draws of all contributions to keep, 0 for none; of filtered components there are none.
        site: the observed site, where there are several.
        most: number of draws of the parameters to use.
        parameters: of a fit at one point: "fixed" or "laplace", as in `pssm.infer.forecast`.
        key: random key, or a whole number; the same key gives the same draws.

    Returns:
        A `Decomposition`: `.data` (xarray), `.table`, `.plot()`.

    Raises:
        ValueError: the states are not integrated out exactly, data are absent or given twice, there are several series
            in a plate, `components` has other states, or labels do not fit.

    Example:
        >>> import functools
        >>> from pssm import datasets, models
        >>> from pssm.infer import fit_ml
        >>> co2 = datasets.load("co2")
        >>> model = functools.partial(models.structural, trend=True, seasonal=12, harmonics=2)
        >>> found = decompose(fit_ml(model, co2.y[:120], num_starts=1, progress_bar=False), time=co2.time[:120])
        >>> found.components
        ('level', 'seasonal', 'irregular')
        >>> total = found.data["mean"].sel(component=["level", "seasonal"]).sum("component")
        >>> bool(abs(total - found.data["signal_mean"]).max() < 1e-2)
        True

    Source:
        Durbin & Koopman 2012, section 3.2; Harvey 1989, chapter 4.
    """
    check_count("draws", draws, least=0)
    if not 0 < level < 1:
        raise ValueError(f"`level` must lie between 0 and 1; got {level}.")
    wanted = 0 if filtered else draws
    labels: Any = None
    origins: Any = (0, 0)
    if isinstance(fit, LinearGaussianSSM):
        if y is None:
            raise ValueError("`y` is required: the data of a `LinearGaussianSSM`.")
        ssm, data = fit, check_series(y, fit.n_obs)
        inputs = check_inputs(ssm, u, data.shape[-2])
        states = tuple(f"state {i}" for i in range(ssm.n_state)) if state_names is None else tuple(state_names)
        groups = _groups(components, states, ssm.n_state, data)
        keys = jax.random.split(as_key(key), max(wanted, 1))
        found = jax.jit(jax.vmap(lambda k: _parts(ssm, data, inputs, groups, k, filtered, wanted > 0)))(keys)
        observed, count = np.asarray(data, float), 1
    else:
        if y is not None or u is not None:
            raise ValueError("`y` and `u` go with a `LinearGaussianSSM`; a fit has its own data.")
        task = exact_task(fit, most=most, key=key, site=site, parameters=parameters)
        source, labels, origins, count = task.source, task.labels, task.origins, task.count
        trace = source.trace({n: x[0] for n, x in task.draws.items()})
        ssm = source.fn(trace).ssm
        states = state_names_of(trace, source) if state_names is None else tuple(state_names)
        groups = _groups(components, states, ssm.n_state, source.series(trace))

        def one(sample: dict[str, Array], k: Key) -> _Part:
            trace = source.trace(sample)
            d = source.fn(trace)
            return _parts(d.ssm, source.series(trace), d.u, groups, k, filtered, wanted > 0)

        found = task.map(one, max(wanted, 1) if count == 1 else 1)
        observed = np.asarray(trace[source.site]["value"], float)
    observed = observed[:, None] if observed.ndim == 1 else observed
    series, steps = check_labels(names, time, *observed.shape, labels)
    found = jax.tree.map(lambda x: np.asarray(x, float), found)
    paths = found.path[np.linspace(0, len(found.path) - 1, min(wanted, len(found.path))).astype(int)]
    if count == 1:  # the moments of a point do not depend on the key
        found = jax.tree.map(lambda x: x[:1], found)
    above = _counted_from(groups, np.asarray(ssm.with_time_axis("C"), float), *origins, observed.shape)
    coords = {"time": steps, "series": list(series), "state": list(states)}
    if found.inputs is not None:
        given = labels and labels.inputs
        coords["input"] = list(given) if len(given or ()) == found.inputs.shape[1] else np.arange(found.inputs.shape[1])
    return Decomposition(_dataset(found, paths, groups, above, observed, origins, coords, level), level, filtered)


def _groups(components: Mapping[str, Any] | None, states: tuple[str, ...], n_state: int, data: Array) -> Groups:
    if data.ndim != 2:
        raise ValueError(f"`fit` must have one path of states; its series stand in a plate of {data.shape[:-2]}.")
    if len(states) != n_state:
        raise ValueError(f"`state_names` must have {n_state} names; got {len(states)}.")
    return by_name(states) if components is None else as_asked(components, states)


def _parts(
    ssm: LinearGaussianSSM, y: Array, u: Array | None, groups: Groups, key: Key, filtered: bool, drawn: bool
) -> _Part:
    """Moments, and a draw, of the contributions of one model."""
    states = (kalman_filter if filtered else kalman_smoother)(ssm, y, u)
    shape = (len(y), ssm.n_obs)
    C = ssm.with_time_axis("C")
    offset = jnp.zeros(shape, ssm.dtype) if ssm.d is None else jnp.broadcast_to(ssm.with_time_axis("d"), shape)
    inputs = None  # and no array without entries, which a map over draws cannot hold
    if ssm.D is not None and u is not None:
        inputs = jnp.moveaxis(ssm.with_time_axis("D") * u[:, None], -1, 0)
    fixed = [offset, jnp.zeros_like(offset) if inputs is None else inputs.sum(0)]
    own = [np.array(group, int) for group in groups.values()]

    def contributions(z: Array) -> Array:
        return jnp.stack([(C[..., i] @ z[:, i, None])[..., 0] for i in own] + fixed)

    spread = [jnp.sum((C[..., i] @ states.chol[:, i]) ** 2, -1) for i in own]
    path = sample_states(key, ssm, y, u) if drawn else states.mean
    return _Part(
        contributions(states.mean),
        jnp.stack(spread + [jnp.zeros_like(x) for x in fixed]),
        contributions(path),
        ssm.signal(states.mean, u),
        jnp.sum((C @ states.chol) ** 2, -1),
        states.mean,
        jnp.sum(states.chol**2, -1),
        inputs,
        jnp.any(C != 0, axis=(0, 1)),
    )


def _counted_from(groups: Groups, C: np.ndarray, of_state: Any, of_series: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers that each contribution is counted from, `(component, time, obs)`, in 64 bits.

    What no state is counted from is the constant's.
    """
    origin = np.zeros(C.shape[-1]) + np.asarray(of_state, float)
    above = [np.broadcast_to(C[..., group] @ origin[group], shape) for group in groups.values()]
    rest = np.asarray(of_series, float) - sum(above) + np.zeros(shape)
    return np.stack([*above, rest, np.zeros(shape)])


def _dataset(
    found: _Part, paths: np.ndarray, groups: Groups, above: np.ndarray, observed: np.ndarray, origins: Any,
    coords: dict[str, Any], level: float,
) -> xr.Dataset:  # fmt: skip
    """Moments over the draws of the parameters, by name; components that nothing reaches are left out."""
    tails = (1 - level) / 2, (1 + level) / 2
    reaches = found.seen.any(0)
    kept = [bool(reaches[group].any()) for group in groups.values()]
    kept += [bool(found.mean[:, -2].any() or above[-2].any()), found.inputs is not None]
    names: list[str] = list(groups)
    names += [free_name(CONSTANT, names), free_name(REGRESSION, names)]
    names = [*(n for n, k in zip(names, kept, strict=True) if k), free_name(IRREGULAR, names)]
    mean, variance, above = found.mean[:, kept], found.variance[:, kept], above[kept]
    parts, signal = mixture(mean, variance), mixture(found.signal, found.signal_variance, origins[1])
    low, high = mixture_quantiles(mean, variance, tails)
    ends = mixture_quantiles(found.signal, found.signal_variance, tails) + np.asarray(origins[1], float)
    left_sd = np.where(np.isnan(observed), np.nan, signal.sd)

    def with_rest(x: np.ndarray, rest: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
        return ("component", "time", "series"), np.concatenate([x, rest[None]])

    data: dict[str, Any] = {
        "mean": with_rest(parts.mean + above, observed - signal.mean),
        "sd": with_rest(parts.sd, left_sd),
        "low": with_rest(low + above, observed - ends[1]),
        "high": with_rest(high + above, observed - ends[0]),
        "observed": (("time", "series"), observed),
        "signal_mean": (("time", "series"), signal.mean),
        "signal_sd": (("time", "series"), signal.sd),
    }
    if len(paths):
        joint = paths[:, kept] + above
        rest = observed - joint.sum(1)
        data["draws"] = ("draw", "component", "time", "series"), np.concatenate([joint, rest[:, None]], axis=1)
    state = mixture(found.state, found.state_variance, origins[0])
    data |= {"state_mean": (("state", "time"), state.mean.T), "state_sd": (("state", "time"), state.sd.T)}
    if found.inputs is not None:
        data["input_mean"] = ("input", "time", "series"), found.inputs.mean(0)
        data["input_sd"] = ("input", "time", "series"), found.inputs.std(0)
    return xr.Dataset(data, {"component": names, **coords})
