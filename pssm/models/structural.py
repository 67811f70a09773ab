"""Structural time-series models of one series, as plain NumPyro model functions.

Every model is `f(y=None, *, num_steps=None, u=None, ..., states="marginal")`: pass the data to condition on them, or
`num_steps` to predict. `y` has shape `(time,)` or `(time, 1)`; NaN entries are missing.

Observations at uneven times come with `t` `(time,)`, in order: the components are then differential equations,
discretised exactly. Parameters, periods and priors are per unit of time, so choose a unit near the usual gap; with
`t = 0, 1, 2, ...` the models are those without it, but for the trend, whose slope then moves within the steps too. To
forecast, append times whose `y` is NaN.

Regressors `u` count from their first row: the level (or `mean`) is that of `y` while they have their first values, and
`beta` is per unit of `u`. So nothing depends on where the zero of `y` or `u` lies, nor on their units: the sampler
moves in coordinates without units (`pssm.distributions.in_units`), and draws have the user's units. Data in 64 bits
that 32 bits cannot hold (heights near 1e7 that differ by centimetres) count from their first value, inside; a location
such as `mean` is then the sum of that value and a site `mean_above`.

With `states="marginal"` (the default) the states are integrated out exactly: the model has one observed site `y`, a
`LinearGaussianMarginal`, and only its parameters are sampled. With `states="sampled"` the path is the site `z`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from pssm._checks import check_choice, check_count
from pssm._types import Array, ArrayLike
from pssm.distributions.in_units import Normal
from pssm.distributions.state_path import check_steps
from pssm.models import components
from pssm.models.components import Block, Scale
from pssm.models.effects import regression
from pssm.models.patterns import patterns
from pssm.models.scales import Series, located, observe_from, warn_of_few
from pssm.models.single import STATES, fit, marginal, one_series, scale_of
from pssm.sde import gaps_between
from pssm.ssm import LinearGaussianSSM


def local_level(
    y: ArrayLike | None = None,
    *,
    num_steps: int | None = None,
    t: ArrayLike | None = None,
    u: ArrayLike | None = None,
    states: str = "marginal",
    initial: str = "prior",
    location: float | None = None,
    scale: float | None = None,
) -> None:
    """A random walk observed with noise: `y_t = level_t + v_t`, `level_t = level_{t-1} + w_t`.

    Priors: `sigma_level, sigma_obs ~ HalfNormal(scale)`, first level `N(location, (10 scale)^2)`.

    Args:
        y: data `(time,)` or `(time, 1)`, NaN where missing; None to predict.
        num_steps: number of steps, needed where `y` is None.
        t: times of the observations, see the module's head.
        u: regressors `(time, input)`: adds `beta' (u_t - u_1)`, see the module's head.
        states: "marginal" (integrated out) or "sampled" (a site `z` of shape `(time, 1)`).
        initial: "prior", the wide normal priors above, or "diffuse": level, slope and seasonal states have no prior,
            with the limit taken exactly (`LinearGaussianSSM`), as other programs' likelihoods have it. Needs data, and
            `states="marginal"`; without data it is "prior".
        location: centre of the prior of the first level; by default the first observed value, 0 without data.
        scale: spread the priors are scaled by; by default the standard deviation of the data, 1 without data.

    Raises:
        ValueError: neither `y` nor `num_steps` is given, a shape does not fit, or `states` is unknown.

    Example:
        >>> from numpyro.infer import MCMC, NUTS
        >>> from pssm import datasets
        >>> mcmc = MCMC(NUTS(local_level), num_warmup=100, num_samples=100, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), datasets.load("nile").y)

    Source:
        Harvey 1989, section 2.2; Durbin & Koopman 2012, chapter 2.
    """
    fit(y, num_steps, t, u, states, location, scale, lambda s: [components.level_block(s)], initial=initial)


def local_linear_trend(
    y: ArrayLike | None = None,
    *,
    num_steps: int | None = None,
    t: ArrayLike | None = None,
    u: ArrayLike | None = None,
    states: str = "marginal",
    initial: str = "prior",
    location: float | None = None,
    scale: float | None = None,
) -> None:
    """A level with a slope, both random walks, observed with noise.

    Priors: `sigma_level, sigma_obs ~ HalfNormal(scale)`, `sigma_slope ~ HalfNormal(scale / 10)`. Arguments as in
    `local_level`; the state is `(level, slope)`.

    Source:
        Harvey 1989, section 2.3; Durbin & Koopman 2012, section 3.2.
    """
    fit(y, num_steps, t, u, states, location, scale, lambda s: [components.trend_block(s)], initial=initial)


def seasonal(
    y: ArrayLike | None = None,
    *,
    period: float | Sequence[float],
    harmonics: int | Sequence[int | None] | None = None,
    pattern: str | Sequence[str | None] | None = None,
    num_steps: int | None = None,
    t: ArrayLike | None = None,
    u: ArrayLike | None = None,
    states: str = "marginal",
    initial: str = "prior",
    location: float | None = None,
    scale: float | None = None,
) -> None:
    """A local level and a seasonal pattern that changes slowly.

    Args:
        y: as in `local_level`, like the arguments not listed here.
        period: number of time steps in a season, at least 2; need not be whole with `harmonics`. Several periods are
            patterns that add up: `(24, 168)` for hours, `(7, 365.25)` for days.
        harmonics: number of sine waves of the pattern, at most half the period: then it is full (`period - 1` states).
            By default the pattern is free: one effect for every step of a whole period (`period - 1` states, singular
            `Q`) up to 7 steps, three waves beyond that. With several periods, one number or one for each.
        pattern: "dummy", free effects for any whole period, or "trigonometric", waves (all of a whole period's without
            `harmonics`); one, or one for each period. None for the default above.
        num_steps: number of steps, needed where `y` is None.
        t: times of the observations, see the module's head.
        u: regressors `(time, input)`.
        states: "marginal" or "sampled".
        initial: "prior" or "diffuse", as in `local_level`.
        location: as in `local_level`.
        scale: as in `local_level`.

    Source:
        Durbin & Koopman 2012, section 3.2.
    """
    structural(
        y,
        num_steps=num_steps,
        t=t,
        u=u,
        level=True,
        seasonal=period,
        harmonics=harmonics,
        pattern=pattern,
        states=states,
        initial=initial,
        location=location,
        scale=scale,
    )


def structural(
    y: ArrayLike | None = None,
    *,
    num_steps: int | None = None,
    t: ArrayLike | None = None,
    u: ArrayLike | None = None,
    level: bool = True,
    trend: bool = False,
    damped: bool = False,
    seasonal: float | Sequence[float] | None = None,
    harmonics: int | Sequence[int | None] | None = None,
    pattern: str | Sequence[str | None] | None = None,
    cycle: bool | tuple[float, float] = False,
    ar: int = 0,
    matern: float | None = None,
    moving: bool | int | str | Sequence[int | str] = False,
    u_origin: ArrayLike | None = None,
    u_names: Sequence[str] | None = None,
    interventions: Mapping[str, Sequence[Any]] | None = None,
    noise: str = "normal",
    states: str = "marginal",
    initial: str = "prior",
    location: float | None = None,
    scale: float | None = None,
) -> None:
    """Any sum of level, trend, seasonal, cycle, autoregression, regression and interventions, observed with noise.

    `y_t = level_t + seasonal_t + cycle_t + ar_t + beta_t' (u_t - u_1) + effect' x_t + v_t`, of which each part is there
    on demand. The components' parameters and priors are in `pssm.models.components`.

    Args:
        y: data `(time,)` or `(time, 1)`, NaN where missing; None to predict.
        num_steps: number of steps, needed where `y` is None.
        t: times of the observations, see the module's head.
        u: regressors `(time, input)`; adds `beta' (u_t - u_1)` with `beta ~ Normal(0, 2.5 scale / sd(u))`.
        level: a random-walk level. Without level and trend there is a constant `mean ~ Normal(location, 10 scale)`.
        trend: a level with a slope (includes the level).
        damped: the slope of the trend dies out, `slope_t = trend_damping slope_{t-1} + w_t`, so that forecasts level
            off; `trend_damping ~ Beta(18, 2)`.
        seasonal: number of time steps in a season, or several for patterns that add up, `(24, 168)`: their sites and
            states are then called `sigma_seasonal_24`, `seasonal_24_1`, ... None for no season.
        harmonics: waves of the seasonal pattern, one number or one for each pattern, see `seasonal`.
        pattern: "dummy" or "trigonometric", one or one for each seasonal pattern, see `seasonal`.
        cycle: a damped stochastic cycle; True, or bounds `(shortest, longest)` of its period in time steps.
        ar: order of a stationary autoregression, 0 for none; not with `t` (`matern=0.5` is the one of order 1).
        matern: smoothness of a stationary Gaussian process, 0.5, 1.5 or 2.5 (`pssm.sde.matern`); None for none.
        moving: which coefficients of `u` are random walks: all (True), or columns by number or name. They are states,
            `beta_<column>`, with `sigma_beta ~ HalfNormal(0.1 scale / sd(u))`.
        u_origin: what regressors count from, a number or one for each, by default their first row. For a moving
            coefficient it matters: the level is that at these values, and does not move with the coefficient. Take 0
            where zero means none (holidays, trading days).
        u_names: names of the columns of `u`, for states and coordinates; by default those of a frame of pandas.
        interventions: events at known times, by name: `{"law": ("step", 60)}` is 1 from step 60 on, `("pulse", 30)` at
            step 30 alone, `("pulse", 30, 32)` from 30 to 32, `("slope", 80)` bends the trend after 80, `("ramp", 40,
            52)` goes from 0 at 40 to 1 at 52. Steps count from 0; with `t` they are times. For dates see
            `pssm.datasets.interventions`. The site `effect` has the coefficients, `~ Normal(0, 5 scale)`, of a slope
            (per unit of time) `~ Normal(0, scale)`. They go on in forecasts.
        noise: of the observations: "normal"; "student_t", with `nu_obs` degrees of freedom, for outliers; or
            "stochastic_volatility", whose log variance is an autoregression. With these, and states integrated out,
            each step has a number of its own that is sampled (`weight_obs`, `log_variance`); with `states="sampled"`
            the log variance is the last state.
        states: "marginal" or "sampled".
        initial: "prior" or "diffuse", as in `local_level`.
        location: as in `local_level`.
        scale: as in `local_level`.

    Raises:
        ValueError: no component, or a setting that does not fit; the message names it.

    Example:
        >>> from functools import partial
        >>> from numpyro import handlers
        >>> weekly = partial(structural, trend=True, seasonal=365.25 / 7, harmonics=2)
        >>> trace = handlers.trace(handlers.seed(weekly, 0)).get_trace(num_steps=104)
        >>> trace["y"]["fn"].ssm.n_state
        6
        >>> law = partial(structural, interventions={"law": ("step", 28)}, noise="student_t")
        >>> trace = handlers.trace(handlers.seed(law, 0)).get_trace(num_steps=50)
        >>> trace["effect"]["value"].shape, trace["weight_obs"]["value"].shape
        ((1,), (50,))

    Source:
        Harvey 1989, chapters 2 and 7; Durbin & Koopman 2012, chapter 3. Damping: Gardner & McKenzie 1985.
    """
    check_count("ar", ar, least=0)
    if not (level or trend or seasonal is not None or cycle or ar or matern or _any(moving)):
        raise ValueError(
            "`structural` needs at least one component: `level`, `trend`, `seasonal`, `cycle`, `ar`, `matern` or "
            "`moving` coefficients."
        )
    if ar and t is not None:
        raise ValueError("`ar` counts steps and does not go with `t`; `matern=0.5` is its like of order 1 in time.")
    least = 2.0 if t is None else 1e-9  # steps cannot tell shorter periods from longer ones
    if isinstance(cycle, tuple | list) and not least <= cycle[0] < cycle[1]:
        bound = "2 <=" if t is None else "0 <"
        raise ValueError(f"`cycle` must be bounds with {bound} shortest < longest; got {cycle}.")
    if damped and not trend:
        raise ValueError("`damped` is of a trend: add `trend=True`.")
    seasons = patterns(seasonal, harmonics, pattern, uneven=t is not None)
    span = None if t is None else jnp.sum(gaps_between(t)) + 1.0

    def blocks(s: Scale, length: int) -> list[Block]:
        longest = max(float(length), 6.0) if span is None else jnp.maximum(span, 6.0)
        parts = []
        if trend or level:
            make = components.damped_trend_block if damped else components.trend_block
            parts.append(make(s) if trend else components.level_block(s))
        for period, waves, label in seasons:
            parts.append(
                components.dummy_seasonal_block(s, int(period), label)
                if waves is None
                else components.harmonic_seasonal_block(s, period, waves, label)
            )
        if cycle:
            parts.append(components.cycle_block(s, *((3.0, longest) if cycle is True else cycle)))
        if ar:
            parts.append(components.autoregressive_block(s, ar))
        if matern:
            parts.append(components.matern_block(s, matern, 1.0, longest))
        return parts

    _, length = one_series(y, num_steps, t)
    fit(
        y,
        num_steps,
        t,
        u,
        states,
        location,
        scale,
        lambda s: blocks(s, length),
        constant=not (level or trend),
        moving=moving,
        u_origin=u_origin,
        u_names=u_names,
        interventions=interventions,
        noise=noise,
        initial=initial,
    )


def _any(moving: Any) -> bool:
    """Whether some coefficients move."""
    return moving if isinstance(moving, bool) else not isinstance(moving, Sequence) or len(moving) > 0


def autoregression(
    y: ArrayLike | None = None,
    *,
    order: int = 1,
    num_steps: int | None = None,
    u: ArrayLike | None = None,
    states: str = "marginal",
    location: float | None = None,
    scale: float | None = None,
) -> None:
    """A stationary autoregression around a mean, observed exactly: `y_t - mean = phi . (lags) + w_t`.

    Companion form with a singular `Q` and `R = 0`, right with missing entries. Priors: `mean ~ Normal(location,
    scale)`, `ar_partial ~ Uniform(-1, 1)`, `sigma_ar ~ HalfNormal(scale)`; `phi` is deterministic.

    With `states="sampled"` the values that were not observed are sampled, through their standard normal innovations
    `z_base`; the states `z` `(time, order)` are deterministic.

    Args:
        y: as in `local_level`, like the arguments not listed here.
        order: number of lags, at least 1.
        num_steps: number of steps, needed where `y` is None.
        u: regressors `(time, input)` that shift the mean.
        states: "marginal" or "sampled".
        location: by default the mean of the data.
        scale: as in `local_level`.

    Source:
        Durbin & Koopman 2012, section 3.4.
    """
    check_choice("states", states, STATES)
    check_count("order", order)
    found, length = one_series(y, num_steps)
    about = scale_of(found, location, scale, mean=True)
    mean = located("mean", Normal(about.location, about.spread), None if found is None else found.origin)
    block = components.autoregressive_block(about, order)
    warn_of_few(found, order)
    effect, inputs, _ = regression(u, length, about)
    if states == "marginal":
        ssm = LinearGaussianSSM(*block[:5], jnp.zeros((1, 1)), d=mean[None], D=effect)
        marginal(ssm, length, inputs, found, {"state_names": block.names})
        return
    shift = mean if effect is None or inputs is None else mean + inputs.differences @ effect[0]
    _sampled_autoregression(found, length, block, jnp.broadcast_to(shift, (length,)))


def _sampled_autoregression(found: Series | None, length: int, block: Block, shift: Array) -> None:
    """Observed values enter as they are, missing ones are drawn: `x_t = mean_t + sigma e_t` with `e_t` a site."""
    order = block.m0.shape[0]
    normal = dist.Normal(0.0, 1.0).expand([length + order - 1]).to_event(1)
    noise = numpyro.sample("z_base", normal, infer={"state_names": block.names, "path_noise": True})
    check_steps("z_base", noise, normal, length)
    sigma = block.chol_Q[0, 0]
    values = jnp.full(length, jnp.nan) if found is None else jnp.asarray(found.values[:, 0], shift.dtype)
    seen = ~jnp.isnan(values)
    centred = jnp.where(seen, values, 0.0) - shift
    # The first state: its first entry is x_1, the others are the lags before the series, given x_1.
    first_e = jnp.where(seen[0], centred[0] / block.chol_P0[0, 0], noise[0])
    first = block.chol_P0 @ jnp.concatenate([first_e[None], noise[length:]])

    def step(z: Array, xs: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        x, is_seen, e = xs
        mean = block.A[0] @ z
        z = jnp.concatenate([jnp.where(is_seen, x, mean + sigma * e)[None], z[:-1]])
        return z, (z, mean)

    _, (later, means) = jax.lax.scan(step, first, (centred[1:], seen[1:], noise[1:length]))
    path = numpyro.deterministic("z", jnp.concatenate([first[None], later]))
    if found is None:
        numpyro.sample("y", dist.Delta(path[:, :1] + shift[:, None], event_dim=2))
        return
    centre = jnp.concatenate([jnp.zeros(1), means]) + shift
    spread = jnp.concatenate([block.chol_P0[0, :1], jnp.broadcast_to(sigma, (length - 1,))])
    observe_from("y", dist.Normal(centre[:, None], spread[:, None]), found)
