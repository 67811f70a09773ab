"""The dynamic factor model."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpyro
import numpyro.distributions as dist

from pssm._checks import check_choice, check_count
from pssm._types import Array, ArrayLike
from pssm.distributions.in_units import HalfNormal, Normal
from pssm.distributions.stable import stationary_vector_autoregression
from pssm.models.components import stationary_autoregression
from pssm.models.periods import periods_of, series_names
from pssm.models.scales import located
from pssm.models.several import look_at, observe_series, sample_path, triangular_loadings
from pssm.models.single import STATES, marginal
from pssm.ssm import LinearGaussianSSM


def dynamic_factor(
    y: ArrayLike | None = None,
    *,
    num_factors: int = 1,
    factor_order: int = 1,
    error_order: int = 0,
    num_steps: int | None = None,
    num_obs: int | None = None,
    u: ArrayLike | None = None,
    aggregate: Mapping[Any, str] | Sequence[str | None] | None = None,
    every: Any = None,
    start: Any = 0,
    names: Sequence[str] | None = None,
    states: str = "marginal",
    location: ArrayLike | None = None,
    scale: ArrayLike | None = None,
) -> None:
    """A few common factors and one error for each series: `y_t = C f_t + D (u_t - u_1) + d + e_t`.

    The factors are a stationary vector autoregression with unit innovations; the errors are white noise or
    autoregressions of their own. Loadings are lower triangular with a positive diagonal: the order of the first
    `num_factors` series matters, choose ones that the factors move.

    Priors: `loadings ~ N(0, scale_i^2)`, `d ~ N(location_i, (2 scale_i)^2)`, `sigma_obs ~ HalfNormal(scale)`,
    `D ~ N(0, (2.5 scale / sd(u))^2)`; partial autocorrelations of the errors `~ Uniform(-1, 1)`, and those of the
    factors `L^{-1} X` with `L L' = 1 + X X'` and standard normal `X` (the site `factor_partial`).

    Args:
        y: as in `lds`, like the arguments not listed here.
        num_factors: number of factors, at most the number of series.
        factor_order: lags of the factors.
        error_order: lags of each series' error; 0 for white noise.
        num_steps: number of steps, needed where `y` is None.
        num_obs: number of series, likewise.
        u: regressors `(time, input)`.
        aggregate: series that are sums or means over periods, as in `multivariate_structural`: quarterly figures of
            what moves monthly. Their `sigma_obs` is of the figure, or with `error_order` of a step.
        every: number of steps in a period, likewise.
        start: place of the first step in its period, likewise.
        names: of the series, likewise; an error with a state of its own is called `error[gdp]`.
        states: "marginal" or "sampled". Sampled are the factors and their lags; the errors are integrated out.
        location: as in `lds`.
        scale: as in `lds`.

    Raises:
        ValueError: more factors than series, or as in `lds`.

    Example:
        >>> import numpy as np
        >>> from pssm import datasets
        >>> growth = np.diff(np.log(datasets.load("macrodata", ["realgdp", "realcons"]).y), axis=0)
        >>> fn = numpyro.handlers.seed(dynamic_factor, 0)
        >>> numpyro.handlers.trace(fn).get_trace(growth)["loadings"]["value"].shape
        (2, 1)

    Source:
        Durbin & Koopman 2012, section 3.7; Geweke 1977; stationarity: Ansley & Kohn 1986.
    """
    check_choice("states", states, STATES)
    k, order = check_count("num_factors", num_factors), check_count("factor_order", factor_order)
    check_count("error_order", error_order, least=0)
    figures = look_at(y, num_steps, num_obs, u, location, scale, from_origin=True)
    p = figures.num_obs
    if k > p:
        raise ValueError(f"`num_factors` must be at most {p}, the number of series; got {k}.")
    own = series_names(names, y, p)
    periods = periods_of(aggregate, every, start, own, figures.num_steps)
    about = figures if periods is None else periods.per_step(figures)
    X = numpyro.sample("factor_partial", dist.Normal(jnp.zeros((order, k, k)), 1.0).to_event(3))
    coefficients, chol = stationary_vector_autoregression(X)
    numpyro.deterministic("phi", coefficients)
    loadings = triangular_loadings("loadings", about.scale, k)
    noise_scale = about.scale if error_order else figures.scale
    sigma = jnp.asarray(numpyro.sample("sigma_obs", HalfNormal(noise_scale).to_event(1)))
    origin = None if about.origin is None else about.origin / (1.0 if periods is None else periods.steps)
    d = located("d", Normal(about.location, 2 * about.scale).to_event(1), origin)
    D = None
    if about.u is not None:
        D = numpyro.sample("D", Normal(0.0, 2.5 * about.scale[:, None] / about.input_scale).to_event(2))

    size = order * k
    A = jnp.concatenate([jnp.concatenate(list(coefficients), axis=1), jnp.eye(size - k, size)])
    C = jnp.pad(loadings, ((0, 0), (0, size - k)))
    factors = LinearGaussianSSM(jnp.zeros(size), chol, A, jnp.eye(size, k), C, jnp.diag(sigma), d=d, D=D)
    named = [f"factor_{j + 1}" + (f"_lag{i}" if i else "") for i in range(order) for j in range(k)]

    def figure(ssm: LinearGaussianSSM) -> LinearGaussianSSM:
        return ssm if periods is None else periods.of(ssm, about)

    def observed(ssm: LinearGaussianSSM, states: str) -> None:
        all_names = named if periods is None else periods.names(named, own)
        observe_series(figure(ssm), about, states, {"state_names": tuple(all_names)})

    if not error_order:
        observed(factors, states)
        return
    partial = numpyro.sample("error_partial", dist.Uniform(-1.0, 1.0).expand([p, error_order]).to_event(2))
    errors = _errors(partial, sigma)
    if states == "marginal":
        named += [f"error[{name}]" + (f"_lag{i}" if i else "") for name in own for i in range(error_order)]
        observed(_sum(factors, errors), states)
        return
    z = sample_path(factors, about, {"state_names": tuple(named)})  # given the factors, errors are about them
    signal = factors.signal(z, None if about.inputs is None else about.inputs.differences)
    marginal(figure(errors.replace(d=signal, time_varying=("d",))), about.num_steps, None, about.series)


def _errors(partial: Array, sigma: Array) -> LinearGaussianSSM:
    """One autoregression for each series, `(obs, order)` partial autocorrelations, observed exactly."""
    p, order = partial.shape
    phi, chol = jax.vmap(stationary_autoregression)(partial, sigma)
    companion = jnp.concatenate([phi[:, None], jnp.broadcast_to(jnp.eye(order - 1, order), (p, order - 1, order))], 1)
    first = jnp.eye(order)[:, :1]

    def blocks(x: Array) -> Array:
        """Block-diagonal matrix of `(obs, rows, cols)`."""
        _, rows, cols = x.shape
        return (jnp.eye(p)[:, None, :, None] * x[:, :, None, :]).reshape(p * rows, p * cols)

    noise = blocks(sigma[:, None, None] * first)
    seen = blocks(jnp.broadcast_to(first.T, (p, 1, order)))
    return LinearGaussianSSM(jnp.zeros(p * order), blocks(chol), blocks(companion), noise, seen, jnp.zeros((p, p)))


def _sum(a: LinearGaussianSSM, b: LinearGaussianSSM) -> LinearGaussianSSM:
    """The states of both, observed through their sum; the observations' noise is that of `b`, the offset of `a`."""
    return LinearGaussianSSM(
        jnp.concatenate([a.m0, b.m0]),
        jsl.block_diag(a.chol_P0, b.chol_P0),
        jsl.block_diag(a.A, b.A),
        jsl.block_diag(a.chol_Q, b.chol_Q),
        jnp.concatenate([a.C, b.C], axis=1),
        b.chol_R,
        d=a.d,
        D=a.D,
    )
