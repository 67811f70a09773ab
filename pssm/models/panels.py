"""A panel: many short series of one kind, whose parameters are drawn from one population."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pssm._checks import as_float, check_choice, check_count, is_traced
from pssm._types import Array, ArrayLike
from pssm.distributions import NonCenteredPath, StatePath
from pssm.distributions.in_units import HalfNormal, Normal
from pssm.models import components
from pssm.models.components import Scale
from pssm.models.patterns import patterns
from pssm.models.periods import labels_of, series_names
from pssm.models.scales import Regressors, Series, located, number, observe_from, regressors, series
from pssm.models.single import STATES, marginal
from pssm.ssm import LinearGaussianSSM

POOLING = ("partial", "complete", "none")
APART = 0.5  # scale of the prior of the spread of logarithms over series


class Population(NamedTuple):
    """The data and what the priors are relative to.

    Attributes:
        found: the data `(series, time, 1)`; None to predict.
        num_series, num_steps: their sizes.
        location: mean of the first values, counted from the origin of the data.
        within: typical spread of a series about its own mean.
        total: the spread of first values and of series together.
        pooling: how the parameters of the series are related.
    """

    found: Series | None
    num_series: int
    num_steps: int
    location: Any
    within: Any
    total: Any
    pooling: str

    def plate(self) -> Any:
        """The series."""
        return numpyro.plate("series", self.num_series, dim=-1)

    def scales(self, name: str, spread: Any) -> Array:
        """Standard deviations of the series, `(series,)`, from their population."""
        each = f"{name}_each"
        if self.pooling == "none":
            with self.plate():
                return jnp.asarray(numpyro.sample(each, HalfNormal(spread)))
        typical = jnp.asarray(numpyro.sample(name, HalfNormal(spread)))
        if self.pooling == "complete":
            return jnp.broadcast_to(typical, (self.num_series,))
        apart = self.deviations(name)
        with self.plate():
            return jnp.asarray(numpyro.deterministic(each, typical * jnp.exp(apart)))

    def deviations(self, name: str, size: int | None = None) -> Array:
        """What sets the series apart from their population, `(series,)` or `(series, size)`: `tau e`, `e` normal."""
        tau = numpyro.sample(f"tau_{name}", dist.HalfNormal(APART))
        normal = dist.Normal(0.0, 1.0)
        with self.plate():
            e = numpyro.sample(f"apart_{name}", normal if size is None else normal.expand([size]).to_event(1))
        return jnp.asarray(tau) * jnp.asarray(e)


class Part(NamedTuple):
    """A component of every series: fields of a `LinearGaussianSSM`, some with the series in front."""

    m0: Array
    chol_P0: Array
    A: Array
    chol_Q: Array
    C: Array
    names: tuple[str, ...]


def panel(
    y: ArrayLike | None = None,
    *,
    num_series: int | None = None,
    num_steps: int | None = None,
    u: ArrayLike | None = None,
    varying: bool | Sequence[bool] = False,
    level: bool = True,
    trend: bool = False,
    seasonal: float | Sequence[float] | None = None,
    harmonics: int | Sequence[int | None] | None = None,
    ar: int = 0,
    pooling: str = "partial",
    names: Sequence[str] | None = None,
    states: str = "marginal",
    location: float | None = None,
    scale: float | None = None,
) -> None:
    """Many short series of one kind: each has its own components, whose parameters come from one population.

        y_it = level_it + seasonal_it + ar_it + (beta + b_i)' (u_it - u_1) + N(0, sigma_obs_i^2)
        log sigma_i ~ N(log sigma, tau^2) for each standard deviation,   level_i1 ~ N(level_mean, level_sd^2)

    A short series borrows from the others, and one without data has the posterior of the population. States, first
    levels and the effects `b_i` are integrated out exactly, in one plate `series`; the sampler sees the population's
    parameters, and one number of each standard deviation for each series (the site `apart_<name>`, standard normal).

    Priors, `s` the typical spread of a series about its mean, `S` that of series and first values together:
    `sigma_obs, sigma_level, sigma_ar ~ HalfNormal(s)`, `sigma_slope, sigma_seasonal ~ HalfNormal(s / 10)`, `tau ~
    HalfNormal(0.5)`; `level_mean ~ N(mean of first values, (10 S)^2)`, `level_sd ~ HalfNormal(2 S)`; slopes and
    seasonal effects at the start are `N(mean, sd^2)` over the series, with `mean ~ N(0, s^2)` and `sd ~
    HalfNormal(s)`; `beta ~ N(0, (2.5 s / sd(u))^2)`, `beta_sd ~ HalfNormal(s / sd(u))`.

    Args:
        y: data `(series, time)`, or `(series, time, 1)`, NaN where missing, as at the ends of shorter series; None to
            predict. `pssm.datasets.stack_series` makes them from a list, or from a table with a row for each value.
        num_series: number of series, needed where `y` is None.
        num_steps: number of steps, likewise.
        u: regressors `(time, input)` of all series, or `(series, time, input)`, counted from their first row.
        varying: the effects of regressors differ by series; one answer, or one for each regressor.
        level: a random-walk level for each series; without it (and without trend) a constant one.
        trend: a level with a slope.
        seasonal: number of time steps in a season, or several, as in `structural`.
        harmonics: waves of the seasonal pattern, as in `structural`.
        ar: order of a stationary autoregression about the level; 0 for none.
        pooling: "partial"; "complete", one set of standard deviations for all series (what `fit_ml` can maximise);
            or "none", standard deviations that are independent, `HalfNormal`.
        names: of the series, for the axes of results; by default numbers.
        states: "marginal" (integrated out) or "sampled" (a site `z` of shape `(series, time, state)`).
        location: centre of the prior of `level_mean`.
        scale: `s`; `S` is then at least that.

    Raises:
        ValueError: a shape or a setting does not fit; the message names it.

    Example:
        >>> sales = np.cumsum(np.random.default_rng(0).normal(size=(20, 12)), axis=1)
        >>> sales[3, 8:] = np.nan  # a shorter one
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(panel, 0)).get_trace(sales)
        >>> trace["sigma_level_each"]["value"].shape, trace["y"]["fn"].batch_shape
        ((20,), (20,))

    Source:
        Gelman & Hill 2007, chapter 12; Harvey 1989, section 8.7; non-centred: Papaspiliopoulos, Roberts & Skold 2007.
    """
    check_choice("states", states, STATES)
    check_choice("pooling", pooling, POOLING)
    check_count("ar", ar, least=0)
    about = _look_at(y, num_series, num_steps, location, scale, pooling)
    series_names(names, None, about.num_series)
    inputs = None if u is None else regressors(u, (about.num_series, about.num_steps))

    parts = [_level(about, walk=level or trend, slope=trend)]
    plain = Scale(jnp.zeros(()), jnp.ones(()))
    for period, waves, label in patterns(seasonal, harmonics, uneven=False):
        parts.append(_seasonal(about, plain, period, waves, label))
    if ar:
        parts.append(_autoregression(about, ar))
    sigma_obs = about.scales("sigma_obs", about.within)
    D = None
    timed: tuple[str, ...] = ()
    if inputs is not None:
        width = 2.5 * about.within / inputs.spread
        beta = numpyro.sample("beta", Normal(0.0, width).to_event(1), infer={"dims": {"beta": ("input",)}})
        D = jnp.asarray(beta)[None]
        chosen = _varying(varying, len(width))
        if chosen.any():
            parts.append(_effects(about, inputs, chosen))
            timed = ("C",)
    ssm = _join(parts, sigma_obs, D, timed, about.num_series)
    state_names = tuple(name for part in parts for name in part.names)
    named = labels_of(state_names, names)
    origin = None if about.found is None else about.found.origin
    above = None if origin is None else np.pad(origin, (0, ssm.n_state - 1))
    with about.plate():
        if states == "marginal":
            marginal(ssm, about.num_steps, inputs, about.found, named, above)
            return
        path = StatePath.from_ssm(ssm, about.num_steps)
        infer = named | ({} if above is None else {"origin": above})
        with numpyro.handlers.infer_config(config_fn=lambda site: infer):
            z = numpyro.deterministic("z", NonCenteredPath()("z", path, None)[1])
        signal = ssm.signal(z, None if inputs is None else inputs.differences)
        observe_from("y", dist.Normal(signal, sigma_obs[:, None, None]), about.found)


def _look_at(
    y: ArrayLike | None,
    num_series: int | None,
    num_steps: int | None,
    location: float | None,
    scale: float | None,
    pooling: str,
) -> Population:
    """The data, checked, and their scales."""
    if y is None:
        if num_series is None or num_steps is None:
            raise ValueError("`num_series` and `num_steps` are required where `y` is None.")
        sizes = check_count("num_series", num_series), check_count("num_steps", num_steps)
        found, (first, within, total) = None, (0.0, 1.0, 1.0)
    else:
        given = y if is_traced(y) or isinstance(y, np.ndarray) else _array(y)
        shape = np.shape(given)
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 1):
            raise ValueError(f"`y` must have shape (series, time) or (series, time, 1); got {shape}.")
        sizes = shape[0], shape[1]
        for name, value, size in (("num_series", num_series, sizes[0]), ("num_steps", num_steps, sizes[1])):
            if value is not None and value != size:
                raise ValueError(f"`{name}` is {value}, but `y` has {size}; leave it out.")
        found = series(given[..., None] if len(shape) == 2 else given, 1)  # pyright: ignore[reportIndexIssue]
        first, within, total = _spreads(found)
    if location is not None:
        first = location if found is None or found.origin is None else np.asarray(location, float) - found.origin[0]
    if scale is not None:
        total = (scale**2 + total**2 - within**2) ** 0.5
        within = scale
    return Population(found, *sizes, number(first), number(within), number(total), pooling)


def _array(y: Any) -> Any:
    try:
        return as_float("y", y) if isinstance(y, jax.Array) else np.asarray(y, float)
    except (TypeError, ValueError):
        raise ValueError(
            "`y` must be an array (series, time), NaN where a series has no value; got series of unequal length? "
            "`pssm.datasets.stack_series` makes one of them."
        ) from None


def _spreads(found: Series) -> tuple[Any, Any, Any]:
    """Mean of first values, typical spread within a series, and that with the spread of first values."""
    xp: Any = jnp if is_traced(found.values) else np
    rows = found.values[..., 0]
    seen = ~xp.isnan(rows)
    filled, count = xp.where(seen, rows, 0.0), seen.sum(1)
    mean = filled.sum(1) / xp.maximum(count, 1)
    within = xp.sqrt((xp.where(seen, rows - mean[:, None], 0.0) ** 2).sum() / xp.maximum((count - 1).clip(0).sum(), 1))
    first = xp.take_along_axis(filled, xp.argmax(seen, 1)[:, None], 1)[:, 0]
    there = xp.maximum((count > 0).sum(), 1)
    centre = first.sum() / there
    between = xp.sqrt((xp.where(count > 0, first - centre, 0.0) ** 2).sum() / there)
    size = xp.abs(centre + (0.0 if found.origin is None else found.origin[0]))
    tiny = 16 * found.precision * size
    total = xp.sqrt(within**2 + between**2)
    total = xp.where(total > tiny, total, xp.where(size > 0, size, 1.0))
    return centre, xp.where(within > tiny, within, total), total


def _level(about: Population, *, walk: bool, slope: bool) -> Part:
    """Levels, with slopes if asked for."""
    origin = None if about.found is None else about.found.origin
    mean = located("level_mean", Normal(about.location, 10 * about.total, unit=about.total), origin)
    sd = jnp.asarray(numpyro.sample("level_sd", HalfNormal(2 * about.total)))
    one = jnp.eye(1)
    zero = jnp.zeros(about.num_series)
    sigma = about.scales("sigma_level", about.within) if walk else zero
    if not slope:
        return Part(jnp.reshape(mean, (1,)), sd * one, one, sigma[:, None, None] * one, one, ("level",))
    first, first_sd = _first(about, "slope")
    steep = about.scales("sigma_slope", 0.1 * about.within)
    noise = jnp.stack([sigma, steep], axis=-1)[:, :, None] * jnp.eye(2)
    m0 = jnp.stack([jnp.reshape(mean, ()), first])
    A = jnp.array([[1.0, 1.0], [0.0, 1.0]])
    return Part(m0, jnp.diag(jnp.stack([sd, first_sd])), A, noise, jnp.eye(2)[:1], ("level", "slope"))


def _first(about: Population, name: str, size: int | None = None) -> tuple[Array, Array]:
    """Mean and spread over the series of states at the start."""
    prior = Normal(0.0, about.within)
    mean = numpyro.sample(f"{name}_mean", prior if size is None else prior.expand([size]).to_event(1))
    return jnp.asarray(mean), jnp.asarray(numpyro.sample(f"{name}_sd", HalfNormal(about.within)))


def _seasonal(about: Population, plain: Scale, period: float, waves: tuple[int, ...] | None, label: str) -> Part:
    """Seasonal patterns about one of the population."""
    if waves is None:
        A, names = components.dummy_pattern(int(period), label)
        C = jnp.eye(len(names))[:1]
        enters = C.T
    else:
        A, C, names = components.wave_pattern(plain, period, waves, label)
        enters = jnp.eye(len(names))
    mean, sd = _first(about, f"seasonal{label}", len(names))
    sigma = about.scales(f"sigma_seasonal{label}", 0.1 * about.within)
    return Part(mean, sd * jnp.eye(len(names)), A, sigma[:, None, None] * enters, C, names)


def _autoregression(about: Population, order: int) -> Part:
    """Stationary autoregressions, whose partial autocorrelations are about those of the population."""
    uniform = dist.Uniform(-1.0, 1.0)
    if about.pooling == "none":
        with about.plate():
            each = jnp.asarray(numpyro.sample("ar_partial_each", uniform.expand([order]).to_event(1)))
    else:
        common = jnp.asarray(numpyro.sample("ar_partial", uniform.expand([order]).to_event(1)))
        each = jnp.broadcast_to(common, (about.num_series, order))
        if about.pooling == "partial":
            each = jnp.tanh(jnp.arctanh(common) + about.deviations("ar_partial", order))
    sigma = about.scales("sigma_ar", about.within)
    phi, chol_P0 = jax.vmap(components.stationary_autoregression)(each, sigma)
    lags = jnp.broadcast_to(jnp.eye(order - 1, order), (about.num_series, order - 1, order))
    first = jnp.eye(order)[:, :1]
    names = ("ar", *(f"ar_lag{i}" for i in range(1, order)))
    A = jnp.concatenate([phi[:, None], lags], axis=1)
    return Part(jnp.zeros(order), chol_P0, A, sigma[:, None, None] * first, first.T, names)


def _varying(varying: bool | Sequence[bool], size: int) -> np.ndarray:
    chosen = np.asarray(varying, bool)
    if chosen.ndim and chosen.shape != (size,):
        raise ValueError(f"`varying` must be one answer, or one for each of {size} regressors; got {varying}.")
    return np.broadcast_to(chosen, (size,))


def _effects(about: Population, inputs: Regressors, chosen: np.ndarray) -> Part:
    """What the effects of some regressors have of their own in each series: states that do not move."""
    k = int(chosen.sum())
    prior = HalfNormal(about.within / inputs.spread[chosen]).to_event(1)
    sd = jnp.asarray(numpyro.sample("beta_sd", prior, infer={"dims": {"beta_sd": ("varying_input",)}}))
    rows = inputs.differences[..., np.flatnonzero(chosen)][..., None, :]  # (..., time, 1, input)
    names = tuple(f"beta_{i}" for i in np.flatnonzero(chosen))
    return Part(jnp.zeros(k), jnp.diag(sd), jnp.eye(k), jnp.zeros((k, 1)), rows, names)


def _join(
    parts: list[Part], sigma_obs: Array, D: Array | None, timed: tuple[str, ...], num_series: int
) -> LinearGaussianSSM:
    """The sum of the components; a field has the series in front where one of its parts has them."""

    def diagonal(blocks: list[Array]) -> Array:
        lead = jnp.broadcast_shapes(*(x.shape[:-2] for x in blocks))
        width = [x.shape[-1] for x in blocks]
        rows = []
        for i, x in enumerate(blocks):
            space = [(0, 0)] * len(lead) + [(0, 0), (sum(width[:i]), sum(width[i + 1 :]))]
            rows.append(jnp.pad(jnp.broadcast_to(x, lead + x.shape[-2:]), space))
        return jnp.concatenate(rows, axis=-2)

    lead = jnp.broadcast_shapes(*(part.C.shape[:-2] for part in parts))
    return LinearGaussianSSM(
        jnp.concatenate([part.m0 for part in parts]),
        diagonal([part.chol_P0 for part in parts]),
        diagonal([part.A for part in parts]),
        diagonal([part.chol_Q for part in parts]),
        jnp.concatenate([jnp.broadcast_to(part.C, lead + part.C.shape[-2:]) for part in parts], axis=-1),
        sigma_obs[:, None, None] * jnp.ones((1, 1)),
        D=D,
        time_varying=timed,
    )
