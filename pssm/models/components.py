"""Blocks of structural time-series models: each draws its parameters and gives its transition and its emission.

A block is a small linear-Gaussian system; a model is a stack of blocks whose contributions to the observation add up.
Scales are relative to `Scale`: the location and spread of the data, so that one set of weakly informative priors fits
river flows and interest rates alike.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpyro
import numpyro.distributions as dist

from pssm._types import Array, ArrayLike
from pssm.distributions.in_units import HalfNormal
from pssm.sde import discretise, matern, semidefinite_cholesky


class Scale(NamedTuple):
    """Location and scale of the data for the priors: the first observed value and the standard deviation of the data.

    `gaps` `(time,)` are the times between observations, where they are uneven; None means steps of one. A block
    then has a time axis in front of `A` and `chol_Q`: it is a linear stochastic differential equation, discretised
    exactly (`pssm.sde`), here in closed form. The parameters are those of a step of one.
    """

    location: Array
    spread: Array
    gaps: Array | None = None

    def noise(self, sigma: Array, size: int) -> Array:
        """Factor of independent noises that come in evenly: `sigma` in a step of one."""
        factor = sigma * jnp.eye(size)
        return factor if self.gaps is None else jnp.sqrt(self.gaps)[:, None, None] * factor

    def turn(self, angle: ArrayLike) -> Array:
        """Rotation by `angle` in a step of one."""
        return _rotation(jnp.asarray(angle)) if self.gaps is None else jax.vmap(_rotation)(angle * self.gaps)


class Block(NamedTuple):
    """One component: `m0 (n,)`, `chol_P0 (n, n)`, `A (n, n)`, `chol_Q (n, q)`, `C (1, n)` and names of its states.

    `A`, `chol_Q` and `C` may have a time axis in front: with uneven times, or with regressors. `unit` `(n,)` is the
    size of the states where it is not the spread of the data. `free` says that the states have no distribution of
    their own before the data, so that their start may be diffuse.
    """

    m0: Array
    chol_P0: Array
    A: Array
    chol_Q: Array
    C: Array
    names: tuple[str, ...]
    unit: Any = None
    free: bool = False


def stack(blocks: list[Block]) -> Block:
    """The sum of independent components."""
    return Block(
        jnp.concatenate([b.m0 for b in blocks]),
        jsl.block_diag(*[b.chol_P0 for b in blocks]),
        _block_diagonal([b.A for b in blocks]),
        _block_diagonal([b.chol_Q for b in blocks]),
        _beside([b.C for b in blocks]),
        tuple(name for b in blocks for name in b.names),
    )


def _block_diagonal(parts: list[Array]) -> Array:
    """Matrices side by side, at every time where one of them has a time axis."""
    timed = [len(part) for part in parts if part.ndim == 3]
    if not timed:
        return jsl.block_diag(*parts)
    return jax.vmap(jsl.block_diag)(*[jnp.broadcast_to(part, (timed[0], *part.shape[-2:])) for part in parts])


def _beside(parts: list[Array]) -> Array:
    """Emissions side by side, at every time where one of them has a time axis."""
    timed = [len(part) for part in parts if part.ndim == 3]
    parts = [jnp.broadcast_to(part, (timed[0], *part.shape[-2:])) for part in parts] if timed else parts
    return jnp.concatenate(parts, axis=-1)


def level_block(scale: Scale) -> Block:
    """A random walk, `level_t = level_{t-1} + w_t`, with `sigma_level ~ HalfNormal(spread)`."""
    sigma = numpyro.sample("sigma_level", HalfNormal(scale.spread))
    one = jnp.ones((1, 1))
    return Block(scale.location[None], 10 * scale.spread * one, one, scale.noise(sigma, 1), one, ("level",), free=True)


def trend_block(scale: Scale) -> Block:
    """A random walk whose step is itself a random walk, `level_t = level_{t-1} + slope_{t-1} + w_t`.

    `sigma_level ~ HalfNormal(spread)`, `sigma_slope ~ HalfNormal(spread / 10)`; the first slope is within a spread.
    Between uneven times the slope is a Brownian motion that carries the level along.
    """
    sigma_level = numpyro.sample("sigma_level", HalfNormal(scale.spread))
    sigma_slope = numpyro.sample("sigma_slope", HalfNormal(0.1 * scale.spread))
    A, chol_Q = jnp.array([[1.0, 1.0], [0.0, 1.0]]), jnp.diag(jnp.stack([sigma_level, sigma_slope]))
    if scale.gaps is not None:
        gap, none = scale.gaps, jnp.zeros_like(scale.gaps)
        A = jnp.stack([none + 1, gap, none, none + 1], axis=1).reshape(-1, 2, 2)
        rows = sigma_slope * gap / 3**0.5, sigma_slope * (none + 0.75**0.5), none + 0.5 * sigma_slope
        columns = jnp.stack([none + sigma_level, rows[0], none, none, rows[1], rows[2]], axis=1)
        chol_Q = jnp.sqrt(gap)[:, None, None] * columns.reshape(-1, 2, 3)
    return _level_and_slope(scale, A, chol_Q)


def _level_and_slope(scale: Scale, A: Array, chol_Q: Array) -> Block:
    first = jnp.stack([scale.location, jnp.zeros_like(scale.location)])
    spread = jnp.diag(jnp.stack([10 * scale.spread, scale.spread]))
    return Block(first, spread, A, chol_Q, jnp.array([[1.0, 0.0]]), ("level", "slope"), free=True)


def damped_trend_block(scale: Scale) -> Block:
    """A level with a slope that dies out, `slope_t = phi slope_{t-1} + v_t`; the level is as in `trend_block`.

    Priors as in `trend_block`, and `trend_damping` (`phi`) `~ Beta(18, 2)`. Between uneven times the slope is an
    Ornstein-Uhlenbeck process that carries the level along, at a rate by which a step of one is the one above; the
    slope's own noise then moves the level within the steps too.
    """
    sigma_level = jnp.asarray(numpyro.sample("sigma_level", HalfNormal(scale.spread)))
    sigma_slope = jnp.asarray(numpyro.sample("sigma_slope", HalfNormal(0.1 * scale.spread)))
    phi = jnp.asarray(numpyro.sample("trend_damping", dist.Beta(18.0, 2.0)))
    zero, one = jnp.zeros_like(phi), jnp.ones_like(phi)
    if scale.gaps is None:
        A, chol_Q = jnp.array([[one, one], [zero, phi]]), jnp.diag(jnp.stack([sigma_level, sigma_slope]))
    else:
        decay = -jnp.log(phi)
        F = jnp.array([[zero, decay / (1 - phi)], [zero, -decay]])
        L = jnp.diag(jnp.stack([sigma_level, sigma_slope * jnp.sqrt(2 * decay / (1 - phi**2))]))
        A, chol_Q = jax.vmap(lambda gap: discretise(F, L, gap))(scale.gaps)
    return _level_and_slope(scale, A, chol_Q)


def dummy_seasonal_block(scale: Scale, period: int, label: str = "") -> Block:
    """Seasonal effects that sum to white noise over a period, `s_t = -(s_{t-1} + ... + s_{t-period+1}) + w_t`.

    State of size `period - 1`, one noise: a singular `Q`. `sigma_seasonal<label> ~ HalfNormal(spread / 10)`.
    """
    sigma = numpyro.sample(f"sigma_seasonal{label}", HalfNormal(0.1 * scale.spread))
    n = period - 1
    transition, names = dummy_pattern(period, label)
    first = jnp.eye(n)[:, :1]
    return Block(jnp.zeros(n), scale.spread * jnp.eye(n), transition, sigma * first, first.T, names, free=True)


def dummy_pattern(period: int, label: str = "") -> tuple[Array, tuple[str, ...]]:
    """Transition and names of the states of free seasonal effects; the noise enters the first state, which is seen."""
    n = period - 1
    names = (f"seasonal{label}", *(f"seasonal{label}_lag{i}" for i in range(1, n)))
    return jnp.concatenate([-jnp.ones((1, n)), jnp.eye(n - 1, n)]), names


def harmonic_seasonal_block(scale: Scale, period: float, waves: int | tuple[int, ...], label: str = "") -> Block:
    """Seasonal pattern as a sum of slowly turning waves: multiples of one frequency, the first so many or those given.

    Any period, whole or not (365.25 / 7 weeks). `sigma_seasonal<label> ~ HalfNormal(spread / 10)`, one for all waves.
    The wave of half the period's steps changes its sign at every step and is one state, so that a full pattern of an
    even period has `period - 1` of them.
    """
    sigma = numpyro.sample(f"sigma_seasonal{label}", HalfNormal(0.1 * scale.spread))
    multiples = tuple(range(1, waves + 1)) if isinstance(waves, int) else waves
    transition, seen, names = wave_pattern(scale, period, multiples, label)
    n = len(names)
    return Block(jnp.zeros(n), scale.spread * jnp.eye(n), transition, scale.noise(sigma, n), seen, names, free=True)


def wave_pattern(
    scale: Scale, period: float, multiples: tuple[int, ...], label: str = ""
) -> tuple[Array, Array, tuple[str, ...]]:
    """Transition, emission `(1, n)` and names of the states of waves; each state has a noise of its own."""
    turns, seen, names = [], [], []
    for k in multiples:
        names.append(f"seasonal{label}_{k}")
        seen.append(1.0)
        if 2 * k == period and scale.gaps is None:
            turns.append(-jnp.ones((1, 1)))
            continue
        turns.append(scale.turn(2 * jnp.pi * k / period))
        names.append(f"seasonal{label}_phase_{k}")
        seen.append(0.0)
    return _block_diagonal(turns), jnp.array([seen]), tuple(names)


def cycle_block(scale: Scale, shortest: float, longest: float) -> Block:
    """A damped stochastic cycle, stationary, of unknown period.

    `cycle_period ~ LogUniform(shortest, longest)` in time steps (units of time), `cycle_damping ~ Beta(8, 2)`,
    `sigma_cycle ~ HalfNormal(spread)`.
    """
    period = numpyro.sample("cycle_period", dist.LogUniform(shortest, longest))
    damping = numpyro.sample("cycle_damping", dist.Beta(8.0, 2.0))
    sigma = numpyro.sample("sigma_cycle", HalfNormal(scale.spread))
    stationary = sigma / jnp.sqrt(1 - damping**2)
    kept, chol_Q = damping, sigma * jnp.eye(2)
    if scale.gaps is not None:
        log_kept = scale.gaps * jnp.log(damping)
        kept = jnp.exp(log_kept)[:, None, None]
        chol_Q = stationary * safe_sqrt(-jnp.expm1(2 * log_kept))[:, None, None] * jnp.eye(2)
    return Block(
        jnp.zeros(2),
        stationary * jnp.eye(2),
        kept * scale.turn(2 * jnp.pi / period),
        chol_Q,
        jnp.array([[1.0, 0.0]]),
        ("cycle", "cycle_phase"),
    )


def matern_block(scale: Scale, smoothness: float, shortest: ArrayLike, longest: ArrayLike) -> Block:
    """A stationary Gaussian process with a Matern covariance, see `pssm.sde.matern`.

    `matern_length ~ LogUniform(shortest, longest)` in units of time, `sigma_matern ~ HalfNormal(spread)`.
    """
    length = numpyro.sample("matern_length", dist.LogUniform(shortest, longest))
    sigma = numpyro.sample("sigma_matern", HalfNormal(scale.spread))
    unit = matern(length, jnp.ones_like(sigma), smoothness=smoothness)
    if scale.gaps is None:
        A, chol_Q = discretise(unit.F, unit.L, 1.0)
    else:
        A, chol_Q = jax.vmap(lambda gap: discretise(unit.F, unit.L, gap))(scale.gaps)
    names = ("matern", "matern_slope", "matern_curvature")[: len(unit.m0)]
    return Block(unit.m0, sigma * semidefinite_cholesky(unit.P0), A, sigma * chol_Q, unit.C, names)


def safe_sqrt(x: Array) -> Array:
    """The root of a number that is not negative, with a derivative of zero at zero."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def autoregressive_block(scale: Scale, order: int) -> Block:
    """A stationary autoregression of mean zero in companion form; one noise, so `Q` is singular for `order > 1`.

    Partial autocorrelations `ar_partial ~ Uniform(-1, 1)` (every point is stationary), innovations
    `sigma_ar ~ HalfNormal(spread)`. The first state has the stationary distribution.
    """
    prior = dist.Uniform(-1.0, 1.0).expand([order]).to_event(1)
    partial = numpyro.sample("ar_partial", prior, infer={"dims": {"ar_partial": ("lag",), "phi": ("lag",)}})
    sigma = numpyro.sample("sigma_ar", HalfNormal(scale.spread))
    phi, chol_P0 = stationary_autoregression(partial, sigma)
    numpyro.deterministic("phi", phi)
    companion = jnp.concatenate([phi[None], jnp.eye(order - 1, order)])
    first = jnp.eye(order)[:, :1]
    names = ("ar", *(f"ar_lag{i}" for i in range(1, order)))
    return Block(jnp.zeros(order), chol_P0, companion, sigma * first, first.T, names)


def stationary_autoregression(partial: Array, sigma: Array) -> tuple[Array, Array]:
    """Coefficients and stationary covariance factor from partial autocorrelations (Durbin-Levinson recursion).

    Args:
        partial: partial autocorrelations in (-1, 1), `(order,)`.
        sigma: standard deviation of the innovations.

    Returns:
        `phi` `(order,)`, and a lower-triangular factor `(order, order)` of the covariance of `order` neighbours.

    Source:
        Barndorff-Nielsen & Schou 1973; Monahan 1984.
    """
    order = partial.shape[0]
    sd = sigma / jnp.sqrt(jnp.prod(1 - partial**2))  # of a single value
    phi = jnp.zeros(0, partial.dtype)
    rows = [jnp.zeros(order, partial.dtype).at[0].set(sd)]
    for k in range(1, order + 1):
        r = partial[k - 1]
        phi = jnp.concatenate([phi - r * phi[::-1], r[None]])
        sd = sd * jnp.sqrt(1 - r**2)
        if k < order:  # x_{k+1} = phi . (x_k, ..., x_1) + sd e: one more row of the factor
            rows.append((phi[::-1] @ jnp.stack(rows)).at[k].set(sd))
    return phi, jnp.stack(rows)


def _rotation(angle: Array) -> Array:
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cos, sin]), jnp.stack([-sin, cos])])
