"""Seasonal autoregressive integrated moving averages with regressors, `sarimax`."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pssm._checks import check_choice, check_count
from pssm._types import Array, ArrayLike
from pssm.distributions.in_units import HalfNormal, Normal
from pssm.models.arma import Orders, arima, coefficients, invertible
from pssm.models.exactly import Start, observe_exactly
from pssm.models.scales import located, warn_of_few
from pssm.models.single import STATES, one_series, regression, scale_of

TRENDS = ("n", "c", "ct")


def sarimax(
    y: ArrayLike | None = None,
    *,
    order: tuple[int, int, int] = (1, 0, 0),
    seasonal_order: tuple[int, int, int, int] | None = None,
    trend: str | None = None,
    num_steps: int | None = None,
    u: ArrayLike | None = None,
    states: str = "marginal",
    location: float | None = None,
    scale: float | None = None,
) -> None:
    """A seasonal autoregressive integrated moving average with regressors, `(p, d, q) x (P, D, Q)_s`.

        y_t = beta' (u_t - u_1) + x_t,   w_t = (1 - L)^d (1 - L^s)^D x_t
        phi(L) Phi(L^s) (w_t - E w_t) = theta(L) Theta(L^s) e_t,   e_t ~ N(0, sigma^2)

    The differences are undone by states whose start is diffuse, so nothing is cut off and entries may be missing
    anywhere, the first ones too. `w` starts in its stationary distribution. Observed exactly, `R = 0`.

    Priors: partial autocorrelations `ar_partial`, `seasonal_ar_partial ~ Uniform(-1, 1)`, every point of which is
    stationary; likewise `ma_partial`, `seasonal_ma_partial`, every point of which is invertible;
    `sigma ~ HalfNormal(scale)`; `mean ~ Normal(location, 10 scale)` where nothing is differenced, and else
    `drift ~ Normal(0, scale)`, the mean of `w`; `slope ~ Normal(0, scale)`, its change in a step;
    `beta ~ Normal(0, 2.5 scale / sd(u))`. The coefficients `phi`, `theta`, `seasonal_phi`, `seasonal_theta` are
    deterministic.

    Args:
        y: data `(time,)` or `(time, 1)`, NaN where missing; None to predict, from a start of
            `Normal(location, 10 scale)` in place of the diffuse one.
        order: `(p, d, q)`: lags of the autoregression, differences, lags of the moving average.
        seasonal_order: `(P, D, Q, s)`, the same at multiples of `s` time steps; None for no season.
        trend: "n", `E w_t` is zero; "c", a constant; "ct", a straight line. By default "c" where nothing is
            differenced, else "n". With "n" and no differences, `y` and `u` count from zero.
        num_steps: number of steps, needed where `y` is None.
        u: regressors `(time, input)`.
        states: "marginal" (integrated out) or "sampled" (deterministic `z`, driven by the noise of missing entries
            and of the start, which then is not diffuse but as without data).
        location: centre of the priors of the level; by default the mean of the data, or their first value where there
            are differences; 0 without data.
        scale: spread the priors are scaled by; by default the standard deviation of the data, 1 without data.

    Raises:
        ValueError: an order is out of range; the message names it.

    Example:
        >>> from functools import partial
        >>> from numpyro import handlers
        >>> airline = partial(sarimax, order=(0, 1, 1), seasonal_order=(0, 1, 1, 12))
        >>> trace = handlers.trace(handlers.seed(airline, 0)).get_trace(num_steps=36)
        >>> trace["y"]["fn"].ssm.n_state, trace["theta"]["value"].shape
        (27, (1,))

    Source:
        Box & Jenkins 1970; state space form: Harvey 1989, section 3.4; partial autocorrelations: Monahan 1984; diffuse
        start: Durbin & Koopman 2012, section 5.6.3.
    """
    check_choice("states", states, STATES)
    orders = check_orders(order, seasonal_order)
    if trend is None:
        trend = "n" if orders.lags else "c"
    check_choice("trend", trend, TRENDS)
    found, length = one_series(y, num_steps)
    about = scale_of(found, location, scale, mean=not orders.lags)
    warn_of_few(found, orders.lags + orders.memory)
    one = jnp.ones((), jnp.result_type(float))

    def partials(name: str, size: int) -> Array:
        if not size:
            return jnp.zeros(0, one.dtype)
        prior = dist.Uniform(-one, one).expand([size]).to_event(1)
        axis = "season" if "seasonal" in name else "lag"
        return jnp.asarray(numpyro.sample(name, prior, infer={"dims": {name: (axis,)}}))

    ar, ma = partials("ar_partial", orders.p), partials("ma_partial", orders.q)
    seasonal_ar, seasonal_ma = partials("seasonal_ar_partial", orders.P), partials("seasonal_ma_partial", orders.Q)
    found_coefficients = {
        "phi": coefficients(ar),
        "theta": invertible(ma),
        "seasonal_phi": coefficients(seasonal_ar),
        "seasonal_theta": invertible(seasonal_ma),
    }
    for name, value in found_coefficients.items():
        if len(value):
            numpyro.deterministic(name, value)
    sigma = jnp.asarray(numpyro.sample("sigma", HalfNormal(about.spread)))
    mean, drift, slope = _trend(trend, orders, about, None if found is None else found.origin)
    effect, inputs, _ = regression(u, length, about)
    if inputs is not None and trend == "n" and not orders.lags:
        inputs = inputs._replace(origin=np.zeros(np.shape(inputs.origin)))
    system = arima(orders, *found_coefficients.values(), sigma, drift, slope, ar)
    if mean is None and orders.lags:
        mean = about.location * one  # where the lags count from, a number
    offset = jnp.zeros((), one.dtype) if mean is None else mean
    if slope is None and drift is not None:
        offset = offset + drift
    above = None
    if orders.lags:
        base = about.location + (0.0 if found is None or found.origin is None else found.origin[0])
        above = jnp.where(system.diffuse, jnp.asarray(base, one.dtype), 0.0)
    start = Start(system.m0, system.chol_P0, system.diffuse, jnp.full(len(system.m0), 10 * about.spread, one.dtype))
    matrices = {"A": system.A, "chol_Q": system.chol_Q, "C": system.C, "b": system.b, "d": offset[None], "D": effect}
    observe_exactly(start, matrices, length, inputs, found, system.names, states, above)


def _trend(trend: str, orders: Orders, about, origin) -> tuple[Array | None, Array | None, Array | None]:
    """The mean where nothing is differenced, the drift where something is, and the slope; None where there is none."""
    one = jnp.ones((), jnp.result_type(float))
    mean = drift = slope = None
    if trend != "n" and not orders.lags:
        mean = located("mean", Normal(about.location, 10 * about.spread, unit=about.spread), origin)
    if trend != "n" and orders.lags:
        drift = jnp.asarray(numpyro.sample("drift", Normal(0.0 * one, about.spread)))
    if trend == "ct":
        slope = jnp.asarray(numpyro.sample("slope", Normal(0.0 * one, about.spread)))
    return mean, drift, slope


def check_orders(order: tuple[int, int, int], seasonal_order: tuple[int, int, int, int] | None) -> Orders:
    """The orders, each a whole number that is not negative.

    Raises:
        ValueError: there are not three, or four, of them, or the season is shorter than two steps.
    """
    near = tuple(order) if isinstance(order, tuple | list) else ()
    if len(near) != 3:
        raise ValueError(f"`order` must be three whole numbers (p, d, q); got {order!r}.")
    for name, value in zip(("p", "d", "q"), near, strict=True):
        check_count(f"order: {name}", value, least=0)
    if seasonal_order is None:
        return Orders(*near)
    far = tuple(seasonal_order) if isinstance(seasonal_order, tuple | list) else ()
    if len(far) != 4:
        raise ValueError(f"`seasonal_order` must be four whole numbers (P, D, Q, s); got {seasonal_order!r}.")
    for name, value in zip(("P", "D", "Q"), far[:3], strict=True):
        check_count(f"seasonal_order: {name}", value, least=0)
    if not any(far[:3]):
        return Orders(*near)
    check_count("seasonal_order: s", far[3], least=2)
    return Orders(*near, *far)
