"""The structural model of several series: level, slope, seasonal and cycle, their noise correlated over the series."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform

from pssm._checks import check_choice, check_count
from pssm._types import Array, ArrayLike
from pssm.distributions.in_units import HalfNormal, Normal
from pssm.models import components
from pssm.models.components import Scale
from pssm.models.patterns import patterns
from pssm.models.periods import labels_of, periods_of, series_names
from pssm.models.scales import located, moments, number
from pssm.models.several import About, below_diagonal, look_at, observe_series, sample_path, triangular_loadings
from pssm.models.single import STATES, marginal
from pssm.ssm import LinearGaussianSSM

UNIT = constraints.unit_interval
PARTS = ("level", "slope", "seasonal", "cycle")
Rank = int | Mapping[str, int] | None


class Part(NamedTuple):
    """A component of all series: that of one series, with a noise that is a vector over the series.

    Attributes:
        A, C: transition and emission `(1, k)` of one series.
        noise: for each independent noise vector, where it enters `(k,)`, and its factor `(obs, rank)`.
        m0: `(k, obs)`.
        chol_P0: `(k obs, k obs)`.
        names: of the states of one series.
    """

    A: Array
    C: Array
    noise: list[tuple[Array, Array]]
    m0: Array
    chol_P0: Array
    names: tuple[str, ...]


def multivariate_structural(
    y: ArrayLike | None = None,
    *,
    num_obs: int | None = None,
    num_steps: int | None = None,
    u: ArrayLike | None = None,
    level: bool = True,
    trend: bool = False,
    seasonal: float | Sequence[float] | None = None,
    harmonics: int | Sequence[int | None] | None = None,
    cycle: bool | tuple[float, float] = False,
    rank: Rank = None,
    noise: str = "diagonal",
    aggregate: Mapping[Any, str] | Sequence[str | None] | None = None,
    every: Any = None,
    start: Any = 0,
    names: Sequence[str] | None = None,
    states: str = "marginal",
    location: ArrayLike | None = None,
    scale: ArrayLike | None = None,
) -> None:
    """Seemingly unrelated time-series equations: `y_it = level_it + seasonal_it + cycle_it + D_i (u_t - u_1) + v_it`.

    Each series has its own components, related through their noise, which is correlated over the series:

        level_t = level_{t-1} + slope_{t-1} + N(0, L L'),   slope_t = slope_{t-1} + N(0, S S'),   L, S: (obs, rank)

    and likewise the noise of a seasonal pattern, of a cycle (with one period and one damping for all series), and, if
    asked for, of the observations. With full rank `L = diag(sigma) K`, where `K K'` is a correlation matrix. With a
    lower rank `L` is a matrix of loadings (lower triangular, positive diagonal): the levels are `rank` common walks,
    plus a constant for each series, its own first level.

    Priors, `s_i` the spread of a series: `sigma_level, sigma_cycle, sigma_obs ~ HalfNormal(s)`, `sigma_slope,
    sigma_seasonal ~ HalfNormal(s / 10)`; correlations `LKJ(1)`, all matrices alike; loadings `N(0, w^2 / rank)` with
    the same `w = s` or `s / 10`; first levels `N(first value, (10 s)^2)`, slopes and seasonal effects `N(0, s^2)`,
    cycles stationary; `D ~ N(0, (2.5 s / sd(u))^2)`.

    Args:
        y: data `(time, obs)`, or `(sequence, time, obs)` for independent sequences of one model; NaN where missing;
            None to predict. A frame of pandas gives the series their names.
        num_obs: number of series, needed where `y` is None.
        num_steps: number of steps, likewise.
        u: regressors `(time, input)`, which count from their first row; each series has its own effects.
        level: a random-walk level. Without level and trend there is a constant `mean` for each series.
        trend: a level with a slope (includes the level).
        seasonal: number of time steps in a season, or several, as in `structural`.
        harmonics: waves of the seasonal pattern, as in `structural`.
        cycle: a damped stochastic cycle, as in `structural`.
        rank: of the noise of level and slope, from 1 to the number of series; or for each of "level", "slope",
            "seasonal" and "cycle", `{"level": 0, "slope": 1}`: 0 for a component without noise, full where not named.
        noise: of the observations: "diagonal" or "correlated".
        aggregate: series that are sums or means over periods, or values at their end: `{"gdp": "sum"}`, by name or
            number; components then are those of every step. See `pssm.aggregate`.
        every: number of steps in a period, or a label for each step, those of a forecast included; by series
            where they differ.
        start: place of the first step in its period; by series where they differ.
        names: of the series; by default the columns of a frame, or numbers. States are called `level[gdp]`.
        states: "marginal" (integrated out) or "sampled" (a site `z` of shape `(time, state)`).
        location: centre of the priors of first levels (or of `mean`), one for each series; by default the first
            observed values, or the means; for a sum it is that of the figure.
        scale: spread of each series; by default the standard deviations of the data, 1 without data.

    Raises:
        ValueError: no component, or a setting that does not fit; the message names it.

    Example:
        >>> import functools
        >>> two = functools.partial(multivariate_structural, trend=True, seasonal=4, rank=1, names=("gdp", "prices"))
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(two, 0)).get_trace(num_steps=40, num_obs=2)
        >>> trace["y"]["infer"]["state_names"][:4]
        ('level[gdp]', 'level[prices]', 'slope[gdp]', 'slope[prices]')

    Source:
        Harvey 1989, chapter 8; Harvey & Koopman 1997; Durbin & Koopman 2012, section 3.3; the prior of correlations:
        Lewandowski, Kurowicka & Joe 2009.
    """
    check_choice("states", states, STATES)
    check_choice("noise", noise, ("diagonal", "correlated"))
    walks = level or trend
    if not (walks or seasonal is not None or cycle):
        raise ValueError("`multivariate_structural` needs a component: `level`, `trend`, `seasonal` or `cycle`.")
    if isinstance(cycle, tuple | list) and not 2 <= cycle[0] < cycle[1]:
        raise ValueError(f"`cycle` must be bounds with 2 <= shortest < longest; got {cycle}.")
    figures = look_at(y, num_steps, num_obs, u, location, scale, from_origin=True)
    if walks and location is None and figures.series is not None:
        figures = figures._replace(location=number(moments(figures.series, warn=False)[0]))
    p = figures.num_obs
    own = series_names(names, y, p)
    ranks = _ranks(rank, p)
    periods = periods_of(aggregate, every, start, own, figures.num_steps)
    about = figures if periods is None else periods.per_step(figures)

    parts = [_trend(about, ranks, trend)] if walks else []
    plain = Scale(jnp.zeros(()), jnp.ones(()))
    for period, waves, label in patterns(seasonal, harmonics, uneven=False):
        parts.append(_seasonal(about, ranks["seasonal"], plain, period, waves, label))
    if cycle:
        longest = max(float(about.num_steps), 6.0)
        parts.append(_cycle(about, ranks["cycle"], *((3.0, longest) if cycle is True else cycle)))
    chol_R = factor("obs", figures.scale, p) if noise == "correlated" else None
    if chol_R is None:
        chol_R = jnp.diag(sampled_scale("obs", figures.scale))
    origin = None if about.origin is None else about.origin / (1.0 if periods is None else periods.steps)
    d = D = None
    if not walks:
        prior = Normal(about.location, 10 * about.scale, unit=about.scale).to_event(1)
        d = located("mean", prior, origin)
    if about.u is not None:
        width = 2.5 * about.scale[:, None] / about.input_scale
        named = {"dims": {"D": ("series", "input")}}
        D = numpyro.sample("D", Normal(jnp.zeros(width.shape), width).to_event(2), infer=named)
    ssm, state_names = _join(parts, chol_R, d, D, own)
    above = np.pad(origin, (0, ssm.n_state - p)) if origin is not None and walks else None
    if periods is not None:
        ssm, state_names = periods.of(ssm, about), periods.names(state_names, own)
        above = None if above is None else np.pad(above, (0, ssm.n_state - len(above)))
    _observe(ssm, about, states, labels_of(state_names, names), above)


def sampled_scale(name: str, spread: Array) -> Array:
    """The site `sigma_<name> ~ HalfNormal(spread)`, one number for each series."""
    infer = {"dims": {f"sigma_{name}": ("series",)}}
    return jnp.asarray(numpyro.sample(f"sigma_{name}", HalfNormal(spread).to_event(1), infer=infer))


def factor(name: str, spread: Array, rank: int) -> Array:
    """Factor `(obs, rank)` of the covariance of a noise over the series, whose scales are relative to `spread`.

    Full: scales `sigma_<name>` and the partial correlations `partial_<name>`, with `corr_<name>` deterministic. Of a
    lower rank: loadings `loadings_<name>`.
    """
    p = len(spread)
    if rank == 0:
        return jnp.zeros((p, 0))
    if rank < p:
        return triangular_loadings(f"loadings_{name}", spread / rank**0.5, rank)
    sigma = sampled_scale(name, spread)
    if p == 1:
        return sigma[:, None]
    column = below_diagonal(p, p)[1]
    beta = dist.TransformedDistribution(dist.Beta(*2 * (p / 2 - column / 2,)), AffineTransform(-1.0, 2.0, UNIT))
    K = correlation_factor(jnp.asarray(numpyro.sample(f"partial_{name}", beta.to_event(1))), p)
    numpyro.deterministic(f"corr_{name}", K @ K.T)
    return sigma[:, None] * K


def correlation_factor(partial: Array, p: int) -> Array:
    """Lower-triangular factor `(p, p)` of a correlation matrix from `p (p - 1) / 2` partial correlations, row by row.

    Entry `(i, j)` is the correlation of the variables `i` and `j` given those before `j`. With independent
    `partial ~ 2 Beta(a, a) - 1`, `a = 1 + (p - 2 - j) / 2`, all correlation matrices are alike: LKJ(1). Unlike a
    matrix, partial correlations of plus or minus one are points that a maximum of the likelihood can be at.
    """
    rows, columns = below_diagonal(p, p)
    r = jnp.zeros((p, p), partial.dtype).at[rows, columns].set(partial)
    left = components.safe_sqrt(jnp.cumprod(1 - r**2, axis=1))  # of the row's length after each entry
    before = jnp.concatenate([jnp.ones((p, 1), partial.dtype), left[:, :-1]], axis=1)
    return jnp.tril((r + jnp.eye(p)) * before)


def _ranks(rank: Rank, p: int) -> dict[str, int]:
    """The rank of each component's noise."""
    asked = {"level": rank, "slope": rank} if not isinstance(rank, Mapping) else dict(rank)
    for name, value in asked.items():
        check_choice("rank", name, PARTS)
        if value is None:
            asked[name] = p
        elif check_count("rank", value, least=int(not isinstance(rank, Mapping) or name == "cycle")) > p:
            raise ValueError(f"`rank` must be at most {p}, the number of series; got {value}.")
    return {name: int(asked.get(name, p)) for name in PARTS}  # pyright: ignore[reportArgumentType]


def _trend(about: About, ranks: dict[str, int], slope: bool) -> Part:
    """Levels, with slopes if asked for."""
    spread, one = about.scale, jnp.eye(1)
    noise = [(one[0], factor("level", spread, ranks["level"]))]
    if not slope:
        return Part(one, one, noise, about.location[None], jnp.diag(10 * spread), ("level",))
    two = jnp.eye(2)
    noise = [(two[0], noise[0][1]), (two[1], factor("slope", 0.1 * spread, ranks["slope"]))]
    m0 = jnp.stack([about.location, jnp.zeros_like(about.location)])
    P0 = jnp.diag(jnp.concatenate([10 * spread, spread]))
    return Part(jnp.array([[1.0, 1.0], [0.0, 1.0]]), two[:1], noise, m0, P0, ("level", "slope"))


def _seasonal(about: About, rank: int, plain: Scale, period: float, waves: tuple[int, ...] | None, label: str) -> Part:
    """Seasonal patterns of one form."""
    if waves is None:
        A, names = components.dummy_pattern(int(period), label)
        C = jnp.eye(len(names))[:1]
        enters = C  # one noise, into the state that is seen
    else:
        A, C, names = components.wave_pattern(plain, period, waves, label)
        enters = jnp.eye(len(names))
    L = factor(f"seasonal{label}", 0.1 * about.scale, rank)
    k = len(names)
    start = jnp.kron(jnp.eye(k), jnp.diag(about.scale))
    return Part(A, C, [(row, L) for row in enters], jnp.zeros((k, about.num_obs)), start, names)


def _cycle(about: About, rank: int, shortest: float, longest: float) -> Part:
    """Similar cycles: of one period and one damping, with correlated noise; stationary."""
    period = numpyro.sample("cycle_period", dist.LogUniform(shortest, longest))
    damping = jnp.asarray(numpyro.sample("cycle_damping", dist.Beta(8.0, 2.0)))
    L = factor("cycle", about.scale, rank)
    first = jnp.pad(L, ((0, 0), (0, about.num_obs - rank))) / jnp.sqrt(1 - damping**2)
    plain, two = Scale(jnp.zeros(()), jnp.ones(())), jnp.eye(2)
    A = damping * plain.turn(2 * jnp.pi / jnp.asarray(period))
    names = ("cycle", "cycle_phase")
    return Part(A, two[:1], [(row, L) for row in two], jnp.zeros((2, about.num_obs)), jnp.kron(two, first), names)


def _join(
    parts: list[Part], chol_R: Array, d: Array | None, D: Array | None, own: tuple[str, ...]
) -> tuple[LinearGaussianSSM, tuple[str, ...]]:
    """The sum of the components as one model, and the names of its states: component by component, series by series."""
    one = jnp.eye(len(own))
    columns = [jnp.concatenate([jnp.kron(row[:, None], L) for row, L in part.noise], axis=1) for part in parts]
    ssm = LinearGaussianSSM(
        jnp.concatenate([part.m0.reshape(-1) for part in parts]),
        jsl.block_diag(*[part.chol_P0 for part in parts]),
        jsl.block_diag(*[jnp.kron(part.A, one) for part in parts]),
        jsl.block_diag(*columns),
        jnp.concatenate([jnp.kron(part.C, one) for part in parts], axis=1),
        chol_R,
        d=d,
        D=D,
    )
    return ssm, tuple(f"{name}[{series}]" for part in parts for name in part.names for series in own)


def _observe(
    ssm: LinearGaussianSSM, about: About, states: str, named: dict[str, Any], above: np.ndarray | None
) -> None:
    """The observed site; sampled paths are driven by their noise, whose units are 1."""
    if states == "marginal":
        observe_series(ssm, about, states, named, above)
        return
    if about.num_sequences is not None:
        with numpyro.plate("sequences", about.num_sequences):
            _observe(ssm, about._replace(num_sequences=None), states, named, above)
        return
    z = sample_path(ssm, about, named | ({} if above is None else {"origin": above}), by_noise=True)
    signal = ssm.signal(z, None if about.inputs is None else about.inputs.differences)
    p, none = ssm.n_obs, jnp.zeros((1, 1))
    rest = LinearGaussianSSM(
        none[0], none, none, none, jnp.zeros((p, 1)), ssm.chol_R, d=signal, time_varying=("d",)
    )  # given the states only the noise of the observations is left
    marginal(rest, about.num_steps, None, about.series)
