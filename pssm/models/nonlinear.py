"""Nonlinear and non-Gaussian models, as plain NumPyro model functions.

Every model is `f(y=None, *, num_steps=None, u=None, ..., states="sampled")`. With `states="sampled"` (the default) the
path is the site `z`, for NUTS over states and for `AutoStateSpace`. With the name of a rule, `states="ekf"`, "ukf",
"cubature" or "gauss_hermite", the states are integrated out approximately: the observed site is a
`GaussianFilterMarginal`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions.batch_util import promote_batch_shape

from pssm._checks import also_called, check_choice, check_count, is_traced
from pssm._types import Array, ArrayLike
from pssm.distributions import GaussianFilterMarginal, StableMatrixNormal, StatePath, observe
from pssm.distributions.in_units import HalfNormal, Normal
from pssm.distributions.state_path import path_site
from pssm.filters.linearize import NAMES
from pssm.models.dynamics import (
    Emission,
    lorenz63_system,
    pendulum_system,
    ring_attractor_system,
    van_der_pol_system,
)
from pssm.models.scales import number
from pssm.models.several import About, look_at, triangular_loadings
from pssm.nonlinear import NonlinearSSM

STATES = ("sampled", *NAMES)


def stochastic_volatility(
    y: ArrayLike | None = None, *, num_steps: int | None = None, u: ArrayLike | None = None, states: str = "sampled"
) -> None:
    """Returns whose log variance is an autoregression, `y_t ~ N(0, exp(z_t))`, `z_t = mu + phi (z_{t-1} - mu) + w_t`.

    Priors: `mu ~ N(log var(y), 4)`, `phi = 2 phi_unit - 1` with `phi_unit ~ Beta(20, 1.5)`, `sigma ~ HalfNormal(0.5)`.
    The mean of a return does not depend on the state, so a rule that linearises means gets no information: with
    `states="ekf"` and the other rules the data enter as `log y^2`, with its noise treated as normal (quasi likelihood).

    Args:
        y: returns `(time,)` or `(time, 1)`, of mean zero; NaN where missing; None to predict.
        num_steps: number of steps, needed where `y` is None.
        u: not used by this model.
        states: see the module's head.

    Example:
        >>> trace = numpyro.handlers.trace(numpyro.handlers.seed(stochastic_volatility, 0)).get_trace(num_steps=20)
        >>> trace["y"]["value"].shape
        (20, 1)

    Source:
        Kim, Shephard & Chib 1998; the quasi likelihood: Harvey, Ruiz & Shephard 1994.
    """
    check_choice("states", states, STATES)
    _no_inputs(u)
    about = look_at(y, num_steps, 1)
    log_variance = 2 * jnp.log(about.scale[0]) if is_traced(about.scale) else number(2 * np.log(about.scale[0]))
    mu = jnp.asarray(numpyro.sample("mu", Normal(log_variance, 2.0)))
    phi = numpyro.deterministic("phi", 2 * numpyro.sample("phi_unit", dist.Beta(20.0, 1.5)) - 1)
    sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
    start = (sigma / jnp.sqrt(1 - phi**2))[None, None]
    system = NonlinearSSM(
        mu[None],
        start,
        lambda z, u: mu + phi * (z - mu),
        sigma[None, None],
        lambda z: dist.Normal(0.0, jnp.exp(0.5 * z)).to_event(1),
    )
    if states == "sampled" or about.y is None:
        _observe(system, about, "sampled", log_variance)
        return
    # E log e^2 = -1.2704 and Var log e^2 = pi^2 / 2 for a standard normal e; a return of zero is missing.
    logs = jnp.where(about.y == 0, jnp.nan, jnp.log(jnp.where(about.y == 0, 1.0, about.y) ** 2))
    quasi = NonlinearSSM(
        mu[None],
        start,
        system.transition,
        sigma[None, None],
        lambda z: dist.Normal(z - 1.2703628454614782, jnp.pi / 2**0.5).to_event(1),
    )
    _observe(quasi, about._replace(y=logs), states)


@also_called(n_state="num_states")
def poisson_lds(
    y: ArrayLike | None = None,
    *,
    num_states: int = 2,
    num_steps: int | None = None,
    num_obs: int | None = None,
    u: ArrayLike | None = None,
    states: str = "sampled",
) -> None:
    """Counts of several series driven by a few linear states: `y_t ~ Poisson(exp(C z_t + D (u_t - u_1) + d))`.

    `A` is stable, the noise of the states the identity and `C` lower triangular with a positive diagonal, as in `lds`.
    Priors: `A ~ N(0.7, 0.2^2 / n)` about the identity, `C ~ N(0, 0.3^2)`, `d ~ N(log mean, 1)`, `D ~ N(0, 1 / var(u))`.

    Args:
        y: counts `(time, obs)`; NaN where missing; None to predict.
        num_states: size of the state; `n_state` is a second name for it.
        num_steps: number of steps, needed where `y` is None.
        num_obs: number of series, likewise.
        u: inputs `(time, input)`.
        states: see the module's head.

    Source:
        Macke, Buesing, Cunningham, Yu, Shenoy & Sahani 2011.
    """
    check_choice("states", states, STATES)
    n = check_count("num_states", num_states)
    about = look_at(y, num_steps, num_obs, u)
    p, one = about.num_obs, jnp.eye(n)
    A = numpyro.sample("A", StableMatrixNormal(0.7 * one, 0.2 * n**-0.5))
    C = triangular_loadings("C", jnp.full(p, 0.3), n)
    log_mean = jnp.zeros(p) if about.y is None else jnp.log(jnp.maximum(about.location, 0.1))
    d = numpyro.sample("d", dist.Normal(log_mean, 1.0).to_event(1))
    D = None
    if about.u is not None:
        zero, sd = np.zeros((p, about.u.shape[-1])), 1 / about.input_scale
        D = numpyro.sample("D", Normal(zero, sd).to_event(2))
        about = about._replace(u=about.inputs.differences)

    def emission(z: Array, u: Array | None) -> dist.Distribution:
        drive = C @ z + d if D is None or u is None else C @ z + D @ u + d
        return dist.Poisson(jnp.exp(drive)).to_event(1)

    system = NonlinearSSM(jnp.zeros(n), 2.0 * one, lambda z, u: A @ z, one, emission)
    _observe(system, about, states)


def pendulum(
    y: ArrayLike | None = None,
    *,
    dt: float = 0.05,
    num_steps: int | None = None,
    u: ArrayLike | None = None,
    states: str = "sampled",
) -> None:
    """A damped pendulum, observed by the sine of its angle; see `pendulum_system`.

    Priors: `stiffness ~ LogNormal(log 10, 0.5)`, `damping ~ HalfNormal(0.5)`, `sigma_force ~ HalfNormal(1)`,
    `sigma_obs ~ HalfNormal(0.5)`. Arguments as in `stochastic_volatility`; `dt` is the time between steps.
    """
    check_choice("states", states, STATES)
    _no_inputs(u)
    about = look_at(y, num_steps, 1)
    stiffness = numpyro.sample("stiffness", dist.LogNormal(jnp.log(10.0), 0.5))
    damping = numpyro.sample("damping", dist.HalfNormal(0.5))
    sigma_force = numpyro.sample("sigma_force", dist.HalfNormal(1.0))
    sigma_obs = numpyro.sample("sigma_obs", dist.HalfNormal(0.5))
    _observe(pendulum_system(stiffness, damping, sigma_force, sigma_obs, dt=dt), about, states)


def lorenz63(
    y: ArrayLike | None = None,
    *,
    dt: float = 0.02,
    observed: tuple[int, ...] = (0, 1, 2),
    num_steps: int | None = None,
    u: ArrayLike | None = None,
    states: str = "sampled",
) -> None:
    """The Lorenz system, some of its three states observed with noise; see `lorenz63_system`.

    Priors about the usual values: `sigma ~ LogNormal(log 10, 0.3)`, `rho ~ LogNormal(log 28, 0.3)`,
    `beta ~ LogNormal(log 8/3, 0.3)`; `sigma_state ~ HalfNormal(2)`, `sigma_obs ~ HalfNormal(2)`. Arguments as in
    `pendulum`; `observed` are the numbers of the observed states.
    """
    check_choice("states", states, STATES)
    _no_inputs(u)
    about = look_at(y, num_steps, len(observed))
    sigma = numpyro.sample("sigma", dist.LogNormal(jnp.log(10.0), 0.3))
    rho = numpyro.sample("rho", dist.LogNormal(jnp.log(28.0), 0.3))
    beta = numpyro.sample("beta", dist.LogNormal(jnp.log(8.0 / 3.0), 0.3))
    sigma_state = numpyro.sample("sigma_state", dist.HalfNormal(2.0))
    sigma_obs = numpyro.sample("sigma_obs", dist.HalfNormal(2.0))
    system = lorenz63_system(sigma, rho, beta, sigma_state, sigma_obs, dt=dt, observed=tuple(observed))
    _observe(system, about, states)


def van_der_pol(
    y: ArrayLike | None = None,
    *,
    dt: float = 0.1,
    readout: str = "direct",
    num_steps: int | None = None,
    num_obs: int | None = None,
    u: ArrayLike | None = None,
    states: str = "sampled",
) -> None:
    """The Van der Pol oscillator, observed directly or through many channels; see `van_der_pol_system`.

    Priors: `mu ~ HalfNormal(2)`, `sigma_state ~ HalfNormal(0.3)`; with a readout `C ~ N(0, 1)`, `d ~ N(location, 1)`
    (of the data; for counts of their logarithm), `sigma_obs ~ HalfNormal(scale)`.

    Args:
        y: data `(time, obs)`; NaN where missing; None to predict.
        dt: time between steps.
        readout: "direct" (both states with noise), "gaussian" (`C z + d` with noise) or "poisson" (counts with rates
            `exp(C z + d)`).
        num_steps: number of steps, needed where `y` is None.
        num_obs: number of channels, likewise; two for "direct".
        u: not used by this model.
        states: see the module's head.
    """
    check_choice("states", states, STATES)
    check_choice("readout", readout, ("direct", "gaussian", "poisson"))
    _no_inputs(u)
    about = look_at(y, num_steps, 2 if readout == "direct" else num_obs)
    p = about.num_obs
    mu = numpyro.sample("mu", dist.HalfNormal(2.0))
    sigma_state = numpyro.sample("sigma_state", dist.HalfNormal(0.3))
    emission: Emission
    if readout == "direct":
        sigma_obs = numpyro.sample("sigma_obs", dist.HalfNormal(1.0))
        emission = lambda z: dist.Normal(z, sigma_obs).to_event(1)  # noqa: E731
    else:
        C = numpyro.sample("C", dist.Normal(jnp.zeros((p, 2)), 1.0).to_event(2))
        counts = readout == "poisson"
        centre = jnp.log(jnp.maximum(about.location, 0.1)) if counts and about.y is not None else about.location
        d = numpyro.sample("d", dist.Normal(centre, 1.0).to_event(1))
        if counts:
            emission = lambda z: dist.Poisson(jnp.exp(C @ z + d)).to_event(1)  # noqa: E731
        else:
            sigma = numpyro.sample("sigma_obs", HalfNormal(about.scale).to_event(1))
            emission = lambda z: dist.Normal(C @ z + d, sigma).to_event(1)  # noqa: E731
    _observe(van_der_pol_system(mu, sigma_state, emission=emission, dt=dt), about, states)


def ring_attractor(
    y: ArrayLike | None = None,
    *,
    dt: float = 0.1,
    num_steps: int | None = None,
    num_obs: int | None = None,
    u: ArrayLike | None = None,
    states: str = "sampled",
) -> None:
    """A heading turned by its input and read by cells that count; see `ring_attractor_system`.

    Priors: `speed ~ N(1, 0.5)`, `pull ~ LogNormal(log 5, 0.5)`, `sigma_state ~ HalfNormal(0.3)`,
    `gain ~ HalfNormal(2)`, `log_rate ~ N(0, 1)`.

    Args:
        y: counts `(time, obs)` of cells with evenly spaced directions; NaN where missing; None to predict.
        dt: time between steps.
        num_steps: number of steps, needed where `y` is None.
        num_obs: number of cells, likewise.
        u: angular velocity `(time,)` or `(time, 1)`; none for a heading that only drifts.
        states: see the module's head.
    """
    check_choice("states", states, STATES)
    about = look_at(y, num_steps, num_obs, u)
    if about.u is not None and about.u.shape[-1] != 1:
        raise ValueError(f"`u` must be one angular velocity, (time,) or (time, 1); got {about.u.shape}.")
    speed = numpyro.sample("speed", dist.Normal(1.0, 0.5)) if about.u is not None else 1.0
    pull = numpyro.sample("pull", dist.LogNormal(jnp.log(5.0), 0.5))
    sigma_state = numpyro.sample("sigma_state", dist.HalfNormal(0.3))
    gain = numpyro.sample("gain", dist.HalfNormal(2.0))
    log_rate = numpyro.sample("log_rate", dist.Normal(0.0, 1.0))
    _observe(ring_attractor_system(about.num_obs, speed, pull, sigma_state, gain, log_rate, dt=dt), about, states)


def _no_inputs(u: ArrayLike | None) -> None:
    if u is not None:
        raise ValueError("`u` is given, but this model has no inputs.")


def _observe(system: NonlinearSSM, about: About, states: str, centre: Array | None = None) -> None:
    """The observed site `y`, the path sampled or integrated out approximately; `centre` is where a sampler starts."""
    if about.num_sequences is not None:
        raise ValueError(f"`y` must be one sequence (time, obs); got {about.num_sequences} of them.")
    if states != "sampled":
        marginal = GaussianFilterMarginal(system, about.num_steps, about.u, method=states)
        numpyro.sample("y", marginal, obs=about.y)
        return
    path = StatePath.from_ssm(system, about.num_steps, about.u)
    z = path_site("z", path if centre is None else path.in_units(centre, np.ones(())))
    each = promote_batch_shape(jax.vmap(system.emission)(z, about.u))
    observe("y", each.to_event(1), about.y)
