"""Vector autoregressions, with moving averages and regressors where they are wanted, `var`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pssm._checks import check_choice, check_count, is_traced
from pssm._types import Array, ArrayLike
from pssm.distributions.in_units import HalfNormal, Normal
from pssm.distributions.stable import stationary_vector_autoregression
from pssm.models.exactly import Start, observe_exactly
from pssm.models.scales import located, number, warn_of_few
from pssm.models.several import About, look_at
from pssm.models.single import STATES
from pssm.models.vector_arma import in_units_of, observable_form, stationary_start

TRENDS = ("n", "c", "ct")


def var(
    y: ArrayLike | None = None,
    *,
    order: int = 1,
    ma_order: int = 0,
    trend: str = "c",
    stationary: bool = False,
    own_lag: float = 1.0,
    tightness: float | None = 0.2,
    cross: float | None = 0.5,
    decay: float = 1.0,
    num_steps: int | None = None,
    num_obs: int | None = None,
    u: ArrayLike | None = None,
    states: str = "marginal",
    location: ArrayLike | None = None,
    scale: ArrayLike | None = None,
) -> None:
    """A vector autoregression, `y_t - m = c + sum_j A_j (y_{t-j} - m) + B (u_t - u_1) + e_t`, `e_t ~ N(0, S)`.

    With `ma_order` the error is `e_t + Theta_1 e_{t-1} + ...` (VARMAX). Observed exactly; entries may be missing
    anywhere, single series of a step too. `m` is the location of the data, a number: so the intercept `c` (the site
    `drift`) is the growth of series that stand at their location, and no prior depends on where their zero lies.

    The coefficients have a Minnesota prior: with the sizes `s` of the series' steps,

        A_j[i, k] ~ N(own_lag if j = 1 and i = k else 0, (tightness / j^decay (cross if i != k else 1) s_i / s_k)^2)

    and the start is diffuse: the likelihood is that of all values given the first `order` rows. With
    `stationary=True` every coefficient is stationary and the series starts in its stationary distribution about
    `mean ~ N(location, (2 scale)^2)`; then `ar_partial ~ N(0, 1)`, numbers `X` whose partial autocorrelations are
    `L^{-1} X` with `L L' = 1 + X X'`, in place of the Minnesota prior. Other priors: `sigma ~ HalfNormal(s)`, the
    standard deviations of `e_t`; `correlation`, a factor of its correlations, `~ LKJ(1)`; `drift ~ N(0, s^2)`;
    `slope ~ N(0, s^2)`, its change in a step; `B ~ N(0, (2.5 s / sd(u))^2)`; `ma_partial ~ N(0, 1 / 4)`, as
    `ar_partial`, so that moving averages are invertible.

    Args:
        y: data `(time, obs)`, NaN where missing; None to predict, from a start of `N(location, (10 scale)^2)` in place
            of the diffuse one.
        order: lags, at least 1.
        ma_order: lags of the moving average.
        trend: "n", no intercept, and `m = 0`; "c", an intercept; "ct", one that changes in a straight line (with
            `stationary=True`: a mean that does).
        stationary: whether stationarity is imposed.
        own_lag: centre of the prior of a series' own first lag: 1, a random walk, for levels; 0 for growth rates.
        tightness: overall standard deviation of the prior; None: a site `tightness ~ HalfNormal(0.5)`.
        cross: factor for lags of other series; None: a site `cross ~ Uniform(0, 1)`.
        decay: power of the lag by which the prior narrows.
        num_steps: number of steps, needed where `y` is None.
        num_obs: number of series, likewise.
        u: regressors `(time, input)`, whose effects the lags carry on.
        states: "marginal" (integrated out) or "sampled" (deterministic `z`, driven by the noise of missing entries
            and of the start, which then is not diffuse but as without data).
        location: centre of each series; by default the means of the data, 0 without data.
        scale: spread of each series, and then `s` too; by default the standard deviations of the data, and of their
            steps for `s`; 1 without data.

    Sites:
        `coefficients` `(lag, obs, obs)` (deterministic where stationary), `ma_coefficients`, `innovation_cov`
        (deterministic), `sigma`, `correlation`, `drift` or `mean`, `B` `(obs, input)`.

    Raises:
        ValueError: an option is unknown or out of range; the message names it.

    Example:
        >>> import numpy as np
        >>> from numpyro import handlers
        >>> from pssm import datasets
        >>> growth = np.diff(np.log(datasets.load("macrodata", ["realgdp", "realcons"]).y), axis=0)
        >>> trace = handlers.trace(handlers.seed(var, 0)).get_trace(growth, order=2, own_lag=0.0)
        >>> trace["coefficients"]["value"].shape, trace["y"]["fn"].ssm.n_state
        ((2, 2, 2), 4)

    Source:
        Litterman 1986; Giannone, Lenza & Primiceri 2015; stationarity: Ansley & Kohn 1986, Heaps 2023; state space
        form: Harvey 1989, section 8.3.
    """
    check_choice("states", states, STATES)
    check_choice("trend", trend, TRENDS)
    p, q = check_count("order", order), check_count("ma_order", ma_order, least=0)
    for name, value in (("tightness", tightness), ("cross", cross), ("decay", decay)):
        if value is not None and not is_traced(value) and not value >= 0:
            raise ValueError(f"`{name}` must not be negative; got {value}.")
    about = look_at(y, num_steps, num_obs, u, location, scale, from_origin=True)
    if about.num_sequences is not None:
        raise ValueError(f"`y` must be one group of series, of shape (time, obs); got {np.shape(about.y)}.")
    k = about.num_obs
    size = about.scale if scale is not None else number(_steps(about))
    warn_of_few(about.series, k * max(p, q + 1))
    sigma = jnp.asarray(numpyro.sample("sigma", HalfNormal(size).to_event(1)))
    chol = sigma[:, None] * _correlation(k, sigma.dtype)
    numpyro.deterministic("innovation_cov", chol @ chol.T)
    ma = _moving_average(q, chol)
    if stationary:
        X = numpyro.sample("ar_partial", dist.Normal(jnp.zeros((p, k, k), chol.dtype), 1.0).to_event(3))
        ar, factor = stationary_start(jnp.asarray(X), ma, chol)
        numpyro.deterministic("coefficients", ar)
    else:
        ar, factor = _minnesota(p, own_lag, tightness, cross, decay, size, chol.dtype), None
    if q:
        numpyro.deterministic("ma_coefficients", ma)
    A, noise, C = observable_form(ar, ma, chol)
    n = len(A)
    names = tuple(f"series_{i}" + (f"_carry{j}" if j else "") for j in range(n // k) for i in range(k))
    m0, b, d, slope = jnp.zeros(n, chol.dtype), None, None, None
    if trend != "n":
        d = jnp.broadcast_to(jnp.asarray(about.location, chol.dtype), (k,))
    if trend != "n" and stationary:
        d = located("mean", Normal(about.location, 2 * about.scale).to_event(1), about.origin)
    elif trend != "n":
        drift = jnp.asarray(numpyro.sample("drift", Normal(jnp.zeros(k, chol.dtype), size).to_event(1)))
        b = jnp.zeros(n, chol.dtype).at[:k].set(drift)
    if trend == "ct":
        slope = jnp.asarray(numpyro.sample("slope", Normal(jnp.zeros(k, chol.dtype), size).to_event(1)))
    B = None
    if about.inputs is not None:
        width = 2.5 * jnp.asarray(size)[:, None] / about.input_scale
        effect = jnp.asarray(numpyro.sample("B", Normal(jnp.zeros(width.shape, chol.dtype), width).to_event(2)))
        B = jnp.zeros((n, effect.shape[1]), chol.dtype).at[:k].set(effect)
    factor = jnp.zeros((n, n), chol.dtype) if factor is None else factor
    diffuse = np.full(n, not stationary)
    if slope is not None:  # a state that counts the steps
        A, noise, C, m0, b, factor, B = _counting(A, noise, C, b, factor, B, slope, stationary)
        diffuse, names = np.append(diffuse, False), (*names, "time")
    wide = 10 * jnp.asarray(about.scale, chol.dtype)
    spread = jnp.ones(len(A), chol.dtype).at[:n].set(jnp.tile(wide, n // k))
    matrices: dict[str, Any] = {"A": A, "chol_Q": noise, "C": C, "b": b, "d": d, "B": B}
    above = None
    if d is not None and not stationary:
        base = about.location + (0.0 if about.origin is None else about.origin)
        above = jnp.zeros(len(A), chol.dtype).at[:k].set(jnp.asarray(base, chol.dtype))
    start = Start(m0, factor, diffuse, spread)
    observe_exactly(start, matrices, about.num_steps, about.inputs, about.series, names, states, above)


def _steps(about: About) -> Any:
    """Root mean square of each series' change between neighbouring observed steps; its scale where there is none."""
    if about.series is None:
        return about.scale
    values = about.series.values
    xp: Any = jnp if is_traced(values) else np
    change = values[1:] - values[:-1]
    seen = ~xp.isnan(change)
    count = seen.sum(0)
    size = xp.sqrt((xp.where(seen, change, 0.0) ** 2).sum(0) / xp.maximum(count, 1))
    return xp.where(size > 0, size, about.scale)


def _correlation(k: int, dtype: Any) -> Array:
    """A factor of the correlations of the innovations."""
    if k == 1:
        return jnp.ones((1, 1), dtype)
    return jnp.asarray(numpyro.sample("correlation", dist.LKJCholesky(k, jnp.ones((), dtype))))


def _moving_average(q: int, chol: Array) -> Array:
    """`Theta_1, ..., Theta_q`, invertible."""
    k = chol.shape[0]
    if not q:
        return jnp.zeros((0, k, k), chol.dtype)
    X = numpyro.sample("ma_partial", dist.Normal(jnp.zeros((q, k, k), chol.dtype), 0.5).to_event(3))
    return -in_units_of(stationary_vector_autoregression(jnp.asarray(X))[0], chol)


def _minnesota(
    p: int, own_lag: float, tightness: float | None, cross: float | None, decay: float, size: ArrayLike, dtype: Any
) -> Array:
    """The coefficients, with Litterman's prior."""
    one = jnp.ones((), dtype)
    overall = numpyro.sample("tightness", dist.HalfNormal(0.5 * one)) if tightness is None else tightness
    across = numpyro.sample("cross", dist.Uniform(0.0 * one, one)) if cross is None else cross
    ratio = jnp.asarray(size, dtype)[:, None] / jnp.asarray(size, dtype)
    own = jnp.eye(len(ratio), dtype=dtype)
    narrowing = jnp.arange(1, p + 1, dtype=dtype)[:, None, None] ** -decay
    width = overall * narrowing * jnp.where(own == 1, 1.0, across) * ratio
    centre = jnp.zeros((p, *own.shape), dtype).at[0].set(own_lag * own)
    prior = Normal(centre, jnp.maximum(width, 1e-6 * ratio), unit=0.2 * narrowing * ratio)
    return jnp.asarray(numpyro.sample("coefficients", prior.to_event(3), infer={"dims": {"coefficients": ("lag",)}}))


def _counting(A, noise, C, b, factor, B, slope: Array, stationary: bool) -> tuple[Any, ...]:
    """The system with one more state, the number of steps so far, that the slope is a multiple of."""
    n, k = len(A), len(slope)
    A = jnp.pad(A, ((0, 1), (0, 1))).at[n, n].set(1.0)
    C = jnp.pad(C, ((0, 0), (0, 1)))
    b = jnp.pad(jnp.zeros(n, slope.dtype) if b is None else b, (0, 1)).at[n].set(1.0)
    m0 = jnp.zeros(n + 1, slope.dtype)
    if stationary:
        C = C.at[:, n].set(slope)
    else:
        A, m0 = A.at[:k, n].set(slope), m0.at[n].set(1.0)
    padded = None if B is None else jnp.pad(B, ((0, 1), (0, 0)))
    return A, jnp.pad(noise, ((0, 1), (0, 0))), C, m0, b, jnp.pad(factor, ((0, 1), (0, 1))), padded
