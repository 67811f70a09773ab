"""The noise of observations: normal, with heavy tails, or of a volatility that changes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform, ExpTransform

from pssm._types import Array
from pssm.distributions.in_units import HalfNormal
from pssm.models.components import Block, Scale, safe_sqrt

NOISES = ("normal", "student_t", "stochastic_volatility")
STEPWISE = {"dims": {"noise_base": ("time",), "weight_obs": ("time",), "log_variance": ("time",)}}


class Noise(NamedTuple):
    """Noise of an observed series.

    Attributes:
        sigma: its scale, the site `sigma_obs`.
        factors: by which the scale is multiplied at each step, `(time,)`; None where it stays.
        degrees: of freedom, where the noise is Student's and is not a mixture over `factors`.
        block: the state that holds the log variance; None where there is none.
    """

    sigma: Array
    factors: Array | None = None
    degrees: Array | None = None
    block: Block | None = None

    @property
    def chol_R(self) -> Array:
        """The factor of its covariance, `(1, 1)` or `(time, 1, 1)`."""
        if self.factors is None:
            return self.sigma * jnp.ones((1, 1))
        return (self.sigma * self.factors)[:, None, None]

    def around(self, signal: Array, z: Array) -> dist.Distribution:
        """The distribution of observations `(time, 1)` given a path whose last state is the log variance, if any."""
        if self.degrees is not None:
            return dist.StudentT(self.degrees, signal, self.sigma)
        return dist.Normal(signal, self.sigma if self.block is None else self.sigma * jnp.exp(0.5 * z[:, -1:]))


def observation_noise(kind: str, about: Scale, length: int, *, sampled: bool) -> Noise:
    """Draws the parameters of the noise, `sigma_obs ~ HalfNormal(spread)` and others.

    Student's distribution has `nu_obs = 2 + x` degrees of freedom, `x ~ Gamma(2, 0.1)`: its variance is finite. The log
    variance is a stationary autoregression of mean zero, `h_t = phi_log_variance h_{t-1} + sigma_log_variance e_t`, and
    the standard deviation `sigma_obs exp(h_t / 2)`; `phi_log_variance ~ Beta(20, 1.5)`, `sigma_log_variance ~
    HalfNormal(0.5)`.

    Where the states are integrated out, the noise is normal given numbers of its own for each step, which are sampled
    (the site `noise_base`): the weights of Student's distribution, of standard deviation `sigma_obs /
    sqrt(weight_obs)`, or the log variance.

    Args:
        kind: one of `NOISES`.
        about: scales of the priors.
        length: number of steps.
        sampled: the states are sampled: Student's distribution has its density, and the log variance is a state.
    """
    sigma = jnp.asarray(numpyro.sample("sigma_obs", HalfNormal(about.spread)))
    if kind == "normal":
        return Noise(sigma)
    if kind == "student_t":
        return _student(sigma, length, sampled)
    phi = jnp.asarray(numpyro.sample("phi_log_variance", dist.Beta(20.0, 1.5)))
    move = jnp.asarray(numpyro.sample("sigma_log_variance", dist.HalfNormal(0.5)))
    wide = move / jnp.sqrt(1 - phi**2)
    keep, shock = jnp.broadcast_to(phi, (length,)), jnp.broadcast_to(move, (length,))
    if about.gaps is not None:
        log_keep = about.gaps * jnp.log(phi)
        keep, shock = jnp.exp(log_keep), wide * safe_sqrt(-jnp.expm1(2 * log_keep))
    if sampled:
        one, timed = jnp.ones((1, 1)), about.gaps is not None
        A, chol_Q = (x[:, None, None] if timed else x[:1, None] for x in (keep, shock))
        block = Block(jnp.zeros(1), wide * one, A, chol_Q, 0 * one, ("log_variance",), np.ones(1))
        return Noise(sigma, block=block)
    base = _each_step(dist.Normal(0.0, 1.0).expand([length]))
    shocks = jnp.where(jnp.arange(length) == 0, wide, shock) * base
    _, path = jax.lax.scan(lambda h, x: (x[0] * h + x[1],) * 2, jnp.zeros_like(wide), (keep, shocks))
    return Noise(sigma, jnp.exp(0.5 * jnp.asarray(numpyro.deterministic("log_variance", path))))


def _student(sigma: Array, length: int, sampled: bool) -> Noise:
    """The weights are sampled as `sqrt(nu / 2) log weight`, of a spread of about one for every `nu`: no funnel."""
    prior = dist.TransformedDistribution(dist.Gamma(2.0, 0.1), AffineTransform(2.0, 1.0, domain=constraints.positive))
    nu = jnp.asarray(numpyro.sample("nu_obs", prior))
    if sampled:
        return Noise(sigma, degrees=nu)
    root = jnp.sqrt(nu / 2)
    weights = dist.Gamma(jnp.broadcast_to(nu / 2, (length,)), nu / 2)
    scaled = [ExpTransform().inv, AffineTransform(0.0, root)]
    base = _each_step(dist.TransformedDistribution(weights, scaled))
    return Noise(sigma, jnp.exp(-0.5 * jnp.log(numpyro.deterministic("weight_obs", jnp.exp(base / root)))))


def _each_step(prior: dist.Distribution) -> Array:
    """The site `noise_base`: a number for each step, independent of each other."""
    infer: dict[str, Any] = {**STEPWISE, "first": 1}
    return jnp.asarray(numpyro.sample("noise_base", prior.to_event(1), infer=infer))
