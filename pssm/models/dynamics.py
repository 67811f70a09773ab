"""Known nonlinear systems with given parameters, as `NonlinearSSM`s: to simulate, to filter, and inside the models.

Differential equations move by one Runge-Kutta step of fourth order and get their noise at the end of it.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpyro.distributions as dist

from pssm._types import Array, ArrayLike
from pssm.nonlinear import NonlinearSSM
from pssm.nonlinear_sde import runge_kutta

Emission = Callable[[Array], dist.Distribution]


def pendulum_system(
    stiffness: ArrayLike = 9.8,
    damping: ArrayLike = 0.0,
    sigma_force: ArrayLike = 0.3,
    sigma_obs: ArrayLike = 0.1,
    *,
    dt: float = 0.05,
) -> NonlinearSSM:
    """A pendulum pushed at random: state angle and velocity, `sin(angle)` (its place) is observed.

    `stiffness` is gravity over length, in 1 / time^2. `Q` is that of a velocity pushed by white noise.

    Source:
        Särkkä & Svensson 2023, section 7.2.
    """

    def field(z: Array) -> Array:
        return jnp.stack([z[1], -stiffness * jnp.sin(z[0]) - damping * z[1]])

    push = jnp.array([[dt**1.5 / 3**0.5, 0.0], [3**0.5 / 2 * dt**0.5, dt**0.5 / 2]])
    return NonlinearSSM(
        jnp.array([1.5, 0.0]),
        jnp.diag(jnp.array([0.5, 1.0])),
        lambda z, u: runge_kutta(field, z, dt),
        sigma_force * push,
        lambda z: dist.Normal(jnp.sin(z[:1]), sigma_obs).to_event(1),
    )


def lorenz63_system(
    sigma: ArrayLike = 10.0,
    rho: ArrayLike = 28.0,
    beta: ArrayLike = 8.0 / 3.0,
    sigma_state: ArrayLike = 0.3,
    sigma_obs: ArrayLike = 1.0,
    *,
    dt: float = 0.02,
    observed: tuple[int, ...] = (0, 1, 2),
) -> NonlinearSSM:
    """Convection after Lorenz: three states, chaotic at the usual parameters; `observed` lists the observed ones.

    Source:
        Lorenz 1963.
    """

    def field(z: Array) -> Array:
        x, y, w = z
        return jnp.stack([sigma * (y - x), x * (rho - w) - y, x * y - beta * w])

    seen = jnp.array(observed)
    return NonlinearSSM(
        jnp.array([0.0, 1.0, 25.0]),
        5.0 * jnp.eye(3),
        lambda z, u: runge_kutta(field, z, dt),
        sigma_state * dt**0.5 * jnp.eye(3),
        lambda z: dist.Normal(z[seen], sigma_obs).to_event(1),
    )


def van_der_pol_system(
    mu: ArrayLike = 1.5, sigma_state: ArrayLike = 0.1, *, emission: Emission | None = None, dt: float = 0.1
) -> NonlinearSSM:
    """An oscillator whose friction changes sign with its size: `x'' = mu (1 - x^2) x' - x`.

    Args:
        mu: strength of the friction.
        sigma_state: standard deviation of one step's noise in both states.
        emission: distribution of the observation given a state; by default both coordinates with noise of 0.3.
        dt: time between steps.

    Source:
        Van der Pol 1926.
    """

    def field(z: Array) -> Array:
        return jnp.stack([z[1], mu * (1 - z[0] ** 2) * z[1] - z[0]])

    return NonlinearSSM(
        jnp.array([1.0, 0.0]),
        jnp.eye(2),
        lambda z, u: runge_kutta(field, z, dt),
        sigma_state * jnp.eye(2),
        emission or (lambda z: dist.Normal(z, 0.3).to_event(1)),
    )


def ring_attractor_system(
    num_obs: int = 20,
    speed: ArrayLike = 1.0,
    pull: ArrayLike = 5.0,
    sigma_state: ArrayLike = 0.1,
    gain: ArrayLike = 2.0,
    log_rate: ArrayLike = 0.0,
    *,
    dt: float = 0.1,
) -> NonlinearSSM:
    """A heading on a ring, turned by its input and read by cells tuned to directions.

    The state is a point of the plane that is pulled to the unit circle, `dz/dt = pull (1 - |z|^2) z / 2`, and turned by
    the angle `speed u_t dt`; noise acts along the circle and across. Cell `i` of `num_obs` counts with the rate
    `exp(log_rate + gain z . (cos a_i, sin a_i))`, a bump about its own direction.

    Source:
        Zhang 1996; Skaggs, Knierim, Kudrimoti & McNaughton 1995.
    """
    angles = 2 * jnp.pi * jnp.arange(num_obs) / num_obs
    readout = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)

    def transition(z: Array, u: Array | None) -> Array:
        z = runge_kutta(lambda z: 0.5 * pull * (1 - z @ z) * z, z, dt)
        turn = jnp.zeros(()) if u is None else speed * dt * u[0]
        cos, sin = jnp.cos(turn), jnp.sin(turn)
        return jnp.stack([cos * z[0] - sin * z[1], sin * z[0] + cos * z[1]])

    return NonlinearSSM(
        jnp.zeros(2),
        jnp.eye(2),
        transition,
        sigma_state * jnp.eye(2),
        lambda z: dist.Poisson(jnp.exp(log_rate + gain * (readout @ z))).to_event(1),
    )
