"""Exponential smoothing as a state-space model with one source of error, `ets`."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from pssm._checks import check_choice, check_count
from pssm._types import Array, ArrayLike
from pssm.distributions.in_units import HalfNormal, Normal
from pssm.models.exactly import Start, observe_exactly
from pssm.models.scales import located, warn_of_few
from pssm.models.single import STATES, one_series, regression, scale_of

INITIAL = ("diffuse", "sampled")


def ets(
    y: ArrayLike | None = None,
    *,
    error: str = "add",
    trend: str | None = None,
    damped: bool = False,
    seasonal: str | None = None,
    period: int | None = None,
    initial: str = "diffuse",
    num_steps: int | None = None,
    u: ArrayLike | None = None,
    states: str = "marginal",
    location: float | None = None,
    scale: float | None = None,
) -> None:
    """Exponential smoothing with one source of error: ETS(A,N,N), (A,A,N), (A,Ad,N), (A,N,A), (A,A,A), (A,Ad,A).

        y_t = beta' (u_t - u_1) + l_{t-1} + phi b_{t-1} + s_{t-m} + e_t,   e_t ~ N(0, sigma^2)
        l_t = l_{t-1} + phi b_{t-1} + alpha e_t,   b_t = phi b_{t-1} + beta* e_t,   s_t = s_{t-m} + gamma e_t

    The error is a state, so the likelihood is exact with missing entries too: where `y_t` is missing, `e_t` is unknown
    and moves the level nevertheless. The seasonal effects of the last `m` steps are kept at a sum of zero (a share
    `gamma / m` of each error goes from all of them to the level), which changes no forecast.

    Priors: `smoothing_level` (`alpha`) `~ Uniform(0, 1)`, `smoothing_trend` (`beta*`) `~ Uniform(0, alpha)`,
    `smoothing_seasonal` (`gamma`) `~ Uniform(0, 1 - alpha)`, `damping_trend` (`phi`) `~ Uniform(0.8, 0.98)`: the usual
    restrictions; `sigma ~ HalfNormal(scale)`, `beta ~ Normal(0, 2.5 scale / sd(u))`. The sites of the second and the
    third are their shares of what they may be, `smoothing_trend_share` and `smoothing_seasonal_share`.

    Args:
        y: data `(time,)` or `(time, 1)`, NaN where missing; None to predict, from the priors of the sampled start.
        error: "add". Multiplicative errors are not linear: take the logarithm of `y`, whose additive model is close.
        trend: None, or "add".
        damped: whether the slope is damped by `phi` in each step; needs a trend.
        seasonal: None, or "add".
        period: time steps in a season, `m`, a whole number of at least 2.
        initial: the states before the first observation. "diffuse": unknown, integrated out exactly. "sampled":
            parameters `level_start ~ Normal(location, 10 scale)`, `slope_start ~ Normal(0, scale)` and
            `seasonal_start ~ Normal(0, scale)`, `(period - 1,)`, effects of the first steps, all of which sum to zero;
            their maximum likelihood is that of other programs.
        num_steps: number of steps, needed where `y` is None.
        u: regressors `(time, input)`.
        states: "marginal" (integrated out) or "sampled" (deterministic `z`, driven by the noise of missing entries and
            of the start, which then has the priors of the sampled one).
        location: centre of the prior of the level; by default the first observed value, 0 without data.
        scale: spread the priors are scaled by; by default the standard deviation of the data, 1 without data.

    Raises:
        ValueError: an option is unknown, multiplicative, or does not go with another; the message names it.

    Example:
        >>> from functools import partial
        >>> from numpyro import handlers
        >>> quarterly = partial(ets, trend="add", damped=True, seasonal="add", period=4)
        >>> trace = handlers.trace(handlers.seed(quarterly, 0)).get_trace(num_steps=20)
        >>> trace["y"]["fn"].ssm.n_state
        6

    Source:
        Hyndman, Koehler, Ord & Snyder 2008, chapters 2 and 3; sums of zero: section 8.1.
    """
    for name, value in (("error", error), ("trend", trend), ("seasonal", seasonal)):
        if value == "mul":
            raise ValueError(
                f'`{name}="mul"` is not linear in the states; take `{name}="add"` for the logarithm of `y` instead.'
            )
    check_choice("error", error, ("add",))
    for name, value in (("trend", trend), ("seasonal", seasonal)):
        if value is not None:
            check_choice(name, value, ("add",))
    if damped and trend is None:
        raise ValueError('`damped` is the slope\'s, and there is none; add `trend="add"`.')
    if (seasonal is None) != (period is None):
        raise ValueError(f'`seasonal="add"` and `period` go together; got {seasonal!r} and {period!r}.')
    m = 0 if period is None else check_count("period", period, least=2)
    check_choice("initial", initial, INITIAL)
    check_choice("states", states, STATES)
    found, length = one_series(y, num_steps)
    about = scale_of(found, location, scale)
    names = (
        "level",
        *(["slope"] if trend else []),
        *(f"seasonal_lag{i}" for i in range(1, m)),
        "error",
    )
    warn_of_few(found, len(names))
    one = jnp.ones((), jnp.result_type(float))

    def share(name: str) -> Array:
        return jnp.asarray(numpyro.sample(name, dist.Uniform(0.0 * one, one)))

    alpha = share("smoothing_level")
    beta = gamma = None
    damping = one
    if trend:
        beta = numpyro.deterministic("smoothing_trend", alpha * share("smoothing_trend_share"))
    if damped:
        damping = jnp.asarray(numpyro.sample("damping_trend", dist.Uniform(0.8 * one, 0.98 * one)))
    if m:
        gamma = numpyro.deterministic("smoothing_seasonal", (1 - alpha) * share("smoothing_seasonal_share"))
    sigma = jnp.asarray(numpyro.sample("sigma", HalfNormal(about.spread)))
    effect, inputs, _ = regression(u, length, about)
    A, C = smoothing(m, alpha, beta, damping, gamma)
    n = len(names)
    origin = None if found is None else found.origin
    centre = jnp.zeros(n, one.dtype).at[0].set(about.location)
    if initial == "sampled":
        centre = _sampled_start(centre, about, bool(trend), m, origin)
    # The start, that of the states before the first step and of its error.
    spread = jnp.full(n, 1.0 * about.spread, one.dtype).at[0].multiply(10.0)
    last = np.arange(n) == n - 1
    chol = jnp.diag(jnp.where(last, sigma, 0.0))
    start = Start(centre, chol, np.zeros(n, bool) if initial == "sampled" else ~last, spread)
    noise = jnp.zeros((n, 1), one.dtype).at[-1, 0].set(sigma)
    above = None if origin is None else origin * np.eye(n)[0]
    matrices: dict[str, Array | None] = {"A": A, "chol_Q": noise, "C": C, "D": effect}
    observe_exactly(start, matrices, length, inputs, found, names, states, above)


def smoothing(m: int, alpha: Array, beta: Array | None, damping: Array, gamma: Array | None) -> tuple[Array, Array]:
    """`A` and `C` of the states `(l_{t-1}, b_{t-1}, s_{t-1}, ..., s_{t-m+1}, e_t)`, whose season sums to zero.

    Args:
        m: steps in a season; 0 without one.
        alpha: share of an error that the level takes.
        beta: of the slope; None without one.
        damping: of the slope.
        gamma: of the season; None without one.
    """
    first = 1 if beta is None else 2  # of the season's states
    n = first + max(m - 1, 0) + 1
    A = jnp.zeros((n, n), alpha.dtype)
    C = A[:1].at[0, 0].set(1.0).at[0, -1].set(1.0)
    A = A.at[0, 0].set(1.0).at[0, -1].set(alpha)
    if beta is not None:
        A = A.at[0, 1].set(damping).at[1, 1].set(damping).at[1, -1].set(beta)
        C = C.at[0, 1].set(damping)
    if gamma is not None:
        seasons = slice(first, first + m - 1)
        now = -jnp.ones(m - 1, alpha.dtype)  # s_{t-m}, the effect that the others leave
        C = C.at[0, seasons].set(now)
        A = A.at[first, seasons].set(now).at[0, -1].add(gamma / m)
        A = A.at[seasons, seasons].add(jnp.eye(m - 1, k=-1, dtype=alpha.dtype))
        A = A.at[seasons, -1].set(-gamma / m).at[first, -1].add(gamma)
    return A, C


def _sampled_start(centre: Array, about, trend: bool, m: int, origin: np.ndarray | None) -> Array:
    """The states before the first step as parameters."""
    one = jnp.ones((), centre.dtype)
    level = located("level_start", Normal(about.location, 10 * about.spread, unit=about.spread), origin)
    centre = centre.at[0].set(level)
    if trend:
        centre = centre.at[1].set(numpyro.sample("slope_start", Normal(0.0 * one, about.spread)))
    if m:
        prior = Normal(jnp.zeros(m - 1, centre.dtype), about.spread, centre=0.0 * one, unit=about.spread).to_event(1)
        first = numpyro.sample("seasonal_start", prior, infer={"dims": {"seasonal_start": ("season",)}})
        # Effects of the steps 1, ..., m - 1 are s_{1-m}, ..., s_{-1}; that of step m is s_0, the first of the states.
        s_0 = -jnp.sum(first)
        place = 1 + trend
        centre = centre.at[place].set(s_0).at[place + 1 : place + m - 1].set(first[1:][::-1])
    return centre
